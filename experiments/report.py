"""One HTML page of all results in a folder: tables, figures, each run's settings, differences between two runs.

    python -m experiments.report results/

Writes <folder>/report.html from the rows (*.jsonl) and figures (*.png) in the folder and below. The page opens in a
browser without a network. Rows of different protocols stand in different tables.
"""

import argparse
import base64
import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from itables.utils import read_package_file
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from experiments.command_line import console, one_sentence
from experiments.tables import COLUMNS, ROWS, label, misfit, read_rows
from jquant.errors import InputError
from jquant.evaluation import rows as names_of
from jquant.evaluation.rows import Row
from jquant.io.files import write_text

PAGE, TABLE, METRICS = "report.html", "table.jsonl", ".metrics.jsonl"
# What the entries of a row tell; the others are figures.
SECTIONS = {
    "protocol": ("protocol",),
    "settings": ("method", "settings", "stored", "composition", "config", "seed"),
    "figures": (),
    "environment": ("device", "code_version", "packages", "products", "fingerprint"),
}
NAMED = {"method": str, "protocol": {"dtype": str}, "config": dict}
ON_TEXT = {"protocol": ROWS["outliers.jsonl"]["protocol"]}
MOST_COLUMNS = 12  # shown at first, of rows that are not a perplexity table's
LONG = 100  # characters; a longer text is shown with a run's settings only
DEPTH = 5  # what is nested more deeply is shown as JSON
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?(e[-+]\d+)?( ?[±/].*)?")
Found = tuple[str, Row]  # a row's file, below the folder, and the row
Parts = dict[str, dict[str, str]]  # of a row as text: section -> dotted path -> text
Group = dict[str, Any]


def page(folder: Path) -> str:
    """The page as HTML; the same files give the same page.

    Raises:
      InputError: the folder is missing or has no rows; a file is damaged.
    """
    found = _rows(folder)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return environment.get_template("report.html.jinja").render(
        name=folder.resolve().name,
        count=len(found),
        groups=_groups(found),
        figures=_figures(folder),
        script=read_package_file("html/dt_bundle.js"),
        style=read_package_file("html/dt_bundle.css"),
    )


def _rows(folder: Path) -> list[Found]:
    """All rows; of those that are equal but for `settings`, a sweep's and its trials', the first."""
    if not folder.is_dir():
        near = difflib.get_close_matches(folder.name, [path.name for path in folder.parent.glob("*/")], cutoff=0.0)
        nearest = f"; the nearest in {folder.parent} are {', '.join(near)}" if near else ""
        raise InputError(f"{folder} is not a folder{nearest}.")
    paths = sorted(folder.rglob("*.jsonl"), key=lambda path: (len(path.parts), path))
    found: dict[str, Found] = {}
    for path in paths:
        for number, row in enumerate(read_rows(path.parent, path.name)):
            run = json.dumps({key: value for key, value in row.items() if key != "settings"}, sort_keys=True)
            found.setdefault(run if "fingerprint" in row else f"{path} {number}", (_below(folder, path), row))
    if not found:
        raise InputError(f"{folder} has no results: there are no rows in files *.jsonl there or below.")
    return list(found.values())


def _figures(folder: Path) -> dict[str, str]:
    """The figures by their paths, as data URLs."""
    figures = {}
    for path in sorted(folder.rglob("*.png")):
        try:
            with Image.open(path, formats=["PNG"]) as image:
                image.verify()
            data = path.read_bytes()
        except (OSError, SyntaxError, ValueError) as wrong:
            raise InputError(f"{path} is damaged ({wrong}); move it away.") from None
        figures[_below(folder, path)] = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return figures


def _below(folder: Path, path: Path) -> str:
    return os.fsencode(path.relative_to(folder).as_posix()).decode(errors="replace")


def _groups(found: Sequence[Found]) -> list[Group]:
    """The tables: one for each kind of rows and protocol; perplexity tables first, metrics of trainings last."""
    members: dict[str, list[Found]] = {}
    for file, row in found:
        members.setdefault(_comparable(file, row), []).append((file, row))
    runs = {str(row.get("fingerprint")): _method(row) for _, row in found if misfit(row, NAMED, "") is None}
    groups = [_group(rows, runs) for rows in members.values()]
    for group, details in [(group, _details(group, groups)) for group in groups]:
        group["title"] += details
    return sorted(groups, key=lambda group: (group["kind"] != TABLE, group["kind"].endswith(METRICS)))


def _details(group: Group, groups: Sequence[Group]) -> str:
    """What tells a table from others of the same title: entries of the protocol, hashes only if no other."""
    alike = [other for other in groups if other["title"] == group["title"]]
    entries = {
        path.removeprefix("protocol."): text
        for path, text in group["shared"]["protocol"].items()
        if any(other["shared"]["protocol"].get(path, text) != text for other in alike)
    }
    readable = {key: text for key, text in entries.items() if not key.endswith("sha256")} or entries
    return f" ({', '.join(f'{key}: {text}' for key, text in readable.items())})" if readable else ""


def _comparable(file: str, row: Row) -> str:
    """What the rows of one table share: their kind and protocol, without the method's calibration; or their file."""
    protocol = row.get("protocol")
    if not isinstance(protocol, dict):
        return file
    same = {key: value for key, value in protocol.items() if key != "calibration_sha256"}
    return json.dumps([_kind(file, row), same], sort_keys=True)


def _kind(file: str, row: Row) -> str:
    return TABLE if misfit(row, ROWS[TABLE], "") is None else Path(file).name


def _group(found: Sequence[Found], runs: dict[str, str]) -> Group:
    """A table: its heading, its columns, what all rows share, and each row's cells and other parts."""
    kind = _kind(*found[0])
    rows = [{"cells": _cells(file, row, kind), "parts": _parts(row)} for file, row in found]
    shared = {
        section: {
            path: text for path, text in parts.items() if all(r["parts"][section].get(path) == text for r in rows)
        }
        for section, parts in rows[0]["parts"].items()
    }
    columns = _columns(rows, kind)
    for row in rows:
        row["parts"] = {
            section: {path: text for path, text in parts.items() if path not in shared[section]}
            for section, parts in row["parts"].items()
        }
    title, about = _heading(*found[0], kind, runs)
    order = [at for at, column in enumerate(columns) if kind == TABLE and column["key"] == "perplexity"]
    return {
        "kind": kind,
        "title": title,
        "about": about,
        "columns": columns,
        "order": order,
        "shared": shared,
        "rows": rows,
    }


def _heading(file: str, row: Row, kind: str, runs: dict[str, str]) -> tuple[str, str]:
    """A table's title, and what is said below it."""
    title = "" if kind == TABLE else f"{kind.removesuffix('.jsonl')}: "
    if misfit(row, ON_TEXT, "") is None:
        protocol = row["protocol"]
        bos = "with" if protocol["bos"] else "without"
        return f"{title}{names_of.text(row)}", f"{names_of.model(row)}, computed in {protocol['dtype']}, {bos} BOS"
    fingerprint = kind.removesuffix(METRICS)
    return (f"training of {runs[fingerprint]} ({fingerprint})", file) if fingerprint in runs else (file, "")


def _method(row: Row) -> str:
    """The readers' name of a row's method, with its width if it has one."""
    width = None if row.get("stored") else re.search(r"-(\d+)$", label(row))
    return names_of.name(row) + (f", {width[1]} bits" if width else "")


def _cells(file: str, row: Row, kind: str) -> dict[str, str]:
    """The cells of a row that are not simply one of its entries, by heading."""
    named = {"method": _method(row)} if misfit(row, NAMED, "") is None else {}
    others = {heading: cell for heading, cell in COLUMNS.items() if kind == TABLE and heading not in named}
    return named | {heading: cell(row) for heading, cell in others.items()} | {"from": file.removesuffix(f"/{TABLE}")}


def _parts(row: Row) -> Parts:
    """A row's entries as text."""
    parts: Parts = {section: {} for section in SECTIONS}
    for key, value in row.items():
        section = next((section for section, keys in SECTIONS.items() if key in keys), "figures")
        parts[section].update(_leaves(key, value, DEPTH))
    return parts


def _leaves(path: str, value: Any, depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value and depth:
        for key, part in value.items():
            yield from _leaves(f"{path}.{key}", part, depth - 1)
    else:
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _columns(rows: Sequence[Group], kind: str) -> list[Group]:
    """The columns of a table: the rows' cells and figures, and whatever else differs between them.

    Shown at first are the cells, the first figures unless the cells have them, and the device.
    """
    cells = [_column([row["cells"][heading] for row in rows], "cells", heading) for heading in rows[0]["cells"]]
    cells = [column | {"shown": True} for column in cells if column["filled"]]
    *cells, file = cells
    known = {key.rstrip("?") for key in ROWS[TABLE]} if kind == TABLE else {}
    figures = [column for column in _entries(rows, "figures") if column["key"] not in known]
    for column in figures[: 0 if kind == TABLE else MOST_COLUMNS]:
        column["shown"] = column["filled"]
    others = [column for section in SECTIONS if section != "figures" for column in _entries(rows, section)]
    others = [
        column | {"shown": column["key"] == "device"}
        for column in others
        if column["differs"] and column["key"] not in rows[0]["cells"]
    ]
    return [*cells, *figures, file | {"shown": file["differs"]}, *others]


def _entries(rows: Sequence[Group], section: str) -> list[Group]:
    """A column for each of the rows' entries that a cell can hold: no list, no long text."""
    paths = dict.fromkeys(path for row in rows for path in row["parts"][section])
    columns = {path: [row["parts"][section].get(path, "null") for row in rows] for path in paths}
    return [
        _column(["" if text == "null" else text for text in texts], section, path)
        for path, texts in columns.items()
        if not any(text.startswith(("[", "{")) or len(text) > LONG for text in texts)
    ]


def _column(texts: Sequence[str], section: str, key: str) -> Group:
    """A column; it is numeric if all its texts are numbers, and those of an entry are shown with the same decimals."""
    filled = [text for text in texts if text]
    numeric = all(map(NUMBER.fullmatch, filled))
    decimals = None
    if numeric and section == "figures" and any("." in text or "e" in text for text in filled):
        sizes = [size for size in map(abs, map(float, filled)) if 0 < size < math.inf]
        decimals = min(max(3 - math.floor(math.log10(median(sizes))), 0), 6) if sizes else 1
    return {
        "section": section,
        "key": key,
        "title": key.removeprefix("config."),
        "numeric": numeric,
        "decimals": decimals,
        "filled": bool(filled),
        "differs": len({*texts}) > 1,
        "shown": False,
    }


def main() -> None:
    """The command."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="the folder of results, or one experiment's in it")
    folder = options.parse_args().folder
    with one_sentence():
        write_text(folder / PAGE, page(folder))
        console.print(folder / PAGE, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
