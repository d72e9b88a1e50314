"""Quantizes a decoder block by block: observe, transform, round, move on with the quantized block's outputs.

Each block sees the inputs that the quantized blocks before it produce, so later blocks make up for earlier errors.
Only one block's statistics are ever alive.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.traversals import flatten_mapping, unflatten_mapping
from jax import Array
from jaxtyping import Float, Int

from jquant.data import sample_windows
from jquant.errors import InputError
from jquant.formats import Group, group_rows
from jquant.io.load import LanguageModel, Progress
from jquant.methods import Method
from jquant.methods import method as named_method
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Block, Decoder, Taps, rotary_table
from jquant.models.families import LLAMA, Site, shared_channels
from jquant.qtensor import QTensor
from jquant.rounding import SolveInfo
from jquant.stats import AbsMean, Gram

Params = dict[str, Any]  # "attention.q.kernel" -> Array or QTensor
SiteStats = dict[str, Gram | AbsMean]  # "abs_mean", "gram", and a Gram matrix per token weight


def quantize_decoder(
    decoder: Decoder,
    method: Method,
    tokens: Int[np.ndarray, "n context"] | None = None,
    *,
    batch: int = 8,
    progress: Progress | None = None,
) -> tuple[Decoder, dict[tuple[int, str], SolveInfo]]:
    """Quantizes every projection of every block; embedding, norms and head stay as they are.

    Args:
      decoder: float; left untouched.
      method: a point in the space of methods.
      tokens: calibration windows; not needed by methods that look at weights alone.
      batch: windows per forward pass.
      progress: called with ("quantize", blocks done, blocks in all).

    Returns:
      The quantized decoder, and what was done to each weight: (layer, path) -> SolveInfo.

    Raises:
      InputError: the method needs calibration tokens and there are none; a group larger than a weight.
    """
    check_method(decoder, method)
    if method.needs_calibration and tokens is None:
        raise InputError("This method looks at activations: give it calibration tokens.")
    stream = _Stream(decoder, tokens, batch) if method.needs_calibration and tokens is not None else None
    graph, layers = nnx.split(decoder.layers)
    blocks, report = [], {}
    for index in range(decoder.config.layers):
        block = nnx.merge(graph, jax.tree.map(lambda a: a[index], layers))  # noqa: B023
        stats = stream.observe(block, method.token_weights) if stream else {}
        params, infos = _quantize_block(_flat(block), stats, method, LLAMA.sites, decoder.config)
        nnx.update(block, unflatten_mapping({tuple(path.split(".")): leaf for path, leaf in params.items()}))
        if stream:
            stream.advance(block)
        blocks.append(nnx.state(block))
        report |= {(index, path): info for path, info in infos.items()}
        jax.block_until_ready(infos)
        if progress:
            progress("quantize", index + 1, decoder.config.layers)
    outer, params = nnx.split(decoder)
    params["layers"] = jax.tree.map(lambda *a: jnp.stack(a), *blocks)
    return nnx.merge(outer, params), jax.device_get(report)


def check_method(decoder: Decoder, method: Method) -> None:
    """Finds out before any work whether a method suits a decoder.

    Raises:
      InputError: a weight has fewer rows than the method's groups, or is quantized already.
    """
    params = _flat(decoder.layers)
    for path in (path for site in LLAMA.sites for path in site.weights):
        if isinstance(params[path], QTensor):
            raise InputError(f"{path} is quantized already: quantize the float model.")
        try:
            group_rows(method.format, params[path].shape[-2])
        except InputError as wrong:
            raise InputError(f"{path}: {wrong}") from None


def quantize(
    model: LanguageModel,
    method: str | Method,
    *,
    bits: int = 4,
    group: Group = 64,
    symmetric: bool = False,
    calibration: str | None = None,
    samples: int = 128,
    context: int = 512,
    seed: int = 0,
    progress: Progress | None = None,
) -> LanguageModel:
    """Quantizes a model's projections by a named method or one of your own.

    Args:
      model: float; left untouched.
      method: a name in `METHODS`, which `bits`, `group` and `symmetric` complete, or a `Method`, which has its own.
      bits: 2 to 8.
      group: rows that share a scale: a number, "channel" or "tensor".
      symmetric: without zero points.
      calibration: text whose activations the method looks at; RTN, NF4 and INT8 need none.
      samples: calibration windows, drawn from the text. 128 × 512 = 65,536 tokens: with 8,192 GPTQ's gain on wide
        layers vanishes on held-out text.
      context: tokens per calibration window.
      seed: of the draw.
      progress: called with ("quantize", blocks done, blocks in all).

    Returns:
      A model whose kernels are QTensors, with `report` filled.

    Raises:
      InputError: an unknown method; a missing or too short calibration text; bits or group out of range; a model that
        is quantized already.
    """
    chosen = named_method(method, bits, group, symmetric) if isinstance(method, str) else method
    tokens = None
    if chosen.needs_calibration:
        if calibration is None:
            raise InputError(f"{method} looks at activations: give it text, e.g. calibration=load_text('c4_utf8').")
        tokens = sample_windows(model.tokenizer.encode(calibration), context, samples, seed)
    decoder, report = quantize_decoder(model.decoder, chosen, tokens, progress=progress)
    return replace(model, decoder=decoder, report=report)


class _Stream:
    """The calibration windows on their way through the blocks, `batch` at a time."""

    def __init__(self, decoder: Decoder, tokens: np.ndarray, batch: int):
        self.rotary = rotary_table(decoder.config, jnp.arange(tokens.shape[1]))
        self.states = [_embed(decoder, tokens[i : i + batch]) for i in range(0, len(tokens), batch)]
        self.config = decoder.config

    def observe(self, block: Block, token_weights: bool) -> dict[str, SiteStats]:
        """Statistics of the block's sites over all windows."""
        stats = _init_stats(LLAMA.sites, self.config, token_weights)
        for x in self.states:
            stats = _observe(block, x, self.rotary, stats, LLAMA.sites)
        return stats

    def advance(self, block: Block) -> None:
        """Replaces the inputs of the block by its outputs."""
        for i, x in enumerate(self.states):
            self.states[i] = _forward(block, x, self.rotary)


@jax.jit
def _embed(decoder: Decoder, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    return decoder.embed(tokens)


@partial(jax.jit, donate_argnums=1)
def _forward(block: Block, x: Float[Array, "b t d"], rotary: Array) -> Float[Array, "b t d"]:
    return block(x, rotary)[0]


def _init_stats(sites: tuple[Site, ...], config: DecoderConfig, token_weights: bool) -> dict[str, SiteStats]:
    widths = {"attention_output": config.heads * config.head_dim, "mlp_output": config.ffn}
    stats = {}
    for site in sites:
        width = widths.get(site.tap, config.hidden)
        weightings = {"gram"} | ({tap for _, tap in site.token_weights} if token_weights else set())
        stats[site.tap] = {"abs_mean": AbsMean.init(width)} | {name: Gram.init(width) for name in sorted(weightings)}
    return stats


@partial(jax.jit, static_argnames="sites", donate_argnames="stats")
def _observe(
    block: Block, x: Float[Array, "b t d"], rotary: Array, stats: dict[str, SiteStats], sites: tuple[Site, ...]
) -> dict[str, SiteStats]:
    _, taps, _ = block(x, rotary)
    return {
        site.tap: {
            name: one.observe(taps[site.tap], _token_weight(taps, name)) for name, one in stats[site.tap].items()
        }
        for site in sites
    }


def _token_weight(taps: Taps, name: str) -> Array | None:
    return None if name in ("gram", "abs_mean") else taps[name]


@partial(jax.jit, static_argnames=("method", "sites", "config"))
def _quantize_block(
    params: Params, stats: Mapping[str, SiteStats], method: Method, sites: tuple[Site, ...], config: DecoderConfig
) -> tuple[Params, dict[str, SolveInfo]]:
    """Transforms every site, then rounds every weight: a site's transform may rewrite an earlier site's weight."""
    dtypes = {path: leaf.dtype for path, leaf in params.items()}
    params, infos, grams = {path: leaf.astype(jnp.float32) for path, leaf in params.items()}, {}, {}
    for site in sites:
        weightings = dict(site.token_weights) if method.token_weights else {}
        for path in site.weights:
            grams[path] = stats[site.tap][weightings.get(path, "gram")].mean if stats else None
    if method.transform is not None:
        for site in sites:
            _transform(params, grams, stats[site.tap]["abs_mean"].mean, site, method, config)
    for path, gram in grams.items():
        scale, zero = method.range(params[path], method.format, gram)
        params[path], infos[path] = method.rounding(params[path], scale, zero, gram, method.format)
    stay = {path: leaf.astype(dtypes[path]) for path, leaf in params.items() if path not in infos}
    return params | stay, infos


def _transform(
    params: Params, grams: dict[str, Any], abs_mean: Array, site: Site, method: Method, config: DecoderConfig
) -> None:
    """Scales a site's input channels and folds the inverse into whatever produces them; updates its arguments."""
    assert method.transform is not None
    shared = shared_channels(site, config)
    if shared is None:
        channels, width = jnp.arange(len(abs_mean)), len(abs_mean)
    else:
        channels, width = jnp.asarray(shared), max(shared) + 1
    sharers = jnp.zeros(width).at[channels].add(1)
    pooled = jnp.zeros(width).at[channels].add(abs_mean) / sharers
    weights = [params[path] for path in site.weights]
    site_grams = [grams[path] for path in site.weights]
    scale = method.transform(weights, site_grams, pooled[channels], method.format)
    for path, w, gram in zip(site.weights, weights, site_grams, strict=True):
        params[path] = w * scale[:, None]
        grams[path] = gram / (scale[:, None] * scale)
    # Channels that share a producer share the scale, so any of them tells it.
    produced = jnp.zeros(width).at[channels].set(scale)
    params[site.producer] = params[site.producer] / produced


def _flat(block: nnx.Module) -> Params:
    return {
        ".".join(map(str, path)): leaf for path, leaf in flatten_mapping(nnx.to_pure_dict(nnx.state(block))).items()
    }
