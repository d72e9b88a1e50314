"""Outliers: their tokens and channels, layer by layer, and the distribution of activations.

python -m paper_figures.outliers results/smollm2_135m
"""

from collections.abc import Sequence
from pathlib import Path

from jquant.evaluation.rows import Row
from jquant.plot.activations import figure, histograms
from jquant.plot.style import save
from paper_figures.command import command


def draw(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Writes <folder>/outliers.{png,pdf} and <folder>/outlier_histograms.{png,pdf} from the rows of the last run."""
    rows = [row for row in rows if row.get("fingerprint") == rows[-1].get("fingerprint")]  # others had other settings
    return [
        *save(figure(rows), Path(folder) / "outliers"),
        *save(histograms(rows), Path(folder) / "outlier_histograms"),
    ]


if __name__ == "__main__":
    command(draw, "outliers.jsonl")
