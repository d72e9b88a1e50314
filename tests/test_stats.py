"""Statistics are monoids and equal their float64 definitions, whatever the activations' dtype."""

import re
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jquant.errors import InputError
from jquant.stats import AbsMax, AbsMean, Cross, Gram, check_gram

TOKENS, FEATURES = 12, 5
KINDS = [Gram, AbsMean]
gram_observe = jax.jit(Gram.observe)
observe = jax.jit(lambda stats, x, weight: stats.observe(x, weight))


def inputs(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_same(a, b, rtol: float = 0) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max())


def exact(kind: type, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    return (x * weight[:, None]).T @ x if kind is Gram else weight @ np.abs(x)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, TOKENS - 1), max_size=3), seed=st.integers(0, 99), weighted=st.booleans())
def test_observing_in_pieces_and_merging_in_any_grouping_is_observing_at_once(kind, cuts, seed, weighted):
    """Small integers add exactly in float32, so the order of the sums must not show at all."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-8, 9, (TOKENS, FEATURES)).astype(np.float32)
    weight = rng.integers(0, 5, TOKENS).astype(np.float32) if weighted else np.ones(TOKENS, np.float32)
    bounds = [0, *sorted(cuts), TOKENS]
    parts, running = [], kind.init(FEATURES)
    for start, stop in pairwise(bounds):
        piece = (jnp.asarray(x[start:stop]), jnp.asarray(weight[start:stop]) if weighted else None)
        parts.append(observe(kind.init(FEATURES), *piece))
        running = observe(running, *piece)
    whole = jax.tree.map(jnp.asarray, kind(jnp.asarray(exact(kind, x, weight)), jnp.asarray(weight.sum())))
    left = kind.init(FEATURES)
    for part in parts:
        left = left.merge(part)
    right = kind.init(FEATURES)
    for part in reversed(parts):
        right = part.merge(right)
    for got in (running, left, right):
        assert_same(got, whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_statistics_equal_float64_numpy_over_any_leading_axes(kind, weighted):
    x = inputs(4, 50, FEATURES)
    weight = np.random.default_rng(1).uniform(0, 3, (4, 50)).astype(np.float32)
    got = kind.init(FEATURES).observe(jnp.asarray(x), jnp.asarray(weight) if weighted else None)
    used = weight.reshape(-1) if weighted else np.ones(200)
    wanted = exact(kind, x.reshape(-1, FEATURES), used)
    np.testing.assert_allclose(got.total, wanted, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got.value, wanted / used.sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_two_counts_a_token_twice_and_a_weight_of_zero_not_at_all(kind):
    x = inputs(3, FEATURES)
    got = kind.init(FEATURES).observe(jnp.asarray(x), jnp.asarray([2.0, 0.0, 1.0]))
    assert_same(got, kind.init(FEATURES).observe(jnp.asarray(x[[0, 0, 2]])), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_inputs_accumulate_in_float32(kind, dtype):
    """In bfloat16 a sum of 4096 ones would stop at 256."""
    x = jnp.asarray(inputs(4096, FEATURES), dtype)
    got = kind.init(FEATURES)
    for piece in jnp.split(x, 8):
        got = observe(got, piece, jnp.ones(len(piece), dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    wanted = exact(kind, np.asarray(x, np.float64), np.ones(len(x)))
    np.testing.assert_allclose(got.total, wanted, atol=1e-6 * np.abs(wanted).max(), rtol=1e-5)
    assert jax.tree.leaves(got)[1] == 4096


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_asked_for_at_the_highest_precision(kind):
    """A GPU or TPU would else multiply float32 in fewer bits; the CPU does not show it."""
    text = observe.lower(kind.init(FEATURES), jnp.ones((3, FEATURES)), jnp.ones(3)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert all(re.search(r"precision = \[HIGHEST, HIGHEST\]", line) for line in products), products
    assert products or kind is AbsMean  # AbsMean may as well sum without a matrix product


def test_a_gram_matrix_is_symmetric_and_positive_semi_definite_for_bfloat16_inputs_and_few_tokens():
    x = jnp.asarray(inputs(20, 48) + 3, jnp.bfloat16)
    total = np.asarray(gram_observe(Gram.init(48), x).total, np.float64)
    np.testing.assert_allclose(total, total.T, rtol=1e-6)
    values = np.linalg.eigvalsh((total + total.T) / 2)
    assert values[0] >= -1e-6 * values[-1]
    assert (values[:28] <= 1e-6 * values[-1]).all()
    assert values[-1] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_devices_combine_by_a_sum_over_the_leaves(kind):
    x = inputs(8, 6, FEATURES)
    mesh = jax.make_mesh((8,), ("data",))
    spec = jax.sharding.PartitionSpec("data")

    def on_one_device(piece):
        return jax.lax.psum(kind.init(FEATURES).observe(piece), "data")

    run = jax.shard_map(on_one_device, mesh=mesh, in_specs=spec, out_specs=jax.sharding.PartitionSpec())
    spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    assert_same(jax.jit(run)(spread), kind.init(FEATURES).observe(jnp.asarray(x)), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_of_nothing_is_zero(kind):
    assert (np.asarray(kind.init(FEATURES).value) == 0).all()


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, TOKENS - 1), max_size=3), seed=st.integers(0, 99), weighted=st.booleans())
def test_the_largest_magnitudes_are_those_of_the_tokens_that_count_however_they_were_observed(cuts, seed, weighted):
    rng = np.random.default_rng(seed)
    x, weight = inputs(TOKENS, FEATURES, seed=seed), rng.integers(0, 3, TOKENS).astype(np.float32)
    x[rng.integers(TOKENS), rng.integers(FEATURES)] = -9  # a feature's largest may be negative
    wanted = np.abs(x[weight > 0] if weighted else x).max(0, initial=0)
    parts, running = [], AbsMax.init(FEATURES)
    for start, stop in pairwise([0, *sorted(cuts), TOKENS]):
        piece = (jnp.asarray(x[start:stop]), jnp.asarray(weight[start:stop]) if weighted else None)
        parts.append(observe(AbsMax.init(FEATURES), *piece))
        running = observe(running, *piece)
    left, right = AbsMax.init(FEATURES), AbsMax.init(FEATURES)
    for part in parts:
        left, right = left.merge(part), part.merge(right)
    for got in (running, left, right):
        np.testing.assert_array_equal(got.largest, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_largest_magnitudes_are_exact_in_any_dtype_and_over_any_leading_axes(dtype):
    x = jnp.asarray(inputs(2, 3, 7, FEATURES), dtype)
    weight = jnp.ones((2, 3, 7)).at[1, 2].set(0)
    exact = np.abs(np.asarray(x, np.float32))
    for used, part in ((None, exact), (weight, exact[np.asarray(weight) > 0])):
        got = AbsMax.init(FEATURES).observe(x, used)
        assert got.largest.dtype == jnp.float32
        np.testing.assert_array_equal(got.largest, part.reshape(-1, FEATURES).max(0))
    np.testing.assert_array_equal(AbsMax.init(FEATURES).largest, np.zeros(FEATURES))


@pytest.mark.parametrize("kind", [*KINDS, AbsMax])
def test_scaled_statistics_are_those_of_scaled_inputs(kind):
    x, factor = inputs(TOKENS, FEATURES), np.array([2, -0.5, 1, 3, 0.1], np.float32)
    got = kind.init(FEATURES).observe(jnp.asarray(x)).scaled(jnp.asarray(factor))
    assert_same(got, kind.init(FEATURES).observe(jnp.asarray(x * factor)), rtol=1e-6)


def lagging(tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs as seen, as the float model has them, and weights, all of which float32 adds exactly."""
    rng = np.random.default_rng(seed)
    x, exact = rng.integers(-8, 9, (2, tokens, FEATURES)).astype(np.float32)
    return x, exact, rng.integers(0, 5, tokens).astype(np.float32)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("cut", [None, 5])
def test_a_cross_moment_is_its_definition_over_any_leading_axes_and_pieces(weighted, cut):
    x, exact, weight = lagging(TOKENS)
    parts = []
    for piece in (slice(None, cut), slice(cut, None)) if cut else (slice(None),):
        arrays = [jnp.asarray(a[piece])[None] for a in (x, exact, weight)]
        parts.append(Cross.init(FEATURES).observe(*arrays[:2], arrays[2] if weighted else None))
    got, used = Cross.init(FEATURES), weight if weighted else np.ones(TOKENS)
    for part in parts:
        got = got.merge(part)
    total = (x * used[:, None]).T.astype(np.float64) @ (exact - x)
    np.testing.assert_array_equal(got.total, total)
    assert got.weight == used.sum()
    np.testing.assert_allclose(got.value, total / used.sum(), rtol=1e-6)
    factor = np.array([2, -0.5, 1, 4, 0.25], np.float32)
    np.testing.assert_array_equal(got.scaled(jnp.asarray(factor)).total, total * np.outer(factor, factor))


def test_the_cross_moment_of_nothing_is_zero_and_of_bfloat16_float32():
    assert (np.asarray(Cross.init(FEATURES).value) == 0).all()
    x, exact, weight = (jnp.asarray(a, jnp.bfloat16) for a in lagging(TOKENS))
    got = Cross.init(FEATURES).observe(x, exact, weight)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("kind", [*KINDS, Cross])
def test_the_mean_is_over_weights_that_sum_to_less_than_one_too(kind):
    x, exact, weight = (jnp.asarray(a) for a in lagging(TOKENS))
    arrays = (x, exact) if kind is Cross else (x,)
    few, many = (kind.init(FEATURES).observe(*arrays, scale * weight) for scale in (2.0**-20, 1))
    np.testing.assert_allclose(few.value, many.value, rtol=1e-6)


def test_a_gram_matrix_that_is_a_mean_already_stays_it():
    total = jnp.asarray(inputs(FEATURES, FEATURES))
    np.testing.assert_array_equal(Gram(total, None).value, total)


@pytest.mark.parametrize("shape", [(3, 3), (4, 3), (3, 4), (1, 4, 4), (4,)])
def test_a_gram_matrix_of_another_weight_is_refused(shape):
    with pytest.raises(InputError, match=re.escape(f"shape {shape} does not belong to a weight of shape (4, 3)")):
        check_gram(jnp.zeros(shape), jnp.zeros((4, 3)))
    check_gram(jnp.zeros((4, 4)), jnp.zeros((4, 3)))
    check_gram(None, jnp.zeros((4, 3)))
