"""Fake quantization: the packed weight's values, and the gradients of what straight-through rounding takes for them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import problem, shape_for

from jquant import METHODS, SEQ, Activation, Codebook, Float, Int, dequantize, method
from jquant.activations import fake_quant_inputs
from jquant.formats import FP8_E4M3, NF4, Format, block_shape, tile_of
from jquant.learning.fake_quant import FakeQuantized, as_typed, fake_quant, fixed_codes
from jquant.qtensor import Grid, quantize
from jquant.ranges import MinMax

EVERY = {method(name).format: name for name in reversed(METHODS)}
FORMATS = {format: name for format, name in EVERY.items() if tile_of(format) == (1, 1)}  # tiles have no ends
every_format = pytest.mark.parametrize("format", FORMATS, ids=FORMATS.values())


def floats(grid) -> tuple:
    return tuple(None if v is None else jnp.asarray(v, jnp.float32) for v in grid)


def clipped_grid(w, format: Format, factor: float = 0.7) -> tuple:
    """A grid in floats on which some weights lie beyond the ends."""
    scale, zero = floats(MinMax()(w, format))
    return scale * factor, zero


# ---- forwards -------------------------------------------------------------------------------------------------------


@every_format
def test_the_value_is_that_of_the_packed_weight_bit_for_bit(format):
    w, _, _ = problem(shape_for(format))
    for grid in (floats(MinMax()(w, format)), clipped_grid(w, format)):
        packed = quantize(w, *as_typed(*grid, format), format)
        value = np.asarray(fake_quant(w, *grid, format))
        if format == method("nf4_double").format:  # the mean of its scales is a sum, whose order compilers choose
            np.testing.assert_allclose(value, dequantize(packed), rtol=1e-6)
            continue
        np.testing.assert_array_equal(value, dequantize(packed))
        kernel = FakeQuantized.on_grid(w, *grid, format, w.shape)
        np.testing.assert_array_equal(kernel.value(), dequantize(kernel.pack()))
        fixed = FakeQuantized.of(packed)
        np.testing.assert_array_equal(fixed.value(), dequantize(packed))
        for a, b in zip(jax.tree.leaves(fixed.pack()), jax.tree.leaves(packed), strict=True):
            np.testing.assert_array_equal(a, b)


# ggml chooses codes before it rounds the scale, training after.
OWN = {format: name for format, name in FORMATS.items() if not isinstance(format, Int) or format.ties == "even"}


@pytest.mark.parametrize("format", OWN, ids=OWN.values())
def test_on_a_ranges_own_grid_it_is_the_nearest_rounding(format):
    w, _, _ = problem(shape_for(format))
    scale, zero = MinMax()(w, format)
    nearest = dequantize(quantize(w, scale, zero, format))
    np.testing.assert_array_equal(fake_quant(w, *floats((scale, zero)), format), nearest)


def test_a_kernel_multiplies_by_what_its_packed_weight_holds():
    w, _, _ = problem((160, 16))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 160)), jnp.float32)
    for activation in (None, Activation(), Activation(Int(8, "tensor", symmetric=True, scale="float32"), static=True)):
        q = quantize(w, *MinMax()(w, Int(4, 64)), Int(4, 64))
        static = activation is not None and activation.static
        q = replace(q, activation=activation, input_scale=jnp.float32([[0.03]]) if static else None)
        exact = replace(FakeQuantized.of(q), compute="float32")
        np.testing.assert_allclose(x @ exact, x @ q, rtol=1e-5, atol=1e-5)
        assert np.abs((x @ FakeQuantized.of(q)) - (x @ q)).max() < 2e-2  # factors in bfloat16


# ---- backwards ------------------------------------------------------------------------------------------------------

ASYMMETRIC = Codebook((-1.0, -0.4, -0.1, 0.0, 0.2, 0.7), "tensor")
SIMPLE = {
    "integer zero": Int(3, 16),
    "integer zero, a column": Int(4, "channel", scale="float32"),
    "symmetric": Int(3, 16, symmetric=True),
    "symmetric without its last code": Int(3, (16, 4), symmetric=True, full_range=False),
    "float zero": Int(3, 16, zero="float"),
    "ties up": Int(4, 32, symmetric=True, scale="float32", ties="up"),
    "NF4": NF4(16),
    "an uneven codebook, a tensor": ASYMMETRIC,
    "FP8 in blocks": FP8_E4M3((16, 4)),
    "a float under powers of two": Float(2, 1, 16, "float8_e8m0fnu"),
}
ROWS, OUT = 40, 6  # groups of 16 end in a short one, blocks of 16 × 4 in short ones on both edges


def heavy_tailed(seed: int = 0) -> jax.Array:
    return jnp.asarray(0.05 * np.random.default_rng(seed).standard_t(3, (ROWS, OUT)), jnp.float32)


def of_blocks(format: Format, shape: tuple[int, int]) -> list[tuple[int, int, tuple[slice, slice]]]:
    """(Group, column, its rows and columns) of every block."""
    (rows, columns), (n, out) = block_shape(format, shape), shape
    return [
        (i // rows, j // columns, (slice(i, min(i + rows, n)), slice(j, min(j + columns, out))))
        for i in range(0, n, rows)
        for j in range(0, out, columns)
    ]


def elements(format: Format) -> np.ndarray:
    """The values that codes stand for under a scale of 1 and no zero, from outside the package."""
    match format:
        case Codebook():
            return np.asarray(format.levels)
        case Float():
            if format.bits == 4:
                positive = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
            else:
                positive = np.arange(0x7F, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float64)
            return np.unique(np.concatenate([positive, -positive]))
        case Int(symmetric=True):
            half = 2 ** (format.bits - 1)
            return np.arange(-half + (not format.full_range), half)
    assert isinstance(format, Int)
    return np.arange(2**format.bits)


def surrogate(w, scale: float, zero: float | None, format: Format, residue=None):
    """What straight-through rounding takes for a block's values, in float64: scale · (clip(u) + r), u the weight on the
    grid's axis and r what rounding adds there, a constant. Returns the values and r."""
    table = elements(format)
    moving = isinstance(format, Int) and format.zero == "float" and not format.symmetric
    origin = 0.0 if zero is None else zero
    position = np.clip((w - origin) / scale if moving else w / scale + origin, table.min(), table.max())
    if residue is None:
        residue = table[np.argmin(np.abs(position[..., None] - table), -1)] - position
    coded = position + residue
    return (scale * coded + origin if moving else scale * (coded - origin)), residue


@pytest.mark.parametrize("name", SIMPLE)
def test_gradients_are_those_of_the_straight_through_surrogate(name):
    """Against central differences in float64, for weights within the grid and beyond it, scales and zeros."""
    format, w = SIMPLE[name], heavy_tailed()
    rng = np.random.default_rng(5)
    slope = rng.standard_normal(w.shape)
    scale, zero = clipped_grid(w, format)
    if format.scale != "float32":  # so that nothing is rounded on the way
        scale = scale.astype(format.scale).astype(jnp.float32)
        zero = zero if zero is None or format.zero == "integer" else zero.astype(format.scale).astype(jnp.float32)
    value, back = jax.vjp(lambda *a: fake_quant(*a, format), w, scale, zero)
    found = jax.tree.map(np.asarray, back(jnp.asarray(slope, jnp.float32)))
    w, scale, zero, value = jax.tree.map(np.asarray, (w, scale, zero, value))
    beyond = 0
    for i, j, at in of_blocks(format, w.shape):
        part, s = np.asarray(w[at], np.float64), float(scale[i, j])
        z = None if zero is None else float(zero[i, j])
        values, residue = surrogate(part, s, z, format)
        np.testing.assert_allclose(value[at], values, rtol=1e-5, atol=1e-7)
        step = 1e-6 * s

        def change(dw=0.0, ds=0.0, dz=0.0):
            ends = [
                surrogate(part + sign * dw, s + sign * ds, None if z is None else z + sign * dz, format, residue)[0]  # noqa: B023
                for sign in (1, -1)
            ]
            return slope[at] * (ends[0] - ends[1]) / 2  # noqa: B023

        edge = np.abs(change(dw=step) / step / slope[at] - 0.5) < 0.49  # a weight on the very end of the grid
        assert not edge.any()
        np.testing.assert_allclose(found[0][at], change(dw=step) / step, rtol=1e-4, atol=1e-5)
        assert float(found[1][i, j]) == pytest.approx(change(ds=step).sum() / step, rel=2e-4, abs=2e-4)
        if z is not None:
            unit = step if format.zero == "float" else 1e-6
            assert float(found[2][i, j]) == pytest.approx(change(dz=unit).sum() / unit, rel=2e-4, abs=2e-4)
        beyond += (np.asarray(found[0][at]) == 0).sum()
    assert 0 < beyond < w.size / 2  # else one of the two cases was not seen


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gradients_of_symmetric_scales_are_lsqs(bits):
    """LSQ (arXiv 1902.08153, Eq. 3) in float64: −v/s + round(v/s) within, −Q_N or Q_P beyond."""
    format, w = Int(bits, "channel", symmetric=True, scale="float32"), heavy_tailed(bits)
    scale = jnp.asarray(np.random.default_rng(bits).uniform(0.01, 0.05, (1, OUT)), jnp.float32)
    slope = np.random.default_rng(1).standard_normal(w.shape)
    _, back = jax.vjp(lambda s: fake_quant(w, s, None, format), scale)
    position = np.asarray(w, np.float64) / np.asarray(scale, np.float64)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    each = np.where(position <= low, low, np.where(position >= high, high, np.round(position) - position))
    np.testing.assert_allclose(
        back(jnp.asarray(slope, jnp.float32))[0], (slope * each).sum(0, keepdims=True), rtol=1e-4
    )


@every_format
def test_every_formats_gradients_are_finite_masked_beyond_the_grid_and_consistent(format):
    """Σ over a block of ∂w · w + ∂scale · scale (+ ∂zero · zero) = Σ slope · ŵ, as ŵ is homogeneous in all three."""
    w, _, _ = problem(shape_for(format), seed=3)
    scale, zero = clipped_grid(w, format, 0.6)
    slope = jnp.asarray(np.random.default_rng(2).standard_normal(w.shape), jnp.float32)
    grid = Grid.of(*as_typed(scale, zero, format), format, w.shape)
    value, back = jax.vjp(lambda *a: fake_quant(*a, format), w, scale, zero)
    at_w, at_scale, at_zero, w, slope, value = jax.tree.map(np.asarray, (*back(slope), w, slope, value))
    assert at_scale.shape == scale.shape
    low, high = (np.asarray(grid.decode(format.encode(jnp.float32(end), *grid.nearest))) for end in (-3e38, 3e38))
    outside = np.asarray((w < np.minimum(low, high)) | (w > np.maximum(low, high)))
    assert outside.any()
    np.testing.assert_array_equal(np.asarray(at_w)[outside], 0)
    np.testing.assert_array_equal(np.asarray(at_w)[~outside], np.asarray(slope)[~outside])
    scales, zeros = (
        None if v is None else np.broadcast_to(np.asarray(v, np.float64), w.shape) for v in grid.per_weight
    )
    for i, j, at in of_blocks(format, w.shape):
        total = (at_w[at].astype(np.float64) * w[at]).sum() + at_scale[i, j] * scales[at].flat[0]
        if isinstance(format, Int) and format.zero == "float" and not format.symmetric:
            total += at_zero[i, j] * zeros[at].flat[0]
        expected = (slope[at].astype(np.float64) * value[at]).sum()
        assert total == pytest.approx(expected, rel=1e-3, abs=1e-3), (i, j)


@pytest.mark.parametrize("format", [NF4(16), SEQ(2, 16), ASYMMETRIC], ids=["NF4", "SEQ", "uneven"])
def test_learned_levels_have_the_gradient_of_the_weights_that_hold_them(format):
    w, rng = heavy_tailed(), np.random.default_rng(7)
    scale = clipped_grid(w, format)[0].astype(jnp.dtype(format.scale)).astype(jnp.float32)
    levels = jnp.sort(
        jnp.asarray(np.asarray(format.levels) + 0.03 * rng.standard_normal(len(format.levels)), jnp.float32)
    )
    slope = jnp.asarray(rng.standard_normal(w.shape), jnp.float32)
    value, back = jax.vjp(lambda w, s, t: fake_quant(w, s, None, format, t), w, scale, levels)
    at_w, at_scale, at_levels = back(slope)
    own = replace(format, levels=tuple(levels.tolist()))
    expected, back = jax.vjp(lambda w, s: fake_quant(w, s, None, own), w, scale)
    np.testing.assert_array_equal(value, expected)
    for ours, theirs in zip((at_w, at_scale), back(slope), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    codes = np.asarray(Grid.of(*as_typed(scale, None, own), own, w.shape).encode(w))
    steps = np.asarray(value, np.float64) / np.asarray(levels, np.float64)[codes]
    each = [(np.asarray(slope, np.float64) * steps)[codes == code].sum() for code in range(len(levels))]
    np.testing.assert_allclose(at_levels, each, rtol=1e-4, atol=1e-6)


def test_codes_that_do_not_change_have_gradients_of_a_linear_function():
    w, _, _ = problem((40, 8))
    for format in (Int(3, 16), Int(3, 16, zero="float", scale="float32"), NF4(16)):
        scale, zero = floats(MinMax()(w, format))
        codes = Grid.of(*as_typed(scale, zero, format), format, w.shape).encode(w)
        slope = jnp.asarray(np.random.default_rng(3).standard_normal(w.shape), jnp.float32)
        _, back = jax.vjp(lambda s, z: fixed_codes(codes, s, z, format), scale, zero)  # noqa: B023
        found, slope, codes, zero = jax.tree.map(np.asarray, (back(slope), slope, codes, zero))
        for i, j, at in of_blocks(format, w.shape):
            levels = elements(format)[np.asarray(codes[at])] if isinstance(format, Codebook) else np.asarray(codes[at])
            if isinstance(format, Int) and format.zero == "integer":
                levels = levels - float(zero[i, j])
            part = np.asarray(slope[at], np.float64)
            assert float(found[0][i, j]) == pytest.approx((part * levels).sum(), rel=1e-4, abs=1e-4)
            if isinstance(format, Int) and format.zero == "float":
                assert float(found[1][i, j]) == pytest.approx(part.sum(), rel=1e-4, abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), bits=st.integers(2, 8), tiny=st.booleans())
def test_no_gradient_underflows_through_float16_scales(seed, bits, tiny):
    """The gradients of a mean over many tokens are smaller than float16's least number."""
    rng = np.random.default_rng(seed)
    format, w = Int(bits, 8, symmetric=True), jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    scale, _ = clipped_grid(w, format)
    size = 2.0**-40 if tiny else 1.0  # powers of two: no product or sum is rounded otherwise
    slope = jnp.asarray(rng.normal(size=w.shape), jnp.float32)
    gradient = lambda g: jax.vjp(lambda s: fake_quant(w, s, None, format), scale)[1](g)[0]  # noqa: E731
    np.testing.assert_array_equal(gradient(slope * size), gradient(slope) * size)


def test_a_scale_of_zero_has_no_gradient():
    w = jnp.zeros((16, 2))
    for format in (Int(3, 8), NF4(8), Int(3, 8, zero="float")):
        scale, zero = floats(MinMax()(w, format))
        gradients = jax.grad(lambda w, s: jnp.sum(fake_quant(w, s, zero, format)), (0, 1))(w, scale)  # noqa: B023
        assert all(np.isfinite(g).all() for g in gradients)
        np.testing.assert_array_equal(gradients[1], 0)


def test_features_with_outliers_multiply_in_16_bits_as_in_the_packed_product():
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((5, 24)).astype(np.float32), rng.standard_normal((24, 6)).astype(np.float32)
    x[2, [3, 7]] = 20.3, -9.1
    format = Int(8, "channel", symmetric=True, scale="float32")
    q = quantize(jnp.asarray(w), *MinMax()(jnp.asarray(w), format), format)
    q = replace(q, activation=Activation(outliers=6.0))
    student = replace(FakeQuantized.of(q), compute="float32")
    x, without = jnp.asarray(x), jnp.asarray(np.where(np.abs(x) > 6, 0, x))
    np.testing.assert_allclose(x @ student, x @ q, rtol=1e-5, atol=1e-5)
    assert np.abs(without @ q - x @ q).max() > 1


def test_inputs_pass_their_gradient_straight_through():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 8)), jnp.float32)
    activation = Activation(Int(4, "channel", symmetric=True, scale="float32"))
    value, back = jax.vjp(lambda x: fake_quant_inputs(x, activation, None), x)
    for token, rounded in zip(x.reshape(-1, 8), value.reshape(-1, 8), strict=True):
        step = np.abs(token).max() / 7
        np.testing.assert_allclose(rounded, np.round(token / step) * step, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(back(x)[0], x)
