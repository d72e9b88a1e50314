"""Text that a model samples itself, in windows: training data for its quantized copy where there is no other data.

LLM-QAT (arXiv 2305.17888 §3.1) learns a quantized model on text that the float model has sampled. Window k is:

- the tokenizer's BOS; without one a token drawn uniformly from the vocabulary, as in the paper;
- after such a token, but not after BOS, the LIKELIEST most likely tokens one after another: few continuations of a
  random token make sense. The paper takes the first 3 to 5 tokens of a text so, its `generate_data.py` the 2 to 4
  after the drawn one;
- tokens sampled from the model's distribution to the window's end. An end-of-sequence token is one of them: the model
  goes on with what it expects after it, as in pretraining, where a window holds documents one after another.

Windows wait in the cache's folder `sampled`: one folder a recipe, one file a batch. Window k depends on the recipe and
on k alone, so the number of windows is not part of the recipe: a larger number adds files, and a killed run loses one
batch at most. The size of a batch is part of it: products of another shape round otherwise, and a sampled text that has
once gone another way stays different.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from jquant.data import check_whole
from jquant.errors import InputError
from jquant.evaluation.generation import Sampling, check_sampling, generate_batch
from jquant.io.kept import Kept
from jquant.io.language_model import LanguageModel
from jquant.models.decoder import Decoder, identity
from jquant.progress import Progress, showing
from jquant.provenance import code_of, packages

BATCHES = {"cpu": 32, "gpu": 256, "tpu": 256}  # windows sampled at once, by the backend; whole batches are kept
# How many tokens after a random first one are the most likely ones; LLM-QAT's code has 2, 3 and 4.
LIKELIEST = 3


def sample_text(
    model: LanguageModel | Decoder,
    count: int,
    context: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    progress: Progress | bool = True,
) -> Int[np.ndarray, "count context"]:
    """Windows of token ids that the model samples; see the module. They are read from the cache if it has them.

    The same arguments give the same windows on the same machine, and the first ones of a larger `count` are those of a
    smaller one.

    Args:
      model: usually float; a decoder alone has no BOS.
      count: windows.
      context: tokens per window.
      temperature: logits are divided by it; 1 samples the model's own distribution.
      seed: of the sampling.
      progress: whether to show progress; or a function, called with ("generate", tokens done, tokens in all).

    Raises:
      InputError: an option out of range; the cache's folder can't be written.
    """
    decoder, bos = (model.decoder, model.tokenizer.bos_id) if isinstance(model, LanguageModel) else (model, None)
    check_whole(1, count=count)
    check_whole(2, context=context)
    check_whole(0, seed=seed)
    if temperature == 0:
        raise InputError("Text sampled at temperature=0 would be the same in every window; 1 is the model's own.")
    batch = BATCHES[jax.default_backend()]
    first = np.full((batch, 1), 0 if bos is None else bos, np.int32)
    check_sampling(first, decoder.config, Sampling(context - 1, temperature, None))
    recipe = {
        "model": identity(decoder),
        "bos": bos,
        "context": int(context),
        "temperature": float(temperature),
        "seed": int(seed),
        "batch": batch,
        "code": code_of(None, [__name__]),
        "packages": packages(),
        "device": jax.devices()[0].device_kind,
    }
    kept, batches, size = Kept.of("sampled", recipe), [], batch * context
    total = -(-count // batch)
    with showing(progress) as tell:
        for number in range(total):
            make = lambda number=number: {"tokens": _sample(decoder, recipe, number)}  # noqa: E731
            batches.append(kept.arrays(number, {"tokens": (batch, context)}, make)["tokens"])
            tell("generate", (number + 1) * size, total * size)
    return np.concatenate(batches)[:count]


def _sample(decoder: Decoder, recipe: dict[str, Any], number: int) -> Int[np.ndarray, "batch context"]:
    """The windows of a batch; window k has the seed's key folded with k."""
    batch, context, bos = recipe["batch"], recipe["context"], recipe["bos"]
    rows = number * batch + jnp.arange(batch)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(recipe["seed"]), rows)
    of_start, of_text = jax.vmap(jax.random.split, out_axes=1)(keys)
    if bos is not None:
        start = np.full((batch, 1), bos, np.int32)
    else:
        start = _random_start(decoder, of_start, min(LIKELIEST, context - 1))
    tokens, temperature = context - start.shape[1], recipe["temperature"]
    text = generate_batch(decoder, start, of_text, tokens=tokens, temperature=temperature)
    return np.concatenate([start, text], 1)


def _random_start(decoder: Decoder, keys: Array, likeliest: int) -> Int[np.ndarray, "batch start"]:
    """A random token a window, and the most likely ones after it."""
    draw = jax.vmap(lambda key: jax.random.randint(key, (1,), 0, decoder.config.vocab_size))
    first = np.asarray(draw(keys))
    return np.concatenate([first, generate_batch(decoder, first, keys, tokens=likeliest)], 1)
