"""Methods by name: rows of `jquant.methods.METHODS`, or compositions and plans written in configs/method/*.yaml.

A file holds either one method, its parts named as in `jquant` (`_target_: jquant.NF4`), or `rules`, each a regular
expression over weights' names (`layers.3.attention.v.kernel`) and the name of a row of METHODS; the first that is found
decides, and a rule without a method leaves its weights float.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jquant
from jquant import METHODS, InputError, Method, method
from jquant.io.hub import load_config
from jquant.methods import Plan

FOLDER = Path(__file__).parents[1] / "configs" / "method"


def find_method(name: str, bits: int, group: Any, symmetric: bool) -> "Method | Plan":
    """The method or plan of that name; the rest completes what it leaves open. "gptq-3" is gptq at 3 bits.

    Raises:
      InputError: no such name; a file that composes something else than jquant's parts.
    """
    row, dash, width = name.rpartition("-")
    if dash and width.isdigit() and takes_bits(row):
        return method(row, int(width), group, symmetric)
    if name in METHODS:
        return method(name, bits, group, symmetric)
    written = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    if name not in written:
        raise InputError(f"There is no method {name!r}; known: {', '.join([*METHODS, *written])}.")
    config = load_config("method", name)
    if "rules" not in config:
        composed = _compose(config, name)
        if not isinstance(composed, Method):
            raise InputError(f"configs/method/{name}.yaml is neither a jquant.Method nor rules.")
        return composed
    for rule in config["rules"]:
        if "weights" not in rule or rule.keys() - {"weights", "method"}:
            raise InputError(f"configs/method/{name}.yaml: a rule has weights and method, not {', '.join(rule)}.")
    activation = _compose(config["activation"], name) if "activation" in config else None

    def complete(row: str | None) -> Method | None:
        chosen = None if row is None else method(row, bits, group, symmetric)
        return chosen and (replace(chosen, activation=activation) if activation else chosen)

    return [(rule["weights"], complete(rule.get("method"))) for rule in config["rules"]]


def takes_bits(name: str) -> bool:
    """Whether a row of METHODS leaves the width to the settings."""
    return name in METHODS and METHODS[name](3, 64, False) != METHODS[name](4, 64, False)


def needs_calibration(plan: "Method | Plan") -> bool:
    """Whether any of its methods looks at activations."""
    methods = [plan] if isinstance(plan, Method) else [one for _, one in plan]
    return any(isinstance(one, Method) and one.needs_calibration for one in methods)


def _compose(config: Any, name: str) -> Any:
    try:
        return _build(config)
    except (InputError, TypeError) as wrong:
        raise InputError(f"configs/method/{name}.yaml: {wrong}") from None


def _build(config: Any) -> Any:
    """What the `_target_`s stand for; lists become tuples, so that it can be hashed."""
    if isinstance(config, list):
        return tuple(map(_build, config))
    if not isinstance(config, dict):
        return config
    target = str(config.get("_target_"))
    package, _, part = target.rpartition(".")
    if package != "jquant" or part not in jquant.__all__:
        raise InputError(f"{target!r} is not one of jquant's parts.")
    return getattr(jquant, part)(**{key: _build(value) for key, value in config.items() if key != "_target_"})
