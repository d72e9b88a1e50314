"""A GGUF file as a checkpoint: its decoder's shape, and its tensors through the gguf package's own dequantizers."""

from pathlib import Path

import gguf
import numpy as np

from jquant.errors import InputError
from jquant.io.gguf.header import Tensor, read_header
from jquant.models.config import DecoderConfig, config_from_gguf
from jquant.models.families import family_of

_ROTARY = (".attn_q.weight", ".attn_k.weight")
_ROPE = "rope_freqs.weight"
_PLAIN = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}


class GGUFCheckpoint:
    """A .gguf file; each tensor is mapped into memory only while it is read.

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
    quantized = False

    def __init__(self, path: Path):
        self.path, self.files = path, [path]
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

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32, kernels `[out, in]`, rotary pairs in the order (i, i + d/2).

        Raises:
          InputError: no such tensor.
        """
        if name not in self._tensors:
            raise InputError(f"{self.path} lacks the tensor {name}.")
        values = self._values(self._tensors[name])
        if not name.endswith(_ROTARY) or not family_of(self.config).gguf_interleaved:
            return values
        # llama.cpp interleaves each Llama head's rotary pairs: its rows (2i, 2i + 1) are our rows (i, i + d/2).
        head = self.config.head_dim
        if values.ndim != 2 or len(values) % head:
            raise InputError(f"{self.path}: {name} has shape {values.shape}, which is no whole heads of {head} rows.")
        return values.reshape(-1, head // 2, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)

    def _values(self, tensor: Tensor) -> np.ndarray:
        # Mapped for each tensor: all pages read from one open mapping would count as this process's memory.
        data = np.memmap(self.path, np.uint8, "r", tensor.offset, (tensor.nbytes,))
        rows = data.view(_PLAIN[tensor.kind]) if tensor.kind in _PLAIN else data.reshape(*tensor.shape[:-1], -1)
        return gguf.dequantize(rows, tensor.kind).reshape(tensor.shape)


def _check_readable(path: Path, kind: gguf.GGMLQuantizationType, name: str) -> None:
    """Raises InputError for a storage type that the gguf package can't dequantize."""
    if kind in _PLAIN:
        return
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        raise InputError(f"{path}: {name} has the unsupported type {kind.name}.") from None
