"""Number of the default model's codes that differ between one device and a mesh of virtual devices.

    python -m benchmarks.meshes

GPTQ-4, C4 128 × 512, the first blocks, with quantized and with float inputs. Times mean nothing here: the
devices share the machine's cores. The last line is JSON.
"""

import json
from itertools import islice
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.provenance import versions
from jquant import Options, load_model, load_text, method
from jquant.calibration.windows import Calibration
from jquant.data import sample_windows
from jquant.formats import unpack
from jquant.models.decoder import Decoder, blocks
from jquant.models.params import flat_params
from jquant.parallel.mesh import Devices
from jquant.pipeline.driver import quantize_blocks
from jquant.pipeline.plan import make_plan
from jquant.qtensor import QTensor

BLOCKS = 4
MESHES: dict[Any, tuple[tuple[int, int], ...]] = {"quantized": ((8, 1), (2, 4)), "float": ((2, 4),)}


def main() -> None:
    """Quantizes on every mesh and prints the table and the JSON line."""
    jax.config.update("jax_num_cpu_devices", 8)
    model = load_model("smollm2_135m")
    tokens = sample_windows(model.tokenizer.encode(load_text("c4_utf8")), 512, 128, seed=0)
    table = Table("inputs", "data × model", *(f"block {n}" for n in range(BLOCKS)), title="codes unlike one device's")
    rows = []
    for inputs, meshes in MESHES.items():
        alone = codes(model.decoder, tokens, inputs, None)
        for mesh in meshes:
            devices = Devices(*mesh, uneven="replicate")
            unlike = [
                int(np.sum(a != b)) for a, b in zip(alone, codes(model.decoder, tokens, inputs, devices), strict=True)
            ]
            rows.append({"inputs": inputs, "mesh": mesh, "unlike": unlike, "of": alone[0].size})
            table.add_row(inputs, f"{mesh[0]} × {mesh[1]}", *map(str, unlike))
    Console().print(table)
    print(json.dumps({"rows": rows, **versions()}))


def codes(decoder: Decoder, tokens: np.ndarray, inputs: Any, devices: Devices | None) -> list[np.ndarray]:
    """All codes of each of the first blocks."""
    plan, options = make_plan(decoder, method("gptq")), Options(inputs=inputs, devices=devices)
    calibration = Calibration(decoder, plan.layers, tokens, options)
    block_codes = []
    for quantized in islice(quantize_blocks(blocks(decoder), {"": plan}, calibration, options), BLOCKS):
        weights = [jax.device_get(leaf) for leaf in flat_params(quantized[""][0]).values() if isinstance(leaf, QTensor)]
        block_codes.append(np.concatenate([np.ravel(unpack(q.codes, q.format.bits, q.in_features)) for q in weights]))
    return block_codes


if __name__ == "__main__":
    main()
