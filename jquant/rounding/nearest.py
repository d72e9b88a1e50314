"""Round to nearest (RTN): every weight on its own."""

from dataclasses import dataclass

from jax import Array
from jaxtyping import Float

from jquant.formats import Format
from jquant.qtensor import QTensor, Stored, quantize
from jquant.rounding.info import SolveInfo, solve_info
from jquant.stats import check_gram


@dataclass(frozen=True)
class Nearest:
    """Each weight takes its nearest code; the Gram matrices serve only to report the error."""

    needs = frozenset()

    def __call__(
        self,
        w: Float[Array, "in out"],
        scale: Stored,
        zero: Stored,
        gram: Float[Array, "in in"] | None,
        format: Format,
        held_out: Float[Array, "in in"] | None = None,
    ) -> tuple[QTensor, SolveInfo]:
        """See `Rounding`."""
        check_gram(gram, w)
        check_gram(held_out, w)
        q = quantize(w, scale, zero, format)
        return q, solve_info(w, q, gram, held_out)
