"""Confidence intervals of measurements on the same windows."""

from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit


class Change(NamedTuple):
    """A change of perplexity in percent, and the ends of its 95 % interval; the ends are NaN for a single window."""

    percent: float
    low: float
    high: float

    def __str__(self) -> str:
        # No interval: one window, or a model beside itself.
        return f"{self.percent:+.2f}" + (f" [{self.low:+.2f}, {self.high:+.2f}]" if self.low < self.high else "")


def mean_and_half(values: Any) -> tuple[float, float]:
    """The mean of `[n]` values and half its 95 % interval: Student's t, n - 1 degrees of freedom; NaN for one value."""
    n = len(values)
    half = stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / n**0.5 if n > 1 else np.nan
    return float(np.mean(values)), float(half)


def paired_change(window_nll: Any, base: Any) -> Change:
    """Change of perplexity against a base on the same windows, percent, with its 95 % interval.

    Both models score the same tokens, so most of the variation between windows cancels in the differences of the
    windows' mean negative log likelihoods. Their mean has a Student's t interval, with windows taken as independent;
    exp turns it into an interval of the ratio of perplexities.

    Args:
      window_nll: `Scores.window_nll`.
      base: `Scores.window_nll` of the base.
    """
    mean, half = mean_and_half(np.subtract(window_nll, base))
    return Change(*(float(100 * np.expm1(mean + shift)) for shift in (0, -half, half)))
