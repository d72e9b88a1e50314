"""Quantizes a decoder block by block: observe, transform, round, move on with the quantized block's outputs.

By default each block sees the inputs that the quantized blocks before it produce, so that later blocks make up for
earlier errors. Only one block's statistics are ever alive.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.traversals import flatten_mapping, unflatten_mapping
from jax import Array
from jaxtyping import Float, Int

from jquant.data import sample_windows
from jquant.errors import InputError
from jquant.formats import Group, block_shape
from jquant.io.load import LanguageModel, Progress
from jquant.loss import learn_clips
from jquant.methods import Method, Plan, assign
from jquant.methods import method as named_method
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Block, Decoder, Taps, blocks, rotary_table, with_blocks
from jquant.models.families import LLAMA, Site, shared_channels
from jquant.qtensor import QTensor
from jquant.rounding import SolveInfo
from jquant.stats import AbsMax, AbsMean, Gram

Params = dict[str, Any]  # "attention.q.kernel" -> Array or QTensor
SiteStats = dict[str, Gram | AbsMean | AbsMax]  # "abs_mean", "abs_max", "gram", and a Gram matrix per token weight
Choices = tuple[tuple[str, Method], ...]  # path within a block -> method; hashable


def quantize_decoder(
    decoder: Decoder,
    method: Method | Plan,
    tokens: Int[np.ndarray, "n context"] | None = None,
    *,
    batch: int = 8,
    inputs: Literal["quantized", "float"] = "quantized",
    progress: Progress | None = None,
) -> tuple[Decoder, dict[tuple[int, str], SolveInfo]]:
    """Quantizes the projections of the blocks; embedding, norms and head stay as they are.

    Args:
      decoder: float; left untouched.
      method: a point in the space of methods, or a plan that gives weights different ones (`methods.assign`).
      tokens: calibration windows; not needed by methods that look at weights alone.
      batch: windows per forward pass.
      inputs: whether a block is fitted to what the quantized blocks before it produce, or to what float ones do.
      progress: called with ("quantize", blocks done, blocks in all).

    Returns:
      The quantized decoder, and what was done to each weight: (layer, path) -> SolveInfo.

    Raises:
      InputError: what `check_plan` finds; a method needs calibration tokens and there are none.
    """
    choices = check_plan(decoder, method)
    if any(chosen.needs for layer in choices for _, chosen in layer) and tokens is None:
        raise InputError("This method looks at activations: give it calibration tokens.")
    # Clips are learned beforehand, on the whole decoder.
    needs = [frozenset[str]().union(*(chosen.needs - {"clips"} for _, chosen in layer)) for layer in choices]
    stream = _Stream(decoder, tokens, batch) if any(needs) and tokens is not None else None
    clips = learn_clips(decoder, choices, tokens) if tokens is not None else {}
    done, report = [], {}
    for index, block in enumerate(blocks(decoder)):
        stats = stream.observe(block, _needed_stats(choices[index], decoder.config)) if stream and needs[index] else {}
        params, infos = _quantize_block(
            _flat(block), stats, clips.get(index, {}), choices[index], LLAMA.sites, decoder.config
        )
        onward = stream if any(needs[index + 1 :]) else None
        if onward and inputs == "float":
            onward.advance(block)
        nnx.update(block, unflatten_mapping({tuple(path.split(".")): leaf for path, leaf in params.items()}))
        if onward and inputs == "quantized":
            onward.advance(block)
        done.append(block)
        report |= {(index, path): info for path, info in infos.items()}
        jax.block_until_ready(infos)
        if progress:
            progress("quantize", index + 1, decoder.config.layers)
    return with_blocks(decoder, done), jax.device_get(report)


def check_plan(decoder: Decoder, method: Method | Plan) -> list[Choices]:
    """Finds out before any work whether a plan suits a decoder; the methods of each layer's weights.

    Raises:
      InputError: a rule that names no weight or no method; a weight smaller than its method's groups, or with NaN or
        infinite values; a decoder that is quantized already; projections that read one input and do not share a
        transform; a transform with a range that is learned before it.
    """
    paths = [path for site in LLAMA.sites for path in site.weights]
    chosen = assign(method, [f"layers.{i}.{path}" for i in range(decoder.config.layers) for path in paths])
    layers = []
    for index, params in enumerate(_shapes(decoder)):
        for path in paths:
            one = chosen[f"layers.{index}.{path}"]
            if isinstance(params[path], QTensor):
                raise InputError(f"layers.{index}.{path} is quantized already: quantize the float model.")
            if one is None:
                continue
            if one.transform is not None and "clips" in one.needs:
                raise InputError(f"layers.{index}.{path}: LossSearch learns on untransformed weights; leave one out.")
            try:
                block_shape(one.format, params[path].shape)
            except InputError as wrong:
                raise InputError(f"layers.{index}.{path}: {wrong}") from None
        layers.append(tuple((path, m) for path in paths if (m := chosen[f"layers.{index}.{path}"]) is not None))
        for site in LLAMA.sites:
            if len({m.transform for path, m in layers[-1] if path in site.weights}) > 1:
                readers = ", ".join(site.weights)
                raise InputError(f"layers.{index}: {readers} read one input, so they must share a transform.")
    _check_finite(decoder, layers)
    return layers


def quantize(
    model: LanguageModel,
    method: str | Method | Plan,
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
    """Quantizes a model's projections by a named method, one of your own, or a plan.

    Args:
      model: float; left untouched.
      method: a name in `METHODS`, which `bits`, `group` and `symmetric` complete; a `Method`, which has its own; or a
        plan, rules (regex, method) that give weights different ones, e.g. `[(r"layers\\.0\\.", None), ("", "gptq")]`.
      bits: 2 to 8.
      group: weights that share a scale: rows of a column, (rows, columns), "channel" or "tensor".
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
      InputError: an unknown method; a plan's rule that names no weight; a missing or too short calibration text; bits
        or group out of range; a model that is quantized already.
    """
    named = partial(named_method, bits=bits, group=group, symmetric=symmetric)
    if isinstance(method, str | Method):
        plan = chosen = named(method) if isinstance(method, str) else method
        needs = chosen.needs_calibration
    else:
        plan = [(rule, named(name) if isinstance(name, str) else name) for rule, name in method]
        needs = any(chosen is not None and chosen.needs_calibration for _, chosen in plan)
    check_plan(model.decoder, plan)
    tokens = None
    if needs:
        if calibration is None:
            raise InputError(f"{method} looks at activations: give it text, e.g. calibration=load_text('c4_utf8').")
        tokens = sample_windows(model.tokenizer.encode(calibration), context, samples, seed)
    decoder, report = quantize_decoder(model.decoder, plan, tokens, progress=progress)
    return replace(model, decoder=decoder, report=report)


class _Stream:
    """The calibration windows on their way through the blocks, `batch` at a time."""

    def __init__(self, decoder: Decoder, tokens: np.ndarray, batch: int):
        self.rotary = rotary_table(decoder.config, jnp.arange(tokens.shape[1]))
        self.states = [_embed(decoder, tokens[i : i + batch]) for i in range(0, len(tokens), batch)]

    def observe(self, block: Block, stats: dict[str, SiteStats]) -> dict[str, SiteStats]:
        """Adds all windows to the statistics of the block's sites."""
        for x in self.states:
            stats = _observe(block, x, self.rotary, stats)
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


def _needed_stats(choices: Choices, config: DecoderConfig) -> dict[str, SiteStats]:
    """Empty statistics of every site, and of every token weighting, that the methods of a block ask for."""
    widths = {"attention_output": config.heads * config.head_dim, "mlp_output": config.ffn}
    kinds = {"abs_mean": AbsMean, "abs_max": AbsMax}
    stats: dict[str, SiteStats] = {}
    for site in LLAMA.sites:
        wanted = {
            _gram_name(site, path, chosen) if need == "gram" else need
            for path, chosen in choices
            if path in site.weights
            for need in chosen.needs - {"clips"}
        }
        width = widths.get(site.tap, config.hidden)
        stats[site.tap] = {name: kinds.get(name, Gram).init(width) for name in sorted(wanted)}
    return stats


def _gram_name(site: Site, path: str, chosen: Method) -> str:
    """The statistic that is a weight's Gram matrix: plain, or named after the tap that weights the tokens."""
    return dict(site.token_weights).get(path, "gram") if chosen.token_weights else "gram"


@partial(jax.jit, donate_argnames="stats")
def _observe(
    block: Block, x: Float[Array, "b t d"], rotary: Array, stats: dict[str, SiteStats]
) -> dict[str, SiteStats]:
    _, taps, _ = block(x, rotary)
    return {
        tap: {name: one.observe(taps[tap], _token_weight(taps, name)) for name, one in site.items()}
        for tap, site in stats.items()
    }


def _token_weight(taps: Taps, name: str) -> Array | None:
    return None if name in ("gram", "abs_mean", "abs_max") else taps[name]


@partial(jax.jit, static_argnames=("choices", "sites", "config"))
def _quantize_block(
    params: Params,
    stats: Mapping[str, SiteStats],
    clips: Mapping[str, Array],
    choices: Choices,
    sites: tuple[Site, ...],
    config: DecoderConfig,
) -> tuple[Params, dict[str, SolveInfo]]:
    """Transforms every site, then rounds every weight: a site's transform may rewrite an earlier site's weight."""
    dtypes = {path: leaf.dtype for path, leaf in params.items()}
    params, infos = {path: leaf.astype(jnp.float32) for path, leaf in params.items()}, {}
    methods, grams, abs_max = dict(choices), {}, {}
    for site in sites:
        for path in site.weights:
            seen = stats.get(site.tap, {})
            if path in methods:
                gram = seen.get(_gram_name(site, path, methods[path]))
                grams[path] = gram.mean if isinstance(gram, Gram) else None
            abs_max[path] = seen.get("abs_max")
    for site in sites:
        chosen = next((methods[path] for path in site.weights if path in methods), None)
        if chosen is not None and chosen.transform is not None:
            _transform(params, grams, stats[site.tap]["abs_mean"], site, methods, config)
    for path, chosen in methods.items():
        grid = chosen.range(params[path], chosen.format, grams[path], clips.get(path))
        q, infos[path] = chosen.rounding(params[path], *grid, grams[path], chosen.format)
        if chosen.activation is not None:
            q = replace(q, activation=chosen.activation)
            if chosen.activation.static:
                low_high = abs_max[path].largest.reshape(1, 1)
                q = replace(q, input_scale=chosen.activation.format.grid(-low_high, low_high)[0])
        params[path] = q
    stay = {path: leaf.astype(dtypes[path]) for path, leaf in params.items() if path not in infos}
    return params | stay, infos


def _transform(
    params: Params,
    grams: dict[str, Any],
    abs_mean: Any,
    site: Site,
    methods: Mapping[str, Method],
    config: DecoderConfig,
) -> None:
    """Scales a site's input channels and folds the inverse into whatever produces them; updates its arguments."""
    shared, observed = shared_channels(site, config), abs_mean.mean
    if shared is None:
        channels, width = jnp.arange(len(observed)), len(observed)
    else:
        channels, width = jnp.asarray(shared), max(shared) + 1
    sharers = jnp.zeros(width).at[channels].add(1)
    pooled = jnp.zeros(width).at[channels].add(observed) / sharers
    rounded = [path for path in site.weights if path in methods]
    transform = methods[rounded[0]].transform
    assert transform is not None
    scale = transform(
        [params[path] for path in rounded],
        [grams[path] for path in rounded],
        pooled[channels],
        [methods[path].format for path in rounded],
    )
    for path in site.weights:  # those that stay float are scaled along
        params[path] = params[path] * scale[:, None]
        if path in grams:
            grams[path] = grams[path] / (scale[:, None] * scale)
    # Channels that share a producer share the scale, so any of them tells it.
    produced = jnp.zeros(width).at[channels].set(scale)
    params[site.producer] = params[site.producer] / produced


def _check_finite(decoder: Decoder, layers: list[Choices]) -> None:
    """Raises InputError for a weight to be quantized that holds NaN or infinite values."""
    first = 0
    for segment in decoder.segments:
        stack = _flat(segment)
        for path, finite in jax.device_get(_finite(stack)).items():
            for index in first + np.flatnonzero(~finite):
                if path in dict(layers[index]):
                    raise InputError(f"layers.{index}.{path} holds NaN or infinite values.")
        first += jax.tree.leaves(stack)[0].shape[0]


@jax.jit
def _finite(stack: Params) -> dict[str, Array]:
    """Of each stacked parameter, which layers' values are all finite."""
    return {path: jnp.all(jnp.isfinite(leaf), tuple(range(1, leaf.ndim))) for path, leaf in stack.items()}


def _shapes(decoder: Decoder) -> Iterator[Params]:
    """Every layer's parameters as shapes."""
    for segment in decoder.segments:
        stack = _flat(segment)
        one = jax.eval_shape(lambda stack: jax.tree.map(itemgetter(0), stack), stack)
        yield from [one] * jax.tree.leaves(stack)[0].shape[0]


def _flat(block: nnx.Module) -> Params:
    return {
        ".".join(map(str, path)): leaf for path, leaf in flatten_mapping(nnx.to_pure_dict(nnx.state(block))).items()
    }
