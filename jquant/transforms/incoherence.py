"""Random rotations of a weight's inputs and outputs, undone when the model runs (QuIP#, arXiv 2402.04396, §3)."""

from dataclasses import dataclass

from jax import Array
from jaxtyping import Float

from jquant.rotations import Rotation, apply


@dataclass(frozen=True)
class Incoherence:
    """Rounds Qᵢₙᵀ W Qₒᵤₜ in place of W; x @ W is then ((x Qᵢₙ) @ Ŵ) Qₒᵤₜᵀ, which takes two fast transforms more.

    Both rotations are random signs times a Hadamard matrix (`jquant.rotations`). They spread outliers over the whole
    matrix and make its values nearly normal. The statistics turn along. Unlike `Hadamard`, it turns each weight alone,
    so a plan may turn some weights only, and no norm is folded.

    Attributes:
      seed: of the inputs' signs; the outputs' have the next one.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        Rotation(1, self.seed)  # checks the seed

    def rotations(self, shape: tuple[int, ...]) -> tuple[Rotation, Rotation]:
        """Qᵢₙ and Qₒᵤₜ of a weight `[*l, in, out]`."""
        return Rotation(shape[-2], self.seed), Rotation(shape[-1], self.seed + 1)

    def turn(self, w: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """Qᵢₙᵀ W Qₒᵤₜ."""
        inputs, outputs = self.rotations(w.shape)
        return apply(apply(w.T, inputs).T, outputs)

    def turn_gram(self, gram: Float[Array, "in in"]) -> Float[Array, "in in"]:
        """Qᵢₙᵀ H Qᵢₙ, the Gram matrix of turned inputs; exactly symmetric."""
        return _turned(gram, self.rotations(gram.shape)[0])

    def turn_output_gram(self, gram: Float[Array, "out out"]) -> Float[Array, "out out"]:
        """Qₒᵤₜᵀ H Qₒᵤₜ, the Gram matrix of gradients at turned outputs; exactly symmetric."""
        return _turned(gram, self.rotations(gram.shape)[1])


def _turned(gram: Float[Array, "n n"], rotation: Rotation) -> Float[Array, "n n"]:
    turned = apply(apply(gram, rotation).T, rotation)
    return (turned + turned.T) / 2
