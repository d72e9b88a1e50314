"""The cost of quantizing only one projection type, one layer or one matrix.

python -m paper_figures.sensitivity results/sensitivity
"""

from collections.abc import Sequence
from pathlib import Path

from jquant.evaluation.rows import Row
from jquant.plot.layers import figure
from jquant.plot.style import save
from paper_figures.command import command


def draw(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Writes <folder>/sensitivity.{png,pdf}."""
    return save(figure(rows), Path(folder) / "sensitivity")


if __name__ == "__main__":
    command(draw, "sensitivity.jsonl")
