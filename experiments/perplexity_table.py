"""The perplexity table: RTN, GPTQ, AWQ, NF4 and INT8 beside the float model.

    python -m experiments.perplexity_table
    python -m experiments.perplexity_table name=mine methods=[fp32,rtn,gptq] bits=3 evaluation.data=my.txt
    python -m experiments.perplexity_table --config-name formats      # every format, rounded to nearest
    python -m experiments.perplexity_table --config-name ranges       # every range, at 4 and 3 bits
    python -m experiments.perplexity_table --config-name rounding     # GPTQ and better roundings, at 4, 3 and 2 bits
    python -m experiments.perplexity_table --config-name ingredients  # GPTQ, one ingredient added or removed a row

All settings: configs/perplexity_table.yaml; evaluation.data may be a list of texts. Results land in results/<name>/:
table.md, table.csv, table.jsonl (one row an object, with its whole configuration) and the figure. Rows from
the same settings, code, packages and machine are not computed again; each is written when it is finished, so none is
lost. With calibration.inputs=float all methods with calibration are quantized in one pass.
"""

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import hydra
import jax
import numpy as np
from flax import nnx
from omegaconf import DictConfig, OmegaConf

from experiments import provenance, tables
from experiments.command_line import (
    Report,
    console,
    devices_of,
    one_sentence,
    peak_rss_mb,
    progress_bars,
    reset_peak_rss,
    room,
    run,
    show,
)
from experiments.compositions import needs_calibration, rotation_of
from experiments.settings import check_table, naming
from experiments.sweep import in_sweep, run_trial
from jquant import InputError, LanguageModel, Options, load_text
from jquant.cache_folder import cache_dir
from jquant.data import check_disjoint, sample_windows
from jquant.evaluation.compare import compared
from jquant.evaluation.generation import generate_ids
from jquant.evaluation.perplexity import Reference, Scores, evaluation_windows, score
from jquant.io.load import ModelFile, QuantizedFile, open_from_config
from jquant.kernels.choose import products
from jquant.methods import Method, Rules
from jquant.models.decoder import Decoder
from jquant.models.size import size_of
from jquant.pipeline.in_memory import quantize_decoders
from jquant.pipeline.plan import Plan, make_plan
from jquant.pipeline.to_disk import quantize_to_folder
from paper_figures import perplexity_bits

# Settings on which no figure of a row depends.
WHERE = ("method", "methods", "baseline", "name", "results", "checkpoints")


@hydra.main(version_base=None, config_path=str(provenance.ROOT / "configs"), config_name="perplexity_table")
def main(config: DictConfig) -> float | None:
    """Hydra's entry point; in a sweep it returns what a search minimizes."""
    settings: Any = OmegaConf.to_container(config, resolve=True)
    if in_sweep():
        return run_trial(settings, table_rows)
    with one_sentence():
        make_table(settings)
    return None


def make_table(settings: dict[str, Any]) -> None:
    """Computes missing rows, writes and prints the table."""
    rows = table_rows(settings)
    folder = tables.results_folder(settings)
    tables.write_table(folder, rows, settings["baseline"])
    figures = perplexity_bits.draw(rows, folder)
    for text_rows in tables.by_text(rows).values():
        show(tables.terminal_table(text_rows, settings["baseline"], room()))
        console.print(tables.caption(text_rows, settings["baseline"]), highlight=False, soft_wrap=True)
    console.print(tables.written(folder, figures), soft_wrap=True)


def table_rows(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The table's rows; missing rows are computed and kept in the results folder."""
    # Compiled programs are kept between runs: a second run of the same shapes starts at once.
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    methods, folder = check_table(settings), tables.results_folder(settings)
    devices_of(settings)
    source = open_from_config(settings["model"])
    if any(methods.values()):
        refuse_quantized(source)
    with progress_bars(settings["model"]["name"]) as report:
        model = source.load(report)
    plans = {name: None if chosen is None else make_plan(model.decoder, chosen) for name, chosen in methods.items()}
    with products(settings["products"]):
        return compute_rows(source, model, methods, plans, one_text_each(settings), folder)


def refuse_quantized(source: ModelFile | QuantizedFile) -> None:
    """Raises InputError for a quantized model, before it is loaded."""
    if is_quantized(source):
        where = source.folder if isinstance(source, QuantizedFile) else source.name
        raise InputError(
            f"{where} is quantized already: quantize the float model, or evaluate this one by "
            f"experiments.evaluate or the table's methods=[fp32]."
        )


def is_quantized(source: ModelFile | QuantizedFile) -> bool:
    """Whether a model on disk is quantized: by jquant, which can also have saved a float model, or by another tool."""
    return source.quantized


def one_text_each(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings split into one copy for each text, so that a row does not depend on the table's other texts."""
    data = settings["evaluation"]["data"]
    texts = dict.fromkeys(data if isinstance(data, list) else [data])
    return [settings | {"evaluation": settings["evaluation"] | {"data": text}} for text in texts]


def prepare_tokens(
    model: LanguageModel, settings: dict[str, Any], methods: Iterable[Method | Rules | None]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Evaluation windows, and calibration windows if a method needs them.

    Raises:
      InputError: a text is missing, empty, too short, or occurs in the other text.
    """
    scoring, sampling = settings["evaluation"], settings["calibration"]
    text = load_text(scoring["data"])
    cut = (scoring.get(key) for key in ("context", "windows", "bos", "stride"))
    with naming("evaluation.data", scoring["data"]):
        evaluation = evaluation_windows(model, text, *cut)
    if not any(chosen and needs_calibration(chosen) for chosen in methods):
        return evaluation, None
    ids = model.tokenizer.encode(load_text(sampling["data"]))
    check_disjoint(evaluation[:, 1:] if scoring["bos"] else evaluation, ids, f"evaluation.data={scoring['data']}")
    count = sampling["samples"] + sampling.get("held_out", 0)
    with naming("calibration.data", sampling["data"]):
        return evaluation, sample_windows(ids, sampling["context"], count, settings["seed"])


def compute_rows(
    source: ModelFile | QuantizedFile,
    model: LanguageModel,
    methods: dict[str, Method | Rules | None],
    plans: Mapping[str, Plan | None],
    texts: list[dict[str, Any]],
    folder: Path,
) -> list[dict[str, Any]]:
    """One row for each text and method; rows in the folder from the same settings, code and machine are reused.

    Methods with float inputs share one pass through the blocks.

    Args:
      source: the model's files.
      model: the loaded float model.
      methods: by name; None is the float model.
      plans: each method's plan, by name.
      texts: the settings, one text each.
      folder: of the results.
    """
    tokens = [prepare_tokens(model, settings, methods.values()) for settings in texts]
    earlier: dict[Any, Any] = {row.get("fingerprint", n): row for n, row in enumerate(tables.read_rows(folder))}
    origins = {
        name: [
            describe(name, chosen, model, windows, settings) for settings, windows in zip(texts, tokens, strict=True)
        ]
        for name, chosen in methods.items()
    }
    for origin in chain.from_iterable(origins.values()):
        if kept := earlier.get(origin["fingerprint"]):
            console.print(f"{tables.one_line(kept)}  (kept)", highlight=False, soft_wrap=True)
    missing = {
        name: chosen
        for name, chosen in methods.items()
        if any(origin["fingerprint"] not in earlier for origin in origins[name])
    }
    references: dict[int, tuple[Reference, Scores]] = {}
    for together in _passes(missing, texts[0]):
        reset_peak_rss()
        with progress_bars(f"{len(together)} methods" if len(together) > 1 else next(iter(together))) as report:
            quantized, seconds = quantize_all(
                source, model, {name: plans[name] for name in together}, tokens[0][1], texts[0], report
            )
        for name in together:
            decoder, losses = quantized.pop(name)
            speed = None
            for index, (settings, (evaluation, _), origin) in enumerate(zip(texts, tokens, origins[name], strict=True)):
                if origin["fingerprint"] in earlier:
                    continue
                with progress_bars(name) as report:
                    if index not in references:
                        scores = score(model.decoder, evaluation, progress=report)
                        scores = scores.last(settings["evaluation"]["stride"])
                        references[index] = Reference(model.decoder, scores.hidden), scores
                    speed = speed or tokens_per_second(model, decoder, settings["generation"], report)
                    figures = measure(model, decoder, evaluation, *references[index], report)
                figures |= as_stored(source, figures) if is_quantized(source) else {}
                row = {"method": name, **figures, "tokens_per_second": speed, "peak_rss_mb": peak_rss_mb()}
                row |= {"quantize_seconds": seconds, "quantized_together": len(together), **losses}
                earlier[origin["fingerprint"]] = row = row | origin
                tables.add_rows(folder, [row])
                console.print(tables.one_line(row), highlight=False, soft_wrap=True)
        if texts[0]["checkpoints"]:
            shutil.rmtree(texts[0]["checkpoints"], ignore_errors=True)
    return [earlier[of_one[index]["fingerprint"]] for index in range(len(texts)) for of_one in origins.values()]


def _passes(
    methods: Mapping[str, Method | Rules | None], settings: dict[str, Any]
) -> Iterator[Mapping[str, Method | Rules | None]]:
    """Groups of methods that are quantized together: those that read the same float activations."""
    shared = {name: chosen for name, chosen in methods.items() if chosen is not None and needs_calibration(chosen)}
    if settings["calibration"]["inputs"] != "float":
        shared = {}
    yield from ({name: chosen} for name, chosen in methods.items() if name not in shared)
    for rotation in dict.fromkeys(map(rotation_of, shared.values())):
        yield {name: chosen for name, chosen in shared.items() if rotation_of(chosen) == rotation}


def quantize_all(
    source: ModelFile | QuantizedFile,
    model: LanguageModel,
    plans: Mapping[str, Plan | None],
    calibration: np.ndarray | None,
    settings: dict[str, Any],
    report: Report,
) -> tuple[dict[str, tuple[Decoder, dict[str, Any]]], float]:
    """For each method, the decoder and what its row says of the weights' errors; the seconds of all together.

    A single method keeps its finished blocks in the folder `checkpoints`, if there is one, and a killed run resumes
    from them. Methods that take gradients through the whole model can't resume.
    """
    chosen = {name: plan for name, plan in plans.items() if plan is not None}
    results: dict[str, Any] = dict.fromkeys(plans, (model.decoder, {"fallbacks": []}))
    if not chosen:
        return results, 0.0
    sampling = {key: settings["calibration"][key] for key in ("inputs", "passes", "held_out")}
    options = Options(**sampling, devices=devices_of(settings), progress=report)
    begin = time.perf_counter()
    [name, *others] = chosen
    if settings["checkpoints"] and not others and chosen[name].streams:
        folder = Path(settings["checkpoints"]) / name
        written = quantize_to_folder(source, folder, chosen[name], calibration, options).load(report)
        quantized = {name: (written.decoder, written.report)}
    else:
        quantized = quantize_decoders(model.decoder, chosen, calibration, options)
    seconds = time.perf_counter() - begin
    for name, (decoder, infos) in quantized.items():
        errors = {"output_error": infos.error, "held_out_error": infos.held_out_error}
        results[name] = decoder, {"fallbacks": infos.fallbacks, **errors}
    return results, seconds


def as_stored(source: ModelFile | QuantizedFile, figures: dict[str, Any]) -> dict[str, Any]:
    """The fields of a quantized model's row, which has no float model to compare with."""
    return {**dict.fromkeys(("perplexity_change_percent", "kl", "top1_agreement")), "stored": stored(source, figures)}


def stored(source: ModelFile | QuantizedFile, figures: dict[str, Any]) -> str:
    """How a quantized model's weights are stored."""
    return f"packed codes of {figures['bits_per_weight']:.3f} bits a weight, quantized from {source.stored_as}"


def measure(
    model: LanguageModel,
    decoder: Decoder,
    evaluation: np.ndarray,
    reference: Reference,
    float_scores: Scores,
    report: Report,
) -> dict[str, Any]:
    """A decoder's figures on one text, compared with the float model."""
    scores = float_scores
    if decoder is not model.decoder:
        scores = score(decoder, evaluation, reference=reference, progress=report).last(float_scores.nll.shape[1])
    return compared(scores, float_scores, size_of(decoder), bos=False).row()


def tokens_per_second(
    model: LanguageModel, decoder: Decoder, generation: dict[str, Any], report: Report
) -> float | None:
    """Greedy decoding speed at batch 1, without compilation and prompt."""
    if not generation["tokens"]:
        return None
    prompt = model.tokenizer.encode(generation["prompt"])
    ids = generate_ids(decoder, prompt, tokens=generation["tokens"] + 2)
    for _ in range(2):  # the prompt's step and the first single-token step compile
        next(ids)
    begin = time.perf_counter()
    for done, _ in enumerate(ids, 1):
        report("generate", done, generation["tokens"])
    return generation["tokens"] / (time.perf_counter() - begin)


def describe(
    name: str,
    chosen: Method | Rules | None,
    model: LanguageModel,
    tokens: tuple[np.ndarray, np.ndarray | None],
    settings: dict[str, Any],
    script: str = "experiments.perplexity_table",
) -> dict[str, Any]:
    """Everything that a row's figures depend on, and its fingerprint; `script` is the module that measures.

    `tokens` are the windows of evaluation and calibration (`prepare_tokens`).
    """
    evaluation, calibration = tokens
    uses = calibration if chosen is not None and needs_calibration(chosen) else None
    config = {key: value for key, value in settings.items() if key not in WHERE}
    config["evaluation"] = config["evaluation"] | {"windows": len(evaluation)}
    protocol = {
        **evaluated(settings, evaluation),
        "weights_stored_as": model.stored_as,
        "dtype": str(model.decoder.dtype),
        "calibration_sha256": None if uses is None else provenance.digest(uses),
        "weights_sha256": provenance.digest(*jax.tree.leaves(nnx.state(model.decoder))),
    }
    origin = {"composition": repr(chosen), "protocol": protocol, "config": config, "seed": settings["seed"]}
    return provenance.identified(origin, {name: chosen}, script)


def evaluated(settings: dict[str, Any], tokens: np.ndarray) -> dict[str, Any]:
    """The entries of a row's protocol on the model's name and on the scored windows."""
    stride = settings["evaluation"].get("stride")
    return {
        "model": str(settings["model"].get("path") or settings["model"]["name"]),
        "data": str(settings["evaluation"]["data"]),
        "windows": len(tokens),
        "context": tokens.shape[1],
        "stride": stride or tokens.shape[1],
        "bos": settings["evaluation"]["bos"],
        "scored_tokens": tokens[:, 1:][:, -(stride or 0) :].size,
        "evaluation_sha256": provenance.digest(tokens),
    }


if __name__ == "__main__":
    from experiments import perplexity_table  # launchers send `main` to other processes by its module's name

    run(perplexity_table.main)
