"""The cost of quantizing only one projection type, one layer or one matrix."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jquant.evaluation.rows import FLOAT, Row, check_rows, float_name, model, text, with_bits
from jquant.plot import style


@style.styled
def sensitivity(rows: Sequence[Row], ax: Axes | None = None) -> Axes:
    """Perplexities with one projection type quantized; below them, the KL divergence of each matrix alone.

    Args:
      rows: of `experiments.sensitivity`.
      ax: where to draw the perplexities, instead of a figure of its own.

    Raises:
      InputError: no rows, or something else than rows.
    """
    check_rows(rows)
    if ax is None:
        return figure(rows, style.shown).axes[0]
    _bars(ax, rows, list(rows[0]["projections"]))
    ax.legend()
    return ax


@style.styled
def figure(rows: Sequence[Row], new: Callable[..., Figure] = Figure) -> Figure:
    """Bars of perplexity by projection type, and a heat map layer × projection of KL for each method."""
    names = list(rows[0]["projections"])
    heat = [row for row in rows if row["matrices"]]
    height = 1.5 + 0.09 * (1 + max(cell["layer"] for cell in heat[0]["matrices"])) if heat else 0
    drawn = new(figsize=(style.TWO, 2.6 + height), layout="constrained")
    grid = drawn.add_gridspec(2 if heat else 1, max(len(heat), 1), height_ratios=[2.6, height] if heat else None)
    _bars(drawn.add_subplot(grid[0, :]), rows, names)
    drawn.suptitle(f"{model(rows[0])}\n{text(rows[0])}")
    windows = f"± one standard error over {rows[0]['protocol']['windows']} windows, the same ones for all"
    error = Line2D([], [], color="0.4", linestyle="", marker="|", markersize=9, label=windows)
    drawn.legend(handles=[*drawn.axes[0].get_legend_handles_labels()[0], error], loc="outside lower center", ncols=2)
    if not heat:
        return drawn
    grids = [_matrix(row, names) for row in heat]
    positive = np.concatenate([cells[cells > 0] for cells in grids])
    low, high = positive.min(initial=1.0), positive.max(initial=1e-6)
    panels = [drawn.add_subplot(grid[1, column]) for column in range(len(heat))]
    for axes, row, cells in zip(panels, heat, grids, strict=True):
        axes.imshow(cells, norm=LogNorm(low, high), cmap="magma_r", aspect="auto", interpolation="nearest")
        axes.set_title(f"{with_bits(row)}\none matrix alone, windows: {row['config']['matrix_windows']}")
        axes.set_xticks(range(len(names)), names)
        axes.yaxis.set_major_locator(style.few_ticks(integer=True))
        axes.spines[:].set_visible(True)
    panels[0].set_ylabel("layer")
    bar = drawn.colorbar(panels[0].images[0], ax=panels, label="KL to the float model, nats a token", pad=0.01)
    style.set_ticks(bar.ax.yaxis, style.log_ticks(low, high))
    return drawn


def _bars(axes: Axes, rows: Sequence[Row], names: list[str]) -> None:
    width = 0.8 / len(rows)
    for index, row in enumerate(rows):
        cells = [row["projections"][name] for name in names]
        values = np.array([cell["perplexity"] for cell in cells])
        errors = [cell.get("perplexity_stderr") or 0 for cell in cells]
        at = np.arange(len(names)) + (index - (len(rows) - 1) / 2) * width
        look = {"color": style.family(row)[1], "error_kw": {"ecolor": "0.4", "elinewidth": 0.8}}
        bars = axes.bar(at, values - row[FLOAT], width, bottom=row[FLOAT], yerr=errors, label=with_bits(row), **look)
        axes.bar_label(bars, [f"{value:.1f}" for value in values], fontsize=style.SMALL, padding=1)
    style.float_line(axes, rows[0][FLOAT], f"{float_name(rows[0])}\n{rows[0][FLOAT]:.2f}")
    axes.set_xticks(range(len(names)), names)
    axes.yaxis.set_major_locator(style.few_ticks())
    axes.set_ylabel("perplexity")
    axes.set_title("one projection type quantized in all layers, the rest float")
    axes.margins(y=0.1)


def _matrix(row: Row, names: list[str]) -> np.ndarray:
    cells = np.zeros((1 + max(cell["layer"] for cell in row["matrices"]), len(names)))
    for cell in row["matrices"]:
        cells[cell["layer"], names.index(cell["projection"])] = cell["kl"]
    return cells
