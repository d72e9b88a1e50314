"""Perplexity against bits per weight.

python -m paper_figures.perplexity_bits results/smollm2_135m
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from paper_figures import style
from paper_figures.rows import Ends, Row, by_text, command, intervals, is_float

# With more points, or a perplexity so many times the best, the figure is a chart with a line for each row.
MOST_POINTS, FARTHEST = 12, 4
LARGEST_KL = 2.0  # beyond it a model is no usable language model
# Places of a label beside its point: distance in points, and direction.
PLACES = [(d, x, y) for d in (6, 11, 17, 24) for x, y in ((1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))]
SIDES = {1: ("left", "bottom"), 0: ("center", "center"), -1: ("right", "top")}


def draw(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Writes <folder>/perplexity_bits.{png,pdf}: one point for each row, or with many rows a line for each.

    Files of further texts also have the text's name.
    """
    paths: list[Path] = []
    for text, text_rows in by_text(rows).items():
        stem = f"perplexity_bits-{Path(text).stem}" if paths else "perplexity_bits"
        paths += style.save(figure(text_rows), Path(folder) / stem)
    return paths


def figure(rows: Sequence[Row]) -> Figure:
    """The figure that suits one text's rows: `scatter` or `ranking`."""
    perplexities = [row["perplexity"] for row in rows]
    few = len(rows) <= MOST_POINTS and max(perplexities) <= FARTHEST * min(perplexities)
    return scatter(rows) if few else ranking(rows)


@style.styled
def scatter(rows: Sequence[Row]) -> Figure:
    """Perplexity over bits per weight."""
    drawn = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = drawn.add_subplot()
    kind, ends = intervals(rows)
    points = [(row, pair) for row, pair in zip(rows, ends, strict=True) if not is_float(row)]
    for row, pair in points:
        color = style.family(row)[1]
        axes.plot(row["bits_per_weight"], row["perplexity"], "o", markersize=5, color=color)
        if pair:
            axes.vlines(row["bits_per_weight"], *pair, color=color)
    for row in filter(is_float, rows):
        style.float_line(axes, row["perplexity"], f"{style.name(row)}\n{row['perplexity']:.2f}")
    axes.set_xlabel("bits per weight (codes, scales and zeros of the projections)")
    axes.set_ylabel("perplexity, lower is better")
    axes.set_title(f"{style.model(rows[0])}\n{style.text(rows[0])}")
    axes.margins(x=0.2, y=0.12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(style.few_ticks())
    if any(ends):
        line = Line2D([], [], color="0.4", linestyle="", marker="|", markersize=10, label=kind)
        drawn.legend(handles=[line], loc="outside lower center")
    _label(axes, drawn, points, [row["perplexity"] for row in rows if is_float(row)])
    return drawn


def _label(axes: Axes, drawn: Figure, points: Sequence[tuple[Row, Ends | None]], lines: Sequence[float]) -> None:
    """Labels each point where the label covers no point, no line and no other label."""
    renderer = FigureCanvasAgg(drawn).get_renderer()
    drawn.draw_without_rendering()  # computes the layout, on which the places depend
    spans = [((row["bits_per_weight"],) * 2, pair or (row["perplexity"],) * 2) for row, pair in points]
    spans += [(axes.get_xlim(), (line, line)) for line in lines]
    corners = [axes.transData.transform([(x[0], y[0]), (x[1], y[1])]) for x, y in spans]
    taken = [Bbox(corner).padded(3 * drawn.dpi / 72) for corner in corners]
    for (row, _), label in zip(points, labels([row for row, _ in points]), strict=True):
        text = axes.annotate(
            f"{label} {row['perplexity']:.2f}",
            (row["bits_per_weight"], row["perplexity"]),
            (0, 0),
            textcoords="offset points",
            color="0.2",
        )
        text.set_in_layout(False)
        for distance, x, y in PLACES:
            text.set(position=(distance * x, distance * y), ha=SIDES[x][0], va=SIDES[y][1])
            box = text.get_window_extent(renderer)
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
            if inside and not any(map(box.overlaps, taken)):
                break
        taken.append(text.get_window_extent(renderer))


def labels(rows: Sequence[Row]) -> list[str]:
    """The rows' names, with a sweep's settings if two names are the same."""
    names = [(style.name(row), round(row["bits_per_weight"], 2)) for row in rows]
    alike = Counter(names)
    settings = [row.get("settings") if alike[name] > 1 else None for row, name in zip(rows, names, strict=True)]
    return [f"{name} ({more})" if more else name for (name, _), more in zip(names, settings, strict=True)]


@style.styled
def ranking(rows: Sequence[Row]) -> Figure:
    """A line for each row, by bits: perplexity left, KL right; filled if no model of this size or smaller is better."""
    kind, ends = intervals(rows)
    points: list[Row] = [row | {"ends": pair} for row, pair in zip(rows, ends, strict=True) if not is_float(row)]
    points.sort(key=lambda row: (-row["bits_per_weight"], -row["perplexity"]))
    least = min(row["perplexity"] for row in rows)
    limits = {"perplexity": (least, FARTHEST * least)}
    headings = {"perplexity": "perplexity", "kl": "KL to the float model, nats a token"}
    if any(row["kl"] is not None for row in points):  # None: a stored quantized model without a float one
        limits["kl"] = (min((row["kl"] for row in points if row["kl"]), default=1e-3), LARGEST_KL)
    drawn = Figure(figsize=(8, 0.165 * len(points) + 1.7), layout="constrained")
    panels = drawn.subplots(1, len(limits), sharey=True, squeeze=False, gridspec_kw={"wspace": 0.06})[0]
    for axes, column in zip(panels, limits, strict=True):
        _panel(axes, [row for row in enumerate(points) if row[1][column] is not None], column, limits[column])
        axes.set_xlabel(headings[column])
    for row in filter(is_float, rows):
        style.float_line(panels[0], row["perplexity"], f"{style.name(row)} {row['perplexity']:.2f}", upright=True)
    names = [f"{label}   {row['bits_per_weight']:.2f}" for label, row in zip(labels(points), points, strict=True)]
    panels[0].set_yticks(range(len(points)), names, fontsize=7)
    panels[0].set_ylim(-0.7, len(points) - 0.3)
    drawn.suptitle(f"{style.model(rows[0])}\n{style.text(rows[0])}; beside each name: bits per weight")
    arrows = any(line.get_marker() in ("<", ">") for axes in panels for line in axes.lines)
    drawn.legend(
        handles=_markers(arrows, f"{kind},\nwhere longer than the marker" if any(ends) else None),
        loc="outside lower left",
    )
    drawn.legend(handles=_families(points), loc="outside lower right", ncols=2)
    return drawn


def _panel(axes: Axes, points: Sequence[tuple[int, Row]], column: str, limits: Ends) -> None:
    """One column of values; a value beyond the limits is drawn as an arrow, so that the others stay apart."""
    pairs = [(row["ends"] if column == "perplexity" else None) or (row[column],) * 2 for _, row in points]
    low, high = limits[0], max(limits[0] * 1.01, min(limits[1], max(end for _, end in pairs)))
    for (line, row), pair in zip(points, pairs, strict=True):
        value, color = row[column], style.family(row)[1]
        best = min(other[column] for _, other in points if other["bits_per_weight"] <= row["bits_per_weight"])
        shown = min(max(value, low), high)
        side = (value > shown) - (value < shown)
        face, marker = color if value == best else "white", {1: ">", 0: "o", -1: "<"}[side]
        axes.plot(shown, line, marker, markersize=4.5, color=color, markerfacecolor=face)
        if side:
            place = {"xytext": (-6 * side, 0), "textcoords": "offset points", "va": "center", "fontsize": 6.5}
            axes.annotate(style.number(value), (shown, line), ha="right" if side > 0 else "left", **place)
        else:
            axes.hlines(line, *pair, color=color, linewidth=1, zorder=1.5)
    room = (high / low) ** 0.06
    axes.set_xscale("log")
    axes.set_xlim(low / room, high * room)
    style.set_ticks(axes.xaxis, style.log_ticks(low / room, high * room))
    axes.grid()
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _markers(arrows: bool, kind: str | None) -> list[Line2D]:
    """Legend entries of the markers."""
    look = {"color": "0.3", "linestyle": "", "markersize": 4.5}
    return [
        Line2D([], [], marker="o", label="filled: nothing of this size or smaller is better", **look),
        Line2D([], [], marker="o", mfc="white", label="open: something of this size or smaller is better", **look),
        *([Line2D([], [], marker=">", label="arrow: beyond the axis, with its value", **look)] if arrows else []),
        *([Line2D([], [], color="0.3", linewidth=1, label=kind)] if kind else []),
    ]


def _families(points: Sequence[Row]) -> list[Line2D]:
    """Legend entries of the colours."""
    colors = dict(map(style.family, reversed(points)))
    return [Line2D([], [], color=color, ls="", marker="s", ms=4.5, label=name) for name, color in colors.items()]


if __name__ == "__main__":
    command(draw, "table.jsonl")
