"""Products with packed weights on an accelerator against bfloat16 ones, alone and in the decoding of a whole model.

    python -m benchmarks.products

Weights have the shapes of Llama-3-8B and random values; inputs are in bfloat16. The model has LAYERS of its 32 layers.
Each time of a product is that of many weights of a shape, one after another and TURNS times in one program, divided by
their number: together they are larger than a chip's caches. "plain" is XLA's product of the unpacked codes, the others
are those that `jquant.kernels.choose` takes. Decoding is greedy, after a prompt of one token, with its loop on the
device. Medians of ROUNDS alternating rounds.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from rich.console import Console
from rich.table import Table

from benchmarks.scaling import SHAPES
from experiments.provenance import versions
from jquant import NF4, Int
from jquant.cache_folder import cache_dir
from jquant.evaluation import generation
from jquant.formats import Format
from jquant.kernels.choose import products
from jquant.models.cache import Cache
from jquant.models.decoder import Decoder, DecoderConfig
from jquant.qtensor import QTensor, prepared, quantize
from jquant.ranges import MinMax

ROUNDS, TURNS, TOGETHER, TOKENS, LAYERS = 7, 20, 300e6, 64, 8  # TOGETHER: bytes of the bfloat16 weights of one program
WEIGHTS = {"q, o": (4096, 4096), "k, v": (4096, 1024), "gate, up": (4096, 14336), "down": (14336, 4096)}
FORMATS: dict[str, Format] = {"INT4": Int(4, 64, symmetric=True), "INT4, zeros": Int(4, 64), "NF4": NF4(64)}
BATCHES = 1, 16


def main() -> None:
    """Times everything, prints a table and the JSON line."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    rows = [row for name in WEIGHTS for row in of_products(name)] + of_decoding("8B")
    table = Table("what", "inputs", "weights", "µs", "GB/s", "× bfloat16")
    for row in rows:
        figures = f"{row['microseconds']:.1f}", f"{row['gb_per_second']:.0f}", f"{row['ratio']:.2f}"
        table.add_row(row["what"], str(row["batch"]), row["weights"], *figures)
    Console().print(table)
    protocol = f"medians of {ROUNDS} alternating rounds; bfloat16 inputs; groups of 64; {TOKENS} tokens are decoded"
    print(json.dumps({"rows": rows, "protocol": protocol, **versions()}))


def of_products(name: str) -> list[dict[str, Any]]:
    """Rows of one shape."""
    shape = WEIGHTS[name]
    count = max(int(TOGETHER / (2 * shape[0] * shape[1])), 2)
    w = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    stacks: dict[str, list[Any]] = {"bfloat16": [w + i for i in range(count)]}
    for format_name, format in FORMATS.items():
        q = rounded(w.astype(jnp.float32), format)
        copies = [jax.tree.map(jnp.array, q) for _ in range(count)]
        stacks[f"{format_name}, plain"] = copies
        stacks[format_name] = [prepared(copy) for copy in copies]
    rows = []
    for batch in BATCHES:
        x = jax.random.normal(jax.random.key(1), (batch, shape[0]), jnp.bfloat16)
        runs = {weights: partial(all_of, x, stack) for weights, stack in stacks.items()}
        seconds = timed(runs)
        for weights, stack in stacks.items():
            own = seconds[weights] / count / TURNS
            moved = sum(leaf.nbytes for leaf in jax.tree.leaves(stack[0]))
            rows.append(row_of(name, batch, weights, own, moved, seconds["bfloat16"] / count / TURNS))
    return rows


def rounded(w: Array, format: Any) -> QTensor:
    """A weight to the nearest."""
    return quantize(w, *MinMax()(w, format), format)


@jax.jit
def all_of(x: Array, stack: list[Any]) -> Array:
    """x @ every weight, one after another, TURNS times; a product waits for the one before it."""

    def turn(_: Any, x: Array) -> Array:
        for w in stack:
            x, _ = jax.lax.optimization_barrier((x, x @ w))
        return x

    return jax.lax.fori_loop(0, TURNS, turn, x)


def of_decoding(shape: str) -> list[dict[str, Any]]:
    """Rows of a model of LAYERS layers."""
    hidden, ffn, _, heads, kv_heads = SHAPES[shape]
    config = DecoderConfig(
        128256, hidden, ffn, LAYERS, heads, kv_heads, hidden // heads, 1e-5, 5e5, None, False, 2048
    )  # fmt: skip
    decoders: dict[str, Decoder] = {"bfloat16": random_decoder(config, None)}
    decoders |= {name: random_decoder(config, format) for name, format in FORMATS.items()}
    runs, moved = {}, {}
    for weights, decoder in decoders.items():
        for kind in ("fast",) if weights == "bfloat16" else ("fast", "plain"):
            with products(kind):
                model = generation.in_steps(decoder)
            name = weights if kind == "fast" else f"{weights}, plain"
            runs[name] = partial(decode, config, model)
            moved[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(model)) - 2 * 128256 * hidden  # the embedding
    seconds = timed(runs)
    of_float = seconds["bfloat16"] / TOKENS
    return [row_of("decode", 1, name, seconds[name] / TOKENS, moved[name], of_float) for name in runs]


def decode(config: DecoderConfig, model: Any) -> Array:
    """The last of TOKENS tokens."""
    leaves, structure = jax.tree.flatten(model)
    return appended(structure, leaves, Cache.init(config, 1, TOKENS, jnp.bfloat16))


@partial(jax.jit, static_argnames="structure")
def appended(structure: Any, leaves: list[Array], cache: Cache) -> Array:
    """The last of as many tokens as the cache holds."""

    def following(_: Any, so_far: tuple[Array, Cache]) -> tuple[Array, Cache]:
        logits, cache = generation._step(structure, leaves, *so_far)
        return logits.argmax(-1)[:, None].astype(jnp.int32), cache

    return jax.lax.fori_loop(0, TOKENS, following, (jnp.zeros((1, 1), jnp.int32), cache))[0]


def random_decoder(config: DecoderConfig, format: Format | None) -> Decoder:
    """A decoder of random weights in bfloat16; its projections in a format, if one is given."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))

    @partial(jax.jit, static_argnames=("shape", "packed"))
    def fill(key: Array, shape: tuple[int, ...], packed: bool) -> Any:
        draw = lambda key: jax.random.normal(key, shape[-2:], jnp.bfloat16) * shape[-2] ** -0.5  # noqa: E731
        if len(shape) < 3:
            return draw(key) if len(shape) == 2 else jnp.ones(shape, jnp.bfloat16)
        one = (lambda key: rounded(draw(key).astype(jnp.float32), format)) if packed and format else draw
        return jax.lax.map(one, jax.random.split(key, shape[0]))

    flat = nnx.to_flat_state(state)
    filled = []
    for number, (path, leaf) in enumerate(flat):
        packed = path[-1] == "kernel" and "head" not in path
        filled.append((path, leaf.replace(fill(jax.random.key(number), leaf.get_value().shape, packed))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def timed(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each, in turns."""
    for run in runs.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def row_of(what: str, batch: int, weights: str, seconds: float, moved: int, of_float: float) -> dict[str, Any]:
    """One row."""
    figures = {"microseconds": 1e6 * seconds, "gb_per_second": moved / seconds / 1e9, "ratio": of_float / seconds}
    return {"what": what, "batch": batch, "weights": weights, **figures}


if __name__ == "__main__":
    main()
