"""What calibration tells a block: token weights, lagging inputs, held-out windows, several passes."""

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import refused
from flax import nnx
from test_pipeline import GRID, PROJECTIONS, TAPS, TOKENS, block, energy, leaves, outlier_llama, same_bytes, taps

from jquant.calibration.options import Options
from jquant.calibration.token_weights import token_gradients
from jquant.calibration.windows import Calibration
from jquant.io.load import load_model
from jquant.methods import Method
from jquant.models.decoder import Decoder
from jquant.pipeline.blocks import propagate_error
from jquant.pipeline.in_memory import quantize_decoder, quantize_decoders
from jquant.qtensor import dequantize
from jquant.ranges import LossSearch, Search
from jquant.rounding import GPTQ
from jquant.transforms import AWQ, SmoothQuant

FITTED = Method(GRID, Search("diagonal"), GPTQ())
TORCH_NAMES = {
    "attention.q.kernel": "self_attn.q_proj",
    "attention.k.kernel": "self_attn.k_proj",
    "attention.v.kernel": "self_attn.v_proj",
    "attention.o.kernel": "self_attn.o_proj",
    "mlp.gate.kernel": "mlp.gate_proj",
    "mlp.up.kernel": "mlp.up_proj",
    "mlp.down.kernel": "mlp.down_proj",
}


def run(decoder, method, tokens=TOKENS, **options):
    return quantize_decoder(decoder, method, tokens, Options(**{"batch": 4, **options}))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Decoder:
    return load_model(checkpoints.save(tmp_path_factory.mktemp("tiny"), outlier_llama())).decoder


# ---- token weights --------------------------------------------------------------------------------------------------


def test_token_gradients_are_those_of_torch(decoder):
    torch_model, seen = outlier_llama(), {}
    for name, module in torch_model.named_modules():
        if name.endswith("_proj"):
            module.register_full_backward_hook(lambda _, __, slope, name=name: seen.update({name: slope[0]}))
    tokens = torch.tensor(TOKENS[:3], dtype=torch.long)
    torch_model(tokens, labels=tokens).loss.backward()
    ours = token_gradients(decoder, TOKENS[:3])
    assert ours.keys() == TORCH_NAMES.keys()
    for path, name in TORCH_NAMES.items():
        for layer in range(2):
            theirs = seen[f"model.layers.{layer}.{name}"].pow(2).sum(-1).numpy()
            np.testing.assert_allclose(ours[path][layer], theirs, rtol=2e-3, atol=1e-4 * theirs.max(), err_msg=path)


def test_loss_weights_count_each_projections_tokens_by_its_own_gradients(decoder):
    _, report = run(decoder, Method(GRID, Search("diagonal"), GPTQ(), token_weights="loss"))
    first, weights = block(decoder, 0), token_gradients(decoder, TOKENS)
    seen, kernels = taps(decoder, [first]), leaves(first)
    for path in PROJECTIONS:
        expected = energy(kernels[path], seen[TAPS[path]], weights[path][0].astype(np.float64))
        assert float(report[0, path].energy) == pytest.approx(expected, rel=1e-3), path


def test_norm_weights_make_every_token_as_long(decoder):
    _, report = run(decoder, Method(GRID, Search("diagonal"), GPTQ(), token_weights="norm"))
    first = block(decoder, 0)
    seen, kernels = taps(decoder, [first]), leaves(first)
    for path in PROJECTIONS:
        x = seen[TAPS[path]]
        assert float(report[0, path].energy) == pytest.approx(energy(kernels[path], x, 1 / (x**2).mean(-1)), rel=1e-3)


# ---- lagging inputs -------------------------------------------------------------------------------------------------


def test_a_propagated_target_is_the_least_squares_fit_to_the_float_outputs():
    rng = np.random.default_rng(0)
    exact, w = rng.normal(size=(200, 12)), rng.normal(size=(12, 5))
    seen = exact + 0.3 * rng.normal(size=exact.shape) @ rng.normal(size=(12, 12))
    gram, cross = seen.T @ seen / 200, seen.T @ (exact - seen) / 200
    damped = gram + 0.01 * np.trace(gram) / 12 * np.eye(12)
    step = np.linalg.solve(damped, cross @ w)
    ours = lambda alpha: propagate_error(*(jnp.asarray(a, jnp.float32) for a in (w, gram, cross)), alpha)  # noqa: E731
    for alpha in (0.5, 1.0):
        np.testing.assert_allclose(ours(alpha), w + alpha * step, rtol=2e-3, atol=2e-4)
    misses = [np.sum((seen @ np.asarray(ours(alpha), np.float64) - exact @ w) ** 2) for alpha in (0.0, 0.5, 1.0)]
    assert misses[0] > misses[1] > misses[2]


def test_error_propagation_brings_the_second_blocks_outputs_closer_to_the_float_ones(decoder):
    misses = {}
    for alpha in (0.0, 1.0):
        quantized, report = run(decoder, Method(GRID, Search("diagonal"), GPTQ(), error_propagation=alpha))
        exact = taps(decoder, [block(decoder, 0), block(decoder, 1)])["attention_input"]
        seen = taps(decoder, [block(quantized, 0), block(decoder, 1)])["attention_input"]
        kernel = "attention.q.kernel"
        w = np.asarray(leaves(block(decoder, 1))[kernel], np.float64)
        rounded = np.asarray(dequantize(leaves(block(quantized, 1))[kernel]), np.float64)
        misses[alpha] = np.sum((seen @ rounded - exact @ w) ** 2)
        assert np.isfinite(float(report[1, kernel].error))
    assert misses[1.0] < 0.97 * misses[0.0]


def test_the_first_block_has_no_error_to_make_up_for(decoder):
    with_it, without = (run(decoder, Method(GRID, rounding=GPTQ(), error_propagation=a))[0] for a in (1.0, 0.0))
    for path in PROJECTIONS:
        assert same_bytes(leaves(block(with_it, 0))[path], leaves(block(without, 0))[path]), path


def test_error_propagation_is_refused_with_float_inputs(decoder):
    with refused("error_propagation", "float"):
        run(decoder, Method(GRID, rounding=GPTQ(), error_propagation=0.5), inputs="float")


# ---- held-out windows -----------------------------------------------------------------------------------------------


def test_nothing_is_fitted_to_held_out_windows_and_the_report_has_the_error_there(decoder):
    held, report = run(decoder, FITTED, held_out=4)
    alone, plain = quantize_decoder(decoder, FITTED, TOKENS[:-4], options=Options(batch=4))
    assert same_bytes(leaves(held), leaves(alone))
    first = block(decoder, 0)
    seen, before, after = taps(decoder, [first]), leaves(first), leaves(block(held, 0))
    for path in PROJECTIONS:
        mass = seen["attention_mass"][-4:] if path in ("attention.k.kernel", "attention.v.kernel") else None
        x, w = seen[TAPS[path]][-4:], np.asarray(before[path], np.float64)
        delta = np.asarray(dequantize(after[path]), np.float64) - w
        assert float(report[0, path].held_out_energy) == pytest.approx(energy(w, x, mass), rel=1e-3), path
        assert float(report[0, path].held_out_error) == pytest.approx(energy(delta, x, mass), rel=2e-3), path
        assert np.isnan(plain[0, path].held_out_error)


def test_a_damping_chosen_by_held_out_windows_errs_no_more_there(decoder):
    dampings = (1e-3, 0.1, 1.0)
    chosen = run(decoder, Method(GRID, rounding=GPTQ(damping=dampings)), held_out=4, inputs="float")[1]
    each = [run(decoder, Method(GRID, rounding=GPTQ(damping=d)), held_out=4, inputs="float")[1] for d in dampings]
    for key, info in chosen.items():
        least = min(float(one[key].held_out_error) for one in each)
        assert float(info.held_out_error) == pytest.approx(least, rel=1e-3), key


def test_too_many_held_out_windows_and_none_are_refused(decoder):
    with refused("held_out=12"):
        run(decoder, FITTED, held_out=12)
    with refused("held_out"):
        run(decoder, Method(GRID, rounding=GPTQ(damping=(0.01, 0.1))))


def test_no_pass_at_all_is_refused(decoder):
    with refused("passes takes a whole number from 1, not 0"):
        run(decoder, FITTED, passes=0)


# ---- passes and transforms ------------------------------------------------------------------------------------------


def test_a_second_pass_fits_the_block_to_its_own_quantized_projections(decoder):
    once, _ = run(decoder, FITTED)
    _, report = run(decoder, FITTED, passes=2)
    after_first = block(once, 0)
    seen, kernels = taps(decoder, [after_first]), leaves(block(decoder, 0))
    moved = 0
    for path in PROJECTIONS:
        mass = seen["attention_mass"] if path in ("attention.k.kernel", "attention.v.kernel") else None
        expected = energy(kernels[path], seen[TAPS[path]], mass)
        assert float(report[0, path].energy) == pytest.approx(expected, rel=1e-3), path
        float_inputs = energy(kernels[path], taps(decoder, [block(decoder, 0)])[TAPS[path]], mass)
        moved += abs(expected / float_inputs - 1) > 1e-3
    assert moved >= 3  # o, gate, up and down read what the others made


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_smoothquant_folds_exactly(tmp_path, monkeypatch, kv_heads):
    from test_pipeline import forward, transformed

    decoder = load_model(checkpoints.save(tmp_path, outlier_llama(num_key_value_heads=kv_heads))).decoder
    folded = transformed(monkeypatch, decoder, Method(GRID, Search("diagonal"), transform=SmoothQuant()))
    before, after = leaves(decoder), leaves(folded)
    for path in PROJECTIONS:
        assert (
            np.abs(np.asarray(after[f"segments.0.{path}"]) / np.asarray(before[f"segments.0.{path}"]) - 1).max() > 0.1
        )
    assert checkpoints.relative(np.asarray(forward(folded, TOKENS)), np.asarray(forward(decoder, TOKENS))) <= 1e-4


def test_calibration_leaves_the_float_decoder_as_it_was(decoder):
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(decoder)))
    run(decoder, Method(GRID, rounding=GPTQ(), token_weights="loss", error_propagation=0.5), held_out=4, passes=2)
    assert same_bytes(before, nnx.to_pure_dict(nnx.state(decoder)))


# ---- several methods, one pass ---------------------------------------------------------------------------------------

SEVERAL = {
    "rtn": Method(GRID),
    "gptq": FITTED,
    "awq": Method(GRID, Search("gram"), transform=AWQ(steps=4)),
    "first": [(r"layers\.0\.", FITTED)],
    "learned": Method(GRID, LossSearch(steps=2)),
}


def test_methods_that_share_a_pass_get_what_each_gets_alone(decoder):
    together = quantize_decoders(decoder, SEVERAL, TOKENS, Options(batch=4, inputs="float"))
    assert list(together) == list(SEVERAL)
    for name, method in SEVERAL.items():
        alone, report = run(decoder, method, inputs="float")
        assert same_bytes(leaves(together[name][0]), leaves(alone)), name
        assert together[name][1].keys() == report.keys(), name


def test_methods_that_share_a_pass_share_its_forward_passes(decoder, monkeypatch):
    calls = []
    observe = Calibration.observe
    monkeypatch.setattr(Calibration, "observe", lambda *args, **kwargs: calls.append(args) or observe(*args, **kwargs))
    quantize_decoders(decoder, SEVERAL, TOKENS, Options(batch=4, inputs="float"))
    assert len(calls) == decoder.config.layers


def test_methods_cannot_share_inputs_that_each_quantizes_its_own_way(decoder):
    with refused("float"):
        quantize_decoders(decoder, SEVERAL, TOKENS, Options(inputs="quantized"))
