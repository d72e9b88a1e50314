"""Quantized inputs: LLM.int8() against bitsandbytes on the CPU, W8A8 against float64 oracles."""

import operator
from dataclasses import replace

import bitsandbytes
import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jquant.activations import PER_TOKEN_INT8, Activation, input_codes, outlier_features, quantize_inputs
from jquant.errors import InputError
from jquant.formats import FP8_E4M3, Int, block_shape, unpack
from jquant.qtensor import QTensor, dequantize, quantize
from jquant.ranges import MinMax

F32 = np.float32
SHAPES = [(1, 64, 16), (7, 96, 24), (33, 576, 40)]
WEIGHTS = Int(8, "channel", symmetric=True, scale="float32")
STATIC = Activation(Int(8, "tensor", symmetric=True, scale="float32"), static=True)
multiply = jax.jit(operator.matmul)


def halves(*shape: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    """float16 numbers, the precision that bitsandbytes quantizes inputs and weights in."""
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float16)


def inputs(tokens: int, features: int, outliers: bool, seed: int = 0) -> np.ndarray:
    x = halves(tokens, features, seed=seed)
    if outliers:
        x[0, 3], x[-1, 17], x[tokens // 2, 40] = 6.0, -31.0, 60.0  # 6 itself is one
        x[:, 5] = np.clip(x[:, 5], -5.9, 5.9)
    return x


def quantized(w: np.ndarray, activation: Activation | None, format: Int = WEIGHTS) -> QTensor:
    w = jnp.asarray(w, jnp.float32)
    return replace(quantize(w, *MinMax()(w, format), format), activation=activation)


def int_codes(codes, bits: int = 8) -> np.ndarray:
    return np.asarray(codes).astype(int) - 2 ** (bits - 1)


# -------------------------------------------------------------------------------------------- against bitsandbytes


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("threshold", [6.0, None])
@pytest.mark.parametrize(("tokens", "features"), [s[:2] for s in SHAPES])
def test_input_codes_are_bitsandbytes_exactly(tokens, features, threshold, outliers):
    x = inputs(tokens, features, outliers)
    wanted, absmax, columns = bnb.int8_vectorwise_quant(torch.from_numpy(x.copy()), threshold or 0.0)
    codes, (scale, zero) = input_codes(jnp.asarray(x), Activation(outliers=threshold))
    np.testing.assert_array_equal(int_codes(codes), wanted.numpy())
    np.testing.assert_allclose(scale[0], absmax.numpy() / 127, rtol=2.0**-23)
    assert zero is None
    if threshold:
        found = np.flatnonzero(outlier_features(jnp.asarray(x), Activation(outliers=threshold)))
        np.testing.assert_array_equal(found, columns.numpy())
        assert outliers == (len(found) == 3)


def test_input_codes_at_ties_are_bitsandbytes_exactly():
    """absmax / 2 is 63.5 steps; which way it goes hangs on the order of multiplying and dividing."""
    largest = np.linspace(1, 5.9, 400).astype(np.float16)[:, None]
    x = np.concatenate([largest, largest / 2, -largest / 2, largest / 4, largest * 0], 1).astype(np.float16)
    wanted = bnb.int8_vectorwise_quant(torch.from_numpy(x))[0].numpy()
    for run in (input_codes, jax.jit(input_codes, static_argnums=1)):
        np.testing.assert_array_equal(int_codes(run(jnp.asarray(x), Activation())[0]), wanted)


def test_a_token_of_zeros_has_codes_and_products_of_zero():
    x = halves(3, 64)
    x[1] = 0
    codes, _ = input_codes(jnp.asarray(x), Activation())
    assert (int_codes(codes)[1] == 0).all()
    got = np.asarray(multiply(jnp.asarray(x, jnp.float32), quantized(halves(64, 16), Activation())))
    assert np.isfinite(got).all()
    assert (got[1] == 0).all()


def test_weight_codes_are_bitsandbytes_but_for_ties():
    """Its weights are rounded row by row of [out, in]; ours column by column of [in, out]."""
    w = halves(576, 96, scale=0.05)
    wanted, absmax, _ = bnb.int8_vectorwise_quant(torch.from_numpy(w.T.copy()))
    q = quantized(w, None)
    codes = int_codes(unpack(q.codes, 8, 576))
    steps = w.astype(np.float64) * (127 / absmax.numpy().astype(np.float64))
    tie = np.abs(np.abs(steps - np.floor(steps)) - 0.5) < 1e-5
    assert tie.mean() < 0.001
    np.testing.assert_array_equal(codes[~tie], wanted.numpy().T[~tie])
    assert (np.abs(codes - wanted.numpy().T) <= 1).all()
    np.testing.assert_allclose(np.asarray(q.scale)[0], absmax.numpy() / 127, rtol=2.0**-23)


def bitsandbytes_layer(w: np.ndarray, threshold: float) -> bitsandbytes.nn.Linear8bitLt:
    layer = bitsandbytes.nn.Linear8bitLt(*w.shape, bias=False, has_fp16_weights=False, threshold=threshold)
    layer.weight = bitsandbytes.nn.Int8Params(torch.from_numpy(w.T.copy()), requires_grad=False)
    return layer.to("cpu").eval()


def same_columns(q: QTensor, w: np.ndarray) -> np.ndarray:
    """Columns in which no tie of the weight went the other way: elsewhere the two multiply other numbers."""
    theirs = bnb.int8_vectorwise_quant(torch.from_numpy(w.T.copy()))[0].numpy().T
    same = (int_codes(unpack(q.codes, 8, len(w))) == theirs).all(0)
    assert same.mean() > 0.8
    return same


def exact_llm_int8(x: np.ndarray, w: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The integer part and the part of outlier features in float64, from bitsandbytes' own codes."""
    codes, absmax, columns = bnb.int8_vectorwise_quant(torch.from_numpy(x.copy()), threshold)
    weight, scale, _ = bnb.int8_vectorwise_quant(torch.from_numpy(w.T.copy()))
    values = (weight.double() * scale.double()[:, None] / 127).numpy().T
    integers = (codes.double() * absmax.double()[:, None] / 127).numpy() @ values
    if columns is None or not len(columns):
        return integers, np.zeros_like(integers)
    kept = x.astype(np.float64)[:, columns.numpy()]
    return integers, np.abs(kept) @ np.abs(values[columns.numpy()]) + 1j * (kept @ values[columns.numpy()])


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("threshold", [6.0, None])
@pytest.mark.parametrize(("tokens", "features", "out"), SHAPES)
def test_llm_int8_outputs_are_bitsandbytes_within_float16(tokens, features, out, threshold, outliers):
    x, w = inputs(tokens, features, outliers, seed=2), halves(features, out, scale=0.05, seed=3)
    layer = bitsandbytes_layer(w, threshold or 0.0)
    with torch.no_grad():
        theirs = layer(torch.from_numpy(x.copy())).numpy().astype(np.float64)
    q = quantized(w, Activation(outliers=threshold))
    ours = np.asarray(multiply(jnp.asarray(x, jnp.float32), q), np.float64)
    integers, kept = exact_llm_int8(x, w, threshold or 0.0)
    wanted, size = integers + kept.imag, np.abs(kept.real)
    same = same_columns(q, w)

    # Ours is the exact product to float32.
    np.testing.assert_allclose(
        ours[:, same], wanted[:, same], rtol=1e-6, atol=1e-6 * (np.abs(integers).max() + size.max())
    )
    # Theirs rounds the integer part, the outliers' weights and the sum to float16, and takes 6.200124e-05 for 1/127².
    unit = 2.0**-11
    bound = unit * (np.abs(integers) + size + np.abs(theirs)) * 1.01 + 2e-5 * np.abs(integers) + 2.0**-24
    assert (np.abs(ours - theirs) <= bound)[:, same].all()


def test_without_outliers_float16_outputs_are_the_very_bits_but_for_its_constant():
    """bitsandbytes multiplies by 6.200124e-05 for 1/127² = 6.2000124e-05: 1.8e-5 of the value, 1 in 40 roundings."""
    x, w = inputs(33, 576, False), halves(576, 40, scale=0.05)
    with torch.no_grad():
        theirs = bitsandbytes_layer(w, 6.0)(torch.from_numpy(x.copy())).numpy()
    q = quantized(w, Activation(outliers=6.0))
    same = same_columns(q, w)
    ours = np.asarray(multiply(jnp.asarray(x, jnp.float32), q), np.float64)
    assert ((ours * (6.200124e-05 * 127**2)).astype(np.float16) == theirs)[:, same].mean() > 0.999
    half = np.asarray(multiply(jnp.asarray(x), q))
    assert half.dtype == np.float16
    assert (half == theirs)[:, same].mean() > 0.97
    assert (np.abs(half.astype(F32) - theirs.astype(F32)) <= np.spacing(np.abs(theirs)).astype(F32))[:, same].all()


# ---------------------------------------------------------------------------------------------------- W8A8


def rounded(x: np.ndarray, scale: np.ndarray, bits: int = 8) -> np.ndarray:
    """Integers in float64, halves to even, saturating."""
    most = 2 ** (bits - 1) - 1
    return np.clip(np.rint(x.astype(np.float64) / scale), -most, most)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("tokens", "features", "out"), SHAPES)
def test_w8a8_is_the_integer_product_scaled_by_token_and_column(tokens, features, out, bits):
    rng = np.random.default_rng(4)  # float32 numbers: none lies at a tie
    x, w = (rng.standard_normal(shape).astype(F32) for shape in ((tokens, features), (features, out)))
    most = 2 ** (bits - 1) - 1
    format = Int(bits, "channel", symmetric=True, scale="float32", full_range=False)
    q = quantized(w, Activation(format), format)
    by_token, by_column = (np.abs(v).max(a, keepdims=True).astype(np.float64) / most for v, a in ((x, 1), (w, 0)))
    wanted = rounded(x, by_token, bits) @ rounded(w, by_column, bits) * by_token * by_column
    np.testing.assert_allclose(multiply(jnp.asarray(x), q), wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())


def test_static_w8a8_has_one_scale_for_all_tokens_and_saturates_past_it():
    rng = np.random.default_rng(5)
    x, w = (rng.standard_normal(shape).astype(F32) for shape in ((9, 96), (96, 24)))
    scale = np.float64(F32(2.0 / 127))  # |x| goes past 2
    assert np.abs(x).max() > 2.5
    q = replace(quantized(w, STATIC), input_scale=jnp.full((1, 1), scale, jnp.float32))
    codes = np.clip(np.rint(x / scale), -128, 127)
    by_column = np.abs(w).max(0).astype(np.float64) / 127
    wanted = codes @ rounded(w, by_column) * scale * by_column
    np.testing.assert_allclose(multiply(jnp.asarray(x), q), wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("format", "most"), [(Int(8, 128, symmetric=True, scale="float32"), 127), (FP8_E4M3(128), 448)]
)
def test_blocks_of_128_inputs_have_scales_of_their_own(format, most):
    x, w = halves(5, 300).astype(F32), halves(300, 24, scale=0.05).astype(F32)
    x[:, 128:256] *= 50
    activation = Activation(format)
    got = np.asarray(quantize_inputs(jnp.asarray(x), activation), np.float64)
    for start in (0, 128, 256):  # the last one short
        block = x[:, start : start + 128]
        scale = np.abs(block).max(1, keepdims=True).astype(np.float64) / most
        error = np.abs(got[:, start : start + 128] - block)
        limit = scale / 2 if most == 127 else np.maximum(np.abs(block) * 2.0**-4, scale * 2.0**-10)
        assert (error <= limit * (1 + 1e-5)).all()
    q = quantized(w, activation)
    plain = np.asarray(multiply(jnp.asarray(got, jnp.float32), replace(q, activation=None)))
    np.testing.assert_allclose(multiply(jnp.asarray(x), q), plain, rtol=1e-5, atol=1e-5 * np.abs(plain).max())


@pytest.mark.parametrize(
    "weights",
    [WEIGHTS, Int(8, "tensor", symmetric=True, scale="float32"), Int(4, 32), Int(4, 32, symmetric=True)],
    ids=str,
)
@pytest.mark.parametrize("outliers", [None, 6.0])
def test_the_integer_product_is_the_product_of_the_rounded_inputs(weights, outliers):
    """Whichever way it is computed: rows at a time, one row, or leading axes."""
    x, w = inputs(6, 96, True).astype(F32), halves(96, 24, scale=0.05).astype(F32)
    q = quantized(w, Activation(outliers=outliers), weights)
    kept = np.asarray(outlier_features(jnp.asarray(x), Activation(outliers=outliers or 1e9)))
    values = np.asarray(quantize_inputs(jnp.asarray(x), q.activation), np.float64) + np.where(kept, x, 0)
    wanted = values @ np.asarray(multiply(jnp.eye(96), replace(q, activation=None)), np.float64)
    limits = {"rtol": 2e-6, "atol": 2e-6 * np.abs(wanted).max()}
    np.testing.assert_allclose(multiply(jnp.asarray(x), q), wanted, **limits)
    np.testing.assert_allclose(multiply(jnp.asarray(x.reshape(2, 3, 96)), q), wanted.reshape(2, 3, -1), **limits)


def test_an_integer_product_of_many_inputs_is_exact_past_2_to_the_24():
    n = 8192  # 8192 · 127² = 1.3e8: float32 sums of such products lose the last bits
    x, w = np.full((2, n), 1.0, F32), np.full((n, 8), 1.0, F32)
    x[1, ::2] = 1 / 127
    got = np.asarray(multiply(jnp.asarray(x), quantized(w, Activation())), np.float64)
    np.testing.assert_allclose(got[0], n, rtol=3e-7)
    np.testing.assert_allclose(got[1], n / 2 * (1 + 1 / 127), rtol=3e-7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_product_has_the_dtype_of_its_input(dtype):
    x = jnp.asarray(inputs(4, 64, True), dtype)
    got = multiply(x, quantized(halves(64, 16), Activation(outliers=6.0)))
    assert got.dtype == x.dtype


@pytest.mark.parametrize(
    ("dtype", "kept_in"), [("float32", "float16"), ("float16", "float16"), ("bfloat16", "bfloat16")]
)
def test_outliers_are_kept_in_16_bits_of_the_inputs_own_kind(dtype, kept_in):
    """float16 would make infinities of bfloat16's largest."""
    q = quantized(halves(64, 16), Activation(outliers=6.0))
    loud = jnp.asarray(1e5 if dtype == "bfloat16" else 7.003, dtype)
    got = multiply(jnp.zeros((2, 64), dtype).at[0, 3].set(loud), q)
    wanted = np.asarray(loud.astype(kept_in), F32) * np.asarray(dequantize(q))[3]
    assert abs(float(loud) - float(loud.astype(kept_in))) > 1e-4 or dtype != "float32"
    np.testing.assert_allclose(np.asarray(got[0], F32), wanted, rtol=1e-5 if dtype == "float32" else 0.01)


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("threshold", [0.0, -6.0, float("nan")])
def test_a_threshold_that_is_not_positive_is_refused_by_its_value(threshold):
    with pytest.raises(InputError, match=str(threshold)):
        Activation(outliers=threshold)


def test_a_static_scale_without_calibration_is_refused():
    x = jnp.ones((2, 64))
    for call in (lambda: quantize_inputs(x, STATIC), lambda: x @ quantized(halves(64, 16), STATIC)):
        with pytest.raises(InputError, match="calibration"):
            call()


def test_a_block_longer_than_a_token_is_refused():
    with pytest.raises(InputError, match="128"):
        quantize_inputs(jnp.ones((2, 64)), Activation(replace(PER_TOKEN_INT8, group=128)))
    assert block_shape(PER_TOKEN_INT8, (64, 2)) == (64, 1)
