"""Multiple-choice accuracy of quantized models, by lm-evaluation-harness.

    python -m experiments.downstream
    python -m experiments.downstream methods=[fp32,rtn,gptq] bits=3 tasks=/path/to/tasks

The harness makes the requests and counts what is right: the choice with the largest log-likelihood (accuracy), and the
one with the largest log-likelihood per character (normalised accuracy). jquant answers (`jquant.evaluation.harness`,
which needs the extra `harness`). All settings: configs/downstream.yaml.

Results land in results/<name>/: downstream.jsonl (one method on one task an object, with each item's outcome), and
downstream.md. Rows from the same settings, items, code, packages and machine are not computed again.
"""

import contextlib
import dataclasses
import difflib
import io
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
import jax
import numpy as np
import yaml
from flax import nnx
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.table import Table

from experiments import provenance, tables
from experiments.cloze import NAME as CLOZE
from experiments.cloze import cloze_items, write_task
from experiments.command_line import console, one_sentence, peak_rss_mb, progress_bars, reset_peak_rss, run, show
from experiments.compositions import needs_calibration
from experiments.overrides import CONFIGS
from experiments.perplexity_table import is_quantized, refuse_quantized, stored
from experiments.settings import check, check_methods
from jquant import InputError, LanguageModel, Method, Options, load_text
from jquant.cache_folder import cache_dir
from jquant.data import check_disjoint, check_unseen, sample_windows
from jquant.evaluation.intervals import paired_accuracy
from jquant.io.files import write_text
from jquant.io.load import open_from_config
from jquant.methods import Rules
from jquant.models.size import size_of
from jquant.pipeline.in_memory import quantize_decoder
from jquant.pipeline.plan import make_plan

Row = dict[str, Any]
FILE = "downstream.jsonl"
# Settings on which no figure of a row depends.
WHERE = ("methods", "baseline", "name", "results", "tasks", "cloze")


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="downstream")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    with one_sentence():
        compare(OmegaConf.to_container(config, resolve=True))  # pyright: ignore[reportArgumentType]


def compare(settings: dict[str, Any]) -> None:
    """Computes missing rows, writes and prints the table."""
    check(settings)
    methods, baseline = check_methods(settings), settings["baseline"]
    if baseline is not None and not any(re.fullmatch(rf"{re.escape(baseline)}(-\d+)?", name) for name in methods):
        raise InputError(f"baseline={baseline} is not among the methods: {', '.join(methods)}.")
    import jquant.evaluation.harness  # noqa: F401 -- says what to install, before any work

    folder = tables.results_folder(settings)
    source = open_from_config(settings["model"])
    if any(methods.values()):
        refuse_quantized(source)
    tasks = load_tasks(settings)
    with progress_bars(settings["model"]["name"]) as report:
        model = source.load(report)
    calibration = prepare_calibration(model, tasks, methods, settings)
    earlier = {row.get("fingerprint"): row for row in tables.read_rows(folder, FILE)}
    rows = []
    for name, chosen in methods.items():
        origins = {task: describe(name, chosen, model, (task, tasks[task]), calibration, settings) for task in tasks}
        missing = [task for task, origin in origins.items() if origin["fingerprint"] not in earlier]
        quantized, costs = quantize(model, chosen, calibration, name) if missing else (model, {})
        for task in missing:
            row = {"method": name, "task": task, **measure(quantized, tasks[task], settings["batch"], name), **costs}
            row |= {"stored": stored(source, row)} if is_quantized(source) else {}
            earlier[origins[task]["fingerprint"]] = row = row | origins[task]
            tables.add_rows(folder, [row], FILE)
        rows += [earlier[origin["fingerprint"]] for origin in origins.values()]
        for row in rows[-len(tasks) :]:
            kept = "" if row["task"] in missing else "  (kept)"
            line = f"{tables.label(row)} on {row['task']}: accuracy {row['accuracy']:.1%}{kept}"
            console.print(line, highlight=False, soft_wrap=True)
    written = []
    for task in tasks:
        of_task = [row for row in rows if row["task"] == task]
        table = table_of(of_task, baseline)
        show(table)
        console.print(caption(of_task, baseline), highlight=False, soft_wrap=True)
        written.append(f"{table.title}\n\n{tables.as_markdown(table)}\n{caption(of_task, baseline)}\n")
    write_text(folder / "downstream.md", "\n".join(written))
    console.print(f"Results: {folder}/{FILE}, downstream.md.", soft_wrap=True)


# ---- tasks ----------------------------------------------------------------------------------------------------------


def given_tasks(settings: dict[str, Any]) -> list[str]:
    """What the settings name as tasks, as a list."""
    return settings["tasks"] if isinstance(settings["tasks"], list) else [settings["tasks"]]


def load_tasks(settings: dict[str, Any]) -> dict[str, Any]:
    """The harness's tasks by name, with their requests built.

    Raises:
      InputError: a folder without tasks, a broken task, an unknown name, a task that is not multiple choice.
    """
    found = {}
    for entry in given_tasks(settings):
        path = Path(entry).expanduser()
        if entry == CLOZE:
            made = settings["cloze"]
            words = (made["beginning"], made["continuation"])
            path = write_task(cloze_items(load_text(made["data"]), made["items"], *words, settings["seed"]))
        elif not path.is_dir() and (path.suffix or len(path.parts) > 1):
            raise InputError(f"tasks={entry} is not a folder.")
        for name, task in (_in_folder(path) if path.is_dir() else _built_in(entry)).items():
            if name in found:
                raise InputError(f"tasks={entry} has a second task named {name}.")
            found[name] = _ready(name, task, settings["seed"])
    return found


def _in_folder(folder: Path) -> dict[str, Any]:
    """All tasks of a folder; data files are looked for there."""
    from lm_eval.tasks import TaskManager

    for path in sorted(folder.rglob("*.yaml")):
        try:
            yaml.compose(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as wrong:
            raise InputError(f"{path} is no YAML ({' '.join(str(wrong).split())}).") from None
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not manager.all_subtasks:
        raise InputError(f"{folder} has no task of lm-evaluation-harness: a YAML file with task: and output_type:.")
    with contextlib.chdir(folder):
        return _loaded(manager, manager.all_subtasks, str(folder))


def _built_in(name: str) -> dict[str, Any]:
    """A task, or the tasks of a group, that the harness brings; their data are fetched."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, [CLOZE, *manager.all_tasks], n=3, cutoff=0.0)
        raise InputError(f"There is no task {name!r}; the nearest names are {', '.join(near)}. A folder would do, too.")
    return _loaded(manager, [name], name)


def _loaded(manager: Any, names: list[str], what: str) -> dict[str, Any]:
    with _quiet():
        try:
            return manager.load(names)["tasks"]
        except Exception as wrong:  # whatever datasets, jinja2 or the harness raise
            reason = " ".join(str(wrong).split())[:200] or type(wrong).__name__
            raise InputError(f"tasks={what} can't be loaded ({reason}).") from None


def _ready(name: str, task: Any, seed: int) -> Any:
    if task.OUTPUT_TYPE != "multiple_choice" or "acc" not in task.aggregation():
        raise InputError(
            f"{name} asks for {task.OUTPUT_TYPE} and {', '.join(task.aggregation())}: the table takes multiple_choice "
            f"with acc."
        )
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(seed)
    with _quiet():
        task.build_all_requests()
    return task


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's own progress bars and notes."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)


def requests_of(task: Any) -> list[tuple[str, str]]:
    """Every (context, continuation) that the task asks for."""
    return [instance.args[:2] for instance in task.instances]


def prepare_calibration(
    model: LanguageModel,
    tasks: Mapping[str, Any],
    methods: Mapping[str, Method | Rules | None],
    settings: dict[str, Any],
) -> np.ndarray | None:
    """Calibration windows, if a method needs them.

    Raises:
      InputError: the text is missing or too short, or shares 64 tokens in a row with an item, as it is or was
        calibrated on.
    """
    encode, sampling = model.tokenizer.encode, settings["calibration"]
    needed = any(chosen and needs_calibration(chosen) for chosen in methods.values())
    ids = encode(load_text(sampling["data"])) if needed else None
    for name, task in tasks.items():
        items = np.concatenate([encode(context + continuation) for context, continuation in requests_of(task)])
        if model.calibrated_on is not None:
            check_unseen(items, model.calibrated_on, f"Text of the task {name}", "choose another task")
        if ids is not None:
            check_disjoint(items, ids, f"Text of the task {name}")
    return None if ids is None else sample_windows(ids, sampling["context"], sampling["samples"], settings["seed"])


# ---- rows -----------------------------------------------------------------------------------------------------------


def quantize(
    model: LanguageModel, chosen: Method | Rules | None, calibration: np.ndarray | None, name: str
) -> tuple[LanguageModel, Row]:
    """The model by a method, and what that cost."""
    reset_peak_rss()
    if chosen is None:
        return model, {"quantize_seconds": 0.0, "fallbacks": []}
    begin = time.perf_counter()
    with progress_bars(name) as report:
        plan = make_plan(model.decoder, chosen)
        decoder, infos = quantize_decoder(model.decoder, plan, calibration, Options(progress=report))
    costs = {"quantize_seconds": time.perf_counter() - begin, "fallbacks": infos.fallbacks}
    return dataclasses.replace(model, decoder=decoder), costs


def measure(model: LanguageModel, task: Any, batch: int, name: str) -> Row:
    """A model's accuracies on a task, and which items it has right: a digit each, in the task's order."""
    from lm_eval.evaluator import evaluate

    from jquant.evaluation.harness import JquantLM

    begin = time.perf_counter()
    with progress_bars(name) as report, _quiet():
        served = JquantLM(model, batch=batch, progress=report)
        results: Any = evaluate(served, {"tasks": {task.task_name: task}}, bootstrap_iters=0)
    samples = sorted(results["samples"][task.task_name], key=lambda sample: sample["doc_id"])
    seconds = time.perf_counter() - begin
    size, figures = size_of(model.decoder), {}
    for metric, suffix in (("acc", ""), ("acc_norm", "_norm")):
        right = [int(sample[metric]) for sample in samples if metric in sample]
        figures[f"accuracy{suffix}"] = float(np.mean(right)) if right else None
        figures[f"correct{suffix}"] = "".join(map(str, right)) if right else None
    return {
        **figures,
        "items": len(samples),
        "bits_per_weight": size.bits_per_weight,
        "weight_mb": size.megabytes,
        "evaluate_seconds": seconds,
        "peak_rss_mb": peak_rss_mb(),
    }


def describe(
    name: str,
    chosen: Method | Rules | None,
    model: LanguageModel,
    task: tuple[str, Any],
    calibration: np.ndarray | None,
    settings: dict[str, Any],
) -> Row:
    """Everything that a row's figures depend on, and its fingerprint; the task is its name and itself."""
    uses = calibration if chosen is not None and needs_calibration(chosen) else None
    asked = [requests_of(task[1]), [task[1].doc_to_target(doc) for doc in task[1].eval_docs]]
    config = {key: value for key, value in settings.items() if key not in WHERE}
    protocol = {
        "model": str(settings["model"].get("path") or settings["model"]["name"]),
        "weights_stored_as": model.stored_as,
        "dtype": str(model.decoder.dtype),
        "data": task[0],
        "made_from": settings["cloze"] if task[0] == CLOZE and CLOZE in given_tasks(settings) else None,
        "examples": task[1].get_config("num_fewshot"),
        "items_sha256": provenance.fingerprint(asked),
        "lm_eval": version("lm-eval"),
        "calibration_sha256": None if uses is None else provenance.digest(uses),
        "weights_sha256": provenance.digest(*jax.tree.leaves(nnx.state(model.decoder))),
    }
    origin = {"composition": repr(chosen), "protocol": protocol, "config": config, "seed": settings["seed"]}
    return provenance.identified(origin, {name: chosen}, "experiments.downstream")


# ---- the table ------------------------------------------------------------------------------------------------------


def change(row: Row, rows: Sequence[Row], baseline: str | None, correct: str = "correct") -> str:
    """The row's accuracy against the baseline's, paired by item; blank without one, or for the baseline itself."""
    base = None if baseline is None else tables.base_of(row, rows, baseline)
    if base is None or base is row or not row[correct] or not base[correct]:
        return ""
    return paired_accuracy(*([int(digit) for digit in each[correct]] for each in (row, base))).text(1)


def table_of(rows: Sequence[Row], baseline: str | None) -> Table:
    """One task's accuracies, and their changes against the baseline in percentage points."""
    title = f"{rows[0]['task']}: accuracy on {rows[0]['items']} items"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1), collapse_padding=True)
    columns = {
        "method": [tables.label(row) for row in rows],
        "acc %": [f"{100 * row['accuracy']:.1f}" for row in rows],
        f"vs {baseline}": [change(row, rows, baseline) for row in rows],
        "norm %": ["" if row["accuracy_norm"] is None else f"{100 * row['accuracy_norm']:.1f}" for row in rows],
        f"norm vs {baseline}": [change(row, rows, baseline, "correct_norm") for row in rows],
        "bits/weight": [f"{row['bits_per_weight']:.3f}" for row in rows],
    }
    columns = {heading: cells for heading, cells in columns.items() if any(cells)}
    for heading in columns:
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def caption(rows: Sequence[Row], baseline: str | None) -> str:
    """The protocol of one task's rows."""
    protocol, made, sampling = rows[0]["protocol"], rows[0]["protocol"]["made_from"], rows[0]["config"]["calibration"]
    sentences = [
        f"{protocol['model']} (weights stored as {protocol['weights_stored_as']}, computed in {protocol['dtype']}), "
        f"{protocol['examples']} examples before an item, seed {rows[0]['seed']}.",
        f"Items: {made['beginning']} words of a paragraph of {made['data']}, and which of four continuations of "
        f"{made['continuation']} words is the true one."
        if made
        else "",
        "acc: the choice with the largest log-likelihood is right; norm: with the largest one per character.",
        f"vs {baseline}: percentage points with a 95 % interval (Bonett and Price), paired by item; * excludes zero."
        if baseline
        else "",
        f"Calibration: {sampling['data']}, {sampling['samples']} × {sampling['context']} tokens."
        if any(row["protocol"]["calibration_sha256"] for row in rows)
        else "",
        f"lm-evaluation-harness {protocol['lm_eval']}; {rows[0]['device']}.",
    ]
    return " ".join(filter(None, sentences))


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    run(main)
