"""Which product multiplies a packed weight on the device where it lies."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from jquant.activations import Activation
from jquant.errors import InputError
from jquant.formats import Int
from jquant.kernels.blocked import blocked, by_columns
from jquant.kernels.cpu.attention import WIDEST, attend
from jquant.kernels.cpu.build import target
from jquant.kernels.cpu.tiled import tiled
from jquant.kernels.packed import PackedMatrix

_KIND = ContextVar("products", default="fast")


@contextmanager
def products(kind: str) -> Iterator[None]:
    """What `prepared` chooses inside: "fast" kernels where there are some, or "plain" XLA."""
    if kind not in ("fast", "plain"):
        raise InputError(f'Products are "fast" or "plain", not {kind!r}.')
    token = _KIND.set(kind)
    try:
        yield
    finally:
        _KIND.reset(token)


def in_use() -> str:
    """What multiplies packed weights where there is a kernel: a name with a digest of its code, or "plain"."""
    if _KIND.get() != "fast":
        return "plain"
    return {"cpu": target(), "tpu": "pallas", "gpu": "pallas"}.get(jax.devices()[0].platform) or "plain"


def kernel(
    w: PackedMatrix, activation: Activation | None, input_scale: Array | None, mesh: Mesh | None = None
) -> Any | None:
    """The weight as its device's kernel reads it; None where XLA multiplies the packed bytes.

    On one CPU that is the C++ product, on one TPU or GPU the Pallas product, each for the formats that it takes. `mesh`
    says over which devices the weight is cut by columns; on TPUs each then multiplies its own.
    """
    if w.levels is not None:  # kernels hold the table of the format
        return None
    if mesh is not None:
        return by_columns(w, activation, input_scale, mesh) if _KIND.get() == "fast" else None
    platform = _alone_on(w.codes)
    if platform == "cpu":
        return tiled(w, activation, input_scale)
    # On an H200 the kernel's look-up takes as long as XLA's, so there only whole numbers have one.
    found = platform == "tpu" or (platform == "gpu" and isinstance(w.format, Int))
    return blocked(w, activation, input_scale, str(platform)) if found else None


def attention(like: Array, head_dim: int) -> Callable[..., Array] | None:
    """The attention of one query a head where `like` lies, in its dtype; None where XLA's is taken."""
    fits = like.dtype == jnp.float32 and head_dim % WIDEST == 0
    return attend if fits and _alone_on(like) == "cpu" and target() else None


def _alone_on(array: Array) -> str | None:
    """The platform of the only device that holds an array; None if there are several, or products are plain."""
    devices = array.devices()
    return next(iter(devices)).platform if _KIND.get() == "fast" and len(devices) == 1 else None
