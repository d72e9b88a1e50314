"""experiments.distortion: rows, table and figure; what has no range of its own is refused."""

import json

import numpy as np
import pytest
from commands import run_here

from jquant.plot import distortion

SMALL = ("rows=256", "columns=64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("distortion")
    done = run_here("distortion", f"results={place}", "name=small", "methods=[rtn_mse-2,e8p-2,rtn_mse-4,nf4]", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "error over bound" in done.stdout
    return place / "small"


def test_rows_have_bits_and_errors_above_the_bound(folder):
    rows = {row["method"]: row for row in map(json.loads, (folder / "distortion.jsonl").read_text().splitlines())}
    assert [*rows] == ["rtn_mse-2", "e8p-2", "rtn_mse-4", "nf4"]
    assert rows["e8p-2"]["bits_per_weight"] == 2 + 16 / 256
    assert rows["nf4"]["bits_per_weight"] == 4.5
    assert rows["e8p-2"]["squared_error"] == pytest.approx(0.0912, rel=0.02)
    for row in rows.values():
        assert 1.2 < row["squared_error"] * 4 ** row["bits_per_weight"] < 5
    assert (folder / "distortion.md").read_text().count("\n| ") == 5


def test_the_figure_joins_a_methods_widths_and_draws_the_bound(folder):
    assert (folder / "distortion.png").stat().st_size > 10_000
    assert (folder / "distortion.pdf").read_bytes().startswith(b"%PDF")
    lines = distortion([json.loads(line) for line in (folder / "distortion.jsonl").read_text().splitlines()]).lines
    assert len(lines) == 4
    assert sorted(len(line.get_xdata()) for line in lines[:3]) == [1, 1, 2]
    bits, bound = lines[3].get_data()
    np.testing.assert_allclose(bound, 4.0 ** -np.asarray(bits))


@pytest.mark.parametrize("method", ["fp32", "gptq", "gguf_q4_0"])
def test_a_range_that_looks_at_more_than_weights_is_refused(tmp_path, method):
    done = run_here("distortion", f"results={tmp_path}", f"methods=[{method}]", *SMALL)
    assert done.returncode == 2
    assert f"error: {method} has no one range that looks at weights alone" in done.stderr
    assert not list(tmp_path.iterdir())
