"""What the formats of exported folders share: their contract, words of 32 bits, and checks of a file's tensors.

A format's file has pure functions that only move bits. `to_tensors` gives the tensors of one weight by the end of their
name ("qweight" of "model.layers.0.mlp.up_proj.qweight"), `from_tensors` gives the weight back.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Int32, Shaped, UInt8

from jquant.errors import InputError
from jquant.formats import Codebook, Float, Int
from jquant.parts import brief
from jquant.qtensor import QTensor, dequantize, is_integer

Tensors = dict[str, np.ndarray]
Expected = Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]]  # end of a name -> dtypes that it may have, shape
SCALES = ("float16", "bfloat16", "float32")  # dtypes of scales in files


@dataclass(frozen=True)
class FolderFormat:
    """A format of the weights in a Hugging Face folder.

    Attributes:
      why_not: why a weight `[in, out]` can't be written so, as the end of a sentence; None if it can.
      to_tensors: (weight, dtype of the model) -> the tensors that hold it, by the end of their name.
      quantization_config: (modules with a quantized weight -> that weight, perhaps with shapes for arrays; names of the
        linear modules that stay float) -> the entry of config.json, or None. Raises InputError for weights that can't
        be in one file.
    """

    why_not: Callable[[QTensor], str | None]
    to_tensors: Callable[[QTensor, str], Tensors]
    quantization_config: Callable[[Mapping[str, QTensor], Sequence[str]], dict[str, Any] | None]


def to_words(stream: UInt8[np.ndarray, "rows bytes"]) -> Int32[np.ndarray, "rows words"]:
    """Rows of bytes as little-endian int32 words; the last word is filled up with zeros."""
    filled = np.pad(stream, [(0, 0), (0, -stream.shape[1] % 4)])
    return np.ascontiguousarray(filled).view("<i4")


def from_words(words: Int32[np.ndarray, "rows words"], size: int) -> UInt8[np.ndarray, "rows bytes"]:
    """The first `size` bytes of each row; the inverse of `to_words`."""
    return np.ascontiguousarray(words, "<i4").view(np.uint8)[:, :size]


def transposed(values: Any) -> Shaped[np.ndarray, "columns rows"]:
    """A matrix with rows and columns exchanged, in one piece."""
    return np.ascontiguousarray(np.asarray(values).T)


def check_tensors(tensors: Mapping[str, np.ndarray], expected: Expected) -> None:
    """Raises InputError unless the tensors are those that are expected, with their dtypes and shapes."""
    for name, (dtypes, shape) in expected.items():
        belongs = f"where {' or '.join(dtypes)} of shape {shape} belongs"
        if name not in tensors:
            raise InputError(f"{name} is missing, {belongs}")
        actual = tensors[name]
        if str(actual.dtype) not in dtypes or actual.shape != shape:
            raise InputError(f"{name} is {actual.dtype} of shape {actual.shape}, {belongs}")
    if surplus := sorted(tensors.keys() - expected.keys()):
        raise InputError(f"{surplus[0][:100]} has no place in it")


def setting(config: Mapping[str, Any], key: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
    """An entry of quantization_config.

    Raises:
      InputError: it is missing and has no default, or of another type.
    """
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is int):
        raise InputError(f"quantization_config has {key}={str(value)[:50]!r}")
    return value


def group_of(size: Any, in_features: int) -> Any:
    """A format's group from a file's group size, -1 for a whole column.

    Raises:
      InputError: a size that does not divide the weight's rows.
    """
    if size == -1:
        return "channel"
    if type(size) is not int or size < 1 or in_features % size:
        raise InputError(f"groups of {str(size)[:20]} do not divide its {in_features} inputs")
    return size


def integer_problem(q: QTensor, title: str, bits: tuple[int, ...], scales: tuple[str, ...]) -> str | None:
    """Why a weight is not one of whole groups of integers along `in`, as `why_not` says it."""
    format, widths = q.format, ", ".join(map(str, bits))
    if len(q.shape) != 2:
        return f"it is stacked, {q.shape}, and {title} holds matrices"
    if q.activation is not None:
        return f"its inputs are quantized ({brief(q.activation)}), and {title} holds weights only"
    if not isinstance(format, Int):
        return f"it is {brief(format)}, and {title} holds integers"
    if format.bits not in bits:
        return f"it has {format.bits} bits, and {title} holds {widths}"
    if q.zero is not None and not is_integer(q.zero):
        return f"its zeros are floats, and {title} holds integer zeros"
    if not isinstance(format.scale, str) or format.scale not in scales:
        stored = format.scale if isinstance(format.scale, str) else brief(format.scale)
        return f"its scales are stored as {stored}, and {title} holds {' or '.join(scales)}"
    return group_problem(format.group, q.in_features, title)


def group_problem(group: Any, in_features: int, title: str) -> str | None:
    """Why a group is not a whole column or an even part of one."""
    if group == "channel":
        return None
    if not isinstance(group, int):
        return f"its scales are for {group!r}, and {title} holds groups along the inputs"
    if in_features % group:
        return f"its groups of {group} do not divide its {in_features} inputs, as {title} asks"
    return None


def group_size(group: Any) -> int:
    """A group as files write it: -1 for a whole column."""
    return -1 if group == "channel" else group


def groups_of(group: Any, in_features: int) -> int:
    """How many groups a column has."""
    return 1 if group == "channel" else in_features // group


def check_finite(q: QTensor) -> QTensor:
    """The weight itself.

    Raises:
      InputError: a scale or a float zero is NaN or infinite, or a weight can be.
    """
    for part in (q.scale, q.zero):
        for values in (part.scale, part.zero) if isinstance(part, QTensor) else (part,):
            if values is not None and values.dtype != jnp.uint8 and not bool(jnp.isfinite(_wide(values)).all()):
                raise InputError("its scales hold NaN or infinite values")
    scale: Any = dequantize(q.scale) if isinstance(q.scale, QTensor) else _wide(q.scale)
    if not np.abs(np.asarray(scale, np.float64)).max() * _largest(q.format) <= np.finfo(np.float32).max:
        raise InputError("its scales are so large that weights are infinite")
    return q


def _largest(format: Any) -> float:
    """The most by which a scale is multiplied."""
    if isinstance(format, Float):
        return format.largest
    return max(map(abs, format.levels)) if isinstance(format, Codebook) else 2.0**format.bits


def _wide(values: Any) -> Any:
    return jnp.asarray(np.asarray(values).astype(np.float32))


def only_kind(weights: Mapping[str, QTensor], title: str, kind: Callable[[QTensor], Any]) -> Any:
    """What `kind` says of every weight.

    Raises:
      InputError: weights differ in it, which the format can't say.
    """
    first, *others = weights.items()
    for name, q in others:
        if kind(q) != kind(first[1]):
            raise InputError(
                f"{name} is {brief(q.format)} and {first[0]} {brief(first[1].format)}: {title} holds weights of one "
                f'format, and "compressed-tensors" or "plain" can hold several.'
            )
    return kind(first[1])


E8M0 = "float8_e8m0fnu"
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
