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

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.collect import SWEEP, TRIAL, Overrides, collect, read_sweep, trial_folder
from experiments.command_line import one_sentence
from jquant.errors import InputError
from jquant.io.files import read_json, write_json

ATTEMPTS = 3  # at a trial: in one process, or in several where it dies and its engine begins the trial again


class Sweep(Callback):
    """What Hydra calls before and after all trials of a sweep."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Lists the trials; those of an earlier sweep into the same folder stay, and failed ones may try again."""
        with heard():
            folder = Path(config.results) / str(config.name)
            trials = expand(config.hydra.overrides.task)
            both = dict.fromkeys(map(tuple, [*read_sweep(folder), *trials]))
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / SWEEP, {"trials": list(map(list, both))})
            for trial in trials:
                state = trial_folder(folder, trial) / TRIAL
                if state.exists() and "rows" not in read_json(state):
                    state.unlink()

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


def run_trial(settings: dict[str, Any], work: Callable[[dict[str, Any]], Sequence[dict[str, Any]]]) -> None:
    """Computes one trial's rows into its folder, and writes down how it ended.

    It never raises: an engine that sees a trial fail stops the others. What fails by an error is tried again from the
    last finished block, `ATTEMPTS` times in all; if the process dies, its engine begins the trial again, as often.

    Args:
      settings: the trial's.
      work: computes rows into settings["results"]/settings["name"], and keeps what is unfinished in
        settings["checkpoints"].
    """
    hydra = HydraConfig.get()
    os.chdir(hydra.runtime.cwd)  # paths in settings are relative to where the sweep was started
    folder = trial_folder(Path(settings["results"]).absolute() / str(settings["name"]), hydra.overrides.task)
    folder.mkdir(parents=True, exist_ok=True)
    its = settings | {"results": str(folder.parent), "name": folder.name, "checkpoints": str(folder / "unfinished")}
    state = folder / TRIAL
    told = read_json(state) if state.exists() else {}
    attempt = 0 if "rows" in told else told.get("attempt", 0)
    failed = told.get("failed", f"its process died {ATTEMPTS} times")
    while attempt < ATTEMPTS:
        attempt += 1
        told = {"overrides": list(hydra.overrides.task), "attempt": attempt, "process": os.getpid()}
        write_json(state, told)
        try:
            rows = work(its)
        except InputError as wrong:  # another attempt would end the same
            failed = str(wrong)
            break
        except Exception as broken:
            (folder / "traceback.txt").write_text(traceback.format_exc())
            failed = f"{type(broken).__name__}: {(str(broken).splitlines() or [''])[0]}"
        else:
            write_json(state, told | {"rows": [row["fingerprint"] for row in rows]})
            return
    write_json(state, told | {"failed": failed})
