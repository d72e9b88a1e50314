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

from jquant.calibration.options import DEFAULTS, Options
from jquant.calibration.spill import Spill, Waiting
from jquant.calibration.token_weights import token_gradients, token_weight, weighting
from jquant.composition import Choices, Method, needs_of
from jquant.errors import InputError
from jquant.learning.objectives import all_finite
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Block, Decoder, rotary_table
from jquant.models.families import Site, family_of
from jquant.parallel.mesh import BOTH, Devices, exchange, gather_pieces, scatter
from jquant.stats import BUILT_IN, Gram


class Key(NamedTuple):
    """By what a statistic of a site is found.

    Attributes:
      name: what parts call it (`Method.needs`).
      by: what tokens count by: "uniform", "norm", a tap's name, or a weight's path, which stands for its gradients.
      statistic: its class.
    """

    name: str
    by: str
    statistic: type


SiteStats = dict[Key, Any]
Stats = dict[str, SiteStats]  # by the site's tap
UNWEIGHTED = ("abs_mean", "abs_max")  # statistics in which all tokens count alike, whatever Method.token_weights says


def key_of(name: str, site: Site, path: str, chosen: Method) -> Key:
    """The key under which a weight finds a statistic that its method needs."""
    statistic = BUILT_IN.get(name) or chosen.statistics[name]
    return Key(name, "uniform" if name in UNWEIGHTED else weighting(site, path, chosen), statistic)


class Calibration:
    """Batches of windows, moved on block by block.

    Args:
      decoder: float; what lies outside its blocks is enough, unless a method takes gradients.
      layers: the methods of each layer's weights.
      tokens: calibration windows.
      options: see there.
      spill: where windows wait that are more than the host shall hold.

    Raises:
      InputError: there are no tokens, or not those that the methods need (`check_calibration`).
    """

    def __init__(
        self,
        decoder: Decoder,
        layers: Sequence[Choices],
        tokens: Int[np.ndarray, "n context"] | None,
        options: Options = DEFAULTS,
        spill: Spill | None = None,
    ):
        methods = {one for layer in layers for _, one in layer}
        needs = needs_of(methods)
        tokens = check_calibration(needs, tokens, options)
        fit, devices = len(tokens) - options.held_out, options.devices
        starts = [*range(0, fit, options.windows_per_pass), *range(fit, len(tokens), options.windows_per_pass)]
        batches = [devices.windows(one) if devices else one for one in np.split(tokens, starts[1:])]
        self.devices, self.inputs = devices, options.inputs
        self.config, self.dtype = decoder.config, decoder.embedding.get_value().dtype
        self.fit = sum(start < fit for start in starts)  # batches, from the first, that statistics are fitted to
        by_loss = any(one.token_weights == "loss" for one in methods)
        self.gradients = [token_gradients(decoder, one) if by_loss else {} for one in batches]
        self.rotary = rotary_table(decoder.config, jnp.arange(tokens.shape[1]))
        self.seen = Waiting((embed(decoder, one) for one in batches), "seen", spill)
        # What the float model reads: a second stream, where a method looks at both.
        two = "outputs" in needs or (options.inputs == "quantized" and "cross" in needs)
        self.exact = Waiting((embed(decoder, one) for one in batches), "exact", spill) if two else None

    def observe(self, block: Block, exact: Block, choices: Choices, layer: int, advance: bool = False) -> Stats:
        """Statistics of all windows at the sites of `block`; `exact` is the float block, on the float stream.

        With `advance` the windows move on through `block` in the same pass.

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
                {path: rows[layer] for path, rows in self.gradients[i].items()},
                None if self.exact is None else (exact, self.exact[i]),
            )
            part = {
                tap: {key: one for key, one in site.items() if (key.name == "held_out") == held_out}
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
        """Replaces what the float model reads by the float block's outputs, where that is kept."""
        if self.exact is not None:
            for i, x in enumerate(self.exact):
                self.exact[i] = forward(block, x, self.rotary, self.devices)

    def advance(self, block: Block) -> None:
        """Replaces a block's inputs by its outputs: the float block's, or the quantized one's (`self.inputs`)."""
        for i, x in enumerate(self.seen):
            self.seen[i] = forward(block, x, self.rotary, self.devices)

    def windows(self) -> tuple[Float[Array, "n t d"], Float[Array, "n t d"]]:
        """A block's inputs and, after `advance_exact`, what the float model makes of its own; no held-out windows."""
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
    """Statistics without observations, of every kind and token weighting that the methods of a block ask for."""
    keys: dict[str, set[Key]] = {}
    for site in family_of(config).sites:
        at_site = keys.setdefault(site.tap, set())
        for path, chosen in choices:
            if path in site.weights:
                names = {*chosen.statistics, *(["held_out"] if held_out and "gram" in chosen.needs else [])}
                at_site.update(key_of(name, site, path, chosen) for name in names)
    return _empty(keys, config)


def _empty(keys: Mapping[str, Iterable[Key]], config: DecoderConfig) -> Stats:
    widths = {"attention_output": config.heads * config.head_dim, "mlp_output": config.ffn}
    return {
        tap: {key: key.statistic.init(widths.get(tap, config.hidden)) for key in sorted(site)}
        for tap, site in keys.items()
    }


@jax.jit
def embed(decoder: Decoder, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """The residual stream before the first block."""
    return decoder.embed(tokens)


@partial(jax.jit, static_argnames="devices", donate_argnums=1)
def forward(
    block: Block, x: Float[Array, "b t d"], rotary: Array, devices: Devices | None = None
) -> Float[Array, "b t d"]:
    """The residual stream after a block; x is used up."""
    through = lambda block, x, rotary: block(x, rotary)[0]  # noqa: E731
    if devices:
        through = devices.on_each(through, (False, True, False), True)
    return through(block, x, rotary)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Windows before a block.

    Attributes:
      x: the residual stream, `[b, t, d]`.
      rotary: `rotary_table` of the positions.
      gradients: token weights by the loss's gradient, `[b, t]`, by the weight's path.
      exact: the float block and its own stream, where a statistic looks at both; else None.
    """

    x: Any
    rotary: Any
    gradients: Any
    exact: Any


@partial(jax.jit, static_argnames=("devices", "advance"), donate_argnames="stats")
def observe_batch(
    block: Block, batch: Batch, stats: Stats, devices: Devices | None = None, advance: bool = False
) -> tuple[Float[Array, "b t d"] | None, Stats]:
    """The stream after the block, with `advance`, and statistics with a batch of windows added to them: one program.

    Args:
      block: what the windows go through.
      batch: the windows.
      stats: used up; on a mesh in pieces (`start_pieces`).
      devices: the mesh over which the windows are split.
      advance: whether the stream is asked for.
    """
    if not devices:
        after, stats = _observe(block, batch, stats)
        return (after if advance else None), stats

    def own(block: Block, batch: Batch, empty: Stats, pieces: Stats) -> Any:
        after, brought = _observe(block, batch, empty)
        add = lambda so_far, one: (merge(so_far, one), None)  # noqa: E731
        brought = exchange(scatter(brought, devices.count))
        so_far, _ = jax.lax.scan(add, jax.tree.map(itemgetter(0), pieces), brought)
        return (after if advance else None), jax.tree.map(lambda leaf: leaf[None], so_far)

    empty = _empty(stats, block.attention.config)
    split = Batch(True, False, True, None if batch.exact is None else (False, True))
    return devices.on_each(own, (False, split, False, True), (True if advance else None, True))(
        block, batch, empty, stats
    )


def _observe(block: Block, batch: Batch, stats: Stats) -> tuple[Float[Array, "b t d"], Stats]:
    after, taps, _ = block(batch.x, batch.rotary)
    exact = {} if batch.exact is None else batch.exact[0](batch.exact[1], batch.rotary)[1]

    def observed(tap: str, key: Key, so_far: Any) -> Any:
        weight = token_weight(taps | dict(batch.gradients), tap, key.by)
        inputs = (taps[tap], exact[tap]) if key.name == "cross" else (taps[tap],)
        return so_far.observe(*inputs, weight)

    return after, {tap: {key: observed(tap, key, own) for key, own in site.items()} for tap, site in stats.items()}


def merge(a: Stats, b: Stats) -> Stats:
    """Both together."""
    return {tap: {key: one.merge(b[tap][key]) for key, one in site.items()} for tap, site in a.items()}


def averaged(stats: Stats) -> Stats:
    """Complete statistics, Gram matrices with their mean in the total's place; used up."""
    is_gram = lambda one: isinstance(one, Gram)  # noqa: E731
    return jax.tree.map(
        lambda one: Gram(_mean(one.total, one.weight), None) if is_gram(one) else one, stats, is_leaf=is_gram
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
    """Whether each statistic is finite; what is wrong with a token or a channel shows on a square matrix's diagonal."""
    thin = lambda leaf: jnp.diagonal(leaf) if leaf.ndim == 2 and len(set(leaf.shape)) == 1 else leaf  # noqa: E731
    return {tap: {key: all_finite(jax.tree.map(thin, one)) for key, one in site.items()} for tap, site in stats.items()}


def start_pieces(empty: Stats, devices: Devices) -> Stats:
    """Statistics without observations, every device with a piece `[1, piece]` of them."""
    return devices.place(scatter(empty, devices.count), BOTH)


@partial(jax.jit, static_argnames=("config", "devices"), donate_argnames="pieces")
def join_pieces(pieces: Stats, config: DecoderConfig, devices: Devices) -> Stats:
    """The statistics whose pieces the devices hold, whole on every one."""
    like = jax.eval_shape(lambda: _empty(pieces, config))
    return devices.on_each(lambda pieces: gather_pieces(pieces, like), (True,), False)(pieces)
