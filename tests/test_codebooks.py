"""Codebooks against bitsandbytes on the CPU: FP4, NF4, double quantization; NormalFloat tables against scipy."""

import re
from dataclasses import replace
from functools import partial

import bitsandbytes.functional as bnb
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.stats import norm

from jquant.formats import (
    FP4,
    NF3,
    NF4,
    NF4_LEVELS,
    Codebook,
    double_quantized,
    dynamic_levels,
    normal_float_levels,
    unpack,
)
from jquant.qtensor import QTensor, bits_per_weight, dequantize, quantize
from jquant.ranges import MinMax

F32 = np.float32
MAKE = {"nf4": NF4, "fp4": FP4}
# Our ascending codes by bitsandbytes' codes, which for FP4 are bit patterns with two zeros: of the two, its CPU path
# gives one to halves of the lowest level below zero and the other to those above; we have one.
OURS = {"nf4": np.arange(16), "fp4": np.array([7, 8, 13, 14, 11, 12, 9, 10, 7, 6, 1, 0, 3, 2, 5, 4])}
REAL = ("blk.0.attn_q.weight", "blk.5.attn_v.weight", "blk.11.ffn_down.weight")
code_table = bnb.create_dynamic_map


def bits(values) -> np.ndarray:
    return np.asarray(values, F32).view(np.uint32)


def minmax(w, format) -> QTensor:
    return quantize(w, *MinMax()(w, format), format)


compiled = jax.jit(minmax, static_argnames="format")


def codes_of(q: QTensor) -> np.ndarray:
    return np.asarray(unpack(q.codes, q.format.bits, q.in_features)).astype(int)


def normal(rows: int = 576, out: int = 8, seed: int = 0) -> np.ndarray:
    return (0.05 * np.random.default_rng(seed).standard_normal((rows, out))).astype(F32)


def at_midpoints(kind: str) -> np.ndarray:
    """Blocks of 64 with a weight on every midpoint of two levels and one float32 above and below, at many scales."""
    levels = np.sort(bnb.get_4bit_type(kind, device="cpu").numpy())
    on = (levels[:-1] + levels[1:]) / 2
    steps = np.concatenate([on, np.nextafter(on, F32(9)), np.nextafter(on, F32(-9)), [1]])
    steps = np.pad(steps, (0, 64 - len(steps)))[:, None].astype(F32)
    return np.tile(steps, (9, 1)) * F32([1, 0.0473, 3.7, 1e-3, 0.33333334, 250.7, 2.0**-30, 6e4])


def with_empty_blocks() -> np.ndarray:
    w = normal()
    w[:64, 1] = w[-64:, 2] = w[:, 3] = 0
    return w


@pytest.fixture(scope="module")
def real(default_gguf) -> dict[str, np.ndarray]:
    """Some of the default model's weights, [in, out]."""
    tensors = {t.name: t for t in gguf.GGUFReader(default_gguf).tensors}
    return {name: gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).T for name in REAL}


def bitsandbytes(w: np.ndarray, kind: str, double: bool = False):
    """Codes in our numbering and values, both `[in, out]`, and the state of its CPU path; its weight is [out, in]."""
    weight = torch.from_numpy(w.T.copy())
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=double)
    flat = packed.numpy().reshape(-1)
    codes = OURS[kind][np.stack([flat >> 4, flat & 15], -1).reshape(w.shape[::-1]).T]
    return codes, decoded(packed, state), state


def decoded(packed: torch.Tensor, state) -> np.ndarray:
    """Its values `[in, out]`. FP4's second zero is -0 on CPUs without AVX-512 and 0 on those with it: 0 here."""
    return bnb.dequantize_4bit(packed, state).numpy().T + F32(0)


# ----------------------------------------------------------------------------------------------------- NF4 and FP4


@pytest.mark.parametrize("kind", MAKE)
def test_levels_are_those_of_bitsandbytes(kind):
    levels = bnb.get_4bit_type(kind, device="cpu").numpy()
    np.testing.assert_array_equal(F32(MAKE[kind]().levels)[OURS[kind]], levels)
    assert set(OURS[kind]) == set(range(len(MAKE[kind]().levels)))


def assert_equal_to_bitsandbytes(w: np.ndarray, kind: str, run=compiled) -> None:
    codes, values, state = bitsandbytes(w, kind)
    q = run(jnp.asarray(w), format=MAKE[kind]())
    np.testing.assert_array_equal(codes_of(q), codes)
    np.testing.assert_array_equal(bits(q.scale).T.ravel(), bits(state.absmax))
    np.testing.assert_array_equal(bits(dequantize(q)), bits(values))
    np.testing.assert_array_equal(bits(jax.jit(dequantize)(q)), bits(values))


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("run", [compiled, minmax], ids=["jit", "eager"])
def test_codes_scales_and_values_are_bitsandbytes_bit_for_bit(kind, run):
    for w in (normal(), at_midpoints(kind)):
        assert_equal_to_bitsandbytes(w, kind, run)


@pytest.mark.parametrize("kind", MAKE)
def test_empty_blocks_have_the_scale_zero_of_bitsandbytes_and_no_infinities(kind):
    w = with_empty_blocks()
    _, values, state = bitsandbytes(w, kind)
    q = compiled(jnp.asarray(w), format=MAKE[kind]())
    np.testing.assert_array_equal(np.asarray(dequantize(q)), values)
    np.testing.assert_array_equal(bits(q.scale).T.ravel(), bits(state.absmax))


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("name", REAL)
def test_real_weights_are_bitsandbytes_bit_for_bit(kind, name, real):
    assert_equal_to_bitsandbytes(real[name], kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_bitsandbytes_bit_for_bit(dtype):
    weight = torch.from_numpy(normal(576, 8, 1).T.copy()).to(dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    state.dtype = torch.float32
    q = compiled(jnp.asarray(weight.float().numpy().T).astype(str(dtype).removeprefix("torch.")), format=NF4())
    np.testing.assert_array_equal(bits(dequantize(q)), bits(decoded(packed, state)))


# ---------------------------------------------------------------------------------------------- double quantization


def test_dynamic_levels_are_bitsandbytes_map_to_the_last_bit():
    assert len(dynamic_levels()) == 256
    np.testing.assert_array_equal(np.float64(dynamic_levels()), code_table().numpy().astype(np.float64))


def exact_codes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and absmax of bitsandbytes' own exact search in blocks of 256.

    Its kernel of float32 snaps first (`snapped_codes`); the same operator with float64 input computes in float32 too,
    and searches the nearest level.
    """
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(
        torch.from_numpy(values.astype(np.float64)), code_table(), 256
    )
    return codes.numpy(), absmax.numpy()


def snapped_codes(values: np.ndarray) -> np.ndarray:
    """What its CPU kernel does: normalized values go to the nearest of 65,536 points on [−1, 1], those to a level."""
    blocks = np.pad(values, (0, -len(values) % 256)).reshape(-1, 256)
    steps = blocks * (1 / np.abs(blocks).max(-1, keepdims=True))
    points = np.floor((steps + F32(1)) * F32(0.5) * F32(65535) + F32(0.5))
    table = code_table().numpy()
    levels = np.searchsorted((table[1:] + table[:-1]) / 2, (2 * points.astype(np.float64) / 65535 - 1).astype(F32))
    return levels.ravel()[: len(values)]


def assert_double_quantization_is_bitsandbytes(w: np.ndarray, kind: str) -> None:
    """All of it given the offset, whose sum bitsandbytes takes in another order."""
    codes, values, state = bitsandbytes(w, kind, double=True)
    q = compiled(jnp.asarray(w), format=MAKE[kind](64, double_quantized()))
    assert isinstance(q.scale, QTensor)
    np.testing.assert_array_equal(codes_of(q), codes)

    offset = np.asarray(q.scale.zero).ravel()
    np.testing.assert_allclose(offset, state.offset.numpy(), rtol=4 * 2.0**-23)  # torch's sum, ours: 4 last places
    plain = bitsandbytes(w, kind)[2].absmax.numpy()
    wanted, absmax = exact_codes(plain - offset)
    nested = np.asarray(q.scale.codes).ravel()
    np.testing.assert_array_equal(nested, wanted)
    np.testing.assert_array_equal(bits(q.scale.scale).ravel(), bits(absmax))
    np.testing.assert_array_equal(state.absmax.numpy(), snapped_codes(plain - state.offset.numpy()))
    # What is left between its kernel's codes and ours is that snapping: half a point from a midpoint of two levels.
    differ = nested != state.absmax.numpy()
    table, steps = code_table().numpy(), (plain - offset) / np.repeat(absmax, 256)[: len(plain)]
    middle = (table[1:] + table[:-1]) / 2
    apart = np.abs(middle - steps[differ][:, None]).min(-1)
    assert (apart < 1.01 / 65535).all()
    assert differ.sum() <= 1 + 0.005 * differ.size

    # With our nested codes in the place of its own, bitsandbytes decodes to our very bits.
    mine = replace_statistics(state, nested, absmax, offset)
    packed = bnb.quantize_4bit(torch.from_numpy(w.T.copy()), blocksize=64, quant_type=kind)[0]
    for run in (dequantize, jax.jit(dequantize)):
        np.testing.assert_array_equal(bits(run(q)), bits(decoded(packed, mine)))
    same = ~np.repeat(differ.reshape(w.shape[1], -1).T, 64, 0)
    np.testing.assert_allclose(np.asarray(dequantize(q))[same], values[same], rtol=2e-6, atol=1e-9)


def replace_statistics(state, codes: np.ndarray, absmax: np.ndarray, offset: np.ndarray):
    """bitsandbytes' state with other nested codes."""
    state2 = bnb.QuantState(absmax=torch.from_numpy(absmax), code=code_table(), blocksize=256, dtype=torch.float32)
    return bnb.QuantState(
        absmax=torch.from_numpy(codes.copy()), shape=state.shape, dtype=state.dtype, blocksize=64, code=state.code,
        quant_type=state.quant_type, offset=torch.tensor(offset[0]), state2=state2,
    )  # fmt: skip


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("out", [8, 200], ids=["one short block", "blocks across columns"])
def test_double_quantization_is_bitsandbytes_bit_for_bit(kind, out):
    assert_double_quantization_is_bitsandbytes(normal(576, out, seed=out), kind)


@pytest.mark.parametrize("name", REAL)
def test_double_quantization_of_real_weights_is_bitsandbytes_bit_for_bit(name, real):
    assert_double_quantization_is_bitsandbytes(real[name], "nf4")


def test_nested_codes_are_bitsandbytes_at_every_level_and_beside_every_midpoint():
    """One millionth beside it: nearer, its search compares two rounded distances, ours the value with the midpoint."""
    table = code_table().numpy()
    middle = (table[1:] + table[:-1]) / 2
    steps = np.concatenate([table, middle * F32(1 + 1e-6), middle * F32(1 - 1e-6)])
    for scale in F32([1, 0.31]):
        blocks = np.pad(steps * scale, (0, -len(steps) % 255)).reshape(-1, 255)
        flat = np.concatenate([blocks, np.full((len(blocks), 1), scale)], 1).ravel()
        q = compiled(jnp.asarray(flat[:, None]), format=Codebook(dynamic_levels(), 256, "float32"))
        np.testing.assert_array_equal(np.asarray(q.codes).ravel(), exact_codes(flat)[0])


def test_equal_scales_leave_nothing_but_the_offset():
    signs = np.sign(normal(128, 8))
    q = compiled(jnp.asarray(signs * F32(0.5)), format=NF4(64, double_quantized()))
    np.testing.assert_array_equal(dequantize(q), signs * F32(0.5))


# --------------------------------------------------------------------------------------------------- NormalFloat


def normal_float(bits: int) -> np.ndarray:
    """QLoRA's construction (arXiv 2305.14314, §3) in float64: 2^(bits−1) quantiles above zero, one fewer below."""
    tail, half = 0.9677083, 2 ** (bits - 1)
    above = norm.ppf(np.linspace(tail, 0.5, half + 1)[:-1])
    below = norm.ppf(np.linspace(tail, 0.5, half)[:-1])
    return np.sort(np.concatenate([-below / below.max(), [0], above / above.max()]))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_normal_float_levels_are_scipys_quantiles(bits):
    np.testing.assert_allclose(normal_float_levels(bits), normal_float(bits), rtol=1e-9, atol=0)


def test_four_bits_give_the_table_of_nf4():
    np.testing.assert_allclose(normal_float_levels(4), NF4_LEVELS, rtol=0, atol=2.0**-23)
    own = np.unique(bnb.create_normal_map().numpy())
    np.testing.assert_allclose(normal_float_levels(4), own, rtol=0, atol=2.0**-22)


def test_nf3_rounds_to_the_nearest_of_eight_quantiles():
    w, levels = normal(), F32(normal_float(3))
    q = compiled(jnp.asarray(w), format=NF3())
    scale = np.abs(w.reshape(9, 64, -1)).max(1)
    np.testing.assert_array_equal(np.asarray(q.scale), scale)
    distance = np.abs(w[..., None].astype(np.float64) - np.repeat(scale, 64, 0)[..., None].astype(np.float64) * levels)
    # A weight may go to the farther of two levels by float32 rounding of its quotient only.
    at = np.take_along_axis(distance, codes_of(q)[..., None], -1)[..., 0]
    assert (at <= distance.min(-1) + 1e-7 * np.repeat(scale, 64, 0)).all()


# ------------------------------------------------------------------------------------------------ bits and bad input


@pytest.mark.parametrize(
    ("format", "rows", "out", "wanted"),
    [
        (NF4(64, double_quantized()), 576, 256, 4 + 8 / 64 + 32 / (64 * 256) + 32 / (576 * 256)),
        (NF4(64, double_quantized()), 64, 256, 4 + 8 / 64 + 32 / (64 * 256) + 32 / (64 * 256)),
        (FP4(64), 576, 8, 4 + 32 / 64),
        (NF3(64), 576, 8, 3 + 32 / 64),
        (NF3(64, "float16"), 576, 8, 3 + 16 / 64),
        (NF4(32, double_quantized(64)), 64, 32, 4 + 8 / 32 + 32 / (32 * 64) + 32 / (64 * 32)),
        (NF4(64, double_quantized()), 64, 8, 4 + 8 / 64 + 32 / (64 * 8) * 2),  # eight scales: one short block
    ],
)
def test_bits_per_weight_are_codes_scales_their_scales_and_one_offset(format, rows, out, wanted):
    shape = jax.eval_shape(partial(minmax, format=format), jax.ShapeDtypeStruct((rows, out), jnp.float32))
    held = 8 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shape)) / (rows * out)
    q = compiled(jnp.asarray(normal(rows, out)), format=format)
    assert bits_per_weight(q) == pytest.approx(held, rel=1e-12)
    assert held == pytest.approx(wanted, rel=1e-12)


def test_the_double_quantization_of_a_large_matrix_takes_4_127_bits():
    format = NF4(64, double_quantized())
    shape = jax.eval_shape(partial(minmax, format=format), jax.ShapeDtypeStruct((4096, 4096), jnp.float32))
    held = 8 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shape)) / 4096**2
    assert round(held, 3) == 4.127


def test_weights_below_the_lowest_midpoint_and_above_the_highest_take_the_outer_levels():
    format = replace(NF4(), scale="float16")
    w = jnp.asarray(normal())
    scale, _ = MinMax()(w, format)
    q = quantize(w, scale / 2, None, format)
    outside = np.abs(np.asarray(w)) > np.repeat(np.asarray(scale, F32), 64, 0) / 2
    assert outside.any()
    np.testing.assert_array_equal(codes_of(q)[outside], np.where(np.asarray(w) > 0, 15, 0)[outside])


@pytest.mark.parametrize("levels", [3, 8, 9, 16, 17])
def test_tables_of_up_to_four_bits_are_searched_and_read_without_a_loop_or_a_gather(levels):
    """Both take one element at a time. Larger tables would need more comparisons than these take."""
    format, scale = Codebook(tuple(map(float, range(levels)))), jnp.ones(1)
    for function, dtype in ((format.encode, jnp.float32), (format.decode, jnp.uint8)):
        program = jax.jit(lambda values, f=function: f(values, scale, None)).lower(jnp.zeros(8, dtype)).as_text()
        assert bool({"gather", "while"} & set(re.findall(r"\w+", program))) == (levels > 16)
