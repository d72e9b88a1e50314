"""The perplexity table as its users run it: real processes, a tiny checkpoint that transformers wrote, local text."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import tables
from paper_figures import perplexity_bits

ROOT = Path(__file__).parents[1]
FIELDS = {
    "method", "perplexity", "perplexity_stderr", "kl", "top1_agreement", "bits_per_weight", "weight_mb",
    "tokens_per_second", "quantize_seconds", "peak_rss_mb", "config", "protocol", "code_version", "packages", "device",
    "seed",
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


def table(workplace: Path, *overrides: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(workplace, *overrides), cwd=ROOT, capture_output=True, text=True, **options)


def command(workplace: Path, *overrides: str) -> list[str]:
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
    given = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "experiments.perplexity_table", *given]


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "table.jsonl").read_text().splitlines()]


def test_one_command_writes_the_table_the_rows_and_the_figure_and_a_second_reuses_them(workplace):
    done = table(workplace, "name=whole")
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
        assert [row["method"] for row in csv.DictReader(file)] == METHODS
    markdown = (folder / "table.md").read_text()
    assert all(f"{row['perplexity']:.3f}" in markdown for row in rows)
    assert "4 windows of 64 tokens" in markdown
    assert (folder / "perplexity_bits.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "perplexity_bits.pdf").read_bytes().startswith(b"%PDF")
    assert str(folder) in done.stdout

    again = table(workplace, "name=whole")
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
    "a text shorter than a window": (["evaluation.data={}/short.txt"], "too few"),
    "a text that is not there": (["evaluation.data=/nowhere.txt"], "/nowhere.txt"),
    "evaluation text inside the calibration text": (["evaluation.data={}/calibration.txt"], "calibration"),
    "an unknown method": (["methods=[fp32,gptqq]"], "gptqq"),
    "bits out of range": (["bits=9"], "9"),
    "a group larger than a weight": (["group=4096"], "4096"),
    "an option that does not exist": (["evaluation.windws=3"], "evaluation.windws"),
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
    process = subprocess.Popen(
        command(workplace, *overrides), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not (folder / "table.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    kept = rows_of(folder)
    assert 1 <= len(kept) < 4
    assert [path.name for path in folder.iterdir()] == ["table.jsonl"]

    done = table(workplace, *overrides)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(kept)") == len(kept)
    assert rows_of(folder)[: len(kept)] == kept
    assert len(rows_of(folder)) == 4


def test_the_experiment_runs_where_torch_cannot_be_imported(workplace, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is absent')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = table(workplace, "name=torchless", "methods=[fp32,rtn]", env=env)
    assert done.returncode == 0, done.stderr


def test_a_figure_of_many_rows_has_a_line_each_and_none_presses_the_others_together():
    rows = tables.read_rows(ROOT / "experiments" / "results" / "formats")
    left = perplexity_bits.ranking(rows).axes[0]
    names = [label.get_text() for label in left.get_yticklabels()]
    bits = [float(name.split()[-1]) for name in names]
    assert len(names) == len(rows) - 1 > perplexity_bits.MOST_LABELS
    assert bits == sorted(bits, reverse=True)
    assert max(row["perplexity"] for row in rows) > 1e5
    assert left.get_xlim()[1] < 5 * min(row["perplexity"] for row in rows)
    shown = {float(line.get_xdata()[0]) for line in left.get_lines()}
    assert {round(x, 9) for x in shown} >= {round(r["perplexity"], 9) for r in rows if r["perplexity"] < 90}
