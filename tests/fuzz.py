"""Damaged files of every kind that jquant reads, and what becomes of them.

    python tests/fuzz.py --cases 4000 --seed 0

Each case takes one good file, changes it (flipped bits, cuts, JSON and header fields of other types, sizes and places),
and has another process read it. That may end in

    same      what the good file holds
    weights   other weights, everything else the same: bytes without a checksum of their own
    as told   another setting, which is the one that the file now says, by a reader that is not ours
    refused   an InputError of one sentence

and in nothing else: no other exception, no answer after LIMIT_S seconds, no allocation of more than three times the
files' size beside SLACK (what the interpreter and jax take for themselves), no setting that the file does not say.
"""

import argparse
import collections
import json
import os
import re
import resource
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
LIMIT_S = 20
SLACK = 64 << 20
GOOD = ("same", "weights", "as told", "refused")

ODD = [None, True, False, -1, 0, 1, 2, 3, 7, 1e9, 10**9, 10**30, 2**63, 1.5, -0.0, 1e-9, 1e300, float("nan"), "", "x"]
ODD += ["../../x", "/etc/passwd", "\ud800", "a\0b", "x" * 5000, [], {}, [0], [[]], {"x": {}}, ["x", 1], [None] * 9]
ODD += [10**400, "(a+)+$", "re:(.*.*)*x", "(.|.)*" * 9 + "!", ["(([a-z.0-9]+)+)+!"], "(" * 999, ["x" * 5000], "a\nb"]
WORDS = [0, 1, 2, 3, 8, 9, 31, 33, 255, 1 << 16, 1 << 31, 1 << 32, 1 << 40, 1 << 62, (1 << 63) - 1, (1 << 64) - 1]


# ---- changes --------------------------------------------------------------------------------------------------------


def change(case: Path, kind: str, rng: np.random.Generator) -> None:
    """Damages a file of a kind in the folder of a case."""
    name, how = KINDS[kind]
    files = sorted(path for path in case.glob(name) if path.is_file())
    for _ in range(int(rng.integers(1, 4))):
        file = files[rng.integers(len(files))]
        data = file.read_bytes()
        # Structure, where there is one, mostly: bits alone seldom leave anything to be read.
        file.write_bytes(how(data, rng) if rng.random() < (0.9 if kind in DEEP else 0.67) else _bytes(data, rng))
    if kind in FORGED and rng.random() < 0.7:
        _forge(case)


def _bytes(data: bytes, rng: np.random.Generator, head: int = 0) -> bytes:
    """Bits flipped, a piece overwritten, cut out, doubled or cut off; mostly in the first `head` bytes."""
    end = head if head and rng.random() < 0.9 else len(data)
    if not data:
        return b"\0"
    at, size = int(rng.integers(max(end, 1))), int(rng.integers(1, 24))
    match int(rng.integers(6)):
        case 0 | 1:
            return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
        case 2:
            return data[:at] + rng.bytes(size) + data[at + size :]
        case 3:
            return data[:at] + data[at + size :]
        case 4:
            return data[:at] + data[at : at + size] + data[at:]
        case _:
            return data[:at]


def _json(data: bytes, rng: np.random.Generator) -> bytes:
    """Something in a JSON file replaced, left out, renamed, exchanged, or buried under brackets."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return _bytes(data, rng)
    if rng.random() < 0.02:
        return b"[" * 100_000
    holder, key = _place(content, rng)
    if holder is None:
        content = ODD[rng.integers(len(ODD))]
    else:
        _replace(holder, key, rng)
    return json.dumps(content).encode()


def _place(node: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    """A random member, and the object or list that holds it; seldom deep in a long list."""
    holder, key = None, None
    while isinstance(node, dict | list) and node and (holder is None or rng.random() < 0.7):
        keys = list(node) if isinstance(node, dict) else range(len(node))
        holder, key = node, keys[int(rng.integers(len(keys)))]
        node = node[key]
    return holder, key


def _replace(holder: Any, key: Any, rng: np.random.Generator) -> None:
    match int(rng.integers(8)):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[ODD[-1][0] or "x" + str(key)] = holder.pop(key)
        case 2:
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            other = keys[int(rng.integers(len(keys)))]
            holder[key], holder[other] = holder[other], holder[key]
        case 3 if isinstance(holder[key], int | float) and abs(holder[key]) < 1e300:
            holder[key] = holder[key] * float(rng.choice([-1, 0.5, 2, 1.01])) + int(rng.integers(-1, 2))
        case 4 if isinstance(holder[key], int):
            holder[key] = int(holder[key]) + int(rng.integers(-2, 3))
        case _:
            holder[key] = ODD[rng.integers(len(ODD))]


def _safetensors(data: bytes, rng: np.random.Generator) -> bytes:
    """A header with another structure, its length told as it is, or not."""
    (length,) = struct.unpack_from("<Q", data.ljust(8))
    if rng.random() < 0.1 or length + 8 > len(data):
        return struct.pack("<Q", int(rng.choice(np.array(WORDS, np.uint64)))) + data[8:]
    if rng.random() < 0.5:
        return _tensors(data, rng)
    header = _json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


SHAPES = [[], [0], [1], [0, 2**62], [2**31, 0], [1] * 70, [2**63], [-1], [0] * 3]
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3"]
DTYPES += ["I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "C64"]


def _tensors(data: bytes, rng: np.random.Generator) -> bytes:
    """One tensor renamed, left out, or of another type, shape, size or content; header and offsets fit the file."""
    try:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        facts = {"__metadata__": header.pop("__metadata__", {})}
        places = {name: slice(*(8 + length + at for at in of["data_offsets"])) for name, of in header.items()}
        parts = {name: data[place] for name, place in places.items()}
        # Statistics and settings beside a weight's codes as often as all weights together.
        small = [name for name in header if not name.endswith("weight")]
        _change_tensor(header, parts, str(rng.choice(small if small and rng.random() < 0.5 else sorted(header))), rng)
        at = 0
        for name, part in parts.items():
            header[name]["data_offsets"] = [at, at + len(part)]
            at += len(part)
        text = json.dumps(facts | header).encode()
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError, OverflowError, struct.error):
        return _bytes(data, rng)  # damaged before
    return struct.pack("<Q", len(text)) + text + b"".join(parts.values())


def _change_tensor(header: dict[str, Any], parts: dict[str, bytes], name: str, rng: np.random.Generator) -> None:
    entry, part, other = header[name], parts[name], str(rng.choice(sorted(header)))
    size = len(part) // max(1, int(np.prod(entry["shape"])))
    match int(rng.integers(9)):
        case 0:
            del header[name], parts[name]
        case 1:
            parts[name], parts[other] = parts[other], parts[name]
            header[name], header[other] = header[other], header[name]
        case 2:
            entry["dtype"] = str(rng.choice(DTYPES))
        case 3:
            entry["shape"] = SHAPES[rng.integers(len(SHAPES))]
        case 4:
            entry["shape"] = [*entry["shape"][::-1], *[1] * int(rng.integers(2))]
        case 5:  # another number of rows, and the bytes that belong to it
            rows, *rest = entry["shape"] or [1]
            rows = max(0, int(rng.choice([0, 1, rows - 1, rows + 1, 2 * rows, rows // 2])))
            wanted = min(rows * size * int(np.prod(rest)), 1 << 20)
            entry["shape"], parts[name] = [rows, *rest], part.ljust(wanted, b"\1")[:wanted]
        case 6:  # the least or largest number, infinity, NaN
            fill = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\x7c\0\x7c", b"\0\0\x80\x7f", b"\x7f\x7f\x7f\x7f"]
            parts[name] = (fill[rng.integers(len(fill))] * (len(part) // 4 + 1))[: len(part)]
        case 7 if part[:1] == b"{":  # bitsandbytes' settings
            parts[name] = _json(part, rng)
            entry["shape"] = [len(parts[name])]
        case _:
            parts[name] = _bytes(part, rng)[: len(part)].ljust(len(part), b"\0")


def _quantization(data: bytes, rng: np.random.Generator) -> bytes:
    """Something in quantization_config replaced, left out, renamed or exchanged."""
    try:
        content = json.loads(data)
        inner = _json(json.dumps(content["quantization_config"]).encode(), rng)
        return json.dumps(content | {"quantization_config": json.loads(inner)}).encode()
    except (ValueError, RecursionError, LookupError, TypeError):
        return _json(data, rng)


OUTSIDE = [
    "../sharded/model-00001-of-00004.safetensors",
    "./model-00001-of-00004.safetensors",
    "/etc/passwd",
    "/dev/zero",
]
OUTSIDE += [
    "up/sharded/model-00002-of-00004.safetensors",
    "up",
    "loop.safetensors",
    "zero.safetensors",
    "..",
    ".",
    "",
    "~",
]
OUTSIDE += [
    "..\\x",
    "a\0b",
    "\ud800",
    "model-00001-of-00004.safetensors/",
    "//model-00001-of-00004.safetensors",
    "x" * 5000,
]


def _names(data: bytes, rng: np.random.Generator) -> bytes:
    """Shards of an index renamed to what lies outside the folder."""
    try:
        content = json.loads(data)
        names = content["weight_map"]
        shard, outside = str(rng.choice(sorted(set(names.values())))), OUTSIDE[rng.integers(len(OUTSIDE))]
        every = rng.random() < 0.5
        moved = {
            name: outside if value == shard and (every or rng.random() < 0.2) else value
            for name, value in names.items()
        }
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return _json(data, rng)
    return json.dumps(content | {"weight_map": moved}).encode()


def _gguf(data: bytes, rng: np.random.Generator) -> bytes:
    """A length, count, kind, number or offset of the header replaced; sometimes bits of it."""
    head = data.find(b"\0" * 33, 64)
    head = min(head if head > 0 else len(data), len(data) - 8)
    # Most fields follow a name: the kind of a value four bytes, the value itself some more.
    names = [found.end() for found in re.finditer(rb"[a-z_.0-9]{6,}", data[:head])]
    if rng.random() < 0.4 or not names:
        return _bytes(data, rng, head)
    at = int(rng.choice(names)) + int(rng.choice([-40, 0, 4, 8, 12, 16, 20, 24]))
    at = min(max(at, 4), len(data) - 8)
    word = struct.pack("<Q", int(rng.choice(np.array(WORDS, np.uint64))))[: int(rng.choice([1, 4, 8]))]
    return data[:at] + word + data[at + len(word) :]


def _fields(data: bytes, rng: np.random.Generator) -> bytes:
    """One value of a GGUF header replaced, or an array's members; written back by the gguf package."""
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.gguf").write_bytes(data)
        try:
            read = gguf.GGUFReader(Path(folder) / "x.gguf")
            values = {name: of.contents() for name, of in read.fields.items() if not name.startswith("GGUF.")}
            kinds = {name: of.types for name, of in read.fields.items()}
            name = str(rng.choice(sorted(values)))
            values[name] = _other(values[name], rng)
            writer = gguf.GGUFWriter(Path(folder) / "y.gguf", str(values.pop("general.architecture")))
            for key, value in values.items():
                kind = kinds[key][0] if key != name else gguf.GGUFValueType.get_type(value)
                writer.add_key_value(
                    key, value, kind, kinds[key][-1] if kind == gguf.GGUFValueType.ARRAY and value == [] else None
                )
            for tensor in read.tensors:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            return (Path(folder) / "y.gguf").read_bytes()
        except (
            ValueError,
            TypeError,
            IndexError,
            KeyError,
            OverflowError,
            struct.error,
            MemoryError,
        ):  # can't be written
            return _gguf(data, rng)


def _other(value: Any, rng: np.random.Generator) -> Any:
    """Another value for a header's key: of another type, or an array of another length or with other members."""
    odd = [
        -1,
        0,
        1,
        3,
        255,
        1 << 20,
        1 << 31,
        0.5,
        -1.0,
        float("nan"),
        1e30,
        True,
        "",
        "x",
        "gpt2",
        "a b c",
        "x" * 5000,
    ]
    odd += [[1, 2], ["x"], [0.5], ["x"] * 400, [1 << 40], [-1] * 320, [float("nan")] * 18, [True]]
    if not isinstance(value, list) or not value or rng.random() < 0.2:
        return odd[rng.integers(len(odd))]
    at, same = int(rng.integers(len(value))), [one for one in odd if type(one) is type(value[0])]
    match int(rng.integers(5)):
        case 0:
            return value[:at] or value
        case 1:
            return value + value[at:]
        case 2:
            return value[::-1]
        case 3:
            return [*value[:at], value[rng.integers(len(value))], *value[at + 1 :]]
        case _:
            return [*value[:at], same[rng.integers(len(same))], *value[at + 1 :]]


def _sealed(data: bytes, rng: np.random.Generator) -> bytes:
    """A file of our own changed and, half the time, given the checksum that fits."""
    changed = _json(data, rng)
    try:
        content = json.loads(changed)
        if rng.random() < 0.5 or not isinstance(content, dict):
            return changed
        content.pop("sha256", None)
        return _with_checksum(content)
    except (ValueError, RecursionError):  # not JSON, NaN, half a surrogate pair
        return changed


def _with_checksum(content: dict[str, Any]) -> bytes:
    from jquant.io.checkpoint import write_sealed

    with tempfile.TemporaryDirectory() as folder:
        write_sealed(Path(folder) / "x.json", content)
        return (Path(folder) / "x.json").read_bytes()


def _forge(case: Path) -> None:
    """Gives every file of a checkpoint the checksum that fits, as its manifest and items have them."""
    from jquant.io.checkpoint import checksum

    for path in [*case.rglob("item.json"), *case.rglob("manifest.json")]:
        try:
            content = json.loads(path.read_bytes())
            content.pop("sha256")
            content["files"] = {name: checksum(path.parent / name) for name in content["files"]}
            path.write_bytes(_with_checksum(content))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # itself what was damaged
            continue


def _texts(data: bytes, rng: np.random.Generator) -> bytes:
    """A JSON file, one with an object on each line, or a text that is neither."""
    return _lines(data, rng) if data.startswith(b'{"step"') else _json(data, rng)


def _lines(data: bytes, rng: np.random.Generator) -> bytes:
    lines = data.splitlines()
    at = int(rng.integers(len(lines)))
    return b"\n".join([*lines[:at], _json(lines[at], rng), *lines[at + 1 :]]) + b"\n"


How = Callable[[bytes, np.random.Generator], bytes]
KINDS: dict[str, tuple[str, How]] = {  # kind -> (files, how they are changed); of several folders one, in turn
    "config.json": ("folder/config.json", _json),
    "safetensors": ("folder/model.safetensors", _safetensors),
    "index": ("sharded/model.safetensors.index.json", _json),
    "shard": ("sharded/model-*.safetensors", _safetensors),
    "tokenizer.json": ("folder/tokenizer.json", _json),
    "token settings": ("folder/*er*_config.json", _json),
    "gguf": ("x.gguf", _gguf),
    "gguf sentencepiece": ("words.gguf", _gguf),
    "manifest": ("quantized/manifest.json", _sealed),
    "item": ("quantized/*/*/item.json", _sealed),
    "arrays": ("quantized/*/*/*/*", _json),
    "checkpoint words": ("quantized/tokenizer.json", _json),
    "packed settings": ("packed-*/config.json", _quantization),
    "packed tensors": ("packed-*/model.safetensors", _tensors),
    "index names": ("sharded/model.safetensors.index.json", _names),
    "vocabulary": ("vocabulary/[vmt]*", _json),
    "gguf fields": ("x.gguf", _fields),
    "gguf tokens": ("words.gguf", _fields),
    "source": ("saved/source.json", _json),
    "calibration": ("saved/calibration.safetensors", _safetensors),
    "adapter settings": ("adapter/adapter_config.json", _json),
    "adapter tensors": ("adapter/*.safetensors", _safetensors),
    "journal": ("journal/*.json*", _texts),
    "training state": ("journal/state/*/item.json", _sealed),
    "training arrays": ("journal/state/*/*/*", _json),
    "rows": ("results/table.jsonl", _lines),
    "sweep": ("results/sweep.json", _json),
    "trial": ("results/trials/*/trial.json", _json),
}
# Kinds whose structure has much behind it.
DEEP = ("packed settings", "packed tensors", "index names", "gguf fields", "gguf tokens", "adapter settings", "source")
FORGED = ("arrays", "checkpoint words", "source", "calibration", "training arrays")  # files with a checksum elsewhere


# ---- the process that reads -----------------------------------------------------------------------------------------


def worker(templates: Path, kinds: Sequence[str]) -> None:
    """Reads cases told on standard input, one JSON line each, and tells what they came to."""
    import readers

    good = readers.Good(templates, sorted({path.name for kind in kinds for path in _parts(templates, kind)}))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        told = json.loads(line)
        outcome, why = good.read(Path(told["case"]), told["kind"], limited)
        print(json.dumps({"outcome": outcome, "why": why[:300]}), flush=True)


@contextmanager
def limited(case: Path) -> Iterator[None]:
    """Refuses this process memory beyond what it has, three times the files' sizes, and SLACK."""
    size = sum(path.stat().st_size for path in case.rglob("*") if path.is_file())
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + 3 * size + SLACK, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _data_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmData")).split()[1]) * 1024


class Reader:
    """The process, started anew where it hangs or dies."""

    def __init__(self, templates: Path, kinds: Sequence[str], limit_s: float = LIMIT_S):
        self._limit_s = limit_s
        self._command = [sys.executable, __file__, "--worker", str(templates), "--kinds", *kinds]
        self._start()

    def _start(self) -> None:
        quiet = _environment() | {"RUST_BACKTRACE": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=quiet
        )
        self._answer(300)

    def read(self, case: Path, kind: str) -> tuple[str, str]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"case": str(case), "kind": kind}).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._answer(self._limit_s)
        if isinstance(answer, dict):
            return answer["outcome"], answer["why"]
        self._process.kill()
        self._process.wait()
        self._start()
        return answer, ""

    def _answer(self, seconds: float) -> Any:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return "hang"
        line = self._process.stdout.readline()
        return json.loads(line) if line else "crash"

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def run(
    cases: int, seed: int, keep: Path | None = None, kinds: Sequence[str] = tuple(KINDS)
) -> dict[str, collections.Counter]:
    """Outcomes by kind; cases that end otherwise than they may are told, and kept in a folder if there is one."""
    outcomes = {kind: collections.Counter() for kind in kinds}
    with tempfile.TemporaryDirectory() as temporary:
        templates = Path(temporary) / "good"
        write = [sys.executable, str(ROOT / "tests" / "readers.py"), str(templates)]
        subprocess.run(write, check=True, cwd=ROOT, env=_environment())
        reader = Reader(templates, kinds)
        try:
            for number in range(cases):
                kind = kinds[number % len(kinds)]
                case = Path(temporary) / "case"
                parts = _parts(templates, kind)
                _copy(templates, case, parts[number // len(kinds) % len(parts)].name)
                change(case, kind, np.random.default_rng([seed, number]))
                outcome, why = reader.read(case, kind)
                outcomes[kind][outcome] += 1
                if outcome not in GOOD:
                    print(f"case {number} of seed {seed}, {kind}: {outcome} {why}", file=sys.stderr)
                    if keep:
                        shutil.copytree(case, keep / f"{seed}-{number}", symlinks=True, dirs_exist_ok=True)
                shutil.rmtree(case)
        finally:
            reader.close()
    return outcomes


def _environment() -> dict[str, str]:
    """As the tests': most of the time is compilation of tiny programs, and what was compiled is kept."""
    from jquant.cache_folder import cache_dir

    return os.environ | {
        "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache_dir() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def _parts(templates: Path, kind: str) -> list[Path]:
    """The templates that have files of a kind."""
    return sorted(templates.glob(KINDS[kind][0].split("/")[0]))


def _copy(templates: Path, case: Path, part: str) -> None:
    case.mkdir()
    if (templates / part).is_dir():
        shutil.copytree(templates / part, case / part, symlinks=True)
    else:
        shutil.copy(templates / part, case / part)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cases", type=int, default=4000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    options.add_argument("--keep", type=Path, help="a folder for the cases that ended otherwise than they may")
    options.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.worker:
        worker(given.worker, given.kinds)
        return 0
    begin = time.perf_counter()
    outcomes = run(given.cases, given.seed, given.keep, given.kinds)
    bad = sorted({name for counts in outcomes.values() for name in counts} - set(GOOD))
    columns = [*GOOD, *bad]
    print("| file | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns))
    for kind, counts in outcomes.items():
        print(f"| {kind} | " + " | ".join(str(counts[name]) for name in columns) + " |")
    total = sum(outcomes.values(), collections.Counter())
    print("| all | " + " | ".join(str(total[name]) for name in columns) + " |")
    print(f"\n{given.cases} cases, seed {given.seed}, {time.perf_counter() - begin:.0f} s.")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
