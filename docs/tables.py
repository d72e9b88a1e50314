"""The tables of README.md and docs/, written from result files.

    python docs/tables.py            # writes them (make docs)
    python docs/tables.py --check    # names outdated tables (make lint); status 1 if there are any

A table is between two comments. The first comment describes it:

    <!-- table: experiments/results/ranges/table.jsonl width=4
    method: {method}
    perplexity: {perplexity:.3f}
    rtn-4 = min-max
    -->
    <!-- end -->

The first line names a file of JSON lines, and filters of its rows: `width=4` keeps rows whose width is 4;
`rows=against_qwix.rows` takes rows from that place in each line (default: "rows", else the line itself). Each further
line is a column: its heading and a format string over the row. `value = text` renames a value of the first column; with
such lines the table has only the rows that they name, in their order. The text may hold further cells, such as other
tools' figures (`rtn-4 = min-max | 31.5`); the first heading then has their headings too. With `across` (a format
string), the table has a column for each of its values, filled by the format string `cell`.

A first line alone gives the columns of `MEASURED`, and a sentence on what they were measured. A filter takes several
values: `method=fp32,nf4`. The pages of a folder are listed, each with its first paragraph, between

    <!-- pages: formats -->
    <!-- end -->
"""

import json
import re
import string
import sys
from pathlib import Path
from typing import Any

from jquant.evaluation.intervals import paired_accuracy, paired_change
from jquant.evaluation.rows import model, text

Row = dict[str, Any]

ROOT = Path(__file__).parents[1]
TABLE = re.compile(r"(<!-- (table|pages): (.*?)-->\n)(.*?)(<!-- end -->)", re.DOTALL)
MEASURED = {
    "method": "`{method}`",
    "bits/weight": "{bits_per_weight:.3f}",
    "perplexity": "{perplexity:,.3f}",
    "against float, %": "{perplexity_change_percent:+,.1f}",
    "KL": "{kl:.4f}",
    "top-1": "{top1_agreement:.1%}",
}
BASELINE = "gptq"  # `{change}` compares a row with this method, at the row's width and on its text


def main(check: bool) -> int:
    """Writes, or only checks, the tables of all pages; returns the exit status."""
    wrong = []
    for page in [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "docs").glob("[!_]*/*.md")),
    ]:
        text = page.read_text(encoding="utf-8")
        if len(re.findall("<!-- (?:table|pages):", text)) != len(TABLE.findall(text)):
            wrong.append(f"{page.relative_to(ROOT)}: a table has no <!-- end -->")
        stale = [match for match in TABLE.finditer(text) if match[4] != written(match, page.parent)]
        if check:
            wrong += [f"{page.relative_to(ROOT)}: {match[3].split()[0]} (make docs)" for match in stale]
        elif stale:
            for match in stale:
                text = text.replace(match[0], match[1] + written(match, page.parent) + match[5])
            page.write_text(text, encoding="utf-8")
    print(*wrong, sep="\n", end="\n" * bool(wrong), file=sys.stderr)
    return 1 if wrong else 0


def written(match: re.Match[str], folder: Path) -> str:
    """What stands between a match's comments; `folder` is that of the page."""
    return f"\n{table(match[3]) if match[2] == 'table' else index(folder, match[3].strip())}\n"


def index(folder: Path, pages: str) -> str:
    """The Markdown table of the pages in a folder beside a page: their titles and first paragraphs."""
    lines = ["name | what it is", "--- | ---"]
    for page in sorted((folder / pages).glob("*.md"), key=lambda page: page.stem.lower()):
        title, paragraph, *_ = page.read_text(encoding="utf-8").split("\n\n")
        lines.append(f"[{title.removeprefix('# ')}]({pages}/{page.name}) | {' '.join(paragraph.split())}")
    return "".join(f"| {line} |\n" for line in lines)


def table(description: str) -> str:
    """The Markdown table of a description."""
    source, *lines = description.strip().splitlines()
    file, *filters = source.split()
    columns = dict(line.split(": ", 1) for line in lines if ": " in line) or MEASURED
    names = dict(line.split(" = ", 1) for line in lines if " = " in line)
    conditions = dict(condition.split("=", 1) for condition in filters)
    rows = read(ROOT / file, conditions.pop("rows", "rows"))
    rows = [row for row in rows if all(str(row[key]) in value.split(",") for key, value in conditions.items())]
    key = next(iter(columns))
    cells: dict[str, list[Row]] = {}
    for row in rows:
        cells.setdefault(filled(columns[key], row), []).append(row)
    if names:
        cells = {value: cells[value] for value in names}
    if "across" in columns:
        headings = list(dict.fromkeys(filled(columns["across"], row) for row in rows))
        body = [[value, *across(columns, headings, matching)] for value, matching in cells.items()]
    else:
        headings = list(columns)[1:]
        body = [[value, *(filled(columns[name], row) for name in headings)] for value in cells for row in cells[value]]
    heading = " | ".join([key, *headings])
    lines = [" | ".join([names.get(value, value), *rest]) for value, *rest in body]
    lines = [heading, "---" + " | ---:" * heading.count(" | "), *lines]
    caption = f"\nOn {model(rows[0])}; {text(rows[0])}; from `{file}`.\n" if columns is MEASURED else ""
    return "".join(f"| {line} |\n" for line in lines) + caption


def across(columns: dict[str, str], headings: list[str], rows: list[Row]) -> list[str]:
    """One line of a table that has a column for each value of `across`."""
    by_heading = {filled(columns["across"], row): filled(columns["cell"], row) for row in rows}
    return [by_heading.get(heading, "") for heading in headings]


class Blank(string.Formatter):
    """Python's format strings, except that None is blank."""

    def format_field(self, value: Any, format_spec: str) -> str:
        """See string.Formatter."""
        return "" if value is None else super().format_field(value, format_spec)


def filled(form: str, row: Row) -> str:
    """A format string with a row's values."""
    return Blank().vformat(form, (), row).strip()


def read(path: Path, place: str) -> list[Row]:
    """The rows of a results file; those of methods also have `name`, `width`, `text`, `steps` and changes."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    measured = [
        line for line in lines if {"method", "protocol", "config"} <= line.keys() and "data" in line["protocol"]
    ]
    for line in measured:
        name, _, width = line["method"].rpartition("-")
        line["name"] = name if width.isdecimal() else line["method"]
        line["width"] = int(width) if width.isdecimal() else line["config"]["bits"]
        line["text"] = Path(line["protocol"]["data"]).name
        line["steps"] = "".join(re.findall(r"Search\(.*?steps=(\d+)", line["composition"]))
    for line in measured:
        line["change"] = change(line, measured)
        for kind in ("accuracy", "accuracy_norm"):
            line[f"{kind}_change"] = accuracy_change(line, measured, kind.replace("accuracy", "correct"))
    return [row for line in lines for row in inside(line, place)]


def inside(line: Row, place: str) -> list[Row]:
    """The rows at a place in a line, each with the line's other entries."""
    at_place: Any = line
    for key in place.split("."):
        at_place = (at_place or {}).get(key)
    if isinstance(at_place, dict):
        at_place = [{"name": name} | row for name, row in at_place.items()]
    machine = line["device"].partition("host ")[2].partition(",")[0]
    return [line | {"machine": machine} | row for row in at_place or [{}] * (place == "rows")]


def change(row: Row, rows: list[Row]) -> str:
    """The change of the perplexity against the baseline, percent, with its 95 % interval, paired by window.

    A star stands where it excludes zero.

    The baseline is the one that the row's settings name, else a method.
    """
    named = row["config"].get("baseline")
    key, value = ("settings", named) if named else ("name", BASELINE)
    base = [r for r in rows if r.get(key) == value and (r["width"], r["text"]) == (row["width"], row["text"])]
    if not base or base[0] is row or not row.get("window_nll") or row["composition"] == "None":
        return ""
    return paired_change(row["window_nll"], base[0]["window_nll"]).text(1)


def accuracy_change(row: Row, rows: list[Row], correct: str) -> str:
    """The change of the accuracy against the float model's on the same items, points, starred if it excludes zero."""
    base = [r for r in rows if r["name"] == "fp32" and r["text"] == row["text"]]
    if not base or base[0] is row or not row.get(correct):
        return ""
    return paired_accuracy([*map(int, row[correct])], [*map(int, base[0][correct])]).text(1)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
