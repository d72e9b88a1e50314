"""Memory of key/value caches of 8,192 tokens: resident, beside what their formats say.

    python -m benchmarks.cache_memory

A random model of 4 layers with 8 key/value heads of 64 reads a text of 8,192 tokens. Resident: by how much the process
has grown once the cache is there, and nothing else that was not there before; the median of 5 times. Formula: b bits a
value; a scale of 16 bits and a zero of 8 for each group of 32; tokens that are not rounded in float32. The last line is
JSON.
"""

import json
import statistics

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from experiments.memory import resident
from experiments.provenance import versions
from jquant import CacheFormat, Int, Stored, with_cache
from jquant.evaluation.generation import empty_cache, in_steps, step
from jquant.models.cache import Cache
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Decoder

LAYERS, HEADS, WIDTH, TOKENS, GROUP = 4, 8, 64, 8192, 32
CONFIG = DecoderConfig(256, HEADS * WIDTH, 512, LAYERS, HEADS, HEADS, WIDTH, 1e-5, 1e4, None, True, TOKENS)
# Bits (None: as they are), how keys are grouped, and tokens that are not rounded: the last, the first.
CACHES = [(None, "token", 0, 0), *((bits, "token", 0, 0) for bits in (8, 4, 3, 2)), (4, "channel", 32, 4)]


def main() -> None:
    """Measures every cache, prints the table and the JSON line."""
    decoder = nnx.jit(lambda: Decoder(CONFIG, nnx.Rngs(0)))()
    text = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, TOKENS), np.int32)
    rows = []
    for bits, keys, recent, first in CACHES:
        cached = None
        if bits:
            cached = CacheFormat(Stored(Int(bits, GROUP), keys), Stored(Int(bits, GROUP)), recent, first)
        grown, counted = measured(with_cache(decoder, cached) if cached else decoder, text)
        rows.append({"bits": bits, "keys": keys, "recent": recent, "first": first})
        sizes = {"formula": formula(bits, recent, first), "nbytes": counted, "resident": grown}
        rows[-1] |= {f"{name}_mb": size / 1e6 for name, size in sizes.items()} | {"ratio": grown / sizes["formula"]}
    table = Table("bits", "keys by", "last", "first", "formula, MB", "nbytes, MB", "resident, MB", "ratio")
    for row in rows:
        names = [str(row[name]) for name in ("bits", "keys", "recent", "first")]
        figures = [f"{row[name]:.1f}" for name in ("formula_mb", "nbytes_mb", "resident_mb")]
        table.add_row(*names, *figures, f"{row['ratio']:.3f}")
    Console().print(table)
    print(json.dumps({"rows": rows, "tokens": TOKENS, "group": GROUP, **versions()}))


def measured(decoder: Decoder, text: np.ndarray) -> tuple[int, int]:
    """Bytes by which the process has grown with a cache of the text, and the cache's own count."""
    leaves, structure = jax.tree.flatten(in_steps(decoder))

    def read() -> Cache:
        logits, cache = step(structure, leaves, text, empty_cache(decoder, 1, TOKENS))
        jax.block_until_ready((logits, cache))
        return cache

    read()  # compiles
    grown, counted = [], 0
    for _ in range(5):
        before = resident()
        cache = read()
        grown.append(resident() - before)
        counted = cache.nbytes
        del cache
    return int(statistics.median(grown)), counted


def formula(bits: int | None, recent: int, first: int) -> float:
    """Bytes of keys and values."""
    vectors, together = 2 * LAYERS * HEADS * WIDTH, 32 / 8
    if bits is None:
        return vectors * TOKENS * together
    return vectors * ((TOKENS - first) * (bits + (16 + 8) / GROUP) / 8 + (recent + first) * together)


if __name__ == "__main__":
    main()
