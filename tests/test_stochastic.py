"""Stochastic rounding: between the neighbours, right on average, and the same draws on any number of devices."""

import re
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import rounded, shape_for

from jquant.formats import Format, Int, tile_of, unpack
from jquant.methods import METHODS
from jquant.qtensor import Grid, dequantize
from jquant.ranges import MinMax
from jquant.rounding import Stochastic
from jquant.rounding.neighbours import neighbours

EVERY = {row(3, 16, False).format for row in METHODS.values()}
FORMATS = sorted((format for format in EVERY if tile_of(format) == (1, 1)), key=repr)  # tiles: test_lattice
COPIES = 24


@partial(jax.jit, static_argnames=("format", "seed"))
def round_between(w, format: Format, seed: int = 0, clip: float = 1.0):
    """Codes and values of a stochastic rounding, and of the neighbours; the grid spans `clip` of the weights' range."""
    scale, zero = MinMax()(clip * w, format)
    grid = Grid.of(scale, zero, format, w.shape)
    codes = neighbours(w, grid)
    q, _ = rounded(Stochastic(seed), w, format, grid=(scale, zero))
    values = [grid.decode(c) for c in codes]
    return unpack(q.codes, format.bits, w.shape[0]), dequantize(q), codes, values, grid.per_weight


@cache
def solved(format: Format) -> SimpleNamespace:
    """Each of a few columns many times over, every tenth weight beyond the grid or at its end."""
    rng, (rows, out) = np.random.default_rng(0), shape_for(format)
    w = np.tile(0.05 * rng.standard_normal((rows, out)), COPIES).astype(np.float32)
    codes, values, (below, above), (low, high), grid = round_between(jnp.asarray(w), format, clip=0.7)
    found = SimpleNamespace(w=w, codes=codes, values=values, below=below, above=above, low=low, high=high)
    found = SimpleNamespace(**{name: np.asarray(v) for name, v in vars(found).items()}, grid=grid)
    with np.errstate(invalid="ignore", divide="ignore"):
        found.chance = np.where(found.high > found.low, (w - found.low) / (found.high - found.low), 0).clip(0, 1)
    return found


# ------------------------------------------------------------------------------------------------------ neighbours


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_neighbours_are_those_of_a_search_through_all_values_that_encode_can_give(format):
    got, part = solved(format), slice(0, 16)
    grid = jax.tree.map(lambda v: jnp.broadcast_to(v, got.w.shape)[:, part], got.grid)
    codes = np.arange(2**format.bits, dtype=np.uint8)
    values = np.stack([np.asarray(format.decode(jnp.uint8(code), *grid)) for code in codes])
    again = np.stack([np.asarray(format.encode(jnp.asarray(v), *grid)) for v in values])
    again = np.take_along_axis(values, again.astype(np.int64), 0)
    values = np.where(again == values, values, np.nan)  # NaNs of FP8, codes that no weight gets
    w, low, high = got.w[:, part], got.low[:, part], got.high[:, part]
    least, most = np.nanmin(values, 0), np.nanmax(values, 0)
    inside = (w > least) & (w < most)
    # Whether a weight all but on a value lies below or above it, float rounding decides.
    clear = inside & (np.nanmin(np.abs(values - w), 0) > 1e-6 * np.nanmax(np.abs(values), 0))
    assert clear.sum() > 0.98 * inside.sum() > 0.5 * w.size
    below, above = np.where(values <= w, values, -np.inf).max(0), np.where(values >= w, values, np.inf).min(0)
    np.testing.assert_allclose(low[clear], below[clear], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(high[clear], above[clear], rtol=1e-6, atol=1e-9)
    for beyond, end in ((w < least, least), (w > most, most)):
        assert beyond.any() or format.bits == 2
        np.testing.assert_allclose(low[beyond], end[beyond], rtol=1e-6)
        np.testing.assert_allclose(high[beyond], end[beyond], rtol=1e-6)


def test_a_weight_on_the_grid_is_both_of_its_neighbours():
    codes = jnp.arange(8, dtype=jnp.uint8)[:, None]
    for format in (Int(3, 8), Int(3, 8, symmetric=True, ties="up"), Int(3, 8, zero="float")):
        zero = None if format.symmetric else format.grid(jnp.zeros((1, 1)), jnp.ones((1, 1)))[1]
        grid = Grid.of(jnp.float16([[-0.25]]), zero, format, codes.shape)
        below, above = neighbours(grid.decode(codes), grid)
        np.testing.assert_array_equal(below, codes)
        np.testing.assert_array_equal(above, codes)


def test_a_grid_of_one_value_has_one_neighbour():
    grid = Grid.of(jnp.zeros((1, 1)), None, Int(3, 4, symmetric=True), (4, 1))
    for codes in neighbours(jnp.array([[-1.0], [0.0], [2.0], [1e30]]), grid):
        np.testing.assert_array_equal(grid.decode(codes), np.zeros((4, 1)))


# ------------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_weight_takes_a_neighbour_and_those_beyond_the_grid_its_end(format):
    got = solved(format)
    assert ((got.codes == got.below) | (got.codes == got.above)).all()
    alone = got.low == got.high
    np.testing.assert_array_equal(got.codes[alone], got.below[alone])
    spread = np.abs(got.high - got.low).max()
    np.testing.assert_allclose(got.values, np.where(got.codes == got.above, got.high, got.low), atol=1e-5 * spread)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_it_is_unbiased_row_by_row_and_at_every_distance_from_the_lower_neighbour(format):
    """In units of the standard deviation that independent draws give; copies that shared theirs would show as well."""
    got = solved(format)
    surplus, variance = (got.codes == got.above) * 1.0 - got.chance, got.chance * (1 - got.chance)
    free = got.high > got.low
    surplus = np.where(free, surplus, 0)
    rows = variance.sum(1) > 10
    assert np.abs(surplus.sum(1)[rows] / np.sqrt(variance.sum(1)[rows])).max() < 4.5
    tenth = (got.chance * 10).astype(int).clip(0, 9)
    for place in range(10):
        here = free & (tenth == place)
        assert abs(surplus[here].sum()) < 4 * np.sqrt(variance[here].sum())


def test_draws_are_uniform_and_independent_of_seed_weight_and_sign():
    """Correlations between the surpluses of two roundings of 20,000 weights; one standard deviation is 0.007."""
    format, w = Int(3, 16, symmetric=True), np.random.default_rng(0).standard_normal((80, 256)).astype(np.float32)
    w[:, 0] = w[:, 1]  # alike, but not in the same place
    other = w.copy()
    other[-1] += 1e-6  # outside the rows that are looked at, and below a step of any scale

    def surplus(w, seed=0):
        codes, _, (_, above), (low, high), _ = map(partial(jax.tree.map, np.asarray), round_between(w, format, seed))
        gap = np.where(high > low, high - low, 1)
        chance = np.where(high > low, (w - low) / gap, 0)
        return (((codes == above) & (high > low)) - chance)[:64]

    first = surplus(w)
    np.testing.assert_array_equal(first, surplus(w))
    assert abs(np.corrcoef(first.ravel(), first.ravel())[0, 1] - 1) < 1e-6
    for second in (surplus(w, 1), surplus(other), surplus(-w), surplus(w[:, ::-1])):
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.03
    assert (first[:, 0] != first[:, 1]).any()
    errors = np.corrcoef(first.T)[np.triu_indices(256, 1)]
    assert abs(errors.mean()) < 0.005
    assert np.abs(errors).max() < 0.75  # of 32,640 pairs of 64 weights: 6 standard deviations


def test_it_errs_twice_as_much_as_rounding_to_nearest():
    """Uniformly distributed weights: a sixth of a squared step against a twelfth."""
    w = np.random.default_rng(0).uniform(-1, 1, (64, 64)).astype(np.float32)
    _, values, _, ends, _ = round_between(jnp.asarray(w), Int(6, 64))
    nearest = np.minimum(*(np.abs(np.asarray(end) - w) for end in ends))
    assert np.square(values - w).mean() / np.square(nearest).mean() == pytest.approx(2, rel=0.1)


# ---------------------------------------------------------------------------------------------- the compiled program

GRID = Int(3, 16)


def run(w):
    return rounded(Stochastic(), w, GRID)[0]


def test_vmap_over_stacked_weights_is_a_loop_over_them_whatever_their_dtype():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((3, 40, 16)), jnp.bfloat16)
    mapped = jax.jit(jax.vmap(run))(w)
    for one, got in zip(w.astype(jnp.float32), mapped.codes, strict=True):
        np.testing.assert_array_equal(got, jax.jit(run)(one).codes)


def test_sharded_over_out_it_draws_without_communication_the_codes_of_one_device():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((40, 64)), jnp.float32)
    mesh = jax.make_mesh((8,), ("out",), axis_types=(AxisType.Auto,))
    split = jax.device_put(w, NamedSharding(mesh, P(None, "out")))
    compiled = jax.jit(run).lower(split).compile()
    assert not re.findall(r"all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter", compiled.as_text())
    got = compiled(split)
    assert got.codes.sharding.shard_shape(got.codes.shape) == (15, 8)
    np.testing.assert_array_equal(got.codes, jax.jit(run)(w).codes)


def test_the_program_grows_neither_with_the_matrix_nor_with_the_number_of_codes():
    def lines(format, *shape):
        solve = lambda w: rounded(Stochastic(), w, format)  # noqa: E731
        return len(jax.jit(solve).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).as_text().splitlines())

    assert lines(Int(4, 32), 64, 16) == lines(Int(4, 32), 512, 128)
    assert lines(Int(2, 32, True), 64, 16) == pytest.approx(lines(Int(8, 32, True), 64, 16), rel=0.3)  # packing differs
