"""Tokens per second by batch and context: prefill and greedy decoding, float and quantized.

    python -m experiments.speed
    python -m experiments.speed methods=[fp32,rtn] bits=3 timing.batches=[1] timing.contexts=[512]

Prefill reads the prompts of all texts at once; decoding then adds a token to each, one after another. Methods take
turns in every round, so that a change of the machine's speed affects all. All settings: configs/speed.yaml. Results
land in results/<name>/: speed.jsonl and speed.md.
"""

import time
from collections.abc import Mapping
from typing import Any

import hydra
import jax
import jax.numpy as jnp
import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.table import Table

from experiments import provenance, tables
from experiments.command_line import console, one_sentence, progress_bars, run, show
from experiments.overrides import CONFIGS
from experiments.perplexity_table import refuse_quantized
from experiments.settings import check, check_methods
from experiments.tables import FLOAT
from jquant import InputError, LanguageModel, load_text
from jquant.cache_folder import cache_dir
from jquant.data import sample_windows
from jquant.evaluation.generation import empty_cache, in_steps, step
from jquant.io.files import write_text
from jquant.io.load import open_from_config
from jquant.kernels.choose import products
from jquant.methods import Method, Rules
from jquant.models.decoder import Decoder
from jquant.models.size import size_of
from jquant.pipeline.in_memory import quantize_decoder
from jquant.pipeline.plan import make_plan

FILE = "speed.jsonl"


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="speed")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    with one_sentence():
        measure(OmegaConf.to_container(config, resolve=True))  # pyright: ignore[reportArgumentType]


def measure(settings: dict[str, Any]) -> None:
    """Times all methods, adds their rows, prints and writes the table."""
    check(settings)
    methods, timing = check_methods(settings), settings["timing"]
    folder = tables.results_folder(settings)
    model, decoders = quantized_by(methods, settings)
    longest = max(timing["contexts"]) + timing["tokens"] + 1
    if longest > model.config.context_length:
        raise InputError(f"{longest} tokens exceed the model's context of {model.config.context_length}.")
    rows: list[dict[str, Any]] = []
    with products(settings["products"]), progress_bars("speed") as report:
        grid = [(batch, context) for batch in timing["batches"] for context in timing["contexts"]]
        for count, (batch, context) in enumerate(grid, 1):
            found = rates(decoders, batch, context, timing["tokens"], timing["rounds"])
            for name, (prefill, decode) in found.items():
                figures = {"prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode}
                shape = {"batch": batch, "context": context, "weight_mb": size_of(decoders[name]).megabytes}
                rows.append(
                    {"method": name, **shape, **figures} | described(name, methods[name], model, settings, shape)
                )
            tables.add_rows(folder, rows[-len(found) :], FILE)
            report("time", count, len(grid))
    write_text(folder / "speed.md", f"{tables.as_markdown(table(rows))}\n{caption(rows, settings)}\n")
    show(table(rows))
    console.print(caption(rows, settings), highlight=False, soft_wrap=True)


def quantized_by(
    methods: Mapping[str, Method | Rules | None], settings: dict[str, Any]
) -> tuple[LanguageModel, dict[str, Decoder]]:
    """The float model, and a decoder for each method."""
    source = open_from_config(settings["model"])
    refuse_quantized(source)
    with progress_bars(settings["model"]["name"]) as report:
        model = source.load(report)
    decoders, sampling, tokens = {}, settings["calibration"], None
    for name, chosen in methods.items():
        if chosen is None:
            decoders[name] = model.decoder
            continue
        plan = make_plan(model.decoder, chosen)
        if plan.needs and tokens is None:
            ids = model.tokenizer.encode(load_text(sampling["data"]))
            tokens = sample_windows(ids, sampling["context"], sampling["samples"], settings["seed"])
        decoders[name] = quantize_decoder(model.decoder, plan, tokens if plan.needs else None)[0]
    return model, decoders


def rates(
    decoders: Mapping[str, Decoder], batch: int, context: int, tokens: int, rounds: int
) -> dict[str, tuple[float, float]]:
    """Each decoder's tokens per second of prefill and of decoding, the fastest of the rounds."""
    ids = np.random.default_rng(0).integers(
        0, next(iter(decoders.values())).config.vocab_size, (batch, context), np.int32
    )
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in decoders}
    for _ in range(rounds + 1):  # the first compiles
        for name, decoder in decoders.items():
            seconds[name].append(_timed(decoder, jnp.asarray(ids), tokens))
    best = {name: np.min(times[1:], axis=0) for name, times in seconds.items()}
    return {name: (batch * context / prefill, batch * tokens / decode) for name, (prefill, decode) in best.items()}


def _timed(decoder: Decoder, ids: jax.Array, tokens: int) -> tuple[float, float]:
    """Seconds of the prompt, and of so many further tokens."""
    leaves, structure = jax.tree.flatten(in_steps(decoder))
    cache = empty_cache(decoder, ids.shape[0], ids.shape[1] + tokens + 1)
    begin = time.perf_counter()
    logits, cache = jax.block_until_ready(step(structure, leaves, ids, cache))
    prefill = time.perf_counter() - begin
    for count in range(tokens + 1):
        if count == 1:  # the first of them may compile
            begin = time.perf_counter()
        logits, cache = jax.block_until_ready(step(structure, leaves, jnp.argmax(logits, -1)[:, None], cache))
    return prefill, time.perf_counter() - begin


def described(
    name: str, chosen: Method | Rules | None, model: LanguageModel, settings: dict[str, Any], shape: dict[str, Any]
) -> dict[str, Any]:
    """What a row's figures depend on, and its fingerprint."""
    config = {key: value for key, value in settings.items() if key not in ("methods", "name", "results")}
    config["timing"] = {key: settings["timing"][key] for key in ("tokens", "rounds")}
    protocol = {
        "model": str(settings["model"].get("path") or settings["model"]["name"]),
        "weights_stored_as": model.stored_as,
        "dtype": str(model.decoder.dtype),
        **shape,
    }
    origin = {"composition": repr(chosen), "protocol": protocol, "config": config, "seed": settings["seed"]}
    return provenance.identified(origin, {name: chosen}, "experiments.speed")


def table(rows: list[dict[str, Any]]) -> Table:
    """A line for each method, batch and context; beside the speeds their ratio to the float model's, if it is there."""
    shown = Table(box=box.SIMPLE_HEAD)
    for heading in ("method", "batch", "context", "prefill tok/s", "÷ float", "decode tok/s", "÷ float"):
        shown.add_column(heading, justify="left" if heading == "method" else "right")
    floats = {(row["batch"], row["context"]): row for row in rows if row["method"] == FLOAT}
    for row in rows:
        base = floats.get((row["batch"], row["context"]))
        cells = []
        for key in ("prefill_tokens_per_second", "decode_tokens_per_second"):
            cells += [f"{row[key]:.0f}", f"{row[key] / base[key]:.2f}" if base else ""]
        shown.add_row(tables.label(row), str(row["batch"]), str(row["context"]), *cells)
    return shown


def caption(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """How the rows were measured."""
    protocol, timing = rows[0]["protocol"], settings["timing"]
    return (
        f"{protocol['model']} (weights stored as {protocol['weights_stored_as']}, computed in {protocol['dtype']}), "
        f"random prompts, {timing['tokens']} tokens decoded after each; the fastest of {timing['rounds']} rounds, in "
        f"which all methods take turns. {rows[0]['device']}."
    )


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    run(main)
