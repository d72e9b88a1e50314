"""The cost of quantizing only one layer, one projection type, or one weight matrix.

    python -m experiments.sensitivity
    python -m experiments.sensitivity methods=[rtn] bits=3 evaluation.data=my.txt

Every weight is quantized once, with the float model's inputs. Then each selection of quantized weights is evaluated,
with all other weights float. All settings: configs/sensitivity.yaml. Results land in results/<name>/:
sensitivity.jsonl (one method an object), sensitivity.md and the figure.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import hydra
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.table import Table

from experiments import tables
from experiments.command_line import Report, console, one_sentence, progress_bars, run, show
from experiments.overrides import CONFIGS
from experiments.perplexity_table import describe, prepare_tokens, refuse_quantized
from experiments.settings import check, check_methods
from experiments.tables import FLOAT
from jquant import InputError, Method, Options, QTensor, dequantize
from jquant.cache_folder import cache_dir
from jquant.evaluation.perplexity import Reference, Scores, score
from jquant.io.files import write_text
from jquant.io.load import open_from_config
from jquant.models.decoder import Decoder, blocks
from jquant.models.families import LLAMA
from jquant.pipeline.in_memory import quantize_decoder
from jquant.pipeline.plan import Plan, make_plan
from paper_figures import sensitivity as figure

PATHS = LLAMA.weights
Stacks = dict[str, Array]  # path within a block -> [layers, in, out]


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="sensitivity")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    with one_sentence():
        analyse(OmegaConf.to_container(config, resolve=True))  # pyright: ignore[reportArgumentType]


def analyse(settings: dict[str, Any]) -> None:
    """Computes missing rows, writes and prints the tables, draws the figure."""
    check(settings)
    folder = tables.results_folder(settings)
    methods = check_methods(settings)
    for name, chosen in methods.items():
        if not isinstance(chosen, Method) or chosen.transform or chosen.rotation or chosen.tuning or chosen.activation:
            raise InputError(f"{name}: sensitivity takes methods that change one weight at a time.")
    source = open_from_config(settings["model"])
    refuse_quantized(source)
    with progress_bars(settings["model"]["name"]) as report:
        model = source.load(report)
    evaluation, calibration = prepare_tokens(model, settings, methods.values())
    earlier, rows, reference = tables.read_rows(folder, "sensitivity.jsonl"), [], None
    for name, chosen in methods.items():
        assert isinstance(chosen, Method)
        plan = make_plan(model.decoder, chosen)
        origin = describe(name, chosen, model, (evaluation, calibration), settings, "experiments.sensitivity")
        row = next((row for row in earlier if row.get("fingerprint") == origin["fingerprint"]), None)
        if row is None:
            with progress_bars(name) as report:
                scores = reference or score(model.decoder, evaluation, progress=report)
                reference = scores
                figures = measure(model.decoder, plan, (evaluation, calibration), scores, settings, report)
            row = {"method": name, FLOAT: scores.perplexity, **figures, **origin}
            tables.add_rows(folder, [row], "sensitivity.jsonl")
        rows.append(row)
    for table in (projection_table(rows), layer_table(rows)):
        show(table)
    write_text(folder / "sensitivity.md", markdown(rows))
    console.print(f"Results: {folder}/sensitivity.jsonl, sensitivity.md. Figure: {figure.draw(rows, folder)[0]}.")


def measure(
    decoder: Decoder,
    plan: Plan,
    tokens: tuple[np.ndarray, np.ndarray | None],
    reference: Scores,
    settings: dict[str, Any],
    report: Report,
) -> dict[str, Any]:
    """Perplexity and KL with one projection type, one layer, one matrix, and everything quantized."""
    evaluation, calibration = tokens
    quantized, weights_report = quantize_decoder(decoder, plan, calibration, Options(inputs="float", progress=report))
    float_values, values = _stacks(decoder), _stacks(quantized)
    graph, state = nnx.split(decoder)
    layers = decoder.config.layers
    counts = {
        "projection": len(evaluation),
        "layer": settings["layer_windows"],
        "matrix": settings["matrix_windows"],
    }
    selections = list(_selections(layers, {kind for kind, windows in counts.items() if windows}))
    figures: dict[str, Any] = {"all": None, "projections": {}, "layers": [], "matrices": []}
    figures["fallbacks"] = weights_report.fallbacks
    for count, (kind, path, layer) in enumerate(selections, 1):
        mask = {p: np.isin(np.arange(layers), range(layers) if layer is None else layer) for p in PATHS}
        mask = {p: m if path in (None, p) else np.zeros_like(m) for p, m in mask.items()}
        mixed = nnx.merge(graph, _mix(state, float_values, values, mask))
        windows = counts.get(kind, len(evaluation))
        scores = score(mixed, evaluation[:windows], reference=Reference(decoder, reference.hidden[:windows]))
        assert scores.kl is not None
        entry = {"perplexity": scores.perplexity, "perplexity_stderr": scores.stderr, "kl": float(scores.kl.mean())}
        match kind:
            case "all":
                figures["all"] = entry
            case "projection":
                figures["projections"][_short(path)] = entry
            case "layer":
                figures["layers"].append(entry)
            case _:
                figures["matrices"].append({"layer": layer, "projection": _short(path), **entry})
        report("evaluate", count, len(selections))
    return figures


def _selections(layers: int, kinds: set[str]) -> Iterator[tuple[str, str | None, int | None]]:
    """(kind, path, layer) of each selection; None for all paths or all layers. The few large ones come first."""
    yield "all", None, None
    yield from (("projection", path, None) for path in PATHS)
    if "layer" in kinds:
        yield from (("layer", None, layer) for layer in range(layers))
    if "matrix" in kinds:
        yield from (("matrix", path, layer) for layer in range(layers) for path in PATHS)


def _stacks(decoder: Decoder) -> Stacks:
    """The blocks' kernels, dequantized."""
    kernels_of: dict[str, list[Array]] = {path: [] for path in PATHS}
    for block in blocks(decoder):
        for path in PATHS:
            part, projection, _ = path.split(".")
            kernel = getattr(getattr(block, part), projection).kernel.get_value()
            kernels_of[path].append(dequantize(kernel) if isinstance(kernel, QTensor) else kernel)
    return {path: jnp.stack(kernels) for path, kernels in kernels_of.items()}


@partial(jax.jit)
def _mix(state: Any, float_values: Stacks, values: Stacks, mask: dict[str, Array]) -> Any:
    """The decoder's state with quantized values where the mask, `[layers]` for each path, is true."""
    mixed = nnx.to_pure_dict(state)
    for path in PATHS:
        part, projection, _ = path.split(".")
        kept = float_values[path]
        mixed_kernel = jnp.where(mask[path][:, None, None], values[path].astype(kept.dtype), kept)
        mixed["segments"][0][part][projection]["kernel"] = mixed_kernel
    nnx.replace_by_pure_dict(state, mixed)
    return state


def _short(path: str | None) -> str:
    return (path or "").split(".")[1]


def projection_table(rows: list[dict[str, Any]]) -> Table:
    """Perplexity with one projection type quantized in every layer."""
    told2 = rows[0]["protocol"]
    title = f"Perplexity, one projection type quantized alone (float: {rows[0][FLOAT]:.2f}; {told2['windows']} windows)"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    names = list(rows[0]["projections"])
    for column in ("method", *names, "all"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        cells = [*(row["projections"][name] for name in names), row["all"]]
        table.add_row(tables.label(row), *(f"{cell['perplexity']:.2f}" for cell in cells))
    return table


def layer_table(rows: list[dict[str, Any]]) -> Table:
    """KL with one layer quantized alone, thousandths of a nat."""
    title = f"KL × 1000, one layer quantized alone ({rows[0]['config']['layer_windows']} windows)"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("layer", *map(tables.label, rows)):
        table.add_column(column, justify="right")
    for layer, cells in enumerate(zip(*(row["layers"] for row in rows), strict=True)):
        table.add_row(str(layer), *(f"{1000 * cell['kl']:.2f}" for cell in cells))
    return table


def markdown(rows: list[dict[str, Any]]) -> str:
    """Both tables and their protocol."""
    text = ""
    for table in (projection_table(rows), layer_table(rows)):
        text += f"{table.title}\n\n{tables.as_markdown(table)}\n"
    return text + tables.caption(rows) + " Every weight is fitted to the float model's inputs.\n"


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    run(main)
