"""GPTQ (arXiv 2210.17323) in its back-substitution form (arXiv 2507.18553).

Minimising trace((W − Ŵ)ᵀ H (W − Ŵ)) over the grid is a closest-vector problem in the lattice spanned by R, where
H = Rᵀ R and R is upper triangular. Babai's nearest plane solves it greedily from the last row to the first:

    ŵⱼ = Q(wⱼ + Σₖ₍ₖ>ⱼ₎ (rⱼₖ / rⱼⱼ) (wₖ − ŵₖ))

which is what GPTQ computes with the Cholesky factor of H⁻¹, rows taken in the opposite order, without ever inverting H.
The paper's own form lives in tests/oracle.py; both give the same codes.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, UInt8

from jquant.errors import InputError
from jquant.formats import Format
from jquant.qtensor import QTensor, Stored, dequantize, from_codes, settle
from jquant.rounding.info import SolveInfo, output_energy
from jquant.stats import check_gram


@dataclass(frozen=True)
class GPTQ:
    """Error-compensating rounding against the Gram matrix H of the layer's inputs.

    Attributes:
      damping: added to H's diagonal, as a multiple of its mean. Raised tenfold until the factorisation is finite.
      act_order: round the rows with the largest Hᵢᵢ first. Scales are fixed beforehand (static groups), so the order
        costs nothing at inference; without it rows go first to last, as in the paper.
      block: rows per lazy update. Any value gives the same codes up to float rounding; 32 keeps a block of the
        default model's widest matrix in the CPU's second-level cache.

    Raises:
      InputError: no Gram matrix.
    """

    damping: float = 0.01
    act_order: bool = True
    block: int = 32

    needs = frozenset({"gram"})

    def __call__(
        self,
        w: Float[Array, "in out"],
        scale: Stored,
        zero: Stored,
        gram: Float[Array, "in in"] | None,
        format: Format,
    ) -> tuple[QTensor, SolveInfo]:
        """See `Rounding`. A row whose input never fired (Hᵢᵢ = 0) takes the code nearest to zero, as in the paper."""
        if gram is None:
            raise InputError("GPTQ needs the Gram matrix of the layer's inputs: give it calibration text.")
        check_gram(gram, w)
        diagonal = jnp.diagonal(gram)
        dead = diagonal == 0
        order = jnp.argsort(diagonal, stable=True) if self.act_order else jnp.arange(w.shape[0])[::-1]
        factor, damping, attempts = _factorize(gram + jnp.diag(dead.astype(gram.dtype)), order, self.damping)

        stored, at = settle(scale, zero, format, w.shape)
        target = jnp.where(dead[:, None], 0, w).astype(jnp.float32)
        rows = jax.tree.map(lambda v: jnp.broadcast_to(v, w.shape)[order], (target, *at))
        codes = _sweep(rows, factor, format, self.block)
        q = from_codes(jnp.zeros_like(codes).at[order].set(codes), *stored, format)
        error = output_energy(w - dequantize(q), gram)
        return q, SolveInfo(error, output_energy(w, gram), damping, attempts, jnp.sum(dead))


def _factorize(
    gram: Float[Array, "n n"], order: Int[Array, " n"], damping: float
) -> tuple[Float[Array, "n n"], Array, Array]:
    """U = diag(R)⁻¹ R, unit upper-triangular, of the reordered, damped Gram matrix; the damping used; attempts made."""
    gram = gram[order][:, order]
    mean, eye = jnp.mean(jnp.diagonal(gram)), jnp.eye(len(gram), dtype=gram.dtype)

    def attempt(amount: Array, attempts: Array):
        return jnp.linalg.cholesky(gram + amount * mean * eye), amount, attempts

    def failed(state):
        lower, amount, _ = state
        # Past 1000 times the mean the matrix itself is not finite; the identity below then means plain rounding.
        return ~jnp.all(jnp.isfinite(lower)) & (amount < 1e3)

    first = attempt(jnp.float32(damping), jnp.int32(1))
    # 1e-6 is the least that float32 can see beside the mean.
    again = lambda state: attempt(jnp.maximum(10 * state[1], 1e-6), state[2] + 1)  # noqa: E731
    lower, amount, attempts = jax.lax.while_loop(failed, again, first)
    unit = (lower / jnp.diagonal(lower)).T
    return jnp.where(jnp.all(jnp.isfinite(unit)), unit, eye), amount, attempts


def _sweep(
    rows: tuple[Array, Array, Array | None], factor: Float[Array, "n n"], format: Format, block: int
) -> UInt8[Array, "n out"]:
    """Rounds rows of weights from last to first, each to its own scale and zero (`[n, out]`, all three).

    Rows go in blocks. A block first gathers what all later rows owe it in one matrix product (2 n² out operations in
    all), then is swept row by row. Both loops are lax loops: the program's size does not depend on the matrix.
    """
    n = len(factor)
    pad = -n % block
    rows = jax.tree.map(lambda v: jnp.pad(v, ((0, pad), (0, 0)), "edge"), rows)  # not every scale's dtype has a 0
    factor = jnp.pad(factor, ((0, pad), (0, pad)))  # rows of the filling owe nothing to others

    def sweep_block(carry, index):
        errors, codes = carry
        start = index * block
        cut = lambda v: jax.lax.dynamic_slice_in_dim(v, start, block)  # noqa: E731
        debts = cut(factor)
        within = jax.lax.dynamic_slice_in_dim(debts, start, block, axis=1)
        weights, scales, zeros = jax.tree.map(cut, rows)
        targets = weights + jnp.matmul(debts, errors, precision="highest")

        def sweep_row(i, state):
            targets, deltas, codes = state
            row = block - 1 - i
            at = jax.tree.map(lambda v: v[row], (scales, zeros))
            code = format.encode(targets[row], *at)
            # The debt is counted from the original weight: wₖ − ŵₖ, not from the compensated target.
            delta = weights[row] - format.decode(code, *at)
            return targets + within[:, row, None] * delta, deltas.at[row].set(delta), codes.at[row].set(code)

        blank = (targets, jnp.zeros_like(targets), jnp.zeros(targets.shape, jnp.uint8))
        _, deltas, block_codes = jax.lax.fori_loop(0, block, sweep_row, blank)
        errors = jax.lax.dynamic_update_slice_in_dim(errors, deltas, start, 0)
        return (errors, jax.lax.dynamic_update_slice_in_dim(codes, block_codes, start, 0)), None

    blank = (jnp.zeros_like(rows[0]), jnp.zeros(rows[0].shape, jnp.uint8))
    (_, codes), _ = jax.lax.scan(sweep_block, blank, jnp.arange((n + pad) // block)[::-1])
    return codes[:n]
