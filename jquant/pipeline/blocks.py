"""One block transformed and rounded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from jquant.calibration.options import DEFAULTS, Options
from jquant.calibration.windows import UNWEIGHTED, SiteStats, Stats, keys_of
from jquant.composition import Choices, Method
from jquant.errors import InputError
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Block
from jquant.models.families import Site, bias_of, family_of, shared_channels
from jquant.models.params import Params, flat_params, weight_name, with_params
from jquant.parts import given, needs_of_parts, shown
from jquant.qtensor import Grid, QTensor, joined_columns
from jquant.rounding import SolveInfo, round_to_grid
from jquant.rounding.cholesky import cholesky, solve
from jquant.rounding.info import joined_infos
from jquant.rounding.limits import check_scales


@dataclass(frozen=True)
class Evidence:
    """What is known when a block is rounded.

    Attributes:
      stats: statistics of its inputs (`Calibration.observe`).
      clips: factors on the scales that a `LossSearch` learned, by weight.
      observe: takes the statistics of the quantized block for the next pass; None for a single pass.
    """

    stats: Stats
    clips: Mapping[str, Array] = field(default_factory=dict)
    observe: Callable[[Block, Block, Choices], Stats] | None = None


def quantize_block(
    block: Block, choices: Choices, evidence: Evidence, options: Options = DEFAULTS, layer: int = 0
) -> tuple[Block, dict[str, SolveInfo]]:
    """Transforms and rounds a block; returns it and each weight's `SolveInfo`.

    Args:
      block: float.
      choices: the methods of its weights.
      evidence: what is known of its inputs.
      options: how often it is rounded, and the mesh over which the weights' columns are split.
      layer: its number, for error messages.

    Raises:
      InputError: a rounded weight that can't be used (`_check_rounded`).
    """
    if not choices:
        return block, {}
    flat, infos, devices = flat_params(block), {}, options.devices
    params, stats = (devices.columns(flat, dict(choices)) if devices else flat), evidence.stats
    exact = block
    if any(chosen.transform is not None for _, chosen in choices):
        wide = {path: leaf.astype(jnp.float32) for path, leaf in params.items()}
        params, stats = _transform_block(wide, stats, choices, block.attention.config)
        exact = with_params(block, {path: leaf.astype(flat[path].dtype) for path, leaf in params.items()})
    quantized, name = exact, partial(weight_name, layer)
    for number in range(options.passes):
        if number and evidence.observe and any(chosen.needs for _, chosen in choices):
            on_all = devices.place if devices else lambda tree: tree
            stats = evidence.observe(on_all(quantized), on_all(exact), choices)
        weights = {}
        for path, chosen in choices:
            # One after the other: solving a wide matrix takes several times the memory of its statistics.
            seen = seen_by(path, chosen, stats, block.attention.config)
            if path in evidence.clips:
                seen["clips"] = evidence.clips[path]
            weights[path], info, fits = jax.block_until_ready(round_weight(params[path], seen, chosen=chosen))
            if not fits:
                raise InputError(
                    f"{name(path)}: {shown(chosen.rounding)} chose codes outside of 0 to {2**chosen.format.bits - 1}."
                )
            infos[path] = jax.device_get(info)
        quantized = with_params(exact, weights)
    _check_rounded(quantized, flat, infos, choices, name)
    return quantized, infos


@partial(jax.jit, static_argnames=("choices", "config"))
def _transform_block(params: Params, stats: Stats, choices: Choices, config: DecoderConfig) -> tuple[Params, Stats]:
    """Scales every site's channels and its statistics, and folds the inverse into the weight that produces them."""
    params, stats, methods = dict(params), dict(stats), dict(choices)
    for site in family_of(config).sites:
        rounded = {path: methods[path] for path in site.weights if path in methods}
        if not rounded or next(iter(rounded.values())).transform is None:
            continue
        scale = _channel_scale(params, stats[site.tap], site, rounded, config)
        for path in site.weights:  # float weights too: they read the same input
            params[path] = params[path] * scale[:, None]
        stats[site.tap] = {key: statistic.scaled(1 / scale) for key, statistic in stats[site.tap].items()}
        # Channels that share a producer have the same scale, so it does not matter which of them is set last.
        channels, width = _producers(site, config, len(scale))
        per_channel = jnp.zeros(width).at[channels].set(scale)
        for path in (site.producer, bias_of(site.producer)):
            if path in params:
                params[path] = params[path] / per_channel
    return params, stats


def _channel_scale(
    params: Params, stats: SiteStats, site: Site, methods: Mapping[str, Method], config: DecoderConfig
) -> Float[Array, " in"]:
    """The factors that scale a site's channels; channels that share a producer share a factor."""
    transform = next(iter(methods.values())).transform
    assert transform is not None
    channels, width = _producers(site, config, params[site.weights[0]].shape[0])

    def shared(values: Array) -> Array:
        sums = jnp.zeros(width).at[channels].add(values)
        return (sums / jnp.zeros(width).at[channels].add(1))[channels]

    seen: dict[str, Any] = {}
    for name in needs_of_parts(transform):
        each = [stats[keys_of(name, site, path, method)[0]].value for path, method in methods.items()]
        match name:
            case "abs_max":
                seen[name] = jnp.zeros(width).at[channels].max(each[0])[channels]
            case "abs_mean":
                seen[name] = shared(each[0])
            case _:
                seen[name] = each
    scale = transform([params[path] for path in methods], [method.format for method in methods.values()], **seen)
    return jnp.exp(shared(jnp.log(scale)))


def _producers(site: Site, config: DecoderConfig, features: int) -> tuple[Array, int]:
    """The producer's channel behind each channel of a site, and the producer's number of channels."""
    shared = shared_channels(site, config)
    return (jnp.arange(features), features) if shared is None else (jnp.asarray(shared), max(shared) + 1)


def seen_by(path: str, chosen: Method, stats: Stats, config: DecoderConfig) -> dict[str, Any]:
    """A weight's statistics by name: those that its method needs, and "held_out" if it was observed.

    Where groups of outputs have statistics of their own, these are stacked.
    """
    site = next(site for site in family_of(config).sites if path in site.weights)
    observed, seen = stats.get(site.tap, {}), {}
    for name in sorted({*chosen.statistics, "held_out"}):
        found = [observed[key] for key in keys_of(name, site, path, chosen) if key in observed]
        if found:
            seen[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found) if len(found) > 1 else found[0]
    return seen


@partial(jax.jit, static_argnames="chosen")
def round_weight(
    w: Float[Array, "in out"], seen: Mapping[str, Any], *, chosen: Method
) -> tuple[QTensor, SolveInfo, Bool[Array, ""]]:
    """Rounds one weight; returns it, its `SolveInfo`, and whether its codes fit the format.

    Weights of one shape and method share a compiled program.

    Args:
      w: the weight.
      seen: statistics of its inputs by name, and "clips": factors on its scales that a `LossSearch` learned.
      chosen: its method.
    """
    count = chosen.output_groups
    if count == 1:
        return _round_weight(w, seen, chosen)
    shared = {name: statistic for name, statistic in seen.items() if name in UNWEIGHTED}
    own = {name: statistic for name, statistic in seen.items() if name not in UNWEIGHTED}
    columns = w.reshape(len(w), count, -1).swapaxes(0, 1)
    rounded = jax.lax.map(lambda group: _round_weight(group[0], group[1] | shared, chosen), (columns, own))
    parts, infos, fits = zip(*(jax.tree.map(itemgetter(group), rounded) for group in range(count)), strict=True)
    return joined_columns(parts), joined_infos(infos), jnp.all(jnp.stack(fits))


def _round_weight(
    w: Float[Array, "in out"], seen: Mapping[str, Any], chosen: Method
) -> tuple[QTensor, SolveInfo, Bool[Array, ""]]:
    w = w.astype(jnp.float32)
    values = {name: statistic if name == "clips" else statistic.value for name, statistic in seen.items()}
    unsolved = jnp.bool_(False)
    if chosen.error_propagation:
        moved = propagate_error(w, values["gram"], values["cross"], chosen.error_propagation)
        unsolved = ~jnp.all(jnp.isfinite(moved))
        w = jnp.where(unsolved, w, moved)
    rotations = None
    if chosen.incoherence is not None:
        rotations, w = chosen.incoherence.rotations(w.shape), chosen.incoherence.turn(w)
        grams = {name: values[name] for name in ("gram", "held_out") if name in values}
        values |= jax.tree.map(chosen.incoherence.turn_gram, grams)
        if "output_gram" in values:
            values["output_gram"] = chosen.incoherence.turn_output_gram(values["output_gram"])
    grid = Grid.of(*chosen.range(w, chosen.format, **given(chosen.range, values)), chosen.format, w.shape)
    q, info, fits = round_to_grid(w, grid, chosen.rounding, values)
    if chosen.error_propagation:
        info = replace(info, fallback=jnp.maximum(info.fallback, unsolved.astype(jnp.int32)))
    if chosen.activation is not None:
        q = replace(q, activation=chosen.activation)
        if chosen.activation.static:
            ends = jnp.max(values["abs_max"], keepdims=True)[None]
            q = replace(q, input_scale=chosen.activation.format.grid(-ends, ends)[0])
    return replace(q, rotations=rotations), info, fits


def propagate_error(
    w: Float[Array, "in out"], gram: Float[Array, "in in"], cross: Float[Array, "in in"], strength: float
) -> Float[Array, "in out"]:
    """W + α H⁻¹ C W: the weight that maps its inputs x̃ to what the float weight makes of the float inputs x.

    H is the mean of x̃ x̃ᵀ and C that of x̃ (x − x̃)ᵀ. α = 1 is the least-squares fit; a smaller α overfits the
    calibration text less (QEP, arXiv 2504.09629, Eq. 5; GPTAQ, arXiv 2504.02692). H is damped by 1 % of its mean
    diagonal. If the damped H has no Cholesky factor, the result is not finite.
    """
    damped = gram + 0.01 * jnp.mean(jnp.diagonal(gram)) * jnp.eye(len(gram), dtype=gram.dtype)
    lag = jnp.matmul(cross, w, precision="highest")
    return w + strength * solve(cholesky(damped), lag)


def _check_rounded(
    quantized: Block, floats: Params, infos: Mapping[str, SolveInfo], choices: Choices, name: Callable[[str], str]
) -> None:
    """Refuses a block with rounded weights that can't be used; names the first one.

    Raises:
      InputError: scales that do not fit their dtype (`check_scales`); an output error that is NaN or infinite although
        the statistics are finite.
    """
    for path, chosen in choices:
        if "gram" in chosen.needs and not np.isfinite([infos[path].error, infos[path].energy]).all():
            raise InputError(f"{name(path)}: the error of its outputs is NaN or infinite after rounding.")
    params = flat_params(quantized)
    check_scales({name(path): params[path] for path, _ in choices}, {name(path): floats[path] for path, _ in choices})
