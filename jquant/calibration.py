"""The calibration windows on their way through the blocks, and the statistics of a block's inputs."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jquant.errors import InputError
from jquant.loss import token_gradients
from jquant.methods import Method
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Block, Decoder, Taps, rotary_table
from jquant.models.families import LLAMA, Site
from jquant.sharding import Devices
from jquant.stats import AbsMax, AbsMean, Cross, Gram

Choices = tuple[tuple[str, Method], ...]  # path within a block -> method; hashable
# (kind, token weighting) -> statistic; the weighting is "uniform", "norm", a tap's name, or a path: its gradients.
SiteStats = dict[tuple[str, str], Any]
Stats = dict[str, SiteStats]  # by the site's tap

KINDS = {
    "gram": Gram,
    "held_out": Gram,
    "cross": Cross,
    "abs_mean": AbsMean,
    "abs_max": AbsMax,
}
WEIGHTED = ("gram", "held_out", "cross")  # the kinds in which tokens count by Method.token_weights


class Calibration:
    """Batches of windows, moved on block by block.

    Args:
      decoder: float.
      layers: the methods of each layer's weights.
      tokens: calibration windows.
      batch: windows per forward pass.
      inputs: whether a block reads what the quantized blocks before it produce, or what float ones do.
      held_out: windows at the end that only "held_out" statistics see.
      devices: the mesh over which every batch is split; None for where the decoder is.

    Raises:
      InputError: there are no tokens, or not those that the methods need, or they do not divide over the devices.
    """

    def __init__(
        self,
        decoder: Decoder,
        layers: Sequence[Choices],
        tokens: Int[np.ndarray, "n context"] | None,
        *,
        batch: int,
        inputs: Literal["quantized", "float"],
        held_out: int,
        devices: Devices | None = None,
    ):
        methods = {one for layer in layers for _, one in layer}
        needs = frozenset[str]().union(*(one.needs for one in methods))
        tokens = _check(needs, tokens, inputs, held_out)
        fit, step = len(tokens) - held_out, batch * (devices.data if devices else 1)
        if devices:
            devices.check_windows(fit)
            devices.check_windows(held_out)
        starts = [*range(0, fit, step), *range(fit, len(tokens), step)]
        batches = [devices.windows(one) if devices else one for one in np.split(tokens, starts[1:])]
        self.devices = devices
        self.config, self.inputs = decoder.config, inputs
        self.fit = sum(start < fit for start in starts)  # batches, from the first, that statistics are fitted to
        by_loss = any(one.token_weights == "loss" for one in methods)
        self.gradients = [token_gradients(decoder, one) if by_loss else {} for one in batches]
        self.rotary = rotary_table(decoder.config, jnp.arange(tokens.shape[1]))
        self.seen = [embed(decoder, one) for one in batches]
        # What the float model reads: a second stream, where a method looks at both.
        two = "outputs" in needs or (inputs == "quantized" and "cross" in needs)
        self.exact = [embed(decoder, one) for one in batches] if two else None

    def observe(self, block: Block, exact: Block, choices: Choices, layer: int) -> Stats:
        """Statistics of all windows at the sites of `block`; `exact` is the float block, on the float stream."""
        stats = no_stats(choices, self.config, self.fit < len(self.seen))
        stats = self.devices.place(stats) if self.devices else stats
        for i, x in enumerate(self.seen):
            held_out = i >= self.fit
            gradients = {path: rows[layer] for path, rows in self.gradients[i].items()}
            other = None if self.exact is None else (exact, self.exact[i])
            part = {
                tap: {key: one for key, one in site.items() if (key[0] == "held_out") == held_out}
                for tap, site in stats.items()
            }
            for tap, site in observe_batch(block, x, self.rotary, gradients, other, part).items():
                stats[tap] |= site
        return stats

    def advance_exact(self, block: Block) -> None:
        """Replaces what the float model reads by the float block's outputs, where that is kept."""
        for i, x in enumerate(self.exact or ()):
            assert self.exact is not None
            self.exact[i] = forward(block, x, self.rotary)

    def advance(self, block: Block) -> None:
        """Replaces a block's inputs by its outputs: the float block's, or the quantized one's (`self.inputs`)."""
        for i, x in enumerate(self.seen):
            self.seen[i] = forward(block, x, self.rotary)

    def windows(self) -> tuple[Float[Array, "n t d"], Float[Array, "n t d"]]:
        """A block's inputs and, after `advance_exact`, what the float model makes of its own; no held-out windows."""
        assert self.exact is not None
        return jnp.concatenate(self.seen[: self.fit]), jnp.concatenate(self.exact[: self.fit])


def weighting(site: Site, path: str, chosen: Method) -> str:
    """By what a weight's statistics count the tokens: the second half of a key of SiteStats."""
    match chosen.token_weights:
        case "attention":
            return dict(site.token_weights).get(path, "uniform")
        case "loss":
            return path
        case same:
            return same


def _check(needs: frozenset[str], tokens: np.ndarray | None, inputs: str, held_out: int) -> np.ndarray:
    if tokens is None:
        raise InputError("This method looks at activations: give it calibration tokens.")
    if not 0 <= held_out < len(tokens):
        raise InputError(f"held_out={held_out} of {len(tokens)} calibration windows leaves none to fit to.")
    if "held_out" in needs and not held_out:
        raise InputError("This method chooses by held-out windows: set held_out to 1 or more.")
    if "cross" in needs and inputs == "float":
        raise InputError('With inputs="float" there is no error to propagate: leave error_propagation at 0.')
    return tokens


def no_stats(choices: Choices, config: DecoderConfig, held_out: bool) -> Stats:
    """Statistics without observations, of every kind and token weighting that the methods of a block ask for."""
    widths = {"attention_output": config.heads * config.head_dim, "mlp_output": config.ffn}
    stats: Stats = {}
    for site in LLAMA.sites:
        wanted = set()
        for path, chosen in choices:
            if path in site.weights:
                kinds = chosen.needs | ({"held_out"} if held_out and "gram" in chosen.needs else set())
                for kind in kinds & KINDS.keys():
                    wanted.add((kind, weighting(site, path, chosen) if kind in WEIGHTED else "uniform"))
        width = widths.get(site.tap, config.hidden)
        stats[site.tap] = {key: KINDS[key[0]].init(width) for key in sorted(wanted)}
    return stats


@jax.jit
def embed(decoder: Decoder, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """The residual stream before the first block."""
    return decoder.embed(tokens)


@partial(jax.jit, donate_argnums=1)
def forward(block: Block, x: Float[Array, "b t d"], rotary: Array) -> Float[Array, "b t d"]:
    """The residual stream after a block; x is used up."""
    return block(x, rotary)[0]


@partial(jax.jit, donate_argnames="stats")
def observe_batch(
    block: Block,
    x: Float[Array, "b t d"],
    rotary: Array,
    gradients: Mapping[str, Float[Array, "b t"]],
    other: tuple[Block, Array] | None,
    stats: Stats,
) -> Stats:
    """Statistics with a batch of windows added to them: one program.

    Args:
      block: what the windows go through.
      x: the residual stream before it.
      rotary: `rotary_table` of the positions.
      gradients: token weights by the loss's gradient, by the weight's path.
      other: the float block and its own stream, where a statistic looks at both.
      stats: used up.
    """
    _, taps, _ = block(x, rotary)
    exact = {} if other is None else other[0](other[1], rotary)[1]

    def observed(tap: str, kind: str, by: str, one: Any) -> Any:
        weight = _token_weight(taps | dict(gradients), tap, by)
        return one.observe(taps[tap], exact[tap], weight) if kind == "cross" else one.observe(taps[tap], weight)

    return {tap: {key: observed(tap, *key, one) for key, one in site.items()} for tap, site in stats.items()}


def _token_weight(taps: Taps, tap: str, by: str) -> Float[Array, "b t"] | None:
    if by == "uniform":
        return None
    if by == "norm":
        return 1 / jnp.maximum(jnp.mean(taps[tap].astype(jnp.float32) ** 2, -1), 1e-12)
    return taps[by]
