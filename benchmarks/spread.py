"""Memory of each of 8 virtual devices over which 1.2 billion weights are cut, and the figures beside one device.

    python -m benchmarks.spread

The shape of Llama-3.2-1B, random weights in float32, 8 windows of 256 tokens. A device's peak is that of the compiled
program that needs the most: its part of the weights, its other arguments and results, and temporaries. The last line is
JSON.
"""

import json
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from experiments.provenance import versions
from jquant.evaluation import perplexity
from jquant.evaluation.perplexity import score
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Decoder
from jquant.models.params import flat_params
from jquant.parallel.mesh import Devices

CONFIG = DecoderConfig(128256, 2048, 8192, 16, 32, 8, 64, 1e-5, 5e5, None, True, 8192)
WINDOWS, CONTEXT = 8, 256


def main() -> None:
    """Makes the model on the mesh and on one device, evaluates both, prints the table and the JSON line."""
    jax.config.update("jax_num_cpu_devices", 8)
    devices = Devices(8)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (WINDOWS, CONTEXT), np.int32)
    decoder = random_decoder(devices)
    cut = score(decoder, tokens, batch=1)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(decoder))
    placed = devices.windows(tokens)
    hidden = perplexity._hidden(decoder, placed, devices)
    peaks = {
        "layers": peak(perplexity._hidden.lower(decoder, placed, devices)),
        "head": peak(perplexity._nll.lower(decoder, hidden, placed, devices)),
    }
    del hidden
    alone = jax.device_put(decoder, jax.devices()[0])
    del decoder
    one = score(alone, tokens, batch=1)
    difference = float(np.abs(cut.hidden - one.hidden).max() / np.abs(one.hidden).max())
    row = {
        "weights_mb": weights / 1e6,
        "peaks_mb": {name: size / 1e6 for name, size in peaks.items()},
        "limit_mb": weights / 6e6 + 300,
        "hidden_difference": difference,
        "nll_difference": float(np.abs(cut.nll - one.nll).max()),
    }
    table = Table("", "MB", title="8 virtual devices, and one")
    table.add_row("all weights", f"{row['weights_mb']:.0f}")
    for name, size in row["peaks_mb"].items():
        table.add_row(f"peak of a device, {name}", f"{size:.0f}")
    table.add_row("a sixth of the weights, and 300", f"{row['limit_mb']:.0f}")
    Console().print(table, f"largest relative difference of states {difference:.1e}")
    print(json.dumps({"rows": [row], "windows": WINDOWS, "context": CONTEXT, "mesh": [8, 1], **versions()}))


def random_decoder(devices: Devices) -> Decoder:
    """With every weight drawn where it lies."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(CONFIG, nnx.Rngs(0))))
    axes = {name: devices.cut_axes(name, packed=False)(leaf) for name, leaf in flat_params(state).items()}

    def make() -> Any:
        return nnx.state(Decoder(CONFIG, nnx.Rngs(0)))

    shardings = [NamedSharding(devices.mesh, P(*axes[name])) for name in flat_params(state)]
    structure = jax.tree.structure(state)
    return nnx.merge(graph, jax.jit(make, out_shardings=jax.tree.unflatten(structure, shardings))())


def peak(lowered: Any) -> int:
    """Bytes that a device holds at most."""
    memory = lowered.compile().memory_analysis()
    own = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return own + memory.temp_size_in_bytes


if __name__ == "__main__":
    main()
