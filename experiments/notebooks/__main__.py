"""Executes the notebooks anew and writes them beside their scripts: `make notebooks`.

python -m experiments.notebooks                 # all of them
python -m experiments.notebooks inside_gptq     # some
"""

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))


def main(names: list[str]) -> None:
    """Executes notebooks by their scripts' names, in the repository's root."""
    for name in names:
        notebook = read(name)
        # One output for what a cell prints, whenever it is sent; a busy machine may send it late, and by default what
        # comes after 4 s is lost.
        client = NotebookClient(
            notebook,
            timeout=None,
            record_timing=False,
            coalesce_streams=True,
            iopub_timeout=600,
            raise_on_iopub_timeout=True,
        )
        client.execute(cwd=str(FOLDER.parents[1]))
        nbformat.write(cleaned(notebook), FOLDER / f"{name}.ipynb")
        print(FOLDER / f"{name}.ipynb", flush=True)


def read(name: str) -> nbformat.NotebookNode:
    """A script as a notebook without outputs; cells are numbered, so that the same run gives the same file."""
    notebook = jupytext.read(FOLDER / f"{name}.py")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without what is of one machine or moment: progress, and the kernel's versions."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    return notebook


def _is_progress(output: nbformat.NotebookNode) -> bool:
    data = output.get("data", {})
    bar = "application/vnd.jupyter.widget-view+json" in data or data.get("text/plain") == ""  # and what it leaves
    return bar or output.get("name") == "stderr"


if __name__ == "__main__":
    if unknown := {*sys.argv[1:]} - {*NAMES}:
        sys.exit(f"error: there is no notebook {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}.")
    main(sys.argv[1:] or NAMES)
