"""Float elements and block floats against ml_dtypes and NumPy oracles written from the OCP MX specification v1.0."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jquant.errors import InputError
from jquant.formats import (
    FP8_E4M3,
    FP8_E5M2,
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    NVFP4,
    Float,
    unpack,
)
from jquant.qtensor import QTensor, bits_per_weight, dequantize, quantize
from jquant.ranges import MinMax

F32 = np.float32
ELEMENTS = {
    (4, 3): ml_dtypes.float8_e4m3fn,
    (5, 2): ml_dtypes.float8_e5m2,
    (2, 3): ml_dtypes.float6_e2m3fn,
    (3, 2): ml_dtypes.float6_e3m2fn,
    (2, 1): ml_dtypes.float4_e2m1fn,
}
MX = [MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8_E4M3, MXFP8_E5M2]
# Largest exponents of the elements, OCP MX v1.0, Table 1 and §5.3.
EMAX = {(4, 3): 8, (5, 2): 15, (2, 3): 2, (3, 2): 4, (2, 1): 2}
encode = jax.jit(lambda w, format: format.encode(w, jnp.ones(1), None), static_argnames="format")
decode = jax.jit(lambda codes, format: format.decode(codes, jnp.ones(1), None), static_argnames="format")


@partial(jax.jit, static_argnames="format")
def minmax(w, format) -> QTensor:
    return quantize(w, *MinMax()(w, format), format)


def kind(format: Float) -> tuple[int, int]:
    return format.exponent, format.mantissa


def normal(rows: int, out: int, seed: int = 0) -> np.ndarray:
    return (0.05 * np.random.default_rng(seed).standard_normal((rows, out))).astype(F32)


def codes_of(q: QTensor) -> np.ndarray:
    return np.asarray(unpack(q.codes, q.format.bits, q.in_features))


def finite_values(element: tuple[int, int]) -> np.ndarray:
    """Every finite element, ascending, one zero."""
    dtype = ELEMENTS[element]
    values = np.arange(2 ** (1 + sum(element)), dtype=np.uint8).view(dtype).astype(F32)
    return np.unique(values[np.isfinite(values)])


def saturated(x: np.ndarray, element: tuple[int, int]) -> np.ndarray:
    """ml_dtypes' bit patterns of x, beyond the largest element those of the largest: its own E4M3 turns into NaN."""
    largest = finite_values(element).max()
    return np.clip(x, -largest, largest).astype(F32).astype(ELEMENTS[element]).view(np.uint8)


# -------------------------------------------------------------------------------------------------------- elements


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
def test_every_code_stands_for_ml_dtypes_value(element):
    format, dtype = Float(*element), ELEMENTS[element]
    codes = np.arange(2**format.bits, dtype=np.uint8)
    wanted = codes.view(dtype).astype(F32)
    finite = np.isfinite(wanted)
    got = np.asarray(decode(codes, format=format))
    np.testing.assert_array_equal(got.view(np.uint32)[finite], wanted.view(np.uint32)[finite])
    assert format.bits == ml_dtypes.finfo(dtype).bits
    assert format.largest == float(ml_dtypes.finfo(dtype).max)
    assert finite.sum() == len(codes) - {(4, 3): 2, (5, 2): 8}.get(element, 0)


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
def test_codes_are_ml_dtypes_bits_for_random_tie_subnormal_and_signed_zero_values(element):
    format, values, rng = Float(*element), finite_values(element), np.random.default_rng(1)
    middle = (values[1:] + values[:-1]) / 2  # exact: the elements are short
    smallest = values[values > 0].min()
    x = np.concatenate(
        [
            values,
            middle,
            np.nextafter(middle, F32(np.inf)),
            np.nextafter(middle, F32(-np.inf)),
            rng.uniform(-1, 1, 5000) * format.largest,
            rng.uniform(-4, 4, 2000) * smallest,
            2.0 ** rng.uniform(-40, np.log2(format.largest), 5000) * rng.choice([-1, 1], 5000),
            [0.0, -0.0, 1e-40, -1e-40, 2.0**-126, -(2.0**-126)],
        ]
    ).astype(F32)
    wanted = x.astype(ELEMENTS[element]).view(np.uint8)
    np.testing.assert_array_equal(encode(x, format=format), wanted)
    np.testing.assert_array_equal(format.encode(jnp.asarray(x), jnp.ones(1), None), wanted)


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
def test_values_past_the_largest_element_saturate_infinities_too(element):
    """OCP MX v1.0, §6.3; half a step past it rounds to it anyhow."""
    format = Float(*element)
    x = F32([1.001, 1.03, 1.0625, 1.3, 2, 1e30]) * F32(format.largest)
    x = np.concatenate([x, -x, F32([np.inf, -np.inf, 3.4e38])])
    got = np.asarray(decode(encode(x, format=format), format=format))
    np.testing.assert_array_equal(got, np.sign(x) * F32(format.largest))


# ----------------------------------------------------------------------------------------------------- MX formats


def shared_exponent(absmax: np.ndarray, emax: int) -> np.ndarray:
    """⌊log₂ absmax⌋ − emax in float64 (OCP MX v1.0, §6.3), held to E8M0's range; −126 is as low as float32 goes."""
    _, exponent = np.frexp(np.where(absmax > 0, absmax, 2.0**-130).astype(np.float64))
    return np.clip(exponent - 1 - emax, -126, 127)


def mx(w: np.ndarray, format: Float, block: int = 32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, values and scales of a weight [in, out] whose blocks run along `in`."""
    n, out = w.shape
    blocks = np.pad(w, ((0, -n % block), (0, 0))).reshape(-1, block, out).astype(np.float64)
    scale = 2.0 ** shared_exponent(np.abs(blocks).max(1, keepdims=True), EMAX[kind(format)])
    codes = saturated(blocks / scale, kind(format))
    values = codes.view(ELEMENTS[kind(format)]).astype(np.float64) * scale
    flat = lambda v: v.reshape(-1, out)[:n]  # noqa: E731
    return flat(codes), flat(values), scale[:, 0]


@pytest.mark.parametrize("format", MX, ids=str)
def test_mx_matrices_are_the_specifications(format):
    w = np.concatenate([normal(96, 12), normal(64, 12) * F32(1e4), normal(40, 12) * F32(1e-6)])
    w[:32, 3] = w[64:96, 5] = 0
    w[5, 7] = 31.0  # one outlier in its block
    codes, values, scale = mx(w, format)
    q = minmax(jnp.asarray(w), format)
    assert q.scale.dtype == ml_dtypes.float8_e8m0fnu
    np.testing.assert_array_equal(np.asarray(q.scale, np.float64), scale)
    np.testing.assert_array_equal(codes_of(q), codes)
    np.testing.assert_array_equal(np.asarray(dequantize(q), np.float64), values)
    assert (np.asarray(dequantize(q))[:32, 3] == 0).all()


@pytest.mark.parametrize("format", MX, ids=str)
def test_the_shared_exponent_turns_over_exactly_at_powers_of_two(format):
    powers = 2.0 ** np.arange(-105, 127, 7).astype(F32)
    absmax = np.concatenate(
        [powers, np.nextafter(powers, F32(0)), np.nextafter(powers, F32(np.inf)), powers * F32(1.5)]
    )
    w = np.zeros((32, len(absmax)), F32)
    w[9] = np.where(np.arange(len(absmax)) % 2, -absmax, absmax)
    scale = np.asarray(minmax(jnp.asarray(w), format).scale, np.float64)[0]
    np.testing.assert_array_equal(scale, 2.0 ** shared_exponent(absmax, EMAX[kind(format)]))
    exact = scale * 2.0 ** EMAX[kind(format)]
    assert ((exact <= absmax) & (absmax < 2 * exact)).all()


@pytest.mark.parametrize("format", MX, ids=str)
def test_zero_and_subnormal_blocks_give_zeros_and_a_finite_scale(format):
    w = np.zeros((64, 3), F32)
    w[:32, 1], w[32:, 2] = 1e-40, -(2.0**-149)
    q = minmax(jnp.asarray(w), format)
    scale = np.asarray(q.scale, np.float64)
    assert (scale == 2.0**-126).all()
    np.testing.assert_array_equal(dequantize(q), np.zeros_like(w))


# ---------------------------------------------------------------------------------------------------------- NVFP4


def nvfp4(w: np.ndarray, tensor: F32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, values and E4M3 block scales under the given scale of the whole tensor, in float32."""
    n, out = w.shape
    blocks = np.pad(w, ((0, -n % 16), (0, 0))).reshape(-1, 16, out)
    wanted = np.abs(blocks).max(1, keepdims=True) / F32(6) / tensor
    scale = np.minimum(wanted, F32(448)).astype(ml_dtypes.float8_e4m3fn)
    at = scale.astype(F32) * tensor
    codes = saturated(np.where(at > 0, blocks / np.where(at > 0, at, 1), 0), (2, 1))
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(F32) * at
    return codes.reshape(-1, out)[:n], values.reshape(-1, out)[:n], scale[:, 0]


@pytest.mark.parametrize("shape", [(96, 12), (40, 7)], ids=str)
def test_nvfp4_has_e4m3_block_scales_under_one_scale_of_the_tensor(shape):
    w = normal(*shape)
    w[:16, 1] = 0
    w[16:32, 2] *= F32(1e-6)  # its scale falls below the least E4M3
    q = minmax(jnp.asarray(w), NVFP4)
    assert isinstance(q.scale, QTensor)
    tensor = np.asarray(q.scale.scale, F32)
    assert tensor.shape == (1, 1)
    np.testing.assert_allclose(tensor[0, 0], np.abs(w).max() / (6 * 448), rtol=2.0**-22)
    codes, values, scale = nvfp4(w, tensor[0, 0])
    np.testing.assert_array_equal(codes_of(q.scale), scale.view(np.uint8))
    # Under a scale of 0 a code says nothing but its sign.
    live = np.repeat(scale.astype(F32) > 0, 16, 0)[: shape[0]]
    np.testing.assert_array_equal(codes_of(q)[live], codes[live])
    np.testing.assert_array_equal(np.asarray(dequantize(q)), values)
    assert scale.astype(F32).max() == 448
    assert (values[:32, 1:3][np.array([[True, False]] * 16 + [[False, True]] * 16)] == 0).all()


def test_nvfp4_of_zeros_is_zero():
    np.testing.assert_array_equal(dequantize(minmax(jnp.zeros((32, 4)), NVFP4)), np.zeros((32, 4)))


# ------------------------------------------------------------------------------------------------------------ FP8


def blockwise_scale(w: np.ndarray, largest: float, rows: int, columns: int) -> np.ndarray:
    """absmax / largest of every rows × columns in float64, those at the edges short."""
    blocks = [[w[i : i + rows, j : j + columns] for j in range(0, w.shape[1], columns)] for i in range(0, len(w), rows)]
    return np.array([[np.abs(block).max() / np.float64(largest) for block in row] for row in blocks])


@pytest.mark.parametrize(
    ("group", "rows", "columns"),
    [("tensor", 300, 200), ("channel", 300, 1), (128, 128, 1), ((128, 128), 128, 128), ((1, 128), 1, 128)],
    ids=str,
)
@pytest.mark.parametrize("make", [FP8_E4M3, FP8_E5M2])
def test_fp8_blocks_of_every_shape_are_ml_dtypes_with_short_ones_at_the_edges(make, group, rows, columns):
    w = normal(300, 200) * (1 + np.arange(200, dtype=F32) / 50)  # edge blocks of 44 rows and 72 columns
    format = make(group)
    q = minmax(jnp.asarray(w), format)
    scale = np.asarray(q.scale)
    # XLA multiplies by the rounded reciprocal of a constant divisor: a unit or two in float32's last place.
    wanted = blockwise_scale(w, finite_values(kind(format)).max(), rows, columns)
    np.testing.assert_allclose(scale, wanted, rtol=2.0**-23)
    at = scale.repeat(rows, 0)[:300].repeat(columns, 1)[:, :200]
    codes = saturated(w / at, kind(format))
    np.testing.assert_array_equal(codes_of(q), codes)
    np.testing.assert_array_equal(np.asarray(dequantize(q)), codes.view(ELEMENTS[kind(format)]).astype(F32) * at)


# ----------------------------------------------------------------------------------------------------- properties

FORMATS = [FP8_E4M3(), FP8_E5M2("tensor"), MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8_E4M3, NVFP4]
entries = st.floats(-(2.0**10), 2.0**10, width=32).map(lambda x: x if abs(x) > 2.0**-40 else 0.0)
weights = hnp.arrays(F32, (64, 2), elements=entries)


@settings(max_examples=60, deadline=None)
@given(weights, st.sampled_from(FORMATS))
def test_requantizing_the_values_on_their_grid_changes_nothing(w, format):
    q = minmax(jnp.asarray(w), format)
    again = quantize(dequantize(q), q.scale, None, format)
    np.testing.assert_array_equal(dequantize(again), dequantize(q))


@settings(max_examples=60, deadline=None)
@given(weights, st.sampled_from([format for format in FORMATS if format.group in ("channel", "tensor", 32)]))
def test_within_a_block_a_larger_weight_never_gets_a_smaller_value(w, format):
    w = np.repeat(w[:32, :1], 2, 1)  # one block for all three groups, but for the tensor's second column
    values = np.asarray(dequantize(minmax(jnp.asarray(w), format)))[:, 0]
    assert (np.diff(values[np.argsort(w[:, 0], kind="stable")]) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(weights, st.sampled_from(FORMATS))
def test_the_error_is_at_most_half_the_gap_of_neighbours_inside_the_range(w, format):
    q = minmax(jnp.asarray(w), format)
    wide = dequantize(q.scale) if isinstance(q.scale, QTensor) else q.scale
    rows = {16: 16, 32: 32}.get(format.group, 64)
    scale = np.repeat(np.broadcast_to(np.asarray(wide, np.float64), (64 // rows, 2)), rows, 0)
    values = finite_values(kind(format)).astype(np.float64)
    steps = np.where(scale > 0, w / np.where(scale > 0, scale, 1), 0)
    above = np.clip(np.searchsorted(values, steps), 1, len(values) - 1)
    error = np.abs(np.asarray(dequantize(q), np.float64) - w)
    inside = (np.abs(steps) <= values.max()) & (scale > 0)
    assert (error <= scale * (values[above] - values[above - 1]) / 2 * (1 + 1e-5))[inside].all()
    beyond = (np.abs(steps) > values.max()) & (scale > 0)
    np.testing.assert_allclose(
        np.asarray(dequantize(q))[beyond], (np.sign(steps) * scale * values.max())[beyond], rtol=1e-6
    )


# ------------------------------------------------------------------------------------------------ bits and bad input


@pytest.mark.parametrize(
    ("format", "wanted"),
    [
        (MXFP4, 4.25),
        (MXFP6_E2M3, 6.25),
        (MXFP6_E3M2, 6.25),
        (MXFP8_E4M3, 8.25),
        (MXFP8_E5M2, 8.25),
        (NVFP4, 4.5 + 32 / (640 * 16)),
        (FP8_E4M3(), 8 + 32 / 640),
        (FP8_E5M2("tensor"), 8 + 32 / (640 * 16)),
        (FP8_E4M3(256), 8 + 32 * 3 / 640),  # 2.5 blocks are stored as 3
        (FP8_E4M3((256, 8)), 8 + 32 * 3 * 2 / (640 * 16)),
        (FP8_E4M3("channel", "bfloat16"), 8 + 16 / 640),
    ],
    ids=str,
)
def test_bits_per_weight_are_exactly_the_formulas(format, wanted):
    assert bits_per_weight(minmax(jnp.asarray(normal(640, 16)), format)) == wanted


@pytest.mark.parametrize(("exponent", "mantissa"), [(3, 4), (0, 3), (8, 7), (4, 2)])
def test_an_element_that_nobody_defines_is_refused_with_those_there_are(exponent, mantissa):
    with pytest.raises(InputError, match=rf"E{exponent}M{mantissa}; known: E4M3, .*E2M1"):
        Float(exponent, mantissa)


def test_scales_in_no_floating_dtype_and_blocks_larger_than_the_matrix_are_refused():
    with pytest.raises(InputError, match="int8"):
        FP8_E4M3(scale="int8")
    with pytest.raises(InputError, match=r"128 × 128.*64 × 200"):
        minmax(jnp.zeros((64, 200)), FP8_E4M3((128, 128)))
