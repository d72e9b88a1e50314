"""Hugging Face folders: config.json and safetensors files, sharded or not, memory-mapped."""

import json
import reprlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jquant.errors import InputError
from jquant.io.files import check_plain, read_json
from jquant.models.config import DecoderConfig, config_from_hf
from jquant.models.families import family_of

# ml_dtypes comes with jax and teaches NumPy bfloat16.
FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu}
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}


class SafetensorsCheckpoint:
    """A folder with config.json and model.safetensors, or model.safetensors.index.json and its shards.

    Attributes:
      config: the decoder's shape.
      format: "hf", which names the tensors' naming scheme.
      description: how the weights are stored, e.g. "safetensors BF16".
      files: all that it consists of.
      shapes: its tensors' shapes by name, kernels as they are stored. Names are those that transformers writes; files
        of GPT-2 on the hub lack what all of them begin with.
      quantization: quantization_config of config.json, if it has one; `jquant.io.export.read` reads such tensors.

    Raises:
      InputError: a file is missing, truncated or of another type; a tensor that two shards hold, or that is not where
        the index says; another architecture.
    """

    format = "hf"
    quantized = False

    def __init__(self, folder: Path):
        self.folder = folder
        raw = read_json(folder / "config.json")
        self.quantization: Any = raw.pop("quantization_config", None)
        self.config: DecoderConfig = config_from_hf(raw, str(folder / "config.json"))
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        placed: dict[str, Path] = {}
        if index.exists():
            placed = self._read_index(index)
            shards = sorted(set(placed.values()))
        elif single.exists():
            shards = [single]
        else:
            raise InputError(f"{folder} has neither model.safetensors nor model.safetensors.index.json.")
        self.files = [folder / "config.json", *shards]
        self._tensors: dict[str, tuple[Path, str]] = {}  # name -> shard, dtype
        self.shapes: dict[str, tuple[int, ...]] = {}
        for shard in shards:
            self._list(shard)
        if not self._tensors:
            raise InputError(f"{folder} holds no tensors.")
        for name in placed:
            if name not in self._tensors:
                raise InputError(f"{index} names the tensor {name}, which {placed[name].name} lacks.")
        for name, (shard, _) in self._tensors.items():
            if placed and placed.get(name) != shard:
                raise InputError(f"{shard} holds the tensor {name}, which {index.name} does not place there.")
        self._add_prefix()
        kinds = [kind for _, kind in self._tensors.values()]
        self.description = f"safetensors {max(set(kinds), key=kinds.count)}"

    def _read_index(self, index: Path) -> dict[str, Path]:
        """The shard of every tensor."""
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise InputError(f"{index} lacks a weight_map from tensor names to file names.")
        for name in set(names.values()):
            if Path(name).name != name or not name.isprintable():
                raise InputError(f"{self.folder}: the index names a shard outside the folder, {name!r}.")
        return {tensor: self.folder / name for tensor, name in names.items()}

    def _list(self, shard: Path) -> None:
        """Adds a shard's tensors."""
        with open_safetensors(shard) as handle:
            for name in handle.keys():  # noqa: SIM118
                if name in self._tensors:
                    raise InputError(f"{shard} and {self._tensors[name][0].name} both hold the tensor {name}.")
                piece = handle.get_slice(name)
                self._tensors[name], self.shapes[name] = (shard, piece.get_dtype()), tuple(piece.get_shape())

    def _add_prefix(self) -> None:
        """Gives tensors their full names, if all lack the prefix of their family's."""
        family = family_of(self.config)
        prefix, head = family.hf_prefix, family.hf["head.kernel"]
        self._cut = 0
        if prefix and not any(name.startswith(prefix) for name in self._tensors):
            full = {name: name if name == head else prefix + name for name in self._tensors}
            self._cut = len(prefix)
            self._tensors = {full[name]: value for name, value in self._tensors.items()}
            self.shapes = {full[name]: value for name, value in self.shapes.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored dtype.

        Raises:
          InputError: no such tensor, or it isn't stored as floats.
        """
        if name not in self._tensors:
            raise InputError(f"{self.folder} lacks the tensor {name}.")
        if not self.is_float(name):
            kind = self._tensors[name][1]
            raise InputError(f"{self.folder}: {name} is stored as {kind}; jquant reads float checkpoints.")
        return self.read_any(name)

    def is_float(self, name: str) -> bool:
        """Whether one of its tensors is stored as floats of 16 bits or more."""
        return self._tensors[name][1] in DTYPES

    def file_of(self, name: str) -> Path:
        """The file that holds one of its tensors."""
        return self._tensors[name][0]

    def read_any(self, name: str) -> np.ndarray:
        """One of its tensors in its stored dtype, whatever that is."""
        shard, kind = self._tensors[name]
        if self._cut and name != family_of(self.config).hf["head.kernel"]:
            name = name[self._cut :]
        if kind in FLOAT8:
            return _read_float8(shard, name, FLOAT8[kind])
        # Opened for each tensor: all pages read from one open mapping would count as this process's memory.
        with open_safetensors(shard) as handle:
            return read_tensor(handle, shard, name)


def open_safetensors(path: Path) -> Any:
    """An open safetensors file.

    Raises:
      InputError: it is missing, not plain, truncated or of another type.
    """
    check_plain(path)
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as broken:
        raise InputError(f"{path} is not a whole safetensors file ({' '.join(str(broken).split())[:200]}).") from None


def read_tensor(handle: Any, path: Path, name: str) -> np.ndarray:
    """One tensor of an open file.

    Raises:
      InputError: a dtype or shape that NumPy does not have.
    """
    try:
        return handle.get_tensor(name)
    except (SafetensorError, AttributeError, TypeError, ValueError, OverflowError) as broken:
        piece = handle.get_slice(name)
        facts = f"{piece.get_dtype()} of shape {reprlib.repr(piece.get_shape())}"
        raise InputError(f"{path}: {name[:200]!r} is {facts}, which can't be read ({str(broken)[:100]}).") from None


def _read_float8(path: Path, name: str, dtype: Any) -> np.ndarray:
    """A tensor of 8-bit floats, for which safetensors' own reader finds no type in NumPy."""
    open_safetensors(path)  # checks that header and offsets fit the file
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[name]
        begin, end = entry["data_offsets"]
        file.seek(8 + size + begin)
        try:
            return np.frombuffer(file.read(end - begin), dtype).reshape(entry["shape"])
        except (ValueError, OverflowError) as broken:
            raise InputError(f"{path}: {name[:200]!r} can't be read ({str(broken)[:100]}).") from None
