"""Parts and methods of a user's own, named by their import path: `methods=[my_rounding.HalfUp]`.

A path is that of a module on PYTHONPATH, or in the current folder, and a name in it. The name may stand for

- a part's class, which takes its place in plain rounding: `Method(Int(bits, group, symmetric), rounding=HalfUp())`,
- a `Method`, or rules that give weights different ones,
- a function of bits, group and symmetric that returns one of these, like the rows of `jquant.methods.METHODS`.

What a class is shows in its contract: a format has `encode`, a range is called as `(w, format)`, a rounding as
`(w, grid)`, a transform as `(weights, formats)`.
"""

import importlib
import inspect
from typing import Any

from jquant import InputError, Int, Method
from jquant.methods import Rules
from jquant.parts import CALLS


def is_import_path(name: str) -> bool:
    """Whether a method's name is a module's and a name in it, joined by points."""
    return "." in name and all(part.isidentifier() for part in name.split("."))


def own_method(path: str, bits: int, group: Any, symmetric: bool) -> Method | Rules:
    """The method that an import path names.

    Raises:
      InputError: there is no such module or name, or it is none of what this module's head lists.
    """
    named = imported(path)
    if isinstance(named, Method | list | tuple):
        return named
    if isinstance(named, type):
        axis, part = axis_of(path, named), built(path, named, {})
        return Method(part) if axis == "format" else Method(Int(bits, group, symmetric), **{axis: part})
    if not callable(named):
        raise InputError(f"{path!r} is neither a part's class, a Method, nor a function that returns one.")
    made = built(path, named, {"bits": bits, "group": group, "symmetric": symmetric})
    if not isinstance(made, Method | list | tuple):
        raise InputError(f"{path!r} returned {made!r:.80}, which is no jquant.Method.")
    return made


def own_part(path: str, arguments: dict[str, Any]) -> Any:
    """An instance of the part's class that an import path names.

    Raises:
      InputError: there is no such class, it is no part's, or it doesn't take the arguments.
    """
    named = imported(path)
    if not isinstance(named, type):
        raise InputError(f"{path!r} is no class of a format, range, rounding or transform.")
    axis_of(path, named)
    return built(path, named, arguments)


def imported(path: str) -> Any:
    """What an import path stands for.

    Raises:
      InputError: the module can't be imported, or has no such name.
    """
    module, _, name = path.rpartition(".")
    try:
        found = importlib.import_module(module)
    except Exception as wrong:  # importing runs the user's code, which may raise anything
        reason = " ".join(str(wrong).split()) or type(wrong).__name__
        raise InputError(f"{path!r}: {module} can't be imported ({reason}); is its folder on PYTHONPATH?") from None
    if not hasattr(found, name):
        raise InputError(f"{path!r}: {getattr(found, '__file__', module)} defines no {name}.")
    return getattr(found, name)


def axis_of(path: str, kind: type) -> str:
    """The axis to which a class belongs, before it is instantiated.

    Raises:
      InputError: it keeps no axis' contract.
    """
    if all(callable(getattr(kind, name, None)) for name in ("grid", "encode", "decode")):
        return "format"
    if hasattr(kind, "needs") and "__call__" in dir(kind):
        positional = tuple(inspect.signature(kind.__call__).parameters)[1:3]
        for contract, call in CALLS.items():
            if positional == call:
                return contract.lower()
    calls = ", ".join(f"{contract.lower()}({', '.join(call)})" for contract, call in CALLS.items())
    raise InputError(
        f"{path!r} is no part: a format has grid, encode and decode, others have needs and are called as {calls}."
    )


def built(path: str, make: Any, arguments: dict[str, Any]) -> Any:
    """What a user's class or function returns; a TypeError or ValueError of it becomes a sentence."""
    try:
        return make(**arguments)
    except (TypeError, ValueError) as wrong:
        raise InputError(f"{path!r}: {wrong}") from None
