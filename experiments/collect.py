"""One table of a sweep's rows, and the trials that have none.

    python -m experiments.collect results/widths
    python -m experiments.collect results/widths --without "method=gptq bits=2"

A sweep (`experiments.sweep`) calls this in the end; by hand it shows how far one is that still runs elsewhere. Status 1
where rows are missing: the table says which, and why. table.jsonl keeps the rows that other commands wrote into it.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import Timeout

from experiments import tables
from experiments.command_line import console, one_sentence
from jquant.errors import InputError
from jquant.io.files import read_json, write_json
from paper_figures import perplexity_bits

SWEEP, TRIAL = "sweep.json", "trial.json"
RUNNING = ".running.lock"  # in a trial's folder, held by the process that works at it
Overrides = Sequence[str]  # of one trial, as on a command line
# Settings that say where and how, not what.
ELSEWHERE = ("launcher", "name", "results")
FIRST = ("method", "bits")  # in a folder's name


def collect(folder: Path) -> dict[str, str]:
    """Writes and prints the table of a sweep's finished trials.

    Returns:
      Why the others have no row, by their settings.

    Raises:
      InputError: the folder holds no sweep, or damaged files.
    """
    trials = _some_trials(folder)
    rows, missing = [], {}
    for trial, name in zip(trials, varying(trials), strict=True):
        its, problem = outcome(trial_folder(folder, trial))
        rows += [row | {"settings": name} for row in its]
        if problem:
            missing[name] = problem
    tables.add_rows(folder, rows)
    tables.write_table(folder, rows, missing=missing)
    if rows:
        perplexity_bits.draw(rows, folder)
    for its in tables.by_text(rows).values():
        console.print(tables.terminal_table(its))
        console.print(tables.caption(its), highlight=False, soft_wrap=True)
    for line in tables.missing_lines(missing):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return missing


def take_out(folder: Path, wanted: str) -> list[str]:
    """Takes trials out of a sweep, and their rows out of its table; what lies in their own folders stays.

    Args:
      folder: of the sweep.
      wanted: settings that a trial has, as the table shows them.

    Returns:
      The settings of those that are out.

    Raises:
      InputError: no trial has these settings, or all have; the folder holds no sweep, or damaged files.
    """
    _some_trials(folder)
    with tables.locked(folder):
        trials = _some_trials(folder)
        names = dict(zip(map(tuple, trials), varying(trials), strict=True))
        gone = {trial: name for trial, name in names.items() if f" {wanted} " in f" {name} "}
        if not gone:
            raise InputError(f"{folder} has no trial {wanted!r}; there are: {'; '.join(names.values())}.")
        if len(gone) == len(names):
            raise InputError(f"Without {wanted!r} no trial would be left: remove {folder} instead.")
        its = {
            trial: {str(row.get("fingerprint")) for row in tables.read_rows(trial_folder(folder, trial))}
            for trial in names
        }
        write_json(folder / SWEEP, {"trials": [list(trial) for trial in names if trial not in gone]})
    kept = set().union(*(its[trial] for trial in names if trial not in gone))
    tables.add_rows(folder, [], without=set().union(*(its[trial] for trial in gone)) - kept)
    return list(gone.values())


def _some_trials(folder: Path) -> list[Overrides]:
    if trials := read_sweep(folder):
        return trials
    raise InputError(f"{folder} holds no sweep: {SWEEP} is missing or empty.")


def read_sweep(folder: Path) -> list[Overrides]:
    """The settings of every trial; none where there is no sweep.

    Raises:
      InputError: sweep.json is damaged.
    """
    return _read(folder / SWEEP, {"trials": [[str]]}).get("trials", [])


def read_trial(folder: Path) -> dict[str, Any]:
    """What is written down of a trial, by its folder; nothing before it has begun.

    Raises:
      InputError: trial.json is damaged.
    """
    return _read(folder / TRIAL, {"attempt": int, "process": int, "rows?": [str], "failed?": str})


def _read(path: Path, shape: dict[str, Any]) -> dict[str, Any]:
    if not os.path.lexists(path):
        return {}
    told = read_json(path)
    wrong = tables.misfit(told, shape, path.name)
    try:
        json.dumps(told, ensure_ascii=False).encode()  # what can't be written is no text
    except ValueError as broken:
        wrong = str(broken)
    if wrong:
        raise InputError(f"{path} is damaged ({wrong}): move it away.")
    return told


def running(folder: Path) -> bool:
    """Whether a process works at the trial of that folder."""
    try:
        with tables.locked(folder, RUNNING, timeout=0):
            return False
    except Timeout:
        return True


def trial_folder(folder: Path, overrides: Overrides) -> Path:
    """A trial's own folder within the sweep's, named by its settings in any order."""
    name = lambda one: one.split("=")[0].lstrip("+")  # noqa: E731
    ours = sorted(
        (one for one in overrides if name(one) not in ELSEWHERE), key=lambda one: (name(one) not in FIRST, one)
    )
    told = " ".join(ours)
    readable = re.sub(r"[^\w.=-]+", "_", told)[:60]
    return folder / "trials" / f"{readable}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def varying(trials: Sequence[Overrides]) -> list[str]:
    """Of every trial, the settings that not all of them share."""
    common = set.intersection(*map(set, trials))
    return [" ".join(one for one in trial if one not in common) or "the only trial" for trial in trials]


def outcome(folder: Path) -> tuple[list[tables.Row], str | None]:
    """A trial's rows, or why it has none.

    Raises:
      InputError: a file of the trial's is damaged.
    """
    told = read_trial(folder)
    if not told:
        return [], "not begun"
    if "rows" in told:
        found = {row.get("fingerprint"): row for row in tables.read_rows(folder)}
        if all(one in found for one in told["rows"]):
            return [found[one] for one in told["rows"]], None
        return [], f"{folder / 'table.jsonl'} lacks its row"
    if "failed" in told:
        return [], f"failed: {told['failed']}"
    attempt = f"attempt {told['attempt']}, process {told['process']}"
    return [], f"runs ({attempt})" if running(folder) else f"begun ({attempt}), and not finished"


def main() -> None:
    """The command."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="results/<name> of the sweep")
    options.add_argument("--without", metavar="SETTINGS", help="take out the trials that the table shows with these")
    given = options.parse_args()
    with one_sentence():
        if given.without:
            for name in take_out(given.folder, given.without):
                console.print(f"Taken out: {name}.", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1 if collect(given.folder) else 0)


if __name__ == "__main__":
    main()
