"""jquant: quantize language models in JAX.

    model = jquant.load_model("smollm2_135m")
    q = jquant.quantize(model, "gptq", bits=4, group=64, calibration=jquant.load_text("c4_utf8"))
    jquant.perplexity(q, jquant.load_text("wiki_utf8"), windows=32)

A method is a point in transform ∘ range ∘ rounding ∘ format; `METHODS` names some, `Method(...)` writes any other.
"""

from jquant.data import load_text
from jquant.errors import InputError
from jquant.evaluation.generation import generate
from jquant.evaluation.perplexity import perplexity
from jquant.formats import NF4, Codebook, Int
from jquant.io.load import LanguageModel, load_model
from jquant.methods import METHODS, Method, method
from jquant.pipeline import quantize, quantize_decoder
from jquant.qtensor import QTensor, bits_per_weight, dequantize, matmul
from jquant.ranges import MinMax, Search
from jquant.rounding import GPTQ, Nearest
from jquant.transforms import AWQ

__version__ = "0.1.0"

__all__ = [
    "AWQ",
    "GPTQ",
    "METHODS",
    "NF4",
    "Codebook",
    "InputError",
    "Int",
    "LanguageModel",
    "Method",
    "MinMax",
    "Nearest",
    "QTensor",
    "Search",
    "bits_per_weight",
    "dequantize",
    "generate",
    "load_model",
    "load_text",
    "matmul",
    "method",
    "perplexity",
    "quantize",
    "quantize_decoder",
]
