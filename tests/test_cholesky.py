"""Factors and solves in blocks, as TPUs compute them, beside LAPACK's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jquant.rounding.cholesky import cholesky, in_blocks, solve, solve_in_blocks

LOWER = jax.jit(in_blocks, static_argnames="block")
SOLVED = jax.jit(solve_in_blocks, static_argnames="block")


def definite(n: int) -> jax.Array:
    x = np.random.default_rng(n).standard_normal((2 * n, n))
    return jnp.asarray(x.T @ x / n + 0.01 * np.eye(n), jnp.float32)


@pytest.mark.parametrize(("n", "block"), [(1, 4), (7, 4), (8, 4), (65, 16), (300, 128)])
def test_blocks_give_the_factor_and_the_solution(n, block):
    a, b = definite(n), np.random.default_rng(0).standard_normal((n, 5)).astype(np.float32)
    exact = scipy.linalg.cholesky(np.asarray(a, np.float64), lower=True)
    ours = LOWER(a, block=block)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    assert not np.triu(ours, 1).any()
    solution = scipy.linalg.cho_solve((exact, True), b.astype(np.float64))
    np.testing.assert_allclose(SOLVED(ours, b, block=block), solution, rtol=0, atol=1e-4 * np.abs(solution).max())


@pytest.mark.parametrize("factor", [cholesky, in_blocks])
def test_the_lower_half_is_read(factor):
    a = definite(300)
    np.testing.assert_array_equal(factor(jnp.tril(a)), factor(a))


@pytest.mark.parametrize("place", [0, 150, 299])
def test_what_has_no_factor_is_not_finite(place):
    a = definite(300).at[place, place].set(-1)
    assert not np.isfinite(LOWER(a)).all()


def test_a_tpu_gets_the_loop_and_other_platforms_a_library():
    program = lambda platform, function, *of: (  # noqa: E731
        jax.jit(function).trace(*of).lower(lowering_platforms=(platform,)).as_text()
    )
    a, b = jnp.eye(1024), jnp.ones((1024, 8))
    for function, of in ((cholesky, (a,)), (solve, (a, b))):
        assert "while" in program("tpu", function, *of)
        assert "while" not in program("cpu", function, *of)
    small = len(program("tpu", cholesky, jnp.eye(512)))
    assert len(program("tpu", cholesky, a)) < 1.1 * small
