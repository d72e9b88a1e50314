"""Rotations: orthogonal, Hadamard where the sizes of real models have one, fast, and good for what they are for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import scipy.linalg
from checkpoints import refused

from jquant.rotations import Rotation, _jacobsthal, apply, apply_transpose, matrix
from jquant.transforms import Hadamard

# Powers of two; Paley II 12, 20, 28, 36, 100 (a field of 49 elements); Paley I 24, 44, 344 (a field of 343); multiples.
HADAMARD = [1, 2, 4, 64, 128, 12, 20, 24, 28, 36, 44, 48, 72, 96, 100, 140, 344, 576, 1536]
OTHERS = [3, 9, 10, 18, 92, 184]
KINDS = [Rotation(size, seed) for size in HADAMARD + OTHERS for seed in (None, 5)] + [
    Rotation(size, 5, "orthogonal") for size in (1, 7, 64)
]
turn = jax.jit(apply, static_argnames="rotation")
turn_back = jax.jit(apply_transpose, static_argnames="rotation")


def exact(rotation: Rotation) -> np.ndarray:
    return np.asarray(matrix(rotation), np.float64)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- the matrix -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", KINDS, ids=str)
def test_the_matrix_is_orthogonal(rotation):
    q = exact(rotation)
    np.testing.assert_allclose(q @ q.T, np.eye(rotation.size), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("size", HADAMARD)
def test_every_entry_is_one_over_the_root_where_a_hadamard_matrix_is_known(size, seed):
    entries = np.asarray(matrix(Rotation(size, seed)))
    np.testing.assert_allclose(np.abs(entries), size**-0.5, rtol=1e-7)
    np.testing.assert_array_equal(np.abs(entries), np.abs(entries[0, 0]))


@pytest.mark.parametrize("size", [3072, 8960, 9728, 11008, 13824, 14336, 18944, 29568])
def test_the_widths_of_known_models_have_one_too(size):
    """Feed-forward widths of Qwen2, Qwen3, Llama 2 and 3: a loud channel becomes equal shares, a row of ±1/√n."""
    loud = apply(jnp.zeros(size).at[size // 3].set(1), Rotation(size))
    np.testing.assert_allclose(np.abs(loud), size**-0.5, rtol=1e-6)


@pytest.mark.parametrize("size", [2, 64, 512])
def test_powers_of_two_without_signs_are_sylvesters(size):
    np.testing.assert_allclose(exact(Rotation(size, None)), scipy.linalg.hadamard(size) / size**0.5, rtol=1e-7)


@pytest.mark.parametrize(("p", "r"), [(5, 1), (11, 1), (13, 1), (3, 2), (7, 2), (7, 3)])
def test_the_quadratic_character_is_one_at_one_and_eulers_criterion_in_prime_fields(p, r):
    found = _jacobsthal(p, r)
    assert found[p ** (r - 1), 0] == 1  # the element 1, whose first coefficient counts most
    np.testing.assert_array_equal(found, found.T * (-1 if p**r % 4 == 3 else 1))
    if r == 1:
        powers = np.array([pow(int(a), (p - 1) // 2, p) for a in range(p)])
        differences = (np.arange(p)[:, None] - np.arange(p)) % p
        np.testing.assert_array_equal(found, np.where(powers == p - 1, -1, powers)[differences])


@pytest.mark.parametrize(("size", "odd"), [(18, 9), (92, 23), (184, 23), (10, 5)])
def test_elsewhere_it_is_sylvesters_times_a_random_orthogonal_one(size, odd):
    small, twos = exact(Rotation(odd, None)), scipy.linalg.hadamard(size // odd) / (size // odd) ** 0.5
    np.testing.assert_allclose(exact(Rotation(size, None)), np.kron(twos, small), atol=1e-7)
    assert np.ptp(np.abs(small)) > 0.1


@pytest.mark.parametrize("size", [64, 36])
def test_the_seed_puts_signs_on_the_rows(size):
    signs = exact(Rotation(size, 7)) / exact(Rotation(size, None))
    np.testing.assert_allclose(signs, np.broadcast_to(np.sign(signs[:, :1]), signs.shape), rtol=1e-6)
    assert 0.2 < (signs[:, 0] > 0).mean() < 0.8


def test_equal_seeds_give_equal_matrices_and_others_do_not():
    for rotation in (Rotation(36, 1), Rotation(9, 1), Rotation(9, 1, "orthogonal")):
        np.testing.assert_array_equal(exact(rotation), exact(dataclasses.replace(rotation)))
        assert np.abs(exact(rotation) - exact(dataclasses.replace(rotation, seed=2))).max() > 0.01


def test_random_orthogonal_matrices_have_no_preferred_direction():
    """Haar's have entries of mean 0 and variance 1/n, also on the diagonal, which QR alone would leave signed."""
    diagonals = np.array([np.diag(exact(Rotation(8, seed, "orthogonal"))) for seed in range(60)])
    assert abs(diagonals.mean()) < 4 * diagonals.std() / diagonals.size**0.5
    assert diagonals.var() == pytest.approx(1 / 8, rel=0.25)


def test_by_default_all_parts_of_a_decoder_are_rotated():
    assert Hadamard() == Hadamard(residual=True, heads=True, mlp=True, seed=0)


# ---- applying it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", [r for r in KINDS if r.size < 200 or r.seed], ids=str)
def test_applying_is_the_product_and_the_transpose_undoes_it(rotation):
    x, q = normal(3, rotation.size), exact(rotation)
    np.testing.assert_allclose(turn(x, rotation=rotation), x @ q, atol=1e-5)
    np.testing.assert_allclose(turn_back(x, rotation=rotation), x @ q.T, atol=1e-5)
    np.testing.assert_allclose(turn_back(turn(x, rotation=rotation), rotation=rotation), x, atol=1e-5)


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (2, 1, 3)])
def test_any_leading_axes_come_along(leading):
    x, rotation = normal(*leading, 72), Rotation(72)
    turned = apply(jnp.asarray(x), rotation)
    assert turned.shape == x.shape
    np.testing.assert_allclose(turned, x @ exact(rotation), atol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda row: apply(row, rotation))(x) if leading else turned, turned, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rotated_in_float32(dtype):
    x, rotation = jnp.asarray(normal(4, 96), dtype), Rotation(96)
    for function in (apply, apply_transpose):
        turned = function(x, rotation)
        assert turned.dtype == dtype
        np.testing.assert_array_equal(turned, function(x.astype(jnp.float32), rotation).astype(dtype))


@pytest.mark.parametrize(("size", "most"), [(576, 16 + 36), (1536, 32 + 48), (4096, 64 + 64), (92, 2 + 46)])
def test_the_transform_is_fast(size, most):
    """A multiplication and an addition per entry and factor, beside those of the diagonal and a little bookkeeping."""
    cost = turn.lower(jax.ShapeDtypeStruct((8, size), jnp.float32), rotation=Rotation(size)).compile().cost_analysis()
    assert 2 * most <= cost["flops"] / (8 * size) <= 2 * most + 4


def test_equal_rotations_share_a_program():
    traces = []
    count = jax.jit(lambda x, rotation: traces.append(1) or apply(x, rotation), static_argnames="rotation")
    for rotation in (Rotation(24, 3), Rotation(24, 3), Rotation(24, 4)):
        count(normal(2, 24), rotation=rotation)
    assert len(traces) == 2


# ---- what it is for -------------------------------------------------------------------------------------------------


def kurtosis(x: np.ndarray) -> float:
    """Of each token's channels, 3 for a Gaussian."""
    x = np.asarray(x, np.float64)
    x = x - x.mean(-1, keepdims=True)
    return float(((x**4).mean(-1) / (x**2).mean(-1) ** 2).mean())


@pytest.mark.parametrize("rotation", [Rotation(576), Rotation(92), Rotation(64, 0, "orthogonal")], ids=str)
def test_outlier_channels_vanish_in_all_the_others(rotation):
    x = normal(50, rotation.size)
    x[:, 3] *= 40
    assert kurtosis(x) > 20
    assert kurtosis(apply(jnp.asarray(x), rotation)) < 4


def test_rows_of_outliers_round_with_a_fraction_of_the_error():
    """Int4 per channel: a loud row sets the step of every column, until it is spread over all rows."""
    w, rotation = 0.05 * normal(192, 24), Rotation(192)
    w[7] *= 20

    def error(w: np.ndarray) -> float:
        grid = oracle.int_grid(w, 4, None, symmetric=True)
        return float(np.sum((oracle.int_round(w, *grid, 4, None, symmetric=True)[1] - w) ** 2))

    rotated = np.asarray(apply(jnp.asarray(w).T, rotation).T)
    assert np.linalg.norm(rotated) == pytest.approx(np.linalg.norm(w), rel=1e-5)
    assert error(rotated) < 0.3 * error(w)


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_a_rotation_of_the_wrong_size_is_refused():
    for function in (apply, apply_transpose):
        with refused("size 64", "48 channels"):
            function(jnp.zeros((2, 48)), Rotation(64))


def test_impossible_rotations_are_refused():
    with refused("positive", "0"):
        Rotation(0)
    with refused("seed", "-1"):
        Rotation(8, -1)
