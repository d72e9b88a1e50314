"""Ranges learned on the loss: slopes against float64 differences, the loss falls, refusals; percentiles by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import refused
from flax import nnx
from problems import rounded

from jquant.evaluation.perplexity import score
from jquant.formats import (
    FP8_E4M3,
    GGUF,
    MXFP4,
    NF4,
    NVFP4,
    Format,
    Int,
    block_shape,
    double_quantized,
)
from jquant.learning.clips import learn_clips
from jquant.methods import Method
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Decoder, blocks
from jquant.pipeline.in_memory import quantize_decoder
from jquant.pipeline.plan import make_plan
from jquant.qtensor import QTensor
from jquant.ranges import LlamaCpp, LossSearch, MinMax, Percentile, Search
from jquant.ranges.loss import clipped
from jquant.rounding import GPTQ, Nearest

ROWS, OUT = 40, 6  # groups of 16 end in a short one, blocks of 16 × 4 in short ones on both edges
PATHS = [f"attention.{name}.kernel" for name in "qkvo"] + [f"mlp.{name}.kernel" for name in ("gate", "up", "down")]
TOKENS = np.random.default_rng(3).integers(0, 64, (4, 32), np.int32)
GRID = Int(2, 16)
LEARNED = LossSearch(MinMax(), steps=24, windows=4, rate=0.03)


def weight(seed: int = 0) -> np.ndarray:
    """Heavy-tailed, so that clipping pays."""
    return (0.05 * np.random.default_rng(seed).standard_t(3, (ROWS, OUT))).astype(np.float32)


def of_blocks(format: Format) -> list[tuple[int, int, tuple[slice, slice]]]:
    """(Group, column, its rows and columns) of every block of a `[ROWS, OUT]` weight."""
    rows, columns = block_shape(format, (ROWS, OUT))
    return [
        (i // rows, j // columns, (slice(i, min(i + rows, ROWS)), slice(j, min(j + columns, OUT))))
        for i in range(0, ROWS, rows)
        for j in range(0, OUT, columns)
    ]


def test_clipping_keeps_an_integer_zero_and_moves_a_float_one():
    w, clips = jnp.asarray(weight()), jnp.float32([[0.5]])
    for format in (Int(3, 16, scale="float32"), Int(3, 16, zero="float", scale="float32")):
        before = MinMax()(w, format)
        after = clipped(before, clips)
        np.testing.assert_array_equal(after[0], before[0] / 2)
        np.testing.assert_array_equal(after[1], np.asarray(before[1]) / (2 if format.zero == "float" else 1))
        assert [np.asarray(v).dtype for v in after] == [np.asarray(v).dtype for v in before]


# ---- learning -------------------------------------------------------------------------------------------------------


def decoder_of(seed: int = 0, layers: int = 2, dtype: str = "float32") -> Decoder:
    """Random, its kernels large enough for logits of a few units."""
    config = DecoderConfig(
        vocab_size=64, hidden=32, ffn=48, layers=layers, heads=2, kv_heads=1, head_dim=16, norm_eps=1e-5,
        rope_base=1e4, rope_divisors=None, tied=False, context_length=64,
    )  # fmt: skip
    decoder = Decoder(config, nnx.Rngs(seed))
    state = jax.tree.map(lambda v: (v * (8 if v.std() > 0 else 1)).astype(dtype), nnx.state(decoder))
    return nnx.merge(nnx.graphdef(decoder), state)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return decoder_of()


def cross_entropy(decoder: Decoder) -> float:
    return float(np.log(score(decoder, TOKENS).perplexity))


def kernel(decoder: Decoder, layer: int, path: str):
    part, name, _ = path.split(".")
    return getattr(getattr(list(blocks(decoder))[layer], part), name).kernel.get_value()


def learn(decoder: Decoder, plan, tokens: np.ndarray = TOKENS):
    return learn_clips(decoder, make_plan(decoder, plan).layers, tokens)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_calibration_cross_entropy_falls(seed):
    decoder = decoder_of(seed)
    start, learned = (
        cross_entropy(quantize_decoder(decoder, Method(GRID, range), TOKENS)[0]) for range in (MinMax(), LEARNED)
    )
    assert learned < start - 0.2


def test_the_same_windows_give_the_same_factors_and_the_kernels_carry_them(decoder):
    learned, again = learn(decoder, Method(GRID, LEARNED)), learn(decoder, Method(GRID, LEARNED))
    quantized, _ = quantize_decoder(decoder, Method(GRID, LEARNED), TOKENS)
    assert {layer: set(factors) for layer, factors in learned.items()} == {0: set(PATHS), 1: set(PATHS)}
    for layer, factors in learned.items():
        for path, clips in factors.items():
            np.testing.assert_array_equal(clips, again[layer][path])
            scale, _ = clipped(MinMax()(kernel(decoder, layer, path), GRID), clips)
            np.testing.assert_array_equal(kernel(quantized, layer, path).scale, scale, err_msg=path)
            assert np.abs(np.log(clips)).max() > 0.1


def test_gptq_rounds_onto_the_learned_grid(decoder):
    nearest, gptq = (
        quantize_decoder(decoder, Method(GRID, LEARNED, rounding), TOKENS)[0]
        for rounding in (Method(GRID).rounding, GPTQ())
    )
    for path in PATHS:
        a, b = kernel(nearest, 1, path), kernel(gptq, 1, path)
        np.testing.assert_array_equal(a.scale, b.scale, err_msg=path)
        np.testing.assert_array_equal(a.zero, b.zero, err_msg=path)
        assert (np.asarray(a.codes) != np.asarray(b.codes)).any(), path


def test_a_plan_learns_its_own_weights_and_leaves_others_as_they_are(decoder):
    others = [(r"mlp\.down", Method(Int(3, 16))), (r"attention\.q", None)]
    plan = [(r"layers\.1\.attention\.v", Method(GRID, LEARNED)), *others]
    learned = learn(decoder, plan)
    assert {layer: set(factors) for layer, factors in learned.items()} == {0: set(), 1: {"attention.v.kernel"}}
    mixed, plain = quantize_decoder(decoder, plan, TOKENS)[0], quantize_decoder(decoder, others)[0]
    for layer in range(2):
        for path in PATHS:
            a, b = kernel(mixed, layer, path), kernel(plain, layer, path)
            if (layer, path) == (1, "attention.v.kernel"):
                assert isinstance(a, QTensor)
                assert not isinstance(b, QTensor)
            else:
                assert all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b))), (layer, path)
    assert learn(decoder, others) == {}


EVERY = {  # a kind of format for each projection; layer 0's v has another than layer 1's
    r"layers\.0\.attention\.v": Int(3, 16),
    r"attention\.v": Int(2, "channel"),
    r"attention\.q": Int(2, 16, zero="float"),
    r"attention\.k": NF4(16, double_quantized()),
    r"attention\.o": MXFP4,
    r"mlp\.gate": FP8_E4M3((16, 16)),
    r"mlp\.up": NVFP4,
    r"mlp\.down": GGUF["Q2_K"],
}


def test_every_kind_of_format_is_learned_at_once_layers_apart(decoder):
    plans = [[(rule, Method(format, range)) for rule, format in EVERY.items()] for range in (MinMax(), LEARNED)]
    learned = learn(decoder, plans[1])
    for layer, choices in enumerate(make_plan(decoder, plans[1]).layers):
        for path, method in choices:
            clips, (rows, columns) = learned[layer][path], kernel(decoder, layer, path).shape
            block = block_shape(method.format, (rows, columns))
            assert clips.shape == (-(-rows // block[0]), -(-columns // block[1])), path
            assert np.isfinite(clips).all()
            assert (np.asarray(clips) != 1).any(), path
    start, after = (cross_entropy(quantize_decoder(decoder, plan, TOKENS)[0]) for plan in plans)
    assert after < start - 0.1


def test_each_layer_gets_its_own_factors():
    """A kernel of zeros has nothing to learn: its factors stay, and only its."""
    decoder = decoder_of()
    down = decoder.segments[0].mlp.down.kernel
    down.set_value(down.get_value().at[1].set(0))
    learned = learn(decoder, [(r"mlp\.down", Method(GRID, LEARNED))])
    assert (np.asarray(learned[0]["mlp.down.kernel"]) != 1).all()
    assert (np.asarray(learned[1]["mlp.down.kernel"]) == 1).all()


def test_a_bfloat16_decoder_learns_float32_factors():
    learned = learn(decoder_of(dtype="bfloat16"), [(r"mlp\.down", Method(GRID, LEARNED))])
    for factors in learned.values():
        assert factors["mlp.down.kernel"].dtype == jnp.float32
        assert np.isfinite(factors["mlp.down.kernel"]).all()


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_learning_is_refused_without_calibration(decoder):
    assert Method(GRID, LEARNED).needs == {"clips"}
    with refused("calibration"):
        quantize_decoder(decoder, Method(GRID, LEARNED))
    with refused("LossSearch", "needs clips, which comes from calibration text"):
        rounded(Nearest(), jnp.asarray(weight()), GRID, range=LEARNED)


@pytest.mark.parametrize("start", [Search("diagonal"), Search("gram"), LlamaCpp(importance=True), LossSearch()])
def test_a_start_that_needs_calibration_is_refused(start):
    with refused("LossSearch", repr(start)):
        LossSearch(start)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"windows": 0}, {"rate": 0.0}, {"rate": float("nan")}])
def test_a_search_that_cannot_learn_is_refused(bad):
    with refused("LossSearch", f"{next(iter(bad))}={next(iter(bad.values()))}"):
        LossSearch(**bad)


def test_a_start_that_quantizes_the_scales_itself_is_refused(decoder):
    with refused("LossSearch", "LlamaCpp"):
        learn(decoder, [("mlp.down", Method(GGUF["Q2_K"], LossSearch(LlamaCpp())))])


def test_a_partly_quantized_decoder_is_refused(decoder):
    for done in (r"layers\.0", "attention"):  # two segments; one whose kernels are QTensors in part
        partly, _ = quantize_decoder(decoder, [(done, Method(GRID))])
        with refused("quantized already"):
            quantize_decoder(partly, [(r"layers\.1\.mlp", Method(GRID, LEARNED))], TOKENS)


def test_searches_that_learn_differently_are_refused_in_one_plan(decoder):
    plan = [("attention", Method(GRID, LEARNED)), ("mlp", Method(GRID, LossSearch(MinMax(), steps=3)))]
    with refused("same steps, windows and rate"):
        learn(decoder, plan)


# ---- percentiles ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [16, "channel", "tensor", (16, 4)])
@pytest.mark.parametrize("percent", [99.99, 90.0, 51.0])
def test_percentiles_are_numpys_of_each_groups_members(group, percent):
    format, w = Int(4, group, zero="float", scale="float32"), weight()
    scale, low = Percentile(percent)(jnp.asarray(w), format)
    assert low is not None
    found = np.asarray(low, np.float64), np.asarray(low + 15 * scale, np.float64)
    for i, j, at in of_blocks(format):
        expected = np.percentile(w[at].astype(np.float64), [100 - percent, percent])
        np.testing.assert_allclose([end[i, j] for end in found], expected, rtol=1e-4, atol=1e-6)


def test_the_hundredth_percentile_is_minmax():
    for format in (Int(3, 16), NF4((16, 4))):
        for a, b in zip(
            *(range(jnp.asarray(weight()), format) for range in (Percentile(100.0), MinMax())), strict=True
        ):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("percent", [50.0, 0.9999, 100.01, float("nan")])
def test_a_percentile_out_of_range_is_refused(percent):
    with refused("Percentile", str(percent)):
        Percentile(percent)
