"""Rows run again on a tiny model: inside their interval, and out of it where the kept figure is another's."""

import json

import checkpoints
import pytest
from commands import run_here


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    checkpoints.save(folder / "model", checkpoints.llama(initializer_range=0.1))
    (folder / "text.txt").write_text(checkpoints.random_text(4000, seed=3))
    done = run(folder, "perplexity_table", "name=kept", "evaluation.windows=8")
    assert done.returncode == 0, done.stderr
    return folder


def run(place, experiment, *more):
    text = ("evaluation.context=32", f"evaluation.data={place / 'text.txt'}", "generation.tokens=0")
    method = ("methods=[fp32,rtn]", "bits=3", "group=32")
    model = ("model=local", f"model.path={place / 'model'}", f"results={place}")
    return run_here(experiment, *model, *method, *text, *more)


def test_the_same_rows_are_inside_their_intervals(place):
    done = run(place, "reproduce", f"kept={place / 'kept'}", "evaluation.windows=8")
    assert done.returncode == 0, done.stderr
    page = (place / "reproduce/reproduce.md").read_text()
    assert page.count("inside") == 2
    assert "left" not in page


def test_a_figure_out_of_its_interval_is_named_and_the_status_is_1(place):
    rows = [json.loads(line) for line in (place / "kept/table.jsonl").read_text().splitlines()]
    for row in rows:
        row["window_nll"] = [nll + 0.5 * (row["method"] == "rtn") for nll in row["window_nll"]]
    (place / "moved").mkdir()
    (place / "moved/table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(place, "reproduce", f"kept={place / 'moved'}", "evaluation.windows=8", "name=again")
    assert done.returncode == 1
    assert "rtn left the interval." in done.stdout
    assert "| left its interval |" in (place / "again/reproduce.md").read_text()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("methods=[fp32,nf4]", "kept has no row of nf4; it has fp32, rtn."),
        ("methods=[rtn]", "Changes are to the float model: methods takes fp32, too."),
        ("evaluation.windows=4", "kept were evaluated on another text or other windows."),
    ],
)
def test_rows_that_can_not_be_compared_are_refused(place, setting, message):
    done = run(place, "reproduce", f"kept={place / 'kept'}", "evaluation.windows=8", "name=refused", setting)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr
