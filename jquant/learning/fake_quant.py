"""Fake quantization: a weight's or an input's quantized values in floats, with gradients past the rounding.

Rounding has no useful gradient. The straight-through estimator (arXiv 1308.3432) takes it as a constant offset: the
quantized value follows the weight while the weight lies within the grid, and the grid's end beyond it. The gradients of
scales and zeros follow from the same rule; for scales they are those of LSQ (arXiv 1902.08153, Eq. 3).
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, UInt8

from jquant.activations import Activation, fake_quant_inputs
from jquant.formats import Codebook, Format, block_shape, expand, grouped, tile_of, unpack
from jquant.formats.base import has_column_levels, ratio, round_scale
from jquant.kernels.bfloat16 import matmul_in
from jquant.qtensor import Grid, QTensor, Turned, Turns, is_integer, stored_grid

Zero = Float[Array, "*l groups columns"] | None
Levels = Float[Array, "..."] | None  # of a codebook, [levels]; other formats shape them as they like


def fake_quant(
    w: Float[Array, "*l in out"],
    scale: Float[Array, "*l groups columns"],
    zero: Zero,
    format: Format,
    levels: Levels = None,
) -> Float[Array, "*l in out"]:
    """`dequantize(quantize(w, scale, zero, format))`, bit for bit, with gradients.

    With g the gradient of the result ŵ, s the scale and z the zero of a weight's group, rounded to their stored types:

      ∂w: g within the grid, 0 beyond its ends.
      ∂scale: Σ g (ŵ − w) / s over the group's weights within the grid, and Σ g ŵ / s over those beyond it ((ŵ − z) / s
        for float zeros).
      ∂zero: 0 within the grid; beyond it Σ g for a float zero, −Σ g s for an integer one.
      ∂level: Σ g s over the weights that have it.

    A format that codes several weights together has no ends: all weights are taken to lie within its grid.

    Args:
      w: the weight.
      scale: one per block of `format.group`; of either sign.
      zero: a float zero, or an integer one as a float, which is rounded; None where the format has none.
      format: what codes mean. If it quantizes its scales, `scale` is quantized here.
      levels: in place of those of the format; a codebook's are ascending.
    """
    grid = Grid.of(*as_typed(scale, zero, format), format, w.shape, levels)
    codes = grid.encode(w)
    if tile_of(format) != (1, 1):
        return _straight_through(format, w, (scale, zero, levels), codes, jnp.ones(w.shape, jnp.bool_))
    low, high = (grid.decode(grid.encode(jnp.float32(end))) for end in (-3e38, 3e38))
    return _straight_through(format, w, (scale, zero, levels), codes, (w >= low) & (w <= high))


def fixed_codes(
    codes: UInt8[Array, "*l in out"],
    scale: Float[Array, "*l groups columns"],
    zero: Zero,
    format: Format,
    levels: Levels = None,
) -> Float[Array, "*l in out"]:
    """The values of codes that don't change; gradients are those of `fake_quant` for weights beyond the grid."""
    nowhere = jnp.zeros(codes.shape, jnp.float32)
    return _straight_through(format, nowhere, (scale, zero, levels), codes, jnp.zeros(codes.shape, jnp.bool_))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FakeQuantized:
    """A quantized kernel as a function of what is learned; `x @ kernel` rounds it anew.

    Attributes:
      learned: some of "log_scale", the logarithm of a factor on each scale, `[*l, groups, columns]`; "log_clip", that
        of a factor on scales and float zeros; "shift", added to each zero: in codes for integer zeros, in units of the
        scale for float ones; "weight", the weight behind the codes in units of its first scale, `[*l, in, out]`;
        "level", added to levels, in units of the largest, `[levels]` or as `table`.
      scale: the first one, float32 `[*l, groups, columns]`.
      zero: the first one, float32, or None.
      codes: uint8 `[*l, in, out]`, if they don't change; else None.
      weight: the weight behind the codes, if it doesn't change and codes do; else None.
      input_scale: see `QTensor`.
      format: what codes mean (static).
      features: (in, out) (static).
      activation: see `QTensor` (static).
      compute: see `Tuning` (static).
      rotations: see `QTensor`; the weight, its codes and values are the rotated ones (static).
      table: the first levels, if the weight has some of its own; else None.
    """

    learned: Any
    scale: Any
    zero: Any
    codes: Any
    weight: Any
    input_scale: Any
    format: Format = field(metadata={"static": True})
    features: tuple[int, int] = field(metadata={"static": True})
    activation: Activation | None = field(metadata={"static": True})
    compute: str = field(default="bfloat16", metadata={"static": True})
    rotations: Turns = field(default=None, metadata={"static": True})
    table: Any = None

    @staticmethod
    def of(q: QTensor) -> "FakeQuantized":
        """A quantized weight, of which nothing is learned yet; codes don't change."""
        # Unpacked once: within a step, XLA would unpack the zeros again for every weight.
        scale, zero = stored_grid(q)
        codes = unpack(q.codes, q.format.bits, q.in_features)
        start = FakeQuantized.on_grid(None, scale, zero, q.format, q.shape)
        start = replace(start, codes=codes, activation=q.activation, input_scale=q.input_scale, table=q.levels)
        return replace(start, rotations=q.rotations)

    @staticmethod
    def on_grid(
        weight: Any, scale: Array, zero: Array | None, format: Format, shape: tuple[int, ...]
    ) -> "FakeQuantized":
        """A float weight rounded to nearest on a grid, of which nothing is learned yet."""
        zero = None if zero is None else zero.astype(jnp.float32)
        features = (shape[-2], shape[-1])
        return FakeQuantized({}, scale.astype(jnp.float32), zero, None, weight, None, format, features, None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, `[*l, in, out]`."""
        return (*self.scale.shape[:-2], *self.features)

    @property
    def steps(self) -> Float[Array, "*l in out"]:
        """The size of each weight's first scale, the unit of "weight"; 1 where that is 0."""
        size = jnp.abs(self.scale)
        return expand(jnp.where(size == 0, 1, size), block_shape(self.format, self.shape), self.shape)

    def grid(self) -> tuple[Float[Array, "*l groups columns"], Zero]:
        """Scales and zeros."""
        scale, zero, learned, moving = self.scale, self.zero, self.learned, not has_integer_zero(self.format)
        if "shift" in learned and moving:
            zero += learned["shift"] * jnp.abs(scale)
        elif "shift" in learned:
            # Clipped here, so that its gradient ends with the codes.
            zero = jnp.clip(zero + learned["shift"], 0, 2**self.format.bits - 1)
        if "log_clip" in learned:
            factor = jnp.exp(learned["log_clip"])
            return scale * factor, zero * factor if zero is not None and moving else zero
        return scale * jnp.exp(learned["log_scale"]) if "log_scale" in learned else scale, zero

    def levels(self) -> Levels:
        """The levels, if they are learned or the weight's own; a codebook's ascend."""
        if "level" not in self.learned:
            return None if self.table is None else self.table.astype(jnp.float32)
        own = cast(Codebook, self.format).levels if self.table is None else self.table
        first = jnp.asarray(own, jnp.float32)
        # Of each of the stacked layers.
        axes = tuple(range(0 if self.table is None else self.scale.ndim - 2, first.ndim))
        moved = first + self.learned["level"] * jnp.max(jnp.abs(first), axes, keepdims=True)
        return jnp.sort(moved, -2 if has_column_levels(self.format) else -1) if _ascends(self.format) else moved

    def settled(self) -> "FakeQuantized":
        """The kernel with its learned levels as those of its format, or as its table; not under jit."""
        levels, codebook = self.levels(), cast(Codebook, self.format)
        if levels is None:
            return self
        others = {name: leaf for name, leaf in self.learned.items() if name != "level"}
        if self.table is not None:
            return replace(self, learned=others, table=levels.astype(self.table.dtype))
        return replace(self, learned=others, format=replace(codebook, levels=tuple(levels.tolist())))

    def behind(self) -> Float[Array, "*l in out"] | None:
        """The weight behind the codes; None if these don't change."""
        return self.learned["weight"] * self.steps if "weight" in self.learned else self.weight

    def value(self) -> Float[Array, "*l in out"]:
        """The rounded weight."""
        weight = self.behind()
        if weight is None:
            return fixed_codes(self.codes, *self.grid(), self.format, self.levels())
        return fake_quant(weight, *self.grid(), self.format, self.levels())

    def pack(self) -> QTensor:
        """The quantized weight whose values are `value`, bit for bit, once learned levels are `settled`."""
        grid = Grid.of(*as_typed(*self.grid(), self.format), self.format, self.shape, self.table)
        weight = self.behind()
        q = grid.pack(self.codes if weight is None else grid.encode(weight))
        return replace(q, activation=self.activation, input_scale=self.input_scale, rotations=self.rotations)

    def __rmatmul__(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        if self.rotations is not None:
            return x @ Turned(replace(self, rotations=None), self.rotations)
        if self.activation is not None:
            x = fake_quant_inputs(x, self.activation, self.input_scale)
        return matmul_in(self.compute, x, self.value()).astype(x.dtype)


def as_typed(scale: Array, zero: Zero, format: Format) -> tuple[Array, Any]:
    """Scale and zero as a range returns them: rounded to the stored dtype, integer zeros as codes."""
    if isinstance(format.scale, str):
        scale = round_scale(scale, format.scale)
    if zero is None or not has_integer_zero(format):
        return scale, zero if zero is None or not isinstance(format.scale, str) else zero.astype(format.scale)
    return scale, jnp.clip(jnp.round(zero), 0, 2**format.bits - 1).astype(jnp.uint8)


def has_integer_zero(format: Format) -> bool:
    """Whether the format's zeros are codes."""
    value = jax.ShapeDtypeStruct((), jnp.float32)
    return is_integer(jax.eval_shape(format.grid, value, value)[1])


def _ascends(format: Format) -> bool:
    """Whether codes follow the order of levels."""
    return isinstance(format, Codebook) or has_column_levels(format)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _straight_through(
    format: Format,
    w: Float[Array, "*l in out"],
    table: tuple[Array, Zero, Levels],
    codes: UInt8[Array, "*l in out"],
    inside: Bool[Array, "*l in out"],
) -> Float[Array, "*l in out"]:
    """The codes' values on scale, zero and levels; within the grid the gradient passes to `w`."""
    return _forward(format, w, table, codes, inside)[0]


def _forward(
    format: Format, w: Array, table: tuple[Array, Zero, Levels], codes: Array, inside: Array
) -> tuple[Array, Any]:
    scale, zero, levels = table
    grid = Grid.of(*as_typed(scale, zero, format), format, codes.shape, levels)
    value = grid.decode(codes)
    return value, (w, value, grid, inside, None if levels is None else (levels, codes))


def _backward(format: Format, saved: Any, slope: Float[Array, "*l in out"]) -> tuple[Any, ...]:
    w, value, grid, inside, learned = saved
    block, at = block_shape(format, value.shape), grid.per_weight
    summed = lambda v: jnp.sum(grouped(v, block), -2)  # noqa: E731
    step = at[0].astype(jnp.float32)
    outside = jnp.where(inside, 0, slope)
    shifted = at[1] is not None and not has_integer_zero(format)
    origin = at[1].astype(jnp.float32) if shifted else 0.0
    at_scale = summed(slope * ratio(value - jnp.where(inside, w, origin), step))
    at_zero = None if at[1] is None else summed(outside if shifted else -outside * step)
    at_levels = None
    if learned is not None:
        levels, codes = learned
        each, count = slope * step, len(levels)
        if not isinstance(format, Codebook) or levels.ndim > 1:
            at_levels = jax.vjp(lambda levels: replace(grid, levels=levels).decode(codes), levels)[1](slope)[0]
        elif count > 16:
            at_levels = jnp.zeros(count).at[codes].add(each)
        else:  # sums that vectorise; on a CPU a scatter takes one element at a time
            at_levels = jnp.stack([jnp.sum(jnp.where(codes == code, each, 0)) for code in range(count)])
    return jnp.where(inside, slope, 0).astype(w.dtype), (at_scale, at_zero, at_levels), None, None


_straight_through.defvjp(_forward, _backward)
