"""What every part of a method must be: an instance that its axis can use, and a value that never changes."""

from dataclasses import fields, is_dataclass
from typing import Any

from jquant.errors import InputError

# The statistics that a part of each contract can be given, so what its `needs` may name.
NEEDS = {
    "Range": frozenset({"gram", "clips"}),
    "Rounding": frozenset({"gram", "held_out"}),
    "Transform": frozenset({"gram", "abs_mean", "abs_max"}),
}


def check_part(place: str, part: Any, contract: type) -> None:
    """Raises InputError unless a part keeps its contract.

    Args:
      place: what an error calls it, e.g. "Method's rounding".
      part: what the user gave.
      contract: a run-time checkable Protocol, or a class.
    """
    kind = contract.__name__
    if isinstance(part, type):
        raise InputError(f"{place} is the class {part.__name__}, not an instance: write {part.__name__}().")
    if not isinstance(part, contract):
        asked = (name for name in vars(contract) if name == "__call__" or not name.startswith("_"))
        missing = ", ".join(name for name in asked if not hasattr(part, name))
        raise InputError(f"{place} is {shown(part)}, which is no {kind}: it lacks {missing}.")
    if not _is_value(part):
        raise InputError(f"{place} is {shown(part)}, which may change: make its class a frozen dataclass that hashes.")
    if kind not in NEEDS:
        return
    if not isinstance(part.needs, frozenset):
        raise InputError(f"{place} is {shown(part)}: its needs are a frozenset of names, not {shown(part.needs)}.")
    if wrong := part.needs - NEEDS[kind]:
        names, known = (", ".join(sorted(map(str, some))) for some in (wrong, NEEDS[kind]))
        raise InputError(f"{place} is {shown(part)}: it needs {names}, but a {kind} can be given {known}.")


def shown(value: Any) -> str:
    """The start of a value's repr, on one line."""
    whole = " ".join(repr(value).split())
    return whole if len(whole) <= 80 else f"{whole[:79]}…"


def brief(part: Any) -> str:
    """A part in few words: what it has other than by default; of a long tuple how many there are."""
    if isinstance(part, tuple) and len(part) > 4:
        return f"<{len(part)} values>"
    if not is_dataclass(part) or isinstance(part, type):
        return shown(part)
    values = {field.name: getattr(part, field.name) for field in fields(part) if field.repr}
    usual = {field.name: field.default for field in fields(part)}
    given = ", ".join(f"{name}={brief(value)}" for name, value in values.items() if value != usual[name])
    return f"{type(part).__name__}({given})"


def _is_value(part: Any) -> bool:
    """Whether equal parts hash alike: compiled programs are found by hash, and a part that changed would find the old.

    A class that says nothing of it compares by identity, and may change all the same.
    """
    facts = getattr(type(part), "__dataclass_params__", None)
    fixed = facts.frozen if facts else type(part).__hash__ is not object.__hash__
    try:
        return fixed and isinstance(hash(part), int)
    except TypeError:
        return False
