"""Draws every figure of a folder of results anew, from the kept rows: `make figures`.

python -m paper_figures experiments/results
"""

import sys
from pathlib import Path

from jquant.evaluation.rows import is_float, read_rows
from paper_figures import distortion, outliers, perplexity_bits, sensitivity, training_curves
from paper_figures.command import drawn


def main(results: Path) -> list[Path]:
    """Draws what the files of rows below a folder allow; returns the figures' paths."""
    figures: list[Path] = []
    for path in sorted(results.rglob("*.jsonl")):
        match path.name:
            case "distortion.jsonl":
                figures += drawn(distortion.draw, path)
            case "outliers.jsonl":
                figures += drawn(outliers.draw, path)
            case "sensitivity.jsonl":
                figures += drawn(sensitivity.draw, path)
            case "table.jsonl" if any(path.parent.glob("*.metrics.jsonl")):
                figures += drawn(training_curves.draw, path)
            case "table.jsonl" if any(map(is_float, read_rows(path))):
                figures += drawn(perplexity_bits.draw, path)
    return figures


if __name__ == "__main__":
    try:
        if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
            raise ValueError("give one folder of results.")
        print(*main(Path(sys.argv[1])), sep="\n")
    except ValueError as wrong:
        print(f"error: {' '.join(str(wrong).split())}", file=sys.stderr)
        sys.exit(2)
