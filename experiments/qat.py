"""Quantization-aware training: quantizes a model, trains it towards the float one, and adds a row to the table.

    python -m experiments.qat
    python -m experiments.qat bits=3 tuning.steps=200 text.data=my.txt evaluation.data=held_out.txt

All settings: configs/qat.yaml; several hosts: docs/pods.md. A process may die at any moment: the same command goes on
from the last finished block or checkpoint. `output` holds training/ (checkpoints, metrics.jsonl) and model/, which
`jquant.load_model` and experiments.evaluate read; `start` holds the quantized model before training, which trainings
can share. Rows and metrics also land in results/<name>/, with a figure of the KL divergence by tokens.

What each ingredient brings, compared in pairs: configs/training_ingredients.yaml.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import jax
import numpy as np
from omegaconf import DictConfig, OmegaConf

from experiments import tables
from experiments.command_line import console, devices_of, one_sentence, peak_rss_mb, progress_bars, run
from experiments.compositions import find_method
from experiments.overrides import CONFIGS
from experiments.perplexity_table import describe, measure, prepare_tokens, refuse_quantized, tokens_per_second
from experiments.settings import check
from jquant import InputError, Journal, LanguageModel, Method, Options, Tuning, load_text
from jquant.cache_folder import cache_dir
from jquant.data import check_disjoint, run_hashes
from jquant.data import windows as cut_windows
from jquant.evaluation.perplexity import Reference, score
from jquant.evaluation.sampled_text import sample_text
from jquant.io.files import read_json, write_json, write_text
from jquant.io.load import open_from_config
from jquant.learning.journal import METRICS
from jquant.learning.tuning import check_devices, tune
from jquant.models.decoder import Decoder
from jquant.parallel.processes import as_first, on_first
from jquant.pipeline.to_disk import quantize_to_folder
from paper_figures import training_curves

Row = dict[str, Any]


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="qat")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    with one_sentence():
        train(OmegaConf.to_container(config, resolve=True))  # pyright: ignore[reportArgumentType]


def train(settings: dict[str, Any]) -> Row:
    """Trains, or goes on, writes the model, and returns its row.

    Raises:
      InputError: a wrong setting or text; what `quantize_to_folder` and `tune` find.
    """
    check(settings)
    folder, results = Path(settings["output"]), tables.results_folder(settings)
    devices = devices_of(settings)  # joins the other processes before anything is computed
    method = method_of(settings)
    stage = None if settings["tuning"] is None else tuning_of("tuning", settings["tuning"])
    if stage:
        check_devices(stage, devices)
    elif not method.tuning:
        raise InputError("tuning=null needs a stage of blocks: give blocks='{…}'.")
    source = open_from_config(settings["model"])
    refuse_quantized(source)
    with progress_bars(settings["model"]["name"]) as report:
        model = source.load(report)
    evaluation, calibration = prepare_tokens(model, settings, [method])
    windows, seen = training_windows(model, settings, evaluation) if stage else (None, [])
    scores = score(model.decoder, evaluation)
    reference = Reference(model.decoder, scores.hidden)

    def distance(decoder: Decoder) -> dict[str, float]:
        now = score(decoder, evaluation, reference=reference)
        assert now.kl is not None
        return {"kl": float(now.kl.mean()), "perplexity": now.perplexity}

    with progress_bars(str(settings["method"])) as report:
        begin, spent = time.perf_counter(), Path(f"{settings['start']}.seconds.json")
        options, found = Options(devices=devices, progress=report), as_first(spent.is_file())
        start = quantize_to_folder(source, Path(settings["start"]), method, calibration, options).load(report)
        if not found:  # trainings that share the start say what it took
            on_first(partial(write_json, spent, {"seconds": time.perf_counter() - begin}))
        started = read_json(spent).get("seconds")
        if not isinstance(started, float):
            raise InputError(f"{spent} does not say the seconds: move it away.")
        if calibration is not None:
            seen.append(run_hashes(model.tokenizer.encode(load_text(settings["calibration"]["data"]))))
        decoder, metrics = start.decoder, ""
        if stage and windows is not None:
            journal = Journal(folder / "training", evaluate=distance, **settings["journal"])
            decoder = tune(decoder, model.decoder, windows, stage, journal=journal, devices=devices, progress=report)
            metrics = (folder / "training" / METRICS).read_text()
        figures = measure(model, decoder, evaluation, reference, scores, report)
        speed = tokens_per_second(model, decoder, settings["generation"], report)
    trained = replace(start, decoder=decoder, calibrated_on=np.unique(np.concatenate(seen)) if seen else None)
    on_first(partial(shutil.rmtree, folder / "model", ignore_errors=True))
    trained.save(folder / "model")
    row = {"method": "qat", **figures, "tokens_per_second": speed, "peak_rss_mb": peak_rss_mb()}
    # Each block learns from as many tokens as its stage reads.
    read = sum(each.steps * each.windows for each in method.tuning) * settings["calibration"]["context"]
    row |= {"quantize_seconds": round(started + seconds_in(metrics), 1), "training_tokens": read + tokens_in(metrics)}
    decisive = {key: value for key, value in settings.items() if key not in ("about", "output", "start", "hosts")}
    row |= describe("qat", method, model, (evaluation, calibration), decisive, "experiments.qat")
    row |= {"settings": str(settings["about"])} if settings["about"] else {}
    on_first(partial(keep, results, row, metrics, settings["baseline"]))
    console.print(tables.one_line(row), highlight=False, soft_wrap=True)
    console.print(f"The model is in {folder / 'model'}; the row, its metrics and curves in {results}.", soft_wrap=True)
    return row


def keep(folder: Path, row: Row, metrics: str, baseline: str | None) -> None:
    """Adds a row and its metrics to a results folder, and draws them."""
    tables.add_rows(folder, [row])
    rows = tables.read_rows(folder)
    tables.write_table(folder, rows, baseline)
    if metrics:
        write_text(folder / f"{row['fingerprint']}.{METRICS}", metrics)
        training_curves.draw(rows, folder)


def method_of(settings: dict[str, Any]) -> Method:
    """The method that the training starts from, with a stage of blocks if the settings have one.

    Raises:
      InputError: rules, or a method that trains already.
    """
    shape = (settings["bits"], settings["group"], settings["symmetric"])
    method = find_method(str(settings["method"]), *shape)
    if not isinstance(method, Method) or method.tuning:
        raise InputError(f"method={settings['method']}: training starts from a single method without a tuning.")
    if settings["blocks"] is None:
        return method
    return replace(method, tuning=(replace(tuning_of("blocks", settings["blocks"]), target="block"),))


def tuning_of(section: str, given: dict[str, Any]) -> Tuning:
    """The stage that a section of the settings describes.

    Raises:
      InputError: a setting that `Tuning` does not have, or a wrong value.
    """
    known = [field.name for field in fields(Tuning)]
    if unknown := sorted(given.keys() - known):
        raise InputError(f"{section}.{unknown[0]} is no setting of a tuning: choose from {', '.join(known)}.")
    return Tuning(**given)


def training_windows(
    model: LanguageModel, settings: dict[str, Any], evaluation: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The windows to learn from, and the hashes of their texts' runs.

    Texts are packed without gaps; one that is too short for a window is refused. Windows that the float model samples
    follow them.

    Raises:
      InputError: there are no windows; a text that occurs in the evaluation text.
    """
    text = settings["text"]
    names: Sequence[Any] = text["data"] if isinstance(text["data"], list) else [text["data"]] * bool(text["data"])
    parts, seen = [], []
    scored = evaluation[:, 1:] if settings["evaluation"]["bos"] else evaluation
    for ids in (model.tokenizer.encode(load_text(name)) for name in names):
        check_disjoint(scored, ids, f"evaluation.data={settings['evaluation']['data']}", "text.data")
        parts.append(cut_windows(ids, text["context"]))
        seen.append(run_hashes(ids))
    if text["sampled"]:
        shape = (text["sampled"], text["context"])
        parts.append(sample_text(model, *shape, seed=settings["seed"]))
    if not parts:
        raise InputError("There is no text to learn from: give text.data or text.sampled.")
    return np.concatenate(parts), seen


def tokens_in(metrics: str) -> int:
    """The tokens that a training read, from its metrics."""
    return max((line.get("tokens", 0) for line in map(json.loads, metrics.splitlines())), default=0)


def seconds_in(metrics: str) -> float:
    """The seconds that a training took, from its metrics."""
    return max((line["seconds"] for line in map(json.loads, metrics.splitlines())), default=0.0)


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    run(main)
