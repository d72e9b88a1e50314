"""What a quantized key/value cache costs, and what it saves.

    python -m experiments.cache
    python -m experiments.cache cache.bits=[4] evaluation.context=4096 evaluation.windows=4

Every prediction reads the keys and values of past tokens as generation reads them from the packed cache
(`jquant.models.cache`). All settings: configs/cache.yaml. Results land in results/<name>/: cache.jsonl and cache.md;
rows that are there from the same settings and code are not computed again.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import hydra
import jax
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.table import Table

from experiments import tables
from experiments.command_line import console, one_sentence, progress_bars, run, show
from experiments.overrides import CONFIGS
from experiments.perplexity_table import describe
from experiments.settings import check
from experiments.tables import FLOAT
from jquant import CacheFormat, Int, LanguageModel, Stored, load_text, with_cache
from jquant.cache_folder import cache_dir
from jquant.evaluation.intervals import Change, paired_change
from jquant.evaluation.perplexity import Reference, evaluation_windows, score
from jquant.io.files import write_text
from jquant.io.load import open_from_config
from jquant.models.cache import Cache

FILE = "cache.jsonl"
Row = dict[str, Any]


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="cache")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    with one_sentence():
        compare(OmegaConf.to_container(config, resolve=True))  # pyright: ignore[reportArgumentType]


def compare(settings: dict[str, Any]) -> None:
    """Computes missing rows, writes and prints the table."""
    check(settings)
    folder, scoring = tables.results_folder(settings), settings["evaluation"]
    with progress_bars(settings["model"]["name"]) as report:
        model = open_from_config(settings["model"]).load(report)
    text = load_text(scoring["data"])
    tokens = evaluation_windows(model, text, scoring["context"], scoring["windows"], scoring["bos"])
    earlier = {row["fingerprint"]: row for row in tables.read_rows(folder, FILE)}
    rows, plain = [], None
    for cached, labels in [(None, {}), *formats(settings["cache"])]:
        # A row does not depend on which others there are.
        own = settings | {"cache": {**labels, "tokens": settings["cache"]["tokens"]}}
        origin = describe(FLOAT, None, model, (tokens, None), own, "experiments.cache")
        row = earlier.get(origin["fingerprint"])
        if row is None:
            with progress_bars(name(labels)) as report:
                plain = plain or score(model.decoder, tokens, batch=1, progress=report)
                scores = plain
                if cached:
                    reference = Reference(model.decoder, plain.hidden)
                    decoder = with_cache(model.decoder, cached)
                    scores = score(decoder, tokens, reference=reference, batch=1, progress=report)
            change = paired_change(scores.window_nll, plain.window_nll)
            row = {
                "method": name(labels),
                **labels,
                "perplexity": scores.perplexity,
                "change_percent": [change.percent, change.low, change.high],
                "kl": 0.0 if scores.kl is None else float(scores.kl.mean()),
                "top1_agreement": 1.0 if scores.agrees is None else float(scores.agrees.mean()),
                "megabytes": megabytes(model, settings["cache"]["tokens"], cached),
                **origin,
            }
            tables.add_rows(folder, [row], FILE)
        rows.append(row)
    write_text(folder / "cache.md", markdown(rows))
    show(table(rows))
    console.print(f"Results: {folder}/{FILE}, cache.md.", soft_wrap=True)


def formats(grid: dict[str, Any]) -> Iterator[tuple[CacheFormat, dict[str, Any]]]:
    """The grid's cache formats, and what each is called by."""
    for bits, keys, rotate, (recent, first) in product(grid["bits"], grid["keys"], grid["rotate"], grid["kept"]):
        format, axis = Int(bits, grid["group"]), "token" if keys == "token" else "channel"
        cached = CacheFormat(
            Stored(format, axis, rotate),
            Stored(format, rotate=rotate),
            recent,
            first,
            before_rotary=keys == "channel_before_rotary",
        )
        labels = {
            "bits": bits,
            "group": grid["group"],
            "keys": keys,
            "rotate": rotate,
            "recent": recent,
            "first": first,
        }
        yield cached, labels


def name(labels: dict[str, Any]) -> str:
    """A row's name."""
    return f"{labels['bits']} bits" if labels else "float"


def megabytes(model: LanguageModel, tokens: int, cached: CacheFormat | None) -> float:
    """Of the cache of one text, with keys and values that are not rounded in 16 bits."""
    made = jax.eval_shape(lambda: Cache.init(model.config, 1, tokens, "bfloat16", cached))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made.layers)) / 1e6


def table(rows: list[Row]) -> Table:
    """The rows as a table."""
    tokens = rows[0]["config"]["cache"]["tokens"]
    shown = Table(box=box.SIMPLE_HEAD)
    for heading in ("cache", "keys by", "rotated", "last", "first", "perplexity", "change %", "KL", "top-1 %"):
        shown.add_column(heading, justify="left" if heading in ("cache", "keys by") else "right")
    shown.add_column(f"MB, {tokens:,} tokens", justify="right")
    for row in rows:
        shown.add_row(
            row["method"],
            row.get("keys", "").replace("_", " "),
            ("yes" if row["rotate"] else "no") if "rotate" in row else "",
            *(str(row.get(key, "")) for key in ("recent", "first")),
            f"{row['perplexity']:.3f}",
            str(Change(*row["change_percent"])) if "bits" in row else "",
            f"{row['kl']:.4f}",
            f"{100 * row['top1_agreement']:.1f}",
            f"{row['megabytes']:.1f}",
        )
    return shown


def markdown(rows: list[Row]) -> str:
    """The table and its protocol."""
    group = next((row["config"]["cache"]["group"] for row in rows if "bits" in row), None)
    return (
        f"{tables.as_markdown(table(rows))}\n{tables.protocol(rows[0])}. Asymmetric integers, {group} channels of a "
        f"token or tokens of a channel under one scale; values are rounded by token. Change of perplexity with its "
        f"95 % interval (Student's t) paired by window; * where it excludes zero. KL and top-1 agreement are to the "
        f"float cache. MB: of one text's cache, with what is not rounded in 16 bits. {rows[0]['device']}.\n"
    )


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    run(main)
