"""Where each of a decoder's parameters is in the files of its family."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from jquant.models.config import DecoderConfig
from jquant.models.decoder import parameter_shapes
from jquant.models.families import family_of

BLOCKS = "segments."  # prefix of the stacked layers' parameters


@dataclass(frozen=True)
class TensorPlace:
    """Where a parameter is in a file.

    Attributes:
      name: of the tensor.
      shape: of the tensor.
      transposed: whether it holds a kernel `[out, in]`.
      offset: what is added to its values.
      columns: those of the parameter, `[*, out]`, among the tensor's, once that is `[*, out]`, too; a slice or numbers.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool
    offset: float = 0.0
    columns: Any = field(default_factory=lambda: slice(None))

    @property
    def numbers(self) -> Int[np.ndarray, " out"]:
        """Those of the parameter's columns."""
        return np.arange(self.shape[0 if self.transposed else -1])[self.columns]

    def of(self, stored: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "*_ out"]:
        """The parameter in the file's tensor."""
        values = (stored.T if self.transposed else stored)[..., self.columns]
        return np.asarray(values, np.float32) + np.float32(self.offset) if self.offset else values

    def put(self, stored: Shaped[np.ndarray, "..."], values: Shaped[np.ndarray, "*_ out"]) -> None:
        """Writes the parameter into the file's tensor; the inverse of `of`."""
        own = values.astype(np.float32) - np.float32(self.offset) if self.offset else values
        (stored.T if self.transposed else stored)[..., self.columns] = own


def place_of(config: DecoderConfig, format: str, name: str, layer: Any = ...) -> TensorPlace:
    """Where a parameter, "embedding" or "layers.mlp.up.kernel", e.g., of a layer is in a file.

    Args:
      config: the decoder's.
      format: "hf" or "gguf".
      name: as in the family's table.
      layer: its number, for a block's parameter.
    """
    family, shapes = family_of(config), parameter_shapes(config)

    def shape_of(name: str) -> tuple[int, ...]:
        inner = name.removeprefix("layers.")
        return shapes[name] if inner == name else shapes[f"{BLOCKS}0.{inner}"][1:]

    hf = format == "hf"
    turned = hf and family.hf_turned and name.startswith("layers.")
    widths = {other: shape_of(other)[-1] for other in family.fused_with(format, name)}
    shape = (*shape_of(name)[:-1], sum(widths.values()))
    transposed = name.endswith("kernel") and not turned
    return TensorPlace(
        getattr(family, format)[name].format(layer),
        shape[::-1] if transposed else shape,
        transposed,
        family.hf_norm_offset if hf and name.endswith("scale") else 0.0,
        family.columns(format, name, widths, config.head_dim),
    )
