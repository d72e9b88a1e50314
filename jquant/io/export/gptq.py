"""The GPTQ layout, as AutoGPTQ made it and GPTQModel and vLLM read it: integers of 2, 3, 4 or 8 bits.

    qweight  int32   [in · bits / 32, out]        codes, a little-endian bit stream along `in`
    qzeros   int32   [groups, out · bits / 32]    zeros, a bit stream along `out`
    scales   float16 [groups, out]
    g_idx    int32   [in]                         the group of each row

A weight is scale · (code − zero). Version 1 (`checkpoint_format` "gptq") stores zero − 1, version 2 ("gptq_v2") the
zero. Readers of version 1 differ on a zero of 0, which is stored as the largest code: some read 2^bits, some carry into
the next zero. So version 1 refuses it. Symmetric weights have the zero 2^(bits − 1).

32 codes of 3 bits take three words: codes 10 and 21 are split over two of them. That is the bit stream of
`jquant.formats.pack`, as at every other width, so words are our bytes, regrouped.

Source: AutoGPTQ's `QuantLinear.pack` and GPTQModel 7.6 (`nn_modules/qlinear`).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

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

BITS = (2, 3, 4, 8)
TITLE = "the GPTQ layout"


def why_not(q: QTensor, version: int = 2) -> str | None:
    """Why a weight can't be written in this layout; None if it can. See `FolderFormat`."""
    if problem := integer_problem(q, TITLE, BITS, ("float16",)):
        return problem
    if q.in_features * q.format.bits % 32 or q.shape[-1] * q.format.bits % 32:
        return f"its {q.in_features} × {q.shape[-1]} codes of {q.format.bits} bits do not fill {TITLE}'s 32-bit words"
    if version == 1 and q.zero is not None and not np.asarray(stored_grid(q)[1]).all():
        return f"a group has the zero 0, which version 1 of {TITLE} can't say"
    return None


def to_tensors(q: QTensor, version: int = 2) -> Tensors:
    """The tensors of a weight `[in, out]` that `why_not` accepts."""
    bits, rows = q.format.bits, q.in_features
    groups = groups_of(q.format.group, rows)  # pyright: ignore[reportAttributeAccessIssue]
    if q.zero is None:
        zeros = np.full((groups, q.shape[1]), 2 ** (bits - 1), np.uint8)
    else:
        zeros = np.asarray(stored_grid(q)[1])
    zeros = jnp.asarray(zeros - (version == 1))
    return {
        "qweight": transposed(to_words(transposed(q.codes))),
        "qzeros": to_words(transposed(pack(zeros.T, bits))),
        "scales": np.asarray(q.scale),
        "g_idx": np.arange(rows, dtype=np.int32) // np.int32(rows // groups),
    }


def from_tensors(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], shape: tuple[int, int]) -> QTensor:
    """The weight `[in, out]` of these tensors, bit for bit.

    Widths and groups of single weights, `dynamic` in the config, are read from the tensors' shapes.

    Args:
      tensors: by the end of their name.
      config: quantization_config.
      shape: of the weight, `[in, out]`.

    Raises:
      InputError: tensors are missing, or of another dtype or shape; settings that this layout does not have; rows in
        an order of their own (`desc_act` with groups that follow it); a zero of version 1 that readers differ on.
    """
    rows, out = shape
    bits, group = _width_and_group(tensors, config, rows)
    groups = groups_of(group, rows)
    if rows * bits % 32 or out * bits % 32:
        raise InputError(f"its {rows} × {out} codes of {bits} bits do not fill {TITLE}'s 32-bit words")
    check_tensors(
        tensors,
        {
            "qweight": (("int32",), (rows * bits // 32, out)),
            "qzeros": (("int32",), (groups, out * bits // 32)),
            "scales": (SCALES, (groups, out)),
            "g_idx": (("int32",), (rows,)),
        },
    )
    if not np.array_equal(tensors["g_idx"], np.arange(rows) // (rows // groups)):
        raise InputError(
            "g_idx puts the rows into groups in an order of its own (desc_act), and jquant's are consecutive rows"
        )
    zeros = np.asarray(_unpacked(tensors["qzeros"], bits, out)).T
    if _version(config) == 1:
        if (zeros == 2**bits - 1).any():
            raise InputError(
                f"qzeros holds {2**bits - 1}, which some readers take for a zero of 0 and some for {2**bits}"
            )
        zeros = zeros + np.uint8(1)
    symmetric = setting(config, "sym", bool, True) and bool((zeros == 2 ** (bits - 1)).all())
    codes = transposed(from_words(transposed(tensors["qweight"]), rows * bits // 8))
    zero = None if symmetric else jnp.asarray(transposed(pack(jnp.asarray(zeros.T), bits)))
    format = Int(bits, group, symmetric, str(tensors["scales"].dtype))
    return QTensor(jnp.asarray(codes), jnp.asarray(tensors["scales"]), zero, format, rows)


def quantization_config(weights: Mapping[str, QTensor], floats: Sequence[str], version: int = 2) -> dict[str, Any]:
    """The entry of config.json; a width or a group of single weights is an entry of `dynamic`.

    Raises:
      InputError: some weights are symmetric and some are not.
    """
    symmetric = only_kind(weights, TITLE, lambda q: q.zero is None)
    kinds = {name: {"bits": q.format.bits, "group_size": group_size(q.format.group)} for name, q in weights.items()}
    listed = list(kinds.values())
    usual = max(listed, key=listed.count)
    escaped = lambda name: f"^{name.replace('.', chr(92) + '.')}$"  # noqa: E731
    dynamic = {f"-:{escaped(name)}": {} for name in floats if name != "lm_head"}
    dynamic |= {f"+:{escaped(name)}": kind for name, kind in kinds.items() if kind != usual}
    return {
        "quant_method": "gptq",
        **usual,
        "sym": symmetric,
        "desc_act": False,
        "static_groups": True,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "pack_dtype": "int32",
        "lm_head": "lm_head" in weights,
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _width_and_group(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], rows: int) -> tuple[int, Any]:
    bits = setting(config, "bits", int)
    group = setting(config, "group_size", int)
    if setting(config, "dynamic", dict, {}):
        qweight, scales = tensors.get("qweight"), tensors.get("scales")
        if qweight is not None and scales is not None and qweight.ndim == scales.ndim == 2 and scales.shape[0]:
            bits, rest = divmod(qweight.shape[0] * 32, rows)
            bits = 0 if rest else bits
            if scales.shape[0] != groups_of(group_of(group, rows), rows):
                group = rows // scales.shape[0] if scales.shape[0] > 1 else -1
    if bits not in BITS:
        raise InputError(f"it has {str(bits)[:20]} bits, and {TITLE} holds {', '.join(map(str, BITS))}")
    if setting(config, "pack_dtype", str, "int32") != "int32":
        raise InputError(f"quantization_config has pack_dtype={config['pack_dtype'][:50]!r}, and jquant reads int32")
    return bits, group_of(group, rows)


def _version(config: Mapping[str, Any]) -> int:
    named = setting(config, "checkpoint_format", str, config.get("format") or "gptq")
    if named not in ("gptq", "gptq_v2"):
        raise InputError(f"quantization_config has checkpoint_format={named[:50]!r}, and jquant reads gptq and gptq_v2")
    return 1 if named == "gptq" else 2


def _unpacked(words: np.ndarray, bits: int, n: int) -> Any:
    """The codes of rows of words, `[n, rows]`."""
    return unpack(jnp.asarray(transposed(from_words(words, n * bits // 8))), bits, n)


def folder_format(version: int) -> FolderFormat:
    """The layout with its version of zeros."""
    write = lambda q, dtype: to_tensors(q, version)  # noqa: E731 - the model's dtype is not said
    return FolderFormat(partial(why_not, version=version), write, partial(quantization_config, version=version))
