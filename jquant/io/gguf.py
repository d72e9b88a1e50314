"""GGUF files: header, tensors through the gguf package's own dequantizers, memory-mapped."""

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from jquant.errors import InputError
from jquant.models.config import DecoderConfig, config_from_gguf

_ROTARY = (".attn_q.weight", ".attn_k.weight")
_ROPE = "rope_freqs.weight"


class GGUFCheckpoint:
    """A memory-mapped .gguf file.

    Attributes:
      config: the decoder's shape.
      format: "gguf", which names the tensors' naming scheme.
      description: how the projections are stored, e.g. "gguf Q4_1".
      files: what it consists of.

    Raises:
      InputError: not a GGUF file, a truncated one, or another architecture.
    """

    format = "gguf"

    def __init__(self, path: Path):
        self.path, self.files = path, [path]
        try:
            self._reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError, EOFError) as broken:
            raise InputError(f"{path} is not a whole GGUF file ({broken}).") from None
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        divisors = tuple(map(float, self.read(_ROPE))) if _ROPE in self._tensors else None
        tied = "output.weight" not in self._tensors
        self.config: DecoderConfig = config_from_gguf(self.fields(), tied, divisors, str(path))
        if divisors and len(divisors) != self.config.head_dim // 2:
            raise InputError(f"{path}: {_ROPE} has {len(divisors)} values, not {self.config.head_dim // 2}.")
        kinds = [t.tensor_type.name for t in self._reader.tensors if ".ffn_" in t.name and len(t.shape) == 2]
        self.description = f"gguf {max(set(kinds), key=kinds.count)}" if kinds else "gguf"

    def fields(self) -> Mapping[str, Any]:
        """The header's key/value pairs that a decoder's shape is made of."""
        wanted = (
            k for k in self._reader.fields if k.startswith(("general.", "llama.")) or k == "tokenizer.ggml.tokens"
        )
        return {
            key: self._reader.fields[key].data if key.endswith(".tokens") else self._reader.fields[key].contents()
            for key in wanted
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32, kernels `[out, in]`, rotary pairs in the order (i, i + d/2).

        Raises:
          InputError: no such tensor, or a storage type the gguf package can't dequantize.
        """
        if name not in self._tensors:
            raise InputError(f"{self.path} lacks the tensor {name}.")
        tensor = self._tensors[name]
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise InputError(f"{self.path}: {name} has the unsupported type {tensor.tensor_type.name}.") from None
        # Pages of the mapping would count as this process's memory, in the end the whole file.
        if hasattr(mmap, "MADV_DONTNEED"):
            self._reader.data._mmap.madvise(mmap.MADV_DONTNEED)  # pyright: ignore[reportAttributeAccessIssue]
        if not name.endswith(_ROTARY):
            return values
        # llama.cpp interleaves each head's rotary pairs: rows (2i, 2i + 1) there are (i, i + d/2) here.
        head = self.config.head_dim
        if len(values) % head:
            raise InputError(f"{self.path}: {name} has {len(values)} rows, which are no whole heads of {head}.")
        return values.reshape(-1, head // 2, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
