"""The perplexity table as rows on disk, as Markdown and CSV, and in the terminal."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich import box
from rich.table import Table

from experiments.command_line import natural_width
from experiments.compositions import leaves_open, takes_bits
from experiments.tracking import track
from jquant.errors import InputError
from jquant.evaluation import intervals
from jquant.evaluation.intervals import Change
from jquant.evaluation.rows import FLOAT, Row, by_text, is_float, quoted, windows
from jquant.io.files import check_plain, write_text
from jquant.methods import OPEN

LOCK = ".lock"  # beside a results file; never removed, since another process may be waiting for it

# The least that each file's rows have, as a shape for `misfit`.
_PROTOCOL = {"model": str, "weights_stored_as": str, "dtype": str, "data": str, "windows": int, "context": int}
_ORIGIN: dict[str, Any] = {
    "method": str,
    "composition": str,
    "protocol": _PROTOCOL | {"bos": bool, "scored_tokens": int, "evaluation_sha256": str, "calibration_sha256": (str,)},
    "config": {
        "model": dict,
        "published?": ({"model": str, "what": str, "note": str, "methods": dict},),
        "calibration?": {"data": str, "samples": int, "context": int, "inputs?": str},
        "bits?": int,
        "group?": int | str,
        "symmetric?": bool,
    },
    "seed?": int,
    "device": str,
    "fingerprint?": str,
    "fallbacks?": [str],
}
_FIGURES = {"perplexity": float, "kl": float}
ROWS: dict[str, dict[str, Any]] = {
    "table.jsonl": _ORIGIN
    | dict.fromkeys(("perplexity", "bits_per_weight", "weight_mb", "quantize_seconds", "peak_rss_mb"), float)
    | dict.fromkeys(("perplexity_stderr", "perplexity_change_percent", "kl", "top1_agreement"), (float,))
    | {"tokens_per_second": (float,), "quantized_together?": int, "window_nll?": [float]}
    | {
        "output_error?": (float,),
        "held_out_error?": (float,),
        "settings?": str,
        "stored?": str,
        "training_tokens?": int,
    },
    "sensitivity.jsonl": _ORIGIN
    | {FLOAT: float, "all": _FIGURES, "projections": dict, "layers": [_FIGURES]}
    | {"matrices": [_FIGURES | {"layer": int, "projection": str}]},
    "cache.jsonl": _ORIGIN
    | dict.fromkeys(("perplexity", "kl", "top1_agreement", "megabytes"), float)
    | {"change_percent": [float], "bits?": int, "keys?": str, "rotate?": bool, "recent?": int, "first?": int},
    "downstream.jsonl": {key: shape for key, shape in _ORIGIN.items() if key != "protocol"}
    | {"protocol": {"model": str, "weights_stored_as": str, "dtype": str, "data": str, "items_sha256": str}}
    | {"items": int, "accuracy": float, "accuracy_norm": (float,), "correct": str, "correct_norm": (str,)}
    | dict.fromkeys(("bits_per_weight", "quantize_seconds", "evaluate_seconds"), float)
    | {"stored?": str},
    "outliers.jsonl": {"layer": int, "input": str, "fingerprint?": str, "device": str, "ratio": (float,)}
    | {"protocol": _PROTOCOL | {"bos": bool}, "config": {"threshold": float, "bits": int, "group": int}}
    | dict.fromkeys(("max", "median", "sink_energy", "first_token_energy", "massive_tokens"), float)
    | dict.fromkeys(("activation_waste", "weight_waste", "sink_attention"), (float,))
    | {key: [float] for key in ("channel_max", "histogram_edges", "histogram_counts")}
    | {"outlier_features": list},
}

# Columns that a table in a narrow terminal leaves out, the first ones first.
LEAST = ("peak\nMB", "MB", "tok/s", "quant\ns", "held-out\nerror %", "top-1\n%", "change\n%")
# Column heading -> a row's cell; a column without cells is left out.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: label(row),
    "settings": lambda row: swept(row),
    "perplexity": lambda row: f"{row['perplexity']:.3f}" + _filled(row["perplexity_stderr"], " ±{:.3f}"),
    "change\n%": lambda row: _filled(row["perplexity_change_percent"], "{:+.2f}"),
    "KL": lambda row: _filled(row["kl"], "{:.4f}"),
    "top-1\n%": lambda row: _filled(row["top1_agreement"], "{:.1%}").rstrip("%"),
    "held-out\nerror %": lambda row: _filled(row.get("held_out_error"), "{:.2%}").rstrip("%"),
    "fell\nback": lambda row: str(len(row.get("fallbacks") or ()) or ""),  # weights
    "bits/\nweight": lambda row: f"{row['bits_per_weight']:.3f}",
    "MB": lambda row: f"{row['weight_mb']:.0f}",
    "tok/s": lambda row: _filled(row["tokens_per_second"], "{:.1f}"),
    "M tokens\nlearned": lambda row: (
        _filled(row.get("training_tokens"), "{:,}") and f"{row['training_tokens'] / 1e6:.2f}"
    ),
    "quant\ns": lambda row: seconds(row),
    "peak\nMB": lambda row: f"{row['peak_rss_mb']:.0f}",
    "published": lambda row: _filled(quoted(row, "perplexity"), "{:.2f}"),
    "published\ntok/s": lambda row: _filled(quoted(row, "tokens_per_second"), "{:.1f}"),
    "published\nbits": lambda row: _filled(quoted(row, "bits_per_weight"), "{:.2f}"),
    "published\nGB": lambda row: _filled(quoted(row, "memory_gb"), "{:.1f}"),
}


def _filled(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def label(row: Row) -> str:
    """The row's name in a table: the method, with its width if the settings chose it."""
    name = row["method"]
    if row.get("stored"):  # a model that was quantized when it was loaded
        return "stored" if name == FLOAT else name
    if name == FLOAT:
        return {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}.get(row["protocol"]["dtype"], "float")
    if "." in name:  # a user's own, by its file or import path; nothing is imported for what a file of results says
        return Path(name).stem if name.endswith(".yaml") else name
    bits = row["config"].get("bits")
    return f"{name.upper()}-{bits}" if bits is not None and takes_bits(name) else name.upper()


def swept(row: Row) -> str:
    """The trial's settings, in a sweep, without the method, which the row's name tells."""
    parts = row.get("settings", "").split(" ")
    said = (f"method={row['method']}", *(f"{setting}=" for setting in OPEN if is_float(row)))
    return " ".join(part for part in parts if not (part == said[0] or part.startswith(said[1:])))


def named(row: Row) -> str:
    """The row's name among others in the caption."""
    return f"{label(row)} {swept(row)}".rstrip()


def chosen(row: Row) -> dict[str, Any]:
    """Those of bits, group and symmetric that the row's method took from the settings, or the width in its name."""
    if row.get("stored") or "." in row["method"]:  # a folder's name, or a user's own method
        return {}
    name, config = row["method"], row["config"]
    stem, _, width = name.rpartition("-")
    try:
        named = {"bits": int(width)} if width.isdecimal() and takes_bits(stem) else {}
        return named | {
            setting: config[setting] for setting in OPEN if setting in config and leaves_open(name, setting)
        }
    except InputError:  # not a method: the float model, or a file that was removed
        return {}


def seconds(row: Row) -> str:
    """Seconds of quantizing, and the number of methods quantized together, if several."""
    together = row.get("quantized_together", 1)
    return f"{row['quantize_seconds']:.1f}" + (f" /{together}" if together > 1 else "")


def paired_change(row: Row, base: Row) -> Change:
    """Change of perplexity against another row on the same windows (`jquant.evaluation.intervals`).

    Raises:
      InputError: the rows were not evaluated on the same tokens; a row without its windows' likelihoods, such as those
        of older versions.
    """
    for compared in (row, base):
        if not compared.get("window_nll"):
            raise InputError(f"The row {compared['method']} has no window_nll, so it can't be compared in pairs.")
    texts = {compared["protocol"]["evaluation_sha256"] for compared in (row, base)}
    if len(texts) > 1 or len(row["window_nll"]) != len(base["window_nll"]):
        raise InputError(f"The rows {row['method']} and {base['method']} were evaluated on different windows.")
    return intervals.paired_change(row["window_nll"], base["window_nll"])


def base_of(row: Row, rows: Sequence[Row], baseline: str) -> Row | None:
    """The row that `baseline` names for this row: the row with these settings and the same bits and model; or that
    method, at the row's width if it has one."""
    like = lambda other: (other["protocol"]["model"], other["config"].get("bits"))  # noqa: E731
    for candidate in rows:
        if candidate.get("settings") == baseline and like(candidate) == like(row):
            return candidate
    by_name = {candidate["method"]: candidate for candidate in rows}
    width = row["method"].rpartition("-")[2]
    return by_name.get(f"{baseline}-{width}") or by_name.get(baseline)


def written(folder: Path, figures: Sequence[Path]) -> str:
    """Where a table's files are, for the last line of a run."""
    return f"Results: {folder}/table.md, table.csv, table.jsonl. Figure: {', '.join(map(str, figures))}."


def read_rows(folder: Path, name: str = "table.jsonl") -> list[Row]:
    """The rows that earlier runs wrote into a results folder.

    Raises:
      InputError: the file is not plain, or has a line that is not a JSON object with a row's entries (ROWS).
    """
    path, rows = folder / name, []
    if not os.path.lexists(path):
        return rows
    check_plain(path)
    wrong = f"{path} is damaged ({{}}); move it away or choose another name=."
    try:
        # Not splitlines(): it also cuts at characters that a text may hold.
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line:
                rows.append(json.loads(line))
                json.dumps(rows[-1], ensure_ascii=False).encode()  # lone surrogates can't be written back
                if part := misfit(rows[-1], ROWS.get(name, {}), "the row"):
                    raise InputError(wrong.format(f"line {number}: {part}"))
    except RecursionError:
        raise InputError(wrong.format("it is nested too deeply")) from None
    except (OSError, ValueError) as broken:
        raise InputError(wrong.format(broken)) from None
    return rows


def misfit(value: Any, shape: Any, name: str) -> str | None:
    """The first part of a JSON value that does not have its shape, in words; None if all parts do.

    A shape is a type; a dict of shapes by key ("key?" may be missing; other keys may be there); a list with the shape
    of its elements; or a tuple with the shape of a value that may be null. float means any finite number.
    """
    inner: Iterable[str | None] = ()
    if isinstance(shape, tuple):
        return None if value is None else misfit(value, shape[0], name)
    if isinstance(shape, dict):
        fits = isinstance(value, dict)
        inner = (_misfit_at(key, part, value) for key, part in shape.items()) if fits else ()
    elif isinstance(shape, list):
        fits = isinstance(value, list)
        inner = (misfit(part, shape[0], f"an element of {name}") for part in value) if fits else ()
    elif shape is float:
        fits = isinstance(value, int | float) and -1e300 < value < 1e300
    else:
        fits = isinstance(value, shape) and not (shape is int and isinstance(value, bool))
    if not fits:
        return f"{name} is {str(value)[:40]!r}"
    return next(filter(None, inner), None)


def _misfit_at(key: str, shape: Any, value: dict[str, Any]) -> str | None:
    name = key.rstrip("?")
    if name in value:
        return misfit(value[name], shape, name)
    return None if key != name else f"{name} is missing"


def results_folder(settings: Mapping[str, Any]) -> Path:
    """The folder results/<name> of these settings, checked but not made yet.

    Raises:
      InputError: it can't be made or written, so no row could be kept.
    """
    folder = Path(settings["results"]) / str(settings["name"])
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise InputError(f"{folder} can't hold the results, since {there} is no folder: give another results=….")
    if not os.access(there, os.W_OK):
        raise InputError(f"{folder} can't hold the results, since {there} can't be written: give another results=….")
    return folder


def add_rows(folder: Path, rows: Sequence[Row], name: str = "table.jsonl", without: Iterable[str] = ()) -> None:
    """Adds rows to a results file, all or none. Rows that other processes add meanwhile are not lost.

    Args:
      folder: of the results.
      rows: each replaces rows with its fingerprint.
      name: of the file.
      without: fingerprints of rows to take out.

    Raises:
      InputError: the folder can't be written, or the file is damaged; a tracker did not take the rows, which are kept.
    """
    replaced = {row["fingerprint"] for row in rows}.union(without)
    if not replaced:
        return
    with locked(folder):
        kept = [row for row in read_rows(folder, name) if row.get("fingerprint") not in replaced]
        write_text(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*kept, *rows]))
    track(folder, rows)


@contextmanager
def locked(folder: Path, name: str = LOCK, timeout: float = -1) -> Iterator[None]:
    """Makes a folder and holds a lock in it; the lock is freed when its process dies.

    Raises:
      InputError: the folder can't be written.
      filelock.Timeout: another process holds it for longer than `timeout` seconds; by default there is no limit.
    """
    lock = FileLock(folder / name, timeout)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise
    except OSError as failed:
        raise InputError(f"{folder} can't be written ({failed.strerror}).") from None
    try:
        yield
    finally:
        lock.release()


def write_table(
    folder: Path, rows: Sequence[Row], baseline: str | None = None, missing: Mapping[str, str] | None = None
) -> None:
    """Writes rows as table.md, with a table for each text, and table.csv; compared with `baseline` (`base_of`).

    `missing` are reasons for missing rows, by their settings (`missing_lines`).
    """
    sections = by_text(rows)
    written = [_markdown(text_rows, baseline) for text_rows in sections.values()]
    if missing:
        heading, *lines = missing_lines(missing)
        written.append("\n".join([f"**{heading}**", "", *(f"- {line}" for line in lines)]) + "\n")
    write_text(folder / "table.md", "\n".join(written))
    if not rows:
        return
    lines = [_flat(row) | _change_fields(row, sections[row["protocol"]["data"]], baseline) for row in rows]
    plain = io.StringIO()
    writer = csv.DictWriter(plain, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(folder / "table.csv", plain.getvalue())


def _flat(row: Row) -> dict[str, Any]:
    """A row's figures and texts, its method's options, its calibration if any, and its protocol."""
    plain = {key: value for key, value in row.items() if isinstance(value, str | int | float | None)}
    calibration = row["config"].get("calibration", {}) if calibrated(row) else {}
    sampling = {key: calibration.get(key) for key in ("data", "samples", "context", "inputs")}
    return {
        **plain,
        **dict.fromkeys(OPEN),
        **chosen(row),
        **{f"calibration_{key}": value for key, value in sampling.items()},
        "fallbacks": "; ".join(row.get("fallbacks") or ()),
        **row["protocol"],
    }


def calibrated(row: Row) -> bool:
    """Whether its method used the calibration text."""
    return row["protocol"]["calibration_sha256"] is not None


def missing_lines(missing: Mapping[str, str]) -> list[str]:
    """Lines on trials without a row: their number, then the reason for each; none if there are no such trials."""
    return [f"Missing rows: {len(missing)}.", *(f"{name}: {why}" for name, why in missing.items())] if missing else []


def _markdown(rows: Sequence[Row], baseline: str | None) -> str:
    heading, cells = _cells(rows, baseline)
    heading = [column.replace("\n", " ") for column in heading]
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *cells]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{table}\n{caption(rows, baseline)}\n"


def as_markdown(table: Table) -> str:
    """A table for the terminal, whose cells are texts, in Markdown."""
    rows = [[str(column.header) for column in table.columns]]
    rows += [["---:"] * len(table.columns), *zip(*(column.cells for column in table.columns), strict=True)]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def terminal_table(rows: Sequence[Row], baseline: str | None = None, width: int | None = None) -> Table:
    """The table for `show` to print; with a baseline it leaves out speed and memory.

    Args:
      rows: of one text.
      baseline: see `base_of`.
      width: of the terminal, if it is one: in a narrow one the table leaves out columns (LEAST), and says which.
    """
    heading, cells = _cells(rows, baseline, leave_out=("tok/s", "quant\ns", "peak\nMB") if baseline else ())
    columns = dict(zip(heading, zip(*cells, strict=True), strict=True))
    left_out: list[str] = []
    table = _for_terminal(columns, width)
    for column in LEAST:
        if width is not None and natural_width(table) > width and columns.pop(column, None):
            left_out.append(column.replace("\n", " "))
            table = _for_terminal(columns, width)
    if left_out:
        table.caption, table.caption_justify = f"Left out in this narrow terminal: {', '.join(left_out)}.", "left"
    return table


def _for_terminal(columns: Mapping[str, Sequence[str]], width: int | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for index, column in enumerate(columns):
        if column == "settings" and width:
            table.add_column(column, max_width=32, overflow="fold")
        else:
            table.add_column(column, justify="right" if index and column != "settings" else "left", no_wrap=True)
    for line in zip(*columns.values(), strict=True):
        table.add_row(*line)
    return table


def one_line(row: Row) -> str:
    """A row in one line."""
    text = Path(row["protocol"]["data"]).name
    return f"{label(row)} on {text}: perplexity {COLUMNS['perplexity'](row)}, {row['bits_per_weight']:.3f} bits/weight"


def caption(rows: Sequence[Row], baseline: str | None = None) -> str:
    """The protocol of one text's rows; sentences that hold for some rows only name them."""
    quantized = [row for row in rows if not is_float(row)]
    together = max(row.get("quantized_together") or 1 for row in rows)
    dtypes = " or ".join(dict.fromkeys(row["protocol"]["dtype"] for row in rows))
    others = dict.fromkeys((of["what"], of["note"]) for row in rows if (of := row["config"].get("published")))
    sentences = [
        *_sentences(rows, protocol, rows),
        *_sentences(rows, _calibration, quantized),
        *_sentences(rows, _learned, quantized),
        *_sentences(rows, _groups, quantized),
        *_sentences(rows, _fallbacks, []),
        "KL and top-1 agreement are to the float model." if any(row.get("kl", 0) is not None for row in rows) else "",
        f"bits/weight counts codes, scales and zeros of the projections; MB is all weights, embedding, head and norms "
        f"in {dtypes}; peak MB is resident memory.",
        f"Seconds with /{together}: all {together} in one pass over float inputs." if together > 1 else "",
        f"vs {baseline}: change of perplexity, its 95 % interval (Student's t) paired by window; *: it excludes zero."
        if baseline
        else "",
        "; ".join(dict.fromkeys(row["device"] for row in rows)) + ".",
        *(f"Published: {what}. {note}" for what, note in others),
    ]
    return " ".join(filter(None, sentences))


def _sentences(rows: Sequence[Row], say: Callable[[Row], str], every: Sequence[Row]) -> list[str]:
    """The rows' sentences, each once, with the names of its rows unless it holds for all of `every`."""
    by_sentence: dict[str, list[str]] = {}
    for row in rows:
        if sentence := say(row):
            by_sentence.setdefault(sentence, []).append(named(row))
    names = {
        sentence: "" if {*map(named, every)} == {*labels} else f" ({', '.join(dict.fromkeys(labels))})"
        for sentence, labels in by_sentence.items()
    }
    return [f"{sentence}{names[sentence]}." for sentence in by_sentence]


def protocol(row: Row) -> str:
    """A row's model, text and windows."""
    protocol = row["protocol"]
    stored = row.get("stored") or protocol["weights_stored_as"]
    computed = f"weights stored as {stored}, computed in {protocol['dtype']}"
    return f"{protocol['model']} ({computed}) on {protocol['data']}: {windows(protocol)}"


def _calibration(row: Row) -> str:
    sampling = row["config"].get("calibration")
    if not sampling or not calibrated(row):
        return ""
    inputs = ", float inputs" if sampling.get("inputs") == "float" else ""
    size = f"{sampling['samples']} × {sampling['context']} tokens"
    return f"Calibration: {sampling['data']}, {size}{inputs}, seed {row.get('seed')}"


def _learned(row: Row) -> str:
    """The texts that a row of experiments.qat learned from."""
    text = row["config"].get("text")
    if not row.get("training_tokens") or not text or not row["config"].get("tuning"):
        return ""
    names = text["data"] if isinstance(text["data"], list) else [text["data"]] * bool(text["data"])
    sampled = [f"{text['sampled']} windows sampled by the float model"] * bool(text["sampled"])
    return f"Learned from {', '.join([*map(str, names), *sampled])}, windows of {text['context']} tokens"


def _groups(row: Row) -> str:
    options = chosen(row)
    group = (
        f"groups of {options['group']}"
        if isinstance(options.get("group"), int)
        else f"one scale a {options.get('group')}"
    )
    sign = "symmetric" if options.get("symmetric") else "asymmetric"
    return ", ".join([group] * ("group" in options) + [sign] * ("symmetric" in options)).capitalize()


def _fallbacks(row: Row) -> str:
    names = row.get("fallbacks") or []
    more = f" and {len(names) - 3} more" if names[3:] else ""
    return f"Rounded to nearest, because no solution was finite: {', '.join(names[:3])}{more}" if names else ""


def _cells(
    rows: Sequence[Row], baseline: str | None, leave_out: Sequence[str] = ()
) -> tuple[list[str], list[list[str]]]:
    columns = {heading: [fill(row) for row in rows] for heading, fill in COLUMNS.items() if heading not in leave_out}
    if baseline:
        columns[f"vs {baseline}\n%"] = [_change(_change_fields(row, rows, baseline)) for row in rows]
    filled = {heading: cells for heading, cells in columns.items() if any(cells)}
    return list(filled), [list(line) for line in zip(*filled.values(), strict=True)]


def _change_fields(row: Row, rows: Sequence[Row], baseline: str | None) -> dict[str, float | None]:
    """`paired_change` against the row's baseline by column: no columns without a baseline, None if unknown."""
    if baseline is None:
        return {}
    base = base_of(row, rows, baseline)
    figures = (None, None, None)
    if base is not None and row.get("window_nll") and base.get("window_nll"):
        with suppress(InputError):  # other windows of the text
            figures = paired_change(row, base)
    return dict(zip((f"vs {baseline} %", f"vs {baseline} % low", f"vs {baseline} % high"), figures, strict=True))


def _change(fields: dict[str, float | None]) -> str:
    figures = [value for value in fields.values() if value is not None]
    return str(Change(*figures)) if figures else ""
