"""Quantizes a model that does not fit into memory: a block read, quantized, written and forgotten at a time.

What is alive: one float block and the next one as it is read, the block's statistics, and the calibration windows on
their way through the model. A process may die at any moment: blocks are there whole or not at all, and the same call
goes on after the last one, its windows led through the finished blocks again. So it writes the same bytes as a run that
was not interrupted.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import compress, islice
from pathlib import Path
from typing import Any, Literal, TypedDict

import jax
import numpy as np
import safetensors.numpy
from filelock import FileLock, Timeout
from flax import nnx
from jaxtyping import Int

from jquant import provenance
from jquant.calibration.windows import Calibration, Choices, usual_batch
from jquant.data import run_hashes
from jquant.errors import InputError
from jquant.parallel.processes import as_first, gather, on_first
from jquant.io.checkpoint import (
    BLOCKS,
    MANIFEST,
    OUTSIDE,
    SEEN,
    TOKENIZER,
    VERSION,
    Manifest,
    Params,
    TokenizerFacts,
    block_folder,
    check_item,
    checksum_of,
    fits,
    read_manifest,
    to_json,
    tokenizer_facts,
    write_item,
    write_sealed,
)
from jquant.io.files import write_bytes
from jquant.io.load import ModelFile, Progress, QuantizedFile
from jquant.methods import Method, Plan
from jquant.models.decoder import Block, Decoder
from jquant.pipeline.in_memory import check_options, check_plan, flat_params, quantize_blocks, relative_error, shared
from jquant.models.folding import rotate_block, rotate_outside, rotations
from jquant.parallel.mesh import Devices
from jquant.transforms import Rotation
from jquant.calibration.spill import Spill

LOCK = ".lock"  # held by the process that writes
WINDOWS = ".windows"  # beside the blocks: calibration windows that wait on disk
OURS = (LOCK, WINDOWS, f".{MANIFEST}")


def quantize_to_folder(
    source: ModelFile | QuantizedFile,
    folder: str | Path,
    method: str | Method | Plan,
    tokens: Int[np.ndarray, "n context"] | None = None,
    *,
    batch: int | None = None,
    inputs: Literal["quantized", "float"] = "quantized",
    passes: int = 1,
    held_out: int = 0,
    devices: Devices | None = None,
    memory_gb: float | int | None = None,
    progress: Progress | None = None,
) -> QuantizedFile:
    """`quantize_decoder` from disk to disk: a checkpoint that `load_model` reads.

    Args:
      source: the float model (`open_model`).
      folder: of the checkpoint; what an earlier call with the same arguments finished there is kept.
      method: a name, a point in the space of methods, or a plan.
      tokens: calibration windows.
      batch: windows per forward pass and device; by default `usual_batch()`.
      inputs: see `quantize_decoder`.
      passes: see `quantize_decoder`.
      held_out: see `quantize_decoder`.
      devices: see `quantize_decoder`; a checkpoint can be read onto others.
      memory_gb: calibration windows over so many gigabytes, in each process, wait for their next block in files in the
        checkpoint's folder, which are removed in the end; by default all wait in the host's memory.
      progress: called with ("quantize", blocks done, blocks in all) and the error so far.

    Raises:
      InputError: what `quantize_decoder` and `ModelFile` find; a method that takes gradients through the whole model
        or has a user's own format; a folder that holds something else, the beginnings of another run, or a damaged
        block, or that another process is writing; a disk that is full or can't be written.
    """
    for _ in quantize_stream(
        source,
        folder,
        method,
        tokens,
        batch=batch,
        inputs=inputs,
        passes=passes,
        held_out=held_out,
        devices=devices,
        memory_gb=memory_gb,
        progress=progress,
    ):
        pass
    return QuantizedFile(Path(folder))


def quantize_stream(
    source: ModelFile | QuantizedFile,
    folder: str | Path,
    method: str | Method | Plan,
    tokens: Int[np.ndarray, "n context"] | None = None,
    *,
    batch: int | None = None,
    inputs: Literal["quantized", "float"] = "quantized",
    passes: int = 1,
    held_out: int = 0,
    devices: Devices | None = None,
    memory_gb: float | int | None = None,
    progress: Progress | None = None,
) -> Iterator[int]:
    """`quantize_to_folder` step by step: yields each layer once its block is on disk."""
    if isinstance(source, QuantizedFile):
        raise InputError(f"{source.folder} is quantized already: quantize the float model.")
    folder = Path(folder)
    plan = check_plan(nnx.eval_shape(lambda: Decoder(source.config, nnx.Rngs(0))), method)
    for weight, part in _whole_model(plan):
        raise InputError(
            f"{weight}: {part} takes gradients through the whole model, which is never in memory here; quantize the "
            f"loaded model instead."
        )
    _check_formats(plan)
    needs = any(chosen.needs for layer in plan for _, chosen in layer)
    check_options(source.config, plan, tokens, batch, inputs, passes, held_out)
    run = {
        "source": source.fingerprint(),
        "dtype": source.dtype,
        "methods": _told(plan),
        "calibration": None if tokens is None else provenance.array_digest(tokens),
        "batch": batch or usual_batch(),
        "inputs": inputs,
        "passes": passes,
        "held_out": held_out,
        # Statistics are added in the windows' order whatever the mesh; split columns may round a product differently.
        "mesh.model": devices.model if devices and needs else 1,
        "code": provenance.code_of(plan, [__name__]),
        "packages": provenance.packages(),
    }
    spill = _spill(folder, memory_gb)
    _check_ours(folder)
    with _owned(folder):
        _check_run(folder, run)
        rotation = shared(plan, "rotation", None)
        turns = rotations(source.config, **asdict(rotation)) if rotation else {}
        outside = rotate_outside(source.outside(), turns)
        calibration = None
        if needs:
            if spill:
                on_first(partial(_renew, spill.folder))
            calibration = Calibration(
                outside, plan, tokens, batch=batch, inputs=inputs, held_out=held_out, devices=devices, spill=spill
            )
        # Not before all that may be wrong with the call was found.
        on_first(partial(_begin, folder, source, run, outside, tokens if needs else None))
        del outside
        yield from _quantize_missing(source, folder, plan, turns, calibration, passes, devices, progress)
        if spill:
            on_first(partial(shutil.rmtree, spill.folder, ignore_errors=True))


def _quantize_missing(
    source: ModelFile,
    folder: Path,
    plan: list[Choices],
    turns: dict[str, Rotation],
    calibration: Calibration | None,
    passes: int,
    devices: Devices | None,
    progress: Progress | None,
) -> Iterator[int]:
    """Quantizes and writes the blocks from the first missing one on; yields each layer once it is on disk."""

    def blocks(first: int) -> Iterator[Block]:
        for block in source.blocks(first):
            yield rotate_block(block, turns) if turns else block

    manifest, layers = read_manifest(folder), source.config.layers
    places = [block_folder(folder, layer) for layer in range(layers)]
    there = as_first([place.exists() for place in places]).tolist()
    for place in compress(places, there):
        check_item(place)
    report = QuantizedFile(folder).report()
    first = [*there, False].index(False)
    if calibration and first < layers:
        _catch_up(calibration, blocks, folder, first)
    steps = quantize_blocks(blocks(first), {"": plan}, calibration, passes=passes, first=first, devices=devices)
    for layer, results in enumerate(steps, first):
        quantized, infos = results[""]
        report |= {(layer, name): info for name, info in infos.items()}
        if not there[layer]:
            known = lambda v: None if np.isnan(v) else v.item()  # noqa: E731 - JSON has no NaN
            facts = {
                "rotation": to_json(quantized.mlp.rotation),
                "report": {name: jax.tree.map(known, vars(info)) for name, info in infos.items()},
            }
            on_first(partial(_write, folder, manifest, places[layer], gather(flat_params(quantized)), facts))
        if progress:
            progress("quantize", layer + 1, layers, error=relative_error([report]))
        yield layer


def _catch_up(calibration: Calibration, blocks: Callable[[int], Iterator[Block]], folder: Path, count: int) -> None:
    """Leads the windows through the blocks that an earlier process finished."""
    whole = calibration.devices.place if calibration.devices else lambda tree: tree
    if calibration.exact is not None:
        for block in islice(blocks(0), count):
            calibration.advance_exact(whole(block))
    readers = blocks(0) if calibration.inputs == "float" else QuantizedFile(folder).blocks()
    for block in islice(readers, count):
        calibration.advance(whole(block))


def streams(plan: list[Choices]) -> bool:
    """Whether nothing in the methods of the weights (`check_plan`) needs the whole model in memory."""
    return next(_whole_model(plan), None) is None


def _whole_model(plan: list[Choices]) -> Iterator[tuple[str, str]]:
    """Weights and, of their methods, what takes gradients through the whole model."""
    for layer, choices in enumerate(plan):
        for path, chosen in choices:
            whole = {
                "token_weights='loss'": chosen.token_weights == "loss",
                "LossSearch": "clips" in chosen.needs,
                "Tuning with target='model'": any(stage.target == "model" for stage in chosen.tuning),
            }
            yield from ((f"layers.{layer}.{path}", part) for part, wanted in whole.items() if wanted)


def _check_formats(plan: list[Choices]) -> None:
    """Raises InputError for a method with a part of a user's own that a checkpoint would have to hold."""
    for layer, choices in enumerate(plan):
        for path, chosen in choices:
            try:
                to_json(chosen.format)
                to_json(chosen.activation)
            except InputError as wrong:
                raise InputError(f"layers.{layer}.{path}: {wrong}; quantize the loaded model instead.") from None


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
        if differing := sorted(key for key in run if run[key] != earlier.get(key)):
            told = "; ".join(f"{key}: {_changes(key, earlier.get(key), run[key])}" for key in differing)
            raise InputError(f"{folder} holds another run ({told}): give this one another folder.")


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing the folder, until the end of this one at the latest.

    Raises:
      InputError: another process holds it; it can't be written.
    """
    lock, made = FileLock(folder / LOCK, timeout=0, thread_local=False), not folder.exists()

    def hold() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise InputError(f"{folder} is being written by another process.") from None
        except OSError as failed:
            raise InputError(f"{folder} can't be written ({failed.strerror}).") from None

    on_first(hold)
    try:
        yield
    finally:
        if lock.is_locked:
            if made and not (folder / MANIFEST).exists():  # nothing was begun
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
    """Writes what is missing beside the blocks, the manifest first."""
    beside = {TOKENIZER: source.tokenizer.backend.to_str().encode()}
    if tokens is not None:
        beside[SEEN] = safetensors.numpy.save({"runs": run_hashes(tokens)})
    if not (folder / MANIFEST).exists():
        manifest: Manifest = {
            "version": VERSION,
            "name": source.name,
            "stored_as": source.checkpoint.description,
            "config": asdict(source.config),
            "tokenizer": TokenizerFacts(**tokenizer_facts(source.tokenizer)),
            "files": {name: checksum_of(data) for name, data in beside.items()},
            "run": run,
        }
        write_sealed(folder / MANIFEST, manifest)
    manifest = read_manifest(folder)
    try:
        for part in (BLOCKS, OUTSIDE):
            (folder / part).mkdir(exist_ok=True)
    except OSError as failed:
        raise InputError(f"{folder / part} can't be made ({failed.strerror}).") from None
    for name, data in beside.items():
        if not (folder / name).exists():
            write_bytes(folder / name, data)
    for name, leaf in flat_params(outside).items():
        if not (folder / OUTSIDE / name).exists():
            facts = {"rotation": to_json(outside.norm.rotation), "report": {}}
            _write(folder, manifest, folder / OUTSIDE / name, {name: leaf}, facts)


def _write(folder: Path, manifest: Manifest, place: Path, params: Params, facts: dict[str, Any]) -> None:
    """Writes an item, unless the folder is no longer this run's."""
    if read_manifest(folder) != manifest:
        raise InputError(f"{folder / MANIFEST} was replaced while this run was writing: it writes nothing more.")
    write_item(place, params, facts)


class Told(TypedDict):
    """A method's description, and the weights that have it."""

    method: dict[str, Any]
    weights: list[str]


def _told(plan: list[Choices]) -> list[Told]:
    """The methods, and which weights have each."""
    weights: dict[Method, list[str]] = {}
    for layer, choices in enumerate(plan):
        for path, chosen in choices:
            weights.setdefault(chosen, []).append(f"{layer}.{path}")
    return [{"method": provenance.describe(chosen), "weights": its} for chosen, its in weights.items()]


def _changes(key: str, earlier: Any, now: Any) -> str:
    """What of a run is another, three differences at most."""
    if key == "methods" and fits(earlier, list[Told]):
        earlier, now = ({name: one["method"] for one in told for name in one["weights"]} for told in (earlier, now))
        names = dict.fromkeys([*earlier, *now])
        lines = [line for name in names for line in provenance.differences(earlier.get(name), now.get(name))]
    else:
        lines = provenance.differences(earlier, now)
    lines = list(dict.fromkeys(lines))
    return "; ".join(lines[:3]) + (f" and {len(lines) - 3} more" if lines[3:] else "")
