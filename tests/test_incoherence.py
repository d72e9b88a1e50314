"""Weights rotated on both sides: exact, undone by every product, kept by checkpoints, refused by most exports."""

from dataclasses import replace

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import refused
from problems import problem
from test_pipeline import TOKENS, forward, leaves, outlier_llama, run

import jquant
from jquant import E8P, GPTQ, RMS, Incoherence, Int, Method, QTensor, Search, Tuning
from jquant.activations import Activation
from jquant.calibration.options import Options
from jquant.io.load import LanguageModel, load_model
from jquant.learning.tuning import split
from jquant.parallel.mesh import Devices
from jquant.pipeline.blocks import round_weight
from jquant.pipeline.in_memory import quantize_decoder
from jquant.qtensor import Turned, dequantize, prepared, turned_back
from jquant.rotations import matrix
from jquant.stats import AbsMax, Gram

E8 = Method(E8P(), RMS(), GPTQ(), incoherence=Incoherence())
INT = Method(Int(4, 32), Search("diagonal"), GPTQ(), incoherence=Incoherence(3))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    return load_model(checkpoints.save(tmp_path_factory.mktemp("tiny"), outlier_llama()))


@pytest.fixture(scope="module")
def quantized(model) -> LanguageModel:
    return replace(model, decoder=run(model.decoder, E8)[0])


@pytest.mark.parametrize("shape", [(40, 16), (36, 96), (7, 5)])
def test_turning_is_the_product_with_both_matrices_and_turning_back_undoes_it(shape):
    w, gram, _ = problem(shape)
    incoherence = Incoherence(2)
    inputs, outputs = (np.asarray(matrix(each), np.float64) for each in incoherence.rotations(shape))
    np.testing.assert_allclose(inputs @ inputs.T, np.eye(shape[0]), atol=1e-5)
    turned = incoherence.turn(w)
    np.testing.assert_allclose(turned, inputs.T @ np.asarray(w, np.float64) @ outputs, atol=1e-6)
    np.testing.assert_allclose(turned_back(turned, incoherence.rotations(shape)), w, atol=1e-6)
    ours = incoherence.turn_gram(gram)
    np.testing.assert_array_equal(ours, ours.T)
    np.testing.assert_allclose(ours, inputs.T @ np.asarray(gram, np.float64) @ inputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [E8, INT, replace(INT, activation=Activation())], ids=["e8p", "int", "a8"])
def test_products_and_values_are_those_of_the_unturned_weight(method):
    w, gram, _ = problem((64, 48))
    q, info, fits = round_weight(w, {"gram": Gram(gram, jnp.float32(1))}, chosen=method)
    assert fits
    assert q.rotations == method.incoherence.rotations(w.shape)
    delta = np.asarray(dequantize(q), np.float64) - np.asarray(w)
    assert float(info.error) == pytest.approx(np.sum(delta * (np.asarray(gram, np.float64) @ delta)), rel=1e-3)
    assert float(info.energy) == pytest.approx(float(jnp.sum(w * (gram @ w))), rel=1e-3)
    off = 0.02 if method.activation else 1e-5
    for x in (jax.random.normal(jax.random.key(0), (1, 64)), jax.random.normal(jax.random.key(1), (2, 3, 64))):
        wanted = np.asarray(x @ dequantize(q))
        for kernel in (q, prepared(q)):
            np.testing.assert_allclose(x @ kernel, wanted, atol=off * np.abs(wanted).max())
    assert isinstance(prepared(q), QTensor if method is E8 else Turned)


def test_outliers_cost_less_once_they_are_spread():
    """One large weight in each group takes the grid of all others, unless it is spread over the matrix."""
    w = np.array(problem((64, 48))[0])
    w[::32] *= 30
    off = {}
    for incoherence in (None, Incoherence()):
        q, _, _ = round_weight(jnp.asarray(w), {}, chosen=Method(Int(4, 32), incoherence=incoherence))
        off[incoherence] = np.linalg.norm(np.asarray(dequantize(q)) - w)
    assert off[Incoherence()] < 0.7 * off[None]


def test_a_quantized_model_is_that_of_its_values(quantized):
    """Logits, and those of prepared weights, of cached decoding, and of a folder that was saved and loaded."""
    decoder = quantized.decoder
    kernels = {path: leaf for path, leaf in leaves(decoder).items() if isinstance(leaf, QTensor)}
    assert len(kernels) == 7
    assert all(leaf.rotations for leaf in kernels.values())
    plain = jax.tree.map(
        lambda leaf: dequantize(leaf) if isinstance(leaf, QTensor) else leaf,
        dict(leaves(decoder)),
        is_leaf=lambda leaf: isinstance(leaf, QTensor),
    )
    wanted = forward(jquant.models.params.with_params(decoder, plain), TOKENS[:2])
    for same in (decoder, prepared(decoder)):
        assert checkpoints.relative(forward(same, TOKENS[:2]), wanted) < 1e-5
    ids = list(jquant.evaluation.generation.generate_ids(decoder, TOKENS[0, :9], tokens=8))
    longer = np.concatenate([TOKENS[0, :9], ids])[None]
    assert ids == np.argmax(np.asarray(forward(decoder, longer))[0, 8:-1], -1).tolist()


def test_a_saved_model_comes_back_bit_for_bit_and_a_rotation_that_does_not_fit_is_refused(quantized, tmp_path):
    quantized.save(tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    ours, theirs = (jax.tree.flatten(leaves(each.decoder)) for each in (quantized, loaded))
    assert ours[1] == theirs[1]  # formats and rotations among it
    for a, b in zip(ours[0], theirs[0], strict=True):
        np.testing.assert_array_equal(a, b)
    item = next((tmp_path / "saved" / "blocks").glob("*/item.json"))
    text = item.read_text()
    assert '"size": 64' in text
    item.write_text(text.replace('"size": 64', '"size": 32', 1))
    with refused("item.json"):
        load_model(tmp_path / "saved")


def test_only_plain_weights_are_exported(quantized, tmp_path):
    for format in ("gptq", "compressed-tensors", "gguf"):
        with refused("layers.0.attention.", "rotated", "plain"):
            jquant.export(quantized, tmp_path / format, format=format)
        assert not (tmp_path / format).exists()
    jquant.export(quantized, tmp_path / "plain", format="plain")
    ours, theirs = (forward(each.decoder, TOKENS[:1]) for each in (quantized, load_model(tmp_path / "plain")))
    assert checkpoints.relative(theirs, ours) < 1e-4


def test_a_mesh_gives_the_codes_of_one_device(model):
    both = [quantize_decoder(model.decoder, E8, TOKENS, Options(batch=4, devices=d))[0] for d in (None, Devices(2, 2))]
    codes = [[leaf.codes for leaf in leaves(each).values() if isinstance(leaf, QTensor)] for each in both]
    unlike = [np.mean(np.asarray(a) != np.asarray(b)) for a, b in zip(*codes, strict=True)]
    assert max(unlike) < 0.02  # sums in another order, and what a tie changes after it


def test_scales_are_learned_in_the_rotated_basis(model, quantized):
    student = split(quantized.decoder)
    assert all(kernel.rotations for kernel in student.kernels.values())
    x = jax.random.normal(jax.random.key(0), (3, 64))
    q = leaves(quantized.decoder)["segments.0.attention.q.kernel"]
    one = jax.tree.map(lambda leaf: leaf[0], q)
    fake = replace(
        jax.tree.map(lambda leaf: leaf[0], jquant.learning.fake_quant.FakeQuantized.of(q)), compute="float32"
    )
    np.testing.assert_allclose(x @ fake, x @ one, rtol=1e-4, atol=1e-4)
    for path, kernel in student.kernels.items():
        np.testing.assert_array_equal(kernel.pack().codes, leaves(quantized.decoder)[".".join(map(str, path))].codes)
    for tuning in (Tuning(4, 2, rate=0.02), Tuning(4, 2, rate=0.02, weight_rate=0.02)):
        tuned = run(model.decoder, replace(E8, tuning=(tuning,)))[0]
        exact, before, after = (np.asarray(forward(d, TOKENS)) for d in (model.decoder, quantized.decoder, tuned))
        assert np.linalg.norm(after - exact) < np.linalg.norm(before - exact)
    with refused('begin="weights"'):
        run(model.decoder, replace(E8, tuning=(Tuning(2, 2, weight_rate=0.01, begin="weights"),)))


def test_what_is_unknown_of_rotated_inputs_is_refused():
    with refused("Incoherence", "abs_max"):
        Method(Int(4, 32), incoherence=Incoherence(), activation=Activation(Int(8, "tensor", True), static=True))
    with refused("Incoherence", "clips"):
        Method(Int(4, 32), jquant.LossSearch(), incoherence=Incoherence())
    with refused("seed"):
        Incoherence(-1)
    assert AbsMax.name == "abs_max"
