"""What all figures share: sizes, fonts, colours that colour-blind readers can tell apart, ticks, and saving.

pyplot is imported only where a figure is to be shown in a notebook, so importing, drawing and saving do not change
matplotlib's backend and settings.
"""

import io
import math
import re
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import MaxNLocator
from PIL import Image

from jquant.evaluation.rows import Row

# Widths of a paper with two columns, in inches: one column, and both with the space between them.
ONE, TWO = 3.3, 6.9
SMALL = 6.5  # points: the smallest text
# Okabe and Ito's colours, which readers with any kind of colour blindness can tell apart; yellow is too pale for lines.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

# As a decorator: the function draws in this style, independent of the user's settings.
styled = context(
    [
        "default",
        {
            "pdf.fonttype": 42,  # TrueType; journals refuse matplotlib's default, Type 3
            "figure.dpi": 300,
            "savefig.dpi": 300,
            "font.size": 7.5,
            "axes.titlesize": 7.5,
            "axes.prop_cycle": f"cycler('color', {list(PALETTE)})",
            "figure.titlesize": 8,
            "legend.fontsize": 7,
            "legend.frameon": False,
            "xtick.labelsize": 7,
            "ytick.labelsize": 7,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "grid.color": "0.92",
        },
    ]
)
# Start of a method's name (regex) -> its family and the family's colour; the first match counts. Eleven families are
# more than any palette can hold apart, so a name stands at every point; those that are often compared have Okabe and
# Ito's colours.
FAMILIES = {
    "gptq_plain": ("GPTQ as in its paper", "#e69f00"),
    "gptq": ("GPTQ", "#d55e00"),
    "learned|qat|efficient_qat": ("learned", "#aa3377"),
    "awq": ("AWQ", "#009e73"),
    "rtn|stochastic": ("integers, round to nearest", "#0072b2"),
    "(llm_)?int8|w8a8|smoothquant": ("8-bit integers", "#56b4e9"),
    r"nf\d|fp4": ("codebooks: NF, FP4", "#000000"),
    "e8p|trellis": ("codes for several weights", "#882255"),
    "fp8": ("FP8", "#cc79a7"),
    "mxfp|nvfp": ("block floats: MX, NV", "#44aa99"),
    r"i?q\d": ("llama.cpp's types", "#332288"),
    "gguf_": ("llama.cpp's mixtures", "#999933"),
}
OTHERS = ("other methods", "0.4")


def family(row: Row) -> tuple[str, str]:
    """The family of the row's method and its colour, the same in every figure."""
    method = row["method"].lower()
    return next((value for start, value in FAMILIES.items() if re.match(start, method)), OTHERS)


def shown(**options: Any) -> Figure:
    """A figure that a notebook shows after its cell, and `matplotlib.pyplot.show` elsewhere."""
    import matplotlib.pyplot as plt  # imported here: it chooses a backend

    return plt.figure(dpi=150, **options)


def few_ticks(integer: bool = False, most: int = 8) -> MaxNLocator:
    """Round ticks for a linear axis, three or more."""
    return MaxNLocator(most - 1, steps=[1, 2, 5, 10], integer=integer, min_n_ticks=3)


def log_ticks(low: float, high: float, most: int = 9) -> list[float]:
    """Three ticks or more for a logarithmic axis: powers of ten, and values between them if the range is short."""
    powers = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)):
        ticks = [step * power for power in powers for step in steps if low <= step * power <= high]
        if len(ticks) >= 4:
            return ticks[:: math.ceil(len(ticks) / most)]
    return [float(tick) for tick in few_ticks().tick_values(low, high) if low <= tick <= high]


def set_ticks(axis: Axis, ticks: list[float]) -> None:
    """Sets all ticks, as plain numbers, or as powers of ten if some have many digits."""
    short = all(1e-3 <= tick < 1e5 for tick in ticks)
    texts = [f"{tick:,.6g}" if short else f"$10^{{{round(math.log10(tick), 1):g}}}$" for tick in ticks]
    axis.set_ticks(ticks, labels=texts)
    axis.set_ticks([], minor=True)


def float_line(axes: Axes, at: float, label: str, upright: bool = False) -> None:
    """A dashed line for the float model, labelled outside the axes."""
    style: dict[str, Any] = {"color": "0.4", "linewidth": 1, "linestyle": "--", "zorder": 0}
    if upright:
        axes.axvline(at, **style)
        axes.text(at, 1, label, transform=axes.get_xaxis_transform(), ha="center", va="bottom", color="0.3")
    else:
        axes.axhline(at, **style)
        axes.text(1.01, at, label, transform=axes.get_yaxis_transform(), ha="left", va="center", color="0.3")


@styled
def save(drawn: Axes | Figure, stem: str | Path) -> list[Path]:
    """Writes the whole figure as <stem>.png and <stem>.pdf; the same figure gives the same bytes.

    Args:
      drawn: a figure, or one of its axes.
      stem: the files' path without their ending.
    """
    figure = drawn if isinstance(drawn, Figure) else drawn.get_figure(root=True)
    assert figure is not None
    png, pdf = (Path(stem).with_name(f"{Path(stem).name}.{kind}") for kind in ("png", "pdf"))
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png")
    # 256 colours take a third of the bytes; MAXCOVERAGE keeps colour maps smooth.
    image = Image.open(pixels).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    image.save(png, optimize=True, dpi=(300, 300))
    figure.savefig(pdf, metadata={"CreationDate": None})
    return [png, pdf]
