"""A decoder with its tokenizer and their origin."""

import difflib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from jquant.errors import InputError
from jquant.io.save import save_model
from jquant.io.tokenizer import Tokenizer
from jquant.models.adapters import Adapted
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Decoder, blocks
from jquant.models.families import family_of
from jquant.models.params import flat_params, weight_name
from jquant.models.size import size_of
from jquant.parts import brief
from jquant.qtensor import QTensor
from jquant.report import Report

KINDS = 6  # formats that a model's repr names


@dataclass(frozen=True)
class LanguageModel:
    """A decoder, its tokenizer, and where they came from.

    Attributes:
      decoder: the Flax NNX module; its kernels may be QTensors, or `Adapted`.
      tokenizer: text to ids and back.
      name: what the user called it.
      stored_as: how the checkpoint stored the weights, e.g. "gguf Q4_1". Rounding weights that are already on a 4-bit
        grid is another experiment than rounding full-precision weights.
      report: (layer, path) -> SolveInfo of each quantized weight; empty for a float model.
      calibrated_on: hashes (`data.run_hashes`) of the calibration texts' runs of tokens; `perplexity` refuses these
        texts. None without calibration.
      source_files: texts of the small files beside the original weights, by name, which exports hand on: config.json
        and the tokenizer's settings. Empty for a .gguf file.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    name: str
    stored_as: str
    report: Report = field(default_factory=Report)
    calibrated_on: np.ndarray | None = field(default=None, repr=False, compare=False)
    source_files: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def config(self) -> DecoderConfig:
        """The decoder's shape."""
        return self.decoder.config

    def __repr__(self) -> str:
        config, size = self.config, size_of(self.decoder)
        kinds = Counter[str]()
        for segment in self.decoder.segments:
            for name, leaf in flat_params(segment).items():
                if name.endswith("kernel"):
                    kinds[_kind(leaf)] += leaf.shape[0]
        named = [f"{count} of {kind}" for kind, count in kinds.most_common(KINDS)]
        more = [f"{len(kinds) - KINDS} more formats"] if len(kinds) > KINDS else []
        lines = [
            f"LanguageModel {self.name}: {config.layers} layers, {config.hidden} wide, {config.vocab_size} tokens; "
            f"its weights were stored as {self.stored_as}",
            f"projections: {', '.join(named + more)}; {size.bits_per_weight:.3f} bits/weight",
            f"{size.megabytes:.1f} MB with embedding, head and norms in {self.decoder.dtype}",
        ]
        lines += [repr(self.report)] if self.report else []
        return "\n  ".join(lines)

    def weight(self, name: str) -> Any:
        """A weight by its name, `[in, out]`: a float array or a QTensor; "layers.3.attention.v.kernel", e.g.

        Raises:
          InputError: there is no such weight; the message gives the nearest names.
        """
        layer, path = self.place_of(name)
        return flat_params(next(islice(blocks(self.decoder), layer, None)))[path]

    def place_of(self, name: str) -> tuple[int, str]:
        """A projection's layer and its path within the block. InputError as of `weight`."""
        paths = family_of(self.config).weights
        places = {weight_name(layer, path): (layer, path) for layer in range(self.config.layers) for path in paths}
        if name not in places:
            near = difflib.get_close_matches(name, places, n=3, cutoff=0.0)
            raise InputError(f"{self.name} has no weight {name!r}; the nearest names are {', '.join(near)}.")
        return places[name]

    def save(self, folder: str | Path) -> None:
        """Writes the model into a folder that `load_model` reads: the same logits bit for bit, report, `calibrated_on`.

        Weights stay packed as they are in memory. The folder is written completely or not at all.

        Args:
          folder: a new or empty one.

        Raises:
          InputError: the folder is not empty or can't be written; a part that a checkpoint can't hold, such as
            a format of one's own, or an adapter (`save_adapters`).
        """
        save_model(folder, self, self.decoder, self.calibrated_on, self.report)


def _kind(kernel: Any) -> str:
    """A kernel's format or dtype, and the rank of its adapter."""
    if isinstance(kernel, Adapted):
        return f"{_kind(kernel.base)} with an adapter of rank {kernel.rank}"
    return brief(kernel.format) if isinstance(kernel, QTensor) else str(kernel.dtype)
