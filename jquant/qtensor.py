"""QTensor: packed codes, scales and zeros as one pytree that maps, shards, checkpoints and scans like an array."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8

from jquant.activations import Activation
from jquant.errors import InputError
from jquant.formats import Codebook, Format, block_shape, expand, grouped, pack, tile_of, unpack
from jquant.formats.base import has_column_levels, own_levels
from jquant.kernels import choose
from jquant.kernels.matmul import matmul, quantized_matmul
from jquant.kernels.packed import PackedMatrix
from jquant.parts import brief
from jquant.rotations import Rotation, apply, apply_transpose

# Of a weight's inputs and outputs, Q and Q'; None if it was rounded as it is.
Turns = tuple[Rotation, Rotation] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QTensor:
    """A quantized `[*l, in, out]` weight; `x @ q` multiplies by an `[in, out]` one without dequantizing all of it.

    Attributes:
      codes: uint8 `[*l, bytes, out]`, packed along `in`: 8 codes take `format.bits` bytes (`formats.pack`).
      scale: one per block of `format.group`, `[*l, groups, columns]`: an array of dtype `format.scale`, or a
        QTensor if that is a format.
      zero: None; or the blocks' integer zeros packed along their columns, uint8 `[*l, groups, bytes]`; or float zeros,
        stored as the scales are.
      format: what the codes mean (static).
      in_features: rows before packing (static).
      activation: how the weight's inputs are quantized; None if they are not (static).
      input_scale: the inputs' calibrated scale, float32 `[*l, 1, 1]`, if `activation` is static.
      rotations: Q and Q' where the codes are those of Qᵀ W Q' (`transforms.Incoherence`); the product undoes them
        (static).
      levels: a table of this weight's own, which stands in for that of the format (`Format`); `[*l, …]`, or None.
    """

    # Fields are Any because pytree transformations put shapes, shardings or None in place of arrays.
    codes: Any
    scale: Any
    zero: Any
    format: Format = field(metadata={"static": True})
    in_features: int = field(metadata={"static": True})
    activation: Activation | None = field(default=None, metadata={"static": True})
    input_scale: Any = None
    rotations: Turns = field(default=None, metadata={"static": True})
    levels: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, `[*l, in, out]`."""
        return (*self.codes.shape[:-2], self.in_features, self.codes.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zeros and levels together."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    __array_ufunc__ = None  # makes NumPy arrays leave x @ q to the method below

    def __rmatmul__(self, x: Float[Array | np.ndarray, "*b in"]) -> Float[Array, "*b out"]:
        """x @ self in x's dtype.

        Raises:
          InputError: the shapes do not fit; layers are stacked.
        """
        x = jnp.asarray(x)
        if len(self.shape) != 2 or x.shape[-1:] != self.shape[:1]:
            raise InputError(f"Inputs of shape {x.shape} do not fit a weight of shape {self.shape}.")
        if self.rotations is not None:
            return Turned(replace(self, rotations=None), self.rotations).__rmatmul__(x)
        packed = packed_matrix(self)
        if self.activation is None:
            return matmul(x, packed)
        return quantized_matmul(x, packed, self.activation, self.input_scale)

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self)
        if not all(hasattr(leaf, "dtype") and hasattr(leaf, "shape") for leaf in (self.codes, *leaves)):
            return f"QTensor({type(self.codes).__name__}, {brief(self.format)})"  # of shardings, or nothing
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
        bits = f"{8 * size / max(math.prod(self.shape), 1):.3f} bits/weight"
        inputs = f", inputs {brief(self.activation)}" if self.activation else ""
        shape = " × ".join(map(str, self.shape))
        turned = ", rotated" if self.rotations else ""
        return f"QTensor({shape}, {brief(self.format)}{inputs}{turned}, {bits}, {size / 1e6:.3g} MB)"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Turned:
    """A kernel `[in, out]` of rotated inputs and outputs: x @ kernel is ((x Q) @ inner) Q'ᵀ.

    Attributes:
      inner: what multiplies the rotated inputs.
      rotations: Q and Q' (static).
    """

    inner: Any
    rotations: tuple[Rotation, Rotation] = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.inner.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; signs come from their seed."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def __rmatmul__(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        inputs, outputs = self.rotations
        return apply_transpose(apply(x, inputs) @ self.inner, outputs)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Transposed:
    """The transpose of a packed weight, an embedding `[vocab, d]`: its groups run along d, as those of a head do.

    Attributes:
      weight: the QTensor `[d, vocab]`.
      kernel: None, or the weight as its device's product reads it (`prepared`).
    """

    weight: Any
    kernel: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """`[vocab, d]`."""
        return self.weight.shape[::-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def T(self) -> Any:
        """What x is multiplied by where the embedding is also the head, `[d, vocab]`."""
        return self.weight if self.kernel is None else self.kernel

    def __getitem__(self, rows: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        """The values of some rows, float32."""
        q, chosen = self.weight, rows.reshape(-1)
        (height, width), (scale, zero) = block_shape(q.format, q.shape), stored_grid(q)
        of_chosen = lambda v: expand(v[:, chosen // width], (height, 1), (q.in_features, len(chosen)))  # noqa: E731
        codes = unpack(q.codes[:, chosen], q.format.bits, q.in_features)
        values = _on_levels(q.format.decode, codes, jax.tree.map(of_chosen, (scale, zero)), _levels_of(q, chosen))
        return values.T.reshape(*rows.shape, q.in_features)


Stored = Array | QTensor | None


def from_codes(
    codes: UInt8[Array, "*l in out"], scale: Stored, zero: Stored, format: Format, levels: Array | None = None
) -> QTensor:
    """Packs one code per weight; stores each block's scale and zero in the format's types."""
    stored = (_store(scale, format), _store(zero, format))
    return QTensor(pack(codes, format.bits), *stored, format, codes.shape[-2], levels=levels)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Grid:
    """The values that a weight's codes stand for: a range makes the grid, a rounding rounds to it.

    Attributes:
      scale: of each group, `[*l, groups, columns]`, or a QTensor where the format quantizes its scales.
      zero: of each group, likewise; None where the format has none.
      per_weight: scale and zero of every weight, each broadcastable against `[*l, in, out]`. Quantized scales have
        their stored values. Other scales are as the range gave them: most formats round them to the stored dtype in
        `Format.grid`, ggml's formats don't.
      nearest: the scale and zero that `encode` uses: those of `per_weight`, except under double quantization, where
        bitsandbytes chooses codes before it quantizes the scales.
      format: what codes mean (static).
      levels: a table that stands in for that of the format (`Format`), `[*l, …]`; None for the format's.
    """

    scale: Any
    zero: Any
    per_weight: Any
    nearest: Any
    format: Format = field(metadata={"static": True})
    levels: Any = None

    @staticmethod
    def of(scale: Stored, zero: Stored, format: Format, shape: tuple[int, ...], levels: Array | None = None) -> "Grid":
        """The grid of a weight of `shape`, from the scale and zero that a range returns.

        Without `levels` it has the first ones of a format that stores some.

        Raises:
          InputError: the number of scales is not that of groups.
        """
        chosen = scale
        if not isinstance(format.scale, str):
            scale, zero = (v if is_integer(v) else _store(v, format) for v in (scale, zero))
        block = block_shape(format, shape)
        groups, columns = (-(-n // size) for n, size in zip(shape[-2:], block, strict=True))
        if isinstance(chosen, Array) and chosen.shape[-2:] != (groups, columns):
            raise InputError(
                f"Scales of shape {chosen.shape} do not fit the {groups} × {columns} groups of a weight {shape}."
            )
        expanded = jax.tree.map(lambda v: expand(v, block, shape), (_load(scale, columns), _load(zero, columns)))
        nearest = expanded
        if _is_centred(format.scale) and isinstance(chosen, Array):
            nearest = (expand(chosen, block, shape), None)
        return Grid(scale, zero, expanded, nearest, format, own_levels(format, shape) if levels is None else levels)

    def encode(self, w: Float[Array, "..."], at: Any = None) -> UInt8[Array, "..."]:
        """The nearest code of each weight `[*l, in, out]`; of some rows, if `at` gives their scales and zeros."""
        return _on_levels(self.format.encode, w, self.nearest if at is None else at, self.levels)

    def decode(self, codes: UInt8[Array, "..."], at: Any = None) -> Float[Array, "..."]:
        """The float32 value of each code; a scalar code is decoded at every place of the grid. `at` as of `encode`."""
        return _on_levels(self.format.decode, codes, self.per_weight if at is None else at, self.levels)

    def pack(self, codes: UInt8[Array, "*l in out"]) -> QTensor:
        """The quantized weight with these codes."""
        return from_codes(codes, self.scale, self.zero, self.format, self.levels)


def _on_levels(function: Callable[..., Array], values: Array, at: Any, levels: Array | None) -> Array:
    """`Format.encode` or `decode`; stacked weights have a table each."""
    if levels is None:
        return function(values, *at)
    layers = at[0].shape[:-2]
    values = jnp.broadcast_to(values, (*layers, *jnp.shape(values)[-2:]))
    for _ in layers:
        function = jax.vmap(function)
    return function(values, *at, levels)


def quantize(w: Float[Array, "*l in out"], scale: Stored, zero: Stored, format: Format) -> QTensor:
    """Rounds every weight to its nearest code on the given grid."""
    grid = Grid.of(scale, zero, format, w.shape)
    return grid.pack(grid.encode(w))


def dequantize(q: QTensor, dtype: Any = jnp.float32) -> Float[Array, "*l in out"]:
    """The weight's values."""
    block = block_shape(q.format, q.shape)
    at = jax.tree.map(lambda v: expand(v, block, q.shape), stored_grid(q))
    values = _on_levels(q.format.decode, unpack(q.codes, q.format.bits, q.in_features), at, q.levels)
    return turned_back(values, q.rotations).astype(dtype)


def turned_back(w: Float[Array, "*l in out"], rotations: Turns) -> Float[Array, "*l in out"]:
    """Q W Q'ᵀ: the weight whose rotated form is `w`."""
    if rotations is None:
        return w
    inputs, outputs = rotations
    return apply_transpose(apply_transpose(w.mT, inputs).mT, outputs)


def stored_grid(q: QTensor) -> tuple[Array, Array | None]:
    """Scales and zeros per block, `[*l, groups, columns]`, in the stored dtype; integer zeros are unpacked."""
    columns = -(-q.shape[-1] // block_shape(q.format, q.shape)[1])
    if is_integer(q.zero):
        return _load(q.scale, columns), _swap(unpack(_swap(q.zero), q.format.bits, columns))
    return _load(q.scale, columns), _load(q.zero, columns)


def packed_matrix(q: QTensor) -> PackedMatrix:
    """The weight as kernels take it."""
    return PackedMatrix(q.codes, *stored_grid(q), q.format, q.in_features, q.levels)


def prepared(tree: Any, mesh: Mesh | None = None) -> Any:
    """A pytree with its QTensors as the fastest kernel of their device reads them, for evaluation and generation.

    They are copies in another order, with scales in float32. QTensors that no kernel takes stay. `mesh`: the devices
    over which the QTensors are cut by columns.
    """

    def fastest(leaf: Any) -> Any:
        if isinstance(leaf, Transposed):
            return replace(leaf, kernel=fastest(leaf.weight))
        if not isinstance(leaf, QTensor):
            return leaf
        found = choose.kernel(packed_matrix(leaf), leaf.activation, leaf.input_scale, mesh)
        if found is None:
            return leaf
        return found if leaf.rotations is None else Turned(found, leaf.rotations)

    return jax.tree.map(fastest, tree, is_leaf=lambda leaf: isinstance(leaf, QTensor | Transposed))


def side_by_side(kernels: Sequence[Any]) -> Any | None:
    """Kernels of one input as the fastest kernel of their device reads them together, `[in, out of all]`.

    None where they are not all QTensors of one format and rounding of inputs, with a scale for each column of their
    own, or where no kernel takes them.
    """
    first, *others = kernels
    same = lambda q: isinstance(q, QTensor) and (q.format, q.activation) == (first.format, first.activation)  # noqa: E731
    if not isinstance(first, QTensor) or not all(map(same, others)) or first.input_scale is not None:
        return None
    if any(kernel.rotations or kernel.levels is not None for kernel in kernels):
        return None
    matrices = [packed_matrix(kernel) for kernel in kernels]
    if any(matrix.scale.shape[-1] != matrix.codes.shape[-1] for matrix in matrices):
        return None
    parts = [(matrix.codes, matrix.scale, matrix.zero) for matrix in matrices]
    codes, scale, zero = jax.tree.map(lambda *columns: jnp.concatenate(columns, -1), *parts)
    return choose.kernel(PackedMatrix(codes, scale, zero, first.format, first.in_features), first.activation, None)


def columns_of(q: QTensor, chosen: slice | Int[np.ndarray, " n"]) -> QTensor:
    """Some columns of a weight.

    Raises:
      InputError: columns share their scales, or are coded together.
    """
    _check_own_scales(q)
    if tile_of(q.format)[1] > 1:
        raise InputError(f"{brief(q.format)} codes several columns together, so they can't be parted.")
    take = lambda leaf: leaf[..., chosen]  # noqa: E731
    zero = stored_grid(q)[1] if is_integer(q.zero) else q.zero
    scale, zero = jax.tree.map(take, (q.scale, zero))
    return replace(q, codes=take(q.codes), scale=scale, zero=_store(zero, q.format), levels=_levels_of(q, chosen))


def _levels_of(q: QTensor, chosen: Any) -> Array | None:
    """The table of some columns."""
    return q.levels[..., chosen] if q.levels is not None and has_column_levels(q.format) else q.levels


def joined_columns(parts: Sequence[QTensor]) -> QTensor:
    """Weights of the same inputs as one, `[in, out of all]`.

    Raises:
      InputError: their formats, or how their inputs are rounded, differ; columns share their scales or levels.
    """
    first, levels = parts[0], None
    for part in parts:
        _check_own_scales(part)
        if (part.format, part.activation, part.in_features) != (first.format, first.activation, first.in_features):
            raise InputError(
                f"{brief(first.format)} and {brief(part.format)} can't be one weight: quantize them alike."
            )
    if first.input_scale is not None:
        raise InputError("weights whose inputs have scales of their own can't be one.")
    if any(part.levels is not None for part in parts):
        if not has_column_levels(first.format) or any(part.levels is None for part in parts):
            raise InputError(f"weights in {brief(first.format)} with levels of their own can't be one.")
        levels = jnp.concatenate([part.levels for part in parts], -1)
    grids = [(part.codes, part.scale, stored_grid(part)[1] if is_integer(part.zero) else part.zero) for part in parts]
    codes, scale, zero = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, -1), *grids)
    return replace(first, codes=codes, scale=scale, zero=_store(zero, first.format), levels=levels)


def _check_own_scales(q: QTensor) -> None:
    if q.rotations is not None:
        raise InputError(f"{brief(q.format)} has rotated columns, so they can't be parted.")
    if block_shape(q.format, q.shape)[1] > 1 or _is_centred(q.format.scale):
        raise InputError(f"{brief(q.format)} has scales that several columns share, so its columns can't be parted.")


def bits_per_weight(tree: Any) -> float:
    """Stored bits (codes, scales, zeros, levels, remainders) per weight over every array and QTensor of a pytree."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    return 8 * sum(leaf.nbytes for leaf in leaves) / sum(math.prod(leaf.shape) for leaf in leaves)


def _store(values: Stored, format: Format) -> Stored:
    """Scales or zeros as the format stores them: packed integers, a dtype, or a QTensor."""
    if values is None or isinstance(values, QTensor):
        return values
    if is_integer(values):
        return _swap(pack(_swap(values), format.bits))
    if isinstance(format.scale, str):
        return values.astype(format.scale)
    return _quantize_scales(values, format.scale)


def _quantize_scales(values: Float[Array, "*l groups columns"], format: Any) -> QTensor:
    """Rounds scales to their own min-max grid; a group longer than the rows is shortened."""
    zero = None
    if _is_centred(format):
        values = _swap(values).reshape(*values.shape[:-2], -1, 1)
        zero = jnp.mean(values, (-2, -1), keepdims=True)
        values = values - zero
    format = _shortened(format, values.shape[-2])
    members = grouped(values, block_shape(format, values.shape))
    scale, own_zero = format.grid(jnp.min(members, -2), jnp.max(members, -2))
    q = quantize(values, scale, own_zero, format)
    return q if zero is None else replace(q, zero=zero)


def _shortened(format: Any, rows: int) -> Any:
    """The format with its group no longer than `rows`."""
    return replace(format, group=min(format.group, rows)) if isinstance(format.group, int) else format


def _load(values: Any, columns: int) -> Any:
    if not isinstance(values, QTensor):
        return values
    loaded = dequantize(values)
    if _is_centred(values.format):
        return _swap(loaded.reshape(*loaded.shape[:-2], columns, -1))
    return loaded


def _is_centred(format: str | Format) -> bool:
    return isinstance(format, Codebook) and format.centred


def is_integer(values: Any) -> bool:
    """Whether zeros are integer codes, not floats."""
    return not isinstance(values, QTensor) and values is not None and values.dtype == jnp.uint8


def _swap(a: Array) -> Array:
    return jnp.swapaxes(a, -1, -2)
