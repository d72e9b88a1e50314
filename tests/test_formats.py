"""Packing, integer grids, codebooks and QTensor against the float64 oracle, bitsandbytes and their own formulas."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import bitsandbytes.functional as bnb
import gguf
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jquant.activations import Activation
from jquant.errors import InputError
from jquant.formats import (
    GGUF,
    NF4,
    NF4_LEVELS,
    Codebook,
    Int,
    block_shape,
    double_quantized,
    expand,
    grouped,
    pack,
    real_members,
    unpack,
)
from jquant.qtensor import Grid, QTensor, bits_per_weight, dequantize, from_codes, quantize, stored_grid
from jquant.ranges import MinMax

SHAPES = {64: 576, 16: 40, "channel": 40, "tensor": 40}  # group -> rows; 40 = 2.5 × 16 ends in a short group
GROUPS = list(SHAPES)
NO_ZERO = Codebook((-1.0, -0.3, 0.4, 0.9), 16)  # no level at zero
FORMATS = [Int(4, 16), Int(3, 16, True), Int(8, "channel"), Int(2, "tensor"), NF4(16), NO_ZERO, NF4("tensor")]


def normal(*shape: int, seed: int = 0, scale: float = 0.05) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@partial(jax.jit, static_argnames="format")
def minmax(w, format) -> QTensor:
    return quantize(w, *MinMax()(w, format), format)


@partial(jax.jit, static_argnames="format")
def on_grid(w, scale, zero, format) -> QTensor:
    return quantize(w, scale, zero, format)


pack_bits = jax.jit(pack, static_argnums=1)
unpack_bits = jax.jit(unpack, static_argnums=(1, 2))


def codes_of(q: QTensor) -> np.ndarray:
    return np.asarray(unpack_bits(q.codes, q.format.bits, q.in_features)).astype(np.int64)


def grid_of(q: QTensor) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero as float64, one column per output; a missing zero is 0."""
    scale = np.asarray(q.scale, np.float64)
    if q.zero is None:
        zero = np.zeros_like(scale)
    else:
        zero = np.stack([oracle.unpack_bits(row, q.format.bits, scale.shape[-1]) for row in np.asarray(q.zero)])
    wide = (scale.shape[0], q.shape[-1])
    return np.broadcast_to(scale, wide), np.broadcast_to(zero.astype(np.float64), wide)


def spread(values: np.ndarray, q: QTensor) -> np.ndarray:
    """Per-group values repeated to one row per weight."""
    rows = block_shape(q.format, q.shape)[0]
    return values[np.minimum(np.arange(q.in_features) // rows, len(values) - 1)]


# ------------------------------------------------------------------------------------------------------- packing


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(2, 8), st.sampled_from([(1, 3), (13, 3), (2, 1, 9, 2), (3, 16, 1)]))
def test_packing_round_trips_for_every_width_length_and_leading_axis(data, bits, shape):
    codes = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    packed = pack_bits(jnp.asarray(codes), bits)
    assert packed.shape == (*shape[:-2], -(-shape[-2] * bits // 8), shape[-1])
    np.testing.assert_array_equal(unpack_bits(packed, bits, shape[-2]), codes)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("n", [1, 8, 21])
def test_packed_bytes_are_the_oracles_stream_column_by_column(bits, n):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, n, 3)).astype(np.uint8)
    packed = np.asarray(pack_bits(jnp.asarray(codes), bits))
    for layer in range(2):
        for column in range(3):
            np.testing.assert_array_equal(packed[layer, :, column], oracle.pack_bits(codes[layer, :, column], bits))


# -------------------------------------------------------------------------------------------------- integer grids


def near_tie(x: np.ndarray, slack: float) -> np.ndarray:
    """Whether float64 x is so near a half that float32 may round it the other way."""
    return np.abs(np.abs(x - np.floor(x)) - 0.5) <= slack * np.maximum(1, np.abs(x))


def assert_scales_match(got: np.ndarray, w: np.ndarray, bits: int, group: int | None, symmetric: bool) -> None:
    """Stored float16 scales are the rounded exact ones, save where those lie halfway between two float16 numbers."""
    exact, _ = oracle.int_grid(w, bits, group, symmetric)
    stored, _ = oracle.int_grid(w, bits, group, symmetric, np.float16)
    half = np.float16(stored)
    ulp = np.spacing(half).astype(np.float64)
    tie = np.abs(np.abs(exact - stored) - ulp / 2) < 5e-4 * ulp  # float32 knows it to 2.4e-4
    assert tie.sum() <= 1 + 0.01 * tie.size
    np.testing.assert_array_equal(got[~tie], stored[~tie])
    assert (np.abs(got - stored) <= ulp).all()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_int_grid_codes_and_values_equal_the_oracle_except_at_ties(bits, symmetric, group):
    w = normal(SHAPES[group], 6, seed=bits)
    w[:, 4], w[:, 5] = np.abs(w[:, 4]) + 0.01, -np.abs(w[:, 5]) - 0.01  # ranges that must be widened to hold 0
    q = minmax(jnp.asarray(w), Int(bits, group, symmetric))
    assert q.scale.dtype == jnp.float16
    scale, zero = grid_of(q)
    size = None if isinstance(group, str) else group
    flat = w.reshape(-1, 1) if group == "tensor" else w
    stored = scale[:, : flat.shape[1]]
    assert_scales_match(stored, flat, bits, size, symmetric)
    if not symmetric:
        low = np.stack([np.minimum(flat[rows].min(0), 0) for rows in oracle.group_slices(len(flat), size)])
        wanted = -low.astype(np.float64) / stored
        tie = near_tie(wanted, 1e-6)
        assert tie.mean() < 0.05
        np.testing.assert_array_equal(zero[:, : flat.shape[1]][~tie], np.clip(np.rint(wanted), 0, 2**bits - 1)[~tie])
    codes, values = oracle.int_round(w, scale, zero, bits, size, symmetric)
    tie = near_tie(w / spread(scale, q), 1e-6)
    assert tie.mean() < 0.01
    got = codes_of(q) - (2 ** (bits - 1) if symmetric else 0)
    np.testing.assert_array_equal(got[~tie], codes[~tie])
    assert (np.abs(got - codes) <= 1).all()
    np.testing.assert_allclose(np.asarray(dequantize(q))[~tie], values[~tie], rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_exact_ties_go_to_the_even_multiple_of_the_scale_whatever_the_zero_point(symmetric):
    """The zero is added after rounding; adding it before would turn every tie round where the zero is odd."""
    w = np.arange(-7, 8).astype(np.float32)[:, None] * 0.25 + np.zeros((1, 2), np.float32)
    scale = np.full((1, 2), 0.5, np.float32)
    zero = None if symmetric else np.array([[7, 8]], np.uint8)
    format = Int(4, "channel", symmetric)
    q = on_grid(jnp.asarray(w), jnp.asarray(scale, jnp.float16), None if zero is None else jnp.asarray(zero), format)
    wanted, values = oracle.int_round(w, scale, np.zeros((1, 2)) if symmetric else zero, 4, None, symmetric)
    np.testing.assert_array_equal(codes_of(q) - (8 if symmetric else 0), wanted)
    np.testing.assert_array_equal(np.asarray(dequantize(q)), values)


# Nothing below 2^-40: float32 flushes the scale of such weights to 0; they are tested on their own below.
entries = st.floats(-(2.0**10), 2.0**10, width=32).map(lambda x: x if abs(x) > 2.0**-40 else 0.0)
weights = st.builds(
    np.multiply, hnp.arrays(np.float32, (11, 3), elements=entries), st.sampled_from(np.float32([1, 2e-4]))
)
PROPERTY_FORMATS = [Int(3, 4), Int(4, 4, True), Int(8, "tensor"), NF4(4)]


@settings(max_examples=60, deadline=None)
@given(weights, st.sampled_from(PROPERTY_FORMATS))
def test_error_is_at_most_half_a_step_where_nothing_clips(w, format):
    q = minmax(jnp.asarray(w), format)
    scale, zero = (spread(v, q) for v in grid_of(q))
    error = np.abs(np.asarray(dequantize(q), np.float64) - w)
    if isinstance(format, Int):
        origin = 2 ** (format.bits - 1) if format.symmetric else zero
        free = np.where(scale > 0, np.rint(w / np.where(scale > 0, scale, 1)), 0) + origin
        inside = (free >= 0) & (free <= 2**format.bits - 1)
        assert (error <= scale / 2 * (1 + 1e-5))[inside].all()
        assert (codes_of(q)[~inside] == np.clip(free, 0, 2**format.bits - 1)[~inside]).all()
    else:
        levels = np.array(format.levels)
        position = np.clip(np.searchsorted(levels, w / np.where(scale > 0, scale, 1)), 1, len(levels) - 1)
        assert (error <= scale * (levels[position] - levels[position - 1]) / 2 * (1 + 1e-5)).all()


@settings(max_examples=60, deadline=None)
@given(weights, st.sampled_from(PROPERTY_FORMATS))
def test_quantizing_the_dequantized_weight_again_changes_nothing(w, format):
    q = minmax(jnp.asarray(w), format)
    zero = None if q.zero is None else jnp.asarray(grid_of(q)[1][:, : q.scale.shape[-1]], jnp.uint8)
    again = on_grid(dequantize(q), q.scale, zero, format)
    np.testing.assert_array_equal(dequantize(again), dequantize(q))
    live = spread(grid_of(q)[0], q) > 0
    np.testing.assert_array_equal(codes_of(again)[live], codes_of(q)[live])
    if not format.has_zero:  # here the refitted range gives back the very scale, too
        refitted = minmax(dequantize(q), format)
        np.testing.assert_array_equal(dequantize(refitted), dequantize(q))


def test_a_small_weight_keeps_the_precision_of_an_8_bit_grid():
    """absmax / 127 is below float16's least normal number (6.1e-5) here, but far above its least number (6e-8)."""
    w = normal(64, 4, scale=1.0)
    w *= 2e-3 / np.abs(w).max()
    error = [
        float(np.sum((np.asarray(dequantize(minmax(jnp.asarray(w), Int(8, "channel", True, dtype)))) - w) ** 2))
        for dtype in ("float16", "float32")
    ]
    assert error[0] <= 1.1 * error[1]


@pytest.mark.parametrize("format", [Int(4, 16), Int(8, "channel", True), Int(2, "tensor"), NF4(16), NO_ZERO])
@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e30])
def test_zero_tiny_and_huge_weights_give_finite_scales_and_values(format, factor):
    w = normal(40, 6, scale=1.0) * np.float32(factor)
    w[:16, 0] = 0
    q = minmax(jnp.asarray(w), format)
    assert np.isfinite(np.asarray(q.scale, np.float32)).all()
    values = np.asarray(dequantize(q))
    assert np.isfinite(values).all()
    if format.group == 16:
        assert (values[:16, 0] == 0).all()
    if factor == 0:
        assert (values == 0).all()
    if factor == 1e30 and isinstance(format, Codebook):  # float32 scales hold it
        assert np.linalg.norm(values / 1e30 - w / 1e30) < 0.5 * np.linalg.norm(w / 1e30)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("zero", ["integer", "float"])
def test_codes_are_the_nearest_on_the_grid_of_the_scale_as_stored(zero, dtype):
    w = normal(32, 6, scale=1.0)
    q = minmax(jnp.asarray(w), Int(4, 16, scale=dtype, zero=zero))
    assert q.scale.dtype == dtype
    scale = np.repeat(np.asarray(q.scale, np.float64), 16, 0)
    if zero == "float":
        assert q.zero.dtype == dtype
        lowest = np.repeat(np.asarray(q.zero, np.float64), 16, 0)
    else:
        lowest = -scale * np.repeat(grid_of(q)[1], 16, 0)
    levels = lowest + scale * np.arange(16)[:, None, None]
    nearest = levels[np.abs(levels - w).argmin(0), *np.indices(w.shape)]
    np.testing.assert_allclose(np.asarray(dequantize(q)), nearest, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("format", [Int(8, 16), Int(4, 16, True), Int(4, "tensor"), NF4(16)])
def test_the_grid_of_a_half_precision_weight_is_that_of_its_float32_values(format, dtype):
    w = jnp.asarray(normal(40, 6), dtype)
    half, single = minmax(w, format), minmax(w.astype(jnp.float32), format)
    np.testing.assert_array_equal(half.scale, single.scale)
    np.testing.assert_array_equal(half.codes, single.codes)


# ------------------------------------------------------------------------------------------------ bits accounting


def layout(rows: int, out: int, format: Int | Codebook) -> int:
    """Bytes of codes, scales and zeros, from the documented layout."""
    scales = 1 if format.group == "tensor" else -(-rows // block_shape(format, (rows, out))[0]) * out
    zeros = (scales // out if scales > 1 else 1) * -(-(out if scales > 1 else 1) * format.bits // 8)
    wide = {"float16": 2, "float32": 4}[format.scale]
    return -(-rows * format.bits // 8) * out + scales * wide + (zeros if format.has_zero else 0)


@pytest.mark.parametrize(
    ("rows", "out", "format", "bits"),
    [
        (576, 16, Int(4, 64), 4 + 16 / 64 + 4 / 64),
        (576, 16, Int(4, 64, True), 4 + 16 / 64),
        (576, 16, Int(3, 128), 3 + (16 + 3) * 5 / 576),  # 4.5 groups are stored as 5
        (576, 5, Int(4, 64), 4 + 16 / 64 + 24 / 5 / 64),  # 5 zeros of 4 bits fill up 3 bytes
        (576, 8, NF4(), 4.5),
        (576, 8, Int(8, "channel", True), 8 + 16 / 576),
        (576, 8, Int(2, "tensor"), 2 + (16 + 8) / (576 * 8)),
        (41, 3, Int(3, 16), (16 * 8 * 3 + 3 * 3 * 16 + 3 * 2 * 8) / (41 * 3)),  # 41 codes fill up 16 bytes
    ],
)
def test_bits_per_weight_counts_codes_scales_zeros_and_remainders(rows, out, format, bits):
    q = minmax(jnp.asarray(normal(rows, out)), format)
    assert q.shape == (rows, out)
    assert bits_per_weight(q) == pytest.approx(bits, rel=1e-12)
    held = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(q))
    assert q.nbytes == held == layout(rows, out, format)


def test_bits_per_weight_of_a_tree_weighs_every_array_by_its_size():
    q = minmax(jnp.asarray(normal(576, 8)), NF4())
    tree = {"projection": q, "norm": jnp.ones(576, jnp.float32)}
    assert bits_per_weight(tree) == pytest.approx((4.5 * 576 * 8 + 32 * 576) / (576 * 8 + 576), rel=1e-12)


# ------------------------------------------------------------------------------------------------------- NF4


def bitsandbytes_nf4(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes and values [in, out] and scales [blocks, out] of bitsandbytes on the CPU, whose weight is [out, in]."""
    packed, state = bnb.quantize_4bit(torch.from_numpy(w.T.copy()), blocksize=64, quant_type="nf4")
    values = bnb.dequantize_4bit(packed, state).numpy().T
    flat = packed.numpy().reshape(-1)
    codes = np.stack([flat >> 4, flat & 15], -1).reshape(w.shape[1], w.shape[0]).T
    return codes, values, state.absmax.numpy().reshape(w.shape[1], -1).T


def midpoint_block() -> np.ndarray:
    """Blocks whose weights lie on every midpoint of two levels, and one float32 above and below it."""
    levels = oracle.nf4_table()
    midpoints = (levels[:-1] + levels[1:]) / np.float32(2)
    columns = []
    for scale in np.float32([1.0, 0.0473, 3.7, 1e-3, 0.33333334, 250.7]):
        on = midpoints * scale
        near = [on, np.nextafter(on, np.float32(-9e9)), np.nextafter(on, np.float32(9e9)), on * np.float32(1 + 1e-6)]
        columns.append(np.concatenate([*near, np.float32([scale, -scale, 0, 0])]))
    return np.stack(columns, 1).astype(np.float32)


@pytest.mark.parametrize("run", [minmax, minmax.__wrapped__], ids=["jit", "eager"])
@pytest.mark.parametrize("w", [normal(576, 8), midpoint_block()], ids=["random", "midpoints"])
def test_nf4_is_bitsandbytes_bit_for_bit(w, run):
    codes, values, scales = bitsandbytes_nf4(w)
    q = run(jnp.asarray(w), format=NF4())
    np.testing.assert_array_equal(codes_of(q), codes)
    np.testing.assert_array_equal(np.asarray(q.scale).view(np.uint32), scales.view(np.uint32))
    np.testing.assert_array_equal(np.asarray(dequantize(q)).view(np.uint32), values.view(np.uint32))


def test_nf4_zero_blocks_have_the_values_of_bitsandbytes():
    w = normal(128, 4)
    w[:64, 1] = w[64:, 2] = w[:, 3] = 0
    np.testing.assert_array_equal(dequantize(minmax(jnp.asarray(w), NF4())), bitsandbytes_nf4(w)[1])


def test_nf4_levels_are_the_papers_table():
    np.testing.assert_array_equal(np.float32(NF4_LEVELS), oracle.nf4_table())


# --------------------------------------------------------------------------------------------------- QTensor


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (5,), (2, 3)])
def test_matmul_with_a_qtensor_is_the_product_with_the_dequantized_matrix(format, lead):
    w, x = normal(40, 6, seed=1), normal(*lead, 40, seed=2, scale=1.0)
    q = minmax(jnp.asarray(w), format)
    wanted = x.astype(np.float64) @ np.asarray(dequantize(q), np.float64)
    got = np.asarray(jnp.asarray(x) @ q)
    assert got.shape == (*lead, 6)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lead", [(), (3,)])
def test_matmul_keeps_the_dtype_of_its_input(lead):
    w, x = jnp.asarray(normal(40, 6)), jnp.asarray(normal(*lead, 40, scale=1.0), jnp.bfloat16)
    q = minmax(w, Int(4, 16))
    for weight in (q, dequantize(q).astype(jnp.bfloat16)):
        got = x @ weight
        assert got.dtype == jnp.bfloat16
        wanted = np.asarray(x, np.float64) @ np.asarray(dequantize(q), np.float64)
        np.testing.assert_allclose(np.asarray(got, np.float64), wanted, atol=0.02 * np.abs(wanted).max())


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_stacked_weights_dequantize_like_their_layers(format):
    w = normal(3, 40, 5)
    layers = [minmax(jnp.asarray(layer), format) for layer in w]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    assert stacked.shape == (3, 40, 5)
    np.testing.assert_array_equal(dequantize(stacked), np.stack([dequantize(q) for q in layers]))
    again = on_grid(jnp.asarray(w), stacked.scale, _integer_zero(layers), format)
    np.testing.assert_array_equal(again.codes, stacked.codes)
    np.testing.assert_array_equal(dequantize(again), dequantize(stacked))


@pytest.mark.parametrize("format", [Int(3, 8), NF4(8, double_quantized())], ids=str)
def test_stacked_weights_wider_than_high_dequantize_like_their_layers(format):
    """Integer zeros and centred scales are kept along the columns, whose number is not that of the rows."""
    layers = [minmax(jnp.asarray(layer), format) for layer in normal(3, 8, 20)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    np.testing.assert_array_equal(dequantize(stacked), np.stack([dequantize(q) for q in layers]))
    for q in (stacked, layers[0]):
        assert {grid.shape[-2:] for grid in stored_grid(q) if grid is not None} == {(1, 20)}


def _integer_zero(layers: list[QTensor]):
    if layers[0].zero is None:
        return None
    width = layers[0].scale.shape[-1]
    return jnp.asarray(np.stack([grid_of(q)[1][:, :width] for q in layers]), jnp.uint8)


def test_from_codes_keeps_every_code_scale_and_zero():
    rng = np.random.default_rng(3)
    codes, zero = rng.integers(0, 8, (21, 5)).astype(np.uint8), rng.integers(0, 8, (3, 5)).astype(np.uint8)
    scale = rng.uniform(0.5, 2, (3, 5)).astype(np.float16)
    q = jax.jit(from_codes, static_argnums=3)(*map(jnp.asarray, (codes, scale, zero)), Int(3, 8))
    row = np.arange(21) // 8
    np.testing.assert_array_equal(dequantize(q), (codes.astype(np.float32) - zero[row]) * scale[row].astype(np.float32))


def test_expand_gives_each_row_its_group():
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal(expand(jnp.asarray(values), (4, 1), (10, 2)), values[np.arange(10) // 4])


@pytest.mark.parametrize("block", [(4, 1), (1, 1), (1, 3), (2, 3), (4, 5), (10, 5)])
def test_grouped_gathers_each_block_row_by_row_and_real_members_are_those_of_the_weight(block):
    w, (rows, columns) = normal(2, 10, 5), block
    members, real = np.asarray(grouped(jnp.asarray(w), block)), real_members(w.shape, block)
    assert members.shape == (2, -(-10 // rows), rows * columns, -(-5 // columns))
    real = np.broadcast_to(real, members.shape[1:])
    for group, column in np.ndindex(members.shape[1], members.shape[3]):
        at = np.s_[group * rows : (group + 1) * rows, column * columns : (column + 1) * columns]
        filling = ((0, rows - len(w[0][at])), (0, columns - w[0][at].shape[1]))
        for layer in range(2):
            np.testing.assert_array_equal(members[layer, group, :, column], np.pad(w[layer][at], filling).ravel())
        np.testing.assert_array_equal(real[group, :, column], np.pad(np.ones(w[0][at].shape), filling).ravel())


@pytest.mark.parametrize("name", GGUF)
def test_llama_cpps_types_take_its_bits_under_any_range(name):
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert bits_per_weight(minmax(jnp.asarray(normal(512, 8)), GGUF[name])) == 8 * size / weights


@pytest.mark.parametrize("format", [Int(4, 16), NF4(16, double_quantized())], ids=str)
def test_a_grid_goes_through_jit_whose_programs_know_its_format(format):
    w = jnp.asarray(normal(40, 5))
    q = minmax(w, format)
    grid = jax.jit(lambda w: Grid.of(*MinMax()(w, format), format, w.shape))(w)
    assert grid.format == format
    np.testing.assert_array_equal(jax.jit(lambda grid: grid.pack(grid.encode(w)).codes)(grid), q.codes)
    np.testing.assert_array_equal(
        jax.jit(lambda grid: grid.decode(unpack(q.codes, format.bits, 40)))(grid), dequantize(q)
    )


def test_a_qtensor_says_its_shape_format_bits_and_size():
    q = minmax(jnp.asarray(normal(64, 96)), Int(4, 32))
    text = "QTensor(64 × 96, Int(bits=4, group=32), 4.625 bits/weight, 0.00355 MB)"
    assert repr(q) == repr(jax.eval_shape(lambda: q)) == text
    turned = replace(q, activation=Activation())
    assert repr(turned).startswith("QTensor(64 × 96, Int(bits=4, group=32), inputs Activation(")
    assert repr(turned).endswith("), 4.625 bits/weight, 0.00355 MB)")
    for other in (None, "a sharding", SimpleNamespace(dtype="float32"), SimpleNamespace(shape=(3,))):
        assert repr(jax.tree.map(lambda _: other, q)) == f"QTensor({type(other).__name__}, Int(bits=4, group=32))"  # noqa: B023


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("bits", [1, 9, 0, -4])
def test_a_width_out_of_range_is_refused_by_its_number(bits):
    with pytest.raises(InputError, match=rf"not {bits}\b"):
        Int(bits)


@pytest.mark.parametrize("group", [0, -1, "row"])
@pytest.mark.parametrize("make", [partial(Int, 4), NF4, partial(Codebook, (0.0, 1.0))], ids=["Int", "NF4", "Codebook"])
def test_a_bad_group_is_refused_by_its_name(make, group):
    jaxtyping.config.update("jaxtyping_disable", True)  # as users run it; the type checks would refuse a string first
    try:
        with pytest.raises(InputError, match=str(group)):
            make(group)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("format", [Int(4, 128), NF4(64)])
def test_a_group_larger_than_the_matrix_is_refused_with_both_sizes(format):
    with pytest.raises(InputError, match=rf"{format.group}.*40"):
        MinMax()(jnp.asarray(normal(40, 3)), format)
    assert block_shape(format, (format.group, 3)) == (format.group, 1)


@pytest.mark.parametrize("levels", [(0.0, -1.0), (0.0, 0.5, 0.5), (1.0,), (), tuple(map(float, range(257)))])
def test_a_codebook_that_is_unsorted_too_small_or_too_large_is_refused(levels):
    with pytest.raises(InputError, match=r"ascending" if 2 <= len(levels) <= 256 else rf"not {len(levels)}\b"):
        Codebook(levels)
    assert Codebook(tuple(map(float, range(256)))).bits == 8
    assert Codebook((-1.0, 0.0, 1.0)).bits == 2
