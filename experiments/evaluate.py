"""Perplexity of a model on disk, float or quantized, block by block; and its distance from the float model.

    python -m experiments.evaluate model=local model.path=quantized/smollm2_135m-gptq-4
    python -m experiments.evaluate model=local model.path=quantized/my-llama-gptq-4 reference=/models/my-llama

All settings: configs/evaluate.yaml. The last line is JSON: the figures, and the protocol. The row is kept in
results/<name>/table.jsonl with the reference's; table.md there has all rows. It is not computed again from the
same settings, files, code, packages and machine.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import jax
import numpy as np
from omegaconf import DictConfig, OmegaConf

from experiments import provenance, tables
from experiments.command_line import console, devices_of, one_sentence, peak_rss_mb, progress_bars, run
from experiments.overrides import CONFIGS
from experiments.perplexity_table import evaluated, is_quantized, stored
from experiments.settings import check, naming
from experiments.tables import FLOAT
from jquant import InputError, load_text
from jquant.cache_folder import cache_dir
from jquant.data import check_unseen
from jquant.evaluation.compare import compared
from jquant.evaluation.perplexity import Reference, Scores, evaluation_windows, score_from_disk
from jquant.io.load import ModelFile, QuantizedFile, open_from_config, open_model
from jquant.kernels.choose import products
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Block, Decoder
from jquant.models.size import Size, size_of
from jquant.parallel.processes import as_first, on_first
from jquant.progress import Progress

Row = dict[str, Any]
SHOWN = ("perplexity", "perplexity_stderr", "perplexity_change_percent", "kl", "top1_agreement", "bits_per_weight")


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="evaluate")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    settings: Any = OmegaConf.to_container(config, resolve=True)
    with one_sentence(), products(settings["products"]):
        evaluate(settings)


def evaluate(settings: dict[str, Any]) -> None:
    """Prints the model's figures and their protocol, and keeps them as a row.

    Raises:
      InputError: a wrong setting, a file that can't be read, or predictions that are not finite.
    """
    check(settings)
    folder = tables.results_folder(settings)
    devices_of(settings)  # joins the other processes before anything is computed
    source = open_from_config(settings["model"])
    reference = open_reference(settings, source)
    tokens = windows(source, settings)
    if reference and not np.array_equal(windows(reference, settings), tokens):
        raise InputError(f"reference={settings['reference']} reads the text as other tokens than the model.")
    origin = describe(source, tokens, settings)
    kept = [row for row in tables.read_rows(folder) if row.get("fingerprint") == origin["fingerprint"]]
    if as_first(bool(kept)):
        row = kept[0] if kept else {}
        console.print("The row was kept from an earlier run.")
    else:
        with progress_bars(source.name) as report:
            rows = measure(source, reference, tokens, settings, report)
        row = rows[-1]
        on_first(partial(keep, folder, rows))
    if jax.process_index() == 0:
        tell(row)


def open_reference(settings: dict[str, Any], source: ModelFile | QuantizedFile) -> ModelFile | QuantizedFile | None:
    """The float model to compare with, in the model's dtype.

    Raises:
      InputError: it is quantized, or can't be opened.
    """
    if settings["reference"] is None:
        return None
    reference = open_model(settings["reference"], dtype=source.computed_in)
    if is_quantized(reference):
        raise InputError(f"reference={settings['reference']} is quantized: give the float model.")
    return reference


def windows(source: ModelFile | QuantizedFile, settings: dict[str, Any]) -> np.ndarray:
    """The evaluation windows.

    Raises:
      InputError: a text is missing or too short, or the model was calibrated on it.
    """
    scoring = settings["evaluation"]
    cut = (scoring.get(key) for key in ("context", "windows", "bos", "stride"))
    text = load_text(scoring["data"])
    with naming("evaluation.data", scoring["data"]):
        tokens = evaluation_windows(source, text, *cut)
    if isinstance(source, QuantizedFile) and source.calibrated_on is not None:
        scored = tokens[:, 1:] if scoring["bos"] else tokens
        check_unseen(scored, source.calibrated_on, f"evaluation.data={scoring['data']}", "choose another text")
    return tokens


def measure(
    source: ModelFile | QuantizedFile,
    reference: ModelFile | QuantizedFile | None,
    tokens: np.ndarray,
    settings: dict[str, Any],
    report: Progress,
) -> list[Row]:
    """The reference's row, if there is one, and the model's."""
    devices, rows = devices_of(settings), []
    bos, stride = (settings["evaluation"].get(key) for key in ("bos", "stride"))
    base: Scores | None = None
    comparison = None
    if reference:
        weighed = Weighed(reference)
        base = score_from_disk(weighed, tokens, devices=devices, progress=report).last(stride)
        comparison = Reference(reference.outside(), base.hidden)
        float_settings = settings | {
            "model": {"name": reference.name, "path": settings["reference"]},
            "reference": None,
        }
        figures = compared(base, base, weighed.size, bos).row()
        rows.append({"method": FLOAT, **figures, **_costs(), **describe(reference, tokens, float_settings)})
    weighed = Weighed(source)
    scores = score_from_disk(weighed, tokens, reference=comparison, devices=devices, progress=report).last(stride)
    figures = compared(scores, base, weighed.size, bos).row()
    name = Path(settings["model"].get("path") or source.name).name
    if is_quantized(source):
        figures |= {"stored": stored(source, figures)}
    elif not reference:
        name = FLOAT
    return [*rows, {"method": name, **figures, **_costs(), **describe(source, tokens, settings)}]


class Weighed:
    """A source of blocks (`score_from_disk`) that adds up the sizes of what is read."""

    def __init__(self, source: ModelFile | QuantizedFile):
        self._source, self.size = source, Size()

    @property
    def config(self) -> DecoderConfig:
        """The decoder's shape."""
        return self._source.config

    def outside(self) -> Decoder:
        """The decoder without its blocks."""
        decoder = self._source.outside()
        self.size += size_of(decoder)
        return decoder

    def blocks(self, first: int = 0) -> Iterator[Block]:
        """Blocks from layer `first` on."""
        for block in self._source.blocks(first):
            self.size += size_of(block)
            yield block


def _costs() -> Row:
    """Peak memory, and blanks for costs that other tables' rows have."""
    return {"quantize_seconds": 0.0, "tokens_per_second": None, "peak_rss_mb": peak_rss_mb()}


def describe(source: ModelFile | QuantizedFile, tokens: np.ndarray, settings: dict[str, Any]) -> Row:
    """Everything that a row's figures depend on, and its fingerprint."""
    config = {key: value for key, value in settings.items() if key not in ("name", "results", "hosts")}
    protocol = {
        **evaluated(settings, tokens),
        "weights_stored_as": source.stored_as,
        "dtype": source.computed_in,
        "calibration_sha256": None,
        "files": source.fingerprint(),
    }
    origin = {"composition": "as stored", "protocol": protocol, "config": config}
    return provenance.identified(origin, None, "experiments.evaluate")


def keep(folder: Path, rows: list[Row]) -> None:
    """Adds rows to the folder's, and writes the table of all rows."""
    tables.add_rows(folder, rows)
    tables.write_table(folder, tables.read_rows(folder))


def tell(row: Row) -> None:
    """Prints a row as a line, and as JSON."""
    facts = {"model": row["protocol"]["model"], **{key: row[key] for key in SHOWN}}
    facts |= {key: row["protocol"][key] for key in ("data", "windows", "context", "bos", "scored_tokens")}
    facts |= {"weight_mb": row["weight_mb"], "peak_rss_mb": row["peak_rss_mb"]}
    spread = "" if row["perplexity_stderr"] is None else f" ±{row['perplexity_stderr']:.3f}"
    kl = "" if row["kl"] is None else f", KL {row['kl']:.4f}"
    console.print(f"{facts['model']}: perplexity {row['perplexity']:.3f}{spread}{kl}", highlight=False)
    print(json.dumps(facts, allow_nan=False))


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    run(main)
