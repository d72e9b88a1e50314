"""Notebooks: every script runs on a tiny model, and the kept notebook has its cells and was executed without errors."""

import os
import re
import runpy

import checkpoints
import matplotlib
import nbformat
import pytest
from commands import ROOT

from experiments.notebooks.__main__ import FOLDER, NAMES, cleaned, read

EVERY = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    return checkpoints.save(tmp_path_factory.mktemp("notebooks") / "tiny", checkpoints.llama(**shape))


@EVERY
def test_a_notebook_runs(name, tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("NOTEBOOK_MODEL", str(tiny))
    monkeypatch.chdir(tmp_path)
    backend = matplotlib.get_backend(auto_select=False)
    matplotlib.use("agg")
    try:
        runpy.run_path(str(FOLDER / f"{name}.py"))
    finally:
        matplotlib.pyplot.close("all")
        if backend:
            matplotlib.use(backend)
    assert not os.listdir(tmp_path)


@EVERY
def test_the_kept_notebook_has_the_scripts_cells_and_their_outputs(name):
    kept = nbformat.read(FOLDER / f"{name}.ipynb", nbformat.NO_CONVERT)
    nbformat.validate(kept)
    cells = lambda notebook: [(cell.id, cell.cell_type, cell.source) for cell in notebook.cells]  # noqa: E731
    assert cells(kept) == cells(read(name)), "make notebooks"
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert any(cell.outputs for cell in code)


@EVERY
def test_the_kept_notebook_is_small_and_of_no_machine(name):
    text = (FOLDER / f"{name}.ipynb").read_text()
    assert len(text) < 400_000
    plain = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(r"(/home|/root|/tmp|/work|/usr|/Users|C:\\\\)\b", plain)
    assert str(ROOT) not in plain


def test_progress_and_versions_are_left_out():
    code = nbformat.v4.new_code_cell("1")
    shown = nbformat.v4.new_output("stream", name="stdout", text="4\n")
    widget = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "Output()"}
    progress = [nbformat.v4.new_output("stream", name="stderr", text="quantize 1/30 layers\n")]
    progress += [nbformat.v4.new_output("display_data", data=widget)]
    code.outputs = [*progress, shown]
    notebook = nbformat.v4.new_notebook(
        cells=[code], metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}, "title": "x"}
    )
    assert cleaned(notebook).cells[0].outputs == [shown]
    assert list(notebook.metadata) == ["kernelspec"]
