"""Models as GGUF files for llama.cpp. Quantized weights keep their bits; only floats are rounded, to 16 bits."""

import math
import os
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from jquant.errors import InputError
from jquant.formats import GGUF, Int
from jquant.io.export.vocabulary import vocabulary
from jquant.io.files import sync
from jquant.io.gguf.blocks import block_size, to_blocks
from jquant.io.save import Origin
from jquant.models.config import GGUF_FAMILIES, DecoderConfig, config_from_gguf
from jquant.models.decoder import Decoder, blocks, outside_of
from jquant.models.families import Family, family_of
from jquant.models.params import flat_params, weight_name
from jquant.parts import brief
from jquant.qtensor import QTensor, Transposed

FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
ARCHITECTURES = {family: name for name, family in GGUF_FAMILIES.items()} | {"mistral": "llama"}
ROTARY = ("attention.q.kernel", "attention.k.kernel")
OUTSIDE = ("embedding", "positions", "norm.scale", "norm.bias", "head.kernel")  # not in a block


class Entry(NamedTuple):
    """A tensor of the file: its name, type and shape `[out, in]`, and a function that makes its rows of bytes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    rows: Callable[[], UInt8[np.ndarray, "..."]]


def write_gguf(model: Origin, path: str | Path, floats: str = "F16", force: bool = False) -> None:
    """Writes a model as a GGUF file, completely or not at all.

    Weights whose format is one of llama.cpp's (`jquant.GGUF`) keep codes and scales bit for bit; so do integers without
    zeros, or with float zeros, in groups of a multiple of 32. Norms are float32.

    Args:
      model: a `LanguageModel`, or what `open_model` returns; that is read block by block, twice.
      path: of the file, `model.gguf`, say.
      floats: how weights that are not quantized are stored: F16, BF16 or F32.
      force: whether an existing file is replaced.

    Raises:
      InputError: the file exists or can't be written; a weight, rotation, configuration or tokenizer that a GGUF file
        can't hold; the message says which.
    """
    path = Path(path).expanduser()
    if model.config.family not in ARCHITECTURES:
        raise InputError(
            f'llama.cpp has no architecture for {model.config.family} models: export(model, folder, "plain") writes a '
            f"folder."
        )
    if floats not in FLOATS:
        raise InputError(f"A GGUF file's floats are {', '.join(FLOATS)}, not {floats!r}.")
    if path.is_dir() or (path.exists() and not force):
        raise InputError(f"{path} exists already: give another name, or force=True to replace the file.")
    # Without their arrays: of a model on disk one block at a time is in memory.
    tensors = [(entry.name, entry.kind, entry.shape) for entry in _entries(model, floats)]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    metadata = _metadata(model, [kind for _, kind, shape in tensors if len(shape) > 1])
    writer = gguf.GGUFWriter(temporary, ARCHITECTURES[model.config.family])
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, kind, shape in tensors:
        stored = gguf.GGMLQuantizationType[kind]
        in_bytes = gguf.quant_shape_to_byte_shape(shape, stored)
        writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), int(np.prod(in_bytes)), stored)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in _entries(model, floats):
            writer.write_tensor_data(entry.rows())
        writer.close()
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as failed:
        raise InputError(f"{path} can't be written ({failed.strerror or failed}).") from None
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)


# ---- tensors --------------------------------------------------------------------------------------------------------


def _entries(model: Any, floats: str) -> Iterator[Entry]:
    """The file's tensors, in its order: embedding, blocks, last norm, head."""
    names, config = family_of(model.config).gguf, model.config
    outside, layers = _parts(model)
    if outside.norm.rotation is not None:
        raise InputError("The model's residual stream is rotated, which GGUF can't say: model.save(folder) can.")
    params = flat_params(outside)
    yield _entry("embedding", names["embedding"], params["embedding"], config, floats)
    if config.rope_divisors is not None:
        factors = np.asarray(config.rope_divisors, np.float32)
        yield Entry("rope_freqs.weight", "F32", factors.shape, lambda: factors.view(np.uint8))
    for layer, block in enumerate(layers):
        if block.mlp.rotation is not None:
            raise InputError(
                f"layers.{layer}.mlp.down.kernel reads rotated inputs, which GGUF can't say: rotate with mlp=False, or "
                f"write model.save(folder)."
            )
        entries = {
            f"layers.{path}": _entry(
                weight_name(layer, path), names[f"layers.{path}"].format(layer), leaf, config, floats
            )
            for path, leaf in flat_params(block).items()
        }
        yield from _joined(entries, family_of(config))
    for name in OUTSIDE[1:]:
        if name in params:
            # llama.cpp's converter writes positions in 32 bits.
            yield _entry(name, names[name], params[name], config, "F32" if name == "positions" else floats)


def _joined(entries: dict[str, Entry], family: Family) -> Iterator[Entry]:
    """A block's tensors, each once; the rows of several parameters follow one another in the family's order.

    Raises:
      InputError: parameters of one tensor that are stored in different types.
    """
    for name, entry in entries.items():
        fused = family.fused_with("gguf", name)
        if name != fused[0]:
            continue
        if len(fused) == 1:
            yield entry
            continue
        parts = [entries[other] for other in fused]
        if len({part.kind for part in parts}) > 1:
            raise InputError(
                f"{entry.name} holds {', '.join(other.removeprefix('layers.') for other in fused)}, and a tensor has "
                f"one type, not {', '.join(dict.fromkeys(part.kind for part in parts))}: quantize them alike."
            )
        shape = (sum(part.shape[0] for part in parts), *entry.shape[1:])
        rows = lambda parts=parts: np.concatenate([part.rows() for part in parts])  # noqa: E731
        yield entry._replace(shape=shape, rows=rows)


def _parts(model: Any) -> tuple[Decoder, Iterator[Any]]:
    """The decoder without its blocks, and these one by one."""
    if hasattr(model, "decoder"):
        return outside_of(model.decoder), blocks(model.decoder)
    return model.outside(), model.blocks()


def _entry(weight: str, name: str, leaf: Any, config: DecoderConfig, floats: str) -> Entry:
    """The tensor of a parameter; `weight` is its name in errors."""
    leaf = leaf.weight if isinstance(leaf, Transposed) else leaf
    interleaved = family_of(config).gguf_interleaved and weight.endswith(ROTARY)
    order = _interleaved(leaf.shape[-1], config) if interleaved else None
    if isinstance(leaf, QTensor):
        kind, q = as_kind(weight, leaf)
        columns = lambda a: a if order is None else a[..., order]  # noqa: E731
        return Entry(name, kind, q.shape[::-1], lambda: to_blocks(jax.tree.map(columns, q), kind))
    if not hasattr(leaf, "astype"):
        raise InputError(f"{weight} is {type(leaf).__name__}, which GGUF can't hold: merge_adapters(model) first.")
    if leaf.ndim == 1:
        return Entry(name, "F32", leaf.shape, lambda: np.asarray(leaf, np.float32).view(np.uint8))
    turn = weight.endswith("kernel")
    shape = leaf.shape[::-1] if turn else leaf.shape

    def rows() -> np.ndarray:
        values = np.asarray(leaf, np.float32)
        values = values.T if turn else values
        return _bytes(weight, values if order is None else values[order], floats)

    return Entry(name, floats, shape, rows)


def _interleaved(width: int, config: DecoderConfig) -> np.ndarray:
    """For each row of q or k in the file, which of ours it is: llama.cpp's heads have their rotary pairs side by side.

    Our rows (i, i + d/2) of a head are its rows (2i, 2i + 1).
    """
    head = config.head_dim
    return np.arange(width).reshape(-1, 2, head // 2).swapaxes(1, 2).reshape(-1)


def _bytes(weight: str, values: Float[np.ndarray, "out in"], floats: str) -> UInt8[np.ndarray, "out bytes"]:
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values, FLOATS[floats])
    if not np.isfinite(stored).all():
        raise InputError(f"{weight} holds values up to {np.abs(values).max():g}, more than {floats} can: take F32.")
    return stored.view(np.uint8)


def as_kind(weight: str, q: QTensor) -> tuple[str, QTensor]:
    """llama.cpp's type that holds a weight `[in, out]` exactly, and the weight in that type's format.

    Args:
      weight: its name in errors.
      q: in a format of `jquant.GGUF`, or integers in groups of a multiple of 32 whose scales are float16.

    Raises:
      InputError: no type holds it.
    """
    if q.rotations is not None:
        raise InputError(f"{weight} has rotated inputs and outputs, which GGUF can't say: export format=plain.")
    if q.levels is not None:
        raise InputError(f"{weight} has levels of its own, which GGUF can't say: export format=plain.")
    q = replace(q, activation=None, input_scale=None)
    for kind, format in GGUF.items():
        if q.in_features % block_size(kind)[0]:
            continue
        if q.format == format:
            return kind, q
        if isinstance(format, Int) and isinstance(q.format, Int) and isinstance(format.scale, str):
            # Ties and the range of codes decide how weights were rounded, not what codes mean.
            same = replace(q.format, group=format.group, ties=format.ties, full_range=format.full_range) == format
            if same and isinstance(q.format.group, int) and q.format.group % 32 == 0:
                return kind, _in_blocks(q, format)
    raise InputError(
        f"{weight} is {brief(q.format)} with rows of {q.in_features}, which no type of llama.cpp holds: quantize to "
        f"one of {', '.join(GGUF)} (gguf_mix), or export in another format."
    )


def _in_blocks(q: QTensor, format: Int) -> QTensor:
    """The same weight with a scale for each block of 32."""
    assert isinstance(q.format, Int)
    assert isinstance(q.format.group, int)
    times, blocks = q.format.group // 32, q.in_features // 32
    repeated = lambda v: None if v is None else jnp.repeat(v, times, axis=0)[:blocks]  # noqa: E731
    return QTensor(q.codes, repeated(q.scale), repeated(q.zero), format, q.in_features)


# ---- metadata -------------------------------------------------------------------------------------------------------


def _metadata(model: Origin, kinds: list[str]) -> dict[str, Any]:
    """The file's keys; `kinds` are the types of its matrices.

    Raises:
      InputError: a part of the configuration that the keys can't say.
    """
    config = model.config
    rotary = len(config.no_rope) < config.layers
    common = max(dict.fromkeys(kinds), key=kinds.count)
    shape = {
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "embedding_length": config.hidden,
        "block_count": config.layers,
        "feed_forward_length": config.ffn,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        f"attention.layer_norm_{'rms_' if config.norm == 'rms' else ''}epsilon": float(config.norm_eps),
        "rope.dimension_count": config.rotary_channels if rotary else None,
        "rope.freq_base": float(config.rope_base) if rotary else None,
        "use_parallel_residual": config.parallel_residual if config.family == "gpt_neox" else None,
        "rope.freq_base_swa": config.local_rope_base,
        "attention.sliding_window": next((window for window in config.windows or () if window), None),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logits_softcap,
    }
    architecture = ARCHITECTURES[config.family]
    header = {"general.architecture": architecture}
    header |= {f"{architecture}.{key}": value for key, value in shape.items() if value is not None}
    _check_said(config, header)
    del header["general.architecture"]  # the writer adds it
    return {
        "general.type": "model",
        "general.name": model.name,
        "general.quantized_by": "jquant",
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "general.file_type": int(_file_type(common)),
        **header,
        **vocabulary(model.tokenizer, config.vocab_size),
    }


def _check_said(config: DecoderConfig, header: dict[str, Any]) -> None:
    """Raises InputError for a part of the configuration that a header with these keys does not say."""
    try:
        read = config_from_gguf(header, config.tied, config.rope_divisors, "its file")
    except InputError as wrong:
        raise InputError(f"A model of the family {config.family} can't be written as GGUF here: {wrong}") from None
    for field in fields(config):
        ours, said = getattr(config, field.name), getattr(read, field.name)
        same = math.isclose(ours, said, rel_tol=1e-6) if isinstance(ours, float) and said is not None else ours == said
        if not same and field.name != "family":  # Mistral's files are Llama's
            raise InputError(
                f"The model has {field.name}={reprlib.repr(ours)}, which a GGUF file of {config.family} can't say as "
                f"jquant writes it: it would be read as {reprlib.repr(said)}."
            )


def _file_type(kind: str) -> gguf.LlamaFileType:
    """What llama.cpp calls a file most of whose matrices have this type; it is shown, and decides nothing."""
    named = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M"}
    return gguf.LlamaFileType[named.get(kind, f"MOSTLY_{kind}")]


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)
