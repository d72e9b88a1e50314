"""What several processes do together, and what only the first of them does.

Every process runs the same program. Arrays on a mesh of all their devices are computed in step; files are written by
process 0 alone, and read by all of them from a file system that they share. With one process all of this does nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jquant.errors import InputError


def join(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Makes the devices of all processes one machine; before anything else is computed.

    Args:
      coordinator: "host:port" of process 0. Without the three, they come from SLURM, OpenMPI, MPI, Kubernetes or a
        Cloud TPU pod, as `jax.distributed.initialize` finds them.
      count: processes in all.
      index: this process's number, from 0.

    Raises:
      InputError: some of the three are missing, none of those environments is there, or the others don't answer.
    """
    given = (coordinator, count, index)
    if any(one is None for one in given) and any(one is not None for one in given):
        raise InputError(f"Processes meet by coordinator, count and index, all three or none, not {given}.")
    if count is not None and index is not None and not 0 <= index < count:
        raise InputError(f"Processes are numbered from 0 to count - 1: there is no {index} of {count}.")
    try:
        jax.distributed.initialize(coordinator, count, index)
    except (ValueError, RuntimeError) as wrong:
        raise InputError(f"The processes can't meet ({str(wrong).splitlines()[0]}).") from None


def gather(tree: Any) -> Any:
    """A tree's arrays as NumPy arrays, whole in every process."""

    def whole(array: Any) -> np.ndarray:
        if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
            return multihost_utils.process_allgather(array, tiled=True)
        return np.asarray(array)

    return jax.tree.map(whole, tree)


def on_first(work: Callable[[], None]) -> None:
    """Has process 0 do something while the others wait for it.

    Raises:
      InputError: of `work`; the other processes raise one that points to process 0.
    """
    problem = None
    if jax.process_index() == 0:
        try:
            work()
        except InputError as wrong:
            problem = wrong
    failed = as_first(problem is not None)
    if problem:
        raise problem
    if failed:
        raise InputError("Process 0 could not go on: it says why.")


def as_first(value: Any) -> Any:
    """Process 0's value, in every process: a number or a list of them, as a NumPy array."""
    value = np.asarray(value)
    return multihost_utils.broadcast_one_to_all(value) if jax.process_count() > 1 else value
