"""Sweeps on real engines: in one process, on a Ray and a submitit that the tests start; trials that die or fail."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import scipy.stats
from checkpoints import refused
from commands import run_here
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict

from experiments import tables
from experiments.collect import RUNNING, TRIAL, average, collect, outcome, read_sweep, take_out, trial_folder
from experiments.collect import main as collect_main
from experiments.sweep import ATTEMPTS, Sweep, expand, list_trials, run_trial
from jquant.errors import InputError

ROOT = Path(__file__).parents[1]
LAYERS = 8  # time to kill a trial between its first block and its last


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("sweep")
    model = checkpoints.llama(hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS, initializer_range=0.1)
    checkpoints.save(made / "float", model)
    for seed, name in enumerate(("calibration", "evaluation")):
        (made / f"{name}.txt").write_text(checkpoints.random_text(8000, seed=seed + 3))
    return made


def settings(name: str) -> list[str]:
    given = ["model=local", "model.path=float", "evaluation.data=evaluation.txt", "evaluation.windows=4"]
    given += ["evaluation.context=32", "calibration.data=calibration.txt", "calibration.samples=64"]
    return [*given, "calibration.context=64", "generation.tokens=0", "group=32", f"name={name}"]


def sweep(folder: Path, name: str, *overrides: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.perplexity_table", "--multirun", *overrides, *settings(name)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def table(folder, monkeypatch) -> Callable[..., tuple[int, str]]:
    """Runs the command in this process, and gives its status and all that was said."""
    monkeypatch.chdir(folder)

    def run(name: str, *arguments: str) -> tuple[int, str]:
        done = run_here("perplexity_table", *arguments, *settings(name))
        return done.returncode, done.stdout + done.stderr

    return run


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Status, and all that was said."""
    try:
        said = process.communicate(timeout=400)
    finally:
        process.kill()
    return process.returncode, "".join(said)


def rows(folder: Path) -> dict[tuple[str, int], float]:
    """Perplexities by method and width."""
    found = map(json.loads, (folder / "table.jsonl").read_text().splitlines())
    return {(row["method"], row["config"]["bits"]): row["perplexity"] for row in found}


def kill_between_blocks(folder: Path, method: str, process: subprocess.Popen) -> int:
    """Kills the process of a method's trial once its first block is finished, and tells which block was its last."""
    while process.poll() is None:
        for first in folder.glob("trials/*/unfinished/*/blocks/00000"):
            if first.parents[1].name == method:
                os.kill(json.loads((first.parents[3] / TRIAL).read_text())["process"], signal.SIGKILL)
                return len(list(first.parent.glob("0*")))
        time.sleep(0.002)
    raise AssertionError(f"no block of {method} was seen: {process.communicate()}")


@pytest.fixture(scope="module")
def alone(folder) -> dict[tuple[str, int], float]:
    """What trials one after another in one process give."""
    status, said = ended(sweep(folder, "alone", "method=rtn,gptq", "bits=3"))
    assert status == 0, said
    assert "Missing" not in said
    assert "trial 2/2: method=gptq" in said
    return rows(folder / "results" / "alone")


def test_a_sweep_in_one_process_makes_one_table_of_its_trials(folder, alone, table):
    assert alone.keys() == {("rtn", 3), ("gptq", 3)}
    written = (folder / "results" / "alone" / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in written[2:4]] == ["RTN-3", "GPTQ-3"]
    assert "vs" not in written[0]
    assert (folder / "results" / "alone" / "perplexity_bits.png").exists()
    assert not list(folder.glob("results/alone/trials/*/unfinished"))
    status, said = table("single", "methods=[gptq]", "bits=3")
    assert status == 0, said
    assert rows(folder / "results" / "single")["gptq", 3] == alone["gptq", 3]


def test_on_ray_a_killed_trial_goes_on_where_it_was_and_a_failing_one_is_listed(folder, alone):
    process = sweep(folder, "ray", "method=gptq", "calibration.held_out=0,100000", "bits=3", "launcher=ray")
    blocks = kill_between_blocks(folder / "results" / "ray", "gptq", process)
    status, said = ended(process)
    assert status == 1, said
    assert 1 <= blocks < LAYERS
    assert rows(folder / "results" / "ray") == {("gptq", 3): alone["gptq", 3]}
    states = [json.loads(path.read_text()) for path in folder.glob(f"results/ray/trials/*/{TRIAL}")]
    assert [state["attempt"] for state in states if "rows" in state] == [2]
    written = (folder / "results" / "ray" / "table.md").read_text()
    for told in (said, written):
        assert "Missing rows: 1" in told
        assert re.search("calibration.held_out=100000: failed: calibration.data=.*: The calibration text has", told)


def test_on_submitit_a_killed_trial_is_told_and_the_same_command_finishes_it(folder, alone):
    overrides = ("method=gptq", "bits=3", "launcher=submitit_local")
    process = sweep(folder, "submitit", *overrides)
    kill_between_blocks(folder / "results" / "submitit", "gptq", process)
    status, said = ended(process)
    assert status != 0, said
    collected = subprocess.run(
        [sys.executable, "-m", "experiments.collect", folder / "results" / "submitit"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert collected.returncode == 1
    assert "Missing rows: 1" in collected.stdout
    assert re.search(r"begun \(attempt 1, process \d+\), and not finished", collected.stdout)
    status, said = ended(sweep(folder, "submitit", *overrides))
    assert status == 0, said
    assert rows(folder / "results" / "submitit") == {("gptq", 3): alone["gptq", 3]}
    assert collect(folder / "results" / "submitit") == {}


def test_a_config_can_be_a_sweep_and_the_command_line_changes_what_it_varies(folder, table):
    overrides = ("--config-name", "bits_sweep", "method=rtn", "bits=2,8")  # `settings` give group=32
    status, said = table("in_config", *overrides)
    assert status == 0, said
    found = {(row["config"]["bits"], row["config"]["group"]) for row in tables.read_rows(folder / "results/in_config")}
    assert found == {(2, 32), (8, 32)}


def test_a_search_ends_with_the_best_of_its_trials_and_begun_again_computes_nothing(folder, table):
    overrides = ["--multirun", "sweeper=optuna", "hydra.sweeper.n_trials=4", "method=rtn", "bits=range(2,8)"]
    status, said = table("search", *overrides)
    rows = tables.read_rows(folder / "results/search")
    best = min(rows, key=lambda row: row["kl"])
    found = OmegaConf.load(folder / "results/search/optimization_results.yaml")
    assert (found.best_params.bits, found.best_value) == (best["config"]["bits"], pytest.approx(best["kl"]))
    assert (status, len(rows)) == (0, len(read_sweep(folder / "results/search"))), said
    assert len({row["config"]["bits"] for row in rows}) > 1  # it searches
    again = table("search", *overrides)
    assert again[0] == 0
    assert tables.read_rows(folder / "results/search") == rows
    assert not (folder / "optimization_results.yaml").exists()


def test_trials_are_those_that_hydra_runs():
    overrides = ["method=rtn,gptq", "bits=2,3", "group=32", "launcher=ray", "+note='a,b'", "seed=range(0,3)"]
    trials = [
        [f"method={method}", f"bits={bits}", "group=32", "launcher=ray", "+note='a,b'", f"seed={seed}"]
        for method in ("rtn", "gptq")
        for bits in (2, 3)
        for seed in range(3)
    ]
    assert expand(overrides) == trials
    assert expand(["bits=2,3", "bits=4"]) == [["bits=4"]]  # a config's values, and those of the command line
    with refused("one folder", "name="):
        expand(["model=a,b"])
    with refused("one folder"):
        expand(["model=a", "name=x,y"])
    assert expand(["model=a,b", "name=both"]) == [["model=a", "name=both"], ["model=b", "name=both"]]


def test_a_trials_folder_does_not_depend_on_where_and_how_it_runs(tmp_path):
    place = trial_folder(tmp_path, ["bits=3", "method=gptq"])
    assert place.parent == tmp_path / "trials"
    assert place == trial_folder(tmp_path, ["launcher=ray", "method=gptq", "name=x", "bits=3"])
    assert place != trial_folder(tmp_path, ["bits=4", "method=gptq"])
    assert place != trial_folder(tmp_path, ["bits=3", "method=gptq", "model.path=/a b/../c"])
    assert trial_folder(tmp_path, ["model.path=/a b/../c"]).parent == tmp_path / "trials"


@pytest.fixture
def job(tmp_path, monkeypatch) -> Callable[[Callable], dict]:
    """Runs work as a trial of a sweep in this process, and tells what is written down of it."""
    monkeypatch.chdir(tmp_path)
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        config = compose("perplexity_table", ["method=rtn", "name=tried"], return_hydra_config=True)
    with open_dict(config):
        config.hydra.runtime.cwd = str(tmp_path)
    HydraConfig.instance().set_config(config)
    settings = {"results": "results", "name": "tried"}
    state = trial_folder(tmp_path / "results" / "tried", ["method=rtn", "name=tried"]) / TRIAL

    def run(work: Callable, told: dict | None = None) -> dict:
        state.parent.mkdir(parents=True, exist_ok=True)
        state.unlink(missing_ok=True)
        if told:
            state.write_text(json.dumps(told))
        run_trial(settings, work)
        return json.loads(state.read_text())

    yield run
    HydraConfig.instance().cfg = None


def test_errors_are_tried_again_a_users_are_not_and_neither_stops_a_sweep(job):
    calls = []

    def fails(times: int, error: Exception):
        def work(settings):
            calls.append(settings)
            if len(calls) <= times:
                raise error
            return [{"fingerprint": "f"}]

        calls.clear()
        return work

    told = job(fails(2, RuntimeError("out of\nmemory")))
    assert (told["attempt"], told["rows"]) == (3, ["f"])
    told = job(fails(3, RuntimeError("out of\nmemory")))
    assert (told["attempt"], told["failed"], len(calls)) == (ATTEMPTS, "RuntimeError: out of", ATTEMPTS)
    told = job(fails(1, InputError("bits=9 is too much.")))
    assert (told["attempt"], told["failed"], len(calls)) == (1, "bits=9 is too much.", 1)
    assert {settings["checkpoints"] for settings in calls} == {
        f"{Path(calls[0]['results']) / calls[0]['name']}/unfinished"
    }


def test_a_trial_whose_process_died_too_often_gives_up_without_another_attempt(job):
    calls = []
    work = lambda settings: calls.append(settings) or [{"fingerprint": "f"}]  # noqa: E731
    assert job(work, {"attempt": ATTEMPTS, "process": 1})["failed"] == f"its process died {ATTEMPTS} times"
    assert not calls
    assert job(work, {"attempt": ATTEMPTS - 1, "process": 1})["rows"] == ["f"]
    assert (
        job(work, {"attempt": ATTEMPTS, "process": 1, "rows": ["f"]})["attempt"] == 1
    )  # finished, and asked for again


def test_a_folder_without_a_sweep_is_refused(tmp_path):
    for look in (collect, lambda folder: take_out(folder, "bits=3")):
        with refused(str(tmp_path), "no sweep"):
            look(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- before the first trial -----------------------------------------------------------------------------------------


@pytest.fixture
def begin(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Does what happens before the first trial of a sweep, and tells its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def start(*overrides: str) -> Path:
        with initialize_config_dir(str(ROOT / "configs"), version_base=None):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            given = [*overrides, "name=begun"]
            config = hydra.compose_config("perplexity_table", given, RunMode.MULTIRUN, with_log_configuration=False)
            Sweep().on_multirun_start(config, config_name="perplexity_table")
        return tmp_path / "results" / "begun"

    return start


@pytest.mark.parametrize(
    ("overrides", "part"),
    {
        ("method=rtn,gtpq",): "method=gtpq can't: There is no method 'gtpq'; the nearest names are gptq,",
        ("method=rtn,gptq_damping-3",): "gptq_damping-3 chooses by held-out windows",
        ("bits=3,9", "method=gptq"): "bits=9 can't:",
        ("seed=0,1,two",): "seed=two can't: seed takes a whole number from 0, not 'two'.",
        ("evaluation.data=wiki_utf8,wiki_utf9",): "'wiki_utf9'",
        ("model=local", "model.path=/nowhere/a,/nowhere/b"): "model.path=/nowhere/a does not exist.",
    }.items(),
)
def test_a_trial_that_cannot_run_is_found_before_the_first_and_nothing_is_written(begin, capsys, overrides, part):
    with pytest.raises(SystemExit) as ended:
        begin(*overrides)
    assert ended.value.code == 2
    assert part in capsys.readouterr().err
    assert not list(Path.cwd().iterdir())


def test_a_sweep_does_not_begin_in_a_folder_whose_table_no_sweep_made(begin, capsys):
    folder = Path("results/begun")
    tables.add_rows(folder, KEPT)
    before = (folder / "table.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        begin("method=rtn,gptq")
    assert "a table that no sweep made: give the sweep a folder of its own, name=" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == [tables.LOCK, "table.jsonl"]
    assert (folder / "table.jsonl").read_bytes() == before


def test_sweeps_that_begin_together_list_the_trials_of_all(tmp_path):
    trials = [[f"bits={bits}", f"seed={seed}"] for bits in (2, 3, 4) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda one: list_trials(tmp_path, [one]), trials))
    assert sorted(read_sweep(tmp_path)) == sorted(trials)


def test_a_failed_trial_may_begin_anew_but_not_one_that_runs(begin):
    folder = begin("method=rtn,gptq,awq")
    states = {}
    for trial in read_sweep(folder):
        place = trial_folder(folder, trial)
        place.mkdir(parents=True)
        told = {"attempt": 3, "process": 1} | ({"rows": []} if "method=awq" in trial else {})
        (place / TRIAL).write_text(json.dumps(told))
        states[trial[0]] = place
    with tables.locked(states["method=gptq"], RUNNING):
        begin("method=rtn,gptq,awq")
        assert [(states[f"method={name}"] / TRIAL).exists() for name in ("rtn", "gptq", "awq")] == [False, True, True]
        assert outcome(states["method=gptq"]) == ([], "runs (attempt 3, process 1)")
    assert outcome(states["method=gptq"]) == ([], "begun (attempt 3, process 1), and not finished")


def test_a_trial_that_another_process_is_at_is_left_to_it(job, tmp_path, capsys):
    calls = []
    [place] = [trial_folder(tmp_path / "results" / "tried", ["method=rtn", "name=tried"])]
    with tables.locked(place, RUNNING):
        told = job(calls.append, {"attempt": 1, "process": 1})
    assert (calls, told) == ([], {"attempt": 1, "process": 1})
    assert "another process computes it" in capsys.readouterr().out


# ---- the table of a sweep -------------------------------------------------------------------------------------------

KEPT = tables.read_rows(ROOT / "experiments" / "results" / "perplexity_table")
SHARED = "name=made"


@pytest.fixture
def made(tmp_path) -> Path:
    """A sweep of three methods: rtn and nf4 have rows, gtpq failed; beside them a row that no sweep made."""
    list_trials(tmp_path, [[f"method={name}", "bits=4", SHARED] for name in ("rtn", "nf4", "gtpq")])
    for trial, row in zip(read_sweep(tmp_path), (KEPT[2], KEPT[5], None), strict=True):
        place = trial_folder(tmp_path, trial)
        told = {"rows": [row["fingerprint"]]} if row else {"failed": "There is no method 'gtpq'."}
        if row:
            tables.add_rows(place, [row])
        place.mkdir(parents=True, exist_ok=True)
        (place / TRIAL).write_text(json.dumps({"attempt": 1, "process": 1} | told))
    tables.add_rows(tmp_path, KEPT[:2])
    return tmp_path


def methods(folder: Path) -> list[str]:
    return [row["method"] for row in tables.read_rows(folder)]


def test_collecting_keeps_the_rows_that_other_commands_made(made):
    for _ in range(2):
        assert collect(made) == {"method=gtpq": "failed: There is no method 'gtpq'."}
        assert methods(made) == ["fp32", "int8", "rtn", "nf4"]
        assert tables.read_rows(made)[:2] == KEPT[:2]
    assert "FP32" not in (made / "table.md").read_text()


def test_a_collected_table_ends_with_its_files_and_what_is_no_sweep_is_told_apart(made, capsys):
    collect(made)
    assert (
        f"Results: {made}/table.md, table.csv, table.jsonl. Figure: {made}/perplexity_bits.png"
        in capsys.readouterr().out
    )
    (made / "ablation").mkdir()
    with refused(f"There is no folder {made}/ablaton; the nearest is {made}/ablation."):
        collect(made / "ablaton")
    tables.write_table(made / "ablation", KEPT[:1])
    with refused(f"a plain run, no sweep: they are in {made}/ablation/table.md."):
        collect(made / "ablation")


def test_the_float_model_has_one_row_in_a_sweep_over_groups(tmp_path):
    trials = [[f"method={row['method']}", f"group={group}"] for row in (KEPT[0], KEPT[2]) for group in (32, 64)]
    list_trials(tmp_path, trials)
    for index, trial in enumerate(trials):
        row, place = KEPT[0 if index < 2 else 2] | {"fingerprint": str(index)}, trial_folder(tmp_path, trial)
        tables.add_rows(place, [row])
        (place / TRIAL).write_text(json.dumps({"attempt": 1, "process": 1, "rows": [str(index)]}))
    assert collect(tmp_path) == {}
    assert methods(tmp_path) == ["fp32", "rtn", "rtn"]
    assert [tables.swept(row) for row in tables.read_rows(tmp_path)] == ["", "group=32", "group=64"]


def test_a_trial_can_be_taken_out_and_its_row_stays_in_its_own_folder(made, monkeypatch, capsys):
    collect(made)
    with refused("no trial 'method=gptq'", "method=rtn; method=nf4; method=gtpq"):
        take_out(made, "method=gptq")
    with refused("no trial 'method=gt'"):
        take_out(made, "method=gt")
    monkeypatch.setattr(sys, "argv", ["collect", str(made), "--without", "method=gtpq"])
    with pytest.raises(SystemExit) as ended:
        collect_main()
    assert ended.value.code == 0
    assert "Taken out: method=gtpq." in capsys.readouterr().out
    assert len(read_sweep(made)) == 2
    place = trial_folder(made, ["method=nf4", "bits=4", SHARED])
    assert take_out(made, "method=nf4") == ["method=nf4"]
    assert methods(made) == ["fp32", "int8", "rtn"]
    assert methods(place) == ["nf4"]
    with refused("no trial would be left"):
        take_out(made, "the only trial")


def seeded(folder: Path, **changes) -> list[float]:
    """A sweep of three seeds of rtn and of awq; rows of the last seed with these changes of their protocol."""
    trials = [[f"method={name}", f"seed={seed}", SHARED] for name in ("rtn", "awq") for seed in range(3)]
    list_trials(folder, trials)
    values = [30.0, 31.0, 33.5, 26.0, 26.1, 26.2]
    for trial, value, base in zip(trials, values, [KEPT[2]] * 3 + [KEPT[4]] * 3, strict=True):
        seed = int(trial[1].partition("=")[2])
        row = base | {"perplexity": value, "config": base["config"] | {"seed": seed}, "fingerprint": " ".join(trial)}
        row["protocol"] = base["protocol"] | {"calibration_sha256": str(seed)} | (changes if seed == 2 else {})
        place = trial_folder(folder, trial)
        tables.add_rows(place, [row])
        (place / TRIAL).write_text(json.dumps({"attempt": 1, "process": 1, "rows": [row["fingerprint"]]}))
    return values


def test_means_over_seeds_have_students_intervals(tmp_path, monkeypatch, capsys):
    values = seeded(tmp_path)
    monkeypatch.setattr(sys, "argv", ["collect", str(tmp_path), "--over", "seed"])
    with pytest.raises(SystemExit) as ended:
        collect_main()
    assert ended.value.code == 0
    page = (tmp_path / "over-seed.md").read_text()
    for name, three in (("rtn", values[:3]), ("awq", values[3:])):
        half = scipy.stats.t.interval(0.95, 2, scale=scipy.stats.sem(three))[1]
        assert f"method={name} | 3 | 4." in page
        assert f"| {np.mean(three):.3f} ±{half:.3f} |" in page
    assert "Means over seed" in capsys.readouterr().out


@pytest.mark.parametrize("changed", [{"context": 512}, {"evaluation_sha256": "other"}, {"bos": True}])
def test_no_mean_is_taken_over_different_protocols(tmp_path, changed):
    seeded(tmp_path, **changed)
    with refused("method=rtn: no mean is taken", f"whose protocol.{next(iter(changed))} differs"):
        average(tmp_path, "seed")
    with refused("do not vary 'bits'", "method, seed"):
        average(tmp_path, "bits")
    with refused("no mean is taken", "composition differs"):
        average(tmp_path, "method")
    assert not list(tmp_path.glob("over-*"))


DAMAGED = [
    "",
    "{",
    "[]",
    "[" * 100_000,
    '{"trials": 3}',
    '{"trials": [[3]]}',
    '{"trials": ["a"]}',
    '{"trials": [["\\ud800"]]}',
]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_list_of_trials_is_refused_by_its_name(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    with refused("sweep.json"):
        read_sweep(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "3", "{}", '{"attempt": "1", "process": 2}', '{"attempt": 1, "process": 2, "rows": [3]}',
             '{"attempt": 1, "process": 2, "failed": null}', '{"attempt": 1, "process": 2, "failed": "\\udfff"}'],
)  # fmt: skip
def test_a_damaged_state_of_a_trial_is_refused_by_its_name(tmp_path, text):
    (tmp_path / TRIAL).write_text(text)
    with refused("trial.json"):
        outcome(tmp_path)


def test_a_pipe_in_the_place_of_a_sweeps_file_is_refused(tmp_path):
    for name, look in (("sweep.json", read_sweep), (TRIAL, outcome)):
        os.mkfifo(tmp_path / name)
        with refused(f"{name} is not a plain file"):
            look(tmp_path)
