"""Rows of results: reading, selecting, readers' names of methods, intervals of perplexities, a short table."""

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jquant.errors import InputError
from jquant.evaluation.intervals import mean_and_half
from jquant.methods import METHODS, leaves_open
from jquant.parts import counted, shown

FLOAT = "fp32"  # in rows of results, the model that the others are compared with
Row = dict[str, Any]
Ends = tuple[float, float]  # of an interval

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
    "gptq_incoherent": "GPTQ, each weight rotated",
    "gptq_drawn": "GPTQ, tokens weighted by drawn labels",
    "gptq_guided": "GPTQ, 4 groups of outputs (GuidedQuant)",
    "gptq_two_sided": "GPTQ on both sides, tokens as in GPTQ",
    "gptq_yaqa": "GPTQ on both sides (YAQA)",
    "rtn_incoherent": "round to nearest, each weight rotated",
    "nf4_incoherent": "NF4, each weight rotated",
    "mxfp4_incoherent": "MXFP4, each weight rotated",
    "nvfp4_incoherent": "NVFP4, each weight rotated",
    "e8p": "E8P",
    "e8p_plain": "E8P, not rotated",
    "trellis": "trellis",
    "trellis_plain": "trellis, not rotated",
    "trellis_refit": "trellis, scales refitted",
    "trellis_drawn": "trellis, tokens weighted by drawn labels",
    "trellis_yaqa": "trellis, on both sides (YAQA)",
    "trellis_propagated": "trellis, errors propagated",
    "trellis_learned": "trellis, scales and norms learned",
    "aqlm": "AQLM",
    "lnq": "LNQ",
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
MODELS = {"smollm2_135m": "SmolLM2-135M-Instruct"}
TEXTS = {
    "wiki_utf8": "Wikipedia (wiki_utf8)",
    "code_utf8": "source code (code_utf8)",
    "technical_utf8": "technical articles (technical_utf8)",
    "wiki.test.noblank.raw": "WikiText-2's test split, no blank lines",
    "wikitext2": "WikiText-2's test split",
}
# Columns of a short table: heading, and a format string over the row; those that no row has are left out.
COLUMNS = {
    "perplexity": "{perplexity:.3f}",
    "change, %": "{perplexity_change_percent:+.2f}",
    "KL": "{kl:.4f}",
    "top-1, %": "{top1_percent:.1f}",
    "bits/weight": "{bits_per_weight:.3f}",
    "MB": "{weight_mb:.1f}",
    "settings": "{settings}",
}


class Rows(list[Row]):
    """A list of rows that is shown as a short table, in notebooks as HTML; the rows themselves are dictionaries."""

    def __repr__(self) -> str:
        return as_text(self._cells())

    def _repr_html_(self) -> str:
        return as_html(self._cells())

    def _cells(self) -> list[list[str]]:
        """The headings, and each row's cells."""
        texts = {row["protocol"].get("data") for row in self if "protocol" in row}
        cells = [_cells_of(row, len(texts) > 1) for row in self]
        headings = [name for name in ("method", "text", *COLUMNS) if any(line.get(name) for line in cells)]
        return [headings, *([line.get(name, "") for name in headings] for line in cells)] if headings else [["no rows"]]


def as_text(lines: Sequence[Sequence[str]]) -> str:
    """A table of cells, the headings first, in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pad = lambda cells: [cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]  # noqa: E731
    return "\n".join("  ".join(pad(line)) for line in lines)


def as_html(lines: Sequence[Sequence[str]]) -> str:
    """The same as HTML."""
    tagged = lambda tag, cells: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)  # noqa: E731
    body = "".join(f"<tr>{tagged('td', cells)}</tr>" for cells in lines[1:])
    return f"<table><tr>{tagged('th', lines[0])}</tr>{body}</table>"


def _cells_of(row: Row, with_text: bool) -> dict[str, str]:
    """A row's cells by their headings, without those of missing figures."""
    figures = {key: value for key, value in row.items() if value is not None}
    if "top1_agreement" in figures:
        figures["top1_percent"] = 100 * figures["top1_agreement"]
    cells = {"method": with_bits(row) if "method" in row and "protocol" in row else str(row.get("method", ""))}
    if with_text:
        stem = Path(row["protocol"]["data"]).name
        cells["text"] = TEXTS.get(stem, stem)
    for heading, shape in COLUMNS.items():
        try:
            cells[heading] = shape.format(**figures)
        except (KeyError, ValueError):  # the row has no such figure
            continue
    return cells


def read_rows(path: str | Path) -> Rows:
    """The rows of a file of JSON lines.

    Raises:
      InputError: the file can't be read, has no rows, or has a line that is not a JSON object with finite numbers.
    """
    try:
        # Not splitlines(): it also cuts at characters that a text may hold.
        lines = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line]
        rows = [json.loads(line, parse_constant=_refuse) for line in lines]
    except (OSError, ValueError, RecursionError) as wrong:
        raise InputError(f"{path} can't be read ({wrong}).") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} has no rows: it takes one JSON object a line.")
    return Rows(rows)


def check_rows(rows: Any) -> None:
    """Raises InputError for what is no list of rows, or an empty one."""
    if isinstance(rows, str | Path):
        raise InputError(f"A figure takes rows, not their file: give jquant.evaluation.rows.read_rows({str(rows)!r}).")
    if not isinstance(rows, Sequence) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"A figure takes rows, e.g. comparison.rows(), not {shown(rows)}.")
    if not rows:
        raise InputError("A figure takes one row or more, and there is none.")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no finite number")


def is_float(row: Row) -> bool:
    """Whether the row is the float model that the others are compared with."""
    return row["method"] == FLOAT and not row.get("stored")


def by_text(rows: Sequence[Row]) -> dict[str, Rows]:
    """The rows of each text that was evaluated."""
    texts = dict.fromkeys(row["protocol"]["data"] for row in rows)
    return {text: Rows(row for row in rows if row["protocol"]["data"] == text) for text in texts}


def quoted(row: Row, figure: str) -> float | None:
    """A figure of others for this method (configs/published/), of whatever model, if the row's settings quote one."""
    others = row.get("config", {}).get("published") or {"methods": {}}
    return others["methods"].get(row["method"], {}).get(figure)


def published(row: Row) -> float | None:
    """The perplexity that others found for this method and the same model, if the row's settings quote it."""
    config = row.get("config", {})
    same = "published" in config and (config["published"] or {}).get("model") == config["model"]["name"]
    return quoted(row, "perplexity") if same else None


# ---- names ----------------------------------------------------------------------------------------------------------


def stem_and_width(row: Row) -> tuple[str, str]:
    """A method's name without its width, and the width; "gptq-3" and "gptq" with bits=3 are the same."""
    match = re.fullmatch(r"(.+)-([2-8])", row["method"])
    if match and ("config" in row or match[1] in METHODS):  # others are names that a user gave to models
        return match[1], match[2]
    return row["method"], str(row.get("config", {}).get("bits", ""))


def name(row: Row) -> str:
    """The readers' name of the row's method; a user's method keeps its name."""
    if row.get("stored"):
        return "as stored" if row["method"] == FLOAT else row["method"]
    if is_float(row):
        return float_name(row)
    stem, _ = stem_and_width(row)
    if stem.startswith("gguf_"):
        return f"{stem[5:].upper()} mixture"
    return NAMES.get(stem) or (stem.upper() if stem in METHODS else stem)


def with_bits(row: Row) -> str:
    """The readers' name with the width, if the method takes one: "GPTQ, 3 bits"."""
    stem, width = stem_and_width(row)
    takes_width = stem != row["method"] or (stem in METHODS and "bits" in leaves_open(stem))
    named = takes_width and width and not (is_float(row) or row.get("stored"))
    return f"{name(row)}, {width} bits" if named else name(row)


def float_name(row: Row) -> str:
    """The name of the float model that the row is compared with."""
    return FLOAT_NAMES.get(row["protocol"]["dtype"], "float")


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


def windows(protocol: dict[str, Any]) -> str:
    """The windows that were scored: how many, of how many tokens, how far apart, with BOS or without."""
    context, stride = protocol["context"], protocol.get("stride", protocol["context"])
    apart = "not overlapping" if stride == context else f"one every {stride}"
    bos = "with" if protocol["bos"] else "no"
    count = f"{counted(protocol['windows'], 'window')} of {context} tokens"
    return f"{count}, {apart}, {bos} BOS, {protocol['scored_tokens']} scored tokens"


def number(value: float) -> str:
    """A number with three digits, or with all digits if it is large."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# ---- intervals ------------------------------------------------------------------------------------------------------


def intervals(rows: Sequence[Row]) -> tuple[str, list[Ends | None]]:
    """A description of the perplexities' intervals, and each row's ends, or None.

    Windows differ much more than methods do. So if all rows have the likelihoods of the same windows, the intervals are
    those of the change from the float model, paired by window; otherwise they are standard errors.
    """
    base = next(filter(is_float, rows), None)
    if base and all(row.get("window_nll") and _windows(row) == _windows(base) for row in rows):
        halves = [mean_and_half(np.subtract(row["window_nll"], base["window_nll"]))[1] for row in rows]
        pairs = [(row["perplexity"], float(np.exp(half))) for row, half in zip(rows, halves, strict=True)]
        ends = [(at / factor, at * factor) if factor > 1 else None for at, factor in pairs]
        return "95 % interval of the change from the float model, paired by window", ends
    pairs = [(row["perplexity"], row.get("perplexity_stderr")) for row in rows]
    return "± one standard error", [(at - error, at + error) if error else None for at, error in pairs]


def _windows(row: Row) -> tuple[Any, int]:
    return row["protocol"].get("evaluation_sha256"), len(row["window_nll"])
