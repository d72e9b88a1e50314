"""Tuning after rounding: it brings the student closer, changes nothing it must not, and refuses what it can't do."""

from dataclasses import replace

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import refused
from test_pipeline import leaves, same_bytes

import jquant
from jquant.calibration.options import Options
from jquant.evaluation.perplexity import Reference, Scores, score
from jquant.formats import Format
from jquant.io.load import load_model
from jquant.kernels.bfloat16 import bfloat16_matmul
from jquant.learning.tuning import begun, split, tune, tune_block
from jquant.methods import Method, Tuning, method
from jquant.models.decoder import Decoder, blocks
from jquant.models.rotary import rotary_table
from jquant.pipeline.in_memory import quantize_decoder
from jquant.qtensor import QTensor, bits_per_weight, dequantize

TOKENS = np.random.default_rng(5).integers(0, checkpoints.VOCAB, (8, 32), np.int32)
STEPS = 20
LONG = 200  # a weight starts half a unit from the next code: fewer steps must be so wide that all jump at once


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Decoder:
    small = checkpoints.llama(initializer_range=0.08, hidden_size=32, intermediate_size=64, num_attention_heads=2)
    return load_model(checkpoints.save(tmp_path_factory.mktemp("tiny"), small)).decoder


def compared(decoder: Decoder, quantized: Decoder) -> Scores:
    return score(quantized, TOKENS, reference=Reference(decoder, score(decoder, TOKENS).hidden))


def quantized_leaves(decoder: Decoder) -> dict[str, QTensor]:
    return {path: leaf for path, leaf in leaves(decoder).items() if isinstance(leaf, QTensor)}


FORMATS = [jquant.Int(3, 16), jquant.Int(3, 16, symmetric=True), jquant.Int(3, 16, zero="float"), jquant.NF3(16),
           jquant.Int(3, "channel"), jquant.Float(2, 1, 16)]  # fmt: skip


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_tuned_scales_come_closer_to_the_float_model_under_the_same_codes_and_bits(decoder, format: Format):
    quantized, _ = quantize_decoder(decoder, Method(format))
    before = jax.tree.map(np.array, leaves(quantized))
    tuned = tune(quantized, decoder, TOKENS, Tuning(STEPS, windows=8, rate=3e-3))
    assert compared(decoder, tuned).kl.mean() < 0.9 * compared(decoder, quantized).kl.mean()
    assert same_bytes(before, leaves(quantized))
    after = leaves(tuned)
    assert bits_per_weight(quantized_leaves(tuned)) == bits_per_weight(quantized_leaves(quantized))
    for path, leaf in after.items():
        if isinstance(leaf, QTensor):
            assert same_bytes(leaf.codes, before[path].codes), path
            assert leaf.format == format
            assert leaf.scale.dtype == before[path].scale.dtype
        else:
            assert same_bytes(leaf, before[path]), path


def test_codes_move_when_they_have_a_rate(decoder):
    quantized, _ = quantize_decoder(decoder, method("rtn", 2, 16))
    scales, both = (tune(quantized, decoder, TOKENS, Tuning(LONG, 8, 3e-3, weight_rate=r)) for r in (0.0, 0.01))
    for a, b in zip(quantized_leaves(quantized).values(), quantized_leaves(both).values(), strict=True):
        assert 0 < np.mean(np.asarray(a.codes) != np.asarray(b.codes)) < 0.9
    assert compared(decoder, both).kl.mean() < compared(decoder, scales).kl.mean()


def test_the_text_as_target_lowers_perplexity_below_the_float_models_and_keeps_less_of_it(decoder):
    quantized, _ = quantize_decoder(decoder, method("rtn", 3, 16))
    text, model = (tune(quantized, decoder, TOKENS, Tuning(STEPS, 8, 1e-2, text=share)) for share in (1.0, 0.0))
    text, model = compared(decoder, text), compared(decoder, model)
    assert text.perplexity < score(decoder, TOKENS).perplexity
    assert text.kl.mean() > model.kl.mean()


@pytest.mark.parametrize("weight_rate", [0.0, 0.01])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_what_is_learned_starts_at_the_quantized_weight(decoder, format, weight_rate):
    quantized, _ = quantize_decoder(decoder, Method(format))
    start, student = begun(split(quantized), Tuning(weight_rate=weight_rate), decoder)
    packed = student.packed(start())
    for (path, a), b in zip(leaves(quantized).items(), leaves(packed).values(), strict=True):
        assert same_bytes(a, b), path


def test_a_tunings_product_is_that_of_bfloat16_factors_forwards_and_backwards():
    rng = np.random.default_rng(1)
    x, w, slope = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 5, 16), (16, 4), (3, 5, 4)))
    short = lambda a: np.asarray(a.astype(jnp.bfloat16), np.float64)  # noqa: E731
    y, back = jax.vjp(bfloat16_matmul, x, w)
    at_x, at_w = back(slope)
    np.testing.assert_allclose(y, short(x) @ short(w), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(at_x, short(slope) @ short(w).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(at_w, np.einsum("bti,bto->io", short(x), short(slope)), rtol=1e-5, atol=1e-5)


def test_the_same_twice_gives_the_same_bytes(decoder):
    quantized, _ = quantize_decoder(decoder, method("rtn", 3, 16))
    first, again = (tune(quantized, decoder, TOKENS, Tuning(3)) for _ in range(2))
    assert same_bytes(leaves(first), leaves(again))


def test_progress_counts_steps(decoder):
    calls = []
    quantized, _ = quantize_decoder(decoder, method("rtn", 3, 16))
    tune(quantized, decoder, TOKENS, Tuning(2), progress=lambda *call, **figures: calls.append((call, figures)))
    assert [call for call, _ in calls] == [("tune", 1, 2), ("tune", 2, 2)]
    assert all(0 < figures["loss"] < np.inf for _, figures in calls)


@pytest.mark.parametrize("weight_rate", [0.0, 0.01])
def test_blocks_tuned_one_by_one_end_closer_to_the_float_ones(decoder, weight_rate):
    stage = Tuning(LONG, 8, 3e-3, weight_rate, target="block")
    plain, tuned = (
        quantize_decoder(decoder, replace(method("rtn", 2, 16), tuning=stages), TOKENS)[0] for stages in ((), (stage,))
    )
    exact = decoder.hidden(jnp.asarray(TOKENS))
    misses = [float(jnp.mean((one.hidden(jnp.asarray(TOKENS)) - exact) ** 2)) for one in (plain, tuned)]
    assert misses[1] < 0.9 * misses[0]
    for a, b in zip(quantized_leaves(plain).values(), quantized_leaves(tuned).values(), strict=True):
        assert np.any(np.asarray(a.codes) != np.asarray(b.codes)) == (weight_rate > 0)
        assert np.any(np.asarray(a.scale) != np.asarray(b.scale))


def test_a_block_is_tuned_on_inputs_of_the_quantized_blocks_before_it_towards_float_outputs(decoder):
    """The second block's loss is least at what undoes the first one's error, so its float weights are no optimum."""
    quantized, _ = quantize_decoder(decoder, [(r"layers\.0\.", method("rtn", 2, 16))])
    first, second = blocks(decoder)
    broken = next(iter(blocks(quantized)))
    rotary = rotary_table(decoder.config, jnp.arange(TOKENS.shape[1]))
    x = decoder.embed(jnp.asarray(TOKENS))
    seen, wanted = broken(x, rotary)[0], second(first(x, rotary)[0], rotary)[0]
    fine, _ = quantize_decoder(decoder, Method(jquant.Int(8, 16)))
    start = list(blocks(fine))[1]
    tuned = tune_block(start, seen, wanted, rotary, Tuning(40, 8, 3e-3, target="block"))
    misses = [float(jnp.mean((one(seen, rotary)[0] - wanted) ** 2)) for one in (second, start, tuned)]
    assert misses[2] < 0.97 * min(misses[:2])


def test_stages_follow_one_another_and_blocks_come_first(decoder):
    stages = (Tuning(2, 8, target="block"), Tuning(2, 8))
    calls = []
    two = replace(method("rtn", 2, 16), tuning=stages)
    whole, _ = quantize_decoder(decoder, two, TOKENS, Options(progress=lambda *call, **_: calls.append(call)))
    first, _ = quantize_decoder(decoder, replace(two, tuning=stages[:1]), TOKENS)
    assert same_bytes(leaves(whole), leaves(tune(first, decoder, TOKENS, stages[1])))
    assert calls == [("quantize", 1, 2), ("quantize", 2, 2), ("tune", 1, 2), ("tune", 2, 2)]
    with refused("before the whole model"):
        replace(two, tuning=stages[::-1])


def test_weights_begin_at_the_float_ones_if_asked(decoder):
    """Then codes are the nearest ones, whatever they were."""
    solved, _ = quantize_decoder(decoder, method("gptq", 3, 16), TOKENS)
    stage = Tuning(1, 8, 1e-9, weight_rate=1e-9, begin="weights")
    begun = quantized_leaves(tune(solved, decoder, TOKENS, stage))
    floats = leaves(decoder)
    for path, q in quantized_leaves(solved).items():
        assert (np.asarray(q.codes) != np.asarray(begun[path].codes)).any()
        errors = [np.abs(np.asarray(dequantize(each) - floats[path])) for each in (begun[path], q)]
        assert (errors[0] <= errors[1] + 1e-3 * errors[1].max()).all(), path
    scaled, _ = quantize_decoder(decoder, method("awq", 3, 16), TOKENS)
    with refused("no transform"):
        tune(scaled, decoder, TOKENS, stage)


def test_what_cannot_be_tuned_is_refused(decoder):
    with refused("one by one"):
        tune(decoder, decoder, TOKENS, Tuning(target="block"))
    for tokens, held_out in ((None, 0), (TOKENS, len(TOKENS))):
        with refused("Tuning learns from text", f"held_out={held_out}"):
            quantize_decoder(decoder, method("gptq_tuned", 3, 16), tokens, Options(held_out=held_out))
    with refused("nothing to tune"):
        tune(decoder, decoder, TOKENS)
