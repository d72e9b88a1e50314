"""Packed weights in the order in which a TPU's or GPU's product reads them: a Pallas kernel unpacks them on the chip.

A product of few rows is bound by the bytes of its weights: 4-bit codes in groups of 64 with scales and offsets in
float32 take 5 bits a weight, bfloat16 weights 16. A product of many rows is bound by the matrix unit; unpacking then
costs 3 operations a weight for whole numbers and 16 for a codebook, for each block of MOST rows of the inputs.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int8

from jquant.activations import Activation, quantize_inputs
from jquant.formats import Codebook, Format, Int, block_shape, expand, unpack
from jquant.formats import Float as SmallFloat
from jquant.kernels.matmul import add_outliers
from jquant.kernels.packed import PackedMatrix, fill

# Outputs side by side: the first of these that divides a weight's columns, else the last. And the most rows of inputs
# that a block of weights is unpacked for.
TILES, MOST = {"tpu": (256, 128), "gpu": (64,)}, {"tpu": 256, "gpu": 64}
# Rows of a weight that are unpacked together. On a GPU a product is of one group, whose scale is a row.
DEEPEST = 1024
# Programs that a GPU's product is split into at least, where the rows of a weight are enough; and Triton's settings.
PROGRAMS, WARPS, STAGES = 1024, 4, 3
FEWEST = 16  # rows of inputs: the smallest tile of 16-bit numbers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocked:
    """A quantized weight as the Pallas product reads it: x @ w for evaluation and generation, without a gradient.

    A weight is scale · level(code) + offset. Rows lie in blocks; the last one is filled up with scales of 0, and
    columns to whole tiles.

    Attributes:
      codes: int8 `[*l, blocks, bytes, columns]`. Of 4 bits, byte r of a block has the code of its row r in the low half
        and that of row r + bytes in the high half. Of 8 bits, a signed code.
      scale: float32 `[*l, blocks, groups, columns]`.
      offset: likewise; None where all are 0.
      input_scale: see `QTensor`.
      layout: what the codes mean (static).
      activation: how inputs are rounded; None if they are not (static).
    """

    codes: Any
    scale: Any
    offset: Any
    input_scale: Any
    layout: "Layout" = field(metadata={"static": True})
    activation: Activation | None = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, `[*l, in, out]`."""
        return (*self.codes.shape[:-3], self.layout.rows, self.layout.columns)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    __array_ufunc__ = None  # makes NumPy arrays leave x @ w to the method below

    def __rmatmul__(self, x: Float[Array | np.ndarray, "*b in"]) -> Float[Array, "*b out"]:
        """x @ self in x's dtype; sums are float32."""
        x = jnp.asarray(x)
        flat = x.reshape(-1, x.shape[-1])
        product = partial(multiply, w=self)
        y = product(flat if self.activation is None else quantize_inputs(flat, self.activation, self.input_scale))
        if self.activation is not None:
            y = add_outliers(y, flat, self.activation, product)
        return y.reshape(*x.shape[:-1], -1).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ByColumns:
    """A quantized weight whose columns lie on several devices: x @ w with all of x on each, its result cut as w is.

    Attributes:
      own: every device's blocks, cut along their last axis; the layout is that of one device.
      mesh: the devices (static).
    """

    own: Blocked
    mesh: Mesh = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight, `[in, out]`."""
        return self.own.layout.rows, self.own.layout.columns * self.mesh.size

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays on all devices."""
        return self.own.nbytes

    __array_ufunc__ = None

    def __rmatmul__(self, x: Float[Array | np.ndarray, "*b in"]) -> Float[Array, "*b out"]:
        """x @ self in x's dtype."""
        x, last = jnp.asarray(x), self.mesh.axis_names
        cut = jax.tree.map(lambda leaf: P(None, None, last) if leaf.ndim == 3 else P(), self.own)
        out = P(*(None,) * (x.ndim - 1), last)
        product = jax.shard_map(lambda x, w: x @ w, mesh=self.mesh, in_specs=(P(), cut), out_specs=out, check_vma=False)
        return product(x, self.own)


@dataclass(frozen=True)
class Layout:
    """What the codes of a `Blocked` mean.

    Attributes:
      rows: of the weight.
      columns: of the weight.
      depth: rows of a block.
      tile: outputs side by side.
      width: bits of a stored code, 4 or 8.
      levels: of the 16 codes; None where a level is a whole number, the code less `centre`.
      centre: see `levels`.
      platform: "tpu" or "gpu".
      interpret: whether JAX runs the kernel step by step, for tests.
    """

    rows: int
    columns: int
    depth: int
    tile: int
    width: int
    levels: tuple[float, ...] | None
    centre: int
    platform: str
    interpret: bool = False


def blocked(
    w: PackedMatrix, activation: Activation | None, input_scale: Array | None, platform: str, interpret: bool = False
) -> Blocked | None:
    """The weight, perhaps of stacked layers, in blocks; None where there is no kernel for its format or shape."""
    layout = _layout(w.format, w.shape, platform, interpret)
    if layout is None:
        return None
    codes, scale, offset = _parts(w.codes, w.scale, w.zero, w.format, layout)
    return Blocked(codes, scale, offset, input_scale, layout, activation)


def by_columns(
    w: PackedMatrix, activation: Activation | None, input_scale: Array | None, mesh: Mesh, interpret: bool = False
) -> ByColumns | None:
    """The weight with its columns over all devices of a mesh, in blocks.

    None where there is no kernel for its format or shape, or columns don't divide.
    """
    rows, columns = w.shape
    own, together = columns // mesh.size, block_shape(w.format, w.shape)[1]  # columns of a device, and under one scale
    platform = "tpu" if interpret else mesh.devices.flat[0].platform
    if platform != "tpu" or columns % mesh.size or (together < columns and own % together):
        return None
    layout = _layout(w.format, (rows, own), platform, interpret)
    if layout is None:
        return None
    codes, scale, offset = _parts_on_each((w.codes, w.scale, w.zero), w.format, layout, mesh)
    return ByColumns(Blocked(codes, scale, offset, input_scale, layout, activation), mesh)


def _layout(format: Format, shape: tuple[int, int], platform: str, interpret: bool) -> Layout | None:
    """How a weight lies in blocks; None where there is no kernel for its format or shape."""
    rows, columns = shape
    depth = _depth(block_shape(format, shape)[0], rows, platform)
    if depth is None or not (
        isinstance(format, Int) or (isinstance(format, Codebook | SmallFloat) and format.bits <= 4)
    ):
        return None
    levels, centre = None, 0
    if isinstance(format, Int):
        centre = 2 ** (format.bits - 1) if format.symmetric and format.bits <= 4 else 0
    else:
        with jax.ensure_compile_time_eval():
            codes = jnp.arange(16, dtype=jnp.uint8) % 2**format.bits
            levels = tuple(np.asarray(format.decode(codes, jnp.ones((), jnp.float32), None), np.float64).tolist())
    tile = next((tile for tile in TILES[platform] if columns % tile == 0), TILES[platform][-1])
    return Layout(rows, columns, depth, tile, 4 if format.bits <= 4 else 8, levels, centre, platform, interpret)


def _depth(group: int, rows: int, platform: str) -> int | None:
    """Rows of a block: two halves of whole groups, or all under one scale; None where there is no such number."""
    unit = 64  # two halves of 32 rows, the smallest tile of bytes
    if group >= rows:  # one scale a column
        return min(-(-rows // unit) * unit, 512)
    if group % 512 == 0:
        return 512
    halves = 2 * group if platform == "gpu" else math.lcm(2 * group, 512)
    if platform == "gpu" and group & (group - 1):
        return None
    depth = halves if halves <= DEEPEST else 2 * group
    return depth if depth <= DEEPEST and depth % unit == 0 else None


@partial(jax.jit, static_argnames=("format", "layout"))
def _parts(codes: Array, scale: Array, zero: Array | None, format: Format, layout: Layout) -> tuple[Any, ...]:
    """Codes, scales and offsets of a `Blocked`."""
    codes = unpack(codes, format.bits, layout.rows)
    block = block_shape(format, (layout.rows, layout.columns))
    wide = (*scale.shape[:-1], layout.columns)
    scale, zero = jax.tree.map(lambda v: jnp.broadcast_to(expand(v, (1, block[1]), wide), wide), (scale, zero))
    origin = 2 ** (format.bits - 1) if layout.width == 8 else 0
    offset = None
    if isinstance(format, Int) and format.has_zero:  # the value of the code that is stored as 0
        offset = format.decode(jnp.full(wide, origin, jnp.uint8), scale, zero).astype(jnp.float32)
    scale = scale.astype(jnp.float32)

    def in_blocks(a: Array, per_block: int) -> Array:
        filled = fill(fill(a, -2, per_block), -1, layout.tile)
        return filled.reshape(*a.shape[:-2], -1, per_block, filled.shape[-1])

    codes = in_blocks(codes, layout.depth)
    if layout.width == 8:
        stored = codes - jnp.uint8(origin)
    else:
        low, high = jnp.split(codes, 2, -2)
        stored = low | (high << 4)
    stored = jax.lax.bitcast_convert_type(stored, jnp.int8)
    blocks, groups = codes.shape[-3], scale.shape[-2]
    if block[0] >= layout.depth:  # a group holds whole blocks
        repeat = lambda v: jnp.repeat(v, -(-blocks // groups), -2)[..., :blocks, :]  # noqa: E731
        grid = [None if v is None else in_blocks(repeat(v), 1) for v in (scale, offset)]
    else:
        grid = [None if v is None else in_blocks(v, layout.depth // block[0]) for v in (scale, offset)]
    return stored, *grid


@partial(jax.jit, static_argnames=("format", "layout", "mesh"))
def _parts_on_each(grid: tuple[Any, ...], format: Format, layout: Layout, mesh: Mesh) -> tuple[Any, ...]:
    """`_parts` of every device's columns."""
    cut = jax.tree.map(lambda v: P(None, mesh.axis_names if v.shape[-1] > 1 else None), grid)
    own = lambda grid: _parts(*grid, format, layout)  # noqa: E731
    joined = P(None, None, mesh.axis_names)
    return jax.shard_map(own, mesh=mesh, in_specs=(cut,), out_specs=joined, check_vma=False)(grid)


def multiply(x: Float[Array, "tokens in"], w: Blocked) -> Float[Array, "tokens out"]:
    """x @ w, float32. 16-bit inputs multiply in 16 bits, others in float32."""
    of, tokens = w.layout, len(x)
    x = fill(fill(x, -1, of.depth), -2, FEWEST)
    most = MOST[of.platform]
    x = fill(x, -2, most) if len(x) > most else x
    product = _on_tpu if of.platform == "tpu" else _on_gpu
    return product(x, w, min(most, len(x)))[:tokens, : of.columns]


def _on_tpu(x: Float[Array, "t in"], w: Blocked, rows: int) -> Float[Array, "t out"]:
    """Blocks of one output tile follow one another and add to a sum in the chip's memory."""
    of, (blocks, stored, width), columns = w.layout, w.codes.shape, w.layout.tile
    grid = [w.scale] if w.offset is None else [w.scale, w.offset]

    def kernel(x_ref: Any, codes_ref: Any, *refs: Any) -> None:
        *grid_refs, out_ref, sum_ref = refs

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            sum_ref[...] = jnp.zeros_like(sum_ref)

        sum_ref[...] += _block(x_ref[...], codes_ref[...], [ref[...] for ref in grid_refs], of)

        @pl.when(pl.program_id(2) == blocks - 1)
        def _() -> None:
            out_ref[...] = sum_ref[...]

    of_weight = lambda n: pl.BlockSpec((None, n, columns), lambda i, j, k: (k, 0, j))  # noqa: E731
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((len(x), width), jnp.float32),
        cost_estimate=_cost(x, w),
        grid=(len(x) // rows, width // columns, blocks),
        in_specs=[
            pl.BlockSpec((rows, of.depth), lambda i, j, k: (i, k)),
            of_weight(stored),
            *(of_weight(part.shape[1]) for part in grid),
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=of.interpret,
    )(x, w.codes, *grid)


def _on_gpu(x: Float[Array, "t in"], w: Blocked, rows: int) -> Float[Array, "t out"]:
    """Each program goes through its share of the blocks of one output tile; XLA adds the shares.

    Codes multiply as they are, and the product with a group is scaled: 16-bit inputs then meet exact codes, and a
    scale costs an operation an output in place of one a weight.
    """
    of, (blocks, stored, width), columns = w.layout, w.codes.shape, w.layout.tile
    grid = [w.scale] if w.offset is None else [w.scale, w.offset]
    tiles = len(x) // rows * (width // columns)
    shares = next(n for n in range(min(blocks, max(PROGRAMS // tiles, 1)), 0, -1) if blocks % n == 0)
    own, halves = blocks // shares, 8 // of.width
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def kernel(x_ref: Any, codes_ref: Any, *refs: Any) -> None:
        *grid_refs, out_ref = refs
        first = pl.program_id(2) * own

        def add(k: Any, total: Array) -> Array:
            codes = codes_ref[k].astype(jnp.int32)
            for half in range(halves):
                inputs = x_ref[:, pl.ds((first + k) * of.depth + half * stored, stored)]
                part = codes if halves == 1 else (codes >> 4 * half) & 15
                levels = (part - of.centre).astype(x.dtype) if of.levels is None else _look_up(part, of.levels)
                product = jnp.dot(
                    inputs, levels.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32
                )
                scale, *offset = [ref[k, half % ref.shape[1]][None] for ref in grid_refs]
                total += product * scale
                if offset:
                    total += inputs.astype(jnp.float32).sum(1, keepdims=True) * offset[0]
            return total

        out_ref[...] = jax.lax.fori_loop(0, own, add, jnp.zeros((rows, columns), jnp.float32))

    of_weight = lambda n: pl.BlockSpec((own, n, columns), lambda i, j, s: (s, 0, j))  # noqa: E731
    parts = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((shares, len(x), width), jnp.float32),
        cost_estimate=_cost(x, w),
        grid=(len(x) // rows, width // columns, shares),
        in_specs=[
            pl.BlockSpec((rows, x.shape[1]), lambda i, j, s: (i, 0)),
            of_weight(stored),
            *(of_weight(part.shape[1]) for part in grid),
        ],
        out_specs=pl.BlockSpec((None, rows, columns), lambda i, j, s: (s, i, j)),
        interpret=of.interpret,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
    )(x, w.codes, *grid)
    return parts.sum(0)


def _cost(x: Float[Array, "t in"], w: Blocked) -> pl.CostEstimate:
    """What XLA counts a product as."""
    size = w.codes.size * 8 // w.layout.width
    return pl.CostEstimate(flops=2 * len(x) * size, bytes_accessed=w.nbytes + x.nbytes, transcendentals=0)


def _block(x: Float[Array, "t depth"], codes: Int8[Array, "bytes out"], grid: list[Array], of: Layout) -> Array:
    """The product with one block of a weight; `grid` holds its scales `[groups, out]`, and offsets if it has any."""
    wide = codes.astype(jnp.int32)
    parts = [wide] if of.width == 8 else [wide & 15, (wide >> 4) & 15]
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    total, begin = jnp.zeros((len(x), codes.shape[1]), jnp.float32), 0
    for number, part in enumerate(parts):
        rows, groups = len(part), max(len(grid[0]) // len(parts), 1)
        own = [v if len(v) == 1 else v[number * groups : (number + 1) * groups] for v in grid]
        values = (part - of.centre).astype(jnp.float32) if of.levels is None else _look_up(part, of.levels)
        if groups > 1:
            values, own = values.reshape(groups, -1, values.shape[1]), [v[:, None] for v in own]
        values = values * own[0] + own[1] if len(own) > 1 else values * own[0]
        w = values.reshape(rows, -1).astype(x.dtype)
        total += jnp.dot(x[:, begin : begin + rows], w, precision=precision, preferred_element_type=jnp.float32)
        begin += rows
    return total


def _look_up(codes: Array, levels: tuple[float, ...]) -> Array:
    """The levels of codes of four bits, by choices that halve each time: chips have no look-up that fits."""
    found: list[Any] = [jnp.float32(level) for level in levels]
    for bit in range(4):
        odd = (codes >> bit) & 1 == 1
        found = [jnp.where(odd, b, a) for a, b in zip(found[::2], found[1::2], strict=True)]
    return found[0]
