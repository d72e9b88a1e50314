"""experiments.qat: from a float model to a trained one and its row; resumed, refused."""

import json
from dataclasses import fields
from pathlib import Path

import checkpoints
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run_here
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import tables
from experiments.overrides import CONFIGS, check_command
from experiments.qat import method_of, tuning_of
from experiments.settings import check
from jquant import InputError, Tuning, load_model, perplexity
from jquant.learning import loop

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "initializer_range": 0.1}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A float model and three texts."""
    place = tmp_path_factory.mktemp("qat")
    checkpoints.save(place / "float", checkpoints.llama(**SHAPE))
    for seed, (name, words) in enumerate({"evaluation": 1500, "calibration": 1500, "training": 300}.items()):
        (place / f"{name}.txt").write_text(checkpoints.random_text(words, seed=seed))
    return place


def command(place: Path, out: Path, *changes: str) -> list[str]:
    given = {
        "model": "local",
        "model.path": place / "float",
        "name": "mine",
        "results": out / "results",
        "output": out / "qat",
        "bits": 2,
        "group": 32,
        "calibration.data": place / "calibration.txt",
        "calibration.samples": 4,
        "calibration.context": 64,
        "text.data": place / "training.txt",
        "text.context": 64,
        "tuning.steps": 30,
        "tuning.weight_rate": 0.01,
        "tuning.rate": 0.005,
        "journal.every": 10,
        "journal.evaluate_every": 15,
        "evaluation.data": place / "evaluation.txt",
        "evaluation.windows": 4,
        "evaluation.context": 64,
        "generation.tokens": 0,
    }
    given |= dict(change.split("=", 1) for change in changes)
    return [f"{key}={value}" for key, value in given.items()]


def row(out: Path) -> dict:
    [one] = tables.read_rows(out / "results/mine")
    return one


def test_training_lowers_its_loss_and_leaves_a_model_with_its_row(place, tmp_path):
    done = run_here("qat", *command(place, tmp_path))
    assert done.returncode == 0, done.stderr
    found = row(tmp_path)
    start, trained = load_model(tmp_path / "qat/start"), load_model(tmp_path / "qat/model")
    metrics = [json.loads(line) for line in (tmp_path / "qat/training/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "kl" in line] == [15, 30]
    assert found["kl"] == pytest.approx(metrics[-1]["kl"])
    assert found["training_tokens"] == 30 * 2 * 64
    kept = tmp_path / f"results/mine/{found['fingerprint']}.metrics.jsonl"
    assert kept.read_text() == (tmp_path / "qat/training/metrics.jsonl").read_text()
    text = (place / "evaluation.txt").read_text()
    figures = [perplexity(model, text, context=64, windows=4, progress=False) for model in (start, trained)]
    assert found["perplexity"] == pytest.approx(figures[1])
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    with pytest.raises(InputError, match="occurs in the calibration text"):
        perplexity(trained, (place / "training.txt").read_text(), context=64, progress=False)
    with pytest.raises(InputError, match="occurs in the calibration text"):
        perplexity(trained, (place / "calibration.txt").read_text(), context=64, progress=False)
    assert "| QAT-2 |" in (tmp_path / "results/mine/table.md").read_text()


def test_a_run_that_ended_early_goes_on_to_the_same_bytes(place, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    blocks = "blocks={steps: 3, weight_rate: 0.01}"
    assert run_here("qat", *command(place, whole, blocks)).returncode == 0
    step, steps = loop.step, []

    def stopped(*arguments, **named):
        steps.append(1)
        if len(steps) == 2 * 3 + 25:  # after the two blocks
            raise KeyboardInterrupt
        return step(*arguments, **named)

    monkeypatch.setattr(loop, "step", stopped)
    assert run_here("qat", *command(place, parts, blocks)).returncode == 130
    assert not (parts / "qat/model").exists()
    monkeypatch.undo()
    assert run_here("qat", *command(place, parts, blocks)).returncode == 0
    for name in ("kl", "perplexity", "window_nll", "training_tokens"):
        assert row(whole)[name] == row(parts)[name], name
    ours, theirs = (load_model(folder / "qat/model").decoder for folder in (whole, parts))
    tokens = jnp.arange(32)[None]
    np.testing.assert_array_equal(ours(tokens), theirs(tokens))


def test_text_that_the_model_samples_is_learned_from(place, tmp_path, monkeypatch):
    monkeypatch.setenv("JQUANT_CACHE", str(tmp_path / "cache"))
    asked = command(place, tmp_path, "text.data=null", "text.sampled=6", "text.context=32", "tuning.steps=3")
    done = run_here("qat", *asked)
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "cache/sampled").rglob("*.safetensors"))


def test_trainings_share_a_start_and_are_compared_with_a_row_by_its_settings(place, tmp_path):
    start = f"start={tmp_path}/start"
    for about, *changes in (
        ("all", "tuning.steps=4"),
        ("blocks", "blocks={steps: 5, weight_rate: 0.01}", f"start={tmp_path}/own", "tuning=null"),
        ("scales", "tuning.steps=3", "tuning.weight_rate=0.0", "journal.evaluate_every=2"),
        ("other windows", "tuning.steps=1", "evaluation.windows=3"),
    ):
        own = command(place, tmp_path, f"output={tmp_path}/{about.split()[0]}", f"about={about}", "baseline=all")
        own += [start] * (about != "blocks") + list(changes)
        done = run_here("qat", *[given for given in own if about != "blocks" or not given.startswith("tuning.")])
        assert done.returncode == 0, done.stderr
    rows = {row["settings"]: row for row in tables.read_rows(tmp_path / "results/mine")}
    assert [row["training_tokens"] for row in rows.values()] == [4 * 2 * 64, 5 * 2 * 64, 3 * 2 * 64, 2 * 64]
    table = (tmp_path / "results/mine/table.md").read_text()
    changes = {line.split("|")[2].strip(): line.split("|")[-2].strip() for line in table.splitlines()[2:6]}
    assert changes["all"].startswith("+0.00")
    assert changes["scales"].endswith("]")
    assert changes["other windows"] == ""
    assert "Learned from" in table
    assert "QAT-2 blocks" not in next(part for part in table.split(". ") if "Learned from" in part)
    assert (tmp_path / "results/mine/training_curves.png").is_file()
    seconds = json.loads((tmp_path / "start.seconds.json").read_text())["seconds"]
    assert all(row["quantize_seconds"] > seconds for name, row in rows.items() if name != "blocks")


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "ingredient").glob("*.yaml")))
def test_every_ingredient_is_a_training_of_as_many_tokens(name):
    with initialize_config_dir(str(CONFIGS), version_base=None):
        composed = compose("training_ingredients", [f"ingredient={name}"])
    settings = OmegaConf.to_container(composed, resolve=True)
    check(settings)
    stages = list(method_of(settings).tuning)
    stages += [] if settings["tuning"] is None else [tuning_of("tuning", settings["tuning"])]
    assert sum(stage.steps * stage.windows for stage in stages) == 400
    assert settings["about"] == name
    assert settings["output"] == f"qat/ingredients/{name}"
    alone = settings["start"] != "qat/ingredients/start"
    assert alone == (name in ("blocks", "both", "seq"))
    assert (settings["calibration"]["context"], settings["text"]["context"]) == (512, 512)
    check_command("qat", ["--config-name", "training_ingredients", f"ingredient={name}"])


def test_the_settings_are_all_those_of_a_tuning():
    settings = OmegaConf.load(CONFIGS / "qat.yaml")
    assert set(settings.tuning) == {field.name for field in fields(Tuning)} - {"target"}


REFUSED = {
    "its evaluation text": (["text.data={place}/evaluation.txt"], "evaluation.txt occurs in the calibration text"),
    "an empty text": (["text.data={out}/empty.txt"], "holds no text"),
    "a text shorter than a window": (["text.data={out}/short.txt"], "too few for 1 window of 64"),
    "no text": (["text.data=null"], "text.data or text.sampled"),
    "a method that trains": (["method=learned"], "without a tuning"),
    "a rate that diverges": (["tuning.rate=1e6", "tuning.schedule=constant"], "lower rate"),
    "a setting that blocks don't have": (["blocks={{tempo: 3}}"], "blocks.tempo is no setting"),
    "a misspelt setting": (["tuning.step=3"], "tuning.step"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_ends_in_one_sentence(place, tmp_path, name):
    changes, said = REFUSED[name]
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("the cat")
    asked = [change.format(place=place, out=tmp_path) for change in changes]
    done = run_here("qat", *command(place, tmp_path), *asked)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()
    assert len(last) == 1 or "rate" in name, done.stderr
    assert said in " ".join(last), done.stderr
    assert not (tmp_path / "results").exists()


def test_a_config_that_has_a_config_of_training_as_its_default_is_one_too():
    """qat_long has qat_mixed as its default, which has qat."""
    check_command("qat", ["--config-name", "qat_long", "bits=2"])
    with initialize_config_dir(str(CONFIGS), version_base=None):
        assert compose("qat_long", [])["tuning"]["rate"] == compose("qat_mixed", [])["tuning"]["rate"]
