"""Quantizing block by block: what changes, what must not, what each block sees, exact folding, the issue's figures."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
from checkpoints import refused
from conftest import wikitext
from flax import nnx
from flax.nnx.traversals import flatten_mapping

import jquant
from jquant.calibration.options import Options
from jquant.data import windows
from jquant.evaluation.perplexity import score
from jquant.formats import Format
from jquant.io.load import LanguageModel, load_model
from jquant.methods import METHODS, Method, completed, method
from jquant.models.decoder import Decoder, blocks
from jquant.models.rotary import rotary_table
from jquant.pipeline.in_memory import quantize_decoder
from jquant.qtensor import QTensor, dequantize
from jquant.ranges import Search
from jquant.rounding import GPTQ, SolveInfo
from jquant.transforms import AWQ

forward = jax.jit(lambda decoder, tokens: decoder(tokens))

PROJECTIONS = {f"attention.{n}.kernel" for n in "qkvo"} | {f"mlp.{n}.kernel" for n in ("gate", "up", "down")}
TOKENS = np.random.default_rng(1).integers(0, checkpoints.VOCAB, (12, 64), np.int32)
GRID = jquant.Int(3, 32)


def outlier_llama(**changes) -> torch.nn.Module:
    """Two layers, grouped queries; a few input channels of every site far larger than the rest, as AWQ expects."""
    torch_model = checkpoints.llama(initializer_range=0.08, **changes)
    with torch.no_grad():
        for name, parameter in torch_model.named_parameters():
            if "layernorm" in name:
                parameter[::9] *= 8
            if "up_proj" in name or "v_proj" in name:
                parameter[::7] *= 5
    return torch_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    return load_model(checkpoints.save(tmp_path_factory.mktemp("tiny"), outlier_llama()))


@pytest.fixture(scope="module")
def decoder(model) -> Decoder:
    return model.decoder


def leaves(decoder: Decoder) -> dict[str, jax.Array | QTensor]:
    return {".".join(map(str, k)): v for k, v in flatten_mapping(nnx.to_pure_dict(nnx.state(decoder))).items()}


def same_bytes(a, b) -> bool:
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def transformed(monkeypatch, decoder, method):
    """The decoder that a method rounds, before it does."""
    nothing = SolveInfo(*[jnp.float32(0)] * 5)
    monkeypatch.setattr("jquant.pipeline.blocks.round_weight", lambda w, seen, chosen: (w, nothing, True))
    monkeypatch.setattr("jquant.pipeline.blocks.check_scales", lambda *_: None)
    return run(decoder, method)[0]


def run(decoder, method, tokens=TOKENS, **options):
    return quantize_decoder(decoder, method, tokens, Options(**{"batch": 4, **options}))


# ---- what changes, and what must not --------------------------------------------------------------------------------


def unlike_for_the_pipeline() -> list[str]:
    """One row of each kind that the pipeline treats in its own way; tests/test_contract.py has them all."""
    kinds = {}
    for name in METHODS:
        m = completed(name, 4, 32, False)
        nested = isinstance(m.format.scale, Format)
        kinds.setdefault((m.needs, type(m.range), m.transform, m.activation, nested, m.token_weights), name)
    return ["nf4", "rtn", *kinds.values()]


@pytest.mark.parametrize("name", unlike_for_the_pipeline())
def test_only_projections_become_qtensors_and_the_float_model_is_untouched(decoder, name):
    before = jax.tree.map(np.array, leaves(decoder))
    quantized, report = run(decoder, completed(name, 4, 32, False))
    after = leaves(decoder)
    assert before.keys() == after.keys()
    assert same_bytes(before, after)
    assert not any(isinstance(leaf, QTensor) for leaf in after.values())
    changed = leaves(quantized)
    assert {path for path, leaf in changed.items() if isinstance(leaf, QTensor)} == {
        f"segments.0.{p}" for p in PROJECTIONS
    }
    for path, leaf in changed.items():
        if isinstance(leaf, QTensor):
            assert leaf.shape == before[path].shape
        elif method(name).transform is None or not path.startswith("segments."):
            np.testing.assert_array_equal(leaf, before[path], err_msg=path)
    assert set(report) == {(layer, path) for layer in range(2) for path in PROJECTIONS}
    exact, ours = (np.asarray(forward(d, TOKENS[:1])) for d in (decoder, quantized))
    chosen = method(name)
    # Inputs in 8 bits suffer from this model's loud channels; 2 bits leave a random network little.
    most = 0.1 if chosen.format.bits == 8 and chosen.activation is None else {2: 1.2}.get(chosen.format.bits, 0.7)
    assert 1e-4 < np.linalg.norm(ours - exact) / np.linalg.norm(exact) < most


@pytest.mark.parametrize("name", ["int8", "rtn", "nf4"])
def test_logits_equal_transformers_with_the_oracles_weights(decoder, name):
    """The whole path, from grid to logits: torch runs on weights that the float64 oracle rounded."""
    torch_model = outlier_llama()
    state = {key: value.clone() for key, value in torch_model.state_dict().items()}
    for key in state:
        if "_proj" in key:
            state[key] = torch.tensor(rounded_by_oracle(state[key].numpy().T, name).T.copy(), dtype=torch.float32)
    torch_model.load_state_dict(state)
    ours = np.asarray(forward(run(decoder, completed(name, 4, 32, False))[0], TOKENS[:1]))
    assert checkpoints.relative(ours, checkpoints.logits(torch_model, TOKENS[:1])) <= 1e-4


def rounded_by_oracle(w: np.ndarray, name: str) -> np.ndarray:
    if name == "nf4":
        return np.stack([oracle.nf4_quantize(column)[2] for column in w.T], axis=1)
    bits, group, symmetric = (8, None, True) if name == "int8" else (4, 32, False)
    scale, zero = oracle.int_grid(w, bits, group, symmetric, np.float16)
    return oracle.int_round(w, scale, zero, bits, group, symmetric)[1]


def test_progress_counts_blocks(decoder):
    calls = []
    run(decoder, method("rtn", group=32), progress=lambda *call, **_: calls.append(call))
    assert calls == [("quantize", 1, 2), ("quantize", 2, 2)]


def test_batch_size_changes_codes_hardly_at_all(decoder):
    """Sums are taken in another order, so a code next to a tie may flip."""
    small, large = (leaves(run(decoder, method("gptq", group=32), batch=b)[0]) for b in (5, 12))
    for path in PROJECTIONS:
        a, b = (np.asarray(x[f"segments.0.{path}"].codes) for x in (small, large))
        assert (a != b).mean() < 0.02, path


def test_same_seed_same_bytes_another_seed_others(model):
    text = checkpoints.random_text(900, seed=6)
    quantize = partial(jquant.quantize, model, "gptq", group=32, calibration=text, samples=8, context=64)
    first, again, other = quantize(seed=0), quantize(seed=0), quantize(seed=1)
    assert same_bytes(leaves(first.decoder), leaves(again.decoder))
    assert not same_bytes(leaves(first.decoder), leaves(other.decoder))
    assert len(first.report) == 14
    assert model.report == {}


@pytest.mark.parametrize("name", ["rtn", "awq", "gptq"])
def test_a_bfloat16_model_stays_one(model, tmp_path, name):
    small = checkpoints.llama(num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=2)
    decoder = load_model(checkpoints.save(tmp_path, small), dtype="bfloat16").decoder
    quantized, _ = run(decoder, method(name, group=16))
    for path, leaf in leaves(quantized).items():
        assert isinstance(leaf, QTensor) or leaf.dtype == jnp.bfloat16, path
    logits = forward(quantized, TOKENS[:1])
    assert logits.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(logits, np.float32)).all()


# ---- what each block sees -------------------------------------------------------------------------------------------


def block(decoder: Decoder, index: int):
    return list(blocks(decoder))[index]


def taps(decoder: Decoder, layers: list) -> dict[str, jax.Array]:
    """Float64 inputs that the last block's projections read when the tokens run through `layers`."""
    rotary, x = rotary_table(decoder.config, jnp.arange(TOKENS.shape[1])), decoder.embed(jnp.asarray(TOKENS))
    for one in layers:
        x, seen, _ = jax.jit(lambda b, x: b(x, rotary))(one, x)
    return {name: np.asarray(tap, np.float64) for name, tap in seen.items()}


TAPS = {
    "attention.q.kernel": "attention_input",
    "attention.k.kernel": "attention_input",
    "attention.v.kernel": "attention_input",
    "attention.o.kernel": "attention_output",
    "mlp.gate.kernel": "mlp_input",
    "mlp.up.kernel": "mlp_input",
    "mlp.down.kernel": "mlp_output",
}


def energy(w: np.ndarray, x: np.ndarray, mass: np.ndarray | None = None) -> float:
    """trace(Wᵀ H W) with H the mean of x xᵀ, weighted by `mass`: the outputs' mean squared norm."""
    squares = ((x @ np.asarray(w, np.float64)) ** 2).sum(-1)
    return float(np.average(squares, weights=mass))


@pytest.mark.parametrize("name", ["gptq", "gptq_plain"])
def test_the_second_block_is_fitted_to_the_quantized_first_ones_outputs(decoder, name):
    quantized, report = run(decoder, method(name, bits=3, group=32))
    second = block(decoder, 1)
    seen = taps(decoder, [block(quantized, 0), second])
    unquantized = taps(decoder, [block(decoder, 0), second])
    weights = leaves(second)
    for path in PROJECTIONS:
        weighted = name == "gptq" and path in ("attention.k.kernel", "attention.v.kernel")
        of = lambda t: energy(weights[path], t[TAPS[path]], t["attention_mass"] if weighted else None)  # noqa: B023, E731
        assert float(report[1, path].energy) == pytest.approx(of(seen), rel=1e-4), path
        assert of(seen) != pytest.approx(of(unquantized), rel=1e-3), path


def test_the_first_block_and_each_site_within_a_block_see_float_inputs(decoder):
    _, report = run(decoder, method("gptq_plain", bits=3, group=32))
    first = block(decoder, 0)
    seen, weights = taps(decoder, [first]), leaves(first)
    for path in PROJECTIONS:
        assert float(report[0, path].energy) == pytest.approx(energy(weights[path], seen[TAPS[path]]), rel=1e-4), path


def test_attention_mass_weights_k_and_v_and_nothing_else(decoder):
    weighted, plain = (
        run(decoder, Method(GRID, Search("diagonal"), GPTQ(), token_weights=by)) for by in ("attention", "uniform")
    )
    first = block(decoder, 0)
    seen, weights = taps(decoder, [first]), leaves(first)
    assert seen["attention_mass"].std() > 0.1  # else weighting could not be told from not weighting
    for path in PROJECTIONS:
        a, b = (leaves(block(q, 0))[path] for q, _ in (weighted, plain))
        assert same_bytes(a, b) == (path not in ("attention.k.kernel", "attention.v.kernel")), path
    for path in ("attention.k.kernel", "attention.v.kernel"):
        expected = energy(weights[path], seen["attention_input"], seen["attention_mass"])
        assert float(weighted[1][0, path].energy) == pytest.approx(expected, rel=1e-4)


def test_reported_errors_are_those_of_the_weights_returned(decoder):
    quantized, report = run(decoder, method("gptq_plain", bits=3, group=32))
    first = block(decoder, 0)
    seen, float_weights, rounded = taps(decoder, [first]), leaves(first), leaves(block(quantized, 0))
    for path in PROJECTIONS:
        delta = np.asarray(float_weights[path], np.float64) - np.asarray(dequantize(rounded[path]), np.float64)
        assert float(report[0, path].error) == pytest.approx(energy(delta, seen[TAPS[path]]), rel=1e-3), path


def test_gptq_leaves_less_output_error_than_rounding_to_nearest_in_every_weight(decoder):
    _, nearest = run(decoder, Method(GRID, Search("diagonal")))
    _, gptq = run(decoder, Method(GRID, Search("diagonal"), GPTQ()))
    assert nearest.keys() == gptq.keys()
    for key in nearest:
        ours, theirs = (float(report[key].error / report[key].energy) for report in (gptq, nearest))
        assert 0 < ours < theirs, key


# ---- AWQ ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_awq_folds_exactly(tmp_path, monkeypatch, kv_heads):
    """Logits stay although every kernel has moved; with 2 key/value heads, pairs of heads share channels of v."""
    decoder = load_model(checkpoints.save(tmp_path, outlier_llama(num_key_value_heads=kv_heads))).decoder
    folded = transformed(monkeypatch, decoder, Method(GRID, transform=AWQ(steps=4)))
    before, after = leaves(decoder), leaves(folded)
    for path in PROJECTIONS:
        moved = np.abs(np.asarray(after[f"segments.0.{path}"]) / np.asarray(before[f"segments.0.{path}"]) - 1)
        assert (moved.max((1, 2)) > 0.05).all(), path
    assert checkpoints.relative(np.asarray(forward(folded, TOKENS)), np.asarray(forward(decoder, TOKENS))) <= 1e-4


def test_awq_lowers_the_output_error_where_channels_differ(decoder):
    """Against the same min-max grid without the transform, which keeps the energy the error is set against."""
    _, plain = run(decoder, Method(GRID, Search("diagonal", steps=1)))
    _, awq = run(decoder, Method(GRID, transform=AWQ(steps=4)))
    for path in ("attention.q.kernel", "mlp.gate.kernel", "mlp.up.kernel"):
        a, b = (float(report[0, path].error / report[0, path].energy) for report in (awq, plain))
        assert a < b, path


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gptq", "gptq_plain", "awq"])
def test_a_method_that_looks_at_activations_is_refused_without_text(model, name):
    with refused(name, "calibration"):
        jquant.quantize(model, name, group=32)
    with refused("calibration"):
        quantize_decoder(model.decoder, method(name, group=32))


def test_a_quantized_model_is_refused(model):
    quantized = jquant.quantize(model, "rtn", group=32)
    with refused("already"):
        jquant.quantize(quantized, "rtn", group=32)


def test_an_unknown_method_names_the_three_nearest(model):
    with refused("'gtpq'", "the nearest names are gptq, gptq_a8, gptq_loss."):
        jquant.quantize(model, "gtpq")


@pytest.mark.parametrize(
    ("options", "part"),
    [({"group": 4096}, "4096"), ({"bits": 1}, "1"), ({"bits": 9}, "9"), ({"group": 0}, "0"), ({"group": -8}, "-8")],
)
def test_an_impossible_width_or_group_is_refused(model, options, part):
    with refused(part):
        jquant.quantize(model, "rtn", **({"group": 32} | options))


def test_a_short_calibration_text_is_refused(model):
    with refused("too few"):
        jquant.quantize(model, "gptq", group=32, calibration="abcd")
    with refused("calibration.samples="):
        jquant.quantize(model, "gptq", group=32, calibration=checkpoints.random_text(300, seed=1), context=64)


# ---- the default model ----------------------------------------------------------------------------------------------


def evaluation(model: LanguageModel, count: int) -> np.ndarray:
    return windows(model.tokenizer.encode(wikitext("wiki.test.noblank.raw")), 1024, count)


@pytest.mark.optimised
def test_gptq_beats_rounding_to_nearest_on_the_default_model(default_model):
    tokens, values = evaluation(default_model, 2), {}
    options = {"symmetric": True, "calibration": jquant.load_text("c4_utf8"), "samples": 8}
    for name in ("rtn", "gptq"):
        values[name] = score(jquant.quantize(default_model, name, **options).decoder, tokens).perplexity
    assert score(default_model.decoder, tokens).perplexity < values["gptq"] < values["rtn"]


# 32 windows of wiki.test.noblank.raw, 128 × 512 calibration tokens of c4_utf8, group 64. Bounds: the project's issue.
FIGURES = [
    ("rtn", 4, True, 34.11, 34.71),
    ("rtn", 4, False, 31.18, 31.78),
    ("gptq", 4, False, 24.0, 27.0),
    ("gptq", 4, True, 24.0, 27.5),
    ("awq", 4, False, 24.0, 28.9),
    ("awq", 4, True, 24.0, 30.9),
    ("gptq", 3, False, 24.0, 45.0),
]


@pytest.mark.optimised
@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits", "symmetric", "low", "high"), FIGURES)
def test_figures_of_the_issue(default_model, name, bits, symmetric, low, high):
    options = {"bits": bits, "symmetric": symmetric, "calibration": jquant.load_text("c4_utf8")}
    quantized = jquant.quantize(default_model, name, **options)
    assert low <= score(quantized.decoder, evaluation(default_model, 32)).perplexity <= high


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # any `import torch` now raises ImportError
import jquant
model = jquant.load_model(sys.argv[1])
quantized = jquant.quantize(model, "rtn")
print(float(jquant.perplexity(quantized, "The quick brown fox jumps over the lazy dog. " * 20, context=64, windows=1)))
print(len(list(jquant.generate(quantized, "The quick", tokens=3))))
assert sys.modules["torch"] is None
"""


def test_jquant_runs_where_torch_is_absent(tmp_path):
    checkpoints.save(tmp_path, checkpoints.llama())
    command = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    value, pieces = done.stdout.split()
    assert 1 < float(value) < np.inf
    assert 1 <= int(pieces) <= 3
