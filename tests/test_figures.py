"""Figures: drawn from rows alone, legible, the same look everywhere, and nothing of matplotlib's settings changed."""

import ast
import inspect
import json
import runpy
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from checkpoints import refused
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image
from scipy import stats

from jquant import plot
from jquant.evaluation import rows as reading
from jquant.evaluation.rows import Rows, by_text, intervals, is_float, read_rows
from jquant.plot import activations, bits, layers, style, training
from paper_figures import __main__ as all_figures
from paper_figures import outliers, perplexity_bits

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
TABLES = ("perplexity_table", "formats", "ranges", "rounding", "ingredients")
DRAWN = (*TABLES, "sensitivity", "outliers", "outlier_histograms", "training")
PROTOCOL = {"model": "m", "weights_stored_as": "F32", "dtype": "float32", "data": "t", "windows": 3, "context": 9}


def row(method: str, bits_per_weight: float, perplexity: float, **more) -> dict:
    fields = {"method": method, "bits_per_weight": float(bits_per_weight), "perplexity": float(perplexity), "kl": 0.1}
    return fields | {"perplexity_stderr": 0.5, "config": {"bits": 4}, "protocol": PROTOCOL} | more


def table(name: str) -> list[dict]:
    return next(iter(by_text(read_rows(RESULTS / name / "table.jsonl")).values()))


@pytest.fixture(scope="module")
def figures() -> dict[str, Figure]:
    drawn = {name: bits.figure(table(name)) for name in TABLES}
    drawn["sensitivity"] = layers.figure(read_rows(RESULTS / "sensitivity" / "sensitivity.jsonl"))
    rows = read_rows(RESULTS / "outliers" / "outliers.jsonl")
    drawn |= {"outliers": activations.figure(rows), "outlier_histograms": activations.histograms(rows)}
    drawn["training"] = training.figure(read_rows(RESULTS / "qat" / "table.jsonl"), RESULTS / "qat")
    for figure in drawn.values():
        figure.draw_without_rendering()
    return drawn


def ticks(axis) -> list[tuple[float, Text]]:
    """An axis's ticks within its ends: where, and what stands there."""
    low, high = sorted(axis.get_view_interval())
    pairs = zip(axis.get_majorticklocs(), axis.get_major_ticks(), strict=True)
    return [(at, tick.label1) for at, tick in pairs if low <= at <= high]


def axes_of(figure: Figure) -> list[Axes]:
    return figure.findobj(Axes)  # pyright: ignore[reportReturnType]


def boxes(figure: Figure) -> dict[str, Bbox]:
    """Where every text that is seen stands."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    every = {id(text): text for text in figure.findobj(Text)}
    for axis in [axis for axes in axes_of(figure) for axis in (axes.xaxis, axes.yaxis)]:
        for tick in axis.get_major_ticks():
            every.pop(id(tick.label1), None)
        every |= {id(label): label for _, label in ticks(axis)}
    shown = [text for text in every.values() if text.get_visible() and text.get_text()]
    return {f"{text.get_text()} #{count}": text.get_window_extent(renderer) for count, text in enumerate(shown)}


def overlapping(placed: dict[str, Bbox]) -> list[tuple[str, str]]:
    return [(a, b) for a, b in combinations(placed, 2) if placed[a].padded(-1).overlaps(placed[b].padded(-1))]


def points(axes: Axes) -> dict[float, Line2D]:
    """The markers by their perplexity."""
    axis = int(axes.get_xscale() == "linear")  # of a scatter, where perplexity is y; of a chart it is x
    lines = [line for line in axes.get_lines() if line.get_marker() == "o"]
    return {float(np.asarray(line.get_data()[axis])[0]): line for line in lines}


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


# ---- rooms ----------------------------------------------------------------------------------------------------------


def test_no_file_of_paper_figures_imports_experiments():
    for path in (ROOT / "paper_figures").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.partition(".")[0] == "experiments" for name in names), path


IMPORTS = """
import sys, matplotlib
from pathlib import Path

def state():
    settings = {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}
    return matplotlib.get_backend(auto_select=False), settings

before = state()
assert before[0] is None
from experiments import collect, evaluate, outliers, perplexity_table, quantize, sensitivity
from paper_figures import perplexity_bits
from jquant.evaluation.rows import read_rows
assert state() == before
matplotlib.use("svg")
chosen = state()
perplexity_bits.draw(read_rows(Path(sys.argv[1])), Path(sys.argv[2]))
assert state() == chosen
assert chosen[0] == "svg"
assert "matplotlib.pyplot" not in sys.modules
"""


def test_importing_and_drawing_leave_matplotlibs_backend_and_settings_alone(tmp_path):
    """Where none has been chosen yet, and where one has."""
    command = [sys.executable, "-c", IMPORTS, str(RESULTS / "perplexity_table" / "table.jsonl"), str(tmp_path)]
    env = {"PATH": "", "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}  # without MPLBACKEND
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "perplexity_bits.png").exists()


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_pdf_holds_truetype_a_png_300_dpi_whatever_the_users_settings_are_and_the_same_bytes_again(tmp_path):
    rows = [row("fp32", 32, 20), row("gptq", 4.3, 22)]
    with matplotlib.rc_context({"pdf.fonttype": 3, "savefig.dpi": 50}):
        png, pdf = perplexity_bits.draw(rows, tmp_path)
    first = png.read_bytes(), pdf.read_bytes()
    assert b"/Type3" not in first[1]
    assert b"/CIDFontType2" in first[1]
    image = Image.open(png)
    assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    assert image.size[0] == round(300 * style.ONE)
    perplexity_bits.draw(rows, tmp_path)
    assert (png.read_bytes(), pdf.read_bytes()) == first


def test_the_figures_in_the_repository_are_of_that_sort_and_small():
    pngs, pdfs = list(RESULTS.glob("*/*.png")), list(RESULTS.glob("*/*.pdf"))
    assert len(pngs) > 8 <= len(pdfs)
    for png in pngs:
        assert Image.open(png).info["dpi"] == pytest.approx((300, 300), abs=0.1), png
        assert png.stat().st_size < 300_000, png
    for pdf in pdfs:
        assert b"/Type3" not in pdf.read_bytes(), pdf


def test_the_kept_figures_are_drawn_anew_from_their_rows_with_the_same_bytes_each_time(tmp_path):
    for name in ("perplexity_table/table.jsonl", "float_inputs/table.jsonl"):  # the second has no float model
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes((RESULTS / name).read_bytes())
    paths = all_figures.main(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        f"perplexity_table/perplexity_bits.{kind}" for kind in ("png", "pdf")
    ]
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in all_figures.main(tmp_path)] == first
    assert b"CreationDate" not in first[1]


# ---- one call -------------------------------------------------------------------------------------------------------


def test_one_call_returns_the_axes_of_a_figure_and_draws_into_given_ones(tmp_path):
    rows = [row("fp32", 32, 20), row("gptq", 4.3, 22), row("int8", 8.0, 20.5)]
    mine = Figure().add_subplot()
    assert plot.perplexity_bits(rows, ax=mine) is mine
    assert {22, 20.5} <= points(mine).keys()
    assert all(path.stat().st_size > 1000 for path in plot.save(mine, tmp_path / "mine"))
    assert plot.sensitivity(read_rows(RESULTS / "sensitivity" / "sensitivity.jsonl"), ax=Figure().add_subplot())
    assert plot.training_curves(table("qat"), RESULTS / "qat", ax=Figure().add_subplot()).get_lines()
    assert plot.outliers(read_rows(RESULTS / "outliers" / "outliers.jsonl"), ax=Figure().add_subplot()).get_legend()
    with refused("these rows are of 2: t, u"):
        plot.perplexity_bits([*rows, row("gptq", 4.3, 22, protocol=PROTOCOL | {"data": "u"})])
    with refused("No row has evaluations in"):
        plot.training_curves(table("qat"), tmp_path)
    (tmp_path / f"{table('qat')[0]['fingerprint']}.metrics.jsonl").write_text('{"step": 1, "tokens": "x"}\n')
    with refused("metrics.jsonl is not what a training wrote"):
        plot.training_curves(table("qat"), tmp_path)


LAZY = """
import sys, jquant
assert "matplotlib" not in sys.modules
sys.modules["matplotlib"] = None
try:
    jquant.plot
except ImportError as wrong:
    print(wrong)
del sys.modules["matplotlib"]
import matplotlib
matplotlib.use("agg")
rows = [{"method": "gptq", "bits_per_weight": 4.3, "perplexity": 22.0, "protocol": %r}]
print(type(jquant.plot.perplexity_bits(rows)).__name__, matplotlib.pyplot.get_fignums())
"""


def test_importing_jquant_imports_no_matplotlib_and_its_absence_is_one_sentence():
    """Without axes given, the figure is pyplot's, which notebooks show."""
    done = subprocess.run([sys.executable, "-c", LAZY % PROTOCOL], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Figures need matplotlib: pip install 'jquant[plot]'.\nAxes [1]\n"


# ---- what is legible ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWN)
def test_every_axis_has_three_ticks_and_no_text_covers_another(figures, name):
    for axes in axes_of(figures[name]):
        for axis in (axes.xaxis, axes.yaxis):
            found = ticks(axis)
            if axes.get_label() == "<colorbar>" and not found:
                continue  # the short side of a colour bar
            assert len(found) >= 3, (name, axes.get_title(), axis)
            assert len({label.get_text() for _, label in found if label.get_visible()}) in (0, len(found))
    assert not overlapping(boxes(figures[name]))


@given(st.floats(1e-6, 1e5), st.floats(1.02, 1e9), st.sampled_from([4, 9]))
def test_a_logarithmic_axis_has_three_ticks_over_any_range(low, ratio, most):
    found = style.log_ticks(low, low * ratio, most)
    assert 3 <= len(found) <= 9
    assert found == sorted({*found})
    assert low <= found[0] <= found[-1] <= low * ratio


@pytest.mark.parametrize("seed", range(3))
def test_labels_of_crowded_points_cover_no_point_no_interval_no_line_and_no_other_label(seed):
    random = np.random.default_rng(seed)
    rows = [row("fp32", 32, 20.0), *(row(f"mine_{i}", *random.uniform((4, 20.1), (5, 24))) for i in range(8))]
    figure = bits.points(rows)
    figure.draw_without_rendering()
    [axes] = axes_of(figure)
    placed = boxes(figure)
    labels = {text: box for text, box in placed.items() if text.startswith("mine_")}
    assert len(labels) == 8
    assert not overlapping(placed)
    corners = [[(r["bits_per_weight"], r["perplexity"] + sign * 0.5) for sign in (-1, 1)] for r in rows[1:]]
    corners.append([(axes.get_xlim()[0], 20), (axes.get_xlim()[1], 20)])
    for ends in corners:
        mark = Bbox(axes.transData.transform(ends)).padded(1)
        assert not [text for text, box in labels.items() if box.overlaps(mark)]


def test_a_chart_has_a_line_a_row_and_a_broken_model_does_not_press_the_others_together(figures):
    rows, left = table("formats"), figures["formats"].axes[0]
    names = [label.get_text() for label in left.get_yticklabels()]
    widths = [float(name.split()[-1]) for name in names]
    assert len(names) == len(rows) - 1 > bits.MOST_POINTS
    assert widths == sorted(widths, reverse=True)
    assert max(row["perplexity"] for row in rows) > 1e5
    assert left.get_xlim()[1] < 5 * min(row["perplexity"] for row in rows)
    shown = {round(value, 9) for value in points(left)}
    assert shown >= {round(row["perplexity"], 9) for row in rows if row["perplexity"] < 90}
    assert "607,971" in words(figures["formats"])
    few = [row("fp32", 32, 20.0), row("gptq", 4.3, 22.0), row("rtn", 2.3, 6e5)]
    assert bits.figure(few).axes[0].get_xscale() == "log"
    assert bits.figure(few[:2]).axes[0].get_xscale() == "linear"


# ---- what is said ---------------------------------------------------------------------------------------------------


def test_names_are_those_that_readers_know():
    called = {"gptq": "GPTQ", "gptq-3": "GPTQ", "rtn": "round to nearest", "q4_k": "Q4_K", "nf4": "NF4", "fp32": "FP32"}
    called |= {"gguf_q4_k_m": "Q4_K_M mixture", "llm_int8": "LLM.int8()", "my_rounding.HalfUp": "my_rounding.HalfUp"}
    assert {method: reading.name(row(method, 4, 20)) for method in called} == called
    assert reading.name(row("fp32", 4, 20, protocol=PROTOCOL | {"dtype": "bfloat16"})) == "BF16"
    assert reading.name(row("fp32", 4, 20, stored="packed codes")) == "as stored"
    assert reading.stem_and_width(row("gptq-3", 4, 20)) == ("gptq", "3")
    assert reading.stem_and_width(row("gptq", 4, 20)) == ("gptq", "4")
    twice = [row("gptq", 4.3, 22, settings="seed=0"), row("gptq", 4.3, 23, settings="seed=1"), row("awq", 4.3, 23)]
    assert bits.labels(twice) == ["GPTQ, 4 bits, seed 0", "GPTQ, 4 bits, seed 1", "AWQ, 4 bits"]
    groups = [row("gptq", bits, 22, settings=f"method=gptq group={group}") for group, bits in ((64, 4.3), (128, 4.2))]
    assert bits.labels(groups) == ["GPTQ, 4 bits, group 64", "GPTQ, 4 bits, group 128"]


def test_a_sweeps_labels_differ_the_float_model_is_named_once_and_nothing_covers_anything():
    rows = [row("fp32", 32, 20.0, settings=f"method=fp32 group={group}") for group in (32, 64, 128)]
    for method, at in (("rtn", 23.0), ("gptq", 21.0)):
        for group, width in ((32, 4.63), (64, 4.31), (128, 4.16)):
            rows.append(row(method, width, at - 10 / group, settings=f"method={method} group={group}"))
    placed = boxes(bits.points(rows))
    assert len([text for text in placed if text.startswith("FP32")]) == 1
    assert len({text for text in placed if "group 128" in text}) == 2
    assert not overlapping(placed)


@pytest.mark.parametrize("draw", [bits.perplexity_bits, plot.outliers, plot.sensitivity, plot.training_curves])
def test_what_is_no_list_of_rows_is_refused(draw):
    draw = inspect.unwrap(draw)  # without the tests' own check of types
    folder = ["."] if draw.__name__ == "training_curves" else []
    with refused("takes rows, not their file: give jquant.evaluation.rows.read_rows('table.jsonl')"):
        draw("table.jsonl", *folder)
    with refused("there is none"):
        draw([], *folder)
    with refused("A figure takes rows, e.g. comparison.rows(), not 3"):
        draw(3, *folder)


def test_an_interval_beyond_the_axis_ends_in_an_arrow():
    rows = [row("fp32", 32, 20.0), row("rtn", 3.3, 500.0), row("gptq", 4.3, 70.0, perplexity_stderr=40.0)]
    drawn = bits.ranking(rows)
    assert "the interval goes on beyond the axis" in words(drawn)
    assert [line.get_marker() for line in drawn.axes[0].lines if line.get_label() == bits.CUT] == [">"]
    assert "goes on" not in words(bits.ranking(rows[:2]))


def test_the_float_line_is_named(figures):
    for name in (*TABLES, "sensitivity"):
        value = read_rows(RESULTS / name / "sensitivity.jsonl")[0]["fp32"] if name == "sensitivity" else None
        value = value or next(row["perplexity"] for row in table(name) if is_float(row))
        assert f"FP32 {value:.2f}" in words(figures[name]).replace("FP32\n", "FP32 ")


def test_a_method_has_one_colour_in_every_figure_whatever_its_rank(figures):
    def colours(figure: Figure, rows: list[dict]) -> dict[str, str]:
        drawn = points(figure.axes[0])
        return {reading.stem_and_width(row)[0]: to_hex(drawn[row["perplexity"]].get_color()) for row in rows}

    names = ["gptq", "awq", "rtn", "nf4", "gptq_plain"]
    rising = [row(name, 4.3, 20.0 + i) for i, name in enumerate(names)]
    falling = [row(f"{name}-3", 3.3, 30.0 - i) for i, name in enumerate(names)]
    expected = colours(bits.points(rising), rising)
    assert len({*expected.values()}) == len(names)
    assert colours(bits.points(falling), falling) == expected
    assert colours(bits.ranking(falling), falling) == expected
    bars = [held for held in figures["sensitivity"].axes[0].containers if isinstance(held, BarContainer)]
    assert [to_hex(held[0].get_facecolor()) for held in bars] == [expected["rtn"], expected["gptq_plain"]]


def test_filled_markers_are_those_that_nothing_as_small_beats_and_the_legend_says_so():
    rows = [row("gptq", 4.3, 22.0), row("awq", 4.3, 23.0), row("rtn", 3.3, 30.0), row("int8", 8.0, 22.5)]
    figure = bits.ranking(rows)
    faces = {value: to_hex(line.get_markerfacecolor()) for value, line in points(figure.axes[0]).items()}
    assert {value for value, face in faces.items() if face != "#ffffff"} == {22.0, 30.0}
    assert "Pareto front,\nnothing of this size or smaller is better" in words(figure)
    assert "open: something of this size or smaller is better" in words(figure)
    assert "arrow: beyond" not in words(figure)


def test_the_pareto_front_joins_what_nothing_as_small_beats():
    rows = [row("gptq", 4.3, 22.0), row("awq", 4.3, 23.0), row("rtn", 3.3, 30.0), row("int8", 8.0, 22.5)]
    rows.append(row("q8_0", 8.5, 20.5))
    for figure in (bits.points(rows), bits.ranking(rows)):
        across = int(figure.axes[0].get_xscale() == "linear")  # where perplexity is y
        [line] = [line for line in figure.axes[0].get_lines() if len(np.atleast_1d(line.get_xdata())) > 2]
        assert sorted(map(float, line.get_data()[across])) == [20.5, 22.0, 30.0]


def test_published_figures_are_marked_where_the_config_quotes_some():
    figures = {"fp32": {"perplexity": 19.0}, "gptq": {"perplexity": 21.0}}
    others = {"model": "m", "what": "m elsewhere", "note": "", "methods": figures}
    quoted = {"bits": 4, "model": {"name": "m"}, "published": others}
    rows = [row("fp32", 32, 20.0, config=quoted), row("gptq", 4.3, 22.0, config=quoted), row("awq", 4.3, 23.0)]
    for draw in (bits.points, bits.ranking):
        figure = draw(rows)
        axis = int(figure.axes[0].get_xscale() == "linear")
        marks = [line for line in figure.axes[0].get_lines() if line.get_marker() == "D"]
        dotted = [line for line in figure.axes[0].get_lines() if line.get_linestyle() == ":"]
        assert [np.asarray(line.get_data()[axis])[0] for line in marks + dotted] == [21.0, 19.0]
        assert "published" in words(figure)
    assert "published" not in words(bits.points(rows[2:]))
    of_another = quoted | {"model": {"name": "another"}}
    assert "published" not in words(bits.points([row("fp32", 32, 20.0, config=of_another)]))


def test_rows_are_a_short_table():
    rows = Rows([row("fp32", 32, 20.0, kl=0.0), row("gptq", 4.3, 22.0, top1_agreement=0.825), row("mine <b>", 4, 23)])
    lines = repr(rows).splitlines()
    assert lines[0].split() == ["method", "perplexity", "KL", "top-1,", "%", "bits/weight"]
    assert len({*map(len, lines)}) == 1
    assert "GPTQ, 4 bits" in lines[2]
    assert "82.5" in lines[2]
    assert "window_nll" not in repr(table("perplexity_table"))
    assert rows._repr_html_().count("<tr>") == 4
    assert "mine &lt;b&gt;" in rows._repr_html_()
    assert repr(Rows()) == "no rows"
    assert repr(Rows([{"layer": 1}])) == "no rows"


def test_intervals_are_paired_by_window_where_they_can_be_and_else_standard_errors():
    random = np.random.default_rng(0)
    base, other = random.uniform(2, 4, 8), random.uniform(0, 0.2, 8)
    rows = [row("fp32", 32, np.exp(base.mean()), window_nll=base.tolist())]
    rows += [row("gptq", 4.3, np.exp((base + other).mean()), window_nll=(base + other).tolist())]
    kind, (none, pair) = intervals(rows)
    low, high = stats.t.interval(0.95, 7, other.mean(), stats.sem(other))
    assert "paired by window" in kind
    assert none is None
    assert pair == pytest.approx((rows[0]["perplexity"] * np.exp(low), rows[0]["perplexity"] * np.exp(high)))
    figure = bits.points(rows)
    [segment] = figure.axes[0].collections[0].get_segments()  # pyright: ignore[reportAttributeAccessIssue]
    assert tuple(segment[:, 1]) == pytest.approx(pair)
    assert kind in words(figure).replace("\n", " ")

    elsewhere = {"protocol": PROTOCOL | {"evaluation_sha256": "other"}}
    for changed in ({"window_nll": None}, {"window_nll": [1.0]}, elsewhere):
        kind, ends = intervals([rows[0], rows[1] | changed])
        assert kind == "± one standard error"
        assert ends[1] == (rows[1]["perplexity"] - 0.5, rows[1]["perplexity"] + 0.5)
    single = [one | {"window_nll": one["window_nll"][:1]} for one in rows]
    assert intervals(single)[1] == [None, None]


# ---- the command ----------------------------------------------------------------------------------------------------


def command(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["perplexity_bits", *map(str, arguments)])
    monkeypatch.delitem(sys.modules, "paper_figures.perplexity_bits", raising=False)
    runpy.run_module("paper_figures.perplexity_bits", run_name="__main__")


def test_the_command_takes_a_file_or_its_folder(tmp_path, monkeypatch, capsys):
    for name, path in (("mine.jsonl", tmp_path / "mine.jsonl"), ("table.jsonl", tmp_path)):
        (tmp_path / name).write_text(json.dumps(row("gptq", 4.3, 22)) + "\n")
        command(monkeypatch, path)
        figures = capsys.readouterr().out.split()
        assert figures == [str(tmp_path / f"perplexity_bits.{kind}") for kind in ("png", "pdf")]
        for figure in map(Path, figures):
            figure.unlink()


BAD = {
    "no file": (None, "table.jsonl"),
    "empty": ("", "has no rows"),
    "no JSON": ("{", "can't be read"),
    "no number": (json.dumps(row("gptq", 4.3, np.nan)), "NaN is no finite number"),
    "no object": ("[1]", "has no rows"),
    "nested": ("[" * 100_000, "can't be read"),
    "a column missing": ('{"method": "gptq", "protocol": {"data": "t"}}', "without 'perplexity'"),
    "a text for a number": (json.dumps(row("gptq", 4.3, 22) | {"perplexity": "low"}), "can't be drawn"),
    "no protocol": (json.dumps(row("gptq", 4.3, 22, protocol=None)), "can't be drawn"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_end_in_one_sentence(tmp_path, monkeypatch, capsys, case):
    content, told = BAD[case]
    if content is not None:
        (tmp_path / "table.jsonl").write_text(content)
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, tmp_path)
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert told in said.err
    assert str(tmp_path) in said.err


def test_the_command_needs_one_argument(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch)
    assert capsys.readouterr().err == "error: give one folder of results, or its file of rows.\n"


def test_the_outliers_command_draws_the_rows_of_the_last_run(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(outliers, "figure", drawn.extend)
    monkeypatch.setattr(outliers, "histograms", lambda rows: None)
    monkeypatch.setattr(outliers, "save", lambda figure, stem: [])
    outliers.draw([{"fingerprint": "a"}, {"fingerprint": "b", "layer": 0}, {"fingerprint": "b"}], tmp_path)
    assert drawn == [{"fingerprint": "b", "layer": 0}, {"fingerprint": "b"}]
