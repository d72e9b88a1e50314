"""The members of each axis, which have a page each: docs/formats/NF4.md is that of `jquant.formats.NF4`."""

import importlib
import inspect
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import jquant
from jquant.composition import AXES
from jquant.formats import Codebook, Float, Int, UInt, tile_of
from jquant.parts import asked_of, brief
from jquant.plot import style

# Folder of jquant, and of docs/ -> the parts of `jquant.Method` that it holds.
FOLDERS = {
    "formats": ("format",),
    "ranges": ("range",),
    "rounding": ("rounding",),
    "transforms": ("transform", "rotation", "incoherence"),
}
# Members whose pages wait for rows that show them.
WAITING = frozenset({"VectorCodebook", "Additive", "ColumnCodebook", "AQLM", "LNQ"})
# What is drawn of formats that are no single grid.
EXAMPLES: dict[str, tuple[Any, ...]] = {
    "Int": (Int(4), Int(4, symmetric=True), Int(4, zero="float")),
    "UInt": (UInt(6, 8), UInt(4, 16)),
    "Codebook": (Codebook((-1.0, -0.4, -0.1, 0.0, 0.1, 0.4, 1.0)),),
    "Float": (Float(4, 3), Float(5, 2), Float(2, 3), Float(3, 2), Float(2, 1)),
}


def members(folder: str) -> dict[str, Any]:
    """The public members of an axis by name: classes, functions that return a format, and formats themselves."""
    module = importlib.import_module(f"jquant.{folder}")
    public = {name: getattr(module, name) for name in module.__all__} | getattr(module, "GGUF", {})
    contracts = [AXES[part][0] for part in FOLDERS[folder]]
    return {name: value for name, value in public.items() if any(keeps(value, contract) for contract in contracts)}


def keeps(value: Any, contract: type) -> bool:
    """Whether a class, what a function returns, or an object has all that a contract asks for."""
    kind = inspect.signature(value).return_annotation if inspect.isfunction(value) else value
    kind = kind if isinstance(kind, type) else type(kind)
    return is_dataclass(kind) and {*asked_of(contract)} <= {*dir(kind), *(field.name for field in fields(kind))}


def reference(folder: str, name: str) -> str:
    """A directive that documents a member from its docstring and signature; of a mere value, the value."""
    value = members(folder)[name]
    path = name if name in jquant.__all__ else f"{folder}.{name}"
    if not callable(value):
        path = f'GGUF["{name}"]' if value in jquant.GGUF.values() else path
        return f"```python\njquant.{path} == {brief(value)}\n```"
    directive = "autoclass" if isinstance(value, type) else "autofunction"
    members_too = "   :no-members:\n" if isinstance(value, type) else ""
    return f"```{{eval-rst}}\n.. {directive}:: jquant.{path}\n{members_too}```"


def levels(format: Any) -> np.ndarray:
    """The values that codes stand for in a group whose weights lie between −1 and 1, ascending."""
    grid, tile = format.grid(jnp.float32(-1), jnp.float32(1)), tile_of(format)
    if tile != (1, 1):  # of one weight in many codes
        random = np.random.default_rng(0).integers(0, 2**format.bits, (64 * tile[0], 16 * tile[1]), np.uint8)
        return np.unique(format.decode(jnp.asarray(random), *grid))
    every = format.decode(jnp.arange(2**format.bits, dtype=jnp.uint8), *grid)
    # Patterns that no weight gets, such as NaNs, take another level's code.
    return np.unique(format.decode(format.encode(every, *grid), *grid))


@style.styled
def draw_levels(name: str, path: Path) -> None:
    """Writes a drawing of a format's levels."""
    value = members("formats")[name]
    formats = EXAMPLES.get(name) or (value() if callable(value) else value,)
    figure = Figure(figsize=(4.2, 0.5 + 0.5 * len(formats)), layout="constrained")  # 8 points can be read on a phone
    axes = figure.add_subplot()
    axes.axvspan(-1, 1, color="0.95", lw=0)
    for place, format in enumerate(formats):
        values = levels(format)
        axes.vlines(values, -place, -place + 0.55, color="#0072b2", lw=1.2 if len(values) <= 64 else 0.3)
        label = f"{brief(format)}, " * (len(formats) > 1) + f"{len(values)} levels"
        axes.text(0.01, -place + 0.6, label, transform=axes.get_yaxis_transform(), va="bottom")
    axes.set(yticks=[], ylim=(0.9 - len(formats), 1))
    axes.set_xlabel("values, where a group's weights lie from −1 to 1 (shaded)")
    axes.spines.left.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
