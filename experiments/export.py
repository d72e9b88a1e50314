"""Writes a model as other tools load it.

    python -m experiments.export format=gguf mixture=q4_k_m rounding=gptq
    python -m experiments.export model=local model.path=my-llama-awq-4 format=awq output=my-llama-awq

All settings: configs/export.yaml.
"""

import time
from pathlib import Path
from typing import Any

import hydra
import jax
from omegaconf import DictConfig, OmegaConf

from experiments.command_line import console, one_sentence, peak_rss_mb, progress_bars, run
from experiments.compositions import find_method, needs_of
from experiments.overrides import CONFIGS
from experiments.settings import check
from jquant import GPTQ, InputError, LlamaCpp, Method, export, gguf_mix, load_text, quantize
from jquant.cache_folder import cache_dir
from jquant.io.language_model import LanguageModel
from jquant.io.load import open_from_config
from jquant.methods import Rules


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="export")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    with one_sentence():
        write(OmegaConf.to_container(config, resolve=True))  # pyright: ignore[reportArgumentType]


def write(settings: dict[str, Any]) -> Path:
    """Writes the file or folder, prints a summary, and returns the path.

    Raises:
      InputError: a wrong setting, or what `export` finds.
    """
    check(settings)
    path, format = Path(settings["output"]), settings["format"]
    if format == "gguf":
        path = path.with_name(f"{path.name.removesuffix('.gguf')}.gguf")
    if path.exists() and not settings["force"]:
        raise InputError(f"{path} exists already: give another output=…, or force=true to replace it.")
    model: Any = open_from_config(settings["model"])
    begin = time.perf_counter()
    if (chosen := _method(settings, model.config)) is not None:
        model = _quantized(model.load(), chosen, settings)
    rounded = time.perf_counter()
    export(model, path, format, settings["force"])
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    console.print(
        f"{path}: {format}, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB, rounded in "
        f"{rounded - begin:.0f} s and written in {time.perf_counter() - rounded:.0f} s, {peak_rss_mb():.0f} MB "
        f"resident at most.",
        highlight=False,
        soft_wrap=True,
    )
    return path


def _method(settings: dict[str, Any], config: Any) -> Method | Rules | None:
    """The method or rules that the settings name; None for the model as it is."""
    name, mixture = settings["method"], settings["mixture"]
    if mixture is not None:
        if name is not None or settings["format"] != "gguf":
            raise InputError(f"mixture={mixture} is one of format=gguf, without a method: give mixture or method.")
        if settings["rounding"] == "nearest":
            return gguf_mix(mixture, config)
        return gguf_mix(mixture, config, lambda format: Method(format, LlamaCpp(importance=True), GPTQ()))
    return None if name is None else find_method(name, settings["bits"], settings["group"], settings["symmetric"])


def _quantized(model: LanguageModel, chosen: Method | Rules, settings: dict[str, Any]) -> LanguageModel:
    sampling = settings["calibration"]
    text = load_text(sampling["data"]) if needs_of(chosen) else None
    windows = {key: sampling[key] for key in ("samples", "context")}
    with progress_bars(str(settings["method"] or settings["mixture"])) as report:
        return quantize(model, chosen, calibration=text, seed=settings["seed"], progress=report, **windows)


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    run(main)
