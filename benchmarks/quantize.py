"""Time of the parts of quantizing a model: forward passes, Gram matrices, ranges and transforms, solves.

    python -m benchmarks.quantize

The default model, C4 128 × 512, first 4 blocks; the first is left out, since its time includes compilation. A
block's forward pass and Gram matrices are one program, and so are its ranges and solves. So a part's time is the
difference between the program with and without it. The pass without Gram matrices computes the largest magnitude of
every tap instead, so that the compiler keeps the pass. "Gram" includes the attention mass that weights tokens.
"""

import json
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.provenance import versions
from jquant import Rounded, SmoothQuant, load_text, method
from jquant.calibration.windows import Calibration
from jquant.data import sample_windows
from jquant.io.load import load_model
from jquant.methods import Method
from jquant.models.decoder import blocks
from jquant.pipeline.blocks import Evidence, quantize_block
from jquant.pipeline.plan import make_plan

MODEL, CALIBRATION, SAMPLES, CONTEXT = "smollm2_135m", "c4_utf8", 128, 512
METHODS, BLOCKS = ("gptq", "awq", "e8p-2", "trellis-2"), 4


@dataclass(frozen=True)
class Unsolved:
    """A rounding that takes no time: all codes are 0."""

    needs: frozenset[str] = frozenset()

    def __call__(self, w: jax.Array, grid: Any) -> Rounded:
        """See `jquant.Rounding`."""
        return Rounded(jnp.zeros(w.shape, jnp.uint8))


def main() -> None:
    """Times every method and prints the table and the JSON line."""
    model = load_model(MODEL)
    tokens = sample_windows(model.tokenizer.encode(load_text(CALIBRATION)), CONTEXT, SAMPLES, seed=0)
    rows = {name: measure(model.decoder, method(name), tokens) for name in METHODS}
    table = Table("method", "first block s", *next(iter(rows.values()))["seconds"], title="seconds a block")
    for name, row in rows.items():
        total = sum(row["seconds"].values())
        cells = [f"{value:.2f} ({100 * value / total:.0f} %)" for value in row["seconds"].values()]
        table.add_row(name, f"{row['first_block_s']:.1f}", *cells)
    Console().print(table)
    print(json.dumps({"rows": rows, "blocks": BLOCKS, "tokens": tokens.size, **versions()}))


def measure(decoder, chosen: Method, tokens: np.ndarray) -> dict:
    """Median seconds of each part of a block, and the first block's seconds with compilation."""
    plan = make_plan(decoder, chosen).layers
    calibration = Calibration(decoder, plan, tokens)
    light = tuple((path, Method(path_method.format, transform=SmoothQuant())) for path, path_method in plan[0])
    unsolved = tuple((path, replace(path_method, rounding=Unsolved())) for path, path_method in plan[0])
    parts: dict[str, list[float]] = {"forward": [], "Gram": [], "range and transform": [], "solve": []}
    block_seconds = []
    for index, block in list(zip(range(BLOCKS), blocks(decoder), strict=False)):
        passing, _ = timed(partial(calibration.observe, block, block, light, index))
        begin = time.perf_counter()
        observing, stats = timed(partial(calibration.observe, block, block, plan[index], index))
        quantizing, (quantized, _) = timed(partial(quantize_block, block, plan[index], Evidence(stats)))
        advancing, _ = timed(partial(advanced, calibration, quantized))
        block_seconds.append(time.perf_counter() - begin)
        ranging, _ = timed(partial(quantize_block, block, unsolved, Evidence(stats)))
        parts["forward"].append(passing + advancing)
        parts["Gram"].append(observing - passing)
        parts["range and transform"].append(ranging)
        parts["solve"].append(quantizing - ranging)
    return {
        "first_block_s": block_seconds[0],
        "seconds": {name: float(np.median(values[1:])) for name, values in parts.items()},
    }


def advanced(calibration: Calibration, quantized) -> list:
    """The streams after a block."""
    calibration.advance(quantized)
    return list(calibration.seen)


def timed(function):
    """Seconds of one call, and its result."""
    begin = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - begin, result


if __name__ == "__main__":
    main()
