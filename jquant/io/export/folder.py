"""Writes a model as a Hugging Face folder, block by block, in a format of `jquant.io.export`.

The model is read twice: first every weight is checked, then each is written. In memory are one block and the tensors of
one shard.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jquant.errors import InputError
from jquant.io.export.base import FolderFormat
from jquant.io.export.beside import CONFIG, card, files_beside
from jquant.io.files import check_new, sync, write_bytes
from jquant.io.language_model import LanguageModel
from jquant.io.places import place_of
from jquant.models.adapters import first_adapted
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Block, Decoder, blocks, outside_of
from jquant.models.families import family_of
from jquant.models.params import Params, flat_params, weight_name
from jquant.models.size import Size, size_of
from jquant.parallel.processes import gather, on_first
from jquant.parts import brief
from jquant.qtensor import QTensor, Transposed, columns_of, joined_columns

SHARD = 5_000_000_000  # bytes of a file, as transformers cuts models
WEIGHT = ".weight"


def write(model: Any, path: Path, name: str, formats: Mapping[str, FolderFormat], force: bool = False) -> None:
    """Writes the folder completely or not at all; see `jquant.io.export.write_folder`."""
    survey = _survey(model, name, formats)
    quantization = formats[name].quantization_config(survey.weights, survey.floats) if survey.weights else None
    files = files_beside(model, survey.dtype, quantization)
    files["README.md"] = card(
        model, name, survey.kinds, survey.size.bits_per_weight, getattr(model, "calibrated_on", None)
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    on_first(partial(_begin, path, temporary, force))
    try:
        shards: list[dict[str, int]] = []
        for shard in _in_shards(_tensors(model, formats[name], survey.dtype)):
            on_first(partial(_write_shard, temporary / f"{len(shards)}", shard))
            shards.append({tensor: array.nbytes for tensor, array in shard.items()})
        on_first(partial(_finish, temporary, path, shards, files))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@dataclass
class _Survey:
    """What the first reading of a model finds: quantized modules with shapes for arrays, float linear modules."""

    dtype: str
    weights: dict[str, QTensor] = field(default_factory=dict)
    floats: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    size: Size = field(default_factory=Size)


def _survey(model: Any, name: str, formats: Mapping[str, FolderFormat]) -> _Survey:
    """Reads the model once, and raises InputError for what the format can't say."""
    outside, named = _outside(model), family_of(model.config).hf
    if name != "plain" and family_of(model.config).hf_turned:
        raise InputError(
            f"Folders of {model.config.family} hold kernels turned around, which jquant can only write "
            f'"plain": export so, or keep the model by save.'
        )
    if outside.norm.rotation is not None:
        raise InputError(
            f"The residual stream is rotated, which no format of {', '.join(formats)} can say: quantize with "
            f"residual=False, or keep the model by save."
        )
    survey = _Survey(str(outside.dtype))
    _check(flat_params(outside), "", name, formats)
    embedding = outside.embedding.get_value()
    if isinstance(embedding, Transposed) and name != "plain":
        raise InputError(
            f'embedding is quantized, and {name} has float embeddings: "plain" or a .gguf file can hold it.'
        )
    for layer, block in enumerate(_blocks(model)):
        if block.mlp.rotation is not None:
            raise InputError(
                f"{weight_name(layer, 'mlp.down.kernel')} reads rotated inputs, which no format of "
                f"{', '.join(formats)} can say: quantize with mlp=False, or keep the model by save."
            )
        params = flat_params(block)
        _check(params, weight_name(layer, ""), name, formats)
        for path, leaf in params.items():
            if path.endswith("kernel"):
                module = named[f"layers.{path}"].format(layer).removesuffix(WEIGHT)
                _note(survey, module, leaf if name == "plain" else _whole(model.config, params, path, module))
                survey.kinds[brief(leaf.format) if isinstance(leaf, QTensor) else str(leaf.dtype)] += 1
        survey.size += size_of(block)
    head = embedding if outside.head is None else outside.head.kernel.get_value()
    _note(survey, named["head.kernel"].removesuffix(WEIGHT), head)
    return survey


def _whole(config: DecoderConfig, params: Params, path: str, module: str) -> Any:
    """The weight that the file holds: a parameter, or several joined.

    Raises:
      InputError: packed ones of different formats, or packed ones and floats.
    """
    fused = [other.removeprefix("layers.") for other in family_of(config).fused_with("hf", f"layers.{path}")]
    parts = [params[other] for other in fused]
    packed = [isinstance(part, QTensor) for part in parts]
    if len(parts) == 1 or not any(packed):
        return parts[0]
    try:
        if not all(packed):
            raise InputError("some are floats: quantize them alike.")
        return jax.eval_shape(lambda parts: _join(config, parts, [f"layers.{other}" for other in fused]), parts)
    except InputError as wrong:
        raise InputError(f"{module} holds {', '.join(fused)}: {wrong}") from None


def _join(config: DecoderConfig, parts: Sequence[QTensor], names: Sequence[str]) -> QTensor:
    """Packed weights as the columns of one, in the file's order."""
    columns = [place_of(config, "hf", name, 0).numbers for name in names]
    parts = [jax.tree.map(jnp.asarray, part) for part in parts]
    return columns_of(joined_columns(parts), np.argsort(np.concatenate(columns)))


def _note(survey: _Survey, module: str, leaf: Any) -> None:
    if isinstance(leaf, QTensor):
        survey.weights[module] = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), leaf)
    else:
        survey.floats.append(module)


def _check(params: Params, prefix: str, name: str, formats: Mapping[str, FolderFormat]) -> None:
    """Raises InputError for an adapter, or a weight that the format can't hold; names formats that can."""
    if adapted := first_adapted(params):
        raise InputError(f"{prefix}{adapted} has an adapter: merge_adapters(model) gives a model without.")
    for path, leaf in params.items():
        if isinstance(leaf, QTensor) and (problem := _problem(name, formats[name], leaf)):
            able = [f'"{other}"' for other, format in formats.items() if _problem(other, format, leaf) is None]
            way = f"{' or '.join(able)} can hold it" if able else "save keeps it"
            raise InputError(f"{prefix}{path}: {problem}; {way}.")


def _problem(name: str, format: FolderFormat, leaf: QTensor) -> str | None:
    if leaf.rotations is not None and name != "plain":
        return f"its inputs and outputs are rotated, which {name} can't say"
    if leaf.levels is not None and name != "plain":
        return f"its levels are its own, which {name} can't say"
    return format.why_not(leaf)


def _tensors(model: Any, format: FolderFormat, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """The folder's tensors by name, block by block."""
    yield from _named(model.config, gather(flat_params(_outside(model))), ..., format, dtype)
    for layer, block in enumerate(_blocks(model)):
        params = {f"layers.{path}": leaf for path, leaf in gather(flat_params(block)).items()}
        yield from _named(model.config, params, layer, format, dtype)


def _named(
    config: DecoderConfig, params: Params, layer: Any, format: FolderFormat, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of parameters of a layer, or outside the layers, whose arrays are in this process."""
    family, joined = family_of(config), {}
    for path, leaf in params.items():
        leaf, place = jax.tree.map(jnp.asarray, leaf), place_of(config, "hf", path, layer)
        fused = family.fused_with("hf", path)
        if isinstance(leaf, Transposed):
            yield place.name, np.ascontiguousarray(format.to_tensors(leaf.weight, dtype)["weight"])
            continue
        if isinstance(leaf, QTensor):
            tensors = format.to_tensors(leaf, dtype)
            if tensors.keys() != {"weight"}:  # it is packed; several parameters are written with the first
                if path == fused[0]:
                    if len(fused) > 1:
                        tensors = format.to_tensors(_join(config, [params[other] for other in fused], fused), dtype)
                    for end, array in tensors.items():
                        yield f"{place.name.removesuffix(WEIGHT)}.{end}", np.ascontiguousarray(array)
                continue
            leaf = tensors["weight"].T
        values = np.asarray(leaf)
        tensor, missing = joined.setdefault(place.name, (np.empty(place.shape, values.dtype), set(fused)))
        place.put(tensor, values)
        missing.discard(path)
        if not missing:
            yield place.name, joined.pop(place.name)[0]


def _outside(model: Any) -> Decoder:
    return outside_of(model.decoder) if isinstance(model, LanguageModel) else model.outside()


def _blocks(model: Any) -> Iterator[Block]:
    return blocks(model.decoder) if isinstance(model, LanguageModel) else model.blocks()


# ---- files ----------------------------------------------------------------------------------------------------------


def _in_shards(tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """Gathers tensors up to the bytes of a shard."""
    shard, size = {}, 0
    for name, array in tensors:
        if shard and size + array.nbytes > SHARD:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    if shard:
        yield shard


def _write_shard(path: Path, tensors: dict[str, np.ndarray]) -> None:
    try:
        safetensors.numpy.save_file(tensors, path, {"format": "pt"})
        sync(path)
    except (OSError, safetensors.SafetensorError) as failed:
        reason = getattr(failed, "strerror", None) or str(failed)[:200]
        raise InputError(f"{path.parent} can't be written ({reason}).") from None


def _begin(path: Path, temporary: Path, force: bool) -> None:
    """Makes the temporary folder; the final one must be empty, missing, or with `force`, an exported model."""
    try:
        if not (force and (path / CONFIG).is_file()):
            check_new(path)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as failed:
        raise InputError(f"{path} can't be written ({failed.strerror}).") from None


def _finish(temporary: Path, path: Path, shards: list[dict[str, int]], files: Mapping[str, bytes]) -> None:
    """Names the shards, writes the other files, and renames the folder."""
    try:
        if len(shards) == 1:
            os.rename(temporary / "0", temporary / "model.safetensors")
        else:
            names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
            for i, name in enumerate(names):
                os.rename(temporary / f"{i}", temporary / name)
            index = {
                "metadata": {"total_size": sum(sum(shard.values()) for shard in shards)},
                "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
            }
            write_bytes(temporary / "model.safetensors.index.json", json.dumps(index, indent=1).encode())
        for name, data in files.items():
            write_bytes(temporary / name, data)
        _rename(temporary, path)
    except OSError as failed:
        raise InputError(f"{path} can't be written ({failed.strerror}).") from None


def _rename(temporary: Path, path: Path) -> None:
    """Puts the new folder in the old one's place."""
    old = temporary.with_name(f"{temporary.name}.old")
    with suppress(FileNotFoundError):
        os.rename(path, old)
    os.rename(temporary, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)
