"""What quantization did to the weights of a model."""

import difflib
import math
from collections.abc import Iterable, Iterator

import numpy as np

from jquant.errors import InputError
from jquant.parts import counted
from jquant.rounding import SolveInfo


class Report(dict[tuple[int, str], SolveInfo]):
    """(layer, path within the block) -> SolveInfo of each quantized weight.

    A weight's whole name, "layers.0.mlp.down.kernel", is a key, too; InputError with the nearest names for another.
    """

    def __getitem__(self, weight: tuple[int, str] | str) -> SolveInfo:
        if not isinstance(weight, str):
            return super().__getitem__(weight)
        names = {f"layers.{layer}.{path}": info for (layer, path), info in self.items()}
        if weight not in names:
            near = difflib.get_close_matches(weight, names, n=3, cutoff=0.0)
            raise InputError(f"The report has no weight {weight!r}; the nearest names are {', '.join(near) or 'none'}.")
        return names[weight]

    @property
    def fallbacks(self) -> list[str]:
        """Names of the weights for which no factorisation was finite (`SolveInfo.fallback`)."""
        return [f"layers.{layer}.{path}" for (layer, path), info in self.items() if info.fallback]

    @property
    def error(self) -> float | None:
        """Mean share of the weights' output energy that rounding loses on the calibration text; None if unknown."""
        return _mean(share for _, share in _shares(self))

    @property
    def held_out_error(self) -> float | None:
        """The same on held-out windows."""
        return _mean(float(i.held_out_error / i.held_out_energy) for i in self.values() if i.held_out_energy > 0)

    def __repr__(self) -> str:
        layers = len({layer for layer, _ in self})
        head = f"Report of {counted(len(self), 'weight')} in {counted(layers, 'layer')}"
        shares = {f"layers.{layer}.{path}": share for (layer, path), share in _shares(self)}
        if not shares:
            return f"{head}: no error is known, as there was no calibration text"
        worst = max(shares, key=shares.__getitem__)
        return (
            f"{head}: they lose {np.mean(list(shares.values())):.3g} of their outputs' energy on average, {worst} "
            f"{shares[worst]:.3g}"
            + (f"; {many} rounded to nearest, because no solution was finite" if (many := len(self.fallbacks)) else "")
        )


def relative_error(reports: Iterable[Report]) -> float:
    """Mean share of the projections' output energy that rounding loses; NaN if unknown."""
    mean = _mean(share for report in reports for _, share in _shares(report))
    return math.nan if mean is None else mean


def _mean(shares: Iterable[float]) -> float | None:
    values = list(shares)
    return float(np.mean(values)) if values else None


def _shares(report: Report) -> Iterator[tuple[tuple[int, str], float]]:
    """(weight, share of its output energy that is lost), for weights whose energy is known."""
    for weight, info in report.items():
        if info.energy > 0:
            yield weight, float(info.error / info.energy)
