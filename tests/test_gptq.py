"""GPTQ against the float64 oracle, against its own definition, and on Gram matrices that break factorisations."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import rounded

from jquant.errors import InputError
from jquant.formats import NF4, Codebook, Int, block_shape, unpack
from jquant.qtensor import Grid, dequantize, from_codes
from jquant.ranges import MinMax
from jquant.rounding import GPTQ, Nearest
from jquant.rounding.gptq import min_pivot
from jquant.rounding.info import output_energy

ROWS, OUT = 40, 16
ORDERS, FORMS = ["activation", "pivot", "rows"], ["babai", "inverse"]
NEAR = 1e-3  # of a step: how near to a tie float32 may decide otherwise than float64


def problem(
    seed: int = 0, rows: int = ROWS, out: int = OUT, dead: tuple[int, ...] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """A weight and the Gram matrix of correlated inputs of uneven magnitude."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((6 * rows, rows)) @ rng.standard_normal((rows, rows)) / np.sqrt(rows)
    x *= rng.uniform(0.2, 3, rows)
    x[:, list(dead)] = 0
    return (0.05 * rng.standard_normal((rows, out))).astype(np.float32), (x.T @ x / len(x)).astype(np.float32)


@partial(jax.jit, static_argnames=("rounding", "format"))
def solve(rounding, w, gram, format):
    q, info = rounded(rounding, w, format, gram)
    zero = None if q.zero is None else unpack(jnp.swapaxes(q.zero, 0, 1), format.bits, q.scale.shape[1]).T
    return q, info, unpack(q.codes, format.bits, w.shape[0]), dequantize(q), zero


def solved(rounding, w: np.ndarray, gram: np.ndarray, format) -> SimpleNamespace:
    """Everything about a solution in NumPy: codes as in the format, scale and zero one row per weight."""
    q, info, codes, values, zero = solve(rounding, jnp.asarray(w), jnp.asarray(gram), format)
    row = np.minimum(np.arange(len(w)) // block_shape(format, w.shape)[0], len(q.scale) - 1)
    scale = np.broadcast_to(np.asarray(q.scale, np.float64)[row], w.shape)
    origin = 2 ** (format.bits - 1) if isinstance(format, Int) and format.symmetric else 0
    zero = np.full(w.shape, origin) if zero is None else np.broadcast_to(np.asarray(zero, np.float64)[row], w.shape)
    codes, values = np.asarray(codes).astype(np.int64), np.asarray(values, np.float64)
    return SimpleNamespace(info=jax.device_get(info), codes=codes, values=values, scale=scale, zero=zero)


def order_of(gram: np.ndarray, order: str, damping: float) -> np.ndarray:
    """The order of quantization."""
    if order == "pivot":
        return oracle.min_pivot(gram, damping)[0]
    return np.argsort(np.diag(gram), kind="stable")[::-1] if order == "activation" else np.arange(len(gram))


def targets(w: np.ndarray, gram: np.ndarray, values: np.ndarray, damping: float, order: np.ndarray) -> np.ndarray:
    """What each weight is rounded from, in float64, given every value chosen before it: Babai's nearest plane."""
    h, w = gram.astype(np.float64), w.astype(np.float64)
    dead = np.diag(h) == 0
    w, h = np.where(dead[:, None], 0, w), h + np.diag(dead.astype(float))
    h += damping * np.diag(h).mean() * np.eye(len(h))
    back = order[::-1]
    r = np.linalg.cholesky(h[np.ix_(back, back)]).T
    found = np.empty_like(w)
    found[back] = w[back] + np.triu(r / np.diag(r)[:, None], 1) @ (w - values)[back]
    return found


def distance_to_cell(target: np.ndarray, got: SimpleNamespace, format) -> np.ndarray:
    """How far, in steps, a target lies outside the cell of the code it got; 0 where the code is the nearest one."""
    if isinstance(format, Int):
        t, top = target / got.scale + got.zero, 2**format.bits - 1
        low = np.where(got.codes == 0, -np.inf, got.codes - 0.5)
        high = np.where(got.codes == top, np.inf, got.codes + 0.5)
    else:
        t, levels = target / got.scale, np.array(format.levels)
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        low, high = edges[got.codes], edges[got.codes + 1]
    return np.maximum(0, np.maximum(low - t, t - high))


def assert_oracles_codes(got, w, gram, format, damping, order) -> None:
    """Same codes as both oracles, save chains that begin where the target lies within NEAR of a tie."""
    first = [len(w) if isinstance(format.group, str) else format.group]
    groups = np.arange(0, len(w), first[0])
    grid = [v[groups] for v in (got.scale, got.zero if not format.symmetric else np.zeros_like(got.zero))]
    offset = 2 ** (format.bits - 1) if format.symmetric else 0
    size = None if isinstance(format.group, str) else format.group
    for reference in (oracle.gptq, oracle.babai):
        codes, values = reference(w, gram, *grid, format.bits, size, format.symmetric, damping, order)
        differs = (codes + offset != got.codes)[order]
        columns = np.flatnonzero(differs.any(0))
        assert len(columns) <= 2, f"{len(columns)} of {w.shape[1]} columns differ from {reference.__name__}"
        target = targets(w, gram, values, damping, order)[order] / got.scale[order]
        for column in columns:
            start = np.argmax(differs[:, column])
            assert abs(abs(target[start, column] % 1) - 0.5) < NEAR
        wanted = oracle.output_error(w, values, gram)
        assert oracle.output_error(w, got.values, gram) == pytest.approx(wanted, rel=1e-3)


def check(w, gram, format, order="activation", block=32, damping=0.01, form="babai") -> SimpleNamespace:
    got = solved(GPTQ(damping, order, block, form), w, gram, format)
    rows = order_of(gram, order, damping)
    assert distance_to_cell(targets(w, gram, got.values, damping, rows), got, format).max() < NEAR
    assert float(got.info.error) == pytest.approx(oracle.output_error(w, got.values, gram), rel=1e-4)
    assert float(got.info.energy) == pytest.approx(oracle.output_error(w, 0 * w, gram), rel=1e-4)
    assert (float(got.info.damping), int(got.info.attempts)) == (pytest.approx(damping), 1)
    if isinstance(format, Int):
        assert_oracles_codes(got, w, gram, format, damping, rows)
    return got


# ------------------------------------------------------------------------------------------------ against the oracle


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", ORDERS)
def test_codes_and_error_equal_the_oracles_for_every_order_and_form(order, form):
    for seed in range(8):
        check(*problem(seed), Int(3, 16), order, form=form)  # 40 = 2.5 × 16


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_and_error_equal_the_oracles_for_every_width(bits, symmetric):
    for seed in range(3):
        check(*problem(seed), Int(bits, 16, symmetric), "activation" if symmetric else "rows")


@pytest.mark.parametrize("format", [Int(3, 8), Int(4, "channel"), Int(4, "tensor"), Int(3, "channel", True)], ids=str)
def test_codes_and_error_equal_the_oracles_for_every_grouping(format):
    check(*problem(7), format)
    check(*problem(7), format, "pivot")


@pytest.mark.parametrize(
    ("format", "order"), [(NF4(16), "activation"), *((Codebook((-1.0, -0.2, 0.5, 0.8), 8), each) for each in ORDERS)]
)
def test_every_code_on_a_codebook_is_the_nearest_to_its_compensated_target(format, order):
    got = check(*problem(1), format, order)
    nearest = solved(Nearest(), *problem(1), format)
    assert (got.codes != nearest.codes).mean() > 0.05  # compensation does change codes
    assert got.info.error < nearest.info.error


def test_both_forms_give_the_same_codes():
    """On these problems without a single tie, which the oracles' test allows for."""
    for seed in range(8):
        babai, inverse = (solved(GPTQ(form=form), *problem(seed), Int(3, 16)) for form in FORMS)
        np.testing.assert_array_equal(babai.codes, inverse.codes)
        assert babai.info.error == pytest.approx(inverse.info.error, rel=1e-6)


@pytest.mark.parametrize(("block", "format"), [(1, Int(3, 16)), (16, NF4(16)), (64, Int(3, 16))], ids=str)
def test_any_block_size_gives_the_same_codes(block, format):
    w, gram = problem(2)
    got = check(w, gram, format, block=block)
    np.testing.assert_array_equal(got.codes, solved(GPTQ(), w, gram, format).codes)


def test_damping_of_any_strength_is_the_oracles():
    w, gram = problem(3)
    light, heavy = (check(w, gram, Int(3, 16), damping=damping) for damping in (0.001, 1.0))
    assert (light.codes != heavy.codes).any()
    assert light.info.error < heavy.info.error


def test_one_row_and_one_column_are_rounded_to_nearest():
    w, gram = problem(4, rows=1, out=1)
    np.testing.assert_array_equal(
        solved(GPTQ(), w, gram, Int(4, 1, True)).codes, solved(Nearest(), w, gram, Int(4, 1, True)).codes
    )


# -------------------------------------------------------------------------------------------------- what must follow


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", FORMS)
def test_on_a_diagonal_gram_matrix_it_is_round_to_nearest(form, order):
    w, gram = problem(5)
    gram = np.diag(np.diag(gram))
    gptq, nearest = (solved(rounding, w, gram, Int(3, 16)) for rounding in (GPTQ(order=order, form=form), Nearest()))
    np.testing.assert_array_equal(gptq.codes, nearest.codes)
    assert gptq.info.error == pytest.approx(nearest.info.error, rel=1e-6)


@pytest.mark.parametrize(("bits", "order"), [(2, "rows"), (4, "rows"), *((3, order) for order in ORDERS)])
def test_error_on_correlated_inputs_is_below_that_of_round_to_nearest(bits, order):
    for seed in range(3):
        gptq, nearest = (
            solved(rounding, *problem(seed), Int(bits, 16, False)) for rounding in (GPTQ(order=order), Nearest())
        )
        assert gptq.info.error < 0.8 * nearest.info.error


def test_nearest_reports_the_oracles_error_and_the_dead_inputs():
    w, gram = problem(6, dead=(3, 20))
    got = solved(Nearest(), w, gram, Int(4, 16))
    assert float(got.info.error) == pytest.approx(oracle.output_error(w, got.values, gram), rel=1e-4)
    assert int(got.info.dead) == 2
    blind, info, *_ = solve(Nearest(), jnp.asarray(w), None, Int(4, 16))
    assert np.isnan(info.error)
    np.testing.assert_array_equal(dequantize(blind), got.values)


DEAD = (3, 20, 39)


@pytest.mark.parametrize("order", ORDERS)
def test_dead_channels_get_the_code_of_zero_and_are_counted(order):
    w, gram = problem(6, dead=DEAD)
    live = np.delete(np.diag(gram), DEAD)
    got = check(w, gram / live.mean(), Int(3, 16), order)  # the paper's code puts 1 in their place, this one the mean
    assert int(got.info.dead) == 3
    assert (got.values[list(DEAD)] == 0).all()
    assert (w[list(DEAD)] != 0).all()
    no_zero = solved(GPTQ(order=order), w, gram, Codebook((-1.0, -0.2, 0.5, 0.8), 8))
    assert (no_zero.codes[list(DEAD)] == 1).all()


def test_the_codes_of_live_channels_depend_neither_on_the_unit_of_the_inputs_nor_on_dead_channels():
    w, gram = problem(6, dead=DEAD)
    wanted = solved(GPTQ(), w, gram, Int(4, "channel"))
    for unit in (2.0**-40, 2.0**20):
        got = solved(GPTQ(), w, np.float32(unit) * gram, Int(4, "channel"))
        np.testing.assert_array_equal(got.codes, wanted.codes)
        assert got.info.error == pytest.approx(unit * wanted.info.error, rel=1e-6)
    live = np.setdiff1d(np.arange(ROWS), DEAD)
    w[list(DEAD)] = w[live[0]]  # so that they stretch no range
    with_dead = solved(GPTQ(), w, gram, Int(4, "channel"))
    without = solved(GPTQ(), w[live], gram[np.ix_(live, live)], Int(4, "channel"))
    np.testing.assert_array_equal(with_dead.codes[live], without.codes)


# ------------------------------------------------------------------------------------------------------- min-pivot


@pytest.mark.parametrize("block", [1, 7, 32, 64])
def test_the_min_pivot_order_is_the_oracles(block):
    for seed in range(3):
        gram = problem(seed)[1]
        h = (gram + 0.01 * np.diag(gram).mean() * np.eye(ROWS)).astype(np.float32)
        eliminated = np.asarray(jax.jit(min_pivot, static_argnums=1)(h, block))
        np.testing.assert_array_equal(eliminated[::-1], oracle.min_pivot(gram, 0.01)[0])


def test_the_min_pivot_order_lowers_the_bound_and_on_average_the_error():
    """The bound is Σ D; on correlated inputs it falls by a large part (arXiv 2507.18553)."""
    bounds, errors = np.zeros((2, 20)), np.zeros((2, 20))
    for seed in range(20):
        w, gram = problem(seed)
        for i, order in enumerate(("rows", "pivot")):
            bounds[i, seed] = oracle.pivots(gram, 0.01, order_of(gram, order, 0.01)).sum()
            errors[i, seed] = solved(GPTQ(order=order), w, gram, Int(3, 16)).info.error
    assert (bounds[1] < bounds[0]).all()
    assert bounds[1].mean() < 0.8 * bounds[0].mean()
    assert errors[1].mean() < 0.9 * errors[0].mean()


def test_what_no_factorisation_survives_is_still_put_in_an_order():
    infinite = np.diag(np.full(ROWS, np.inf))
    for gram in (np.zeros((ROWS, ROWS)), -np.eye(ROWS), np.full((ROWS, ROWS), np.nan), infinite, infinite + 1):
        order = np.asarray(jax.jit(min_pivot)(gram.astype(np.float32)))
        np.testing.assert_array_equal(np.sort(order), np.arange(ROWS))


# ------------------------------------------------------------------------------------------------- choice of damping

DAMPINGS = (0.03, 0.3, 10.0)


@partial(jax.jit, static_argnames=("rounding", "format"))
def held_out_solve(rounding, w, gram, held_out, format):
    q, info = rounded(rounding, w, format, gram, held_out)
    return unpack(q.codes, format.bits, w.shape[0]), info


def test_of_several_dampings_the_one_that_errs_least_on_the_held_out_windows_is_kept():
    """The calibration windows' own Gram matrix likes the light one; another's inputs the heavy one, or one between."""
    format = Int(3, 16)
    w, gram = problem(0)
    own, other = gram, problem(1)[1]
    chosen = set()
    for held_out in (own, 0.5 * own + 0.5 * other, other):
        one = [held_out_solve(GPTQ(damping), w, gram, held_out, format) for damping in DAMPINGS]
        errors = [float(info.held_out_error) for _, info in one]
        codes, info = held_out_solve(GPTQ(DAMPINGS), w, gram, held_out, format)
        best = int(np.argmin(errors))
        np.testing.assert_array_equal(codes, one[best][0])
        assert float(info.damping) == pytest.approx(DAMPINGS[best])
        assert float(info.held_out_error) == pytest.approx(errors[best], rel=1e-6)
        values = np.asarray(oracle_values(w, codes, format), np.float64)
        assert float(info.held_out_error) == pytest.approx(oracle.output_error(w, values, held_out), rel=1e-3)
        assert float(info.held_out_energy) == pytest.approx(oracle.output_error(w, 0 * w, held_out), rel=1e-4)
        assert float(info.error) == pytest.approx(oracle.output_error(w, values, gram), rel=1e-3)
        chosen.add(best)
    assert chosen == {0, 1, 2}


def oracle_values(w, codes, format):
    return dequantize(from_codes(codes, *MinMax()(jnp.asarray(w), format), format))


def test_a_damping_among_several_is_raised_where_it_does_not_factorise():
    w, gram = problem()[0], broken("rank one")
    _, info = held_out_solve(GPTQ((0.0, 100.0)), w, gram, problem(1)[1], Int(3, 16))
    alone = held_out_solve(GPTQ(0.0), w, gram, problem(1)[1], Int(3, 16))[1]
    assert int(alone.attempts) > 1
    other = held_out_solve(GPTQ(100.0), w, gram, problem(1)[1], Int(3, 16))[1]
    wanted = min(alone, other, key=lambda one: float(one.held_out_error))
    assert (float(info.damping), int(info.attempts)) == (float(wanted.damping), int(wanted.attempts))


def test_a_held_out_matrix_of_nan_keeps_the_first_damping():
    w, gram = problem()
    codes, info = held_out_solve(GPTQ(DAMPINGS), w, gram, np.nan * gram, Int(3, 16))
    np.testing.assert_array_equal(codes, held_out_solve(GPTQ(DAMPINGS[0]), w, gram, gram, Int(3, 16))[0])
    assert float(info.damping) == pytest.approx(DAMPINGS[0])
    assert np.isnan(info.held_out_error)


def test_it_needs_the_held_out_matrix_only_to_choose():
    assert GPTQ().needs == GPTQ((0.01,)).needs == {"gram"}
    assert GPTQ(DAMPINGS).needs == {"gram", "held_out"}
    w, gram = map(jnp.asarray, problem())
    with pytest.raises(InputError, match=r"GPTQ\(.*\) needs held_out"):
        rounded(GPTQ(DAMPINGS), w, Int(4, 16), gram)
    with pytest.raises(InputError, match="held-out"):
        GPTQ(DAMPINGS)(w, Grid.of(*MinMax()(w, Int(4, 16)), Int(4, 16), w.shape), gram)
    info = solved(GPTQ(), *problem(), Int(3, 16)).info
    assert np.isnan([info.held_out_error, info.held_out_energy]).all()


@pytest.mark.parametrize("options", [{"damping": ()}, {"damping": -0.1}, {"damping": (0.1, np.nan)}, {"block": 0}])
def test_an_option_that_makes_no_sense_is_refused(options):
    with pytest.raises(InputError, match="GPTQ takes"):
        GPTQ(**options)


def test_without_a_gram_matrix_it_is_refused():
    w = jnp.asarray(problem()[0])
    with pytest.raises(InputError, match=r"GPTQ\(.*needs gram, which comes from calibration text"):
        rounded(GPTQ(), w, Int(4, 16))


# --------------------------------------------------------------------------------- Gram matrices that break things


def broken(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "rank one":
        v = rng.standard_normal(ROWS)
        return np.outer(v, v).astype(np.float32)
    if kind == "condition 1e8":
        basis = np.linalg.qr(rng.standard_normal((ROWS, ROWS)))[0]
        return (basis * np.logspace(0, -8, ROWS) @ basis.T).astype(np.float32)
    if kind == "indefinite":
        gram = problem()[1]
        return gram - np.float32(0.05 * np.diag(gram).mean()) * np.eye(ROWS, dtype=np.float32)
    gram = problem()[1]
    gram[3, 5] = gram[5, 3] = np.nan
    return gram


@pytest.mark.parametrize("kind", ["rank one", "condition 1e8", "indefinite"])
def test_a_gram_matrix_that_does_not_factorise_raises_the_damping_and_says_so(kind):
    w, gram, format = problem()[0], broken(kind), Int(3, 16)
    got = solved(GPTQ(damping=0.0), w, gram, format)
    attempts, damping = int(got.info.attempts), float(got.info.damping)
    if kind == "condition 1e8":  # float32 may or may not see that it is positive
        assert attempts <= 3
    else:
        assert attempts > 1
    assert damping == (pytest.approx(1e-6 * 10 ** (attempts - 2), rel=1e-3) if attempts > 1 else 0)
    assert damping <= 1
    assert np.isfinite(got.values).all()
    error = oracle.output_error(w, got.values, gram)
    assert float(got.info.error) == pytest.approx(error, rel=1e-3, abs=1e-6)
    if kind != "indefinite":
        assert error < oracle.output_error(w, solved(Nearest(), w, gram, format).values, gram)


@pytest.mark.parametrize("kind", ["rank one", "condition 1e8"])
def test_the_default_damping_factorises_a_degenerate_gram_matrix_at_once(kind):
    check(problem()[0], broken(kind), Int(3, 16))


def test_a_zero_gram_matrix_leaves_every_channel_dead():
    w = problem()[0]
    got = solved(GPTQ(), w, np.zeros((ROWS, ROWS), np.float32), Int(3, 16))
    assert (got.values == 0).all()
    assert (int(got.info.dead), float(got.info.error)) == (ROWS, 0.0)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_gram_matrix_with_nan_falls_back_to_nearest_codes_and_shows_in_the_info(damping):
    w, gram = problem()[0], broken("nan")
    got = solved(GPTQ(damping=damping), w, gram, Int(3, 16))
    assert int(got.info.attempts) > 1
    assert np.isnan(got.info.error)
    np.testing.assert_array_equal(got.codes, solved(Nearest(), w, gram, Int(3, 16)).codes)


# ---------------------------------------------------------------------------------------------- the compiled program


def run(w, scale, zero, gram, rounding=GPTQ()):  # noqa: B008
    return rounded(rounding, w, Int(4, 32), gram, gram, grid=(scale, zero))


@pytest.mark.parametrize("options", [{}, {"order": "pivot", "damping": DAMPINGS, "form": "inverse"}], ids=str)
def test_the_program_does_not_grow_with_the_matrix(options):
    sizes, solve = set(), partial(run, rounding=GPTQ(**options))
    for rows in (64, 128, 512):
        shapes = [jax.ShapeDtypeStruct((rows, 16), jnp.float32), jax.ShapeDtypeStruct((rows // 32, 16), jnp.float16)]
        shapes += [jax.ShapeDtypeStruct((rows // 32, 16), jnp.uint8), jax.ShapeDtypeStruct((rows, rows), jnp.float32)]
        sizes.add(len(jax.jit(solve).lower(*shapes).as_text().splitlines()))
    assert len(sizes) == 1, sizes


def test_its_matrix_products_are_asked_for_at_the_highest_precision():
    """A GPU or TPU would else multiply float32 in fewer bits, and the compensated targets and the error with it."""
    w, gram = map(jnp.asarray, problem(rows=64))
    rounding = GPTQ(DAMPINGS, "pivot", form="inverse")
    text = jax.jit(partial(run, rounding=rounding)).lower(w, *MinMax()(w, Int(4, 32)), gram).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all(re.search(r"precision = \[HIGHEST, HIGHEST\]", line) for line in products), products


def test_memory_does_not_grow_with_the_number_of_dampings():
    shapes = [jax.ShapeDtypeStruct((128, 64), jnp.float32), jax.ShapeDtypeStruct((4, 64), jnp.float16)]
    shapes += [jax.ShapeDtypeStruct((4, 64), jnp.uint8), jax.ShapeDtypeStruct((128, 128), jnp.float32)]
    used = [
        jax.jit(partial(run, rounding=GPTQ(tuple(np.linspace(0.01, 1, count).tolist()))))
        .lower(*shapes)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for count in (2, 12)
    ]
    assert used[1] < 1.05 * used[0]


def test_a_tall_matrix_is_solved_beside_two_copies_of_its_gram_matrix():
    """The bytes of n² are what a wide model's down-projection is quantized in; before there were three."""
    rows, out = 2048, 32
    shapes = [jax.ShapeDtypeStruct((rows, out), jnp.float32), jax.ShapeDtypeStruct((rows // 32, out), jnp.float16)]
    shapes += [jax.ShapeDtypeStruct((rows // 32, out), jnp.uint8), jax.ShapeDtypeStruct((rows, rows), jnp.float32)]
    solve = lambda w, scale, zero, gram: rounded(GPTQ(), w, Int(4, 32), gram, grid=(scale, zero))  # noqa: E731
    used = jax.jit(solve).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert 4 * rows**2 < used < 2.5 * 4 * rows**2


@pytest.mark.parametrize("rows", [1, 72, 2053, 3000])
def test_the_output_energy_of_a_matrix_is_the_oracles_whether_it_is_summed_in_parts_or_not(rows):
    w, gram = problem(3, rows=rows, out=5)
    got = output_energy(jnp.asarray(w), jnp.asarray(gram))
    assert float(got) == pytest.approx(oracle.output_error(w, 0 * w, gram), rel=1e-5)


@pytest.mark.parametrize("order", ["activation", "pivot"])
def test_sharded_over_out_it_runs_without_communication_and_gives_the_codes_of_one_device(order):
    solve = partial(run, rounding=GPTQ(order=order))
    w, gram = map(jnp.asarray, problem(8, rows=72, out=64))
    scale, zero = MinMax()(w, Int(4, 32))
    wanted, info = jax.jit(solve)(w, scale, zero, gram)
    mesh = jax.make_mesh((8,), ("out",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P(None, "out")), NamedSharding(mesh, P())
    args = [*(jax.device_put(v, split) for v in (w, scale, zero)), jax.device_put(gram, whole)]
    quantized = jax.jit(lambda *args: solve(*args)[0]).lower(*args).compile()
    collective = r"all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter"
    assert not re.findall(collective, quantized.as_text())
    got = quantized(*args)
    assert got.codes.sharding.shard_shape(got.codes.shape) == (36, 8)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)
    # The error is a sum over all of `out`, so the whole solution may talk, once for each number it reports.
    _, spread = jax.jit(solve)(*args)
    assert float(spread.error) == pytest.approx(float(info.error), rel=1e-5)
