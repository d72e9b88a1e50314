"""Figures from rows of results, each by one call:

    jquant.plot.perplexity_bits(comparison.rows())

Every function returns the axes of its main panel. Without `ax` it draws a figure of its own, with all panels, in the
size of a paper's column; a notebook shows it. With `ax` it draws the main panel there. `save` writes the figure as PNG
and PDF. matplotlib comes with the extra `plot`.
"""

try:
    import matplotlib  # noqa: F401
except ImportError:
    raise ImportError("Figures need matplotlib: pip install 'jquant[plot]'.") from None

from jquant.plot.activations import outliers
from jquant.plot.bits import perplexity_bits
from jquant.plot.distortion import distortion
from jquant.plot.layers import sensitivity
from jquant.plot.style import save
from jquant.plot.training import training_curves

__all__ = ["distortion", "outliers", "perplexity_bits", "save", "sensitivity", "training_curves"]
