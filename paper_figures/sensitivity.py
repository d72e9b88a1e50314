"""What one projection type, one layer, one matrix costs when it alone is quantized.

python -m paper_figures.sensitivity results/sensitivity
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm

from experiments import tables
from experiments.command_line import one_sentence


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Bars of perplexity by projection type, and a heat map layer × projection of KL for each method."""
    names = list(rows[0]["projections"])
    heat = [row for row in rows if row["matrices"]]
    height = 3.0 + (2.0 + 0.11 * (1 + max(one["layer"] for one in heat[0]["matrices"])) if heat else 0)
    figure = plt.figure(figsize=(8.4, height), layout="constrained")
    grid = figure.add_gridspec(2 if heat else 1, max(len(heat), 1), height_ratios=[3.0, height - 3.0] if heat else None)
    _bars(figure.add_subplot(grid[0, :]), rows, names)
    if heat:
        grids = [_matrix(row, names) for row in heat]
        positive = np.concatenate([cells[cells > 0] for cells in grids])
        norm = LogNorm(positive.min(initial=1.0), positive.max(initial=1e-6))
        image = None
        for column, (row, cells) in enumerate(zip(heat, grids, strict=True)):
            axes = figure.add_subplot(grid[1, column])
            image = axes.imshow(cells, norm=norm, cmap="magma_r", aspect="auto", interpolation="nearest")
            axes.set_title(tables.label(row), fontsize=9)
            axes.set_xticks(range(len(names)), names, fontsize=8)
            axes.set_yticks(range(0, len(cells), 3))
            axes.set_ylabel("layer" if column == 0 else "")
        assert image is not None
        figure.colorbar(image, ax=figure.axes[1:], label="KL to the float model, nats", pad=0.01)
    paths = [folder / f"sensitivity.{kind}" for kind in ("png", "pdf")]
    for path in paths:
        figure.savefig(path, dpi=160)
    plt.close(figure)
    return paths


def _bars(axes: Any, rows: Sequence[dict[str, Any]], names: list[str]) -> None:
    width = 0.8 / len(rows)
    for index, row in enumerate(rows):
        values = [row["projections"][name]["perplexity"] for name in names]
        at = np.arange(len(names)) + (index - (len(rows) - 1) / 2) * width
        bars = axes.bar(at, np.array(values) - row["fp32"], width, bottom=row["fp32"], label=tables.label(row))
        axes.bar_label(bars, [f"{value:.1f}" for value in values], fontsize=6.5, padding=1)
    axes.axhline(rows[0]["fp32"], color="0.5", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("perplexity")
    told = rows[0]["protocol"]
    axes.set_title(
        f"{Path(told['model']).name}, one projection type quantized in all layers, the rest float "
        f"(dashed: {rows[0]['fp32']:.2f})",
        fontsize=9,
    )
    axes.legend(frameon=False, fontsize=8)
    axes.margins(y=0.15)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _matrix(row: dict[str, Any], names: list[str]) -> np.ndarray:
    cells = np.zeros((1 + max(one["layer"] for one in row["matrices"]), len(names)))
    for one in row["matrices"]:
        cells[one["layer"], names.index(one["projection"])] = one["kl"]
    return cells


if __name__ == "__main__":
    with one_sentence():
        target = Path(sys.argv[1])
        print(*draw(tables.some_rows(target, "sensitivity.jsonl"), target))
