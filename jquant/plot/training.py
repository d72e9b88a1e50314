"""How far a model is from the float one while it is trained, by tokens."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jquant.errors import InputError
from jquant.evaluation.rows import Row, by_text, check_rows, float_name, model, number, text
from jquant.plot import style

MARKERS = "os^Dv"
KL = "KL to the float model, nats"
Curve = list[dict[str, Any]]  # evaluations: tokens, kl, perplexity


@style.styled
def training_curves(rows: Sequence[Row], folder: str | Path, ax: Axes | None = None) -> Axes:
    """KL to the float model and perplexity while a model is trained, a line for each row with metrics.

    Args:
      rows: of `experiments.qat`.
      folder: holds <fingerprint>.metrics.jsonl of the rows.
      ax: where to draw the KL, instead of a figure of its own.

    Raises:
      InputError: no rows, or something else than rows; no row has metrics there.
    """
    check_rows(rows)
    if ax is None:
        return figure(rows, folder, style.shown).axes[0]
    drawn = _drawn(rows, folder)
    _lines(ax, drawn, "kl", list(dict.fromkeys(_name(row) for row, _ in drawn)))
    ax.set_ylabel(KL)
    ax.legend()
    return ax


def curves(rows: Sequence[Row], folder: str | Path) -> list[tuple[Row, Curve]]:
    """The rows that have metrics, each with its evaluations."""
    found = []
    for row in rows:
        path = Path(folder) / f"{row.get('fingerprint')}.metrics.jsonl"
        if path.is_file():
            try:
                lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
                tokens = {line["step"]: line["tokens"] for line in lines if "tokens" in line}
                before = row["training_tokens"] - max(tokens.values())  # of a stage of blocks
                curve = [line | {"tokens": before + tokens[line["step"]]} for line in lines if "kl" in line]
            except (OSError, ValueError, LookupError, TypeError, RecursionError) as broken:
                raise InputError(f"{path} is not what a training wrote ({type(broken).__name__}).") from None
            found.append((row, curve))
    return found


def _drawn(rows: Sequence[Row], folder: str | Path) -> list[tuple[Row, Curve]]:
    """The rows that have evaluations, and these."""
    drawn = [(row, curve) for row, curve in curves(rows, folder) if curve]
    if not drawn:
        raise InputError(f"No row has evaluations in {folder}/<fingerprint>.metrics.jsonl.")
    return drawn


@style.styled
def figure(rows: Sequence[Row], folder: str | Path, new: Callable[..., Figure] = Figure) -> Figure:
    """KL and perplexity by millions of tokens: panels side by side for each text, a line for each row with metrics."""
    drawn = _drawn(rows, folder)
    texts = by_text([row for row, _ in drawn])
    names = list(dict.fromkeys(_name(row) for row, _ in drawn))
    plot = new(figsize=(style.TWO, 2.7 * len(texts)), layout="constrained")
    grid: Any = plot.subplots(len(texts), 2, squeeze=False)
    for (kl, perplexity), chosen in zip(grid, texts.values(), strict=True):
        of_text = [(row, curve) for row, curve in drawn if row in chosen]
        _lines(kl, of_text, "kl", names)
        _lines(perplexity, of_text, "perplexity", names)
        kl.set_ylabel(KL)
        perplexity.set_ylabel("perplexity")
        base = chosen[0]["perplexity"] / (1 + chosen[0]["perplexity_change_percent"] / 100)
        style.float_line(perplexity, base, f"{float_name(chosen[0])}\n{base:.2f}")
        kl.set_title(text(chosen[0]), loc="left")
    plot.suptitle(model(drawn[0][0]))
    lines = {line.get_label(): line for kl, _ in grid for line in kl.get_lines()}
    plot.legend([lines[name] for name in names], names, loc="outside lower center", ncols=min(3, len(names)))
    plot.draw_without_rendering()  # computes the layout, on which the places depend
    for (kl, perplexity), chosen in zip(grid, texts.values(), strict=True):
        ends = [curve[-1] for row, curve in drawn if row in chosen]
        _label_ends(kl, ends, "kl")
        _label_ends(perplexity, ends, "perplexity")
    return plot


def _lines(axes: Axes, drawn: Sequence[tuple[Row, Curve]], figure: str, names: list[str]) -> None:
    for row, curve in drawn:
        place = names.index(_name(row))
        at, values = [point["tokens"] / 1e6 for point in curve], [point[figure] for point in curve]
        look = {
            "color": f"C{place}",
            "marker": MARKERS[place % len(MARKERS)],
            "markersize": 3,
            "linewidth": 1.1,
            "linestyle": "-" if place < len(style.PALETTE) else "--",
        }
        axes.plot(at, values, label=_name(row), **look)
    axes.set_xscale("log")
    every = [point["tokens"] / 1e6 for _, curve in drawn for point in curve]
    style.set_ticks(axes.xaxis, style.log_ticks(0.9 * min(every), 1.1 * max(every)))
    axes.yaxis.set_major_locator(style.few_ticks())
    axes.set_xlim(right=axes.get_xlim()[1] * 1.15)  # room for the last values
    axes.set_xlabel("tokens learned, millions")
    axes.grid(axis="y")
    axes.margins(y=0.12)


def _label_ends(axes: Axes, ends: list[dict[str, Any]], figure: str) -> None:
    """Writes the curves' last values beside them; one that would cover another stands above it."""
    drawn = axes.get_figure(root=True)
    assert drawn is not None
    points = drawn.dpi / 72
    written: list[tuple[float, float]] = []
    places = {(end["tokens"] / 1e6, end[figure]): None for end in sorted(ends, key=lambda end: end[figure])}
    marks = [axes.transData.transform(at) / points for at in places]
    for at, (x, y) in zip(places, marks, strict=True):
        right = max(other for other, height in marks if abs(other - x) < 26 and abs(height - y) < 8)
        up = max([y, *(below + 8 for other, below in written if abs(other - x) < 26)]) - y
        label = f"{at[1]:.3f}" if figure == "kl" else number(at[1])
        axes.annotate(label, at, (right - x + 5, up), textcoords="offset points", va="center", fontsize=style.SMALL)
        written.append((x, y + up))


def _name(row: Row) -> str:
    bits = row["config"].get("bits")
    return (
        f"{bits} bits: {row['settings']}"
        if row.get("settings")
        else f"{bits} bits, {row['training_tokens'] / 1e6:.2f} M"
    )
