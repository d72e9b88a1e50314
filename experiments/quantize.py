"""Quantizes a model from disk to disk, a block at a time.

    python -m experiments.quantize
    python -m experiments.quantize model=local model.path=/models/my-llama method=awq bits=3 output=my-llama-awq-3

All settings: configs/quantize.yaml. A process may die at any moment: the same command resumes after the last block.
"""

import time
from pathlib import Path
from typing import Any

import hydra
import jax
from omegaconf import DictConfig, OmegaConf

from experiments.command_line import console, devices_of, one_sentence, peak_rss_mb, progress_bars, run
from experiments.compositions import find_method, needs_of
from experiments.overrides import CONFIGS
from experiments.settings import check
from jquant import Options, load_text
from jquant.cache_folder import cache_dir
from jquant.data import sample_windows
from jquant.io.load import QuantizedFile, open_from_config
from jquant.pipeline.to_disk import quantize_to_folder
from jquant.report import relative_error


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="quantize")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    with one_sentence():
        quantize(OmegaConf.to_container(config, resolve=True))  # pyright: ignore[reportArgumentType]


def quantize(settings: dict[str, Any]) -> QuantizedFile:
    """Writes the checkpoint, or its missing blocks, and prints a summary.

    Raises:
      InputError: a wrong setting, or what `quantize_to_folder` finds.
    """
    check(settings)
    name, sampling, folder = str(settings["method"]), settings["calibration"], Path(settings["output"])
    chosen = find_method(name, settings["bits"], settings["group"], settings["symmetric"])
    devices = devices_of(settings)
    source = open_from_config(settings["model"])
    tokens = None
    if needs_of(chosen):
        ids = source.tokenizer.encode(load_text(sampling["data"]))
        tokens = sample_windows(ids, sampling["context"], sampling["samples"] + sampling["held_out"], settings["seed"])
    how = {key: sampling[key] for key in ("inputs", "passes", "held_out")}
    begin = time.perf_counter()
    with progress_bars(name) as report:
        options = Options(**how, devices=devices, progress=report)
        written = quantize_to_folder(source, folder, chosen, tokens, options, sampling["memory_gb"])
    seconds = time.perf_counter() - begin
    megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    report = written.report()
    console.print(
        f"{folder}: {written.config.layers} blocks by {name}, {megabytes:.0f} MB, error "
        f"{relative_error([report]):.3g}, {seconds:.0f} s, {peak_rss_mb():.0f} MB resident at most.",
        highlight=False,
        soft_wrap=True,
    )
    if fell_back := report.fallbacks:
        console.print(
            f"Rounded to nearest, because no solution was finite: {len(fell_back)} weights, {', '.join(fell_back)}.",
            highlight=False,
            soft_wrap=True,
        )
    return written


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    run(main)
