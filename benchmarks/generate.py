"""Generation of many texts at once: tokens per second by the number of texts, beside one text.

    python -m benchmarks.generate

The default model in float32, 256 new tokens after BOS, sampled at temperature 1. `generate_ids` gives one text token by
token, `generate_batch` many with the loop over the tokens on the device. All take turns, so that a change of the
machine's speed affects all; the ratio is the median over the rounds of a round's tokens per second, divided by those of
`generate_ids` in the same round. Times include the prompt's step and the copy that `unstack` makes.
"""

import json
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.provenance import versions
from jquant import load_model
from jquant.cache_folder import cache_dir
from jquant.evaluation.generation import generate_batch, generate_ids
from jquant.models.decoder import Decoder

NEW_TOKENS, BATCHES, ROUNDS = 256, (1, 8, 32, 64), 3
ALONE, TOGETHER = ("generate_ids", 1), "generate_batch"  # function, texts


def main() -> None:
    """Times every batch, prints the table and the JSON line."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    model = load_model("smollm2_135m")
    prompt = np.array([model.tokenizer.bos_id], np.int32)

    def alone() -> None:
        for _ in generate_ids(model.decoder, prompt, tokens=NEW_TOKENS, temperature=1.0):
            pass

    runs = {ALONE: alone} | {(TOGETHER, texts): together(model.decoder, prompt, texts) for texts in BATCHES}
    first = {key: timed(run) for key, run in runs.items()}
    speeds = {key: [] for key in runs}
    for _ in range(ROUNDS):
        for key, run in runs.items():
            speeds[key].append(key[1] * NEW_TOKENS / timed(run))
    rows = [
        {
            "function": function,
            "texts": texts,
            "tokens_per_second": statistics.median(speed),
            "ratio": statistics.median(a / b for a, b in zip(speed, speeds[ALONE], strict=True)),
            "first_call_s": first[function, texts],
        }
        for (function, texts), speed in speeds.items()
    ]
    table = Table("function", "texts", "tokens/s", "ratio", "ms a step", "first call s")
    for row in rows:
        speed = row["tokens_per_second"]
        cells = (f"{speed:.0f}", f"{row['ratio']:.2f}", f"{1000 * row['texts'] / speed:.0f}")
        table.add_row(row["function"], str(row["texts"]), *cells, f"{row['first_call_s']:.1f}")
    Console().print(table)
    protocol = f"{NEW_TOKENS} tokens after BOS, temperature 1; medians of {ROUNDS} alternating rounds; float32"
    print(json.dumps({"rows": rows, "protocol": protocol, **versions()}))


def together(decoder: Decoder, prompt: np.ndarray, texts: int) -> Callable[[], None]:
    """Generates so many texts with one prompt."""
    keys = jax.random.split(jax.random.key(0), texts)
    prompts = np.repeat(prompt[None], texts, 0)

    def run() -> None:
        generate_batch(decoder, prompts, keys, tokens=NEW_TOKENS, temperature=1.0)

    return run


def timed(function: Callable[[], None]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
