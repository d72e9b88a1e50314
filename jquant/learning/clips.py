"""Ranges learned on the calibration cross-entropy, by gradients through the whole decoder."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jquant.composition import Choices, Method, Tuning
from jquant.errors import InputError
from jquant.learning.fake_quant import FakeQuantized
from jquant.learning.loop import Learned, Task, fit
from jquant.learning.losses import model_loss
from jquant.learning.tuning import split
from jquant.models.decoder import Decoder, blocks, with_blocks
from jquant.models.params import flat_params, with_params
from jquant.ranges import LossSearch


def learn_clips(
    decoder: Decoder, layers: Sequence[Choices], tokens: Int[np.ndarray, "n context"]
) -> dict[int, dict[str, Float[Array, "groups columns"]]]:
    """Factors on the scales of every weight whose range is a `LossSearch`, learned together.

    Args:
      decoder: float, all of it.
      layers: the methods of each layer's weights, as in `pipeline.plan.Plan`.
      tokens: calibration windows.

    Returns:
      layer -> path within it -> factors. Weights with other ranges are float while these are learned. `LossSearch` says
      what it costs.

    Raises:
      InputError: `LossSearch` ranges with different steps, windows or rates; one that starts from quantized scales; a
        step whose gradient is not finite.
    """
    search = _shared_search(layers)
    if search is None:
        return {}
    rounded = _rounded(decoder, layers)
    student = split(rounded)
    start = lambda: {  # noqa: E731
        path: {"log_clip": jnp.zeros(kernel.scale.shape, jnp.float32)} for path, kernel in student.kernels.items()
    }
    stage = Tuning(search.steps, search.windows, search.rate, text=1.0, schedule="constant", compute="float32")
    frozen, (count, context) = (student, decoder), tokens.shape
    batch = lambda _, which: tokens[which]  # noqa: E731
    task = Task("LossSearch", start, model_loss, frozen, batch, count, context, student.packed)
    return _by_layer(rounded, fit(task, stage))


def _shared_search(layers: Sequence[Choices]) -> LossSearch | None:
    """A range with the steps, windows and rate of all weights that learn theirs; their initial ranges may differ."""
    methods = dict.fromkeys(method for choices in layers for _, method in choices)
    ranges = [method.range for method in methods if isinstance(method.range, LossSearch)]
    if len({(search.steps, search.windows, search.rate) for search in ranges}) > 1:
        raise InputError("A plan's LossSearch ranges are learned together: give them the same steps, windows and rate.")
    return ranges[0] if ranges else None


def _rounded(decoder: Decoder, layers: Sequence[Choices]) -> Decoder:
    """The decoder with fake-quantized kernels where a range is learned."""
    fake = []
    for block, choices in zip(blocks(decoder), layers, strict=True):
        params = flat_params(block)
        kernels = {
            path: _fake(params[path], method) for path, method in choices if isinstance(method.range, LossSearch)
        }
        fake.append(with_params(block, kernels))
    return with_blocks(decoder, fake)


@partial(jax.jit, static_argnames="method")
def _fake(w: Float[Array, "in out"], method: Method) -> FakeQuantized:
    assert isinstance(method.range, LossSearch)
    w = w.astype(jnp.float32)
    return FakeQuantized.on_grid(w, *method.range.initial(w, method.format), method.format, w.shape)


def _by_layer(decoder: Decoder, logs: Learned) -> dict[int, dict[str, Array]]:
    """The factors of each layer's weights; a decoder's segments of stacked layers follow one another."""
    learned: dict[int, dict[str, Array]] = {}
    for index, segment in enumerate(decoder.segments):
        stacks = {".".join(path[2:]): jnp.exp(log["log_clip"]) for path, log in logs.items() if path[1] == index}
        for layer in range(segment.mlp_norm.scale.get_value().shape[0]):
            learned[len(learned)] = {path: stack[layer] for path, stack in stacks.items()}
    return learned
