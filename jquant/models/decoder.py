"""One Flax NNX decoder for all families; what differs between them is in `DecoderConfig`.

Layers are stacked on axis 0 and run under `lax.scan`, so compile time does not grow with depth. Layers that differ in
formats, window or rotary embedding form consecutive segments, each stacked and scanned. `Block` also returns its taps,
the distinct inputs that its projections read, for calibration. Under jit, unused taps cost nothing.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from jquant.errors import InputError
from jquant.models.cache import CacheFormat, Past, extended, read, rounded_past
from jquant.models.config import DecoderConfig
from jquant.models.params import flat_params
from jquant.models.rotary import rotary_table, rotate
from jquant.provenance import describe, digest
from jquant.rotations import Rotation, apply, apply_transpose

Taps = dict[str, Array]
# The distinct inputs of a block's projections, among its taps.
TAPS = ("attention_input", "attention_output", "mlp_input", "mlp_output")

# Attention is unrolled into at most so many chunks of queries; each reads only the keys that it may attend to.
MAX_CHUNKS, MIN_CHUNK = 16, 128


class Linear(nnx.Module):
    """y = x @ kernel, kernel `[in, out]`: an array, a `QTensor`, or anything that has a shape and takes x @ kernel.

    With a bias `[out]`, an array, y = x @ kernel + bias.
    """

    def __init__(self, in_features: int, out_features: int, rngs: nnx.Rngs, bias: bool = False):
        self.kernel = nnx.Param(0.02 * rngs.params.normal((in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros(out_features)) if bias else None

    def __call__(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        """Applies the kernel in x's dtype."""
        y = x @ self.kernel.get_value()
        return y if self.bias is None else y + self.bias.get_value()


class SideBySide(nnx.Module):
    """Several linear layers of one input as one, whose kernel holds theirs side by side.

    Attributes:
      kernel: `[in, out]`; anything that has a shape and takes x @ kernel.
      ends: where each but the last layer's outputs end.
      bias: theirs side by side, `[out]`, or None.
    """

    def __init__(self, kernel: Any, ends: tuple[int, ...], bias: Array | None = None):
        self.kernel = nnx.Param(kernel)
        self.ends = ends
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: Float[Array, "*b in"]) -> list[Float[Array, "*b _"]]:
        """The layers' outputs."""
        y = x @ self.kernel.get_value()
        return jnp.split(y if self.bias is None else y + self.bias.get_value(), self.ends, -1)


class RMSNorm(nnx.Module):
    """x · scale / √(mean x² + ε), the mean in float32; if x is rotated by `rotation`, it is rotated back first."""

    def __init__(self, features: int, eps: float):
        self.scale = nnx.Param(jnp.ones(features))
        self.eps = eps
        self.rotation: Rotation | None = None

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Normalises the last axis."""
        wide = x.astype(jnp.float32)
        if self.rotation is not None:
            wide = apply_transpose(wide, self.rotation)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.scale.get_value()


class LayerNorm(nnx.Module):
    """(x − mean x) · scale / √(var x + ε) + bias, in float32 (arXiv 1607.06450)."""

    def __init__(self, features: int, eps: float):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.eps = eps
        self.rotation: Rotation | None = None  # none: it would change the mean

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Normalises the last axis."""
        wide = x.astype(jnp.float32)
        wide -= jnp.mean(wide, -1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        return (wide * self.scale.get_value() + self.bias.get_value()).astype(x.dtype)


def norm_of(config: DecoderConfig) -> RMSNorm | LayerNorm:
    """A norm of the residual stream."""
    return (LayerNorm if config.norm == "layer" else RMSNorm)(config.hidden, config.norm_eps)


@dataclass(frozen=True)
class Scores:
    """How attention scores s = q·k come about; fields as in `DecoderConfig`, the window that of one layer."""

    scale: float | None = None
    softcap: float | None = None
    window: int | None = None

    def scaled(self, q: Float[Array, "b h t d"]) -> Float[Array, "b h t d"]:
        """Queries times the scale."""
        return q * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)

    def sees(self, query: Any, key: Any) -> Any:
        """Whether a query's position sees a key's."""
        return key <= query if self.window is None else (key <= query) & (key > query - self.window)

    def plain(self, slots: int) -> bool:
        """Whether among so many tokens a query sees all that came before, and no score is capped."""
        return self.softcap is None and (self.window is None or self.window >= slots)


PLAIN = Scores()


def soft_capped(x: Array, cap: float | None) -> Array:
    """c · tanh(x / c), which lies within ±c; x as it is without a cap (Gemma 2, arXiv 2408.00118, §2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class Attention(nnx.Module):
    """Grouped-query attention; `cached` rounds past keys and values (`with_cache`).

    `window` and `rope` are the layer's (`DecoderConfig.window`, `.rope`), and static: layers that differ in them share
    neither a segment nor a compiled program.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, layer: int = 0):
        self.config = config
        self.window, self.rope = config.window(layer), config.rope(layer)
        self.cached: CacheFormat | None = None
        self.of_one: Any = None  # attends with one query a head (`kernels.choose.attention`); set by generation
        self.devices: Any = None  # a mesh over which the cache's heads are cut; set by generation
        self.together: SideBySide | None = None  # q, k and v as one; set by generation
        width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = Linear(config.hidden, width, rngs, "attention.q" in config.biases)
        self.k = Linear(config.hidden, kv_width, rngs, "attention.k" in config.biases)
        self.v = Linear(config.hidden, kv_width, rngs, "attention.v" in config.biases)
        self.o = Linear(width, config.hidden, rngs, "attention.o" in config.biases)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    @property
    def scores(self) -> Scores:
        """How its scores come about."""
        return Scores(self.config.attention_scale, self.config.attention_softcap, self.window)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        rotary: Float[Array, "ropes t half 2"],
        cache: tuple[Any, Any] | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "b t d"], Taps, tuple[Any, Any] | None]:
        """Output, taps and the cache with these tokens written at `start`.

        The cache is this layer's (keys, values), as in `Cache.layers`; without one, attention is causal within x. Where
        `cached` packs it, several tokens at once are the first.
        """
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.config.head_dim).transpose(0, 2, 1, 3)  # noqa: E731
        q, k, v = map(heads, self.together(x) if self.together else (self.q(x), self.k(x), self.v(x)))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        own = None if self.rope is None else rotary[self.rope]
        q = rotate(q, own)
        if cache is not None:
            cache = extended(cache, (k, v), own, start, self.cached)
        if cache is None or (self.cached is not None and x.shape[1] > 1):
            past = rounded_past(k, v, own, self.cached)
            out, mass = causal_attention(q, rotate(k, own), v, *past, scores=self.scores)
        else:
            out, mass = self._over_heads(self._to_cache)(q, cache, start), None
        merged = out.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
        taps = {"attention_input": x, "attention_output": merged}
        return self.o(merged), taps if mass is None else taps | {"attention_mass": mass}, cache

    def _to_cache(self, q: Float[Array, "b h t d"], cache: tuple[Any, Any], start: Any) -> Float[Array, "b h t d"]:
        length = start + q.shape[2]
        keys, values = read(cache, length, self.config, self.cached, self.rope)
        scores = self.scores
        if self.of_one is not None and q.shape[2] == 1 and scores.plain(keys.shape[2]):
            if scores.scale is not None:  # the kernel divides by √d
                q = scores.scaled(q) * q.shape[-1] ** 0.5
            return self.of_one(q, keys, values, length)
        return attend(q, keys, values, start, scores)

    def _over_heads(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function if self.devices is None else self.devices.over_heads(function, self.config.kv_heads)


_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu": partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


class MLP(nnx.Module):
    """down(activation(gate(x)) · up(x)), or down(activation(up(x))) without a gate (`DecoderConfig.gated`).

    `rotation` rotates the input of `down` (`jquant.models.folding`).
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.activation, self.gated = config.activation, config.gated
        self.rotation: Rotation | None = None
        self.together: SideBySide | None = None  # gate and up as one; set by generation
        if config.gated:
            self.gate = Linear(config.hidden, config.ffn, rngs, "mlp.gate" in config.biases)
        self.up = Linear(config.hidden, config.ffn, rngs, "mlp.up" in config.biases)
        self.down = Linear(config.ffn, config.hidden, rngs, "mlp.down" in config.biases)

    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Taps]:
        """Output and taps."""
        activation = _ACTIVATIONS[self.activation]
        if self.gated:
            gate, up = self.together(x) if self.together else (self.gate(x), self.up(x))
            inner = activation(gate) * up
        else:
            inner = activation(self.up(x))
        if self.rotation is not None:
            inner = apply(inner, self.rotation)
        return self.down(inner), {"mlp_input": x, "mlp_output": inner}


class Block(nnx.Module):
    """One pre-norm decoder layer; with `DecoderConfig.post_norms` what it adds to the stream is normalised, too.

    With `DecoderConfig.parallel_residual` the MLP reads the stream that attention reads.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, layer: int = 0):
        self.parallel = config.parallel_residual
        self.attention_norm = norm_of(config)
        self.attention = Attention(config, rngs, layer)
        self.attention_post_norm = norm_of(config) if config.post_norms else None
        self.mlp_norm = norm_of(config)
        self.mlp = MLP(config, rngs)
        self.mlp_post_norm = norm_of(config) if config.post_norms else None

    def __call__(
        self,
        x: Float[Array, "b t d"],
        rotary: Float[Array, "ropes t half 2"],
        cache: tuple[Any, Any] | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "b t d"], Taps, tuple[Any, Any] | None]:
        """Residual stream after the layer, its taps, and its cache."""
        attended, taps, cache = self.attention(self.attention_norm(x), rotary, cache, start)
        after = x + (attended if self.attention_post_norm is None else self.attention_post_norm(attended))
        out, mlp_taps = self.mlp(self.mlp_norm(x if self.parallel else after))
        return after + (out if self.mlp_post_norm is None else self.mlp_post_norm(out)), taps | mlp_taps, cache


class Decoder(nnx.Module):
    """Token ids to logits. `embedding` is `[vocab, d]`, an array or `Transposed`; a tied head is the same, not a copy.

    `positions`, `[offset + context, d]`, are learned ones (`DecoderConfig.position_offset`), or None.

    The residual stream may be rotated by `norm.rotation` (`jquant.models.folding`): `embed` rotates it and the last
    norm rotates it back, so embedding and head do not change and may stay tied.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Param(0.02 * rngs.params.normal((config.vocab_size, config.hidden)))
        rows = None if config.position_offset is None else config.position_offset + config.context_length
        self.positions = nnx.Param(0.02 * rngs.params.normal((rows, config.hidden))) if rows else None

        def stack(run: range) -> Block:
            return nnx.split_rngs(splits=len(run))(nnx.vmap(lambda rngs: Block(config, rngs, run[0])))(rngs)

        self.segments = nnx.List([stack(run) for run in config.runs])
        self.norm = norm_of(config)
        self.head = None if config.tied else Linear(config.hidden, config.vocab_size, rngs)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t vocab"]:
        """Next-token logits at every position."""
        return self.logits(self.hidden(tokens))

    @property
    def dtype(self) -> Any:
        """Of activations, and of the parameters that are not quantized."""
        return self.norm.scale.get_value().dtype

    @property
    def cached(self) -> CacheFormat | None:
        """How attention rounds past keys and values (`with_cache`)."""
        return self.segments[0].attention.cached

    def embed(self, tokens: Int[Array, "b t"], start: Int[Array, ""] | int = 0) -> Float[Array, "b t d"]:
        """The residual stream before the first layer; the first of the tokens is at position `start`.

        Raises:
          InputError: more tokens than learned positions.
        """
        x = self.embedding.get_value()[tokens].astype(self.dtype)
        if self.config.embedding_scale != 1:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)  # rounded to it, as transformers does
        if self.positions is not None and self.config.position_offset is not None:
            if tokens.shape[1] > self.config.context_length:
                raise InputError(
                    f"{self.config.family} has learned positions for {self.config.context_length} tokens; a text of "
                    f"{tokens.shape[1]} has more."
                )
            rows = self.config.position_offset + start + jnp.arange(tokens.shape[1])
            x = x + self.positions.get_value()[rows].astype(x.dtype)
        return x if self.norm.rotation is None else apply(x, self.norm.rotation)

    def hidden(self, tokens: Int[Array, "b t"], remat: bool = False) -> Float[Array, "b t d"]:
        """States after the last norm, the input of `logits`; 80 times smaller than the default model's logits.

        With `remat`, gradients keep the projections' outputs of every layer and compute the rest again, attention's
        squares above all.
        """
        return self.norm(self.through_layers(self.embed(tokens), remat))

    def through_layers(
        self, x: Float[Array, "b t d"], remat: bool = False, joined: Callable[[Any], Any] | None = None
    ) -> Float[Array, "b t d"]:
        """The residual stream after the last layer; `joined` joins a layer's parameters that are cut over devices."""
        rotary = rotary_table(self.config, jnp.arange(x.shape[1]))
        for segment in self.segments:
            graph, layers = nnx.split(segment)

            def layer(x: Array, params: Any, graph: Any = graph) -> tuple[Array, None]:
                return nnx.merge(graph, joined(params) if joined else params)(x, rotary)[0], None

            if remat:
                layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
            x, _ = jax.lax.scan(layer, x, layers)
        return x

    def logits(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b vocab"]:
        """Projects final states onto the vocabulary."""
        logits = hidden @ self.embedding.get_value().T if self.head is None else self.head(hidden)
        return soft_capped(logits, self.config.logits_softcap)


def one_layer(config: DecoderConfig) -> DecoderConfig:
    """The configuration with its first layer alone, whose parameters have the shapes of every layer's."""
    windows = None if config.windows is None else config.windows[:1]
    return replace(config, layers=1, windows=windows, no_rope=())


@lru_cache(8)
def parameter_shapes(config: DecoderConfig) -> Mapping[str, tuple[int, ...]]:
    """The shape of each of a decoder's parameters, layers stacked on axis 0, e.g. of "segments.0.mlp.up.kernel".

    Only one layer is traced: a file can ask for thousands, and another kind of window for each.
    """
    decoder = nnx.eval_shape(lambda: Decoder(one_layer(config), nnx.Rngs(0)))
    traced = {name: leaf.shape for name, leaf in flat_params(decoder).items()}
    layer = {name: shape[1:] for name, shape in traced.items() if name.startswith("segments.")}
    shapes = {name: shape for name, shape in traced.items() if name not in layer}
    for index, run in enumerate(config.runs):
        shapes |= {name.replace(".0.", f".{index}.", 1): (len(run), *shape) for name, shape in layer.items()}
    return shapes


def outside_of(decoder: Decoder) -> Decoder:
    """The decoder without its layers: embedding, learned positions, last norm and head."""
    outside = nnx.merge(*nnx.split(decoder))
    outside.segments = nnx.List([])
    return outside


def blocks(decoder: Decoder) -> Iterator[Block]:
    """The decoder's layers one after another, each a copy cut from its stack."""
    for segment in decoder.segments:
        graph, stack = nnx.split(segment)
        for index in range(jax.tree.leaves(stack)[0].shape[0]):
            yield nnx.merge(graph, jax.tree.map(itemgetter(index), stack))


def identity(decoder: Decoder) -> str:
    """A digest of what decides a decoder's values: arrays, formats, configuration, rotations, the cache's rounding."""
    segments = [(segment.mlp.rotation, segment.attention.cached) for segment in decoder.segments]
    parts = [flat_params(decoder), decoder.config, decoder.norm.rotation, segments]
    return digest(json.dumps(describe(parts), sort_keys=True).encode())


def with_cache(decoder: Decoder, cached: Any) -> Decoder:
    """The decoder whose attention rounds past keys and values so, for evaluation, generation and training alike.

    It is a choice for a run, as the cache's type is in other tools: a saved model does not hold it.

    Raises:
      InputError: no `CacheFormat`; groups that are larger than a head.
    """
    if not isinstance(cached, CacheFormat | None):
        raise InputError(f"with_cache takes a CacheFormat or None, not {cached!r}.")
    for stored in () if cached is None else filter(None, (cached.keys, cached.values)):
        jax.eval_shape(stored.pack, jax.ShapeDtypeStruct((1, 1, stored.block, decoder.config.head_dim), jnp.float32))
    changed = nnx.merge(*nnx.split(decoder))
    for segment in changed.segments:
        segment.attention.cached = cached
    return changed


def with_blocks(decoder: Decoder, layers: Sequence[Block]) -> Decoder:
    """The decoder with these layers; consecutive layers that differ only in their arrays' values share a segment."""

    def kind(layer: Block) -> tuple[Any, ...]:
        graph, state = nnx.split(layer)
        leaves, structure = jax.tree.flatten(state)
        return graph, structure, [(leaf.shape, leaf.dtype) for leaf in leaves]

    segments = []
    for _, run in groupby(layers, key=kind):
        graphs, states = zip(*map(nnx.split, run), strict=True)
        segments.append(nnx.merge(graphs[0], jax.tree.map(lambda *a: jnp.stack(a), *states)))
    rebuilt = nnx.merge(*nnx.split(decoder))
    rebuilt.segments = nnx.List(segments)
    return rebuilt


def causal_attention(
    q: Float[Array, "b h t d"],
    k: Float[Array, "b kv t d"],
    v: Float[Array, "b kv t d"],
    past_keys: Past | None = None,
    past_values: Past | None = None,
    scores: Scores = PLAIN,
) -> tuple[Float[Array, "b h t d"], Float[Array, "b t"]]:
    """Causal attention, and the attention mass each token receives: summed over queries, averaged over heads.

    Keys and values of past tokens may be rounded; `Past` says which each query reads so.

    Each chunk of queries reads the keys that it sees, up to its own end. Without a window that takes half the products
    of the full square, and only one chunk's probabilities are in memory (1/16 of the square at 4,096 tokens).
    """
    outs, mass = [], jnp.zeros((q.shape[0], q.shape[2]), jnp.float32)
    for begin, end in chunks(q.shape[2]):
        first = 0 if scores.window is None else max(begin + 1 - scores.window, 0)
        # Traced: NumPy's mask would be a constant of the program, 16 MB in all at 4,096 tokens.
        visible = scores.sees(jnp.arange(begin, end)[:, None], jnp.arange(first, end))
        seen = scores.sees(np.arange(begin, end)[:, None], np.arange(first, end))
        sources = [_sources(x, past, first, seen) for x, past in ((k, past_keys), (v, past_values))]
        out, received = _softmax_attention(q[:, :, begin:end], *sources, visible, scores)
        outs.append(out)
        mass = mass.at[:, first:end].add(received)
    return jnp.concatenate(outs, 2), mass


def chunks(queries: int) -> list[tuple[int, int]]:
    """Where each chunk of queries begins and ends."""
    size = max(MIN_CHUNK, -(-queries // MAX_CHUNKS))
    return [(begin, min(begin + size, queries)) for begin in range(0, queries, size)]


def attend(
    q: Float[Array, "b h t d"],
    k: Float[Array, "b kv s d"],
    v: Float[Array, "b kv s d"],
    start: Int[Array, ""] | int,
    scores: Scores = PLAIN,
) -> Float[Array, "b h t d"]:
    """Attention of queries at positions start, start + 1, … to a cache of `s` slots; later slots are empty.

    A single query multiplies and sums. Batched matrix products would cost a CPU a quarter of the default model's
    decoding step, for their set-up per head. Several queries come in chunks, as in `causal_attention`.
    """
    visible = scores.sees(start + jnp.arange(q.shape[2])[:, None], jnp.arange(k.shape[2]))
    if q.shape[2] > 1:
        sources, parts = ((k, None), (v, None)), [slice(*ends) for ends in chunks(q.shape[2])]
        outs = [_softmax_attention(q[:, :, part], *sources, visible[part], scores)[0] for part in parts]
        return jnp.concatenate(outs, 2)
    b, _, _, d = q.shape
    query = scores.scaled(q).astype(jnp.float32).reshape(b, k.shape[1], -1, 1, d)
    products = soft_capped(jnp.sum(query * k[:, :, None], -1), scores.softcap)
    weights = jax.nn.softmax(jnp.where(visible[0], products, -jnp.inf), -1)
    return jnp.sum(weights[..., None] * v[:, :, None], -2).reshape(q.shape).astype(q.dtype)


def _sources(x: Array, past: Past | None, first: int, seen: np.ndarray) -> tuple[Array, Past | None]:
    """What a chunk of queries reads of the tokens from `first` on: as they are, and as past ones.

    `seen` says which of these tokens each of the queries sees; the last query is at the last token.
    """
    end = first + seen.shape[1]
    if past is None:
        return x[:, :, first:end], None
    reads = past.reads[end - len(seen) : end, first:end]
    if not reads.any():
        return x[:, :, first:end], None
    if (reads | ~seen).all():  # all that they see is past
        return past.rounded[:, :, first:end], None
    return x[:, :, first:end], Past(past.rounded[:, :, first:end], reads)


def _softmax_attention(
    q: Array, keys: Sequence[Any], values: Sequence[Any], visible: Array, scores: Scores
) -> tuple[Array, Array]:
    """Scores and probabilities in float32; query heads that share a key/value head are rows of one matrix product.

    Keys and values are pairs: as they are, and None or `Past`.
    """
    b, h, t, d = q.shape
    (k, past_keys), (v, past_values) = keys, values
    kv, s = k.shape[1:3]
    grouped = scores.scaled(q).reshape(b, kv, h // kv * t, d)
    scores_of = lambda k: jnp.einsum("bkqd,bksd->bkqs", grouped, k, preferred_element_type=jnp.float32).reshape(  # noqa: E731
        b, kv, h // kv, t, s
    )
    products = scores_of(k)
    if past_keys is not None:
        products = jnp.where(past_keys.reads, scores_of(past_keys.rounded), products)
    products = jnp.where(visible, soft_capped(products, scores.softcap), -jnp.inf)
    weights = jnp.exp(products - jnp.max(products, -1, keepdims=True))
    # Dividing the outputs, not the probabilities, saves a pass over the square.
    total = jnp.sum(weights, -1, keepdims=True)
    sums_of = lambda weights, v: jnp.einsum("bkqs,bksd->bkqd", weights.astype(v.dtype).reshape(b, kv, -1, s), v)  # noqa: E731
    if past_values is None:
        out = sums_of(weights, v)
    else:
        reads = past_values.reads
        out = sums_of(jnp.where(reads, 0, weights), v) + sums_of(jnp.where(reads, weights, 0), past_values.rounded)
    out = out.reshape(b, h, t, d) / total.reshape(b, h, t, 1).astype(v.dtype)
    return out, jnp.sum(weights / total, (1, 2, 3)) / h
