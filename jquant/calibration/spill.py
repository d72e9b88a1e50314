"""Calibration windows wait for their next block in the host's memory, and above a limit on disk."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from jquant.errors import InputError


@dataclass(frozen=True)
class Spill:
    """Where windows go that exceed a limit on the host's memory.

    Attributes:
      folder: of their files, one a batch and device; it must exist, and the caller removes it.
      limit: bytes that stay in memory.
    """

    folder: Path
    limit: float


class Waiting:
    """Batches of the residual stream, or of gradients by it: each is read, advanced through a block and stored again.

    On an accelerator the batches wait in the host's memory, so that the accelerator holds one batch. Every process
    keeps the shards of its own devices. Batches keep the model's dtype.

    Args:
      batches: on the devices.
      name: of this stream's files.
      spill: where batches over the limit go; None keeps all in memory.

    Raises:
      InputError: the disk is full or can't be written; later assignments raise it too.
    """

    def __init__(self, batches: Iterable[Array], name: str = "", spill: Spill | None = None):
        self._name, self._spill = name, spill
        self._places: list[Any] = []
        self._left = spill.limit if spill else math.inf
        self.extend(batches)

    def extend(self, batches: Iterable[Array]) -> None:
        """Adds batches at the end."""
        for x in batches:
            self._left -= sum(shard.data.nbytes for shard in x.addressable_shards)
            self._places.append(None if self._left >= 0 else x.sharding)
            self._places[-1] = self._put(len(self._places) - 1, x)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Array]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Array:
        place = self._places[index]
        return place.read() if isinstance(place, _Files) else _moved(place, "device")

    def __setitem__(self, index: int, x: Array) -> None:
        self._places[index] = self._put(index, x)

    def _put(self, index: int, x: Array) -> Any:
        if not isinstance(self._places[index], _Files | jax.sharding.Sharding):
            return _moved(x, "pinned_host")
        assert self._spill is not None
        return _Files.write(self._spill.folder / f"{self._name}{index:05}", x)


def _moved(x: Array, memory: str) -> Array:
    """The array in another memory of its devices; a CPU has only one."""
    if next(iter(x.sharding.device_set)).platform == "cpu":
        return x
    return jax.device_put(x, x.sharding.with_memory_kind(memory))


@dataclass(frozen=True)
class _Files:
    """An array on disk: one file for the shard of each of this process's devices."""

    path: Path
    array: jax.ShapeDtypeStruct

    @staticmethod
    def write(path: Path, x: Array) -> "_Files":
        try:
            for shard in x.addressable_shards:
                np.asarray(shard.data).tofile(f"{path}.{shard.device.id}")
        except OSError as failed:
            raise InputError(f"{path} can't be written ({failed.strerror or failed}).") from None
        return _Files(path, jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding))

    def read(self) -> Array:
        sharding = self.array.sharding
        assert sharding is not None
        shape = sharding.shard_shape(self.array.shape)
        parts = [
            jax.device_put(np.fromfile(f"{self.path}.{device.id}", self.array.dtype).reshape(shape), device)
            for device in sharding.addressable_devices
        ]
        return jax.make_array_from_single_device_arrays(self.array.shape, sharding, parts)
