"""The contract of every transform that scales channels."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from jax import Array
from jaxtyping import Float

from jquant.formats import Format


@runtime_checkable
class Transform(Protocol):
    """Chooses the scales of a site's input channels; the pipeline folds their inverse into the producer."""

    @property
    def needs(self) -> frozenset[Any]:
        """The keywords of its call: "gram", "abs_mean", "abs_max", or statistics of one's own (`Statistic`)."""
        ...

    def __call__(
        self, weights: Sequence[Float[Array, "in _"]], formats: Sequence[Format], /, *_: Any, **seen: Any
    ) -> Float[Array, " in"]:
        """The scale by which input channels are multiplied, positive.

        Args:
          weights: the matrices that read the input.
          formats: what each will be rounded to.
          seen: only what `needs` names, by name. "gram" and statistics of one's own are lists with a value for each
            weight, since weights may weight tokens differently. "abs_mean" and "abs_max" are `[in]`: the mean and the
            maximum over channels that must share a scale.
        """
        ...
