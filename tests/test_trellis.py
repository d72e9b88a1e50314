"""Trellis codes against enumeration of all paths, a float64 Viterbi written from the paper, and QTIP's figures."""

import struct
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jquant.errors import InputError
from jquant.formats import Format
from jquant.formats import trellis as module
from jquant.formats.trellis import Trellis

SMALL = Trellis(2, state_bits=8)
# QTIP's mean squared errors of normal weights with L = 12, tail-biting, by bits (arXiv 2406.11235).
QTIP = {1: 0.280, 2: 0.0733, 3: 0.0198, 4: 0.0055}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@partial(jax.jit, static_argnames="format")
def encode(w, scale, format) -> jax.Array:
    return format.encode(w, scale, None)


@partial(jax.jit, static_argnames="format")
def decode(codes, scale, format) -> jax.Array:
    return format.decode(codes, scale, None)


def tiles_of(w: np.ndarray) -> np.ndarray:
    """[tiles, 256], tile by tile along `in`, then along `out`; a column after the other within a tile."""
    n, out = w.shape
    cuts = product(range(0, n, 16), range(0, out, 16))
    return np.stack([w[row : row + 16, column : column + 16].T.reshape(-1) for row, column in cuts])


# ---------------------------------------------------------------------------------------------- NumPy, from the paper


def walk(codes: np.ndarray, bits: int, state_bits: int, state: int = 0) -> list[int]:
    """The states that codes lead through from a state."""
    states = []
    for code in codes:
        state = (state << bits | int(code)) & (2**state_bits - 1)
        states.append(state)
    return states


def cyclic_states(codes: np.ndarray, bits: int, state_bits: int) -> list[int]:
    """Two turns: the second starts from the state that the first one leaves."""
    return walk(codes, bits, state_bits, walk(codes, bits, state_bits)[-1])


def raw_value(state: int, code: str) -> float:
    """The paper's algorithms 1 and 2 on one integer; the first without its division."""
    if code == "1mad":
        x = (34038481 * state + 76625530) % 2**32
        return sum(x.to_bytes(4, "little")) - 510
    x = ((89226354 * state + 64248484) % 2**32 & 0x8FFF8FFF) ^ 0x3B603B60
    return sum(struct.unpack("<2e", x.to_bytes(4, "little")))


def viterbi(costs: np.ndarray, bits: int, overlap: int | None = None) -> np.ndarray:
    """States of the cheapest path through float64 costs [n, states]; from an overlap to itself if one is given."""
    states = costs.shape[1]
    shared = states >> bits
    state = np.arange(states)
    best = costs[0] + (0 if overlap is None else np.where(state >> bits == overlap, 0, np.inf))
    before = []
    for cost in costs[1:]:
        # State s follows the states whose low bits are its high bits.
        candidates = (state >> bits)[:, None] + shared * np.arange(2**bits)
        chosen = best[candidates].argmin(1)
        before.append(candidates[state, chosen])
        best = best[before[-1]] + cost
    if overlap is not None:
        best = np.where(state % shared == overlap, best, np.inf)
    path = [int(best.argmin())]
    for previous in reversed(before):
        path.append(int(previous[path[-1]]))
    return np.array(path[::-1])


def tail_biting(costs: np.ndarray, bits: int) -> np.ndarray:
    """The paper's algorithm 4: codes."""
    half = len(costs) // 2
    rotated = viterbi(np.roll(costs, -half, 0), bits)
    overlap = rotated[len(costs) - half] >> bits
    return viterbi(costs, bits, int(overlap)) % 2**bits


def costs_of(x: np.ndarray, weight: np.ndarray, values: np.ndarray) -> np.ndarray:
    return weight[:, None] * (x[:, None].astype(np.float64) - values.astype(np.float64)) ** 2


def cost_of_codes(costs: np.ndarray, codes: np.ndarray, bits: int) -> float:
    return costs[np.arange(len(costs)), cyclic_states(codes, bits, costs.shape[1].bit_length() - 1)].sum()


# ------------------------------------------------------------------------------------------------------ short paths


@partial(jax.jit, static_argnames="bits")
def paths(x, scale, values, bits):
    """Codes, and the overlap before them, of the cheapest path and of the cyclic path, for targets [n, lanes]."""
    sequences = module._sequences(x, scale, values)
    cost = jnp.zeros((len(values) >> bits, x.shape[1]))
    cost, choices = module._forward(cost, sequences, values, bits)
    free = module._backward(jnp.argmin(cost, axis=0), cost, choices, bits)
    return *free, module._tail_biting(sequences, values, bits)


@pytest.mark.parametrize(("bits", "state_bits", "n"), [(1, 4, 12), (2, 5, 7)])
def test_short_paths_are_the_best_of_all(bits, state_bits, n):
    lanes, states = 64, 2**state_bits
    x, values = 1.5 * normal(n, lanes, seed=1), normal(states, seed=2)
    x[0, :8] = 40.0  # outliers
    scale = np.exp(normal(n, lanes, seed=3))
    scale[2, ::3] = 0
    before, free, cyclic = map(np.asarray, paths(x, scale, values, bits))
    costs = np.stack([costs_of(x[:, lane], scale[:, lane] ** 2.0, values) for lane in range(lanes)], 1)
    # Every path: codes as digits of a number; all starts of a free path, one of a cyclic path.
    codes = np.arange(2 ** (bits * n))[None] >> bits * np.arange(n)[::-1, None] & 2**bits - 1
    least = np.full(lanes, np.inf)
    for start in range(states >> bits):
        total, state = 0, np.full(codes.shape[1], start)
        for t in range(n):
            state = (state << bits | codes[t]) % states
            total = total + costs[t][:, state]
        least = np.minimum(least, total.min(1))
    total, state = 0, np.arange(codes.shape[1]) % states  # what the last codes leave
    for t in range(n):
        state = (state << bits | codes[t]) % states
        total = total + costs[t][:, state]
    least_cyclic = total.min(1)
    for lane in range(lanes):
        reached = walk(free[:, lane], bits, state_bits, int(before[lane]))
        np.testing.assert_allclose(costs[np.arange(n), lane, reached].sum(), least[lane], rtol=1e-5)
    found = np.array([cost_of_codes(costs[:, lane], cyclic[:, lane], bits) for lane in range(lanes)])
    assert (found >= least_cyclic * (1 - 1e-12)).all()
    oracle = [cost_of_codes(costs[:, lane], tail_biting(costs[:, lane], bits), bits) for lane in range(lanes)]
    np.testing.assert_allclose(found, oracle, rtol=1e-5)
    # Of so few weights the free end of the rotated sequence is near, so the overlap is sometimes not the best.
    assert np.mean(found <= least_cyclic * (1 + 1e-5)) > 0.7
    assert found.sum() < 1.1 * least_cyclic.sum()


# ------------------------------------------------------------------------------------------------- whole tiles


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("scales", ["channel", "rows"])
def test_codes_cost_what_the_float64_viterbi_finds(bits, scales):
    format = Trellis(bits, state_bits=8)
    w = normal(32, 32, seed=bits)
    w[3, 5] = 60.0
    scale = np.exp(normal(1 if scales == "channel" else 32, 32, seed=9) / 2).astype(np.float16)
    codes = np.asarray(encode(w, scale, format))
    assert codes.dtype == np.uint8
    assert codes.max() < 2**bits
    wide = np.broadcast_to(scale.astype(np.float64), w.shape)
    for x, weight, got in zip(tiles_of(w / wide), tiles_of(wide**2), tiles_of(codes), strict=True):
        costs = costs_of(x, weight, format.values)
        wanted = tail_biting(costs, bits)
        assert cost_of_codes(costs, got, bits) == pytest.approx(cost_of_codes(costs, wanted, bits), rel=1e-5)
        assert np.mean(got == wanted) > 0.9  # a tie in float32 changes a few


@pytest.mark.parametrize(
    "format",
    [Trellis(1, code="1mad", state_bits=16), Trellis(2), Trellis(3, code="lut", state_bits=8), Trellis(4, code="1mad")],
)
def test_values_are_those_of_a_walk_through_the_states(format):
    codes = np.random.default_rng(0).integers(0, 2**format.bits, (2, 32, 48)).astype(np.uint8)
    scale = np.exp(normal(2, 1, 48)).astype(np.float16)
    got = np.asarray(decode(codes, scale, format))
    assert got.dtype == np.float32
    assert got.shape == codes.shape
    if format.code == "lut":
        values = format.values.astype(np.float64)
        quantiles = np.sort(values)
        assert not np.array_equal(values, quantiles)
        np.testing.assert_allclose(quantiles, -quantiles[::-1], atol=1e-6)
    else:
        values = np.array([raw_value(state, format.code) for state in range(2**format.state_bits)], float)
        values *= module.SPREAD[format.bits] / np.sqrt(np.mean(values**2))
    np.testing.assert_allclose(format.values, values, rtol=1e-6, atol=1e-6)
    for layer in range(2):
        walked = [cyclic_states(tile, format.bits, format.state_bits) for tile in tiles_of(codes[layer])]
        wide = np.broadcast_to(scale[layer].astype(np.float64), codes.shape[1:])
        np.testing.assert_allclose(tiles_of(got[layer]), values[walked] * tiles_of(wide), rtol=1e-5, atol=1e-6)


def test_encoding_what_codes_decode_to_loses_nothing():
    for bits in (1, 4):
        format = Trellis(bits, state_bits=8)
        codes = np.random.default_rng(bits).integers(0, 2**bits, (32, 32)).astype(np.uint8)
        scale = np.exp(normal(32, 32, seed=9) / 2).astype(np.float16)
        values = decode(codes, scale, format)
        np.testing.assert_array_equal(decode(encode(values, scale, format), scale, format), values)


def test_weights_of_scale_zero_leave_the_others_free():
    """Rows of scale 0 hold what they may; the others' error is as if those rows held what suits them best."""
    w, scale = normal(16, 16), np.ones((16, 16), np.float16)
    scale[::2] = 0
    loud = w.copy()
    loud[::2] = 1e30
    codes = encode(w, scale, SMALL)
    np.testing.assert_array_equal(encode(loud, scale, SMALL), codes)
    assert (np.asarray(decode(codes, scale, SMALL))[::2] == 0).all()
    error = np.sum((np.asarray(decode(codes, scale, SMALL)) - w)[1::2] ** 2)
    alone = np.asarray(decode(encode(w, np.ones((1, 16), np.float16), SMALL), np.ones((1, 16), np.float16), SMALL))
    assert error < 0.5 * np.sum((alone - w)[1::2] ** 2)


def test_a_weight_counts_by_its_squared_scale():
    """Two encodings under one another's scales: each is better under its own."""
    target = normal(16, 16, seed=4)
    scales = [np.exp(normal(16, 16, seed=seed)).astype(np.float16) for seed in (5, 6)]
    decoded = [np.asarray(decode(encode(target * s, s, SMALL), np.ones_like(s), SMALL)) for s in scales]
    for own in (0, 1):
        error = [np.sum(scales[own].astype(np.float64) ** 2 * (d - target) ** 2) for d in decoded]
        assert error[own] < 0.8 * error[1 - own]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(-12, 12), st.sampled_from([0.0, 1.0, 30.0]))
def test_a_power_of_two_on_weights_and_scales_changes_no_code(seed, exponent, outlier):
    w = normal(16, 32, seed=seed)
    w[seed % 16, 7] += outlier
    scale = np.exp2(np.round(normal(1, 32, seed=seed + 1))).astype(np.float32)
    codes = encode(w, scale, Trellis(2, scale="float32", state_bits=6))
    factor = np.float32(2.0**exponent)
    moved = encode(w * factor, scale * factor, Trellis(2, scale="float32", state_bits=6))
    np.testing.assert_array_equal(moved, codes)


def test_tiles_are_encoded_one_by_one_whatever_the_matrix():
    """50 tiles go in two turns of 32 lanes; leading axes, broadcast scales and slices give the same codes."""
    w, scale = normal(5, 32, 80), np.full((1, 80), 0.9, np.float16)
    codes = np.asarray(encode(w, scale, SMALL))
    for layer in (0, 4):
        np.testing.assert_array_equal(encode(w[layer], scale, SMALL), codes[layer])
    np.testing.assert_array_equal(encode(w.reshape(160, 80), np.float16(0.9), SMALL), codes.reshape(160, 80))
    eager = SMALL.encode(jnp.asarray(w[1, 16:, 16:48]), jnp.asarray(scale[:, 16:48]), None)
    np.testing.assert_array_equal(eager, codes[1, 16:, 16:48])
    np.testing.assert_array_equal(
        decode(codes, scale, SMALL)[2, :16, 64:], decode(codes[2, :16, 64:], scale[:, 64:], SMALL)
    )


def test_codes_of_a_weight_cut_over_devices_are_those_of_one_device():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    cut = NamedSharding(mesh, PartitionSpec(None, "model"))
    w, scale = normal(32, 256), np.ones((1, 256), np.float16)
    sharded = encode(jax.device_put(w, cut), jax.device_put(scale, cut), SMALL)
    np.testing.assert_array_equal(sharded, encode(w, scale, SMALL))
    values = decode(jax.device_put(sharded, cut), jax.device_put(scale, cut), SMALL)
    np.testing.assert_array_equal(values, decode(np.asarray(sharded), scale, SMALL))


def test_the_scale_is_used_as_stored():
    w, scale = normal(16, 16), np.full((1, 16), 1.0003, np.float32)  # float16 has 1.0 and 1.001
    np.testing.assert_array_equal(encode(w, scale, SMALL), encode(w, np.ones_like(scale), SMALL))


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e30, np.nan])
def test_zero_tiny_huge_and_missing_weights_give_codes(factor):
    w = normal(16, 16) * np.float32(factor)
    format = Trellis(2, state_bits=8, scale="float32")
    scale, zero = format.grid(jnp.min(w, 0, keepdims=True), jnp.max(w, 0, keepdims=True))
    assert zero is None
    codes = encode(w, scale, format)
    assert int(jnp.max(codes)) < 4
    values = np.asarray(decode(codes, scale, format))
    if factor == 0:
        assert (values == 0).all()
    elif factor == factor:
        assert np.linalg.norm(values / factor - w / factor) < 0.6 * np.linalg.norm(w / factor)


# ----------------------------------------------------------------------------------------------------------- error


def normal_error(x: np.ndarray, values: np.ndarray, bits: int) -> float:
    """Mean squared error of targets [tiles, 256] encoded with any values."""
    codes = np.asarray(module._encode_tiles(x, np.ones_like(x), values, bits)).astype(int)
    age = range(-(-len(values).bit_length() // bits) + 1)
    states = sum(np.roll(codes, turn, 1) << bits * turn for turn in age) % len(values)
    return float(np.mean((x - values[states]) ** 2))


@pytest.mark.optimised
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_error_of_normal_weights_is_the_papers(bits):
    """The paper's values are normal random numbers. Those of a format are scaled to fit and have less error."""
    x = normal(384, 256, seed=5)
    table = np.random.default_rng(0).standard_normal(2**12).astype(np.float32)
    assert normal_error(x, table, bits) == pytest.approx(QTIP[bits], rel=0.02)
    values = Trellis(bits).values
    assert normal_error(x, values, bits) < QTIP[bits]
    if bits in (1, 4):  # the range's factor is the best: 12 % more or less is worse
        error = normal_error(x, values, bits)
        assert error < normal_error(x, values * np.float32(1.12), bits)
        assert error < normal_error(x, values / np.float32(1.12), bits)


@pytest.mark.slow
@pytest.mark.optimised
def test_the_error_of_16_state_bits_is_the_papers():
    assert normal_error(normal(256, 256, seed=5), Trellis(2, state_bits=16).values, 2) == pytest.approx(0.069, rel=0.02)


# -------------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("code", ["1mad", "3inst", "lut"])
def test_a_range_of_so_many_deviations_gives_the_root_mean_square(code):
    format = Trellis(3, code=code)
    assert isinstance(format, Format)
    assert not format.has_zero
    assert format.tile == (16, 16)
    assert hash(format) == hash(Trellis(3, code=code))
    ends = jnp.array([[0.25, 2.0]])
    scale, zero = format.grid(-ends * format.deviations, ends * format.deviations / 2)
    assert zero is None
    assert scale.dtype == jnp.float16
    np.testing.assert_array_equal(scale, [[0.25, 2.0]])
    assert np.sqrt(np.mean(format.values.astype(np.float64) ** 2)) == pytest.approx(module.SPREAD[3], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"bits": 5}, "takes 1 to 4 bits, not 5"),
        ({"bits": True}, "takes 1 to 4 bits, not True"),
        ({"state_bits": 17}, "here 4 to 16, not 17"),
        ({"bits": 4, "state_bits": 7}, "here 8 to 16, not 7"),
        ({"code": "2mad"}, "not '2mad'"),
        ({"group": 0}, "A group is"),
        ({"scale": "int8"}, "Scales are stored"),
    ],
)
def test_bad_settings_are_refused(arguments, sentence):
    jaxtyping.config.update("jaxtyping_disable", True)  # as users run it; the type checks would refuse some first
    try:
        with pytest.raises(InputError, match=sentence):
            Trellis(**arguments)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("shape", [(16, 24), (8, 16), (16,)])
def test_matrices_without_whole_tiles_are_refused(shape):
    with pytest.raises(InputError, match="whole tiles"):
        Trellis().encode(jnp.zeros(shape), jnp.ones(()), None)
    with pytest.raises(InputError, match="whole tiles"):
        Trellis().decode(jnp.zeros(shape, jnp.uint8), jnp.ones(()), None)
