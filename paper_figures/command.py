"""A figure's command line."""

import sys
from collections.abc import Callable
from pathlib import Path

from jquant.evaluation.rows import Row, read_rows


def command(draw: Callable[[list[Row], Path], list[Path]], name: str) -> None:
    """Draws the rows of a file, or of the file `name` in a folder, into that folder.

    Ends with status 2 and one sentence if the rows can't be drawn.
    """
    try:
        if len(sys.argv) != 2:
            raise ValueError("give one folder of results, or its file of rows.")
        path = Path(sys.argv[1])
        print(*drawn(draw, path / name if path.is_dir() else path))
    except ValueError as wrong:
        print(f"error: {' '.join(str(wrong).split())}", file=sys.stderr)
        sys.exit(2)


def drawn(draw: Callable[[list[Row], Path], list[Path]], path: Path) -> list[Path]:
    """Draws the rows of a file into its folder.

    Raises:
      ValueError: the rows can't be drawn; the message is one sentence that names the file.
    """
    rows = read_rows(path)
    try:
        return draw(rows, path.parent)
    except KeyError as missing:
        raise ValueError(f"{path} has a row without {missing}: the figure is drawn from {path.name}.") from None
    except (IndexError, TypeError, ValueError, AttributeError, OSError) as wrong:
        raise ValueError(f"{path} can't be drawn ({wrong}).") from None
