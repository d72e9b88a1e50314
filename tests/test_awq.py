"""AWQ's scale search against the float64 oracle on the same quantizer, and what must hold whatever it finds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jquant.formats import NF4, Int
from jquant.qtensor import dequantize, quantize
from jquant.ranges import MinMax, Search
from jquant.rounding.info import output_energy
from jquant.transforms import AWQ

ROWS = 32
FORMAT = Int(3, 16)


def problem(seed: int, outs=(12,), dead=()) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Weights, a Gram matrix for each and the mean |x|, of inputs with a few loud channels."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, ROWS)) @ (np.eye(ROWS) + 0.2 * rng.standard_normal((ROWS, ROWS)))
    x *= np.exp(rng.standard_normal(ROWS))
    x[:, list(dead)] = 0
    ws = [(0.05 * rng.standard_normal((ROWS, out))).astype(np.float32) for out in outs]
    token_weights = [rng.uniform(0.5, 2, len(x)) if i else np.ones(len(x)) for i in range(len(ws))]
    grams = [((x * t[:, None]).T @ x / len(x)).astype(np.float32) for t in token_weights]
    return ws, grams, np.abs(x).mean(0).astype(np.float32)


def rounder(format: Int):
    """The same quantizer in float64: min-max grid, stored in float16, round to nearest."""
    size = None if isinstance(format.group, str) else format.group

    def quantize(w: np.ndarray) -> np.ndarray:
        grid = oracle.int_grid(w, format.bits, size, format.symmetric, np.float16)
        return oracle.int_round(w, *grid, format.bits, size, format.symmetric)[1]

    return quantize


@partial(jax.jit, static_argnames=("awq", "format"))
def scale_of(awq, ws, grams, abs_mean, format):
    return awq(ws, [format] * len(ws), gram=grams, abs_mean=abs_mean)


def search(ws, grams, abs_mean, format=FORMAT, awq: AWQ | None = None) -> np.ndarray:
    args = [[jnp.asarray(v) for v in ws], [jnp.asarray(v) for v in grams], jnp.asarray(abs_mean)]
    return np.asarray(scale_of(awq or AWQ(), *args, format), np.float64)


def total(ws, grams, s, quantize) -> float:
    return sum(oracle.awq_error(w, gram, s, quantize) for w, gram in zip(ws, grams, strict=True))


def oracle_scale(abs_mean: np.ndarray, alpha: float) -> np.ndarray:
    s = abs_mean.astype(np.float64) ** alpha
    return s / np.sqrt(s.max() * s.min())


@pytest.mark.parametrize("outs", [(12,), (12, 4, 4)], ids=["one matrix", "three matrices"])
@pytest.mark.parametrize("format", [FORMAT, Int(4, "channel", True)], ids=str)
def test_the_search_chooses_the_oracles_alpha_and_error(format, outs):
    alphas = []
    for seed in range(4):
        ws, grams, abs_mean = problem(seed, outs)
        quantize = rounder(format)
        wanted, alpha, error = oracle.awq_search(ws, grams, abs_mean, quantize)
        got = search(ws, grams, abs_mean, format)
        assert total(ws, grams, got, quantize) == pytest.approx(error, rel=1e-3)
        ladder = sorted(total(ws, grams, oracle_scale(abs_mean, i / 20), quantize) for i in range(20))
        if ladder[1] > 1.002 * ladder[0]:  # else two alphas are as good as each other in float32
            np.testing.assert_allclose(got, wanted, rtol=1e-4)
            alphas.append(alpha)
    assert len(alphas) >= 2
    assert max(alphas) > 0


def test_every_matrix_has_its_say_under_its_own_gram_matrix():
    """The scale for two matrices is the best for their sum, not for either alone."""
    differs = 0
    for seed in range(4):
        ws, grams, abs_mean = problem(seed, (12, 12))
        grams[1] = 5 * grams[1][::-1, ::-1].copy()
        both, alone = search(ws, grams, abs_mean), search(ws[:1], grams[:1], abs_mean)
        quantize = rounder(FORMAT)
        assert total(ws, grams, both, quantize) <= total(ws, grams, alone, quantize) * (1 + 1e-3)
        differs += not np.allclose(both, alone)
    assert differs


def test_one_step_is_alpha_zero_which_scales_nothing():
    np.testing.assert_array_equal(search(*problem(0), awq=AWQ(steps=1)), np.ones(ROWS))


def test_equal_channels_are_not_scaled_whatever_alpha():
    ws, grams, abs_mean = problem(0)
    np.testing.assert_allclose(search(ws, grams, np.full_like(abs_mean, 3.7)), np.ones(ROWS), rtol=1e-5)


@pytest.mark.parametrize("format", [FORMAT, Int(2, 8), Int(4, "channel", True)], ids=str)
def test_the_error_is_never_above_that_of_round_to_nearest(format):
    gains = []
    for seed in range(6):
        ws, grams, abs_mean = problem(seed)
        errors = [total(ws, grams, s, rounder(format)) for s in (np.ones(ROWS), search(ws, grams, abs_mean, format))]
        assert errors[1] <= errors[0] * (1 + 1e-4)
        gains.append(1 - errors[1] / errors[0])
    assert max(gains) > 0.1


@pytest.mark.parametrize("dead", [(3,), (0, 15, 31), tuple(range(ROWS))], ids=["one", "three", "all"])
@pytest.mark.parametrize("format", [FORMAT, NF4(16)], ids=["Int3", "NF4"])
def test_dead_channels_leave_every_scale_finite_and_positive(format, dead):
    ws, grams, abs_mean = problem(1, dead=dead)
    assert (abs_mean[list(dead)] == 0).all()
    s = search(ws, grams, abs_mean, format)
    assert np.isfinite(s).all()
    assert (s > 0).all()
    assert s.max() * s.min() == pytest.approx(1, rel=1e-4)
    np.testing.assert_array_equal(s, search(ws, grams, np.maximum(abs_mean, 1e-5), format))
    assert len(dead) == ROWS or s.max() > 1.1  # the others are scaled all the same
    if format is FORMAT:
        quantize = rounder(format)
        assert total(ws, grams, s, quantize) <= total(ws, grams, np.ones(ROWS), quantize) * (1 + 1e-4)


def test_louder_channels_are_never_scaled_less():
    ws, grams, abs_mean = problem(2)
    s = search(ws, grams, abs_mean)
    assert (np.diff(s[np.argsort(abs_mean)]) >= 0).all()
    assert s.max() > 1.1


def test_the_range_of_the_search_can_be_any():
    ws, grams, abs_mean = problem(3)
    plain, clipped = (search(ws, grams, abs_mean, awq=AWQ(10, range)) for range in (MinMax(), Search("gram", 5)))
    for s in (plain, clipped):
        alphas = np.log(s[1:] / s[:-1]) / np.log(abs_mean[1:].astype(np.float64) / abs_mean[:-1])
        np.testing.assert_allclose(alphas, alphas[0], atol=1e-2)
        assert round(alphas[0] * 10, 1) == pytest.approx(round(alphas[0] * 10), abs=0.11)


@partial(jax.jit, static_argnames="range")
def clipped_error(w, gram, s, range):
    """The error of nearest rounding on a range that sees the inputs as they are after scaling."""
    scaled = w * s[:, None]
    grid = range(scaled, FORMAT, gram=gram / jnp.outer(s, s))
    return output_energy(dequantize(quantize(scaled, *grid, FORMAT)) / s[:, None] - w, gram)


def test_a_range_sees_the_gram_matrix_of_the_scaled_inputs():
    """The search chooses what trying every α by hand chooses."""
    range, alphas = Search("gram", 5), np.arange(10) / 10
    for seed in (3, 4, 5, 6):
        (w,), (gram,), abs_mean = problem(seed)
        scales = [oracle_scale(abs_mean, alpha).astype(np.float32) for alpha in alphas]
        errors = [float(clipped_error(w, gram, s, range)) for s in scales]
        assert sorted(errors)[1] > 1.0005 * min(errors)
        np.testing.assert_allclose(
            search([w], [gram], abs_mean, awq=AWQ(10, range)), scales[np.argmin(errors)], rtol=1e-4
        )
