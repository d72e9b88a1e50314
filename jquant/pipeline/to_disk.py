"""Quantizes a model that does not fit into memory: reads, quantizes and writes one block at a time.

In memory are one float block, the next one as it is read, the block's statistics and the calibration windows. A process
may die at any moment. Each block is written completely or not at all. The same call then resumes: it leads the windows
through the finished blocks again, goes on after the last of them, and writes the same bytes as a run that was not
interrupted.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from filelock import FileLock
from flax import nnx
from jaxtyping import Int

from jquant import provenance
from jquant.calibration.options import DEFAULTS, Options, usual_batch
from jquant.calibration.spill import Spill
from jquant.composition import Method
from jquant.data import run_hashes
from jquant.errors import InputError
from jquant.io.checkpoint import (
    BLOCKS,
    MANIFEST,
    OUTSIDE,
    Manifest,
    block_folder,
    check_item,
    fits,
    read_manifest,
    to_json,
    write_item,
    write_sealed,
)
from jquant.io.files import hold, write_bytes
from jquant.io.load import ModelFile, QuantizedFile
from jquant.io.save import block_facts, files_beside, new_manifest, outside_items
from jquant.methods import Rules
from jquant.models.decoder import Block, Decoder
from jquant.models.folding import Rotated, rotations
from jquant.models.params import Params, flat_params, weight_name
from jquant.parallel.processes import as_first, gather, on_first
from jquant.pipeline.driver import calibrate, quantize_into
from jquant.pipeline.in_memory import check_tokens_and_options
from jquant.pipeline.outside import quantize_outside
from jquant.pipeline.plan import Plan, make_plan
from jquant.progress import showing
from jquant.rounding import SolveInfo

LOCK = ".lock"  # held by the process that writes
WINDOWS = ".windows"  # calibration windows that wait on disk
OURS = (LOCK, WINDOWS, f".{MANIFEST}")


def quantize_to_folder(
    source: ModelFile | QuantizedFile,
    folder: str | Path,
    method: str | Method | Rules | Plan,
    tokens: Int[np.ndarray, "n context"] | None = None,
    options: Options = DEFAULTS,
    memory_gb: float | int | None = None,
) -> QuantizedFile:
    """`quantize_decoder` from disk to disk: a checkpoint that `load_model` reads.

    Args:
      source: the float model (`open_model`).
      folder: the checkpoint's; blocks that an earlier call with the same arguments finished are kept.
      method: see `quantize_decoder`.
      tokens: calibration windows.
      options: see `Options`. The checkpoint can be loaded onto other devices.
      memory_gb: gigabytes of calibration windows that a process keeps in memory. Further windows wait in files in the
        checkpoint's folder, removed at the end. By default all stay in memory.

    Raises:
      InputError: what `quantize_decoder` and `ModelFile` find; a method that takes gradients through the whole model
        or has a user's own format; a folder that holds something else, the beginnings of another run, or a damaged
        block, or that another process is writing; a disk that is full or can't be written.
    """
    for _ in quantize_stream(source, folder, method, tokens, options, memory_gb):
        pass
    return QuantizedFile(Path(folder))


def quantize_stream(
    source: ModelFile | QuantizedFile,
    folder: str | Path,
    method: str | Method | Rules | Plan,
    tokens: Int[np.ndarray, "n context"] | None = None,
    options: Options = DEFAULTS,
    memory_gb: float | int | None = None,
) -> Iterator[int]:
    """`quantize_to_folder` step by step: yields each layer once its block is on disk."""
    if isinstance(source, QuantizedFile) or source.quantized:
        problem = "is quantized already" if source.quantized else "was saved by jquant, and is only quantized in memory"
        where = source.folder if isinstance(source, QuantizedFile) else source.name
        raise InputError(f"{where} {problem}: give the float model's own files.")
    folder = Path(folder)
    plan = make_plan(nnx.eval_shape(lambda: Decoder(source.config, nnx.Rngs(0))), method)
    _check_streams(plan)
    check_tokens_and_options(source.config, [plan], tokens, options)
    run = _run(source, plan, tokens, options)
    spill = _spill(folder, memory_gb)
    _check_ours(folder)
    with _owned(folder):
        _check_run(folder, run)
        if plan.needs and spill:
            on_first(partial(_renew, spill.folder))
        rotated = Rotated(source, rotations(source.config, **asdict(plan.rotation)) if plan.rotation else {})
        calibration = calibrate(rotated, {"": plan}, tokens, options, spill)
        # Nothing is written before the whole call was checked.
        outside = quantize_outside(rotated.outside(), plan.outside)
        on_first(partial(_begin, folder, source, run, outside, tokens if plan.needs else None))
        with showing(options.progress) as tell:
            resolved = replace(options, progress=tell)
            yield from quantize_into({"": _Folder(folder)}, rotated, {"": plan}, calibration, resolved)
        if spill:
            on_first(partial(shutil.rmtree, spill.folder, ignore_errors=True))


class _Folder:
    """A checkpoint's folder as a sink of blocks (`driver.Sink`); existing blocks are not written again."""

    def __init__(self, folder: Path):
        self._folder, self._file = folder, QuantizedFile(folder)
        self._manifest = read_manifest(folder)
        self._places = [block_folder(folder, layer) for layer in range(self._file.config.layers)]
        self._there = as_first([place.exists() for place in self._places]).tolist()
        for place in compress(self._places, self._there):
            check_item(place)
        self.report = self._file.report()

    def finished(self) -> int:
        return [*self._there, False].index(False)

    def blocks(self) -> Iterator[Block]:
        return self._file.blocks()

    def take(self, layer: int, block: Block, infos: Mapping[str, SolveInfo]) -> None:
        self.report |= {(layer, path): info for path, info in infos.items()}
        if self._there[layer]:
            return
        params = gather(flat_params(block))
        on_first(partial(_write, self._folder, self._manifest, self._places[layer], params, block_facts(block, infos)))


def _run(source: ModelFile, plan: Plan, tokens: np.ndarray | None, options: Options) -> dict[str, Any]:
    """Everything that decides a checkpoint's bytes."""
    devices = options.devices
    return {
        "source": source.fingerprint(),
        "dtype": source.dtype,
        "methods": _described(plan),
        "outside": {name: provenance.describe(method) for name, method in plan.outside},
        "calibration": None if tokens is None else provenance.array_digest(tokens),
        "batch": options.batch or usual_batch(),
        "inputs": options.inputs,
        "passes": options.passes,
        "held_out": options.held_out,
        # On every mesh statistics are added in the windows' order, but products of split columns may round differently.
        "mesh.model": devices.model if devices and plan.needs else 1,
        "code": provenance.code_of(plan.layers, [__name__]),
        "packages": provenance.packages(),
    }


def _check_streams(plan: Plan) -> None:
    """Raises InputError for a method that needs the whole model or has a format that a checkpoint can't hold."""
    for weight, part in plan.whole_model():
        raise InputError(
            f"{weight}: {part} takes gradients through the whole model, which is never in memory here; quantize the "
            f"loaded model instead."
        )
    _check_formats(plan)


def _check_formats(plan: Plan) -> None:
    """Raises InputError for a method with a format of a user's own, which a checkpoint can't hold."""
    named = {weight_name(layer, path): method for layer, choices in enumerate(plan.layers) for path, method in choices}
    for name, method in [*named.items(), *plan.outside]:
        try:
            to_json(method.format)
            to_json(method.activation)
        except InputError as wrong:
            raise InputError(f"{name}: {wrong}; quantize the loaded model instead.") from None


def _check_ours(folder: Path) -> None:
    """Raises InputError unless the folder is empty, or holds a run."""
    try:
        others = folder.exists() and any(not path.name.startswith(OURS) for path in folder.iterdir())
        if others and not (folder / MANIFEST).exists():
            raise InputError(f"{folder} is not empty, and holds no {MANIFEST} that says what is in it.")
    except OSError as failed:
        raise InputError(f"{folder} can't be read ({failed.strerror}).") from None


def _check_run(folder: Path, run: dict[str, Any]) -> None:
    """Raises InputError if the folder holds another run."""
    if (folder / MANIFEST).exists():
        earlier = read_manifest(folder)["run"]
        if earlier is None:
            raise InputError(f"{folder} holds a saved model, not a run to resume: give this run another folder.")
        if differing := sorted(key for key in run if run[key] != earlier.get(key)):
            changes = "; ".join(f"{key}: {_changes(key, earlier.get(key), run[key])}" for key in differing)
            raise InputError(f"{folder} holds another run ({changes}): give this run another folder.")


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing the folder while this one does.

    Raises:
      InputError: another process holds it; it can't be written.
    """
    lock, new_folder = FileLock(folder / LOCK, timeout=0, thread_local=False), not folder.exists()

    on_first(partial(hold, folder, lock))
    try:
        yield
    finally:
        if lock.is_locked:
            if new_folder and not (folder / MANIFEST).exists():  # nothing was written
                shutil.rmtree(folder, ignore_errors=True)
            lock.release()


def _spill(folder: Path, memory_gb: float | int | None) -> Spill | None:
    if memory_gb is None:
        return None
    if isinstance(memory_gb, bool) or not isinstance(memory_gb, int | float) or not memory_gb >= 0:
        raise InputError(f"memory_gb takes gigabytes from 0, not {memory_gb!r}.")
    return Spill(folder / WINDOWS, memory_gb * 1e9)


def _renew(folder: Path) -> None:
    """Makes an empty folder."""
    try:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed process left
        folder.mkdir(parents=True)
    except OSError as failed:
        raise InputError(f"{folder} can't be written ({failed.strerror}).") from None


def _begin(
    folder: Path, source: ModelFile, run: dict[str, Any], outside: Decoder, tokens: Int[np.ndarray, "n context"] | None
) -> None:
    """Writes the files that are missing, except the blocks; the manifest first."""
    beside = files_beside(source, None if tokens is None else run_hashes(tokens))
    for name in (MANIFEST, *beside):
        for unfinished in folder.glob(f".{name}.*"):  # of a process that died while it wrote
            unfinished.unlink()
    if not (folder / MANIFEST).exists():
        write_sealed(folder / MANIFEST, new_manifest(source, beside, run))
    manifest = read_manifest(folder)
    try:
        for part in (BLOCKS, OUTSIDE):
            (folder / part).mkdir(exist_ok=True)
    except OSError as failed:
        raise InputError(f"{folder / part} can't be made ({failed.strerror}).") from None
    for name, data in beside.items():
        if not (folder / name).exists():
            write_bytes(folder / name, data)
    for name, params, facts in outside_items(outside):
        if not (folder / OUTSIDE / name).exists():
            _write(folder, manifest, folder / OUTSIDE / name, params, facts)


def _write(folder: Path, manifest: Manifest, place: Path, params: Params, facts: dict[str, Any]) -> None:
    """Writes an item, unless the folder is no longer this run's."""
    if read_manifest(folder) != manifest:
        raise InputError(f"{folder / MANIFEST} was replaced while this run was writing: it writes nothing more.")
    try:
        write_item(place, params, facts)
    except InputError as failed:
        raise InputError(f"{str(failed).removesuffix('.')}; what is finished is kept.") from None


class Described(TypedDict):
    """A method's description, and the weights that have it."""

    method: dict[str, Any]
    weights: list[str]


def _described(plan: Plan) -> list[Described]:
    """The methods, and which weights have each."""
    weights: dict[Method, list[str]] = {}
    for layer, choices in enumerate(plan.layers):
        for path, method in choices:
            weights.setdefault(method, []).append(weight_name(layer, path))
    return [{"method": provenance.describe(method), "weights": names} for method, names in weights.items()]


def _changes(key: str, earlier: Any, now: Any) -> str:
    """How two runs differ in one of their keys, three differences at most."""
    if key == "methods" and fits(earlier, list[Described]):
        earlier, now = ({name: entry["method"] for entry in run for name in entry["weights"]} for run in (earlier, now))
        names = dict.fromkeys([*earlier, *now])
        lines = [line for name in names for line in provenance.differences(earlier.get(name), now.get(name))]
    else:
        lines = provenance.differences(earlier, now)
    lines = list(dict.fromkeys(lines))
    return "; ".join(lines[:3]) + (f" and {len(lines) - 3} more" if lines[3:] else "")
