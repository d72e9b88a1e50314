"""Two real processes on this machine's loopback give what one gives, and fail together."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import refused
from commands import run_here
from test_streaming import files

import jquant
from experiments.command_line import devices_of
from jquant.errors import InputError
from jquant.io.load import load_model
from jquant.parallel.processes import as_first, gather, join, on_first

ROOT = Path(__file__).parents[1]
SAMPLING = ("calibration.samples=16", "calibration.context=24", "bits=3", "group=32", "method=gptq")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("hosts")
    model = checkpoints.llama(hidden_size=64, intermediate_size=128, num_hidden_layers=2, initializer_range=0.1)
    checkpoints.save(made / "float", model)
    (made / "text.txt").write_text(checkpoints.random_text(3000, seed=3))
    return made


def commands(folder: Path, output: str, *settings: str, script: str = "quantize") -> list[str]:
    if script == "quantize":
        settings = ("model.path=float", f"output={output}", "calibration.data=text.txt", *SAMPLING, *settings)
    elif script == "qat":
        settings = (output, *settings)
    else:
        wanted = ("evaluation.data=text.txt", "evaluation.windows=8", "evaluation.context=32")
        settings = (f"model.path={output}", *wanted, *settings)
    return [sys.executable, "-m", f"experiments.{script}", "model=local", *settings]


def run(folder: Path, command: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"} | (environment or {})
    return subprocess.Popen(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Status, standard output and error of each, all of which end."""
    try:
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def two(folder: Path, *arguments: str, script: str = "quantize") -> list[tuple[int, str, str]]:
    """A command in two processes that find each other by flags."""
    return ended(started(folder, *arguments, script=script))


def started(folder: Path, *arguments: str, script: str) -> list[subprocess.Popen]:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    flags = [f"hosts={{coordinator:'localhost:{port}',count:2,index:{index}}}" for index in range(2)]
    return [run(folder, commands(folder, *arguments, flag, script=script)) for flag in flags]


def two_by_slurm(folder: Path, *arguments: str) -> list[tuple[int, str, str]]:
    """A command in two processes as `srun --ntasks=2` starts them."""
    with socket.create_server(("localhost", 0)) as server:
        job = server.getsockname()[1]  # jax derives the coordinator's port from it
    slurm = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    ranks = [slurm | {"SLURM_PROCID": str(index), "SLURM_LOCALID": "0"} for index in range(2)]
    return ended([run(folder, commands(folder, *arguments, "hosts=auto"), rank) for rank in ranks])


@pytest.fixture(scope="module")
def alone(folder) -> Path:
    """What one process writes: this one."""
    given = {"model.path": folder / "float", "output": folder / "alone", "calibration.data": folder / "text.txt"}
    ended = run_here("quantize", "model=local", *(f"{key}={value}" for key, value in given.items()), *SAMPLING)
    assert ended.returncode == 0, ended.stderr
    return folder / "alone"


@pytest.fixture(scope="module")
def by_two(folder):
    """axis -> what two processes that cut it say; each run once, into two-<axis>."""
    return cache(lambda axis: two(folder, f"two-{axis}", f"mesh.{axis}=2"))


@pytest.mark.parametrize("axis", ["data", pytest.param("model", marks=pytest.mark.slow)])
def test_two_processes_write_the_weights_of_one_and_tell_it_once(folder, alone, by_two, axis):
    results = by_two(axis)
    assert [status for status, _, _ in results] == [0, 0], results
    assert ["2 blocks by gptq" in output for _, output, _ in results] == [True, False]
    theirs, ours = files(alone), files(folder / f"two-{axis}")
    assert theirs.keys() == ours.keys()
    differing = {name for name in theirs if theirs[name] != ours[name]}
    assert {Path(name).name for name in differing} <= {"manifest.json", "item.json"}  # the mesh; the error's last place


def test_two_processes_under_slurm_go_on_where_two_stopped_and_score_what_one_scores(folder, alone, by_two):
    by_two("data")
    shutil.copytree(folder / "two-data", folder / "resumed")
    whole = files(folder / "resumed")
    shutil.rmtree(folder / "resumed" / "blocks" / "00001")
    again = two_by_slurm(folder, "resumed", "mesh.data=2")
    assert [status for status, _, _ in again] == [0, 0], again
    assert files(folder / "resumed") == whole
    one = jquant.perplexity(load_model(alone), (folder / "text.txt").read_text(), context=32, windows=8)
    both = two(folder, "resumed", "mesh.data=2", script="evaluate")
    assert [status for status, _, _ in both] == [0, 0], both
    assert json.loads(both[0][1].splitlines()[-1])["perplexity"] == pytest.approx(one.value, rel=1e-4)
    assert "perplexity" not in both[1][1]


@pytest.mark.slow
def test_two_processes_train_as_one_with_two_devices_and_go_on(folder, monkeypatch):
    """Losses, evaluations and the model's bytes; after a kill, too."""
    given = ("model.path=float", "name=trained", "bits=2", "group=32", "text.data=text.txt", "text.context=32")
    given += ("calibration.data=text.txt", "calibration.samples=8", "calibration.context=24", "tuning.windows=4")
    given += ("evaluation.data=other.txt", "evaluation.windows=4", "evaluation.context=32", "generation.tokens=0")
    given += ("tuning.steps=12", "journal.every=3", "journal.evaluate_every=6", "mesh.data=2")
    (folder / "other.txt").write_text(checkpoints.random_text(800, seed=9))

    def settings(output: str) -> tuple[str, ...]:
        return (*given, f"output={output}", f"results={output}/results")

    def figures(output: str) -> list[tuple[int, dict[str, float]]]:
        lines = map(json.loads, (folder / output / "training/metrics.jsonl").read_text().splitlines())
        return [
            (line["step"], {key: line[key] for key in line.keys() & {"loss", "kl", "perplexity"}}) for line in lines
        ]

    monkeypatch.chdir(folder)
    one = run_here("qat", "model=local", *settings("one"))
    assert one.returncode == 0, one.stderr
    results = two(folder, *settings("two"), script="qat")
    assert [status for status, _, _ in results] == [0, 0], results
    assert ["perplexity" in said for _, said, _ in results] == [True, False]
    for (step, theirs), (same, ours) in zip(figures("one"), figures("two"), strict=True):
        assert step == same
        assert ours == pytest.approx(theirs, rel=1e-4)

    killed = started(folder, *settings("killed"), script="qat")
    try:
        while not any((folder / "killed/training/state").glob("[0-9]*")):
            assert [process.poll() for process in killed] == [None, None]
            time.sleep(0.01)
    finally:
        for process in killed:
            process.kill()
            process.communicate()
    assert any((folder / "killed/training/state").glob("[0-9]*"))
    assert not (folder / "killed/model").exists()
    results = two(folder, *settings("killed"), script="qat")
    assert [status for status, _, _ in results] == [0, 0], results
    assert figures("killed") == figures("two")
    assert files(folder / "killed/model") == files(folder / "two/model")


def test_when_the_first_process_cannot_write_both_end_with_a_sentence(folder):
    (folder / "file").write_text("")
    results = two(folder, "file/inside", "mesh.data=2")
    assert [status for status, _, _ in results] == [2, 2], results
    assert "file/inside can't be written" in results[0][2]
    assert "Process 0 could not go on" in results[1][2]


def test_hosts_that_cannot_be_are_refused():
    with refused("all three or none", "a:1"):
        join("a:1")
    with refused("no 2 of 2"):
        join("a:1", 2, 2)
    mesh = {"data": 1, "model": 1, "uneven": "error"}
    for wrong in ("yes", {"coordinator": "a:1"}, 3):
        with refused("hosts takes auto"):
            devices_of({"hosts": wrong, "mesh": mesh})


def test_hosts_auto_outside_any_cluster_is_refused_in_a_sentence(folder):
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI", "PMI"))}
    [(status, _, error)] = ended([run(folder, commands(folder, "nowhere", "hosts=auto"), variables)])
    assert status == 2
    assert "The processes can't meet" in error
    assert not (folder / "nowhere").exists()


def test_with_one_process_everything_is_first():
    tree = gather({"a": jnp.arange(3), "b": np.ones(2)})
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree))
    assert as_first([True, False]).tolist() == [True, False]
    done = []
    on_first(lambda: done.append(1))
    assert done == [1]

    def fails():
        raise InputError("The disk is full, says this test.")

    with refused("disk is full"):
        on_first(fails)
