"""Shows how far a computation is: bars on a terminal and in Jupyter, elsewhere a line every few seconds."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from time import monotonic
from typing import Protocol, runtime_checkable

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

SECONDS = 10  # between lines in a log, and before the first line
UNITS = {
    "load": "tensors",
    "observe": "layers",
    "quantize": "layers",
    "tune": "steps",
    "evaluate": "windows",
    "answer": "texts",
    "generate": "tokens",
}


@runtime_checkable
class Progress(Protocol):
    """A function that a computation calls to say how far it is."""

    def __call__(self, stage: str, done: int, total: int, /, **figures: float) -> None:
        """`done` of `total` steps of a stage are over; `figures` are known by then, e.g. error=0.12."""
        ...


@contextmanager
def showing(progress: Progress | bool, title: str = "", console: Console | None = None) -> Iterator[Progress]:
    """Gives a computation the function that shows its progress, while it runs.

    Args:
      progress: True shows progress; False shows nothing; a function is passed through. Only process 0 shows it.
      title: of the computation, shown before the stage's name.
      console: where to show it; by default standard error.
    """
    if callable(progress):
        yield progress
    elif not progress or jax.process_index() > 0:
        yield _nothing
    else:
        console = console or Console(stderr=True)
        if console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None):
            with _bars(title, console) as tell:
                yield tell
        else:
            yield _Lines(title, console)


def _nothing(stage: str, done: int, total: int, /, **figures: float) -> None:
    pass


@contextmanager
def _bars(title: str, console: Console) -> Iterator[Progress]:
    """A bar per stage: its name, steps done and in all, its figures so far, time left."""
    columns = (
        TextColumn("{task.description:<24}", markup=False),
        BarColumn(bar_width=16),  # the line fits a terminal of 80 columns
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}, left"),
        TimeRemainingColumn(compact=True),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        tasks = {}

        def tell(stage: str, done: int, total: int, /, **figures: float) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(_named(title, stage), figures="", total=total)
            bars.update(tasks[stage], completed=done, total=total, figures=_figures(stage, figures))

        yield tell


class _Lines:
    """A line every few seconds with the contents of the bar."""

    def __init__(self, title: str, console: Console):
        self._title, self._console = title, console
        self._first: dict[str, tuple[float, int]] = {}  # by stage: time and steps done at its first call
        self._next = monotonic() + SECONDS

    def __call__(self, stage: str, done: int, total: int, /, **figures: float) -> None:
        now = monotonic()
        began, before = self._first.setdefault(stage, (now, done))
        if now < self._next:
            return
        self._next = now + SECONDS
        left = f", {(now - began) / (done - before) * (total - done):.0f} s left" if done > before else ""
        line = f"{_named(self._title, stage)} {done}/{total} {_figures(stage, figures)}{left}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _named(title: str, stage: str) -> str:
    return f"{title}: {stage}" if title else stage


def _figures(stage: str, figures: dict[str, float]) -> str:
    """The unit of the steps, and the known figures."""
    known = "".join(f", {name} {value:.3g}" for name, value in figures.items() if not math.isnan(value))
    return f"{UNITS.get(stage, '')}{known}"
