"""Sweeps over settings, on the engines that Hydra launches: this process, SLURM, Ray.

    python -m experiments.perplexity_table --multirun method=rtn,gptq,awq bits=2,3,4 launcher=ray name=widths

Hydra expands the settings, and a launcher (configs/launcher/) runs the trials. Before the first trial, sweep.json lists
all. Each trial has a folder for its row, its finished blocks, and its state, so no trial is lost:
`experiments.collect`, which also runs at the end, makes one table of the rows and names the trials without a row.
"""

import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import Timeout
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
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
from experiments.tables import locked, read_rows
from jquant.errors import InputError
from jquant.io.files import write_json, write_text

ATTEMPTS = 3  # per trial, in one process, or in several if it dies and its engine begins the trial again


class Sweep(Callback):
    """Hydra calls these methods before and after all trials of a sweep."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Checks and lists the trials. Trials of an earlier sweep in the folder stay; failed ones are tried again."""
        with heard():
            folder = Path(config.results) / str(config.name)
            if searches(config):  # trials are listed as they are chosen
                list_trials(folder, [])
                return
            in_config = [f"{key}={values}" for key, values in (config.hydra.sweeper.params or {}).items()]
            trials = expand([*in_config, *config.hydra.overrides.task])
            check_trials(config, trials)
            list_trials(folder, trials)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Makes the table; status 1 if rows are missing."""
        with heard():
            if collect(Path(config.results) / str(config.name)):
                sys.exit(1)


@contextmanager
def heard() -> Iterator[None]:
    """Ends the process on an exception inside; Hydra would only warn and continue."""
    try:
        with one_sentence():
            yield
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def in_sweep() -> bool:
    """Whether this process's job is a trial of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def searches(config: DictConfig) -> bool:
    """Whether the sweep's next trial is chosen by the earlier ones' results."""
    return not config.hydra.sweeper._target_.endswith("BasicSweeper")


def expand(overrides: Sequence[str]) -> list[Overrides]:
    """The settings of every trial, as Hydra's own sweeper expands them; the last override of a setting counts.

    Raises:
      InputError: the sweep's folder would differ from trial to trial.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    named = {override.key_or_group for override in parsed}
    if swept & {"name", "results"} or ("model" in swept and "name" not in named):
        raise InputError("A sweep has one folder: give it one name=… and one results=….")
    return list[Overrides](BasicSweeper.split_arguments(parsed, max_batch_size=None)[0])


def check_trials(config: DictConfig, trials: Sequence[Overrides]) -> None:
    """Composes the settings of every trial, and checks them like those of a single run.

    Raises:
      InputError: a trial has a wrong setting.
    """
    loader = GlobalHydra.instance().config_loader()
    for trial, name in zip(trials, varying(trials), strict=True):
        composed = loader.load_sweep_config(config, list(trial))
        without_hydra = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
        settings: Any = OmegaConf.to_container(without_hydra, resolve=True)
        try:
            check_table(settings)
        except InputError as wrong:
            raise InputError(f"No trial has begun, since {name} can't: {wrong}") from None


def list_trials(folder: Path, trials: Sequence[Overrides]) -> None:
    """Adds trials to the folder's sweep; trials without a row will begin again.

    Raises:
      InputError: the folder holds a table that no sweep made, or damaged files; it can't be written.
    """
    with locked(folder):
        earlier = read_sweep(folder)
        if not earlier and (folder / "table.jsonl").exists():
            raise InputError(f"{folder} holds a table that no sweep made: give the sweep a folder of its own, name=….")
        places = [trial_folder(folder, trial) for trial in trials]
        unfinished = [place for place in places if (state := read_trial(place)) and "rows" not in state]
        all_trials = dict.fromkeys(map(tuple, [*earlier, *trials]))
        write_json(folder / SWEEP, {"trials": list(map(list, all_trials))})
        for place in unfinished:
            if not running(place):
                (place / TRIAL).unlink()


def run_trial(settings: dict[str, Any], work: Callable[[dict[str, Any]], Sequence[dict[str, Any]]]) -> float:
    """Computes a trial's rows into its folder, and records how it ended.

    Returns what a search minimizes: the mean of the rows' KL divergence; infinity if the trial failed.

    It never raises, because an engine stops the other trials when one fails. After an error the trial is tried again
    from its last finished block, `ATTEMPTS` times in all. If the process dies, the engine begins the trial again, with
    the same limit. A trial that another process is computing is skipped.

    Args:
      settings: the trial's.
      work: computes rows into settings["results"]/settings["name"], and keeps unfinished work in
        settings["checkpoints"].
    """
    hydra = HydraConfig.get()
    os.chdir(hydra.runtime.cwd)  # paths in settings are relative to where the sweep was started
    sweep = Path(settings["results"]).absolute() / str(settings["name"])
    folder = trial_folder(sweep, hydra.overrides.task)
    if searches(OmegaConf.create({"hydra": hydra})):
        list_trials(sweep, [hydra.overrides.task])
    trials = read_sweep(sweep)
    places = [trial_folder(sweep, trial) for trial in trials]
    if folder in places:
        number = places.index(folder)
        said = f"trial {number + 1}/{len(trials)}: {varying(trials)[number]}"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    own_settings = settings | {
        "results": str(folder.parent),
        "name": folder.name,
        "checkpoints": str(folder / "unfinished"),
    }
    try:
        with locked(folder, RUNNING, timeout=2):  # it waits, because `running` holds the lock for a moment
            _attempt(own_settings, folder, hydra.overrides.task, work)
    except Timeout:
        console.print(
            f"{' '.join(hydra.overrides.task)}: another process computes it.", highlight=False, soft_wrap=True
        )
    rows = read_rows(folder) if "rows" in read_trial(folder) else []
    return fmean(row["kl"] for row in rows) if rows and all(row["kl"] is not None for row in rows) else math.inf


def _attempt(
    settings: dict[str, Any],
    folder: Path,
    overrides: Overrides,
    work: Callable[[dict[str, Any]], Sequence[dict[str, Any]]],
) -> None:
    state_file, state = folder / TRIAL, read_trial(folder)
    attempt = 0 if "rows" in state else state.get("attempt", 0)
    failed = state.get("failed", f"its process died {ATTEMPTS} times")
    while attempt < ATTEMPTS:
        attempt += 1
        state = {"overrides": list(overrides), "attempt": attempt, "process": os.getpid()}
        write_json(state_file, state)
        try:
            rows = work(settings)
        except InputError as wrong:  # another attempt would fail too
            failed = str(wrong)
            break
        except Exception as broken:
            write_text(folder / "traceback.txt", traceback.format_exc())
            failed = f"{type(broken).__name__}: {(str(broken).splitlines() or [''])[0]}"
        else:
            write_json(state_file, state | {"rows": [row["fingerprint"] for row in rows]})
            return
    write_json(state_file, state | {"failed": failed})
