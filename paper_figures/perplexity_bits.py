"""Perplexity against bits per weight.

python -m paper_figures.perplexity_bits results/smollm2_135m
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments import tables
from experiments.command_line import one_sentence

# More labels than this run into each other beside their points.
MOST_LABELS = 12


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draws one point a row and writes <folder>/perplexity_bits.{png,pdf}; many rows make a chart, a line each.

    Texts after the first have their name in the file's.
    """
    paths: list[Path] = []
    for text, its in tables.by_text(rows).items():
        figure = _scatter(its) if len(its) <= MOST_LABELS else ranking(its)
        name = f"perplexity_bits-{Path(text).stem}" if paths else "perplexity_bits"
        for kind in ("png", "pdf"):
            paths.append(folder / f"{name}.{kind}")
            figure.savefig(paths[-1], dpi=160)
        plt.close(figure)
    return paths


def _scatter(rows: Sequence[dict[str, Any]]) -> Figure:
    """Perplexity over bits per weight, with standard errors."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for row in rows:
        if tables.is_float(row):
            axes.axhline(row["perplexity"], color="0.5", linewidth=1, linestyle="--", zorder=0)
            axes.annotate(
                f"{tables.label(row)} {row['perplexity']:.2f}",
                (0, row["perplexity"]),
                xycoords=("axes fraction", "data"),
                xytext=(6, 4),
                textcoords="offset points",
                ha="left",
                color="0.35",
            )
    points = [row for row in rows if not tables.is_float(row)]
    for index, row in enumerate(sorted(points, key=lambda row: row["perplexity"])):
        at = (row["bits_per_weight"], row["perplexity"])
        axes.errorbar(*at, yerr=row["perplexity_stderr"], fmt="o", capsize=3, color=f"C{index}")
        axes.annotate(
            f"{tables.label(row)} {row['perplexity']:.2f}", at, xytext=(7, 0), textcoords="offset points", va="center"
        )
    axes.set_xlabel("bits per weight (codes, scales and zeros of the projections)")
    axes.set_ylabel(_measure(rows))
    axes.set_title(f"{_model(rows)}: lower left is better", fontsize=10)
    axes.margins(x=0.25, y=0.12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def ranking(rows: Sequence[dict[str, Any]]) -> Figure:
    """A line a row, by bits: perplexity on the left, KL on the right; filled where nothing smaller is as good."""
    points = sorted((row for row in rows if not tables.is_float(row)), key=lambda row: -row["bits_per_weight"])
    figure, both = plt.subplots(1, 2, figsize=(8.6, 0.19 * len(points) + 1.2), layout="constrained", sharey=True)
    # A broken row must not press all others together: it becomes an arrow at the edge.
    most = {"perplexity": 4 * min(row["perplexity"] for row in rows), "kl": 2.0}
    headings = {"perplexity": _measure(rows), "kl": "KL to the float model"}
    for axes, (column, heading) in zip(both, headings.items(), strict=True):
        for line, row in enumerate(points):
            if row[column] is None:  # of a model that came quantized, and is compared with none
                continue
            beaten = any(
                other["bits_per_weight"] <= row["bits_per_weight"] and other[column] < row[column]
                for other in points
                if other[column] is not None
            )
            face, off = "white" if beaten else "C0", row[column] > most[column]
            at = min(row[column], most[column])
            axes.plot(at, line, ">" if off else "o", markersize=5, color="C0", markerfacecolor=face)
        axes.set_xscale("log")
        if column == "perplexity":
            ticks = [t for t in (10, 15, 20, 25, 30, 40, 50, 60, 80, 100, 150, 200) if 0.2 < t / most[column] < 1]
            axes.set_xticks(ticks, [str(t) for t in ticks], minor=False)
            axes.minorticks_off()
        axes.set_xlabel(heading, fontsize=9)
        axes.grid(axis="both", color="0.92", linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(axis="y", length=0)
    for row in rows:
        if tables.is_float(row):
            both[0].axvline(row["perplexity"], color="0.5", linewidth=1, linestyle="--", zorder=0)
    names = [f"{tables.label(row)}   {row['bits_per_weight']:.2f}" for row in points]
    both[0].set_yticks(range(len(points)), names, fontsize=7.5)
    both[0].set_ylim(-0.7, len(points) - 0.3)
    figure.suptitle(f"{_model(rows)}, bits per weight beside each name; filled: none as small is better", fontsize=10)
    return figure


def _measure(rows: Sequence[dict[str, Any]]) -> str:
    told = rows[0]["protocol"]
    return f"perplexity, {told['windows']} × {told['context']} tokens of {Path(told['data']).name}"


def _model(rows: Sequence[dict[str, Any]]) -> str:
    return Path(rows[0]["protocol"]["model"]).name


if __name__ == "__main__":
    with one_sentence():
        target = Path(sys.argv[1])
        print(*draw(tables.some_rows(target, "table.jsonl"), target))
