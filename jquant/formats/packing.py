"""Packs codes of 1 to 8 bits into a little-endian bit stream."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Integer, UInt8, UInt32


def pack(codes: UInt8[Array, "*l n out"], bits: int) -> UInt8[Array, "*l bytes out"]:
    """Packs along axis −2 as a little-endian bit stream of ⌈n · bits / 8⌉ bytes: 8 codes take `bits` of them."""
    n = codes.shape[-2]
    if bits == 8:
        return codes
    fill = [(0, 0)] * (codes.ndim - 2) + [(0, -n % 8), (0, 0)]
    lanes = jnp.pad(codes, fill).reshape(*codes.shape[:-2], -1, 8, codes.shape[-1]).astype(jnp.uint16)
    packed = []
    for byte in range(bits):
        value = jnp.zeros_like(lanes[..., 0, :])
        for lane in range(8):
            shift = lane * bits - byte * 8
            if -bits < shift < 8:
                value |= (lanes[..., lane, :] << shift) if shift >= 0 else (lanes[..., lane, :] >> -shift)
        packed.append(value.astype(jnp.uint8))
    stream = jnp.stack(packed, -2).reshape(*codes.shape[:-2], -1, codes.shape[-1])
    return stream[..., : -(-n * bits // 8), :]


def unpack(packed: UInt8[Array, "*l bytes out"], bits: int, n: int) -> UInt8[Array, "*l n out"]:
    """Inverse of `pack`; `n` is the number of codes along axis −2."""
    if bits == 8:
        return packed[..., :n, :]
    packed = jnp.pad(packed, [(0, 0)] * (packed.ndim - 2) + [(0, -packed.shape[-2] % bits), (0, 0)])
    chunk = packed.reshape(*packed.shape[:-2], -1, bits, packed.shape[-1])
    lanes = []
    for lane in range(8):
        byte, shift = divmod(lane * bits, 8)
        value = chunk[..., byte, :] >> shift
        if shift + bits > 8:
            value |= chunk[..., byte + 1, :] << (8 - shift)
        lanes.append(value & (2**bits - 1))
    return jnp.stack(lanes, -2).reshape(*packed.shape[:-2], -1, packed.shape[-1])[..., :n, :]


def cut_words(words: Integer[Array, "*l tiles out"], bits: int, rows: int) -> UInt8[Array, "*l tiles rows out"]:
    """Each weight's share of the code of its tile of `rows` weights: `bits` of at most 32 bits, the lowest first."""
    shifts = bits * jnp.arange(rows, dtype=jnp.uint32)[:, None]
    return ((words.astype(jnp.uint32)[..., None, :] >> shifts) & (2**bits - 1)).astype(jnp.uint8)


def join_words(shares: UInt8[Array, "*l tiles rows out"], bits: int) -> UInt32[Array, "*l tiles out"]:
    """Inverse of `cut_words`."""
    shifts = bits * jnp.arange(shares.shape[-2], dtype=jnp.uint32)[:, None]
    return jnp.sum(shares.astype(jnp.uint32) << shifts, -2, dtype=jnp.uint32)
