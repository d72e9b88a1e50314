"""A model cut over eight devices: the figures and texts of one device, and the bytes that each device holds."""

import math
from functools import partial
from pathlib import Path

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import relative

from jquant import CacheFormat, Int, Stored, quantize, with_cache
from jquant.evaluation import generation, perplexity
from jquant.evaluation.generation import generate_batch, generate_ids
from jquant.evaluation.perplexity import Reference, score
from jquant.io.language_model import LanguageModel
from jquant.io.load import load_model
from jquant.kernels import choose
from jquant.kernels.blocked import ByColumns, by_columns
from jquant.models.decoder import Decoder
from jquant.models.params import flat_params
from jquant.parallel.mesh import Devices, spread_over

TOKENS = np.random.default_rng(0).integers(0, checkpoints.VOCAB, (9, 24), np.int32)
# A method for every kind of leaf: packed zeros, codebooks, scales that are themselves quantized, rows of bytes.
METHODS = {
    "float": None,
    "int": "rtn-4",
    "nf4, head and embedding": [("", "nf4"), ("head|embedding", "q8_0")],
    "double": "nf4_double",
    "k-quant": "q4_k",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "initializer_range": 0.1}
    model = checkpoints.llama(**shape, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False)
    return checkpoints.save(tmp_path_factory.mktemp("float"), model)


@pytest.fixture(scope="module", params=METHODS)
def model(request, folder) -> LanguageModel:
    loaded, chosen = load_model(folder), METHODS[request.param]
    return quantize(loaded, chosen, progress=False) if chosen else loaded


def held(tree, device) -> int:
    """Bytes that a device holds."""
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


def weights(decoder: Decoder) -> list:
    return [leaf for name, leaf in flat_params(decoder).items() if name.endswith(("kernel", "embedding"))]


def test_a_model_that_is_cut_has_the_figures_of_one_device(model, folder):
    float_model = load_model(folder)
    reference = Reference(float_model.decoder, score(float_model.decoder, TOKENS).hidden)
    devices = Devices(2, 4)
    decoder = devices.spread(model.decoder)
    assert spread_over(model.decoder) is None
    assert spread_over(decoder) == devices
    alone, cut = (score(one, TOKENS, reference=reference, batch=1) for one in (model.decoder, decoder))
    assert cut.nll.shape == alone.nll.shape == (9, 23)
    assert relative(cut.hidden, alone.hidden) < 1e-5
    np.testing.assert_allclose(cut.nll, alone.nll, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(cut.kl, alone.kl, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cut.agrees, alone.agrees)
    np.testing.assert_allclose(score(decoder, TOKENS).nll, alone.nll, rtol=1e-5, atol=1e-5)


def test_each_device_holds_its_part_of_the_weights(model):
    decoder = Devices(2, 4).spread(model.decoder)
    total = sum(leaf.nbytes for leaf in weights(model.decoder))
    for device in jax.devices():
        assert held(weights(decoder), device) <= 1.05 * total / 8  # scales of one column, of double quantization, stay
    norms = [leaf for name, leaf in flat_params(decoder).items() if name.endswith("scale")]
    assert all(leaf.sharding.is_fully_replicated for leaf in norms)


def test_an_axis_that_does_not_divide_is_not_cut():
    devices = Devices(8)
    assert devices.cut("head.kernel", jnp.zeros((16, 12))).sharding.spec[0] == ("data", "model")
    assert devices.cut("head.kernel", jnp.zeros((12, 12))).sharding.is_fully_replicated
    assert devices.cut("embedding", jnp.zeros((16, 16))).sharding.spec[0] == ("data", "model")
    assert devices.cut("norm.scale", jnp.zeros((3, 16))).sharding.is_fully_replicated


def test_a_program_joins_one_layer_at_a_time_and_never_the_vocabulary(folder):
    decoder, devices = load_model(folder).decoder, Devices(8)
    cut = devices.spread(decoder)
    total, layer = sum(leaf.nbytes for leaf in weights(decoder)), sum(leaf[0].nbytes for leaf in weights(decoder)[1:-1])
    tokens = devices.windows(TOKENS[:8])
    memory = perplexity._hidden.lower(cut, tokens, devices).compile().memory_analysis()
    assert memory.argument_size_in_bytes < 1.1 * total / 8
    assert memory.temp_size_in_bytes < 1.5 * layer  # with the activations
    hidden = perplexity._hidden(cut, tokens, devices)
    text = perplexity._nll.lower(cut, hidden, tokens, devices).compile().as_text()
    assert f"[256,{checkpoints.VOCAB}]" not in text
    assert f"f32[256,{checkpoints.VOCAB // 8}]" in text


def test_texts_of_a_model_that_is_cut_are_those_of_one_device(model):
    decoder = Devices(2, 4).spread(model.decoder)
    before = generation._advance._cache_size()
    ids = list(generate_ids(decoder, TOKENS[0], tokens=12))
    assert generation._advance._cache_size() == before + 2  # the prompt, and every further token
    assert ids == list(generate_ids(model.decoder, TOKENS[0], tokens=12))
    keys = jax.random.split(jax.random.key(0), 2)
    prompts = [TOKENS[0], TOKENS[1, :20]]
    together = generate_batch(decoder, prompts, keys, tokens=6)
    np.testing.assert_array_equal(together, generate_batch(model.decoder, prompts, keys, tokens=6))


def test_a_step_moves_activations_and_not_weights(folder):
    """The largest array that a generated token's program joins from its parts."""
    cut = Devices(8).spread(load_model(folder).decoder)
    leaves, structure = jax.tree.flatten(generation.in_steps(cut))
    cache = generation.empty_cache(cut, 1, 64)
    assert {leaf.sharding.spec for pair in cache.layers for leaf in pair} == {jax.P(None, ("data", "model"))}
    text = generation.step.lower(structure, leaves, TOKENS[:1, :1], cache).compile().as_text()
    moved = [line for line in text.splitlines() if " all-gather(" in line or " all-to-all(" in line]
    assert moved
    shapes = [line.split("f32[")[1].split("]")[0].split(",") for line in moved if "f32[" in line]
    assert max(math.prod(int(n) for n in shape if n) for shape in shapes) <= 512  # the widest activation


def test_on_tpus_each_device_multiplies_its_own_columns(folder, monkeypatch):
    """The Pallas product, in JAX's interpreter."""
    model = quantize(load_model(folder), "rtn-4", progress=False)
    cut = Devices(8).spread(model.decoder)
    monkeypatch.setattr(choose, "by_columns", partial(by_columns, interpret=True))
    layers = generation.in_steps(cut)[1]
    assert all(isinstance(layer.mlp.down.kernel.get_value(), ByColumns) for layer in layers)
    assert list(generate_ids(cut, TOKENS[0], tokens=4)) == list(generate_ids(model.decoder, TOKENS[0], tokens=4))


def test_a_packed_cache_is_cut_by_heads(folder):
    packed = Stored(Int(8, "channel", symmetric=True))
    decoder = with_cache(load_model(folder).decoder, CacheFormat(keys=packed, values=packed))
    cut = Devices(8).spread(decoder)
    cache = generation.empty_cache(cut, 2, 64)
    assert held(cache.layers, jax.devices()[0]) == cache.nbytes // 8
    assert list(generate_ids(cut, TOKENS[0], tokens=8)) == list(generate_ids(decoder, TOKENS[0], tokens=8))


@pytest.mark.parametrize("chosen", [None, "rtn-4", [("", "rtn-4"), ("embedding", "q8_0")]], ids=str)
def test_a_model_is_cut_as_it_is_loaded(folder, tmp_path, chosen):
    source, devices = folder, Devices(8)
    if chosen:
        source = tmp_path / "quantized"
        quantize(load_model(folder), chosen, progress=False).save(source)
    decoder = load_model(source, devices=devices, progress=False).decoder
    assert spread_over(decoder) == devices
    placed = devices.spread(load_model(source, progress=False).decoder)
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding and np.array_equal(a, b), decoder, placed)
    assert all(jax.tree.leaves(same))
