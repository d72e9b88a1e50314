"""One battery over every row of `jquant.methods.METHODS`, and every composition on every format.

A new row is covered the day it is written: rows of the same composition share its tests, every other row gets its own.
Nearly all of the time is compilation. The tests share one program per composition, compiled as users' programs are;
eager, mapped, sharded and other programs, which are not optimised, must give its codes.
"""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import problem, rounded, shape_for

from jquant.errors import InputError
from jquant.formats import Codebook, Format, block_shape, tile_of
from jquant.methods import METHODS, Method, completed, method
from jquant.parts import given
from jquant.qtensor import Grid, QTensor, dequantize
from jquant.ranges import RMS, LlamaCpp, MinMax, Range
from jquant.rounding import Rounding, SolveInfo, Stochastic, round_to_grid
from jquant.transforms import AWQ

LAYERS = 2
# What users run; tests/conftest.py takes these away from all other programs.
OPTIMISED = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
}
traces: list[Method] = []


def make(name: str) -> Method:
    """A fresh, equal object at every call."""
    return METHODS[name](3, 16, False)


def composition(name: str) -> Method:
    """What `whole` reads of a row; token weights, tuning and incoherence are the pipeline's, and are tested there."""
    return replace(make(name), token_weights="attention", tuning=(), incoherence=None)


ROWS = list(METHODS)
# The first row of each composition stands for all of them.
FIRST = {composition(name): name for name in reversed(ROWS)}
NAMES = [name for name in ROWS if FIRST[composition(name)] == name]


def problem_for(name: str, seed: int = 0, dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array]:
    return problem(shape_for(make(name).format), seed, dtype)


def whole(w, gram, abs_mean, method: Method):
    """Transform, range and rounding of one matrix, as the pipeline composes them, and the channel scale."""
    traces.append(method)
    s = jnp.ones_like(abs_mean)
    if method.transform is not None:
        seen = {"gram": [gram], "abs_mean": abs_mean, "abs_max": 3 * abs_mean}
        s = method.transform([w], [method.format], **given(method.transform, seen))
        w, gram = w * s[:, None], gram / (s[:, None] * s)
    groups = [-(-n // size) for n, size in zip(w.shape, block_shape(method.format, w.shape), strict=True)]
    seen = {"clips": jnp.full(groups, 0.995, jnp.float32), "gram": gram, "held_out": gram}
    grid = Grid.of(*method.range(w, method.format, **given(method.range, seen)), method.format, w.shape)
    q, info, _ = round_to_grid(w, grid, method.rounding, seen)
    if method.activation is not None:
        q = replace(q, activation=method.activation)
        if method.activation.static:
            q = replace(q, input_scale=method.activation.format.grid(jnp.full((1, 1), -9.0), jnp.full((1, 1), 9.0))[0])
    return q, info, s


solve = jax.jit(whole, static_argnames="method", compiler_options=OPTIMISED)
solve_once = jax.jit(whole, static_argnames="method")


@cache
def solved(name: str) -> tuple[QTensor, SolveInfo, jax.Array]:
    return solve(*problem_for(name), method=make(name))


def assert_same(a, b) -> None:
    """The same codes and zeros, also those of quantized scales; floats to the last place of their dtype.

    Double quantization subtracts the mean of a tensor's scales from them. Programs add in different orders, and a sum
    of n float32 numbers errs by up to n · 2⁻²⁴. Codebooks that all columns share are fitted by such sums, step after
    step, and rounded to float16: they may differ in a last place of the largest level.
    """
    if isinstance(b, QTensor) and b.levels is not None:
        theirs = np.asarray(b.levels, np.float64)
        np.testing.assert_allclose(np.asarray(a.levels, np.float64), theirs, atol=2.0**-10 * np.abs(theirs).max())
        a, b = replace(a, levels=None), replace(b, levels=None)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    inner = b.format.scale if isinstance(b, QTensor) else None
    rtol = b.scale.codes.size * 2.0**-24 if isinstance(inner, Codebook) and inner.centred else 2e-7
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if x.dtype == jnp.uint8:
            np.testing.assert_array_equal(x, y)
        else:
            np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=rtol)


# ------------------------------------------------------------------------------------------------------ every row


@pytest.mark.parametrize("name", ROWS)
def test_the_row_makes_a_hashable_method_that_equals_itself_made_again(name):
    a, b = make(name), make(name)
    assert a is not b
    assert a == b
    assert hash(a) == hash(b)
    assert completed(name, 3, 16, False) == a
    assert isinstance(a.format, Format)
    assert isinstance(a.range, Range)
    assert isinstance(a.rounding, Rounding)
    assert a.needs <= {"gram", "held_out", "cross", "abs_mean", "abs_max", "clips", "text", "outputs"}


@pytest.mark.parametrize("name", [name for name in ROWS if name not in NAMES])
def test_rows_of_one_composition_are_one_program(name):
    """So that the tests of the first row are the tests of this one."""
    first = FIRST[composition(name)]
    jaxprs = [jax.make_jaxpr(partial(whole, method=make(row)))(*problem_for(row)) for row in (name, first)]
    assert str(jaxprs[0]) == str(jaxprs[1])


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_finite_and_reconstructs_the_weight(name):
    (w, gram, _), (q, info, s) = problem_for(name), solved(name)
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
def test_jit_gives_the_codes_of_eager_and_eval_shape_its_shapes(name):
    args = problem_for(name)
    eager = whole(*args, make(name))
    assert_same(solved(name)[0], eager[0])
    promised = jax.eval_shape(partial(whole, method=make(name)), *args)
    assert jax.tree.structure(promised) == jax.tree.structure(eager)
    for a, b in zip(jax.tree.leaves(promised), jax.tree.leaves(eager), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_stacked_weights_is_a_loop_over_them(name):
    problems = [problem_for(name, seed) for seed in range(LAYERS)]
    stacked = [jnp.stack(leaves) for leaves in zip(*problems, strict=True)]
    mapped = jax.jit(jax.vmap(partial(whole, method=make(name))))
    q, info, s = mapped(*stacked)
    assert q.shape == (LAYERS, *problems[0][0].shape)
    values = np.asarray(dequantize(q))
    for layer, args in enumerate(problems):
        one, info_one, s_one = solve(*args, method=make(name))
        of_layer = jax.tree.map(lambda leaf: leaf[layer], q)  # noqa: B023
        assert_same(of_layer, one)
        np.testing.assert_allclose(values[layer], dequantize(of_layer), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(info.error[layer], info_one.error, rtol=1e-4)
        np.testing.assert_allclose(s[layer], s_one, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_sharded_over_out_it_gives_the_codes_of_one_device(name):
    w, gram, abs_mean = problem_for(name)
    mesh = jax.make_mesh((8,), ("out",), axis_types=(AxisType.Auto,))
    put = lambda v, *spec: jax.device_put(v, NamedSharding(mesh, P(*spec)))  # noqa: E731
    q, info, _ = solve_once(put(w, None, "out"), put(gram), put(abs_mean), method=make(name))
    wanted, info_wanted, _ = solved(name)
    assert len(q.codes.sharding.device_set) == 8
    assert_same(q, wanted)
    # Levels in float16 may differ in a last place.
    np.testing.assert_allclose(info.error, info_wanted.error, rtol=1e-5 if q.levels is None else 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_call_with_an_equal_method_compiles_nothing(name):
    solved(name)
    before = len(traces)
    solve(*problem_for(name, 1), method=make(name))
    assert len(traces) == before
    other = METHODS[name](4, 24, False)
    solve.eval_shape(*problem_for(name), method=other)  # the counter does count: many rows fix all three
    assert len(traces) == before + (other != make(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_program_does_not_grow_with_the_matrix(name):
    (rows, out), sizes = shape_for(make(name).format), set()
    for factor in (8, 24):  # nf4_double's scales, too, fill more than one group of 256
        n = rows * factor
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n, out), (n, n), (n,))]
        sizes.add(len(solve.lower(*shapes, method=make(name)).as_text().splitlines()))
    assert len(sizes) == 1, sizes


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_a_pytree_that_maps_scans_and_goes_through_jit(name):
    q = solved(name)[0]
    leaves, structure = jax.tree.flatten(q)
    assert_same(jax.tree.unflatten(structure, leaves), q)
    assert jax.tree.map(jnp.shape, q).codes == q.codes.shape
    assert {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(q)} >= {".codes"}
    values, x = dequantize(q), problem_for(name)[2]

    @jax.jit
    def scanned(q, x):
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), q)
        return jax.lax.scan(lambda carry, layer: (carry, (dequantize(layer), x @ layer)), 0, stacked)[1]

    each, products = scanned(q, x)
    np.testing.assert_allclose(each, jnp.stack([values] * 2), rtol=1e-6, atol=1e-9)
    wanted = np.asarray(x @ values)
    off = 0.02 * np.abs(wanted).max() if q.activation else 1e-5  # x in 8 bits
    np.testing.assert_allclose(products, [wanted] * 2, rtol=1e-4, atol=off)


@pytest.mark.parametrize("name", NAMES)
def test_a_bfloat16_weight_gets_the_codes_of_its_float32_values(name):
    w, gram, abs_mean = problem_for(name, 1, "bfloat16")
    q, info, s = solve_once(w, gram, abs_mean, method=make(name))
    wanted, info_wanted, _ = solve(w.astype(jnp.float32), gram, abs_mean, method=make(name))
    assert_same(q, wanted)
    assert s.dtype == jnp.float32
    np.testing.assert_allclose(info.error, info_wanted.error, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_float64_weight_gets_the_codes_of_its_float32_values(name):
    w, gram, abs_mean = problem_for(name)
    with jax.enable_x64(True):
        q = solve_once(jnp.asarray(np.asarray(w, np.float64)), gram, abs_mean, method=make(name))[0]
    assert_same(q, solved(name)[0])


@pytest.mark.parametrize("name", [name for name in NAMES if make(name).needs - {"abs_max"}])
def test_a_method_that_needs_calibration_refuses_to_do_without(name):
    w, chosen = problem_for(name)[0], make(name)
    if chosen.transform is not None and chosen.range == MinMax():
        pytest.fail("nothing but the transform would notice: test that it refuses")
    with pytest.raises(InputError, match=r"calibration"):
        rounded(chosen.rounding, w, chosen.format, range=chosen.range)


def test_an_unknown_method_is_refused_with_the_three_nearest_names():
    with pytest.raises(InputError, match=r"'gptqq'; the nearest names are gptq, gptq_\w+, gptq_\w+\.$"):
        method("gptqq")


# ---------------------------------------------------------------------------------- every composition on every format

FORMATS = sorted({make(name).format for name in NAMES}, key=repr)
# llama.cpp's own search suits its own types only, and RMS those with deviations; they are among the formats.
COMPOSITIONS = sorted(
    {
        replace(composition(name), format=FORMATS[0], activation=None)
        for name in NAMES
        if not isinstance(make(name).range, LlamaCpp | RMS)
    },
    key=repr,
)


@dataclass(frozen=True)
class Compiled:
    """A part whose program all compositions that have the part share."""

    part: Any

    @property
    def needs(self) -> frozenset[str]:
        return self.part.needs

    def __call__(self, *args, **options):
        leaves, structure = jax.tree.flatten((args, options))
        fixed = tuple(None if isinstance(leaf, jax.Array) else leaf for leaf in leaves)
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        return _call(arrays, self.part, structure, fixed)


@partial(jax.jit, static_argnames=("part", "structure", "fixed"))
def _call(arrays: list[jax.Array], part: Any, structure: Any, fixed: tuple):
    """The part, called with arrays in the places where `fixed` has None; the rest are formats."""
    given = iter(arrays)
    args, options = jax.tree.unflatten(structure, [next(given) if leaf is None else leaf for leaf in fixed])
    return part(*args, **options)


def in_parts(method: Method) -> Method:
    parts = {axis: getattr(method, axis) for axis in ("transform", "range", "rounding")}
    return replace(method, **{axis: part and Compiled(part) for axis, part in parts.items()})


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_composition_suits_the_format(format):
    """Every range, rounding and transform that any row makes: finite, and no worse than plain rounding on that grid."""
    args = problem(shape_for(format))

    def relative_error(composition: Method) -> float:
        q, info, s = whole(*args, in_parts(replace(composition, format=format)))
        values = np.asarray(dequantize(q) / s[:, None])
        assert np.isfinite(values).all(), composition
        if composition.transform == AWQ():
            assert (values != 0).any()
        return float(info.error / info.energy)

    single = tile_of(format) == (1, 1)
    suiting = [one for one in COMPOSITIONS if single or not isinstance(one.rounding, Stochastic)]
    errors = {composition: relative_error(composition) for composition in suiting}
    (nearest,) = (errors[one] for one in suiting if one == Method(FORMATS[0]))
    for composition, error in errors.items():
        # Stochastic rounding has twice the variance, and is there for its mean.
        assert 0 < error < (4 if isinstance(composition.rounding, Stochastic) else 1.5) * nearest, composition
