"""Outliers: every figure against float64 NumPy on torch's activations, definitions, refusals, the command."""

import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import checkpoints
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import refused
from commands import run_here, run_in_process_of_its_own
from conftest import wikitext
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jquant
from jquant.data import windows
from jquant.evaluation.outliers import (
    INPUTS,
    Criteria,
    InputOutliers,
    Outliers,
    first_tokens,
    observe,
    outliers,
    wasted_levels,
)
from jquant.io.load import LanguageModel, load_model

ROOT = Path(__file__).parents[1]
HOOKS = {"attention_input": "q_proj", "attention_output": "o_proj", "mlp_input": "gate_proj", "mlp_output": "down_proj"}
READERS = {
    "attention_input": ("q_proj", "k_proj", "v_proj"),
    "attention_output": ("o_proj",),
    "mlp_input": ("gate_proj", "up_proj"),
    "mlp_output": ("down_proj",),
}
TOKENS = np.random.default_rng(1).integers(2, checkpoints.VOCAB, (6, 64), np.int32)
TOKENS[2, :3] = TOKENS[2, 0]  # a window that begins with a run
THRESHOLD, BITS, GROUP = 2.0, 4, 32


def outlier_llama() -> torch.nn.Module:
    """Two layers with grouped queries and a few loud channels."""
    model = checkpoints.llama(hidden_size=64, intermediate_size=96, initializer_range=0.1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter[::9] *= 6
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    return load_model(checkpoints.save(tmp_path_factory.mktemp("tiny"), outlier_llama()))


@pytest.fixture(scope="module")
def seen() -> dict[tuple[int, str], np.ndarray]:
    """What torch's layers read, `[windows, context, in]`, and `attention_mass`, `[windows, context]`, in float64."""
    oracle, seen = outlier_llama().double(), {}
    oracle.set_attn_implementation("eager")

    def keep(key, _, inputs):
        seen[key] = inputs[0].numpy()

    for layer, block in enumerate(oracle.model.layers):
        block.register_forward_pre_hook(partial(keep, (layer, "residual")))
        for name, projection in HOOKS.items():
            part = block.self_attn if name.startswith("attention") else block.mlp
            getattr(part, projection).register_forward_pre_hook(partial(keep, (layer, name)))
    with torch.no_grad():
        attentions = oracle(torch.as_tensor(TOKENS, dtype=torch.int64), output_attentions=True).attentions
    for layer, weights in enumerate(attentions):
        seen[layer, "attention_mass"] = weights.numpy().mean(1).sum(1)
    return seen


@pytest.fixture(scope="module")
def found(model) -> Outliers:
    inputs, received = observe(model.decoder, TOKENS, Criteria(THRESHOLD, BITS, GROUP), batch=4)
    return Outliers(inputs, received, TOKENS, Criteria(THRESHOLD, BITS, GROUP), False)


def waste_by_counting(group: np.ndarray, bits: int) -> float:
    """Counts the levels of the grid that lie beyond the farthest one that a member other than the largest rounds to."""
    levels = np.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1))
    sizes = np.sort(np.abs(np.asarray(group, np.float64)))
    if sizes[-1] == 0:
        return 0.0
    grid = levels * sizes[-1] / levels[-1]
    reached = max(np.argmin(np.abs(grid[grid >= 0] - size)) for size in sizes[:-1])
    return float((np.abs(levels) > reached).mean())


# ---- against torch and NumPy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", INPUTS)
def test_every_figure_equals_numpys_on_torchs_activations(found, seen, layer, name):
    x, ours = np.abs(seen[layer, name]), found[layer, name]
    close = partial(np.testing.assert_allclose, rtol=2e-4)
    close(ours.channel_max, x.max((0, 1)))
    close(ours.token_max, x.max(-1))
    close(ours.token_energy, (x**2).sum(-1))
    assert (ours.channel_share == (x >= THRESHOLD).mean((0, 1))).all()
    assert ours.max == pytest.approx(x.max(), rel=2e-4)
    assert ours.median == pytest.approx(np.median(x), rel=1 / 32)
    assert ours.ratio == ours.max / ours.median
    gram = np.einsum("bti,btj->ij", x, x)
    assert ours.first_token_energy == pytest.approx((x[:, 0] ** 2).sum() / np.trace(gram), rel=2e-4)
    run = (x[:, 0] ** 2).sum() + (x[2, 1:3] ** 2).sum()
    assert ours.sink_energy == pytest.approx(run / np.trace(gram), rel=2e-4)
    features = np.flatnonzero((x >= THRESHOLD).mean((0, 1)) >= 0.06)
    assert ours.outlier_features.tolist() == features.tolist()
    assert ours.mixed_precision_features.tolist() == np.flatnonzero((x >= THRESHOLD).any((0, 1))).tolist()
    assert ours.outlier_tokens.tolist() == np.argwhere((x >= THRESHOLD).any(-1)).tolist()
    largest = np.argsort(-x.max(-1).ravel())[:3]
    assert ours.largest_tokens(3).tolist() == np.stack(np.divmod(largest, x.shape[1]), -1).tolist()


def test_the_oracle_sees_outliers_to_find(found):
    """Else the comparison above would hold of empty lists."""
    features = [len(found[1, name].outlier_features) for name in INPUTS]
    assert max(features) > 3
    assert any(0 < len(found[1, name].mixed_precision_features) < 64 for name in INPUTS)


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_received_equals_torchs(found, seen, layer):
    mass = seen[layer, "attention_mass"]
    np.testing.assert_allclose(found.attention_received[layer], mass, rtol=2e-4)
    np.testing.assert_allclose(found.attention_received[layer].sum(-1), TOKENS.shape[1], rtol=1e-5)
    assert found.sink_attention[layer] == pytest.approx((mass[:, 0].sum() + mass[2, 1:3].sum()) / mass.sum(), rel=2e-4)


@pytest.mark.parametrize("name", INPUTS)
def test_wasted_levels_equal_a_count_of_the_grids_levels(found, seen, name):
    """Float32 and float64 may disagree where a member lies midway between two levels: on 1 group in a thousand."""
    groups = lambda rows: np.split(rows, range(GROUP, rows.shape[-1], GROUP), -1)  # noqa: E731
    tokens = seen[1, name].reshape(-1, seen[1, name].shape[-1])[:96]
    expected = [np.mean([waste_by_counting(group, BITS) for group in groups(row)]) for row in tokens]
    ours = found[1, name].token_waste.ravel()[:96]
    assert (np.abs(ours - expected) > 1e-6).mean() <= 0.01
    if name == "residual":
        assert found[1, name].weight_waste is None
        return
    state = {key.split(".")[-2]: value.numpy() for key, value in outlier_llama().model.layers[1].state_dict().items()}
    rows = np.concatenate([state[reader] for reader in READERS[name]])
    counted = np.array([[waste_by_counting(group, BITS) for group in groups(row)] for row in rows])
    assert (np.abs(wasted_levels(jnp.array(rows), BITS, GROUP) - counted) > 1e-6).mean() <= 1e-3
    mean, worst = found[1, name].weight_waste
    assert mean == pytest.approx(counted.mean(), rel=1e-3)
    assert worst == pytest.approx(counted.max(), rel=1e-6)


def test_batches_of_any_size_find_the_same(model, found):
    inputs, received = observe(model.decoder, TOKENS, Criteria(THRESHOLD, BITS, GROUP), batch=6)
    np.testing.assert_allclose(received, found.attention_received, rtol=1e-4)
    for key, one in inputs.items():
        np.testing.assert_allclose(one.channel_max, found[key].channel_max, rtol=1e-4, err_msg=str(key))
        np.testing.assert_allclose(one.token_energy, found[key].token_energy, rtol=1e-4, err_msg=str(key))
        assert one.histogram.sum() == found[key].histogram.sum() == TOKENS.size * len(one.channel_max)


def test_repeats_of_the_first_token_have_its_state(found):
    """Why they count as one sink: causal attention among equal values returns that value."""
    for key, one in found.inputs.items():
        np.testing.assert_allclose(one.token_energy[2, 1:3], one.token_energy[2, 0], rtol=1e-4, err_msg=str(key))
        assert abs(one.token_energy[2, 3] / one.token_energy[2, 0] - 1) > 1e-3


# ---- definitions ----------------------------------------------------------------------------------------------------


def one_input(x: np.ndarray, threshold: float = 6.0) -> InputOutliers:
    """An input put together by hand, x `[windows, context, in]`."""
    x = np.abs(np.asarray(x, np.float32))
    bins = np.bincount(x.view(np.uint32).ravel() >> 18, minlength=2**13)
    share, energy = (x >= threshold).mean((0, 1)), (x**2).sum(-1)
    sink = np.zeros(energy.shape, bool)
    sink[:, 0] = True
    return InputOutliers(x.max((0, 1)), share, x.max(-1), energy, sink, np.zeros_like(energy), bins, None, threshold)


def test_an_outlier_feature_takes_6_percent_of_the_tokens_and_the_mixed_product_one_token():
    x = np.ones((1, 100, 4))
    x[0, :6, 1], x[0, :5, 2], x[0, 0, 3] = -6, 6, 5.99
    one = one_input(x)
    assert one.outlier_features.tolist() == [1]
    assert one.mixed_precision_features.tolist() == [1, 2]
    assert one.outlier_tokens.tolist() == [[0, t] for t in range(6)]


@pytest.mark.parametrize(("rest", "peak", "massive"), [(1, 1040, 1), (1, 960, 0), (0.01, 99, 0), (0.01, 101, 1)])
def test_a_massive_activation_exceeds_100_and_1000_medians(rest, peak, massive):
    x = np.full((2, 8, 16), rest)
    x[1, 3, 5] = -peak
    one = one_input(x)
    assert one.massive_tokens.tolist() == [[1, 3]] * massive
    assert one.massive_features.tolist() == [5] * massive


def test_a_systematic_feature_takes_a_quarter_of_the_layers():
    loud, quiet = np.ones((1, 10, 3)), np.ones((1, 10, 3))
    loud[..., 2] = 9

    def systematic(layers: int) -> list[int]:
        inputs = {(layer, "mlp_input"): one_input(loud if layer < 2 else quiet) for layer in range(layers)}
        found = Outliers(inputs, np.ones((layers, 1, 10)), np.zeros((1, 10), int), Criteria(), False)
        return found.systematic_features("mlp_input").tolist()

    assert systematic(layers=8) == [2]
    assert systematic(layers=9) == []


@given(st.lists(st.floats(0, 2.0**60, width=32, allow_subnormal=False), min_size=1, max_size=60))
@settings(max_examples=200, deadline=None)
def test_the_median_is_within_a_bin_of_the_true_one_and_the_histogram_holds_all_but_zeros(values):
    one = one_input(np.array(values).reshape(1, 1, -1))
    ordered = np.sort(np.float32(values)).astype(np.float64)
    low, high = ordered[(len(values) - 1) // 2], ordered[len(values) // 2]
    assert low * (1 - 1 / 32) - 1e-37 <= one.median <= high * (1 + 1 / 32) + 1e-37
    edges, counts = one.histogram_by(2)
    positive = ordered[ordered > 0]
    assert counts.sum() == len(positive)
    assert len(edges) == len(counts) + 1
    if len(positive):
        assert edges[-2] <= positive[-1] < edges[-1]
        assert edges[0] <= positive[0] < edges[1]


def test_a_dead_input_has_no_ratio_and_its_row_is_valid_json():
    row = one_input(np.zeros((1, 4, 8))).summary()
    assert row["ratio"] is None
    assert row["sink_energy"] == row["max"] == row["median"] == 0
    json.dumps(row, allow_nan=False)


def test_first_tokens_marks_the_run_that_begins_each_window():
    tokens = np.array([[7, 7, 3, 7], [1, 2, 2, 2], [5, 5, 5, 5]])
    assert first_tokens(tokens).astype(int).tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_wasted_levels_by_hand(bits):
    top = 2 ** (bits - 1) - 1
    waste = lambda x: wasted_levels(jnp.array(x, jnp.float32), bits, 4).tolist()  # noqa: E731
    all_but_zero = pytest.approx(2 * top / (2 * top + 1))
    assert waste([3, -3, 1, 0]) == [0]
    assert waste([1000, 0.1, 0.2, -0.1]) == [all_but_zero]
    assert waste([0, 0, 0, 0]) == [0]
    assert waste([1, 1, 1, 1, 9, 0, 0, 0, 5]) == [0, all_but_zero]  # the last group has one member
    assert waste([1, 1, 1, 1, 5, 0]) == [0, all_but_zero]  # and here two


@given(st.lists(st.floats(-8, 8, width=16), min_size=8, max_size=8), st.permutations(range(8)), st.integers(2, 8))
@settings(max_examples=50, deadline=None)
def test_wasted_levels_heed_neither_order_nor_sign_nor_scale(values, order, bits):
    x = jnp.array(values, jnp.float32)
    waste = wasted_levels(x, bits, 8)
    assert 0 <= float(waste[0]) < 1
    for other in (x[jnp.array(order)], -x, 4 * x):
        assert wasted_levels(other, bits, 8).tolist() == waste.tolist()


# ---- the public function --------------------------------------------------------------------------------------------


def test_rows_are_plain_numbers_one_a_layer_and_input(model):
    found, calls = None, []
    text = checkpoints.random_text(300, seed=3)
    found = outliers(model, text, context=64, windows=3, group=32, progress=lambda *call: calls.append(call))
    rows = found.rows()
    assert [(row["layer"], row["input"]) for row in rows] == [(layer, name) for layer in range(2) for name in INPUTS]
    json.dumps(rows, allow_nan=False)
    assert calls == [("observe", 1, 2), ("observe", 2, 2)]
    np.testing.assert_array_equal(found.tokens, windows(model.tokenizer.encode(text), 64, 3))
    assert len(repr(found)) < 200


def test_a_quantized_and_a_bfloat16_model_can_be_looked_at(model, tmp_path):
    text = checkpoints.random_text(300, seed=3)
    look = partial(outliers, text=text, context=64, windows=2, group=32)
    exact = look(model)
    rounded = look(jquant.quantize(model, "rtn", bits=4, group=32))
    small = look(load_model(checkpoints.save(tmp_path, outlier_llama()), dtype="bfloat16"))
    for other in (rounded, small):
        for key, one in other.inputs.items():
            assert one.channel_max.dtype == np.float32
            assert one.max == pytest.approx(exact[key].max, rel=0.5), key
        assert other[1, "mlp_output"].max != exact[1, "mlp_output"].max
    plain, quantized = (found[1, "mlp_output"].weight_waste[0] for found in (exact, rounded))
    assert 0.8 < quantized / plain < 1.2


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"threshold": -6.0}, "threshold=-6.0"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"threshold": float("inf")}, "threshold=inf"),
        ({"bits": 1}, "bits=1"),
        ({"bits": 9}, "bits=9"),
        ({"group": 1}, "group=1"),
        ({"group": 65}, "group=65"),
        ({"windows": 0}, "windows takes a whole number from 1, not 0"),
        ({"windows": 4000}, "too few"),
        ({"context": 1}, "context takes a whole number from 2, not 1"),
        ({"text": "a few words"}, "too few"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(model, options, part):
    good = {"text": checkpoints.random_text(300, seed=3), "context": 64, "windows": 2, "group": 32}
    with refused(part):
        outliers(model, **(good | options))


def test_activations_that_are_nan_are_refused_by_layer_and_input(model):
    broken = nnx.clone(model.decoder)
    state = nnx.state(broken)
    paths = [path for path, _ in nnx.to_flat_state(state) if "up" in path]
    assert len(paths) == 1
    flat = dict(nnx.to_flat_state(state))
    flat[paths[0]].set_value(flat[paths[0]].get_value().at[..., 0, 3].set(jnp.nan))
    nnx.update(broken, nnx.from_flat_state(list(flat.items())))
    with refused("mlp_output of layer 0", "NaN"):
        observe(broken, TOKENS, Criteria(group=32))


# ---- the default model ----------------------------------------------------------------------------------------------


@pytest.mark.optimised
@pytest.mark.parametrize("text", ["wiki_utf8", "wiki.test.noblank.raw"])
def test_the_first_token_is_the_sink_that_layer_11s_down_projection_makes(default_model, text):
    found = outliers(default_model, wikitext(text) if text.endswith("raw") else jquant.load_text(text), windows=2)
    down = found[11, "mlp_output"]
    assert down.first_token_energy > 0.99
    assert down.massive_tokens.tolist() == [[0, 0], [1, 0]]
    assert max(found[layer, "mlp_output"].first_token_energy for layer in range(30) if layer != 11) < 0.9
    # What it writes stays in the residual stream, and draws the attention of the layers above.
    assert found[11, "residual"].first_token_energy < 0.01 < 0.95 < found[12, "residual"].first_token_energy
    assert found.sink_attention[11] < 0.05
    assert found.sink_attention[12:].min() > 0.2


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("outliers")
    checkpoints.save(folder / "model", outlier_llama())
    (folder / "text.txt").write_text(checkpoints.random_text(500, seed=5))
    (folder / "short.txt").write_text("a few words")
    return folder


def command(workplace: Path, *overrides: str, run: Callable = run_here) -> subprocess.CompletedProcess:
    given = {
        "model": "local", "model.path": workplace / "model", "results": workplace / "results", "name": "tiny",
        "evaluation.data": workplace / "text.txt", "evaluation.windows": 3, "evaluation.context": 64, "group": 32,
        "threshold": 2,
    }  # fmt: skip
    given |= dict(override.split("=", 1) for override in overrides)
    options = [f"{key}={value}" for key, value in given.items()]
    return run("outliers", *options)


def test_the_command_writes_rows_and_figures_and_reuses_them(workplace):
    done = command(workplace)
    assert done.returncode == 0, done.stderr
    folder = workplace / "results" / "tiny"
    rows = [json.loads(line) for line in (folder / "outliers.jsonl").read_text().splitlines()]
    assert [(row["layer"], row["input"]) for row in rows] == [(layer, name) for layer in range(2) for name in INPUTS]
    for row in rows:
        assert row.keys() >= {"config", "protocol", "code_version", "packages", "device", "fingerprint"}
        assert row["protocol"]["tokens"] == 3 * 64
        assert max(row["channel_max"]) == pytest.approx(row["max"], rel=0.01)
        assert sum(row["histogram_counts"]) == 3 * 64 * len(row["channel_max"])
        assert row["largest_tokens"][0][2] == row["max"]
    for stem in ("outliers", "outlier_histograms"):
        assert (folder / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{stem}.pdf").read_bytes().startswith(b"%PDF")
    assert all(name in done.stdout for name in INPUTS)
    assert "3 windows of 64 tokens" in done.stdout

    marked = [row | {"max": 12345.0} for row in rows]
    (folder / "outliers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked))
    assert "12,345" in command(workplace).stdout  # the kept rows, not new ones
    assert "12,345" not in command(workplace, "threshold=3").stdout
    after = [json.loads(line) for line in (folder / "outliers.jsonl").read_text().splitlines()]
    assert (after[: len(marked)], len(after)) == (marked, 2 * len(marked))  # another setting drops no rows


BAD = {
    "a text too short": (["evaluation.data={}/short.txt"], "too few"),
    "a threshold below zero": (["threshold=-1"], "threshold=-1"),
    "a group larger than a row": (["group=65"], "group=65"),
    "a group that is no number": (["group=channel"], "group=channel"),
    "a model that is not there": (["model.path=/nowhere/model"], "/nowhere/model"),
    "an option that does not exist": (["treshold=3"], "treshold"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_sentence_and_leaves_nothing(workplace, case):
    overrides, names = BAD[case]
    # Run-time type checks would be the first to find this one.
    run = run_in_process_of_its_own if case == "a group that is no number" else run_here
    done = command(workplace, "name=bad", *(override.format(workplace) for override in overrides), run=run)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert names in lines[0]
    assert not (workplace / "results" / "bad").exists()


def test_damaged_rows_are_refused_by_name(workplace):
    folder = workplace / "results" / "damaged"
    folder.mkdir(parents=True)
    (folder / "outliers.jsonl").write_text('{"layer": 0')
    done = command(workplace, "name=damaged")
    assert done.returncode == 2
    assert "outliers.jsonl is damaged" in done.stderr
