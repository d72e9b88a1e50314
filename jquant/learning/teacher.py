"""What a step learns from: the float model itself, or its most likely next tokens, computed once and kept.

The k most likely tokens and their log-probabilities take 8 · k bytes a token; the float model's blocks are then not
needed, nor is their forward pass in every step. The probability of all other tokens together is the (k + 1)-th of the
distribution that is learned, so the divergence from it is at most that from the whole distribution.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jquant.composition import Tuning
from jquant.errors import InputError
from jquant.io.kept import Kept
from jquant.learning.losses import computing_in, head_of
from jquant.learning.objectives import map_rows, top_k
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Decoder, identity, outside_of
from jquant.progress import Progress
from jquant.provenance import array_digest, code_of, packages

WINDOWS = 8  # in a file, and in a forward pass

BatchOf = Callable[[Int[np.ndarray, " windows"]], Any]


def check_top_k(tuning: Tuning, config: DecoderConfig) -> None:
    """Raises InputError for more tokens a prediction than the vocabulary has beside the others."""
    if tuning.top_k is not None and tuning.top_k >= config.vocab_size:
        raise InputError(f"Tuning's top_k={tuning.top_k} is not below the model's {config.vocab_size} tokens.")


def batches_of(
    teacher: Decoder, tokens: Int[np.ndarray, "n context"], tuning: Tuning, tell: Progress
) -> tuple[Decoder, BatchOf]:
    """The teacher that a step needs, and a function that gives the batch of some windows.

    With `tuning.top_k` the teacher is its embedding, norm and head, and a batch is (tokens, log-probabilities `[b,
    t − 1, k]`, ids `[b, t − 1, k]`); else the batch is the tokens.

    Args:
      teacher: the float model.
      tokens: all windows.
      tuning: a stage with target "model".
      tell: progress, called with ("teach", windows done, windows in all).

    Raises:
      InputError: the cache can't be written.
    """
    if tuning.top_k is None or tuning.text == 1:
        return teacher, lambda which: tokens[which]
    log_p, ids = predictions(teacher, tokens, tuning.top_k, tuning.compute, tell)
    return outside_of(teacher), lambda which: (tokens[which], log_p[which], ids[which])


def predictions(
    teacher: Decoder, tokens: Int[np.ndarray, "n context"], k: int, compute: str, tell: Progress
) -> tuple[Float[np.ndarray, "n t k"], Int[np.ndarray, "n t k"]]:
    """Log-probabilities and ids of the k likeliest next tokens, likeliest first, t = context − 1.

    They are kept in the cache's folder `teacher`, and read from there the next time.
    """
    n, context = tokens.shape
    recipe = {
        "teacher": identity(teacher),
        "tokens": array_digest(tokens),
        "k": k,
        "compute": compute,
        "code": code_of(None, [__name__]),
        "packages": packages(),
        "device": jax.devices()[0].device_kind,
    }
    kept, shape = Kept.of("teacher", recipe), (n, context - 1, k)
    log_p, ids = np.empty(shape, np.float32), np.empty(shape, np.int32)
    for begin in range(0, n, WINDOWS):
        some = slice(begin, min(begin + WINDOWS, n))
        make = partial(_predictions, teacher, tokens[some], k, compute)
        part = kept.arrays(begin // WINDOWS, dict.fromkeys(("log_p", "ids"), log_p[some].shape), make)
        log_p[some], ids[some] = part["log_p"], part["ids"]
        tell("teach", some.stop, n)
    return log_p, ids


def _predictions(teacher: Decoder, tokens: np.ndarray, k: int, compute: str) -> dict[str, np.ndarray]:
    log_p, ids = _top(teacher, tokens, k, compute)
    return {"log_p": np.asarray(log_p), "ids": np.asarray(ids)}


@partial(jax.jit, static_argnames=("k", "compute"))
def _top(teacher: Decoder, tokens: Int[Array, "b t"], k: int, compute: str) -> tuple[Array, Array]:
    head = head_of(teacher, compute)

    def rows(states: Array) -> tuple[Array, Array]:
        logits = head(states)
        values, ids = top_k(logits, k)
        return values - jax.nn.logsumexp(logits, -1, keepdims=True), ids.astype(jnp.int32)

    return map_rows(rows, computing_in(compute, teacher).hidden(tokens)[:, :-1])
