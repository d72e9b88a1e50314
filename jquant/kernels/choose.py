"""Which product multiplies a packed weight on the device where it lies."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
from jax import Array

from jquant.activations import Activation
from jquant.errors import InputError
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
    on_cpu = jax.devices()[0].platform == "cpu"
    return (target() if on_cpu and _KIND.get() == "fast" else None) or "plain"


def prepared(w: PackedMatrix, activation: Activation | None, input_scale: Array | None) -> Any | None:
    """The weight as its device's kernel reads it; None where XLA multiplies the packed bytes.

    On one CPU that is the C++ product for the formats that it takes.
    """
    devices = w.codes.devices()
    if _KIND.get() == "plain" or len(devices) != 1 or next(iter(devices)).platform != "cpu":
        return None
    return tiled(w, activation, input_scale)
