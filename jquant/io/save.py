"""Writes checkpoints (`jquant.io.checkpoint`) of models in memory; `pipeline.to_disk` writes them block by block."""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import safetensors.numpy
from flax import nnx

from jquant.errors import InputError
from jquant.io.checkpoint import (
    BLOCKS,
    MANIFEST,
    OUTSIDE,
    SEEN,
    SOURCE,
    TOKENIZER,
    VERSION,
    Manifest,
    TokenizerFacts,
    block_folder,
    check_storable,
    checksum_of,
    to_json,
    tokenizer_facts,
    write_item,
    write_sealed,
)
from jquant.io.files import check_new, sync, write_bytes
from jquant.io.source_files import to_bytes
from jquant.io.tokenizer import Tokenizer
from jquant.models.adapters import first_adapted
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Block, Decoder, blocks, outside_of
from jquant.models.params import Params, flat_params, with_params
from jquant.parallel.processes import gather, on_first
from jquant.rounding import SolveInfo

STACKED = "segments."  # how the names of the blocks' parameters begin in a decoder
Facts = dict[str, Any]


@runtime_checkable
class Origin(Protocol):
    """What a manifest takes from a `LanguageModel` or its file."""

    @property
    def name(self) -> str:
        """What the user called it."""
        ...

    @property
    def stored_as(self) -> str:
        """How the weights were stored before jquant read them."""
        ...

    @property
    def config(self) -> DecoderConfig:
        """The decoder's shape."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back."""
        ...

    @property
    def source_files(self) -> Mapping[str, str]:
        """See `LanguageModel`."""
        ...


def files_beside(origin: Origin, calibrated_on: np.ndarray | None) -> dict[str, bytes]:
    """The files beside the manifest, by name: the tokenizer, the source's files, hashes of the calibration texts."""
    files = {TOKENIZER: origin.tokenizer.backend.to_str().encode()}
    if origin.source_files:
        files[SOURCE] = to_bytes(origin.source_files)
    return files if calibrated_on is None else files | {SEEN: safetensors.numpy.save({"runs": calibrated_on})}


def new_manifest(origin: Origin, files: Mapping[str, bytes], run: dict[str, Any] | None) -> Manifest:
    """The manifest of a checkpoint with these files; `run` as in `Manifest`."""
    return {
        "version": VERSION,
        "name": origin.name,
        "stored_as": origin.stored_as,
        "config": asdict(origin.config),
        "tokenizer": TokenizerFacts(**tokenizer_facts(origin.tokenizer)),
        "files": {name: checksum_of(data) for name, data in files.items()},
        "run": run,
    }


def outside_items(decoder: Decoder) -> Iterator[tuple[str, Params, Facts]]:
    """Embedding, last norm and head: the name, the parameters and the facts of each item."""
    for name, leaf in flat_params(decoder).items():
        if not name.startswith(STACKED):
            yield name, {name: leaf}, {"rotation": to_json(decoder.norm.rotation), "report": {}}


def block_facts(block: Block, infos: Mapping[str, SolveInfo]) -> Facts:
    """A block's facts for `write_item`; `infos` has its weights' `SolveInfo` by path."""
    plain = lambda value: None if np.isnan(value) else np.asarray(value).item()  # noqa: E731 - JSON has no NaN
    report = {path: {key: plain(value) for key, value in vars(info).items()} for path, info in infos.items()}
    return {"rotation": to_json(block.mlp.rotation), "report": report}


def save_model(
    folder: str | Path, origin: Origin, decoder: Decoder, calibrated_on: np.ndarray | None, report: Mapping
) -> None:
    """Writes a decoder as a checkpoint; see `LanguageModel.save`.

    It is written under a temporary name and renamed: a process that dies leaves no folder that loads.
    """
    folder = Path(folder).expanduser().resolve()
    if name := first_adapted(flat_params(decoder)):
        raise InputError(
            f"{name} has an adapter, which a checkpoint can't hold: save_adapters(folder, model) saves adapters, "
            f"merge_adapters(model) gives a float model without."
        )
    files = files_beside(origin, calibrated_on)
    manifest = new_manifest(origin, files, None)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    on_first(partial(_begin, folder, temporary))
    try:
        for place, params, facts in _items(decoder, report):
            on_first(partial(write_item, temporary / place, gather(params), facts))
        on_first(partial(_finish, temporary, folder, manifest, files))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _items(decoder: Decoder, report: Mapping) -> Iterator[tuple[Path, Params, Facts]]:
    """The items of a decoder, each with its path in the folder.

    Raises:
      InputError: a part that a checkpoint can't hold.
    """
    outside = outside_of(decoder)
    rebuilt = nnx.eval_shape(lambda: Decoder(decoder.config, nnx.Rngs(0)))
    rebuilt.segments, rebuilt.norm.rotation = nnx.List([]), decoder.norm.rotation
    _check_described(outside, rebuilt, "The decoder")
    for name, params, facts in outside_items(outside):
        check_storable(params)
        yield Path(OUTSIDE, name), params, facts
    layer = -1
    for layer, block in enumerate(blocks(decoder)):
        check_storable(flat_params(block), f"layers.{layer}.")
        rebuilt = nnx.eval_shape(lambda layer=layer: Block(decoder.config, nnx.Rngs(0), layer))
        rebuilt.mlp.rotation, rebuilt.attention.cached = block.mlp.rotation, block.attention.cached
        _check_described(block, rebuilt, f"layers.{layer}")
        infos = {path: info for (number, path), info in report.items() if number == layer}
        yield block_folder(Path(), layer), flat_params(block), block_facts(block, infos)
    if layer + 1 != decoder.config.layers:
        raise InputError(f"The decoder has {layer + 1} layers, its configuration {decoder.config.layers}.")


def _check_described(module: Any, rebuilt: Any, name: str) -> None:
    """Raises InputError for a module that differs from `rebuilt`, the one that its configuration gives."""
    shapes, params = ({path: leaf.shape for path, leaf in flat_params(tree).items()} for tree in (rebuilt, module))
    if shapes != params or nnx.graphdef(with_params(rebuilt, flat_params(module))) != nnx.graphdef(module):
        raise InputError(f"{name} differs from what the model's configuration describes: it can't be saved.")


def _begin(folder: Path, temporary: Path) -> None:
    """Makes the temporary folder; the final one must be empty or missing."""
    try:
        check_new(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        for part in (BLOCKS, OUTSIDE):
            (temporary / part).mkdir(parents=True)
    except OSError as failed:
        raise InputError(f"{folder} can't be written ({failed.strerror}).") from None


def _finish(temporary: Path, folder: Path, manifest: Manifest, files: Mapping[str, bytes]) -> None:
    """Writes the remaining files, the manifest last, and renames the folder."""
    for name, data in files.items():
        write_bytes(temporary / name, data)
    write_sealed(temporary / MANIFEST, manifest)
    try:
        os.rename(temporary, folder)
        sync(folder.parent)
    except OSError as failed:
        raise InputError(f"{folder} can't be written ({failed.strerror}).") from None
