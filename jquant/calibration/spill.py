"""Where calibration windows wait for their next block: on the host, and past a limit on disk."""

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
    """What becomes of windows that are more than the host shall hold.

    Attributes:
      folder: where their files go, one a batch and device; it must exist, and is the caller's to remove.
      limit: bytes that stay in memory.
    """

    folder: Path
    limit: float


class Waiting:
    """Batches of the residual stream, each taken out, moved on by a block, and put back in its place.

    On an accelerator they wait in the host's memory, so that its own holds one batch; every process keeps the parts
    that its devices work on. They stay in the dtype in which the model computes.

    Args:
      batches: as they lie on the devices.
      name: of this stream's files.
      spill: where batches go that are over the limit; all stay in memory without it.

    Raises:
      InputError: the disk is full or can't be written; of every later assignment too.
    """

    def __init__(self, batches: Iterable[Array], name: str = "", spill: Spill | None = None):
        self._name, self._spill = name, spill
        self._places: list[Any] = []
        left = spill.limit if spill else math.inf
        for x in batches:
            left -= sum(shard.data.nbytes for shard in x.addressable_shards)
            self._places.append(None if left >= 0 else x.sharding)
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
    """The array in another of its devices' memories; a CPU's are all the same."""
    if next(iter(x.sharding.device_set)).platform == "cpu":
        return x
    return jax.device_put(x, x.sharding.with_memory_kind(memory))


@dataclass(frozen=True)
class _Files:
    """An array on disk, what this process's devices hold of it a file each."""

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
