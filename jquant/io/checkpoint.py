"""Checkpoints: a folder with one item a block; each item is written completely or not at all.

    manifest.json      what the checkpoint holds and was made from
    tokenizer.json
    source.json               the small files of the original model's folder, for exports (`source_files`)
    calibration.safetensors   hashes of the runs of tokens that the weights were fitted to (`data.run_hashes`)
    outside/ …         embedding, last norm and head, an item each
    blocks/00000/ …    a block's parameters, packed as they are in memory

An item is a folder of arrays written by Orbax (zarr: read lazily, and onto any mesh) and item.json. item.json holds the
formats, size and SHA-256 of every file, and the report of quantization. An item is written under another name, synced
and renamed, so a process may die at any moment.

manifest.json has size and SHA-256 of the files beside it. Both kinds of JSON end with a checksum of themselves.
Arrays must also have the shapes and dtypes that the model's configuration asks for: a file with forged checksums ends
in an error message, too.
"""

import gc
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import lru_cache, partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NotRequired, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tokenizers
from etils import epath
from flax.nnx.traversals import flatten_mapping, unflatten_mapping

from jquant.activations import Activation
from jquant.errors import InputError
from jquant.formats import E8P, Additive, Codebook, ColumnCodebook, Float, Format, Int, Trellis, UInt, VectorCodebook
from jquant.io.files import check_plain, is_text, read_json, sync, write_text
from jquant.io.safetensors import open_safetensors, read_tensor
from jquant.io.tokenizer import Tokenizer, check_ids
from jquant.qtensor import QTensor, Transposed, Turns, quantize
from jquant.ranges import MinMax
from jquant.rotations import Rotation

VERSION = 3
CHUNK = 1 << 26  # bytes of an array in one file
MANIFEST, TOKENIZER, ITEM = "manifest.json", "tokenizer.json", "item.json"
SEEN = "calibration.safetensors"
SOURCE = "source.json"
OUTSIDE, BLOCKS = "outside", "blocks"
FORMATS = (Int, UInt, Codebook, Float, E8P, Trellis, VectorCodebook, Additive, ColumnCodebook)
SPECS = {kind.__name__: kind for kind in (*FORMATS, Activation, Rotation)}
PARTS = ("codes", "scale", "zero", "input_scale", "levels")
DTYPES = ("float32", "float16", "bfloat16")  # of arrays that are not quantized

Params = dict[str, Any]  # "attention.q.kernel" -> Array or QTensor
Place = Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]


class TokenizerFacts(TypedDict):
    """What a tokenizer holds beyond tokenizer.json."""

    bos_id: int | None
    eos_ids: list[int]
    add_bos: bool
    chat_template: str | None
    pre: NotRequired[str | None]


class Manifest(TypedDict):
    """manifest.json. `files` has [size, SHA-256] by name.

    `run` is what decides the codes of a run that can resume; None for a model saved from memory.
    """

    version: int
    name: str
    stored_as: str
    config: dict[str, Any]
    tokenizer: TokenizerFacts
    files: dict[str, list[Any]]
    run: dict[str, Any] | None


class Item(TypedDict):
    """item.json. `weights` describes each parameter except its arrays; `files` has [size, SHA-256] by name."""

    weights: dict[str, Any]
    files: dict[str, list[Any]]
    rotation: dict[str, Any] | None
    report: dict[str, dict[str, float | None]]


def write_item(folder: Path, params: Params, facts: Mapping[str, Any]) -> None:
    """Writes parameters as an item, completely or not at all.

    Args:
      folder: the item's; must not exist.
      params: arrays and QTensors by name, all of each in this process. They are written as NumPy arrays, so the files
        don't depend on the arrays' devices.
      facts: further entries of item.json.

    Raises:
      InputError: the disk is full or can't be written.
    """
    temporary = folder.with_name(f".{folder.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed process left
        temporary.mkdir(parents=True)
        arrays = unflatten_mapping({tuple(path.split(".")): _parts(leaf) for path, leaf in params.items()})
        arrays = jax.tree.map(np.asarray, arrays)
        pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK), arrays)
        _handler().save(epath.Path(temporary.absolute()), args=ocp.args.PyTreeSave(arrays, save_args=pieces))
        files = {name: checksum(temporary / name) for name in sorted(_files(temporary))}
        item = {"weights": {path: _static(leaf) for path, leaf in params.items()}, "files": files, **facts}
        write_sealed(temporary / ITEM, item)
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        temporary.rename(folder)
        sync(folder.parent)
        return
    except (OSError, ValueError) as failed:  # tensorstore reports a full disk as a ValueError
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(failed, "strerror", None) or str(failed).splitlines()[0]
    gc.collect()  # Orbax's other tasks failed, too, and say so when they are collected: before our sentence
    raise InputError(f"{folder} can't be written ({reason}).")


def read_item(folder: Path, shapes: Mapping[str, tuple[int, ...]], place: Place | None = None) -> Params:
    """The parameters of an item, checked against its checksums and the expected shapes.

    Args:
      folder: the item's.
      shapes: the expected shape of each of its parameters, by name.
      place: gives each array's sharding from its name and shape; by default the first device.

    Raises:
      InputError: what `check_item` finds; parameters other than those of `shapes`, or arrays that don't fit them.
    """
    weights = check_item(folder)["weights"]
    wrong = partial(damaged, folder / ITEM, rewritable=folder)
    if weights.keys() != shapes.keys():
        raise wrong(f"it holds {_some(weights)}, where {_some(shapes)} belong")
    leaves = {}
    for name, shape in shapes.items():
        try:
            leaves[name] = _expected(name, weights[name], shape)
        except (InputError, RecursionError) as error:
            raise wrong(f"{name}: {error}") from None
    expected = flatten_mapping(
        unflatten_mapping({tuple(name.split(".")): _parts(leaf) for name, leaf in leaves.items()})
    )
    path = epath.Path(folder.absolute())
    try:
        stored = flatten_mapping(_handler().metadata(path).tree)  # pyright: ignore[reportArgumentType]
        actual = {key: (array.shape, jnp.dtype(array.dtype)) for key, array in stored.items()}
    except Exception as broken:  # Orbax and tensorstore raise many types
        raise damaged(folder, f"its arrays can't be read: {_first_line(broken)}", folder) from None
    for key in sorted(actual.keys() | expected.keys()):
        needed = (expected[key].shape, expected[key].dtype) if key in expected else None
        if actual.get(key) != needed:
            raise damaged(
                folder,
                f"{'.'.join(key)} is {_in_words(actual.get(key))}, where {_in_words(needed)} belongs",
                folder,
            )
    for key, array in stored.items():
        _check_pieces(folder, ".".join(key), array, expected[key])
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    sharded = {
        key: jax.ShapeDtypeStruct(of.shape, of.dtype, sharding=place(".".join(key), of) if place else first)
        for key, of in expected.items()
    }
    abstract = unflatten_mapping(sharded)
    how = ocp.args.PyTreeRestore(item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
    try:
        flat = flatten_mapping(_handler().restore(path, args=how))
    except Exception as broken:
        raise damaged(folder, f"its arrays can't be read: {_first_line(broken)}", folder) from None
    return {name: _leaf(tuple(name.split(".")), flat, leaf) for name, leaf in leaves.items()}


def check_storable(params: Params, prefix: str = "") -> None:
    """Raises InputError that names a parameter which `read_item` could not read again."""
    for name, leaf in params.items():
        try:
            _expected(name, _static(leaf), leaf.shape)
        except InputError as wrong:
            raise InputError(f"{prefix}{name}: {wrong}.") from None


def check_item(folder: Path) -> Item:
    """item.json of an item, after a check that its files are those that were written.

    Raises:
      InputError: the item is missing, or one of its files is missing, truncated, changed or not listed.
    """
    item, present = read_item_json(folder), _files(folder) - {ITEM}
    for name in sorted(item["files"].keys() | present):
        # A listed path that leads out of the folder is not in `present`, so it is refused.
        if name not in present or checksum(folder / name) != item["files"].get(name):
            listed = name in item["files"]
            what = "it is missing, or its checksum differs" if listed else f"{ITEM} has no such file"
            raise damaged(Path(f"{folder}/{name}"), what, folder)
    return item


def read_item_json(folder: Path) -> Item:
    """item.json, its files unchecked. Raises InputError if it is missing or changed."""
    item: Any = read_sealed(folder / ITEM, folder)
    if not fits(item, Item):
        raise damaged(folder / ITEM, "a key of it is missing, or of another type", folder)
    return item


def read_rotation(folder: Path, size: int) -> Rotation | None:
    """The rotation in item.json: of the block, or of the residual stream.

    Raises:
      InputError: it is not a rotation of that size.
    """
    try:
        rotation = from_json(read_item_json(folder)["rotation"])
    except (InputError, RecursionError) as wrong:
        raise damaged(folder / ITEM, f"rotation: {wrong}", folder) from None
    if rotation is not None and (type(rotation) is not Rotation or rotation.size != size):
        raise damaged(folder / ITEM, f"its rotation is not one of {size}", folder)
    return rotation


def read_manifest(folder: Path) -> Manifest:
    """manifest.json.

    Raises:
      InputError: it is missing, was changed, or was written by another version of jquant.
    """
    path = folder / MANIFEST
    version = read_json(path).get("version")
    if type(version) is int and version != VERSION:
        raise InputError(f"{folder} was written by a jquant with checkpoints of version {version}.")
    manifest: Any = read_sealed(path)
    if not fits(manifest, Manifest):
        raise damaged(path, "a key of it is missing, or of another type")
    return manifest


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object whose last entry is the SHA-256 of the rest; errors as of `write_text`."""
    write_text(path, _sealed(content))


def read_sealed(path: Path, rewritable: Path | None = None) -> dict[str, Any]:
    """A JSON object that `write_sealed` wrote, without its checksum.

    Args:
      path: of the file.
      rewritable: see `damaged`.

    Raises:
      InputError: it is missing, or not byte for byte what was written.
    """
    content = read_json(path)
    content.pop("sha256", None)
    try:
        if path.read_bytes() == _sealed(content).encode():
            return content
    except (OSError, ValueError, RecursionError):
        pass
    raise damaged(path, "its checksum differs", rewritable)


def damaged(path: Path, what: str, rewritable: Path | None = None) -> InputError:
    """The error for a file or folder that is not what was written.

    Args:
      path: of the file or folder.
      what: what is wrong with it.
      rewritable: the part of the checkpoint that quantizing again would write.
    """
    way = "write the model into another folder"
    if rewritable:
        way = f"delete {rewritable.name} and run the same command again, or save the model once more"
    return InputError(f"{path} is not what was written ({' '.join(what.split())[:300]}): {way}.")


def block_folder(folder: Path, layer: int) -> Path:
    """The folder of a block's item."""
    return folder / BLOCKS / f"{layer:05}"


def to_json(value: Any) -> Any:
    """Formats, activations, rotations and their fields as JSON; `from_json` gives an equal value.

    Raises:
      InputError: a type that `from_json` doesn't know, such as a user's own.
    """
    kind = type(value)
    if SPECS.get(kind.__name__) is kind:
        return {"type": kind.__name__} | {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if kind is tuple:
        return [to_json(item) for item in value]
    if kind not in (NoneType, bool, int, float, str):
        raise InputError(f"a checkpoint can't hold a {kind.__name__}; it knows {', '.join(SPECS)}")
    return value


def from_json(value: Any) -> Any:
    """The inverse of `to_json`.

    Raises:
      InputError: an unknown type, or options that it doesn't take.
    """
    if isinstance(value, list):
        return tuple(map(from_json, value))
    if not isinstance(value, dict):
        return value
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in SPECS:
        raise InputError(f"there is no {str(kind)[:50]!r} among {', '.join(SPECS)}")
    types = get_type_hints(SPECS[kind])
    hints = {field.name: types[field.name] for field in fields(SPECS[kind])}
    options = {key: from_json(item) for key, item in value.items() if key != "type"}
    for key in sorted(options.keys() | hints.keys()):
        if key not in hints or key not in options or not fits(options[key], hints[key]):
            raise InputError(f"{kind} has no {key[:50]}={str(value.get(key, 'nothing'))[:50]}")
    return SPECS[kind](**options)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON, and all that it holds, has an annotated type; True is no int."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if is_typeddict(kind):
        keys = get_type_hints(kind)
        return (
            type(value) is dict
            and kind.__required_keys__ <= value.keys()
            and all(fits(value[key], keys[key]) for key in keys.keys() & value.keys())
        )
    if origin in (Union, UnionType):
        return any(fits(value, item) for item in arguments)
    if origin is Literal:
        return type(value) is str and value in arguments
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, arguments[1]) for item in value.values())
    if origin in (list, tuple) and type(value) is not origin:
        return False
    if origin is list or (origin is tuple and arguments[1:] == (...,)):
        return all(fits(item, arguments[0]) for item in value)
    if origin is tuple:
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    if kind is Format:
        return type(value) in FORMATS
    return type(value) in ((int, float) if kind is float else (kind,))


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a tokenizer holds beyond tokenizer.json."""
    return {key: getattr(tokenizer, key) for key in TokenizerFacts.__annotations__}


def read_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Raises:
      InputError: tokenizer.json is missing, changed or broken.
    """
    facts, path = manifest["tokenizer"], folder / TOKENIZER
    if checksum(path) != manifest["files"].get(TOKENIZER):
        raise damaged(path, "its checksum differs", path)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except BaseException as broken:  # the library raises bare Exceptions and Rust's panics, which are no Exceptions
        if not isinstance(broken, Exception) and type(broken).__name__ != "PanicException":
            raise
        raise InputError(f"{path} can't be read ({_first_line(broken)}).") from None
    check_ids(backend, str(path))
    eos_ids, rest = tuple(facts["eos_ids"]), (facts["add_bos"], facts["chat_template"], facts.get("pre"))
    return Tokenizer(backend, facts["bos_id"], eos_ids, *rest)


def read_seen(folder: Path, manifest: Manifest) -> np.ndarray | None:
    """Hashes of the calibration texts' runs of tokens, uint64 `[runs]`; None without calibration.

    Raises:
      InputError: the file is missing, changed or broken.
    """
    if SEEN not in manifest["files"]:
        return None
    path = folder / SEEN
    if checksum(path) != manifest["files"][SEEN]:
        raise damaged(path, "its checksum differs")
    try:
        with open_safetensors(path) as handle:
            if "runs" not in handle.keys():  # noqa: SIM118
                raise InputError("it has no runs")
            runs = read_tensor(handle, path, "runs")
    except InputError as broken:
        raise damaged(path, _first_line(broken)) from None
    if runs.ndim != 1 or runs.dtype != np.uint64:
        raise damaged(path, f"its runs are {runs.dtype} of shape {runs.shape}")
    return runs


def read_source(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Texts of the original folder's small files by name; empty if it had none.

    Raises:
      InputError: the file is missing, changed or broken.
    """
    if SOURCE not in manifest["files"]:
        return {}
    path = folder / SOURCE
    if checksum(path) != manifest["files"][SOURCE]:
        raise damaged(path, "its checksum differs")
    files = read_json(path)
    if not fits(files, dict[str, str]) or not all(is_text(part) for item in files.items() for part in item):
        raise damaged(path, "it is no object of texts")
    return files


def _check_pieces(folder: Path, name: str, array: Any, expected: jax.ShapeDtypeStruct) -> None:
    """Raises InputError for an array in pieces larger than itself, or whose files don't fill it: both are allocated."""
    pieces = array.storage and array.storage.chunk_shape
    if pieces is None or any(piece > max(size, 1) for piece, size in zip(pieces, expected.shape, strict=True)):
        raise damaged(folder, f"{name} of shape {expected.shape} is in pieces of {pieces}", folder)
    size = sum(file.stat().st_size for file in (folder / name).rglob("*") if not file.name.startswith("."))
    if size < math.prod(expected.shape) * expected.dtype.itemsize:
        raise damaged(folder, f"{name} has {size:,} bytes, too few for {expected.shape}", folder)


def _handler() -> ocp.PyTreeCheckpointHandler:
    # Plain zarr: OCDBT's file names are random, and the same run shall write the same bytes. Not compressed: packed
    # codes hardly shrink. With embedding and head of Llama-3-8B's shape, writing up to the first block took 84 s
    # compressed and 34 s uncompressed.
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False, use_compression=False)


def _parts(leaf: Any) -> Any:
    """A QTensor's arrays by name, as a dictionary of dictionaries; other leaves as they are."""
    if isinstance(leaf, Transposed):
        return _parts(leaf.weight)
    if not isinstance(leaf, QTensor):
        return leaf
    return {part: _parts(value) for part in PARTS if (value := getattr(leaf, part)) is not None}


def _static(leaf: Any) -> Any:
    """A QTensor's description without its arrays; another leaf's dtype."""
    if isinstance(leaf, Transposed):
        return {"transposed": _static(leaf.weight)}
    if not isinstance(leaf, QTensor):
        return str(leaf.dtype)
    parts = {part: _static(value) for part in PARTS if (value := getattr(leaf, part)) is not None}
    return {
        "format": to_json(leaf.format),
        "in_features": leaf.in_features,
        "activation": to_json(leaf.activation),
        **({} if leaf.rotations is None else {"rotations": to_json(leaf.rotations)}),
        "parts": parts,
    }


def _expected(name: str, static: Any, shape: tuple[int, ...]) -> Any:
    """The parameter that item.json describes, with shapes and dtypes in place of arrays.

    Raises:
      InputError: there is no such parameter of that shape.
    """
    if isinstance(static, str) and static in DTYPES:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(static))
    if name == "embedding" and isinstance(static, dict) and static.keys() == {"transposed"}:
        return Transposed(_expected("kernel", static["transposed"], shape[::-1]))
    if not isinstance(static, dict) or not name.endswith("kernel"):
        raise InputError(f"{str(static)[:50]} is no dtype of it")
    format, activation, rotations = (from_json(static.get(key)) for key in ("format", "activation", "rotations"))
    if not fits(format, Format) or not fits(activation, Activation | None):
        raise InputError("it has no format")
    if not fits(rotations, Turns) or (rotations and tuple(each.size for each in rotations) != shape[-2:]):
        raise InputError("its rotations do not fit it")
    leaf = replace(_quantized(shape, format, activation), rotations=rotations)
    parts = static.get("parts")
    if not isinstance(parts, dict) or "levels" not in parts:
        leaf = replace(leaf, levels=None)
    elif leaf.levels is None and hasattr(format, "levels"):  # a table in place of the format's
        levels = jax.ShapeDtypeStruct((*shape[:-2], *np.shape(format.levels)), jnp.float32)
        leaf = replace(leaf, levels=levels)
    if _static(leaf) != static:
        raise InputError("its parts are not those of its format")
    return leaf


@lru_cache
def _quantized(shape: tuple[int, ...], format: Format, activation: Activation | None) -> QTensor:
    """A quantized weight of that shape, with shapes and dtypes in place of arrays."""

    def quantized(w: jax.Array) -> QTensor:
        q = quantize(w, *MinMax()(w, format), format)
        if activation is None or not activation.static:
            return replace(q, activation=activation)
        return replace(q, activation=activation, input_scale=activation.format.grid(-w[:1, :1], w[:1, :1])[0])

    return jax.eval_shape(quantized, jax.ShapeDtypeStruct(shape, jnp.float32))


def _leaf(path: tuple[str, ...], flat: Mapping[tuple[str, ...], Any], of: Any) -> Any:
    """A leaf with arrays in place of its shapes."""
    if isinstance(of, Transposed):
        return Transposed(_leaf(path, flat, of.weight))
    if not isinstance(of, QTensor):
        return flat[path]
    parts = {part: _leaf((*path, part), flat, value) for part in PARTS if (value := getattr(of, part)) is not None}
    return replace(of, **parts)


def _files(folder: Path) -> set[str]:
    """All files in a folder, by their path in it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def checksum(file: Path) -> list[Any]:
    """Size and SHA-256.

    Raises:
      InputError: it is not a plain file, or can't be read.
    """
    check_plain(file)
    try:
        with file.open("rb") as handle:
            return [os.fstat(handle.fileno()).st_size, hashlib.file_digest(handle, "sha256").hexdigest()]
    except OSError as failed:
        raise InputError(f"{file} can't be read ({failed.strerror}).") from None


def checksum_of(data: bytes) -> list[Any]:
    """Size and SHA-256 of a file with this content."""
    return [len(data), hashlib.sha256(data).hexdigest()]


def _sealed(content: Mapping[str, Any]) -> str:
    dump = lambda value: json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"  # noqa: E731
    return dump({**content, "sha256": checksum_of(dump(content).encode())[1]})


def _some(names: Mapping[str, Any]) -> str:
    return ", ".join(sorted(names))[:150] or "nothing"


def _in_words(array: tuple[Any, Any] | None) -> str:
    return "missing" if array is None else f"{array[1]} of shape {array[0]}"


def _first_line(problem: BaseException) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0][:200]
