"""Perplexity against bits per weight."""

import textwrap
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from jquant.errors import InputError
from jquant.evaluation.rows import (
    Ends,
    Row,
    by_text,
    check_rows,
    intervals,
    is_float,
    model,
    name,
    number,
    published,
    text,
    with_bits,
)
from jquant.plot import style

# With more points, or a perplexity so many times the best, the figure is a chart with a line for each row.
MOST_POINTS, FARTHEST = 12, 4
FEW_POINTS = 6  # that fit into one column of a paper
LARGEST_KL = 2.0  # beyond it a model is no usable language model
# Places of a label beside its point: distance in points, and direction.
PLACES = [(d, x, y) for d in (5, 9, 14, 20, 27, 35) for x, y in ((1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))]
SIDES = {1: ("left", "bottom"), 0: ("center", "center"), -1: ("right", "top")}
FRONT = {"color": "0.65", "linewidth": 0.8, "zorder": 0.5}
CUT = "small arrow: the interval goes on beyond the axis"
PUBLISHED = {"marker": "D", "markersize": 3.5, "markerfacecolor": "white", "color": "0.4", "linestyle": ""}


@style.styled
def perplexity_bits(rows: Sequence[Row], ax: Axes | None = None) -> Axes:
    """One text's rows by bits per weight and perplexity, with the float model, intervals and the Pareto front.

    Many rows, or perplexities far apart, are drawn as a chart with a line for each row, with a second panel for the KL
    divergence.

    Args:
      rows: of results: `Comparison.rows()`, or `jquant.evaluation.rows.read_rows` of a table.jsonl.
      ax: where to draw the points, instead of a figure of its own.

    Raises:
      InputError: no rows, or something else than rows; rows of several texts.
    """
    check_rows(rows)
    if len(texts := by_text(rows)) > 1:
        raise InputError(f"A figure shows one text, and these rows are of {len(texts)}: {', '.join(texts)}.")
    if ax is None:
        return figure(rows, style.shown).axes[0]
    scatter(rows, ax)
    return ax


def figure(rows: Sequence[Row], new: Callable[..., Figure] = Figure) -> Figure:
    """The figure that suits one text's rows: points, or a chart with a line for each row."""
    perplexities = [row["perplexity"] for row in rows]
    few = len(rows) <= MOST_POINTS and max(perplexities) <= FARTHEST * min(perplexities)
    return points(rows, new) if few else ranking(rows, new)


@style.styled
def points(rows: Sequence[Row], new: Callable[..., Figure] = Figure) -> Figure:
    """`scatter` with a title and a legend, in one column of a paper or, with many points, in two."""
    most = FEW_POINTS if labels(rows) == list(map(with_bits, rows)) else FEW_POINTS // 2  # longer labels need room
    size = (style.ONE, 2.9) if len(rows) <= most + 1 else (style.TWO, 4.0)
    drawn = new(figsize=size, layout="constrained")
    axes = drawn.add_subplot()
    axes.set_title(f"{model(rows[0])}\n{text(rows[0])}", x=0.5 if size[0] > style.ONE else 0.45)
    scatter(rows, axes)
    return drawn


def scatter(rows: Sequence[Row], axes: Axes) -> None:
    """Perplexity over bits per weight, a label beside each point."""
    kind, ends = intervals(rows)
    placed = [(row, pair) for row, pair in zip(rows, ends, strict=True) if not is_float(row)]
    for row, pair in placed:
        color, bits = style.family(row)[1], row["bits_per_weight"]
        axes.plot(bits, row["perplexity"], "o", markersize=4, color=color)
        if pair:
            axes.vlines(bits, *pair, color=color)
        if value := published(row):
            axes.plot(bits, value, **PUBLISHED)
    for row in _floats(rows):
        style.float_line(axes, row["perplexity"], f"{name(row)}\n{row['perplexity']:.2f}")
        if value := published(row):
            axes.axhline(value, color="0.4", linewidth=1, linestyle=":", zorder=0)
    best = front([row for row, _ in placed], "perplexity")
    if len(best) > 1:
        at, values = zip(*[(row["bits_per_weight"], row["perplexity"]) for row in best], strict=True)
        axes.plot(at, values, drawstyle="steps-post", **FRONT)
    axes.set_xlabel("bits per weight (codes, scales and zeros)")
    axes.set_ylabel("perplexity, lower is better")
    axes.margins(x=0.2, y=0.12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(style.few_ticks())
    _legend(axes, kind if any(ends) else None, len(best) > 1, rows)
    lines = [(axes.get_xlim(), (row["perplexity"],) * 2) for row in rows if is_float(row)]
    _label(axes, placed, lines)


def _floats(rows: Sequence[Row]) -> list[Row]:
    """The float models' rows, each value once: a sweep may have the same one several times."""
    return list({f"{name(row)} {row['perplexity']:.2f}": row for row in rows if is_float(row)}.values())


def front(rows: Sequence[Row], column: str) -> list[Row]:
    """The Pareto front, by bits: the rows that no row of their size or smaller is better than."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["bits_per_weight"], row[column])):
        if not best or row[column] < best[-1][column]:
            best.append(row)
    return best


def _legend(axes: Axes, kind: str | None, has_front: bool, rows: Sequence[Row]) -> None:
    """Says below the axes what their lines are."""
    handles = []
    if has_front:
        handles.append(Line2D([], [], label="Pareto front: nothing of this size or smaller is better", **FRONT))
    if kind:
        kind = textwrap.fill(kind, 50)
        handles.append(Line2D([], [], color="0.4", linestyle="", marker="|", markersize=8, label=kind))
    if any(map(published, rows)):
        handles.append(Line2D([], [], label="published (dotted: of the float model)", **PUBLISHED))
    if handles:
        axes.figure.legend(handles=handles, loc="outside lower center")


def _label(axes: Axes, placed: Sequence[tuple[Row, Ends | None]], lines: Sequence[tuple[Ends, Ends]]) -> None:
    """Labels each point where the label covers no point, no line and no other label."""
    drawn = axes.get_figure(root=True)
    assert drawn is not None
    drawn.draw_without_rendering()  # computes the layout, on which the places depend
    spans = [((row["bits_per_weight"],) * 2, pair or (row["perplexity"],) * 2) for row, pair in placed]
    spans += [((row["bits_per_weight"],) * 2, (value,) * 2) for row, _ in placed if (value := published(row))]
    corners = [axes.transData.transform([(x[0], y[0]), (x[1], y[1])]) for x, y in [*spans, *lines]]
    taken = [Bbox(corner).padded(2.5 * drawn.dpi / 72) for corner in corners]
    for (row, _), label in zip(placed, labels([row for row, _ in placed], "\n"), strict=True):
        written = axes.annotate(
            f"{label}: {row['perplexity']:.2f}",
            (row["bits_per_weight"], row["perplexity"]),
            (0, 0),
            textcoords="offset points",
            color="0.2",
            fontsize=7,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},  # over the Pareto front
        )
        written.set_in_layout(False)
        covered: list[tuple[int, int]] = []  # how much each place covers, and its number
        for index, place in enumerate(PLACES):
            _put(written, place)
            box = written.get_window_extent()
            outside = not (axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1))
            covered.append((len(taken) * outside + sum(map(box.overlaps, taken)), index))
            if not covered[-1][0]:
                break
        _put(written, PLACES[min(covered)[1]])
        taken.append(written.get_window_extent())


def _put(written: Annotation, place: tuple[int, int, int]) -> None:
    distance, x, y = place
    written.set(position=(distance * x, distance * y), ha=SIDES[x][0], va=SIDES[y][1])


def labels(rows: Sequence[Row], between: str = ", ") -> list[str]:
    """The rows' names; where two are the same, with what differs: a sweep's settings, or the group."""
    names = list(map(with_bits, rows))
    found: list[str] = []
    for row, label in zip(rows, names, strict=True):
        alike = [other for other, name in zip(rows, names, strict=True) if name == label]
        own = [part for part in _settings(row) if any(part not in _settings(other) for other in alike)]
        found.append(f"{label}{between}{', '.join(own)}" if own else label)
    return found


def _settings(row: Row) -> list[str]:
    """What a row may differ in from others of its method: "group 128", e.g."""
    if not row.get("settings"):
        group = row.get("config", {}).get("group")
        return [] if group is None else [f"group {group}"]
    pairs = [part.partition("=") for part in row["settings"].split(" ")]
    return [f"{key.rpartition('.')[2]} {value}" for key, _, value in pairs if key not in ("method", "bits")]


@style.styled
def ranking(rows: Sequence[Row], new: Callable[..., Figure] = Figure) -> Figure:
    """A line for each row, by bits: perplexity left, KL right; those on the Pareto front are filled and joined."""
    kind, ends = intervals(rows)
    listed: list[Row] = [row | {"ends": pair} for row, pair in zip(rows, ends, strict=True) if not is_float(row)]
    listed.sort(key=lambda row: (-row["bits_per_weight"], -row["perplexity"]))
    least = min(row["perplexity"] for row in rows)
    limits = {"perplexity": (least, FARTHEST * least)}
    headings = {"perplexity": "perplexity", "kl": "KL to the float model, nats a token"}
    if any(row["kl"] is not None for row in listed):  # None: a stored quantized model without a float one
        limits["kl"] = (min((row["kl"] for row in listed if row["kl"]), default=1e-3), LARGEST_KL)
    drawn = new(figsize=(style.TWO, max(0.15 * len(listed) + 1.6, 2.8)), layout="constrained")
    panels = drawn.subplots(1, len(limits), sharey=True, squeeze=False, gridspec_kw={"wspace": 0.06})[0]
    for axes, column in zip(panels, limits, strict=True):
        _panel(axes, [row for row in enumerate(listed) if row[1][column] is not None], column, limits[column])
        axes.set_xlabel(headings[column])
    for row in _floats(rows):
        style.float_line(panels[0], row["perplexity"], f"{name(row)} {row['perplexity']:.2f}", upright=True)
        if value := published(row):
            panels[0].axvline(value, color="0.4", linewidth=1, linestyle=":", zorder=0)
    names = [f"{label}   {row['bits_per_weight']:.2f}" for label, row in zip(labels(listed), listed, strict=True)]
    panels[0].set_yticks(range(len(listed)), names, fontsize=style.SMALL)
    panels[0].set_ylim(-0.7, len(listed) - 0.3)
    drawn.suptitle(f"{model(rows[0])}\n{text(rows[0])}; beside each name: bits per weight")
    drawn_lines = [line for axes in panels for line in axes.lines]
    arrows = any(line.get_marker() in ("<", ">") and line.get_label() != CUT for line in drawn_lines)
    cut = any(line.get_label() == CUT for line in drawn_lines)
    drawn.legend(
        handles=_markers(arrows, any(map(published, rows)), f"{kind},\nif longer than the marker" * any(ends), cut),
        loc="outside lower left",
    )
    drawn.legend(handles=_families(listed), loc="outside lower right", ncols=2)
    return drawn


def _panel(axes: Axes, listed: Sequence[tuple[int, Row]], column: str, limits: Ends) -> None:
    """One column of values; a value beyond the limits is drawn as an arrow, so that the others stay apart."""
    pairs = [(row["ends"] if column == "perplexity" else None) or (row[column],) * 2 for _, row in listed]
    low, high = limits[0], max(limits[0] * 1.01, min(limits[1], max(end for _, end in pairs)))
    room = (high / low) ** 0.06
    best = front([row for _, row in listed], column)
    for (line, row), pair in zip(listed, pairs, strict=True):
        value, color = row[column], style.family(row)[1]
        shown = min(max(value, low), high)
        side = (value > shown) - (value < shown)
        face, marker = color if value == _least(listed, row, column) else "white", {1: ">", 0: "o", -1: "<"}[side]
        axes.plot(shown, line, marker, markersize=4, color=color, markerfacecolor=face)
        if side:
            place = {"xytext": (-6 * side, 0), "textcoords": "offset points", "va": "center", "fontsize": style.SMALL}
            axes.annotate(number(value), (shown, line), ha="right" if side > 0 else "left", **place)
        else:
            axes.hlines(line, *pair, color=color, linewidth=1, zorder=1.5)
            for end, marker in ((low / room, "<"), (high * room, ">")):
                if not pair[0] <= end <= pair[1]:
                    continue
                axes.plot(end, line, marker, markersize=3, color=color, clip_on=False, label=CUT)
        quoted = published(row) if column == "perplexity" else None
        if quoted and low <= quoted <= high:
            axes.plot(quoted, line, **PUBLISHED)
    joined = [(row[column], line) for line, row in listed if row in best and low <= row[column] <= high]
    if len(joined) > 1:
        axes.plot(*zip(*joined, strict=True), **FRONT)
    axes.set_xscale("log")
    axes.set_xlim(low / room, high * room)
    style.set_ticks(axes.xaxis, style.log_ticks(low / room, high * room))
    axes.grid()
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _least(listed: Sequence[tuple[int, Row]], row: Row, column: str) -> float:
    """The least value of the rows of this size or smaller."""
    return min(other[column] for _, other in listed if other["bits_per_weight"] <= row["bits_per_weight"])


def _markers(arrows: bool, quoted: bool, kind: str, cut: bool) -> list[Line2D]:
    """Legend entries of the markers."""
    look = {"color": "0.3", "linestyle": "", "markersize": 4}
    on_front = "filled, joined: the Pareto front,\nnothing of this size or smaller is better"
    return [
        Line2D([], [], marker="o", label=on_front, **look),
        Line2D([], [], marker="o", mfc="white", label="open: something of this size or smaller is better", **look),
        *([Line2D([], [], marker=">", label="arrow: beyond the axis, with its value", **look)] if arrows else []),
        *([Line2D([], [], label="published (dotted: of the float model)", **PUBLISHED)] if quoted else []),
        *([Line2D([], [], color="0.3", linewidth=1, label=kind)] if kind else []),
        *([Line2D([], [], marker=">", label=CUT, color="0.3", linestyle="", markersize=3)] if cut else []),
    ]


def _families(listed: Sequence[Row]) -> list[Line2D]:
    """Legend entries of the colours."""
    colors = dict(map(style.family, reversed(listed)))
    return [Line2D([], [], color=color, ls="", marker="s", ms=4, label=kind) for kind, color in colors.items()]
