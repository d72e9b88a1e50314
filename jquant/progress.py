"""How a computation says how far it is: bars on a terminal and in Jupyter, elsewhere a line now and then."""

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

SECONDS = 10  # between two lines in a log, and before the first
UNITS = {
    "load": "tensors",
    "observe": "layers",
    "quantize": "layers",
    "tune": "steps",
    "evaluate": "windows",
    "generate": "tokens",
}


@runtime_checkable
class Progress(Protocol):
    """Told by a computation how far it is."""

    def __call__(self, stage: str, done: int, total: int, /, **figures: float) -> None:
        """`done` of `total` steps of a stage are over; `figures` are what it can say by then, e.g. error=0.12."""
        ...


@contextmanager
def showing(progress: Progress | bool, title: str = "", console: Console | None = None) -> Iterator[Progress]:
    """What a computation tells how far it is, as long as it runs.

    Args:
      progress: True shows it; False shows nothing; a function is told itself. Of several processes the first shows it.
      title: of what is computed, before the stage's name.
      console: where it is shown; by default standard error.
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
    """A bar per stage: what, how many of how many, the stage's figures so far, time left."""
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
    """A line every few seconds: the same as a bar's."""

    def __init__(self, title: str, console: Console):
        self._title, self._console = title, console
        self._first: dict[str, tuple[float, int]] = {}  # by stage, when it was first told of, and how much was done
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
    """What the steps are, and the figures that are known."""
    known = "".join(f", {name} {value:.3g}" for name, value in figures.items() if not math.isnan(value))
    return f"{UNITS.get(stage, '')}{known}"
