"""The perplexity table as rows on disk, as Markdown and CSV, and in the terminal."""

import csv
import io
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from experiments.compositions import takes_bits
from jquant.errors import InputError

Row = dict[str, Any]

# Column heading, and how a row fills it.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: label(row),
    "perplexity": lambda row: f"{row['perplexity']:.3f} ±{row['perplexity_stderr']:.3f}",
    "change\n%": lambda row: f"{row['perplexity_change_percent']:+.2f}",
    "KL": lambda row: f"{row['kl']:.4f}",
    "top-1\n%": lambda row: f"{100 * row['top1_agreement']:.1f}",
    "bits/\nweight": lambda row: f"{row['bits_per_weight']:.3f}",
    "MB": lambda row: f"{row['weight_mb']:.0f}",
    "tok/s": lambda row: "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.1f}",
    "quant\ns": lambda row: f"{row['quantize_seconds']:.1f}",
    "peak\nMB": lambda row: f"{row['peak_rss_mb']:.0f}",
}


def label(row: Row) -> str:
    """What the row is called in a table: the method, with its width where the settings chose it."""
    name = row["method"]
    if name == "fp32":
        return {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}.get(row["protocol"]["dtype"], "float")
    return f"{name.upper()}-{row['config']['bits']}" if takes_bits(name) else name.upper()


def published(row: Row) -> str:
    """The published perplexity that the model's config quotes for this method, if any."""
    figures = row["config"]["model"].get("published") or {}
    return f"{figures[row['method']]:.2f}" if row["method"] in figures else ""


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


def write_table(folder: Path, rows: Sequence[Row]) -> None:
    """Writes this run's rows as table.md and table.csv."""
    heading, cells = _cells(rows)
    heading = [column.replace("\n", " ") for column in heading]
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *cells]
    markdown = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_text(folder / "table.md", f"{markdown}\n{caption(rows[0])}\n")
    plain = io.StringIO()
    fields = [key for key, value in rows[0].items() if isinstance(value, str | int | float) and key != "composition"]
    writer = csv.DictWriter(plain, [*fields, *rows[0]["protocol"]], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | row["protocol"] for row in rows)
    write_text(folder / "table.csv", plain.getvalue())


def terminal_table(rows: Sequence[Row]) -> Table:
    """The table for rich to print."""
    heading, cells = _cells(rows)
    # Bare enough for a terminal of 80 columns.
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for index, column in enumerate(heading):
        table.add_column(column, justify="right" if index else "left", no_wrap=index == 0)
    for line in cells:
        table.add_row(*line)
    return table


def one_line(row: Row) -> str:
    """A finished row in one line."""
    return f"{label(row)}: perplexity {COLUMNS['perplexity'](row)}, {row['bits_per_weight']:.3f} bits/weight"


def caption(row: Row) -> str:
    """The protocol, in a sentence or two."""
    told, config = row["protocol"], row["config"]
    calibration = config["calibration"]
    published_note = (config["model"].get("published") or {}).get("note")
    return (
        f"{told['model']} (weights stored as {told['weights_stored_as']}, computed in {told['dtype']}) on "
        f"{told['data']}: {told['windows']} windows of {told['context']} tokens, not overlapping, "
        f"{'with' if told['bos'] else 'no'} BOS, {told['scored_tokens']} scored tokens. Calibration: "
        f"{calibration['data']}, {calibration['samples']} × {calibration['context']} tokens, seed {row['seed']}. "
        f"Groups of {config['group']}, {'symmetric' if config['symmetric'] else 'asymmetric'}. KL and top-1 "
        f"agreement are to the float model; bits/weight counts codes, scales and zeros of the projections; MB is all "
        f"weights, embedding, head and norms in {told['dtype']}; peak MB is resident memory. {row['device']}."
        + (f" Published: {published_note}" if published_note else "")
    )


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    columns = dict(COLUMNS)
    if any(published(row) for row in rows):
        columns["published"] = published
    return list(columns), [[fill(row) for fill in columns.values()] for row in rows]


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, also when interrupted or out of space."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as failed:
        raise InputError(f"{path} can't be written ({failed.strerror}).") from None
