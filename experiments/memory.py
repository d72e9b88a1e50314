"""Memory of generation: weights, key/value cache and activations, by formula and as measured.

    python -m experiments.memory
    python -m experiments.memory methods=[nf4] batches=[16] contexts=[2048] cache_bits=4

`batch` texts of `context` tokens are read into an empty cache at once. Formula: `formula`. Compiled: what XLA's program
for it takes as arguments and as temporary memory. It needs no weights, so models of which only shapes are given
(`examples`) have it, too. Resident: by how much the process grows when the weights are copied, and when the texts are
read. All settings: configs/memory.yaml. Results land in results/<name>/: memory.jsonl and memory.md.
"""

import ctypes
import gc
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import jax
import jax.numpy as jnp
from flax import nnx
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.table import Table

from experiments import provenance, tables
from experiments.command_line import console, one_sentence, run, show
from experiments.overrides import CONFIGS
from experiments.perplexity_table import refuse_quantized
from experiments.settings import check, check_methods
from jquant import CacheFormat, InputError, Int, Stored, with_cache
from jquant.cache_folder import cache_dir
from jquant.evaluation.generation import in_steps, step, unstack
from jquant.formats.base import Format, block_shape
from jquant.io.files import write_text
from jquant.io.load import open_from_config
from jquant.kernels.choose import products
from jquant.methods import Method
from jquant.models.cache import Cache
from jquant.models.config import config_from_hf
from jquant.models.decoder import Decoder, chunks, outside_of
from jquant.models.params import flat_params, with_params
from jquant.qtensor import quantize
from jquant.ranges import MinMax

FILE, PARTS, WAYS = "memory.jsonl", ("weights", "cache", "activations"), ("formula", "compiled", "resident")
Sizes = dict[str, float]  # part -> bytes


class Case(NamedTuple):
    """A decoder with a method's weights, described or there, and the texts that it reads.

    Attributes:
      model: its name.
      method: its name.
      format: of the projections; None if they are float.
      decoder: with arrays, or with shapes in their place.
      batch: texts.
      context: tokens of each.
    """

    model: str
    method: str
    format: Format | None
    decoder: Decoder
    batch: int
    context: int


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="memory")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    with one_sentence():
        measure(OmegaConf.to_container(config, resolve=True))  # pyright: ignore[reportArgumentType]


def measure(settings: dict[str, Any]) -> None:
    """Measures all cases, adds their rows, prints and writes the table."""
    check(settings)
    formats, examples = formats_of(settings, settings["methods"]), list(described(settings))
    folder, bits = tables.results_folder(settings), settings["cache_bits"]
    stored = bits and Stored(Int(bits, settings["cache_group"]))
    rows = []
    with products(settings["products"]):
        for case in [*loaded(formats, settings), *examples]:
            decoder = with_cache(case.decoder, stored and CacheFormat(stored, stored))
            sizes = {"formula": formula(case, stored), **measured(decoder, case.batch, case.context)}
            figures = {way: found and {part: found[part] / 1e6 for part in PARTS} for way, found in sizes.items()}
            rows.append(identified(case, settings) | figures)
            tables.add_rows(folder, rows[-1:], FILE)
            console.print(f"{case.model} {case.method} {case.batch} × {case.context}", highlight=False)
    write_text(folder / "memory.md", f"{tables.as_markdown(table(rows))}\n{caption(rows)}\n")
    show(table(rows))
    console.print(caption(rows), highlight=False, soft_wrap=True)


def formats_of(settings: dict[str, Any], names: list[str]) -> dict[str, Format | None]:
    """The methods' formats by name; None is the float model."""
    formats = {}
    for name, chosen in check_methods(settings | {"methods": names}).items():
        if chosen is not None and not isinstance(chosen, Method):
            raise InputError(f"{name} has a method for each weight; experiments.memory takes one for all.")
        formats[name] = chosen and chosen.format
    return formats


def loaded(formats: Mapping[str, Format | None], settings: dict[str, Any]) -> Iterator[Case]:
    """The settings' model, whose weights are there."""
    source = open_from_config(settings["model"])
    refuse_quantized(source)
    model = source.load(progress=False)
    for name, format in formats.items():
        decoder = packed(model.decoder, format)
        for batch in settings["batches"]:
            for context in settings["contexts"]:
                yield Case(settings["model"]["name"], name, format, decoder, batch, context)


def described(settings: dict[str, Any]) -> Iterator[Case]:
    """Models by their shapes alone."""
    for name, example in (settings["examples"] or {}).items():
        if example is None:
            continue
        config = config_from_hf(example["config"], f"examples.{name}.config")
        decoder = nnx.eval_shape(lambda config=config: Decoder(config, nnx.Rngs(0)))
        decoder = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), decoder)
        for method, format in formats_of(settings, [example["method"]]).items():
            yield Case(name, method, format, packed(decoder, format), example["batch"], example["context"])


def packed(decoder: Decoder, format: Format | None) -> Decoder:
    """The decoder with its projections in a format; their codes do not matter here, so ranges are plain."""
    if format is None:
        return decoder
    pack = jax.vmap(lambda w: quantize(w, *MinMax()(w, format), format))
    kernels = {name: leaf for name, leaf in flat_params(decoder).items() if is_packed(name)}
    if isinstance(decoder.embedding.get_value(), jax.ShapeDtypeStruct):
        wide = {name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for name, leaf in kernels.items()}
        return with_params(decoder, {name: jax.eval_shape(pack, leaf) for name, leaf in wide.items()})
    return with_params(decoder, {name: jax.jit(pack)(leaf) for name, leaf in kernels.items()})


def is_packed(name: str) -> bool:
    """Whether a parameter is a projection of a block."""
    return name.endswith("kernel") and name != "head.kernel"


# ---- formula --------------------------------------------------------------------------------------------------------


def formula(case: Case, stored: Stored | None) -> Sizes:
    """Bytes of each part.

    Weights: of every projection in · out · `stored_bits` / 8; all else in the model's dtype.
    Cache: 2 · layers · key/value heads · head width · batch · context values, in the model's dtype or as `stored`.
    Activations: the larger of two moments in a block, for batch · context tokens. In attention, the residual stream,
    queries and outputs, and of each head scores and probabilities of a chunk of queries in float32. In the MLP, the
    residual stream and its norm, gate and up.
    """
    decoder, config = case.decoder, case.decoder.config
    itemsize, tokens = jnp.dtype(decoder.dtype).itemsize, case.batch * case.context
    weights = 0.0
    for name, leaf in flat_params(decoder).items():
        bits = stored_bits(case.format, leaf.shape) if case.format and is_packed(name) else 8 * itemsize
        weights += math.prod(leaf.shape) * bits / 8
    values = 2 * config.layers * config.kv_heads * config.head_dim * tokens
    cache = values * (stored_bits(stored.format, (config.head_dim, case.context)) / 8 if stored else itemsize)
    width = config.heads * config.head_dim
    chunk = chunks(case.context)[0][1]
    attention = tokens * ((config.hidden + 2 * width) * itemsize + 2 * config.heads * chunk * 4)
    mlp = tokens * (2 * config.hidden + 2 * config.ffn) * itemsize
    return {"weights": weights, "cache": cache, "activations": max(attention, mlp)}


def stored_bits(format: Format, shape: tuple[int, ...]) -> float:
    """Bits a weight: those of its code, and its share of its group's scale and zero."""
    rows, columns = block_shape(format, shape)
    scale = format.scale
    bits = 8 * jnp.dtype(scale).itemsize if isinstance(scale, str) else stored_bits(scale, (math.prod(shape), 1))
    zero = (bits if getattr(format, "zero", "") == "float" else format.bits) if format.has_zero else 0
    return format.bits + (bits + zero) / (rows * columns)


# ---- measurement ----------------------------------------------------------------------------------------------------


def measured(decoder: Decoder, batch: int, context: int) -> dict[str, Sizes | None]:
    """Bytes of each part, compiled and resident; the latter None where arrays are only described, or not on Linux."""
    there = isinstance(decoder.embedding.get_value(), jax.Array)
    apart = (
        in_steps(decoder) if there else jax.eval_shape(lambda decoder: (outside_of(decoder), unstack(decoder)), decoder)
    )
    leaves, structure = jax.tree.flatten(apart)
    empty = lambda: Cache.init(decoder.config, batch, context, decoder.dtype, decoder.cached)  # noqa: E731
    tokens = jax.ShapeDtypeStruct((batch, context), jnp.int32)
    program = step.lower(structure, leaves, tokens, jax.eval_shape(empty)).compile()
    cache = float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(empty).layers)))
    memory: Any = program.memory_analysis()
    arguments = memory.argument_size_in_bytes - cache - 4 * batch * context
    compiled = {"weights": arguments, "cache": cache, "activations": memory.temp_size_in_bytes}
    if not there or not Path("/proc/self/clear_refs").exists():
        return {"compiled": compiled, "resident": None}
    before = resident()
    copied = jax.block_until_ready([jnp.copy(leaf) for leaf in leaves])
    weights = resident() - before
    del copied
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the largest size so far, begins anew
    _, filled = jax.block_until_ready(step(structure, leaves, jnp.zeros(tokens.shape, jnp.int32), empty()))
    peak = status("VmHWM") - before
    grown = resident() - before
    del filled
    return {"compiled": compiled, "resident": {"weights": weights, "cache": grown, "activations": peak - grown}}


def resident() -> int:
    """Bytes of this process in memory, after freed ones were given back."""
    gc.collect()
    sizes: list[int] = []
    while len(sizes) < 4 or len(set(sizes[-4:])) > 1:  # XLA frees temporaries after its results are ready
        time.sleep(0.2)
        ctypes.CDLL(None).malloc_trim(0)
        sizes.append(status("VmRSS"))
    return sizes[-1]


def status(name: str) -> int:
    """Bytes of this process by a name of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


# ---- rows and table -------------------------------------------------------------------------------------------------


def identified(case: Case, settings: dict[str, Any]) -> dict[str, Any]:
    """A row without its figures."""
    config = {key: value for key, value in settings.items() if key in ("bits", "group", "symmetric", "seed")}
    protocol = {
        "model": case.model,
        "dtype": str(jnp.dtype(case.decoder.dtype)),
        "batch": case.batch,
        "context": case.context,
        "cache_bits": settings["cache_bits"],
        "cache_group": settings["cache_group"],
    }
    origin = {"method": case.method, "composition": repr(case.format), "protocol": protocol, "config": config}
    return provenance.identified(origin, {case.method: case.format}, "experiments.memory")


def table(rows: list[dict[str, Any]]) -> Table:
    """A line for each case, in megabytes: of each part the formula, the compiled program and the process."""
    shown = Table(box=box.SIMPLE_HEAD)
    for heading in ("model", "method", "batch", "context"):
        shown.add_column(heading, justify="left" if heading in ("model", "method") else "right")
    for part in PARTS:
        for way in WAYS:
            shown.add_column(f"{part}\n{way}", justify="right")
    for row in rows:
        figures = [f"{row[way][part]:,.1f}" if row[way] else "" for part in PARTS for way in WAYS]
        shape = str(row["protocol"]["batch"]), str(row["protocol"]["context"])
        shown.add_row(row["protocol"]["model"], tables.label(row), *shape, *figures)
    return shown


def caption(rows: list[dict[str, Any]]) -> str:
    """How the rows were measured."""
    bits = rows[0]["protocol"]["cache_bits"]
    return (
        f"Megabytes (10⁶ bytes) of reading batch · context tokens into a cache "
        f"{f'of {bits} bits' if bits else 'in the dtype of the model'}. {rows[0]['device']}."
    )


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    run(main)
