"""Confidence intervals of measurements on the same windows, or on the same items."""

from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtri, stdtrit


class Change(NamedTuple):
    """A change of perplexity in percent, or of accuracy in percentage points, and the ends of its 95 % interval.

    The ends are NaN for a single window.
    """

    percent: float
    low: float
    high: float

    def __str__(self) -> str:
        return self.text()

    def text(self, decimals: int = 2) -> str:
        """The change, its interval, and a star where the interval excludes zero."""
        if not self.low < self.high:  # one window, or a model beside itself
            return f"{self.percent:+,.{decimals}f}"
        low, high = (f"{end:+,.{decimals}f}" for end in (self.low, self.high))
        return f"{self.percent:+,.{decimals}f} [{low}, {high}]" + "*" * (self.low > 0 or self.high < 0)


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


def paired_accuracy(correct: Any, base: Any) -> Change:
    """Change of accuracy against a base on the same items, percentage points, with its 95 % interval.

    Only items on which the two differ tell anything: b that this model alone has right, c that the base alone has. The
    change is (b − c) / n. The interval is Bonett and Price's (2012, doi:10.3102/1076998611411915): Wald's with one
    item added to b and one to c. Wald's own has no width where b = c = 0, and covers too little for few such items.
    Fagerland, Lydersen and Laake (2014, doi:10.1002/sim.6148) compare such intervals and recommend this one.

    Args:
      correct: whether each item is right, `[n]`.
      base: the same of the base.
    """
    gap = np.asarray(correct, np.int64) - np.asarray(base, np.int64)
    n, won, lost = len(gap), (gap > 0).sum(), (gap < 0).sum()
    p, q = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    half = ndtri(0.975) * np.sqrt((p + q - (p - q) ** 2) / (n + 2))
    ends = np.clip([p - q - half, p - q + half], -1, 1)
    return Change(*(float(100 * value) for value in ((won - lost) / n, *ends)))
