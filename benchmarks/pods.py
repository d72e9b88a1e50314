"""What a user can start on a pod, compiled for it by the TPU compiler: memory a device, collectives, operations.

    python -m benchmarks.pods                    # needs jax[tpu] (`make pods`), no TPU
    python -m benchmarks.pods v5e:2x4 8B         # one pod and model

Llama-3's shapes, 4 bits in groups of 64. Programs: observing a batch of calibration windows with a block, rounding a
block's weight of the most inputs by GPTQ, evaluating windows with the model cut over all devices, generating a token
with a packed cache of 8,192 tokens, and a step of quantization-aware training at 2 bits. Nothing runs. Rows go to
benchmarks/results/pods.jsonl as they come, and are not compiled again while the code stays the same.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from benchmarks import scaling
from benchmarks.scaling import COLLECTIVE, SHAPES, collectives
from experiments.provenance import versions
from jquant import CacheFormat, Int, Stored, Tuning, method, provenance
from jquant.calibration.windows import Batch, averaged, no_stats, observe_batch
from jquant.evaluation import generation, perplexity
from jquant.io.files import write_text
from jquant.kernels import choose
from jquant.learning import loop
from jquant.learning.losses import model_loss
from jquant.learning.tuning import initial, split
from jquant.models.cache import Cache
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Block, Decoder, outside_of, with_cache
from jquant.models.families import family_of
from jquant.models.params import flat_params, with_params
from jquant.parallel.mesh import BOTH, DATA, MODEL, Devices, in_mesh, scatter
from jquant.pipeline.blocks import round_weight, seen_by
from jquant.qtensor import QTensor, packed_matrix, quantize
from jquant.ranges import MinMax

ROWS, NAMES = Path(__file__).parent / "results/pods.jsonl", ("topology", "model", "program")
# Topology -> GiB a device, the mesh, the models. A chip is a device, but on tpu7x two.
PODS: dict[str, tuple[int, tuple[int, int], tuple[str, ...]]] = {
    "v5e:2x4": (16, (4, 2), ("8B",)),
    "v6e:2x4": (32, (4, 2), ("8B", "70B")),
    "tpu7x:2x2x2": (96, (8, 2), ("70B",)),
    "v5p:4x4x4": (95, (16, 4), ("70B", "405B")),
    "v6e:16x16": (32, (32, 8), ("405B",)),
}
# Of a program's text: where a computation begins, what it calls, what a loop repeats.
COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
CALLED = re.compile(r"(?:body|condition|calls|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
BODY = re.compile(r"body=%?([\w.\-]+)")
PART = re.compile(r"= (\w+\[[\d,]*\])\S* (\S+)\(.*channel_id=(\d+)")
CONTEXT, BATCH, CACHED = 2048, 4, 8192
PACKED = Stored(Int(4, 64))


def main(chosen: list[str]) -> None:
    """Compiles every program for every pod, adds the rows, and prints all."""
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    done = {tuple(row[name] for name in NAMES): row for row in map(json.loads, lines)}
    origin = versions()
    here = provenance.digest(*(Path(file).read_bytes() for file in (__file__, scaling.__file__)))
    sources = f"{origin['code_version'].rpartition(' ')[2]} {here}"  # not the commit: other files change with it
    for topology, (memory, mesh, models) in PODS.items():
        if chosen and topology != chosen[0]:
            continue
        of = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        devices = Devices(*mesh, uneven="replicate", of=tuple(in_mesh(of, mesh).flat))
        for model in models if len(chosen) < 2 else chosen[1:]:
            config = llama3(model)
            for program, lower in PROGRAMS.items():
                key = topology, model, program
                if done.get(key, {}).get("sources") == sources:
                    continue
                pod = {"mesh": f"{mesh[0]} × {mesh[1]}", "memory_gib": memory, "sources": sources}
                done[key] = dict(zip(NAMES, key, strict=True)) | pod | compiled(lower, config, devices) | origin
                write_text(ROWS, "".join(json.dumps(row) + "\n" for row in done.values()))
                print(json.dumps(done[key]), flush=True)
    show(list(done.values()))


def llama3(model: str) -> DecoderConfig:
    """A shape of `SHAPES`."""
    hidden, ffn, layers, heads, kv_heads = SHAPES[model]
    return DecoderConfig(
        128256, hidden, ffn, layers, heads, kv_heads, hidden // heads, 1e-5, 5e5, None, False, CACHED
    )  # fmt: skip


def compiled(lower: Callable[[DecoderConfig, Devices], Any], config: DecoderConfig, devices: Devices) -> dict[str, Any]:
    """A program's figures a device, or why it does not compile; the compiler refuses what does not fit."""
    begin = time.perf_counter()
    try:
        program = lower(config, devices).compile()
    except Exception as error:  # the compiler's own, of many classes: the row says what it said
        names = "held_gb", "temporary_gb", "collectives", "collectives_in_loops", "tflop"
        return dict.fromkeys(names) | {"fits": f"no: {reason(error)}", "compile_s": time.perf_counter() - begin}
    memory, cost = program.memory_analysis(), program.cost_analysis()
    once, looped = apart(program.as_text() or "")
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "held_gb": held / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "fits": "yes",
        "collectives": moved(once),
        "collectives_in_loops": moved(looped),
        "tflop": cost.get("flops", 0) / 1e12,
        "compile_s": time.perf_counter() - begin,
    }


def reason(error: Exception) -> str:
    """What the compiler says of memory; else the first line of what it says."""
    text = str(error).strip()
    found = re.search(r"Used (\S+) of (\S+) hbm|\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", text)
    return " of ".join(filter(None, found.groups())) if found else text.splitlines()[0][:200]


def apart(text: str) -> tuple[str, str]:
    """A compiled program's lines outside of loops, and those within, which run once a turn."""
    lines: dict[str, list[str]] = {}
    name, parts = "", set()
    for line in text.splitlines():
        if begin := COMPUTATION.match(line):
            name = begin[1]
        # A collective that goes on beside products stands in the fusion that starts it, in theirs, and in its last.
        part = PART.search(line) if name.startswith(("fused_computation", "async_collective_fusion")) else None
        if part is None or part.groups() not in parts:
            lines.setdefault(name, []).append(line)
        parts.add(part and part.groups())
    for name, own in lines.items():
        if name.startswith("all-reduce-scatter"):  # it adds everything in its text, and keeps a part: a reduce-scatter
            own[:] = [line for line in own if not COLLECTIVE.search(line)]
            own[:] = [re.sub(r"(ROOT.*?) [\w-]+\(", r"\1 reduce-scatter(", line) for line in own]
    names = lambda own: re.findall(r"[\w.\-]+", " ".join(CALLED.findall("\n".join(own))))  # noqa: E731
    calls = {name: set(names(own)) for name, own in lines.items()}
    looped, found = set(), set(BODY.findall(text))
    while found:
        looped |= found
        found = set().union(*(calls.get(name, ()) for name in found)) - looped
    join = lambda inside: "\n".join(line for name, own in lines.items() if (name in looped) == inside for line in own)  # noqa: E731
    return join(False), join(True)


def moved(text: str) -> str:
    """A program's collectives, in words: how many of each kind, and the bytes that come out of them."""
    kinds: dict[str, list[int]] = {}
    for line, size in collectives(text).items():
        kinds.setdefault(COLLECTIVE.search(line)[2], []).append(size)  # pyright: ignore[reportOptionalSubscript]
    return ", ".join(f"{len(sizes)} {kind} {sum(sizes) / 1e6:,.1f} MB" for kind, sizes in kinds.items())


# ---- programs -------------------------------------------------------------------------------------------------------


def array(devices: Devices, leaf: Any, *axes: Any, dtype: Any = None) -> jax.ShapeDtypeStruct:
    """An array that is only described, split along these mesh axes."""
    return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=NamedSharding(devices.mesh, P(*axes)))


def observing(config: DecoderConfig, devices: Devices) -> Any:
    """`observe_batch` of a bfloat16 block, for GPTQ; BATCH windows a device."""
    choices = choices_of(config)
    block = nnx.eval_shape(lambda: Block(config, nnx.Rngs(0)))
    block = jax.tree.map(lambda leaf: array(devices, leaf, dtype=jnp.bfloat16), block)
    like = jax.ShapeDtypeStruct((BATCH * devices.count, CONTEXT, config.hidden), jnp.bfloat16)
    rotary = jax.ShapeDtypeStruct((1, CONTEXT, config.head_dim // 2, 2), jnp.float32)
    pieces = jax.eval_shape(lambda: scatter(no_stats(choices, config, False), devices.count))
    pieces = jax.tree.map(lambda leaf: array(devices, leaf, BOTH), pieces)
    batch = Batch(array(devices, like, BOTH), array(devices, rotary), {}, None)
    return observe_batch.lower(block, batch, pieces, devices)


def rounding(config: DecoderConfig, devices: Devices) -> Any:
    """`round_weight` of the down-projection, which has the most rows."""
    choices, path = choices_of(config), "mlp.down.kernel"
    means = jax.eval_shape(lambda: averaged(no_stats(choices, config, False)))
    seen = seen_by(path, dict(choices)[path], jax.tree.map(partial(array, devices), means), config)
    weight = jax.ShapeDtypeStruct((config.ffn, config.hidden), jnp.float32)
    return round_weight.lower(array(devices, weight, None, MODEL), seen, chosen=dict(choices)[path])


def evaluating(config: DecoderConfig, devices: Devices) -> Any:
    """`perplexity._hidden` of a 4-bit model that is cut over all devices; a window each."""
    tokens = jax.ShapeDtypeStruct((devices.count, CONTEXT), jnp.int32)
    decoder = spread(quantized(config, Int(4, 64)), devices)
    return perplexity._hidden.lower(decoder, array(devices, tokens, BOTH), devices)


def generating(config: DecoderConfig, devices: Devices) -> Any:
    """`generation.step` of a token, from a 4-bit cache of CACHED tokens whose last 64 are in 16 bits."""
    decoder = with_cache(quantized(config, Int(4, 64)), CacheFormat(PACKED, PACKED, recent=64))

    def unstacked(decoder: Decoder) -> Any:
        return outside_of(decoder), generation.unstack(decoder)

    outside, layers = jax.eval_shape(unstacked, decoder)
    cut = spread(outside, devices), tuple(spread(layer, devices) for layer in layers)
    for layer in cut[1]:
        layer.attention.devices = devices

    def fastest(leaf: Any) -> Any:
        if not isinstance(leaf, QTensor):
            return leaf
        blocks = jax.eval_shape(lambda q: choose.kernel(packed_matrix(q), None, None, devices.mesh), leaf)
        return jax.tree.map(lambda part: array(devices, part, None, None, BOTH), blocks) or leaf

    cut = jax.tree.map(fastest, cut, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    leaves, structure = jax.tree.flatten(cut)
    cache = jax.eval_shape(lambda: Cache.init(config, 1, CACHED, jnp.bfloat16, decoder.cached))
    heads = devices.head_axes(config.kv_heads)
    cache = jax.tree.map(lambda leaf: array(devices, leaf, *(heads if leaf.ndim > 1 else ())), cache)
    token = array(devices, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    return generation.step.lower(structure, leaves, token, cache)


def training(config: DecoderConfig, devices: Devices) -> Any:
    """`loop.step` at 2 bits: weights, scales and norms learned with Adam, a window a chip of the mesh's `data`."""
    stage = Tuning(1, devices.data, rate=1e-3, weight_rate=1e-3, norm_rate=1e-3, compute="bfloat16")
    student = jax.eval_shape(split, quantized(config, Int(2, 64)))
    learned = jax.eval_shape(lambda student: initial(student, stage, {}), student)
    state = loop.State(learned, jax.eval_shape(loop.optimizer(stage).init, learned))
    teacher = float_decoder(config)
    cut = lambda tree: jax.tree.map(lambda leaf: array(devices, leaf, *devices.parameter_axes(leaf)), tree)  # noqa: E731
    tokens = array(devices, jax.ShapeDtypeStruct((devices.data, CONTEXT), jnp.int32), DATA)
    program = loop.Program.of(model_loss, stage, devices)
    return loop.step.lower(cut(state), cut((student, teacher)), tokens, loop.rates_of(stage, 0), program)


PROGRAMS: dict[str, Callable[[DecoderConfig, Devices], Any]] = {
    "observe": observing,
    "round": rounding,
    "evaluate": evaluating,
    "generate": generating,
    "train": training,
}


def choices_of(config: DecoderConfig) -> tuple[tuple[str, Any], ...]:
    """GPTQ for every weight of a block."""
    return tuple((path, method("gptq")) for path in family_of(config).weights)


def float_decoder(config: DecoderConfig) -> Decoder:
    """In bfloat16, described only."""
    decoder = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), decoder)


def quantized(config: DecoderConfig, format: Int) -> Decoder:
    """Every projection in a format, the rest in bfloat16, described only."""

    def packed(leaf: Any) -> QTensor:
        w = jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
        return jax.eval_shape(jax.vmap(lambda w: quantize(w, *MinMax()(w, format), format)), w)

    decoder = float_decoder(config)
    params = flat_params(decoder)
    kernels = {name: packed(leaf) for name, leaf in params.items() if ".kernel" in name and name != "head.kernel"}
    return with_params(decoder, kernels)


def spread(module: Any, devices: Devices) -> Any:
    """`Devices.spread` of what is only described."""
    params = {}
    for name, leaf in flat_params(module).items():
        axes = devices.cut_axes(name, isinstance(leaf, QTensor))
        params[name] = jax.tree.map(lambda part, axes=axes: array(devices, part, *axes(part)), leaf)
    return with_params(module, params)


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    columns = ("pod", "model", "program", "held GB", "temporary GB", "fits", "collectives", "a turn", "TFLOP", "s")
    table = Table(*columns, title="a device")
    for row in rows:
        figure = lambda name, row=row: "" if row[name] is None else f"{row[name]:.2f}"  # noqa: E731
        cells = row["topology"], row["model"], row["program"], figure("held_gb"), figure("temporary_gb"), row["fits"]
        collected = row["collectives"] or "", row["collectives_in_loops"] or ""
        table.add_row(*cells, *collected, figure("tflop"), f"{row['compile_s']:.0f}")
    Console(width=160).print(table)


if __name__ == "__main__":
    # The compiler asks no server for what a TPU's machine would know.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    main(sys.argv[1:])
