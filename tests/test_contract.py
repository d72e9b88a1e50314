"""One battery over every row of `jquant.methods.METHODS`: a new method is covered the day it gets its row."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jquant.errors import InputError
from jquant.methods import METHODS, Method, method
from jquant.qtensor import QTensor, dequantize, matmul
from jquant.ranges import MinMax
from jquant.rounding import SolveInfo

ROWS, OUT, LAYERS = 72, 16, 3  # 72 = 64 + 8 = 4.5 × 16: a short last group for every method
NAMES = list(METHODS)
traces: list[Method] = []


def make(name: str) -> Method:
    """A fresh, equal object at every call."""
    return METHODS[name](3, 16, False)


def whole(w, gram, abs_mean, method: Method):
    """Transform, range and rounding of one matrix, as the pipeline composes them, and the channel scale."""
    traces.append(method)
    s = jnp.ones_like(abs_mean)
    if method.transform is not None:
        s = method.transform([w], [gram], abs_mean, method.format)
        w, gram = w * s[:, None], gram / (s[:, None] * s)
    q, info = method.rounding(w, *method.range(w, method.format, gram), gram, method.format)
    return q, info, s


solve = jax.jit(whole, static_argnames="method")


def problem(seed: int = 0, rows: int = ROWS, dtype=jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * rows, rows)) @ (np.eye(rows) + 0.1 * rng.standard_normal((rows, rows)))
    x *= rng.uniform(0.3, 3, rows)
    w = jnp.asarray(0.05 * rng.standard_normal((rows, OUT)), dtype)
    return w, jnp.asarray(x.T @ x / len(x), jnp.float32), jnp.asarray(np.abs(x).mean(0), jnp.float32)


def assert_same_codes(a: QTensor, b: QTensor) -> None:
    """The same codes and zeros, the scales to the last place of their dtype."""
    np.testing.assert_array_equal(a.codes, b.codes)
    assert (a.zero is None) == (b.zero is None)
    if a.zero is not None:
        np.testing.assert_array_equal(a.zero, b.zero)
    np.testing.assert_allclose(np.asarray(a.scale, np.float64), np.asarray(b.scale, np.float64), rtol=2e-7)
    assert (a.format, a.in_features, a.scale.dtype) == (b.format, b.in_features, b.scale.dtype)


@pytest.mark.parametrize("name", NAMES)
def test_the_row_makes_a_hashable_method_that_equals_itself_made_again(name):
    a, b = make(name), make(name)
    assert a is not b
    assert a == b
    assert hash(a) == hash(b)
    assert method(name, 3, 16, False) == a


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_finite_and_reconstructs_the_weight(name):
    w, gram, abs_mean = problem()
    q, info, s = solve(w, gram, abs_mean, make(name))
    assert isinstance(q, QTensor)
    assert isinstance(info, SolveInfo)
    assert q.shape == w.shape
    leaves = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves((q, info, s))]
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert all(np.ndim(field) == 0 for field in jax.tree.leaves(info))
    assert (s > 0).all()
    values = np.asarray(dequantize(q) / s[:, None], np.float64)
    delta = values - np.asarray(w)
    assert np.linalg.norm(delta) < 0.4 * np.linalg.norm(w)
    error = np.sum(delta * (np.asarray(gram, np.float64) @ delta))
    assert float(info.error) == pytest.approx(error, rel=1e-3)
    assert 0 < error < 0.1 * float(info.energy)


@pytest.mark.parametrize("name", NAMES)
def test_eval_shape_agrees_with_the_result(name):
    args = problem()
    promised = jax.eval_shape(partial(whole, method=make(name)), *args)
    result = solve(*args, make(name))
    assert jax.tree.structure(promised) == jax.tree.structure(result)
    for a, b in zip(jax.tree.leaves(promised), jax.tree.leaves(result), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("name", NAMES)
def test_jit_gives_the_codes_of_eager(name):
    args = problem(1)
    assert_same_codes(solve(*args, make(name))[0], whole(*args, make(name))[0])


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_stacked_weights_is_a_loop_over_them(name):
    problems = [problem(seed) for seed in range(LAYERS)]
    stacked = [jnp.stack(leaves) for leaves in zip(*problems, strict=True)]
    q, info, s = jax.jit(jax.vmap(partial(whole, method=make(name))))(*stacked)
    assert q.shape == (LAYERS, ROWS, OUT)
    values = np.asarray(dequantize(q))
    for layer, args in enumerate(problems):
        one, info_one, s_one = solve(*args, make(name))
        assert_same_codes(jax.tree.map(lambda leaf: leaf[layer], q), one)  # noqa: B023
        np.testing.assert_allclose(values[layer], dequantize(one), rtol=1e-6)
        np.testing.assert_allclose(info.error[layer], info_one.error, rtol=1e-4)
        np.testing.assert_allclose(s[layer], s_one, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_sharded_over_out_it_gives_the_codes_of_one_device(name):
    w, gram, abs_mean = problem(2)
    mesh = jax.make_mesh((8,), ("out",), axis_types=(AxisType.Auto,))
    put = lambda v, *spec: jax.device_put(v, NamedSharding(mesh, P(*spec)))  # noqa: E731
    q, info, _ = solve(put(w, None, "out"), put(gram), put(abs_mean), make(name))
    wanted, info_wanted, _ = solve(w, gram, abs_mean, make(name))
    assert len(q.codes.sharding.device_set) == 8
    assert_same_codes(q, wanted)
    np.testing.assert_allclose(info.error, info_wanted.error, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_call_with_equal_formats_compiles_nothing(name):
    solve(*problem(3), make(name))
    before = len(traces)
    solve(*problem(4), make(name))
    assert len(traces) == before
    solve(*problem(4), METHODS[name](5, 24, True))  # the counter does count: int8 and nf4 fix all three
    assert len(traces) == before + (METHODS[name](5, 24, True) != make(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_program_does_not_grow_with_the_matrix(name):
    sizes = set()
    for rows in (128, 512):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, OUT), (rows, rows), (rows,))]
        sizes.add(len(solve.lower(*shapes, make(name)).as_text().splitlines()))
    assert len(sizes) == 1, sizes


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_a_pytree_that_maps_scans_and_goes_through_jit(name):
    q = solve(*problem(), make(name))[0]
    leaves, structure = jax.tree.flatten(q)
    back = jax.tree.unflatten(structure, leaves)
    assert_same_codes(back, q)
    assert_same_codes(jax.tree.map(lambda leaf: leaf, q), q)
    assert jax.tree.map(jnp.shape, q).codes == q.codes.shape
    assert len(leaves) == 2 + q.format.has_zero
    assert {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(q)} >= {".codes", ".scale"}
    values, x = dequantize(q), problem()[2]
    np.testing.assert_array_equal(jax.jit(dequantize)(q), values)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), q)
    _, products = jax.lax.scan(lambda carry, layer: (carry, matmul(x, layer)), 0, stacked)
    np.testing.assert_allclose(products, jnp.stack([x @ values] * 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_bfloat16_weight_gets_the_codes_of_its_float32_values(name):
    w, gram, abs_mean = problem(5, dtype=jnp.bfloat16)
    q, info, s = solve(w, gram, abs_mean, make(name))
    wanted, info_wanted, _ = solve(w.astype(jnp.float32), gram, abs_mean, make(name))
    assert_same_codes(q, wanted)
    assert s.dtype == jnp.float32
    np.testing.assert_allclose(info.error, info_wanted.error, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_float64_weight_gets_the_codes_of_its_float32_values(name):
    w, gram, abs_mean = problem(6)
    wanted = solve(w, gram, abs_mean, make(name))[0]
    with jax.enable_x64(True):
        q = solve(jnp.asarray(np.asarray(w, np.float64)), gram, abs_mean, make(name))[0]
    assert_same_codes(q, wanted)


@pytest.mark.parametrize("name", [name for name in NAMES if make(name).needs_calibration])
def test_a_method_that_needs_calibration_refuses_to_do_without(name):
    w, chosen = problem()[0], make(name)
    if chosen.transform is not None and chosen.range == MinMax():
        pytest.fail("nothing but the transform would notice: test that it refuses")
    with pytest.raises(InputError, match=r"calibration|Gram"):
        chosen.rounding(w, *chosen.range(w, chosen.format, None), None, chosen.format)


def test_an_unknown_method_is_refused_with_the_names_there_are():
    with pytest.raises(InputError, match="gptqq") as error:
        method("gptqq")
    assert all(name in str(error.value) for name in NAMES)
