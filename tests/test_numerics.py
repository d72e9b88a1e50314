"""Gram matrices that real activations give and textbooks do not: finite codes, and what was done is reported."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from problems import rounded

from jquant.formats import Int
from jquant.qtensor import dequantize
from jquant.rounding import GPTQ, Nearest, Refit, Stochastic
from jquant.stats import Gram

ROWS, OUT, FORMAT = 40, 8, Int(3, 16)
GPTQS = [GPTQ(order=order, form=form) for order in ("activation", "pivot", "rows") for form in ("babai", "inverse")]
UNDAMPED = GPTQ(damping=0.0, order="pivot")
ALL = [*GPTQS, UNDAMPED, Refit(GPTQ()), Refit(Nearest()), Stochastic(), Nearest()]
DEAD = (0, 17, 39)


def inputs(tokens: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((tokens, ROWS)) @ rng.standard_normal((ROWS, ROWS)) / np.sqrt(ROWS)


def observed(x: np.ndarray, dtype: str = "float32") -> np.ndarray:
    return np.asarray(Gram.init(ROWS).observe(jnp.asarray(x, dtype)).value)


def gram_of(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    match kind:
        case "bfloat16":
            return observed(inputs(200) + 1, "bfloat16")
        case "bfloat16, few tokens":
            return observed(inputs(12) + 1, "bfloat16")
        case "rank 1":
            return observed(np.outer(rng.standard_normal(100), rng.standard_normal(ROWS)))
        case "condition 1e8":
            basis = np.linalg.qr(rng.standard_normal((ROWS, ROWS)))[0]
            return (basis * np.logspace(0, -8, ROWS) @ basis.T).astype(np.float32)
        case "one channel 1e4 times the rest":
            return observed(inputs(200) * np.where(np.arange(ROWS) == 7, 1e4, 1))
        case "dead inputs":
            return observed(inputs(200) * ~np.isin(np.arange(ROWS), DEAD))
        case "all dead":
            return np.zeros((ROWS, ROWS), np.float32)
    raise KeyError(kind)


KINDS = ["bfloat16", "bfloat16, few tokens", "rank 1", "condition 1e8", "one channel 1e4 times the rest", "dead inputs"]


def weight(seed: int = 0) -> np.ndarray:
    return (0.05 * np.random.default_rng(seed).standard_normal((ROWS, OUT))).astype(np.float32)


def solve(rounding, w, gram):
    q, info = rounded(rounding, w, FORMAT, gram, gram)
    return dequantize(q), info, q


@partial(jax.jit, static_argnums=0)
def solve_all(rounding, w, gram):
    """Of stacked weights, each with its Gram matrix."""
    return jax.vmap(partial(solve, rounding))(w, gram)


@cache
def solved(rounding):
    """Every kind at once, as the experts of a layer: values [kinds, in, out] and infos."""
    grams = np.stack([gram_of(kind) for kind in [*KINDS, "all dead"]])
    values, info, q = solve_all(rounding, jnp.asarray(np.stack([weight()] * len(grams))), jnp.asarray(grams))
    return np.asarray(values, np.float64), jax.device_get(info), q


def name(rounding) -> str:
    return repr(rounding).replace("damping=0.01, ", "").replace(", block=32", "")


@pytest.mark.parametrize("rounding", ALL, ids=name)
def test_codes_and_what_is_reported_are_finite_and_the_error_is_the_oracles(rounding):
    values, info, q = solved(rounding)
    assert np.isfinite(values).all()
    assert all(np.isfinite(np.float32(leaf)).all() for leaf in jax.tree.leaves((q, info)))
    for i, kind in enumerate(KINDS):
        gram = gram_of(kind)
        wanted = oracle.output_error(weight(), values[i], gram)
        # Where float32 cancels, it is to the sum of the magnitudes that an error is exact.
        delta = np.abs(weight() - values[i])
        size = np.sum(delta * (np.abs(gram) @ delta))
        assert info.error[i] == pytest.approx(wanted, rel=1e-4, abs=1e-6 * size), kind
        assert info.held_out_error[i] == info.error[i]


@pytest.mark.parametrize("rounding", GPTQS, ids=name)
@pytest.mark.parametrize("kind", KINDS)
def test_with_the_default_damping_gptq_errs_less_than_rounding_to_nearest_on_every_kind(rounding, kind):
    """No theorem, as grids are clipped. Almost all energy in one direction leaves almost no error, unless it is a
    channel's own: nothing can make up for that channel's weights, and the damping drowns the rest."""
    i, gram = KINDS.index(kind), gram_of(kind)
    nearest, gptq = (oracle.output_error(weight(), solved(one)[0][i], gram) for one in (Nearest(), rounding))
    assert gptq < {"rank 1": 0.05, "one channel 1e4 times the rest": 1}.get(kind, 0.9) * nearest


@pytest.mark.parametrize("start", [GPTQ(), Nearest()], ids=name)
def test_a_refit_errs_no_more_than_its_start_on_any_kind(start):
    for i, kind in enumerate([*KINDS, "all dead"]):
        gram = gram_of(kind)
        before, after = (solved(one)[0][i] for one in (start, Refit(start)))
        delta = np.abs(weight() - before)
        noise = 1e-6 * np.sum(delta * (np.abs(gram) @ delta))
        assert oracle.output_error(weight(), after, gram) <= oracle.output_error(weight(), before, gram) + noise, kind


@pytest.mark.parametrize("rounding", ALL, ids=name)
def test_dead_inputs_are_counted_and_get_the_value_zero_from_gptq_alone(rounding):
    values, info, _ = solved(rounding)
    i = KINDS.index("dead inputs")
    assert info.dead.tolist() == [0] * i + [len(DEAD), ROWS]
    assert info.error[-1] == 0
    compensates = isinstance(rounding, GPTQ) or rounding == Refit(GPTQ())
    assert (values[i, list(DEAD)] == 0).all() == compensates
    assert (values[-1] == 0).all() == compensates


@pytest.mark.parametrize("rounding", [*GPTQS, Refit(GPTQ())], ids=name)
def test_the_default_damping_suffices_at_once_where_nothing_is_indefinite(rounding):
    info = solved(rounding)[1]
    raised = info.attempts > 1
    if getattr(rounding, "form", "babai") == "babai":
        assert not raised.any()
    np.testing.assert_allclose(info.damping, 0.01 * 10.0 ** (info.attempts - 1), rtol=1e-5)


def test_without_damping_what_is_singular_takes_more_attempts_and_the_others_stay_untouched():
    """Under vmap as well, where one expert's further attempts must not reach the rest."""
    info = solved(UNDAMPED)[1]
    attempts = dict(zip(KINDS, info.attempts.tolist(), strict=False))
    assert attempts["rank 1"] > 1
    assert attempts["bfloat16, few tokens"] > 1
    assert attempts["bfloat16"] == attempts["dead inputs"] == 1
    raised = 1e-6 * 10.0 ** (info.attempts - 2)
    np.testing.assert_allclose(info.damping, np.where(info.attempts > 1, raised, 0), rtol=1e-5)
    assert (info.damping <= 1e-3).all()


@pytest.mark.parametrize("rounding", [GPTQS[0], UNDAMPED, Refit(GPTQ()), Stochastic()], ids=name)
def test_an_expert_gets_alone_the_codes_it_gets_beside_a_dead_and_a_singular_one(rounding):
    kinds = ["bfloat16", "dead inputs"]
    w, grams = jnp.asarray(weight())[None], [jnp.asarray(gram_of(kind))[None] for kind in kinds]
    for kind, gram in zip(kinds, grams, strict=True):
        _, info, q = solve_all(rounding, w, gram)
        i, beside = KINDS.index(kind), solved(rounding)
        np.testing.assert_array_equal(q.codes[0], beside[2].codes[i])
        assert info.attempts[0] == beside[1].attempts[i]


def test_bfloat16_activations_give_the_codes_of_their_float64_gram_matrix():
    """Products of bfloat16 numbers are exact in float32, so only the order of the sums is left to differ."""
    x = jnp.asarray(inputs(200) + 1, "bfloat16")
    exact = np.asarray(x, np.float64)
    wanted = solve_all(GPTQ(), jnp.asarray(weight())[None], jnp.asarray((exact.T @ exact / 200), jnp.float32)[None])
    np.testing.assert_array_equal(wanted[2].codes[0], solved(GPTQ())[2].codes[KINDS.index("bfloat16")])
