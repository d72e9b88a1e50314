"""Coordinate descent: against a float64 loop, and where it ends no change of one code helps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import refused
from problems import problem, rounded

from jquant.formats import E8P, NF4, Format, Int, unpack
from jquant.qtensor import Grid, dequantize
from jquant.ranges import RMS, MinMax
from jquant.rounding import GPTQ, Nearest, Refit
from jquant.rounding.descent import CoordinateDescent

FORMATS = [Int(3, 16), NF4(16), Int(4, "tensor", symmetric=True)]


def objective(delta: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Of each column."""
    return np.sum(delta * (gram @ delta), 0)


def table(w: jax.Array, format: Format) -> np.ndarray:
    """[codes, in, out]: the value of every code at every place, float64."""
    grid = Grid.of(*MinMax()(w, format), format, w.shape)
    every = [grid.decode(jnp.full(w.shape, code, jnp.uint8)) for code in range(2**format.bits)]
    return np.asarray(jnp.stack(every), np.float64)


def descended(w: np.ndarray, values: np.ndarray, levels: np.ndarray, gram: np.ndarray, sweeps: int) -> np.ndarray:
    """The oracle: row by row, the level nearest to the best real value, if that lowers the error."""
    values = values.copy()
    for _ in range(sweeps):
        for row in range(len(w)):
            best = values[row] + (gram[row] @ (w - values)) / gram[row, row]
            chosen = np.argmin(np.abs(levels[:, row] - best), 0)
            new = levels[chosen, row, np.arange(w.shape[1])]
            better = np.abs(new - best) < np.abs(values[row] - best) * (1 - 1e-6)
            values[row] = np.where(better, new, values[row])
    return values


@pytest.mark.parametrize("block", [1, 7, 32])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_it_is_the_oracles_descent_in_blocks_of_any_size(format, block):
    w, gram, _ = problem((40, 16))
    start, before = rounded(GPTQ(), w, format, gram)
    q, info = rounded(CoordinateDescent(GPTQ(), 2, block), w, format, gram)
    exact, h = np.asarray(w, np.float64), np.asarray(gram, np.float64)
    wanted = descended(exact, np.asarray(dequantize(start), np.float64), table(w, format), h, 2)
    assert np.mean(np.abs(np.asarray(dequantize(q)) - wanted) > 1e-5) < 0.01  # ties, and what follows them
    assert float(info.error) == pytest.approx(objective(exact - wanted, h).sum(), rel=0.01)
    assert float(info.error) < float(before.error)


def test_at_its_end_no_other_code_of_one_weight_has_less_error():
    w, gram, _ = problem((40, 16))
    q, _ = rounded(CoordinateDescent(Nearest(), 30), w, FORMATS[0], gram)
    levels, h = table(w, FORMATS[0]), np.asarray(gram, np.float64)
    delta = np.asarray(w, np.float64) - np.asarray(dequantize(q), np.float64)
    pull = h @ delta
    for row in range(len(w)):
        moved = levels[:, row] - (np.asarray(w, np.float64) - delta)[row]
        assert np.max(2 * moved * pull[row] - moved**2 * h[row, row]) < 1e-4 * objective(delta, h).max()


@pytest.mark.parametrize("seed", [0, 1])
def test_tiles_come_closer_and_no_column_gets_worse(seed):
    w, gram, _ = problem((40, 16), seed)
    start, before = rounded(GPTQ(), w, E8P(), gram, range=RMS())
    q, after = rounded(CoordinateDescent(sweeps=3), w, E8P(), gram, range=RMS())
    assert float(after.error) < 0.97 * float(before.error)
    exact, h = np.asarray(w, np.float64), np.asarray(gram, np.float64)
    ours, theirs = (objective(exact - np.asarray(dequantize(each), np.float64), h) for each in (q, start))
    assert np.all(ours <= theirs * (1 + 1e-5))


def test_inputs_that_were_never_active_keep_their_codes_and_refitting_may_follow():
    w, gram, _ = problem((40, 16))
    gram = gram.at[3].set(0).at[:, 3].set(0).at[11].set(0).at[:, 11].set(0)
    for format, range in ((FORMATS[0], MinMax()), (E8P(), RMS())):
        start, _ = rounded(GPTQ(), w, format, gram, range=range)
        q, info = rounded(CoordinateDescent(), w, format, gram, range=range)
        if format == FORMATS[0]:
            codes = [np.asarray(unpack(each.codes, 3, 40)) for each in (start, q)]
            np.testing.assert_array_equal(codes[0][[3, 11]], codes[1][[3, 11]])
        _, refitted = rounded(Refit(CoordinateDescent()), w, format, gram, range=range)
        assert float(refitted.error) <= float(info.error)
        assert np.isfinite(np.asarray(dequantize(q))).all()


def test_bad_options_are_refused():
    for options in ({"sweeps": 0}, {"block": 0}):
        with refused("CoordinateDescent", "at least 1"):
            CoordinateDescent(**options)
    with refused("CoordinateDescent's start", "not an instance"):
        CoordinateDescent(GPTQ)  # pyright: ignore[reportArgumentType]
