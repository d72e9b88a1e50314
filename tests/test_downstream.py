"""lm-evaluation-harness on jquant models: equal to its `hf` backend; cloze items; the command; the paired interval."""

import ast
import contextlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import lm_eval
import numpy as np
import pytest
import transformers
import yaml
from checkpoints import refused
from commands import run_here, run_in_process_of_its_own
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from test_structure import ROOT
from tokenizers.processors import TemplateProcessing

import jquant
from experiments import tables
from experiments.cloze import cloze_items
from experiments.downstream import load_tasks
from jquant import load_model
from jquant.evaluation import harness
from jquant.evaluation.harness import JquantLM, padded
from jquant.evaluation.intervals import paired_accuracy

WINDOW = 48
ITEMS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model whose context is short, one whose tokenizer begins texts with BOS, a task and texts."""
    place = tmp_path_factory.mktemp("downstream")
    model = checkpoints.llama(max_position_embeddings=WINDOW)
    for name in ("model", "with_bos"):
        checkpoints.save(place / name, model)
    tokenizer = json.loads((place / "model" / "tokenizer.json").read_text())
    template = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer["post_processor"] = json.loads(template.__getstate__())
    (place / "with_bos" / "tokenizer.json").write_text(json.dumps(tokenizer))
    write_task(place / "tasks", "first", seed=1)
    (place / "calibration.txt").write_text(checkpoints.random_text(900, seed=6))
    paragraphs = [checkpoints.random_text(30, seed=seed) for seed in range(40)]
    (place / "paragraphs.txt").write_text("\n".join(paragraphs))
    return place


def write_task(folder: Path, name: str, seed: int, **changes: Any) -> None:
    """A task with choices of one to nine words, which are one to many tokens."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    words = checkpoints.random_text(4000, seed=seed).split()
    lines = []
    for item in range(ITEMS):
        cut = [" ".join(words[item * 60 + 9 * place :][: rng.integers(1, 10)]) for place in range(4)]
        question = " ".join(words[item * 60 + 36 :][: rng.integers(0, 24)])
        right = int(np.argmin([*map(len, cut)])) if item % 2 else int(rng.integers(4))  # short choices are likely
        lines.append(json.dumps({"question": question, "answers": cut, "right": right}))
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
    task = {
        "task": name, "output_type": "multiple_choice", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "doc_to_text": "question", "doc_to_choice": "answers", "doc_to_target": "right",
    } | changes  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def theirs(folder: Path, batch: int = 1) -> HFLM:
    """The harness's own backend on the same folder."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)


def asked(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def text(tokens: int, seed: int) -> str:
    """A text of so many tokens."""
    tokenizer = checkpoints.tokenizer()
    ids = tokenizer.encode(checkpoints.random_text(200, seed=seed)).ids[:tokens]
    found = tokenizer.decode(ids)
    assert len(tokenizer.encode(found).ids) == tokens
    return found


PAIRS = [
    ("abc", " a"),
    ("abc def ghij", " jihg fedc ba"),  # several tokens
    ("abc def  ", "ghi"),  # the context's spaces belong to the continuation
    ("abc", "defgh"),  # a token may join both
    ("", " abc dab"),
    ("", "<s> abc"),
    ("<s>abc", " dab"),
    (text(WINDOW - 2, 1), text(3, 2)),  # one token too many, of which the last is only predicted
    (text(WINDOW - 2, 3), text(4, 4)),
    (text(150, 5), text(9, 6)),  # longer than the window
    (text(30, 7), text(WINDOW - 3, 8)),
    *((text(n, n), " " + text(1 + n % 5, 100 + n)) for n in range(1, 30, 3)),
]


@pytest.mark.parametrize(("folder", "batch"), [("model", 1), ("model", 7), ("with_bos", 64)])
def test_log_likelihoods_are_those_of_the_hf_backend(place, folder, batch):
    told = []
    ours = JquantLM(load_model(place / folder), batch=batch, progress=lambda *step: told.append(step))
    requests = asked("loglikelihood", *PAIRS)
    expected = theirs(place / folder).loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests)
    np.testing.assert_allclose([ll for ll, _ in found], [ll for ll, _ in expected], atol=1e-4, rtol=0)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert told[-1] == ("answer", len(PAIRS), len(PAIRS))


def test_what_the_model_would_say_itself_is_greedy_with_both(place):
    model, ids = checkpoints.llama(max_position_embeddings=WINDOW), [5, 80, 7]
    for _ in range(3):
        ids.append(int(checkpoints.logits(model, np.array([ids]))[0, -1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % checkpoints.VOCAB]
    requests = [(None, ids[:3], ids[3:]), (None, ids[:3], other[3:]), (None, ids[:5], ids[5:])]
    for server in (JquantLM(load_model(place / "model")), theirs(place / "model")):
        answers = server._loglikelihood_tokens(requests, disable_tqdm=True)
        assert [greedy for _, greedy in answers] == [True, False, True]


def test_both_begin_with_bos_only_where_the_tokenizer_does(place):
    for folder, bos in (("model", []), ("with_bos", [0])):
        ours, other = JquantLM(load_model(place / folder)), theirs(place / folder)
        for string in ("abc", "<s>abc", ""):
            assert ours.tok_encode(string) == other.tok_encode(string)
            ids = ours.tok_encode(string, add_special_tokens=False)
            assert ids == other.tok_encode(string, add_special_tokens=False)
        assert ours.tok_encode("abc")[: len(bos)] == bos


def test_rolling_log_likelihoods_are_those_of_the_hf_backend(place):
    requests = asked("loglikelihood_rolling", (text(5, 1),), (text(WINDOW, 2),), (text(3 * WINDOW + 7, 3),))
    expected = theirs(place / "model").loglikelihood_rolling(requests, disable_tqdm=True)
    found = JquantLM(load_model(place / "model"), batch=2).loglikelihood_rolling(requests)
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0)


def test_generated_texts_are_those_of_the_hf_backend(place):
    until = {"until": ["a"], "max_gen_toks": 8}
    options = [until, {"max_gen_toks": 8}, until, {"max_gen_toks": 8, "do_sample": False}]
    contexts = ["abc def", "jj", text(100, 4), "gfe dcb"]
    requests = asked("generate_until", *zip(contexts, options, strict=True))
    expected = theirs(place / "model", batch=2).generate_until(requests, disable_tqdm=True)
    ours = JquantLM(load_model(place / "model"), batch=2)
    assert ours.generate_until(requests) == expected
    assert len(set(expected)) > 2
    sampled = asked("generate_until", *[("abc", {"max_gen_toks": 8, "do_sample": True, "temperature": 2.0})] * 2)
    first, second = ours.generate_until(sampled)
    assert first != second
    assert ours.generate_until(sampled) == [first, second]


def test_what_the_adapter_cannot_answer_is_one_sentence(place):
    ours = JquantLM(load_model(place / "model"))
    with refused(f"has {WINDOW + 1} tokens", f"context is {WINDOW}"):
        ours.loglikelihood(asked("loglikelihood", ("abc", text(WINDOW + 1, 1))))
    with refused("continuation of 'abc' is empty"):
        ours.loglikelihood(asked("loglikelihood", ("abc", "")))
    with refused("num_beams", "max_gen_toks"):
        ours.generate_until(asked("generate_until", ("abc", {"num_beams": 3})))
    with refused("max_gen_toks=256", "no room"):
        ours.generate_until(asked("generate_until", ("abc", {})))
    with refused("batch takes a whole number from 1"):
        JquantLM(ours.model, batch=0)


def test_texts_are_padded_to_few_lengths():
    lengths = {padded(length, 2000) for length in range(1, 2001)}
    assert len(lengths) == 24
    assert max(lengths) == 2000
    for length in range(65, 2001):
        assert length <= padded(length, 2000) <= 1.25 * length


@pytest.fixture(scope="module")
def expected(place) -> Any:
    """What the harness makes of the first task with its own backend."""
    return evaluated(theirs(place / "model", batch=8), place / "tasks")


def evaluated(server: Any, folder: Path) -> Any:
    with contextlib.chdir(folder):
        loaded = TaskManager(include_path=folder, include_defaults=False).load(["first"])
    return lm_eval.evaluate(server, loaded, bootstrap_iters=0)


def test_every_item_comes_out_as_with_the_hf_backend(place, expected):
    found = evaluated(JquantLM(load_model(place / "model"), batch=5), place / "tasks")
    for metric in ("acc", "acc_norm"):
        assert found["results"]["first"][f"{metric},none"] == expected["results"]["first"][f"{metric},none"]
        items, same = ([sample[metric] for sample in one["samples"]["first"]] for one in (found, expected))
        assert items == same
        assert 0 < sum(items) < ITEMS


# ---- items and interval ---------------------------------------------------------------------------------------------


def test_cloze_items_hold_the_true_continuation_once(place):
    source = (place / "paragraphs.txt").read_text()
    made = cloze_items(source, 20, 12, 6, seed=3)
    assert made == cloze_items(source, 20, 12, 6, seed=3)
    assert made != cloze_items(source, 20, 12, 6, seed=4)
    paragraphs = source.split("\n")
    for item in made:
        [own] = [line for line in paragraphs if line.startswith(item["context"])]
        true = [own.startswith(f"{item['context']} {choice}") for choice in item["choices"]]
        assert [place for place, right in enumerate(true) if right] == [item["label"]]
        assert {len(choice.split(" ")) for choice in item["choices"]} == {6}
        assert len(set(item["choices"])) == 4
    assert {item["label"] for item in made} == {0, 1, 2, 3}
    assert len({item["context"] for item in made}) == 20
    with refused("40 paragraphs of 18 words", "41 items", "cloze.items"):
        cloze_items(source, 41, 12, 6, seed=3)


def paired(both: int, won: int, lost: int, none: int) -> tuple[list[int], list[int]]:
    """Outcomes of two methods: right on both, on the first only, on the second only, on none."""
    return [1] * (both + won) + [0] * (lost + none), [1] * both + [0] * won + [1] * lost + [0] * none


def test_the_paired_interval_is_the_published_one():
    # The example of `ci.prop.ps` in statpsych, the R package of Bonett, one of the interval's authors.
    change = paired_accuracy(*paired(6, 26, 4, 12))
    assert change.percent == pytest.approx(100 * 22 / 48)
    assert (change.low, change.high) == pytest.approx((25.48067, 62.51933), abs=1e-5)


@pytest.mark.parametrize(("p", "q"), [(0.1, 0.1), (0.15, 0.05), (0.02, 0.02), (0.3, 0.1)])
def test_the_paired_interval_holds_the_truth_as_often_as_it_says(p, q):
    n, covered = 60, 0.0
    for won in range(n + 1):
        for lost in range(n + 1 - won):
            ways = math.comb(n, won) * math.comb(n - won, lost)
            chance = ways * p**won * q**lost * (1 - p - q) ** (n - won - lost)
            if chance > 1e-9:
                change = paired_accuracy(*paired(0, won, lost, n - won - lost))
                covered += chance * (change.low <= 100 * (p - q) <= change.high)
    assert 0.94 < covered <= 1


# ---- the command ----------------------------------------------------------------------------------------------------


def command(place: Path, run: Any = run_here, **changes: Any) -> Any:
    options = {
        "model": "local", "model.path": place / "model", "results": place / "results", "name": "tiny",
        "methods": "[fp32,rtn,gptq-3]", "bits": 2, "group": 32, "tasks": f"[{place / 'tasks'},cloze]", "batch": 16,
        "cloze.data": place / "paragraphs.txt", "cloze.items": 10, "cloze.beginning": 12, "cloze.continuation": 5,
        "calibration.data": place / "calibration.txt", "calibration.samples": 8, "calibration.context": 32,
    } | changes  # fmt: skip
    return run("downstream", *(f"{key}={value}" for key, value in options.items()))


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("JQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_command_writes_rows_and_tables_and_reuses_the_rows(place, own_cache, expected):
    done = command(place)
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip()
    folder = place / "results" / "tiny"
    rows = tables.read_rows(folder, "downstream.jsonl")
    names = [(row["method"], row["task"]) for row in rows]
    assert names == [(method, task) for method in ("fp32", "rtn", "gptq-3") for task in ("first", "cloze")]
    [made] = (own_cache / "tasks").iterdir()
    assert [json.loads(line)["label"] for line in (made / "cloze.jsonl").read_text().splitlines()]
    for correct, metric in (("correct", "acc"), ("correct_norm", "acc_norm")):
        assert rows[0][correct] == "".join(str(int(sample[metric])) for sample in expected["samples"]["first"])
    for row in rows:
        assert row.keys() >= {"config", "protocol", "code_version", "packages", "device", "fingerprint", "seed"}
        assert row["accuracy"] == row["correct"].count("1") / row["items"]
        assert row["items"] == len(row["correct"]) == (10 if row["task"] == "cloze" else ITEMS)
        assert (row["protocol"]["calibration_sha256"] is None) == (row["method"] != "gptq-3")
        same = [other for other in rows if other["task"] == row["task"]]
        assert {other["protocol"]["items_sha256"] for other in same} == {row["protocol"]["items_sha256"]}
    assert len({row["protocol"]["items_sha256"] for row in rows}) == 2
    markdown = (folder / "downstream.md").read_text()
    for row in rows:
        base = next(other for other in rows if other["task"] == row["task"])
        change = paired_accuracy(*([*map(int, each["correct"])] for each in (row, base)))
        shown = f"{change.percent:+.1f} [{change.low:+.1f}, {change.high:+.1f}]"
        cell = "" if row is base else shown + "*" * (not change.low <= 0 <= change.high)
        label = {"fp32": "FP32", "rtn": "RTN-2", "gptq-3": "GPTQ-3"}[row["method"]]
        assert f"| {label} | {100 * row['accuracy']:.1f} | {cell} |" in markdown

    marked = [row | {"accuracy": 0.77777} for row in rows]
    (folder / "downstream.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked))
    again = command(place)
    assert again.returncode == 0, again.stderr
    assert tables.read_rows(folder, "downstream.jsonl") == marked
    assert (folder / "downstream.md").read_text().count("| 77.8 |") == 6


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"methods": "[gptqq]"}, ["gptqq", "gptq"]),
        ({"baseline": "awq"}, ["baseline=awq", "fp32, rtn, gptq-3"]),
        ({"tasks": "[]"}, ["tasks takes cloze, a folder"]),
        ({"cloze.items": 1}, ["cloze.items takes a whole number from 2"]),
        ({"cloze.data": "nothing.txt"}, ["cloze.data=nothing.txt is not a file"]),
        ({"calibration.data": "paragraphs.txt", "cloze.continuation": 18}, ["cloze occurs in the calibration text"]),
    ],
)
def test_bad_input_ends_in_one_sentence_and_leaves_nothing(place, own_cache, monkeypatch, changes, parts):
    monkeypatch.chdir(place)
    done = command(place, name="bad", **{"tasks": "cloze"} | changes)
    assert done.returncode == 2, (done.stdout, done.stderr)
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
    assert not (place / "results" / "bad").exists()


def test_tasks_that_cannot_be_run_are_named(place, own_cache, monkeypatch, tmp_path):
    for name, changes in {
        "texts": {"output_type": "generate_until"},
        "no_data": {"dataset_kwargs": {"data_files": {"test": "nothing.jsonl"}}},
        "no_field": {"doc_to_choice": "{{answer"},
    }.items():
        write_task(tmp_path / name, name, 1, **changes)
    for name in ("empty", "no_yaml"):
        (tmp_path / name).mkdir()
    (tmp_path / "no_yaml" / "task.yaml").write_text("task: [")
    made = {"data": str(place / "paragraphs.txt"), "items": 99, "beginning": 12, "continuation": 6}
    for tasks, *parts in [
        (str(tmp_path / "nowhere"), "nowhere is not a folder"),
        (str(tmp_path / "empty"), "has no task"),
        (str(tmp_path / "no_yaml"), "task.yaml is no YAML"),
        (str(tmp_path / "texts"), "texts asks for generate_until", "multiple_choice"),
        (str(tmp_path / "no_data"), "no_data can't be loaded", "nothing.jsonl"),
        (str(tmp_path / "no_field"), "no_field can't be loaded"),
        ([str(place / "tasks")] * 2, "second task named first"),
        ("cloze", "40 paragraphs", "99 items"),
    ]:
        with refused(*parts):
            load_tasks({"tasks": tasks, "cloze": made, "seed": 0})
    # The harness's own tasks are thousands of files, which take it seconds to read.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: SimpleNamespace(all_tasks=["hellaswag", "arc_easy"]))
    with refused("no task 'helaswag'", "hellaswag"):
        load_tasks({"tasks": "helaswag", "seed": 0})


def test_a_model_that_was_calibrated_on_the_items_is_refused(place, own_cache, tmp_path):
    text = (place / "paragraphs.txt").read_text()
    model = jquant.quantize(load_model(place / "model"), "gptq-4", group=32, calibration=text, samples=8, context=32)
    model.save(tmp_path / "gptq-4")
    changes = {"model.path": tmp_path / "gptq-4", "methods": "[fp32]", "tasks": "cloze", "cloze.continuation": 18}
    done = command(place, name="bad", **changes)
    assert done.returncode == 2
    assert "occurs in the calibration text" in done.stderr
    done = command(place, name="stored", **changes | {"tasks": place / "tasks"})
    assert done.returncode == 0, done.stderr
    assert {tables.label(row) for row in tables.read_rows(place / "results" / "stored", "downstream.jsonl")} == {
        "stored"
    }


def test_without_the_extra_one_sentence_says_what_to_install(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, harness.__name__)
    monkeypatch.delattr("jquant.evaluation.harness")
    done = command(place, name="bad")
    assert done.returncode == 2
    assert done.stderr.startswith("error: lm-evaluation-harness is not installed: pip install 'jquant[harness]'")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (place / "results" / "bad").exists()


def test_the_command_in_a_process_of_its_own_checks_before_it_works(place):
    done = command(place, run_in_process_of_its_own, tasks=place / "nowhere", name="bad")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"error: tasks={place / 'nowhere'} is not a folder."]


def test_no_other_module_imports_the_harness_when_it_is_imported():
    for file in [*(ROOT / "jquant").rglob("*.py"), *(ROOT / "experiments").glob("*.py")]:
        module = ast.parse(file.read_text())
        at_import = [node for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {getattr(node, "module", "") or "" for node in at_import}
        names |= {alias.name for node in at_import for alias in node.names}
        assert not [name for name in names if name.startswith(("lm_eval", "torch", "jquant.evaluation.harness"))], file
