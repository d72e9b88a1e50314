"""Parts and methods of a user's own, named by their import path: `methods=[my_rounding.HalfUp]`.

A path is a module on PYTHONPATH or in the current folder, and a name in it. The name may be that of

- a part's class, for a method with defaults elsewhere: `Method(Int(bits, group, symmetric), rounding=HalfUp())`,
- a `Method`, or rules that give weights different methods,
- a function of bits, group and symmetric that returns one of these, like the rows of `jquant.methods.METHODS`.

A class's kind follows from its contract: a format has `encode`, a range is called as `(w, format)`, a rounding as
`(w, grid)`, a transform as `(weights, formats)`.
"""

import importlib
import inspect
from typing import Any

from jquant import InputError, Int, Method
from jquant.methods import Rules
from jquant.parts import CALLS


def is_import_path(name: str) -> bool:
    """Whether a method's name is a module and a name in it, joined by points."""
    return "." in name and all(part.isidentifier() for part in name.split("."))


def own_method(path: str, bits: int, group: Any, symmetric: bool) -> Method | Rules:
    """The method that an import path names.

    Raises:
      InputError: there is no such module or name, or it is none of the kinds in this module's docstring.
    """
    named = imported(path)
    if isinstance(named, Method | list | tuple):
        return named
    if isinstance(named, type):
        axis, part = axis_of(path, named), built(path, named, {})
        return Method(part) if axis == "format" else Method(Int(bits, group, symmetric), **{axis: part})
    if not callable(named):
        raise InputError(f"{path!r} is neither a part's class, a Method, nor a function that returns one.")
    result = built(path, named, {"bits": bits, "group": group, "symmetric": symmetric})
    if not isinstance(result, Method | list | tuple):
        raise InputError(f"{path!r} returned {result!r:.80}, which is no jquant.Method.")
    return result


def own_part(path: str, arguments: dict[str, Any]) -> Any:
    """An instance of the part's class that an import path names.

    Raises:
      InputError: there is no such class, it is not a part's, or it doesn't take the arguments.
    """
    named = imported(path)
    if not isinstance(named, type):
        raise InputError(f"{path!r} is no class of a format, range, rounding or transform.")
    axis_of(path, named)
    return built(path, named, arguments)


def imported(path: str) -> Any:
    """The object that an import path names.

    Raises:
      InputError: the module can't be imported, or has no such name.
    """
    module, _, name = path.rpartition(".")
    try:
        loaded = importlib.import_module(module)
    except Exception as wrong:  # importing runs the user's code, which may raise anything
        reason = " ".join(str(wrong).split()) or type(wrong).__name__
        raise InputError(f"{path!r}: {module} can't be imported ({reason}); is its folder on PYTHONPATH?") from None
    if not hasattr(loaded, name):
        raise InputError(f"{path!r}: {getattr(loaded, '__file__', module)} defines no {name}.")
    return getattr(loaded, name)


def axis_of(path: str, kind: type) -> str:
    """The axis of a part's class.

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
    """The result of a user's class or function; its TypeError or ValueError becomes an InputError."""
    try:
        return make(**arguments)
    except (TypeError, ValueError) as wrong:
        raise InputError(f"{path!r}: {wrong}") from None
