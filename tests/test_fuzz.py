"""112 damaged files, and that the harness sees what it is there to see; `make fuzz` tries thousands."""

import collections

import fuzz
import pytest


def test_112_damaged_files_are_read_right_or_refused(capfd):
    outcomes = fuzz.run(112, seed=18)  # 4 of each kind
    total = sum(outcomes.values(), collections.Counter())
    assert set(total) <= set(fuzz.GOOD), capfd.readouterr().err
    assert sum(total.values()) == 112
    # The changes are neither all fatal nor all without effect.
    assert total["refused"] >= 25
    assert total["same"] + total["weights"] + total["as told"] >= 5


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    made = fuzz.Reader(tmp_path_factory.mktemp("fuzz"), [], limit_s=2)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [("hang", "hang"), ("crash", "crash"), ("memory", "escaped"), ("escape", "escaped"), ("good", "same")],
)
def test_the_harness_sees_every_fault(tmp_path, reader, fault, outcome):
    (tmp_path / "trap").write_text(fault)
    found, why = reader.read(tmp_path, "trap")
    assert found == outcome
    assert {"memory": "allocate", "escape": "KeyError"}.get(fault, "") in why
