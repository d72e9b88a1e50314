"""What the public functions say to shapes and options that make no sense: one sentence that names them."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jquant import (
    GGUF,
    NF4,
    Activation,
    Codebook,
    Float,
    InputError,
    Int,
    LlamaCpp,
    Method,
    MinMax,
    Percentile,
    Search,
    Tuning,
    method,
)
from jquant.formats import UInt
from jquant.qtensor import quantize

W = jnp.asarray(np.random.default_rng(0).standard_normal((16, 4)), jnp.float32)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Int(1), "2 to 8 bits, not 1"),
        (lambda: Int(9), "2 to 8 bits, not 9"),
        (lambda: Int(True), "2 to 8 bits"),
        (lambda: UInt(0, 8), "2 to 8 bits, not 0"),
        (lambda: Int(4, 0), "not 0"),
        (lambda: Int(4, (16, 0)), r"\(16, 0\)"),
        (lambda: Int(4, scale="int8"), "'int8'"),
        (lambda: Int(4, scale="float9"), "'float9'"),
        (lambda: Codebook(()), "2 to 256 levels, not 0"),
        (lambda: Codebook((0.0,)), "2 to 256 levels, not 1"),
        (lambda: Codebook((0.0, 1.0, 0.5)), "ascending"),
        (lambda: Codebook((0.0, 0.0)), "ascending"),
        (lambda: Codebook((0.0, float("nan"))), "finite"),
        (lambda: Codebook((0.0, float("inf"))), "finite"),
        (lambda: Float(4, 4), "E4M4"),
        (lambda: Percentile(50.0), "50"),
        (lambda: Percentile(100.5), "100.5"),
        (lambda: Search(steps=0), "0"),
        (lambda: Search(smallest=0.0), "0.0"),
        (lambda: Activation(outliers=0.0), "0.0"),
        (lambda: method("gptqq"), "gptqq"),
        (lambda: Method(Int(4), error_propagation=1.5), "error_propagation.*1.5"),
        (lambda: Tuning(steps=0), "steps"),
        (lambda: Tuning(windows=0), "windows"),
        (lambda: Tuning(rate=0.0), "rate"),
        (lambda: Tuning(weight_rate=-1.0), "weight_rate"),
        (lambda: method("rtn", bits=12), "12"),
    ],
)
def test_an_option_out_of_range_is_named(make, said):
    with pytest.raises(InputError, match=said):
        make()


@pytest.mark.parametrize("levels", [[-1.0, 0.0, 1.0], np.array([-1.0, 0.0, 1.0])])
def test_a_codebook_takes_any_sequence_and_still_hashes(levels):
    # The run-time type check of these tests knows only the documented tuple.
    book = Codebook(tuple(levels), 8)
    assert hash(book) == hash(Codebook((-1.0, 0.0, 1.0), 8))


@pytest.mark.parametrize("format", [Int(4, 32), NF4(), Int(4, (32, 1)), Int(4, (8, 8)), GGUF["Q4_0"]], ids=str)
def test_a_group_larger_than_the_weight_is_named(format):
    with pytest.raises(InputError, match=r"larger than the weight's 16"):
        MinMax()(W, format)


# Run-time type checks are on in this process; users do not have them. One process serves all that needs one.
WITHOUT_TYPE_CHECKS = """
from dataclasses import dataclass
import jax.numpy as jnp, numpy as np
from flax import nnx
from jquant import *
from jquant.evaluation.generation import generate_ids
from jquant.evaluation.perplexity import score
from jquant.data import sample_windows, windows
from jquant.rounding import round_to_grid
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Decoder

w, gram, format = jnp.ones((16, 4)), jnp.eye(5), Int(4, 8)
grid = Grid.of(*MinMax()(w, format), format, w.shape)
decoder = Decoder(DecoderConfig(64, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, None, True, 64), nnx.Rngs(0))
model = LanguageModel(decoder, None, "tiny", "F32")
tokens = np.zeros((8, 16), np.int32)
gptq = Method(format, rounding=GPTQ())

class Mutable:
    needs = frozenset()
    def __call__(self, *_): ...

@dataclass
class Thawed(Mutable):
    pass

@dataclass(frozen=True)
class NoNeeds:
    def __call__(self, *_): ...

@dataclass(frozen=True)
class Asks(Mutable):
    needs = frozenset({"hessian"})

@dataclass(frozen=True)
class ASet(Mutable):
    needs = {"gram"}

@dataclass(frozen=True)
class NotHashable(Mutable):
    levels: list

def calibrated(tokens=tokens, **options):
    return lambda: quantize_decoder(decoder, gptq, tokens, Options(**options))

def method_of(**parts):
    return lambda: Method(format, **parts)

uses = {
USES}
for name, use in uses.items():
    try:
        use()
    except InputError as wrong:
        print(name, wrong, sep="|")
"""

# By the fault: a use, and what its sentence must hold.
SHAPES = {
    "search by the diagonal": ('Search("diagonal")(w, format, gram)', "(5, 5)"),
    "search by the matrix": ('Search("gram")(w, format, gram)', "(5, 5)"),
    "llama.cpp": ('LlamaCpp(importance=True)(jnp.ones((32, 4)), GGUF["Q4_0"], gram)', "(5, 5)"),
    "nearest": ("round_to_grid(w, grid, Nearest(), {'gram': gram})", "(5, 5)"),
    "gptq": ("round_to_grid(w, grid, GPTQ(), {'gram': jnp.eye(16), 'held_out': gram})", "(5, 5)"),
    "gptq without statistics": ("round_to_grid(w, grid, GPTQ(), {})", "needs gram, which comes from calibration text"),
    "a vector": ("MinMax()(jnp.ones(16), format)", "(16,)"),
    "group": ('Int(4, "row")', "'row'"),
    "token weights": ('Method(format, token_weights="mass")', "'mass'"),
    "groups of outputs": ("LossGradient(0)", "1 group of outputs, not 0"),
    "labels": ('LossGradient(labels="true")', "'true'"),
    "groups of rotated outputs": (
        "Method(format, rounding=GPTQ(), token_weights=LossGradient(2), incoherence=Incoherence())",
        "Incoherence does not allow: take groups=1",
    ),
    "groups of outputs on both sides": (
        "Method(format, rounding=TwoSided(), token_weights=LossGradient(2))",
        "a Gram matrix of the outputs does not allow",
    ),
    "scaled outputs": ("Method(format, rounding=TwoSided(), transform=AWQ())", "leave one out"),
    "groups that do not divide": (
        "quantize_decoder(decoder, Method(Int(4), rounding=GPTQ(), token_weights=LossGradient(5)), tokens)",
        "do not divide into 5 groups",
    ),
    "target": ('Tuning(target="teacher")', "'teacher'"),
    "text": ("Tuning(text=1.5)", "1.5"),
    "text of a block": ('Tuning(target="block", text=0.5)', "0.5"),
    "order": ('GPTQ(order="columns")', "'columns'"),
}
METHODS_AND_PLANS = {
    "None": ("quantize_decoder(decoder, None)", "None is no method"),
    "number": ("quantize_decoder(decoder, 4)", "4 is no method"),
    "class": ("quantize_decoder(decoder, Method)", "no method"),
    "format": ("quantize_decoder(decoder, Int(4))", "Int(bits=4"),
    "format in quantize": ("quantize(model, Int(4))", "no method"),
    "None in quantize": ("quantize(model, None)", "no method"),
    "rule that is no pair": ('quantize_decoder(decoder, ["rtn"])', "pair (regex, method), not 'rtn'"),
    "rule of three": ('quantize_decoder(decoder, [("", "rtn", 3)])', "pair (regex, method)"),
    "rule without a regex": ('quantize_decoder(decoder, [(1, "rtn")])', "pair (regex, method)"),
    "rule with a format": ('quantize_decoder(decoder, [("", Int(4))])', "no method"),
}
PARTS = {
    "name as format": ('Method("int4")', "format is 'int4', which is no Format: it lacks bits"),
    "class without brackets": ("method_of(rounding=GPTQ)()", "write GPTQ()"),
    "class within Refit": ("Refit(GPTQ)", "write GPTQ()"),
    "class within LossSearch": ("LossSearch(Search)", "write Search()"),
    "class within AWQ": ("AWQ(range=Search)", "write Search()"),
    "part without a value": ("method_of(rounding=Mutable())()", "frozen dataclass"),
    "thawed part": ("method_of(rounding=Thawed())()", "frozen dataclass"),
    "part that does not hash": ("method_of(rounding=NotHashable([1]))()", "frozen dataclass"),
    "part without needs": (
        "method_of(rounding=NoNeeds())()",
        "Method's rounding is NoNeeds(), which is no Rounding: it lacks needs",
    ),
    "unknown need": ("method_of(rounding=Asks())()", "it needs hessian, but a Rounding can be given gram, held_out"),
    "unknown need of a transform": ("method_of(transform=Asks())()", "can be given abs_max, abs_mean, gram"),
    "needs in a set": ("method_of(range=ASet())()", "a frozenset of names, not {'gram'}"),
    "range left out": ("method_of(range=None)()", "Method's range is None"),
    "rotation": ("method_of(rotation=True)()", "which is no Hadamard"),
    "activation": ("method_of(activation=Int(8))()", "which is no Activation"),
    "tuning without a tuple": ("method_of(tuning=Tuning())()", "tuple"),
    "propagation in words": ('method_of(error_propagation="1")()', "error_propagation from 0 to 1, not '1'"),
}
TOKENS_AND_OPTIONS = {
    "no tokens": ("calibrated(None)()", "calibration tokens"),
    "empty windows": ("calibrated(np.zeros((8, 0), np.int32))()", "hold no token: their shape is [8, 0]"),
    "no windows": ("calibrated(np.zeros((0, 8), np.int32))()", "[0, 8]"),
    "one row": ("calibrated(tokens[0])()", "not int32 [16]"),
    "a list": ("calibrated(tokens.tolist())()", "not list"),
    "floats": ("calibrated(tokens * 1.0)()", "not float64 [8, 16]"),
    "list to tune": ("tune(decoder, decoder, tokens.tolist())", "not list"),
    "floats to score": ("score(decoder, tokens * 1.0)", "Evaluation windows are an integer NumPy array"),
    "one token to score": ("score(decoder, tokens[:, :1])", "no prediction"),
    "batch -1": ("calibrated(batch=-1)()", "batch takes a whole number from 1, not -1"),
    "batch True": ("calibrated(batch=True)()", "not True"),
    "batch in words": ('calibrated(batch="4")()', "batch takes a whole number from 1, not '4'"),
    "passes": ("calibrated(passes=1.5)()", "passes takes a whole number from 1, not 1.5"),
    "held_out": ("calibrated(held_out=-1)()", "held_out takes a whole number from 0, not -1"),
    "inputs": ("calibrated(inputs=None)()", "not None"),
    "batch to score": ("score(decoder, tokens, batch=-1)", "batch takes a whole number from 1, not -1"),
    "negative samples": ('quantize(model, gptq, calibration="x", samples=-5)', "samples takes a whole number from 1"),
    "samples hidden by held_out": ('quantize(model, gptq, calibration="x", samples=-1, held_out=9)', "not -1"),
    "context": ('quantize(model, gptq, calibration="x", context=2.0)', "context takes a whole number from 1, not 2.0"),
    "seed": ('quantize(model, gptq, calibration="x", seed="a")', "seed takes a whole number from 0, not 'a'"),
    "windows drawn": ("sample_windows(np.arange(9), 3, -2, 0)", "samples takes a whole number from 1, not -2"),
    "windows": ('windows(np.arange(9), 3, "two")', "windows takes a whole number from 1, not 'two'"),
    "context to score": ('perplexity(model, "x", context=None)', "context takes a whole number from 2, not None"),
    "tokens to generate": ("next(generate_ids(decoder, tokens[0], tokens=-1))", "tokens takes a whole number from 0"),
    "temperature": ("next(generate_ids(decoder, tokens[0], tokens=1, temperature=-1))", "temperature"),
    "top_k": ("next(generate_ids(decoder, tokens[0], tokens=1, top_k=0))", "top_k takes a whole number from 1"),
    "top_k above all": ("next(generate_ids(decoder, tokens[0], tokens=1, top_k=65))", "top_k=65"),
    "prompt of floats": ("next(generate_ids(decoder, tokens[0] * 1.0, tokens=1))", "The prompt's ids"),
}  # fmt: skip


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What every use above ends in, in a process without run-time type checks."""
    uses = "".join(f"    {name!r}: lambda: {use},\n" for name, (use, _) in ALL.items())
    code = WITHOUT_TYPE_CHECKS.replace("USES", uses)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(line.split("|", 1) for line in done.stdout.splitlines())


ALL = SHAPES | METHODS_AND_PLANS | PARTS | TOKENS_AND_OPTIONS


@pytest.mark.parametrize("name", ALL)
def test_bad_input_is_named_in_one_sentence_without_run_time_type_checks(said, name):
    assert ALL[name][1] in said[name]
    assert len(said) == len(ALL)  # a sentence has one line


def test_scales_of_another_grid_are_refused():
    with pytest.raises(InputError, match=r"\(1, 4\).*2 × 4"):
        quantize(W, jnp.ones((1, 4)), None, Int(4, 8, symmetric=True))


@pytest.mark.parametrize("xp", [np, jnp])
def test_inputs_of_another_width_are_refused(xp):
    q = quantize(W, *MinMax()(W, Int(4, 8)), Int(4, 8))
    with pytest.raises(InputError, match=r"\(2, 15\).*\(16, 4\)"):
        xp.ones((2, 15)) @ q


def test_a_product_with_stacked_layers_is_refused():
    stacked = quantize(W[None], jnp.ones((1, 2, 4)), None, Int(4, 8, symmetric=True))
    with pytest.raises(InputError, match=r"\(1, 16, 4\)"):
        jnp.ones((2, 16)) @ stacked


def test_llama_cpps_search_names_the_types_it_knows():
    with pytest.raises(InputError, match="Q4_K"):
        LlamaCpp()(W, Int(4, 8))
    with pytest.raises(InputError, match="calibration"):
        LlamaCpp(importance=True)(jnp.ones((32, 4)), GGUF["Q4_0"])


def test_a_method_of_a_group_no_weight_has_says_so_at_once():
    with pytest.raises(InputError, match="larger"):
        Method(Int(4, 64)).range(W, Int(4, 64))
