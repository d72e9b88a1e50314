"""Plain safetensors: every weight dequantized to the model's dtype, for tools that know no quantization."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jquant.io.export.base import FolderFormat, Tensors, transposed
from jquant.parts import brief
from jquant.qtensor import QTensor, dequantize


def why_not(q: QTensor) -> str | None:
    """Why a weight can't be written so; None if it can. See `FolderFormat`."""
    if q.activation is not None:
        return f"its inputs are quantized ({brief(q.activation)}), which plain weights can't say"
    return None


def to_tensors(q: QTensor, dtype: str) -> Tensors:
    """The values of a weight `[in, out]`, as `[out, in]` in the model's dtype; float32 holds every format exactly."""
    return {"weight": transposed(dequantize(q, jnp.dtype(dtype)))}


def quantization_config(weights: Mapping[str, QTensor], floats: Sequence[str]) -> dict[str, Any] | None:
    """None: config.json says nothing of quantization."""
    return None


FORMAT = FolderFormat(why_not, to_tensors, quantization_config)
