"""x @ w for packed codes of w, without dequantizing all of a large matrix at once."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.activations import Activation, in_16_bits, input_codes, outlier_features, quantize_inputs
from jquant.formats import Format, Int, block_shape, expand, grouped, tile_of, unpack
from jquant.kernels.packed import PackedMatrix

# The most weights that a product of several rows dequantizes at a time: 4 MB of float32, about a core's share of cache.
PANEL = 1 << 20


def matmul(x: Float[Array, "*b in"], w: PackedMatrix) -> Float[Array, "*b out"]:
    """x @ w in x's dtype.

    A matrix of more than PANEL weights is never dequantized as a whole. For a single row, as in decoding, one
    loop over the packed bytes unpacks, multiplies and sums. For more rows the matrix is taken panel by panel along
    `in`.
    """
    if x.size == x.shape[-1]:
        return _matvec(x.reshape(-1), w).reshape(*x.shape[:-1], -1)
    return _panels(x, w)


def quantized_matmul(
    x: Float[Array, "*b in"], w: PackedMatrix, activation: Activation, input_scale: Array | None
) -> Float[Array, "*b out"]:
    """x @ w with inputs rounded to `activation`; features with outliers are not rounded, and multiply in 16 bits."""
    flat = x.reshape(-1, x.shape[-1])
    if _one_integer_scale(w.format) and _one_integer_scale(activation.format):
        y = _integer_product(flat, w, activation, input_scale)
    else:
        y = matmul(quantize_inputs(flat, activation, input_scale), w)
    y = add_outliers(y, flat, activation, lambda kept: matmul(kept, w))
    return y.reshape(*x.shape[:-1], -1).astype(x.dtype)


def add_outliers(
    y: Float[Array, "tokens out"],
    x: Float[Array, "tokens in"],
    activation: Activation,
    product: Callable[[Array], Array],
) -> Float[Array, "tokens out"]:
    """y, the product of rounded inputs, and that of the features with outliers, which `product` multiplies."""
    if activation.outliers is None:
        return y
    outlying = outlier_features(x, activation)
    kept = in_16_bits(jnp.where(outlying, x, 0))
    # Most inputs have no outliers.
    return y + jax.lax.cond(jnp.any(outlying), lambda: product(kept), lambda: jnp.zeros_like(y))


def _one_integer_scale(format: Format) -> bool:
    """Whether codes can be summed as integers before scaling: no zero, one scale a column or tensor."""
    return isinstance(format, Int) and format.symmetric and format.group in ("channel", "tensor")


def _integer_product(
    x: Float[Array, "tokens in"], w: PackedMatrix, activation: Activation, input_scale: Array | None
) -> Float[Array, "tokens out"]:
    """Σᵢ codes of x · codes of w in int8 × int8 → int32, exact up to 131,071 inputs, then scaled in float32."""
    codes, (scale, _) = input_codes(x, activation, input_scale)
    signed = lambda codes, bits: (codes.astype(jnp.int32) - 2 ** (bits - 1)).astype(jnp.int8)  # noqa: E731
    sums = jax.lax.dot_general(
        signed(codes, activation.format.bits),
        signed(unpack(w.codes, w.format.bits, w.in_features), w.format.bits),
        (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.int32,
    )
    return sums.astype(jnp.float32) * scale.T.astype(jnp.float32) * w.scale.astype(jnp.float32)


def _panels(x: Float[Array, "*b in"], w: PackedMatrix) -> Float[Array, "*b out"]:
    """Σ over panels of whole groups, of at most PANEL weights if groups allow it; the remaining rows come first."""
    tile = math.lcm(tile_of(w.format)[0], 8)  # codes pack by 8 rows
    unit = tile if w.scale.shape[-2] == 1 else math.lcm(block_shape(w.format, w.shape)[0], tile)
    size = unit * max(1, PANEL // (unit * w.shape[-1]))
    count = w.in_features // size
    if count < 2:
        return x @ w.dequantize(x.dtype)
    panelled, block = count * size, block_shape(w.format, w.shape)

    def rows(start: int, stop: int) -> tuple[Array, Any]:
        """Codes and grid of the rows from start to stop, which are whole groups."""
        bytes_of = lambda n: -(-n // 8) * w.format.bits  # noqa: E731
        groups_of = lambda n: -(-n // block[0])  # noqa: E731
        cut = lambda v: v if v.shape[-2] == 1 else v[groups_of(start) : groups_of(stop)]  # noqa: E731
        return w.codes[bytes_of(start) : bytes_of(stop)], jax.tree.map(cut, (w.scale, w.zero))

    def product(x: Array, codes: Array, grid: Any) -> Array:
        n = x.shape[-1]
        at = jax.tree.map(lambda v: expand(v, block, (n, w.shape[-1])), grid)
        values = w.decode(unpack(codes, w.format.bits, n), *at).astype(x.dtype)
        return jnp.matmul(x, values, preferred_element_type=jnp.float32)

    def add(total: Array, panel: tuple[Array, Array, Any]) -> tuple[Array, None]:
        return total + product(*panel), None

    codes, at = rows(0, panelled)
    stack = lambda v: v.reshape(count, -1, v.shape[-1])  # noqa: E731
    at = jax.tree.map(lambda v: jnp.broadcast_to(v, (count, *v.shape)) if v.shape[0] == 1 else stack(v), at)
    inputs = jnp.moveaxis(x[..., :panelled].reshape(*x.shape[:-1], count, size), -2, 0)
    total = jnp.zeros((*x.shape[:-1], w.shape[-1]), jnp.float32)
    if panelled < w.in_features:
        total = product(x[..., panelled:], *rows(panelled, w.in_features))
    return jax.lax.scan(add, total, (inputs, stack(codes), at))[0].astype(x.dtype)


def _matvec(x: Float[Array, " in"], w: PackedMatrix) -> Float[Array, " out"]:
    """Σ_g scale_g Σ_{i in g} x_i level(code_i): values are linear in the scale, so each group is scaled once.

    A group is summed in pieces of at most 64 rows: XLA's CPU loop walks down a column, and the cache lines of 64 rows
    stay in the first-level cache (12 times faster than a whole column of 576).
    """
    rows, columns = block_shape(w.format, w.shape)
    tile = tile_of(w.format)[0]
    piece = tile * math.gcd(rows // tile, max(64 // tile, 1))
    pieces = lambda v: grouped(v, (rows, 1)).reshape(-1, piece, v.shape[-1])  # noqa: E731
    # One row per group, one column per output; then one row per piece.
    wide = lambda v: expand(v, (1, columns), (v.shape[-2], w.shape[-1])).repeat(rows // piece, -2)  # noqa: E731
    scale, zero = jax.tree.map(wide, (w.scale, w.zero))
    codes = pieces(unpack(w.codes, w.format.bits, w.in_features))
    inputs, unscaled = pieces(x[:, None].astype(jnp.float32)), jnp.ones((1, 1, 1))
    if zero is None or zero.dtype == jnp.uint8:
        levels = w.decode(codes, unscaled, None if zero is None else zero[:, None])
        return jnp.sum(jnp.sum(inputs * levels, -2) * scale.astype(jnp.float32), -2).astype(x.dtype)
    sums = jnp.sum(inputs * w.decode(codes, unscaled, None), -2) * scale.astype(jnp.float32)
    return jnp.sum(sums + jnp.sum(inputs, -2) * zero.astype(jnp.float32), -2).astype(x.dtype)
