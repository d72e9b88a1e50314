"""A GGUF file's header: key/value pairs, and where its tensors are.

`gguf.GGUFReader` is not used, because it trusts the file: one flipped bit in an array's length makes it loop and
allocate without end. It also makes one NumPy view per string: opening a file with 49,152 tokens takes it 2 s, this
parser 0.1 s. This parser refuses counts that the rest of the file has no room for, so time and memory stay within a
small multiple of the file's size.

Source: the GGUF specification (ggml/docs/gguf.md); tensors are laid out as llama.cpp demands (ggml/src/gguf.cpp).
"""

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from jquant.errors import InputError
from jquant.io.files import check_plain

_STRING, _ARRAY = 8, 9  # gguf.GGUFValueType; the other types, with their NumPy dtypes:
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_ALIGNMENT = 32  # bytes, unless general.alignment says otherwise
_MOST_WEIGHTS = 1 << 48


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is in the file.

    Attributes:
      shape: the last axis is the one along which blocks run; kernels `[out, in]`.
      kind: how it is stored.
      offset: of its first byte in the file.
      nbytes: its size in bytes.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """The part of the file before the tensors' bytes.

    Attributes:
      metadata: values by key; arrays of strings are lists, arrays of numbers NumPy arrays.
      tensors: by name, in the file's order.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Key/value pairs and tensors of a little-endian GGUF file of version 2 or 3.

    Raises:
      InputError: not such a file; one that ends too early; a key or tensor twice; tensors that do not follow one
        another in the order of their names, on multiples of general.alignment; a tensor past the file's end.
    """
    return _read(Path(path), tensors=True)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The key/value pairs alone; the file may be cut off inside its tensors. Errors as of `read_header`."""
    return _read(Path(path), tensors=False).metadata


def _read(path: Path, tensors: bool) -> Header:
    size = check_plain(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            parser = _Parser(data, size)
            count, metadata = parser.start()
            return Header(metadata, parser.tensors(count, metadata) if tensors else {})
    except (OSError, ValueError) as broken:
        raise InputError(f"{path} cannot be read as GGUF ({broken}); download or convert it again.") from None


class _Parser:
    """A position in the file that moves forward. Each ValueError says what is wrong at the position."""

    def __init__(self, data: mmap.mmap, size: int):
        self.data, self.size, self.at = data, size, 0

    def start(self) -> tuple[int, dict[str, Any]]:
        """The number of tensors, and the key/value pairs."""
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.at = 4
        if (version := self.number("<u4")) not in (2, 3):
            raise ValueError(f"version {version} is neither 2 nor 3")
        tensors, pairs = self.number("<u8"), self.number("<u8")
        metadata: dict[str, Any] = {}
        for _ in range(self.room_for(pairs, 12, "keys")):
            key = self.string()
            if key in metadata:
                raise ValueError(f"the key {key[:80]!r} appears twice")
            metadata[key] = self.value(self.number("<u4"))
        return tensors, metadata

    def tensors(self, count: int, metadata: dict[str, Any]) -> dict[str, Tensor]:
        """Where the tensors are: each begins at the end of the one before, rounded up to the alignment."""
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}, no power of two from 8")
        entries = [self.tensor() for _ in range(self.room_for(count, 24, "tensors"))]
        begin, expected = -(-self.at // alignment) * alignment, 0
        placed: dict[str, Tensor] = {}
        for name, shape, kind, offset in entries:
            if name in placed:
                raise ValueError(f"the tensor {name[:80]!r} appears twice")
            if offset != expected:
                raise ValueError(f"the tensor {name[:80]!r} is at {offset} and not at {expected}, after the one before")
            placed[name] = Tensor(shape, kind, begin + offset, nbytes := _bytes(name, shape, kind))
            if begin + offset + nbytes > self.size:
                raise ValueError(f"it ends inside the tensor {name[:80]!r}")
            expected += -(-nbytes // alignment) * alignment
        return placed

    def tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, axes = self.string(), self.number("<u4")
        if not 1 <= axes <= 4:
            raise ValueError(f"the tensor {name[:80]!r} has {axes} axes")
        shape = tuple(self.number("<u8") for _ in range(axes))[::-1]
        kind, offset = self.number("<u4"), self.number("<u8")
        if kind not in GGML_QUANT_SIZES:
            raise ValueError(f"the tensor {name[:80]!r} is stored in the unknown type {kind}")
        return name, shape, GGMLQuantizationType(kind), offset

    def value(self, kind: int) -> Any:
        """One value. Arrays of arrays are refused: no known key has them."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_scalar(kind))
        kind, count = self.number("<u4"), self.number("<u8")
        if kind == _STRING:
            return [self.string() for _ in range(self.room_for(count, 8, "strings"))]
        dtype = np.dtype(_scalar(kind))
        nbytes = dtype.itemsize * self.room_for(count, dtype.itemsize, "numbers")
        return np.frombuffer(self.take(nbytes), dtype)

    def number(self, dtype: str) -> Any:
        kind = np.dtype(dtype)
        return np.frombuffer(self.take(kind.itemsize), kind)[0].item()

    def string(self) -> str:
        (length,) = _LENGTH.unpack(self.take(8))
        return self.take(length).decode()

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:  # a slice would silently be too short
            raise ValueError("it ends too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def room_for(self, count: int, least: int, what: str) -> int:
        """The count, checked: the rest of the file must have room for so many entries of at least `least` bytes."""
        if count * least > self.size - self.at:
            raise ValueError(f"it has no room for {count} {what}")
        return count


_LENGTH = struct.Struct("<Q")


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value has the unknown or nested type {kind}")
    return _SCALARS[kind]


def _bytes(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    weights = 1
    for n in shape:  # checked axis by axis, so that the product stays small
        if not 1 <= n <= _MOST_WEIGHTS or (weights := weights * n) > _MOST_WEIGHTS:
            raise ValueError(f"the tensor {name[:80]!r} has the impossible shape {shape}")
    block, nbytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise ValueError(f"rows of {shape[-1]} weights of {name[:80]!r} are no whole blocks of {kind.name}")
    return weights // block * nbytes
