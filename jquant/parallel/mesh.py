"""Placement of arrays on a mesh of devices.

The mesh has two axes. A weight is rounded with its output columns split over `model`: each column is fitted by itself,
against a Gram matrix that every device holds. Calibration windows are split over both axes: every device has the whole
block and sends its own windows through it.

The statistics are a sum over all windows. Each device keeps one piece of that sum (`scatter`), and adds the windows'
contributions to it in the order of the windows, as a single device would. The order matters: float32 sums depend on it,
and a difference in the last place in the first block changes about a percent of the codes in the fourth. A step moves
each Gram matrix once; an all-reduce would move it twice. No device holds a whole sum before the block's last step
(`gather_pieces`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jquant.composition import Method
from jquant.errors import InputError
from jquant.formats import Format, block_shape
from jquant.formats.base import has_column_levels
from jquant.models.params import Module, flat_params, to_state, with_params
from jquant.qtensor import QTensor, Transposed

DATA, MODEL = "data", "model"
BOTH = (DATA, MODEL)
Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Devices:
    """The devices of all hosts that a computation uses, as a mesh.

    Attributes:
      data: calibration windows are split into data · model parts.
      model: how many parts a weight's output columns are split into.
      uneven: for weights whose columns do not divide: an error, or every device rounds all columns.
      of: the devices that there are, in the mesh's order; by default all of all hosts, neighbours beside each other.

    Raises:
      InputError: there are too few devices, or the mesh leaves devices of several processes without work.
    """

    data: int = 1
    model: int = 1
    uneven: Literal["error", "replicate"] = "error"
    of: tuple[Any, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.data < 1 or self.model < 1:
            raise InputError(f"A mesh has data and model from 1, not data={self.data}, model={self.model}.")
        if self.uneven not in ("error", "replicate"):
            raise InputError(f"A mesh takes uneven=error or replicate, not {self.uneven!r}.")
        there = jax.device_count() if self.of is None else len(self.of)
        if self.data * self.model > there:
            raise InputError(
                f"A mesh of data={self.data} × model={self.model} takes {self.data * self.model} devices; there are "
                f"{there}."
            )
        if self.of is None and jax.process_count() > 1 and self.data * self.model < jax.device_count():
            raise InputError(
                f"A mesh of data={self.data} × model={self.model} leaves some of the {jax.device_count()} devices of "
                f"{jax.process_count()} processes without work: use them all."
            )

    @cached_property
    def mesh(self) -> Mesh:
        """JAX's mesh; on one device it is 1 × 1."""
        shape = (self.data, self.model)
        if self.of is None:
            devices = in_mesh(jax.devices()[: self.count], shape)
        else:
            devices = np.asarray(self.of[: self.count]).reshape(shape)
        return Mesh(devices, (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)

    @property
    def count(self) -> int:
        """Number of devices."""
        return self.data * self.model

    def place(self, tree: Tree, *axes: Any) -> Tree:
        """A tree's arrays, split along these mesh axes from the first array axis on; by default replicated."""
        sharding = NamedSharding(self.mesh, P(*axes))

        def put(leaf: Any) -> Array:
            if sharding.is_fully_addressable or (isinstance(leaf, Array) and not leaf.is_fully_addressable):
                return jax.device_put(leaf, sharding)
            array = np.asarray(leaf)  # every process has all of it, and puts parts of it on its own devices
            return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

        return jax.tree.map(put, tree)

    def windows(self, windows: Any) -> Any:
        """Windows `[n, …]` split over all devices; n must be a multiple of their number."""
        return self.place(windows, BOTH)

    def check_windows(self, count: int) -> None:
        """Raises InputError unless so many windows divide over all devices."""
        if count % self.count:
            raise InputError(
                f"{count} windows do not divide over the {self.count} devices of a mesh of data={self.data} × "
                f"model={self.model}."
            )

    def parameters(self, tree: Tree) -> Tree:
        """A tree's arrays, each cut over all devices for training: rows over `data`, columns over `model`.

        Axes that don't divide are not cut.
        """
        return jax.tree.map(lambda leaf: self.place(leaf, *self.parameter_axes(leaf)), tree)

    def spread(self, module: Module) -> Module:
        """A decoder or block, each of its weights cut over all devices (`cut`), so that each holds 1/count of them."""
        return with_params(module, {name: self.cut(name, leaf) for name, leaf in flat_params(module).items()})

    def cut(self, name: str, leaf: Any) -> Any:
        """A parameter by its name, cut over all devices: by rows, which are joined again without being moved.

        A packed weight is cut by columns, whose codes, scales and zeros belong together; so is the head, whose logits
        stay cut. Arrays that don't divide so are cut along the other axis, and otherwise every device holds them. Norms
        are not cut.
        """
        axes = self.cut_axes(name, isinstance(leaf, QTensor | Transposed))
        return by_columns(lambda array, cut: self.place(array, *(axes(array) if cut else ())), leaf)

    def cut_axes(self, name: str, packed: bool) -> Callable[[Any], tuple[Any, ...]]:
        """Along which mesh axes `cut` cuts each axis of a parameter's arrays."""
        order = (-1, -2) if packed or name.startswith("head") else (-2, -1)

        def axes(array: Any) -> tuple[Any, ...]:
            if array.ndim < 2 or not name.endswith(("embedding", "kernel")):
                return ()
            cut = [axis for axis in order if array.shape[axis] % self.count == 0][:1]
            return tuple(BOTH if place - array.ndim in cut else None for place in range(array.ndim))

        return axes

    def place_heads(self, tree: Tree) -> Tree:
        """A cache's arrays `[b, heads, …]`, cut by heads (`head_axes`)."""
        put = lambda leaf: self.place(leaf, *(self.head_axes(leaf.shape[1]) if leaf.ndim > 1 else ()))  # noqa: E731
        return jax.tree.map(put, tree)

    def head_axes(self, heads: int) -> tuple[Any, ...]:
        """Along which mesh axes arrays `[b, heads, …]` are cut: as many devices as divide so many key/value heads."""
        sizes = {BOTH: self.count, MODEL: self.model, DATA: self.data}
        fitting = [axes for axes, size in sizes.items() if heads % size == 0 and size > 1]
        return (None, max(fitting, key=sizes.__getitem__)) if fitting else ()

    def joined(self, params: Any) -> Any:
        """Within a jitted function: a block's parameters, which `spread` cut, joined on every device."""

        def join(name: str, leaf: Any) -> Any:
            axes = self.cut_axes(name, isinstance(leaf, QTensor))
            # Held as they lie first: else XLA joins a layer before it is taken out of the stack, and copies the stack.
            return by_columns(lambda array, cut: self._held(self._held(array, *(axes(array) if cut else ()))), leaf)

        return to_state({name: join(name, leaf) for name, leaf in flat_params(params).items()})

    def whole(self, tree: Tree) -> Tree:
        """Within a jitted function: arrays joined on every device."""
        return jax.tree.map(lambda leaf: self._held(leaf), tree)

    def over_heads(self, function: Callable[..., Any], heads: int) -> Callable[..., Any]:
        """The function, of arrays `[b, heads, …]` and scalars, run where the heads lie (`head_axes`).

        `heads` counts key/value heads; arrays may have a multiple of them. Left to itself, XLA cuts a cache along its
        channels as well and joins it again, which moves all of it for a token.
        """
        axes = P(*self.head_axes(heads))

        def over(*arguments: Any) -> Any:
            cut = jax.tree.map(lambda leaf: axes if jnp.ndim(leaf) > 1 else P(), arguments)
            of = jax.shard_map(function, mesh=self.mesh, in_specs=cut, out_specs=axes, check_vma=False)
            return of(*arguments)

        return over

    def apart(self, windows: Array) -> Array:
        """Within a jitted function: windows `[n, …]` split over all devices."""
        return self._held(windows, BOTH)

    def _held(self, leaf: Array, *axes: Any) -> Array:
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, P(*axes)))

    def constrain(self, tree: Tree) -> Tree:
        """Within a jitted function: arrays cut as `parameters` cuts them."""
        sharding = lambda leaf: NamedSharding(self.mesh, P(*self.parameter_axes(leaf)))  # noqa: E731
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding(leaf)), tree)

    def parameter_axes(self, leaf: Any) -> tuple[str | None, ...]:
        """Along which mesh axis `parameters` cuts each axis of an array."""
        if leaf.ndim < 2:
            return ()
        sizes = zip(leaf.shape[-2:], (self.data, self.model), (DATA, MODEL), strict=True)
        return (*(None,) * (leaf.ndim - 2), *(axis if length % count == 0 else None for length, count, axis in sizes))

    def on_each(self, function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
        """The function run on every device separately.

        `inputs` and `outputs` are prefixes of its arguments' and result's trees: True for arrays that are split over
        all devices along their first axis, False for arrays that every device holds completely.
        """
        spec = lambda tree: jax.tree.map(lambda split: P(BOTH) if split else P(), tree)  # noqa: E731
        return jax.shard_map(function, mesh=self.mesh, in_specs=spec(inputs), out_specs=spec(outputs), check_vma=False)

    def columns(self, params: Mapping[str, Array], methods: Mapping[str, Method]) -> dict[str, Array]:
        """A block's parameters: weights with a method are split by columns over `model`, the others replicated.

        Raises:
          InputError: columns do not divide, and `uneven` is "error".
        """
        placed = {}
        for path, leaf in params.items():
            split = path in methods and self._divides(path, leaf, methods[path].format)
            placed[path] = self.place(leaf, None, MODEL) if split else self.place(leaf)
        return placed

    def _divides(self, path: str, leaf: Array, format: Format) -> bool:
        # These columns stay together: those of a block under one scale, and 8 columns whose zeros share bytes.
        unit = block_shape(format, leaf.shape)[1] * (8 if format.has_zero else 1)
        if leaf.shape[-1] % (self.model * unit) == 0:
            return True
        if self.uneven == "error":
            raise InputError(
                f"{path}: {leaf.shape[-1]} columns do not divide over the mesh's model={self.model} devices in units "
                f"of {unit}; uneven=replicate rounds such weights whole on every device."
            )
        return False


def by_columns(function: Callable[[Any, bool], Any], leaf: Any) -> Any:
    """A parameter with the function's results for its arrays; it is told whether an array may be cut.

    A table of levels may not, unless it has columns as the weight has.
    """
    if not isinstance(leaf, QTensor) or leaf.levels is None:
        return jax.tree.map(lambda array: function(array, True), leaf)
    levels = function(leaf.levels, has_column_levels(leaf.format))
    return replace(jax.tree.map(lambda array: function(array, True), replace(leaf, levels=None)), levels=levels)


def spread_over(decoder: Any) -> Devices | None:
    """The devices over which a decoder is cut (`Devices.spread`); None where its embedding lies on one, or on each."""
    leaf = jax.tree.leaves(decoder.embedding.get_value())[0]
    sharding = getattr(leaf, "sharding", None)  # traced and abstract arrays may have none
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated or DATA not in sharding.mesh.shape:
        return None
    assert isinstance(sharding.mesh, Mesh)
    of = tuple(sharding.mesh.devices.flat)
    usual = set(of) == set(jax.devices()[: len(of)])
    return Devices(sharding.mesh.shape[DATA], sharding.mesh.shape[MODEL], of=None if usual else of)


def in_mesh(devices: Sequence[Any], shape: tuple[int, int]) -> np.ndarray:
    """Devices as a mesh whose neighbours are neighbours on the chips' links."""
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def scatter(tree: Tree, count: int) -> Tree:
    """A tree's arrays flattened and cut into `[count, piece]`; the last pieces are padded."""

    def cut(leaf: Array) -> Array:
        return jnp.pad(leaf.reshape(-1), (0, -leaf.size % count)).reshape(count, -1)

    return jax.tree.map(cut, tree)


def exchange(tree: Tree) -> Tree:
    """Within `on_each`: from every device's pieces `[count, piece]`, those with this device's number, in order."""
    return jax.tree.map(lambda leaf: jax.lax.all_to_all(leaf, BOTH, 0, 0, tiled=True), tree)


def gather_pieces(pieces: Tree, like: Tree) -> Tree:
    """Within `on_each`: joins the devices' pieces `[1, piece]` into arrays shaped as in `like`."""

    def joined(piece: Array, shaped: Any) -> Array:
        flat = jax.lax.all_gather(piece[0], BOTH, tiled=True)
        return flat[: shaped.size].reshape(shaped.shape)

    return jax.tree.map(joined, pieces, like)
