"""Rows of results: reading, selecting, and intervals of their perplexities."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jquant.evaluation.compare import FLOAT
from jquant.evaluation.intervals import mean_and_half

Row = dict[str, Any]
Ends = tuple[float, float]  # of an interval


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a file of JSON lines.

    Raises:
      ValueError: the file can't be read, has no rows, or has a line that is not a JSON object with finite numbers.
    """
    try:
        # Not splitlines(): it also cuts at characters that a text may hold.
        lines = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line]
        rows = [json.loads(line, parse_constant=_refuse) for line in lines]
    except (OSError, ValueError, RecursionError) as wrong:
        raise ValueError(f"{path} can't be read ({wrong}).") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} has no rows: it takes one JSON object a line.")
    return rows


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no finite number")


def is_float(row: Row) -> bool:
    """Whether the row is the float model that the others are compared with."""
    return row["method"] == FLOAT and not row.get("stored")


def by_text(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each text that was evaluated."""
    texts = dict.fromkeys(row["protocol"]["data"] for row in rows)
    return {text: [row for row in rows if row["protocol"]["data"] == text] for text in texts}


def intervals(rows: Sequence[Row]) -> tuple[str, list[Ends | None]]:
    """A description of the perplexities' intervals, and each row's ends, or None.

    Windows differ much more than methods do. So if all rows have the likelihoods of the same windows, the intervals are
    those of the change from the float model, paired by window; otherwise they are standard errors.
    """
    base = next(filter(is_float, rows), None)
    if base and all(row.get("window_nll") and _windows(row) == _windows(base) for row in rows):
        halves = [mean_and_half(np.subtract(row["window_nll"], base["window_nll"]))[1] for row in rows]
        pairs = [(row["perplexity"], float(np.exp(half))) for row, half in zip(rows, halves, strict=True)]
        ends = [(at / factor, at * factor) if factor > 1 else None for at, factor in pairs]
        return "95 % interval of the change from the float model, paired by window", ends
    pairs = [(row["perplexity"], row.get("perplexity_stderr")) for row in rows]
    return "± one standard error", [(at - error, at + error) if error else None for at, error in pairs]


def _windows(row: Row) -> tuple[Any, int]:
    return row["protocol"].get("evaluation_sha256"), len(row["window_nll"])


def command(draw: Callable[[list[Row], Path], list[Path]], name: str) -> None:
    """A figure's command line: draws the rows of a file, or of the file `name` in a folder, into that folder.

    Ends with status 2 and one sentence if the rows can't be drawn.
    """
    try:
        if len(sys.argv) != 2:
            raise ValueError("give one folder of results, or its file of rows.")
        path = Path(sys.argv[1])
        path = path / name if path.is_dir() else path
        rows = read_rows(path)
        try:
            print(*draw(rows, path.parent))
        except KeyError as missing:
            raise ValueError(f"{path} has a row without {missing}: the figure is drawn from {name}.") from None
        except (IndexError, TypeError, ValueError, AttributeError, OSError) as wrong:
            raise ValueError(f"{path} can't be drawn ({wrong}).") from None
    except ValueError as wrong:
        print(f"error: {' '.join(str(wrong).split())}", file=sys.stderr)
        sys.exit(2)
