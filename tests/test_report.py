"""The report: it has the rows as their files have them, runs nothing of theirs; a browser sorts, filters, compares."""

import json
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from experiments import report

RESULTS = Path(__file__).parents[1] / "experiments" / "results"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 2'>&amp;"


class Parsed(HTMLParser):
    """The elements of a page, each tag with its attributes, and the texts of its scripts by their id."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        tag, attributes = self.elements[-1] if self.elements else ("", {})
        if tag == "script":
            self.scripts.setdefault(attributes.get("id") or "", data)

    def groups(self) -> list[dict]:
        return json.loads(self.scripts["groups"])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def rows_of(group: dict) -> Iterator[dict[str, str]]:
    """The rows of a table by dotted paths, put together again."""
    for row in group["rows"]:
        yield {
            path: text
            for section in group["shared"]
            for path, text in (group["shared"][section] | row["parts"].get(section, {})).items()
        }


def by_paths(row: dict) -> dict[str, str]:
    """The same of a row of a file."""
    flat, waiting = {}, list(row.items())
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict) and value:
            waiting += [(f"{path}.{key}", part) for key, part in value.items()]
        else:
            flat[path] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def unordered(rows) -> list[str]:
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


@pytest.fixture(scope="module")
def kept() -> str:
    """The report of the results in the repository."""
    return report.page(RESULTS)


@pytest.fixture
def row() -> dict:
    """A row of the README's table."""
    return lines(RESULTS / "perplexity_table/table.jsonl")[3]


def write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(monkeypatch, folder: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["report", str(folder)])
    report.main()


def test_the_page_has_the_rows_of_all_files(kept):
    files = sorted(RESULTS.rglob("*.jsonl"))
    assert len(files) > 10
    shown = [row for group in Parsed(kept).groups() for row in rows_of(group)]
    assert unordered(shown) == unordered(by_paths(row) for file in files for row in lines(file))


def test_a_table_holds_the_rows_of_one_protocol(kept):
    seen = set()
    for group in Parsed(kept).groups():
        protocols = {
            tuple(sorted((path, text) for path, text in row.items() if path.startswith("protocol.")))
            for row in ({**row, "protocol.calibration_sha256": ""} for row in rows_of(group))
        }
        assert len(protocols) == 1
        table = (group["kind"], *protocols)
        assert table not in seen
        seen.add(table)
    assert len(seen) > 10


def test_protocols_that_differ_in_one_entry_have_tables_that_say_so(tmp_path, row):
    protocol = row["protocol"]
    others = [{"dtype": "bfloat16"}, {"evaluation_sha256": "0"}, {"calibration_sha256": None}]
    write(tmp_path / "table.jsonl", row, *(row | {"protocol": protocol | other} for other in others))
    groups = Parsed(report.page(tmp_path)).groups()
    assert [len(group["rows"]) for group in groups] == [2, 1, 1]
    title = "32 × 1,024 tokens of Wikipedia (wiki_utf8)"
    assert [group["title"] for group in groups] == [
        f"{title} (dtype: float32)",
        f"{title} (dtype: bfloat16)",
        f"{title} (dtype: float32)",
    ]


def test_columns_are_those_of_the_table_with_the_names_of_readers(kept):
    tables = [group for group in Parsed(kept).groups() if group["kind"] == "table.jsonl"]
    table = next(g for g in tables if any(row["cells"].get("from") == "perplexity_table" for row in g["rows"]))
    shown = [column["title"].replace("\n", " ") for column in table["columns"] if column["shown"]]
    assert shown[:5] == ["method", "settings", "perplexity", "change %", "KL"]
    assert shown[-2:] == ["from", "device"]
    (gptq,) = [
        r["cells"] for r in table["rows"] if "window_nll" in r["parts"]["figures"] and r["cells"]["KL"] == "0.1046"
    ]
    assert (gptq["method"], gptq["perplexity"], gptq["from"]) == ("GPTQ, 4 bits", "22.104 ±0.375", "perplexity_table")
    assert {row["cells"]["method"] for row in table["rows"]} >= {"FP32", "NF4", "learned scales and codes, 3 bits"}


def test_the_rows_of_a_sweep_and_of_its_trials_are_shown_once(tmp_path, row):
    write(tmp_path / "trials/a/table.jsonl", row)
    write(tmp_path / "table.jsonl", row | {"settings": "bits=4"})
    (group,) = Parsed(report.page(tmp_path)).groups()
    assert [row["cells"]["settings"] for row in group["rows"]] == ["bits=4"]


def test_metrics_say_whose_training_they_are(kept):
    titles = [group["title"] for group in Parsed(kept).groups() if group["kind"].endswith(".metrics.jsonl")]
    assert "training of QAT, 2 bits (54e7ab9b77b53c28)" in titles
    assert len(titles) == len(list(RESULTS.rglob("*.metrics.jsonl")))


def test_figures_are_in_the_page_and_nothing_is_loaded(kept):
    elements = Parsed(kept).elements
    images = [attributes for tag, attributes in elements if tag == "img"]
    assert {image["alt"] for image in images} == {p.relative_to(RESULTS).as_posix() for p in RESULTS.rglob("*.png")}
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in images)
    loaded = [attributes for tag, attributes in elements if ("src" in attributes and tag != "img") or tag == "link"]
    assert not loaded


def test_the_same_files_give_the_same_bytes_and_nothing_else_is_written(tmp_path, monkeypatch, capsys, row):
    for folder in ("one/results", "two/results"):
        write(tmp_path / folder / "a/table.jsonl", row)
        write(tmp_path / folder / "b/other.jsonl", {"layer": 1, "loss": float("nan")}, {"layer": 2})
        shutil.copy(RESULTS / "perplexity_table/perplexity_bits.png", tmp_path / folder / "a")
        run(monkeypatch, tmp_path / folder)
        assert capsys.readouterr().out == f"{tmp_path / folder / 'report.html'}\n"
    first = (tmp_path / "one/results/report.html").read_bytes()
    assert first == (tmp_path / "two/results/report.html").read_bytes()
    run(monkeypatch, tmp_path / "one/results")  # over the page that is there
    assert first == (tmp_path / "one/results/report.html").read_bytes()
    assert len([path for path in (tmp_path / "one").rglob("*") if path.is_file()]) == 4


def test_texts_of_rows_stay_texts(tmp_path, row):
    make_hostile(tmp_path, row)
    parsed = Parsed(report.page(tmp_path))
    assert [tag for tag, _ in parsed.elements if tag in ("script", "img")] == ["script"] * 3
    assert any(HOSTILE in cell for group in parsed.groups() for row in group["rows"] for cell in row["cells"].values())


def make_hostile(folder: Path, row: dict) -> None:
    config = row["config"] | {HOSTILE: 1, "bits": 4}
    protocol = row["protocol"] | {"data": HOSTILE, "model": HOSTILE}
    hostile = row | {"settings": HOSTILE, "config": config, "protocol": protocol, "device": HOSTILE}
    write(folder / "table.jsonl", hostile, hostile | {"device": "cpu", "config": config | {HOSTILE: HOSTILE}})
    write(folder / "<img src=x onerror=window.ran=3>.jsonl", {HOSTILE: 1.5}, {HOSTILE: HOSTILE, "figure": 2})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("table.jsonl", b"{\n", "table.jsonl is damaged"),
        ("table.jsonl", b'{"method": "gptq"}\n', "line 1: composition is missing"),
        ("other.jsonl", b"[1]\n", "line 1: the row is '[1]'"),
        ("other.jsonl", b"\xff\n", "other.jsonl is damaged"),
        ("other.jsonl", b"[" * 100_000, "nested too deeply"),
        ("figure.png", b"no picture", "figure.png is damaged"),
        ("figure.png", (RESULTS / "qat/training_curves.png").read_bytes()[:-5000], "figure.png is damaged"),
        ("other.jsonl", None, "other.jsonl is not a plain file"),
    ],
)
def test_a_damaged_file_is_named_and_the_page_stays(tmp_path, monkeypatch, capsys, row, name, content, said):
    write(tmp_path / "good.jsonl", row)
    (tmp_path / "report.html").write_text("of yesterday")
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    assert said in refused(monkeypatch, capsys, tmp_path)
    assert (tmp_path / "report.html").read_text() == "of yesterday"
    assert not list(tmp_path.glob(".*"))


def test_folders_without_rows_are_refused(tmp_path, monkeypatch, capsys):
    assert "has no results" in refused(monkeypatch, capsys, tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "widths").mkdir()
    missing = tmp_path / "width"
    assert f"width is not a folder; the nearest in {tmp_path} are widths." in refused(monkeypatch, capsys, missing)
    assert not missing.exists()
    file = write(tmp_path / "table.jsonl")
    assert "table.jsonl is not a folder" in refused(monkeypatch, capsys, file)


def refused(monkeypatch, capsys, folder: Path) -> str:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, folder)
    assert ended.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    return sentence


def test_deeply_nested_and_odd_values_are_shown(tmp_path):
    deep = {"a": 1}
    for _ in range(300):
        deep = {"a": deep}
    odd = {"deep": deep, "empty": {}, "big": 10**400, "tiny": 1e-300, "list": [{}], "none": None, "method": 1}
    write(tmp_path / "x.jsonl", odd | {"protocol": 3})
    (group,) = Parsed(report.page(tmp_path)).groups()
    figures = group["shared"]["figures"]
    assert json.loads(figures["big"]) == 10**400
    assert figures["empty"] == "{}"
    assert json.loads(figures["tiny"]) == 1e-300
    nested = odd["deep"]
    path = next(path for path in figures if path.startswith("deep"))
    for key in path.split(".")[1:]:
        nested = nested[key]
    assert json.loads(figures[path]) == nested


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM)
        yield started
        started.close()


def opened(browser: Browser, folder: Path) -> tuple[Page, list[str]]:
    """The folder's report at a phone's width, and a list of what goes wrong: errors, and anything fetched."""
    (folder / "report.html").write_text(report.page(folder), encoding="utf-8")
    page, problems = browser.new_page(viewport={"width": 390, "height": 844}), []
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
    page.goto((folder / "report.html").as_uri())
    page.wait_for_selector("body[data-ready]")
    return page, problems


def column(page: Page, at: int) -> Locator:
    """The cells of the first table's column, counted from 1, the boxes' column included."""
    return page.locator(f"#table-0 tbody tr td:nth-child({at})")


def differences(page: Page) -> dict[str, list[str]]:
    """What the page says of two runs: the cells of each line by its heading."""
    page.get_by_role("button", name="Differences").click()
    read = "table => [...table.rows].map(row => [...row.cells].map(cell => cell.textContent))"
    return {heading: cells for heading, *cells in page.locator("#runs table").evaluate(read)}


def test_a_browser_sorts_filters_and_compares(browser, tmp_path):
    shutil.copytree(RESULTS / "perplexity_table", tmp_path / "a")
    shutil.copytree(RESULTS / "qlora", tmp_path / "b")
    page, problems = opened(browser, tmp_path)
    rows = sorted(lines(tmp_path / "a/table.jsonl"), key=lambda row: row["perplexity"])
    expect(column(page, 3)).to_have_text([f"{r['perplexity']:.3f} ±{r['perplexity_stderr']:.3f}" for r in rows])
    assert page.evaluate("document.documentElement.scrollWidth") == 390

    kl = page.locator("#table-0 thead th", has_text="KL")
    for order in ("ascending", "descending"):
        kl.click()
        expect(kl).to_have_attribute("aria-sort", order)
    expect(column(page, 5)).to_have_text([f"{kl:.4f}" for kl in sorted((row["kl"] for row in rows), reverse=True)])

    kl.locator("button").click()
    page.locator(".dtcc-dropdown select").select_option("less")
    page.locator(".dtcc-dropdown input").fill("0.2")
    expect(column(page, 2)).to_have_text(["AWQ, 4 bits", "GPTQ, 4 bits", "INT8", "FP32"])
    page.locator("#group-0 input[type=search]").fill("4 bits")
    expect(column(page, 2)).to_have_text(["AWQ, 4 bits", "GPTQ, 4 bits"])

    page.locator("#table-0 tbody input").first.click()
    page.get_by_role("button", name="Settings").click()
    assert "SmolLM2-135M-Instruct.Q4_1.gguf" in page.locator("#runs table").inner_text()
    page.get_by_role("button", name="Close").click()
    page.locator("#table-0 tbody input").last.click()
    gptq, awq = (next(row for row in rows if row["method"] == name) for name in ("gptq", "awq"))
    cells = differences(page)
    assert cells["method"] == ["awq", "gptq", ""]
    less = awq["kl"] - gptq["kl"]
    assert cells["kl"] == [str(awq["kl"]), str(gptq["kl"]), f"−{less:.4g} (−{100 * less / awq['kl']:.3g} %)"]
    assert "config.bits" not in cells
    page.get_by_label("what is equal too").check()
    assert page.locator("#runs tr", has_text="config.bits").inner_text().split() == ["config.bits", "4", "4"]
    page.get_by_role("button", name="Close").click()

    page.locator("#table-1 tbody input").click()  # in place of the run that was picked first
    cells = differences(page)
    assert cells["protocol.data"] == ["wiki_utf8", "code_utf8"]
    assert cells["loss_after"][0] == "–"
    expect(page.locator("#warning")).to_be_visible()
    assert problems == []


def test_a_browser_runs_nothing_of_what_rows_say(browser, tmp_path, row):
    make_hostile(tmp_path, row)
    page, problems = opened(browser, tmp_path)
    page.set_viewport_size({"width": 1400, "height": 1000})
    for button in page.get_by_role("button", name="Columns").all():
        button.click()
        hidden = page.locator(".dt-button-collection button:not(.dt-button-active)")
        while hidden.count():
            hidden.first.click()
        page.keyboard.press("Escape")
    page.locator("#table-0 tbody input").first.click()
    page.locator("#table-1 tbody input").first.click()
    assert HOSTILE in "".join(differences(page)["device"])
    page.get_by_role("button", name="Close").click()
    for button in page.locator("thead button").all():
        button.click()
    expect(page.locator("img, tbody script")).to_have_count(0)
    assert HOSTILE in page.locator("#table-0 tbody").inner_text()
    assert page.evaluate("window.ran") is None
    assert problems == []
