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
from jquant.io.tokenizer import GrowingText
from jquant.kernels.choose import attention
from jquant.learning.objectives import top_k as largest
from jquant.models.cache import Cache
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Block, Decoder, SideBySide, outside_of
from jquant.models.rotary import rotary_table
from jquant.parallel.mesh import spread_over
from jquant.qtensor import prepared, side_by_side

# Tokens that `_draw` takes together. A vocabulary of 49,152 has 384 such blocks.
BLOCK = 128

# XLA's CPU scheduler by default begins with what depends on nothing: it dequantizes all weights before any product
# (428 MB for a prompt of 256 tokens on the default model in 4 bits; so 9 MB). Other compilers ignore it.
LEAST_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


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
    together = generate_many(model, [prompt], tokens=tokens, temperature=temperature, top_k=top_k, seed=seed)
    return (piece for _, piece in together)


def generate_many(
    model: LanguageModel,
    prompts: Sequence[str],
    *,
    tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[tuple[int, str]]:
    """Yields the continuations of several prompts as they come: the prompt's number, and a piece of its text.

    All go on together, one program a token. Prompts of any length: see `generate_batch`. A text ends by itself at its
    own end-of-sequence token. Arguments and errors are those of `generate`.
    """
    ids = [model.tokenizer.encode(prompt) for prompt in prompts]
    if model.tokenizer.add_bos and model.tokenizer.bos_id is not None:
        ids = [np.concatenate([[model.tokenizer.bos_id], each]).astype(np.int32) for each in ids]
    check_whole(0, seed=seed)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(ids)))
    steps = _in_lockstep(model.decoder, ids, keys, Sampling(tokens, temperature, top_k))
    texts = {row: GrowingText(model.tokenizer) for row in range(len(ids))}
    for new in steps:
        for row, token in new.items():
            if row not in texts:  # it has ended
                continue
            ended = token in model.tokenizer.eos_ids
            if piece := texts[row].end() if ended else texts[row].add(token):
                yield row, piece
            if ended:
                del texts[row]
        if not texts:
            return
    for row, text in texts.items():
        if piece := text.end():
            yield row, piece


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
    keys = jax.random.fold_in(jax.random.key(seed), 0)[None]
    for new in _in_lockstep(decoder, [np.asarray(prompt)], keys, Sampling(tokens, temperature, top_k)):
        yield new[0]


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

    Nothing is padded or masked: all texts are at the same position in every step, and every text has its tokens where
    it has them alone. The prompts are read together as far as the shortest goes. From there on a step takes one token
    a text, that of the prompt while there is one; so texts of similar lengths go together best.

    A text depends on its own prompt and key only. Alone it has the same logits up to rounding (products of another
    shape may add in another order), so a sampled text may take another way there. The loop over the tokens runs on the
    device; no token is read before the last one is there.

    Args:
      decoder: float or quantized.
      prompts: ids, `[b, n]` or `b` arrays of any lengths.
      keys: typed keys `[b]`, one a prompt; unused at temperature 0.
      tokens: how many for each; an end-of-sequence token ends nothing.
      temperature: as of `generate`.
      top_k: as of `generate`.

    Raises:
      InputError: not one key a prompt; otherwise as of `generate`.
    """
    sampling = Sampling(tokens, temperature, top_k)
    texts = check_prompts(prompts, keys, decoder.config, sampling)
    if tokens == 0:
        return np.empty((len(texts), 0), np.int32)
    start, given, index = _aligned(texts, tokens)
    leaves, structure = jax.tree.flatten(in_steps(decoder))
    cache = empty_cache(decoder, len(texts), start.shape[1] + len(given) - 1)  # the last token is not read
    logits, cache = step(structure, leaves, jnp.asarray(start), cache)
    ids = np.asarray(_continue(structure, leaves, logits, cache, (keys, given, index), sampling)[0])
    return np.stack([row[skipped : skipped + tokens] for row, skipped in zip(ids, -index[0], strict=True)])


def _in_lockstep(
    decoder: Decoder, prompts: Sequence[np.ndarray], keys: Array, sampling: Sampling
) -> Iterator[dict[int, int]]:
    """Yields for one position after another the new ids of the texts that have one there, by the texts' numbers."""
    texts = check_prompts(prompts, keys, decoder.config, sampling)
    if sampling.tokens == 0:
        return
    start, given, index = _aligned(texts, sampling.tokens)
    # Slots in steps of 256, so that prompts of similar length share one compilation.
    slots = min(-(-(start.shape[1] + len(given)) // 256) * 256, decoder.config.context_length)
    leaves, structure = jax.tree.flatten(in_steps(decoder))
    cache, how = empty_cache(decoder, len(texts), slots), sampling._replace(tokens=0)
    advance = lambda place, token, cache: _advance(  # noqa: E731
        structure, leaves, token, cache, (keys, given[place], index[place]), how
    )
    token, cache = advance(0, jnp.asarray(start), cache)
    for place in range(len(given)):
        ready = token
        if place + 1 < len(given):
            # Dispatched before the token is read, so that Python's share overlaps with the next step.
            token, cache = advance(place + 1, token, cache)
        ids = np.asarray(ready)[:, 0]
        yield {row: int(ids[row]) for row, new in enumerate(index[place]) if 0 <= new < sampling.tokens}


def _aligned(
    texts: Sequence[np.ndarray], tokens: int
) -> tuple[Int[np.ndarray, "b n"], Int[np.ndarray, "steps b"], Int[np.ndarray, "steps b"]]:
    """What all texts begin with, `n` tokens as the shortest has; then for every step and text the prompt's own token.

    Where a prompt has none left that is −1. The last array numbers each text's new tokens; below 0 it is its prompt's.
    """
    lengths = np.array([len(text) for text in texts])
    shortest = lengths.min()
    steps = int(lengths.max() - shortest) + tokens
    given = np.full((steps, len(texts)), -1, np.int32)
    for row, text in enumerate(texts):
        given[: len(text) - shortest, row] = text[shortest:]
    index = np.arange(steps)[:, None] - (lengths - shortest)
    return np.stack([text[:shortest] for text in texts]).astype(np.int32), given, index.astype(np.int32)


def check_prompts(prompts: Any, keys: Array, config: DecoderConfig, sampling: Sampling) -> list[np.ndarray]:
    """The prompts one by one.

    Raises:
      InputError: prompts that can't be continued so; not one key a prompt.
    """
    texts = [np.asarray(prompt) for prompt in prompts]
    for text in texts or [np.empty(0, np.int32)]:
        check_sampling(text[None] if text.ndim == 1 else np.asarray(prompts), config, sampling)
    if keys.shape != (len(texts),) or not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        raise InputError(
            f"{len(texts)} prompts take as many typed keys, not {keys.dtype} {list(keys.shape)}: "
            f"jax.random.split(jax.random.key(seed), {len(texts)}) makes them."
        )
    return texts


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
    outside, devices = outside_of(decoder), spread_over(decoder)
    of_one = attention(decoder.norm.scale.get_value(), decoder.config.head_dim)
    layers = unstack(decoder)
    for layer in layers:
        layer.attention.of_one, layer.attention.devices = of_one, devices
        if devices is None:
            _put_together(layer.attention, ("q", "k", "v"))
            if layer.mlp.gated:
                _put_together(layer.mlp, ("gate", "up"))
    return prepared((outside, layers), devices and devices.mesh)


def _put_together(module: Any, names: tuple[str, ...]) -> None:
    """Linear layers of the same input as one, where the device's kernel takes their weights side by side."""
    linears = [getattr(module, name) for name in names]
    kernels = [linear.kernel.get_value() for linear in linears]
    together = side_by_side(kernels)
    if together is None:
        return
    ends = tuple(np.cumsum([kernel.shape[1] for kernel in kernels[:-1]]).tolist())
    biases = [linear.bias.get_value() for linear in linears if linear.bias is not None]
    if len(biases) not in (0, len(linears)):
        return
    module.together = nnx.data(SideBySide(together, ends, jnp.concatenate(biases) if biases else None))
    for name in names:
        setattr(module, name, None)


def empty_cache(decoder: Decoder, texts: int, slots: int) -> Cache:
    """The cache of a decoder's generation; where the decoder is cut over devices, its heads are."""
    cache, devices = Cache.init(decoder.config, texts, slots, decoder.dtype, decoder.cached), spread_over(decoder)
    return cache if devices is None else devices.place_heads(cache)


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


@partial(jax.jit, static_argnames="structure", donate_argnames="cache", compiler_options=LEAST_MEMORY)
def step(
    structure: Any, leaves: list[Array], tokens: Int[Array, "b t"], cache: Cache
) -> tuple[Float[Array, "b vocab"], Cache]:
    """Appends `tokens` to the cache; returns the float32 logits after the last of them, and the cache.

    `leaves` and `structure` are the flattened result of `in_steps`. Flattening 30 Flax modules for every token would
    take 3 ms, a sixth of the default model's step.
    """
    return _step(structure, leaves, tokens, cache)


def _step(structure: Any, leaves: list[Array], tokens: Array, cache: Cache) -> tuple[Array, Cache]:
    decoder, layers = jax.tree.unflatten(structure, leaves)
    x = decoder.embed(tokens, cache.length)
    rotary = rotary_table(decoder.config, cache.length + jnp.arange(tokens.shape[1]))
    filled = []
    for layer, slots in zip(layers, cache.layers, strict=True):
        x, _, slots = layer(x, rotary, slots, cache.length)
        filled.append(slots)
    logits = decoder.logits(decoder.norm(x[:, -1]))
    return logits.astype(jnp.float32), Cache(tuple(filled), cache.length + tokens.shape[1])


@partial(jax.jit, static_argnames=("structure", "sampling"), donate_argnames="cache", compiler_options=LEAST_MEMORY)
def _continue(
    structure: Any, leaves: list[Array], logits: Float[Array, "b vocab"], cache: Cache, draw: Any, sampling: Sampling
) -> tuple[Int[Array, "b steps"], Cache]:
    """The ids of all texts from the logits after what they begin with; and the cache, so that its buffers are donated.

    `draw` holds the texts' keys, and the arrays of `_aligned`.
    """
    keys, given, index = draw

    def following(so_far: tuple[Array, Cache], at: tuple[Array, Array]) -> tuple[tuple[Array, Cache], Array]:
        logits, cache = so_far
        token = _pick_each(logits, (keys, *at), sampling)
        return _step(structure, leaves, token[:, None], cache), token

    (logits, cache), ids = jax.lax.scan(following, (logits, cache), (given[:-1], index[:-1]))
    last = _pick_each(logits, (keys, given[-1], index[-1]), sampling)
    return jnp.concatenate([ids, last[None]]).T, cache


def _pick_each(logits: Float[Array, "b vocab"], draw: tuple[Array, Any, Any], sampling: Sampling) -> Int[Array, " b"]:
    """The texts' next ids: the given ones, where they are not −1; else by each text's key and the number of its id."""
    (keys, given, index), (_, temperature, top_k) = draw, sampling
    if temperature == 0:
        chosen = jnp.argmax(logits, -1)
    else:
        logits = logits if top_k is None else _among(logits, top_k)
        chosen = jax.vmap(_draw)(jax.vmap(jax.random.fold_in)(keys, index), logits / temperature)
    return jnp.where(given < 0, chosen, given)


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


@partial(jax.jit, static_argnames=("structure", "sampling"), donate_argnames="cache", compiler_options=LEAST_MEMORY)
def _advance(
    structure: Any, leaves: list[Array], tokens: Int[Array, "b t"], cache: Cache, draw: Any, sampling: Sampling
) -> tuple[Int[Array, "b 1"], Cache]:
    """One program a token: `step`, and the next token of each text, by `draw` as in `_pick_each`."""
    logits, cache = _step(structure, leaves, tokens, cache)
    return _pick_each(logits, draw, sampling)[:, None], cache
