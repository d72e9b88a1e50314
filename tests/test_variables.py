"""Quantized kernels are variables of a type of their own: training leaves them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_decoder import CONFIG
from test_pipeline import same_bytes

from jquant.learning.objectives import next_token_loss
from jquant.methods import method
from jquant.models.decoder import Decoder, blocks, with_blocks
from jquant.models.params import Packed, flat_params, with_params
from jquant.pipeline.in_memory import quantize_decoder
from jquant.qtensor import QTensor, dequantize

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 8), np.int32))
loss = nnx.jit(lambda decoder: next_token_loss(decoder(TOKENS), TOKENS))
slopes = nnx.jit(nnx.grad(lambda decoder: next_token_loss(decoder(TOKENS), TOKENS)))


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(CONFIG, nnx.Rngs(0))


@pytest.fixture
def quantized(decoder) -> Decoder:
    return quantize_decoder(decoder, method("rtn", 4, 16))[0]


def types(module: nnx.Module) -> dict[str, type]:
    """The variables' types by name."""
    return {".".join(map(str, path)): type(variable) for path, variable in nnx.to_flat_state(nnx.state(module))}


def assert_types_suit(module: nnx.Module) -> None:
    params = flat_params(module)
    suitable = {name: Packed if isinstance(leaf, QTensor) else nnx.Param for name, leaf in params.items()}
    assert types(module) == suitable
    assert set(suitable.values()) == {Packed, nnx.Param}


def test_quantized_kernels_are_packed_variables_and_float_ones_params(decoder, quantized):
    assert set(types(decoder).values()) == {nnx.Param}
    assert_types_suit(quantized)
    assert_types_suit(quantize_decoder(decoder, [("mlp", method("rtn", 4, 16))])[0])
    for block in blocks(quantized):
        assert_types_suit(block)


def test_float_values_in_a_quantized_kernels_place_are_params_again(quantized):
    params = flat_params(quantized)
    values = {name: jnp.zeros(leaf.shape) for name, leaf in params.items() if isinstance(leaf, QTensor)}
    assert set(types(with_params(quantized, values)).values()) == {nnx.Param}


def test_layers_that_differ_in_a_variables_type_are_not_stacked(decoder):
    first, second = blocks(decoder)
    assert len(with_blocks(decoder, [first, second]).segments) == 1
    second.mlp.up.kernel = Packed(second.mlp.up.kernel.get_value())
    parted = with_blocks(decoder, [first, second])
    assert [types(segment)["mlp.up.kernel"] for segment in parted.segments] == [nnx.Param, Packed]


@pytest.mark.parametrize("wrt", [nnx.Param, nnx.All(nnx.Param, nnx.PathContains("scale"))], ids=["params", "norms"])
def test_an_optimizer_of_params_trains_floats_only(quantized, wrt):
    before, start = jax.tree.map(np.array, flat_params(quantized)), loss(quantized)
    optimizer = nnx.Optimizer(quantized, optax.sgd(0.1), wrt=wrt)
    optimizer.update(quantized, slopes(quantized))
    after = flat_params(quantized)
    assert loss(quantized) < start
    moved = {name for name, leaf in after.items() if not same_bytes(leaf, before[name])}
    norms = {name for name in after if name.endswith("scale")}
    assert len(norms) == 3
    assert moved == (norms | {"embedding"} if wrt is nnx.Param else norms)


def test_gradients_of_params_are_those_of_the_dequantized_decoder(quantized):
    params, plain = flat_params(quantized), jax.jit(dequantize)
    values = {name: plain(leaf) for name, leaf in params.items() if isinstance(leaf, QTensor)}
    wanted, got = flat_params(slopes(with_params(quantized, values))), flat_params(slopes(quantized))
    assert got.keys() == wanted.keys() - values.keys()
    for name, gradient in got.items():
        np.testing.assert_allclose(gradient, wanted[name], rtol=1e-4, atol=1e-6)
