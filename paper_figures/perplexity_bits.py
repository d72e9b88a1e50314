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

from experiments import tables


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draws one point a row, with its standard error, and writes <folder>/perplexity_bits.{png,pdf}."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for row in rows:
        if row["method"] == "fp32":
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
    points = [row for row in rows if row["method"] != "fp32"]
    for index, row in enumerate(sorted(points, key=lambda row: row["perplexity"])):
        at = (row["bits_per_weight"], row["perplexity"])
        axes.errorbar(*at, yerr=row["perplexity_stderr"], fmt="o", capsize=3, color=f"C{index}")
        axes.annotate(
            f"{tables.label(row)} {row['perplexity']:.2f}", at, xytext=(7, 0), textcoords="offset points", va="center"
        )
    told = rows[0]["protocol"]
    axes.set_xlabel("bits per weight (codes, scales and zeros of the projections)")
    axes.set_ylabel(f"perplexity, {told['windows']} × {told['context']} tokens of {Path(told['data']).name}")
    axes.set_title(f"{Path(told['model']).name}: lower left is better", fontsize=10)
    axes.margins(x=0.25, y=0.12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    paths = [folder / f"perplexity_bits.{kind}" for kind in ("png", "pdf")]
    for path in paths:
        figure.savefig(path, dpi=160)
    plt.close(figure)
    return paths


if __name__ == "__main__":
    target = Path(sys.argv[1])
    print(*draw(tables.read_rows(target), target))
