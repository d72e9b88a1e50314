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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
LIMIT_S = 10
SLACK = 64 << 20
GOOD = ("same", "weights", "as told", "refused")

ODD = [None, True, False, -1, 0, 1, 2, 3, 7, 1e9, 10**9, 10**30, 2**63, 1.5, -0.0, 1e-9, 1e300, float("nan"), "", "x"]
ODD += ["../../x", "/etc/passwd", "\ud800", "a\0b", "x" * 5000, [], {}, [0], [[]], {"x": {}}, ["x", 1], [None] * 9]
WORDS = [0, 1, 2, 3, 8, 9, 31, 33, 255, 1 << 16, 1 << 31, 1 << 32, 1 << 40, 1 << 62, (1 << 63) - 1, (1 << 64) - 1]


# ---- changes --------------------------------------------------------------------------------------------------------


def change(case: Path, kind: str, rng: np.random.Generator) -> None:
    """Damages a file of a kind in the folder of a case."""
    name, how = KINDS[kind]
    files = sorted(case.glob(name))
    for _ in range(int(rng.integers(1, 4))):
        file = files[rng.integers(len(files))]
        data = file.read_bytes()
        # Structure, where there is one, in two cases of three: bits alone seldom leave anything to be read.
        file.write_bytes(how(data, rng) if rng.random() < 0.67 else _bytes(data, rng))


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
        case 3 if isinstance(holder[key], int | float):
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
    header = _json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


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


def _lines(data: bytes, rng: np.random.Generator) -> bytes:
    lines = data.splitlines()
    at = int(rng.integers(len(lines)))
    return b"\n".join([*lines[:at], _json(lines[at], rng), *lines[at + 1 :]]) + b"\n"


KINDS = {  # kind -> (files, how they are changed)
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
    "rows": ("results/table.jsonl", _lines),
    "sweep": ("results/sweep.json", _json),
    "trial": ("results/trials/*/trial.json", _json),
}


# ---- the process that reads -----------------------------------------------------------------------------------------


def worker(templates: Path) -> None:
    """Reads cases told on standard input, one JSON line each, and tells what they came to."""
    sys.path.insert(0, str(ROOT))
    import readers

    good = readers.Good(templates)
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

    def __init__(self, templates: Path, limit_s: float = LIMIT_S):
        self._limit_s = limit_s
        self._command = [sys.executable, __file__, "--worker", str(templates)]
        self._start()

    def _start(self) -> None:
        quiet = os.environ | {"RUST_BACKTRACE": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}
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
        subprocess.run([sys.executable, str(ROOT / "tests" / "readers.py"), str(templates)], check=True, cwd=ROOT)
        reader = Reader(templates)
        try:
            for number in range(cases):
                kind = kinds[number % len(kinds)]
                case = Path(temporary) / "case"
                _copy(templates, case, KINDS[kind][0].split("/")[0])
                change(case, kind, np.random.default_rng([seed, number]))
                outcome, why = reader.read(case, kind)
                outcomes[kind][outcome] += 1
                if outcome not in GOOD:
                    print(f"case {number} of seed {seed}, {kind}: {outcome} {why}", file=sys.stderr)
                    if keep:
                        shutil.copytree(case, keep / f"{seed}-{number}", dirs_exist_ok=True)
                shutil.rmtree(case)
        finally:
            reader.close()
    return outcomes


def _copy(templates: Path, case: Path, part: str) -> None:
    case.mkdir()
    if (templates / part).is_dir():
        shutil.copytree(templates / part, case / part)
    else:
        shutil.copy(templates / part, case / part)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cases", type=int, default=4000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    options.add_argument("--keep", type=Path, help="a folder for the cases that ended otherwise than they may")
    options.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.worker:
        worker(given.worker)
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
