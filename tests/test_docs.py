"""README.md and docs/: what they link to, name and quote is there, and their tables are what result files say."""

import ast
import hashlib
import importlib.util
import inspect
import json
import re
import shlex
import shutil
from pathlib import Path

import datasets
import pytest
import yaml
from conftest import wikitext

import jquant
from experiments.compositions import FOLDER as COMPOSITIONS
from experiments.compositions import find_method, takes_bits
from experiments.overrides import check_command
from experiments.tables import paired_change, read_rows
from jquant import METHODS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
PAGE = pytest.mark.parametrize("page", TEXT)

spec = importlib.util.spec_from_file_location("tables_of_pages", ROOT / "docs" / "tables.py")
assert spec is not None
assert spec.loader is not None
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


def fences(text: str, language: str = r"\w*") -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def spans(text: str) -> list[str]:
    """The words set as code within a page's sentences and tables."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$|<!--.*?-->", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(text: str) -> set[str]:
    """What a link into a page may end in, as GitHub makes it of headings."""
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", plain, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[str]:
    """Every `make …` and `python -m …` of a page, without comments."""
    lines = [line for block in fences(text) for line in block.splitlines()] + spans(text)
    return [line.split(" #")[0].strip() for line in lines if re.match(r"(make|python -m) \w", line)]


def test_readme_is_short():
    assert len(TEXT["README.md"].splitlines()) <= 150


@PAGE
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", TEXT[page])
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_page_is_reached_from_the_readme():
    for page in TEXT:
        assert page == "README.md" or f"]({page})" in TEXT["README.md"], page


@PAGE
def test_commands_exist_with_their_settings(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands(TEXT[page]):
        first, *rest = shlex.split(command)
        if first == "make" and rest[0] != "…":
            assert rest[0] in targets, command
            module = "experiments.perplexity_table"
            given = [part for word in rest[1:] if word.startswith("ARGS=") for part in shlex.split(word[5:])]
            arguments = given if rest[0] == "table" else []  # the others pass them to programs without settings
        else:
            module, *arguments = rest[1:]
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), command
        package, _, script = module.partition(".")
        if package == "experiments" and script != "collect":
            check_command(script, arguments)
            for name in methods_in(arguments):
                assert name == "fp32" or find_method(name, 4, 64, False), command


def methods_in(arguments: list[str]) -> list[str]:
    """The methods that a command line names."""
    given = dict(argument.split("=", 1) for argument in arguments if argument.startswith(("method=", "methods=")))
    return [name for names in given.values() for name in names.strip("[]").split(",")]


@PAGE
def test_settings_in_sentences_exist(page):
    known = yaml.safe_load((ROOT / "configs/perplexity_table.yaml").read_text())
    known["calibration"] |= yaml.safe_load((ROOT / "configs/quantize.yaml").read_text())["calibration"]
    known["mesh"] = yaml.safe_load((ROOT / "configs/mesh/one.yaml").read_text())
    for span in spans(TEXT[page]):
        if found := re.match(r"(calibration|evaluation|generation|mesh)\.(\w+)", span):
            assert found[2] in known[found[1]], span


@PAGE
def test_methods_in_sentences_exist(page):
    for span in spans(TEXT[page]):
        if re.fullmatch(r"(rtn|gptq|awq|learned|gguf|smoothquant|w8a8|nf4|int8)(_\w+)?(-\d)?", span):
            assert find_method(span, 4, 64, False), span


def listed(section: str) -> set[str]:
    """The names in the first column of a section's table in methods.md, with those marked † once more, marked."""
    rows = re.findall(
        r"^\| (.*?) \|", TEXT["docs/methods.md"].split(f"## {section}\n")[1].split("\n## ")[0], re.MULTILINE
    )
    return {name + mark for row in rows[1:] for name, mark in re.findall(r"`(\w+)`( †)?", row)}


@pytest.mark.parametrize(
    ("section", "names"),
    [("Named methods", list(METHODS)), ("Compositions", [path.stem for path in COMPOSITIONS.glob("*.yaml")])],
)
def test_the_lists_of_methods_are_complete_and_mark_what_takes_bits(section, names):
    assert listed(section) == {name + " †" * takes_bits(name) for name in names}


def test_every_part_is_in_the_list_of_methods():
    from experiments.compositions import PARTS

    words = set(re.findall(r"\w+", " ".join(spans(TEXT["docs/methods.md"]))))
    assert {*PARTS} - {"Method"} <= words


def test_the_composition_that_a_page_shows_is_the_file():
    (block,) = fences(TEXT["docs/methods.md"], "yaml")
    assert yaml.safe_load(block) == yaml.safe_load((COMPOSITIONS / "awq_gptq.yaml").read_text())


@PAGE
def test_python_on_a_page_calls_what_is_there(page):
    for block in fences(TEXT[page], "python"):
        tree = ast.parse(block)
        known = {}
        for node in ast.walk(tree):
            # Files that a page shows are run by tests/test_extending.py.
            if isinstance(node, ast.ImportFrom) and f"<!-- file: {node.module}.py -->" not in TEXT[page]:
                module = importlib.import_module(str(node.module))
                assert node.module != "jquant" or {name.name for name in node.names} <= {*jquant.__all__}
                known |= {name.name: getattr(module, name.name) for name in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "jquant":
                assert node.attr in [*jquant.__all__, "plot"]
            if isinstance(node, ast.Call):
                called = node.func
                name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
                function = known.get(name) or (getattr(jquant, name) if name in jquant.__all__ else None)
                if function is not None:
                    given = {str(keyword.arg): None for keyword in node.keywords}
                    inspect.signature(function).bind(*node.args, **given)


def test_the_recipe_for_wikitext_gives_the_files_of_the_figures(monkeypatch, tmp_path):
    lines = wikitext("wiki.test.raw").split("\n")[:-1]
    rows = [f"{line}\n" if line.strip() else "" for line in lines]  # as the data set has them: 4,358
    assert len(rows) == 4358
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, split: {"text": rows})
    monkeypatch.chdir(tmp_path)
    (recipe,) = fences(TEXT["docs/reproducing.md"], "python")
    exec(recipe, {})
    for name in ("wiki.test.raw", "wiki.test.noblank.raw"):
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() in TEXT["docs/reproducing.md"]


def test_tables_are_what_the_result_files_say(capsys):
    assert tables.main(check=True) == 0, capsys.readouterr().err


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """A page and its result file, elsewhere."""
    for name in ("README.md", "docs/methods.md", "experiments/results/perplexity_table/table.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    return tmp_path


def test_a_changed_result_is_found_and_written(copy, capsys):
    results = copy / "experiments/results/perplexity_table/table.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    rows[3]["perplexity"] += 0.001
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tables.main(check=True) == 1
    assert "README.md: experiments/results/perplexity_table/table.jsonl" in capsys.readouterr().err
    assert (copy / "README.md").read_text() == TEXT["README.md"]
    assert tables.main(check=False) == 0
    assert f"{rows[3]['perplexity']:.3f}" in (copy / "README.md").read_text()
    assert tables.main(check=True) == 0


def test_a_changed_page_is_found_and_mended(copy):
    page = copy / "README.md"
    page.write_text(page.read_text().replace("| INT8 | 2", "| INT8 | 1", 1))
    assert tables.main(check=True) == 1
    assert tables.main(check=False) == 0
    assert page.read_text() == TEXT["README.md"]


def test_a_table_without_an_end_is_named(copy, capsys):
    page = copy / "README.md"
    page.write_text(page.read_text().replace("<!-- end -->", ""))
    assert tables.main(check=True) == 1
    assert "<!-- end -->" in capsys.readouterr().err


def test_a_missing_figure_stops_the_writing(copy):
    page = copy / "README.md"
    page.write_text(page.read_text().replace("{kl:.4f}", "{klx:.4f}"))
    with pytest.raises(KeyError, match="klx"):
        tables.main(check=False)


@pytest.mark.parametrize("results", ["rounding", "ingredients"])
def test_changes_are_those_of_the_experiments(results):
    folder = ROOT / "experiments/results" / results
    rows = tables.read(folder / "table.jsonl", "rows")
    compared = 0
    for row, plain in zip(rows, read_rows(folder), strict=True):
        same = [other for other in rows if (other["width"], other["text"]) == (row["width"], row["text"])]
        base = [other for other in same if other["name"] == "gptq"]
        if row["change"]:
            change, low, high = paired_change(plain, base[0])
            assert row["change"] == f"{change:+,.1f} [{low:+,.1f}, {high:+,.1f}]"
            compared += 1
        else:
            assert row["name"] in ("gptq", "fp32")
    assert compared > 10


def test_rows_across_two_values_and_cells_of_other_tools(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    lines = [{"device": "x", "a": a, "b": b, "c": c} for a, b, c in (("u", 1, 0.5), ("u", 2, None), ("v", 1, -0.01))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    across = "rows.jsonl\nname | other: {a}\nacross: at {b}\ncell: {c:z.1f}\nv = V | 7\nu = U | 8\n"
    assert tables.table(across) == (
        "| name | other | at 1 | at 2 |\n| --- | ---: | ---: | ---: |\n| V | 7 | 0.0 |  |\n| U | 8 | 0.5 |  |\n"
    )
    assert tables.table("rows.jsonl b=1\na: {a}\nc: {c}\n") == "| a | c |\n| --- | ---: |\n| u | 0.5 |\n| v | -0.01 |\n"
