"""Outliers of a model's activations: their size, channels and tokens, and their cost in quantization.

    python -m experiments.outliers
    python -m experiments.outliers name=mine model=local model.path=/my/model evaluation.data=my.txt

All settings: configs/outliers.yaml; definitions: jquant/evaluation/outliers.py. Results land in results/<name>/:
outliers.jsonl (one row a layer and input) and the figures. Rows from the same settings, code, packages and machine
are not computed again.
"""

from collections.abc import Callable
from typing import Any

import hydra
import jax
import numpy as np
from flax import nnx
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.table import Table

import paper_figures.outliers
from experiments import provenance, tables
from experiments.command_line import console, one_sentence, progress_bars, run, show
from experiments.overrides import CONFIGS
from experiments.settings import check
from jquant import LanguageModel, load_text
from jquant.cache_folder import cache_dir
from jquant.evaluation.outliers import INPUTS, Criteria, Outliers, observe
from jquant.evaluation.perplexity import evaluation_windows
from jquant.io.load import load_from_config

Row = dict[str, Any]


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="outliers")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    with one_sentence():
        find_outliers(OmegaConf.to_container(config, resolve=True))  # pyright: ignore[reportArgumentType]


def find_outliers(settings: dict[str, Any]) -> None:
    """Computes the rows unless they exist, prints a summary and draws the figures."""
    check(settings)
    folder = tables.results_folder(settings)
    kept = tables.read_rows(folder, "outliers.jsonl")
    criteria = Criteria(float(settings["threshold"]), settings["bits"], settings["group"])
    evaluation = settings["evaluation"]
    with progress_bars(settings["model"]["name"]) as report:
        model = load_from_config(settings["model"], progress=report)
        criteria.check_widths(model.decoder.config)
        text = load_text(evaluation["data"])
        tokens = evaluation_windows(model, text, evaluation["context"], evaluation["windows"], evaluation["bos"])
        origin = describe(model, tokens, settings)
        rows = [row for row in kept if row.get("fingerprint") == origin["fingerprint"]]
        if not rows:
            seen = observe(model.decoder, tokens, criteria, progress=report)
            rows = [row | origin for row in rows_of(Outliers(*seen, tokens, criteria, evaluation["bos"]), model)]
            tables.add_rows(folder, rows, "outliers.jsonl")
    figures = paper_figures.outliers.draw(rows, folder)
    show(terminal_table(rows))
    console.print(caption(rows[0]), highlight=False, soft_wrap=True)
    console.print(f"Results: {folder}/outliers.jsonl. Figures: {', '.join(map(str, figures))}.", soft_wrap=True)


def rows_of(outliers: Outliers, model: LanguageModel) -> list[Row]:
    """`Outliers.rows` with rounded data for the figures: channel maxima, histogram, attention received.

    `largest_tokens` becomes [window, position, largest |x|, the token's text].
    """
    rows = outliers.rows()
    for row in rows:
        input_outliers = outliers[row["layer"], row["input"]]
        row["largest_tokens"] = [
            [w, p, float(input_outliers.token_max[w, p]), model.tokenizer.decode([int(outliers.tokens[w, p])])]
            for w, p in row["largest_tokens"]
        ]
        edges, counts = input_outliers.histogram_by(2)
        row["channel_max"], row["histogram_edges"] = _rounded(input_outliers.channel_max, 3), _rounded(edges, 4)
        row["histogram_counts"] = counts.tolist()
        if row["input"] == "attention_input":
            row["attention_received"] = _rounded(outliers.attention_received[row["layer"]].mean(0), 4)
    return rows


def _rounded(values: np.ndarray, digits: int) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values]


def describe(model: LanguageModel, tokens: np.ndarray, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything that the rows depend on, and its fingerprint."""
    config = {key: value for key, value in settings.items() if key not in ("name", "results")}
    evaluation = settings["evaluation"]
    protocol = {
        "model": str(config["model"].get("path") or config["model"]["name"]),
        "weights_stored_as": model.stored_as,
        "dtype": str(model.decoder.embedding.get_value().dtype),
        "data": str(evaluation["data"]),
        "windows": len(tokens),
        "context": tokens.shape[1],
        "stride": tokens.shape[1],
        "bos": evaluation["bos"],
        "tokens": tokens.size,
        "tokens_sha256": provenance.digest(tokens),
        "weights_sha256": provenance.digest(*jax.tree.leaves(nnx.state(model.decoder))),
    }
    return provenance.identified({"protocol": protocol, "config": config}, None, "experiments.outliers")


def terminal_table(rows: list[Row]) -> Table:
    """One line an input: each figure's maximum over the layers, with the layer; the mean share of wasted levels."""
    # Fits a terminal of 80 columns.
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    headings = (
        "max /\nmedian",
        "max\n|x|",
        "sink's\nenergy %",
        "outlier\nfeatures",
        "massive\ntokens",
        "waste %\nx, w",
    )
    table.add_column("input", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name in INPUTS:
        input_rows = [row for row in rows if row["input"] == name]
        table.add_row(
            name,
            _largest(input_rows, lambda row: row["ratio"] or 0),
            _largest(input_rows, lambda row: row["max"]).split()[0],
            _largest(input_rows, lambda row: 100 * row["sink_energy"]),
            _largest(input_rows, lambda row: len(row["outlier_features"])),
            _largest(input_rows, lambda row: row["massive_tokens"]),
            ", ".join(filter(None, (_mean(input_rows, "activation_waste"), _mean(input_rows, "weight_waste")))),
        )
    return table


def _largest(rows: list[Row], figure: Callable[[Row], float]) -> str:
    top = max(rows, key=figure)
    value = figure(top)
    return f"{value:,.0f} ({top['layer']})" if value >= 1000 else f"{value:.3g} ({top['layer']})" if value else "0"


def _mean(rows: list[Row], key: str) -> str:
    known = [row[key] for row in rows if row[key] is not None]
    return f"{100 * np.mean(known):.0f}" if known else ""


def caption(row: Row) -> str:
    """The protocol and the definitions."""
    measured, config = row["protocol"], row["config"]
    return (
        f"Largest over the layers, the layer in brackets. {measured['model']} (weights stored as "
        f"{measured['weights_stored_as']}, computed in {measured['dtype']}) on {measured['data']}: "
        f"{measured['windows']} windows of {measured['context']} tokens, {'with' if measured['bos'] else 'no'} BOS. "
        f"Sink: the first token of a window and its unbroken repeats; energy: Σ x², the Gram matrix's trace. "
        f"Outlier features: |x| ≥ {config['threshold']:g} in 6 % of the tokens or more. "
        f"Massive: |x| > 100 and > 1,000 × median. Waste: the share of a symmetric "
        f"{config['bits']}-bit grid's levels that only the largest of {config['group']} neighbours reaches, "
        f"in activations (x) and in the weights that read them (w), mean over the layers. {row['device']}."
    )


if __name__ == "__main__":
    # Compiled programs are kept between runs: a second run of the same shapes starts at once.
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    run(main)
