"""Sensitivity: the mixed decoder is the quantized or the float one at its ends, every selection has a row, refusals."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import refused
from commands import run_here, run_in_process_of_its_own
from flax import nnx
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import sensitivity
from experiments.sensitivity import PATHS, analyse, measure
from jquant import QTensor, method, quantize_decoder
from jquant.calibration.options import Options
from jquant.evaluation.perplexity import Reference, score
from jquant.io.load import load_model
from jquant.models.decoder import Decoder, blocks
from jquant.pipeline.plan import make_plan

ROOT = Path(__file__).parents[1]
NAMES = ["q", "k", "v", "o", "gate", "up", "down"]
TOKENS = np.random.default_rng(1).integers(2, checkpoints.VOCAB, (4, 64), np.int32)
RTN = method("rtn", bits=3, group=32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return checkpoints.save(tmp_path_factory.mktemp("tiny") / "model", checkpoints.llama())


@pytest.fixture(scope="module")
def decoder(checkpoint) -> Decoder:
    return load_model(checkpoint).decoder


def kernel(decoder: Decoder, layer: int, path: str):
    part, name, _ = path.split(".")
    return getattr(getattr(list(blocks(decoder))[layer], part), name).kernel.get_value()


def same(a, b) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


# ---- the mix --------------------------------------------------------------------------------------------------------


def mixed(decoder: Decoder, mask: dict[str, np.ndarray]) -> Decoder:
    quantized, _ = quantize_decoder(decoder, RTN)
    graph, state = nnx.split(decoder)
    return nnx.merge(graph, sensitivity._mix(state, sensitivity._stacks(decoder), sensitivity._stacks(quantized), mask))


def test_a_mask_of_nothing_is_the_float_model(decoder):
    scores = score(decoder, TOKENS)
    nothing = mixed(decoder, {path: np.zeros(2, bool) for path in PATHS})
    again = score(nothing, TOKENS, reference=Reference(decoder, scores.hidden))
    assert again.kl is not None
    assert np.abs(again.kl).max() < 1e-5
    np.testing.assert_array_equal(again.nll, scores.nll)


def test_a_mask_of_one_weight_changes_that_weight_alone(decoder):
    mask = {path: np.array([False, path == "mlp.up.kernel"]) for path in PATHS}
    one = mixed(decoder, mask)
    for layer in range(2):
        for path in PATHS:
            equal = same(kernel(one, layer, path), kernel(decoder, layer, path))
            assert equal == ((layer, path) != (1, "mlp.up.kernel")), (layer, path)


@pytest.fixture(scope="module")
def figures(decoder) -> dict:
    told, settings = [], {"layer_windows": 2, "matrix_windows": 1}
    report = lambda stage, done, total, **_: told.append((stage, done, total))  # noqa: E731
    found = measure(decoder, make_plan(decoder, RTN), (TOKENS, None), score(decoder, TOKENS), settings, report)
    assert told[-1] == ("evaluate", 1 + 7 + 2 + 14, 1 + 7 + 2 + 14)
    return found


def against_float(decoder: Decoder, plan, windows: int) -> tuple[float, float]:
    """Perplexity and KL through the pipeline, which keeps codes and never mixes."""
    tokens = TOKENS[:windows]
    scores = score(
        quantize_decoder(decoder, plan)[0], tokens, reference=Reference(decoder, score(decoder, tokens).hidden)
    )
    assert scores.kl is not None
    return scores.perplexity, float(scores.kl.mean())


def test_every_selection_scores_as_the_pipelines_own_plan_of_it(decoder, figures):
    assert list(figures["projections"]) == NAMES
    assert len(figures["layers"]) == 2
    matrices = {(one["layer"], one["projection"]): one for one in figures["matrices"]}
    assert list(matrices) == [(layer, name) for layer in range(2) for name in NAMES]
    cases = [
        (figures["all"], RTN, 4),
        (figures["projections"]["v"], [(r"attention\.v", RTN)], 4),
        (figures["layers"][1], [(r"layers\.1", RTN)], 2),
        (matrices[0, "down"], [(r"layers\.0\.mlp\.down", RTN)], 1),
    ]
    for entry, plan, windows in cases:
        expected = against_float(decoder, plan, windows)
        assert (entry["perplexity"], entry["kl"]) == pytest.approx(expected, rel=2e-3), plan
    kls = [cell["kl"] for cell in (figures["all"], *figures["projections"].values(), *matrices.values())]
    assert max(kls) == figures["all"]["kl"]
    assert len(set(kls)) == len(kls)
    assert min(kls) > 0


def test_layers_and_matrices_are_left_out_on_request(decoder):
    settings = {"layer_windows": 0, "matrix_windows": 0}
    found = measure(
        decoder,
        make_plan(decoder, RTN),
        (TOKENS[:1], None),
        score(decoder, TOKENS[:1]),
        settings,
        lambda *_, **__: None,
    )
    assert (found["layers"], found["matrices"]) == ([], [])
    assert set(found["projections"]) == set(NAMES)


def test_a_bfloat16_model_is_measured_too(checkpoint):
    decoder = load_model(checkpoint, dtype="bfloat16").decoder
    settings = {"layer_windows": 0, "matrix_windows": 0}
    found = measure(
        decoder,
        make_plan(decoder, RTN),
        (TOKENS[:1], None),
        score(decoder, TOKENS[:1]),
        settings,
        lambda *_, **__: None,
    )
    assert found["all"]["kl"] > found["projections"]["k"]["kl"] > 0


# ---- inputs="float" -------------------------------------------------------------------------------------------------

GPTQ = method("gptq", bits=3, group=32)


def test_inputs_from_float_blocks_fit_each_block_as_if_it_alone_were_quantized(decoder):
    fitted, _ = quantize_decoder(decoder, GPTQ, TOKENS, Options(inputs="float"))
    alone, _ = quantize_decoder(decoder, [(r"layers\.1", GPTQ)], TOKENS)
    in_turn, _ = quantize_decoder(decoder, GPTQ, TOKENS)
    for path in PATHS:
        first, second = kernel(fitted, 0, path), kernel(fitted, 1, path)
        assert isinstance(second, QTensor)
        assert same(second, kernel(alone, 1, path)), path
        assert not same(second, kernel(in_turn, 1, path)), path
        # The first block, and so a decoder of one, has nothing quantized before it.
        assert same(first, kernel(in_turn, 0, path)), path


def test_a_decoder_of_one_block_does_not_care(tmp_path):
    decoder = load_model(checkpoints.save(tmp_path, checkpoints.llama(num_hidden_layers=1))).decoder
    found = [quantize_decoder(decoder, GPTQ, TOKENS, Options(inputs=inputs))[0] for inputs in ("float", "quantized")]
    assert all(same(*(kernel(one, 0, path) for one in found)) for path in PATHS)


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, checkpoint) -> Path:
    folder = tmp_path_factory.mktemp("sensitivity")
    (folder / "model").symlink_to(checkpoint)
    (folder / "evaluation.txt").write_text(checkpoints.random_text(500, seed=5))
    (folder / "calibration.txt").write_text(checkpoints.random_text(900, seed=6))
    return folder


def options(workplace: Path, **changes) -> dict:
    return {
        "model": "local", "model.path": workplace / "model", "results": workplace / "results", "name": "tiny",
        "bits": 3, "group": 32, "methods": "[rtn,gptq-2]", "layer_windows": 1, "matrix_windows": 1,
        "evaluation.data": workplace / "evaluation.txt", "evaluation.windows": 2, "evaluation.context": 64,
        "calibration.data": workplace / "calibration.txt", "calibration.samples": 8, "calibration.context": 64,
    } | changes  # fmt: skip


def command(workplace: Path, run: Callable = run_here, **changes) -> subprocess.CompletedProcess:
    given = [f"{key}={value}" for key, value in options(workplace, **changes).items()]
    return run("sensitivity", *given)


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "sensitivity.jsonl").read_text().splitlines()]


def test_the_command_writes_rows_tables_and_figure_and_reuses_the_rows(workplace):
    done = command(workplace)
    assert done.returncode == 0, done.stderr
    folder = workplace / "results" / "tiny"
    rows = rows_of(folder)
    assert [row["method"] for row in rows] == ["rtn", "gptq-2"]
    for row in rows:
        assert row.keys() >= {"fp32", "config", "protocol", "code_version", "packages", "device", "fingerprint"}
        assert list(row["projections"]) == NAMES
        assert (len(row["layers"]), len(row["matrices"])) == (2, 14)
    assert rows[0]["fp32"] == rows[1]["fp32"]
    assert rows[0]["protocol"]["calibration_sha256"] is None
    markdown = (folder / "sensitivity.md").read_text()
    for row, label in zip(rows, ("RTN-3", "GPTQ-2"), strict=True):
        cells = [f"{cell['perplexity']:.2f}" for cell in (*row["projections"].values(), row["all"])]
        assert f"| {' | '.join([label, *cells])} |" in markdown
    kls = [f"{1000 * row['layers'][1]['kl']:.2f}" for row in rows]
    assert f"| {' | '.join(['1', *kls])} |" in markdown
    assert "2 windows of 64 tokens" in markdown
    assert (folder / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "sensitivity.pdf").read_bytes().startswith(b"%PDF")

    marked = [row | {"all": row["all"] | {"perplexity": 77777.0}} for row in rows]
    (folder / "sensitivity.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked))
    again = command(workplace)
    assert again.returncode == 0, again.stderr
    assert rows_of(folder) == marked
    assert (folder / "sensitivity.md").read_text().count("77777.00") == 2


@pytest.mark.parametrize(
    ("methods", "names", "run"),
    [("[rtn,awq]", "awq", run_here), ("[gptqq]", "gptqq", run_in_process_of_its_own)],
)
def test_bad_input_ends_in_one_sentence_and_leaves_nothing(workplace, methods, names, run):
    done = command(workplace, run, name="bad", methods=methods)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert names in lines[0]
    assert not (workplace / "results" / "bad").exists()


@pytest.mark.parametrize("name", ["fp32", "w8a8", "gguf_q4_0", "awq_gptq"])
def test_methods_that_change_more_than_one_weight_are_refused_before_any_work(workplace, name):
    nowhere = {"model": {"name": "nowhere"}, "results": str(workplace / "results"), "methods": [name]}
    settings = OmegaConf.merge(OmegaConf.load(ROOT / "configs" / "sensitivity.yaml"), nowhere)
    with refused(name, "one weight at a time"):
        analyse(OmegaConf.to_container(settings, resolve=True))  # pyright: ignore[reportArgumentType]


def test_evaluation_text_inside_the_calibration_text_is_refused_here_too(workplace):
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        given = options(workplace, **{"evaluation.data": workplace / "calibration.txt", "name": "leaking"})
        config = compose("sensitivity", [f"{key}={value}" for key, value in given.items()])
    with refused("calibration.txt occurs in the calibration text"):
        analyse(OmegaConf.to_container(config, resolve=True))  # pyright: ignore[reportArgumentType]
    assert not (workplace / "results" / "leaking").exists()


def test_the_mixed_kernels_keep_the_models_dtype(decoder):
    stacks = sensitivity._stacks(decoder)
    assert {stack.dtype for stack in stacks.values()} == {jnp.dtype("float32")}
    assert stacks["mlp.down.kernel"].shape == (2, 96, 64)
