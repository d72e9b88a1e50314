"""QLoRA: adapters learned over a frozen, quantized model, and the loss of text that it was not trained on.

    python -m experiments.qlora
    python -m experiments.qlora model=local model.path=/models/my-llama training.data=my.txt output=my-adapter

All settings: configs/qlora.yaml. The adapter is written in PEFT's layout; a row with the figures is added to
results/<name>/qlora.jsonl. It is not computed again from the same settings, code, packages and machine.
"""

import time
from pathlib import Path
from typing import Any

import hydra
import jax
import numpy as np
from flax import nnx
from omegaconf import DictConfig, OmegaConf

from experiments import provenance, tables
from experiments.command_line import console, one_sentence, peak_rss_mb, progress_bars, run
from experiments.compositions import find_method, needs_of
from experiments.overrides import CONFIGS
from experiments.perplexity_table import refuse_quantized
from experiments.settings import check
from jquant import InputError, Journal, LanguageModel, LoRA, Tuning, load_text, quantize, save_adapters
from jquant.cache_folder import cache_dir
from jquant.data import check_disjoint, windows
from jquant.evaluation.intervals import paired_change
from jquant.evaluation.perplexity import score
from jquant.io.files import check_new
from jquant.io.load import open_from_config
from jquant.io.tokenizer import Tokenizer
from jquant.learning.lora import add_adapters, optimizer_bytes, train_adapters
from jquant.models.adapters import Adapted
from jquant.models.params import flat_params
from jquant.progress import Progress

Row = dict[str, Any]
FILE = "qlora.jsonl"


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="qlora")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    with one_sentence():
        qlora(OmegaConf.to_container(config, resolve=True))  # pyright: ignore[reportArgumentType]


def qlora(settings: dict[str, Any]) -> Row:
    """Trains and saves the adapter unless its row exists; prints the figures.

    Raises:
      InputError: a wrong setting; a method that needs calibration text; an output folder that is not empty; a text that
        is too short, or whose held-out part occurs in the rest; a quantized model; a loss that is not finite.
    """
    check(settings)
    training, output = settings["training"], Path(settings["output"]).expanduser()
    folder = tables.results_folder(settings)
    lora, tuning = LoRA(**settings["lora"]), tuning_of(settings)
    chosen = find_method(str(settings["method"]), 4, 64, False)
    if needs_of(chosen):
        raise InputError(f"method={settings['method']} needs calibration text: choose one without, e.g. nf4_double.")
    source = open_from_config(settings["model"])
    refuse_quantized(source)
    tokens, held_out = split_text(source.tokenizer, training, settings["evaluation"]["windows"])
    with progress_bars(str(settings["name"])) as report:
        model = source.load(report)
        origin = describe(model, (tokens, held_out), settings, {"base": chosen, "lora": lora, "tuning": tuning})
        kept = [row for row in tables.read_rows(folder, FILE) if row["fingerprint"] == origin["fingerprint"]]
        if kept and (output / "adapter_config.json").exists():
            console.print("The row was kept from an earlier run.")
            row = kept[0]
        else:
            check_new(output)
            base = quantize(model, chosen, progress=report)
            adapted = add_adapters(base, lora, model if lora.start == "loftq" else None, seed=settings["seed"])
            journal = Journal(output.with_name(f"{output.name}-training"))
            trained, figures = measure(adapted, (tokens, held_out), tuning, journal, report)
            save_adapters(output, trained)
            row = figures | origin
            tables.add_rows(folder, [row], FILE)
    tell(row, output)
    return row


def tuning_of(settings: dict[str, Any]) -> Tuning:
    """The stage of learning: the text's cross-entropy alone."""
    options = {key: settings["training"][key] for key in ("steps", "windows", "rate", "warmup", "clip")}
    return Tuning(**options, text=1.0, seed=settings["seed"])


def split_text(tokenizer: Tokenizer, training: dict[str, Any], count: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The training windows, and `count` windows of the part at the text's end.

    Raises:
      InputError: either part is too short; the part at the end occurs in the rest, in runs of 64 tokens or more.
    """
    ids = tokenizer.encode(load_text(training["data"]))
    begin = round(len(ids) * (1 - training["held_out"]))
    tokens = windows(ids[:begin], training["context"])
    held_out = windows(ids[begin:], training["context"], count)
    check_disjoint(held_out, ids[:begin], f"The held-out part of training.data={training['data']}", "training.data")
    return tokens, held_out


def measure(
    model: LanguageModel, tokens: tuple[np.ndarray, np.ndarray], tuning: Tuning, journal: Journal, report: Progress
) -> tuple[LanguageModel, Row]:
    """The trained model, and the figures.

    Raises:
      RuntimeError: training changed the base.
    """
    train, held_out = tokens
    before, base = score(model.decoder, held_out, progress=report), base_checksum(model)
    begin = time.perf_counter()
    trained = train_adapters(model, train, tuning, journal=journal, progress=report)
    seconds = time.perf_counter() - begin
    after = score(trained.decoder, held_out, progress=report)
    if base_checksum(trained) != base:
        raise RuntimeError("Training changed the base, which is frozen.")
    return trained, {
        "loss_before": float(before.nll.mean(dtype=np.float64)),
        "loss_after": float(after.nll.mean(dtype=np.float64)),
        "window_nll_before": before.window_nll.tolist(),
        "window_nll_after": after.window_nll.tolist(),
        "base_sha256_before": base,
        "base_sha256_after": base_checksum(trained),
        "adapter_bytes": sum(kernel.a.nbytes + kernel.b.nbytes for kernel in adapters_of(trained)),
        "optimizer_bytes": optimizer_bytes(trained, tuning),
        "train_seconds": seconds,
        "peak_rss_mb": peak_rss_mb(),
    }


def adapters_of(model: LanguageModel) -> list[Adapted]:
    """The stacks of adapted kernels."""
    return [leaf for leaf in flat_params(model.decoder).values() if isinstance(leaf, Adapted)]


def base_checksum(model: LanguageModel) -> str:
    """Digest of all parameters except the adapters."""
    params = flat_params(model.decoder)
    frozen = {name: leaf.base if isinstance(leaf, Adapted) else leaf for name, leaf in params.items()}
    return provenance.digest(*jax.tree.leaves(frozen))


def describe(
    model: LanguageModel, tokens: tuple[np.ndarray, np.ndarray], settings: dict[str, Any], parts: dict[str, Any]
) -> Row:
    """Everything that the row depends on, and its fingerprint."""
    train, held_out = tokens
    config = {key: value for key, value in settings.items() if key not in ("name", "results", "output")}
    protocol = {
        "model": str(settings["model"].get("path") or settings["model"]["name"]),
        "weights_stored_as": model.stored_as,
        "dtype": str(model.decoder.embedding.get_value().dtype),
        "data": str(settings["training"]["data"]),
        "training_windows": len(train),
        "training_sha256": provenance.digest(train),
        "windows": len(held_out),
        "context": held_out.shape[1],
        "stride": held_out.shape[1],
        "bos": False,
        "scored_tokens": held_out[:, 1:].size,
        "evaluation_sha256": provenance.digest(held_out),
        "weights_sha256": provenance.digest(*jax.tree.leaves(nnx.state(model.decoder))),
    }
    return provenance.identified({"protocol": protocol, "config": config}, parts, "experiments.qlora")


def tell(row: Row, output: Path) -> None:
    """Prints a row in a few lines."""
    protocol, change = row["protocol"], paired_change(row["window_nll_after"], row["window_nll_before"])
    lines = [
        f"held-out loss {row['loss_before']:.4f} → {row['loss_after']:.4f} nats a token, perplexity "
        f"{change} % ({protocol['windows']} windows of {protocol['context']} tokens of {protocol['data']})",
        f"base {row['base_sha256_before']} → {row['base_sha256_after']}",
        f"adapter {row['adapter_bytes'] / 1e6:.1f} MB, optimizer's state {row['optimizer_bytes'] / 1e6:.1f} MB, "
        f"{row['train_seconds']:.0f} s, {row['peak_rss_mb']:.0f} MB resident at most",
        f"adapter's folder: {output}",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    run(main)
