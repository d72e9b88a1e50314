"""The configs that stand beside published tables, on tiny random models of the same kinds."""

import json
from pathlib import Path

import checkpoints
import pytest
from checkpoints import LLAMA3_ROPE
from commands import run_here

from experiments.tables import COLUMNS

# Config -> what makes a tiny model one of its kind, and settings that make the run small.
KINDS = {
    "published_llama3.1_8b": ({"rope_scaling": LLAMA3_ROPE}, ["methods=[fp32,int8,gptq,nf4]"]),
    "published_llama3.2_1b": ({"rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True}, ["methods=[fp32,awq]"]),
    "published_llama2_7b": ({"num_key_value_heads": 4}, ["methods=[fp32,gptq-3]"]),
    "published_llama2_7b_codes": ({"num_key_value_heads": 4}, ["methods=[fp32,e8p-2]"]),
}


def rows(folder: Path, name: str, *settings: str) -> tuple[list[dict], str]:
    changes, smaller = KINDS[name]
    checkpoints.save(folder / "model", checkpoints.llama(**changes))
    for text, seed in (("evaluated", 1), ("calibration", 2)):
        (folder / text).write_text(checkpoints.random_text(4000, seed=seed))
    run = run_here(
        "perplexity_table",
        *("--config-name", name, f"model.path={folder / 'model'}", f"results={folder}", "name=table", "group=32"),
        *(f"evaluation.data={folder / 'evaluated'}", "evaluation.windows=3", "evaluation.context=64"),
        *(f"calibration.data={folder / 'calibration'}", "calibration.samples=4", "calibration.context=64"),
        *("generation.tokens=0", *smaller, *settings),
    )
    assert run.returncode == 0, run.stderr
    lines = (folder / "table/table.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], (folder / "table/table.md").read_text()


def test_the_eight_billions_figures_stand_beside_ones_own(tmp_path):
    found, page = rows(tmp_path, "published_llama3.1_8b")
    assert [COLUMNS["published"](row) for row in found] == ["6.14", "6.17", "6.41", "6.45"]
    assert [COLUMNS["published\ntok/s"](row) for row in found] == ["42.3", "68.1", "95.7", "78.4"]
    assert [COLUMNS["published\nGB"](row) for row in found] == ["16.1", "8.5", "4.8", "5.5"]
    assert found[0]["protocol"]["dtype"] == "bfloat16"
    assert "Published: Llama-3.1-8B on one A100. Its protocol is not stated" in page
    assert "| published | published tok/s | published GB |" in page


def test_a_width_has_its_own_published_figure(tmp_path):
    found, page = rows(tmp_path, "published_llama2_7b")
    assert [COLUMNS["published"](row) for row in found] == ["5.47", "6.29"]
    assert "published GB" not in page


def test_codes_for_several_weights_stand_beside_their_papers_figures(tmp_path):
    found, page = rows(tmp_path, "published_llama2_7b_codes")
    assert [COLUMNS["published"](row) for row in found] == ["5.12", "8.22"]
    assert "states of 16 bits" in page
    assert all(2 < row["bits_per_weight"] < 2.5 for row in found[1:])


def test_the_strided_protocol_says_what_it_scored(tmp_path):
    found, page = rows(tmp_path, "published_llama3.2_1b", "evaluation.stride=16")
    for row in found:
        assert (row["protocol"]["stride"], row["protocol"]["scored_tokens"]) == (16, 48)
        assert len(row["window_nll"]) == 3
    assert "3 windows of 64 tokens, one every 16, no BOS, 48 scored tokens" in page
    assert found[1]["kl"] > 0
    assert "published" not in page.lower()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("evaluation.stride=0", "evaluation.stride takes a whole number from 1, or null, not 0."),
        ("evaluation.stride=65", "stride=65 would leave out text between windows of 64 tokens"),
        ("published=llama4", "llama3.1_8b"),
    ],
)
def test_bad_settings_are_refused(tmp_path, setting, message):
    with pytest.raises(AssertionError, match=message.replace(".", r"\.")):
        rows(tmp_path, "published_llama3.2_1b", setting)
    assert not (tmp_path / "table").exists()
