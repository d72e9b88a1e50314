"""Where a model's activations are large: outlier features, massive activations, attention sinks, wasted levels.

One pass streams a text through the blocks, with one block's inputs alive at a time. For each input it keeps the largest
value per channel and per token, the energy of each token, and a histogram. From these follow the outliers of the
literature:

- an *outlier feature* is a channel with |x| ≥ 6 in at least 6 % of the tokens (LLM.int8(), arXiv 2208.07339 §4); the
  channels that LLM.int8() would keep in 16 bits for this text are the wider set with |x| ≥ 6 in any token;
- a *massive activation* is larger than 100 and than 1,000 times the median |x| (arXiv 2402.17762 §2, there of the
  residual stream, here of every input);
- the *attention sink* is the first token of a window, which draws attention whatever it says (arXiv 2309.17453 §3.1).
  Its unbroken repeats count too: causal attention among equal values returns that value, so their states are equal at
  every layer. (A window that begins with the zeros of 2000 has three equal sinks.)
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jquant.calibration.windows import embed
from jquant.data import check_tokens
from jquant.errors import InputError
from jquant.evaluation.perplexity import evaluation_windows
from jquant.io.language_model import LanguageModel
from jquant.models.adapters import values_of
from jquant.models.config import DecoderConfig
from jquant.models.decoder import TAPS, Block, Decoder, blocks
from jquant.models.families import family_of
from jquant.models.rotary import rotary_table
from jquant.progress import Progress, showing

# The inputs observed in each block: the residual stream that enters it, and the distinct inputs of its projections.
RESIDUAL = "residual"
INPUTS = (RESIDUAL, *TAPS)

# LLM.int8(), §4: a channel is an outlier feature if it is one in this share of the tokens and of the layers.
TOKEN_SHARE, LAYER_SHARE = 0.06, 0.25
# Massive activations, §2: larger than the first, and than the second times the median.
MASSIVE, MASSIVE_RATIO = 100.0, 1000.0

# A histogram bin is a float32's exponent and the first 5 bits of its mantissa: 32 bins an octave over the whole range,
# exact edges, no logarithm.
_SHIFT = 18
_EDGES = (np.arange(2 ** (31 - _SHIFT) + 1, dtype=np.uint32) << _SHIFT).view(np.float32)[:-1]


@dataclass(frozen=True)
class Criteria:
    """What counts as an outlier, and the grid whose wasted levels are counted.

    Attributes:
      threshold: magnitude from which an activation is an outlier.
      bits: of the symmetric grid whose wasted levels are counted, 2 to 8.
      group: neighbours along `in` that share that grid, 2 or more.

    Raises:
      InputError: one of them is out of range.
    """

    threshold: float = 6.0
    bits: int = 4
    group: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, int | float) or not 0 < self.threshold < float("inf"):
            raise InputError(f"threshold={self.threshold} marks no outliers; it takes a positive number.")
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise InputError(f"bits={self.bits} is no grid that is counted here; it takes 2 to 8.")
        if type(self.group) is not int or self.group < 2:
            raise InputError(f"group={self.group} is no group; it takes a whole number from 2.")

    def check_widths(self, config: DecoderConfig) -> None:
        """Raises InputError where a group is wider than one of a decoder's inputs."""
        widths = {RESIDUAL: config.hidden, "attention_output": config.heads * config.head_dim, "mlp_output": config.ffn}
        name = min(widths, key=widths.__getitem__)
        if self.group > widths[name]:
            raise InputError(
                f"group={self.group} does not suit {name}, {widths[name]} channels wide: take 2 to {widths[name]}."
            )


@dataclass(frozen=True)
class InputOutliers:
    """An input of a layer, over all tokens.

    Attributes:
      channel_max: float32 `[in]`, the largest |x| of each channel.
      channel_share: float64 `[in]`, the share of tokens in which |x| ≥ `threshold`.
      token_max: float32 `[windows, context]`, the largest |x| of each token.
      token_energy: float32 `[windows, context]`, Σ x² of each token: its part of the Gram matrix's trace.
      in_sink: bool `[windows, context]`, the first token of each window and its unbroken repeats.
      token_waste: float32 `[windows, context]`, mean `wasted_levels` of the token's groups of channels.
      histogram: int64 `[bins]`, how many |x| lie in each bin; `histogram_by` gives edges.
      weight_waste: `wasted_levels` of the groups of the weights that read this input, mean and maximum; None for
        the residual stream, which no weight reads.
      threshold: magnitude from which an activation is an outlier.
    """

    channel_max: np.ndarray = field(repr=False)
    channel_share: np.ndarray = field(repr=False)
    token_max: np.ndarray = field(repr=False)
    token_energy: np.ndarray = field(repr=False)
    in_sink: np.ndarray = field(repr=False)
    token_waste: np.ndarray = field(repr=False)
    histogram: np.ndarray = field(repr=False)
    weight_waste: tuple[float, float] | None
    threshold: float

    @property
    def max(self) -> float:
        """The largest |x|."""
        return float(self.channel_max.max())

    @property
    def median(self) -> float:
        """The median |x|, interpolated within a histogram bin: off by 1/32 of itself at most."""
        total = np.cumsum(self.histogram)
        half = total[-1] / 2
        index = int(np.searchsorted(total, half))
        low, high = map(float, _EDGES[index : index + 2])
        return low + (high - low) * float(1 - (total[index] - half) / self.histogram[index]) if index else 0.0

    @property
    def ratio(self) -> float:
        """The largest |x| against the median; infinite where the median is 0."""
        return self.max / self.median if self.median else float("inf")

    @property
    def outlier_features(self) -> np.ndarray:
        """Channels with |x| ≥ threshold in at least 6 % of the tokens."""
        return np.flatnonzero(self.channel_share >= TOKEN_SHARE)

    @property
    def mixed_precision_features(self) -> np.ndarray:
        """Channels with |x| ≥ threshold in any token: LLM.int8() keeps them in 16 bits if the text is one batch."""
        return np.flatnonzero(self.channel_share > 0)

    @property
    def outlier_tokens(self) -> np.ndarray:
        """`[n, 2]`: window and position of the tokens with |x| ≥ threshold in any channel."""
        return np.argwhere(self.token_max >= self.threshold)

    @property
    def massive_features(self) -> np.ndarray:
        """Channels that hold a massive activation."""
        return np.flatnonzero(self.channel_max > self._massive)

    @property
    def massive_tokens(self) -> np.ndarray:
        """`[n, 2]`: window and position of the tokens that hold a massive activation."""
        return np.argwhere(self.token_max > self._massive)

    @property
    def _massive(self) -> float:
        return max(MASSIVE, MASSIVE_RATIO * self.median)

    @property
    def first_token_energy(self) -> float:
        """The share of the Gram matrix's trace that the first tokens of the windows make up."""
        return _share(self.token_energy, np.arange(self.token_energy.shape[1]) == 0)

    @property
    def sink_energy(self) -> float:
        """`first_token_energy` with the first tokens' unbroken repeats included."""
        return _share(self.token_energy, self.in_sink)

    def largest_tokens(self, count: int) -> np.ndarray:
        """`[count, 2]`: window and position of the tokens with the largest |x|, the largest first."""
        order = np.argsort(-self.token_max, axis=None, kind="stable")[:count]
        return np.stack(np.unravel_index(order, self.token_max.shape), -1)

    def summary(self) -> dict[str, Any]:
        """Every figure and index as plain numbers and lists, ready for JSON or a data frame."""
        weight_waste, worst = self.weight_waste or (None, None)
        return {
            "max": self.max,
            "median": self.median,
            "ratio": self.ratio if self.median else None,
            "outlier_features": self.outlier_features.tolist(),
            "mixed_precision_features": self.mixed_precision_features.tolist(),
            "massive_features": self.massive_features.tolist(),
            "outlier_tokens": len(self.outlier_tokens),
            "massive_tokens": len(self.massive_tokens),
            "massive_positions": np.unique(self.massive_tokens[:, 1]).tolist(),
            "largest_tokens": self.largest_tokens(8).tolist(),
            "first_token_energy": self.first_token_energy,
            "sink_energy": self.sink_energy,
            "activation_waste": float(self.token_waste.mean(dtype=np.float64)),
            "weight_waste": weight_waste,
            "weight_waste_worst": worst,
        }

    def histogram_by(self, per_octave: int) -> tuple[np.ndarray, np.ndarray]:
        """The histogram in 1, 2, 4, 8, 16 or 32 bins an octave, without the empty ends: edges `[n + 1]`, counts `[n]`.

        Zeros are left out: they lie in no octave.
        """
        merged = 32 // per_octave
        counts = self.histogram.reshape(-1, merged).sum(1)
        counts[0] -= self.histogram[0]
        used = np.flatnonzero(counts)
        first, end = (used[0], used[-1] + 1) if len(used) else (1, 1)
        return _EDGES[::merged][first : end + 1].astype(np.float64), counts[first:end]


@dataclass(frozen=True)
class Outliers:
    """The result of `outliers`, with the protocol it was measured by.

    Attributes:
      inputs: (layer, input) -> `InputOutliers`; the inputs are those of `INPUTS`.
      attention_received: float32 `[layers, windows, context]`: the attention each token receives, summed over the
        window's queries, averaged over heads. A window's tokens sum to `context`.
      tokens: int32 `[windows, context]`, the ids observed.
      criteria: what counted as an outlier.
      bos: whether the windows begin with the tokenizer's BOS.
    """

    inputs: dict[tuple[int, str], InputOutliers] = field(repr=False)
    attention_received: np.ndarray = field(repr=False)
    tokens: np.ndarray = field(repr=False)
    criteria: Criteria
    bos: bool

    def __getitem__(self, key: tuple[int, str]) -> InputOutliers:
        return self.inputs[key]

    @property
    def sink_attention(self) -> np.ndarray:
        """Float64 `[layers]`: the share of all attention that first tokens and their unbroken repeats receive.

        If each query attended evenly to all that it sees, a first token would receive
        (1 + 1/2 + … + 1/context) / context.
        """
        sink = first_tokens(self.tokens)
        return np.array([_share(received, sink) for received in self.attention_received])

    def rows(self) -> list[dict[str, Any]]:
        """One row a layer and input: `InputOutliers.summary`, and the layer's `sink_attention`."""
        attention = self.sink_attention.tolist()
        return [
            {"layer": layer, "input": name, **outliers.summary(), "sink_attention": attention[layer]}
            for (layer, name), outliers in self.inputs.items()
        ]

    def systematic_features(self, name: str) -> np.ndarray:
        """Channels of an input that are outlier features in at least a quarter of the layers (LLM.int8(), §4)."""
        shares = np.stack(
            [outliers.channel_share for (_, input_name), outliers in self.inputs.items() if input_name == name]
        )
        return np.flatnonzero((shares >= TOKEN_SHARE).mean(0) >= LAYER_SHARE)


def outliers(
    model: LanguageModel,
    text: str,
    *,
    context: int = 512,
    windows: int | None = 32,
    threshold: float = 6.0,
    bits: int = 4,
    group: int = 64,
    bos: bool = False,
    progress: Progress | bool = True,
) -> Outliers:
    """Looks for outliers at every input of every layer while a text runs through the model.

    Args:
      model: float or quantized.
      text: tokenized without special tokens and cut into non-overlapping windows, as for `perplexity`.
      context: tokens per window.
      windows: how many, from the start; None for all.
      threshold: magnitude from which an activation is an outlier.
      bits: of the symmetric grid whose wasted levels are counted, 2 to 8.
      group: neighbours along `in` that share that grid, 2 or more.
      bos: begin every window with the tokenizer's BOS.
      progress: whether to show progress; or a function, called with ("observe", layers done, layers in
        all).

    Raises:
      InputError: the text is shorter than that many windows; a threshold, a width or a group out of range; a group
        larger than an input; activations that are NaN or infinite.
    """
    criteria = Criteria(threshold, bits, group)
    criteria.check_widths(model.decoder.config)
    tokens = evaluation_windows(model, text, context, windows, bos)
    with showing(progress) as tell:
        inputs, received = observe(model.decoder, tokens, criteria, progress=tell)
    return Outliers(inputs, received, tokens, criteria, bos)


def observe(
    decoder: Decoder,
    tokens: Int[np.ndarray, "windows context"],
    criteria: Criteria | None = None,
    *,
    batch: int = 4,
    progress: Progress | None = None,
) -> tuple[dict[tuple[int, str], InputOutliers], Float[np.ndarray, "layers windows context"]]:
    """`Outliers.inputs` and `Outliers.attention_received` of token windows, `batch` of them at a time."""
    criteria = criteria or Criteria()
    criteria.check_widths(decoder.config)
    check_tokens(tokens, decoder.config, "Windows")
    rotary = rotary_table(decoder.config, jnp.arange(tokens.shape[1]))
    states = [embed(decoder, tokens[begin : begin + batch]) for begin in range(0, len(tokens), batch)]
    sink, inputs, received = first_tokens(tokens), {}, []
    for layer, block in enumerate(blocks(decoder)):
        parts, masses = [], []
        for index, x in enumerate(states):
            states[index], seen, mass = _observe(block, x, rotary, criteria)
            # # Moved to the host: counts add up in 64 bits there, and a device holds those of one batch only.
            parts.append(jax.device_get(seen))
            masses.append(np.asarray(mass))
        wastes = jax.device_get(_weight_waste(block, criteria))
        for name in INPUTS:
            merged = _merge([part[name] for part in parts], sink, wastes.get(name), criteria.threshold)
            if not np.isfinite(merged.token_energy).all():
                raise InputError(f"{name} of layer {layer} holds NaN or infinite values: nothing can be said about it.")
            inputs[layer, name] = merged
        received.append(np.concatenate(masses))
        if progress:
            progress("observe", layer + 1, decoder.config.layers)
    return inputs, np.stack(received)


def first_tokens(tokens: Int[np.ndarray, "windows context"]) -> Bool[np.ndarray, "windows context"]:
    """Marks the first token of each window and its unbroken repeats."""
    return np.logical_and.accumulate(tokens == tokens[:, :1], axis=1)


def wasted_levels(x: Float[Array, "*b in"], bits: int, group: int) -> Float[Array, "*b groups"]:
    """The share of each group's levels that only its largest member reaches.

    A symmetric grid has 2L + 1 levels, L = 2^(bits−1) − 1, from −m to m, m the group's largest magnitude. The other
    members reach at most the second largest magnitude s, level round(L·s/m) on either side. So 2·(L − round(L·s/m))
    levels serve the largest member alone: none if s = m, all but level 0 if s ≪ m.

    Groups run along the last axis; the last one may be short, and is left out where a single member remains.
    """
    width = x.shape[-1] - (x.shape[-1] % group == 1)
    fill = -width % group
    padded = jnp.pad(jnp.abs(x[..., :width].astype(jnp.float32)), [(0, 0)] * (x.ndim - 1) + [(0, fill)])
    first, second = jnp.moveaxis(jax.lax.top_k(padded.reshape(*x.shape[:-1], -1, group), 2)[0], -1, 0)
    top = 2 ** (bits - 1) - 1
    # A group of zeros has no largest member, and wastes nothing.
    reached = jnp.where(first > 0, jnp.round(top * second / first), top)
    return 2 * (top - reached) / (2 * top + 1)


class _Seen(NamedTuple):
    """A batch's observations of an input; fields as in `InputOutliers`, with counts in place of shares."""

    channel_max: Array
    channel_count: Array
    token_max: Array
    token_energy: Array
    token_waste: Array
    histogram: Array


@partial(jax.jit, static_argnames="criteria", donate_argnames="x")
def _observe(
    block: Block, x: Float[Array, "b t d"], rotary: Array, criteria: Criteria
) -> tuple[Float[Array, "b t d"], dict[str, _Seen], Float[Array, "b t"]]:
    """The block's output, the observations of its inputs, and the attention each token receives."""
    out, taps, _ = block(x, rotary)
    seen = {name: _look(tap, criteria) for name, tap in ({RESIDUAL: x} | taps).items() if name in INPUTS}
    return out, seen, taps["attention_mass"]


def _look(x: Float[Array, "b t in"], criteria: Criteria) -> _Seen:
    size = jnp.abs(x.astype(jnp.float32))
    bins = jax.lax.bitcast_convert_type(size, jnp.int32) >> _SHIFT
    return _Seen(
        channel_max=jnp.max(size, (0, 1)),
        channel_count=jnp.sum(size >= criteria.threshold, (0, 1)),
        token_max=jnp.max(size, -1),
        token_energy=jnp.sum(size * size, -1),
        token_waste=jnp.mean(wasted_levels(size, criteria.bits, criteria.group), -1),
        histogram=jnp.zeros(len(_EDGES), jnp.int32).at[bins.reshape(-1)].add(1),
    )


@partial(jax.jit, static_argnames="criteria")
def _weight_waste(block: Block, criteria: Criteria) -> dict[str, tuple[Array, Array]]:
    """Mean and maximum of `wasted_levels` over the weights that read each input."""

    def waste(path: str) -> Array:
        kernel = operator.attrgetter(path)(block).get_value()
        return wasted_levels(values_of(kernel).T, criteria.bits, criteria.group)

    sites = family_of(block.attention.config).sites
    wastes = {site.tap: jnp.concatenate([waste(path) for path in site.weights]) for site in sites}
    return {name: (jnp.mean(shares), jnp.max(shares)) for name, shares in wastes.items()}


def _merge(
    parts: Sequence[_Seen], in_sink: np.ndarray, weight_waste: tuple[Any, Any] | None, threshold: float
) -> InputOutliers:
    """Joins the batches of an input."""
    all_of = {name: [getattr(part, name) for part in parts] for name in _Seen._fields}
    token_max = np.concatenate(all_of["token_max"])
    return InputOutliers(
        channel_max=np.stack(all_of["channel_max"]).max(0),
        channel_share=np.stack(all_of["channel_count"]).sum(0, dtype=np.int64) / token_max.size,
        token_max=token_max,
        token_energy=np.concatenate(all_of["token_energy"]),
        in_sink=in_sink,
        token_waste=np.concatenate(all_of["token_waste"]),
        histogram=np.stack(all_of["histogram"]).sum(0, dtype=np.int64),
        weight_waste=None if weight_waste is None else (float(weight_waste[0]), float(weight_waste[1])),
        threshold=threshold,
    )


def _share(values: np.ndarray, chosen: np.ndarray) -> float:
    """The share of a sum that the chosen values make up; 0 if the sum is 0."""
    total = values.sum(dtype=np.float64)
    return float(values.sum(dtype=np.float64, where=chosen) / total) if total else 0.0
