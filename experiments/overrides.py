"""Checks the names of a command's settings before Hydra reads them, so that a misspelt setting is an error."""

import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from jquant.errors import InputError
from jquant.io.hub import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
# Settings that are read although not every config has them.
EXTRA = ("model.tokenizer", "model.source")
# Launchers and sweepers that the `sweep` extra installs.
PLUGINS = {
    "optuna": "hydra_plugins.hydra_optuna_sweeper",
    "ray": "hydra_plugins.hydra_ray_launcher",
    "submitit": "hydra_plugins.hydra_submitit_launcher",
    "submitit_local": "hydra_plugins.hydra_submitit_launcher",
}


def check_command(script: str, arguments: Sequence[str]) -> None:
    """Refuses a command line with settings or choices that an experiment does not have.

    Args:
      script: the name of the experiment and of its config.
      arguments: the command line after it.

    Raises:
      InputError: an unknown setting, model, mesh, launcher or config, also with a + before it; a launcher that is not
        installed; a sweep without --multirun, or of an experiment without sweeps.
    """
    parser = get_args_parser()
    parser.error = _one_sentence
    parsed = parser.parse_args(arguments)
    overrides = OverridesParser.create().parse_overrides(parsed.overrides)
    user_folders = [Path(folder) for folder in (parsed.config_path, parsed.config_dir) if folder]
    name = (parsed.config_name or script).removesuffix(".yaml")
    if name != script and not user_folders and name not in (configs := _configs(script)):
        raise InputError(
            f"experiments.{script} has no config {name!r}; there are: {', '.join(nearest(name, configs))}."
        )
    own = name if name in _configs(script) else script
    _, choices, sweeps = _known(own, ())
    given = {override.key_or_group: override for override in overrides if override.key_or_group in choices}
    single = {group: each.value() for group, each in given.items() if not each.is_sweep_override()}
    known = _known(own, tuple(f"{group}={value}" for group, value in single.items() if value in choices[group]))[0]
    for file in (folder / f"{name}.yaml" for folder in user_folders):
        for key in _names(OmegaConf.load(file)) if file.is_file() else ():
            _check_key(key, [*known, "defaults"])
    multirun = sweeps or parsed.multirun or "hydra.mode=MULTIRUN" in parsed.overrides
    _check_sweep(script, overrides, "launcher" in choices, multirun)
    for override in overrides:
        if override.is_hydra_override():
            continue
        if override.key_or_group in choices:
            for value in override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]:
                if user_folders and (value not in choices[override.key_or_group]):
                    continue  # Hydra looks for it in the user's folder
                _check_choice(override.key_or_group, str(value))
            continue
        for key in _keys(override, known):
            _check_key(key, known)
        if override.is_delete():
            raise InputError(f"{override.input_line}: a setting can't be left out; give it another value.")


def multirun_first(arguments: Sequence[str]) -> list[str]:
    """A command line with --multirun, or -m, before the settings."""
    return sorted(arguments, key=lambda argument: argument not in ("--multirun", "-m"))


def _one_sentence(message: str) -> NoReturn:
    raise InputError(f"{message}: options such as --config-name stand before the settings, key=value.")


@cache
def _known(name: str, chosen: tuple[str, ...]) -> tuple[list[str], dict[str, list[str]], bool]:
    """A config's settings and sections under these choices, all choices of its groups (model, mesh …), and whether the
    config itself is a sweep."""
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose(name, list(chosen), return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        groups = [str(key) for key in config.hydra.runtime.choices if not str(key).startswith("hydra/")]
        sweeps = config.hydra.mode == RunMode.MULTIRUN
        return [*_names(config), *groups], {group: loader.get_group_options(group) for group in groups}, sweeps


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Names, the one spelt most alike first."""
    return sorted(names, key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio())


def _configs(script: str) -> list[str]:
    """Names of an experiment's configs: its own, and those that have it, or one of these, as a default."""
    configs: dict[str, Any] = {path.stem: OmegaConf.load(path) for path in sorted(CONFIGS.glob("*.yaml"))}

    def derives(name: str) -> bool:
        above = [entry for entry in configs[name].get("defaults") or [] if isinstance(entry, str)]
        return name == script or any(entry in configs and derives(entry) for entry in above)

    others = {path.stem for path in Path(__file__).parent.glob("*.py")} - {script}  # have configs of their own
    return [name for name in configs if derives(name) and name not in others]


def _names(config: Any, above: str = "") -> Iterator[str]:
    """Dotted names of all settings and sections."""
    for key in config if isinstance(config, DictConfig) else ():
        if above or key != "hydra":
            yield above + str(key)
            if not OmegaConf.is_missing(config, str(key)) and not OmegaConf.is_interpolation(config, str(key)):
                yield from _names(config[key], f"{above}{key}.")


def _keys(override: Override, known: Sequence[str]) -> list[str]:
    """The settings that an override sets: several if its value is a section's {key:value}."""
    name, value = override.key_or_group, None if override.is_sweep_override() else override.value()
    if not isinstance(value, dict) or not any(key.startswith(f"{name}.") for key in known):
        return [name]
    return [key for key in _names(OmegaConf.create({name: value})) if key != name]


def _check_key(key: str, known: Sequence[str]) -> None:
    if key in known or key.startswith(tuple(f"{section}." for section in EXTRA)) or key in EXTRA:
        return
    last = key.rpartition(".")[2]
    near = [name for name in known if name.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(key, [*known, *EXTRA], n=1, cutoff=0.0)
    raise InputError(f"There is no setting {key!r}; the nearest is {' or '.join(near)}.")


def _check_choice(group: str, name: str) -> None:
    if group == "model" and (os.sep in name or name.endswith(".gguf")):
        raise InputError(f"model={name} is no name: a folder or a file is model=local model.path={name}.")
    if group == "model" and not (CONFIGS / "model" / f"{name}.yaml").exists():
        for path in (name, f"{name}.gguf"):
            if os.path.exists(path):
                raise InputError(f"model={name} is no name, but there is {path}: give model=local model.path=./{path}.")
    load_config(group, name)
    if group in ("launcher", "sweeper") and name in PLUGINS and not find_spec(PLUGINS[name]):
        raise InputError(f"{group}={name} needs the extra sweep: pip install -c constraints.txt -e '.[sweep]'.")


def _check_sweep(script: str, overrides: Sequence[Override], sweeps: bool, multirun: bool) -> None:
    swept = [str(given.input_line) for given in overrides if given.is_sweep_override()]
    if not sweeps:
        misplaced = ["--multirun"] * multirun + swept
        engines = ("launcher", "hydra/launcher", "sweeper", "hydra/sweeper")
        misplaced += [given.input_line for given in overrides if given.key_or_group in engines]
        if misplaced:
            raise InputError(f"experiments.{script} runs once, without sweeps, so {misplaced[0]} can't be given.")
    elif swept and not multirun:
        key, _, values = swept[0].partition("=")
        raise InputError(
            f"{swept[0]} has several values: --multirun makes a sweep of them, and a list takes brackets, "
            f"{key}=[{values}]."
        )
