"""AutoAWQ's GEMM layout, as vLLM reads it: 4-bit integers with zeros.

    qweight  int32   [in, out / 8]        codes of 8 columns in a word
    qzeros   int32   [groups, out / 8]    zeros, likewise
    scales   float16 [groups, out]

A word holds columns 0, 2, 4, 6, 1, 3, 5, 7 of its eight, from the lowest 4 bits. A weight is scale · (code − zero);
symmetric weights have the zero 8.

Source: AutoAWQ's `WQLinear_GEMM.from_linear`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, UInt8

from jquant.errors import InputError
from jquant.formats import Int, pack, unpack
from jquant.io.export.base import (
    SCALES,
    FolderFormat,
    Tensors,
    check_tensors,
    from_words,
    group_of,
    group_size,
    groups_of,
    integer_problem,
    only_kind,
    setting,
    to_words,
    transposed,
)
from jquant.qtensor import QTensor, stored_grid

ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
TITLE = "the AWQ layout"


def why_not(q: QTensor) -> str | None:
    """Why a weight can't be written in this layout; None if it can. See `FolderFormat`."""
    if problem := integer_problem(q, TITLE, (4,), ("float16",)):
        return problem
    return None if q.shape[-1] % 8 == 0 else f"its {q.shape[-1]} outputs are no multiple of 8, as {TITLE} asks"


def to_tensors(q: QTensor) -> Tensors:
    """The tensors of a weight `[in, out]` that `why_not` accepts."""
    scale, zero = stored_grid(q)
    zeros = np.full(scale.shape, 8, np.uint8) if zero is None else np.asarray(zero)
    codes = np.asarray(unpack(q.codes, 4, q.in_features))
    return {"qweight": _to_words(codes), "qzeros": _to_words(zeros), "scales": np.asarray(scale)}


def from_tensors(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], shape: tuple[int, int]) -> QTensor:
    """The weight `[in, out]` of these tensors, bit for bit; arguments as of `gptq.from_tensors`.

    Raises:
      InputError: tensors are missing, or of another dtype or shape; another version of the layout.
    """
    rows, out = shape
    bits, version = setting(config, "bits", int, 4), setting(config, "version", str, config.get("format") or "gemm")
    if bits != 4 or version.lower() != "gemm":
        raise InputError(
            f"quantization_config has bits={str(bits)[:20]} and version={version[:20]!r}, and jquant reads 4 and gemm"
        )
    if out % 8:
        raise InputError(f"its {out} outputs are no multiple of 8, as {TITLE} asks")
    group = group_of(setting(config, "group_size", int, 128), rows)
    groups = groups_of(group, rows)
    check_tensors(
        tensors,
        {
            "qweight": (("int32",), (rows, out // 8)),
            "qzeros": (("int32",), (groups, out // 8)),
            "scales": (SCALES, (groups, out)),
        },
    )
    zeros = _from_words(tensors["qzeros"])
    told = setting(setting(config, "meta", dict, {}), "symmetric", bool, not setting(config, "zero_point", bool, True))
    symmetric = told and bool((zeros == 8).all())
    zero = None if symmetric else jnp.asarray(transposed(pack(jnp.asarray(zeros.T), 4)))
    codes = pack(jnp.asarray(_from_words(tensors["qweight"])), 4)
    format = Int(4, group, symmetric, str(tensors["scales"].dtype))
    return QTensor(codes, jnp.asarray(tensors["scales"]), zero, format, rows)


def quantization_config(weights: Mapping[str, QTensor], floats: Sequence[str]) -> dict[str, Any]:
    """The entry of config.json; `meta` says which zeros of 8 are ours to leave out.

    Raises:
      InputError: weights with other groups, or symmetric and others; a quantized head, which readers leave float.
    """
    group, symmetric = only_kind(weights, TITLE, lambda q: (q.format.group, q.zero is None))
    if "lm_head" in weights:
        raise InputError(f'lm_head is quantized, and {TITLE} has float heads: "gptq_v2" or "plain" can hold it.')
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": group_size(group),
        "zero_point": True,
        "modules_to_not_convert": list(floats),
        "meta": {"symmetric": symmetric},
    }


def _to_words(codes: UInt8[np.ndarray, "rows out"]) -> Int32[np.ndarray, "rows words"]:
    placed = codes.reshape(len(codes), -1, 8)[..., ORDER].reshape(len(codes), -1)
    return to_words(placed[:, ::2] | placed[:, 1::2] << 4)


def _from_words(words: Int32[np.ndarray, "rows words"]) -> UInt8[np.ndarray, "rows out"]:
    stream = from_words(words, 4 * words.shape[1])
    placed = np.stack([stream & 15, stream >> 4], -1).reshape(len(words), -1, 8)
    return placed[..., np.argsort(ORDER)].reshape(len(words), -1)


FORMAT = FolderFormat(why_not, lambda q, dtype: to_tensors(q), quantization_config)
