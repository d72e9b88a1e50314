"""GGUF files: header, tensors as floats, and quantized blocks as QTensors."""

from jquant.io.gguf.blocks import block_size, from_blocks, to_blocks
from jquant.io.gguf.header import Header, Tensor, read_header, read_metadata
from jquant.io.gguf.tensors import GGUFCheckpoint

__all__ = [
    "GGUFCheckpoint",
    "Header",
    "Tensor",
    "block_size",
    "from_blocks",
    "read_header",
    "read_metadata",
    "to_blocks",
]
