"""Widths under a budget: choices against every choice there is, and the whole experiment on a tiny model."""

import json
from itertools import product

import checkpoints
import numpy as np
import pytest
import yaml
from checkpoints import refused
from commands import run_here
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.compositions import find_method
from experiments.mixed_precision import exact, greedy
from experiments.tables import read_rows


@st.composite
def problems(draw):
    """Costs, sizes and a budget of up to 5 weights at up to 3 widths; wider is larger, and not always better."""
    weights, widths = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    numbers = st.integers(1, 6)
    costs = np.array([[draw(st.integers(0, 50)) / 7 for _ in range(widths)] for _ in range(weights)])
    sizes = np.array([np.cumsum([draw(numbers) * 48 for _ in range(widths)]) for _ in range(weights)])
    return costs, sizes, int(sizes[:, 0].sum()) + draw(st.integers(0, 40)) * 24


def total(values, chosen):
    return sum(values[weight, place] for weight, place in enumerate(chosen))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_exact_choice_is_the_best_of_all_and_the_greedy_one_fits(problem):
    costs, sizes, budget = problem
    fitting = [c for c in product(range(costs.shape[1]), repeat=len(costs)) if total(sizes, c) <= budget]
    found, quick = exact(costs, sizes, budget), greedy(costs, sizes, budget)
    assert total(sizes, found) <= budget
    assert total(sizes, quick) <= budget
    assert total(costs, found) == pytest.approx(min(total(costs, c) for c in fitting))
    assert total(costs, quick) <= total(costs, [0] * len(costs))


def test_a_budget_below_the_smallest_widths_is_refused():
    with refused("The smallest widths take 30 bytes, more than the 29 there are."):
        exact(np.zeros((2, 2)), np.array([[10, 20], [20, 30]]), 29)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    checkpoints.save(folder / "model", checkpoints.llama())
    for name, seed in (("evaluation", 1), ("calibration", 2)):
        (folder / name).write_text(checkpoints.random_text(6000, seed=seed))
    return folder


def run(place, *more):
    return run_here(
        "mixed_precision",
        *("model=local", f"model.path={place / 'model'}", f"results={place}", "name=mixed", "group=32"),
        *(f"evaluation.data={place / 'evaluation'}", "evaluation.windows=4", "evaluation.context=64"),
        *(f"calibration.data={place / 'calibration'}", "calibration.samples=8", "calibration.context=64"),
        *("calibration.held_out=2", "gradient_windows=4", "widths=[2,3,4]", *more),
    )


def test_plans_have_the_uniform_size_and_quantize_takes_them(place):
    done = run(place)
    assert done.returncode == 0, done.stderr
    rows = {row["method"]: row for row in read_rows(place / "mixed")}
    uniform = rows["gptq-3"]
    plans = sorted((place / "mixed").glob("*.yaml"))
    assert [plan.stem for plan in plans] == ["exact-kl", "exact-second_order", "greedy-kl", "greedy-second_order"]
    costs = [json.loads(line) for line in (place / "mixed/costs.jsonl").read_text().splitlines()]
    for plan in plans:
        assert rows[str(plan)]["bits_per_weight"] <= uniform["bits_per_weight"]
        widths = {rule["method"]: rule["weights"].count("kernel") for rule in yaml.safe_load(plan.read_text())["rules"]}
        assert sum(widths.values()) == 14
        assert len(widths) > 1
    by_kl = {row["width"]: row["kl"] for row in costs}
    assert sum(by_kl[2].values()) > sum(by_kl[3].values()) > sum(by_kl[4].values()) > 0
    taken = run_here(
        "quantize",
        *("model=local", f"model.path={place / 'model'}", f"method={plans[0]}", "group=32", f"output={place / 'out'}"),
        *(f"calibration.data={place / 'calibration'}", "calibration.samples=4", "calibration.context=64"),
    )
    assert taken.returncode == 0, taken.stderr
    again = run(place)  # nothing is measured again
    assert again.stdout.count("(kept)") == 6


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("bits=2", "bits=2 gives the size: it is one of widths=[2, 3, 4], not the smallest."),
        ("bits=7", "bits=7 gives the size"),
        ("calibration.held_out=0", "Costs are measured on held-out windows"),
        ("method=awq", "awq: widths are chosen for methods that change one weight at a time."),
        ("method=rtn", "rtn fits no weight to its inputs"),
        ("widths=[]", "widths is a list"),
    ],
)
def test_bad_settings_are_refused(place, setting, message):
    done = run(place, setting, "name=refused")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr
    assert not (place / "refused").exists()


def test_a_file_of_ones_own_is_named_by_its_path(tmp_path):
    with refused(f"{tmp_path}/none.yaml is not a file."):
        find_method(f"{tmp_path}/none.yaml", 3, 64, False)
    (tmp_path / "bad.yaml").write_text("rules: [{weights: 3, method: gptq}]")
    with refused(f"{tmp_path}/bad.yaml: a rule's weights are a regular expression"):
        find_method(f"{tmp_path}/bad.yaml", 3, 64, False)
