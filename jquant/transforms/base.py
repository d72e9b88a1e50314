"""What every transform that scales channels offers."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jax import Array
from jaxtyping import Float

from jquant.formats import Format


@runtime_checkable
class Transform(Protocol):
    """Chooses the scale of a site's input channels; the pipeline folds its inverse into what produces them."""

    @property
    def needs(self) -> frozenset[str]:
        """The statistics it looks at: a subset of {"gram", "abs_mean", "abs_max"}."""
        ...

    def __call__(
        self, weights: Sequence[Float[Array, "in _"]], stats: Mapping[str, Any], formats: Sequence[Format]
    ) -> Float[Array, " in"]:
        """The scale by which input channels are multiplied, positive.

        `stats` holds "gram" as a list, one `[in, in]` a weight, the others as `[in]`, already averaged (or the largest
        taken) over channels that must share a scale.
        """
        ...
