"""Greedy and sampled generation: of one text, streamed token by token, and of many prompts at once.

Ops and bytes of a step for `b` texts; in brackets those of the default model in float32 with 256 slots:

- weights: all bytes are read once whatever `b` is (538 MB), and 2 operations per weight and text (269 MFLOP × b);
- cache: all slots of every text are read, the empty ones too (46 kB × slots × b, 11.8 MB × b);
- logits: 4 bytes per token of the vocabulary and text (197 kB × b).

One text is bound by the weights' bytes: a step takes 21 ms on two cores of an AMD EPYC. With 32 texts it takes about
60 ms: projections and head 34 ms, attention 19 ms. Beyond that attention's products of a single query, which sum along
the keys' last axis, grow faster than the number of texts: 64 texts give no more tokens per second than 32.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from jquant.data import check_tokens, check_whole
from jquant.errors import InputError
from jquant.io.language_model import LanguageModel
from jquant.kernels.choose import attention
from jquant.learning.objectives import top_k as largest
from jquant.models.cache import Cache
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Block, Decoder, rotary_table
from jquant.qtensor import prepared

# Tokens that `_draw` takes together. A vocabulary of 49,152 has 384 such blocks.
BLOCK = 128


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
    check_whole(0, seed=seed)
    check_sampling(np.asarray(prompt)[None], decoder.config, Sampling(tokens, temperature, top_k))
    slots, config = len(prompt) + tokens, decoder.config
    # Slots in steps of 256, so that prompts of similar length share one compilation.
    slots = min(-(-slots // 256) * 256, config.context_length)
    leaves, structure = jax.tree.flatten(in_steps(decoder))
    cache = Cache.init(config, 1, slots, decoder.dtype, decoder.cached)
    key, token = jax.random.key(seed), jnp.asarray(prompt)[None]
    if tokens:
        token, cache = _advance(structure, leaves, token, cache, (key, 0), (temperature, top_k))
    for index in range(tokens):
        ready = token
        if index + 1 < tokens:
            # Dispatched before the token is read, so that Python's share overlaps with the next step.
            token, cache = _advance(structure, leaves, token, cache, (key, index + 1), (temperature, top_k))
        yield int(np.asarray(ready)[0, 0])


class Sampling(NamedTuple):
    """How a text goes on; see `generate`."""

    tokens: int
    temperature: float
    top_k: int | None


def generate_batch(
    decoder: Decoder,
    prompts: Sequence[np.ndarray] | np.ndarray,
    keys: Array,
    *,
    tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
) -> Int[np.ndarray, "b tokens"]:
    """The `tokens` ids that continue each of several prompts, all generated at once.

    The prompts have one length: then nothing is padded or masked, and every text has its tokens at the same positions
    as alone. A text depends on its own prompt and key only. Alone it has the same logits up to rounding (products of
    another shape may add in another order), so a sampled text may take another way there. The loop over the tokens
    runs on the device; no token is read before the last one is there.

    Args:
      decoder: float or quantized.
      prompts: ids, `[b, n]` or `b` arrays of `n`.
      keys: typed keys `[b]`, one a prompt; unused at temperature 0.
      tokens: how many for each; an end-of-sequence token ends nothing.
      temperature: as of `generate`.
      top_k: as of `generate`.

    Raises:
      InputError: prompts of several lengths, or not one key a prompt; otherwise as of `generate`.
    """
    lengths = {np.size(prompt) for prompt in prompts}
    if len(lengths) > 1:
        raise InputError(
            f"Prompts that are continued together have one length; these have from {min(lengths)} to {max(lengths)} "
            f"tokens: give those of each length to a call of their own."
        )
    sampling, start = Sampling(tokens, temperature, top_k), np.asarray(prompts)
    check_sampling(start, decoder.config, sampling)
    if keys.shape != start.shape[:1] or not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        raise InputError(
            f"{len(start)} prompts take as many typed keys, not {keys.dtype} {list(keys.shape)}: "
            f"jax.random.split(jax.random.key(seed), {len(start)}) makes them."
        )
    if tokens == 0:
        return np.empty((len(start), 0), np.int32)
    leaves, structure = jax.tree.flatten(in_steps(decoder))
    slots = start.shape[1] + tokens - 1  # the last token is not read
    cache = Cache.init(decoder.config, len(start), slots, decoder.dtype, decoder.cached)
    logits, cache = step(structure, leaves, jnp.asarray(start, jnp.int32), cache)
    return np.asarray(_continue(structure, leaves, logits, cache, keys, sampling)[0])


def check_sampling(prompts: np.ndarray, config: DecoderConfig, sampling: Sampling) -> None:
    """Raises InputError for prompts that can't be continued so."""
    tokens, temperature, top_k = sampling
    check_whole(0, tokens=tokens)
    check_whole(1, top_k=1 if top_k is None else top_k)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
        raise InputError(f"temperature takes a finite number from 0, not {temperature!r}.")
    if prompts.size == 0:
        raise InputError("The prompt has no tokens.")
    if prompts.shape[-1] + tokens > config.context_length:
        raise InputError(
            f"A prompt of {prompts.shape[-1]} tokens and {tokens} new ones exceed the context of "
            f"{config.context_length}."
        )
    if top_k is not None and top_k > config.vocab_size:
        raise InputError(f"top_k={top_k} is more than the model's {config.vocab_size} tokens.")
    check_tokens(prompts, config, "The prompt's ids")


def in_steps(decoder: Decoder) -> tuple[Decoder, tuple[Block, ...]]:
    """The decoder without its layers, and the layers one by one, with the fastest products and attention there are."""
    outside = nnx.merge(*nnx.split(decoder))
    outside.segments = nnx.List([])
    layers, of_one = unstack(decoder), attention(decoder.norm.scale.get_value(), decoder.config.head_dim)
    for layer in layers:
        layer.attention.of_one = of_one
    return prepared((outside, layers))


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

    `leaves` and `structure` are the flattened result of `in_steps`. Flattening 30 Flax modules for every token would
    take 3 ms, a sixth of the default model's step.
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


@partial(jax.jit, static_argnames=("structure", "sampling"), donate_argnames="cache")
def _continue(
    structure: Any, leaves: list[Array], logits: Float[Array, "b vocab"], cache: Cache, keys: Array, sampling: Sampling
) -> tuple[Int[Array, "b tokens"], Cache]:
    """The ids of all texts from the logits after their prompts; and the cache, so that its buffers are donated."""

    def following(so_far: tuple[Array, Cache], index: Array) -> tuple[tuple[Array, Cache], Array]:
        logits, cache = so_far
        token = _pick_each(logits, keys, index, sampling)
        return step(structure, leaves, token[:, None], cache), token

    (logits, cache), ids = jax.lax.scan(following, (logits, cache), jnp.arange(sampling.tokens - 1))
    last = _pick_each(logits, keys, sampling.tokens - 1, sampling)
    return jnp.concatenate([ids, last[None]]).T, cache


def _pick_each(
    logits: Float[Array, "b vocab"], keys: Array, index: int | Array, sampling: Sampling
) -> Int[Array, " b"]:
    _, temperature, top_k = sampling
    if temperature == 0:
        return jnp.argmax(logits, -1)
    logits = logits if top_k is None else _among(logits, top_k)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
    return jax.vmap(_draw)(keys, logits / temperature)


def _draw(key: Array, logits: Float[Array, " vocab"]) -> Int[Array, ""]:
    """A token with its probability: first its block, by the block's summed probability, and then the token in it.

    `jax.random.categorical` takes one random number a token. Those of 32 × 49,152 tokens take 14 ms on two cores,
    where the rest of the step takes 60 ms; a hundredth of them is enough here.
    """
    blocks = _in_blocks(logits)
    of_block, of_token = jax.random.split(key)
    block = jax.random.categorical(of_block, jax.nn.logsumexp(blocks, -1))
    return block * BLOCK + jax.random.categorical(of_token, blocks[block])


def _in_blocks(logits: Float[Array, "*b vocab"]) -> Float[Array, "*b blocks block"]:
    """Logits in blocks, the last one filled up with −∞."""
    filled = [(0, 0)] * (logits.ndim - 1) + [(0, -logits.shape[-1] % BLOCK)]
    return jnp.pad(logits, filled, constant_values=-jnp.inf).reshape(*logits.shape[:-1], -1, BLOCK)


def _among(logits: Float[Array, "b vocab"], top_k: int) -> Float[Array, "b vocab"]:
    """Logits with −∞ for tokens less likely than the `top_k`-th."""
    return jnp.where(logits < largest(logits, top_k)[0][:, -1:], -jnp.inf, logits)


@partial(jax.jit, static_argnames=("structure", "how"), donate_argnames="cache")
def _advance(
    structure: Any, leaves: list[Array], tokens: Int[Array, "b t"], cache: Cache, draw: tuple[Array, Any], how: Any
) -> tuple[Int[Array, "b 1"], Cache]:
    """One program a token: `step`, and the next token by the temperature and top_k of `how`.

    Args:
      structure: see `step`.
      leaves: see `step`.
      tokens: the newest ones.
      cache: of those before them.
      draw: a key, and the number of the next token among the new ones.
      how: temperature and top_k.
    """
    logits, cache = step(structure, leaves, tokens, cache)
    (key, index), (temperature, top_k) = draw, how
    if temperature == 0:
        return jnp.argmax(logits, -1)[:, None], cache
    if top_k is not None:
        logits = _among(logits, top_k)
    return jax.random.categorical(jax.random.fold_in(key, index), logits / temperature)[:, None], cache


def _until(ids: Iterator[int], stop: tuple[int, ...]) -> Iterator[int]:
    for token in ids:
        if token in stop:
            return
        yield token
