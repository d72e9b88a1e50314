"""Ranges: nothing clips under min-max, and the search finds what a float64 brute force finds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jquant.errors import InputError
from jquant.formats import NF4, Codebook, Int, block_shape
from jquant.parts import given
from jquant.qtensor import dequantize, quantize
from jquant.ranges import MinMax, Search

ROWS, OUT, STEPS = 40, 6, 9
METRICS = ["mse", "diagonal", "gram"]
GROUPS = [16, 8, "channel", "tensor"]  # 40 = 2.5 × 16 ends in a short group


def weight(seed: int = 0) -> np.ndarray:
    """Heavy-tailed, so that clipping pays."""
    return (0.05 * np.random.default_rng(seed).standard_t(3, (ROWS, OUT))).astype(np.float32)


def gram(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(100 + seed)
    x = rng.standard_normal((200, ROWS)) @ rng.standard_normal((ROWS, ROWS)) * rng.uniform(0.1, 3, ROWS)
    return (x.T @ x / len(x)).astype(np.float32)


@partial(jax.jit, static_argnames=("range", "format"))
def choose(range, w, format, gram):
    scale, zero = range(w, format, **given(range, {"gram": gram}))
    return scale, zero, dequantize(quantize(w, scale, zero, format))


def loss(delta: np.ndarray, h: np.ndarray, metric: str, format) -> np.ndarray:
    """The metric in float64, [groups, out]; one number [1, 1] per tensor."""
    parts = []
    for rows in oracle.group_slices(ROWS, block_shape(format, (ROWS, OUT))[0]):
        d, block = delta[rows].astype(np.float64), h[rows, rows].astype(np.float64)
        weights = {"mse": np.eye(len(d)), "diagonal": np.diag(np.diag(block)), "gram": block}[metric]
        parts.append(np.sum(d * (weights @ d), 0))
    found = np.stack(parts)
    return found.sum(keepdims=True) if format.group == "tensor" else found


def brute_force(w: np.ndarray, h: np.ndarray, metric: str, format: Int) -> tuple[np.ndarray, np.ndarray]:
    """Loss of min-max and of the best clipping, [groups, out], on the oracle's grids: both ends together, then, where
    there is a zero point, the upper end alone and the lower one."""
    slices = oracle.group_slices(ROWS, block_shape(format, (ROWS, OUT))[0])

    def attempt(factors: np.ndarray) -> np.ndarray:
        values = np.zeros(w.shape)
        for g, rows in enumerate(slices):
            part = w[rows].astype(np.float64)
            flat = part.reshape(-1, 1) if format.group == "tensor" else part
            ends = factors[:, g] * np.stack([flat.min(0), flat.max(0)])
            grid = oracle.int_grid(ends, format.bits, None, format.symmetric, np.float16)
            grid = [np.broadcast_to(v, (1, OUT)) for v in grid]
            values[rows] = oracle.int_round(part, *grid, format.bits, None, format.symmetric)[1]
        return loss(values - w, h, metric, format)

    factors = np.ones((2, len(slices), 1 if format.group == "tensor" else OUT))
    whole = best = attempt(factors)
    for moving in [(0, 1)] if format.symmetric else [(0, 1), (1,), (0,)]:
        kept = factors.copy()
        for shrink in np.linspace(1, 0.6, STEPS):
            tried = kept.copy()
            tried[list(moving)] = shrink
            found = attempt(tried)
            factors = np.where(found < best, tried, factors)
            best = np.minimum(found, best)
    return whole, best


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("make", [partial(Int, 3), partial(Int, 8), partial(Int, 4, symmetric=True), NF4])
def test_minmax_reaches_every_weight_to_half_a_step(make, group):
    format = make(group=group)
    if isinstance(format, Int):
        format = Int(format.bits, group, format.symmetric, "float32")
        widest = 0.5
    else:
        widest = np.diff(format.levels).max() / 2
    w = weight()
    scale, _, values = choose(MinMax(), jnp.asarray(w), format, None)
    step = np.repeat(np.asarray(scale), block_shape(format, (ROWS, OUT))[0], 0)[:ROWS]
    assert (np.abs(values - w) <= widest * step * (1 + 1e-4)).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_minmax_with_float16_scales_clips_by_no_more_than_their_rounding(bits, symmetric):
    w = weight()
    scale, _, values = choose(MinMax(), jnp.asarray(w), Int(bits, 16, symmetric), None)
    step = np.repeat(np.asarray(scale, np.float64), 16, 0)[:ROWS]
    assert (np.abs(values - w) <= step * (0.5 + 2.0**-11 * 2**bits) * (1 + 1e-4)).all()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("make", [partial(Int, 3), partial(Int, 4, symmetric=True)], ids=["Int3", "Int4 symmetric"])
def test_search_finds_the_candidate_that_a_float64_brute_force_finds(make, metric, group):
    w, h, format = weight(), gram(), make(group=group)
    scale, zero, values = choose(Search(metric, STEPS), jnp.asarray(w), format, jnp.asarray(h))
    groups = 1 if isinstance(group, str) else -(-ROWS // group)
    assert scale.shape == ((1, 1) if group == "tensor" else (groups, OUT))
    assert (zero is None) == format.symmetric
    whole, best = brute_force(w, h, metric, format)
    got = loss(np.asarray(values) - w, h, metric, format)
    np.testing.assert_allclose(got, best, rtol=2e-3)
    assert np.median(np.abs(got / best - 1)) < 1e-5
    # Not trivially so: clipping pays in some group.
    assert (best < 0.999 * whole).any()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("metric", METRICS)
def test_search_never_has_a_larger_metric_than_minmax(metric, group):
    gains = []
    for make in (partial(Int, 2), NF4):
        for seed in range(4):
            w, h, format = weight(seed), gram(seed), make(group=group)
            whole, found = (
                loss(np.asarray(choose(range, jnp.asarray(w), format, jnp.asarray(h))[2]) - w, h, metric, format)
                for range in (MinMax(), Search(metric, STEPS))
            )
            assert (found <= whole * (1 + 1e-5)).all()
            gains.append(1 - found.sum() / whole.sum())
    assert max(gains) > 0.05


def test_the_filling_of_a_short_group_has_no_say_in_the_search():
    """A codebook without a level at 0 errs on the zeros that fill the group up; they are not weights."""
    levels = (-1.0, -0.35, 0.35, 1.0)
    w = weight(5)
    short = choose(Search("mse", 21), jnp.asarray(w), Codebook(levels, 32), None)
    whole = choose(Search("mse", 21), jnp.asarray(w[32:]), Codebook(levels, "channel"), None)
    np.testing.assert_array_equal(short[0][1], whole[0][0])


def test_search_of_one_step_is_minmax():
    w = jnp.asarray(weight())
    for format in (Int(4, 16), NF4(16)):
        for a, b in zip(choose(Search("mse", 1), w, format, None), choose(MinMax(), w, format, None), strict=True):
            np.testing.assert_array_equal(a, b)


def test_mse_ignores_the_gram_matrix_and_the_others_follow_it():
    w, format = jnp.asarray(weight()), Int(3, 16)
    flat, steep = jnp.eye(ROWS), jnp.diag(jnp.asarray(np.where(np.arange(ROWS) % 7 == 0, 1e3, 1.0), jnp.float32))
    scales = {m: [choose(Search(m, STEPS), w, format, h)[0] for h in (flat, steep)] for m in METRICS}
    np.testing.assert_array_equal(*scales["mse"])
    for metric in ("diagonal", "gram"):
        np.testing.assert_array_equal(scales[metric][0], scales["mse"][0])
        assert (scales[metric][0] != scales[metric][1]).any()


@pytest.mark.parametrize("metric", ["diagonal", "gram"])
def test_search_without_a_gram_matrix_is_refused_by_the_name_of_its_metric(metric):
    with pytest.raises(InputError, match=metric):
        Search(metric)(jnp.asarray(weight()), Int(4, 16))
    choose(Search("mse", 2), jnp.asarray(weight()), Int(4, 16), None)
