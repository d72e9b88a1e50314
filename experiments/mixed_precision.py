"""Widths chosen weight by weight, at the size of a uniform width.

    python -m experiments.mixed_precision
    python -m experiments.mixed_precision bits=4 widths=[3,4,5,6]

A weight's cost at a width is measured (KL to the float model with that weight alone quantized, on held-out calibration
windows) or estimated to second order (its output error, each token weighted by the loss's gradient). A choice of widths
minimises the sum of costs under the size of all weights at `bits`: greedily, or exactly by dynamic programming. The
plans land in results/<name>/*.yaml, and `experiments.quantize method=results/<name>/exact.yaml` takes them. Their rows
stand beside the uniform one in results/<name>/table.jsonl. All settings: configs/mixed_precision.yaml.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import jax
import numpy as np
import yaml
from jaxtyping import Float, Int
from omegaconf import DictConfig, OmegaConf

from experiments import tables
from experiments.command_line import one_sentence, progress_bars, run
from experiments.compositions import find_method
from experiments.overrides import CONFIGS
from experiments.perplexity_table import describe, make_table, prepare_tokens, refuse_quantized
from experiments.sensitivity import measure
from experiments.settings import check
from jquant import InputError, LanguageModel, Method, Options
from jquant.cache_folder import cache_dir
from jquant.calibration.loss_gradients import token_gradients
from jquant.evaluation.perplexity import score
from jquant.io.files import write_text
from jquant.io.load import open_from_config
from jquant.models.decoder import blocks
from jquant.models.families import family_of
from jquant.models.params import flat_params, weight_name
from jquant.pipeline.in_memory import quantize_decoder
from jquant.pipeline.plan import make_plan

FILE = "costs.jsonl"
Costs = Float[np.ndarray, "weights widths"]
Sizes = Int[np.ndarray, "weights widths"]


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="mixed_precision")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    with one_sentence():
        choose(OmegaConf.to_container(config, resolve=True))  # pyright: ignore[reportArgumentType]


def choose(settings: dict[str, Any]) -> None:
    """Measures the costs that are missing, writes the plans, and makes their table."""
    check(settings)
    folder, widths = tables.results_folder(settings), sorted(settings["widths"])
    if settings["bits"] not in widths or settings["bits"] == widths[0]:
        raise InputError(f"bits={settings['bits']} gives the size: it is one of widths={widths}, not the smallest.")
    if not settings["calibration"]["held_out"]:
        raise InputError("Costs are measured on held-out windows: set calibration.held_out to 1 or more.")
    source = open_from_config(settings["model"])
    refuse_quantized(source)
    with progress_bars(settings["model"]["name"]) as report:
        model = source.load(report)
    rows = {width: costs_of(width, model, settings, folder) for width in widths}
    names = list(rows[widths[0]]["bytes"])
    sizes = np.array([[rows[width]["bytes"][name] for width in widths] for name in names])
    budget = int(sizes[:, widths.index(settings["bits"])].sum())
    plans = []
    for cost in ("kl", "second_order"):
        costs = np.array([[rows[width][cost][name] for width in widths] for name in names])
        for rule, chosen in {"greedy": greedy, "exact": exact}.items():
            plan = {name: widths[place] for name, place in zip(names, chosen(costs, sizes, budget), strict=True)}
            plans.append(folder / f"{rule}-{cost}.yaml")
            write_text(plans[-1], written(plan, str(settings["method"]), settings))
    uniform = f"{settings['method']}-{settings['bits']}"
    methods = ["fp32", uniform, *map(str, plans)]
    make_table(settings | {"methods": methods, "method": None, "baseline": settings["method"], "published": None})


def costs_of(width: int, model: LanguageModel, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Each weight's bytes and costs at a width, by its name; kept in the results folder."""
    method = find_method(str(settings["method"]), width, settings["group"], settings["symmetric"])
    if not isinstance(method, Method) or method.transform or method.rotation or method.tuning or method.activation:
        raise InputError(f"{settings['method']}: widths are chosen for methods that change one weight at a time.")
    if "gram" not in method.needs:
        raise InputError(f"{settings['method']} fits no weight to its inputs: choose a method such as gptq.")
    _, calibration = prepare_tokens(model, settings, [method])
    assert calibration is not None  # a Gram matrix needs some
    held_out = settings["calibration"]["held_out"]
    fit, windows = calibration[:-held_out], calibration[-held_out:]
    own = settings | {"bits": width, "widths": None}
    origin = describe(str(settings["method"]), method, model, (windows, fit), own, "experiments.mixed_precision")
    for row in tables.read_rows(folder, FILE):
        if row.get("fingerprint") == origin["fingerprint"]:
            return row
    plan, every = make_plan(model.decoder, method), {"layer_windows": 0, "matrix_windows": held_out}
    with progress_bars(f"{settings['method']}-{width}") as report:
        scores = score(model.decoder, windows, progress=report)
        alone = measure(model.decoder, plan, (windows, fit), scores, every, report)["matrices"]
        by_loss = make_plan(model.decoder, replace(method, token_weights="loss"))
        quantized, infos = quantize_decoder(model.decoder, by_loss, fit, Options(inputs="float", progress=report))
    paths = {path.split(".")[1]: path for path in family_of(model.config).weights}
    gradients = token_gradients(model.decoder, fit[: settings["gradient_windows"]])
    kernels = {
        weight_name(layer, path): flat_params(block)[path]
        for layer, block in enumerate(blocks(quantized))
        for path in paths.values()
    }
    errors = {
        # Half the mean over tokens of (gᵀ Δᵀ x)², the direction of g averaged out (`token_gradients`).
        name: 0.5 * float(gradients[path][layer].mean() * info.error) / kernels[name].shape[1]
        for (layer, path), info in infos.items()
        if (name := weight_name(layer, path))
    }
    row = {
        "width": width,
        "kl": {weight_name(cell["layer"], paths[cell["projection"]]): cell["kl"] for cell in alone},
        "second_order": errors,
        "bytes": {name: kernel.nbytes for name, kernel in kernels.items()},
        **origin,
    }
    tables.add_rows(folder, [row], FILE)
    return row


def greedy(costs: Costs, sizes: Sizes, budget: int) -> list[int]:
    """For each weight the place of its width: from the smallest on, always the step that saves most per byte."""
    chosen, left = [0] * len(costs), budget - int(sizes[:, 0].sum())
    while True:
        steps = [
            ((costs[weight, place] - costs[weight, wider]) / more, weight, wider, more)
            for weight, place in enumerate(chosen)
            for wider in range(place + 1, costs.shape[1])
            if 0 < (more := int(sizes[weight, wider] - sizes[weight, place])) <= left
        ]
        gain, weight, wider, more = max(steps, default=(0, 0, 0, 0))
        if gain <= 0:
            return chosen
        chosen[weight], left = wider, left - more


def exact(costs: Costs, sizes: Sizes, budget: int) -> list[int]:
    """The choice of the least sum of costs within the budget, by dynamic programming over bytes.

    Raises:
      InputError: the smallest widths exceed the budget.
    """
    smallest = sizes.min(1, keepdims=True)
    if int(smallest.sum()) > budget:
        raise InputError(f"The smallest widths take {int(smallest.sum())} bytes, more than the {budget} there are.")
    more = sizes - smallest
    unit = int(np.gcd.reduce(more, axis=None)) or 1
    steps, room = more // unit, (budget - int(smallest.sum())) // unit
    least, places = np.zeros(room + 1), []  # the least cost of the weights so far, by the room that they may take
    for cost, step in zip(costs, steps, strict=True):
        shifted = [np.concatenate([np.full(min(s, room + 1), np.inf), least[: max(room + 1 - s, 0)]]) for s in step]
        options = np.stack([values + added for values, added in zip(shifted, cost, strict=True)])
        places.append(options.argmin(0))
        least = options.min(0)
    chosen = []
    for place, step in zip(reversed(places), reversed(steps), strict=True):
        chosen.append(int(place[room]))
        room -= int(step[chosen[-1]])
    return chosen[::-1]


def written(plan: Mapping[str, int], method: str, settings: Mapping[str, Any]) -> str:
    """A plan as a file of rules (`experiments.compositions`): one a width, naming its weights."""
    by_width: dict[int, list[str]] = {}
    for name, width in plan.items():
        by_width.setdefault(width, []).append(name.replace(".", r"\."))
    rules = [
        {"weights": f"^({'|'.join(names)})$", "method": f"{method}-{width}"}
        for width, names in sorted(by_width.items())
    ]
    head = f"# By experiments.mixed_precision, of the size of {method}-{settings['bits']}; group={settings['group']}.\n"
    return head + yaml.safe_dump({"rules": rules}, width=10**6, sort_keys=False)


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    run(main)
