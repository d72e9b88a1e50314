"""Squared error on normal weights against bits per weight."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jquant.evaluation.rows import Row, check_rows, name, stem_and_width
from jquant.plot import style


@style.styled
def distortion(rows: Sequence[Row], ax: Axes | None = None) -> Axes:
    """Mean squared error by bits per weight, with Shannon's bound 4^−bits; a method's widths are joined.

    Args:
      rows: of `experiments.distortion`.
      ax: where to draw, instead of a figure of its own.

    Raises:
      InputError: no rows, or something else than rows.
    """
    check_rows(rows)
    if ax is None:
        return figure(rows, style.shown).axes[0]
    _lines(ax, rows)
    ax.legend()
    return ax


@style.styled
def figure(rows: Sequence[Row], new: Callable[..., Figure] = Figure) -> Figure:
    """The panel in one column of a paper."""
    drawn = new(figsize=(style.ONE, 3.4), layout="constrained")
    axes = drawn.add_subplot()
    axes.set_title("normal weights, rounded to nearest")
    _lines(axes, rows)
    drawn.legend(loc="outside lower center", ncols=2)
    return drawn


def _lines(axes: Axes, rows: Sequence[Row]) -> None:
    methods: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["bits_per_weight"]):
        methods.setdefault(stem_and_width(row)[0], []).append(row)
    markers = "osD^v<>PX*hd"
    for number, of_method in enumerate(methods.values()):
        bits = [row["bits_per_weight"] for row in of_method]
        errors = [row["squared_error"] for row in of_method]
        marker, color = markers[number % len(markers)], style.PALETTE[number % len(style.PALETTE)]
        label = name(of_method[0])
        axes.plot(bits, errors, linewidth=0.8, markersize=3, marker=marker, color=color, label=label)
    ends = min(row["bits_per_weight"] for row in rows), max(row["bits_per_weight"] for row in rows)
    bits = np.linspace(ends[0] - 0.2, ends[1] + 0.2, 50)
    axes.plot(bits, 4.0**-bits, color="0.5", ls="--", lw=0.8, label="bound")
    axes.set_yscale("log")
    axes.set(xlabel="bits per weight, with scales", ylabel="mean squared error")
    axes.grid(True)
