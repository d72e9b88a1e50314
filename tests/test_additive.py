"""Vector codebooks and AQLM: all vectors, all sums of a beam, least squares in float64, planted codebooks."""

from dataclasses import replace
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from checkpoints import refused
from problems import problem, rounded

from jquant.formats import Additive, Int, VectorCodebook, vectors
from jquant.qtensor import Grid, bits_per_weight, dequantize
from jquant.ranges import RMS, MinMax
from jquant.rounding import AQLM, GPTQ, Nearest, aqlm
from jquant.rounding.descent import Rows, damped, descend

SMALL = Additive(2, 4, 4)


def as_vectors(w, dim: int) -> np.ndarray:
    """[tiles, out, dim], float64."""
    w = np.asarray(w, np.float64)
    return w.reshape(-1, dim, w.shape[1]).transpose(0, 2, 1)


def sums(format: Additive, levels, codes) -> np.ndarray:
    """[in, out]: Σₘ Cₘ[bₘ], each index read from the bits of its tile's weights, the first lowest."""
    codes, levels = np.asarray(codes, object), np.asarray(levels, np.float64)
    n, out = codes.shape
    values = np.zeros((n, out))
    for first, column in product(range(0, n, format.dim), range(out)):
        word = sum(int(codes[first + i, column]) << (format.bits * i) for i in range(format.dim))
        for m, table in enumerate(levels):
            index = (word >> (format.index_bits * m)) & (2**format.index_bits - 1)
            values[first : first + format.dim, column] += table[index]
    return values


def table_of(table, **options) -> VectorCodebook:
    return VectorCodebook(tuple(map(tuple, np.asarray(table, np.float64).tolist())), **options)


def learned_grid(w, format: Additive, seed: int = 0) -> Grid:
    """A grid with codebooks that are not the first ones."""
    shape = (format.codebooks, 2**format.index_bits, format.dim)
    levels = jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float16)
    return Grid.of(*RMS()(w, format), format, w.shape, levels)


# ---------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(("bits", "dim"), [(1, 4), (2, 3), (3, 2), (5, 1)])
@pytest.mark.parametrize("scores", [1 << 20, 200])
def test_the_code_is_that_of_the_nearest_vector(monkeypatch, bits, dim, scores):
    monkeypatch.setattr(vectors, "SCORES", scores)  # some vectors at a time, down to 64
    table = np.random.default_rng(dim).standard_normal((2 ** (bits * dim), dim)).astype(np.float32)
    format = table_of(table)
    assert (format.bits, format.tile) == (bits, (dim, 1))
    w = jax.random.normal(jax.random.key(0), (12 * dim, 10))
    scale = jnp.full((1, 10), 0.5)
    codes = format.encode(w, scale, None)
    assert int(codes.max()) < 2**bits
    ours = as_vectors(format.decode(codes, scale, None), dim)
    distances = np.sum((as_vectors(w, dim)[..., None, :] - 0.5 * table) ** 2, -1)
    np.testing.assert_allclose(ours, 0.5 * table.astype(np.float64)[np.argmin(distances, -1)], rtol=1e-6)


def test_tables_that_are_none_are_refused():
    for wrong in ((), ((),), ((0.0, 1.0), (1.0,)), ((0.0,), (0.0,)), ((1.0,), (float("nan"),))):
        with refused("VectorCodebook takes vectors of one length"):
            VectorCodebook(wrong)
    normal = np.random.default_rng(0).standard_normal
    for shape in ((3, 1), (8, 2), (1, 1), (2, 4), (512, 1)):
        with refused("VectorCodebook takes 2^(bits · dim) vectors", f"not {shape[0]} vectors of {shape[1]}"):
            table_of(normal(shape))
    with refused("VectorCodebook codes 2 rows", "3"):
        table_of(normal((4, 2)), group=3)
    with refused("floating dtype", "int8"):
        table_of(normal((4, 2)), scale="int8")


@pytest.mark.parametrize("format", [Additive(), Additive(3), Additive(4), SMALL, Additive(1, 6, 3), Additive(3, 4, 6)])
def test_a_code_is_the_indices_of_its_tile_and_decodes_to_their_sum(format):
    n = 6 * format.dim
    assert format.bits * format.dim == format.codebooks * format.index_bits
    shape = (format.codebooks, 6, 5)
    indices = np.random.default_rng(0).integers(0, 2**format.index_bits, shape).astype(np.int32)
    codes = format.codes_of(jnp.asarray(indices)).reshape(n, 5)
    np.testing.assert_array_equal(format.indices_of(codes), indices)
    grid = learned_grid(jnp.ones((n, 5)), format)
    np.testing.assert_allclose(format.decode(codes, jnp.float32(2), None, grid.levels),
                               2 * sums(format, grid.levels, codes), rtol=1e-5, atol=1e-5)  # fmt: skip
    first = np.concatenate([np.asarray(format.own_levels((n, 5)), np.float64)])
    np.testing.assert_allclose(format.decode(codes, jnp.float32(1), None), sums(format, first, codes), atol=1e-5)


def test_first_codebooks_suit_normal_weights():
    w = jax.random.normal(jax.random.key(0), (256, 128))
    for codebooks, most in ((2, 0.14), (3, 0.06)):  # Lloyd-Max's levels: 0.118, 0.0345
        q, _ = rounded(Nearest(), w, Additive(codebooks), range=RMS())
        assert float(jnp.mean((dequantize(q) - w) ** 2)) < most


def test_bad_sizes_are_refused():
    for wrong in ((0, 8, 8), (2, 17, 8), (2, 8, 0), (True, 8, 8)):
        with refused("Additive takes codebooks from 1"):
            Additive(*wrong)
    for wrong in ((5, 8, 8), (1, 8, 3), (2, 9, 2), (1, 4, 8)):
        with refused("Additive takes codebooks · index_bits = bits · dim", f"{wrong[0]} · {wrong[1]}"):
            Additive(*wrong)
    with refused("Additive codes 8 rows", "12"):
        Additive(group=12)


def test_bits_per_weight_count_codebooks_and_scales():
    w, gram, _ = problem((64, 48))
    q, _ = rounded(AQLM(turns=1, steps=2, clusterings=2), w, SMALL, gram, range=RMS())
    assert q.levels.dtype == jnp.float16
    assert bits_per_weight(q) == 2 + 16 * (2 * 16 * 4 + 48) / w.size


# ------------------------------------------------------------------------------------------------------------- AQLM


def rows_of(w, grid: Grid, gram, codes) -> Rows:
    """The first tile, as coordinate descent gives it to the search."""
    dim = grid.format.dim
    at = jax.tree.map(lambda v: jnp.broadcast_to(v, w.shape)[:dim], grid.per_weight)
    return Rows(w[:dim], codes[:dim], damped(gram[:dim, :dim]), at)


def distances(rows: Rows, grid: Grid) -> np.ndarray:
    """[levels, levels, out]: what every sum of two vectors costs."""
    levels, corner = np.asarray(grid.levels, np.float64), np.asarray(rows.corner, np.float64)
    scale = np.asarray(rows.at[0], np.float64)[0]
    every = (levels[0][:, None] + levels[1][None])[..., None] * scale - np.asarray(rows.target, np.float64)
    return np.einsum("abio,ij,abjo->abo", every, corner, every)


@pytest.mark.parametrize("compared", [1 << 22, 1])
def test_a_beam_of_all_sums_finds_the_best_one(monkeypatch, compared):
    monkeypatch.setattr(aqlm, "SUMS", compared)  # 16 vectors at a time
    w, gram, _ = problem((16, 24))
    format = Additive(2, 5, 5) if compared == 1 else SMALL
    w, gram = (w, gram) if compared > 1 else (w[:15], gram[:15, :15])
    grid = learned_grid(w, format)
    codes = grid.encode(w)
    rows = rows_of(w, grid, gram, codes)
    every = distances(rows, grid)
    cost = {}
    for beam in (1, 4, 2**format.index_bits):
        indices = format.indices_of(aqlm.searched(rows, grid, beam))[:, 0]
        cost[beam] = every[indices[0], indices[1], np.arange(w.shape[1])]
    np.testing.assert_allclose(cost[2**format.index_bits], every.min((0, 1)), rtol=1e-4)
    before = format.indices_of(rows.codes)[:, 0]
    assert np.all(cost[1] <= every[before[0], before[1], np.arange(w.shape[1])] * (1 + 1e-5))
    assert cost[1].sum() >= cost[4].sum() >= cost[2**format.index_bits].sum()
    assert cost[4].sum() < 1.5 * every.min((0, 1)).sum()


def test_the_codebooks_are_those_of_least_squares():
    w, gram, _ = problem((32, 40))
    grid = learned_grid(w, SMALL)
    codes = grid.encode(w)
    scale, root = np.asarray(grid.per_weight[0], np.float64), np.linalg.cholesky(np.asarray(gram, np.float64)).T
    # A column for each entry of the codebooks, a row for each weight.
    names = np.zeros((*w.shape, 2 * 16 * 4))
    indices = np.asarray(SMALL.indices_of(codes))
    for m, (tile, column), i in product(range(2), np.ndindex(8, 40), range(4)):
        names[4 * tile + i, column, (m * 16 + indices[m, tile, column]) * 4 + i] = scale[0, column]
    turned, target = (np.einsum("ij,jo...->io...", root, v) for v in (names, np.asarray(w, np.float64)))
    best = np.linalg.lstsq(turned.reshape(w.size, -1), target.reshape(-1), rcond=None)[0]
    least = np.sum((turned.reshape(w.size, -1) @ best - target.reshape(-1)) ** 2)

    def error(steps: int) -> float:
        levels = aqlm.fitted_codebooks(w, codes, grid, gram, steps)
        values = sums(SMALL, levels, codes) * scale
        return oracle.output_error(np.asarray(w, np.float64), values, np.asarray(gram, np.float64))

    errors = [error(steps) for steps in (1, 4, 16, 300)]
    assert np.all(np.diff(errors) <= 1e-5 * errors[0])
    assert errors[-1] == pytest.approx(least, rel=1e-3)
    assert errors[2] < 1.1 * least


def residual_k_means(w: np.ndarray, format: Additive) -> np.ndarray:
    """The oracle's values: each codebook by Lloyd's iteration on what those before it leave, from spread vectors."""
    rest = as_vectors(w, format.dim).reshape(-1, format.dim)
    total = np.zeros_like(rest)
    for _ in range(format.codebooks):
        table = rest[:: len(rest) // 2**format.index_bits][: 2**format.index_bits].copy()
        for _ in range(30):
            nearest = np.argmin(((rest[:, None] - table) ** 2).sum(-1), 1)
            table = np.stack([rest[nearest == k].mean(0) if np.any(nearest == k) else v for k, v in enumerate(table)])
        nearest = np.argmin(((rest[:, None] - table) ** 2).sum(-1), 1)
        total, rest = total + table[nearest], rest - table[nearest]
    return total.reshape(-1, w.shape[1], format.dim).transpose(0, 2, 1).reshape(w.shape)


def planted(format: Additive, shape: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight that is made of codebooks, and these; the second one is half as large."""
    rng, (rows, out) = np.random.default_rng(seed), shape
    tables = rng.standard_normal((format.codebooks, 2**format.index_bits, format.dim))
    tables *= (0.5 ** np.arange(format.codebooks))[:, None, None]
    indices = rng.integers(0, 2**format.index_bits, (format.codebooks, rows // format.dim, out))
    return sum(tables[m][indices[m]] for m in range(format.codebooks)).transpose(0, 2, 1).reshape(shape), tables


@pytest.mark.parametrize(("format", "share"), [(Additive(1, 4, 4), 1e-4), (Additive(2, 4, 8), 0.5)], ids=str)
def test_planted_codebooks_are_fitted_better_than_by_residual_k_means(format, share):
    """One codebook is found as it is. Two are found only from near them: see below."""
    w, _ = planted(format, (64, 128))
    gram, one = problem((64, 128))[1], jnp.ones((1, 128), jnp.float16)
    rounding = AQLM(turns=6, beam=8, steps=32)
    _, info = rounded(rounding, jnp.asarray(w, jnp.float32), format, gram, grid=(one, None))
    theirs = oracle.output_error(w, residual_k_means(w, format), np.asarray(gram, np.float64))
    assert float(info.error) < share * theirs


def test_turns_from_near_planted_codebooks_come_to_them():
    format = Additive(2, 4, 8)
    exact, tables = planted(format, (64, 128))
    w, gram = jnp.asarray(exact, jnp.float32), problem((64, 128))[1]
    near = tables + 0.15 * tables.std() * np.random.default_rng(1).standard_normal(tables.shape)
    one = jnp.ones((1, 128), jnp.float16)
    grid = Grid.of(one, None, format, w.shape, jnp.asarray(near, jnp.float16))

    @jax.jit
    def turn(codes, grid: Grid):
        grid = replace(grid, levels=aqlm.fitted_codebooks(w, codes, grid, gram, 32))
        return descend(w, codes, grid, gram, propose=partial(aqlm.searched, grid=grid, beam=8)), grid

    codes, errors = grid.encode(w), []
    for _ in range(8):
        codes, grid = turn(codes, grid)
        errors.append(oracle.output_error(exact, sums(format, grid.levels, codes), np.asarray(gram, np.float64)))
    energy = np.sum(exact * (np.asarray(gram, np.float64) @ exact))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * energy  # some tiles stay at a worse sum than their planted one


def test_residual_k_means_is_where_it_starts():
    w, _, _ = problem((64, 32))
    grid = Grid.of(jnp.ones((1, 32), jnp.float16), None, SMALL, w.shape)
    levels = aqlm.first_codebooks(w, grid, jnp.eye(64), 30)
    ours = np.asarray(SMALL.decode(SMALL.encode(w, jnp.float32(1), None, levels), jnp.float32(1), None, levels))
    exact = np.asarray(w, np.float64)
    theirs = np.sum((residual_k_means(exact, SMALL) - exact) ** 2)
    assert np.sum((ours - exact) ** 2) == pytest.approx(theirs, rel=0.1)  # from other vectors


@pytest.mark.parametrize("start", [GPTQ(), Nearest()], ids=str)
def test_no_turn_raises_the_error_and_it_ends_far_below_gptq_on_the_first_codebooks(start):
    w, gram, _ = problem((64, 96))
    gptq = rounded(GPTQ(), w, SMALL, gram, range=RMS())[1].error
    options = partial(AQLM, start, steps=8, clusterings=5)
    errors = [float(rounded(options(turns), w, SMALL, gram, range=RMS())[1].error) for turns in (1, 2, 3, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * float(gptq)


def test_dead_inputs_a_zero_column_and_groups_of_rows_are_fine():
    w, gram, _ = problem((64, 48))
    dead = np.array([3, 8, 9, 10, 11])  # the third tile is dead as a whole
    gram, w = gram.at[dead].set(0).at[:, dead].set(0), w.at[:, 5].set(0)
    for range in (RMS(), MinMax()):
        q, info = rounded(AQLM(turns=2), w, Additive(2, 4, 4, group=16), gram, range=range)
        values = np.asarray(dequantize(q))
        assert np.isfinite(values).all()
        assert not values[:, 5].any()
        assert 0 < float(info.error) < 0.2 * float(info.energy)


def test_bad_options_are_refused():
    for options in ({"turns": 0}, {"beam": 0}, {"clusterings": -1}, {"steps": 0}, {"turns": True}):
        with refused(f"AQLM's {next(iter(options))} is a whole number from 1"):
            AQLM(**options)
    with refused("AQLM's start", "not an instance"):
        AQLM(GPTQ)
    w, gram, _ = problem((32, 16))
    with refused("AQLM learns the codebooks of Additive", "Int"):
        rounded(AQLM(), w, Int(4, 32), gram)
