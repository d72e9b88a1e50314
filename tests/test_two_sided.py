"""Rounding with a Gram matrix on both sides: against a float64 loop, and what it gains."""

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import refused
from problems import problem
from test_descent import table

from jquant.formats import NF4, Format, Int, Trellis
from jquant.qtensor import Grid, dequantize
from jquant.ranges import RMS, MinMax
from jquant.rounding import GPTQ, Nearest, Refit, TwoSided, round_to_grid


def gram_of(size: int, seed: int = 7) -> np.ndarray:
    return np.asarray(problem((size, 2), seed)[1], np.float64)


def objective(delta: np.ndarray, gram: np.ndarray, outputs: np.ndarray) -> float:
    return float(np.trace(outputs @ delta.T @ gram @ delta))


def solved(rounding, w, format: Format, gram, outputs, range=MinMax()):  # noqa: B008
    grid = Grid.of(*range(w, format), format, w.shape)
    q, info = round_to_grid(w, grid, rounding, {"gram": gram, "output_gram": jnp.asarray(outputs, jnp.float32)})[:2]
    return np.asarray(dequantize(q), np.float64), info


def babai(w: np.ndarray, levels: np.ndarray, gram: np.ndarray, outputs: np.ndarray, size: int) -> np.ndarray:
    """The oracle: columns by columns, row by row, from float64 Cholesky factors; the last are rounded first."""

    def factor(h: np.ndarray, tile: int) -> tuple[np.ndarray, np.ndarray]:
        h = h + 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
        tiles = np.argsort(np.diag(h).reshape(-1, tile).sum(1), kind="stable")
        order = (tiles[:, None] * tile + np.arange(tile)).ravel()
        return np.linalg.cholesky(h[np.ix_(order, order)]).T, order

    inner, rows = factor(gram, 1)
    outer, columns = factor(outputs, size)
    values = np.zeros_like(w)
    for first in range(len(columns) - size, -1, -size):
        own, later = columns[first : first + size], columns[first + size :]
        corner, beside = outer[first : first + size, first : first + size], outer[first : first + size, first + size :]
        target = w[:, own] + (w - values)[:, later] @ np.linalg.solve(corner, beside).T
        for place in range(len(rows) - 1, -1, -1):
            row, after = rows[place], rows[place + 1 :]
            at = target[row] + inner[place, place + 1 :] / inner[place, place] @ (target[after] - values[after][:, own])
            chosen = np.argmin(np.abs(levels[:, row][:, own] - at), 0)
            values[row, own] = levels[chosen, row, own]
    return values


@pytest.mark.parametrize("columns", [1, 4, 16])
@pytest.mark.parametrize("format", [Int(3, 16), NF4(16)], ids=str)
def test_its_values_are_those_of_a_float64_loop(format, columns):
    w, gram, _ = problem((40, 16))
    outputs = gram_of(16)
    ours, info = solved(TwoSided(GPTQ(), columns), w, format, gram, outputs)
    exact, h = np.asarray(w, np.float64), np.asarray(gram, np.float64)
    wanted = babai(exact, table(w, format), h, outputs, columns)
    assert np.mean(np.abs(ours - wanted) > 1e-5) < 0.02  # ties, and what follows them
    assert objective(exact - ours, h, outputs) == pytest.approx(objective(exact - wanted, h, outputs), rel=0.02)
    assert (float(info.damping), int(info.fallback)) == (pytest.approx(0.01), 0)


@pytest.mark.parametrize("format", [Int(2, 16), Trellis(2)], ids=["integers", "tiles"])
def test_it_lowers_the_error_that_both_sides_weight(format):
    w, gram, _ = problem((48, 64))
    outputs, range = gram_of(64), RMS() if isinstance(format, Trellis) else MinMax()
    exact, h = np.asarray(w, np.float64), np.asarray(gram, np.float64)
    one, two = (solved(r, w, format, gram, outputs, range)[0] for r in (GPTQ(), TwoSided(GPTQ(), 16)))
    assert objective(exact - two, h, outputs) < 0.9 * objective(exact - one, h, outputs)
    assert objective(exact - two, h, np.eye(64)) > objective(exact - one, h, np.eye(64))


def test_outputs_without_correlation_change_nothing():
    w, gram, _ = problem((40, 16))
    alone = solved(GPTQ(), w, Int(3, 16), gram, np.eye(16))[0]
    np.testing.assert_array_equal(solved(TwoSided(GPTQ(), 4), w, Int(3, 16), gram, np.eye(16))[0], alone)


def test_outputs_that_no_loss_depends_on_are_rounded_as_without_them():
    w, gram, _ = problem((40, 16))
    outputs = np.zeros((16, 16))
    alone = solved(GPTQ(), w, Int(3, 16), gram, outputs)[0]
    np.testing.assert_array_equal(solved(TwoSided(GPTQ(), 4), w, Int(3, 16), gram, outputs)[0], alone)


def test_groups_of_columns_divide_the_outputs_and_keep_tiles_whole():
    assert TwoSided(columns=16)._size(576, 1) == 16
    assert TwoSided(columns=16)._size(36, 1) == 12
    assert TwoSided(columns=7)._size(36, 1) == 6
    assert TwoSided(columns=40)._size(96, 16) == 32
    assert TwoSided(columns=4)._size(96, 16) == 16


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TwoSided(columns=0), ("1 column", "0")),
        (lambda: TwoSided(damping=-1.0), ("damping", "-1.0")),
        (lambda: TwoSided(start=GPTQ), ("TwoSided's start", "GPTQ()")),
    ],
)
def test_what_it_does_not_take(make, words):
    with refused(*words):
        make()


def test_a_start_that_changes_the_grid_is_refused():
    w, gram, _ = problem((40, 16))
    with refused("keep the grid", "Refit"):
        solved(TwoSided(Refit(Nearest())), w, Int(3, 16), gram, np.eye(16))
