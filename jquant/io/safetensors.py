"""Hugging Face folders: config.json and safetensors files, sharded or not, memory-mapped."""

from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jquant.errors import InputError
from jquant.io.files import read_json
from jquant.models.config import DecoderConfig, config_from_hf

# ml_dtypes comes with jax and teaches NumPy bfloat16.
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}


class SafetensorsCheckpoint:
    """A folder with config.json and model.safetensors, or model.safetensors.index.json and its shards.

    Attributes:
      config: the decoder's shape.
      format: "hf", which names the tensors' naming scheme.
      description: how the weights are stored, e.g. "safetensors BF16".
      files: what it consists of.

    Raises:
      InputError: a file is missing, truncated or not what its name says; another architecture.
    """

    format = "hf"

    def __init__(self, folder: Path):
        self.folder = folder
        self.config: DecoderConfig = config_from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.exists():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise InputError(f"{index} lacks a weight_map from tensor names to file names.")
            shards = sorted({self._inside(name) for name in names.values()})
        elif single.exists():
            shards = [single]
        else:
            raise InputError(f"{folder} has neither model.safetensors nor model.safetensors.index.json.")
        self.files = [folder / "config.json", *shards]
        self._tensors: dict[str, tuple[Path, str]] = {}  # name -> shard, dtype
        for shard in shards:
            with _open(shard) as handle:
                self._tensors |= {name: (shard, handle.get_slice(name).get_dtype()) for name in handle.keys()}  # noqa: SIM118
        if not self._tensors:
            raise InputError(f"{folder} holds no tensors.")
        kinds = [kind for _, kind in self._tensors.values()]
        self.description = f"safetensors {max(set(kinds), key=kinds.count)}"

    def _inside(self, name: str) -> Path:
        if Path(name).name != name:
            raise InputError(f"{self.folder}: the index names a shard outside the folder, {name!r}.")
        return self.folder / name

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored dtype, kernels `[out, in]`.

        Raises:
          InputError: no such tensor, or it isn't stored as floats.
        """
        if name not in self._tensors:
            raise InputError(f"{self.folder} lacks the tensor {name}.")
        shard, kind = self._tensors[name]
        if kind not in _DTYPES:
            raise InputError(f"{self.folder}: {name} is stored as {kind}; jquant reads float checkpoints.")
        # Opened anew: pages of a mapping that stays open count as this process's memory, in the end the whole file.
        with _open(shard) as handle:
            return handle.get_tensor(name)


def _open(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise InputError(f"{path} is missing.") from None
    except (SafetensorError, OSError) as broken:
        raise InputError(f"{path} is not a whole safetensors file ({broken}).") from None
