"""Embedding and head quantized by a plan's rules: values, sizes, files, generation, and what is refused."""

from dataclasses import replace

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import refused
from flax import nnx

from jquant import Int, Method, QTensor, Tuning, dequantize, method, quantize
from jquant.evaluation.generation import generate_batch, generate_ids
from jquant.evaluation.perplexity import score
from jquant.io.language_model import LanguageModel
from jquant.io.load import load_model, open_model
from jquant.kernels.choose import products
from jquant.learning.tuning import tune
from jquant.models.decoder import Decoder
from jquant.models.params import flat_params, with_params
from jquant.models.size import size_of
from jquant.pipeline.to_disk import quantize_to_folder
from jquant.qtensor import Transposed

TOKENS = np.random.default_rng(3).integers(0, checkpoints.VOCAB, (2, 24), np.int32)
BLOCKS = ("", method("rtn", 4, 16))
RULES = {
    "head": [("head", "q8_0"), BLOCKS],
    "embedding": [BLOCKS, ("embedding", Method(Int(4, 16)))],
    "head|embedding": [("head|embedding", "nf4"), BLOCKS],
    "alone": [("embedding", "rtn-8"), ("head", Method(Int(3, 8, symmetric=True)))],
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path_factory) -> LanguageModel:
    saved = checkpoints.llama(tie_word_embeddings=request.param, num_hidden_layers=1)
    return load_model(checkpoints.save(tmp_path_factory.mktemp("tiny"), saved))


def rules(name: str, model: LanguageModel) -> list:
    """`alone` gives two methods, which tied weights can't have."""
    return RULES[name][:1] if name == "alone" and model.config.tied else RULES[name]


def with_floats(decoder: Decoder) -> Decoder:
    """The decoder with the values of its quantized weights."""
    floats = {}
    for name, leaf in flat_params(decoder).items():
        if isinstance(leaf, Transposed):
            floats[name] = dequantize(leaf.weight).T
        elif isinstance(leaf, QTensor):
            floats[name] = dequantize(leaf)
    return with_params(decoder, floats)


@pytest.mark.parametrize("name", RULES)
def test_rules_quantize_embedding_and_head(model, name):
    quantized = quantize(model, rules(name, model), progress=False).decoder
    tied = model.config.tied
    assert isinstance(quantized.embedding.get_value(), Transposed) == (tied or name != "head")
    assert (
        quantized.head is None
        if tied
        else isinstance(quantized.head.kernel.get_value(), QTensor) == (name != "embedding")
    )
    wanted = with_floats(quantized)(jnp.asarray(TOKENS))
    assert np.abs(np.asarray(wanted) - model.decoder(jnp.asarray(TOKENS))).max() > 1e-3
    np.testing.assert_allclose(quantized(jnp.asarray(TOKENS)), wanted, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        score(quantized, TOKENS).nll, score(with_floats(quantized), TOKENS).nll, rtol=1e-3, atol=1e-3
    )


def test_without_a_rule_that_names_them_they_stay_as_they_are(model):
    for plan in ("rtn-4", [("", "rtn-4")], [(".*", "rtn-4")], [("layers|attention", "rtn-4")], [("kernel", "rtn-4")]):
        quantized = quantize(model, plan, group=16, progress=False).decoder
        for name, leaf in flat_params(quantized).items():
            if not name.startswith("segments"):
                assert not isinstance(leaf, QTensor | Transposed), (plan, name)


def test_tied_weights_are_stored_once(model):
    weights = checkpoints.VOCAB * model.config.hidden
    quantized = quantize(model, RULES["head|embedding"], progress=False).decoder
    nf4 = weights // 2 + weights // 64 * 4
    blocks = sum(leaf.nbytes for name, leaf in flat_params(quantized).items() if name.startswith("segments"))
    norm = 4 * model.config.hidden
    assert size_of(quantized).total == blocks + norm + nf4 * (1 if model.config.tied else 2)


@pytest.mark.parametrize("kernels", ["fast", "plain"])
def test_generation_reads_them_as_evaluation_does(model, kernels):
    quantized = quantize(model, RULES["head|embedding"], progress=False).decoder
    with products(kernels):
        ids = list(generate_ids(quantized, TOKENS[0], tokens=8))
        logits = with_floats(quantized)(jnp.asarray(np.concatenate([TOKENS[0], ids])[None]))
        assert ids == np.asarray(logits).argmax(-1)[0, len(TOKENS[0]) - 1 : -1].tolist()
        together = generate_batch(quantized, TOKENS, jax.random.split(jax.random.key(0), len(TOKENS)), tokens=8)
        assert together[0].tolist() == ids


@pytest.mark.parametrize("name", RULES)
def test_they_are_saved_and_loaded_bit_for_bit(model, name, tmp_path):
    quantized = quantize(model, rules(name, model), progress=False)
    quantized.save(tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    np.testing.assert_array_equal(loaded.decoder(jnp.asarray(TOKENS)), quantized.decoder(jnp.asarray(TOKENS)))
    assert nnx.graphdef(loaded.decoder) == nnx.graphdef(quantized.decoder)


def test_from_disk_to_disk_gives_the_same_bytes(model, tmp_path):
    saved = checkpoints.llama(tie_word_embeddings=model.config.tied, num_hidden_layers=1)
    folder = checkpoints.save(tmp_path / "hf", saved)
    written = quantize_to_folder(open_model(folder), tmp_path / "written", RULES["head|embedding"]).load(False)
    wanted = quantize(load_model(folder), RULES["head|embedding"], progress=False)
    np.testing.assert_array_equal(written.decoder(jnp.asarray(TOKENS)), wanted.decoder(jnp.asarray(TOKENS)))
    with refused("another run", "outside"):
        quantize_to_folder(open_model(folder), tmp_path / "written", RULES["head"])


def test_what_they_can_not_have_is_refused(model):
    for wrong in ("gptq", "awq", "llm_int8", "learned"):
        with refused("embedding", "more than look at the weight"):
            quantize(model, [("embedding", wrong)], calibration="text", progress=False)
    with refused("embedding", "larger"):
        quantize(model, [("embedding", Method(Int(4, 128)))], progress=False)
    if model.config.tied:
        with refused("one weight"):
            quantize(model, RULES["alone"], progress=False)
    embedding = model.decoder.embedding.get_value().at[3, 5].set(jnp.nan)
    broken = replace(model, decoder=with_params(model.decoder, {"embedding": embedding}))
    with refused("embedding", "NaN"):
        quantize(broken, [("embedding", "q8_0")], progress=False)
    quantized = quantize(model, [("embedding", "q8_0")], progress=False)
    with refused("embedding is quantized already"):
        quantize(quantized, [("embedding", "q8_0")], progress=False)
    with refused("embedding is quantized: train first"):
        tune(quantize(quantized, BLOCKS[1], progress=False).decoder, model.decoder, TOKENS, Tuning(2), progress=False)
