"""jquant: quantize language models in JAX.

    model = jquant.load_model("smollm2_135m")
    q = jquant.quantize(model, "gptq", bits=4, group=64, calibration=jquant.load_text("c4_utf8"))
    jquant.perplexity(q, jquant.load_text("wiki_utf8"), windows=32)

A method is a point in transform ∘ range ∘ rounding ∘ format; `METHODS` names some, `Method(...)` writes any other.
"""

from importlib import import_module
from typing import Any

from jquant.activations import Activation
from jquant.calibration.options import Options
from jquant.composition import LossGradient
from jquant.data import load_text
from jquant.errors import InputError
from jquant.evaluation.compare import Comparison, compare
from jquant.evaluation.generation import generate, generate_many
from jquant.evaluation.outliers import outliers
from jquant.evaluation.perplexity import Perplexity, perplexity
from jquant.formats import (
    E8P,
    FP4,
    FP8_E4M3,
    FP8_E5M2,
    GGUF,
    MXFP4,
    NF3,
    NF4,
    NVFP4,
    SEQ,
    Additive,
    Codebook,
    ColumnCodebook,
    Float,
    Format,
    Int,
    Trellis,
    VectorCodebook,
    double_quantized,
)
from jquant.io.adapters import load_adapters, save_adapters
from jquant.io.export import export
from jquant.io.gguf.mixes import gguf_mix
from jquant.io.language_model import LanguageModel
from jquant.io.load import load_model, open_model
from jquant.kernels.choose import products
from jquant.learning.journal import Journal
from jquant.learning.lora import add_adapters, merge_adapters, train_adapters
from jquant.learning.tuning import tune
from jquant.methods import METHODS, Method, Tuning, method
from jquant.models.adapters import LoRA
from jquant.models.cache import CacheFormat, Stored
from jquant.models.decoder import with_cache
from jquant.models.folding import permute_mlp, rotate
from jquant.pipeline.gram import gram
from jquant.pipeline.in_memory import quantize, quantize_decoder, quantize_decoders
from jquant.pipeline.to_disk import quantize_to_folder
from jquant.qtensor import Grid, QTensor, bits_per_weight, dequantize
from jquant.ranges import RMS, LlamaCpp, LossSearch, MinMax, Percentile, Range, Search
from jquant.report import Report
from jquant.rounding import AQLM, GPTQ, LNQ, Nearest, Refit, Rounded, Rounding, Stochastic, TwoSided
from jquant.stats import AbsMax, AbsMean, Gram, Statistic
from jquant.transforms import AWQ, Hadamard, Incoherence, SmoothQuant, Transform

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`jquant.plot`, imported where it is first used: it needs matplotlib, an extra."""
    if name == "plot":
        return import_module("jquant.plot")
    raise AttributeError(f"module 'jquant' has no attribute {name!r}")


__all__ = [
    "AQLM",
    "AWQ",
    "E8P",
    "FP4",
    "FP8_E4M3",
    "FP8_E5M2",
    "GGUF",
    "GPTQ",
    "LNQ",
    "METHODS",
    "MXFP4",
    "NF3",
    "NF4",
    "NVFP4",
    "RMS",
    "SEQ",
    "AbsMax",
    "AbsMean",
    "Activation",
    "Additive",
    "CacheFormat",
    "Codebook",
    "ColumnCodebook",
    "Comparison",
    "Float",
    "Format",
    "Gram",
    "Grid",
    "Hadamard",
    "Incoherence",
    "InputError",
    "Int",
    "Journal",
    "LanguageModel",
    "LlamaCpp",
    "LoRA",
    "LossGradient",
    "LossSearch",
    "Method",
    "MinMax",
    "Nearest",
    "Options",
    "Percentile",
    "Perplexity",
    "QTensor",
    "Range",
    "Refit",
    "Report",
    "Rounded",
    "Rounding",
    "Search",
    "SmoothQuant",
    "Statistic",
    "Stochastic",
    "Stored",
    "Transform",
    "Trellis",
    "Tuning",
    "TwoSided",
    "VectorCodebook",
    "add_adapters",
    "bits_per_weight",
    "compare",
    "dequantize",
    "double_quantized",
    "export",
    "generate",
    "generate_many",
    "gguf_mix",
    "gram",
    "load_adapters",
    "load_model",
    "load_text",
    "merge_adapters",
    "method",
    "open_model",
    "outliers",
    "permute_mlp",
    "perplexity",
    "products",
    "quantize",
    "quantize_decoder",
    "quantize_decoders",
    "quantize_to_folder",
    "rotate",
    "save_adapters",
    "train_adapters",
    "tune",
    "with_cache",
]
