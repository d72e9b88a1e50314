"""Runs kept rows again, and says where a figure left its interval: `make reproduce`.

    python -m experiments.reproduce
    python -m experiments.reproduce methods=[fp32,gptq]

The interval is the kept row's: that of its change of perplexity against the float model, paired by window. The float
model's own perplexity must stay within two standard errors. All settings: configs/reproduce.yaml. The new rows land in
results/<name>/table.jsonl; the status is 1 if a figure left its interval.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.table import Table

from experiments import tables
from experiments.command_line import console, one_sentence, run, show
from experiments.overrides import CONFIGS
from experiments.perplexity_table import table_rows
from experiments.settings import check_table
from experiments.tables import FLOAT, Row, paired_change
from jquant.errors import InputError
from jquant.io.files import write_text


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="reproduce")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    with one_sentence():
        left = reproduce(OmegaConf.to_container(config, resolve=True))  # pyright: ignore[reportArgumentType]
    if left:
        sys.exit(1)


def reproduce(settings: dict[str, Any]) -> list[str]:
    """Computes missing rows, prints and writes the comparison, and returns the rows that left their interval."""
    methods = check_table(settings)
    kept = {row["method"]: row for row in tables.read_rows(Path(settings["kept"]))}
    if missing := [name for name in [FLOAT, *methods] if name not in kept]:
        raise InputError(f"{settings['kept']} has no row of {', '.join(missing)}; it has {', '.join(kept) or 'none'}.")
    if FLOAT not in methods:
        raise InputError(f"Changes are to the float model: methods takes {FLOAT}, too.")
    rows = {row["method"]: row for row in table_rows(settings)}
    texts = {row["protocol"]["evaluation_sha256"] for row in (*rows.values(), *(kept[name] for name in rows))}
    if len(texts) > 1:
        raise InputError(f"The rows of {settings['kept']} were evaluated on another text or other windows.")
    left = [name for name in rows if not inside(name, rows, kept)]
    folder = tables.results_folder(settings)
    shown = table(rows, kept, left)
    write_text(folder / "reproduce.md", tables.as_markdown(shown))
    show(shown)
    said = f"{', '.join(left)} left the interval." if left else "Every figure is inside its interval."
    console.print(f"{said} New rows: {folder}/table.jsonl.", highlight=False, soft_wrap=True)
    return left


def inside(name: str, rows: Mapping[str, Row], kept: Mapping[str, Row]) -> bool:
    """Whether a new row lies in the kept one's interval."""
    new, old = rows[name], kept[name]
    if name == FLOAT:
        return abs(new["perplexity"] - old["perplexity"]) < 2 * old["perplexity_stderr"]
    interval = paired_change(old, kept[FLOAT])
    return interval.low <= paired_change(new, rows[FLOAT]).percent <= interval.high


def table(rows: Mapping[str, Row], kept: Mapping[str, Row], left: list[str]) -> Table:
    """A line for each row: perplexity, its change against the float model and KL, as kept and anew."""
    shown = Table(box=box.SIMPLE_HEAD)
    figures = "perplexity", "change, %", "KL", "seconds"
    for heading in ("method", *(f"{figure}\n{which}" for figure in figures for which in ("kept", "new")), ""):
        shown.add_column(heading, justify="left" if heading in ("method", "") else "right")
    for name, new in rows.items():
        old = kept[name]
        changes = [""] * 2
        if name != FLOAT:
            changes = [str(paired_change(old, kept[FLOAT])), paired_change(new, rows[FLOAT]).text().split(" ")[0]]
        cells = [f"{row['perplexity']:.3f}" for row in (old, new)] + changes
        cells += ["" if row["kl"] is None else f"{row['kl']:.4f}" for row in (old, new)]
        cells += [f"{row['quantize_seconds']:.0f}" for row in (old, new)]
        shown.add_row(tables.label(old), *cells, "left its interval" if name in left else "inside")
    return shown


if __name__ == "__main__":
    run(main)
