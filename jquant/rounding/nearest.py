"""Round to nearest (RTN): every weight on its own."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jquant.formats import Format
from jquant.qtensor import QTensor, Stored, dequantize, quantize
from jquant.rounding.info import SolveInfo, output_energy
from jquant.stats import check_gram


@dataclass(frozen=True)
class Nearest:
    """Each weight takes its nearest code; the Gram matrix serves only to report the error."""

    needs = frozenset()

    def __call__(
        self,
        w: Float[Array, "in out"],
        scale: Stored,
        zero: Stored,
        gram: Float[Array, "in in"] | None,
        format: Format,
    ) -> tuple[QTensor, SolveInfo]:
        """See `Rounding`."""
        check_gram(gram, w)
        q = quantize(w, scale, zero, format)
        dead = jnp.int32(0) if gram is None else jnp.sum(jnp.diagonal(gram) == 0)
        error = output_energy(w - dequantize(q), gram)
        return q, SolveInfo(error, output_energy(w, gram), jnp.float32(0), jnp.int32(0), dead)
