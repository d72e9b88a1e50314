"""Cost of quantizing one block on 1 to 256 devices, counted in the compiled programs without running them.

    python -m benchmarks.scaling

GPTQ-4 of Llama-3's shapes, 256 windows of 2,048 tokens, at most 4 a device and step; bfloat16 blocks and windows. The
programs of a block (observing a batch, joining the pieces of its statistics, rounding the weights) are compiled for
virtual devices at full size, and their collectives are read from the compiled text. Seconds are those counts at the
rates below without overlap: a bound for planning, not a measurement. An all-to-all or all-gather with b bytes of output
on each of d devices moves b (d - 1) / d through each, a ring all-reduce twice that.
"""

import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from rich.console import Console
from rich.table import Table

from experiments.provenance import versions
from jquant import method
from jquant.calibration.windows import Batch, averaged, join_pieces, no_stats, observe_batch
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Block
from jquant.models.families import family_of
from jquant.models.params import flat_params
from jquant.parallel.mesh import BOTH, MODEL, Devices, scatter
from jquant.pipeline.blocks import round_weight, seen_by

SHAPES = {  # hidden, ffn, layers, heads, key/value heads
    "8B": (4096, 14336, 32, 32, 8),
    "70B": (8192, 28672, 80, 64, 8),
    "405B": (16384, 53248, 126, 128, 8),
}
MESHES = ((1, 1), (4, 1), (8, 1), (4, 2), (16, 4), (32, 8))
WINDOWS, CONTEXT, BATCH = 256, 2048, 4
# Assumed rates of one device: bfloat16 and float32 products a second, and bytes a second through its links.
BF16, FLOAT32, LINK = 400e12, 40e12, 50e9
COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)(-start)?\("
)
ARRAY = re.compile(r"\b(pred|bf16|[fsu]\d+\w*)\[([\d,]*)\]")
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "u8": 1, "s8": 1, "s64": 8, "u64": 8, "f64": 8}


def main() -> None:
    """Compiles for every shape and mesh, prints the table and the JSON line."""
    jax.config.update("jax_num_cpu_devices", max(data * model for data, model in MESHES))
    columns = ("model", "data × model", "collectives", "Gram GB", "moved GB", "forward s", "Gram s", "reduce s")
    table = Table(*columns, "solve TFLOP", "solve s", "model h", title="a block, per device")
    rows = []
    for name, shape in SHAPES.items():
        for mesh in MESHES:
            row = {"model": name, **count(DecoderConfig(
                128256, *shape, shape[0] // shape[3], 1e-5, 5e5, None, False, 8192), Devices(*mesh))}  # fmt: skip
            rows.append(row)
            table.add_row(
                name,
                f"{mesh[0]} × {mesh[1]}",
                f"{row['collectives_observing']} × {row['steps']} + {row['collectives_joining']} + "
                f"{row['collectives_rounding']}",
                f"{row['gram_gb']:.2f}",
                f"{row['moved_gb']:.1f}",
                *(f"{row[part]:.2f}" for part in ("forward_s", "gram_s", "reduce_s")),
                f"{row['solve_tflop']:.1f}",
                f"{row['solve_s']:.2f}",
                f"{row['model_h']:.2f}",
            )
    Console(width=130).print(table)
    rates = {"bf16_flops": BF16, "float32_flops": FLOAT32, "link_bytes": LINK}
    print(json.dumps({"rows": rows, "windows": WINDOWS, "context": CONTEXT, "batch": BATCH, **rates, **versions()}))


def count(config: DecoderConfig, devices: Devices, context: int = CONTEXT, windows: int = WINDOWS) -> dict:
    """Collectives of a block's programs, and what each device computes and moves."""
    batch = min(BATCH * devices.count, windows)
    choices = tuple((path, method("gptq")) for path in family_of(config).weights)

    def array(shape: tuple[int, ...], dtype: DTypeLike, *axes: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(devices.mesh, P(*axes)))

    block = nnx.eval_shape(lambda: Block(config, nnx.Rngs(0)))
    params = flat_params(block)
    block = jax.tree.map(lambda leaf: array(leaf.shape, jnp.bfloat16), block)
    x = array((batch, context, config.hidden), jnp.bfloat16, BOTH)
    rotary = array((1, context, config.head_dim // 2, 2), jnp.float32)
    empty = jax.eval_shape(lambda: no_stats(choices, config, False))
    stats = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), empty)
    pieces = jax.eval_shape(lambda: scatter(no_stats(choices, config, False), devices.count))
    pieces = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype, BOTH), pieces)
    observing = observe_batch.lower(block, Batch(x, rotary, {}, None), pieces, devices).compile()
    joining = join_pieces.lower(pieces, config, devices).compile()
    params = {
        path: array(leaf.shape, jnp.float32, *((None, MODEL) if len(leaf.shape) == 2 else ()))
        for path, leaf in params.items()
    }
    observing, joining = (collectives(program.as_text() or "") for program in (observing, joining))
    means = jax.eval_shape(averaged, stats)
    means = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), means)
    rounding = {}
    for path, chosen in choices:
        seen = seen_by(path, chosen, means, config)
        compiled = round_weight.lower(params[path], seen, chosen=chosen).compile()
        rounding |= {(path, line): size for line, size in collectives(compiled.as_text() or "").items()}
    steps, tokens = math.ceil(windows / batch), windows * context
    others = (devices.count - 1) / devices.count
    grams = [leaf.shape[0] for leaf in jax.tree.leaves(stats) if len(leaf.shape) == 2]
    weights = [params[path].shape for path, _ in choices]
    attention = 2 * context * config.heads * config.head_dim  # of one token, causal
    # Observing leaves out the last product; then the quantized block computes the next block's inputs.
    forward = 2 * (2 * sum(n * out for n, out in weights) + attention) - 2 * config.hidden * config.ffn
    moved = (steps * sum(observing.values()) + sum(joining.values())) * others + sum(rounding.values())
    solve = sum(n * n * out / devices.model + n**3 / 3 for n, out in weights)
    seconds = {
        "forward_s": forward * tokens / devices.count / BF16,
        "gram_s": sum(2 * n * n for n in grams) * tokens / devices.count / FLOAT32,
        "reduce_s": moved / LINK,
        "solve_s": solve / FLOAT32,
    }
    return {
        "data": devices.data,
        "devices": devices.count,
        "steps": steps,
        "collectives_observing": len(observing),
        "collectives_joining": len(joining),
        "collectives_rounding": len(rounding),
        "gram_gb": sum(4 * n * n for n in grams) / 1e9,
        "moved_gb": moved / 1e9,
        "solve_tflop": solve / 1e12,
        **seconds,
        "model_h": config.layers * sum(seconds.values()) / 3600,
    }


def collectives(text: str) -> dict[str, int]:
    """Output bytes of every collective in a compiled program, by its line."""
    sizes = {}
    for line in text.splitlines():
        if match := COLLECTIVE.search(line):
            arrays = ARRAY.findall(match[1])
            if match[3] and match[2] != "all-reduce":  # its inputs, then its outputs, then numbers without a shape
                arrays = [array for array in arrays if array[1]]
                arrays = arrays[len(arrays) // 2 :]
            sizes[line.strip()] = sum(
                BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n) for dtype, shape in arrays
            )
    return sizes


if __name__ == "__main__":
    main()
