"""Formats: frozen, hashable specifications that map weights to integer codes and back.

A format defines four things: the values of its codes (`encode`, `decode`), how the end points of a group become a scale
and zero (`grid`), which weights share them (`group`), and how codes and scales are stored (`bits`, `scale`: a dtype, or
another format). A range (`ranges/`) chooses the end points; a rounding (`rounding/`) chooses the codes.

Weights are `[*l, in, out]` throughout. Groups run along `in`: row i belongs to group i // group, and the last group may
be short. Formats compare by value, so equal formats share a jit compilation.
"""

from jquant.formats.base import Block, Format, Group, block_shape, expand, grouped, real_members, tile_of
from jquant.formats.codebook import (
    FP4,
    IQ4_NL_LEVELS,
    NF3,
    NF4,
    NF4_LEVELS,
    SEQ,
    Codebook,
    double_quantized,
    dynamic_levels,
    normal_float_levels,
)
from jquant.formats.columns import ColumnCodebook
from jquant.formats.floating import (
    FP8_E4M3,
    FP8_E5M2,
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    NVFP4,
    Float,
)
from jquant.formats.integer import Int, UInt
from jquant.formats.lattice import E8P
from jquant.formats.packing import pack, unpack
from jquant.formats.trellis import Trellis
from jquant.formats.vectors import Additive, VectorCodebook
from jquant.parts import LEVELS, NAMED

# llama.cpp's block types (ggml-common.h). A super-block of 256 weights is a group of 8 or 16 quantized scales.
GGUF: dict[str, Format] = {
    "Q4_0": Int(4, 32, symmetric=True, ties="up"),
    "Q4_1": Int(4, 32, zero="float", ties="up"),
    "Q5_0": Int(5, 32, symmetric=True, ties="up"),
    "Q5_1": Int(5, 32, zero="float", ties="up"),
    "Q8_0": Int(8, 32, symmetric=True, ties="away"),
    "Q2_K": Int(2, 16, zero="float", scale=UInt(4, 16)),
    "Q3_K": Int(3, 16, symmetric=True, scale=Int(6, 16, symmetric=True)),
    "Q4_K": Int(4, 32, zero="float", scale=UInt(6, 8)),
    "Q5_K": Int(5, 32, zero="float", scale=UInt(6, 8)),
    "Q6_K": Int(6, 16, symmetric=True, scale=Int(8, 16, symmetric=True)),
    "IQ4_NL": Codebook(IQ4_NL_LEVELS, 32, "float16"),
}

# What `print` calls them.
NAMED.update({format: name for name, format in GGUF.items()})
NAMED.update({MXFP4: "MXFP4", MXFP6_E2M3: "MXFP6_E2M3", MXFP6_E3M2: "MXFP6_E3M2", MXFP8_E4M3: "MXFP8_E4M3"})
NAMED.update({MXFP8_E5M2: "MXFP8_E5M2", NVFP4: "NVFP4", double_quantized(): "double_quantized(256)"})
LEVELS.update({named().levels: named.__name__ for named in (NF4, NF3, FP4)})

__all__ = [
    "E8P",
    "FP4",
    "FP8_E4M3",
    "FP8_E5M2",
    "GGUF",
    "IQ4_NL_LEVELS",
    "MXFP4",
    "MXFP6_E2M3",
    "MXFP6_E3M2",
    "MXFP8_E4M3",
    "MXFP8_E5M2",
    "NF3",
    "NF4",
    "NF4_LEVELS",
    "NVFP4",
    "SEQ",
    "Additive",
    "Block",
    "Codebook",
    "ColumnCodebook",
    "Float",
    "Format",
    "Group",
    "Int",
    "Trellis",
    "UInt",
    "VectorCodebook",
    "block_shape",
    "double_quantized",
    "dynamic_levels",
    "expand",
    "grouped",
    "normal_float_levels",
    "pack",
    "real_members",
    "tile_of",
    "unpack",
]
