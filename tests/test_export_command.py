"""`python -m experiments.export`: every format from one command, from memory and from disk, and what it refuses."""

from pathlib import Path

import checkpoints
import gguf
import numpy as np
import pytest
from commands import run_here, run_in_process_of_its_own

import jquant
from jquant import Int, export, load_model, quantize
from jquant.models.params import flat_params
from jquant.qtensor import QTensor

SMALL = {"intermediate_size": 128, "tie_word_embeddings": True}
WIDE = SMALL | {"hidden_size": 256, "intermediate_size": 512}  # rows of whole blocks, whatever the block type


def made(folder: Path, **shape) -> Path:
    checkpoints.save(folder, checkpoints.llama(**shape))
    (folder / "text.txt").write_text(checkpoints.random_text(4000, seed=1))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("small"), **SMALL)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("wide"), **WIDE)


def command(folder: Path, output: Path, *more: str) -> list[str]:
    sampling = [f"calibration.data={folder / 'text.txt'}", "calibration.samples=16", "calibration.context=32"]
    return ["model=local", f"model.path={folder}", f"output={output}", "group=32", *sampling, *more]


@pytest.mark.parametrize(
    ("format", "method"),
    [
        ("gptq_v2", "gptq"),
        ("awq", "awq"),
        ("compressed-tensors", "rtn-8"),
        ("bitsandbytes", "nf4"),
        ("plain", "rtn-3"),
    ],
)
def test_one_command_writes_a_folder_that_loads(folder, tmp_path, format, method):
    ended = run_here("export", *command(folder, tmp_path / "out", f"format={format}", f"method={method}"))
    assert ended.returncode == 0, ended.stderr
    model = load_model(tmp_path / "out", progress=False)
    packed = [leaf for leaf in flat_params(model.decoder).values() if isinstance(leaf, QTensor)]
    assert len(packed) == (0 if format == "plain" else 7)
    readme = (tmp_path / "out" / "README.md").read_text()
    assert format in readme
    assert "bits" in readme


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_mixture_is_one_command(wide, tmp_path, rounding):
    how = ("mixture=q4_k_m", f"rounding={rounding}", "format=gguf")
    ended = run_here("export", *command(wide, tmp_path / "out.gguf", *how))
    assert ended.returncode == 0, ended.stderr
    assert "out.gguf" in ended.stdout
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == "Q4_K"
    assert kinds["blk.1.ffn_down.weight"] == kinds["token_embd.weight"] == "Q6_K"
    ended = run_here("export", *command(wide, tmp_path / "out.gguf", *how))
    assert ended.returncode == 2
    assert "force=true" in ended.stderr


def test_a_checkpoint_on_disk_is_exported_as_it_is(folder, tmp_path):
    q = quantize(load_model(folder, progress=False), "rtn", bits=4, group=32, progress=False)
    q.save(tmp_path / "saved")
    settings = ["model=local", f"model.path={tmp_path / 'saved'}", f"output={tmp_path / 'out'}", "format=gptq_v2"]
    ended = run_in_process_of_its_own("export", *settings)
    assert ended.returncode == 0, ended.stderr
    ours, theirs = (flat_params(m.decoder) for m in (q, load_model(tmp_path / "out", progress=False)))
    for name, leaf in ours.items():
        if isinstance(leaf, QTensor):
            np.testing.assert_array_equal(theirs[name].codes, leaf.codes, err_msg=name)
            np.testing.assert_array_equal(theirs[name].zero, leaf.zero, err_msg=name)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["format=gguff"], "format is gguf, gptq"),
        (["format=gptq", "method=nf4"], "bitsandbytes"),
        (["format=gptq_v2", "mixture=q4_0"], "mixture=q4_0"),
        (["format=gguf", "mixture=q4_0", "method=rtn"], "give mixture or method"),
        (["format=gguf", "mixture=q4_k_x"], "Q4_K_M"),
        (["format=gguf", "mixture=q4_0", "rounding=up"], "rounding is nearest or gptq"),
        (["format=gguf", "method=rtn-4"], "layers.0.attention"),
        (["format=awq", "method=rtn-3"], "layers.0.attention"),
        (["force=maybe"], "force is true or false"),
    ],
    ids=" ".join,
)
def test_wrong_settings_end_in_one_sentence_and_leave_nothing(folder, tmp_path, settings, said):
    ended = run_here("export", *command(folder, tmp_path / "out", *settings))
    assert ended.returncode == 2, ended.stdout
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_names_the_nearest(folder, tmp_path):
    model = load_model(folder, progress=False)
    with checkpoints.refused("'gptq_v3'", "gptq_v2"):
        export(model, tmp_path / "out", "gptq_v3")
    export(quantize(model, jquant.Method(Int(4, 32, symmetric=True)), progress=False), tmp_path / "out.gguf")
    assert len(load_model(tmp_path / "out.gguf", progress=False).decoder.segments) == 1
