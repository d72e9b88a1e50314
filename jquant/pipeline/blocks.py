"""One block transformed and rounded."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jquant.calibration.options import DEFAULTS, Options
from jquant.calibration.token_weights import weighting
from jquant.calibration.windows import WEIGHTED, SiteStats, Stats
from jquant.composition import Choices, Method
from jquant.errors import InputError
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Block
from jquant.models.families import Site, family_of, shared_channels
from jquant.models.params import Params, flat_params, weight_name, with_params
from jquant.qtensor import QTensor
from jquant.rounding import SolveInfo
from jquant.rounding.limits import check_scales


def quantize_block(
    block: Block,
    choices: Choices,
    stats: Stats,
    options: Options = DEFAULTS,
    clips: Mapping[str, Array] | None = None,
    observe: Callable[[Block, Block, Choices], Stats] | None = None,
) -> tuple[Block, dict[str, SolveInfo]]:
    """The block transformed and rounded, and what was done to its weights.

    Args:
      block: float.
      choices: the methods of its weights.
      stats: what the methods look at (`Calibration.observe`).
      options: how often it is rounded, and the mesh over which the weights' columns are split.
      clips: factors on the scales that a `LossSearch` learned, by weight.
      observe: takes the statistics of the quantized block, for the next pass.
    """
    if not choices:
        return block, {}
    flat, infos, devices = flat_params(block), {}, options.devices
    params = devices.columns(flat, dict(choices)) if devices else flat
    exact = block
    if any(chosen.transform is not None for _, chosen in choices):
        wide = {path: leaf.astype(jnp.float32) for path, leaf in params.items()}
        params, stats = _transform_block(wide, stats, choices, block.attention.config)
        exact = with_params(block, {path: leaf.astype(flat[path].dtype) for path, leaf in params.items()})
    quantized = exact
    for number in range(options.passes):
        if number and observe and any(chosen.needs for _, chosen in choices):
            whole = devices.place if devices else lambda tree: tree
            stats = observe(whole(quantized), whole(exact), choices)
        rounded, infos = round_block(params, stats, clips or {}, choices, block.attention.config)
        quantized = with_params(exact, rounded)
    return quantized, infos


@partial(jax.jit, static_argnames=("choices", "config"))
def _transform_block(params: Params, stats: Stats, choices: Choices, config: DecoderConfig) -> tuple[Params, Stats]:
    """Every site's channels scaled and the inverse folded into what produces them; the statistics follow."""
    params, stats, methods = dict(params), dict(stats), dict(choices)
    for site in family_of(config).sites:
        rounded = {path: methods[path] for path in site.weights if path in methods}
        if not rounded or next(iter(rounded.values())).transform is None:
            continue
        scale = _channel_scale(params, stats[site.tap], site, rounded, config)
        for path in site.weights:  # those that stay float are scaled along
            params[path] = params[path] * scale[:, None]
        stats[site.tap] = {key: one.scaled(1 / scale) for key, one in stats[site.tap].items()}
        # Channels that share a producer share the scale, so any of them tells it.
        channels, width = _producers(site, config, len(scale))
        params[site.producer] = params[site.producer] / jnp.zeros(width).at[channels].set(scale)
    return params, stats


def _channel_scale(
    params: Params, stats: SiteStats, site: Site, methods: Mapping[str, Method], config: DecoderConfig
) -> Float[Array, " in"]:
    """What a site's transform multiplies its channels by, the same for channels that share a producer."""
    transform = next(iter(methods.values())).transform
    assert transform is not None
    channels, width = _producers(site, config, params[site.weights[0]].shape[0])

    def shared(values: Array) -> Array:
        sums = jnp.zeros(width).at[channels].add(values)
        return (sums / jnp.zeros(width).at[channels].add(1))[channels]

    given: dict[str, Any] = {}
    for kind in transform.needs:
        if kind in WEIGHTED:
            given[kind] = [stats[kind, weighting(site, path, one)].mean for path, one in methods.items()]
        elif kind == "abs_max":
            given[kind] = jnp.zeros(width).at[channels].max(stats[kind, "uniform"].largest)[channels]
        else:
            given[kind] = shared(stats[kind, "uniform"].mean)
    scale = transform([params[path] for path in methods], given, [one.format for one in methods.values()])
    return jnp.exp(shared(jnp.log(scale)))


def _producers(site: Site, config: DecoderConfig, features: int) -> tuple[Array, int]:
    """Of each channel of a site, the producer's channel that makes it, and how many channels the producer has."""
    shared = shared_channels(site, config)
    return (jnp.arange(features), features) if shared is None else (jnp.asarray(shared), max(shared) + 1)


def round_block(
    params: Params, stats: Stats, clips: Mapping[str, Array], choices: Choices, config: DecoderConfig
) -> tuple[Params, dict[str, SolveInfo]]:
    """The weights that have a method, as QTensors, and what was done to each."""
    rounded, infos = {}, {}
    sites = {path: site for site in family_of(config).sites for path in site.weights}
    for path, chosen in choices:
        # One after the other: what a wide matrix needs while it is solved is several times its statistics.
        seen = seen_by(path, chosen, sites[path], stats)
        done = round_weight(params[path], seen, clips.get(path), chosen=chosen)
        rounded[path], infos[path] = jax.block_until_ready(done)
    return rounded, infos


def seen_by(path: str, chosen: Method, site: Site, stats: Stats) -> dict[str, Any]:
    """What a weight's method looks at, by kind."""
    seen, by = stats.get(site.tap, {}), weighting(site, path, chosen)
    kinds = chosen.needs | {"held_out"}
    keys = {kind: (kind, by if kind in WEIGHTED else "uniform") for kind in sorted(kinds)}
    return {kind: seen[key] for kind, key in keys.items() if key in seen}


@partial(jax.jit, static_argnames="chosen")
def round_weight(
    w: Float[Array, "in out"], seen: Mapping[str, Any], clip: Array | None, *, chosen: Method
) -> tuple[QTensor | Array, SolveInfo]:
    """One weight rounded by its method: one program for all weights of a shape.

    Args:
      w: the weight.
      seen: the statistics of its inputs, by kind.
      clip: factors on its scales that a `LossSearch` learned.
      chosen: its method.
    """
    w = w.astype(jnp.float32)
    gram, held_out = (seen[kind].mean if kind in seen else None for kind in ("gram", "held_out"))
    unsolved = jnp.bool_(False)
    if chosen.error_propagation:
        assert gram is not None
        moved = propagate_error(w, gram, seen["cross"].mean, chosen.error_propagation)
        unsolved = ~jnp.all(jnp.isfinite(moved))
        w = jnp.where(unsolved, w, moved)
    grid = chosen.range(w, chosen.format, gram, clip)
    q, info = chosen.rounding(w, *grid, gram, chosen.format, held_out)
    if chosen.error_propagation:
        info = replace(info, fallback=jnp.maximum(info.fallback, unsolved.astype(jnp.int32)))
    if chosen.activation is not None:
        q = replace(q, activation=chosen.activation)
        if chosen.activation.static:
            ends = jnp.max(seen["abs_max"].largest, keepdims=True)[None]
            q = replace(q, input_scale=chosen.activation.format.grid(-ends, ends)[0])
    return q, info


def propagate_error(
    w: Float[Array, "in out"], gram: Float[Array, "in in"], cross: Float[Array, "in in"], strength: float
) -> Float[Array, "in out"]:
    """W + α H⁻¹ C W: what a weight should be, to make of its inputs x̃ what the float one makes of x.

    With H the mean of x̃ x̃ᵀ and C that of x̃ (x − x̃)ᵀ, α = 1 is the least-squares fit; less keeps it from fitting the
    calibration text (QEP, arXiv 2504.09629, Eq. 5; GPTAQ, arXiv 2504.02692). H is damped by 1 % of its mean diagonal;
    the result is not finite where it has no factorisation even so.
    """
    damped = gram + 0.01 * jnp.mean(jnp.diagonal(gram)) * jnp.eye(len(gram), dtype=gram.dtype)
    lag = jnp.matmul(cross, w, precision="highest")
    return w + strength * jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(damped), True), lag)


def check_rounded(block: Block, quantized: Block, infos: Mapping[str, SolveInfo], choices: Choices, layer: int) -> None:
    """Refuses a block of which some weights were rounded to nothing useful, by their names.

    Raises:
      InputError: scales that do not fit their dtype (`check_scales`); an output error that is not finite, although its
        statistics are.
    """
    for path, chosen in choices:
        if "gram" in chosen.needs and not np.isfinite([infos[path].error, infos[path].energy]).all():
            raise InputError(f"{weight_name(layer, path)}: the error of its outputs is NaN or infinite after rounding.")
    before, after = flat_params(block), flat_params(quantized)
    rounded = {path: after[path] for path, _ in choices if isinstance(after[path], QTensor)}
    name = partial(weight_name, layer)
    check_scales({name(path): q for path, q in rounded.items()}, {name(path): before[path] for path in rounded})
