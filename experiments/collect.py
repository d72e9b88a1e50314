"""One table of a sweep's rows, and the trials that have none.

    python -m experiments.collect results/widths

A sweep (`experiments.sweep`) calls this in the end; by hand it shows how far one is that still runs elsewhere. Status 1
where rows are missing: the table says which, and why.
"""

import argparse
import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import tables
from experiments.command_line import console, one_sentence
from jquant.errors import InputError
from jquant.io.files import read_json
from paper_figures import perplexity_bits

SWEEP, TRIAL = "sweep.json", "trial.json"
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
    trials = read_sweep(folder)
    if not trials:
        raise InputError(f"{folder} holds no sweep: {SWEEP} is missing or empty.")
    rows, missing = [], {}
    for trial, name in zip(trials, varying(trials), strict=True):
        its, problem = outcome(trial_folder(folder, trial))
        rows += [row | {"settings": name} for row in its]
        if problem:
            missing[name] = problem
    tables.write_rows(folder, rows)
    tables.write_table(folder, rows, missing=missing)
    if rows:
        perplexity_bits.draw(rows, folder)
    for its in tables.by_text(rows).values():
        console.print(tables.terminal_table(its))
        console.print(tables.caption(its), highlight=False, soft_wrap=True)
    for line in tables.missing_lines(missing):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return missing


def read_sweep(folder: Path) -> list[Overrides]:
    """The settings of every trial; none where there is no sweep."""
    return read_json(folder / SWEEP)["trials"] if (folder / SWEEP).exists() else []


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
    """A trial's rows, or why it has none."""
    if not (folder / TRIAL).exists():
        return [], "not begun"
    told: dict[str, Any] = read_json(folder / TRIAL)
    if "rows" in told:
        found = {row["fingerprint"]: row for row in tables.read_rows(folder)}
        if all(one in found for one in told["rows"]):
            return [found[one] for one in told["rows"]], None
        return [], f"{folder / 'table.jsonl'} lacks its row"
    if "failed" in told:
        return [], f"failed: {told['failed']}"
    return [], f"begun (attempt {told['attempt']}, process {told['process']}), and not finished"


def main() -> None:
    """The command."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="results/<name> of the sweep")
    with one_sentence():
        sys.exit(1 if collect(options.parse_args().folder) else 0)


if __name__ == "__main__":
    main()
