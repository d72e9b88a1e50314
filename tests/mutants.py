"""How strong the tests are: one operator, number or condition of the core is changed, and a test should fail.

    python tests/mutants.py --count 154 --seed 0
    python tests/mutants.py --count 154 --seed 0 --lived all

The first command runs the tests that are nearest to each changed file, until one fails. The second takes the mutants
that lived and runs all other tests; `--lived nearest` judges them anew, after tests were added.

Mutants come from cosmic-ray, the same number from each area of `TESTS`: places are drawn by seed, and at each one of
the changes that it allows. Left out are changes of annotations and protocols, which Python doesn't run, and arithmetic
that becomes bitwise or the reverse, which fails at once. A mutant stands in a copy of the last commit. Results are
appended to a file, and a mutant that has a row there is not judged again. In the end each test that failed must pass
without a change. Several processes may share the file, each with its own `--areas`.
"""

import argparse
import ast
import json
import multiprocessing
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/mutants.jsonl"
# By area, and in it by the beginning of a file's name: the tests that are nearest, in the order in which they run.
TESTS: dict[str, dict[str, str]] = {
    "formats": {
        "formats/__init__": "llama_cpp formats",
        "formats/codebook": "codebooks llama_cpp",
        "formats/floating": "floats",
        "formats/": "formats codebooks products",
    },
    "qtensor": {"qtensor": "formats products codebooks"},
    "stats": {"stats": "stats"},
    "kernels": {"kernels/": "products activations"},
    "transforms": {
        "transforms/hadamard": "hadamard",
        "transforms/permutation": "rotation",
        "transforms/awq": "awq",
        "transforms/smoothquant": "smoothquant",
    },
    "rounding": {
        "rounding/gptq": "gptq",
        "rounding/refit": "refit",
        "rounding/info": "gptq numerics refusals",
        "rounding/limits": "refusals",
        "rounding/": "stochastic refit extending",
    },
    "ranges": {"ranges/llama_cpp": "llama_cpp", "ranges/loss": "loss", "ranges/": "ranges"},
}
LIMIT_S = 1800
MEMORY = 8 << 30
BITWISE = {"RShift", "LShift", "BitOr", "BitAnd", "BitXor"}
# Imported once; every mutant's process is a fork.
PRELOADED = ["jax.numpy", "flax.nnx", "transformers", "optax", "orbax.checkpoint", "torch", "gguf", "scipy.stats"]
PRELOADED += ["pytest", "hypothesis", "beartype.claw", "jaxtyping", "hydra", "scipy.linalg"]


@dataclass(frozen=True)
class Mutant:
    """The change number `occurrence` that an operator of cosmic-ray can make in a file.

    `name` tells it from all others, and stays the same while other lines of the file change.
    """

    area: str
    file: str
    line: int
    operator: str
    occurrence: int
    change: str
    name: str


def sample(count: int, seed: int, areas: Iterable[str] = tuple(TESTS)) -> list[Mutant]:
    """As many from each area, in turns, so that the first ones are a sample too."""
    each = -(-count // len(TESTS))
    turns = zip_longest(*(islice(_draw(area, seed), each) for area in areas))
    return [mutant for turn in turns for mutant in turn if mutant]


def _draw(area: str, seed: int) -> Iterator[Mutant]:
    """Mutants in the order of a hash of seed and place: a changed line changes its own mutants only."""
    drawn = lambda *named: sha256(repr((seed, *named)).encode()).hexdigest()  # noqa: E731
    folder = ROOT / "jquant" / area
    files = sorted(folder.glob("*.py")) or [folder.with_suffix(".py")]
    places = [(path, place, changes) for path in files for place, changes in _places(path).items()]
    for path, place, changes in sorted(places, key=lambda at: drawn(at[0].name, at[1])):
        text, file = path.read_text(), str(path.relative_to(ROOT))
        for operator, occurrence, line, *index in sorted(changes, key=lambda at: drawn(path.name, place, at[0], at[3])):
            mutated = mutate(path, operator, occurrence)
            if mutated is not None and _code(mutated) != _code(text):
                before, after = (lines.splitlines()[line - 1].strip() for lines in (text, mutated))
                name = sha256(repr((file, place, operator, index)).encode()).hexdigest()[:16]
                yield Mutant(
                    area, file, line, operator.removeprefix("core/"), occurrence, f"{before}  →  {after}", name
                )
                break


def _places(path: Path) -> dict[tuple[str, int, int, str], list[tuple[str, int, int, int]]]:
    """The places of a file that operators change, by the line's text, its count among equal lines, column and kind.

    For each the changes: operator, number in the file, line, and number at the place.
    """
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    lines = path.read_text().splitlines()
    nodes = list(ast_nodes(get_ast(path.read_text())))
    places: dict[tuple[str, int, int, str], list[tuple[str, int, int, int]]] = {}
    for name in sorted(operator_names()):
        kind, *ends = name.removeprefix("core/").split("_")
        if kind.startswith("Variable") or (kind == "ReplaceBinaryOperator" and len({e in BITWISE for e in ends}) > 1):
            continue
        found = [start for node in nodes for start, _ in get_operator(name)().mutation_positions(node)]
        for occurrence, (line, column) in enumerate(found):
            text = lines[line - 1]
            changes = places.setdefault((text, lines[: line - 1].count(text), column, kind), [])
            changes.append((name, occurrence, line, sum(name == change[0] for change in changes)))
    return places


def mutate(path: Path, operator: str, occurrence: int) -> str | None:
    """The text of a changed file; None where the change does not compile."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    mutated = mutate_code(path.read_text(), get_operator(f"core/{operator.removeprefix('core/')}")(), occurrence)
    with suppress(SyntaxError):
        compile(mutated, path, "exec")
        return mutated
    return None


@cache
def _code(text: str) -> str:
    """What Python runs of a module: no annotations, no protocols."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.arg, ast.FunctionDef, ast.AnnAssign)):
            setattr(node, "returns" if isinstance(node, ast.FunctionDef) else "annotation", None)
        if isinstance(node, ast.ClassDef) and any(getattr(base, "id", "") == "Protocol" for base in node.bases):
            node.body, node.decorator_list = [], []
    return ast.dump(tree)


def run_tests(copy: str, tests: list[str], log: str) -> None:
    """In a process of its own: pytest in a copy of the repository, up to the first failure."""
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    os.chdir(copy)
    os.environ["PYTHONPATH"] = copy
    sys.dont_write_bytecode = False
    sys.path.insert(0, copy)
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    import pytest

    os._exit(int(pytest.main(["-x", "-q", "-n0", "--tb=line", "--ff", *tests])))


def outcome(copy: Path, tests: list[str]) -> tuple[str, float]:
    """What failed ("" for nothing, "time" past LIMIT_S), and the seconds that it took."""
    log, begin = copy.parent / "log", time.perf_counter()
    process = multiprocessing.get_context("forkserver").Process(target=run_tests, args=(str(copy), tests, str(log)))
    process.start()
    process.join(LIMIT_S)
    late = process.is_alive()
    with suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    seconds = round(time.perf_counter() - begin, 1)
    if late or process.exitcode == 0:
        return ("time" if late else ""), seconds
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log.read_text(errors="replace"), re.MULTILINE)
    return (failed[0] if failed else f"exit {process.exitcode}"), seconds


def nearest(mutant: Mutant) -> list[str]:
    names = next(tests for start, tests in TESTS[mutant.area].items() if mutant.file.startswith(f"jquant/{start}"))
    return [f"tests/test_{name}.py" for name in (*names.split(), "structure")]


def judge(mutant: Mutant, copy: Path, tests: list[str]) -> dict[str, Any]:
    """What becomes of a mutant, as a row of the results."""
    file = copy / mutant.file
    good = file.read_text()
    file.write_text(mutate(file, mutant.operator, mutant.occurrence) or "")
    try:
        killed_by, seconds = outcome(copy, tests)
    finally:
        file.write_text(good)
    return asdict(mutant) | {"killed_by": killed_by, "seconds": seconds}


def earlier(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The last row of every mutant."""
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {(row["file"], row["name"]): row for row in rows}


def run(options: argparse.Namespace, copy: Path) -> None:
    """Judges the mutants of the sample that have no row yet, or with `--lived` those that lived."""
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=copy, text=True).strip()
    every = sorted(str(path.relative_to(copy)) for path in copy.glob("tests/test_*.py"))
    stamp = {"seed": options.seed, "commit": commit, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    for mutant in sample(options.count, options.seed, options.areas):
        row = earlier(options.results).get((mutant.file, mutant.name))
        if row["killed_by"] or not options.lived if row else options.lived:
            continue
        tests = nearest(mutant)
        if options.lived == "all":
            tests = [name for name in every if name not in tests]
        row = judge(mutant, copy, tests) | {"tests": options.lived or "nearest"} | stamp
        print(
            f"{mutant.file}:{mutant.line} {row['seconds']} s {row['killed_by'] or 'LIVES: ' + mutant.change}",
            flush=True,
        )
        with options.results.open("a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def check(options: argparse.Namespace, copy: Path) -> None:
    """Raises SystemExit if a test that killed a mutant fails without one."""
    killers = {row["killed_by"].partition("[")[0] for row in earlier(options.results).values()}
    failed, _ = outcome(copy, sorted(name for name in killers if name.startswith("tests/")))
    if failed:
        raise SystemExit(f"{failed} fails without any change: remove its rows.")


def summary(options: argparse.Namespace) -> None:
    """Prints what became of all mutants that have a row, area by area."""
    print("| area | mutants | killed |\n|---|---:|---:|")
    for area in (*TESTS, "all"):
        rows = [row for row in earlier(options.results).values() if area in (row["area"], "all")]
        print(f"| {area} | {len(rows)} | {sum(bool(row['killed_by']) for row in rows)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=154)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--areas", nargs="+", default=list(TESTS), choices=TESTS)
    parser.add_argument("--lived", choices=["nearest", "all"], help="which tests the mutants that lived meet now")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
        run(options, copy)
        check(options, copy)
    summary(options)


if __name__ == "__main__":
    main()
