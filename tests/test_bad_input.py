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
    dequantize,
    matmul,
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
        (lambda: Tuning(code_rate=-1.0), "code_rate"),
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


# Run-time shape checks are on in this process; users do not have them.
SHAPES = """
import jax.numpy as jnp
from jquant import GGUF, GPTQ, InputError, Int, LlamaCpp, Method, MinMax, Nearest, Search, Tuning, matmul
w, gram, format = jnp.ones((16, 4)), jnp.eye(5), Int(4, 8)
for use in (
    lambda: Search("diagonal")(w, format, gram),
    lambda: Search("gram")(w, format, gram),
    lambda: LlamaCpp(importance=True)(jnp.ones((32, 4)), GGUF["Q4_0"], gram),
    lambda: Nearest()(w, *MinMax()(w, format), gram, format),
    lambda: GPTQ()(w, *MinMax()(w, format), gram, format),
    lambda: MinMax()(jnp.ones(16), format),
    lambda: Int(4, "row"),
    lambda: Method(format, token_weights="mass"),
    lambda: Tuning(target="teacher"),
    lambda: Tuning(text=1.5),
    lambda: Tuning(target="block", text=0.5),
    lambda: GPTQ(order="columns"),
):
    try:
        use()
    except InputError as wrong:
        print(wrong)
"""


def test_wrong_shapes_are_named_without_run_time_type_checks():
    done = subprocess.run([sys.executable, "-c", SHAPES], capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert len(said) == 12
    assert all("(5, 5)" in line for line in said[:5])
    assert "(16,)" in said[5]
    assert "'row'" in said[6]
    assert "'mass'" in said[7]
    assert "'teacher'" in said[8]
    assert "1.5" in said[9]
    assert "0.5" in said[10]
    assert "'columns'" in said[11]


def test_scales_of_another_grid_are_refused():
    with pytest.raises(InputError, match=r"\(1, 4\).*2 × 4"):
        quantize(W, jnp.ones((1, 4)), None, Int(4, 8, symmetric=True))


def test_inputs_of_another_width_are_refused():
    q = quantize(W, *MinMax()(W, Int(4, 8)), Int(4, 8))
    for w in (q, dequantize(q)):
        with pytest.raises(InputError, match=r"15 features.*\(16, 4\)"):
            matmul(jnp.ones((2, 15)), w)


def test_llama_cpps_search_names_the_types_it_knows():
    with pytest.raises(InputError, match="Q4_K"):
        LlamaCpp()(W, Int(4, 8))
    with pytest.raises(InputError, match="calibration"):
        LlamaCpp(importance=True)(jnp.ones((32, 4)), GGUF["Q4_0"])


def test_a_method_of_a_group_no_weight_has_says_so_at_once():
    with pytest.raises(InputError, match="larger"):
        Method(Int(4, 64)).range(W, Int(4, 64))
