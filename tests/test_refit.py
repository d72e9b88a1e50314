"""Refitted scales against float64 least squares; the error never rises, whatever the format stores."""

import re
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import problem, rounded, shape_for

from jquant.errors import InputError
from jquant.formats import FP8_E4M3, GGUF, MXFP4, NF4, NVFP4, Int, block_shape, expand, unpack
from jquant.qtensor import Grid, dequantize, stored_grid
from jquant.ranges import MinMax
from jquant.rounding import GPTQ, Nearest, Refit


@partial(jax.jit, static_argnames=("rounding", "format"))
def solve(rounding, w, gram, format, stretch=1.0):
    """A rounding on the min-max grid of the weights times `stretch`."""
    q, info = rounded(rounding, w, format, gram, grid=MinMax()(stretch * w, format))
    codes = unpack(q.codes, format.bits, w.shape[0])
    return q, info, codes, dequantize(q), stored_grid(q)


def solved(rounding, w, gram, format, stretch: float = 1.0) -> SimpleNamespace:
    q, info, codes, values, (scale, zero) = solve(rounding, w, gram, format, stretch)
    values = np.asarray(values, np.float64)
    delta = np.asarray(w, np.float64) - values
    errors = np.sum(delta * (np.asarray(gram, np.float64) @ delta), 0)
    zero = None if zero is None else np.asarray(zero)
    found = SimpleNamespace(q=q, info=jax.device_get(info), codes=np.asarray(codes), values=values, errors=errors)
    return SimpleNamespace(**vars(found), scale=np.asarray(scale, np.float64), zero=zero)


def best_values(w, gram, format, got: SimpleNamespace) -> np.ndarray:
    """The values of `got`'s codes under the jointly best scales (and float zeros), block column by block column."""
    rows, columns = block_shape(format, w.shape)
    fixed = None if got.zero is None else expand(jnp.asarray(got.zero), (rows, columns), w.shape)
    free = isinstance(format, Int) and format.has_zero and format.zero == "float"
    basis = format.decode(jnp.asarray(got.codes), jnp.ones((1, 1)), jnp.zeros((1, 1)) if free else fixed)
    basis = np.asarray(basis, np.float64)
    member = np.arange(len(w))[:, None] // rows == np.arange(len(got.scale))
    best = np.empty(w.shape)
    for start in range(0, w.shape[1], columns):
        part = slice(start, start + columns)
        width = basis[:, part].shape[1]
        directions = [np.where(member, basis[:, [j]], 0) for j in range(start, start + width)]
        directions = [np.hstack([each, member]) if free else each for each in directions]
        directions = np.vstack(directions)  # the block's columns one under the other
        scales = oracle.best_scales(
            np.asarray(w)[:, part].T.ravel(), directions, np.kron(np.eye(width), np.asarray(gram, np.float64))
        )
        best[:, part] = (directions @ scales).reshape(width, -1).T
    return best


def errors_of(w, values, gram) -> np.ndarray:
    delta = np.asarray(w, np.float64) - values
    return np.sum(delta * (np.asarray(gram, np.float64) @ delta), 0)


# ------------------------------------------------------------------------------------------------ against the oracle

INT3 = partial(Int, 3, scale="float32")
ONE_GROUP = [
    INT3("channel", True), INT3("channel"), INT3("channel", zero="float"), INT3("tensor", True),
    INT3("tensor", zero="float"), NF4("channel"), FP8_E4M3("channel"),
]  # fmt: skip


@pytest.mark.parametrize("format", ONE_GROUP, ids=str)
def test_one_pass_over_one_group_reaches_the_least_squares_optimum(format):
    w, gram, _ = problem((24, 8))
    before, got = (solved(one, w, gram, format, 1.4) for one in (Nearest(), Refit(Nearest(), 1)))
    np.testing.assert_array_equal(got.codes, before.codes)
    best = best_values(w, gram, format, before)
    np.testing.assert_allclose(got.values, best, atol=1e-5 * np.abs(best).max())
    assert got.errors.sum() == pytest.approx(errors_of(w, best, gram).sum(), rel=1e-5)
    assert got.errors.sum() < 0.95 * before.errors.sum() or format.bits == 8
    assert float(got.info.error) == pytest.approx(got.errors.sum(), rel=1e-4)


SEVERAL_GROUPS = [INT3(16), INT3(16, zero="float"), INT3((16, 3), True)]


@pytest.mark.parametrize("format", SEVERAL_GROUPS, ids=["integer zero", "float zero", "blocks"])
def test_many_passes_reach_the_joint_optimum_of_all_groups(format):
    w, gram, _ = problem((40, 8))  # 2.5 groups of 16 rows; blocks of 3 columns leave a short one
    start = solved(Nearest(), w, gram, format)
    best = errors_of(w, best_values(w, gram, format, start), gram).sum()
    left = [solved(Refit(Nearest(), passes), w, gram, format).errors.sum() - best for passes in (1, 60)]
    gap = start.errors.sum() - best
    assert gap > 2 * left[0] > 2 * left[1]
    assert abs(left[1]) < 1e-3 * gap


def test_by_default_groups_are_fitted_a_second_time_after_their_neighbours_moved():
    w, gram, _ = problem((40, 16))
    errors = [solved(refit, w, gram, Int(2, 8)).errors.sum() for refit in (Refit(Nearest(), 1), Refit(Nearest()))]
    assert errors[1] < 0.99 * errors[0]


@pytest.mark.parametrize("format", [Int(3, 8), Int(4, 8, zero="float")], ids=str)
def test_the_unit_of_the_inputs_changes_nothing(format):
    w, gram, _ = problem((40, 16))
    plain, *others = (solved(Refit(Nearest()), w, unit * gram, format) for unit in (1.0, 2.0**-24, 2.0**24))
    for other in others:
        np.testing.assert_array_equal(other.values, plain.values)


@dataclass(frozen=True)
class FarOff:
    """Nearest codes under scales four times too large."""

    needs = frozenset()

    def __call__(self, w, grid):
        far = Grid.of((4 * grid.scale.astype(jnp.float32)).astype(grid.scale.dtype), None, grid.format, w.shape)
        return replace(Nearest()(w, grid), grid=far)


def test_a_power_of_two_moves_to_the_best_one():
    w, gram, _ = problem((32, 16))
    before, got = (solved(one, w, gram, MXFP4) for one in (FarOff(), Refit(FarOff(), 1)))
    powers = 2.0 ** np.arange(-10, 2)
    errors = [errors_of(w, before.values / before.scale * power, gram) for power in powers]
    np.testing.assert_array_equal(got.scale[0], powers[np.argmin(errors, 0)])
    assert (got.scale < before.scale).all()


# -------------------------------------------------------------------------------------------------- what must follow

FORMATS = [
    Int(3, 16), Int(4, 16, True, "bfloat16"), Int(8, "channel", True), Int(3, (16, 8), zero="float"), Int(4, "tensor"),
    NF4(16, "float16"), GGUF["Q4_0"], GGUF["Q4_1"], MXFP4, Int(3, 16, True, "float8_e5m2"),
    Int(8, 16, False, "bfloat16", "float"),  # 8 bits of code, 8 of scale: what is best unrounded may be worse rounded
]  # fmt: skip


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_error_never_rises_and_codes_and_integer_zeros_and_dtypes_stay(format):
    for seed in range(4):
        w, gram, _ = problem(shape_for(format), seed)
        before, got = (solved(one, w, gram, format) for one in (Nearest(), Refit(Nearest())))
        columns = block_shape(format, w.shape)[1]
        blocks = [np.add.reduceat(one.errors, np.arange(0, w.shape[1], columns)) for one in (before, got)]
        assert (blocks[1] <= blocks[0] * (1 + 1e-6)).all()
        assert blocks[1].sum() < blocks[0].sum() or format == MXFP4
        assert jax.tree.map(lambda v: (v.shape, v.dtype), got.q) == jax.tree.map(lambda v: (v.shape, v.dtype), before.q)
        np.testing.assert_array_equal(got.q.codes, before.q.codes)
        if got.zero is not None and got.zero.dtype == np.uint8:
            np.testing.assert_array_equal(got.q.zero, before.q.zero)


@pytest.mark.parametrize("format", [NF4(16, Int(8, 2)), NVFP4, GGUF["Q4_K"]], ids=["NF4", "NVFP4", "Q4_K"])
def test_scales_that_are_quantized_themselves_stay(format):
    w, gram, _ = problem(shape_for(format))
    before, got = (solve(one, w, gram, format)[0] for one in (Nearest(), Refit(Nearest())))
    assert jax.tree.structure(before) == jax.tree.structure(got)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(a, b)


def test_after_gptq_it_lowers_the_error_further_and_keeps_what_gptq_reports():
    for seed in range(3):
        w, gram, _ = problem((40, 16), seed)
        before, got = (solved(one, w, gram, Int(3, 16)) for one in (GPTQ(), Refit()))
        assert got.info.error < 0.99 * before.info.error
        assert (got.info.damping, got.info.attempts) == (before.info.damping, before.info.attempts)
        assert np.float32(0.01) == got.info.damping
        np.testing.assert_array_equal(got.codes, before.codes)


def test_a_dead_group_a_group_of_zeros_and_one_of_equal_codes_keep_or_gain_a_finite_scale():
    w, gram, _ = (np.array(v) for v in problem((48, 8)))
    gram[:16], gram[:, :16] = 0, 0
    w[16:32] = 0
    w[32:, 0] = 0.25
    for zero in ("integer", "float"):
        format = Int(3, 16, zero=zero)
        before, got = (solved(one, jnp.asarray(w), jnp.asarray(gram), format) for one in (Nearest(), Refit(Nearest())))
        np.testing.assert_array_equal(got.scale[0], before.scale[0])
        assert np.isfinite(got.values).all()
        assert (got.errors <= before.errors * (1 + 1e-6)).all()
        assert int(got.info.dead) == 16


def test_needs_are_those_of_its_start_and_the_gram_matrix():
    assert Refit(Nearest()).needs == {"gram"}
    assert Refit(GPTQ((0.01, 0.1))).needs == {"gram", "held_out"}
    w, *_ = problem((16, 8))
    with pytest.raises(InputError, match=r"needs gram.*calibration text"):
        rounded(Refit(Nearest()), w, Int(4, 16))
    with pytest.raises(InputError, match="pass"):
        Refit(passes=0)


# ---------------------------------------------------------------------------------------------- the compiled program

FORMAT = Int(4, 32, zero="float")


def run(w, gram):
    return rounded(Refit(Nearest()), w, FORMAT, gram)


def test_the_program_does_not_grow_with_the_matrix_and_asks_for_the_highest_precision():
    texts = [
        jax.jit(run)
        .lower(jax.ShapeDtypeStruct((n, 16), jnp.float32), jax.ShapeDtypeStruct((n, n), jnp.float32))
        .as_text()
        for n in (64, 256)
    ]
    assert len({len(text.splitlines()) for text in texts}) == 1
    products = [line for line in texts[0].splitlines() if "dot_general" in line]
    assert products
    assert all(re.search(r"precision = \[HIGHEST, HIGHEST\]", line) for line in products), products


def test_sharded_over_out_it_runs_without_communication_and_gives_the_scales_of_one_device():
    w, gram, _ = problem((72, 64))
    wanted = jax.jit(run)(w, gram)[0]
    mesh = jax.make_mesh((8,), ("out",), axis_types=(AxisType.Auto,))
    args = jax.device_put(w, NamedSharding(mesh, P(None, "out"))), jax.device_put(gram, NamedSharding(mesh, P()))
    compiled = jax.jit(lambda *args: run(*args)[0]).lower(*args).compile()
    assert not re.findall(r"all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter", compiled.as_text())
    got = compiled(*args)
    np.testing.assert_array_equal(got.codes, wanted.codes)
    for a, b in ((got.scale, wanted.scale), (got.zero, wanted.zero)):
        assert a.sharding.shard_shape(a.shape) == (3, 8)
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=2e-3)  # two units in float16's last place


def test_vmap_over_stacked_weights_is_a_loop_over_them():
    problems = [problem((64, 8), seed)[:2] for seed in range(3)]
    mapped, info = jax.jit(jax.vmap(run))(*(jnp.stack(leaves) for leaves in zip(*problems, strict=True)))
    for i, args in enumerate(problems):
        one, info_one = jax.jit(run)(*args)
        np.testing.assert_array_equal(mapped.codes[i], one.codes)
        np.testing.assert_allclose(np.float32(mapped.scale[i]), np.float32(one.scale), rtol=2e-3)
        assert float(info.error[i]) == pytest.approx(float(info_one.error), rel=1e-4)
