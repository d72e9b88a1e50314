"""Which parts of a decoder are rotated (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406)."""

from dataclasses import dataclass

from jquant.errors import InputError
from jquant.rotations import Rotation


@dataclass(frozen=True)
class Hadamard:
    """Which parts of a decoder are rotated before its blocks are quantized; the arguments of `jquant.rotate`.

    Attributes:
      residual: the residual stream; the norms' gains are folded into the weights that read it.
      heads: every value head's channels.
      mlp: the input of `down`, which costs a fast transform when the model runs.
      seed: of the random signs; None for no signs.
    """

    residual: bool = True
    heads: bool = True
    mlp: bool = True
    seed: int | None = 0

    def __post_init__(self) -> None:
        Rotation(1, self.seed)  # checks the seed
        if not (self.residual or self.heads or self.mlp):
            raise InputError("Hadamard rotates the residual stream, the heads or the MLP: all three are off.")
