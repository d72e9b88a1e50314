"""What a command line may say: every misspelt or misplaced part ends in one sentence, before anything is done."""

import copy
import functools
import importlib
import json
import math
import sys
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from checkpoints import refused
from commands import run_here
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from experiments import command_line, overrides
from experiments.overrides import check_command, multirun_first
from experiments.settings import check
from jquant import load_model
from jquant.evaluation.perplexity import Scores
from jquant.io.language_model import LanguageModel

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
TABLE = "perplexity_table"

WRONG = {
    "a misspelt setting": (TABLE, "bitz=3", "There is no setting 'bitz'; the nearest is bits."),
    "a misspelt setting with the + that Hydra advises": (TABLE, "+bitz=3", "the nearest is bits."),
    "and with two": (TABLE, "++bitz=3", "the nearest is bits."),
    "a setting of another experiment": (TABLE, "+threshold=3", "'threshold'"),
    "a setting that the code reads, but this experiment ignores": (
        "sensitivity", "+calibration.held_out=3", "'calibration.held_out'",
    ),
    "a setting without its section": (TABLE, "context=3", "calibration.context or evaluation.context."),
    "a setting in a section's value": ("evaluate", "evaluation={windws:3}", "'evaluation.windws'"),
    "a setting that is left out": (TABLE, "~bits", "can't be left out"),
    "an unknown model": (TABLE, "model=llama9", *MODELS),
    "a folder as model": (TABLE, "model=./my/llama", "model=local model.path=./my/llama"),
    "an unknown mesh": ("evaluate", "mesh=two", "'two'", "one"),
    "an unknown launcher": (TABLE, "--multirun launcher=rey", "ray, process, submitit, submitit_local"),
    "an unknown model in a sweep": (TABLE, "--multirun model=smollm2_135m,llama9 name=x", "'llama9'"),
    "several values without --multirun": (TABLE, "bits=2,3", "--multirun", "bits=[2,3]"),
    "a sweep of what has none": ("quantize", "--multirun bits=3", "experiments.quantize runs once", "--multirun"),
    "values to sweep there": ("evaluate", "mesh.data=1,2", "experiments.evaluate runs once", "mesh.data=1,2"),
    "a launcher there": ("outliers", "launcher=ray", "experiments.outliers runs once", "launcher=ray"),
    "an option after a setting": (TABLE, "bits=3 --config-name formats bits=4", "stand before the settings"),
    "an unknown config": (TABLE, "--config-name formatz", "'formatz'", "there are: formats, "),
    "another experiment's config": ("quantize", "--config-name formats", "'formats'", "there are: quantize"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_an_experiment_does_not_have_is_refused(case):
    script, arguments, *parts = WRONG[case]
    with refused(*parts):
        check_command(script, arguments.split())


def test_a_sweep_may_be_asked_for_after_settings():
    assert multirun_first(["method=rtn", "--multirun", "bits=2,3"]) == ["--multirun", "method=rtn", "bits=2,3"]


def test_a_file_or_folder_given_as_a_models_name_is_told_how_it_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model.gguf").touch()
    (tmp_path / "other").mkdir()
    for name, path in (("my-model", "my-model.gguf"), ("other", "other")):
        with refused(f"model={name} is no name, but there is {path}: give model=local model.path=./{path}."):
            check_command(TABLE, [f"model={name}"])


def test_files_and_words_that_are_nearly_right_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eval.txt").touch()
    (tmp_path / "docs").mkdir()
    settings = {"evaluation": {"data": "evl.txt"}}
    with refused("evaluation.data=evl.txt is not a file; the nearest is eval.txt."):
        check(settings)
    with refused("evaluation.data=docs is a folder: give a file of text."):
        check({"evaluation": {"data": "docs"}})
    with refused("channel or tensor, not 'chanel'; the nearest is channel."):
        check({"group": "chanel"})
    with refused("bits takes a whole number from 2 to 8, not 3.5."):
        check({"bits": 3.5})
    with refused("unknown model name 'smollm_135m', choose from: smollm2_135m, "):
        load_model("smollm_135m")


def test_the_model_spelt_most_alike_is_named_first():
    with refused(f"choose from: {'llama3.1_8b'}"):
        check_command(TABLE, ["model=llama3.1_9b"])


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (
            TABLE,
            ["bits=3", "++bits=3", "model=local", "+model.tokenizer=/x", "methods=[fp32,rtn]", "hydra.verbose=true"],
        ),
        (TABLE, ["--multirun", "bits=2,3", "model=smollm2_135m,local", "name=x", "launcher=process"]),
        (TABLE, ["--config-name", "formats", "evaluation={windows:3}"]),
        ("quantize", ["hosts={coordinator:'a:1',count:2,index:0}", "calibration.memory_gb=1.5"]),
        (TABLE, ["published=llama3.1_8b", "++published.methods.gptq.perplexity=6.0"]),
    ],
)
def test_what_it_has_passes(script, arguments):
    check_command(script, arguments)


def test_a_launcher_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setattr(overrides, "find_spec", lambda name: None)
    with refused("launcher=ray", ".[sweep]"):
        check_command(TABLE, ["--multirun", "bits=2,3", "launcher=ray"])
    check_command(TABLE, ["--multirun", "bits=2,3", "launcher=process"])


def test_a_users_own_config_may_hold_no_misspelt_setting_and_may_name_models_of_its_own(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: mine\npath: /x\ndtype: float32\nsource: null\n")
    (tmp_path / "own.yaml").write_text(f"defaults:\n  - {TABLE}\n  - _self_\nbitz: 3\n")
    arguments = ["--config-dir", str(tmp_path), "--config-name", "own"]
    with refused("'bitz'", "bits"):
        check_command(TABLE, arguments)
    (tmp_path / "own.yaml").write_text(f"defaults:\n  - {TABLE}\n  - _self_\nbits: 3\n")
    check_command(TABLE, [*arguments, "model=mine"])


# ---- values ---------------------------------------------------------------------------------------------------------


@functools.cache
def _composed(script: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return compose(script)


def composed(script: str) -> DictConfig:
    """An experiment's config as it stands."""
    return copy.deepcopy(_composed(script))


VALUES = {
    "calibration.samples=-3": ("quantize", "calibration.samples takes a whole number from 1, not -3."),
    "calibration.memory_gb=many": ("quantize", "calibration.memory_gb takes a number from 0"),
    "calibration.inputs=exact": ("quantize", "calibration.inputs is quantized or float"),
    "calibration.data=[a,b]": ("quantize", "calibration.data is one text here"),
    "calibration=5": ("quantize", "calibration is a section"),
    "seed=1.5": ("quantize", "seed takes a whole number from 0"),
    "symmetric=1": ("quantize", "symmetric is true or false"),
    "group=half": ("quantize", "group takes a whole number from 1, channel or tensor, not 'half'"),
    "bits=two": ("quantize", "bits takes a whole number"),
    "output=7": ("quantize", "output takes a text"),
    "mesh.data=0": ("quantize", "mesh.data takes a whole number from 1"),
    "mesh.uneven=perhaps": ("quantize", "mesh.uneven is error or replicate"),
    "model.dtype=int8": ("quantize", "model.dtype is float32, bfloat16 or float16"),
    "model.source=null": ("quantize", "neither a path nor a source"),
    "model=local": ("evaluate", "model.path has no value: give model.path=…."),
    "evaluation.windows=two": ("evaluate", "evaluation.windows takes a whole number from 1, or null, not 'two'."),
    "evaluation.data=[a,b]": ("evaluate", "evaluation.data is one text here"),
    "evaluation.data=wiki_utf9": ("evaluate", "wiki_utf9"),
    "evaluation.data=no/such.txt": ("evaluate", "evaluation.data=no/such.txt is not a file."),
    "evaluation.bos=maybe": ("evaluate", "evaluation.bos is true or false"),
    "threshold=six": ("outliers", "threshold takes a number, not 'six'"),
    "evaluation.context=1": ("outliers", "evaluation.context takes a whole number from 2"),
    "layer_windows=-1": ("sensitivity", "layer_windows takes a whole number from 0"),
    "results=3": ("sensitivity", "results takes a text, not 3"),
    "lora.start=svd": ("qlora", "lora.start is zero or loftq, not 'svd'."),
    "training.held_out=1": ("qlora", "training.held_out takes a share between 0 and 1, not 1."),
    "training.data=no/such.txt": ("qlora", "training.data=no/such.txt is not a file."),
}  # fmt: skip


@pytest.mark.parametrize("override", VALUES)
def test_a_value_that_a_setting_does_not_take_is_refused_by_every_experiment(override):
    script, part = VALUES[override]
    given = OverridesParser.create().parse_override(override)
    config = composed(script)
    if override == "model=local":
        config.model = OmegaConf.load(CONFIGS / "model" / "local.yaml")
    else:
        OmegaConf.update(config, given.key_or_group, given.value())
    with refused(part):
        check(OmegaConf.to_container(config, resolve=True))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("script", ["cache", "evaluate", "outliers", "qlora", "quantize", "sensitivity", TABLE])
def test_what_the_configs_say_is_what_the_settings_take(script):
    check(OmegaConf.to_container(composed(script), resolve=True))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("script", "argument", "part"),
    [
        ("quantize", "calibration.samples=-3", "calibration.samples takes"),
        ("evaluate", "evaluation.windows=two", "evaluation.windows takes"),
        ("outliers", "threshold=six", "threshold takes"),
        ("sensitivity", "matrix_windows=all", "matrix_windows takes"),
        ("qlora", "lora.rank=0", "lora.rank takes"),
        (TABLE, "evaluation.data=[]", "evaluation.data is"),
        (TABLE, "+bitz=3", "There is no setting 'bitz'"),
        (TABLE, "bits", "missing EQUAL"),
    ],
)
def test_every_script_ends_with_status_2_and_one_line(script, argument, part, monkeypatch, capsys, tmp_path):
    module = importlib.import_module(f"experiments.{script}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", argument])
    with pytest.raises(SystemExit) as ended:
        command_line.run(module.main)
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert part in line
    assert "+" not in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "script",
    ["cache", "distortion", "downstream", "evaluate", "memory", "mixed_precision", "outliers", "qat", "qlora",
     "reproduce", "sensitivity", "speed", TABLE],
)  # fmt: skip
def test_a_results_folder_that_cant_be_written_is_found_before_a_model_is_loaded(script, monkeypatch, tmp_path):
    monkeypatch.setattr(LanguageModel, "__init__", None)  # no model can be made
    (tmp_path / "page.md").touch()
    done = run_here(script, f"results={tmp_path}/page.md/x", *(["tasks=cloze"] if script == "downstream" else []))
    assert done.returncode == 2, done
    assert f"{tmp_path}/page.md is no folder: give another results=…." in done.stderr
    assert len(done.stderr.splitlines()) == 1


# ---- figures that are none ------------------------------------------------------------------------------------------


@pytest.fixture
def evaluated(monkeypatch, tmp_path):
    """Runs experiments.evaluate with given likelihoods in place of a model's."""
    from experiments import evaluate

    folder = checkpoints.save(tmp_path / "tiny", checkpoints.llama(num_hidden_layers=1))
    (tmp_path / "text.txt").write_text("words and more words")

    def run(nll: list[float]) -> None:
        scores = Scores(np.array([nll]), None, None, np.zeros((1, len(nll) + 1, 1)))
        monkeypatch.setattr(evaluate, "score_from_disk", lambda source, *_, **__: [*source.blocks()] and scores)
        config = composed("evaluate")
        config.model = {"name": "tiny", "path": str(folder), "dtype": "float32"}
        config.evaluation = {"data": str(tmp_path / "text.txt"), "windows": 1, "context": len(nll) + 1, "bos": False}
        config.results = str(tmp_path / "results")
        evaluate.evaluate(OmegaConf.to_container(config, resolve=True))  # pyright: ignore[reportArgumentType]

    return run


@pytest.mark.parametrize("nll", [math.nan, math.inf, 1e4])
def test_a_perplexity_that_is_no_number_is_an_error_and_no_json(evaluated, capsys, tmp_path, nll):
    with refused("the perplexity is not a finite number"):
        evaluated([2.0, nll])
    assert not capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_one_scored_token_has_no_standard_error(evaluated, capsys):
    evaluated([2.0])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["perplexity"] == pytest.approx(math.exp(2))
    assert told["perplexity_stderr"] is None
