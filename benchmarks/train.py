"""Quantization-aware training against transformers + torch training the float model, in one run on the same cores.

    python -m benchmarks.train

A step of jquant trains all projections, their scales and zeros at 2 bits, by the KL divergence from the float model,
which runs beside it: its products have factors in bfloat16, everything else is float32. A step of transformers trains
all weights of the float model in float32 by the text's cross-entropy with torch's AdamW, and has no teacher. Both
alternate, so that a change of the machine's speed affects both; ratios are of medians.

The share of the machine's rate compares the products that a step must do with the fastest bfloat16 product of that
shape, timed in the same rounds.
"""

import json
import resource
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.evaluate import transformers_model
from experiments.provenance import versions
from jquant import LanguageModel, Tuning, load_model, load_text, quantize
from jquant.cache_folder import cache_dir
from jquant.data import windows
from jquant.learning import loop
from jquant.learning.losses import model_loss
from jquant.learning.tuning import begun, split

CONTEXT, WINDOWS, ROUNDS = 512, 2, 5
TOKENS = CONTEXT * WINDOWS


def main() -> None:
    """Runs both, prints the table and the JSON line."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    model = load_model("smollm2_135m")
    text = windows(model.tokenizer.encode(load_text("c4_utf8")), CONTEXT, WINDOWS)
    step, multiply = jquant_step(model, text), product()
    step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    runs = {"jquant": step, "transformers": torch_step(text), "product": multiply}
    first = {name: run() for name, run in runs.items()}
    times = {name: [run() for _ in range(1)] for name, run in runs.items()}
    for _ in range(ROUNDS - 1):
        for name, run in runs.items():
            times[name].append(run())
    seconds = {name: statistics.median(values) for name, values in times.items()}
    needed = products_of(model) * TOKENS
    share = needed / seconds["jquant"] / (2 * TOKENS * 576 * 1536 / seconds["product"])
    table = Table("run", "tokens/s", "ratio", "first call s")
    for name in ("jquant", "transformers"):
        ratio = seconds["transformers"] / seconds[name]
        table.add_row(name, f"{TOKENS / seconds[name]:.0f}", f"{ratio:.2f}", f"{first[name]:.1f}")
    Console().print(table)
    print(f"{share:.0%} of the rate of bfloat16 products; {peak:.0f} MB resident at most before torch was loaded.")
    figures = {
        "train_tokens_per_second": TOKENS / seconds["jquant"],
        "train_ratio": seconds["transformers"] / seconds["jquant"],
        "transformers_train_tokens_per_second": TOKENS / seconds["transformers"],
        "share_of_product_rate": share,
        "product_gflops": 2 * TOKENS * 576 * 1536 / seconds["product"] / 1e9,
        "peak_rss_mb": peak,
        "protocol": f"{WINDOWS} windows of {CONTEXT} a step; medians of {ROUNDS} alternating rounds; 2 bits, g64, Adam",
        **versions(),
    }
    print(json.dumps(figures))


def jquant_step(model: LanguageModel, text: np.ndarray) -> Callable[[], float]:
    """A function that takes a step of quantization-aware training and returns its seconds."""
    stage = Tuning(1000, WINDOWS, weight_rate=0.01)
    start, student = begun(split(quantize(model, "rtn-2", progress=False).decoder), stage, model.decoder)
    learned = start()
    held = [loop.State(learned, loop.optimizer(stage).init(learned))]
    frozen, rates, program = (student, model.decoder), loop.rates_of(stage, 0), loop.Program.of(model_loss, stage)

    def run() -> float:
        begin = time.perf_counter()
        held[0], value, _ = loop.step(held[0], frozen, text, rates, program)
        jax.block_until_ready((held[0], value))
        return time.perf_counter() - begin

    return run


def torch_step(text: np.ndarray) -> Callable[[], float]:
    """A function that takes a step of transformers' training and returns its seconds."""
    import torch

    model = transformers_model().train()
    optimizer, ids = torch.optim.AdamW(model.parameters(), 1e-5), torch.from_numpy(text.astype(np.int64))

    def run() -> float:
        begin = time.perf_counter()
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        return time.perf_counter() - begin

    return run


def product() -> Callable[[], float]:
    """A function that multiplies in bfloat16 at the shape of the model's widest projection; the best of 20 seconds."""
    x, w = jnp.ones((TOKENS, 576), jnp.bfloat16), jnp.ones((576, 1536), jnp.bfloat16)
    multiply = jax.jit(lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32))

    def run() -> float:
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            multiply(x, w).block_until_ready()
            times.append(time.perf_counter() - begin)
        return min(times)

    return run


def products_of(model: LanguageModel) -> float:
    """Operations a token that a step must do in products: the student's three, the teacher's one, and attention's."""
    config = model.config
    width, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    projections = config.layers * config.hidden * (2 * width + 2 * kv + 3 * config.ffn)
    attention = config.layers * width * CONTEXT  # scores and values over half the square
    head = config.hidden * config.vocab_size
    # The head is not trained: its second backward product is left out.
    return 2 * (4 * projections + 4 * attention + 3 * head)


if __name__ == "__main__":
    main()
