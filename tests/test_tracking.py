"""Rows in experiment trackers: TensorBoard's own files; what W&B and MLflow are called with, by stand-ins."""

import struct
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from checkpoints import refused
from commands import run_here
from tensorboardX.proto.event_pb2 import Event

from experiments import tables
from experiments.tracking import track, trackers

ROW = {
    "method": "gptq",
    "fingerprint": "0123456789abcdef",
    "kl": 0.25,
    "fallbacks": ["a"],
    "formula": {"weights": 3.5},
    "config": {"bits": 3, "evaluation": {"windows": 8}, "published": None},
    "protocol": {"model": "tiny"},
}
FIGURES, SETTINGS = (
    {"kl": 0.25, "formula.weights": 3.5},
    {"bits": 3, "evaluation.windows": 8, "protocol.model": "tiny"},
)


def test_tensorboard_has_every_row_that_is_added(tmp_path, monkeypatch):
    monkeypatch.setenv("JQUANT_TRACKING", "tensorboard")
    tables.add_rows(tmp_path / "mine", [ROW], "any.jsonl")
    (run,) = [path for path in (tmp_path / "mine/tensorboard").iterdir() if path.is_dir()]
    assert run.name == "mine gptq 012345"
    (file,) = run.iterdir()
    assert dict(scalars(file.read_bytes())) == FIGURES


def scalars(data: bytes) -> Iterator[tuple[str, float]]:
    """A TensorBoard file's figures. Each event has its length in 8 bytes, 4 of a checksum, and 4 of one behind it."""
    while data:
        (length,) = struct.unpack_from("<Q", data)
        event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
        yield from ((value.tag, value.simple_value) for value in event.summary.value if value.HasField("simple_value"))


def test_the_others_get_the_same_figures_and_settings(tmp_path, monkeypatch):
    calls = []
    said = lambda name: lambda *values, **named: calls.append((name, *values, named))  # noqa: E731
    run = SimpleNamespace(log=said("log"), finish=said("finish"))
    wandb = SimpleNamespace(__spec__=1, init=lambda **named: (calls.append(("init", named)), run)[1])
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("JQUANT_TRACKING", "wandb")
    track(tmp_path, [ROW])
    (_, given), logged, (finished, _) = calls
    assert (given["config"], given["dir"]) == (SETTINGS, str(tmp_path))
    assert (logged, finished) == (("log", FIGURES, {}), "finish")


def test_a_tracker_that_fails_loses_no_row(tmp_path, monkeypatch):
    def init(**_):
        raise RuntimeError("no key\nmore")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(__spec__=1, init=init))
    monkeypatch.setenv("JQUANT_TRACKING", "wandb")
    with refused(f"The rows are kept in {tmp_path}, but wandb did not take them: no key"):
        tables.add_rows(tmp_path, [ROW], "any.jsonl")
    monkeypatch.delenv("JQUANT_TRACKING")
    assert tables.read_rows(tmp_path, "any.jsonl") == [ROW]


@pytest.mark.parametrize(
    ("names", "message"),
    [("tensorbord", "is no tracker; there are tensorboard"), ("wandb", "needs the package wandb: pip install wandb")],
)
def test_an_unknown_or_missing_tracker_is_refused_before_any_work(names, message, monkeypatch, tmp_path):
    monkeypatch.setenv("JQUANT_TRACKING", names)
    done = run_here("perplexity_table", f"results={tmp_path}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr


def test_by_default_there_are_none(monkeypatch):
    monkeypatch.setenv("JQUANT_TRACKING", "")
    assert trackers() == []
