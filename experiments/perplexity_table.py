"""The perplexity table: RTN, GPTQ, AWQ, NF4 and INT8 beside the float model.

    python -m experiments.perplexity_table
    python -m experiments.perplexity_table name=mine methods=[fp32,rtn,gptq] bits=3 evaluation.data=my.txt
    python -m experiments.perplexity_table --config-name formats      # every format, rounded to nearest
    python -m experiments.perplexity_table --config-name ranges       # every range, at 4 and 3 bits
    python -m experiments.perplexity_table --config-name rounding     # GPTQ and what beats it, at 4, 3 and 2 bits
    python -m experiments.perplexity_table --config-name ingredients  # GPTQ, one ingredient added or removed a row

All settings: configs/perplexity_table.yaml; evaluation.data may be a list of texts. Results land in results/<name>/:
table.md, table.csv, table.jsonl (one row an object, with its whole configuration) and the figure. Rows that are already
there, from the same settings, code, packages and machine, are not computed again; they are written one by one, so that
nothing finished is lost. With calibration.inputs=float all methods that look at activations are quantized in one pass.
"""

import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from itertools import chain
from operator import getitem
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
    run,
)
from experiments.compositions import find_method, needs_calibration, needs_of, rotation_of
from experiments.sweep import in_sweep, run_trial
from jquant import InputError, LanguageModel, bits_per_weight, load_text
from jquant.data import check_disjoint, sample_windows
from jquant.evaluation.generation import generate_ids
from jquant.evaluation.perplexity import Reference, Scores, evaluation_windows, score
from jquant.io.hub import cache_dir
from jquant.io.load import ModelFile, QuantizedFile, open_from_config
from jquant.methods import Method, Plan
from jquant.models.decoder import Decoder
from jquant.pipeline import check_plan, quantize_decoders
from jquant.streaming import quantize_to_folder, streams
from paper_figures import perplexity_bits

FLOAT = "fp32"
# Settings on which no figure of a row depends.
WHERE = ("method", "methods", "baseline", "name", "results", "checkpoints")
# The least that a setting takes.
LEAST = {
    "seed": 0,
    "calibration.samples": 1,
    "calibration.context": 1,
    "calibration.passes": 1,
    "calibration.held_out": 0,
    "evaluation.windows": 1,
    "evaluation.context": 2,
    "generation.tokens": 0,
}


@hydra.main(version_base=None, config_path=str(provenance.ROOT / "configs"), config_name="perplexity_table")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    settings: Any = OmegaConf.to_container(config, resolve=True)
    if in_sweep():
        run_trial(settings, table_rows)
        return
    with one_sentence():
        make_table(settings)


def make_table(settings: dict[str, Any]) -> None:
    """Computes the rows that are missing, writes and prints the table."""
    folder = Path(settings["results"]) / str(settings["name"])
    rows = table_rows(settings)
    tables.write_table(folder, rows, settings["baseline"])
    figures = perplexity_bits.draw(rows, folder)
    for its in tables.by_text(rows).values():
        console.print(tables.terminal_table(its, settings["baseline"]))
        console.print(tables.caption(its, settings["baseline"]), highlight=False, soft_wrap=True)
    console.print(
        f"Results: {folder}/table.md, table.csv, table.jsonl. Figure: {', '.join(map(str, figures))}.", soft_wrap=True
    )


def table_rows(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The table's rows, of which those that are missing are computed and kept in the results folder."""
    # Compiled programs are kept between runs: a second run of the same shapes starts at once.
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    methods = check_methods(settings)
    check_settings(settings, methods)
    devices_of(settings)
    source = open_from_config(settings["model"])
    with progress_bars(settings["model"]["name"]) as report:
        model = source.load(report)
    for chosen in filter(None, methods.values()):
        check_plan(model.decoder, chosen)
    folder = Path(settings["results"]) / str(settings["name"])
    return compute_rows(source, model, methods, one_text_each(settings), folder)


def check_methods(settings: dict[str, Any]) -> dict[str, Method | Plan | None]:
    """The asked-for methods by name; None is the float model.

    Raises:
      InputError: an unknown method, or bits or a group that no format takes: before any work is done.
    """
    one = settings.get("method")  # a setting of the perplexity table alone
    names = settings["methods"] if one is None else [one]
    if not isinstance(names, list):
        raise InputError(f"methods is a list, e.g. methods=[fp32,gptq], not {names!r}.")
    if not names:
        raise InputError("methods=[] leaves nothing to compute.")
    if type(settings["symmetric"]) is not bool:
        raise InputError(f"symmetric is true or false, not {settings['symmetric']!r}.")
    shape = (settings["bits"], settings["group"], settings["symmetric"])
    return {name: None if name == FLOAT else find_method(name, *shape) for name in map(str, names)}


def check_settings(settings: dict[str, Any], methods: dict[str, Method | Plan | None]) -> None:
    """Finds out before any work what would stop a row.

    Raises:
      InputError: a number out of range; an option that is not there; held-out windows or quantized inputs that a method
        needs and does not get; a baseline that is not among the methods.
    """
    for name, least in LEAST.items():
        *sections, key = name.split(".")
        value = reduce(getitem, sections, settings)[key]
        # null windows are the whole text; True is no number.
        if not (type(value) is int and value >= least) and not (name == "evaluation.windows" and value is None):
            raise InputError(f"{name} takes a whole number from {least}, not {value!r}.")
    sampling, baseline, bos = settings["calibration"], settings["baseline"], settings["evaluation"]["bos"]
    if type(bos) is not bool:
        raise InputError(f"evaluation.bos is true or false, not {bos!r}.")
    if sampling["inputs"] not in ("quantized", "float"):
        raise InputError(f"calibration.inputs is quantized or float, not {sampling['inputs']!r}.")
    texts = settings["evaluation"]["data"]
    if not isinstance(texts, str) and not (
        isinstance(texts, list) and texts and all(isinstance(one, str) for one in texts)
    ):
        raise InputError(f"evaluation.data is a text or a list of some, not {texts!r}.")
    for name, chosen in methods.items():
        needs = needs_of(chosen)
        if "held_out" in needs and not sampling["held_out"]:
            raise InputError(f"{name} chooses by held-out windows: set calibration.held_out to 1 or more.")
        if "cross" in needs and sampling["inputs"] == "float":
            raise InputError(f"{name} makes up for errors in quantized inputs: calibration.inputs=float leaves none.")
    if baseline is not None and not any(re.fullmatch(rf"{re.escape(str(baseline))}(-\d+)?", name) for name in methods):
        raise InputError(f"baseline={baseline} is not among the methods: {', '.join(methods)}.")


def one_text_each(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of a table of several texts as those of one table each, so that a row is the same in either."""
    data = settings["evaluation"]["data"]
    texts = dict.fromkeys(data if isinstance(data, list) else [data])
    return [settings | {"evaluation": settings["evaluation"] | {"data": text}} for text in texts]


def prepare_tokens(
    model: LanguageModel, settings: dict[str, Any], methods: Iterable[Method | Plan | None]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Evaluation windows, and calibration windows if a method needs them.

    Raises:
      InputError: a text is missing, empty, too short, or the one occurs in the other.
    """
    wanted, sampling = settings["evaluation"], settings["calibration"]
    text = load_text(wanted["data"])
    evaluation = evaluation_windows(model, text, wanted["context"], wanted["windows"], wanted["bos"])
    if not any(chosen and needs_calibration(chosen) for chosen in methods):
        return evaluation, None
    ids = model.tokenizer.encode(load_text(sampling["data"]))
    check_disjoint(evaluation[:, 1:] if wanted["bos"] else evaluation, ids, f"evaluation.data={wanted['data']}")
    count = sampling["samples"] + sampling.get("held_out", 0)
    return evaluation, sample_windows(ids, sampling["context"], count, settings["seed"])


def compute_rows(
    source: ModelFile | QuantizedFile,
    model: LanguageModel,
    methods: dict[str, Method | Plan | None],
    texts: list[dict[str, Any]],
    folder: Path,
) -> list[dict[str, Any]]:
    """One row a text and method, taken from the folder where it holds one from the same settings, code and machine.

    Methods that are fitted to float inputs share one way through the blocks.

    Args:
      source: the model's files.
      model: what they hold, float.
      methods: by name; None is the float model.
      texts: the settings, one text each.
      folder: of the results.
    """
    tokens = [prepare_tokens(model, settings, methods.values()) for settings in texts]
    earlier: dict[Any, Any] = {row.get("fingerprint", n): row for n, row in enumerate(tables.read_rows(folder))}
    origins = {
        name: [describe(name, one, model, *both, its) for its, both in zip(texts, tokens, strict=True)]
        for name, one in methods.items()
    }
    for origin in chain.from_iterable(origins.values()):
        if kept := earlier.get(origin["fingerprint"]):
            console.print(f"{tables.one_line(kept)}  (kept)", highlight=False, soft_wrap=True)
    missing = {
        name: one
        for name, one in methods.items()
        if any(origin["fingerprint"] not in earlier for origin in origins[name])
    }
    references: dict[int, tuple[Reference, Scores]] = {}
    for together in _passes(missing, texts[0]):
        reset_peak_rss()
        with progress_bars(f"{len(together)} methods" if len(together) > 1 else next(iter(together))) as report:
            quantized, seconds = quantize_all(source, model, together, tokens[0][1], texts[0], report)
        for name in together:
            decoder = quantized.pop(name)
            speed = None
            for index, (settings, (evaluation, _), origin) in enumerate(zip(texts, tokens, origins[name], strict=True)):
                if origin["fingerprint"] in earlier:
                    continue
                with progress_bars(name) as report:
                    if index not in references:
                        scores = score(model.decoder, evaluation, progress=report)
                        references[index] = Reference(model.decoder, scores.hidden), scores
                    speed = speed or tokens_per_second(model, decoder, settings["generation"], report)
                    figures = measure(model, decoder, evaluation, *references[index], report)
                row = {"method": name, **figures, "tokens_per_second": speed, "peak_rss_mb": peak_rss_mb()}
                row |= {"quantize_seconds": seconds, "quantized_together": len(together), **origin}
                earlier[origin["fingerprint"]] = row
                tables.write_rows(folder, list(earlier.values()))
                console.print(tables.one_line(row), highlight=False, soft_wrap=True)
        if texts[0]["checkpoints"]:
            shutil.rmtree(texts[0]["checkpoints"], ignore_errors=True)
    return [earlier[of_one[index]["fingerprint"]] for index in range(len(texts)) for of_one in origins.values()]


def _passes(
    methods: Mapping[str, Method | Plan | None], settings: dict[str, Any]
) -> Iterator[Mapping[str, Method | Plan | None]]:
    """Which methods are quantized together: those that look at the same activations, if these are the float model's."""
    shared = {name: one for name, one in methods.items() if one is not None and needs_calibration(one)}
    if settings["calibration"]["inputs"] != "float":
        shared = {}
    yield from ({name: one} for name, one in methods.items() if name not in shared)
    for rotation in dict.fromkeys(map(rotation_of, shared.values())):
        yield {name: one for name, one in shared.items() if rotation_of(one) == rotation}


def quantize_all(
    source: ModelFile | QuantizedFile,
    model: LanguageModel,
    methods: Mapping[str, Method | Plan | None],
    calibration: np.ndarray | None,
    settings: dict[str, Any],
    report: Report,
) -> tuple[dict[str, Decoder], float]:
    """Decoders by the methods' names, and how long they took, together.

    A method alone leaves its finished blocks in the folder `checkpoints`, if there is one, and a killed run goes on
    from them; not so those that take gradients through the whole model.
    """
    chosen = {name: one for name, one in methods.items() if one is not None}
    if not chosen:
        return dict.fromkeys(methods, model.decoder), 0.0
    how = {key: settings["calibration"][key] for key in ("inputs", "passes", "held_out")}
    how |= {"devices": devices_of(settings), "progress": report}
    begin = time.perf_counter()
    [name, *others] = chosen
    if settings["checkpoints"] and not others and streams(check_plan(model.decoder, chosen[name])):
        folder = Path(settings["checkpoints"]) / name
        decoders = {name: quantize_to_folder(source, folder, chosen[name], calibration, **how).load().decoder}
    else:
        done = quantize_decoders(model.decoder, chosen, calibration, **how)
        decoders = {name: decoder for name, (decoder, _) in done.items()}
    return dict.fromkeys(methods, model.decoder) | decoders, time.perf_counter() - begin


def measure(
    model: LanguageModel,
    decoder: Decoder,
    evaluation: np.ndarray,
    reference: Reference,
    float_scores: Scores,
    report: Report,
) -> dict[str, Any]:
    """What one decoder keeps of the model on one text."""
    scores = float_scores
    if decoder is not model.decoder:
        scores = score(decoder, evaluation, reference=reference, progress=report)
    projections = nnx.state(decoder.segments, lambda path, _: path[-1] == "kernel")
    return {
        "perplexity": scores.perplexity,
        "perplexity_stderr": scores.stderr,
        "perplexity_change_percent": 100 * (scores.perplexity / float_scores.perplexity - 1),
        "kl": 0.0 if scores.kl is None else float(scores.kl.mean(dtype=np.float64)),
        "top1_agreement": 1.0 if scores.agrees is None else float(scores.agrees.mean()),
        "bits_per_weight": bits_per_weight(projections),
        "weight_mb": sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(decoder))) / 1e6,
        "window_nll": scores.window_nll.tolist(),
    }


def tokens_per_second(
    model: LanguageModel, decoder: Decoder, generation: dict[str, Any], report: Report
) -> float | None:
    """Greedy decoding speed, batch 1, after the first token: compilation and prompt are not counted."""
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
    chosen: Method | Plan | None,
    model: LanguageModel,
    evaluation: np.ndarray,
    calibration: np.ndarray | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Everything a row's figures depend on, and a fingerprint of it."""
    uses = calibration if chosen is not None and needs_calibration(chosen) else None
    config = {key: value for key, value in settings.items() if key not in WHERE}
    config["evaluation"] = config["evaluation"] | {"windows": len(evaluation)}
    protocol = {
        "model": str(config["model"].get("path") or config["model"]["name"]),
        "weights_stored_as": model.stored_as,
        "dtype": str(model.decoder.embedding.get_value().dtype),
        "data": str(settings["evaluation"]["data"]),
        "windows": len(evaluation),
        "context": evaluation.shape[1],
        "stride": evaluation.shape[1],
        "bos": settings["evaluation"]["bos"],
        "scored_tokens": evaluation[:, 1:].size,
        "evaluation_sha256": provenance.digest(evaluation),
        "calibration_sha256": None if uses is None else provenance.digest(uses),
        "weights_sha256": provenance.digest(*jax.tree.leaves(nnx.state(model.decoder))),
    }
    origin = {
        "composition": repr(chosen),
        "protocol": protocol,
        "config": config,
        "seed": settings["seed"],
        **provenance.versions(),
    }
    return origin | {"fingerprint": provenance.fingerprint([name, origin])}


if __name__ == "__main__":
    from experiments import perplexity_table  # launchers send `main` to other processes, by its module's name

    run(perplexity_table.main)
