"""Orthogonal rotations that spread outliers over all channels (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406).

A rotation of size n = 2ᵏ · m, m odd, is Q = D · H / √n with random signs D and a Hadamard matrix H, the Kronecker
product of Sylvester's matrix and of the smallest of Paley's matrices whose order is m times a power of two: 36 for
576 = 16 · 36, 12 for 1536 = 128 · 12. Every entry of Q is ±1/√n, so an outlier in one channel is spread equally over
all. If Paley has no such matrix (odd sizes, 2 · odd, 92, …), Q is the Kronecker product of Sylvester's matrix of order
2ᵏ and a random orthogonal m × m matrix.

Paley's matrices (Journal of Mathematics and Physics 12, 1933) come from the quadratic character χ of a field of q
elements: of order q + 1 where q mod 4 = 3, of order 2 (q + 1) where q mod 4 = 1.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jquant.errors import InputError

Kind = Literal["hadamard", "orthogonal"]

# Small factors are merged up to this width. On a CPU, 512 tokens of width 1536 take 1.1 ms as 32 · 48, 1.6 ms as
# 8 · 16 · 12, and 10.8 ms as one dense product.
WIDEST = 64


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q `[size, size]`, described by its parameters; hashable, so static under jit.

    Attributes:
      size: n.
      seed: of the random signs and matrices, which are the same on every machine up to the rounding of a QR
        factorisation; None for no signs (D = 1), and random matrices of seed 0.
      kind: "hadamard" as the module describes; "orthogonal" for one random (Haar) matrix, applied as a dense product.
    """

    size: int
    seed: int | None = 0
    kind: Kind = "hadamard"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"A rotation has a positive size, not {self.size}.")
        if self.seed is not None and self.seed < 0:
            raise InputError(f"A rotation's seed is None or not negative, not {self.seed}.")
        if self.kind not in get_args(Kind):
            raise InputError(f"There is no rotation of kind {self.kind!r}; known: {', '.join(get_args(Kind))}.")


def apply(x: Float[Array, "*b n"], rotation: Rotation) -> Float[Array, "*b n"]:
    """x @ Q as a fast transform: O(n · Σ orders of the factors), at most 64 each unless Paley's matrix is larger.

    Computed in float32 at the highest matrix-product precision, returned in x's dtype.

    Raises:
      InputError: the last axis is not of the rotation's size.
    """
    _check(x, rotation)
    diagonal, factors = _factors(rotation)
    return _kronecker(x.astype(jnp.float32) * diagonal, factors).astype(x.dtype)


def apply_transpose(x: Float[Array, "*b n"], rotation: Rotation) -> Float[Array, "*b n"]:
    """x @ Qᵀ, which undoes `apply`; otherwise as `apply`."""
    _check(x, rotation)
    diagonal, factors = _factors(rotation)
    turned = _kronecker(x.astype(jnp.float32), tuple(factor.T for factor in factors))
    return (turned * diagonal).astype(x.dtype)


def matrix(rotation: Rotation) -> Float[Array, "n n"]:
    """Q itself, float32."""
    return apply(jnp.eye(rotation.size), rotation)


def _check(x: Array, rotation: Rotation) -> None:
    if x.shape[-1] != rotation.size:
        raise InputError(f"A rotation of size {rotation.size} does not fit {x.shape[-1]} channels.")


def _kronecker(x: Array, factors: tuple[np.ndarray, ...]) -> Array:
    """x @ (F₁ ⊗ F₂ ⊗ …): each product contracts the leading part of the last axis and appends its result at the end."""
    rows, size, turned = math.prod(x.shape[:-1]), x.shape[-1], x
    for factor in factors:
        parts = turned.reshape(rows, len(factor), size // len(factor))
        turned = jnp.tensordot(parts, factor, ((1,), (0,)), precision="highest")
    return turned.reshape(x.shape)


@lru_cache(maxsize=16)
def _factors(rotation: Rotation) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """The diagonal [n] and the Kronecker factors whose product is Q, float32."""
    size, odd = rotation.size, rotation.size // (rotation.size & -rotation.size)
    if rotation.kind == "orthogonal":
        return np.ones(size, np.float32), (_random_orthogonal(size, rotation.seed),)
    core = _paley(size)
    order = size  # of the part whose entries are ±1
    if core is None:
        core, order = _random_orthogonal(odd, rotation.seed), size // odd
    while len(core) < size and 2 * len(core) <= WIDEST:
        core = np.kron(_sylvester(1), core)
    bits = (size // len(core)).bit_length() - 1
    parts = -(-bits // (WIDEST.bit_length() - 1))
    sizes = [bits * (part + 1) // parts - bits * part // parts for part in range(parts)]
    factors = (*map(_sylvester, sizes), core)
    diagonal = _signs(size, rotation.seed) / np.sqrt(order)
    return diagonal.astype(np.float32), tuple(factor.astype(np.float32) for factor in factors)


def _signs(size: int, seed: int | None) -> np.ndarray:
    """Random signs from the generator's raw bits, whose stream NumPy never changes (NEP 19)."""
    if seed is None:
        return np.ones(size)
    return 1.0 - 2.0 * (np.random.PCG64(seed).random_raw(size) >> 63)


def _random_orthogonal(size: int, seed: int | None) -> np.ndarray:
    """Haar-distributed: QR of a Gaussian matrix, the signs of R's diagonal moved into Q."""
    q, r = np.linalg.qr(np.random.default_rng(seed or 0).standard_normal((size, size)))
    return (q * np.sign(np.diag(r))).astype(np.float32)


def _sylvester(bits: int) -> np.ndarray:
    """The Hadamard matrix of order 2^bits: (−1)^(number of bits that row and column share)."""
    shared = np.bitwise_count(np.arange(2**bits)[:, None] & np.arange(2**bits))
    return 1.0 - 2.0 * (shared % 2)


def _paley(size: int) -> np.ndarray | None:
    """Paley's smallest matrix whose order divides `size` and has its odd part; [[1]] for powers of 2; else None."""
    odd = size // (size & -size)
    if odd == 1:
        return np.ones((1, 1))
    order = 4 * odd
    while size % order == 0:
        if order % 8 == 4 and (field := _prime_power(order // 2 - 1)):
            return _second(_jacobsthal(*field))
        if field := _prime_power(order - 1):
            return _first(_jacobsthal(*field))
        order *= 2
    return None


def _first(jacobsthal: np.ndarray) -> np.ndarray:
    """Paley's first construction: 1 + S, S skew."""
    skew = np.pad(jacobsthal, ((1, 0), (1, 0)), constant_values=1)
    skew[1:, 0], skew[0, 0] = -1, 0
    return np.eye(len(skew)) + skew


def _second(jacobsthal: np.ndarray) -> np.ndarray:
    """Paley's second construction: a symmetric S with every 0, ±1 replaced by a 2 × 2 matrix."""
    symmetric = np.pad(jacobsthal, ((1, 0), (1, 0)), constant_values=1)
    symmetric[0, 0] = 0
    return np.kron(symmetric, [[1, 1], [1, -1]]) + np.kron(np.eye(len(symmetric)), [[1, -1], [-1, -1]])


def _jacobsthal(p: int, r: int) -> np.ndarray:
    """χ(a − b) for all pairs of elements of GF(pʳ). χ is the quadratic character: 1 for even powers of a generator.

    Elements are polynomials over GF(p), indexed by their coefficients.
    """
    powers = _powers(p, r)
    character = np.zeros((p,) * r)
    character[tuple(powers[::2].T)] = 1
    character[tuple(powers[1::2].T)] = -1
    elements = np.indices((p,) * r).reshape(r, -1)
    return character[tuple((elements[:, :, None] - elements[:, None]) % p)]


def _powers(p: int, r: int) -> np.ndarray:
    """Coefficients of 1, x, x², … `[pʳ − 1, r]`, for the first rule xʳ = tail(x) under which x generates all units."""
    unity = (1, *[0] * (r - 1))
    for tail in product(range(p), repeat=r):
        powers: list[tuple[int, ...]] = [unity]
        while len(powers) < p**r:
            *low, top = powers[-1]
            following = tuple((a + top * b) % p for a, b in zip((0, *low), tail, strict=True))
            if following == unity:
                break
            powers.append(following)
        if len(powers) == p**r - 1:
            return np.array(powers)
    raise AssertionError(f"Every field has a generator, so {p} cannot be prime.")


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, r) with q = pʳ and p prime; None if q is no prime power."""
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    r = round(math.log(q, p))
    return (p, r) if p**r == q else None
