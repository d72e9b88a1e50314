"""Outliers: which tokens and channels carry them, layer by layer, and how the activations are distributed.

python -m paper_figures.outliers results/smollm2_135m
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from experiments import tables
from experiments.command_line import one_sentence

Row = dict[str, Any]

# Input -> what it is called and its colour; lines keep it in every panel.
LABELS = {
    "residual": ("residual stream", "0.45"),
    "attention_input": ("q, k, v input", "C0"),
    "attention_output": ("o input", "C2"),
    "mlp_input": ("gate, up input", "C1"),
    "mlp_output": ("down-projection input", "C3"),
}
# Columns of a heat map: more would be thinner than a pixel, and single channels would fade.
COLUMNS = 96


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes <folder>/outliers.{png,pdf} and <folder>/outlier_histograms.{png,pdf}."""
    return [*_save(_outliers(rows), folder / "outliers"), *_save(_histograms(rows), folder / "outlier_histograms")]


def _outliers(rows: Sequence[Row]) -> Figure:
    """Above: tokens, layer by layer; below: a heat map layer × channel for each input."""
    figure = plt.figure(figsize=(12.5, 8.2), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    above, below = halves
    energy, attention, waste = above.subplots(1, 3)
    _energy(energy, rows)
    _attention(attention, rows)
    _waste(waste, rows)
    _heat_maps(below, rows)
    told = rows[0]["protocol"]
    figure.suptitle(
        f"Outliers of {Path(told['model']).name}: {told['windows']} × {told['context']} tokens of "
        f"{Path(told['data']).name}, {'with' if told['bos'] else 'no'} BOS",
        fontsize=12,
    )
    figure.supxlabel(_footnote(rows), fontsize=8, x=0.01, ha="left")
    return figure


def _footnote(rows: Sequence[Row]) -> str:
    """Says what counts as a window's first token, and what its position alone makes of the largest energy."""
    top = max((row for row in rows if row["input"] != "residual"), key=lambda row: row["sink_energy"])
    return (
        "¹ of each window, with its unbroken repeats, whose states are the same (position 0 alone: "
        f"{100 * top['first_token_energy']:.1f} % at layer {top['layer']}, {LABELS[top['input']][0]})."
    )


def _energy(axes: Axes, rows: Sequence[Row]) -> None:
    for name, (label, color) in LABELS.items():
        axes.plot(*_series(rows, name, "sink_energy", 100), "o-", ms=3, lw=1.2, color=color, label=label)
    top = max((row for row in rows if row["input"] != "residual"), key=lambda row: row["sink_energy"])
    share = 100 * top["sink_energy"]
    axes.plot(top["layer"], share, "o", ms=11, mfc="none", mec="k", mew=1.3)
    axes.annotate(
        f"layer {top['layer']},\n{LABELS[top['input']][0].removesuffix(' input')}:\n{share:.1f} %",
        (top["layer"], share),
        xytext=(-9, 2),
        textcoords="offset points",
        ha="right",
        va="top",
        weight="bold",
        fontsize=9,
    )
    axes.set_title("Energy (Gram trace) of the first token¹", fontsize=10)
    axes.set_ylabel("% of all tokens'")
    axes.set_ylim(-3, 106)
    axes.legend(fontsize=8, frameon=False, loc="center", bbox_to_anchor=(0.67, 0.42))
    _layer_axis(axes)


def _attention(axes: Axes, rows: Sequence[Row]) -> None:
    layers, share = _series(rows, "attention_input", "sink_attention", 100)
    context = rows[0]["protocol"]["context"]
    axes.bar(layers, share, color="C0", width=0.75)
    axes.axhline(100 * float(np.mean(1 / np.arange(1, context + 1))), color="k", lw=1, ls="--", label="spread evenly")
    axes.set_title("Attention that the first token¹ receives (the sink)", fontsize=10)
    axes.set_ylabel("% of all attention")
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    _layer_axis(axes)


def _waste(axes: Axes, rows: Sequence[Row]) -> None:
    config = rows[0]["config"]
    for name, (_, color) in LABELS.items():
        axes.plot(*_series(rows, name, "activation_waste", 100), color=color, lw=1.2)
        if name != "residual":
            axes.plot(*_series(rows, name, "weight_waste", 100), color=color, lw=1.2, ls=":")
    axes.plot([], [], color="k", lw=1.2, label="activations, per token")
    axes.plot([], [], color="k", lw=1.2, ls=":", label="weights that read them")
    axes.set_title(f"Levels wasted by the largest of {config['group']}, {config['bits']} bits", fontsize=10)
    axes.set_ylabel("% of levels, mean over groups")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False, loc="upper right")
    _layer_axis(axes)


def _heat_maps(figure: SubFigure, rows: Sequence[Row]) -> None:
    panels = figure.subplots(1, len(LABELS), sharey=True)
    for axes, (name, (label, _)) in zip(panels, LABELS.items(), strict=True):
        own = [row for row in rows if row["input"] == name]
        values = np.array([row["channel_max"] for row in own])
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
        axes.plot(channel, layer, "o", ms=12, mfc="none", mec="cyan", mew=1.5, clip_on=False)
        axes.set_title(
            f"{label}: {_number(max(row['max'] for row in own))}\nat layer {layer}, channel {channel}", fontsize=9
        )
        axes.set_xlabel("channel")
        figure.colorbar(image, ax=axes, orientation="horizontal", label="largest |x| over the tokens", aspect=30)
    panels[0].set_ylabel("layer")


def _histograms(rows: Sequence[Row]) -> Figure:
    """One line a layer; the layer with the largest activation for its median stands out."""
    figure, panels = plt.subplots(
        1, len(LABELS), figsize=(14, 3.6), layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    depth = max(max(row["layer"] for row in rows), 1)
    shades = ScalarMappable(Normalize(0, depth), "viridis")
    for axes, (name, (label, _)) in zip(panels[0], LABELS.items(), strict=True):
        own = [row for row in rows if row["input"] == name]
        for row in own:
            axes.step(*_density(row), where="post", color=shades.to_rgba(row["layer"]), lw=0.7)
        loudest = max(own, key=lambda row: row["ratio"] or 0)
        axes.step(*_density(loudest), where="post", color="C3", lw=1.8)
        axes.axvline(rows[0]["config"]["threshold"], color="k", lw=0.8, ls="--", label="outlier threshold")
        axes.set_title(
            f"{label}\nlayer {loudest['layer']}: {_number(loudest['max'])} = {_number(loudest['ratio'] or 0)} × median",
            fontsize=9,
        )
        axes.set_xlabel("|x|")
    panels[0, 0].set(xscale="log", yscale="log", ylabel="share of activations per octave")
    panels[0, 1].legend(fontsize=8, frameon=False, loc="upper right")
    # What is all but zero is of no interest here.
    panels[0, 0].set_xlim(left=1e-2 * min(row["median"] for row in rows if row["median"]))
    figure.colorbar(shades, ax=list(panels[0]), label="layer", pad=0.01)
    return figure


def _density(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Left edges of the bins, and the share of values in each per octave, so that no bin's width shapes the line."""
    edges, counts = np.array(row["histogram_edges"]), np.array(row["histogram_counts"])
    return edges[:-1], counts / counts.sum() / np.log2(edges[1:] / edges[:-1])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _series(rows: Sequence[Row], name: str, key: str, factor: float) -> tuple[list[int], list[float]]:
    own = [row for row in rows if row["input"] == name]
    return [row["layer"] for row in own], [factor * row[key] for row in own]


def _layer_axis(axes: Axes) -> None:
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _save(figure: Figure, stem: Path) -> list[Path]:
    paths = [stem.with_suffix(f".{kind}") for kind in ("png", "pdf")]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths


if __name__ == "__main__":
    with one_sentence():
        target = Path(sys.argv[1])
        rows = tables.some_rows(target, "outliers.jsonl")
        # Those of the last run: others had other settings.
        print(*draw([row for row in rows if row.get("fingerprint") == rows[-1].get("fingerprint")], target))
