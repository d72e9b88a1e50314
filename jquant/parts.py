"""Checks that a part of a method keeps its contract and can't change."""

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from jquant.errors import InputError
from jquant.stats import BUILT_IN, Statistic

# The names that `needs` may hold in each contract, beside statistics of one's own.
NEEDS = {
    "Range": frozenset({"gram", "clips"}),
    "Rounding": frozenset({"gram", "held_out", "output_gram"}),
    "Transform": frozenset({"gram", "abs_mean", "abs_max"}),
}
# The positional arguments in each contract's call, for error messages.
CALLS = {"Range": ("w", "format"), "Rounding": ("w", "grid"), "Transform": ("weights", "formats")}


def check_part(place: str, part: Any, contract: type) -> None:
    """Raises InputError unless a part keeps its contract.

    Args:
      place: its name in error messages, e.g. "Method's rounding".
      part: what the user gave.
      contract: a run-time checkable Protocol, or a class.
    """
    kind = contract.__name__
    if isinstance(part, type):
        raise InputError(f"{place} is the class {part.__name__}, not an instance: write {part.__name__}().")
    if not isinstance(part, contract):
        missing = ", ".join(name for name in asked_of(contract) if not hasattr(part, name))
        raise InputError(f"{place} is {shown(part)}, which is no {kind}: it lacks {missing}.")
    if not _is_value(part):
        raise InputError(f"{place} is {shown(part)}, which may change: make its class a frozen dataclass that hashes.")
    if kind in NEEDS:
        _check_needs(place, part, kind)
        _check_call(place, part, CALLS[kind])


def asked_of(contract: type) -> list[str]:
    """The attributes that a contract asks of a part."""
    return [name for name in vars(contract) if name == "__call__" or not name.startswith("_")]


def statistics_of(*parts: Any) -> dict[str, type]:
    """The statistics that these parts need, by name: jquant's and one's own.

    Raises:
      InputError: two statistics with one name.
    """
    by_name: dict[str, type] = {}
    for part in parts:
        for need in () if part is None else part.needs:
            statistic = BUILT_IN.get(need) if isinstance(need, str) else need
            if statistic is not None and by_name.setdefault(_name(need), statistic) is not statistic:
                raise InputError(f"{shown(part)} needs another statistic {_name(need)!r} than the parts beside it.")
    return by_name


def needs_of_parts(*parts: Any) -> frozenset[str]:
    """The names of all that these parts need; parts may be None."""
    return frozenset(_name(need) for part in parts if part is not None for need in part.needs)


def given(part: Any, seen: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a part: the values that it needs, by name.

    Args:
      part: a range, rounding or transform.
      seen: the values at hand, by name.

    Raises:
      InputError: a value that it needs is missing.
    """
    for name in sorted(needs_of_parts(part) - seen.keys()):
        raise InputError(f"{shown(part)} needs {name}, which comes from calibration text: give it some.")
    return {name: seen[name] for name in needs_of_parts(part)}


def shown(value: Any) -> str:
    """The start of a value's repr, on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:79]}…"


def counted(number: int, noun: str) -> str:
    """ "1 window", "2 windows"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _name(need: Any) -> str:
    return need if isinstance(need, str) else need.name


def _check_needs(place: str, part: Any, kind: str) -> None:
    if not isinstance(part.needs, frozenset):
        raise InputError(f"{place} is {shown(part)}: its needs are a frozenset of names, not {shown(part.needs)}.")
    for need in sorted(part.needs, key=str):
        if isinstance(need, type):
            if missing := [name for name in asked_of(Statistic) if not hasattr(need, name)]:
                raise InputError(f"{place} needs the statistic {need.__name__}, which lacks {', '.join(missing)}.")
            if BUILT_IN.get(need.name, need) is not need or need.name == "clips":
                raise InputError(f"{place} needs the statistic {need.__name__}, whose name {need.name!r} is taken.")
        elif need not in NEEDS[kind]:
            known = ", ".join(sorted(NEEDS[kind]))
            raise InputError(f"{place} is {shown(part)}: it needs {need}, but a {kind} can be given {known}.")


def _check_call(place: str, part: Any, positional: tuple[str, ...]) -> None:
    """Refuses a part that can't be called before any weight is compiled."""
    names = sorted(needs_of_parts(part))
    try:
        inspect.signature(part).bind(*positional, **dict.fromkeys(names))
    except TypeError as wrong:
        call = ", ".join([*positional, *(f"{name}=…" for name in names)])
        raise InputError(f"{place} is {shown(part)}, which can't be called as ({call}): {wrong}.") from None


# Names that `brief` gives: of parts, and of a codebook's levels. The formats enter theirs (`jquant.formats`).
NAMED: dict[Any, str] = {}
LEVELS: dict[Any, str] = {}


def brief(part: Any) -> str:
    """A part in short: its name if it has one, or its fields that differ from their defaults; of a long tuple the
    length."""
    if isinstance(part, tuple) and len(part) > 4:
        return f"<{len(part)} values>"
    if not is_dataclass(part) or isinstance(part, type):
        return shown(part)
    if _is_value(part) and part in NAMED:
        return NAMED[part]
    values = {field.name: getattr(part, field.name) for field in fields(part) if field.repr}
    usual = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(part)
    }
    told = {name: f"{name}={brief(value)}" for name, value in values.items() if value != usual[name]}
    called = type(part).__name__
    if "group" in values and isinstance(levels := values.get("levels"), tuple) and levels in LEVELS:
        called = LEVELS[levels]
        told = {name: said for name, said in told.items() if name not in ("levels", "group")}
        told = {"group": repr(values["group"])} | told
    return f"{called}({', '.join(told.values())})"


def _is_value(part: Any) -> bool:
    """Whether a part can't change and equal parts have one hash.

    Compiled programs are looked up by hash, so a part that changed would run its old program. A class without a hash of
    its own compares by identity and may change.
    """
    facts = getattr(type(part), "__dataclass_params__", None)
    fixed = facts.frozen if facts else type(part).__hash__ is not object.__hash__
    try:
        return fixed and isinstance(hash(part), int)
    except TypeError:
        return False
