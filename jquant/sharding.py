"""Where arrays lie on a mesh of devices.

Two axes. Calibration windows are split over `data`: forward passes need nothing from each other, and the statistics of
all windows are one sum (an all-reduce a batch). Weights are rounded with their output columns split over `model`: every
column is fitted by itself, against a Gram matrix that all devices hold. Blocks that windows go through are whole on
every device, one at a time. Nothing else in jquant knows about devices: arrays are put somewhere, and jit follows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jquant.errors import InputError
from jquant.formats import Format, block_shape
from jquant.methods import Method

DATA, MODEL = "data", "model"
Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Devices:
    """The devices of all hosts that a computation uses, as a mesh.

    Attributes:
      data: how many parts calibration windows are split into.
      model: how many parts a weight's output columns are split into.
      uneven: what becomes of weights whose columns do not divide: an error, or rounded whole on every device.

    Raises:
      InputError: there are not as many devices, or several processes have more.
    """

    data: int = 1
    model: int = 1
    uneven: Literal["error", "replicate"] = "error"

    def __post_init__(self) -> None:
        if self.data < 1 or self.model < 1:
            raise InputError(f"A mesh has data and model from 1, not data={self.data}, model={self.model}.")
        if self.uneven not in ("error", "replicate"):
            raise InputError(f"A mesh takes uneven=error or replicate, not {self.uneven!r}.")
        if self.data * self.model > jax.device_count():
            raise InputError(
                f"A mesh of data={self.data} × model={self.model} takes {self.data * self.model} devices; there are "
                f"{jax.device_count()}."
            )
        if jax.process_count() > 1 and self.data * self.model < jax.device_count():
            raise InputError(
                f"A mesh of data={self.data} × model={self.model} leaves some of the {jax.device_count()} devices of "
                f"{jax.process_count()} processes without work: use them all."
            )

    @cached_property
    def mesh(self) -> Mesh:
        """JAX's mesh; on one device there is one, too, of 1 × 1."""
        devices = jax.devices()[: self.data * self.model]
        return jax.make_mesh((self.data, self.model), (DATA, MODEL), devices=devices, axis_types=(AxisType.Auto,) * 2)

    def place(self, tree: Tree, *axes: str | None) -> Tree:
        """A tree's arrays, split along these mesh axes from the first array axis on; by default whole everywhere."""
        sharding = NamedSharding(self.mesh, P(*axes))

        def put(leaf: Any) -> Array:
            if sharding.is_fully_addressable or (isinstance(leaf, Array) and not leaf.is_fully_addressable):
                return jax.device_put(leaf, sharding)
            whole = np.asarray(leaf)  # every process has it, and puts its own part of it on its own devices
            return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)

        return jax.tree.map(put, tree)

    def windows(self, windows: Any) -> Any:
        """Windows `[n, …]` split over `data`; their number must divide."""
        return self.place(windows, DATA)

    def check_windows(self, count: int) -> None:
        """Raises InputError unless so many windows divide over `data`."""
        if count % self.data:
            raise InputError(f"{count} windows do not divide over the mesh's data={self.data} devices.")

    def columns(self, params: Mapping[str, Array], methods: Mapping[str, Method]) -> dict[str, Array]:
        """A block's parameters: the columns of those that have a method split over `model`, the others whole.

        Raises:
          InputError: columns do not divide, and `uneven` is "error".
        """
        placed = {}
        for path, leaf in params.items():
            split = path in methods and self._divides(path, leaf, methods[path].format)
            placed[path] = self.place(leaf, None, MODEL) if split else self.place(leaf)
        return placed

    def _divides(self, path: str, leaf: Array, format: Format) -> bool:
        # What must stay together: the columns of a block under one scale, and 8 whose zeros share bytes.
        unit = block_shape(format, leaf.shape)[1] * (8 if format.has_zero else 1)
        if leaf.shape[-1] % (self.model * unit) == 0:
            return True
        if self.uneven == "error":
            raise InputError(
                f"{path}: {leaf.shape[-1]} columns do not divide over the mesh's model={self.model} devices in units "
                f"of {unit}; uneven=replicate rounds such weights whole on every device."
            )
        return False
