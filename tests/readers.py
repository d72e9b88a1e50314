"""What `fuzz` has read: one good file of every kind, and each kind's reader with what its answer is compared with.

The oracles are not jquant's: json for what a config.json says, the gguf package for headers, tokenizers for tokenizers.
"""

import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from jquant.errors import InputError  # noqa: E402

TEXT = "abcd efgh, aé. <s>"
HF = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "context_length",
    "tie_word_embeddings": "tied",
}
GGUF = {
    "llama.embedding_length": "hidden",
    "llama.feed_forward_length": "ffn",
    "llama.block_count": "layers",
    "llama.attention.head_count": "heads",
    "llama.attention.head_count_kv": "kv_heads",
    "llama.attention.layer_norm_rms_epsilon": "norm_eps",
    "llama.context_length": "context_length",
    "llama.rope.freq_base": "rope_base",
}


# What links in a folder of shards lead to: other folders, themselves, and files that never end.
LINKS = {"up": "..", "loop.safetensors": "loop.safetensors", "zero.safetensors": "/dev/zero"}

# What the tests of `fuzz` itself have a reader do.
TRAPS: dict[str, Callable[[], Any]] = {
    "hang": lambda: time.sleep(1000),
    "memory": lambda: np.empty(1 << 30, np.uint8),
    "escape": lambda: {}["key"],
    "crash": os.abort,
    "good": lambda: {},
}


def write(templates: Path) -> None:
    """A good file of every kind, written by transformers, gguf and, where they are its own, jquant."""
    import checkpoints
    import gguf

    small = checkpoints.llama(num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=2)
    templates.mkdir()
    checkpoints.save(templates / "folder", small)
    (templates / "folder" / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}"})
    )
    checkpoints.save(templates / "sharded", small, max_shard_size="50KB")
    checkpoints.write_gguf(templates / "x.gguf", small)
    words = gguf.GGUFWriter(templates / "words.gguf", "llama")
    words.add_tokenizer_model("llama")
    words.add_token_list(["<unk>", "<s>", "</s>", *"▁abcdefgh,é.", "ab", "cd", "abcd"])
    words.add_token_scores([0.0] * 15 + [-1.0, -2.0, -3.0])
    words.add_token_types([2, 3, 3] + [1] * 15)
    words.add_bos_token_id(1)
    words.write_header_to_file()
    words.write_kv_data_to_file()
    words.close()

    from jquant import NF4, Int, Method, double_quantized
    from jquant.io.load import open_model
    from jquant.pipeline.to_disk import quantize_to_folder

    source, double = open_model(templates / "folder"), Method(NF4(16, double_quantized()))
    quantize_to_folder(source, templates / "quantized", [(r"attention\.v", double), ("", Method(Int(4, 16)))])
    for lock in templates.rglob(".lock"):
        lock.unlink()
    _write_results(templates / "results")
    _write_vocabulary(templates / "vocabulary")
    _write_packed(templates)
    _write_journal(templates / "journal")
    for name, target in LINKS.items():
        (templates / "sharded" / name).symlink_to(target)


def _write_packed(templates: Path) -> None:
    """A small model in every layout of packed weights, an adapter of it, and what `save` writes of it."""
    import checkpoints

    from jquant import FP4, FP8_E4M3, MXFP4, NF4, NVFP4, Activation, Int, LoRA, add_adapters, double_quantized
    from jquant.io.adapters import save_adapters
    from jquant.io.export import write_folder
    from jquant.io.load import load_model
    from jquant.models.decoder import blocks, with_blocks
    from jquant.models.params import flat_params, with_params
    from jquant.qtensor import quantize
    from jquant.ranges import MinMax

    # All projections are 32 × 32: most of the time is compilation.
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    checkpoints.save(templates / "float", checkpoints.llama(num_hidden_layers=2, head_dim=16, **sizes))
    model = load_model(templates / "float", progress=False)
    layouts: dict[str, tuple[str, list[Any], Activation | None]] = {
        "gptq": ("gptq", [Int(4, 16, True, "float16"), Int(8, 16, True, "float16")], None),
        "gptq_v2": ("gptq_v2", [Int(3, 32, scale="float16")], None),
        "awq": ("awq", [Int(4, 16, scale="float16")], None),
        "int4": ("compressed-tensors", [Int(4, 16), Int(5, 32)], None),
        "int8": ("compressed-tensors", [Int(8, "channel", symmetric=True)], Activation()),
        "fp8": ("compressed-tensors", [FP8_E4M3(), FP8_E4M3((16, 16)), FP8_E4M3("tensor")], None),
        "fp4": ("compressed-tensors", [MXFP4, NVFP4], None),
        "nf4": ("bitsandbytes", [NF4(16, double_quantized())], None),
        "bnb": ("bitsandbytes", [FP4(32)], None),
    }
    for name, (layout, formats, activation) in layouts.items():
        layers = []
        for block in blocks(model.decoder):
            params = {path: leaf for path, leaf in flat_params(block).items() if path.endswith("kernel")}
            for turn, (path, leaf) in enumerate(params.items()):
                format = formats[turn % len(formats)]
                params[path] = replace(quantize(leaf, *MinMax()(leaf, format), format), activation=activation)
            layers.append(with_params(block, params))
        packed = replace(model, decoder=with_blocks(model.decoder, layers))
        write_folder(packed, templates / f"packed-{name}", layout)
    adapted = add_adapters(model, [(r"attention\.q", LoRA(2, 4.0)), (r"layers\.1\.mlp", LoRA(3, 6.0))])
    save_adapters(templates / "adapter", replace(adapted, calibrated_on=np.arange(5, dtype=np.uint64)))
    replace(model, calibrated_on=np.arange(5, dtype=np.uint64)).save(templates / "saved")


def _write_vocabulary(folder: Path) -> None:
    """A tokenizer as its vocabulary and merges, which transformers makes one of."""
    import checkpoints

    content = json.loads(checkpoints.tokenizer().to_str())["model"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["merges"]]
    (folder / "merges.txt").write_text("\n".join(merges))
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def _write_journal(folder: Path) -> None:
    from jquant.learning.journal import Journal, opened

    with opened(Journal(folder), lambda: RUN) as writer:
        assert writer is not None
        for step in (1, 2):
            writer.note(step, {"loss": 1.5, "tokens": 64 * step})
        writer.wrote(2, _state(), last=True)


RUN = {"method": {"type": "jquant.Method", "bits": 4}, "seed": 0, "model": "0123abcd", "rates": [0.1, 0.2]}


def _state() -> dict[str, Any]:
    import jax.numpy as jnp

    return {"weights": jnp.arange(6.0).reshape(2, 3), "steps": jnp.int32(2)}


def _write_results(folder: Path) -> None:
    """Rows as an experiment left them, and a sweep of one finished trial and one that failed."""
    from experiments.collect import TRIAL, trial_folder
    from jquant.io.files import write_json, write_text

    rows = (ROOT / "experiments/results/perplexity_table/table.jsonl").read_text().splitlines()[:3]
    write_text(folder / "table.jsonl", "\n".join(rows) + "\n")
    trials = [["method=rtn", "bits=4"], ["method=gptq", "bits=4"]]
    write_json(folder / "sweep.json", {"trials": trials})
    own = trial_folder(folder, trials[0])
    told = {"overrides": trials[0], "attempt": 1, "process": 7}
    write_json(own / TRIAL, told | {"rows": [json.loads(rows[0])["fingerprint"]]})
    write_text(own / "table.jsonl", rows[0] + "\n")
    write_json(trial_folder(folder, trials[1]) / TRIAL, told | {"failed": "no text"})


class Good:
    """What the good files of these parts of the templates hold, and how cases differ from it."""

    def __init__(self, templates: Path, parts: Sequence[str]):
        logging.disable(logging.WARNING)
        self._whole: dict[str, dict[str, Any]] = {"trap": {}}
        if parts:  # imported and loaded now: no case waits for it
            import transformers

            self._oracle = transformers.LlamaConfig()
        if "adapter" in parts:
            self._base = self._model(templates / "float")
        self._whole |= {part: self._load(part, templates) for part in parts}

    def read(self, case: Path, kind: str, limited: Callable[[Path], AbstractContextManager[None]]) -> tuple[str, str]:
        """The outcome, as `fuzz` tells them, and why; `limited` bounds the memory that the reading takes."""
        [part] = [path.name for path in case.iterdir()]
        try:
            with limited(case):
                found = self._load(part, case)
        except InputError as wrong:
            message = str(wrong)
            if "\n" in message or len(message) > 1000 or "\ud800" in message:
                return "no sentence", repr(message)
            return "refused", message
        except BaseException as escaped:
            return "escaped", f"{type(escaped).__name__}: {escaped}"
        good = self._whole[part]
        if kind == "index names" and not _inside(case / part):
            return "silent", "a file outside the folder was read"
        if found == good:
            return "same", ""
        settings = [key for key in good if key != "weights" and found[key] != good[key]]
        if not settings:
            return "weights", ""
        try:
            silent = [key for key in settings if not _says(kind, case / part, key, found)]
        except Exception as unsure:
            return "silent", f"{settings}: the oracle fails with {type(unsure).__name__}: {unsure}"
        return ("silent", f"{silent}") if silent else ("as told", f"{settings}")

    def _load(self, part: str, where: Path) -> dict[str, Any]:
        if part == "words.gguf":
            from jquant.io.tokenizer import tokenizer_from_gguf

            return _words(tokenizer_from_gguf(where / part))
        if part == "results":
            return _results(where / part)
        if part == "trap":
            return TRAPS[(where / part).read_text()]()
        if part == "vocabulary":
            from jquant.io.tokenizer import tokenizer_from_folder

            return _words(tokenizer_from_folder(where / part))
        if part == "journal":
            return _training(where / part)
        if part == "adapter":
            return _adapted(self._base, where / part)
        # Our own checkpoints hold what was written, checked by checksums alone.
        return _told(self._model(where / part), part in ("folder", "saved"), part not in ("quantized", "saved"))

    def _model(self, path: Path) -> Any:
        from jquant.io.load import load_model

        return load_model(path, progress=False)


def _told(model: Any, beside: bool, finite: bool) -> dict[str, Any]:
    """What is compared of a model that was loaded; with `beside` the files that an export would hand on, too."""
    from jquant.io.export.beside import files_beside

    _check(model, finite)
    files = files_beside(model, "float32", None) if beside else {}
    files.pop("tokenizer.json", None)
    seen = None if model.calibrated_on is None else model.calibrated_on.tolist()
    told = {"config": vars(model.config) | {}, "weights": _digest(model.decoder), "beside": files, "seen": seen}
    return told | _words(model.tokenizer)


def _check(model: Any, finite: bool) -> None:
    """Every parameter has the shape that the model's configuration gives it and, if asked, finite values."""
    import jax.numpy as jnp

    from jquant.models.decoder import parameter_shapes
    from jquant.models.params import flat_params
    from jquant.qtensor import QTensor, Transposed, dequantize

    shapes = parameter_shapes(model.config)
    for name, leaf in flat_params(model.decoder).items():
        leaf = leaf.weight if isinstance(leaf, Transposed) else leaf
        values = dequantize(leaf) if isinstance(leaf, QTensor) else jnp.asarray(leaf)
        # Layers of different formats are in different segments.
        shape, expected = values.shape, shapes[re.sub(r"^segments\.\d+", "segments.0", name)]
        shape, expected = (shape[1:], expected[1:]) if name.startswith("segments") else (shape, expected)
        assert shape in (expected, expected[::-1]), f"{name} is {shape}, not {expected}"
        assert not finite or bool(jnp.isfinite(values.astype(jnp.float32)).all()), f"{name} is not finite"


def _adapted(base: Any, folder: Path) -> dict[str, Any]:
    from jquant.io.adapters import load_adapters
    from jquant.models.adapters import Adapted
    from jquant.models.params import flat_params

    model = load_adapters(base, folder)
    params = flat_params(model.decoder)
    found = {name: leaf for name, leaf in params.items() if isinstance(leaf, Adapted)}
    told = {name: [(leaf.rank, leaf.alpha, leaf.dropout)] for name, leaf in found.items()}
    assert model.calibrated_on is not None
    return {"weights": _digest(model.decoder), "adapters": told, "seen": model.calibrated_on.tolist()}


def _training(folder: Path) -> dict[str, Any]:
    """Where a training goes on."""
    from jquant.learning.journal import METRICS, Journal, opened

    with opened(Journal(folder), lambda: RUN) as writer:
        assert writer is not None
        step, state = writer.resumed(_state)
    state = {name: np.asarray(value).tolist() for name, value in state.items()}
    return {"step": step, "weights": state, "metrics": (folder / METRICS).read_text()}


def _inside(folder: Path) -> bool:
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()
    return all(name in os.listdir(folder) and name not in LINKS for name in names)


def _digest(decoder: Any) -> str:
    import hashlib

    import jax
    from flax import nnx

    told = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(nnx.state(decoder)):
        told.update(f"{path}{leaf.shape}{leaf.dtype}".encode() + np.asarray(leaf).tobytes())
    return told.hexdigest()


def _words(tokenizer: Any) -> dict[str, Any]:
    facts = {key: getattr(tokenizer, key) for key in ("bos_id", "eos_ids", "add_bos", "chat_template")}
    return {"tokenizer": tokenizer.backend.to_str(), "ids": tokenizer.encode(TEXT).tolist(), **facts}


def _results(folder: Path) -> dict[str, Any]:
    from experiments import tables
    from experiments.collect import outcome, read_sweep, trial_folder

    trials = read_sweep(folder)
    rows = tables.read_rows(folder)
    return {"rows": rows, "trials": trials, "outcomes": [outcome(trial_folder(folder, trial)) for trial in trials]}


def _says(kind: str, path: Path, key: str, found: dict[str, Any]) -> bool:
    """Whether the file itself says what was read, by a reader that is not jquant's."""
    if kind in ("rows", "sweep", "trial", "journal"):  # JSON is taken as it is; what it can't be was refused
        return True
    if key == "seen" or kind == "vocabulary":
        return True  # hashes, which nothing else tells; what transformers made of the files
    if key == "beside":
        return _beside_says(path, found["beside"])
    if key == "adapters":
        return _adapter_says(path, found["adapters"])
    if kind.startswith("gguf"):
        return _gguf_says(path, key, found)
    if key == "config":
        return _config_says(path, found["config"])
    if key == "chat_template" or key.endswith(("_id", "_ids")) or key == "add_bos":
        return _settings_say(path, key, found)
    import tokenizers

    theirs = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    theirs.no_truncation()
    theirs.no_padding()
    same = theirs.to_str() == found["tokenizer"]
    return same and theirs.encode(TEXT, add_special_tokens=False).ids == found["ids"]


def _config_says(path: Path, config: dict[str, Any]) -> bool:
    if (path / "manifest.json").exists():
        told = json.loads((path / "manifest.json").read_text())["config"]
        return all(config[key] == (tuple(value) if isinstance(value, list) else value) for key, value in told.items())
    raw = json.loads((path / "config.json").read_text())
    for theirs, ours in HF.items():
        if raw.get(theirs) is not None and config[ours] != raw[theirs]:
            return False
    import transformers

    theirs = transformers.LlamaConfig(**raw)
    rope = theirs.rope_parameters
    kinds = {"default": None, "linear": (rope.get("factor"),) * (config["head_dim"] // 2)}
    return rope["rope_theta"] == config["rope_base"] and config["rope_divisors"] == kinds[rope["rope_type"]]


def _beside_says(path: Path, beside: dict[str, bytes]) -> bool:
    """The files of an export are the folder's, or those in source.json; config.json but for its dtype."""
    if (path / "source.json").exists():
        source = json.loads((path / "source.json").read_text())
    else:
        source = {name: (path / name).read_text() for name in beside if (path / name).exists()}
    own = ("dtype", "torch_dtype", "quantization_config")
    plain = lambda text: {key: value for key, value in json.loads(text).items() if key not in own}  # noqa: E731
    config = source.get("config.json")
    if config and plain(config) != plain(beside["config.json"]):
        return False
    return all(
        source.get(name, data.decode()) == data.decode() for name, data in beside.items() if name != "config.json"
    )


def _adapter_says(path: Path, adapters: dict[str, Any]) -> bool:
    """Every rank, alpha and dropout is one of the numbers in adapter_config.json, or the dropout is none."""
    raw = json.loads((path / "adapter_config.json").read_text())
    patterns = [*(raw.get("rank_pattern") or {}).values(), *(raw.get("alpha_pattern") or {}).values()]
    numbers = {raw.get("r"), raw.get("lora_alpha"), raw.get("lora_dropout", 0.0), *patterns}
    return all(value in numbers for told in adapters.values() for value in told[0])


def _settings_say(path: Path, key: str, found: dict[str, Any]) -> bool:
    """BOS, EOS and template stand in one of the folder's files, or nowhere in them."""
    if (path / "manifest.json").exists():
        told = json.loads((path / "manifest.json").read_text())["tokenizer"][key]
        return found[key] == (tuple(told) if isinstance(told, list) else told)
    if key == "add_bos":
        return True  # what the post-processor of tokenizer.json does with an empty text
    names = ("generation_config.json", "tokenizer_config.json", "config.json")
    raws = [json.loads((path / name).read_text()) for name in names if (path / name).exists()]
    if key == "chat_template":
        return found[key] is None or any(raw.get(key) == found[key] for raw in raws)
    role = key.split("_")[0]
    named = [raw.get(f"{role}_token_id", raw.get(f"{role}_token")) for raw in raws]
    told = [
        one.get("content") if isinstance(one, dict) else one
        for value in named
        for one in (value if isinstance(value, list) else [value])
    ]
    vocabulary = json.loads(found["tokenizer"])
    ids = vocabulary["model"]["vocab"] | {one["content"]: one["id"] for one in vocabulary["added_tokens"]}
    told = {ids.get(one) if isinstance(one, str) else one for one in told}
    own = found[key] if isinstance(found[key], tuple) else [found[key]]
    return all(one is None or one in told for one in own)


def _gguf_says(path: Path, key: str, found: dict[str, Any]) -> bool:
    if key != "config":
        return True  # tokens, merges and types are strings and numbers without a second place that tells them
    import gguf

    # `load_model` has found every length within the file, so this reader ends.
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    config = found["config"]
    defaults = {"llama.rope.freq_base": 10000.0, "llama.attention.head_count_kv": config["heads"]}
    linear = (fields.get("llama.rope.scaling.factor"),) * (config["head_dim"] // 2)
    return config["rope_divisors"] in (None, linear) and all(
        math.isclose(config[ours], fields.get(theirs, defaults.get(theirs, math.nan)), rel_tol=1e-6)
        for theirs, ours in GGUF.items()
    )


if __name__ == "__main__":
    write(Path(sys.argv[1]))
