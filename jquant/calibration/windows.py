"""The calibration windows on their way through the blocks, and the statistics of a block's inputs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jquant.calibration.loss_gradients import at_outputs, loss_gradients
from jquant.calibration.options import DEFAULTS, Options
from jquant.calibration.spill import Spill, Waiting
from jquant.calibration.token_weights import token_weight, weightings
from jquant.composition import Choices, Method, needs_of
from jquant.errors import InputError
from jquant.learning.objectives import all_finite
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Block, Decoder
from jquant.models.families import Site, family_of, features_of
from jquant.models.rotary import rotary_table
from jquant.parallel.mesh import BOTH, Devices, exchange, gather_pieces, scatter
from jquant.stats import BUILT_IN, Gram


class Key(NamedTuple):
    """The key of a statistic at a site.

    Attributes:
      name: as in `Method.needs`.
      by: how tokens are weighted: "uniform", "norm", by a tap (its name), or by a weight's gradients
        (`loss_gradients.names_of`). Of "output_gram" the weight's path: tokens count the squared norm of its inputs.
      statistic: its class.
    """

    name: str
    by: str
    statistic: type


SiteStats = dict[Key, Any]
Stats = dict[str, SiteStats]  # by the site's tap
UNWEIGHTED = ("abs_mean", "abs_max")  # all tokens count the same, whatever Method.token_weights says


def keys_of(name: str, site: Site, path: str, chosen: Method) -> tuple[Key, ...]:
    """The keys under which a weight finds a statistic that its method needs: one for each group of its outputs."""
    statistic = BUILT_IN.get(name) or chosen.statistics[name]
    if name == "output_gram":
        return (Key(name, path, statistic),)
    ways = ("uniform",) if name in UNWEIGHTED else weightings(site, path, chosen)
    return tuple(Key(name, way, statistic) for way in ways)


class Calibration:
    """The calibration windows in batches, advanced block by block.

    Args:
      decoder: float; what lies outside its blocks is enough, unless a method takes gradients.
      layers: the methods of each layer's weights.
      tokens: calibration windows.
      options: see `Options`.
      spill: where windows wait that exceed the host's limit.

    Raises:
      InputError: what `check_calibration` finds.
    """

    def __init__(
        self,
        decoder: Decoder,
        layers: Sequence[Choices],
        tokens: Int[np.ndarray, "n context"] | None,
        options: Options = DEFAULTS,
        spill: Spill | None = None,
    ):
        methods = {method for layer in layers for _, method in layer}
        needs = needs_of(methods)
        tokens = check_calibration(needs, tokens, options)
        fit, devices = len(tokens) - options.held_out, options.devices
        starts = [*range(0, fit, options.windows_per_pass), *range(fit, len(tokens), options.windows_per_pass)]
        batches = [devices.windows(batch) if devices else batch for batch in np.split(tokens, starts[1:])]
        self.devices, self.inputs = devices, options.inputs
        self.config, self.dtype = decoder.config, decoder.dtype
        self.fit = sum(start < fit for start in starts)  # batches fitted to; the rest are held out
        self.rotary = rotary_table(decoder.config, jnp.arange(tokens.shape[1]))
        self.seen = Waiting((embed(decoder, batch) for batch in batches), "seen", spill)
        # Token weights by the loss's gradient, by batch; and the gradient behind each block, one batch after the other.
        self.gradients: list[dict[str, Any]] = []
        self.slopes = Waiting((), "slopes", spill)
        for i, batch in enumerate(batches):
            weights, slopes = loss_gradients(decoder, batch, methods)
            self.gradients.append(weights)
            self.slopes.extend(jax.device_put(slope, self.seen[i].sharding) for slope in slopes)
        # The float model's residual stream, if a method compares it with the quantized model's.
        both_streams = "outputs" in needs or (options.inputs == "quantized" and "cross" in needs)
        self.exact = Waiting((embed(decoder, batch) for batch in batches), "exact", spill) if both_streams else None

    def observe(self, block: Block, exact: Block, choices: Choices, layer: int, advance: bool = False) -> Stats:
        """Statistics of all windows at the sites of `block`; `exact` is the float block, run on the float stream.

        With `advance` the windows advance through `block` in the same pass.

        Raises:
          InputError: a statistic that is not finite.
        """
        empty = no_stats(choices, self.config, self.fit < len(self.seen))
        stats = start_pieces(empty, self.devices) if self.devices else empty
        for i, x in enumerate(self.seen):
            held_out = i >= self.fit
            batch = Batch(
                x,
                self.rotary,
                {name: rows[layer] for name, rows in self.gradients[i].items()},
                None if self.exact is None else (exact, self.exact[i]),
                self.slopes[i * self.config.layers + layer] if self.slopes else None,
            )
            part = {
                tap: {key: statistic for key, statistic in site.items() if (key.name == "held_out") == held_out}
                for tap, site in stats.items()
            }
            after, seen = observe_batch(block, batch, part, self.devices, advance)
            if after is not None:
                self.seen[i] = after
            for tap, site in seen.items():
                stats[tap] |= site
        stats = averaged(join_pieces(stats, self.config, self.devices) if self.devices else stats)
        check_stats(stats, layer, self.dtype)
        return stats

    def advance_exact(self, block: Block) -> None:
        """Advances the float model's stream, if it is kept, through the float block."""
        if self.exact is not None:
            for i, x in enumerate(self.exact):
                self.exact[i] = forward(block, x, self.rotary, self.devices)

    def advance(self, block: Block) -> None:
        """Advances the windows through a block: the float or the quantized one, as `self.inputs` says."""
        for i, x in enumerate(self.seen):
            self.seen[i] = forward(block, x, self.rotary, self.devices)

    def windows(self) -> tuple[Float[Array, "n t d"], Float[Array, "n t d"]]:
        """A block's inputs and, after `advance_exact`, the float block's outputs; without held-out windows."""
        assert self.exact is not None
        fit = range(self.fit)
        return jnp.concatenate([self.seen[i] for i in fit]), jnp.concatenate([self.exact[i] for i in fit])


def check_calibration(needs: frozenset[str], tokens: np.ndarray | None, options: Options) -> np.ndarray:
    """The calibration windows, if they are what the methods need.

    Raises:
      InputError: there are none, or no held-out ones; inputs that leave no error to propagate; windows that do not
        divide over the devices.
    """
    if tokens is None:
        raise InputError("This method looks at activations: give it calibration tokens.")
    if not 0 <= options.held_out < len(tokens):
        raise InputError(f"held_out={options.held_out} of {len(tokens)} calibration windows leaves none to fit to.")
    if "held_out" in needs and not options.held_out:
        raise InputError("This method chooses by held-out windows: set held_out to 1 or more.")
    if "cross" in needs and options.inputs == "float":
        raise InputError('With inputs="float" there is no error to propagate: leave error_propagation at 0.')
    if options.devices:
        options.devices.check_windows(len(tokens) - options.held_out)
        options.devices.check_windows(options.held_out)
    return tokens


def no_stats(choices: Choices, config: DecoderConfig, held_out: bool) -> Stats:
    """Empty statistics, of every kind and token weighting that the methods of a block need."""
    keys: dict[str, set[Key]] = {}
    for site in family_of(config).sites:
        at_site = keys.setdefault(site.tap, set())
        for path, chosen in choices:
            if path in site.weights:
                names = {*chosen.statistics, *(["held_out"] if held_out and "gram" in chosen.needs else [])}
                at_site.update(key for name in names for key in keys_of(name, site, path, chosen))
    return _empty(keys, config)


def _empty(keys: Mapping[str, Iterable[Key]], config: DecoderConfig) -> Stats:
    family, features = family_of(config), features_of(config)

    def width(tap: str, key: Key) -> int:
        return features[key.by][1] if key.name == "output_gram" else features[family.site(tap).weights[0]][0]

    return {tap: {key: key.statistic.init(width(tap, key)) for key in sorted(site)} for tap, site in keys.items()}


@jax.jit
def embed(decoder: Decoder, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """The residual stream before the first block."""
    return decoder.embed(tokens)


@partial(jax.jit, static_argnames="devices", donate_argnums=1)
def forward(
    block: Block, x: Float[Array, "b t d"], rotary: Array, devices: Devices | None = None
) -> Float[Array, "b t d"]:
    """The residual stream after a block; `x` is donated."""
    through = lambda block, x, rotary: block(x, rotary)[0]  # noqa: E731
    if devices:
        through = devices.on_each(through, (False, True, False), True)
    return through(block, x, rotary)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """A batch of windows before a block.

    Attributes:
      x: the residual stream, `[b, t, d]`.
      rotary: `rotary_table` of the positions.
      gradients: token weights by the loss's gradient, `[b, t]`, by name.
      exact: the float block and its own stream, where a statistic looks at both; else None.
      slope: the loss's gradient behind the block, `[b, t, d]`, if a method needs it at outputs; else None.
    """

    x: Any
    rotary: Any
    gradients: Any
    exact: Any
    slope: Any = None


@partial(jax.jit, static_argnames=("devices", "advance"), donate_argnames="stats")
def observe_batch(
    block: Block, batch: Batch, stats: Stats, devices: Devices | None = None, advance: bool = False
) -> tuple[Float[Array, "b t d"] | None, Stats]:
    """Adds a batch of windows to statistics; with `advance` also returns the stream after the block, else None.

    Args:
      block: what the windows go through.
      batch: the windows.
      stats: donated; on a mesh in pieces (`start_pieces`).
      devices: the mesh over which the windows are split.
      advance: whether to return the stream.
    """
    if not devices:
        after, stats = _observe(block, batch, stats)
        return (after if advance else None), stats

    def on_device(block: Block, batch: Batch, empty: Stats, pieces: Stats) -> Any:
        after, added = _observe(block, batch, empty)
        add = lambda so_far, piece: (merge(so_far, piece), None)  # noqa: E731
        added = exchange(scatter(added, devices.count))
        so_far, _ = jax.lax.scan(add, jax.tree.map(itemgetter(0), pieces), added)
        return (after if advance else None), jax.tree.map(lambda leaf: leaf[None], so_far)

    empty = _empty(stats, block.attention.config)
    exact, slope = (None if batch.exact is None else (False, True)), (None if batch.slope is None else True)
    split = Batch(True, False, True, exact, slope)
    return devices.on_each(on_device, (False, split, False, True), (True if advance else None, True))(
        block, batch, empty, stats
    )


def _observe(block: Block, batch: Batch, stats: Stats) -> tuple[Float[Array, "b t d"], Stats]:
    after, taps, _ = block(batch.x, batch.rotary)
    exact = {} if batch.exact is None else batch.exact[0](batch.exact[1], batch.rotary)[1]

    gradients: dict[str, Array] = {}
    if any(key.name == "output_gram" for site in stats.values() for key in site):
        gradients = at_outputs(block, batch.x, batch.slope, batch.rotary)[1]

    def observed(tap: str, key: Key, so_far: Any) -> Any:
        if key.name == "output_gram":
            return so_far.observe(gradients[key.by], jnp.sum(taps[tap].astype(jnp.float32) ** 2, -1))
        weight = token_weight(taps | dict(batch.gradients), tap, key.by)
        inputs = (taps[tap], exact[tap]) if key.name == "cross" else (taps[tap],)
        return so_far.observe(*inputs, weight)

    return after, {tap: {key: observed(tap, key, stat) for key, stat in site.items()} for tap, site in stats.items()}


def merge(a: Stats, b: Stats) -> Stats:
    """Two sets of statistics merged."""
    return {tap: {key: statistic.merge(b[tap][key]) for key, statistic in site.items()} for tap, site in a.items()}


def averaged(stats: Stats) -> Stats:
    """Replaces the total of every Gram matrix by its mean; the totals are donated."""
    is_gram = lambda stat: isinstance(stat, Gram)  # noqa: E731
    return jax.tree.map(
        lambda stat: Gram(_mean(stat.total, stat.weight), None) if is_gram(stat) else stat,
        stats,
        is_leaf=is_gram,
    )


@partial(jax.jit, donate_argnums=0)
def _mean(total: Float[Array, "in in"], weight: Float[Array, ""]) -> Float[Array, "in in"]:
    return Gram(total, weight).value


def check_stats(stats: Stats, layer: int, dtype: Any) -> None:
    """Raises InputError for a statistic of a layer's inputs that is not finite: no method can make use of it."""
    for tap, site in jax.device_get(_finite(stats)).items():
        for key, finite in site.items():
            if not finite:
                raise InputError(
                    f"layers.{layer}: the calibration statistic {key.name!r} of {tap}, tokens weighted by {key.by!r}, "
                    f"is NaN or infinite: probably activations or gradients that overflow {dtype}."
                )


@jax.jit
def _finite(stats: Stats) -> dict[str, dict[Key, Array]]:
    """Whether each statistic is finite; square matrices by their diagonal, where bad tokens and channels show."""
    thin = lambda leaf: jnp.diagonal(leaf) if leaf.ndim == 2 and len(set(leaf.shape)) == 1 else leaf  # noqa: E731
    return {
        tap: {key: all_finite(jax.tree.map(thin, stat)) for key, stat in site.items()} for tap, site in stats.items()
    }


def start_pieces(empty: Stats, devices: Devices) -> Stats:
    """Empty statistics, of which every device holds a piece `[1, piece]`."""
    return devices.place(scatter(empty, devices.count), BOTH)


@partial(jax.jit, static_argnames=("config", "devices"), donate_argnames="pieces")
def join_pieces(pieces: Stats, config: DecoderConfig, devices: Devices) -> Stats:
    """Joins the devices' pieces; every device then holds the whole statistics."""
    like = jax.eval_shape(lambda: _empty(pieces, config))
    return devices.on_each(lambda pieces: gather_pieces(pieces, like), (True,), False)(pieces)
