"""The contract of every format, and a matrix's division into blocks that share a scale."""

from typing import Literal, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped, UInt8

from jquant.errors import InputError

Group = int | tuple[int, int] | Literal["channel", "tensor"]
Block = tuple[int, int]  # rows × columns under one scale


@runtime_checkable
class Format(Protocol):
    """The contract that every rounding and range relies on.

    A format that codes several weights together, as a lattice does, also has a `tile`: the rows and columns of weights
    that it takes at once. Each weight of a tile still has `bits` bits, its share of the tile's code, so that codes are
    packed, cut and stored as others are; `encode` and `decode` then take whole tiles, `[*l, in, out]`.

    A format with a table of levels may take another one as a last argument `levels` of `encode` and `decode`. `Grid`
    and `QTensor` carry it, so that a rounding can learn a table for each weight. A format that always stores a table
    also has `own_levels(shape)`, the first one of a weight of that shape, in its stored dtype; one whose table has a
    column for each column of the weight has `column_levels = True`.
    """

    @property
    def bits(self) -> int:
        """Width of a packed code, 1 to 8."""
        ...

    @property
    def group(self) -> Group:
        """Weights that share a scale: rows of a column, (rows, columns), "channel" (a column) or "tensor" (all)."""
        ...

    @property
    def has_zero(self) -> bool:
        """Whether a group stores a zero beside its scale, so both ends of its range are free."""
        ...

    @property
    def scale(self) -> "str | Format":
        """How scales (and float zeros) are stored: a dtype, or the format in which they are quantized."""
        ...

    def grid(self, low: Array, high: Array) -> tuple[Array, Array | None]:
        """Scale and zero of a group whose values span [low, high]; the zero is an integer (uint8), a float, or None."""
        ...

    def encode(self, w: Array, scale: Array, zero: Array | None) -> UInt8[Array, "..."]:
        """Nearest code of each weight; all arguments broadcast."""
        ...

    def decode(self, codes: Array, scale: Array, zero: Array | None) -> Float[Array, "..."]:
        """Float32 value of each code, linear in the stored scale; all arguments broadcast."""
        ...


def tile_of(format: Format) -> Block:
    """Rows × columns of weights that are coded together: `format.tile`, or 1 × 1."""
    return getattr(format, "tile", (1, 1))


def own_levels(format: Format, shape: tuple[int, ...]) -> Array | None:
    """The first table of levels of a weight `[*l, in, out]`, if its format stores one for each weight; else None."""
    first = getattr(format, "own_levels", None)
    return None if first is None else first(shape)


def has_column_levels(format: Format) -> bool:
    """Whether a table of levels `[*l, levels, out]` has a column for each column of the weight."""
    return getattr(format, "column_levels", False)


def as_argument(levels: Array | None) -> tuple[Array, ...]:
    """Levels as the last argument of `encode` and `decode`; none if there are none."""
    return () if levels is None else (levels,)


def block_shape(format: Format, shape: tuple[int, ...]) -> Block:
    """Rows and columns under one scale, for a weight `[*l, in, out]`.

    Raises:
      InputError: the group is larger than the matrix; the format's tiles do not divide it.
    """
    if len(shape) < 2:
        raise InputError(f"A weight is a matrix [in, out], perhaps stacked; this one has the shape {shape}.")
    rows, columns = shape[-2:]
    tile = tile_of(format)
    if rows % tile[0] or columns % tile[1]:
        size = f"{tile[0]} × {tile[1]}"
        raise InputError(
            f"{type(format).__name__} codes {size} weights together; they do not divide {rows} × {columns}."
        )
    match format.group:
        case "channel":
            return rows, 1
        case "tensor":
            return rows, columns
        case (r, c):
            if r > rows or c > columns:
                raise InputError(f"A group of {r} × {c} is larger than the weight's {rows} × {columns}.")
            return r, c
        case int(r):
            if r > rows:
                raise InputError(f"A group of {r} rows is larger than the weight's {rows}.")
            return r, 1
    raise InputError(f"{format.group!r} is no group.")


def grouped(w: Shaped[Array, "*l in out"], block: Block) -> Shaped[Array, "*l groups members columns"]:
    """Gathers each block's weights, row by row, on axis −2; short blocks at the edges are filled up with zeros."""
    (rows, columns), (n, out) = block, w.shape[-2:]
    w = jnp.pad(w, [(0, 0)] * (w.ndim - 2) + [(0, -n % rows), (0, -out % columns)])
    if columns == 1:
        return w.reshape(*w.shape[:-2], -1, rows, out)
    lead = w.shape[:-2]
    w = jnp.moveaxis(w.reshape(*lead, -1, rows, w.shape[-1] // columns, columns), -1, -2)
    return w.reshape(*lead, w.shape[-4], rows * columns, w.shape[-1])


def real_members(shape: tuple[int, ...], block: Block) -> Float[Array, "groups members columns"]:
    """1 for the members that `grouped` took from the weight, 0 for its padding; broadcasts over columns."""
    return grouped(jnp.ones(shape[-2:] if block[1] > 1 else (shape[-2], 1), jnp.float32), block)


def expand(values: Shaped[Array, "*l groups columns"], block: Block, shape: tuple[int, ...]) -> Array:
    """Per-block values repeated so that they broadcast against the weight `[*l, in, out]`."""
    for axis, size in ((-2, block[0]), (-1, block[1])):
        if values.shape[axis] > 1 and size > 1:  # a single value broadcasts
            values = jnp.repeat(values, size, axis)
    return values[..., : shape[-2], : shape[-1]]


def check_group(group: Group) -> None:
    """Raises InputError unless `group` is a `Group`."""
    if isinstance(group, str) and group in ("channel", "tensor"):
        return
    sizes = group if isinstance(group, tuple) and len(group) == 2 else (group,)
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise InputError(
            f'A group is a positive number of rows, (rows, columns), "channel" or "tensor", not {group!r}.'
        )


def check_tiles(name: str, group: Group, tile: Block) -> None:
    """Raises InputError unless groups have whole tiles, in rows."""
    rows = group[0] if isinstance(group, tuple) else group
    if isinstance(rows, int) and rows % tile[0]:
        raise InputError(f"{name} codes {tile[0]} rows together, so its groups have a multiple of them, not {group!r}.")


def check_bits(name: str, bits: int) -> None:
    """Raises InputError unless `bits` is a width from 2 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise InputError(f"{name} takes 2 to 8 bits, not {bits}.")


def check_scale(scale: "str | Format") -> None:
    """Raises InputError unless `scale` is a floating dtype's name or a format."""
    if isinstance(scale, str):
        try:
            if jnp.issubdtype(jnp.dtype(scale), jnp.floating):
                return
        except TypeError:
            pass
        raise InputError(f"Scales are stored in a floating dtype or a format, not {scale!r}.")


def ratio(w: Array, scale: Array) -> Array:
    """w / scale in float32, 0 where the scale is 0 (a group without weights)."""
    scale = scale.astype(jnp.float32)
    return jnp.where(scale == 0, 0, w.astype(jnp.float32) / jnp.where(scale == 0, 1, scale))


def times_inverse(w: Array, scale: Array) -> Array:
    """w · (1 / scale) in float32, as bitsandbytes and llama.cpp compute it, 0 where the scale is 0.

    It differs from `ratio` in the last place, which decides the code of a weight next to a midpoint.
    """
    scale = scale.astype(jnp.float32)
    product = w.astype(jnp.float32) * jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale))
    # Finite values never reach the bound, but XLA can't know that, so it rounds the product before a sum follows.
    return jnp.minimum(product, float(jnp.finfo(jnp.float32).max))


def round_scale(scale: Array, dtype: str) -> Array:
    """Rounds a scale to its stored dtype and keeps its sign; only 0 becomes 0, none becomes infinite."""
    limits = jnp.finfo(dtype)
    wide = scale.astype(jnp.float32)
    least = max(float(limits.smallest_subnormal), 2.0**-149)
    stored = (jnp.sign(wide) * jnp.clip(jnp.abs(wide), least, float(limits.max))).astype(dtype)
    return jnp.where(wide == 0, jnp.zeros_like(stored), stored)


def as_stored(values: Array, scale: "str | Format") -> Array:
    """Float32 value of scales or zeros rounded to their dtype; quantized ones are already dequantized here."""
    return (values.astype(scale) if isinstance(scale, str) else values).astype(jnp.float32)


def extreme(low: Array, high: Array) -> Array:
    """The end farther from 0, with its sign."""
    return jnp.where(-low > high, low, high)
