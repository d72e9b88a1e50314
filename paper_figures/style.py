"""What all figures share: fonts, lines, readers' names of methods, a colour for each family, ticks, and saving.

pyplot is not used, so importing or drawing a figure does not change matplotlib's backend and settings.
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

from paper_figures.rows import FLOAT, Row, is_float

# As a decorator: the function draws in this style, independent of the user's settings.
styled = context(
    [
        "default",
        {
            "pdf.fonttype": 42,  # TrueType; journals refuse matplotlib's default, Type 3
            "figure.dpi": 300,
            "savefig.dpi": 300,
            "font.size": 8,
            "axes.titlesize": 8.5,
            "figure.titlesize": 9.5,
            "legend.fontsize": 7.5,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "grid.color": "0.92",
        },
    ]
)
FLOAT_NAMES = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}
NAMES = {
    "rtn": "round to nearest",
    "rtn_symmetric": "round to nearest, symmetric",
    "rtn_float_zero": "round to nearest, float zero",
    "rtn_percentile": "round to nearest, percentile range",
    "rtn_mse": "round to nearest, squared-error range",
    "rtn_diagonal": "round to nearest, Gram-diagonal range",
    "rtn_gram": "round to nearest, Gram-block range",
    "rtn_rotated": "round to nearest, rotated",
    "rtn_loss": "round to nearest, loss range",
    "stochastic": "stochastic rounding",
    "gptq_plain": "GPTQ as in its paper",
    "gptq_minmax": "GPTQ, min-max range",
    "gptq_gram_range": "GPTQ, Gram-block range",
    "gptq_uniform": "GPTQ, no token weights",
    "gptq_norm": "GPTQ, tokens weighted by norm",
    "gptq_loss": "GPTQ, tokens weighted by loss gradient",
    "gptq_rows": "GPTQ, rows first to last",
    "gptq_pivot": "GPTQ, smallest pivot first",
    "gptq_damping": "GPTQ, damping by held-out text",
    "gptq_refit": "GPTQ, scales refitted",
    "gptq_tuned": "GPTQ, scales tuned",
    "gptq_propagated": "GPTQ, errors propagated",
    "gptq_rotated": "GPTQ, rotated",
    "gptq_nf4": "GPTQ on NF4",
    "awq_gptq": "AWQ, then GPTQ",
    "learned": "learned scales",
    "learned_codes": "learned scales and codes",  # rows of earlier versions
    "qat": "QAT",
    "efficient_qat": "EfficientQAT",
    "llm_int8": "LLM.int8()",
    "smoothquant": "SmoothQuant W8A8",
    "w8a8_static": "W8A8, static",
    "nf4_double": "NF4, double quantization",
    "fp8_e4m3": "FP8 E4M3",
    "fp8_e4m3_tensor": "FP8 E4M3, one scale a tensor",
    "fp8_e4m3_1x128": "FP8 E4M3, 1 × 128 a scale",
    "fp8_e4m3_128x128": "FP8 E4M3, 128 × 128 a scale",
    "fp8_e5m2": "FP8 E5M2",
    "mxfp8_e4m3": "MXFP8 E4M3",
    "mxfp8_e5m2": "MXFP8 E5M2",
    "mxfp6_e2m3": "MXFP6 E2M3",
    "mxfp6_e3m2": "MXFP6 E3M2",
}
# Start of a method's name (regex) -> its family and the family's colour; the first match counts.
FAMILIES = {
    "gptq_plain": ("GPTQ as in its paper", "#e69f00"),
    "gptq": ("GPTQ", "#d55e00"),
    "learned": ("learned", "#aa3377"),
    "awq": ("AWQ", "#009e73"),
    "rtn|stochastic": ("integers, round to nearest", "#0072b2"),
    "(llm_)?int8|w8a8|smoothquant": ("8-bit integers", "#56b4e9"),
    r"nf\d|fp4": ("codebooks: NF, FP4", "#8c564b"),
    "fp8": ("FP8", "#cc79a7"),
    "mxfp|nvfp": ("block floats: MX, NV", "#44aa99"),
    r"i?q\d": ("llama.cpp's types", "#332288"),
    "gguf_": ("llama.cpp's mixtures", "#999933"),
}
OTHERS = ("other methods", "0.3")
MODELS = {"smollm2_135m": "SmolLM2-135M-Instruct"}
TEXTS = {
    "wiki_utf8": "Wikipedia (wiki_utf8)",
    "code_utf8": "source code (code_utf8)",
    "technical_utf8": "technical articles (technical_utf8)",
    "wiki.test.noblank.raw": "WikiText-2's test split, no blank lines",
    "wikitext2": "WikiText-2's test split",
}


def stem_and_width(row: Row) -> tuple[str, str]:
    """A method's name without its width, and the width; "gptq-3" and "gptq" with bits=3 are the same."""
    match = re.fullmatch(r"(.+)-(\d+)", row["method"])
    return (match[1], match[2]) if match else (row["method"], str(row.get("config", {}).get("bits", "")))


def name(row: Row) -> str:
    """The readers' name of the row's method; a user's method keeps its name."""
    if row.get("stored"):
        return "as stored" if row["method"] == FLOAT else row["method"]
    if is_float(row):
        return float_name(row)
    stem, _ = stem_and_width(row)
    if stem.startswith("gguf_"):
        return f"{stem[5:].upper()} mixture"
    return NAMES.get(stem) or (stem if family(row) == OTHERS else stem.upper())


def float_name(row: Row) -> str:
    """The name of the float model that the row is compared with."""
    return FLOAT_NAMES.get(row["protocol"]["dtype"], "float")


def family(row: Row) -> tuple[str, str]:
    """The family of the row's method and its colour, the same in every figure."""
    return next((value for start, value in FAMILIES.items() if re.match(start, row["method"])), OTHERS)


def model(row: Row) -> str:
    """The model's name, and how its weights were stored: a quantized file is not the published model."""
    protocol = row["protocol"]
    stem = Path(protocol["model"]).name
    return f"{MODELS.get(stem, stem)}, weights stored as {protocol['weights_stored_as']}"


def text(row: Row) -> str:
    """The size and name of the text, e.g. "32 × 1,024 tokens of Wikipedia (wiki_utf8)"."""
    protocol = row["protocol"]
    stem = Path(protocol["data"]).name
    return f"{protocol['windows']} × {protocol['context']:,} tokens of {TEXTS.get(stem, stem)}"


def number(value: float) -> str:
    """A number with three digits, or with all digits if it is large."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


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
def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes <stem>.png and <stem>.pdf; the same figure gives the same bytes."""
    png, pdf = (stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf"))
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    # 256 colours take a third of the bytes; MAXCOVERAGE keeps colour maps smooth.
    image = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    image.save(png, optimize=True, dpi=(300, 300))
    figure.savefig(pdf, metadata={"CreationDate": None})
    return [png, pdf]
