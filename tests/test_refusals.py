"""What would change a figure without a word: ids, windows, statistics, scales and figures that can't be right."""

from dataclasses import replace
from functools import partial

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import refused
from flax import nnx
from problems import rounded

import jquant
from jquant import AWQ, GPTQ, Int, LanguageModel, LossSearch, Method, Nearest, Refit, Search, Tuning, method
from jquant.calibration.options import Options
from jquant.calibration.windows import Key, check_stats
from jquant.evaluation.generation import generate_ids
from jquant.evaluation.outliers import observe
from jquant.evaluation.perplexity import Scores, score, score_from_disk
from jquant.io.load import ModelFile, open_model
from jquant.learning.clips import learn_clips
from jquant.learning.tuning import tune
from jquant.models.decoder import Decoder
from jquant.parallel.mesh import Devices
from jquant.pipeline.in_memory import quantize_decoder
from jquant.pipeline.plan import make_plan
from jquant.report import Report
from jquant.rounding import SolveInfo
from jquant.rounding.limits import check_scales
from jquant.stats import Gram

TOKENS = np.random.default_rng(3).integers(0, checkpoints.VOCAB, (4, 16), np.int32)
PLAIN = Method(Int(4, 32), rounding=GPTQ())


DOWN = r"layers\.1\.mlp\.down"  # one weight compiles faster than fourteen


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> ModelFile:
    return open_model(checkpoints.save(tmp_path_factory.mktemp("tiny"), checkpoints.llama()))


@pytest.fixture(scope="module")
def model(file) -> LanguageModel:
    return file.load()


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory) -> ModelFile:
    """Every weight is finite; what the second layer's down reads is not."""
    loud = checkpoints.llama()
    with torch.no_grad():
        loud.model.layers[1].mlp.gate_proj.weight.mul_(1e20)
        loud.model.layers[1].mlp.up_proj.weight.mul_(1e20)
    return open_model(checkpoints.save(tmp_path_factory.mktemp("loud"), loud))


def scaled(decoder: Decoder, factor: float) -> Decoder:
    """The decoder with the second layer's down multiplied by a factor."""
    changed = nnx.clone(decoder)
    kernel = changed.segments[0].mlp.down.kernel
    kernel.set_value(kernel.get_value().at[1].multiply(factor))
    return changed


# ---- tokens ---------------------------------------------------------------------------------------------------------

USES = {
    "quantize": lambda decoder, tokens: quantize_decoder(decoder, PLAIN, tokens),
    "quantize without a look at them": lambda decoder, tokens: quantize_decoder(decoder, "rtn", tokens),
    "score": lambda decoder, tokens: score(decoder, tokens),
    "outliers": lambda decoder, tokens: observe(decoder, tokens),
    "generate": lambda decoder, tokens: next(generate_ids(decoder, tokens[0], tokens=1)),
    "tune": lambda decoder, tokens: tune(decoder, decoder, tokens),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("bad", [-1, checkpoints.VOCAB, 10**9])
def test_an_id_that_the_embedding_does_not_have_is_named(model, use, bad):
    tokens = TOKENS.copy()
    tokens[0, 3] = bad
    with refused(f"token id {bad};", "from 0 to 319"):
        USES[use](model.decoder, tokens)


@pytest.mark.parametrize("use", USES)
def test_a_window_longer_than_the_models_context_is_refused(model, use):
    with refused("513", "512"):
        USES[use](model.decoder, np.zeros((1, 513), np.int32))


def test_a_text_is_not_scored_in_windows_longer_than_the_models_context(model):
    text = checkpoints.random_text(600, seed=1)
    for use in (jquant.perplexity, jquant.outliers):
        with refused("Evaluation windows are 600 tokens long", "512"):
            use(model, text, context=600, windows=1)
    with refused("Calibration windows are 600 tokens long", "512"):
        jquant.quantize(model, PLAIN, calibration=text, samples=1, context=600)


@pytest.mark.parametrize("bos", [999, -5])
def test_a_bos_id_outside_of_the_vocabulary_is_named(model, bos):
    odd = replace(model, tokenizer=replace(model.tokenizer, bos_id=bos, add_bos=True))
    with refused(f"token id {bos};"):
        jquant.perplexity(odd, checkpoints.random_text(50, seed=1), context=16, windows=1, bos=True)
    with refused(f"token id {bos};"):
        next(jquant.generate(odd, "abcd", tokens=2))


# ---- statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [PLAIN, Method(Int(4, 32), transform=AWQ(2)), method("w8a8_static")], ids=repr)
def test_statistics_that_overflow_are_refused_by_layer_and_input(overflowing, chosen):
    with refused("layers.1", "mlp_output", "overflow float32"):
        quantize_decoder(overflowing.load().decoder, [(DOWN, chosen)], TOKENS)


def test_statistics_that_overflow_are_refused_on_a_mesh(overflowing):
    with refused("layers.1", "mlp_output"):
        quantize_decoder(overflowing.load().decoder, [(DOWN, PLAIN)], TOKENS, Options(batch=1, devices=Devices(2, 2)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_number_that_is_not_finite_spoils_a_statistic(bad):
    gram = lambda value: Gram(jnp.eye(4).at[2, 2].set(value), None)  # noqa: E731
    keys = Key("gram", "uniform", Gram), Key("held_out", "norm", Gram)
    stats = lambda value: {"mlp_input": dict(zip(keys, (gram(1.0), gram(value)), strict=True))}  # noqa: E731
    check_stats(stats(1.0), 7, "float16")
    with refused("layers.7", "'held_out' of mlp_input", "'norm'", "float16"):
        check_stats(stats(bad), 7, "float16")


def test_clips_are_not_learned_from_gradients_that_are_not_finite(overflowing):
    with refused("LossSearch, step 1 of 2"):
        decoder, learned = overflowing.load().decoder, Method(Int(4, 32, scale="float32"), LossSearch(steps=2))
        learn_clips(decoder, make_plan(decoder, [(DOWN, learned)]).layers, TOKENS)


# ---- factorisations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", [GPTQ((0.01, 0.1)), Refit(GPTQ())], ids=repr)
def test_a_weight_rounded_plainly_for_want_of_a_factorisation_is_marked(rounding):
    """The largest finite numbers: damping them overflows, and no factorisation is finite."""
    format, rng = Int(4, 16), np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(32, 4)), jnp.float32)
    for size, expected in ((1.0, 0), (3e38, 1)):
        q, info = jax.jit(rounded, static_argnums=(0, 2))(rounding, w, format, size * jnp.eye(32), jnp.eye(32))
        assert int(info.fallback) == expected
    np.testing.assert_array_equal(q.codes, rounded(Nearest(), w, format)[0].codes)
    report = Report({(3, "mlp.up.kernel"): info, (4, "mlp.up.kernel"): SolveInfo(0, 0, 0, 0, 0)})
    assert report.fallbacks == ["layers.3.mlp.up.kernel"]


def test_an_error_that_could_not_be_propagated_is_marked(model, monkeypatch):
    propagated = Method(Int(4, 32), error_propagation=0.375)
    assert quantize_decoder(model.decoder, [(DOWN, propagated)], TOKENS)[1].fallbacks == []
    monkeypatch.setattr(jquant.pipeline.blocks, "propagate_error", lambda w, *_: w * jnp.nan)
    propagated = replace(propagated, error_propagation=0.3125)  # so that it is traced anew
    quantized, report = quantize_decoder(model.decoder, [(DOWN, propagated)], TOKENS)
    assert report.fallbacks == ["layers.1.mlp.down.kernel"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nnx.state(quantized)))


# ---- scales ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rtn", "int8", "rtn_float_zero", "q8_0", "q4_k"])
def test_weights_whose_scales_float16_does_not_hold_are_refused_by_their_names(model, name):
    chosen = Method(replace(method(name).format, **({} if name in ("int8", "q8_0", "q4_k") else {"group": 32})))
    with refused("layers.1.mlp.down.kernel", "exceed what float16 holds (65504)", "scale='float32'"):
        quantize_decoder(scaled(model.decoder, 1e9), [(r"mlp\.down", chosen)])
    with refused("layers.1.mlp.down.kernel", "too small for float16"):
        quantize_decoder(scaled(model.decoder, 1e-9), [(r"mlp\.down", chosen)])


@pytest.mark.parametrize("scale", ["float32", "bfloat16"])
def test_wider_scales_hold_any_weights(model, scale):
    for factor in (1e9, 1e-9):
        quantize_decoder(scaled(model.decoder, factor), [(r"mlp\.down", Method(Int(4, 32, scale=scale)))])


# One of each kind; all rows of METHODS are run by tests/test_pipeline.py and tests/test_contract.py.
KINDS = ["int8", "rtn_float_zero", "nf4_double", "mxfp4", "nvfp4", "q4_k", "q6_k"]


@pytest.mark.parametrize("name", KINDS)
def test_no_format_is_refused_on_weights_of_usual_sizes(name):
    """Nor where some scales and zeros are 0: of matrices of one value, whose scales are all equal, and of zeros."""
    format, normal = method(name).format, np.random.default_rng(0).standard_normal((256, 128))
    stack = jnp.stack(
        [0.003 * normal, 0.02 * normal, 0.5 * normal, *(np.full_like(normal, v) for v in (0.02, -0.02, 0))]
    )
    nearest = jax.jit(jax.vmap(lambda w: rounded(Nearest(), w, format)[0]))(stack)
    for index, w in enumerate(stack):
        check_scales({"w": jax.tree.map(lambda leaf: leaf[index], nearest)}, {"w": w})  # noqa: B023


# ---- tuning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["model", "block"])
def test_tuning_that_runs_away_writes_nothing(model, target):
    for steps, said in ((1, "its scales exceed"), (3, f"Tuning of the {target}, step 2 of 3")):
        wild = replace(method("rtn", group=32), tuning=(Tuning(steps, rate=1e4, target=target),))
        with refused(said, "layers.1" if target == "block" else ""):
            quantize_decoder(model.decoder, [(DOWN, wild)], TOKENS)


# ---- figures --------------------------------------------------------------------------------------------------------


def test_a_likelihood_that_is_not_finite_ends_in_an_error_that_names_its_window(model):
    broken = nnx.clone(model.decoder)
    broken.embedding.set_value(broken.embedding.get_value().at[7].set(jnp.nan))
    tokens = np.where(TOKENS == 7, 8, TOKENS)
    assert np.isfinite(score(broken, tokens, batch=2).perplexity)
    tokens[3, 5] = 7
    with refused("Window 3,", "NaN or infinite"):
        score(broken, tokens, batch=2)


def test_a_model_on_disk_whose_activations_overflow_has_no_perplexity(overflowing):
    with refused("Window 0,", "NaN or infinite"):
        score_from_disk(overflowing, TOKENS)


def test_an_infinite_perplexity_is_an_error():
    with refused("800 nats"):
        _ = Scores(np.full((2, 3), 800, np.float32), None, None, np.zeros((2, 4, 1))).perplexity


# ---- leakage --------------------------------------------------------------------------------------------------------


def test_the_calibration_text_is_not_scored_unless_the_caller_knows(model):
    first, second, third = (checkpoints.random_text(300, seed) for seed in (1, 2, 3))
    perplexity = partial(jquant.perplexity, context=32, windows=4)
    fit = partial(jquant.quantize, method=[(DOWN, Method(Int(8, 32), Search("diagonal")))], samples=4, context=32)
    quantized = fit(model, calibration=first)
    with refused("evaluation text occurs in the calibration text", "allow_overlap=True"):
        perplexity(quantized, first)
    with refused("first at token 0"):
        perplexity(quantized, first, bos=True)
    assert perplexity(quantized, first, allow_overlap=True).value > 1
    assert perplexity(quantized, second).value > 1
    assert jquant.quantize(model, "rtn", group=32, calibration=first).calibrated_on is None  # it looks at no text
    twice = fit(replace(model, calibrated_on=quantized.calibrated_on), calibration=second)
    for text in (first, second):
        with refused("calibration text"):
            perplexity(twice, text)
    assert perplexity(twice, third).value > 1
    assert "calibrated_on" not in repr(twice)


# ---- names as methods -----------------------------------------------------------------------------------------------


def test_a_name_stands_for_the_tables_method_wherever_one_is_taken(file, model, tmp_path):
    expected, quantized = (quantize_decoder(model.decoder, one)[0] for one in (method("rtn"), "rtn"))
    folder = jquant.quantize_to_folder(file, tmp_path / "rtn", "rtn").load().decoder
    for other in (quantized, folder):
        for ours, theirs in zip(*(jax.tree.leaves(nnx.state(one)) for one in (other, expected)), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    with refused("'gtpq'", "gptq"):
        jquant.quantize_to_folder(file, tmp_path / "none", "gtpq", TOKENS)
    assert not (tmp_path / "none").exists()
