"""Packed weights in the order in which the C++ product reads them."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Shaped, UInt8, UInt32

from jquant.activations import Activation, quantize_inputs
from jquant.formats import Codebook, Format, Int, block_shape, expand, unpack
from jquant.formats import Float as SmallFloat
from jquant.formats.base import as_stored
from jquant.kernels.cpu.build import PRODUCT, target
from jquant.kernels.matmul import add_outliers
from jquant.kernels.packed import PackedMatrix, fill

TILE = 64  # outputs side by side, as in product.h
KINDS = {"": 0, "float32": 1, "float16": 2, "int8": 3}  # Kind in product.h
# Bits of a stored code -> codes a unit, uint32 words a unit: Layout in product.h.
UNITS = {2: (16, 1), 3: (32, 3), 4: (8, 1), 8: (4, 1)}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tiled:
    """A quantized weight as the C++ product reads it: x @ w for evaluation and generation on a CPU, without a gradient.

    A weight is scale · level(code) + offset. Outputs lie in tiles of TILE; the last tile is filled up, and so is each
    group, to whole units of codes.

    Attributes:
      data: uint32 `[*l, words]`: codes, then scales, then offsets, as product.h says.
      input_scale: see `QTensor`.
      layout: what the data mean (static).
      activation: how inputs are rounded; None if they are not (static).
    """

    data: Any
    input_scale: Any
    layout: "Layout" = field(metadata={"static": True})
    activation: Activation | None = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, `[*l, in, out]`."""
        return (*self.data.shape[:-1], self.layout.rows, self.layout.columns)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    __array_ufunc__ = None  # makes NumPy arrays leave x @ w to the method below

    def __rmatmul__(self, x: Float[Array | np.ndarray, "*b in"]) -> Float[Array, "*b out"]:
        """x @ self in x's dtype; sums are float32."""
        x = jnp.asarray(x)
        flat = x.reshape(-1, x.shape[-1])
        if self.activation is None or self.layout.block:
            y = self._product(flat, self.layout.block)
        else:
            y = self._product(quantize_inputs(flat, self.activation, self.input_scale))
            y = add_outliers(y, flat, self.activation, self._product)
        return y.reshape(*x.shape[:-1], -1).astype(x.dtype)

    def _product(self, x: Float[Array, "tokens in"], block: int = 0) -> Float[Array, "tokens out"]:
        of, like = self.layout, jax.ShapeDtypeStruct((len(x), self.layout.columns), jnp.float32)
        numbers = {"width": of.width, "group": of.group, "scale": KINDS[of.scale], "offset": KINDS[of.offset]}
        numbers |= {"centre": of.centre, "block": block}
        attributes = {key: np.int64(value) for key, value in numbers.items()}
        return jax.ffi.ffi_call(f"{PRODUCT}-{target()}", like)(
            x.astype(jnp.float32), self.data, levels=np.asarray(of.levels, np.float32), **attributes
        )


@dataclass(frozen=True)
class Layout:
    """What the data of a `Tiled` mean.

    Attributes:
      rows: of the weight.
      columns: of the weight.
      width: bits of a stored code: 2, 3, 4 or 8.
      group: rows under one scale.
      scale: dtype of the scales.
      offset: dtype of the offsets, "" if all are 0; "int8" stands for zeros, by how much offsets are below 0 in scales.
      levels: the levels of the codes by their lowest four bits; codes of eight bits are signed, and their own levels.
      centre: by how much codes exceed their levels in integer products.
      block: inputs that integer products round to eight bits under one scale; 0 leaves inputs in float32.
    """

    rows: int
    columns: int
    width: int
    group: int
    scale: str
    offset: str
    levels: tuple[float, ...]
    centre: int
    block: int


def tiled(w: PackedMatrix, activation: Activation | None, input_scale: Array | None) -> Tiled | None:
    """The weight, perhaps of stacked layers, in tiles; None where the C++ has no product for it or can't be had."""
    width = _width(w.format, w.shape)
    if width is None or target() is None:
        return None
    (rows, columns), (group, _), format = w.shape, block_shape(w.format, w.shape), w.format
    scale = "float16" if format.scale == "float16" else "float32"
    if isinstance(format, Int):
        origin = _origin(format)
        levels = np.arange(16) % 2**format.bits - float(origin)
        of_zero = "int8" if format.zero == "integer" else scale if format.bits <= 4 else "float32"
        offset, centre = of_zero if format.has_zero else "", 128 if width == 8 else origin
    else:
        codes = jnp.arange(16, dtype=jnp.uint8) % 2**format.bits
        levels, offset, centre = format.decode(codes, jnp.ones((), jnp.float32), None), "", 0
    levels = tuple(np.asarray(levels, np.float64).tolist())
    block = _block(activation, format, group, rows)
    layout = Layout(rows, columns, width, group, scale, offset, levels, centre, block)
    return Tiled(_data(w.codes, w.scale, w.zero, format, layout), input_scale, layout, activation)


def _origin(format: Int) -> int:
    """The code whose level is 0: float zeros of up to four bits are the value of code 0, and exact as offsets."""
    return 0 if format.has_zero and format.zero == "float" and format.bits <= 4 else 2 ** (format.bits - 1)


def _width(format: Format, shape: tuple[int, int]) -> int | None:
    """Bits of a code in tiles, None for a format without a kernel.

    Three bits take four where groups are no multiple of 32 rows.
    """
    if not (isinstance(format, Int) or (isinstance(format, Codebook | SmallFloat) and format.bits <= 4)):
        return None
    rows = block_shape(format, shape)[0]
    if format.bits == 3:
        return 3 if rows % UNITS[3][0] == 0 or rows == shape[0] else 4
    return next(width for width in UNITS if format.bits <= width)


def _block(activation: Activation | None, format: Format, group: int, rows: int) -> int:
    """Inputs under one scale in integer products; 0 where they can't round as the activation says."""
    if activation is None or activation.static or activation.outliers is not None or not isinstance(format, Int):
        return 0
    block = activation.format.group
    if activation.format != Int(8, block, symmetric=True, scale="float32", full_range=False):
        return 0
    if block == "channel":
        return -(-rows // group) * group
    if not isinstance(block, int) or block % UNITS[8 if format.bits > 4 else format.bits][0]:
        return 0
    return block if group % block == 0 or block % group == 0 else 0


@partial(jax.jit, static_argnames=("format", "layout"))
def _data(codes: Array, scale: Array, zero: Array | None, format: Format, layout: Layout) -> Array:
    """`Tiled.data`."""
    codes = unpack(codes, format.bits, layout.rows)
    together = block_shape(format, (layout.rows, layout.columns))[1]
    shape = (*scale.shape[:-1], layout.columns)
    per_column = lambda v: jnp.broadcast_to(expand(v, (1, together), shape), shape)  # noqa: E731
    scale, zero = jax.tree.map(per_column, (scale, zero))
    grid = [as_stored(scale, format.scale).astype(layout.scale)]
    if isinstance(format, Int):
        origin = jnp.uint8(_origin(format))
        if layout.offset == "int8" and zero is not None:
            grid.append((zero - origin).astype(jnp.int8))
        elif layout.offset:
            grid.append(format.decode(jnp.broadcast_to(origin, shape), scale, zero).astype(layout.offset))
        if layout.width == 8:
            codes -= origin  # signed
    parts = [_words(codes, layout), *map(_in_words, grid)]
    return jnp.concatenate([part.reshape(*codes.shape[:-2], -1) for part in parts], -1)


def _in_words(grid: Shaped[Array, "*l groups out"]) -> UInt32[Array, "*l tiles groups words"]:
    """Scales or offsets of TILE outputs side by side, as bytes in words."""
    grid = fill(grid, -1, TILE)
    grid = jnp.moveaxis(grid.reshape(*grid.shape[:-1], -1, TILE), -2, -3)
    together = 4 // grid.dtype.itemsize
    grid = grid if together == 1 else grid.reshape(*grid.shape[:-1], -1, together)
    return jax.lax.bitcast_convert_type(grid, jnp.uint32)


def _words(codes: UInt8[Array, "*l in out"], layout: Layout) -> UInt32[Array, "*l tiles groups units words tile"]:
    per_unit, width = UNITS[layout.width][0], layout.width
    codes = fill(codes, -2, layout.group)
    codes = codes.reshape(*codes.shape[:-2], -1, layout.group, codes.shape[-1])
    codes = fill(fill(codes, -2, per_unit), -1, TILE)
    codes = codes.reshape(*codes.shape[:-2], -1, per_unit, codes.shape[-1] // TILE, TILE).astype(jnp.uint32)
    i = np.arange(per_unit)

    def word(codes: Array, shifts: np.ndarray) -> Array:
        return jnp.sum(codes << jnp.asarray(shifts, jnp.uint32)[:, None, None], -3, dtype=jnp.uint32)

    if width == 3:
        shifts, low = 8 * (i % 4) + 2 * (i % 16 // 4), codes & 3
        parts = [
            word(low[..., :16, :, :], shifts[:16]),
            word(low[..., 16:, :, :], shifts[16:]),
            word(codes >> 2, 8 * (i % 4) + i // 4),
        ]
    else:
        parts = [word(codes, 8 * (i % 4) + width * (i // 4))]
    return jnp.moveaxis(jnp.stack(parts, -3), -2, -5)  # tiles before groups
