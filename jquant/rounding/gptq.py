"""GPTQ in its back-substitution form (arXiv 2507.18553) and in the paper's form (arXiv 2210.17323).

Minimising trace((W − Ŵ)ᵀ H (W − Ŵ)) over the grid is a closest-vector problem in the lattice spanned by R, where
H = Rᵀ R and R is upper triangular. Babai's nearest plane solves it greedily from the last row to the first:

    ŵⱼ = Q(tⱼ),  tⱼ = wⱼ + Σₖ₍ₖ>ⱼ₎ (rⱼₖ / rⱼⱼ) (wₖ − ŵₖ)

The paper takes the rows in the opposite order. It moves the remaining rows by each row's loss against its *moved*
value, with the Cholesky factor of the inverse, H⁻¹ = Vᵀ V, V lower triangular with rows numbered as above:

    tⱼ = wⱼ − Σₖ₍ₖ>ⱼ₎ (vₖⱼ / vₖₖ) (tₖ − ŵₖ)

Both are one sweep with one unit triangular matrix. They give the same codes, except where float rounding decides a tie.

A format that codes g rows together (`tile_of`) has them rounded at once, as in block LDLQ (QuIP#, arXiv 2402.04396,
Eq. 5). With R_bb the g × g block of R on the diagonal, the target of the rows b is

    t_b = w_b + R_bb⁻¹ Σₖ R_bk (wₖ − ŵₖ),  k after b.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, UInt8

from jquant.errors import InputError
from jquant.formats import tile_of
from jquant.qtensor import Grid
from jquant.rounding.base import Rounded
from jquant.rounding.cholesky import cholesky, solve
from jquant.rounding.info import output_energy


@dataclass(frozen=True)
class GPTQ:
    """Error-compensating rounding against the Gram matrix H of the layer's inputs.

    Attributes:
      damping: added to H's diagonal, as a multiple of its mean over the active inputs; raised tenfold until the
        factorisation is finite. Of several dampings, the one with the least error on the held-out windows is used.
      order: which row is rounded first. Scales are fixed beforehand (static groups), so all orders are free at
        inference. "activation": the largest Hᵢᵢ (act-order). "pivot": the last row of a Cholesky factorisation that
        always eliminates the smallest remaining diagonal (min-pivot, arXiv 2507.18553); this keeps the sum of the
        squared pivots low, which bounds the error. "rows": first to last, as in the paper.
      block: rows per lazy update. Any value gives the same codes up to float rounding; 32 keeps a block of the
        default model's widest matrix in the CPU's second-level cache.
      form: "babai" factorises H once; "inverse" inverts it and factorises that too, as the paper does (Algorithm 1).

    Raises:
      InputError: several dampings without a held-out Gram matrix; an unknown option.
    """

    damping: float | tuple[float, ...] = 0.01
    order: Literal["activation", "pivot", "rows"] = "activation"
    block: int = 32
    form: Literal["babai", "inverse"] = "babai"

    def __post_init__(self) -> None:
        if self.order not in ("activation", "pivot", "rows"):
            raise InputError(f'GPTQ takes order="activation", "pivot" or "rows", not {self.order!r}.')
        if self.form not in ("babai", "inverse"):
            raise InputError(f'GPTQ takes form="babai" or "inverse", not {self.form!r}.')
        if not self._dampings or not all(damping >= 0 for damping in self._dampings):
            raise InputError(f"GPTQ takes a damping of at least 0, or several, not {self.damping!r}.")
        if self.block < 1:
            raise InputError(f"GPTQ takes blocks of at least 1 row, not {self.block}.")

    @property
    def _dampings(self) -> tuple[float, ...]:
        return self.damping if isinstance(self.damping, tuple) else (self.damping,)

    @property
    def needs(self) -> frozenset[str]:
        """See `Rounding`; the held-out Gram matrix only for several dampings."""
        return frozenset({"gram", "held_out"} if len(self._dampings) > 1 else {"gram"})

    def __call__(
        self,
        w: Float[Array, "in out"],
        grid: Grid,
        gram: Float[Array, "in in"],
        held_out: Float[Array, "in in"] | None = None,
    ) -> Rounded:
        """See `Rounding`. A row with a dead input (Hᵢᵢ = 0) takes the code nearest to zero, as in the paper."""
        if held_out is None and "held_out" in self.needs:
            raise InputError("GPTQ chooses among dampings by a second Gram matrix: give it held-out windows.")
        w = w.astype(jnp.float32)
        tile = tile_of(grid.format)[0]
        if tile > 1 and (self.form == "inverse" or self.order == "pivot"):
            raise InputError(
                f'{type(grid.format).__name__} codes {tile} rows together: GPTQ takes form="babai" and '
                f'order="activation" or "rows" for it.'
            )
        dead = jnp.diagonal(gram) == 0
        target = jnp.where(dead[:, None], 0, w)
        rows = jax.tree.map(lambda v: jnp.broadcast_to(v, w.shape), (target, *grid.per_weight))
        diagonal = _enliven(jnp.diagonal(gram), dead)

        def rounded_with(damping: Array) -> Rounded:
            unit, order, used, fallback, attempts = self._factorize(gram, diagonal, damping, tile)
            ordered = jax.tree.map(lambda v: v[order], rows)
            codes = _sweep(ordered, unit, grid, self.block, self.form == "inverse", tile)
            return Rounded(jnp.zeros_like(codes).at[order].set(codes), None, used, attempts, fallback)

        def choose(best: tuple[Array, Rounded], damping: Array):
            rounded = rounded_with(damping)
            candidate = (output_energy(w - grid.decode(rounded.codes), held_out), rounded)
            better = (candidate[0] < best[0]) | (best[1].attempts == 0)  # attempts 0: nothing was tried yet
            return jax.tree.map(lambda a, b: jnp.where(better, a, b), candidate, best), None

        dampings = jnp.array(self._dampings, jnp.float32)
        if len(dampings) == 1:
            return rounded_with(dampings[0])
        # A scan holds one candidate and the best: memory does not grow with their number.
        blank = Rounded(jnp.zeros(w.shape, jnp.uint8), None, dampings[0], jnp.int32(0), jnp.int32(0))
        return jax.lax.scan(choose, (jnp.float32(jnp.nan), blank), dampings)[0][1]

    def _factorize(
        self, gram: Float[Array, "n n"], diagonal: Float[Array, " n"], damping: Array, tile: int
    ) -> tuple[Float[Array, "n n"], Int[Array, " n"], Array, Array, Array]:
        """The sweep's unit triangular matrix; the row at each place; damping, fallback and attempts for `Rounded`.

        The last place is rounded first; `tile` rows stay together. `diagonal` replaces the Gram matrix's diagonal.
        Copies of a wide matrix take most of a block's memory: there are two, before and after the factorisation.
        """
        n, mean, places = len(gram), jnp.mean(diagonal), jnp.arange(len(gram))
        inverse = self.form == "inverse"

        def ordered(order: Array, damped: Array) -> Array:
            def row(at: tuple[Array, Array]) -> Array:
                place, row = at
                return jnp.where(places == place, damped[row], gram[row][order])

            # Some rows at a time: ordering rows and then columns would take one more copy.
            return jax.lax.map(row, (places, order), batch_size=64)

        def attempt(state):
            *_, used, attempts = state
            # 1e-6 is the least that float32 can see beside the mean.
            used = jnp.where(attempts == 0, damping, jnp.maximum(10 * used, 1e-6))
            damped = diagonal + used * mean
            order = self._order(gram, diagonal, damped, tile)
            return _factor(ordered(order, damped), inverse), order, used, attempts + 1

        def failed(state):
            upper, _, used, attempts = state
            # Beyond 1000 times the mean nothing helps; the identity below then means rounding to nearest, a fallback.
            return (attempts == 0) | (~_divides(upper) & (used < 1e3))

        blank = (jnp.zeros_like(gram), places, jnp.zeros_like(damping), jnp.int32(0))
        upper, order, used, attempts = jax.lax.while_loop(failed, attempt, blank)
        solved = _divides(upper)
        unit = _unit(jnp.where(solved, upper, jnp.eye(n, dtype=gram.dtype)), inverse, tile)
        return unit, order, used, 1 - solved.astype(jnp.int32), attempts

    def _order(
        self, gram: Float[Array, "n n"], diagonal: Float[Array, " n"], damped: Float[Array, " n"], tile: int
    ) -> Int[Array, " n"]:
        """The row at each place of the factorisation; the last place is rounded first."""
        match self.order:
            case "activation":
                tiles = jnp.argsort(jnp.sum(diagonal.reshape(-1, tile), 1), stable=True)
                return (tiles[:, None] * tile + jnp.arange(tile)).reshape(-1)
            case "pivot":
                return min_pivot(jnp.where(jnp.eye(len(gram), dtype=bool), damped, gram), self.block)
        return jnp.arange(len(gram)).reshape(-1, tile)[::-1].reshape(-1)


def factorize(
    gram: Float[Array, "n n"], damping: float, tile: int
) -> tuple[Float[Array, "n n"], Int[Array, " n"], Array, Array, Array]:
    """What `GPTQ` sweeps with, for any damped Gram matrix: the unit matrix, `tile` rows together, and the order.

    Returns:
      R_bb⁻¹ R_bk; the row at each place, the largest diagonal last; damping, fallback and attempts as in `Rounded`.
    """
    diagonal = _enliven(jnp.diagonal(gram), jnp.diagonal(gram) == 0)
    return GPTQ()._factorize(gram, diagonal, jnp.float32(damping), tile)


def _enliven(diagonal: Float[Array, " n"], dead: Array) -> Float[Array, " n"]:
    """H's diagonal with the mean over active inputs in place of the zeros; the paper's code puts 1.

    So the damping depends neither on dead inputs nor on the unit of the activations.
    """
    count = jnp.sum(~dead)
    mean = jnp.where(count == 0, 1, jnp.sum(diagonal) / jnp.maximum(count, 1))
    return jnp.where(dead, mean, diagonal)


def _factor(gram: Float[Array, "n n"], inverse: bool) -> Float[Array, "n n"]:
    """R, or Vᵀ, upper triangular; not finite if a factorisation fails.

    LAPACK stores matrices by columns: H is symmetric, and passed transposed it needs no copy.
    """
    lower = cholesky(gram.T)
    if not inverse:
        return lower.T
    inverted = solve(lower, jnp.eye(len(gram), dtype=gram.dtype))
    # Numbered from the end, as the paper does, V is upper triangular, the transpose of a lower Cholesky factor.
    return cholesky(((inverted + inverted.T) / 2)[::-1, ::-1])[::-1, ::-1]


def _divides(upper: Float[Array, "n n"]) -> Array:
    """Whether a factor is finite, also divided by its diagonal."""
    return jnp.isfinite(jnp.max(jnp.abs(upper)) / jnp.min(jnp.diagonal(upper)))


def _unit(upper: Float[Array, "n n"], inverse: bool, tile: int) -> Float[Array, "n n"]:
    """The unit upper triangular matrix: rⱼₖ / rⱼⱼ, or −vₖⱼ / vₖₖ above the diagonal; by tiles R_bb⁻¹ R_bk."""
    if tile == 1:
        return -upper / jnp.diagonal(upper) if inverse else upper / jnp.diagonal(upper)[:, None]
    lines = upper.reshape(-1, tile, len(upper))
    firsts = jnp.arange(0, len(upper), tile)
    corners = jax.vmap(lambda line, first: jax.lax.dynamic_slice_in_dim(line, first, tile, 1))(lines, firsts)
    return jax.lax.linalg.triangular_solve(corners, lines, left_side=True).reshape(upper.shape)


def min_pivot(gram: Float[Array, "n n"], block: int = 32) -> Int[Array, " n"]:
    """The order in which a Cholesky factorisation eliminates rows if it always takes the least remaining diagonal.

    It works in blocks: within a block only the pivots' columns are computed, from a panel of the columns before them.
    The Schur complement is updated by one matrix product a block (n³ operations in all).
    """
    n = len(gram)

    def eliminate_block(state, start):
        schur = state[0]

        def eliminate(k, state):
            panel, diagonal, eliminated, order = state
            # Without the bound an infinite diagonal would equal that of finished rows, and a row could come twice.
            pivot = jnp.argmin(jnp.where(eliminated, jnp.inf, jnp.minimum(diagonal, jnp.finfo(diagonal.dtype).max)))
            size = diagonal[pivot]
            eliminated = eliminated.at[pivot].set(True)
            column = schur[pivot] - jnp.matmul(panel, panel[pivot], precision="highest")
            # With a pivot that float rounding made negative, the factorisation will fail; here it eliminates nothing.
            column = jnp.where(eliminated | ~(size > 0), 0, column * jax.lax.rsqrt(size))
            # Places beyond n, of a short last block, are dropped.
            return panel.at[:, k].set(column), diagonal - column**2, eliminated, order.at[start + k].set(pivot)

        panel, *rest = jax.lax.fori_loop(0, block, eliminate, (jnp.zeros((n, block), gram.dtype), *state[1:]))
        return (schur - jnp.matmul(panel, panel.T, precision="highest"), *rest), None

    blank = (gram, jnp.diagonal(gram), jnp.zeros(n, bool), jnp.zeros(n, int))
    (*_, order), _ = jax.lax.scan(eliminate_block, blank, jnp.arange(0, n, block))
    return order


def _sweep(
    rows: tuple[Array, Array, Array | None],
    unit: Float[Array, "n n"],
    grid: Grid,
    block: int,
    moved: bool,
    tile: int,
) -> UInt8[Array, "n out"]:
    """Rounds rows of weights from last to first, each to its own scale and zero (`[n, out]`, all three).

    Row j's target is wⱼ + Σₖ₍ₖ>ⱼ₎ uⱼₖ eₖ with the unit matrix U; eₖ is the loss of row k, against its target if
    `moved`, else against the weight. Rows go in blocks. A block first adds the terms of all later rows by one matrix
    product (2 n² out operations in all), then is swept row by row, or `tile` rows by `tile` rows. Both are lax loops,
    so the program's size does not depend on the matrix.
    """
    n, block = len(unit), -(-block // tile) * tile
    pad = -n % block
    rows = jax.tree.map(lambda v: jnp.pad(v, ((0, pad), (0, 0)), "edge"), rows)  # not 0: some scale dtypes lack it
    unit = jnp.pad(unit, ((0, pad), (0, pad)))  # padding rows change no others

    def sweep_block(carry, index):
        errors, codes = carry
        start = index * block
        cut = lambda v: jax.lax.dynamic_slice_in_dim(v, start, block)  # noqa: E731
        debts = cut(unit)
        within = jax.lax.dynamic_slice_in_dim(debts, start, block, axis=1)
        weights, scales, zeros = jax.tree.map(cut, rows)
        targets = weights + jnp.matmul(debts, errors, precision="highest")

        def sweep_row(i, state):
            targets, lost, codes = state
            row = block - 1 - i
            at = jax.tree.map(lambda v: v[row], (scales, zeros))
            code = grid.encode(targets[row], at)
            loss = (targets if moved else weights)[row] - grid.decode(code, at)
            return targets + within[:, row, None] * loss, lost.at[row].set(loss), codes.at[row].set(code)

        def sweep_tile(i, state):
            targets, lost, codes = state
            first = block - (i + 1) * tile
            of = lambda v, axis=0: jax.lax.dynamic_slice_in_dim(v, first, tile, axis)  # noqa: E731
            put = lambda v, part: jax.lax.dynamic_update_slice_in_dim(v, part, first, 0)  # noqa: E731
            at = jax.tree.map(of, (scales, zeros))
            code = grid.encode(of(targets), at)
            loss = of(weights) - grid.decode(code, at)
            return targets + jnp.matmul(of(within, 1), loss, precision="highest"), put(lost, loss), put(codes, code)

        blank = (targets, jnp.zeros_like(targets), jnp.zeros(targets.shape, jnp.uint8))
        sweep = sweep_row if tile == 1 else sweep_tile
        _, lost, block_codes = jax.lax.fori_loop(0, block // tile, sweep, blank)
        errors = jax.lax.dynamic_update_slice_in_dim(errors, lost, start, 0)
        return (errors, jax.lax.dynamic_update_slice_in_dim(codes, block_codes, start, 0)), None

    blank = (jnp.zeros_like(rows[0]), jnp.zeros(rows[0].shape, jnp.uint8))
    (_, codes), _ = jax.lax.scan(sweep_block, blank, jnp.arange((n + pad) // block)[::-1])
    return codes[:n]
