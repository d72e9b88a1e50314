"""One table of a sweep's rows, and a list of the trials without a row.

    python -m experiments.collect results/widths
    python -m experiments.collect results/widths --without "method=gptq bits=2"
    python -m experiments.collect results/calibration_ablation --over seed

A sweep (`experiments.sweep`) calls this at its end; called by hand it shows how far a running sweep is. The status is 1
if rows are missing: the table says which, and why. table.jsonl keeps the rows that other commands wrote into it.
`--over` adds a table of means over a setting's values, such as seeds.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import Timeout
from rich import box
from rich.table import Table

from experiments import tables
from experiments.command_line import console, one_sentence, room, show
from jquant.errors import InputError
from jquant.evaluation.intervals import mean_and_half
from jquant.io.files import read_json, write_json, write_text
from paper_figures import perplexity_bits

SWEEP, TRIAL = "sweep.json", "trial.json"
RUNNING = ".running.lock"  # in a trial's folder; held by the process that computes the trial
Overrides = Sequence[str]  # of one trial, as on a command line
# Settings that do not change a trial's results.
ELSEWHERE = ("launcher", "name", "results", "sweeper")
FIRST = ("method", "bits")  # these settings come first in a folder's name
# Heading -> what `average` takes means of, and how many digits it shows.
AVERAGED = {
    "perplexity": ("perplexity", 3),
    "KL": ("kl", 4),
    "output error": ("output_error", 5),
    "held-out error": ("held_out_error", 5),
}


def collect(folder: Path) -> dict[str, str]:
    """Writes and prints the table of a sweep's finished trials.

    Returns:
      For each trial without a row, by its settings: why.

    Raises:
      InputError: the folder holds no sweep, or damaged files.
    """
    trials = _some_trials(folder)
    rows, missing, floats = [], {}, []
    for trial, name in zip(trials, varying(trials), strict=True):
        trial_rows, problem = outcome(trial_folder(folder, trial))
        for row in trial_rows:
            if not tables.is_float(row):
                rows.append(row | {"settings": name})
            elif row["protocol"] not in floats:  # the float model has no bits and no group: one row is enough
                floats.append(row["protocol"])
                rows.append(row | {"settings": name})
        if problem:
            missing[name] = problem
    tables.add_rows(folder, rows)
    tables.write_table(folder, rows, missing=missing)
    figures = perplexity_bits.draw(rows, folder) if rows else []
    for text_rows in tables.by_text(rows).values():
        show(tables.terminal_table(text_rows, width=room()))
        console.print(tables.caption(text_rows), highlight=False, soft_wrap=True)
    for line in tables.missing_lines(missing):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if rows:
        console.print(tables.written(folder, figures), soft_wrap=True)
    return missing


def average(folder: Path, setting: str) -> None:
    """Writes over-<setting>.md and prints it: means over a setting's values, with their 95 % intervals (Student's t).

    Raises:
      InputError: the sweep does not vary the setting; rows that would be averaged differ in something else.
    """
    trials = _some_trials(folder)
    groups: dict[str, list[tables.Row]] = {}
    for trial, name in zip(trials, varying(trials), strict=True):
        kept = [part for part in name.split(" ") if part.partition("=")[0] != setting]
        if " ".join(kept) == name:
            varied = sorted({part.partition("=")[0] for part in name.split(" ")})
            raise InputError(f"{folder} has trials that do not vary {setting!r}, but {', '.join(varied)}.")
        for row in outcome(trial_folder(folder, trial))[0]:
            groups.setdefault(f"{Path(row['protocol']['data']).name}: {' '.join(kept)}", []).append(row)
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("settings", "rows", "bits/weight", *AVERAGED):
        table.add_column(heading, justify="left" if heading == "settings" else "right", overflow="fold")
    for name, rows in groups.items():
        for row in rows:
            if field := differing(rows[0], row, setting):
                raise InputError(f"{name}: no mean is taken over rows whose {field} differs.")
        cells = [mean_of([row.get(key) for row in rows], digits) for key, digits in AVERAGED.values()]
        table.add_row(name, str(len(rows)), f"{rows[0]['bits_per_weight']:.3f}", *cells)
    show(table)
    protocol = tables.caption(list(chain(*groups.values())))
    caption = f"Means over {setting}, ± half their 95 % interval (Student's t). {protocol}"
    console.print(caption, highlight=False, soft_wrap=True)
    write_text(folder / f"over-{setting}.md", f"{tables.as_markdown(table)}\n{caption}\n")


def differing(row: Any, other: Any, setting: str, name: str = "") -> str | None:
    """The first entry that differs in two rows' protocol and configuration; the setting's own may, and its windows."""
    if not name:
        parts = ((row[part], other[part], part) for part in ("composition", "protocol", "config"))
        return next(filter(None, (differing(a, b, setting, part) for a, b, part in parts)), None)
    if name in (f"config.{setting}", "protocol.calibration_sha256"):
        return None
    if isinstance(row, dict) and isinstance(other, dict):
        keys = dict.fromkeys([*row, *other])
        inner = (differing(row.get(key), other.get(key), setting, f"{name}.{key}") for key in keys)
        return next(filter(None, inner), None)
    return None if row == other else name


def mean_of(values: Sequence[float | None], digits: int) -> str:
    """A mean, and half its interval if there are several values; blank if one is unknown."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return ""
    mean, half = mean_and_half(known)
    return f"{mean:.{digits}f}" + (f" ±{half:.{digits}f}" if len(known) > 1 else "")


def take_out(folder: Path, settings: str) -> list[str]:
    """Takes trials out of a sweep, and their rows out of its table; the trials' own folders stay.

    Args:
      folder: of the sweep.
      settings: those of the trials to take out, as the table shows them.

    Returns:
      The settings of the trials that were taken out.

    Raises:
      InputError: no trial has these settings, or all have; the folder holds no sweep, or damaged files.
    """
    _some_trials(folder)
    with tables.locked(folder):
        trials = _some_trials(folder)
        names = dict(zip(map(tuple, trials), varying(trials), strict=True))
        removed = {trial: name for trial, name in names.items() if f" {settings} " in f" {name} "}
        if not removed:
            raise InputError(f"{folder} has no trial {settings!r}; there are: {'; '.join(names.values())}.")
        if len(removed) == len(names):
            raise InputError(f"Without {settings!r} no trial would be left: remove {folder} instead.")
        fingerprints = {
            trial: {str(row.get("fingerprint")) for row in tables.read_rows(trial_folder(folder, trial))}
            for trial in names
        }
        write_json(folder / SWEEP, {"trials": [list(trial) for trial in names if trial not in removed]})
    kept = set().union(*(fingerprints[trial] for trial in names if trial not in removed))
    tables.add_rows(folder, [], without=set().union(*(fingerprints[trial] for trial in removed)) - kept)
    return list(removed.values())


def _some_trials(folder: Path) -> list[Overrides]:
    if trials := read_sweep(folder):
        return trials
    if (folder / "table.md").is_file():
        raise InputError(f"{folder} holds the rows of a plain run, no sweep: they are in {folder}/table.md.")
    if not folder.is_dir() and folder.parent.is_dir():
        near = get_close_matches(folder.name, [path.name for path in folder.parent.iterdir() if path.is_dir()], 1)
        say = "".join(f"; the nearest is {folder.with_name(name)}" for name in near)
        raise InputError(f"There is no folder {folder}{say}.")
    raise InputError(f"{folder} holds no sweep: {SWEEP} is missing or empty.")


def read_sweep(folder: Path) -> list[Overrides]:
    """The settings of every trial; an empty list if there is no sweep.

    Raises:
      InputError: sweep.json is damaged.
    """
    return _read(folder / SWEEP, {"trials": [[str]]}).get("trials", [])


def read_trial(folder: Path) -> dict[str, Any]:
    """The state of a trial, from its folder; empty before it has begun.

    Raises:
      InputError: trial.json is damaged.
    """
    return _read(folder / TRIAL, {"attempt": int, "process": int, "rows?": [str], "failed?": str})


def _read(path: Path, shape: dict[str, Any]) -> dict[str, Any]:
    if not os.path.lexists(path):
        return {}
    content = read_json(path)
    wrong = tables.misfit(content, shape, path.name)
    try:
        json.dumps(content, ensure_ascii=False).encode()  # lone surrogates can't be written
    except ValueError as broken:
        wrong = str(broken)
    if wrong:
        raise InputError(f"{path} is damaged ({wrong}): move it away.")
    return content


def running(folder: Path) -> bool:
    """Whether a process is computing the trial of that folder."""
    try:
        with tables.locked(folder, RUNNING, timeout=0):
            return False
    except Timeout:
        return True


def trial_folder(folder: Path, overrides: Overrides) -> Path:
    """A trial's folder within the sweep's; its name does not depend on the order of the settings."""
    name = lambda line: line.split("=")[0].lstrip("+")  # noqa: E731
    deciding = sorted(
        (line for line in overrides if name(line) not in ELSEWHERE), key=lambda line: (name(line) not in FIRST, line)
    )
    joined = " ".join(deciding)
    readable = re.sub(r"[^\w.=-]+", "_", joined)[:60]
    return folder / "trials" / f"{readable}-{hashlib.sha256(joined.encode()).hexdigest()[:8]}"


def varying(trials: Sequence[Overrides]) -> list[str]:
    """For every trial, the settings that not all trials share."""
    common = set.intersection(*map(set, trials))
    return [" ".join(override for override in trial if override not in common) or "the only trial" for trial in trials]


def outcome(folder: Path) -> tuple[list[tables.Row], str | None]:
    """A trial's rows, or the reason why it has none.

    Raises:
      InputError: a file of the trial's is damaged.
    """
    state = read_trial(folder)
    if not state:
        return [], "not begun"
    if "rows" in state:
        by_fingerprint = {row.get("fingerprint"): row for row in tables.read_rows(folder)}
        if all(fingerprint in by_fingerprint for fingerprint in state["rows"]):
            return [by_fingerprint[fingerprint] for fingerprint in state["rows"]], None
        return [], f"{folder / 'table.jsonl'} lacks its row"
    if "failed" in state:
        return [], f"failed: {state['failed']}"
    attempt = f"attempt {state['attempt']}, process {state['process']}"
    return [], f"runs ({attempt})" if running(folder) else f"begun ({attempt}), and not finished"


def main() -> None:
    """The command."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="results/<name> of the sweep")
    options.add_argument("--over", metavar="SETTING", help="a table of means over this setting's values, e.g. seed")
    options.add_argument("--without", metavar="SETTINGS", help="take out the trials that the table shows with these")
    arguments = options.parse_args()
    with one_sentence():
        if arguments.without:
            for name in take_out(arguments.folder, arguments.without):
                console.print(f"Taken out: {name}.", markup=False, highlight=False, soft_wrap=True)
        missing = collect(arguments.folder)
        if arguments.over:
            average(arguments.folder, arguments.over)
        sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
