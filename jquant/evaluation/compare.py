"""Models compared with the one that they were made from, on one text."""

import difflib
import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jquant.errors import InputError
from jquant.evaluation import rows
from jquant.evaluation.intervals import Change, paired_change
from jquant.evaluation.perplexity import Perplexity, Reference, Scores, check_overlap, evaluation_windows, score
from jquant.evaluation.rows import FLOAT, Rows, as_html, as_text
from jquant.io.language_model import LanguageModel
from jquant.models.size import Size, size_of
from jquant.parts import shown
from jquant.progress import Progress, showing
from jquant.provenance import array_digest

HEADINGS = ("model", "perplexity", "change, %", "KL", "top-1, %", "bits/weight", "MB")


@dataclass(frozen=True)
class Compared:
    """One model's figures.

    Attributes:
      perplexity: the model's, with its protocol.
      change: of the perplexity against the base, with its 95 % interval, paired by window; None without a base.
      kl: KL(base ‖ model) of the next-token distribution, nats, mean over the scored tokens; None without a base.
      top1: share of the scored tokens where base and model have the same most likely token; None without a base.
      size: bits per weight and megabytes.
      window_nll: each window's mean negative log likelihood, float64 `[windows]`.
    """

    perplexity: Perplexity
    change: Change | None
    kl: float | None
    top1: float | None
    size: Size
    window_nll: np.ndarray = field(repr=False)

    def row(self) -> dict[str, Any]:
        """The figures by their names in rows of results, ready for JSON."""
        return {
            "perplexity": float(self.perplexity),
            "perplexity_stderr": None if math.isnan(self.perplexity.stderr) else self.perplexity.stderr,
            "perplexity_change_percent": self.change and self.change.percent,
            "kl": self.kl,
            "top1_agreement": self.top1,
            "bits_per_weight": self.size.bits_per_weight,
            "weight_mb": self.size.megabytes,
            "window_nll": self.window_nll.tolist(),
        }


def compared(scores: Scores, base: Scores | None, size: Size, bos: bool, stride: int | None = None) -> Compared:
    """A model's figures. `scores` have the base as reference, or are the base's own; `base` is None without a base."""
    change = kl = top1 = None
    if base is not None:
        change = paired_change(scores.window_nll, base.window_nll)
        kl = 0.0 if scores.kl is None else float(scores.kl.mean(dtype=np.float64))
        top1 = 1.0 if scores.agrees is None else float(scores.agrees.mean())
    return Compared(scores.with_protocol(bos, stride), change, kl, top1, size, scores.window_nll)


@dataclass(frozen=True, repr=False)
class Comparison:
    """The result of `compare`.

    Attributes:
      models: the figures by the models' names, the base first.
      protocol: of the measurement, as in rows of results: model, dtype, windows and so on.
    """

    models: dict[str, Compared]
    protocol: dict[str, Any]

    def __getitem__(self, name: str) -> Compared:
        if name not in self.models:
            near = difflib.get_close_matches(name, self.models, n=len(self.models), cutoff=0.0)
            raise InputError(f"The comparison has no model {name!r}; the nearest names are {', '.join(near)}.")
        return self.models[name]

    def rows(self) -> Rows:
        """One row a model, ready for JSON and for `jquant.plot`; the base is called "fp32"."""
        names = [FLOAT, *list(self.models)[1:]]
        return Rows(
            {"method": name, **model.row(), "protocol": self.protocol}
            for name, model in zip(names, self.models.values(), strict=True)
        )

    def __repr__(self) -> str:
        return f"{as_text([HEADINGS, *self._cells()])}\n{self._caption()}"

    def _repr_html_(self) -> str:
        return f"{as_html([HEADINGS, *self._cells()])}<p>{html.escape(self._caption())}</p>"

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                name,
                f"{model.perplexity:.3f} ±{model.perplexity.stderr:.3f}",
                str(model.change),
                f"{model.kl:.4f}",
                f"{100 * (model.top1 or 0):.1f}",
                f"{model.size.bits_per_weight:.3f}",
                f"{model.size.megabytes:.1f}",
            )
            for name, model in self.models.items()
        ]

    def _caption(self) -> str:
        base = next(iter(self.models))
        return (
            f"{rows.windows(self.protocol)}. Change (its 95 % interval is paired by window; *: it excludes zero), KL "
            f"and top-1 agreement are to {base}."
        )


def compare(
    model: LanguageModel,
    others: Mapping[str, LanguageModel],
    text: str,
    *,
    context: int = 1024,
    windows: int | None = None,
    stride: int | None = None,
    bos: bool = False,
    allow_overlap: bool = False,
    progress: Progress | bool = True,
) -> Comparison:
    """Perplexity, KL divergence, top-1 agreement and size of models beside the one that they were made from.

    Args:
      model: what the others are compared with, usually float.
      others: models by name, e.g. {"GPTQ": q}.
      text: what to score; see `perplexity` for this and the next arguments.
      context: tokens per window.
      windows: how many, from the start; all by default.
      stride: of windows that overlap.
      bos: begin every window with the tokenizer's BOS.
      allow_overlap: whether the text may occur in the calibration text.
      progress: see `perplexity`.

    Raises:
      InputError: what `perplexity` finds; a model with another tokenizer; a name that the base has.
    """
    if not isinstance(others, Mapping):
        raise InputError(f"compare takes the other models by their names, {{'GPTQ': q}}, not {shown(others)}.")
    cut = (text, context, windows, bos, stride)
    tokens = evaluation_windows(model, *cut)
    for name, other in others.items():
        _check_name(name, other, model)
        same_tokenizer = other.tokenizer is model.tokenizer
        if not same_tokenizer and not np.array_equal(evaluation_windows(other, *cut), tokens):
            raise InputError(f"{name} reads the text as other tokens than {model.name}: they can't be compared.")
    for judged in () if allow_overlap else (model, *others.values()):
        check_overlap(judged, tokens, bos)
    with showing(progress) as tell:
        base = score(model.decoder, tokens, progress=tell)
        reference = Reference(model.decoder, base.hidden)
        scored = base.last(stride)
        figures = {model.name: compared(scored, scored, size_of(model.decoder), bos, stride)}
        for name, other in others.items():
            scores = score(other.decoder, tokens, reference=reference, progress=tell).last(stride)
            figures[name] = compared(scores, scored, size_of(other.decoder), bos, stride)
    return Comparison(figures, _protocol(model, tokens, bos, stride))


def _check_name(name: Any, other: Any, model: LanguageModel) -> None:
    """Raises InputError for a value that is no model, or a name that the base has."""
    if not isinstance(other, LanguageModel):
        raise InputError(f"compare takes models by their names, {{'GPTQ': q}}; {name!r} is {shown(other)}.")
    if name in (model.name, FLOAT):
        raise InputError(f"{name!r} is the name of the model that the others are compared with: choose another.")


def _protocol(model: LanguageModel, tokens: np.ndarray, bos: bool, stride: int | None) -> dict[str, Any]:
    return {
        "model": model.name,
        "weights_stored_as": model.stored_as,
        "dtype": str(model.decoder.dtype),
        "data": "text",
        "windows": len(tokens),
        "context": tokens.shape[1],
        "stride": stride or tokens.shape[1],
        "bos": bos,
        "scored_tokens": tokens[:, 1:][:, -(stride or 0) :].size,
        "evaluation_sha256": array_digest(tokens),
    }
