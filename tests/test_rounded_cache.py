"""Rounded keys and values: what attention reads, what generation keeps, what training learns with."""

from dataclasses import replace

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import refused

from jquant import Activation, Int, RoundedCache, Tuning, method, with_cache
from jquant.evaluation.generation import generate_ids
from jquant.io.load import LanguageModel, load_model
from jquant.learning.losses import model_loss
from jquant.learning.tuning import begun, split, tune
from jquant.models.decoder import Decoder
from jquant.pipeline.in_memory import quantize_decoder

TOKENS = np.random.default_rng(5).integers(0, checkpoints.VOCAB, (4, 24), np.int32)
FOUR, EIGHT = (Activation(Int(bits, "channel", symmetric=True, scale="float32")) for bits in (4, 8))
CACHE = RoundedCache(keys=EIGHT, values=Activation(Int(4, 8, scale="float32")))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    return load_model(checkpoints.save(tmp_path_factory.mktemp("tiny"), checkpoints.llama(initializer_range=0.2)))


@pytest.fixture(scope="module")
def quantized(model) -> Decoder:
    return quantize_decoder(model.decoder, method("rtn", 3, 16))[0]


def rounded(x: np.ndarray, bits: int, group: int | None) -> np.ndarray:
    """In float64: symmetric over a token's head, or asymmetric over runs of its channels."""
    x = x.astype(np.float64)
    if group is None:
        step = np.abs(x).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
        return np.round(x / step) * step
    runs = x.reshape(*x.shape[:-1], -1, group)
    low, high = np.minimum(runs.min(-1, keepdims=True), 0), np.maximum(runs.max(-1, keepdims=True), 0)
    step = (high - low) / (2**bits - 1)
    zero = np.round(-low / step)
    return ((np.clip(np.round(runs / step) + zero, 0, 2**bits - 1) - zero) * step).reshape(x.shape)


def test_keys_and_values_are_rounded_per_token_and_head_and_gradients_pass():
    keys, values = (jax.random.normal(jax.random.key(n), (2, 3, 5, 16)) for n in (0, 1))
    (ours, theirs), back = jax.vjp(CACHE, keys, values)
    np.testing.assert_allclose(ours, rounded(np.asarray(keys), 8, None), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(theirs, rounded(np.asarray(values), 4, 8), rtol=1e-5, atol=1e-6)
    for slope, given in zip(back((ours, theirs)), (ours, theirs), strict=True):
        np.testing.assert_array_equal(slope, given)
    kept = RoundedCache(values=FOUR)(keys, values)
    np.testing.assert_array_equal(kept[0], keys)
    assert np.abs(kept[1] - values).max() > 0.01


def test_generation_reads_the_keys_and_values_that_evaluation_does(model):
    decoder = with_cache(model.decoder, CACHE)
    assert np.abs(decoder(jnp.asarray(TOKENS)) - model.decoder(jnp.asarray(TOKENS))).max() > 1e-3
    ids = list(generate_ids(decoder, TOKENS[0, :8], tokens=10))
    text = np.concatenate([TOKENS[0, :8], ids])[None]
    assert ids == np.asarray(decoder(jnp.asarray(text))).argmax(-1)[0, 7:-1].tolist()


def test_training_learns_under_the_rounded_cache_and_keeps_it(model, quantized):
    stage = Tuning(30, 4, 1e-2, weight_rate=1e-2, compute="float32")
    student = with_cache(quantized, RoundedCache(FOUR, FOUR))

    def loss(decoder: Decoder) -> float:
        start, parts = begun(split(decoder), stage, model.decoder)
        return float(model_loss(start(), (parts, model.decoder), jnp.asarray(jnp.asarray(TOKENS)), stage))

    trained = tune(student, model.decoder, TOKENS, stage, progress=False)
    assert trained.segments[0].attention.cached == RoundedCache(FOUR, FOUR)
    assert loss(student) > loss(quantized)
    assert loss(trained) < 0.8 * loss(student)


def test_it_is_a_choice_for_a_run_that_a_saved_model_does_not_hold(model, quantized, tmp_path):
    replace(model, decoder=with_cache(quantized, CACHE)).save(tmp_path / "saved")
    loaded = load_model(tmp_path / "saved").decoder
    np.testing.assert_array_equal(loaded(jnp.asarray(TOKENS)), quantized(jnp.asarray(TOKENS)))
    np.testing.assert_array_equal(
        with_cache(loaded, CACHE)(jnp.asarray(TOKENS)), with_cache(quantized, CACHE)(jnp.asarray(TOKENS))
    )
    np.testing.assert_array_equal(
        with_cache(with_cache(loaded, CACHE), None)(jnp.asarray(TOKENS)), quantized(jnp.asarray(TOKENS))
    )


def test_wrong_formats_are_refused(model):
    whole = Activation(Int(4, "tensor", symmetric=True))  # would let a token see those after it
    for wrong in (Activation(static=True), Activation(outliers=6.0), whole):
        with refused("values", "scales of their own"):
            RoundedCache(values=wrong)
    with refused("keys", "Activation"):
        RoundedCache(keys=Int(8, "channel", symmetric=True))
    with refused("RoundedCache or None"):
        with_cache(model.decoder, FOUR)
    with refused("larger than"):
        with_cache(model.decoder, RoundedCache(keys=Activation(Int(4, 128))))
