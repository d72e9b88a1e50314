"""What every transform that scales channels offers."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from jax import Array
from jaxtyping import Float

from jquant.formats import Format


@runtime_checkable
class Transform(Protocol):
    """Chooses the scale of a site's input channels; the pipeline folds its inverse into what produces them."""

    @property
    def needs(self) -> frozenset[Any]:
        """The statistics it looks at: "gram", "abs_mean", "abs_max", or statistics of one's own (`Statistic`)."""
        ...

    def __call__(
        self, weights: Sequence[Float[Array, "in _"]], formats: Sequence[Format], /, *_: Any, **seen: Any
    ) -> Float[Array, " in"]:
        """The scale by which input channels are multiplied, positive.

        Args:
          weights: the matrices that read the input.
          formats: what each will be rounded to.
          seen: just what `needs` names, by name. "gram", and statistics of one's own, are lists, one value a weight,
            since weights may count tokens differently. "abs_mean" and "abs_max" are `[in]`, already averaged (or the
            largest taken) over channels that must share a scale.
        """
        ...
