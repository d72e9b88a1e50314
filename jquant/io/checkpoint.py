"""Quantized checkpoints: a folder with one item a block, each there whole or not at all.

    manifest.json      what the checkpoint holds and was made from
    tokenizer.json
    outside/ …         embedding, last norm and head, an item each: they are the largest arrays of all
    blocks/00000/ …    a block's parameters, packed as they are in memory

An item is a folder of arrays as Orbax writes them (zarr; lazily read, and onto another mesh than they came from) beside
item.json: the formats, which are no arrays, size and SHA-256 of every file, and what quantization did. It is written
under another name, synced and renamed, so a process may die at any moment.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tokenizers
from etils import epath
from flax.nnx.traversals import flatten_mapping, unflatten_mapping

from jquant.activations import Activation
from jquant.errors import InputError
from jquant.formats import Codebook, Float, Int, UInt
from jquant.io.files import read_json, sync, write_json
from jquant.io.tokenizer import Tokenizer
from jquant.qtensor import QTensor
from jquant.transforms import Rotation

VERSION = 2
CHUNK = 1 << 26  # bytes of an array in one file
MANIFEST, TOKENIZER, ITEM = "manifest.json", "tokenizer.json", "item.json"
OUTSIDE, BLOCKS = "outside", "blocks"
SPECS = {kind.__name__: kind for kind in (Int, UInt, Codebook, Float, Activation, Rotation)}
PARTS = ("codes", "scale", "zero", "input_scale")

Params = dict[str, Any]  # "attention.q.kernel" -> Array or QTensor
Place = Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]


def write_item(folder: Path, params: Params, facts: Mapping[str, Any]) -> None:
    """Writes parameters as an item: afterwards it is there, or nothing is.

    Args:
      folder: its place; must not exist.
      params: arrays and QTensors by name, whole in this process. They are written as NumPy arrays: the files don't
        depend on the devices that the arrays lay on.
      facts: what else to remember, as JSON.

    Raises:
      InputError: the disk is full or can't be written.
    """
    beside = folder.with_name(f".{folder.name}")
    try:
        shutil.rmtree(beside, ignore_errors=True)  # what a killed process left
        beside.mkdir(parents=True)
        arrays = unflatten_mapping({tuple(path.split(".")): _arrays(leaf) for path, leaf in params.items()})
        pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK), arrays)
        _handler().save(epath.Path(beside.absolute()), args=ocp.args.PyTreeSave(arrays, save_args=pieces))
        files = {str(path.relative_to(beside)): _checked(path) for path in sorted(beside.rglob("*")) if path.is_file()}
        item = {"weights": {path: _static(leaf) for path, leaf in params.items()}, "files": files, **facts}
        write_json(beside / ITEM, item)
        for path in [*beside.rglob("*"), beside]:
            sync(path)
        beside.rename(folder)
        sync(folder.parent)
    except (OSError, ValueError) as failed:  # tensorstore reports a full disk as a ValueError
        shutil.rmtree(beside, ignore_errors=True)
        reason = getattr(failed, "strerror", None) or str(failed).splitlines()[0]
        raise InputError(f"{folder} can't be written ({reason}); what is finished is kept.") from None


def read_item(folder: Path, place: Place | None = None) -> Params:
    """The parameters of an item, checked against its checksums.

    Args:
      folder: its place.
      place: where each array goes, by name and shape; the first device by default.

    Raises:
      InputError: it is not there, or a file of it is missing, truncated or changed.
    """
    weights = check_item(folder)["weights"]
    path = epath.Path(folder.absolute())
    stored = flatten_mapping(_handler().metadata(path).tree)  # pyright: ignore[reportArgumentType]
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {}
    for key, array in stored.items():
        shape = jax.ShapeDtypeStruct(array.shape, array.dtype)
        wanted[key] = jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=place(".".join(key), shape) if place else first
        )
    abstract = unflatten_mapping(wanted)
    how = ocp.args.PyTreeRestore(item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
    flat = flatten_mapping(_handler().restore(path, args=how))
    return {name: _leaf(tuple(name.split(".")), flat, static) for name, static in weights.items()}


def check_item(folder: Path) -> dict[str, Any]:
    """item.json of an item whose files are all as they were written.

    Raises:
      InputError: it is not there, or a file of it is missing, truncated or changed.
    """
    item = read_json(folder / ITEM)
    again = f"delete {folder.name} and run the same command again."
    if not all(isinstance(item.get(key), dict) for key in ("files", "weights")):
        raise InputError(f"{folder / ITEM} is damaged: {again}")
    for name, checked in item["files"].items():
        file = folder / name
        if not file.is_file() or _checked(file) != checked:
            raise InputError(f"{file} is not what was written: {again}")
    return item


def block_folder(folder: Path, layer: int) -> Path:
    """Where a block lies."""
    return folder / BLOCKS / f"{layer:05}"


def to_json(value: Any) -> Any:
    """Formats, activations, rotations and what they are made of, as JSON; `from_json` gives an equal value."""
    if is_dataclass(value) and not isinstance(value, type):
        kind = type(value).__name__
        assert kind in SPECS, kind
        return {"type": kind} | {one.name: to_json(getattr(value, one.name)) for one in fields(value)}
    return [to_json(one) for one in value] if isinstance(value, tuple) else value


def from_json(value: Any) -> Any:
    """What `to_json` was given.

    Raises:
      InputError: a type that there is not.
    """
    if isinstance(value, list):
        return tuple(map(from_json, value))
    if not isinstance(value, dict):
        return value
    if value.get("type") not in SPECS:
        raise InputError(f"There is no {value.get('type')!r} among {', '.join(SPECS)}.")
    return SPECS[value["type"]](**{key: from_json(one) for key, one in value.items() if key != "type"})


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a tokenizer knows beyond tokenizer.json."""
    return {key: getattr(tokenizer, key) for key in ("bos_id", "eos_ids", "add_bos", "chat_template")}


def read_tokenizer(folder: Path, facts: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Raises:
      InputError: tokenizer.json is missing or broken.
    """
    path = folder / TOKENIZER
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as broken:  # the library raises bare Exceptions
        raise InputError(f"{path} can't be read ({broken}).") from None
    return Tokenizer(backend, facts["bos_id"], tuple(facts["eos_ids"]), facts["add_bos"], facts["chat_template"])


def _handler() -> ocp.PyTreeCheckpointHandler:
    # Plain zarr: OCDBT's file names are random, and the same run shall write the same bytes. Not compressed: packed
    # codes hardly shrink, and with embedding and head of Llama-3-8B's shape the first block took 84 s compressed,
    # beside other work, and 34 s as it is.
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False, use_compression=False)


def _arrays(leaf: Any) -> Any:
    if not isinstance(leaf, QTensor):
        return np.asarray(leaf)
    return {part: _arrays(value) for part in PARTS if (value := getattr(leaf, part)) is not None}


def _static(leaf: Any) -> Any:
    """What of a leaf is no array; None for plain arrays."""
    if not isinstance(leaf, QTensor):
        return None
    parts = {part: _static(value) for part in PARTS if (value := getattr(leaf, part)) is not None}
    return {
        "format": to_json(leaf.format),
        "in_features": leaf.in_features,
        "activation": to_json(leaf.activation),
        "parts": parts,
    }


def _leaf(path: tuple[str, ...], flat: Mapping[tuple[str, ...], Any], static: Any) -> Any:
    if static is None:
        return flat[path]
    parts = dict.fromkeys(PARTS) | {part: _leaf((*path, part), flat, of) for part, of in static["parts"].items()}
    told = {key: from_json(static[key]) for key in ("format", "in_features", "activation")}
    return QTensor(**parts, **told)


def _checked(file: Path) -> list[Any]:
    """Size and SHA-256."""
    with file.open("rb") as handle:
        return [os.fstat(handle.fileno()).st_size, hashlib.file_digest(handle, "sha256").hexdigest()]
