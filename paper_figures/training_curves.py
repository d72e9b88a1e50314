"""How far a model is from the float one while it is trained, by tokens.

python -m paper_figures.training_curves results/qat
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.rows import Row, by_text, command

Curve = list[dict[str, Any]]  # evaluations: tokens, kl, perplexity


def draw(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Writes <folder>/training_curves.{png,pdf} from the rows and from <folder>/<fingerprint>.metrics.jsonl."""
    return style.save(figure(rows, Path(folder)), Path(folder) / "training_curves")


def curves(rows: Sequence[Row], folder: Path) -> list[tuple[Row, Curve]]:
    """The rows that have metrics, each with its evaluations."""
    found = []
    for row in rows:
        path = folder / f"{row.get('fingerprint')}.metrics.jsonl"
        if path.is_file():
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            tokens = {line["step"]: line["tokens"] for line in lines if "tokens" in line}
            before = row["training_tokens"] - max(tokens.values())  # of a stage of blocks
            found.append((row, [line | {"tokens": before + tokens[line["step"]]} for line in lines if "kl" in line]))
    return found


@style.styled
def figure(rows: Sequence[Row], folder: Path) -> Figure:
    """KL and perplexity by millions of tokens: panels side by side for each text, a line for each row with metrics."""
    drawn = [(row, curve) for row, curve in curves(rows, folder) if curve]
    if not drawn:
        raise ValueError(f"no row has evaluations in {folder}/<fingerprint>.metrics.jsonl")
    texts = by_text([row for row, _ in drawn])
    names = list(dict.fromkeys(_name(row) for row, _ in drawn))
    plot = Figure(figsize=(7.2, 2.9 * len(texts)), layout="constrained")
    grid: Any = plot.subplots(len(texts), 2, squeeze=False)
    for (kl, perplexity), chosen in zip(grid, texts.values(), strict=True):
        of_text = [(row, curve) for row, curve in drawn if row in chosen]
        _lines(kl, of_text, "kl", names)
        _lines(perplexity, of_text, "perplexity", names)
        kl.set_ylabel("KL to the float model, nats a token")
        perplexity.set_ylabel("perplexity")
        base = chosen[0]["perplexity"] / (1 + chosen[0]["perplexity_change_percent"] / 100)
        style.float_line(perplexity, base, f"{style.float_name(chosen[0])}\n{base:.2f}")
        for axes, value in ((kl, "kl"), (perplexity, "perplexity")):
            _label_ends([(curve[-1]["tokens"] / 1e6, curve[-1][value]) for _, curve in of_text], axes, value)
        kl.set_title(style.text(chosen[0]), loc="left")
    plot.suptitle(style.model(drawn[0][0]))
    lines = {line.get_label(): line for kl, _ in grid for line in kl.get_lines()}
    plot.legend([lines[name] for name in names], names, loc="outside lower center", ncols=min(3, len(names)))
    return plot


def _lines(axes: Axes, drawn: Sequence[tuple[Row, Curve]], figure: str, names: list[str]) -> None:
    for row, curve in drawn:
        number = names.index(_name(row))
        at, values = [point["tokens"] / 1e6 for point in curve], [point[figure] for point in curve]
        look = {
            "color": f"C{number}",
            "marker": "o",
            "markersize": 3,
            "linewidth": 1.2,
            "linestyle": "-" if number < 10 else "--",
        }
        axes.plot(at, values, label=_name(row), **look)
    axes.set_xscale("log")
    every = [point["tokens"] / 1e6 for _, curve in drawn for point in curve]
    style.set_ticks(axes.xaxis, style.log_ticks(0.9 * min(every), 1.1 * max(every)))
    axes.yaxis.set_major_locator(style.few_ticks())
    axes.set_xlabel("tokens learned, millions")
    axes.grid(axis="y")
    axes.margins(y=0.12)


def _label_ends(ends: list[tuple[float, float]], axes: Axes, figure: str) -> None:
    """Writes the curves' last values, from the lowest up, those left out that would cover one below."""
    (low, high), (left, right) = axes.get_ylim(), axes.get_xlim()
    written: list[tuple[float, float]] = []
    for at, value in sorted(ends, key=lambda end: end[1]):
        near = lambda other, at=at: abs(math.log(other / at)) < 0.12 * math.log(right / left)  # noqa: E731
        if all(value - below > 0.07 * (high - low) for other, below in written if near(other)):
            text = f"{value:.3f}" if figure == "kl" else style.number(value)
            axes.annotate(text, (at, value), (0, 5), textcoords="offset points", ha="center", fontsize=7)
            written.append((at, value))


def _name(row: Row) -> str:
    bits = row["config"].get("bits")
    return (
        f"{bits} bits: {row['settings']}"
        if row.get("settings")
        else f"{bits} bits, {row['training_tokens'] / 1e6:.2f} M"
    )


if __name__ == "__main__":
    command(draw, "table.jsonl")
