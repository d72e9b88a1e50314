"""Methods by name: rows of `jquant.methods.METHODS`, or methods and rules in configs/compositions/*.yaml.

A file holds a method or rules. A method's parts are named as in `jquant` (`_target_: jquant.NF4`; all: PARTS), or by
the import path of a user's own class (`experiments.own_parts`). A rule is a regular expression over weights' names
(`layers.3.attention.v.kernel`) and the name of a row of METHODS. The first expression found in a
name decides; a rule without a method leaves its weights float. `${bits}`, `${group}` and `${symmetric}` are the
settings, so one file serves every width. A path that ends in .yaml is a file of one's own.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import jquant
from experiments.own_parts import is_import_path, own_method, own_part
from jquant import METHODS, Activation, Hadamard, InputError, Method
from jquant.io.hub import load_config
from jquant.methods import Rules, completed, split_width, takes, unknown

FOLDER = Path(__file__).parents[1] / "configs" / "compositions"
# What a file may name: the parts of methods. Not jquant's other functions, which read files and run models.
PARTS = (
    *(
        "Int",
        "Codebook",
        "Float",
        "NF4",
        "NF3",
        "FP4",
        "SEQ",
        "FP8_E4M3",
        "FP8_E5M2",
        "MXFP4",
        "NVFP4",
        "double_quantized",
        "E8P",
        "Trellis",
        "VectorCodebook",
        "Additive",
        "ColumnCodebook",
    ),
    *("MinMax", "Percentile", "Search", "LossSearch", "LlamaCpp", "RMS"),
    *("Nearest", "Stochastic", "GPTQ", "Refit", "TwoSided", "AQLM", "LNQ"),
    *("AWQ", "SmoothQuant", "Hadamard", "Incoherence", "Activation", "LossGradient", "Tuning", "Method"),
)
# Arguments of parts that are parts.
AXES = ("format", "range", "rounding", "transform", "rotation", "incoherence", "activation")


def find_method(name: str, bits: int, group: Any, symmetric: bool) -> "Method | Rules":
    """The method or rules of that name; the settings complete what it leaves open.

    "gptq-3" is gptq at 3 bits; every row and every file that takes bits has such names.

    Raises:
      InputError: no such name; a file that names something other than parts, or refers to something other than the
        settings.
    """
    own = name.endswith(".yaml")
    name, width = (name, None) if own else split_width(name, _known(), takes_bits)
    settings = {"bits": bits if width is None else width, "group": group, "symmetric": symmetric}
    if name in METHODS:
        return completed(name, **settings)
    if is_import_path(name) and not own:
        return own_method(name, **settings)
    if own and not Path(name).is_file():
        raise InputError(f"{name} is not a file.")
    if not own and name not in _known():
        raise unknown(name, _known())
    config = _read(name, settings)
    if "rules" in config:
        return _plan(config, name, settings)
    composed = _compose(config, name)
    if not isinstance(composed, Method):
        raise InputError(f"{_file(name)} is neither a jquant.Method nor rules.")
    return composed


def takes_bits(name: str) -> bool:
    """Whether a row of METHODS, a file, or a user's own method leaves the width to the settings."""
    return (name in _known() or is_import_path(name)) and leaves_open(name, "bits")


def leaves_open(name: str, setting: str) -> bool:
    """Whether the method of that name, with or without a width, takes `bits`, `group` or `symmetric` from the settings.

    Raises:
      InputError: as of `find_method`.
    """
    return takes(partial(find_method, name), setting)


def needs_of(plan: "Method | Rules | None") -> frozenset[str]:
    """What calibration must provide for all of its methods (`Method.needs`)."""
    methods = [method for _, method in plan] if isinstance(plan, Sequence) else [plan]
    return frozenset[str]().union(*(method.needs for method in methods if isinstance(method, Method)))


def rotation_of(plan: "Method | Rules") -> Hadamard | None:
    """How the decoder is rotated first (`Method.rotation`)."""
    methods = [method for _, method in plan] if isinstance(plan, Sequence) else [plan]
    return next((method.rotation for method in methods if isinstance(method, Method)), None)


def needs_calibration(plan: "Method | Rules") -> bool:
    """Whether any of its methods looks at activations."""
    return bool(needs_of(plan))


def _known() -> list[str]:
    return [*METHODS, *sorted(path.stem for path in FOLDER.glob("*.yaml"))]


def _file(name: str) -> str:
    return name if name.endswith(".yaml") else f"configs/compositions/{name}.yaml"


def _read(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The file, with the settings' values in place of their names."""
    file = _file(name)
    try:
        found = OmegaConf.load(name) if name.endswith(".yaml") else load_config("compositions", name)
        config = OmegaConf.create({**settings, "method": found})
        resolved: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as wrong:
        reason = str(wrong).splitlines()[0]
        raise InputError(f"{file}: {reason}; it may refer to {', '.join(settings)}.") from None
    except (YAMLError, OSError, ValueError, RecursionError) as wrong:
        raise InputError(f"{file} is no YAML: {' '.join(str(wrong).split())}.") from None
    if not isinstance(resolved["method"], dict):
        raise InputError(f"{file} is neither a jquant.Method nor rules.")
    return resolved["method"]


def _plan(config: dict[str, Any], name: str, settings: dict[str, Any]) -> Rules:
    file = _file(name)
    if more := config.keys() - {"rules", "activation"}:
        raise InputError(f"{file} has rules and {more.pop()!r}; beside rules it may only have activation.")
    rules = config["rules"] if isinstance(config["rules"], list) else [config["rules"]]
    for rule in rules:
        if not isinstance(rule, dict) or "weights" not in rule or rule.keys() - {"weights", "method"}:
            raise InputError(f"{file}: a rule has weights and method, but {rule} has not.")
        if not isinstance(rule["weights"], str) or not isinstance(rule.get("method"), str | None):
            raise InputError(f"{file}: a rule's weights are a regular expression, its method a name, not {rule}.")
    activation = _compose(config["activation"], name) if "activation" in config else None
    if not isinstance(activation, Activation | None):
        raise InputError(f"{file}: activation takes {{_target_: jquant.Activation}}, not {config['activation']}.")

    def complete(row: str | None) -> Method | None:
        chosen = None if row is None else completed(row, **settings)
        return chosen and (replace(chosen, activation=activation) if activation else chosen)

    return [(rule["weights"], complete(rule.get("method"))) for rule in rules]


def _compose(config: Any, name: str) -> Any:
    try:
        return _build(config)
    except (InputError, TypeError, ValueError, AttributeError) as wrong:
        raise InputError(f"{_file(name)}: {wrong}") from None


def _build(config: Any) -> Any:
    """The value that a config describes by its `_target_`s; lists become tuples, so that it can be hashed."""
    if isinstance(config, list):
        return tuple(map(_build, config))
    if not isinstance(config, dict):
        return config
    target = str(config.get("_target_"))
    package, _, part = target.rpartition(".")
    if package in ("", "jquant") and part not in PARTS:
        raise InputError(f"{target!r} is not one of jquant's parts: {', '.join(PARTS)}.")
    arguments = {key: _build(value) for key, value in config.items() if key != "_target_"}
    for key, value in arguments.items():
        if key in AXES and isinstance(value, str | int | float):
            named = str(value).rpartition(".")[2]
            example = named if named in PARTS else "…"
            raise InputError(f"{key} takes a part, {{_target_: jquant.{example}}}, not {value!r}.")
    if package != "jquant":
        return own_part(target, arguments)
    kind = getattr(jquant, part)
    return kind(**arguments) if arguments or callable(kind) else kind
