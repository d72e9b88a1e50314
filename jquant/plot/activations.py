"""Outliers: their tokens and channels, layer by layer, and the distribution of activations."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from jquant.evaluation.rows import Row, check_rows, model, number, text
from jquant.plot import style

# Input -> its label, and its colour in all panels.
LABELS = {
    "residual": ("residual stream", "0.3"),
    "attention_input": ("q, k, v input", "#0072b2"),
    "attention_output": ("o input", "#009e73"),
    "mlp_input": ("gate, up input", "#e69f00"),
    "mlp_output": ("down-projection input", "#d55e00"),
}
# Columns of a heat map: with more, a column would be thinner than a pixel and single channels would fade.
COLUMNS = 96


@style.styled
def outliers(rows: Sequence[Row], ax: Axes | None = None) -> Axes:
    """The first token's energy, layer by layer; beside it attention and wasted levels, below it each channel's maximum.

    Args:
      rows: of `experiments.outliers`; with `ax` also those of `jquant.outliers(...).rows()`.
      ax: where to draw the energy, instead of a figure of its own.

    Raises:
      InputError: no rows, or something else than rows.
    """
    check_rows(rows)
    if ax is None:
        return figure(rows, style.shown).axes[0]
    _energy(ax, rows, "")
    ax.legend(handles=_inputs())
    return ax


@style.styled
def figure(rows: Sequence[Row], new: Callable[..., Figure] = Figure) -> Figure:
    """Above: tokens by layer; below: a heat map, layer × channel, for each input."""
    drawn = new(figsize=(style.TWO, 6.6), layout="constrained")
    halves: Any = drawn.subfigures(2, 1, height_ratios=(1, 1.1))
    above, below = halves
    energy, attention, waste = above.subplots(1, 3)
    _energy(energy, rows, "¹")
    _attention(attention, rows)
    _waste(waste, rows)
    above.legend(handles=_inputs(), loc="outside lower center", ncols=len(LABELS))
    _heat_maps(below, rows)
    drawn.suptitle(_title(rows))
    drawn.supxlabel(_footnote(rows), fontsize=style.SMALL, x=0.01, ha="left")
    return drawn


def _inputs() -> list[Line2D]:
    """Legend entries of the inputs."""
    return [Line2D([], [], color=color, label=label) for label, color in LABELS.values()]


def _title(rows: Sequence[Row]) -> str:
    return f"{model(rows[0])}\n{text(rows[0])}, {'with' if rows[0]['protocol']['bos'] else 'no'} BOS"


def _footnote(rows: Sequence[Row]) -> str:
    """Explains a window's first token, and gives the largest energy of position 0 alone."""
    top = max((row for row in rows if row["input"] != "residual"), key=lambda row: row["sink_energy"])
    return (
        "¹ Of each window, with its unbroken repeats, whose states are the same. Position 0 alone: "
        f"{100 * top['first_token_energy']:.1f} % at layer {top['layer']}, {LABELS[top['input']][0]}."
    )


def _energy(axes: Axes, rows: Sequence[Row], note: str) -> None:
    for name, (_, color) in LABELS.items():
        axes.plot(*_series(rows, name, "sink_energy", 100.0), "o-", ms=2, lw=1, color=color)
    top = max((row for row in rows if row["input"] != "residual"), key=lambda row: row["sink_energy"])
    axes.plot(top["layer"], 100 * top["sink_energy"], "o", ms=8, mfc="none", mec="k", mew=1.2)
    ringed = f"{100 * top['sink_energy']:.1f} % at layer {top['layer']}, {LABELS[top['input']][0]}"
    axes.set_title(f"Energy (Gram trace) of the first token{note}\nring: {ringed}")
    axes.set_ylim(-3, 106)
    _finish(axes, "% of all tokens'")


def _attention(axes: Axes, rows: Sequence[Row]) -> None:
    layers, share = _series(rows, "attention_input", "sink_attention", 100.0)
    context = rows[0]["protocol"]["context"]
    axes.bar(layers, share, color=LABELS["attention_input"][1], width=0.75)
    even = 100 * float(np.mean(1 / np.arange(1, context + 1)))
    axes.axhline(even, color="k", lw=1, ls="--", label=f"spread evenly: {even:.1f} %")
    axes.set_title("Attention that the first\ntoken¹ receives (the sink)")
    _finish(axes, "% of all attention")


def _waste(axes: Axes, rows: Sequence[Row]) -> None:
    config = rows[0]["config"]
    for name, (_, color) in LABELS.items():
        axes.plot(*_series(rows, name, "activation_waste", 100.0), color=color, lw=1)
        if name != "residual":
            axes.plot(*_series(rows, name, "weight_waste", 100.0), color=color, lw=1, ls=":")
    axes.plot([], [], color="k", lw=1, label="activations, per token")
    axes.plot([], [], color="k", lw=1, ls=":", label="weights that read them")
    axes.set_title(f"{config['bits']}-bit levels wasted by the\nlargest of {config['group']} neighbours")
    _finish(axes, "% of levels, mean over groups")


def _finish(axes: Axes, measured: str) -> None:
    """Labels the axes; a legend gets space above the lines."""
    axes.set(xlabel="layer", ylabel=measured)
    axes.xaxis.set_major_locator(style.few_ticks(integer=True))
    axes.yaxis.set_major_locator(style.few_ticks())
    if axes.get_legend_handles_labels()[0]:
        axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
        axes.legend(loc="upper center")


def _heat_maps(drawn: SubFigure, rows: Sequence[Row]) -> None:
    panels = drawn.subplots(1, len(LABELS), sharey=True)
    for axes, (name, (label, _)) in zip(panels, LABELS.items(), strict=True):
        input_rows = [row for row in rows if row["input"] == name]
        values = np.array([row["channel_max"] for row in input_rows])
        layers, channels = values.shape
        high = max(float(values.max()), 1e-30)
        low = min(max(float(np.quantile(values, 0.02)), 1e-7 * high), 0.1 * high)
        pooled = np.stack([part.max(1) for part in np.array_split(values, min(COLUMNS, channels), axis=1)], 1)
        image = axes.imshow(
            np.maximum(pooled, low),
            norm=LogNorm(low, high),
            cmap="inferno",
            aspect="auto",
            interpolation="nearest",
            extent=(-0.5, channels - 0.5, layers - 0.5, -0.5),
        )
        layer, channel = np.unravel_index(np.argmax(values), values.shape)
        axes.plot(channel, layer, "o", ms=8, mfc="none", mec="cyan", mew=1.2, clip_on=False)
        largest = number(max(row["max"] for row in input_rows))
        axes.set_title(f"{label}\nring: {largest}\nlayer {layer}, channel {channel}", fontsize=style.SMALL)
        axes.set_xlabel("channel")
        axes.xaxis.set_major_locator(style.few_ticks(integer=True, most=4))
        axes.yaxis.set_major_locator(style.few_ticks(integer=True))
        bar = drawn.colorbar(image, ax=axes, orientation="horizontal", label="largest |x|", aspect=15)
        style.set_ticks(bar.ax.xaxis, style.log_ticks(low, high, most=4))
    panels[0].set_ylabel("layer")


@style.styled
def histograms(rows: Sequence[Row]) -> Figure:
    """One line for each layer; the layer with the largest max / median stands out."""
    drawn = Figure(figsize=(style.TWO, 2.9), layout="constrained")
    panels = drawn.subplots(1, len(LABELS), sharex=True, sharey=True)
    shades = ScalarMappable(Normalize(0, max(*(row["layer"] for row in rows), 1)), "viridis")
    for axes, (name, (label, _)) in zip(panels, LABELS.items(), strict=True):
        input_rows = [row for row in rows if row["input"] == name]
        for row in input_rows:
            axes.step(*_density(row), where="post", color=shades.to_rgba(row["layer"]), lw=0.5)
        top = max(input_rows, key=lambda row: row["ratio"] or 0)
        axes.step(*_density(top), where="post", color="#d55e00", lw=1.5)
        axes.axvline(rows[0]["config"]["threshold"], color="k", lw=0.8, ls="--")
        largest, ratio = number(top["max"]), number(top["ratio"] or 0)
        axes.set_title(f"{label}\nlayer {top['layer']}: {largest}\n= {ratio} × median", fontsize=style.SMALL)
        axes.set(xscale="log", yscale="log", xlabel="|x|")
    # Values far below the median are not shown.
    panels[0].set_xlim(left=1e-2 * min(row["median"] for row in rows if row["median"]))
    panels[0].set_ylabel("share of activations per octave")
    style.set_ticks(panels[0].xaxis, style.log_ticks(*panels[0].get_xlim(), most=4))
    style.set_ticks(panels[0].yaxis, style.log_ticks(*panels[0].get_ylim()))
    lines = [
        Line2D([], [], color="#d55e00", lw=1.5, label="the layer with the largest max |x| / median"),
        Line2D([], [], color="k", lw=0.8, ls="--", label=f"outliers: |x| ≥ {rows[0]['config']['threshold']:g}"),
    ]
    drawn.legend(handles=lines, loc="outside lower center", ncols=2)
    drawn.colorbar(shades, ax=list(panels), label="layer", pad=0.01, ticks=style.few_ticks(integer=True))
    drawn.suptitle(_title(rows))
    return drawn


def _density(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Left edges of the bins, and each bin's share of values per octave, which does not depend on its width."""
    edges, counts = np.array(row["histogram_edges"]), np.array(row["histogram_counts"])
    return edges[:-1], counts / counts.sum() / np.log2(edges[1:] / edges[:-1])


def _series(rows: Sequence[Row], name: str, key: str, factor: float) -> tuple[list[int], list[float]]:
    input_rows = [row for row in rows if row["input"] == name]
    return [row["layer"] for row in input_rows], [factor * row[key] for row in input_rows]
