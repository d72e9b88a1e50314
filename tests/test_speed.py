"""Tokens per second on a tiny model: every method, batch and context has its row."""

import json

import checkpoints
import pytest
from commands import run_here


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    checkpoints.save(folder / "model", checkpoints.llama())
    return folder


def run(place, *more):
    return run_here(
        "speed",
        *("model=local", f"model.path={place / 'model'}", f"results={place}", "methods=[fp32,rtn]", "group=32"),
        *("timing.batches=[1,2]", "timing.contexts=[8,16]", "timing.tokens=3", "timing.rounds=1", *more),
    )


def test_each_shape_has_a_row_and_ratios_stand_beside_the_float_models(place):
    done = run(place)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (place / "speed/speed.jsonl").read_text().splitlines()]
    shapes = {(row["method"], row["batch"], row["context"]) for row in rows}
    assert shapes == {(name, batch, context) for name in ("fp32", "rtn") for batch in (1, 2) for context in (8, 16)}
    assert all(row["prefill_tokens_per_second"] > 0 < row["decode_tokens_per_second"] for row in rows)
    assert len({row["fingerprint"] for row in rows}) == 8
    page = (place / "speed/speed.md").read_text()
    assert page.count("| FP32 |") == page.count("| RTN-4 |") == 4
    assert page.count("| 1.00 |") >= 8  # the float model beside itself
    assert "3 tokens decoded after each; the fastest of 1 rounds" in page


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("timing.contexts=[509]", "513 tokens exceed the model's context of 512."),
        ("timing.rounds=0", "timing.rounds takes a whole number from 1, not 0."),
        ("timing.batches=[0]", "timing.batches is a list, each of which takes a whole number from 1"),
        ("methods=[gtpq]", "gptq"),
    ],
)
def test_bad_settings_are_refused(place, setting, message):
    done = run(place, setting, "name=refused")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr
    assert not (place / "refused").exists()
