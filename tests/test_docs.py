"""README.md and docs/: what they link to, name and quote is there, and their tables are what result files say."""

import ast
import hashlib
import html
import importlib.util
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType

import datasets
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from conftest import wikitext

import jquant
from experiments.compositions import FOLDER as COMPOSITIONS
from experiments.compositions import find_method, takes_bits
from experiments.overrides import check_command
from experiments.tables import paired_change, read_rows
from jquant import METHODS, plot

ROOT = Path(__file__).parents[1]
DOCS = [page for pattern in ("*.md", "[!_]*/*.md") for page in sorted((ROOT / "docs").glob(pattern))]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
PAGE = pytest.mark.parametrize("page", TEXT)


def load(script: str) -> ModuleType:
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(script, ROOT / "docs" / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables, axes = load("tables"), load("members")
MEMBERS = [(folder, name) for folder in axes.FOLDERS for name in axes.members(folder) if name not in axes.WAITING]


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


def linked(page: str) -> set[str]:
    """The pages that a page links to."""
    links = re.findall(r"\]\(([^)\s#]+\.md)", TEXT[page])
    return {((ROOT / page).parent / link).resolve().relative_to(ROOT).as_posix() for link in links} & TEXT.keys()


def test_every_page_is_two_links_from_the_readme():
    near = linked("README.md")
    assert {path for path in TEXT if path.count("/") < 2} <= near | {"README.md"}
    assert TEXT.keys() - near - {"README.md"} <= set().union(*map(linked, near))


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
        if package == "experiments" and script not in ("collect", "report"):
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


def test_every_member_of_an_axis_has_a_page_and_every_page_a_member():
    assert {"GPTQ", "Hadamard", "Q4_K", "double_quantized", "Search"} < {name for _, name in MEMBERS}
    assert {("rounding", "Rounded"), ("transforms", "Rotation"), ("formats", "pack")}.isdisjoint(MEMBERS)
    pages = {(folder, page.stem) for folder in axes.FOLDERS for page in (ROOT / "docs" / folder).glob("*")}
    assert pages == {*MEMBERS}


def test_every_part_of_a_named_method_is_a_member():
    classes = {value for folder in axes.FOLDERS for value in axes.members(folder).values() if isinstance(value, type)}
    for name in METHODS:
        chosen = find_method(name, 4, 64, False)
        parts = [chosen.format, chosen.range, chosen.rounding, chosen.transform, chosen.rotation, chosen.incoherence]
        assert {type(part) for part in parts if part is not None} <= classes, name


@pytest.mark.parametrize(("folder", "name"), MEMBERS)
def test_a_page_of_a_member_says_three_things_and_shows_rows_of_it(folder, name):
    text = TEXT[f"docs/{folder}/{name}.md"]
    title, *paragraphs = text.split("<!--")[0].strip().split("\n\n")
    assert title == f"# `{name}`"
    assert len(paragraphs) == 3
    assert paragraphs[1].startswith("Use ")
    assert paragraphs[2].startswith("Source: ")
    shown = re.findall(r"^\| `([\w-]+)`", text, re.MULTILINE)
    assert any(
        uses(find_method(method, 4, 64, False), axes.members(folder)[name]) for method in shown if method != "fp32"
    )


def uses(part: object, member: object) -> bool:
    """Whether a method, or a part of it, is an instance of the member, or that format but for its group and scale."""
    if isinstance(member, type) and isinstance(part, member):
        return True
    if not isinstance(member, type) and hasattr(part, "decode"):
        format = member() if inspect.isfunction(member) else member
        plain = dict.fromkeys({"group", "scale"} & vars(format).keys(), None)
        if type(part) is type(format) and vars(part) | plain == vars(format) | plain:
            return True
    parts = [getattr(part, field.name) for field in fields(part)] if is_dataclass(part) else []
    return any(uses(inner, member) for inner in parts)


SCALAR = [name for folder, name in MEMBERS if folder == "formats" and not hasattr(axes.members(folder)[name], "tile")]


@pytest.mark.parametrize("name", SCALAR)
def test_the_levels_drawn_are_those_that_weights_take(name):
    value = axes.members("formats")[name]
    counts = {"NF4": 16, "NF3": 8, "FP4": 15, "MXFP4": 15, "FP8_E4M3": 253, "FP8_E5M2": 247, "double_quantized": 256}
    weights = np.linspace(-1, 1, 1001, dtype=np.float32)
    for format in axes.EXAMPLES.get(name) or (value() if callable(value) else value,):
        levels = axes.levels(format)
        assert len(levels) == counts.get(name, len(levels)) > 2 ** (format.bits - 1)
        grid = format.grid(jnp.float32(-1), jnp.float32(1))
        rounded = np.asarray(format.decode(format.encode(jnp.asarray(weights), *grid), *grid))
        assert {*rounded} <= {*levels}
        nearest = np.abs(weights[:, None] - levels).min(1)
        # ggml chooses codes before it rounds a scale to float16, which moves every midpoint by 2^−11 at most.
        np.testing.assert_allclose(
            np.abs(weights - rounded), nearest, atol=2**-10 if "Q" in name or name == "UInt" else 1e-6
        )


def test_the_api_pages_name_what_has_no_page_of_its_own():
    text = "".join(text for page, text in TEXT.items() if page.startswith("docs/api/"))
    paths = re.findall(r"^\.\. auto\w+:: jquant\.([\w.]+)$", text, re.MULTILINE)
    assert len(paths) == len({*paths})
    members = {name for _, name in MEMBERS} | axes.WAITING
    assert {path.rpartition(".")[2] for path in paths}.isdisjoint(members)
    assert {*jquant.__all__} <= {*paths, *members, "GGUF", "METHODS"}
    assert {f"plot.{name}" for name in plot.__all__} <= {*paths}


def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("furo", reason="the extra docs is not installed")
    pytest.importorskip("myst_nb", reason="the extra docs is not installed")
    options = ["-q", "-W", "--keep-going", "-c", "docs", "-d", str(tmp_path / "doctrees"), ".", str(tmp_path / "html")]
    built = subprocess.run([sys.executable, "-m", "sphinx", *options], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    front = (tmp_path / "html" / "index.html").read_text(encoding="utf-8")
    assert "quantizes language models in JAX" in front
    member = (tmp_path / "html" / "docs" / "rounding" / "GPTQ.html").read_text(encoding="utf-8")
    assert "Error-compensating rounding" in member
    packed = (tmp_path / "html" / "docs" / "api" / "tensors.html").read_text(encoding="utf-8")
    assert "Float[Array, '*l in out']" in html.unescape(re.sub("<[^>]+>", "", packed))
    levels = list((tmp_path / "html" / "_images").glob("NF4*.svg"))
    assert len(levels) == 1
    for page in (tmp_path / "html").rglob("*.html"):
        assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"(https?:)?//", page.read_text(encoding="utf-8")), (
            page
        )


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
    (recipe,) = [code for code in fences(TEXT["docs/reproducing.md"], "python") if "load_dataset" in code]
    exec(recipe, {})
    for name in ("wiki.test.raw", "wiki.test.noblank.raw"):
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() in TEXT["docs/reproducing.md"]


def test_tables_are_what_the_result_files_say(capsys):
    assert tables.main(check=True) == 0, capsys.readouterr().err


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """Pages and their result files, elsewhere."""
    results = [f"experiments/results/{name}/table.jsonl" for name in ("perplexity_table", "formats")]
    for name in ("README.md", "docs/formats/NF4.md", *results):
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


def test_a_changed_first_paragraph_is_found_in_the_list_of_pages(copy, capsys):
    (copy / "docs/list.md").write_text("# List\n\n<!-- pages: formats -->\n<!-- end -->\n")
    assert tables.main(check=True) == 1
    assert "docs/list.md: formats" in capsys.readouterr().err
    assert tables.main(check=False) == 0
    assert "| [`NF4`](formats/NF4.md) | Sixteen quantiles" in (copy / "docs/list.md").read_text()
    page = copy / "docs/formats/NF4.md"
    page.write_text(page.read_text().replace("Sixteen", "16"))
    assert tables.main(check=True) == 1


def test_a_changed_result_is_found_on_the_page_of_a_member(copy, capsys):
    results = copy / "experiments/results/formats/table.jsonl"
    results.write_text(results.read_text().replace("30.393705131960573", "30.4"))
    assert tables.main(check=True) == 1
    assert "docs/formats/NF4.md: experiments/results/formats/table.jsonl" in capsys.readouterr().err
    assert tables.main(check=False) == 0
    assert "| `nf4` | 4.500 | 30.400 |" in (copy / "docs/formats/NF4.md").read_text()


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
            star = "*" if low > 0 or high < 0 else ""
            assert row["change"] == f"{change:+,.1f} [{low:+,.1f}, {high:+,.1f}]{star}"
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
