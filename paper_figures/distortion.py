"""Squared error of formats on normal weights, with Shannon's bound.

python -m paper_figures.distortion results/distortion
"""

from collections.abc import Sequence
from pathlib import Path

from jquant.evaluation.rows import Row
from jquant.plot.distortion import figure
from jquant.plot.style import save
from paper_figures.command import command


def draw(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Writes <folder>/distortion.{png,pdf}."""
    return save(figure(rows), Path(folder) / "distortion")


if __name__ == "__main__":
    command(draw, "distortion.jsonl")
