"""Perplexity against bits per weight.

python -m paper_figures.perplexity_bits results/smollm2_135m
"""

from collections.abc import Sequence
from pathlib import Path

from jquant.evaluation.rows import Row, by_text
from jquant.plot.bits import figure
from jquant.plot.style import save
from paper_figures.command import command


def draw(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Writes <folder>/perplexity_bits.{png,pdf}: one point for each row, or with many rows a line for each.

    Files of further texts also have the text's name.
    """
    paths: list[Path] = []
    for text, text_rows in by_text(rows).items():
        stem = f"perplexity_bits-{Path(text).stem}" if paths else "perplexity_bits"
        paths += save(figure(text_rows), Path(folder) / stem)
    return paths


if __name__ == "__main__":
    command(draw, "table.jsonl")
