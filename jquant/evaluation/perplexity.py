"""Perplexity, and the distance of a model's predictions from a reference's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int

from jquant.calibration.windows import embed, forward
from jquant.data import check_tokens, check_unseen, check_whole, refuse_name
from jquant.data import windows as cut_windows
from jquant.errors import InputError
from jquant.io.language_model import LanguageModel
from jquant.io.load import ModelFile, QuantizedFile
from jquant.learning.objectives import map_rows
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Decoder, outside_of
from jquant.models.rotary import rotary_table
from jquant.parallel.mesh import Devices, spread_over
from jquant.parallel.processes import gather
from jquant.parts import counted
from jquant.pipeline.driver import Source
from jquant.progress import Progress, showing
from jquant.qtensor import prepared


@dataclass(frozen=True)
class Scores:
    """Per scored token, `[windows, scored]` each; scored is context − 1, or after `last` fewer.

    Attributes:
      nll: −log p(token), nats.
      kl: KL(reference ‖ model) of the next-token distribution, nats; None without a reference.
      agrees: whether model and reference have the same most likely token; None without a reference.
      hidden: final states, `[windows, context, d]`, for use as a `Reference`.
    """

    nll: np.ndarray
    kl: np.ndarray | None
    agrees: np.ndarray | None
    hidden: np.ndarray

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood; InputError if that overflows."""
        mean = self.nll.mean(dtype=np.float64)
        with np.errstate(over="ignore"):
            value = float(np.exp(mean))
        if not np.isfinite(value):
            raise InputError(
                f"The mean negative log likelihood is {mean:.4g} nats: the perplexity is not a finite number."
            )
        return value

    def last(self, stride: int | None) -> "Scores":
        """Of each window's predictions the last `stride`, those that no window before it has made; None keeps all."""
        cut = lambda values: values[:, -(stride or 0) :]  # noqa: E731
        kl, agrees = (None if values is None else cut(values) for values in (self.kl, self.agrees))
        return Scores(cut(self.nll), kl, agrees, self.hidden)

    def with_protocol(self, bos: bool, stride: int | None = None) -> "Perplexity":
        """The perplexity with its protocol (`evaluation_windows`)."""
        windows, context = self.hidden.shape[:2]
        return Perplexity(self.perplexity, self.stderr, windows, context, stride or context, self.nll.size, bos)

    @property
    def window_nll(self) -> np.ndarray:
        """Each window's mean negative log likelihood, float64 `[windows]`; see `paired_change`."""
        return self.nll.mean(-1, dtype=np.float64)

    @property
    def stderr(self) -> float:
        """The perplexity's standard error by the delta method, tokens taken as independent (as llama.cpp reports it).

        NaN for one token.
        """
        if self.nll.size < 2:
            return math.nan
        return self.perplexity * float(self.nll.std(dtype=np.float64, ddof=1)) / self.nll.size**0.5


@dataclass(frozen=True)
class Reference:
    """A model to compare with: its decoder, of which the head is used, and its final states on the same windows."""

    decoder: Decoder
    hidden: np.ndarray


@dataclass(frozen=True, eq=False, repr=False)
class Perplexity(float):
    """A perplexity: a float that also holds the protocol it was measured by.

    Attributes:
      value: the number itself.
      stderr: its standard error, tokens taken as independent.
      windows: of the text.
      context: tokens a window.
      stride: tokens from one window's begin to the next one's; the context if they don't overlap.
      scored_tokens: in all.
      bos: whether the windows begin with the tokenizer's BOS.
    """

    value: float
    stderr: float
    windows: int
    context: int
    stride: int
    scored_tokens: int
    bos: bool

    def __new__(cls, value: float, *protocol: Any, **named: Any) -> "Perplexity":
        """The float; the dataclass sets the fields."""
        return super().__new__(cls, value)

    def __repr__(self) -> str:
        bos = "with BOS" if self.bos else "no BOS"
        stride = f", one every {self.stride}" if self.stride < self.context else ""
        return (
            f"{self.value:.4f} ±{self.stderr:.4f} ({counted(self.windows, 'window')} of {self.context} tokens{stride}, "
            f"{bos}, {self.scored_tokens} scored tokens)"
        )


def perplexity(
    model: LanguageModel,
    text: str,
    *,
    context: int = 1024,
    windows: int | None = None,
    stride: int | None = None,
    bos: bool = False,
    allow_overlap: bool = False,
    progress: Progress | bool = True,
) -> Perplexity:
    """Perplexity of a text, tokenized without special tokens and cut into windows.

    Without a `stride`, windows don't overlap, and every prediction inside a window is scored, context − 1 of them.

    Args:
      model: float or quantized.
      text: what to score.
      context: tokens per window.
      windows: how many, from the start; all by default.
      stride: a window begins every so many tokens, and of each the last so many predictions are scored: every token is
        predicted once, from at least context − stride others. transformers' example, with 1,024 and 512, also scores
        the first window's other predictions.
      bos: begin every window with the tokenizer's BOS.
      allow_overlap: whether the text may occur in the calibration text; such a figure says little about other texts.
      progress: whether to show progress; or a function, called with ("evaluate", windows done, windows
        in all).

    Raises:
      InputError: the text is shorter than a window, or than `windows` of them; a context below 2, or beyond the
        model's; a stride beyond the context; `bos` where the tokenizer has none; a text that the model was calibrated
        on; likelihoods that are not finite.
    """
    tokens = evaluation_windows(model, text, context, windows, bos, stride)
    if not allow_overlap:
        check_overlap(model, tokens, bos)
    with showing(progress) as tell:
        return score(model.decoder, tokens, progress=tell).last(stride).with_protocol(bos, stride)


def check_overlap(model: LanguageModel, tokens: Int[np.ndarray, "n context"], bos: bool) -> None:
    """Raises InputError for evaluation windows that occur in the model's calibration text."""
    if model.calibrated_on is not None:
        way_out = "judge on another text, or set allow_overlap=True"
        check_unseen(tokens[:, 1:] if bos else tokens, model.calibrated_on, "The evaluation text", way_out)


def evaluation_windows(
    model: LanguageModel | ModelFile | QuantizedFile,
    text: str,
    context: int,
    windows: int | None,
    bos: bool,
    stride: int | None = None,
) -> Int[np.ndarray, "n context"]:
    """The windows that `perplexity` scores; same arguments and errors."""
    check_whole(2, context=context)  # one token leaves no prediction to score
    if bos and model.tokenizer.bos_id is None:
        raise InputError(f"The tokenizer of {model.name} has no BOS token: leave bos out.")
    bos_id = model.tokenizer.bos_id if bos else None
    try:
        tokens = cut_windows(model.tokenizer.encode(text), context, windows, bos_id, stride)
    except InputError:
        refuse_name(text)
        raise
    check_tokens(tokens, model.config, "Evaluation windows")
    return tokens


def score(
    decoder: Decoder,
    tokens: Int[np.ndarray, "n context"],
    *,
    reference: Reference | None = None,
    batch: int = 4,
    progress: Progress | None = None,
) -> Scores:
    """Scores every prediction inside each window, `batch` windows at a time, and on each device.

    A decoder that is cut over devices (`Devices.spread`) is evaluated there: windows are split over the devices, each
    joins one layer's weights at a time, and the vocabulary stays cut.

    Raises:
      InputError: windows that the model can't read (`data.check_tokens`), or of less than 2 tokens; no whole batch;
        likelihoods that are not finite.
    """
    check_windows(tokens, decoder.config, batch)
    devices = spread_over(decoder)
    count = devices.count if devices else 1
    step, filled = batch * count, _filled(tokens, count)
    place = devices.windows if devices else _same
    decoder = prepared(decoder)
    if devices and reference:
        reference = Reference(devices.spread(outside_of(reference.decoder)), _filled(reference.hidden, count))
    results = []
    for begin in range(0, len(filled), step):
        windows = place(filled[begin : begin + step])
        hidden = _hidden(decoder, windows, devices)
        other = None if reference is None else place(jnp.asarray(reference.hidden[begin : begin + step]))
        figures = (*_figures(decoder, hidden, windows, reference, other, devices), hidden)
        results.append(gather(figures) if devices else figures)
        check_finite(begin, *results[-1][:2])
        if progress:
            progress("evaluate", min(begin + step, len(tokens)), len(tokens))
    return _joined(results, len(tokens))


def score_from_disk(
    source: Source,
    tokens: Int[np.ndarray, "n context"],
    *,
    reference: Reference | None = None,
    batch: int = 4,
    devices: Devices | None = None,
    progress: Progress | None = None,
) -> Scores:
    """`score` of a model that does not fit into memory: all windows go through one block, and then through the next.

    In memory are a block and the next one as it is read, every window's residual stream, embedding and head.

    Args:
      source: the model's files (`open_model`).
      tokens: windows.
      reference: what to compare with; its decoder's blocks are not used, so `source.outside()` will do.
      batch: windows per forward pass, and device.
      devices: the mesh over which windows are split; if they don't divide, copies that don't count fill up the last
        devices. Every device holds whole blocks.
      progress: called with ("evaluate", blocks done, blocks in all).

    Raises:
      InputError: what `score` finds.
    """
    check_windows(tokens, source.config, batch)
    step, windows, everywhere = (
        (batch * devices.count, devices.windows, devices.place) if devices else (batch, _same, _same)
    )
    filled = partial(_filled, count=devices.count if devices else 1)
    outside = prepared(everywhere(source.outside()))
    rotary = rotary_table(source.config, jnp.arange(tokens.shape[1]))
    starts = range(0, len(filled(tokens)), step)
    batches = [windows(filled(tokens)[begin : begin + step]) for begin in starts]
    streams = [embed(outside, batch_tokens) for batch_tokens in batches]
    for layer, block in enumerate(map(everywhere, source.blocks()), 1):
        block = prepared(block)
        streams = [jax.block_until_ready(forward(block, x, rotary, devices)) for x in streams]
        if progress:
            progress("evaluate", layer, source.config.layers)
    if reference:
        reference = Reference(everywhere(reference.decoder), filled(reference.hidden))
    results = []
    for begin, x, batch_tokens in zip(starts, streams, batches, strict=True):
        hidden = outside.norm(x)
        other = None if reference is None else windows(jnp.asarray(reference.hidden[begin : begin + step]))
        results.append(gather((*_figures(outside, hidden, batch_tokens, reference, other), hidden)))
    scores = _joined(results, len(tokens))
    check_finite(0, scores.nll, scores.kl)
    return scores


def _filled(windows: np.ndarray, count: int) -> np.ndarray:
    """Windows `[n, …]` filled up with copies of the first until `count` divides their number."""
    return np.concatenate([windows, np.repeat(windows[:1], -len(windows) % count, 0)])


def _figures(
    decoder: Decoder,
    hidden: Array,
    tokens: Any,
    reference: Reference | None,
    other_hidden: Array | None,
    cut: Devices | None = None,
) -> tuple[Array, Array | None, Array | None]:
    """For each scored token the negative log likelihood and, with a reference, KL and whether the top tokens agree.

    `cut` are the devices over which the decoder's vocabulary is cut: each computes its part for all windows.
    """
    if reference is None:
        return _nll(decoder, hidden, tokens, cut), None, None
    return _compare(decoder, hidden, reference.decoder, other_hidden, tokens, cut)


def _joined(results: Sequence[tuple[Any, Any, Any, Any]], count: int) -> Scores:
    """The figures of all batches, for the first `count` windows."""
    parts = zip(*results, strict=True)
    nll, kl, agrees, hidden = (None if part[0] is None else np.concatenate(part)[:count] for part in parts)
    assert nll is not None
    assert hidden is not None
    return Scores(nll, kl, agrees, hidden)


def check_windows(tokens: Any, config: DecoderConfig, batch: int) -> None:
    """Raises InputError unless there are predictions to score, `batch` windows at a time."""
    check_whole(1, batch=batch)
    check_tokens(tokens, config, "Evaluation windows")
    if tokens.shape[1] < 2:
        raise InputError("Evaluation windows of 1 token leave no prediction to score.")


def check_finite(first: int, *figures: Any) -> None:
    """Raises InputError for figures `[windows, scored]`, or None, of which some are not finite.

    `first` is the number of their first window.
    """
    for values in figures:
        finite = np.isfinite(0 if values is None else np.asarray(values)).all(-1)
        if not finite.all():
            raise InputError(
                f"Window {first + int(np.argmin(finite))}, counted from 0, has a likelihood that is NaN or infinite: "
                f"the model's weights are broken, or its activations overflow their dtype."
            )


def _same(value: Any) -> Any:
    return value


@partial(jax.jit, static_argnames="cut")
def _hidden(decoder: Decoder, tokens: Int[Array, "b t"], cut: Devices | None = None) -> Float[Array, "b t d"]:
    if cut is None:
        return decoder.hidden(tokens)
    x = cut.apart(decoder.embed(tokens))
    return decoder.norm(decoder.through_layers(x, joined=cut.joined))


@partial(jax.jit, static_argnames="cut")
def _nll(
    decoder: Decoder, hidden: Float[Array, "b t d"], tokens: Int[Array, "b t"], cut: Devices | None
) -> Float[Array, "b scored"]:
    hidden, tokens = cut.whole((hidden, tokens)) if cut else (hidden, tokens)

    def rows(states: Array, targets: Array) -> Array:
        logits = decoder.logits(states).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    return map_rows(rows, hidden[:, :-1], tokens[:, 1:])


@partial(jax.jit, static_argnames="cut")
def _compare(
    decoder: Decoder, hidden: Array, other: Decoder, other_hidden: Array, tokens: Int[Array, "b t"], cut: Devices | None
) -> tuple[Array, Array, Array]:
    hidden, other_hidden, tokens = cut.whole((hidden, other_hidden, tokens)) if cut else (hidden, other_hidden, tokens)

    def rows(states: Array, other_states: Array, targets: Array) -> tuple[Array, Array, Array]:
        logits = decoder.logits(states).astype(jnp.float32)
        expected = other.logits(other_states).astype(jnp.float32)
        p = jax.nn.softmax(expected)
        # Σ p (log p − log q) with the two normalisers taken out of the sum: a fifth faster than optax.
        gap = jax.nn.logsumexp(logits, -1) - jax.nn.logsumexp(expected, -1)
        kl = jnp.sum(p * (expected - logits), -1) + gap
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return nll, kl, jnp.argmax(logits, -1) == jnp.argmax(expected, -1)

    return map_rows(rows, hidden[:, :-1], other_hidden[:, :-1], tokens[:, 1:])
