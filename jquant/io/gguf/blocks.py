"""GGUF's quantized blocks as QTensors and back, bit for bit, for llama.cpp's types of 2 to 8 bits.

A GGUF row is a column of ours: ggml stores weights `[out, in]`, and blocks of 32 or 256 run along `in`. ggml-common.h
defines what each type stores and in which order; `jquant.formats.GGUF` says what the fields mean. Both directions only
move bits, those of NaN scales too.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float16, UInt8

from jquant.errors import InputError
from jquant.formats import GGUF, unpack
from jquant.qtensor import QTensor, from_codes

# Fields of a block in their order, with their bytes. "d" and "m" are float16: a block's scale and zero, or those of a
# super-block, whose "m" is subtracted. "sub" are the sub-blocks' scales, "low" and "high" the codes' lower and upper
# bits.
LAYOUTS: dict[str, dict[str, int]] = {
    "Q4_0": {"d": 2, "low": 16},
    "Q4_1": {"d": 2, "m": 2, "low": 16},
    "Q5_0": {"d": 2, "high": 4, "low": 16},
    "Q5_1": {"d": 2, "m": 2, "high": 4, "low": 16},
    "Q8_0": {"d": 2, "low": 32},
    "Q2_K": {"sub": 16, "low": 64, "d": 2, "m": 2},
    "Q3_K": {"high": 32, "low": 64, "sub": 12, "d": 2},
    "Q4_K": {"d": 2, "m": 2, "sub": 12, "low": 128},
    "Q5_K": {"d": 2, "m": 2, "sub": 12, "high": 32, "low": 128},
    "Q6_K": {"low": 128, "high": 64, "sub": 16, "d": 2},
    "IQ4_NL": {"d": 2, "low": 16},
}

# For each of the two fields: bits of a code, and `run`. The lowest bits of `run` bytes hold the first `run` codes,
# their next bits the next `run` codes, and so on.
CODES: dict[str, dict[str, tuple[int, int]]] = {
    "Q4_0": {"low": (4, 16)},
    "Q4_1": {"low": (4, 16)},
    "Q5_0": {"low": (4, 16), "high": (1, 1)},
    "Q5_1": {"low": (4, 16), "high": (1, 1)},
    "Q8_0": {"low": (8, 32)},
    "Q2_K": {"low": (2, 32)},
    "Q3_K": {"low": (2, 32), "high": (1, 32)},
    "Q4_K": {"low": (4, 32)},
    "Q5_K": {"low": (4, 32), "high": (1, 32)},
    "Q6_K": {"low": (4, 64), "high": (2, 32)},
    "IQ4_NL": {"low": (4, 16)},
}

_INT8_OFFSET = np.uint8(128)  # ggml's int8 codes are ours with the top bit flipped


def block_size(kind: str) -> tuple[int, int]:
    """Weights and bytes of a block of `kind`, a key of `jquant.formats.GGUF`.

    Raises:
      InputError: an unknown kind.
    """
    if kind not in LAYOUTS:
        raise InputError(f"{kind!r} is no GGUF block type; there are {', '.join(LAYOUTS)}.")
    bits, _ = CODES[kind]["low"]
    return LAYOUTS[kind]["low"] * 8 // bits, sum(LAYOUTS[kind].values())


def from_blocks(raw: UInt8[np.ndarray, "out bytes"], kind: str, in_features: int) -> QTensor:
    """The weight `[in_features, out]` that rows of GGUF blocks hold.

    Raises:
      InputError: an unknown kind, or rows whose length does not suit `in_features` weights.
    """
    weights, size = block_size(kind)
    if in_features % weights or raw.shape[1] * weights != in_features * size:
        raise InputError(f"{raw.shape[1]} bytes are no {kind} row of {in_features} weights: {size} for each {weights}.")
    blocks = raw.reshape(len(raw), -1, size)
    stops = np.cumsum(list(LAYOUTS[kind].values()))
    fields = dict(zip(LAYOUTS[kind], np.split(blocks, stops[:-1], axis=-1), strict=True))
    codes = _columns(_split_codes(fields, kind))
    format: Any = GGUF[kind]
    halves = {name: jnp.asarray(_columns(_half(fields[name]))) for name in ("d", "m") if name in fields}
    scale, zero = halves["d"], halves.get("m")
    if "sub" in fields:
        scales, minima = _split_sub(fields["sub"], kind)
        scale = from_codes(jnp.asarray(_columns(scales)), scale, None, format.scale)
        zero = None if zero is None else from_codes(jnp.asarray(_columns(minima)), _negated(zero), None, format.scale)
    return from_codes(jnp.asarray(codes), scale, zero, format)


def to_blocks(q: QTensor, kind: str) -> UInt8[np.ndarray, "out bytes"]:
    """Rows of GGUF blocks that hold a weight `[in, out]`; the inverse of `from_blocks`.

    Raises:
      InputError: an unknown kind, a weight in another format, or rows that do not fill the blocks.
    """
    weights, _ = block_size(kind)
    if q.in_features % weights or len(q.shape) != 2 or q.format != GGUF[kind]:
        raise InputError(
            f"{kind} takes a matrix in its own format with a multiple of {weights} inputs, not {q.shape} in {q.format}."
        )
    fields = _join_codes(_rows(np.asarray(unpack(q.codes, q.format.bits, q.in_features)), weights), kind)
    d, m = q.scale, q.zero
    if "sub" in LAYOUTS[kind]:
        blocks = q.in_features // weights
        fields["sub"] = _join_sub([_sub_codes(v, blocks) for v in (q.scale, q.zero) if v is not None], kind)
        d, m = q.scale.scale, None if q.zero is None else _negated(q.zero.scale)
    fields |= {name: _half_bytes(value) for name, value in (("d", d), ("m", m)) if value is not None}
    return np.concatenate([fields[name] for name in LAYOUTS[kind]], -1).reshape(q.shape[1], -1)


def _split_codes(fields: dict[str, np.ndarray], kind: str) -> np.ndarray:
    """One code per weight, `[out, blocks, weights]`."""
    codes, shift = np.zeros((), np.uint8), 0
    for name, (bits, run) in CODES[kind].items():
        codes = codes | _spread(fields[name], bits, run) << shift
        shift += bits
    return codes ^ _INT8_OFFSET if kind == "Q8_0" else codes


def _join_codes(codes: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    codes = codes ^ _INT8_OFFSET if kind == "Q8_0" else codes
    fields, shift = {}, 0
    for name, (bits, run) in CODES[kind].items():
        fields[name] = _gather((codes >> shift) & (2**bits - 1), bits, run)
        shift += bits
    return fields


def _split_sub(sub: np.ndarray, kind: str) -> tuple[np.ndarray, Any]:
    """Codes of the sub-blocks' scales, and of their minima or None, `[out, blocks, sub-blocks]`."""
    if kind == "Q2_K":
        return sub & 15, sub >> 4
    if kind == "Q3_K":
        return _spread(sub[..., :8], 4, 8) | _spread(sub[..., 8:], 2, 4) << 4, None
    if kind == "Q6_K":
        return sub ^ _INT8_OFFSET, None
    # The lower 6 bits of the first 8 bytes are the first four scales and minima; the upper 2 belong to the last four.
    first, second, third = np.split(sub, 3, axis=-1)
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], -1)
    return scales, np.concatenate([second & 63, third >> 4 | second >> 6 << 4], -1)


def _join_sub(codes: list[np.ndarray], kind: str) -> np.ndarray:
    if kind == "Q3_K":
        return np.concatenate([_gather(codes[0] & 15, 4, 8), _gather(codes[0] >> 4, 2, 4)], -1)
    if kind == "Q6_K":
        return codes[0] ^ _INT8_OFFSET
    if kind == "Q2_K":
        return codes[0] | codes[1] << 4
    (scale, last_scale), (minimum, last_minimum) = (np.split(v, 2, axis=-1) for v in codes)
    third = last_scale & 15 | (last_minimum & 15) << 4
    return np.concatenate([scale | last_scale >> 4 << 6, minimum | last_minimum >> 4 << 6, third], -1)


def _spread(fields: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Codes of `bits` bits from bytes, in the order that `CODES` describes."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    parts = fields.reshape(*fields.shape[:-1], -1, 1, run) >> shifts & np.uint8(2**bits - 1)
    return parts.reshape(*fields.shape[:-1], -1)


def _gather(codes: np.ndarray, bits: int, run: int) -> np.ndarray:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    parts = codes.reshape(*codes.shape[:-1], -1, 8 // bits, run) << shifts
    return np.bitwise_or.reduce(parts, axis=-2).reshape(*codes.shape[:-1], -1)


def _columns(values: np.ndarray) -> np.ndarray:
    """`[out, blocks, n]` to `[blocks · n, out]`."""
    return np.ascontiguousarray(values.reshape(len(values), -1).T)


def _rows(values: np.ndarray, n: int) -> np.ndarray:
    """`[blocks · n, out]` to `[out, blocks, n]`."""
    return np.ascontiguousarray(values.T).reshape(values.shape[1], -1, n)


def _half(fields: UInt8[np.ndarray, "out blocks 2"]) -> Float16[np.ndarray, "out blocks 1"]:
    return np.ascontiguousarray(fields).view("<f2")


def _half_bytes(values: Array) -> UInt8[np.ndarray, "out blocks 2"]:
    return _rows(np.asarray(values, "<f2"), 1).view(np.uint8)


def _negated(values: Float16[Array, "..."]) -> Float16[Array, "..."]:
    # Only the sign bit is flipped: arithmetic could change other bits of a NaN.
    return jnp.asarray((np.asarray(values).view(np.uint16) ^ np.uint16(0x8000)).view(np.float16))


def _sub_codes(values: QTensor, blocks: int) -> np.ndarray:
    codes = np.asarray(unpack(values.codes, values.format.bits, values.in_features))
    return _rows(codes, values.in_features // blocks)
