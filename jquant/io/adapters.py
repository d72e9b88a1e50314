"""Adapters in PEFT's layout: a folder with adapter_config.json and adapter_model.safetensors.

`peft.PeftModel.from_pretrained` reads what `save_adapters` writes, and `load_adapters` what `save_pretrained` writes.
Pickle files (adapter_model.bin) are refused: reading one can run code.
"""

import json
import reprlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jquant.errors import InputError
from jquant.io.checkpoint import SEEN
from jquant.io.files import read_json, write_folder
from jquant.io.language_model import LanguageModel
from jquant.io.patterns import full_matches
from jquant.io.safetensors import DTYPES, open_safetensors, read_tensor
from jquant.models.adapters import Adapted, LoRA, first_adapted
from jquant.models.config import DecoderConfig
from jquant.models.decoder import blocks, with_blocks
from jquant.models.families import family_of
from jquant.models.params import flat_params, weight_name, with_params
from jquant.parallel.processes import gather, on_first

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # before a module's name in adapter_model.safetensors

# Keys of adapter_config.json that are read, and keys that don't change what an adapter computes. Others must be empty.
READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
        "rank_pattern", "alpha_pattern", "init_lora_weights", "bias")  # fmt: skip
ASIDE = ("auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "megatron_core", "peft_version",
         "qalora_group_size", "revision", "task_type")  # fmt: skip
STARTS = (True, False, "gaussian", "orthogonal", "eva")  # of a and b, that leave the base as it is

Config = dict[str, Any]


def save_adapters(folder: str | Path, model: LanguageModel) -> None:
    """Writes a model's adapters, without its base, into a folder that PEFT and `load_adapters` read.

    a is stored as lora_A `[rank, in]` and b as lora_B `[out, rank]`, both float32. calibration.safetensors beside them
    holds hashes of what the model was calibrated and trained on; PEFT does not read it. The folder is written
    completely or not at all.

    Args:
      folder: a new or empty one.
      model: with adapters.

    Raises:
      InputError: the model has no adapter; the folder is not empty or can't be written.
    """
    folder = Path(folder).expanduser().resolve()
    adapters = {
        _module(model.config, layer, path): replace(leaf, base=None, a=gather(leaf.a), b=gather(leaf.b))
        for layer, block in enumerate(blocks(model.decoder))
        for path, leaf in flat_params(block).items()
        if isinstance(leaf, Adapted)
    }
    if not adapters:
        raise InputError(f"{model.name} has no adapter to save.")
    tensors = {}
    for module, adapter in adapters.items():
        for name, value in zip(_tensors(module), (adapter.a, adapter.b), strict=True):
            tensors[name] = np.ascontiguousarray(value.T, np.float32)
    files = {
        CONFIG: json.dumps(_config(model, adapters), indent=2).encode() + b"\n",
        WEIGHTS: safetensors.numpy.save(tensors, {"format": "pt"}),
    }
    if model.calibrated_on is not None:
        files[SEEN] = safetensors.numpy.save({"runs": model.calibrated_on})
    on_first(partial(write_folder, folder, files))


def load_adapters(model: LanguageModel, folder: str | Path) -> LanguageModel:
    """The model with the adapters of a folder that PEFT or `save_adapters` wrote.

    Args:
      model: the adapters' base, float or quantized, without adapters; left untouched.
      folder: with adapter_config.json and adapter_model.safetensors.

    Raises:
      InputError: a file is missing or broken; only a pickle file is there; a key of the configuration that changes the
        adapter and is not read; a tensor that is missing, has no place, or another shape, rank or type than model and
        configuration ask for; values that are not finite; a model with adapters.
    """
    folder = Path(folder).expanduser()
    if name := first_adapted(flat_params(model.decoder)):
        raise InputError(f"{name} has an adapter already: merge_adapters(model) first.")
    try:
        adapters = _adapters(model.config, read_json(folder / CONFIG))
    except InputError as wrong:
        where = "" if str(folder) in str(wrong) else f"{folder / CONFIG}: "
        raise InputError(f"{where}{wrong}") from None
    if (folder / PICKLE).exists() and not (folder / WEIGHTS).exists():
        raise InputError(f"{folder / PICKLE} is a pickle file, which can run code: save the adapter as safetensors.")
    layers = list(blocks(model.decoder))
    params = [flat_params(block) for block in layers]
    bases = {weight_name(layer, path): leaf for layer, of in enumerate(params) for path, leaf in of.items()}
    read = dict(_read(folder / WEIGHTS, model.config, {name: (bases[name], lora) for name, lora in adapters.items()}))
    for layer, block in enumerate(layers):
        names = {path: weight_name(layer, path) for path in params[layer]}
        layers[layer] = with_params(block, {path: read[name] for path, name in names.items() if name in read})
    seen = model.calibrated_on
    if (folder / SEEN).exists():
        runs = _seen(folder / SEEN)
        seen = runs if seen is None else np.union1d(seen, runs)
    return replace(model, decoder=with_blocks(model.decoder, layers), calibrated_on=seen)


def _module(config: DecoderConfig, layer: int, path: str) -> str:
    """A projection's name in transformers, e.g. "model.layers.3.self_attn.q_proj".

    Raises:
      InputError: transformers holds it in one weight with others.
    """
    family, name = family_of(config), f"layers.{path}"
    if len(fused := family.fused_with("hf", name)) > 1:
        raise InputError(
            f"transformers holds {', '.join(fused)} of {config.family} as one weight, so PEFT has no adapter of each: "
            f"merge_adapters(model) and save the model."
        )
    return family.hf[name].format(layer).removesuffix(".weight")


def _modules(config: DecoderConfig) -> dict[str, str]:
    """The names of all projections in transformers, by their names here."""
    layers, weights = range(config.layers), family_of(config).weights
    return {weight_name(layer, path): _module(config, layer, path) for layer in layers for path in weights}


def _tensors(module: str) -> tuple[str, str]:
    """The names of a module's a and b."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


# ---- writing ---------------------------------------------------------------------------------------------------------


def _config(model: LanguageModel, adapters: Mapping[str, Adapted]) -> Config:
    """adapter_config.json of adapters by module."""
    ranks = {module: adapter.rank for module, adapter in adapters.items()}
    alphas = {module: _number(adapter.alpha) for module, adapter in adapters.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    every = Counter(module.rpartition(".")[2] for module in adapters)
    short = lambda module: module.rpartition(".")[2]  # noqa: E731
    complete = {name for name, count in every.items() if count == model.config.layers}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(adapter.dropout for adapter in adapters.values()),
        "target_modules": sorted({short(m) if short(m) in complete else m for m in adapters}),
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _number(value: int | float) -> int | float:
    return int(value) if float(value).is_integer() else value


# ---- reading ---------------------------------------------------------------------------------------------------------


def _adapters(config: DecoderConfig, stored: Config) -> dict[str, LoRA]:
    """The adapters that adapter_config.json describes, by the weights' names."""
    _check_config(stored)
    modules = _modules(config)
    targets, layers = stored.get("target_modules"), stored.get("layers_to_transform")
    for target in targets if isinstance(targets, list) else []:
        if not _named([target], modules.values()):
            raise InputError(f"target_modules has {target[:100]!r}, which is no projection of the model's layers.")
    named, excluded = (_named(stored.get(k), modules.values()) for k in ("target_modules", "exclude_modules"))
    ranks, alphas = (_by_pattern(stored.get(k), modules.values()) for k in ("rank_pattern", "alpha_pattern"))
    chosen = [None] if layers is None else layers if isinstance(layers, list) else [layers]
    adapters = {}
    for name, module in modules.items():
        in_layers = chosen in ([None], []) or int(name.split(".")[1]) in chosen
        if not in_layers or module not in named or module in excluded:
            continue
        rank, alpha = ranks.get(module, stored["r"]), alphas.get(module, stored["lora_alpha"])
        adapters[name] = LoRA(rank, alpha, stored.get("lora_dropout", 0.0))
    if not adapters:
        raise InputError(f"target_modules={reprlib.repr(targets)} names no projection of the model's layers.")
    return adapters


def _check_config(stored: Config) -> None:
    """Refuses what is no plain LoRA adapter, and values of another type."""
    if stored.get("peft_type") != "LORA":
        raise InputError(f"peft_type is {reprlib.repr(stored.get('peft_type'))}; jquant reads LORA adapters.")
    if stored.get("bias", "none") != "none" or stored.get("init_lora_weights", True) not in STARTS:
        key = "bias" if stored.get("bias", "none") != "none" else "init_lora_weights"
        raise InputError(f"{key}={reprlib.repr(stored[key])} changes the base model, which jquant's adapters don't.")
    for key, value in stored.items():
        if key not in READ + ASIDE and value not in (None, False, "", [], {}):
            raise InputError(f"{key[:50]}={reprlib.repr(value)} is none of the settings that jquant reads.")
    whole, number = lambda value: type(value) is int, lambda value: type(value) in (int, float)
    layers = stored.get("layers_to_transform") or []
    takes = {
        "target_modules": _are_names(stored.get("target_modules")),
        "exclude_modules": _are_names(stored.get("exclude_modules") or []),
        "layers_to_transform": all(map(whole, layers if isinstance(layers, list) else [layers])),
        "rank_pattern": _all_values(stored.get("rank_pattern") or {}, whole),
        "alpha_pattern": _all_values(stored.get("alpha_pattern") or {}, number),
        "r": whole(stored.get("r")),
        "lora_alpha": number(stored.get("lora_alpha")),
        "lora_dropout": number(stored.get("lora_dropout", 0)),
    }
    for key, fits in takes.items():
        if not fits:
            raise InputError(f"{key} is {reprlib.repr(stored.get(key))}, which is none of PEFT's values.")


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, str) for part in value))


def _all_values(patterns: Any, fit: Callable[[Any], bool]) -> bool:
    return isinstance(patterns, dict) and all(map(fit, patterns.values()))


def _named(names: Any, modules: Collection[str]) -> Collection[str]:
    """The modules that PEFT's target_modules or exclude_modules name: by a regex, or by the ends of names."""
    if names == "all-linear":
        return modules
    if isinstance(names, str):
        return full_matches([names], modules)[names]
    return [module for module in modules if not _ends(module).isdisjoint(names or ())]


def _by_pattern(patterns: dict[str, Any] | None, modules: Collection[str]) -> dict[str, Any]:
    """Each module's value: that of the first pattern that matches an end of its name, as PEFT's `get_pattern_key`."""
    ends = {module: _ends(module) for module in modules}
    matched, values = full_matches(list(patterns or {}), set().union(*ends.values())), {}
    for pattern, value in reversed((patterns or {}).items()):
        values |= {module: value for module in modules if not ends[module].isdisjoint(matched[pattern])}
    return values


def _ends(module: str) -> set[str]:
    """The ends of a name that begin after a dot, and the name itself."""
    return {module, *(module[i + 1 :] for i, letter in enumerate(module) if letter == ".")}


def _read(path: Path, config: DecoderConfig, expected: Mapping[str, tuple[Any, LoRA]]) -> Iterator[tuple[str, Adapted]]:
    """The adapted kernels by name; `expected` has each one's base and adapter."""
    modules = _modules(config)
    with open_safetensors(path) as handle:
        left = set(handle.keys())
        places = {tensor for name in expected for tensor in _tensors(modules[name])}
        if strange := sorted(left - places):
            raise InputError(
                f"{path}: {strange[0][:200]!r} has no place in the model, as {CONFIG} describes its adapters."
            )
        for name, (base, lora) in expected.items():
            shapes = ((lora.rank, base.shape[0]), (base.shape[1], lora.rank))
            a, b = (
                _tensor(handle, path, tensor, shape)
                for tensor, shape in zip(_tensors(modules[name]), shapes, strict=True)
            )
            yield name, Adapted(base, a.T, b.T, lora.alpha, lora.dropout)


def _tensor(handle: Any, path: Path, name: str, shape: tuple[int, int]) -> Any:
    """A checked tensor in float32."""
    if name not in handle.keys():  # noqa: SIM118
        raise InputError(f"{path} lacks the tensor {name}.")
    stored = handle.get_slice(name)
    if tuple(stored.get_shape()) != shape:
        raise InputError(
            f"{path}: {name} has the shape {list(stored.get_shape())}; the model's weight and the rank in {CONFIG} ask "
            f"for {list(shape)}."
        )
    if stored.get_dtype() not in DTYPES:
        raise InputError(f"{path}: {name} is stored as {stored.get_dtype()}, not as floats.")
    values = read_tensor(handle, path, name).astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"{path}: {name} holds NaN or infinite values.")
    return jnp.asarray(values)


def _seen(path: Path) -> np.ndarray:
    """Hashes of what adapters were trained on, uint64 `[runs]`."""
    with open_safetensors(path) as handle:
        fits = list(handle.keys()) == ["runs"] and handle.get_slice("runs").get_dtype() == "U64"
        runs = read_tensor(handle, path, "runs") if fits else np.empty((0, 0))
    if runs.ndim != 1:
        raise InputError(f"{path} does not hold hashes of a text's runs of tokens.")
    return runs
