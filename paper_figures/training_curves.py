"""How far a model is from the float one while it is trained, by tokens.

python -m paper_figures.training_curves results/qat
"""

from collections.abc import Sequence
from pathlib import Path

from jquant.evaluation.rows import Row
from jquant.plot.style import save
from jquant.plot.training import figure
from paper_figures.command import command


def draw(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Writes <folder>/training_curves.{png,pdf} from the rows and from <folder>/<fingerprint>.metrics.jsonl."""
    return save(figure(rows, folder), Path(folder) / "training_curves")


if __name__ == "__main__":
    command(draw, "table.jsonl")
