"""x @ w for quantized w: the product with the dequantized matrix, panel by panel, in little memory."""

import operator
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import problem, shape_for

from jquant.activations import Activation
from jquant.formats import NF4, Codebook, Float, Format, Int, double_quantized, tile_of
from jquant.kernels import matmul as products
from jquant.methods import METHODS
from jquant.qtensor import QTensor, dequantize, quantize
from jquant.ranges import MinMax

FORMATS = sorted(
    {
        format for row in METHODS.values() if tile_of(format := row(3, 16, False).format) == (1, 1)
    }  # for tiles: test_lattice
    | {Int(3, 24, True), Int(2, "tensor"), Int(8, (24, 5)), Int(3, 16, zero="float"), NF4("tensor")}
    | {Codebook((-1.0, -0.3, 0.4, 0.9), 16), Float(2, 1, (16, 6), "float8_e8m0fnu")},
    key=repr,
)


@partial(jax.jit, static_argnames="format")
def minmax(w, format: Format) -> QTensor:
    return quantize(w, *MinMax()(w, format), format)


def product(x, q):
    """A function of its own, so that jit traces anew after PANEL has changed."""
    return jax.jit(lambda x, q: x @ q).lower(x, q)


@cache
def quantized(format: Format) -> tuple[QTensor, np.ndarray]:
    """A matrix in that format, and its dequantized values in float64."""
    q = minmax(problem(shape_for(format), 3)[0], format)
    return q, np.asarray(dequantize(q), np.float64)


def inputs(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)


def assert_product(x: jax.Array, format: Format, rtol: float = 1e-5) -> None:
    q, values = quantized(format)
    wanted, got = np.asarray(x, np.float64) @ values, product(x, q).compile()(x, q)
    assert (got.shape, got.dtype) == (wanted.shape, x.dtype)
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_single_row_times_a_qtensor_is_its_product_with_the_dequantized_matrix(format):
    assert_product(inputs(quantized(format)[0].in_features), format)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_many_rows_over_several_panels_and_a_rest_are_the_product_with_the_dequantized_matrix(format, monkeypatch):
    rows, out = quantized(format)[0].shape
    monkeypatch.setattr(products, "PANEL", 8 * out)  # the smallest that groups and packing allow
    assert_product(inputs(2, 3, rows), format)


@pytest.mark.parametrize(
    "format", [Int(4, 32), Int(3, "tensor"), NF4(16, double_quantized()), Int(4, 16, zero="float")]
)
@pytest.mark.parametrize(("rows", "panel"), [(64, 8 * 16), (64, 32 * 16), (72, 32 * 16), (75, 32 * 16), (75, 1 << 20)])
def test_panels_that_divide_the_matrix_or_leave_a_rest_or_hold_it_all_give_the_same(format, rows, panel, monkeypatch):
    monkeypatch.setattr(products, "PANEL", panel)
    q = minmax(problem((rows, 16), rows)[0], format)
    x = inputs(5, rows)
    wanted = np.asarray(x, np.float64) @ np.asarray(dequantize(q), np.float64)
    program = product(x, q)
    np.testing.assert_allclose(program.compile()(x, q), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    unit = 32 if format.group == 32 else 16 if format.group == 16 else 8
    several = rows // max(panel // 16 // unit * unit, unit) >= 2
    assert ("stablehlo.while" in program.as_text()) == several


@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (5,), (2, 3)])
def test_leading_axes_stay_and_bfloat16_stays_bfloat16(lead, monkeypatch):
    monkeypatch.setattr(products, "PANEL", 16 * 16)
    assert_product(inputs(*lead, 40), Int(3, 16))
    assert_product(inputs(*lead, 40, dtype="bfloat16"), Int(3, 16), rtol=0.02)


def test_numpy_arrays_leave_the_product_to_the_qtensor():
    q, _ = quantized(Int(3, 16))
    x = inputs(4, 40)
    got = np.asarray(x) @ q
    assert isinstance(got, jax.Array)
    np.testing.assert_array_equal(got, x @ q)


@pytest.mark.parametrize("format", [Int(4, 64), Int(4, 64, zero="float"), NF4(64), Int(8, "channel", True)], ids=str)
def test_a_product_of_many_rows_never_holds_the_dequantized_matrix(format):
    """Of eight panels at most a few are alive at once."""
    rows, out = 8 * (products.PANEL // 1024), 1024
    q = jax.eval_shape(partial(minmax.__wrapped__, format=format), jax.ShapeDtypeStruct((rows, out), jnp.float32))
    x = jax.ShapeDtypeStruct((16, rows), jnp.float32)
    memory = lambda f: jax.jit(f).lower(x, q).compile().memory_analysis().temp_size_in_bytes  # noqa: E731
    assert memory(operator.matmul) < rows * out * 4 / 3
    assert memory(lambda x, q: x @ dequantize(q)) >= rows * out * 4  # what it would be


def test_a_single_row_holds_no_float_matrix_at_all():
    q = jax.eval_shape(partial(minmax.__wrapped__, format=Int(4, 64)), jax.ShapeDtypeStruct((2048, 1024), jnp.float32))
    x = jax.ShapeDtypeStruct((2048,), jnp.float32)
    assert jax.jit(operator.matmul).lower(x, q).compile().memory_analysis().temp_size_in_bytes < 2048 * 1024 * 4 / 3


def test_quantized_inputs_are_rounded_before_the_product():
    q, values = quantized(Int(3, 16))
    x = inputs(4, 40)
    with_inputs = QTensor(q.codes, q.scale, q.zero, q.format, q.in_features, Activation())
    step = np.abs(np.asarray(x)).max(-1, keepdims=True) / 127
    rounded = np.round(np.asarray(x) / step) * step
    np.testing.assert_allclose(x @ with_inputs, rounded @ values, rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(x @ with_inputs) - np.asarray(x @ q)).max() > 1e-4
