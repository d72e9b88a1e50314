"""Perplexity of a model on disk, float or quantized, a block at a time.

    python -m experiments.evaluate model=local model.path=quantized/smollm2_135m-gptq-4

All settings: configs/evaluate.yaml. The last line is JSON: the figures, and the protocol.
"""

import json
from typing import Any

import hydra
import jax
from omegaconf import DictConfig, OmegaConf

from experiments.command_line import console, devices_of, one_sentence, peak_rss_mb, progress_bars, run
from experiments.overrides import CONFIGS
from experiments.settings import check
from jquant import load_text
from jquant.data import check_unseen
from jquant.evaluation.perplexity import evaluation_windows, score_from_disk
from jquant.io.hub import cache_dir
from jquant.io.load import QuantizedFile, open_from_config


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="evaluate")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    with one_sentence():
        evaluate(OmegaConf.to_container(config, resolve=True))  # pyright: ignore[reportArgumentType]


def evaluate(settings: dict[str, Any]) -> None:
    """Prints the perplexity and how it was measured.

    Raises:
      InputError: a setting can't be meant, a file can't be read, or the model's predictions are not finite.
    """
    check(settings)
    wanted, devices = settings["evaluation"], devices_of(settings)
    source = open_from_config(settings["model"])
    tokens = evaluation_windows(source, load_text(wanted["data"]), wanted["context"], wanted["windows"], wanted["bos"])
    if isinstance(source, QuantizedFile) and source.calibrated_on is not None:
        text = tokens[:, 1:] if wanted["bos"] else tokens
        check_unseen(text, source.calibrated_on, f"evaluation.data={wanted['data']}", "choose another text")
    with progress_bars(source.name) as report:
        scores = score_from_disk(source, tokens, devices=devices, progress=report)
    stderr = scores.stderr if scores.nll.size > 1 else None  # one token has none
    told = {
        "model": str(settings["model"].get("path") or source.name),
        "perplexity": scores.perplexity,
        "perplexity_stderr": stderr,
        "data": wanted["data"],
        "windows": len(tokens),
        "context": tokens.shape[1],
        "bos": wanted["bos"],
        "scored_tokens": scores.nll.size,
        "peak_rss_mb": peak_rss_mb(),
    }
    spread = "" if stderr is None else f" ±{stderr:.3f}"
    console.print(f"{told['model']}: perplexity {scores.perplexity:.3f}{spread}", highlight=False)
    if jax.process_index() == 0:
        print(json.dumps(told, allow_nan=False))


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    run(main)
