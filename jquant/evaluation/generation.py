"""Greedy and sampled generation that streams tokens."""

import math
from collections.abc import Iterator
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from jquant.data import check_tokens, check_whole
from jquant.errors import InputError
from jquant.io.language_model import LanguageModel
from jquant.models.cache import Cache
from jquant.models.decoder import Block, Decoder, rotary_table


def generate(
    model: LanguageModel,
    prompt: str,
    *,
    tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Yields the continuation of a prompt piece by piece, never a part of a character.

    Args:
      model: float or quantized.
      prompt: text to continue.
      tokens: the most to generate; an end-of-sequence token ends the text earlier.
      temperature: 0 takes the most likely token; otherwise logits are divided by it and sampled.
      top_k: sample among the k most likely tokens only.
      seed: of the sampling.

    Raises:
      InputError: an empty prompt, or one with ids that the model does not have; prompt and tokens exceed the model's
        context; an option out of range.
    """
    ids = model.tokenizer.encode(prompt)
    if model.tokenizer.add_bos and model.tokenizer.bos_id is not None:
        ids = np.concatenate([[model.tokenizer.bos_id], ids]).astype(np.int32)
    sampled = generate_ids(model.decoder, ids, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed)
    yield from model.tokenizer.stream(_until(sampled, model.tokenizer.eos_ids))


def generate_ids(
    decoder: Decoder,
    prompt: Int[np.ndarray, " n"],
    *,
    tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yields `tokens` ids that continue a prompt of ids; see `generate`."""
    check_whole(0, tokens=tokens, seed=seed)
    check_whole(1, top_k=1 if top_k is None else top_k)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
        raise InputError(f"temperature takes a finite number from 0, not {temperature!r}.")
    if len(prompt) == 0:
        raise InputError("The prompt has no tokens.")
    slots, config = len(prompt) + tokens, decoder.config
    if slots > config.context_length:
        raise InputError(
            f"A prompt of {len(prompt)} tokens and {tokens} new ones exceed the context of {config.context_length}."
        )
    if top_k is not None and top_k > config.vocab_size:
        raise InputError(f"top_k={top_k} is more than the model's {config.vocab_size} tokens.")
    check_tokens(np.asarray(prompt)[None], config, "The prompt's ids")
    # Slots in steps of 256, so that prompts of similar length share one compilation.
    slots = min(-(-slots // 256) * 256, config.context_length)
    leaves, structure = jax.tree.flatten((decoder, unstack(decoder)))
    cache = Cache.init(config, 1, slots, decoder.embedding.get_value().dtype)
    key = jax.random.key(seed)
    logits, cache = step(structure, leaves, jnp.asarray(prompt)[None], cache)
    for index in range(tokens):
        token = _pick(logits, key, index, temperature, top_k)
        if index + 1 < tokens:
            # Dispatched before the token is read, so that Python's share overlaps with the next step.
            logits, cache = step(structure, leaves, token[:, None], cache)
        yield int(token[0])


def unstack(decoder: Decoder) -> tuple[Block, ...]:
    """The decoder's layers one by one.

    Reading the weights' bytes bounds decoding. Slicing a layer out of the stack inside a scan copies each once more.
    """
    layers = []
    for segment in decoder.segments:
        graph, stack = nnx.split(segment)
        layers += [nnx.merge(graph, layer) for layer in _split(stack, jax.tree.leaves(stack)[0].shape[0])]
    return tuple(layers)


@partial(jax.jit, static_argnames="count")
def _split(stack: Any, count: int) -> list[Any]:
    return [jax.tree.map(itemgetter(i), stack) for i in range(count)]


@partial(jax.jit, static_argnames="structure", donate_argnames="cache")
def step(
    structure: Any, leaves: list[Array], tokens: Int[Array, "b t"], cache: Cache
) -> tuple[Float[Array, "b vocab"], Cache]:
    """Appends `tokens` to the cache; returns the float32 logits after the last of them, and the cache.

    `leaves` and `structure` are the flattened pair of the decoder and its unstacked layers; the decoder's own stack is
    not touched. Flattening 30 Flax modules for every token would take 3 ms, a sixth of the default model's step.
    """
    decoder, layers = jax.tree.unflatten(structure, leaves)
    x = decoder.embed(tokens)
    rotary = rotary_table(decoder.config, cache.length + jnp.arange(tokens.shape[1]))
    filled = []
    for layer, slots in zip(layers, cache.layers, strict=True):
        x, _, slots = layer(x, rotary, slots, cache.length)
        filled.append(slots)
    logits = decoder.logits(decoder.norm(x[:, -1]))
    return logits.astype(jnp.float32), Cache(tuple(filled), cache.length + tokens.shape[1])


@partial(jax.jit, static_argnames=("temperature", "top_k"))
def _pick(
    logits: Float[Array, "b vocab"], key: Array, index: int | Array, temperature: float, top_k: int | None
) -> Int[Array, " b"]:
    if temperature == 0:
        return jnp.argmax(logits, -1)
    if top_k is not None:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(jax.random.fold_in(key, index), logits / temperature)


def _until(ids: Iterator[int], stop: tuple[int, ...]) -> Iterator[int]:
    for token in ids:
        if token in stop:
            return
        yield token
