"""The perplexity table as rows on disk, as Markdown and CSV, and in the terminal."""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from scipy.special import stdtrit

from experiments.compositions import takes_bits
from jquant.errors import InputError
from jquant.io.files import write_text

Row = dict[str, Any]

# Column heading, and how a row fills it; a column that no row fills is left out.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: label(row),
    "settings": lambda row: row.get("settings", ""),  # of a sweep's trial
    "perplexity": lambda row: f"{row['perplexity']:.3f} ±{row['perplexity_stderr']:.3f}",
    "change\n%": lambda row: f"{row['perplexity_change_percent']:+.2f}",
    "KL": lambda row: f"{row['kl']:.4f}",
    "top-1\n%": lambda row: f"{100 * row['top1_agreement']:.1f}",
    "bits/\nweight": lambda row: f"{row['bits_per_weight']:.3f}",
    "MB": lambda row: f"{row['weight_mb']:.0f}",
    "tok/s": lambda row: "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.1f}",
    "quant\ns": lambda row: seconds(row),
    "peak\nMB": lambda row: f"{row['peak_rss_mb']:.0f}",
    "published": lambda row: published(row),
}


def label(row: Row) -> str:
    """What the row is called in a table: the method, with its width where the settings chose it."""
    name = row["method"]
    if name == "fp32":
        return {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}.get(row["protocol"]["dtype"], "float")
    return f"{name.upper()}-{row['config']['bits']}" if takes_bits(name) else name.upper()


def seconds(row: Row) -> str:
    """How long it took to quantize, and with how many methods together, if several."""
    together = row.get("quantized_together", 1)
    return f"{row['quantize_seconds']:.1f}" + (f" /{together}" if together > 1 else "")


def by_text(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each text that was evaluated."""
    texts = dict.fromkeys(row["protocol"]["data"] for row in rows)
    return {text: [row for row in rows if row["protocol"]["data"] == text] for text in texts}


def published(row: Row) -> str:
    """The published perplexity that the model's config quotes for this method, if any."""
    figures = row["config"]["model"].get("published") or {}
    return f"{figures[row['method']]:.2f}" if row["method"] in figures else ""


def paired_change(row: Row, base: Row) -> tuple[float, float, float]:
    """Change of perplexity against another row on the same windows, percent, with its 95 % interval.

    Both rows score the same tokens, so most of what makes windows differ cancels in the windows' differences of mean
    negative log likelihood. Their mean's interval is Student's, with n − 1 degrees of freedom, windows taken as
    independent; exp turns it into one of the perplexities' ratio.

    Returns:
      Change, lower and upper end; the ends are NaN where there is one window only.

    Raises:
      InputError: the rows were not evaluated on the same tokens; a row that does not tell its windows' likelihoods, as
        those of older versions do not.
    """
    for one in (row, base):
        if not one.get("window_nll"):
            raise InputError(f"The row {one['method']} has no window_nll, so nothing can be compared with it in pairs.")
    texts = {one["protocol"]["evaluation_sha256"] for one in (row, base)}
    if len(texts) > 1 or len(row["window_nll"]) != len(base["window_nll"]):
        raise InputError(f"The rows {row['method']} and {base['method']} were evaluated on different windows.")
    differences = np.subtract(row["window_nll"], base["window_nll"])
    n, mean, half = len(differences), differences.mean(), math.nan
    if n > 1:
        half = stdtrit(n - 1, 0.975) * differences.std(ddof=1) / n**0.5
    change, low, high = (float(100 * np.expm1(mean + shift)) for shift in (0, -half, half))
    return change, low, high


def base_of(row: Row, rows: Sequence[Row], baseline: str) -> Row | None:
    """The row that `baseline` names for this one: the method of that name at the row's own width, or as it stands."""
    by_name = {one["method"]: one for one in rows}
    width = row["method"].rpartition("-")[2]
    return by_name.get(f"{baseline}-{width}") or by_name.get(baseline)


def read_rows(folder: Path, name: str = "table.jsonl") -> list[Row]:
    """The rows an earlier run left in a results folder.

    Raises:
      InputError: the file is not one JSON object a line.
    """
    path = folder / name
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (json.JSONDecodeError, UnicodeDecodeError) as broken:
        raise InputError(f"{path} is damaged ({broken}); move it away or choose another name=.") from None


def write_rows(folder: Path, rows: Sequence[Row], name: str = "table.jsonl") -> None:
    """Writes every row, one JSON object a line, whole or not at all."""
    write_text(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_table(
    folder: Path, rows: Sequence[Row], baseline: str | None = None, missing: Mapping[str, str] | None = None
) -> None:
    """Writes this run's rows as table.md, a table a text, and table.csv; compared with `baseline` (`base_of`).

    `missing`: why other rows, by their settings, are not there (`missing_lines`).
    """
    sections = by_text(rows)
    written = [_markdown(its, baseline) for its in sections.values()]
    if missing:
        heading, *lines = missing_lines(missing)
        written.append("\n".join([f"**{heading}**", "", *(f"- {line}" for line in lines)]) + "\n")
    write_text(folder / "table.md", "\n".join(written))
    if not rows:
        return
    plain = io.StringIO()
    fields = [key for key, value in rows[0].items() if isinstance(value, str | int | float) and key != "composition"]
    changes = [_change_fields(row, sections[row["protocol"]["data"]], baseline) for row in rows]
    columns = [*fields, *changes[0], *rows[0]["protocol"]]
    writer = csv.DictWriter(plain, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | change | row["protocol"] for row, change in zip(rows, changes, strict=True))
    write_text(folder / "table.csv", plain.getvalue())


def missing_lines(missing: Mapping[str, str]) -> list[str]:
    """What to say of trials that have no row: how many they are, then why, one by one; nothing if there are none."""
    return [f"Missing rows: {len(missing)}.", *(f"{name}: {why}" for name, why in missing.items())] if missing else []


def _markdown(rows: Sequence[Row], baseline: str | None) -> str:
    heading, cells = _cells(rows, baseline)
    heading = [column.replace("\n", " ") for column in heading]
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *cells]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{table}\n{caption(rows, baseline)}\n"


def terminal_table(rows: Sequence[Row], baseline: str | None = None) -> Table:
    """The table for rich to print; beside a comparison there is no place for what the machine did."""
    heading, cells = _cells(rows, baseline, leave_out=("tok/s", "quant\ns", "peak\nMB") if baseline else ())
    # Bare enough for a terminal of 80 columns.
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for index, column in enumerate(heading):
        table.add_column(column, justify="right" if index else "left", no_wrap=index == 0)
    for line in cells:
        table.add_row(*line)
    return table


def one_line(row: Row) -> str:
    """A finished row in one line."""
    text = Path(row["protocol"]["data"]).name
    return f"{label(row)} on {text}: perplexity {COLUMNS['perplexity'](row)}, {row['bits_per_weight']:.3f} bits/weight"


def caption(rows: Sequence[Row], baseline: str | None = None) -> str:
    """The protocol of one text's rows, in a sentence or two."""
    row = rows[0]
    told, config = row["protocol"], row["config"]
    calibration = config["calibration"]
    published_note = (config["model"].get("published") or {}).get("note")
    together = max(row.get("quantized_together", 1) for row in rows)
    shared = f"Seconds with /{together}: all {together} in one pass over float inputs. " if together > 1 else ""
    paired = (
        f"vs {baseline}: change of perplexity, its 95 % interval (Student's t) paired by window. " if baseline else ""
    )
    return (
        f"{told['model']} (weights stored as {told['weights_stored_as']}, computed in {told['dtype']}) on "
        f"{told['data']}: {told['windows']} windows of {told['context']} tokens, not overlapping, "
        f"{'with' if told['bos'] else 'no'} BOS, {told['scored_tokens']} scored tokens. Calibration: "
        f"{calibration['data']}, {calibration['samples']} × {calibration['context']} tokens, seed {row['seed']}. "
        f"Groups of {config['group']}, {'symmetric' if config['symmetric'] else 'asymmetric'}. KL and top-1 "
        f"agreement are to the float model; bits/weight counts codes, scales and zeros of the projections; MB is all "
        f"weights, embedding, head and norms in {told['dtype']}; peak MB is resident memory. "
        f"{shared}{paired}{row['device']}." + (f" Published: {published_note}" if published_note else "")
    )


def _cells(
    rows: Sequence[Row], baseline: str | None, leave_out: Sequence[str] = ()
) -> tuple[list[str], list[list[str]]]:
    columns = {heading: [fill(row) for row in rows] for heading, fill in COLUMNS.items() if heading not in leave_out}
    if baseline:
        columns[f"vs {baseline}\n%"] = [_change(_change_fields(row, rows, baseline)) for row in rows]
    filled = {heading: cells for heading, cells in columns.items() if any(cells)}
    return list(filled), [list(line) for line in zip(*filled.values(), strict=True)]


def _change_fields(row: Row, rows: Sequence[Row], baseline: str | None) -> dict[str, float | None]:
    """`paired_change` against the row's baseline by column: no columns without one, None where it can't be had."""
    if baseline is None:
        return {}
    base = base_of(row, rows, baseline)
    comparable = base is not None and row.get("window_nll") and base.get("window_nll")
    figures = paired_change(row, base) if base is not None and comparable else (None, None, None)
    return dict(zip((f"vs {baseline} %", f"vs {baseline} % low", f"vs {baseline} % high"), figures, strict=True))


def _change(fields: dict[str, float | None]) -> str:
    change, low, high = fields.values()
    if change is None or low is None or high is None:
        return ""
    # No interval: one window, or the baseline itself.
    return f"{change:+.2f}" + (f" [{low:+.2f}, {high:+.2f}]" if low < high else "")
