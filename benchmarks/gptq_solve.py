"""GPTQ's solve: compile time and run time against the number of columns.

    python -m benchmarks.gptq_solve

One square weight, Int4 g64 asymmetric, min-max grid, act-order. The solve is n²·out multiplications and as many
additions for the lazy updates (twice what the triangle needs: the loop's shapes are fixed) and n³/3 for the Cholesky
factor; the rate counts the useful n²·out + n³/3 operations and is set beside the machine's own matrix product.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.provenance import versions
from jquant import GPTQ, Int, MinMax

COLUMNS = (512, 1024, 4096)
FORMAT, RANGE, ROUNDING = Int(4, 64), MinMax(), GPTQ()


def main() -> None:
    """Times every size and prints the table and the JSON line."""
    peak = product_rate(2048)
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
        **versions(),
    }
    print(json.dumps(figures))


def measure(n: int) -> dict[str, float]:
    """Compile time (median of 3, no cache), solve time (median of 3) and useful rate of an n × n weight."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (2 * n, n)) * jnp.linspace(0.1, 2, n)
    w, gram = jax.random.normal(keys[1], (n, n)), x.T @ x / len(x)

    def solve(w, gram):
        q, info = ROUNDING(w, *RANGE(w, FORMAT), gram, FORMAT)
        return q, info.error

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


def product_rate(n: int) -> float:
    """GFLOP/s of an n × n float32 matrix product."""
    a = jnp.asarray(np.random.default_rng(0).normal(size=(n, n)), jnp.float32)
    return 2 * n**3 / timed(jax.jit(jnp.matmul), a, a) / 1e9


def timed(function, *arguments) -> float:
    """Median seconds of 3 calls after one that is not counted."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    main()
