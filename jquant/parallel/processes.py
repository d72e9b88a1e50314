"""Work of several processes together, and work of process 0 alone.

Every process runs the same program. They compute arrays on a mesh of all devices in step. Process 0 writes files; all
processes read them from a shared file system. With one process these functions do nothing special.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jquant.errors import InputError


def join(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Joins the devices of all processes; must be called before any computation.

    Args:
      coordinator: "host:port" of process 0. Without the three arguments, `jax.distributed.initialize` finds them
        under SLURM, OpenMPI, MPI, Kubernetes or a Cloud TPU pod.
      count: processes in all.
      index: this process's number, from 0.

    Raises:
      InputError: some of the three are missing, none of those environments is found, or other processes don't answer.
    """
    arguments = (coordinator, count, index)
    if any(value is None for value in arguments) and any(value is not None for value in arguments):
        raise InputError(f"Processes meet by coordinator, count and index, all three or none, not {arguments}.")
    if count is not None and index is not None and not 0 <= index < count:
        raise InputError(f"Processes are numbered from 0 to count - 1: there is no {index} of {count}.")
    try:
        jax.distributed.initialize(coordinator, count, index)
    except (ValueError, RuntimeError) as wrong:
        raise InputError(f"The processes can't meet ({str(wrong).splitlines()[0]}).") from None


def gather(tree: Any) -> Any:
    """A tree's arrays as complete NumPy arrays in every process."""

    def local(array: Any) -> np.ndarray:
        if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
            return multihost_utils.process_allgather(array, tiled=True)
        return np.asarray(array)

    return jax.tree.map(local, tree)


def on_first(work: Callable[[], None]) -> None:
    """Process 0 does the work; the others wait for it.

    Raises:
      InputError: what `work` raises; the other processes raise one that points to process 0.
    """
    problem = None
    if jax.process_index() == 0:
        try:
            work()
        except Exception as wrong:  # the others wait, whatever it is
            problem = wrong
    failed = as_first(problem is not None)
    if problem:
        raise problem
    if failed:
        raise InputError("Process 0 could not go on: it says why.")


def as_first(value: Any) -> Any:
    """Process 0's value in every process, as a NumPy array; a number or a list of numbers."""
    value = np.asarray(value)
    return multihost_utils.broadcast_one_to_all(value) if jax.process_count() > 1 else value
