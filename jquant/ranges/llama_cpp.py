"""The scale searches of llama.cpp's quantizer (ggml-quants.c) for the block types of `jquant.formats.GGUF`.

Each search tries a few grids per block, fits scale (and minimum) to each grid's codes by weighted least squares, and
keeps the best. On a CPU the arithmetic equals that of a plain C build, float by float, so the bytes are the same: sums
run over members in order, a product is rounded before it is added (`_once`), and a quotient does not become a product
with a reciprocal (`_over`). On other devices the last place may differ, which may change the choice between grids that
are almost equally good.

In this file a block's members are on axis 0: `[members, groups, out]`. The loops over grids and over members are scans,
so the program does not grow with them, and memory grows by at most one number per block and grid.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from jquant.errors import InputError
from jquant.formats import GGUF, Format, block_shape
from jquant.qtensor import Grid, QTensor, from_codes
from jquant.stats import check_gram

Members = Float[Array, "members groups out"]
Groups = Float[Array, "groups out"]

FLOAT32_MAX = float(np.finfo(np.float32).max)
NO_PEAK = 1e-15  # ggml's GROUP_MAX_EPS: blocks with smaller weights become 0


@dataclass(frozen=True)
class LlamaCpp:
    """Scales (and minima) as llama.cpp chooses them, with the quantization of the sub-blocks' scales.

    With `Nearest` the weights equal those of llama.cpp's quantizer, with two exceptions. With importance weights, Q4_0,
    Q4_1, Q5_0 and Q5_1 keep the codes of the grid to which the scale was fitted, but `Nearest` rounds to the fitted
    grid. Where a scale is 0, all codes mean 0, and llama.cpp's codes may differ. `quantize` gives llama.cpp's bytes in
    these cases too.

    Attributes:
      importance: weight each input by its mean square, the diagonal of the Gram matrix (llama.cpp's imatrix).

    Raises:
      InputError: a format that is not in `jquant.formats.GGUF`, or importance weights without a Gram matrix.
    """

    importance: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """See `Range`."""
        return frozenset({"gram"} if self.importance else ())

    def __call__(
        self, w: Float[Array, "in out"], format: Format, gram: Float[Array, "in in"] | None = None
    ) -> tuple[Array | QTensor, Array | QTensor | None]:
        """See `Range`. Scales that the format stores in float16 are not yet rounded to it, as in ggml."""
        return self._search(w, format, gram)[:2]

    def quantize(self, w: Float[Array, "in out"], format: Format, gram: Float[Array, "in in"] | None = None) -> QTensor:
        """llama.cpp's quantizer with the same bytes, also where a scale is 0."""
        scale, zero, kept = self._search(w, format, gram)
        grid = Grid.of(scale, zero, format, w.shape)
        codes = grid.encode(w.astype(jnp.float32))
        if kept is not None:
            kept = _rows(kept, w.shape[0]).astype(jnp.uint8)
            codes = jnp.where(grid.per_weight[0] == 0, kept, codes) if isinstance(scale, QTensor) else kept
        return grid.pack(codes)

    def _search(self, w: Array, format: Any, gram: Array | None) -> tuple[Any, Any, Members | None]:
        """Scale and zero as from `__call__`, and the codes of the best grid if llama.cpp keeps them, else None."""
        kind = next((name for name, block in GGUF.items() if block == format), None)
        if kind is None:
            raise InputError(f"llama.cpp has no block type for {format}; it has {', '.join(GGUF)}.")
        if self.importance and gram is None:
            raise InputError(f"Importance weights for {kind} need calibration text.")
        check_gram(gram, w)
        w = w.astype(jnp.float32)
        diagonal = jnp.diagonal(gram).astype(jnp.float32) if self.importance and gram is not None else None
        x, weights = _members(w, block_shape(format, w.shape)[0]), _weights(w, kind, diagonal)
        if kind.endswith("_K"):
            return _super_block(x, weights, kind, self.importance)
        if kind == "IQ4_NL":
            scale, codes = _fit_levels(x, weights, format.levels)
            return scale, None, codes
        if kind == "Q8_0":
            return _over(jnp.max(jnp.abs(x), 0), 127), None, None
        return _block(x, weights, format, self.importance)


def _block(x: Members, weights: Members, format: Any, importance: bool) -> tuple[Groups, Groups | None, Any]:
    """Q4_0, Q5_0 and, with a minimum, Q4_1, Q5_1: from the ends of the block, or a search with importance weights."""
    if format.symmetric:
        half = 2 ** (format.bits - 1)
        if not importance:
            return _peak(x) / -half, None, None
        scale, codes = _fit_signed(x, weights, half)
        return scale, None, codes
    top = 2**format.bits - 1
    if not importance:
        low = jnp.min(x, 0)
        return _over(jnp.max(x, 0) - low, top), low, None
    return _fit_affine(x, weights, top, _grids(-0.9, 0.05, range(37), top))


def _super_block(x: Members, weights: Members, kind: str, importance: bool) -> tuple[QTensor, QTensor | None, Members]:
    """The k-quants: a search per sub-block, then a second search for the scales (and minima) of the super-block."""
    format: Any = GGUF[kind]
    (mass,) = _totals(lambda w: (w,), weights)
    if format.symmetric:
        half = 2 ** (format.bits - 1)
        # Only Q3_K without importance weights refines codes one by one.
        fit = _fit_refined if kind == "Q3_K" and not importance else _fit_signed
        scale, codes = fit(x, weights, half)
        return _store_signed(scale, mass if kind == "Q3_K" and importance else None, format.scale), None, codes
    top = 2**format.bits - 1
    if importance:
        grids = _grids(-0.9, 0.05, range(37), top)
    else:
        grids = _grids(-1.0, 0.1, range(21), top) if kind == "Q4_K" else _grids(-0.5, 0.1, range(16), top)
    scale, low, codes = _fit_affine(x, weights, top, grids, absolute=kind == "Q2_K" and not importance)
    mass = mass if importance else None
    minimum = _store_unsigned(-low, mass, format.scale)
    # ggml subtracts the minimum; jquant adds the zero.
    return _store_unsigned(scale, mass, format.scale), replace(minimum, scale=-minimum.scale), codes


def _weights(w: Float[Array, "in out"], kind: str, importance: Float[Array, " in"] | None) -> Members:
    """The weight of each member's squared error; 0 for the padding of a short last block."""
    rows: Any = GGUF[kind].group
    x = _members(w, rows)
    real = _members(jnp.ones((len(w), 1), jnp.float32), rows, repeat_last=False)
    if importance is not None:
        weights = _members(importance[:, None], rows)
        if kind != "Q6_K":
            span = rows if kind == "IQ4_NL" else 256 if kind.endswith("_K") else len(w)
            times = 1 if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K") else 2
            mean = times * _mean_square(w, span)
            mean = jnp.repeat(mean, -(-span // rows), 0)[: x.shape[1]]
            weights = weights * jnp.sqrt(mean + _once(x * x))
    elif kind == "Q2_K":
        weights = jnp.abs(x)
    elif kind in ("Q4_K", "Q5_K"):
        weights = jnp.sqrt(_mean_square(w, rows)) + jnp.abs(x)
    else:
        weights = x * x
    return jnp.broadcast_to(weights * real, x.shape)


def _mean_square(w: Float[Array, "in out"], rows: int) -> Float[Array, "spans out"]:
    members = _members(w, rows, repeat_last=False)
    (total,) = _totals(lambda x: (x * x,), members)
    counts = np.minimum(rows, len(w) - rows * np.arange(members.shape[1]))[:, None]
    return _over(total, counts.astype(np.float32))


def _fit_signed(x: Members, weights: Members, limit: int) -> tuple[Groups, Members]:
    """Scale and codes of a symmetric grid −limit … limit − 1 (make_qx_quants)."""
    peak = _peak(x)
    dead = jnp.abs(peak) < NO_PEAK
    peak = jnp.where(dead, 1, peak)

    def code(inverse: Array, x: Array) -> Array:
        return jnp.clip(jnp.round(inverse * x), -limit, limit - 1)

    def terms(inverse: Array, x: Array, w: Array) -> tuple[Array, Array]:
        c = code(inverse, x)
        return w * x * c, w * c * c

    grids = _grids(0, 0.1, (0, *range(-9, 0), *range(1, 10)), limit)
    scale, inverse = _best_fit(x, weights, lax.map(lambda grid: -grid / peak, grids), terms)
    return jnp.where(dead, 0, scale), jnp.where(dead, 0, code(inverse, x) + limit)


def _fit_levels(x: Members, weights: Members, levels: tuple[float, ...]) -> tuple[Groups, Members]:
    """Scale and codes of a table of levels (the search of IQ4_NL); the codes are those of the fitted scale."""
    table = np.asarray(levels, np.float32)
    peak = _peak(x)
    dead = jnp.abs(peak) < NO_PEAK
    peak = jnp.where(dead, 1, peak)

    def choose(inverse: Array, x: Array, values: np.ndarray) -> Array:
        ratio, value = inverse * x, jnp.full_like(x, values[0])
        for midpoint, above in zip((table[1:] + table[:-1]) / 2, values[1:], strict=True):
            value = jnp.where(ratio >= midpoint, above, value)
        return value

    def terms(inverse: Array, x: Array, w: Array) -> tuple[Array, Array]:
        c = choose(inverse, x, table)
        return w * c * x, w * c * c

    # In the first grid the peak meets the first level with the opposite sign.
    flipped = 1 / _once(_over(peak, -levels[0]))
    grids = _grids(0, 1, range(-7, 8), levels[0])
    inverses = jnp.concatenate([flipped[None], lax.map(lambda grid: grid / peak, grids)])
    scale, _ = _best_fit(x, weights, inverses, terms)
    scale = jnp.where(dead, 0, scale)
    inverse = jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale))
    return scale, choose(inverse, x, np.arange(len(table), dtype=np.float32))


def _best_fit(
    x: Members, weights: Members, inverses: Float[Array, "tries groups out"], terms: Callable
) -> tuple[Groups, Groups]:
    """The least-squares scale of the best grid, and the inverse scale that was tried.

    `terms(inverse, x, w)` are the summands of Σ w x c and Σ w c², c the grid's codes. A grid is judged by the weighted
    error under its best scale: the largest (Σ w x c)² / Σ w c² wins.
    """

    def attempt(best: tuple, inverse: Array) -> tuple[tuple, None]:
        xc, cc = _totals(partial(terms, inverse), x, weights)
        better = (cc > 0) & (xc * xc > best[0] * cc)
        scale = xc / jnp.where(better, cc, 1)
        return _pick(better, (scale * xc, scale, inverse), best), None

    # Any grid is better than −1; without weights the scale stays 0.
    none = (jnp.full_like(x[0], -1), jnp.zeros_like(x[0]), inverses[0])
    (_, scale, inverse), _ = lax.scan(attempt, none, inverses)
    return scale, inverse


def _fit_refined(x: Members, weights: Members, limit: int) -> tuple[Groups, Members]:
    """Scale and codes of a symmetric grid, each code improved in turn (make_q3_quants)."""
    peak = _peak(x)
    dead = jnp.abs(peak) < NO_PEAK
    inverse = -limit / jnp.where(dead, 1, peak)
    codes = jnp.clip(jnp.round(inverse * x), -limit, limit - 1)
    scale, codes = _refine(x, weights, codes, -limit, limit - 1)
    return jnp.where(dead, 0, scale), jnp.where(dead, 0, codes + limit)


def _fit_unsigned(x: Members, weights: Members, top: int) -> tuple[Groups, Members]:
    """Scale and codes of non-negative values (make_qp_quants), for the scales of sub-blocks."""
    high = jnp.maximum(jnp.max(x, 0), 0)
    dead = high < NO_PEAK
    high = jnp.where(dead, 1, high)

    def code(inverse: Array, x: Array) -> Array:
        return jnp.clip(jnp.round(inverse * x), 0, top)

    def attempt(best: tuple, grid: Array) -> tuple[tuple, None]:
        inverse = grid / high
        scale = 1 / _once(inverse)

        def terms(x: Array, w: Array) -> tuple[Array]:
            delta = x - _once(scale * code(inverse, x))
            return (w * delta * delta,)

        (error,) = _totals(terms, x, weights)
        return _pick(error < best[0], (error, inverse), best), None

    none = (jnp.full_like(high, jnp.inf), top / high)
    (_, inverse), _ = lax.scan(attempt, none, _grids(0, 0.1, (0, *range(-4, 0), *range(1, 5)), top))
    scale, codes = _refine(x, weights, code(inverse, x), 0, top)
    return jnp.where(dead, 0, scale), jnp.where(dead, 0, codes)


def _refine(x: Members, weights: Members, codes: Members, lowest: int, highest: int) -> tuple[Groups, Members]:
    """Five sweeps; each code in turn moves to its best value under the best scale of the other codes."""

    def visit(sums: tuple[Array, Array], member: tuple[Array, Array, Array]) -> tuple[tuple, Array]:
        (xc, cc), (x, w, code) = sums, member
        rest_xc, rest_cc = xc - _once(w * x * code), cc - _once(w * code * code)
        moved = jnp.clip(jnp.round(x * rest_cc / jnp.where(rest_xc > 0, rest_xc, 1)), lowest, highest)
        new_xc, new_cc = rest_xc + _once(w * x * moved), rest_cc + _once(w * moved * moved)
        better = (rest_xc > 0) & (new_cc > 0) & (moved != code) & (new_xc * new_xc * cc > xc * xc * new_cc)
        return _pick(better, (new_xc, new_cc), sums), jnp.where(better, moved, code)

    def sweep(_, state: tuple) -> tuple:
        return lax.scan(visit, state[0], (x, weights, state[1]))

    sums = _totals(lambda x, w, c: (w * x * c, w * c * c), x, weights, codes)
    (xc, cc), codes = lax.fori_loop(0, 5, sweep, (sums, codes))
    return jnp.where(cc > 0, xc / jnp.where(cc > 0, cc, 1), 0), codes


def _fit_affine(
    x: Members, weights: Members, top: int, grids: Float[Array, " tries"], absolute: bool = False
) -> tuple[Groups, Groups, Members]:
    """Scale, minimum (at most 0) and codes 0 … top (make_qkx2_quants, make_qkx3_quants).

    Each grid starts at the best minimum so far and is judged by the error, squared or absolute, of its best fit.
    """
    low, high = jnp.minimum(jnp.min(x, 0), 0), jnp.max(x, 0)
    flat = high <= low
    w_sum, x_sum = _totals(lambda x, w: (w, w * x), x, weights)

    def code(inverse: Array, low: Array, x: Array) -> Array:
        # Where the best minimum equals the maximum, the inverse is infinite and its product with 0 is NaN.
        value = inverse * (x - low)
        return jnp.where(value > 0, jnp.round(jnp.minimum(value, top)), 0)

    def error(inverse: Array, start: Array, scale: Array, low: Array) -> Array:
        def terms(x: Array, w: Array) -> tuple[Array]:
            delta = _once(scale * code(inverse, start, x)) + low - x
            return (w * (jnp.abs(delta) if absolute else delta * delta),)

        return _totals(terms, x, weights)[0]

    def attempt(best: tuple, grid: Array) -> tuple[tuple, None]:
        start = best[2]
        inverse = grid / (high - start)

        def terms(x: Array, w: Array) -> tuple[Array, Array, Array]:
            c = code(inverse, start, x)
            return w * c, w * c * c, w * c * x

        c, cc, xc = _totals(terms, x, weights)
        determinant = _once(w_sum * cc) - _once(c * c)
        solvable = determinant > 0
        divisor = jnp.where(solvable, determinant, 1)
        scale = (_once(w_sum * xc) - _once(x_sum * c)) / divisor
        low = (_once(cc * x_sum) - _once(c * xc)) / divisor
        scale = jnp.where(low > 0, xc / jnp.where(solvable, cc, 1), scale)
        low = jnp.minimum(low, 0)
        loss = error(inverse, start, scale, low)
        return _pick(solvable & (loss < best[0]), (loss, scale, low, inverse, start), best), None

    inverse = top / jnp.where(flat, 1, high - low)
    scale = 1 / _once(inverse)
    first = (error(inverse, low, scale, low), scale, low, inverse, low)
    (_, scale, best_low, inverse, start), _ = lax.scan(attempt, first, grids)
    codes = jnp.where(flat, 0, code(inverse, start, x))
    return jnp.where(flat, 0, scale), jnp.where(flat, low, best_low), codes


def _store_unsigned(values: Groups, weights: Groups | None, format: Any) -> QTensor:
    """Scales or minima as multiples of one non-negative scale per super-block."""
    format, x = _supers(values, format)
    top = 2**format.bits - 1
    if weights is not None:
        scale, codes = _fit_unsigned(x, _supers(weights, format)[1], top)
    else:
        high = jnp.maximum(jnp.max(x, 0), 0)
        inverse = jnp.where(high > 0, top / jnp.where(high > 0, high, 1), 0)
        scale, codes = _over(high, top), jnp.clip(jnp.round(inverse * x), 0, top)
    return from_codes(_rows(codes, len(values)).astype(jnp.uint8), scale, None, format)


def _store_signed(values: Groups, weights: Groups | None, format: Any) -> QTensor:
    """Scales as signed multiples of one scale per super-block."""
    format, x = _supers(values, format)
    half = 2 ** (format.bits - 1)
    if weights is not None:
        scale, codes = _fit_signed(x, _supers(weights, format)[1], half)
    else:
        peak = _peak(x)
        # 6-bit scales (Q3_K) are dead only at 0 and then take the first code; 8-bit ones (Q6_K) take the code of 0.
        dead = jnp.abs(peak) < NO_PEAK if format.bits == 8 else peak == 0
        inverse = -half / jnp.where(dead, 1, peak)
        codes = jnp.clip(jnp.round(inverse * x), -half, half - 1) + half
        codes = jnp.where(dead, half if format.bits == 8 else 0, codes)
        scale = jnp.where(dead, 0, 1 / _once(inverse))
    return from_codes(_rows(codes, len(values)).astype(jnp.uint8), scale, None, format)


def _supers(values: Float[Array, "rows out"], format: Any) -> tuple[Any, Members]:
    """The format with its group no longer than the matrix, and the values' super-blocks."""
    format = replace(format, group=min(format.group, len(values)))
    return format, _members(values, format.group, repeat_last=False)


def _members(w: Float[Array, "in out"], rows: int, repeat_last: bool = True) -> Members:
    """Splits `in` into groups, members first; a short last group is padded with its last row, or with zeros."""
    filling = w[-1:] if repeat_last else jnp.zeros_like(w[-1:])
    w = jnp.concatenate([w, jnp.repeat(filling, -len(w) % rows, 0)])
    return jnp.moveaxis(w.reshape(-1, rows, w.shape[1]), 1, 0)


def _rows(members: Members, n: int) -> Float[Array, "in out"]:
    """Inverse of `_members`."""
    return jnp.moveaxis(members, 0, 1).reshape(-1, members.shape[2])[:n]


def _peak(x: Members) -> Groups:
    """The first member of largest magnitude, with its sign."""
    return jnp.take_along_axis(x, jnp.argmax(jnp.abs(x), 0)[None], 0)[0]


def _grids(start: float | int, step: float | int, tries: Any, limit: float | int) -> Float[Array, " tries"]:
    """limit + start + step · try for each grid that is tried, added up in float32 as in C."""
    return jnp.asarray(np.float32(start) + np.float32(step) * np.asarray(tries, np.float32) + np.float32(limit))


def _totals(terms: Callable[..., tuple[Array, ...]], *members: Array) -> tuple[Array, ...]:
    """Sums of `terms` over the members, in order."""

    def add(totals: tuple, member: tuple) -> tuple[tuple, None]:
        return tuple(t + _once(v) for t, v in zip(totals, terms(*member), strict=True)), None

    shapes = jax.eval_shape(terms, *(m[0] for m in members))
    return lax.scan(add, tuple(jnp.zeros(s.shape, s.dtype) for s in shapes), members)[0]


def _once(value: Array) -> Array:
    """The value rounded to float32: XLA would otherwise round a · b + c once, and turn 1 / (a / b) into b / a.

    No finite value is above the bound, but the compiler can't know that; it ignores `optimization_barrier` here.
    """
    return jnp.minimum(value, FLOAT32_MAX)


def _over(a: Array, b: Any) -> Array:
    """a / b with one rounding: XLA would multiply by the reciprocal of a constant divisor."""
    return a / jnp.where(a == 0, 1, b)


def _pick(better: Array, new: tuple, old: tuple) -> tuple:
    return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, old)
