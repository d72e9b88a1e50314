"""What a training writes while it runs: checkpoints to resume from, and its metrics.

    run.json        what decides the bytes of the result
    metrics.jsonl   a line a step: step, loss before it, tokens, seconds; evaluations on lines of their own
    state/<step>    the last checkpoint: an item as in `io.checkpoint`, whose checksums are checked before it is read
    tensorboard/    the same metrics, if asked for; those of repeated steps stand there twice

A process may die at any moment. The same call goes on from the last checkpoint. Metrics after it are written again.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from filelock import FileLock

from jquant import provenance
from jquant.data import check_whole
from jquant.errors import InputError
from jquant.io.checkpoint import ITEM, damaged, read_item, read_item_json, write_item
from jquant.io.files import hold, read_json, write_json, write_text
from jquant.parallel.processes import as_first, gather, on_first

RUN, METRICS, STATE, BOARD, LOCK = "run.json", "metrics.jsonl", "state", "tensorboard", ".lock"


@dataclass(frozen=True)
class Journal:
    """Where training writes, and how often.

    Attributes:
      folder: of one training; made if it is missing.
      every: steps between checkpoints; the last step has one, too.
      evaluate: a function of the quantized module as it is now; returns figures by name.
      evaluate_every: steps between evaluations.
      tensorboard: whether metrics are also written for TensorBoard (the extra `tensorboard`).
    """

    folder: str | Path
    every: int = 50
    evaluate: Callable[[Any], Mapping[str, float]] | None = None
    evaluate_every: int = 100
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_whole(1, every=self.every, evaluate_every=self.evaluate_every)


@contextmanager
def opened(journal: Journal | None, describe: Callable[[], Mapping[str, Any]]) -> Iterator["Writer | None"]:
    """The journal's folder as this training's; None without a journal.

    Args:
      journal: perhaps.
      describe: says what decides the result's bytes, as JSON.

    Raises:
      InputError: the folder holds another training, is written by another process, or can't be written.
    """
    if journal is None:
        yield None
        return
    folder = Path(journal.folder)
    lock = FileLock(folder / LOCK, timeout=0, thread_local=False)
    on_first(partial(hold, folder, lock))
    try:
        on_first(partial(_claim, folder, dict(describe())))
        on_first(partial(_check_board, journal))
        writer = Writer(journal, folder)
        try:
            yield writer
        finally:
            writer.close()
    finally:
        lock.release()


class Writer:
    """An open journal."""

    def __init__(self, journal: Journal, folder: Path):
        self.journal, self.folder, self._states = journal, folder, folder / STATE
        self._begin = time.perf_counter()
        self._board = _board(folder / BOARD) if journal.tensorboard and jax.process_index() == 0 else None

    def resumed(self, start: Callable[[], Any]) -> tuple[int, Any]:
        """Steps done before, and the state after them; `start` makes the state before the first step.

        Raises:
          InputError: a damaged checkpoint.
        """
        done = self.kept()
        on_first(partial(_keep_metrics, self.folder / METRICS, done))
        self._begin -= float(as_first(_seconds_in(self.folder / METRICS)))  # seconds go on where they ended
        if not done:
            return 0, start()
        like = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)  # noqa: E731
        leaves, structure = jax.tree.flatten(jax.tree.map(like, start()))
        named, place = _numbered(leaves), self._states / str(done)
        floats = {name: leaf.shape for name, leaf in named.items() if not _is_count(leaf)}
        read: dict[str, Any] = read_item(place, floats, lambda name, _: named[name].sharding)
        counts: Any = read_item_json(place).get("counts", {})
        counts = counts if isinstance(counts, dict) else {}
        if counts.keys() != named.keys() - floats.keys() or not all(map(_is_step, counts.values())):
            raise damaged(place / ITEM, "its counts are not those of this training", place)
        read |= {name: np.full(named[name].shape, count, named[name].dtype) for name, count in counts.items()}
        return done, jax.tree.unflatten(structure, [read[name] for name in named])

    def wrote(self, step: int, state: Any, last: bool) -> None:
        """Writes a checkpoint every `every` steps and after the last, then removes the one before.

        Raises:
          InputError: it can't be written; the one before it is kept.
        """
        if not last and step % self.journal.every:
            return
        before, named = self.kept(), _numbered(jax.tree.leaves(state))
        counts = {name: int(leaf) for name, leaf in named.items() if _is_count(leaf)}
        arrays = gather({name: leaf for name, leaf in named.items() if name not in counts})
        on_first(partial(self._write, step, arrays, counts, before))

    def _write(self, step: int, arrays: dict[str, Any], counts: dict[str, int], before: int) -> None:
        if step == before:
            return
        try:
            self._states.mkdir(exist_ok=True)
            write_item(self._states / str(step), arrays, {"rotation": None, "report": {}, "counts": counts})
        except (InputError, OSError) as failed:
            kept = f"The checkpoint of step {before} is kept." if before else "There is no checkpoint before it."
            raise InputError(f"{str(failed).removesuffix('.')}. {kept}") from None
        for path in self._states.glob("*"):  # also what a killed process left
            if path.name != str(step):
                shutil.rmtree(path, ignore_errors=True)

    def note(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds a line to the metrics.

        Raises:
          InputError: it can't be written.
        """
        line = {"step": step, **figures, "seconds": round(time.perf_counter() - self._begin, 3)}
        on_first(partial(_append, self.folder / METRICS, json.dumps(line) + "\n"))
        if self._board:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)

    def kept(self) -> int:
        """The step of the last checkpoint; 0 if there is none."""
        steps = [int(path.name) for path in self._states.glob("*") if path.name.isdecimal()]
        return int(as_first(max(steps, default=0)))

    def evaluated(self, module: Any) -> Mapping[str, float]:
        """The figures of a quantized module."""
        assert self.journal.evaluate is not None
        return {name: float(value) for name, value in self.journal.evaluate(module).items()}

    def due(self, step: int, last: bool) -> bool:
        """Whether an evaluation follows a step."""
        return self.journal.evaluate is not None and (last or step % self.journal.evaluate_every == 0)

    def close(self) -> None:
        """Ends what is open."""
        if self._board:
            self._board.close()


def _claim(folder: Path, run: dict[str, Any]) -> None:
    """Writes run.json, or compares with the one that is there."""
    if not (folder / RUN).exists():
        if others := [path.name for path in folder.iterdir() if not path.name.startswith(".")]:
            raise InputError(
                f"{folder} is not empty (it holds {others[0]}), and holds no {RUN} that says what is in it."
            )
        write_json(folder / RUN, run)
        return
    earlier = read_json(folder / RUN)
    if changes := provenance.differences(earlier, json.loads(json.dumps(run))):
        more = f" and {len(changes) - 3} more" if changes[3:] else ""
        raise InputError(
            f"{folder} holds another training ({'; '.join(changes[:3])}{more}): give this one another folder."
        )


def _numbered(leaves: list[Any]) -> dict[str, Any]:
    return {f"leaf_{number:05}": leaf for number, leaf in enumerate(leaves)}


def _is_count(leaf: Any) -> bool:
    """Whether a leaf of the state counts steps; item.json has those."""
    return jnp.issubdtype(leaf.dtype, jnp.integer)


def _is_step(count: Any) -> bool:
    return type(count) is int and 0 <= count < 1 << 31


def _keep_metrics(path: Path, done: int) -> None:
    """Drops the lines of steps after the checkpoint."""
    try:
        lines = path.read_text().splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as broken:
        raise InputError(f"{path} can't be read ({broken}).") from None
    write_text(path, "".join(line + "\n" for line in lines if _number_in(line, "step") <= done))


def _seconds_in(path: Path) -> float:
    """The seconds of the last line."""
    lines = path.read_text().splitlines() if path.exists() else []
    seconds = _number_in(lines[-1], "seconds") if lines else 0.0
    return seconds if math.isfinite(seconds) else 0.0


def _number_in(line: str, key: str) -> float:
    """A number of a line; infinite for half a line, and for what is none of ours."""
    try:
        return float(json.loads(line)[key])
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return math.inf


def _append(path: Path, line: str) -> None:
    try:
        with path.open("a") as file:
            file.write(line)
    except OSError as failed:
        raise InputError(f"{path} can't be written ({failed.strerror}).") from None


def _check_board(journal: Journal) -> None:
    if journal.tensorboard and find_spec("tensorboardX") is None:
        raise InputError("Metrics for TensorBoard need the extra: pip install 'jquant[tensorboard]'.")


def _board(folder: Path) -> Any:
    from tensorboardX import SummaryWriter  # imported here: an optional extra

    return SummaryWriter(str(folder))
