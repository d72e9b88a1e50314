"""Quantizes a decoder block by block: observe, transform, round, move on with the quantized block's outputs.

By default each block sees the inputs that the quantized blocks before it produce, so that later blocks make up for
earlier errors. Only one block's statistics are ever alive.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.traversals import flatten_mapping, unflatten_mapping
from jax import Array
from jaxtyping import Float, Int

from jquant.calibration.windows import WEIGHTED, Calibration, Choices, SiteStats, Stats, weighting
from jquant.data import check_tokens, check_whole, run_hashes, sample_windows
from jquant.errors import InputError
from jquant.formats import Group, block_shape
from jquant.io.load import LanguageModel, Progress
from jquant.learning.clips import learn_clips
from jquant.methods import Method, Plan, assign, complete
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Block, Decoder, blocks, with_blocks
from jquant.models.families import LLAMA, Site, shared_channels
from jquant.parts import shown
from jquant.qtensor import QTensor
from jquant.models.folding import rotate
from jquant.rounding import SolveInfo
from jquant.rounding.limits import check_scales
from jquant.parallel.mesh import Devices
from jquant.learning.tuning import tune, tune_block

Params = dict[str, Any]  # "attention.q.kernel" -> Array or QTensor
Report = dict[tuple[int, str], SolveInfo]


def quantize_decoder(
    decoder: Decoder,
    method: str | Method | Plan,
    tokens: Int[np.ndarray, "n context"] | None = None,
    *,
    batch: int | None = None,
    inputs: Literal["quantized", "float"] = "quantized",
    passes: int = 1,
    held_out: int = 0,
    devices: Devices | None = None,
    progress: Progress | None = None,
) -> tuple[Decoder, Report]:
    """Quantizes the projections of the blocks; embedding, norms and head stay as they are.

    Args:
      decoder: float; left untouched.
      method: a point in the space of methods, a name in `METHODS`, or a plan that gives weights different ones
        (`methods.assign`).
      tokens: calibration windows; not needed by methods that look at weights alone.
      batch: windows per forward pass and device; by default `usual_batch()`.
      inputs: whether a block is fitted to what the quantized blocks before it produce, or to what float ones do.
      passes: how often a block is rounded. From the second time on, its projections are fitted to the inputs that its
        own quantized projections produce.
      held_out: windows at the end of `tokens` that nothing is fitted to: `SolveInfo` has the error on them, and GPTQ
        may choose its damping by it.
      devices: the mesh to compute on: windows are split over one axis, weights' columns over the other.
      progress: called with ("quantize", blocks done, blocks in all) and the error so far, the share of their outputs'
        energy that projections lose, averaged; and with ("tune", steps done, steps in all) and the loss.

    Returns:
      The quantized decoder, and what was done to each weight: (layer, path) -> SolveInfo.

    Raises:
      InputError: what `check_plan` finds; an option out of range; a method needs calibration tokens, or held-out ones,
        and there are none.
    """
    return quantize_decoders(
        decoder,
        {"": method},
        tokens,
        batch=batch,
        inputs=inputs,
        passes=passes,
        held_out=held_out,
        devices=devices,
        progress=progress,
    )[""]


def quantize_decoders(
    decoder: Decoder,
    methods: Mapping[str, str | Method | Plan],
    tokens: Int[np.ndarray, "n context"] | None = None,
    *,
    batch: int | None = None,
    inputs: Literal["quantized", "float"] = "float",
    passes: int = 1,
    held_out: int = 0,
    devices: Devices | None = None,
    progress: Progress | None = None,
) -> dict[str, tuple[Decoder, Report]]:
    """`quantize_decoder` for several methods on one way through the blocks.

    Forward passes, and statistics that methods share, are computed once, so every block must read what the float blocks
    before it produce. Arguments and errors are those of `quantize_decoder`; results come by the methods' names.
    """
    plans = {name: check_plan(decoder, method) for name, method in methods.items()}
    rotations = {shared(plan, "rotation", None) for plan in plans.values()}
    if len(rotations) > 1:
        raise InputError("Methods can share a calibration pass only with the same rotation.")
    if rotation := next(iter(rotations), None):
        decoder = rotate(decoder, **asdict(rotation))
    wanted = together(plans)
    check_options(decoder.config, wanted, tokens, batch, inputs, passes, held_out)
    needs = any(chosen.needs - {"text"} for layer in wanted for _, chosen in layer)
    if len(plans) > 1 and inputs == "quantized" and needs:
        raise InputError('Methods can share a calibration pass only with inputs="float".')
    calibration = None
    if needs:
        calibration = Calibration(
            decoder, wanted, tokens, batch=batch, inputs=inputs, held_out=held_out, devices=devices
        )
    fit = np.empty((0, 0), np.int32) if tokens is None else tokens[: len(tokens) - held_out]
    clips = {name: learn_clips(decoder, plan, fit) for name, plan in plans.items()}
    done: dict[str, list[Block]] = {name: [] for name in plans}
    reports: dict[str, Report] = {name: {} for name in plans}
    steps = quantize_blocks(blocks(decoder), plans, calibration, clips=clips, passes=passes, devices=devices)
    for index, results in enumerate(steps):
        for name, (quantized, infos) in results.items():
            done[name].append(quantized)
            reports[name] |= {(index, path): info for path, info in infos.items()}
        if progress:
            progress("quantize", index + 1, decoder.config.layers, error=relative_error(reports.values()))
    decoders = {name: with_blocks(decoder, layers) for name, layers in done.items()}
    for name, plan in plans.items():
        for stage in shared(plan, "tuning", ()):
            if stage.target != "block":
                decoders[name] = tune(decoders[name], decoder, fit, stage, progress=progress)
    return {name: (decoders[name], reports[name]) for name in plans}


def check_options(
    config: DecoderConfig,
    wanted: Sequence[Choices],
    tokens: Any,
    batch: int | None,
    inputs: str,
    passes: int,
    held_out: int,
) -> None:
    """Raises InputError for arguments of `quantize_decoder` that are out of range, or leave nothing to learn from."""
    if inputs not in ("quantized", "float"):
        raise InputError(f'Blocks take inputs="quantized" or "float", not {inputs!r}.')
    check_whole(1, passes=passes, batch=1 if batch is None else batch)
    check_whole(0, held_out=held_out)
    if tokens is not None:
        check_tokens(tokens, config, "Calibration windows")
    windows = 0 if tokens is None else len(tokens)
    if held_out >= windows and any(chosen.tuning for layer in wanted for _, chosen in layer):
        raise InputError(f"Tuning learns from text: held_out={held_out} of {windows} calibration windows leaves none.")


def together(plans: Mapping[str, Sequence[Choices]]) -> list[Choices]:
    """What the statistics of each block must serve: every weight's methods, each once."""
    return [tuple(dict.fromkeys(chain.from_iterable(layer))) for layer in zip(*plans.values(), strict=True)]


def quantize_blocks(
    source: Iterable[Block],
    plans: Mapping[str, Sequence[Choices]],
    calibration: Calibration | None,
    *,
    clips: Mapping[str, Mapping[int, Mapping[str, Array]]] | None = None,
    passes: int = 1,
    first: int = 0,
    devices: Devices | None = None,
) -> Iterator[dict[str, tuple[Block, dict[str, SolveInfo]]]]:
    """Quantizes blocks as they come; the calibration windows move on when the next one is asked for.

    Args:
      source: float blocks, of which no more than one is held.
      plans: the methods of every layer's weights, by name (`check_plan`).
      calibration: its windows at the first of the blocks; None where no method looks at activations.
      clips: factors on the scales that a `LossSearch` learned, by name, layer and weight.
      passes: see `quantize_decoder`.
      first: layer of the first block.
      devices: see `quantize_decoder`.

    Yields:
      Each block quantized, and what was done to its weights, by the plans' names.
    """
    wanted = together(plans)
    needs = [any(chosen.needs - {"text"} for _, chosen in layer) for layer in wanted]
    whole = devices.place if devices else lambda tree: tree
    # Where blocks read what float ones produce, one pass through a block does for its statistics and for what follows.
    tuned = any(stage.target == "block" for plan in plans.values() for stage in shared(plan, "tuning", ()))
    once = calibration is not None and calibration.inputs == "float" and passes == 1 and not tuned
    for index, block in enumerate(map(whole, source), first):
        stats, moved = {}, False
        if calibration and needs[index]:
            moved = once and any(needs[index + 1 :])
            stats = calibration.observe(block, block, wanted[index], index, advance=moved)
        again = partial(calibration.observe, layer=index) if calibration and passes > 1 else None
        done = {}
        for name, plan in plans.items():
            learned = (clips or {}).get(name, {}).get(index, {})
            quantized, infos = quantize_block(block, plan[index], stats, learned, again, passes, devices)
            infos = jax.device_get(infos)
            check_rounded(block, quantized, infos, plan[index], index)
            done[name] = quantized, infos
        if calibration and any(needs[index:]):
            calibration.advance_exact(block)
            for name, (quantized, infos) in done.items():
                done[name] = _tune_block(quantized, plans[name][index], calibration, index), infos
        yield done
        if calibration and any(needs[index + 1 :]) and not moved:
            calibration.advance(block if calibration.inputs == "float" else whole(next(iter(done.values()))[0]))


def check_rounded(block: Block, quantized: Block, infos: Mapping[str, SolveInfo], choices: Choices, layer: int) -> None:
    """Refuses a block of which some weights were rounded to nothing useful, by their names.

    Raises:
      InputError: scales that do not fit their dtype (`check_scales`); an output error that is not finite, although its
        statistics are.
    """
    for path, chosen in choices:
        if "gram" in chosen.needs and not np.isfinite([infos[path].error, infos[path].energy]).all():
            raise InputError(f"layers.{layer}.{path}: the error of its outputs is NaN or infinite after rounding.")
    before, after = flat_params(block), flat_params(quantized)
    rounded = {path: after[path] for path, _ in choices if isinstance(after[path], QTensor)}
    name = f"layers.{layer}.{{}}".format
    check_scales({name(path): q for path, q in rounded.items()}, {name(path): before[path] for path in rounded})


def fallbacks(report: Report) -> list[str]:
    """The weights for which no factorisation was finite (`SolveInfo.fallback`), e.g. "layers.3.mlp.down.kernel"."""
    return [f"layers.{layer}.{path}" for (layer, path), info in report.items() if info.fallback]


def shared(layers: Sequence[Choices], choice: Literal["rotation", "tuning"], default: Any) -> Any:
    """What all methods of a plan have in common (`check_plan`)."""
    return next((getattr(chosen, choice) for layer in layers for _, chosen in layer), default)


def _tune_block(block: Block, choices: Choices, calibration: Calibration, layer: int) -> Block:
    for stage in shared([choices], "tuning", ()):
        if stage.target == "block":
            try:
                block = tune_block(block, *calibration.windows(), calibration.rotary, stage)
            except InputError as wrong:
                raise InputError(f"layers.{layer}: {wrong}") from None
    return block


def relative_error(reports: Iterable[Report]) -> float:
    """Share of the projections' output energy that the rounding loses, averaged over what is done; NaN if unknown."""
    shares = [info.error / info.energy for report in reports for info in report.values() if info.energy > 0]
    return float(np.mean(shares)) if shares else math.nan


def check_plan(decoder: Decoder, method: str | Method | Plan) -> list[Choices]:
    """Finds out before any work whether a plan suits a decoder; the methods of each layer's weights.

    Raises:
      InputError: no method or plan (`methods.complete`); a rule that names no weight; a weight smaller than its
        method's groups, or with NaN or infinite values; a decoder that is quantized already; projections that read one
        input and do not share a transform; a transform with a range that is learned before it; methods that do not
        share tuning or rotation.
    """
    paths = [path for site in LLAMA.sites for path in site.weights]
    chosen = assign(method, [f"layers.{i}.{path}" for i in range(decoder.config.layers) for path in paths])
    rotated = [
        segment.mlp.rotation is not None
        for segment in decoder.segments
        for _ in range(segment.mlp.down.kernel.get_value().shape[0])
    ]
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
        down = dict(layers[-1]).get("mlp.down.kernel")
        will_be = down is not None and down.rotation is not None and down.rotation.mlp
        if (rotated[index] or will_be) and down is not None and down.transform is not None:
            raise InputError(
                f"layers.{index}.mlp.down.kernel reads rotated inputs, so no scale folds into mlp.up: leave its "
                f"transform out, or rotate with mlp=False."
            )
        for site in LLAMA.sites:
            if len({m.transform for path, m in layers[-1] if path in site.weights}) > 1:
                readers = ", ".join(site.weights)
                raise InputError(f"layers.{index}: {readers} read one input, so they must share a transform.")
    if len({chosen.tuning for layer in layers for _, chosen in layer}) > 1:
        raise InputError("A plan's weights are tuned together: give its methods the same tuning.")
    if len({chosen.rotation for layer in layers for _, chosen in layer}) > 1:
        raise InputError("A plan's weights are rotated together: give its methods the same rotation.")
    if isinstance(decoder.embedding.get_value(), Array):  # and not abstract, its blocks still on disk
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
    held_out: int = 0,
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
      held_out: further windows that nothing is fitted to (`quantize_decoder`).
      seed: of the draw.
      progress: as for `quantize_decoder`.

    Returns:
      A model whose kernels are QTensors, with `report` filled, which knows what it was calibrated on.

    Raises:
      InputError: an unknown method; a plan's rule that names no weight; a missing or too short calibration text; a
        number out of range; a context longer than the model's; a model that is quantized already.
    """
    plan = complete(method, bits, group, symmetric)
    check_whole(1, samples=samples, context=context)
    check_whole(0, held_out=held_out, seed=seed)
    layers = check_plan(model.decoder, plan)
    needs = any(chosen.needs_calibration for layer in layers for _, chosen in layer)
    tokens, seen = None, model.calibrated_on
    if needs:
        if calibration is None:
            raise InputError(f"{shown(method)} looks at activations: give it calibration=load_text('c4_utf8'), e.g.")
        ids = model.tokenizer.encode(calibration)
        tokens, runs = sample_windows(ids, context, samples + held_out, seed), run_hashes(ids)
        seen = runs if seen is None else np.union1d(seen, runs)
    decoder, report = quantize_decoder(model.decoder, plan, tokens, held_out=held_out, progress=progress)
    return replace(model, decoder=decoder, report=report, calibrated_on=seen)


def quantize_block(
    block: Block,
    choices: Choices,
    stats: Stats,
    clips: Mapping[str, Array] | None = None,
    again: Callable[[Block, Block, Choices], Stats] | None = None,
    passes: int = 1,
    devices: Devices | None = None,
) -> tuple[Block, dict[str, SolveInfo]]:
    """The block transformed and rounded, and what was done to its weights.

    Args:
      block: float.
      choices: the methods of its weights.
      stats: what the methods look at (`Calibration.observe`).
      clips: factors on the scales that a `LossSearch` learned, by weight.
      again: observes the block, quantized, for the next pass.
      passes: how often it is rounded.
      devices: the mesh over which the weights' columns are split.
    """
    if not choices:
        return block, {}
    flat, infos = flat_params(block), {}
    params = devices.columns(flat, dict(choices)) if devices else flat
    exact = block
    if any(chosen.transform is not None for _, chosen in choices):
        wide = {path: leaf.astype(jnp.float32) for path, leaf in params.items()}
        params, stats = _transform_block(wide, stats, choices, block.attention.config)
        exact = _with_params(block, {path: leaf.astype(flat[path].dtype) for path, leaf in params.items()})
    quantized = exact
    for number in range(passes):
        if number and again and any(chosen.needs for _, chosen in choices):
            whole = devices.place if devices else lambda tree: tree
            stats = again(whole(quantized), whole(exact), choices)
        rounded, infos = round_block(params, stats, clips or {}, choices)
        quantized = _with_params(exact, rounded)
    return quantized, infos


@partial(jax.jit, static_argnames=("choices", "config"))
def _transform_block(params: Params, stats: Stats, choices: Choices, config: DecoderConfig) -> tuple[Params, Stats]:
    """Every site's channels scaled and the inverse folded into what produces them; the statistics follow."""
    params, stats, methods = dict(params), dict(stats), dict(choices)
    for site in LLAMA.sites:
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

    told: dict[str, Any] = {}
    for kind in transform.needs:
        if kind in WEIGHTED:
            told[kind] = [stats[kind, weighting(site, path, one)].mean for path, one in methods.items()]
        elif kind == "abs_max":
            told[kind] = jnp.zeros(width).at[channels].max(stats[kind, "uniform"].largest)[channels]
        else:
            told[kind] = shared(stats[kind, "uniform"].mean)
    scale = transform([params[path] for path in methods], told, [one.format for one in methods.values()])
    return jnp.exp(shared(jnp.log(scale)))


def _producers(site: Site, config: DecoderConfig, features: int) -> tuple[Array, int]:
    """Of each channel of a site, the producer's channel that makes it, and how many channels the producer has."""
    shared = shared_channels(site, config)
    return (jnp.arange(features), features) if shared is None else (jnp.asarray(shared), max(shared) + 1)


def round_block(
    params: Params, stats: Stats, clips: Mapping[str, Array], choices: Choices
) -> tuple[Params, dict[str, SolveInfo]]:
    """The weights that have a method, as QTensors, and what was done to each."""
    rounded, infos = {}, {}
    sites = {path: site for site in LLAMA.sites for path in site.weights}
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


def _with_params(block: Block, params: Params) -> Block:
    """A copy of the block with other parameters."""
    new = nnx.clone(block)  # merging what split gave would share the variables
    nnx.update(new, unflatten_mapping({tuple(path.split(".")): leaf for path, leaf in params.items()}))
    return new


def _check_finite(decoder: Decoder, layers: list[Choices]) -> None:
    """Raises InputError for a weight to be quantized that holds NaN or infinite values."""
    first = 0
    for segment in decoder.segments:
        stack = flat_params(segment)
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
        stack = flat_params(segment)
        one = jax.eval_shape(lambda stack: jax.tree.map(itemgetter(0), stack), stack)
        yield from [one] * jax.tree.leaves(stack)[0].shape[0]


def flat_params(module: nnx.Module) -> Params:
    """A module's parameters by name."""
    return {
        ".".join(map(str, path)): leaf for path, leaf in flatten_mapping(nnx.to_pure_dict(nnx.state(module))).items()
    }
