"""A method: one choice on each axis, and how it is tuned afterwards. `jquant.methods` names some methods."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from jquant.activations import Activation
from jquant.errors import InputError
from jquant.formats import Format
from jquant.parts import brief, check_part, needs_of_parts, shown, statistics_of
from jquant.ranges import MinMax, Range
from jquant.rounding import Nearest, Rounding
from jquant.stats import BUILT_IN
from jquant.transforms import Hadamard, Incoherence, Transform


@dataclass(frozen=True)
class Tuning:
    """A stage of learning after rounding (`jquant.learning.tuning`): of scales; of zeros, weights and norms if asked.

    Attributes:
      steps: of the optimizer.
      windows: per step; each window of the text comes once an epoch, in an order drawn from `seed`.
      rate: of the scales' logarithm, and of zeros: float ones in units of the scale, integer ones in codes. Integer
        zeros stay unless `weight_rate` is above 0. Of adapters, the rate of a and b.
      weight_rate: of the weights behind the codes, in units of the scale; 0 keeps the codes. The gradient passes
        straight through rounding (`learning.fake_quant`).
      norm_rate: of the norms' scales; 0 keeps them.
      level_rate: of a codebook's levels, in units of the largest; 0 keeps them. Stacked layers share theirs.
      begin: where weights behind the codes start: "codes", at the values of the codes; "weights", at the float weights.
      target: "block" fits each block's outputs to the float model's, before the next block is rounded; "model" learns
        all blocks together at the end, by the KL divergence from the float model's predictions.
      text: weight of the calibration text's cross-entropy in the loss of "model", 0 to 1; the KL divergence has the
        rest. It lowers the perplexity, but the model also learns the text: docs/results.md has the cost in KL.
      reverse: share of KL(student ‖ teacher) in the KL divergence, 0 to 1; the rest is KL(teacher ‖ student).
        "confidence" takes the teacher's mean probability of the text's tokens (BitDistiller, arXiv 2402.10631, Eq. 8),
        here of each part of a step.
      top_k: the float model's k most likely tokens after each token are computed once, kept in the cache and learned
        from, with all others together as one more; None learns its whole distribution, computed in every step.
      optimizer: "adam"; "lion" (arXiv 2302.06675); "adafactor", without first moments and with factored second ones.
        Decay of the first moments: optax's, 0.9.
      b2: decay of Adam's second moments, or of Lion's momentum.
      schedule: "cosine" or "linear" decay of all rates to 0, or "constant".
      warmup: steps over which they rise before.
      clip: the gradient's largest norm over all parameters; None for any.
      compute: dtype of the products' factors; sums, weights and the optimizer's state are float32.
      accumulate: parts in which a step's windows go through the model, one after another.
      seed: of the windows' order.
    """

    steps: int = 64
    windows: int = 2
    rate: float = 2e-3
    weight_rate: float = 0.0
    norm_rate: float = 0.0
    level_rate: float = 0.0
    begin: Literal["codes", "weights"] = "codes"
    target: Literal["block", "model"] = "model"
    text: float = 0.0
    reverse: float | Literal["confidence"] = 0.0
    top_k: int | None = None
    optimizer: Literal["adam", "lion", "adafactor"] = "adam"
    b2: float = 0.999
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: int = 0
    clip: float | None = None
    compute: Literal["bfloat16", "float32"] = "bfloat16"
    accumulate: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("windows", 1), ("accumulate", 1), ("warmup", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"Tuning's {name} is a whole number from {least}, not {value!r}.")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1 or self.reverse == "confidence"):
            raise InputError(
                f"Tuning's top_k is None or a whole number from 1, without reverse='confidence', not {self.top_k!r}."
            )
        if self.windows % self.accumulate:
            raise InputError(f"Tuning's windows={self.windows} do not divide into accumulate={self.accumulate} parts.")
        if self.warmup >= self.steps:
            raise InputError(f"Tuning's warmup={self.warmup} leaves none of its steps={self.steps}.")
        for name, takes in RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool | str) or not takes(value):
                raise InputError(f"Tuning does not take {name}={value!r}.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"Tuning takes {name}={' or '.join(map(repr, choices))}, not {getattr(self, name)!r}.")
        shares = [self.text, *([] if self.reverse == "confidence" else [self.reverse])]
        if not all(isinstance(share, int | float) and 0 <= share <= 1 for share in shares):
            raise InputError(
                f"Tuning takes shares of text and reverse from 0 to 1, not {self.text} and {self.reverse}."
            )
        if self.target == "block" and (self.text or self.reverse or self.top_k):
            raise InputError(
                f"A block has no predictions: text={self.text}, reverse={self.reverse} and top_k={self.top_k} need "
                f'target="model".'
            )
        if self.target == "block" and self.level_rate:
            raise InputError(f'Layers share a codebook\'s levels: level_rate={self.level_rate} needs target="model".')


RANGES = {
    "rate": lambda value: 0 < value < math.inf,
    "weight_rate": lambda value: 0 <= value < math.inf,
    "norm_rate": lambda value: 0 <= value < math.inf,
    "level_rate": lambda value: 0 <= value < math.inf,
    "b2": lambda value: 0 < value < 1,
    "clip": lambda value: value is None or 0 < value < math.inf,
}
CHOICES = {
    "begin": ("codes", "weights"),
    "target": ("block", "model"),
    "optimizer": ("adam", "lion", "adafactor"),
    "schedule": ("cosine", "linear", "constant"),
    "compute": ("bfloat16", "float32"),
}

# A method's parts: the contract of each, and whether it may be None.
AXES: dict[str, tuple[type, bool]] = {
    "format": (Format, False),
    "range": (Range, False),
    "rounding": (Rounding, False),
    "transform": (Transform, True),
    "rotation": (Hadamard, True),
    "incoherence": (Incoherence, True),
    "activation": (Activation, True),
}


@dataclass(frozen=True)
class LossGradient:
    """Token weights from the gradient g of the loss at a weight's outputs: Σₜ gₜₖ² over the outputs k of a group.

    To second order an error Δ of a weight costs Σₜ (gₜᵀ Δᵀ xₜ)²; without its mixed terms that is
    Σₖ Δₖᵀ (Σₜ gₜₖ² xₜ xₜᵀ) Δₖ, so every output has a Gram matrix of its own. Outputs of a group share the mean of
    theirs (GuidedQuant, arXiv 2505.07004).

    Attributes:
      groups: of adjacent outputs of each weight, of one size; each is rounded with its own Gram matrix.
      labels: "text", the next tokens of the calibration text, as in GuidedQuant; "drawn", tokens that the float model
        draws, whose gradients' mean product is the Hessian of the KL divergence from it (as in YAQA, arXiv 2505.22988).

    Raises:
      InputError: fewer than 1 group; an unknown option.
    """

    groups: int = 1
    labels: Literal["text", "drawn"] = "text"

    def __post_init__(self) -> None:
        if isinstance(self.groups, bool) or not isinstance(self.groups, int) or self.groups < 1:
            raise InputError(f"LossGradient takes at least 1 group of outputs, not {self.groups!r}.")
        if self.labels not in ("text", "drawn"):
            raise InputError(f'LossGradient takes labels="text" or "drawn", not {self.labels!r}.')


@dataclass(frozen=True)
class Method:
    """One choice on each axis.

    Attributes:
      format: what a code means.
      range: how a group's scale is chosen.
      rounding: which code a weight gets.
      transform: exact rewrite of a block before rounding, or None.
      rotation: exact rewrite of the whole decoder before any block, or None; a plan's weights share it.
      incoherence: rotations of the weight's own inputs and outputs, which the product undoes, or None.
      token_weights: the weight of each token in the Gram matrix.
        "attention": for k and v, the attention that the token receives (`models/families.py` names the projections);
        with equal weights an attention sink ruins v, see docs/results.md.
        `LossGradient`, or "loss", which is `LossGradient()`: by the gradient of the loss at the projection's output,
        which costs one backward pass over the calibration text.
        "norm": 1 / the mean square of the input, so that all tokens have the same length. "uniform": 1.
      error_propagation: α, 0 to 1: how far weights are corrected for errors in their inputs that the blocks before
        made (`pipeline.blocks.propagate_error`).
      activation: how the weight's inputs are quantized, or None.
      tuning: how scales and codes are learned after rounding, stage by stage: blocks before the whole model.

    Raises:
      InputError: a part that does not keep the contract of its axis or can change (`parts.check_part`); an option out
        of range.
    """

    format: Format
    range: Range = field(default_factory=MinMax)
    rounding: Rounding = field(default_factory=Nearest)
    transform: Transform | None = None
    rotation: Hadamard | None = None
    incoherence: Incoherence | None = None
    token_weights: Literal["attention", "loss", "norm", "uniform"] | LossGradient = "attention"
    error_propagation: float = 0.0
    activation: Activation | None = None
    tuning: tuple[Tuning, ...] = ()

    def __post_init__(self) -> None:
        for axis, (contract, optional) in AXES.items():
            if not (optional and getattr(self, axis) is None):
                check_part(f"Method's {axis}", getattr(self, axis), contract)
        known = ("attention", "loss", "norm", "uniform")
        if not isinstance(self.token_weights, LossGradient) and self.token_weights not in known:
            raise InputError(
                f'Method takes token_weights="attention", "loss", "norm", "uniform" or a LossGradient, '
                f"not {self.token_weights!r}."
            )
        strength = self.error_propagation
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
            raise InputError(f"Method takes an error_propagation from 0 to 1, not {strength!r}.")
        if not isinstance(self.tuning, tuple) or not all(isinstance(stage, Tuning) for stage in self.tuning):
            raise InputError(f"Method's tuning is a tuple of jquant.Tuning(...), not {shown(self.tuning)}.")
        statistics_of(self.range, self.rounding, self.transform)
        if self.incoherence is not None:
            self._check_turned()
        if self.transform is not None and "output_gram" in self.needs:
            raise InputError("A transform scales outputs, whose Gram matrix would be unknown: leave one out.")
        if self.output_groups > 1:
            self._check_output_groups()
        targets = [stage.target for stage in self.tuning]
        if targets != sorted(targets, key=lambda target: target != "block"):
            raise InputError(f"Blocks are tuned before the whole model, not {' after '.join(targets[::-1])}.")

    def _check_turned(self) -> None:
        """Raises InputError for what is known of a weight's inputs or ranges, but not of its rotated ones."""
        others = needs_of_parts(self.range, self.rounding) - {"gram", "held_out", "output_gram"}
        if self.activation is not None and self.activation.static:
            others |= {"abs_max"}
        if others:
            raise InputError(
                f"Incoherence rotates inputs, of which {', '.join(sorted(others))} would be unknown: leave one out."
            )

    def _check_output_groups(self) -> None:
        """Raises InputError for parts that take one Gram matrix for all outputs of a weight."""
        parts = {
            "a transform": self.transform is not None,
            "Incoherence": self.incoherence is not None,
            "LossSearch": "clips" in self.needs,
            "a Gram matrix of the outputs": "output_gram" in self.needs,
            "scales that columns share": self.format.group == "tensor" or isinstance(self.format.group, tuple),
        }
        for part in (part for part, used in parts.items() if used):
            raise InputError(
                f"LossGradient(groups={self.output_groups}) rounds groups of outputs apart, which {part} "
                f"does not allow: take groups=1."
            )

    def __str__(self) -> str:
        """The method in short, without what has its default; `repr` is complete, and rows of results hold it."""
        return brief(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What a notebook shows."""
        printer.text(str(self))

    @property
    def loss_gradient(self) -> LossGradient | None:
        """How `token_weights` takes the loss's gradient; None if it doesn't."""
        chosen = LossGradient() if self.token_weights == "loss" else self.token_weights
        return chosen if isinstance(chosen, LossGradient) else None

    @property
    def output_groups(self) -> int:
        """Groups of outputs with a Gram matrix of their own."""
        return self.loss_gradient.groups if self.loss_gradient else 1

    @property
    def needs(self) -> frozenset[str]:
        """What calibration must provide, by name: statistics, also those of one's own; "clips", factors on ranges that
        the loss chooses; "outputs" of the float blocks; "text"."""
        names = {"outputs" if stage.target == "block" else "text" for stage in self.tuning}
        return needs_of_parts(self.range, self.rounding, self.transform).union(names, self.statistics)

    @property
    def statistics(self) -> dict[str, Any]:
        """The statistics of its inputs that calibration must observe, by name (`stats.Statistic`)."""
        names = {"gram", "cross"} if self.error_propagation else set()
        if self.activation is not None and self.activation.static:
            names.add("abs_max")
        return statistics_of(self.range, self.rounding, self.transform) | {name: BUILT_IN[name] for name in names}

    @property
    def needs_calibration(self) -> bool:
        """Whether any part needs calibration."""
        return bool(self.needs)


# The methods of one layer's weights: path within the block -> method, as pairs, so that it hashes.
Choices = tuple[tuple[str, Method], ...]


def needs_of(methods: Iterable[Method | None]) -> frozenset[str]:
    """What calibration must provide for these methods (`Method.needs`)."""
    return frozenset[str]().union(*(method.needs for method in methods if method is not None))
