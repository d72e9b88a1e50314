"""Sweeps over settings, on the engines that Hydra launches: this process, SLURM, Ray.

    python -m experiments.perplexity_table --multirun method=rtn,gptq,awq bits=2,3,4 launcher=ray name=widths

Hydra expands the settings, and a launcher (configs/launcher/) runs the trials. Before the first of them sweep.json
lists all; each has a folder for its row, for what is finished of its work, and for what became of it. So none can get
lost: `experiments.collect`, which also runs in the end, makes one table of the rows and names the trials without one.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from filelock import Timeout
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.collect import (
    RUNNING,
    SWEEP,
    TRIAL,
    Overrides,
    collect,
    read_sweep,
    read_trial,
    running,
    trial_folder,
    varying,
)
from experiments.command_line import console, one_sentence
from experiments.settings import check_table
from experiments.tables import locked
from jquant.errors import InputError
from jquant.io.files import write_json, write_text

ATTEMPTS = 3  # at a trial: in one process, or in several where it dies and its engine begins the trial again


class Sweep(Callback):
    """What Hydra calls before and after all trials of a sweep."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Checks and lists the trials; those of an earlier sweep into the same folder stay, failed ones try again."""
        with heard():
            folder = Path(config.results) / str(config.name)
            trials = expand(config.hydra.overrides.task)
            check_trials(config, trials)
            list_trials(folder, trials)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Makes the table; status 1 where it lacks rows."""
        with heard():
            if collect(Path(config.results) / str(config.name)):
                sys.exit(1)


@contextmanager
def heard() -> Iterator[None]:
    """Ends the process by what is raised inside, where Hydra would go on with a warning."""
    try:
        with one_sentence():
            yield
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def in_sweep() -> bool:
    """Whether Hydra runs this process's job as one of several."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def expand(overrides: Sequence[str]) -> list[Overrides]:
    """The settings of every trial, as Hydra's own sweeper expands them.

    Raises:
      InputError: the sweep's folder would differ from trial to trial.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    swept = {one.key_or_group for one in parsed if one.is_sweep_override()}
    given = {one.key_or_group for one in parsed}
    if swept & {"name", "results"} or ("model" in swept and "name" not in given):
        raise InputError("A sweep lands in one folder: give it one name=… and one results=….")
    choices = []
    for one in parsed:
        if one.is_sweep_override():
            choices.append([f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()])
        else:
            choices.append([one.input_line])
    return [list(trial) for trial in product(*choices)]


def check_trials(config: DictConfig, trials: Sequence[Overrides]) -> None:
    """Composes the settings of every trial, and checks them as those of a single run.

    Raises:
      InputError: a setting of a trial can't be meant.
    """
    loader = GlobalHydra.instance().config_loader()
    for trial, name in zip(trials, varying(trials), strict=True):
        composed = loader.load_sweep_config(config, list(trial))
        own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
        settings: Any = OmegaConf.to_container(own, resolve=True)
        try:
            check_table(settings)
        except InputError as wrong:
            raise InputError(f"No trial has begun, since {name} can't: {wrong}") from None


def list_trials(folder: Path, trials: Sequence[Overrides]) -> None:
    """Adds trials to those of the folder's sweep, so that those without a row are begun anew.

    Raises:
      InputError: the folder holds a table that no sweep made, or damaged files; it can't be written.
    """
    with locked(folder):
        earlier = read_sweep(folder)
        if not earlier and (folder / "table.jsonl").exists():
            raise InputError(f"{folder} holds a table that no sweep made: give the sweep a folder of its own, name=….")
        places = [trial_folder(folder, trial) for trial in trials]
        again = [place for place in places if (told := read_trial(place)) and "rows" not in told]
        both = dict.fromkeys(map(tuple, [*earlier, *trials]))
        write_json(folder / SWEEP, {"trials": list(map(list, both))})
        for place in again:
            if not running(place):
                (place / TRIAL).unlink()


def run_trial(settings: dict[str, Any], work: Callable[[dict[str, Any]], Sequence[dict[str, Any]]]) -> None:
    """Computes one trial's rows into its folder, and writes down how it ended.

    It never raises: an engine that sees a trial fail stops the others. What fails by an error is tried again from the
    last finished block, `ATTEMPTS` times in all; if the process dies, its engine begins the trial again, as often. A
    trial that another process is at is left to it.

    Args:
      settings: the trial's.
      work: computes rows into settings["results"]/settings["name"], and keeps what is unfinished in
        settings["checkpoints"].
    """
    hydra = HydraConfig.get()
    os.chdir(hydra.runtime.cwd)  # paths in settings are relative to where the sweep was started
    folder = trial_folder(Path(settings["results"]).absolute() / str(settings["name"]), hydra.overrides.task)
    its = settings | {"results": str(folder.parent), "name": folder.name, "checkpoints": str(folder / "unfinished")}
    try:
        with locked(folder, RUNNING, timeout=2):  # not at once: `running` holds it for a moment
            _attempt(its, folder, hydra.overrides.task, work)
    except Timeout:
        console.print(f"{' '.join(hydra.overrides.task)}: another process is at it.", highlight=False, soft_wrap=True)


def _attempt(
    its: dict[str, Any],
    folder: Path,
    overrides: Overrides,
    work: Callable[[dict[str, Any]], Sequence[dict[str, Any]]],
) -> None:
    state, told = folder / TRIAL, read_trial(folder)
    attempt = 0 if "rows" in told else told.get("attempt", 0)
    failed = told.get("failed", f"its process died {ATTEMPTS} times")
    while attempt < ATTEMPTS:
        attempt += 1
        told = {"overrides": list(overrides), "attempt": attempt, "process": os.getpid()}
        write_json(state, told)
        try:
            rows = work(its)
        except InputError as wrong:  # another attempt would end the same
            failed = str(wrong)
            break
        except Exception as broken:
            write_text(folder / "traceback.txt", traceback.format_exc())
            failed = f"{type(broken).__name__}: {(str(broken).splitlines() or [''])[0]}"
        else:
            write_json(state, told | {"rows": [row["fingerprint"] for row in rows]})
            return
    write_json(state, told | {"failed": failed})
