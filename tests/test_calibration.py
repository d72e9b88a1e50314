"""What calibration tells a block: token weights, lagging inputs, held-out windows, several passes."""

from dataclasses import replace

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import refused
from flax import nnx
from test_pipeline import GRID, PROJECTIONS, TAPS, TOKENS, block, energy, leaves, outlier_llama, same_bytes, taps

from jquant.calibration.loss_gradients import _Probed, drawn_tokens, token_gradients
from jquant.calibration.options import Options
from jquant.calibration.windows import Calibration
from jquant.composition import LossGradient
from jquant.io.load import load_model
from jquant.learning.objectives import next_token_loss
from jquant.methods import Method
from jquant.models.decoder import Decoder, blocks
from jquant.models.params import with_params
from jquant.models.rotary import rotary_table
from jquant.parallel.mesh import Devices
from jquant.pipeline.blocks import propagate_error, round_weight, seen_by
from jquant.pipeline.in_memory import quantize_decoder, quantize_decoders
from jquant.pipeline.plan import make_plan
from jquant.qtensor import dequantize
from jquant.ranges import LossSearch, MinMax, Search
from jquant.rounding import GPTQ, TwoSided
from jquant.stats import Gram
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


def gradients_of(decoder: Decoder, tokens, following) -> dict[str, np.ndarray]:
    """By plain differentiation, of each window's mean cross-entropy at projections' outputs: [layers, b, t, out]."""
    rotary, tokens = rotary_table(decoder.config, jnp.arange(tokens.shape[1])), jnp.asarray(tokens)

    def loss(probes):
        x = decoder.embed(tokens)
        for layer, of_layer in enumerate(blocks(decoder)):
            kernels = leaves(of_layer)
            probed = {path: _Probed(kernels[path], probe[layer]) for path, probe in probes.items()}
            x = with_params(of_layer, probed)(x, rotary)[0]
        return len(tokens) * next_token_loss(decoder.logits(decoder.norm(x)), following)

    kernels = leaves(block(decoder, 0))
    return jax.grad(loss)({path: jnp.zeros((2, *tokens.shape, kernels[path].shape[-1])) for path in PROJECTIONS})


def test_groups_of_outputs_are_rounded_with_their_own_gram_matrices(decoder):
    chosen = Method(GRID, Search("gram"), GPTQ(), token_weights=LossGradient(2))
    quantized, report = run(decoder, chosen)
    gradients = gradients_of(decoder, TOKENS, jnp.asarray(TOKENS))
    first, after = block(decoder, 0), leaves(block(quantized, 0))
    seen, kernels = taps(decoder, [first]), leaves(first)
    for path in PROJECTIONS:
        w, x = kernels[path], seen[TAPS[path]].reshape(-1, len(kernels[path]))
        halves, energies = np.split(np.arange(w.shape[1]), 2), 0.0
        for half in halves:
            weight = np.sum(np.asarray(gradients[path][0], np.float64)[..., half] ** 2, -1).ravel()
            gram = (x * weight[:, None]).T @ x / weight.sum()
            energies += np.trace(w[:, half].T @ gram @ w[:, half])
            seen_alone = {"gram": Gram(jnp.asarray(gram, jnp.float32), None)}
            alone, _, _ = round_weight(w[:, half], seen_alone, chosen=replace(chosen, token_weights="uniform"))
            same = np.asarray(dequantize(after[path])[:, half] == dequantize(alone))
            assert same.mean() > 0.98, path  # ties, and what follows them
        assert float(report[0, path].energy) == pytest.approx(energies, rel=1e-3), path


def test_the_gram_matrix_of_outputs_is_that_of_gradients_under_labels_the_model_draws(decoder):
    chosen = Method(GRID, MinMax(), TwoSided(), token_weights=LossGradient(labels="drawn"))
    plan = make_plan(decoder, chosen)
    calibration = Calibration(decoder, plan.layers, TOKENS, Options(batch=5))
    gradients = gradients_of(decoder, TOKENS, drawn_tokens(decoder(jnp.asarray(TOKENS)), jnp.asarray(TOKENS)))
    at = list(blocks(decoder))
    for layer in range(2):
        stats = calibration.observe(at[layer], at[layer], plan.layers[layer], layer)
        seen = taps(decoder, at[: layer + 1])
        for path in PROJECTIONS:
            g, x = np.asarray(gradients[path][layer], np.float64), seen[TAPS[path]].astype(np.float64)
            found = {name: s.value for name, s in seen_by(path, chosen, stats, decoder.config).items()}
            for name, rows, weight in (
                ("output_gram", g, np.sum(x**2, -1)),
                ("gram", x, np.sum(g**2, -1)),
            ):
                rows, weight = rows.reshape(-1, rows.shape[-1]), weight.ravel()
                wanted = (rows * weight[:, None]).T @ rows / weight.sum()
                # The gradients wait in bfloat16.
                least = 0.01 * np.abs(wanted).max()
                np.testing.assert_allclose(found[name], wanted, rtol=0.02, atol=least, err_msg=f"{path} {name}")
        calibration.advance(at[layer])


def test_gradients_under_drawn_labels_do_not_depend_on_batches_or_devices(decoder):
    layers = make_plan(decoder, Method(GRID, rounding=TwoSided(), token_weights=LossGradient(1, "drawn"))).layers
    ways = Options(batch=4), Options(batch=1), Options(batch=1, devices=Devices(2, 2))
    one, *others = (Calibration(decoder, layers, TOKENS, way) for way in ways)

    def found(calibration: Calibration) -> list[np.ndarray]:
        names = sorted(calibration.gradients[0])
        weights = [np.concatenate([batch[name] for batch in calibration.gradients], 1) for name in names]
        slopes = [np.asarray(slope, np.float32) for slope in calibration.slopes]
        return [*weights, *(np.concatenate(slopes[layer::2]) for layer in range(2))]

    for other in others:
        for wanted, ours in zip(found(one), found(other), strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=0.01, atol=1e-3 * np.abs(wanted).max())


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
