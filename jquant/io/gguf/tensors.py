"""A GGUF file as a checkpoint: its decoder's shape, and its tensors as floats or packed as they are.

Floats come from the gguf package's own dequantizers.
"""

from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np

from jquant.errors import InputError
from jquant.formats import GGUF
from jquant.io.gguf.blocks import from_blocks
from jquant.io.gguf.header import Tensor, read_header
from jquant.models.config import DecoderConfig, config_from_gguf
from jquant.models.families import family_of
from jquant.qtensor import QTensor

_ROTARY = (".attn_q.weight", ".attn_k.weight")
_ROPE = "rope_freqs.weight"
_PLAIN = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}


class GGUFCheckpoint:
    """A .gguf file; each tensor is mapped into memory only while it is read.

    Args:
      path: of the file.
      packed: whether matrices in blocks of `jquant.GGUF` are read as QTensors.

    Attributes:
      config: the decoder's shape.
      format: "gguf", which names the tensors' naming scheme.
      description: how the projections are stored, e.g. "gguf Q4_1".
      files: the file, as a list.
      shapes: its tensors' shapes by name, kernels `[out, in]`; without rope_freqs, which the configuration holds.

    Raises:
      InputError: not a GGUF file, a truncated or damaged one, or another architecture.
    """

    format = "gguf"

    def __init__(self, path: Path, packed: bool = False):
        self.path, self.files, self.quantized = path, [path], packed
        header = read_header(path)
        self._tensors = header.tensors
        for kind in {tensor.kind: name for name, tensor in self._tensors.items()}.items():
            _check_readable(path, *kind)
        divisors = None
        if _ROPE in self._tensors:
            if len(self._tensors[_ROPE].shape) > 1 or self._tensors[_ROPE].shape[0] > 1 << 13:
                raise InputError(f"{path}: {_ROPE} has the shape {self._tensors[_ROPE].shape}.")
            divisors = tuple(map(float, self._values(self._tensors[_ROPE])))
        tied = "output.weight" not in self._tensors
        self.config: DecoderConfig = config_from_gguf(header.metadata, tied, divisors, str(path))
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items() if name != _ROPE}
        kinds = [t.kind.name for name, t in self._tensors.items() if ".ffn_" in name and len(t.shape) == 2]
        self.description = f"gguf {max(set(kinds), key=kinds.count)}" if kinds else "gguf"

    def read(self, name: str) -> Any:
        """One tensor as float32, kernels `[out, in]`, or as a QTensor `[in, out]`.

        Rotary pairs are in the order (i, i + d/2).

        Raises:
          InputError: no such tensor.
        """
        if name not in self._tensors:
            raise InputError(f"{self.path} lacks the tensor {name}.")
        tensor = self._tensors[name]
        packed = self.quantized and tensor.kind.name in GGUF and len(tensor.shape) == 2
        values: Any = self._packed(tensor) if packed else self._values(tensor)
        if not name.endswith(_ROTARY) or not family_of(self.config).gguf_interleaved:
            return values
        # llama.cpp interleaves each Llama head's rotary pairs: its rows (2i, 2i + 1) are our rows (i, i + d/2).
        head = self.config.head_dim
        if len(tensor.shape) != 2 or tensor.shape[0] % head:
            raise InputError(f"{self.path}: {name} has shape {tensor.shape}, which is no whole heads of {head} rows.")
        order = np.arange(tensor.shape[0]).reshape(-1, head // 2, 2).swapaxes(1, 2).reshape(-1)
        return jax.tree.map(lambda leaf: leaf[..., order], values) if packed else values[order]

    def _packed(self, tensor: Tensor) -> QTensor:
        return from_blocks(self._rows(tensor), tensor.kind.name, tensor.shape[1])

    def _rows(self, tensor: Tensor) -> np.ndarray:
        # Mapped for each tensor: all pages read from one open mapping would count as this process's memory.
        data = np.memmap(self.path, np.uint8, "r", tensor.offset, (tensor.nbytes,))
        return data.view(_PLAIN[tensor.kind]) if tensor.kind in _PLAIN else data.reshape(*tensor.shape[:-1], -1)

    def _values(self, tensor: Tensor) -> np.ndarray:
        return gguf.dequantize(self._rows(tensor), tensor.kind).reshape(tensor.shape)


def _check_readable(path: Path, kind: gguf.GGMLQuantizationType, name: str) -> None:
    """Raises InputError for a storage type that the gguf package can't dequantize."""
    if kind in _PLAIN:
        return
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        raise InputError(f"{path}: {name} has the unsupported type {kind.name}.") from None
