"""LNQ: levels against float64 least squares and Lloyd's iteration, planted levels, errors that never rise."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from checkpoints import refused
from problems import problem, rounded

from jquant.formats import ColumnCodebook, Int
from jquant.formats.columns import normal_levels
from jquant.qtensor import Grid, bits_per_weight, columns_of, dequantize, joined_columns
from jquant.ranges import RMS, MinMax
from jquant.rounding import GPTQ, LNQ, Nearest
from jquant.rounding.lnq import first_levels, fitted_levels

# Max 1960, Table I: the largest level and the mean squared error.
TABLE = {2: (1.510, 0.1175), 3: (2.152, 0.03454), 4: (2.733, 0.009497)}


def by_column(w, values, gram) -> np.ndarray:
    delta = np.asarray(w, np.float64) - np.asarray(values, np.float64)
    return np.sum(delta * (np.asarray(gram, np.float64) @ delta), 0)


def random_grid(w, bits: int) -> Grid:
    format = ColumnCodebook(bits)
    levels = np.sort(np.random.default_rng(1).standard_normal((2**bits, w.shape[1])), 0)
    return Grid.of(*RMS()(w, format), format, w.shape, jnp.asarray(levels, jnp.float16))


@pytest.mark.parametrize("bits", TABLE)
def test_the_first_levels_are_those_of_max(bits):
    largest, error = TABLE[bits]
    assert float(normal_levels(bits)[-1]) == pytest.approx(largest, rel=2e-3)
    w = jax.random.normal(jax.random.key(0), (512, 256))
    q, _ = rounded(Nearest(), w, ColumnCodebook(bits), range=RMS())
    assert float(jnp.mean((dequantize(q) - w) ** 2)) == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("bits", TABLE)
def test_every_code_is_that_of_the_columns_nearest_level(bits):
    w, _, _ = problem((40, 16))
    grid = random_grid(w, bits)
    codes = grid.encode(w)
    values = np.asarray(grid.levels, np.float64) * np.asarray(grid.scale, np.float64)
    nearest = np.argmin(np.abs(np.asarray(w, np.float64) - values[:, None]), 0)
    assert np.mean(np.asarray(codes) != nearest) < 0.01  # ties that float32 decides otherwise
    wanted = np.take_along_axis(values, np.asarray(codes, np.int64), 0)
    np.testing.assert_allclose(grid.decode(codes), wanted, rtol=1e-6)
    q = grid.pack(codes)
    np.testing.assert_allclose(dequantize(q), wanted, rtol=1e-6)
    assert bits_per_weight(q) == bits + 16 * (2**bits + 1) / 40


def test_columns_take_their_levels_along():
    w, _, _ = problem((40, 16))
    q = random_grid(w, 3).pack(random_grid(w, 3).encode(w))
    some = columns_of(q, np.array([3, 1, 14]))
    np.testing.assert_array_equal(dequantize(some), dequantize(q)[:, [3, 1, 14]])
    both = joined_columns([some, q])
    np.testing.assert_array_equal(dequantize(both), jnp.concatenate([dequantize(some), dequantize(q)], 1))


@pytest.mark.parametrize("bits", TABLE)
def test_levels_are_those_of_least_squares(bits):
    w, gram, _ = problem((96, 16))
    grid = random_grid(w, bits)
    codes = grid.encode(w).at[:, 4].set(1)  # a column that names one level
    new_codes, levels = fitted_levels(w, codes, grid, gram)
    assert np.all(np.diff(np.asarray(levels, np.float32), axis=0) >= 0)
    scale, root = np.asarray(grid.scale, np.float64)[0], np.linalg.cholesky(np.asarray(gram, np.float64)).T
    least = []
    for column in range(16):
        names = np.eye(2**bits)[np.asarray(codes)[:, column]]
        target = np.asarray(w, np.float64)[:, column]
        best = np.linalg.lstsq(root @ names, root @ target, rcond=None)[0]
        least.append(np.sum((root @ (names @ best - target)) ** 2))
    values = np.take_along_axis(np.asarray(levels, np.float64) * scale, np.asarray(new_codes, np.int64), 0)
    np.testing.assert_allclose(by_column(w, values, gram), least, rtol=2e-3)
    # Codes move with their levels: a column's partition stays.
    for column in range(16):
        old, new = (np.asarray(each)[:, column] for each in (codes, new_codes))
        assert len({*zip(old, new, strict=True)}) == len({*old})


def test_where_the_error_cannot_fall_levels_stay():
    w, gram, _ = problem((96, 16))
    once = fitted_levels(w, random_grid(w, 2).encode(w), random_grid(w, 2), gram)
    grid = Grid.of(*RMS()(w, ColumnCodebook(2)), ColumnCodebook(2), w.shape, once[1])
    again = fitted_levels(w, once[0], grid, gram)
    before, after = (by_column(w, dequantize(grid.pack(once[0])), gram),
                     by_column(w, dequantize(Grid.of(grid.scale, None, grid.format, w.shape, again[1]).pack(again[0])),
                               gram))  # fmt: skip
    assert np.all(after <= before * (1 + 1e-6))


@pytest.mark.parametrize("bits", [2, 3])
def test_it_starts_at_weighted_k_means(bits):
    w, gram, _ = problem((96, 16))
    grid = Grid.of(*RMS()(w, ColumnCodebook(bits)), ColumnCodebook(bits), w.shape)
    ours = np.asarray(first_levels(w, grid, gram, 20), np.float64)
    x, share = np.asarray(w, np.float64) / np.asarray(grid.scale, np.float64), np.diagonal(gram).astype(np.float64)
    for column in range(16):
        levels = np.asarray(normal_levels(bits), np.float64)
        for _ in range(20):
            codes = np.argmin(np.abs(x[:, column, None] - levels), 1)
            levels = np.array([np.average(x[codes == k, column], weights=share[codes == k]) if np.any(codes == k) else v
                               for k, v in enumerate(levels)])  # fmt: skip
        np.testing.assert_allclose(ours[:, column], levels, rtol=2e-3, atol=1e-3)


def test_planted_levels_are_found():
    rng = np.random.default_rng(0)
    levels = np.array([-1.0, -0.2, 0.3, 1.5])[:, None] * rng.uniform(0.5, 2, 16)
    w = np.take_along_axis(levels, rng.integers(0, 4, (96, 16)), 0).astype(np.float32)
    _, info = rounded(LNQ(), jnp.asarray(w), ColumnCodebook(2), problem((96, 16))[1], range=RMS())
    assert float(info.error) < 1e-5 * float(info.energy)  # float16's share


@pytest.mark.parametrize("start", [GPTQ(), Nearest()], ids=str)
def test_no_turn_raises_a_columns_error_and_it_ends_below_gptq_on_k_means(start):
    w, gram, _ = problem((96, 16))
    results = [rounded(LNQ(start, turns), w, ColumnCodebook(2), gram, range=RMS()) for turns in (1, 2, 3, 6)]
    errors = np.array([by_column(w, dequantize(q), gram) for q, _ in results])
    assert np.all(errors[1:] <= errors[:-1] * (1 + 1e-5))
    grid = Grid.of(*RMS()(w, ColumnCodebook(2)), ColumnCodebook(2), w.shape)
    grid = Grid.of(grid.scale, None, grid.format, w.shape, first_levels(w, grid, gram, 20))
    plain = GPTQ()(w, grid, gram).codes
    theirs = oracle.output_error(*(np.asarray(v, np.float64) for v in (w, grid.decode(plain), gram)))
    assert errors[-1].sum() < 0.95 * theirs


def test_dead_inputs_and_a_zero_column_are_fine():
    w, gram, _ = problem((40, 16))
    gram, w = gram.at[3].set(0).at[:, 3].set(0), w.at[:, 5].set(0)
    for range in (RMS(), MinMax()):
        q, info = rounded(LNQ(turns=2), w, ColumnCodebook(2), gram, range=range)
        values = np.asarray(dequantize(q))
        assert np.isfinite(values).all()
        assert not values[:, 5].any()
        assert 0 < float(info.error) < 0.2 * float(info.energy)


def test_bad_options_are_refused():
    for bits in (1, 5, True):
        with refused("ColumnCodebook takes 2, 3 or 4 bits"):
            ColumnCodebook(bits)
    with refused("floating dtype", "int8"):
        ColumnCodebook(2, "int8")
    for options in ({"turns": 0}, {"sweeps": 0}, {"clusterings": -1}):
        with refused(f"LNQ's {next(iter(options))} is a whole number from 1"):
            LNQ(**options)
    w, gram, _ = problem((32, 16))
    with refused("LNQ learns the levels of ColumnCodebook", "Int"):
        rounded(LNQ(), w, Int(4, 32), gram)
