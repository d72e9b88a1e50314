"""The perplexity table as its users run it, on a tiny checkpoint that transformers wrote, and local text."""

import csv
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import checkpoints
import jax
import numpy as np
import pytest
import scipy.stats
from checkpoints import refused
from commands import run_here, run_in_process_of_its_own
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from safetensors.numpy import load_file, save_file

from experiments import command_line, perplexity_table, sensitivity, tables
from experiments.settings import check_table
from jquant import InputError, method, open_model, quantize_to_folder
from jquant.evaluation import intervals
from jquant.io.load import QuantizedFile
from paper_figures import perplexity_bits

ROOT = Path(__file__).parents[1]
FIELDS = {
    "method", "perplexity", "perplexity_stderr", "kl", "top1_agreement", "bits_per_weight", "weight_mb",
    "tokens_per_second", "quantize_seconds", "peak_rss_mb", "config", "protocol", "code_version", "packages", "device",
    "seed", "window_nll",
}  # fmt: skip
METHODS = ["fp32", "int8", "rtn", "gptq", "awq", "nf4"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with a tiny Llama checkpoint and two texts that share nothing."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("table")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 4)) for _ in range(200)]
    for name in ("evaluation.txt", "calibration.txt"):
        (folder / name).write_text(" ".join(rng.choice(words, 6000)))
    (folder / "empty.txt").write_text(" \n")
    (folder / "short.txt").write_text("just a few words")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train([str(folder / "evaluation.txt")], trainer)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), num_key_value_heads=2, initializer_range=0.2, **shape
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    return folder


def table(workplace: Path, *overrides: str, run: Callable = run_here, **options) -> subprocess.CompletedProcess:
    return run("perplexity_table", *arguments(workplace, *overrides), **options)


def arguments(workplace: Path, *overrides: str) -> list[str]:
    settings = {
        "model": "local",
        "model.path": workplace / "model",
        "results": workplace / "results",
        "name": "tiny",
        "group": 32,
        "evaluation.data": workplace / "evaluation.txt",
        "evaluation.windows": 4,
        "evaluation.context": 64,
        "calibration.data": workplace / "calibration.txt",
        "calibration.samples": 8,
        "calibration.context": 64,
        "generation.tokens": 4,
        "generation.prompt": "abc",
    }
    settings |= dict(override.split("=", 1) for override in overrides)
    return [f"{key}={value}" for key, value in settings.items()]


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "table.jsonl").read_text().splitlines()]


def test_one_command_writes_the_table_the_rows_and_the_figure_and_a_second_reuses_them(workplace):
    done = table(workplace, "name=whole", "baseline=rtn", run=run_in_process_of_its_own)
    assert done.returncode == 0, done.stderr
    folder = workplace / "results" / "whole"
    rows = rows_of(folder)
    assert [row["method"] for row in rows] == METHODS
    assert all(row.keys() >= FIELDS for row in rows)
    by_name = {row["method"]: row for row in rows}
    assert by_name["fp32"]["kl"] == 0
    assert by_name["fp32"]["bits_per_weight"] == 32
    assert by_name["rtn"]["bits_per_weight"] == 4 + 16 / 32 + 4 / 32
    assert 0 < by_name["int8"]["kl"] < by_name["gptq"]["kl"] < by_name["rtn"]["kl"]
    assert by_name["rtn"]["weight_mb"] < by_name["int8"]["weight_mb"] < by_name["fp32"]["weight_mb"]
    assert all(row["protocol"]["scored_tokens"] == 4 * 63 for row in rows)
    assert all(row["tokens_per_second"] > 0 and row["peak_rss_mb"] > 100 for row in rows)
    with (folder / "table.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["method"] for row in written] == METHODS
    change, low, high = tables.paired_change(by_name["gptq"], by_name["rtn"])
    assert [float(written[3][f"vs rtn %{end}"]) for end in ("", " low", " high")] == [change, low, high]
    assert change == pytest.approx(100 * (by_name["gptq"]["perplexity"] / by_name["rtn"]["perplexity"] - 1), rel=1e-9)
    markdown = (folder / "table.md").read_text()
    assert all(f"{row['perplexity']:.3f}" in markdown for row in rows)
    assert "4 windows of 64 tokens" in markdown
    assert f"{change:+.2f} [{low:+.2f}, {high:+.2f}]" in markdown
    assert "vs rtn" in done.stdout
    assert (folder / "perplexity_bits.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "perplexity_bits.pdf").read_bytes().startswith(b"%PDF")
    assert str(folder) in done.stdout

    again = table(workplace, "name=whole")  # what rows are compared with does not make them others
    assert again.stdout.count("(kept)") == len(METHODS)
    assert rows_of(folder) == rows


def test_overrides_reach_the_rows(workplace):
    done = table(
        workplace, "name=mine", "methods=[fp32,rtn]", "bits=3", "group=16", "symmetric=true", "evaluation.windows=2"
    )
    assert done.returncode == 0, done.stderr
    rtn = rows_of(workplace / "results" / "mine")[1]
    assert rtn["bits_per_weight"] == 3 + 16 / 16
    assert rtn["protocol"]["windows"] == 2
    assert rtn["config"]["symmetric"] is True
    assert "RTN-3" in done.stdout


BAD = {
    "an unknown model": (["model=nonsense"], "nonsense"),
    "a model path that is not there": (["model.path=/nowhere/model"], "/nowhere/model"),
    "a truncated GGUF": (["model.path={}/cut.gguf"], "cut.gguf"),
    "NaN weights": (["model.path={}/nan"], "model.layers.1.mlp.up_proj.weight"),
    "an empty text": (["evaluation.data={}/empty.txt"], "empty.txt"),
    "a text shorter than a window": (["evaluation.data={}/short.txt"], "short.txt: The text has"),
    "a text that is not there": (["evaluation.data=/nowhere.txt"], "/nowhere.txt"),
    "evaluation text inside the calibration text": (
        ["evaluation.data=[{0}/evaluation.txt,{0}/calibration.txt]"],
        "calibration.txt occurs in the calibration text",
    ),
    "an unknown method": (["methods=[fp32,gptqq]"], "gptqq"),
    "bits out of range": (["bits=9"], "9"),
    "a group larger than a weight": (["group=4096"], "4096"),
    "an option that does not exist": (["evaluation.windws=3"], "evaluation.windws"),
    "an option that only a later row needs": (["methods=[fp32,gptq]", "calibration.passes=0"], "calibration.passes"),
    "results that cannot be written": (["results=/dev/null/results", "methods=[fp32]"], "/dev/null/results"),
}


@pytest.fixture(scope="module")
def broken(workplace, default_gguf) -> Path:
    with default_gguf.open("rb") as file:
        (workplace / "cut.gguf").write_bytes(file.read(5_000_000))
    (workplace / "nan").mkdir()
    for file in (workplace / "model").iterdir():
        (workplace / "nan" / file.name).write_bytes(file.read_bytes())
    weights = load_file(workplace / "nan" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(weights, workplace / "nan" / "model.safetensors")
    return workplace


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_sentence_and_leaves_nothing(broken, case):
    overrides, names = BAD[case]
    done = table(broken, "name=bad", *(override.format(broken) for override in overrides))
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert names in lines[0]
    assert not (broken / "results" / "bad").exists()


def test_interrupting_keeps_finished_rows_and_the_next_run_goes_on(workplace):
    folder = workplace / "results" / "stopped"
    overrides = ("name=stopped", "methods=[fp32,rtn,gptq,awq]")
    command = [sys.executable, "-m", "experiments.perplexity_table", *arguments(workplace, *overrides)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (folder / "table.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    kept = rows_of(folder)
    assert 1 <= len(kept) < 4
    assert sorted(path.name for path in folder.iterdir()) == [tables.LOCK, "table.jsonl"]

    done = table(workplace, *overrides)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(kept)") == len(kept)
    assert rows_of(folder)[: len(kept)] == kept
    assert len(rows_of(folder)) == 4


def test_methods_on_float_inputs_share_a_pass_and_get_what_they_get_alone_and_texts_share_the_methods(workplace):
    (workplace / "other.txt").write_text((workplace / "evaluation.txt").read_text()[9000:])
    both = f"evaluation.data=[{workplace}/evaluation.txt,{workplace}/other.txt]"
    common = ("methods=[fp32,rtn,gptq-3,awq-3]", "calibration.inputs=float", "evaluation.windows=2")
    done = table(workplace, "name=shared", both, "baseline=rtn", *common)
    assert done.returncode == 0, done.stderr
    folder = workplace / "results" / "shared"
    rows = rows_of(folder)
    assert [(row["method"], Path(row["protocol"]["data"]).stem) for row in rows] == [
        (name, text) for name in ("fp32", "rtn", "gptq-3", "awq-3") for text in ("evaluation", "other")
    ]
    assert [row["quantized_together"] for row in rows] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert len({row["quantize_seconds"] for row in rows[4:]}) == 1
    assert rows[4]["perplexity"] != rows[5]["perplexity"]
    markdown = (folder / "table.md").read_text()
    assert [markdown.count(f"on {workplace}/{text}.txt: 2 windows") for text in ("evaluation", "other")] == [1, 1]
    assert "/2: all 2 in one pass" in markdown
    with (folder / "table.csv").open() as file:
        written = [row for row in csv.DictReader(file) if row["method"] == "rtn"]
    assert [row["vs rtn %"] for row in written] == ["0.0", "0.0"]
    assert (folder / "perplexity_bits.png").exists()
    assert (folder / "perplexity_bits-other.png").exists()

    # A text alone, and quantized one by one: the very same rows, but for what they cost.
    again = table(workplace, "name=shared", *common)
    assert again.stdout.count("(kept)") == 4
    alone = table(workplace, "name=alone", common[1], common[2], "methods=[awq-3]")
    assert alone.returncode == 0, alone.stderr
    cost = {"quantize_seconds", "quantized_together", "peak_rss_mb", "tokens_per_second"}
    (one,) = rows_of(workplace / "results" / "alone")
    assert {key: one[key] for key in one.keys() - cost} == {key: rows[6][key] for key in one.keys() - cost}


def test_the_experiment_runs_where_torch_cannot_be_imported(workplace, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is absent')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = table(workplace, "name=torchless", "methods=[fp32,rtn]", run=run_in_process_of_its_own, env=env)
    assert done.returncode == 0, done.stderr


# ---- settings -------------------------------------------------------------------------------------------------------


def check(*overrides: str) -> None:
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        settings = OmegaConf.to_container(compose("perplexity_table", [*overrides]), resolve=True)
    check_table(settings)


@pytest.mark.parametrize(
    ("override", "named"),
    {
        "seed=-1": "seed takes a whole number from 0, not -1",
        "calibration.samples=0": "calibration.samples",
        "calibration.context=half": "calibration.context takes a whole number from 1, not 'half'",
        "calibration.passes=1.5": "calibration.passes",
        "calibration.passes=true": "calibration.passes",
        "calibration.held_out=-1": "calibration.held_out",
        "calibration.inputs=exact": "calibration.inputs is quantized or float, not 'exact'",
        "evaluation.windows=0": "evaluation.windows",
        "evaluation.context=1": "evaluation.context",
        "evaluation.data=[]": "evaluation.data is a text or a list of some, not []",
        "evaluation.data=[wiki_utf8,3]": "evaluation.data",
        "evaluation.bos=maybe": "evaluation.bos is true or false, not 'maybe'",
        "symmetric=1": "symmetric",
        "methods=gptq": "methods is a list",
        "generation.tokens=null": "generation.tokens",
        "methods=[fp32,gptq_damping-3]": "gptq_damping-3 chooses by held-out windows: set calibration.held_out",
        "baseline=gptq-3": "baseline=gptq-3 is not among the methods: fp32, int8",
        "baseline=gpt": "baseline=gpt",
    }.items(),
)
def test_settings_are_checked_before_the_model_is_loaded(override, named):
    with refused(named):
        check(override)


def test_quantized_inputs_are_asked_for_where_a_method_needs_them():
    with refused("gptq_propagated", "calibration.inputs=float"):
        check("methods=[gptq,gptq_propagated]", "calibration.inputs=float")
    check("methods=[gptq,gptq_propagated]")
    check("methods=[gptq]", "calibration.inputs=float")


@pytest.mark.parametrize("baseline", ["gptq", "gptq-3", "null"])
def test_what_suits_passes(baseline):
    rest = ("calibration.held_out=2", "evaluation.windows=null", "calibration.inputs=float")
    check("methods=[fp32,rtn-3,gptq-3,gptq_damping]", f"baseline={baseline}", *rest)


# ---- paired comparison ----------------------------------------------------------------------------------------------

# Student's t for a two-sided 95 % interval, from printed tables, by degrees of freedom.
STUDENT = {1: 12.706205, 4: 2.776445, 31: 2.039513}


def row_of(nll: np.ndarray, method: str = "rtn", text: str = "a") -> dict:
    return {"method": method, "window_nll": list(nll), "protocol": {"evaluation_sha256": text}}


@pytest.mark.parametrize("freedom", STUDENT)
def test_the_paired_interval_equals_the_oracles(freedom):
    rng = np.random.default_rng(freedom)
    base = rng.normal(3, 0.5, freedom + 1)
    nll = base + rng.normal(0.03, 0.02, freedom + 1)
    total, square = 0.0, 0.0
    for a, b in zip(nll, base, strict=True):
        total, square = total + (a - b), square + (a - b) ** 2
    n = freedom + 1
    error = ((square - total**2 / n) / (n - 1) / n) ** 0.5
    ends = [total / n + sign * STUDENT[freedom] * error for sign in (0, -1, 1)]
    expected = [100 * (np.exp(end) - 1) for end in ends]
    assert tables.paired_change(row_of(nll), row_of(base)) == pytest.approx(expected, rel=1e-6)


def test_the_interval_holds_the_truth_in_95_of_100_samples_and_the_windows_own_spread_does_not_widen_it():
    rng = np.random.default_rng(0)
    base = rng.normal(3, 0.5, (2000, 8))  # windows differ far more than models do
    nll = base + rng.normal(0.02, 0.01, base.shape)
    changes = np.array([tables.paired_change(row_of(a), row_of(b)) for a, b in zip(nll, base, strict=True)])
    truth = 100 * np.expm1(0.02)
    held = np.mean((changes[:, 1] < truth) & (truth < changes[:, 2]))
    assert abs(held - 0.95) < 0.015  # three standard errors
    assert np.median(changes[:, 2] - changes[:, 1]) < 2


def test_a_star_stands_where_the_interval_excludes_zero():
    shown = lambda *figures: intervals.Change(*figures).text(1)  # noqa: E731
    assert shown(2.04, 1.0, 3.0) == "+2.0 [+1.0, +3.0]*"
    assert shown(-2.0, -1234.5, -0.01) == "-2.0 [-1,234.5, -0.0]*"
    assert shown(2.0, -1.0, 3.0) == "+2.0 [-1.0, +3.0]"
    assert shown(2.0, np.nan, np.nan) == shown(2.0, 2.0, 2.0) == "+2.0"


def test_the_t_interval_agrees_with_a_bootstrap_on_the_kept_rows():
    """Rows beside the row before them, over the same windows; where the two differ, t claims less."""
    widths, excluded = [], []
    for path in sorted((ROOT / "experiments/results").glob("*/table.jsonl")):
        rows = [row for row in tables.read_rows(path.parent) if row.get("window_nll")]
        of_text = lambda row: (row["protocol"]["evaluation_sha256"], len(row["window_nll"]))  # noqa: E731
        for base, row in itertools.pairwise(sorted(rows, key=of_text)):
            gaps = np.subtract(row["window_nll"], base["window_nll"]) if of_text(row) == of_text(base) else np.zeros(1)
            if gaps.std() > 0:
                change = tables.paired_change(row, base)
                drawn = scipy.stats.bootstrap((gaps,), np.mean, rng=np.random.default_rng(0)).confidence_interval
                low, high = 100 * np.expm1(drawn)
                widths.append((len(gaps), (high - low) / (change.high - change.low)))
                excluded.append((change.low > 0 or change.high < 0, low > 0 or high < 0))
    ratios = {few: np.median([ratio for n, ratio in widths if (n < 32) == few]) for few in (False, True)}
    assert 0.9 < ratios[False] < 1  # t's quantile for 31 degrees of freedom is 4 % above the normal one
    assert 0.75 < ratios[True] < 0.9  # few windows: the bootstrap's intervals are known to be too narrow
    assert (True, False) not in excluded
    assert excluded.count((False, True)) < 0.15 * len(excluded)


def test_one_window_tells_the_change_and_no_interval():
    change, low, high = tables.paired_change(row_of([2.0]), row_of([1.0]))
    assert change == pytest.approx(100 * (np.e - 1))
    assert np.isnan([low, high]).all()


def test_rows_that_cannot_be_compared_are_refused():
    base = row_of(np.ones(3), "gptq")
    with refused("rtn", "window_nll"):
        tables.paired_change({key: value for key, value in row_of(np.ones(3)).items() if key != "window_nll"}, base)
    with refused("rtn and gptq", "different windows"):
        tables.paired_change(row_of(np.ones(3), text="b"), base)
    with refused("rtn and gptq", "different windows"):
        tables.paired_change(row_of(np.ones(4)), base)


def test_a_row_is_compared_with_the_baseline_of_its_own_width():
    names = ["fp32", "rtn", "rtn-3", "gptq", "gptq-3", "gptq_nf4", "int8"]
    rows = [{"method": name} for name in names]
    found = [tables.base_of(row, rows, "gptq") for row in rows]
    assert [one and one["method"] for one in found] == ["gptq", "gptq", "gptq-3", "gptq", "gptq-3", "gptq", "gptq"]
    assert tables.base_of(rows[1], rows[2:3], "gptq") is None
    assert tables.base_of(rows[1], rows, "gptq-3") is rows[4]


def test_old_rows_print_beside_new_ones_with_an_empty_cell_and_columns_that_none_fills_are_left_out(tmp_path):
    kept = {row["method"]: row for row in tables.read_rows(ROOT / "experiments" / "results" / "ranges")}
    rows = [kept[name] | {"tokens_per_second": None} for name in ("gptq-4", "gptq-3", "rtn-3")]
    rows[0].pop("window_nll", None)
    for row in rows[1:]:
        row["window_nll"] = [np.log(row["perplexity"]) + 0.25, np.log(row["perplexity"]) - 0.25]
    rows[2]["window_nll"][0] += 0.5
    tables.write_table(tmp_path, rows, "gptq")
    heading, _, *lines = [line.split("|")[1:-1] for line in (tmp_path / "table.md").read_text().splitlines()[:5]]
    assert heading[-1].strip() == "vs gptq %"
    assert not any("tok/s" in column or "published" in column for column in heading)
    change = tables.paired_change(rows[2], rows[1])
    assert [line[-1].strip() for line in lines] == ["", "+0.00", str(change)]
    with (tmp_path / "table.csv").open() as file:
        assert [row["vs gptq %"] for row in csv.DictReader(file)] == ["", "0.0", str(change.percent)]


def test_a_narrow_terminal_cuts_no_figure():
    rows = tables.read_rows(ROOT / "experiments" / "results" / "ranges")
    for index, row in enumerate(rows):
        row["window_nll"] = [np.log(row["perplexity"]), np.log(row["perplexity"]) + 0.01 * index]
    table = tables.terminal_table(rows, "gptq", width=80)
    assert table.columns[-1].header == "vs gptq\n%"
    assert command_line.natural_width(table) <= 80


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_table_cuts_a_number_or_drops_it_without_a_word(width, monkeypatch):
    rows = [
        row | {"settings": f"method={row['method']} group={10**index}", "perplexity": 1e5}
        for index, row in enumerate(KEPT)
    ]
    monkeypatch.setattr(command_line, "console", Console(file=io.StringIO(), width=width))
    for table in (tables.terminal_table(rows, width=width), tables.terminal_table(rows)):
        command_line.show(table)
        said = command_line.console.file.getvalue()
        assert "…" not in said
        assert all(tables.COLUMNS["perplexity"](row) in said for row in rows)
        assert "method=" not in said
        assert "group=10000" in said
        assert all(f"{row['peak_rss_mb']:.0f}" in said for row in rows) or "Left out" in said
    assert "peak" in said


# ---- rows on disk ---------------------------------------------------------------------------------------------------

KEPT = tables.read_rows(ROOT / "experiments" / "results" / "perplexity_table")


def test_rows_that_several_add_at_once_are_all_there_and_one_of_the_same_fingerprint_is_replaced(tmp_path):
    rows = [KEPT[0] | {"fingerprint": str(index)} for index in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: tables.add_rows(tmp_path, [row]), rows))
    assert {row["fingerprint"] for row in tables.read_rows(tmp_path)} == set(map(str, range(24)))
    tables.add_rows(tmp_path, [rows[5] | {"perplexity": 1.0}], without=["7"])
    found = {row["fingerprint"]: row["perplexity"] for row in tables.read_rows(tmp_path)}
    assert len(found) == 23
    assert [one for one, perplexity in found.items() if perplexity == 1.0] == ["5"]


def test_a_line_separator_in_a_rows_text_is_no_end_of_line(tmp_path):
    rows = [KEPT[0] | {"composition": "a\u2028b\x85c\x1ed"}]
    tables.add_rows(tmp_path, rows)
    assert tables.read_rows(tmp_path) == rows


def test_the_committed_results_have_what_rows_have():
    for path in (ROOT / "experiments" / "results").rglob("*.jsonl"):
        assert tables.read_rows(path.parent, path.name)
    assert tables.read_rows(ROOT, "table.jsonl") == []


LINE = json.dumps(KEPT[1])
DAMAGED = {
    "no JSON": "{",
    "no object": "[1, 2]",
    "nested too deeply": "[" * 100_000,
    "a key less": LINE.replace('"perplexity":', '"perplexitx":'),
    "a text for a number": LINE.replace('"kl": ', '"kl": "much", "kk": '),
    "no number": LINE.replace('"weight_mb": ', '"weight_mb": NaN, "mb": '),
    "a number past all floats": LINE.replace('"weight_mb": ', '"weight_mb": 1' + "0" * 400 + ', "mb": '),
    "a number too long to be read": LINE.replace('"weight_mb": ', '"weight_mb": 1' + "0" * 9000 + ', "mb": '),
    "a protocol that is none": LINE.replace('"protocol": ', '"protocol": [], "p": '),
    "half a character": LINE.replace('"method": "int8"', '"method": "\\ud800"'),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_rows_are_refused_by_the_files_name_and_left_alone(tmp_path, case):
    path = tmp_path / "table.jsonl"
    assert case == "no JSON" or DAMAGED[case] != LINE
    path.write_text(f"{LINE}\n{DAMAGED[case]}\n")
    with refused("table.jsonl is damaged", "move it away"):
        tables.add_rows(tmp_path, KEPT[:1])
    assert path.read_text() == f"{LINE}\n{DAMAGED[case]}\n"


def test_a_pipe_and_bytes_that_are_no_text_are_no_rows(tmp_path):
    (tmp_path / "table.jsonl").write_bytes(b"\xff\xfe")
    with refused("table.jsonl is damaged"):
        tables.read_rows(tmp_path)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with refused("pipe.jsonl is not a plain file"):
        tables.read_rows(tmp_path, "pipe.jsonl")


def test_mutated_rows_are_read_or_refused(tmp_path):
    """What is read can also be printed."""
    rng = np.random.default_rng(0)
    lines = [json.dumps(row) for row in KEPT]
    for _ in range(300):
        text = list(lines[rng.integers(len(lines))])
        for at in rng.integers(0, len(text), rng.integers(1, 4)):
            text[at] = str(rng.choice(list('{}[]",:0-9.eNn')))
        (tmp_path / "table.jsonl").write_text("".join(text))
        with suppress(InputError):
            rows = tables.read_rows(tmp_path)
            tables.terminal_table(rows)
            tables.caption(rows)


# ---- labels ---------------------------------------------------------------------------------------------------------


def test_the_caption_names_groups_and_calibration_for_the_rows_that_have_them():
    told = tables.caption(KEPT)
    assert "Calibration: c4_utf8, 128 × 512 tokens, seed 0 (GPTQ-4, AWQ-4)." in told
    assert "Groups of 64, asymmetric (RTN-4, GPTQ-4, AWQ-4)." in told
    [nf4] = [row for row in KEPT if row["method"] == "nf4"]
    assert not {"Groups", "Calibration"} & set(tables.caption([KEPT[0], nf4]).replace(":", "").split())
    both = tables.caption([row for row in KEPT if row["method"] in ("fp32", "gptq", "awq")])
    assert "seed 0. Groups of 64, asymmetric. KL" in both  # all have them, so none is named


def test_rows_of_other_settings_are_not_told_the_first_ones():
    [gptq] = [row for row in KEPT if row["method"] == "gptq"]
    config = gptq["config"] | {"group": 128, "model": gptq["config"]["model"] | {"name": "other"}}
    other = gptq | {"config": config, "protocol": gptq["protocol"] | {"model": "other"}, "device": "another"}
    told = tables.caption([gptq, other])
    for part in ("Groups of 64, asymmetric", "Groups of 128, asymmetric", "other (weights", "smollm2_135m (weights"):
        assert part in told
    assert f"{gptq['device']}; another." in told


def test_the_csv_has_every_rows_columns_and_what_each_was_made_with(tmp_path):
    rows = [row | {} for row in KEPT]
    rows[0]["tokens_per_second"] = None
    del rows[0]["quantized_together"]
    rows[-1]["settings"] = "bits=4"
    by_name = {"gptq": rows[3], "nf4": rows[5], "rtn-3": KEPT[2] | {"method": "rtn-3"}}
    tables.write_table(tmp_path, [rows[0], *by_name.values()])
    with (tmp_path / "table.csv").open() as file:
        [fp32, gptq, nf4, rtn] = csv.DictReader(file)
    assert (fp32["tokens_per_second"], gptq["tokens_per_second"]) == ("", str(rows[3]["tokens_per_second"]))
    assert (gptq["quantized_together"], nf4["settings"], fp32["settings"]) == ("1", "bits=4", "")
    assert [gptq[key] for key in ("bits", "group", "symmetric", "seed")] == ["4", "64", "False", "0"]
    assert [gptq[f"calibration_{key}"] for key in ("data", "samples", "context", "inputs")] == [
        "c4_utf8", "128", "512", "quantized",
    ]  # fmt: skip
    assert {nf4[key] for key in ("bits", "group", "symmetric", "calibration_data", "calibration_samples")} == {""}
    assert (rtn["bits"], rtn["group"], rtn["calibration_data"]) == ("3", "64", "")
    assert "Codebook" in nf4["composition"]


def test_weights_that_fell_back_are_counted_in_the_table_and_named_below_it(tmp_path):
    names = [f"layers.{layer}.attention.v.kernel" for layer in range(5)]
    tables.write_table(tmp_path, [KEPT[0], KEPT[3] | {"fallbacks": names}])
    heading, _, fp32, gptq, *_ = (tmp_path / "table.md").read_text().splitlines()
    column = [cell.strip() for cell in heading.split("|")].index("fell back")
    assert [line.split("|")[column].strip() for line in (fp32, gptq)] == ["", "5"]
    below = (tmp_path / "table.md").read_text()
    assert f"{', '.join(names[:3])} and 2 more (GPTQ-4)." in below
    assert "; ".join(names) in (tmp_path / "table.csv").read_text()


def test_a_model_that_came_quantized_is_not_called_float_and_compared_with_itself(tmp_path, monkeypatch):
    floating = checkpoints.save(tmp_path / "float", checkpoints.llama())
    quantized = quantize_to_folder(open_model(floating), tmp_path / "q", method("rtn", group=32))
    (tmp_path / "text.txt").write_text(checkpoints.random_text(500, seed=1))
    overrides = [f"model.path={quantized.folder}", f"evaluation.data={tmp_path / 'text.txt'}", f"results={tmp_path}"]
    sizes = ["evaluation.context=32", "evaluation.windows=2", "generation.tokens=0", "name=r"]
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        config = compose("perplexity_table", ["model=local", "methods=[fp32]", *overrides, *sizes])
    settings: Any = OmegaConf.to_container(config, resolve=True)
    with monkeypatch.context() as without_loading:
        without_loading.setattr(QuantizedFile, "load", lambda *_: pytest.fail("loaded"))
        for script, name in ((perplexity_table.table_rows, "rtn"), (sensitivity.analyse, "gptq")):
            more = {"methods": [name], "layer_windows": 1, "matrix_windows": 1}
            with refused("q is quantized already", "methods=[fp32]"):
                script(settings | more)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    [row] = perplexity_table.table_rows(settings)
    assert (tables.label(row), tables.is_float(row)) == ("stored", False)
    assert {row[key] for key in ("perplexity_change_percent", "kl", "top1_agreement")} == {None}
    assert row["bits_per_weight"] == 4 + 16 / 32 + 4 / 32
    told = tables.caption([row])
    assert "weights stored as packed codes of 4.625 bits a weight, quantized from" in told
    assert "to the float model" not in told
    tables.write_table(tmp_path, [row])
    assert (tmp_path / "table.md").read_text().startswith("| method | perplexity | bits/ weight | MB |")
    assert perplexity_bits.draw([row], tmp_path)


# ---- progress -------------------------------------------------------------------------------------------------------


def test_a_bar_shows_stage_and_row_how_many_the_figures_so_far_and_the_time_left(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(command_line, "console", Console(file=shown, force_terminal=True, width=100))
    with command_line.progress_bars("gptq-3") as report:
        report("evaluate", 4, 32)
        for done in range(1, 4):
            report("quantize", done, 30, error=0.1234567 * done, loss=float("nan"))
    last = shown.getvalue().replace("\x1b", "\n\x1b")
    for part in ("gptq-3: evaluate", " 4/32", "windows, left", "gptq-3: quantize", " 3/30", "layers, error 0.37, left"):
        assert part in last
    assert "loss" not in last
