"""A decoder with its tokenizer, and what is known of both."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jquant.io.tokenizer import Tokenizer
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Decoder


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
      calibrated_on: hashes of the runs of tokens (`data.run_hashes`) of the texts that the weights were fitted to, on
        which `perplexity` does not judge them; None where there were none.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    name: str
    stored_as: str
    report: dict[tuple[int, str], Any] = field(default_factory=dict)
    calibrated_on: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def config(self) -> DecoderConfig:
        """The decoder's shape."""
        return self.decoder.config
