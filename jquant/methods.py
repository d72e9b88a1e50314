"""The table of named methods: each is a point in format × range × rounding × transform.

A new method is a row here. `method("gptq-3", group=32)` sets the options that a row leaves open. Any other method is
written out: `Method(Codebook(my_levels), rounding=GPTQ())` is GPTQ on one's own codebook. Rules give weights different
methods: `[(r"attention\\.v", "q6_k"), (r"mlp", "gptq-3")]`.
"""

import difflib
import re
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, TypeVar

from jquant.activations import Activation
from jquant.composition import Method, Tuning
from jquant.errors import InputError
from jquant.formats import (
    E8P,
    FP4,
    FP8_E4M3,
    FP8_E5M2,
    GGUF,
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    NF3,
    NF4,
    NVFP4,
    Additive,
    ColumnCodebook,
    Format,
    Group,
    Int,
    Trellis,
    double_quantized,
)
from jquant.parts import shown
from jquant.ranges import RMS, LlamaCpp, LossSearch, MinMax, Percentile, Search
from jquant.rounding import AQLM, GPTQ, LNQ, Refit, Stochastic
from jquant.transforms import AWQ, Incoherence, SmoothQuant


def _fixed(format: Format, **choices) -> Callable[[int, Group, bool], Method]:
    """A row without open options."""
    return lambda bits, group, symmetric: Method(format, **choices)


_INT8 = Int(8, "channel", symmetric=True)
_INT8_INT8 = Int(8, "channel", symmetric=True, scale="float32")  # scales as in bitsandbytes
_INT8_INPUTS = Int(8, 32, symmetric=True, scale="float32", full_range=False)
_INT8_TENSOR = Int(8, "tensor", symmetric=True, scale="float32")

METHODS: dict[str, Callable[[int, Group, bool], Method]] = {
    "int8": _fixed(_INT8),
    "nf4": _fixed(NF4()),
    "rtn": lambda bits, group, symmetric: Method(Int(bits, group, symmetric)),
    "gptq": lambda bits, group, symmetric: Method(Int(bits, group, symmetric), Search("diagonal"), GPTQ()),
    "gptq_plain": lambda bits, group, symmetric: Method(
        Int(bits, group, symmetric), MinMax(), GPTQ(order="rows"), token_weights="uniform"
    ),
    # 21 steps take 5 % longer, with 0.5 % less KL and 0.05 % more perplexity (noblank, float inputs).
    "awq": lambda bits, group, symmetric: Method(
        Int(bits, group, symmetric), Search("gram", steps=11), transform=AWQ()
    ),
    # Roundings.
    "stochastic": lambda bits, group, symmetric: Method(Int(bits, group, symmetric), rounding=Stochastic()),
    "gptq_refit": lambda bits, group, symmetric: Method(Int(bits, group, symmetric), Search("diagonal"), Refit(GPTQ())),
    "gptq_loss": lambda bits, group, symmetric: Method(
        Int(bits, group, symmetric), Search("diagonal"), GPTQ(), token_weights="loss"
    ),
    # At this rate, a step of Adam moves the outermost code by 1/64 of a unit at every width.
    "gptq_tuned": lambda bits, group, symmetric: Method(
        Int(bits, group, symmetric), Search("diagonal"), GPTQ(), tuning=(Tuning(rate=2.0 ** (-5 - bits)),)
    ),
    "learned": lambda bits, group, symmetric: Method(
        Int(bits, group, symmetric), Search("diagonal"), GPTQ(), tuning=(Tuning(rate=2.0 ** (-5 - bits), text=0.15),)
    ),
    # Weights need many small steps: with few large ones, all codes with a steady gradient jump at once.
    "qat": lambda bits, group, symmetric: Method(
        Int(bits, group, symmetric),
        Search("diagonal"),
        GPTQ(),
        tuning=(Tuning(200, rate=2.0 ** (-5 - bits), weight_rate=0.01),),
    ),
    "efficient_qat": lambda bits, group, symmetric: Method(
        Int(bits, group, symmetric),
        Search("diagonal"),
        GPTQ(),
        tuning=(
            Tuning(128, rate=2.0 ** (-5 - bits), weight_rate=0.01, target="block"),
            Tuning(rate=2.0 ** (-5 - bits)),
        ),
    ),
    # Ranges.
    "rtn_percentile": lambda bits, group, symmetric: Method(Int(bits, group, symmetric), Percentile()),
    "rtn_mse": lambda bits, group, symmetric: Method(Int(bits, group, symmetric), Search("mse")),
    "rtn_diagonal": lambda bits, group, symmetric: Method(Int(bits, group, symmetric), Search("diagonal")),
    "rtn_gram": lambda bits, group, symmetric: Method(Int(bits, group, symmetric), Search("gram")),
    "rtn_loss": lambda bits, group, symmetric: Method(Int(bits, group, symmetric), LossSearch()),
    # Other integer grids.
    "rtn_symmetric": lambda bits, group, symmetric: Method(Int(bits, group, symmetric=True)),
    "rtn_float_zero": lambda bits, group, symmetric: Method(Int(bits, group, zero="float")),
    # Codes for several weights.
    "e8p": lambda bits, group, symmetric: Method(E8P(bits), RMS(), GPTQ(), incoherence=Incoherence()),
    "trellis": lambda bits, group, symmetric: Method(Trellis(bits), RMS(), GPTQ(), incoherence=Incoherence()),
    # Levels of each weight's own.
    "aqlm": lambda bits, group, symmetric: Method(Additive(bits), RMS(), AQLM()),
    "lnq": lambda bits, group, symmetric: Method(ColumnCodebook(bits), RMS(), LNQ()),
    # Codebooks.
    "nf4_double": _fixed(NF4(64, double_quantized())),
    "nf3": _fixed(NF3()),
    "fp4": _fixed(FP4()),
    # Floats and block floats.
    "fp8_e4m3": _fixed(FP8_E4M3()),
    "fp8_e4m3_tensor": _fixed(FP8_E4M3("tensor")),
    "fp8_e4m3_1x128": _fixed(FP8_E4M3(128)),
    "fp8_e4m3_128x128": _fixed(FP8_E4M3((128, 128))),
    "fp8_e5m2": _fixed(FP8_E5M2()),
    "mxfp8_e4m3": _fixed(MXFP8_E4M3),
    "mxfp8_e5m2": _fixed(MXFP8_E5M2),
    "mxfp6_e2m3": _fixed(MXFP6_E2M3),
    "mxfp6_e3m2": _fixed(MXFP6_E3M2),
    "mxfp4": _fixed(MXFP4),
    "nvfp4": _fixed(NVFP4),
    # llama.cpp's types with its own search.
    **{name.lower(): _fixed(format, range=LlamaCpp()) for name, format in GGUF.items()},
    # Weights and activations. Blocks of 32 inputs are llama.cpp's.
    "gptq_a8": lambda bits, group, symmetric: Method(
        Int(bits, group, symmetric), Search("diagonal"), GPTQ(), activation=Activation(_INT8_INPUTS)
    ),
    "llm_int8": _fixed(_INT8_INT8, activation=Activation(outliers=6.0)),
    "smoothquant": _fixed(_INT8_INT8, transform=SmoothQuant(), activation=Activation()),
    "w8a8": _fixed(_INT8_INT8, activation=Activation()),
    "w8a8_static": _fixed(_INT8_INT8, activation=Activation(_INT8_TENSOR, static=True)),
}

# Rules that give weights different methods: (regex, method) pairs; the first regex found in a weight's name decides.
Rules = Sequence[tuple[str, "str | Method | None"]]
Choice = TypeVar("Choice")  # what a rule decides, e.g. a method


# The options that a row may leave open: the default, and another value, by which `takes` tests whether a row uses it.
OPEN: dict[str, tuple[Any, Any]] = {"bits": (4, 3), "group": (64, 32), "symmetric": (False, True)}


def method(name: str, bits: int | None = None, group: Group | None = None, symmetric: bool | None = None) -> Method:
    """The named method; "gptq-3" is gptq at 3 bits.

    Args:
      name: a row of `METHODS`, with or without a width.
      bits: 2 to 8, 4 by default.
      group: weights that share a scale, 64 by default.
      symmetric: without zero points; False by default.

    Raises:
      InputError: no such method, with the three nearest names; an option that the method fixes, as nf4 and "gptq-3"
        fix bits.
    """
    given = _given(bits, group, symmetric)
    if fixed := given.keys() - leaves_open(name):
        raise _has_own(name, min(fixed), given)
    row, width = split_width(name, METHODS, _takes_bits)
    settings = {setting: usual for setting, (usual, _) in OPEN.items()} | given
    chosen: dict[str, Any] = settings if width is None else settings | {"bits": width}
    return METHODS[row](*chosen.values())


def leaves_open(name: str) -> set[str]:
    """Those of "bits", "group" and "symmetric" that a named method does not fix.

    Raises:
      InputError: no such method.
    """
    row, width = split_width(name, METHODS, _takes_bits)
    if row not in METHODS:
        raise unknown(name, METHODS)
    return {setting for setting in OPEN if takes(METHODS[row], setting)} - (set() if width is None else {"bits"})


def takes(row: Callable[..., Any], setting: str) -> bool:
    """Whether the result of a function of bits, group and symmetric depends on the argument `setting`."""
    usual = {key: value for key, (value, _) in OPEN.items()}
    result = row(*usual.values())
    try:
        return result != row(*(usual | {setting: OPEN[setting][1]}).values())
    except InputError:  # the method takes the setting, but not this value
        return True


def _takes_bits(row: str) -> bool:
    return row in METHODS and takes(METHODS[row], "bits")


def split_width(name: str, known: Container[str], takes_bits: Callable[[str], bool]) -> tuple[str, int | None]:
    """Splits "gptq-3" into "gptq" and 3 if gptq leaves its width open; other names are returned with None."""
    row, _, width = name.rpartition("-")
    if name not in known and width.isdecimal() and takes_bits(row):
        return row, int(width)
    return name, None


def completed(name: str, bits: int, group: Group, symmetric: bool) -> Method:
    """The named method with the settings that it leaves open; the others are ignored.

    Raises:
      InputError: no such method; a value that it does not take.
    """
    settings: dict[str, Any] = {"bits": bits, "group": group, "symmetric": symmetric}
    return method(name, **{setting: settings[setting] for setting in leaves_open(name)})


def unknown(name: str, known: Iterable[str]) -> InputError:
    """The error for an unknown name; it gives the three most similar names."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.0)
    return InputError(f"There is no method {name!r}; the nearest names are {', '.join(near)}.")


def _given(bits: Any, group: Any, symmetric: Any) -> dict[str, Any]:
    options = {"bits": bits, "group": group, "symmetric": symmetric}
    return {option: value for option, value in options.items() if value is not None}


def _has_own(name: str, option: str, given: dict[str, Any]) -> InputError:
    return InputError(f"{name} has its own {option}: leave {option}={given[option]!r} out.")


def complete(
    plan: Any, bits: int | None = None, group: Group | None = None, symmetric: bool | None = None
) -> Method | list[tuple[str, Method | None]]:
    """A method or rules with `Method`s in place of names; the options complete what the names leave open (`method`).

    Raises:
      InputError: an unknown name; something other than a method, its name, or rules (regex, method); an option
        that every method fixes.
    """
    given = _given(bits, group, symmetric)
    if isinstance(plan, str):
        return method(plan, **given)
    if not isinstance(plan, Sequence):
        if isinstance(plan, Method) and given:
            raise _has_own("A Method", min(given), given)
        return _named(plan, {})
    for rule in plan:
        if not isinstance(rule, list | tuple) or len(rule) != 2 or not isinstance(rule[0], str):
            raise InputError(f"A plan's rule is a pair (regex, method), not {shown(rule)}.")
    chosen = [(pattern, None if choice is None else _named(choice, given)) for pattern, choice in plan]
    taken = {setting for _, choice in plan if isinstance(choice, str) for setting in leaves_open(choice)}
    if fixed := given.keys() - taken:
        raise _has_own("Every method of the plan", min(fixed), given)
    return chosen


def _named(choice: Any, given: dict[str, Any]) -> Method:
    """A choice as a Method; a name is completed by the options that it leaves open."""
    if isinstance(choice, str):
        return method(choice, **{setting: value for setting, value in given.items() if setting in leaves_open(choice)})
    if not isinstance(choice, Method):
        raise InputError(f"{shown(choice)} is no method: give a name in METHODS, Method(format, …) or rules.")
    return choice


def assign(
    plan: "str | Method | Rules", weights: Iterable[str], outside: Iterable[str] = ()
) -> dict[str, Method | None]:
    """The method of each weight; None where it stays float.

    Args:
      plan: one method for all, or rules (regex, method): the first regex found in a weight's name decides. A method may
        be a name, or None for float. Weights that no rule matches stay float.
      weights: their names, e.g. "layers.3.attention.v.kernel".
      outside: weights that stay float unless a rule's regex is their whole name, or matches it as a whole, as
        "head|embedding" does.

    Raises:
      InputError: no method or plan (`complete`); a rule that is no regex, or decides for no weight.
    """
    rules, outside = complete(plan), list(outside)
    if isinstance(rules, Method):
        return dict.fromkeys(weights, rules) | dict.fromkeys(outside, None)
    named = [rule for rule in rules if any(_names(rule[0], name) for name in outside)]
    others = [rule for rule in rules if rule not in named]
    return decide(others, weights) | decide(named, outside, _names)


def _names(pattern: str, weight: str) -> bool:
    """Whether a regex is meant for this very weight: it matches its whole name, but is no pattern for everything."""
    try:
        return bool(re.fullmatch(pattern, weight)) and not re.fullmatch(pattern, "")
    except re.error:  # `decide` says so
        return False


def decide(
    rules: Iterable[tuple[str, Choice | None]],
    weights: Iterable[str],
    found: Callable[[str, str], Any] = re.search,
) -> dict[str, Choice | None]:
    """What the first regex found in a weight's name decides for it; None where none is. Errors as of `assign`."""
    chosen: dict[str, Choice | None] = {}
    names = left = list(weights)
    for pattern, choice in rules:
        try:
            matching = [weight for weight in left if found(pattern, weight)]
        except re.error as wrong:
            raise InputError(f"The plan's rule {pattern!r} is not a regular expression: {wrong}.") from None
        if not matching:
            raise InputError(f"The plan's rule {pattern!r} decides for no weight; they are called like {names[0]}.")
        chosen |= dict.fromkeys(matching, choice)
        left = [weight for weight in left if weight not in chosen]
    return chosen | dict.fromkeys(left, None)
