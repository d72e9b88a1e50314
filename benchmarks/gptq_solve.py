"""GPTQ's solve: compile time and run time by the number of columns, and compared with qwix.

    pip install --constraint constraints.txt --editable '.[bench]'     # qwix; without it, jquant's rows alone
    OPENBLAS_NUM_THREADS=1 python -m benchmarks.gptq_solve

One OpenBLAS thread: on a CPU the Cholesky factor comes from SciPy's OpenBLAS, whose threads spin while they wait for
each other. On cores with other work, a factor of 1,024 columns took 1.17 s with two threads and 0.014 s with one.

Sizes: one square weight, Int4 g64 asymmetric, min-max grid, act-order. The rate counts n²·out + n³/3 operations, those
of the triangle's lazy updates and of the Cholesky factor. It is compared with the machine's float32 matrix product.

qwix: one weight and one Gram matrix, damping 0.01, symmetric Int4 g64 with scales absmax / 7.5 (its core raises on
asymmetric ones). It rounds rows first to last and computes each scale when it reaches the group. So jquant runs twice:
with qwix's scales and order, so that both solve the same problem; and with the scales of the given weight and
act-order. "cold" is a call with nothing compiled: trace, compile and solve. qwix runs under jit, and operation by
operation, as its `quantize_params` calls it. The error is trace((W − Ŵ)ᵀ H (W − Ŵ)) in float64 NumPy.
"""

import importlib
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from experiments.provenance import versions
from jquant import GPTQ, Int, MinMax
from jquant.qtensor import Grid, QTensor, dequantize, from_codes

COLUMNS, PRODUCT = (512, 1024, 4096), 4096
FORMAT, RANGE, ROUNDING = Int(4, 64), MinMax(), GPTQ()
COMPARED = 1024
SYMMETRIC = Int(4, 64, symmetric=True, scale="float32")  # qwix's scales are float32


def main() -> None:
    """Times every size, then qwix's and jquant's cores, and prints the tables and the JSON line."""
    jax.config.update("jax_enable_compilation_cache", False)
    peak = product_rate(PRODUCT)
    rows = [measure(n) | {"columns": n} for n in COLUMNS]
    table = Table("columns", "compile s", "solve s", "GFLOP/s", "share of matrix product", "program lines")
    for row in rows:
        share = f"{100 * row['gflops'] / peak:.1f} %"
        cells = (f"{row['compile_s']:.2f}", f"{row['solve_s']:.3f}", f"{row['gflops']:.1f}", share)
        table.add_row(str(row["columns"]), *cells, str(row["program_lines"]))
    Console().print(table)
    compile_times = [row["compile_s"] for row in rows]
    figures = {
        "rows": rows,
        "compile_ratio": max(compile_times) / min(compile_times),
        "matrix_product_gflops": peak,
        "openblas_threads": os.environ.get("OPENBLAS_NUM_THREADS", "all"),
        **versions(),
    }
    if importlib.util.find_spec("qwix"):
        figures |= {"against_qwix": compare(COMPARED)}
    else:
        print("qwix is not installed (the bench extra has it), so its rows are left out.")
    print(json.dumps(figures))


def problem(n: int) -> tuple[Float[Array, "n n"], Float[Array, "n n"]]:
    """A weight, and the Gram matrix of 2 n inputs whose features differ twentyfold in size."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (2 * n, n)) * jnp.linspace(0.1, 2, n)
    return jax.random.normal(keys[1], (n, n)), jnp.matmul(x.T, x, precision="highest") / len(x)


def measure(n: int) -> dict[str, float]:
    """Compile time (median of 3, no cache), solve time and useful rate of an n × n weight."""
    w, gram = problem(n)

    def solve(w, gram):
        grid = Grid.of(*RANGE(w, FORMAT), FORMAT, w.shape)
        return grid.pack(ROUNDING(w, grid, gram).codes)

    compiling, compiled = [], None
    for _ in range(3):
        jax.clear_caches()
        lowered = jax.jit(solve).lower(w, gram)
        begin = time.perf_counter()
        compiled = lowered.compile()
        compiling.append(time.perf_counter() - begin)
    assert compiled is not None
    seconds = timed(compiled, w, gram)
    return {
        "compile_s": statistics.median(compiling),
        "solve_s": seconds,
        "gflops": (n**3 + n**3 / 3) / seconds / 1e9,
        "program_lines": lowered.as_text().count("\n"),
    }


def compare(n: int) -> dict[str, Any]:
    """qwix's core and jquant's on one n × n problem; prints the table."""
    w, gram = problem(n)
    qwix = qwix_core()

    def jquant(w, gram, scale, order):
        grid = Grid.of(scale, None, SYMMETRIC, w.shape)
        return grid.pack(GPTQ(0.01, order)(w, grid, gram).codes)

    @jax.jit
    def alone(w, gram):
        return jquant(w, gram, jnp.max(jnp.abs(w.reshape(-1, SYMMETRIC.group, n)), 1) / 7.5, "activation")

    q, jitted = trial(jax.jit(qwix), w, gram, repeats=1)
    on_its_grid = jax.jit(lambda w, gram, scale: jquant(w, gram, scale, "rows"))
    rows = {
        "qwix, jit": jitted,
        "qwix, op by op": trial(qwix, w, gram, repeats=1)[1],
        "jquant, qwix's grid": trial(on_its_grid, w, gram, q.scale, repeats=5)[1],
        "jquant": trial(alone, w, gram, repeats=5)[1],
    }
    best = rows["jquant"]
    table = Table(f"{n} columns", "cold s", "ratio", "solve s", "ratio", "output error", "ratio")
    for name, row in rows.items():
        formats = {"cold_s": ".2f", "solve_s": ".4f", "error": ".2f"}
        cells = [(f"{row[key]:{digits}}", f"{row[key] / best[key]:.3g}") for key, digits in formats.items()]
        table.add_row(name, *sum(cells, ()))
    Console().print(table)
    return {"columns": n, "version": metadata.version("qwix"), "rows": rows}


def qwix_core() -> Callable[[Array, Array], QTensor]:
    """qwix's GPTQ of an `[in, out]` weight, with a QTensor as result."""
    core = importlib.import_module("qwix.contrib.gptq_core")
    how = core.qarray.HowToQuantize(qtype=jnp.int4, channelwise_axes=(0,), tiled_axes={1: SYMMETRIC.group})

    def solve(w: Array, gram: Array) -> QTensor:
        q, _ = core.quantize_weight(w.T, gram, how, percdamp=0.01)
        return from_codes((q.qvalue.T.astype(jnp.int8) + 8).astype(jnp.uint8), q.scale.T, None, SYMMETRIC)

    return solve


def trial(function: Callable[..., QTensor], w: Array, *arguments: Array, repeats: int) -> tuple[QTensor, dict]:
    """The result; seconds of a call with nothing compiled (median of `repeats`) and of a later call; output error."""
    cold = []
    for _ in range(repeats):
        jax.clear_caches()
        begin = time.perf_counter()
        jax.block_until_ready(function(w, *arguments))
        cold.append(time.perf_counter() - begin)
    seconds, q = timed(function, w, *arguments), function(w, *arguments)
    return q, {"cold_s": statistics.median(cold), "solve_s": seconds, "error": output_error(w, q, arguments[0])}


def output_error(w: Array, q: QTensor, gram: Array) -> float:
    """trace((W − Ŵ)ᵀ H (W − Ŵ)) in float64."""
    delta = np.asarray(w, np.float64) - np.asarray(dequantize(q), np.float64)
    return float(np.sum(delta * (np.asarray(gram, np.float64) @ delta)))


def product_rate(n: int) -> float:
    """GFLOP/s of an n × n float32 matrix product."""
    a = jnp.asarray(np.random.default_rng(0).normal(size=(n, n)), jnp.float32)
    return 2 * n**3 / timed(jax.jit(lambda a: jnp.matmul(a, a, precision="highest")), a) / 1e9


def timed(function: Callable[..., Any], *arguments: Array) -> float:
    """Median seconds of 3 calls after a first call, which is not counted."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    main()
