"""SmoothQuant's scale against Eq. 4 in float64, and what it does for W8A8."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import refused

from jquant.formats import Int
from jquant.transforms import SmoothQuant

W8 = Int(8, "channel", symmetric=True)


def eq4(alpha: float, channel_max: np.ndarray, *weights: np.ndarray) -> np.ndarray:
    """sⱼ = max|Xⱼ|^α / max|Wⱼ|^(1 − α), one channel at a time."""
    return np.array(
        [
            float(largest) ** alpha / max(float(np.abs(w[j]).max()) for w in weights) ** (1 - alpha)
            for j, largest in enumerate(channel_max)
        ]
    )


@partial(jax.jit, static_argnames="transform")
def scale_of(transform, ws, channel_max):
    return transform(ws, [W8] * len(ws), abs_max=channel_max)


def problem(rows: int = 48, outs=(20,), loud=(), seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Inputs [200, rows] with a few channels 60 times larger, and matrices that read them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, rows))
    x[:, list(loud)] *= 60
    weights = [0.05 * rng.standard_normal((rows, out)) * rng.uniform(0.5, 2, (rows, 1)) for out in outs]
    return x.astype(np.float32), [w.astype(np.float32) for w in weights]


@pytest.mark.parametrize("outs", [(20,), (20, 8, 8)], ids=["one matrix", "three matrices"])
@pytest.mark.parametrize("alpha", [0.0, 0.35, 0.5, 0.8, 1.0])
def test_the_scale_is_equation_4(alpha, outs):
    x, ws = problem(outs=outs, loud=(3, 17))
    channel_max = np.abs(x).max(0)
    np.testing.assert_allclose(scale_of(SmoothQuant(alpha), ws, channel_max), eq4(alpha, channel_max, *ws), rtol=1e-5)


def test_alpha_says_which_side_becomes_even():
    x, (w,) = problem(loud=(5,))
    for alpha, inputs_even, weights_even in ((0.0, False, True), (1.0, True, False)):
        s = np.asarray(scale_of(SmoothQuant(alpha), [w], np.abs(x).max(0)))
        assert (np.ptp(np.abs(x / s).max(0)) < 1e-5) == inputs_even
        assert (np.ptp(np.abs(w * s[:, None]).max(1)) < 1e-5) == weights_even
    s = np.asarray(scale_of(SmoothQuant(), [w], np.abs(x).max(0)))
    np.testing.assert_allclose(np.abs(x / s).max(0), np.abs(w * s[:, None]).max(1), rtol=1e-5)


def rounded(x: np.ndarray, axis: int) -> np.ndarray:
    """Symmetric int8 with one scale a token (axis 1) or an output channel (axis 0), in float64."""
    step = np.abs(x).max(axis, keepdims=True) / 127
    return np.rint(x / step) * step


def w8a8_error(x: np.ndarray, w: np.ndarray, s: np.ndarray) -> float:
    x, w, s = (np.asarray(v, np.float64) for v in (x, w, s))
    exact = x @ w
    return float(np.linalg.norm(rounded(x / s, 1) @ rounded(w * s[:, None], 0) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("seed", range(3))
def test_w8a8_errs_less_where_inputs_have_outlier_channels(seed):
    x, (w,) = problem(loud=(3, 17), seed=seed)
    w[[3, 17]] *= 0.02  # or their products would drown the rest, and the rest's error with it
    s = scale_of(SmoothQuant(), [w], np.abs(x).max(0))
    assert w8a8_error(x, w, s) < 0.5 * w8a8_error(x, w, np.ones(len(w)))


@pytest.mark.parametrize("dead", ["inputs", "weights", "both"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dead_channels_leave_every_scale_finite_and_positive(alpha, dead):
    x, ws = problem(outs=(20, 8))
    if dead != "weights":
        x[:, 4] = 0
    if dead != "inputs":
        for w in ws:
            w[4] = 0
    s = np.asarray(scale_of(SmoothQuant(alpha), ws, np.abs(x).max(0)))
    assert np.isfinite(s).all()
    assert (s > 0).all()
    np.testing.assert_allclose(
        np.delete(s, 4), np.delete(eq4(alpha, np.abs(x).max(0) + 1e-30, *[w + 1e-30 for w in ws]), 4), rtol=1e-5
    )


def test_it_asks_for_the_channels_maxima_alone():
    assert SmoothQuant().needs == {"abs_max"}
    assert SmoothQuant() == SmoothQuant(0.5)
    assert hash(SmoothQuant()) == hash(SmoothQuant(0.5))
    assert jnp.shape(scale_of(SmoothQuant(), [np.ones((3, 2), np.float32)], np.ones(3, np.float32))) == (3,)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_an_impossible_alpha_is_refused(alpha):
    with refused("alpha", str(alpha)):
        SmoothQuant(alpha)
