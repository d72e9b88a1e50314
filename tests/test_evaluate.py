"""experiments.evaluate: rows of models that are streamed, with a reference, on a mesh, and kept."""

import json
from pathlib import Path
from typing import Any

import checkpoints
import jax
import numpy as np
import pytest
from checkpoints import refused
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import jquant
from experiments import evaluate, perplexity_table, tables
from jquant import load_model, open_model
from jquant.data import windows
from jquant.evaluation.perplexity import Reference, score, score_from_disk
from jquant.evaluation.rows import name
from jquant.parallel.mesh import Devices
from paper_figures import perplexity_bits

ROOT = Path(__file__).parents[1]
TEXT = checkpoints.random_text(1500, seed=3)
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "initializer_range": 0.1}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A float model, one quantized from it, and a text."""
    place = tmp_path_factory.mktemp("evaluate")
    jquant.quantize(load_model(checkpoints.save(place / "float", checkpoints.llama(**SHAPE))), "rtn-3", group=32).save(
        place / "rtn-3"
    )
    (place / "text.txt").write_text(TEXT)
    return place


def settings(place: Path, *overrides: str) -> Any:
    given = [f"model.path={place / 'rtn-3'}", f"evaluation.data={place / 'text.txt'}", "evaluation.context=64"]
    given += ["evaluation.windows=5", *overrides]
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return OmegaConf.to_container(compose("evaluate", ["model=local", *given]), resolve=True)


def test_a_streamed_model_has_its_row_with_kl_which_is_kept(place, tmp_path, capsys, monkeypatch):
    asked = settings(place, f"reference={place / 'float'}", f"results={tmp_path}", "mesh.data=2")
    evaluate.evaluate(asked)
    [base, row] = tables.read_rows(tmp_path / "evaluated")
    model, quantized = load_model(place / "float"), load_model(place / "rtn-3")
    expected = jquant.compare(model, {"rtn-3": quantized}, TEXT, context=64, windows=5)
    for found, wanted in zip((base, row), expected.rows(), strict=True):
        for figure in ("perplexity", "kl", "perplexity_change_percent", "top1_agreement", "perplexity_stderr"):
            assert found[figure] == pytest.approx(wanted[figure], rel=1e-4, abs=1e-6), figure
        assert found["bits_per_weight"] == wanted["bits_per_weight"]
        assert found["weight_mb"] == pytest.approx(wanted["weight_mb"], rel=1e-12)
        assert found["window_nll"] == pytest.approx(wanted["window_nll"], rel=1e-5)
        assert found["protocol"]["evaluation_sha256"] == wanted["protocol"]["evaluation_sha256"]
    assert row["kl"] > 0.01
    assert [tables.label(base), tables.label(row)] == ["FP32", "rtn-3"]
    assert name(row) == "rtn-3"
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["perplexity"], told["kl"]) == (row["perplexity"], row["kl"])
    written = (tmp_path / "evaluated" / "table.md").read_text()
    assert f"{row['kl']:.4f}" in written
    assert "packed codes of 3.594 bits a weight, quantized from safetensors F32" in written
    assert perplexity_bits.draw([base, row], tmp_path)

    with monkeypatch.context() as nothing_is_computed:
        nothing_is_computed.setattr(evaluate, "measure", lambda *_: pytest.fail("computed"))
        evaluate.evaluate(asked)
    assert tables.read_rows(tmp_path / "evaluated") == [base, row]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == told
    monkeypatch.setattr(evaluate, "measure", lambda *_: {}["computed anew"])
    with pytest.raises(KeyError, match="computed anew"):
        evaluate.evaluate(settings(place, f"results={tmp_path}", f"reference={place / 'float'}", "mesh.data=1"))


def test_without_a_reference_a_row_compares_with_nothing(place, tmp_path):
    evaluate.evaluate(settings(place, f"results={tmp_path}"))
    evaluate.evaluate(settings(place, f"results={tmp_path}", f"model.path={place / 'float'}"))
    rows = tables.read_rows(tmp_path / "evaluated")
    assert [tables.label(row) for row in rows] == ["rtn-3", "FP32"]
    assert {row[figure] for row in rows for figure in ("kl", "perplexity_change_percent", "top1_agreement")} == {None}


def test_a_reference_that_is_none_is_refused(place, tmp_path):
    with refused("reference=", "is quantized: give the float model"):
        evaluate.evaluate(settings(place, f"results={tmp_path}", f"reference={place / 'rtn-3'}"))
    with refused("/nowhere/model does not exist"):
        evaluate.evaluate(settings(place, f"results={tmp_path}", "reference=/nowhere/model"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 3, 7])
def test_windows_that_do_not_divide_over_the_devices_are_filled_up_and_do_not_count(place, count):
    """Windows, and a reference's states, of any number on four devices, a batch of two on each."""
    source, base = open_model(place / "rtn-3"), load_model(place / "float")
    tokens = windows(base.tokenizer.encode(TEXT), 64, count)
    reference = Reference(base.decoder, score(base.decoder, tokens).hidden)
    alone = score(load_model(place / "rtn-3").decoder, tokens, reference=reference)
    split = score_from_disk(source, tokens, reference=reference, batch=2, devices=Devices(2, 2))
    for one, other in zip(vars(split).values(), vars(alone).values(), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    assert len(jax.devices()) >= 4


def test_the_table_of_a_sharded_model_has_kl_and_keeps_its_rows(place, tmp_path, monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    given = [f"model.path={place / 'float'}", f"evaluation.data={place / 'text.txt'}", "evaluation.context=64"]
    given += ["evaluation.windows=5", "generation.tokens=0", f"results={tmp_path}", "name=r", "methods=[fp32,rtn-3]"]
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        config = compose("perplexity_table", ["model=local", "group=32", "mesh.data=2", "mesh.model=2", *given])
    asked: Any = OmegaConf.to_container(config, resolve=True)
    rows = perplexity_table.table_rows(asked)
    expected = jquant.compare(
        load_model(place / "float"), {"q": load_model(place / "rtn-3")}, TEXT, context=64, windows=5
    )
    for row, wanted in zip(rows, expected.rows(), strict=True):
        for figure in ("perplexity", "kl", "perplexity_change_percent", "bits_per_weight", "weight_mb"):
            assert row[figure] == pytest.approx(wanted[figure], rel=1e-4, abs=1e-6), figure
    monkeypatch.setattr(perplexity_table, "measure", lambda *_: pytest.fail("computed"))
    assert perplexity_table.table_rows(asked) == rows
