"""Quantizing from disk to disk: the bytes of the loaded model's run, whatever happens to the process."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import checkpoints
import jax
import numpy as np
import pytest
from checkpoints import refused
from commands import run_here, run_in_process_of_its_own
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jquant
from jquant import (
    AWQ,
    GGUF,
    GPTQ,
    NF4,
    Activation,
    Hadamard,
    InputError,
    Int,
    LlamaCpp,
    LossSearch,
    Method,
    Search,
    Tuning,
    double_quantized,
)
from jquant import (
    METHODS as ROWS,
)
from jquant.calibration.options import Options
from jquant.data import windows
from jquant.evaluation.perplexity import score, score_from_disk
from jquant.io import checkpoint
from jquant.io.checkpoint import block_folder, checksum, read_item, read_sealed, write_item, write_sealed
from jquant.io.load import LanguageModel, QuantizedFile, load_model, open_model
from jquant.methods import completed, method
from jquant.models.decoder import blocks
from jquant.models.params import flat_params
from jquant.parallel.mesh import MODEL, Devices
from jquant.pipeline.blocks import round_weight
from jquant.pipeline.in_memory import quantize_decoder
from jquant.pipeline.to_disk import quantize_stream, quantize_to_folder
from jquant.stats import AbsMax, Gram

ROOT = Path(__file__).parents[1]
TOKENS = np.random.default_rng(0).integers(0, checkpoints.VOCAB, (16, 24), np.int32)
GPTQ3 = Method(Int(3, 32), Search("diagonal"), GPTQ())
METHODS = {
    "rtn": method("rtn", group=32),
    "gptq": GPTQ3,
    "awq": Method(Int(4, 32), Search("gram"), transform=AWQ(4)),
    "double quantization": Method(NF4(32, double_quantized()), rounding=GPTQ()),
    "k-quant": Method(GGUF["Q4_K"], LlamaCpp()),
    "rotated": replace(GPTQ3, rotation=Hadamard()),
    "propagated": replace(GPTQ3, error_propagation=0.5),
    "tuned blocks": replace(GPTQ3, tuning=(Tuning(3, 2, target="block"),)),
    "static activations": Method(Int(8, "channel", True), activation=Activation(Int(8, "tensor", True), static=True)),
    "plan": [(r"layers\.1\.", None), (r"attention\.v", method("int8")), ("", GPTQ3)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    model = checkpoints.llama(hidden_size=64, intermediate_size=96, num_hidden_layers=4, initializer_range=0.1)
    return checkpoints.save(tmp_path_factory.mktemp("float"), model)


@pytest.fixture(scope="module")
def model(folder) -> LanguageModel:
    return load_model(folder)


def states(decoder) -> list[np.ndarray]:
    return jax.tree.leaves(nnx.to_pure_dict(nnx.state(decoder)))


def files(folder: Path) -> dict[str, bytes]:
    """What a run writes; its lock stays where it was, and holds nothing."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert not found.pop(".lock", b"")
    return found


@pytest.mark.parametrize("name", METHODS)
def test_the_checkpoint_holds_what_quantizing_the_loaded_model_gives(model, folder, tmp_path, name):
    done = []
    written = quantize_to_folder(
        open_model(folder),
        tmp_path / "q",
        METHODS[name],
        TOKENS,
        options=Options(batch=4, progress=lambda *told, **_: done.append(told)),
    )
    expected, report = quantize_decoder(model.decoder, METHODS[name], TOKENS, Options(batch=4))
    loaded = load_model(tmp_path / "q")
    assert jax.tree.structure(nnx.split(loaded.decoder)) == jax.tree.structure(nnx.split(expected))
    assert all(map(np.array_equal, states(loaded.decoder), states(expected)))
    assert loaded.report.keys() == report.keys()
    assert all(np.array_equal(vars(loaded.report[key])["error"], report[key].error, equal_nan=True) for key in report)
    assert done == [("quantize", layer, 4) for layer in (1, 2, 3, 4)]
    text = "a b c"
    assert np.array_equal(loaded.tokenizer.encode(text), model.tokenizer.encode(text))
    assert (loaded.config, loaded.stored_as) == (model.config, model.stored_as)
    assert isinstance(written, QuantizedFile)


@pytest.mark.optimised
@pytest.mark.parametrize("name", ["awq", "rotated"])
def test_so_it_does_where_programs_are_optimised(model, folder, tmp_path, name):
    """Sums may be in another order there; both ways must still run one program."""
    written = quantize_to_folder(open_model(folder), tmp_path / "q", METHODS[name], TOKENS, Options(batch=4))
    expected, _ = quantize_decoder(model.decoder, METHODS[name], TOKENS, Options(batch=4))
    assert all(map(np.array_equal, states(written.load().decoder), states(expected)))


def test_a_checkpoint_is_as_small_as_its_format_says(tmp_path):
    """4 bits, and a group of 128 with a scale of 16 bits and a zero of 4: 4.16 bits a weight, within 2 %."""
    made = checkpoints.llama(hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8)
    folder = checkpoints.save(tmp_path / "float", made)
    quantize_to_folder(open_model(folder), tmp_path / "q", method("rtn", group=128))
    weights = 2 * (2 * 512 * 512 + 2 * 512 * 64 * made.config.num_key_value_heads + 3 * 512 * 1024)
    size = sum(len(content) for name, content in files(tmp_path / "q").items() if name.startswith("blocks"))
    assert size == pytest.approx(weights * 4.16 / 8, rel=0.02)


def test_perplexity_from_disk_is_that_of_the_loaded_model(model, folder, tmp_path):
    quantize_to_folder(open_model(folder), tmp_path / "q", GPTQ3, TOKENS, Options(batch=4))
    for path in (folder, tmp_path / "q"):
        streamed, loaded = score_from_disk(open_model(path), TOKENS), score(load_model(path).decoder, TOKENS)
        np.testing.assert_allclose(streamed.nll, loaded.nll, rtol=1e-4, atol=1e-4)
        assert streamed.perplexity == pytest.approx(loaded.perplexity, rel=1e-5)


def test_a_run_that_stops_goes_on_to_the_same_bytes(folder, tmp_path):
    """From every block on, with float inputs too, and with two streams."""
    for name, inputs in (
        ("gptq", "quantized"),
        ("gptq", "float"),
        ("propagated", "quantized"),
        ("rotated", "float"),
    ):
        how = {"options": Options(batch=4, inputs=inputs)}
        whole = quantize_to_folder(open_model(folder), tmp_path / f"{name}-{inputs}", METHODS[name], TOKENS, **how)
        for stop in (1, 3):
            parts = tmp_path / f"{name}-{inputs}-{stop}"
            steps = quantize_stream(open_model(folder), parts, METHODS[name], TOKENS, **how)
            assert [next(steps) for _ in range(stop)] == list(range(stop))
            steps.close()
            with refused("not finished", f"{stop:05}"):
                load_model(parts)
            done = list(quantize_stream(open_model(folder), parts, METHODS[name], TOKENS, **how))
            assert done == list(range(stop, 4))
            assert files(parts) == files(whole.folder)


def test_windows_that_wait_on_disk_change_nothing_and_leave_nothing(folder, tmp_path):
    for name, devices in (("gptq", None), ("propagated", Devices(2, 2))):
        how = {"options": Options(batch=4, devices=devices)}
        whole = quantize_to_folder(open_model(folder), tmp_path / name, METHODS[name], TOKENS, **how)
        target = tmp_path / f"{name}-spilled"
        batch_gb = 4 * 24 * 64 * 4 / 1e9  # of the four batches of either stream the first stays in memory
        steps = quantize_stream(open_model(folder), target, METHODS[name], TOKENS, **how, memory_gb=1.5 * batch_gb)
        next(steps)
        waiting = sorted(path.name for path in (target / ".windows").iterdir())
        steps.close()  # and its files stay, as a killed process leaves them
        if devices:  # one batch, 16 windows in four parts, does not fit
            assert waiting == [f"{stream}00000.{part}" for stream in ("exact", "seen") for part in range(4)]
        else:
            assert waiting == [f"seen{batch:05}.0" for batch in (1, 2, 3)]
        quantize_to_folder(open_model(folder), target, METHODS[name], TOKENS, **how, memory_gb=0)
        assert files(target) == files(whole.folder)


def test_another_run_is_refused_with_what_differs(folder, tmp_path):
    target = tmp_path / "q"
    next(quantize_stream(open_model(folder), target, GPTQ3, TOKENS))
    before = files(target)
    other = replace(GPTQ3, format=Int(4, 32), rounding=GPTQ(0.05))
    with refused(str(target), "(methods: format.bits 3, now 4; rounding.damping 0.01, now 0.05)"):
        quantize_to_folder(open_model(folder), target, other, TOKENS)
    with refused(str(target), "methods: format Int, now Codebook; rounding.damping 0.01, now 0.05; Method, now null)"):
        plan = [("layers.0", replace(GPTQ3, format=NF4(32))), ("layers.1", replace(GPTQ3, rounding=GPTQ(0.05)))]
        quantize_to_folder(open_model(folder), target, plan, TOKENS)
    with refused(str(target), "calibration"):
        quantize_to_folder(open_model(folder), target, GPTQ3, TOKENS[:8])
    with refused(str(target), "inputs: quantized, now float"):
        quantize_to_folder(open_model(folder), target, GPTQ3, TOKENS, Options(inputs="float"))
    other = checkpoints.save(tmp_path / "other", checkpoints.llama(seed=1, hidden_size=64, intermediate_size=96))
    with refused(str(target), "source"):
        quantize_to_folder(open_model(other), target, GPTQ3, TOKENS)
    assert files(target) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with refused(str(tmp_path / "mine"), "not empty"):
        quantize_to_folder(open_model(folder), tmp_path / "mine", GPTQ3, TOKENS)
    assert files(tmp_path / "mine") == {"notes.txt": b"mine"}


def test_a_checkpoint_written_on_one_mesh_is_read_onto_another(model, folder, tmp_path):
    expected, _ = quantize_decoder(model.decoder, GPTQ3, TOKENS, Options(batch=4))
    devices = Devices(2, 2)
    written = quantize_to_folder(open_model(folder), tmp_path / "q", GPTQ3, TOKENS, Options(batch=4, devices=devices))
    loaded = written.load().decoder
    assert all(map(np.array_equal, states(loaded), states(expected)))
    columns = Devices(1, 8)

    def place(name: str, of: jax.ShapeDtypeStruct) -> NamedSharding:
        return NamedSharding(columns.mesh, P(None, MODEL) if name.endswith("codes") else P())

    shapes = {name: leaf.shape for name, leaf in flat_params(next(blocks(model.decoder))).items()}
    params = read_item(block_folder(tmp_path / "q", 1), shapes, place)
    codes = params["mlp.up.kernel"].codes
    assert codes.sharding.spec == P(None, MODEL)
    assert np.array_equal(codes, next(islice(written.blocks(), 1, None)).mlp.up.kernel.get_value().codes)
    for stop in (1, 3):
        steps = quantize_stream(
            open_model(folder), tmp_path / str(stop), GPTQ3, TOKENS, Options(batch=4, devices=devices)
        )
        assert [next(steps) for _ in range(stop)] == list(range(stop))
        steps.close()
        quantize_to_folder(open_model(folder), tmp_path / str(stop), GPTQ3, TOKENS, Options(batch=4, devices=devices))
        assert files(tmp_path / str(stop)) == files(tmp_path / "q")


def test_a_run_goes_on_over_more_devices_to_the_same_bytes(folder, tmp_path):
    """Statistics are added in the windows' order; split columns are another run where codes depend on them."""
    how, source = {"options": Options(batch=4)}, open_model(folder)
    whole = quantize_to_folder(source, tmp_path / "whole", GPTQ3, TOKENS, **how)
    steps = quantize_stream(source, tmp_path / "q", GPTQ3, TOKENS, **how)
    next(steps)
    steps.close()
    with refused("mesh.model: 1, now 2"):
        quantize_to_folder(source, tmp_path / "q", GPTQ3, TOKENS, Options(batch=4, devices=Devices(1, 2)))
    quantize_to_folder(source, tmp_path / "q", GPTQ3, TOKENS, Options(batch=4, devices=Devices(2)))
    assert files(tmp_path / "q") == files(whole.folder)
    next(quantize_stream(source, tmp_path / "rtn", METHODS["rtn"]))
    quantize_to_folder(source, tmp_path / "rtn", METHODS["rtn"], options=Options(devices=Devices(1, 2)))


def test_what_needs_the_whole_model_is_refused(folder, tmp_path):
    for chosen, part in (
        (replace(GPTQ3, token_weights="loss"), "token_weights='loss'"),
        (Method(Int(3, 32), LossSearch()), "LossSearch"),
        (replace(GPTQ3, tuning=(Tuning(3),)), "target='model'"),
    ):
        with refused("layers.0.attention.q.kernel", part, "whole model"):
            quantize_to_folder(open_model(folder), tmp_path / "q", chosen, TOKENS)
    for how, part in (
        ({}, "give it calibration tokens"),
        ({"tokens": TOKENS, "options": Options(held_out=16)}, "held_out=16 of 16"),
        ({"tokens": TOKENS, "options": Options(devices=Devices(3))}, "16 windows"),
        ({"tokens": TOKENS, "memory_gb": -1}, "memory_gb"),
    ):
        with refused(part):
            quantize_to_folder(open_model(folder), tmp_path / "q", GPTQ3, **how)
    assert not (tmp_path / "q").exists()


def test_damage_is_found_and_named_and_mended_by_the_same_command(folder, tmp_path):
    target = tmp_path / "q"
    quantize_to_folder(open_model(folder), target, GPTQ3, TOKENS, Options(batch=4))
    whole = files(target)
    codes = max((target / "blocks" / "00001" / "mlp.up.kernel.codes").iterdir(), key=lambda path: path.stat().st_size)
    flipped = bytearray(codes.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    for broken in (bytes(flipped), codes.read_bytes()[:-3]):
        codes.write_bytes(broken)
        with refused(str(codes), "delete", "00001"):
            load_model(target)
        with refused(str(codes)):
            quantize_to_folder(open_model(folder), target, GPTQ3, TOKENS, Options(batch=4))
    shutil.rmtree(target / "blocks" / "00001")
    with refused("00001"):
        load_model(target)
    quantize_to_folder(open_model(folder), target, GPTQ3, TOKENS, Options(batch=4))
    assert files(target) == whole
    codes.unlink()
    with refused(str(codes)):
        load_model(target)
    (target / "manifest.json").write_text("{")
    with refused("manifest.json", "not JSON"):
        load_model(target)


# ---- damage and forgery ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A checkpoint of one block: quantized scales, static activations, a rotation, all that item.json describes."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    source = checkpoints.save(tmp_path_factory.mktemp("source"), checkpoints.llama(**shape))
    static = Activation(Int(8, "tensor", True), static=True)
    plan = [("attention", Method(NF4(32, double_quantized()), rotation=Hadamard())),
            ("mlp.down", Method(GGUF["Q4_K"], LlamaCpp(), rotation=Hadamard())),
            ("mlp", Method(Int(8, "channel", True), rotation=Hadamard(), activation=static))]  # fmt: skip
    return quantize_to_folder(open_model(source), tmp_path_factory.mktemp("small") / "q", plan, TOKENS).folder


@pytest.fixture
def copy(small, tmp_path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "copy"))


def read(folder: Path, part: str) -> Any:
    """What a part of a checkpoint holds."""
    file = QuantizedFile(folder)
    if part.startswith("outside"):
        return jax.tree.leaves(nnx.state(file.outside()))
    if part.startswith("blocks"):
        return [file.report(), *(jax.tree.leaves(nnx.state(block)) for block in file.blocks())]
    return file.config, file.tokenizer, file.calibrated_on, file.source_files


def refuses(folder: Path, part: str) -> bool:
    """Whether reading it ends in a sentence that names the folder; no other exception gets through."""
    try:
        read(folder, part)
    except InputError as wrong:
        return str(folder) in str(wrong) and len(str(wrong).splitlines()) == 1 and len(str(wrong)) < 700
    return False


def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_found(copy):
    """Also in manifest.json, item.json and tokenizer.json, whose figures changed the perplexity without a word."""
    rng, names = random.Random(0), sorted(files(copy))
    assert len(names) > 50
    for name in names:
        whole = (copy / name).read_bytes()
        for _ in range(10 if name.endswith(".json") else 1):
            flipped = bytearray(whole)
            flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            (copy / name).write_bytes(flipped)
            assert refuses(copy, name), name
        (copy / name).write_bytes(whole)
    load_model(copy)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where the parts of a JSON value are."""
    if path:
        yield path
    for key, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(one, (*path, key))


def mutated(content: dict, rng: random.Random) -> dict:
    """The same JSON with one part deleted, renamed, nested, or replaced by another number or type."""
    content = json.loads(json.dumps(content))
    *way, key = rng.choice(list(places(content)))
    at: Any = content
    for step in way:
        at = at[step]
    old = at[key]
    others = [None, True, -1, 0, 7, 10**12, 1.5, 1e300, "", "x", "../x", "int8", [], {}, [[]], {"type": "Int"}]
    match rng.choice(["delete", "rename", "nest", "number", "replace", "replace"]):
        case "delete":
            del at[key]
        case "rename" if isinstance(at, dict):
            at[rng.choice(["../x", "/etc/passwd", "x", ""])] = at.pop(key)
        case "nest":
            at[key] = rng.choice([[old], {"a": old}, [old, old]])
        case "number" if type(old) in (int, float):
            at[key] = rng.choice([-old, old + 1, old * 1000, old / 2, float(old)])
        case _:
            at[key] = rng.choice(others)
    return content


@pytest.mark.parametrize("name", ["manifest.json", "blocks/00000/item.json", "outside/norm.scale/item.json"])
def test_mutations_of_manifest_and_item_end_in_a_sentence_or_an_equal_load(copy, name):
    """With the checksum as it was, never a load; with one made to fit, never another exception."""
    path, rng, refusals = copy / name, random.Random(name), 0
    seal, content = json.loads(path.read_text())["sha256"], read_sealed(path)
    content |= {"run": {}} if "run" in content else {}  # which nothing is read from
    others = [other for _ in range(50) if (other := mutated(content, rng)) != content]
    for other in others:
        path.write_text(json.dumps(other | {"sha256": seal}, indent=1) + "\n")
        assert refuses(copy, name), other
        write_sealed(path, other)
        refusals += refuses(copy, name) or not read(copy, name)
    write_sealed(path, content)
    read(copy, name)
    assert len(others) > 40
    assert refusals > 0.4 * len(others)  # names, reports and what fixes no shape may be anything


def test_mutations_of_tokenizer_json_end_in_a_sentence(copy):
    path, rng, refusals = copy / "tokenizer.json", random.Random(0), 0
    whole, manifest = json.loads(path.read_text()), read_sealed(copy / "manifest.json")
    whole["model"]["vocab"], whole["model"]["merges"] = dict(list(whole["model"]["vocab"].items())[:30]), []
    for _ in range(60):
        path.write_text(json.dumps(mutated(whole, rng)))
        write_sealed(copy / "manifest.json", manifest)
        assert refuses(copy, "tokenizer.json")
        write_sealed(copy / "manifest.json", manifest | {"files": {"tokenizer.json": checksum(path)}})
        refusals += refuses(copy, "tokenizer.json") or not read(copy, "tokenizer.json")
    assert 20 < refusals < 60


def test_arrays_that_were_forged_end_in_a_sentence(copy):
    """Checksums made to fit: another shape, a dtype, an array of another name, files that Orbax can't read."""
    item = copy / "blocks" / "00000"
    told, rng = read_sealed(item / "item.json"), random.Random(0)
    for name in [name for name in told["files"] if name.endswith((".zarray", "_METADATA"))]:
        whole = (item / name).read_bytes()
        cut = rng.randrange(len(whole))
        forged = rng.choice([whole[:cut], whole.replace(b"32", b"31"), whole.replace(b"u1", b"i1"), b"[]", b"{}"])
        if forged != whole:
            (item / name).write_bytes(forged)
            write_sealed(item / "item.json", told | {"files": told["files"] | {name: checksum(item / name)}})
            assert refuses(copy, "blocks"), forged
        (item / name).write_bytes(whole)
    write_sealed(item / "item.json", told)
    (item / "mlp.up.kernel.codes" / "9.9").write_bytes(b"more")
    with refused("9.9", "item.json has no such file"):
        load_model(copy)
    (item / "mlp.up.kernel.codes" / "9.9").unlink()
    shutil.copytree(item, copy / "blocks" / "00001")
    with refused("00001", "no place"):
        load_model(copy)


def test_shapes_are_those_that_the_manifest_asks_for(copy):
    manifest = read_sealed(copy / "manifest.json")
    others = {"hidden": 64, "ffn": 96, "kv_heads": 1, "vocab_size": 300, "layers": 2, "tied": True}
    for field, value in others.items():
        write_sealed(copy / "manifest.json", manifest | {"config": manifest["config"] | {field: value}})
        with refused(str(copy)):
            load_model(copy)


@pytest.mark.parametrize("name", [name for name in ROWS if "clips" not in method(name).needs])
def test_what_every_method_gives_is_what_reading_asks_for(name):
    """Formats, parts, shapes and dtypes, by abstract evaluation."""
    chosen, shape, rows = completed(name, 4, 32, False), (512, 128), 512
    square, number, row = (jax.ShapeDtypeStruct(of, np.float32) for of in ((rows, rows), (), (rows,)))
    seen = {"gram": Gram(square, number), "held_out": Gram(square, number), "abs_max": AbsMax(row)}
    of_w = jax.ShapeDtypeStruct(shape, np.float32)
    q, *_ = jax.eval_shape(lambda w, seen: round_weight(w, seen, chosen=chosen), of_w, seen)
    expected = checkpoint._expected("mlp.up.kernel", checkpoint._static(q), shape)
    assert jax.tree.structure(q) == jax.tree.structure(expected)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(q)] == [(a.shape, a.dtype) for a in jax.tree.leaves(expected)]


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_another_process_writes_is_refused(folder, tmp_path):
    """Two runs that begin together: one of them has the folder, until it ends, is closed, or its process dies."""
    target, source, rtn = tmp_path / "q", open_model(folder), method("rtn", group=32)
    steps = quantize_stream(source, target, rtn)
    next(steps)
    for other in (rtn, method("rtn", bits=3, group=32)):
        with refused(str(target), "is being written by another process"):
            quantize_to_folder(source, target, other)
    with refused("not finished"):  # but can be read
        load_model(target)
    steps.close()
    quantize_to_folder(source, target, rtn)
    (tmp_path / "other").mkdir()
    script = "import sys, filelock as f\nheld = f.FileLock(sys.argv[1])\nheld.acquire()\nprint(1, flush=True)\ninput()"
    command = [sys.executable, "-c", script, tmp_path / "other" / ".lock"]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "1\n"
    with refused(str(tmp_path / "other"), "is being written by another process"):
        quantize_to_folder(source, tmp_path / "other", rtn)
    holder.kill()
    holder.communicate()
    quantize_to_folder(source, str(tmp_path / "other"), rtn)
    assert files(target) == files(tmp_path / "other")


def test_a_run_whose_folder_was_replaced_writes_nothing_more(folder, tmp_path):
    target, rtn = tmp_path / "q", method("rtn", group=32)
    for replace_it in (lambda: shutil.rmtree(target), lambda: write_sealed(target / "manifest.json", {"version": 3})):
        steps = quantize_stream(open_model(folder), target, rtn)
        next(steps)
        replace_it()
        before = files(target)
        with refused("manifest.json"):
            next(steps)
        assert files(target) == before
        shutil.rmtree(target, ignore_errors=True)
    steps = quantize_stream(open_model(folder), target, rtn)
    next(steps)
    manifest = read_sealed(target / "manifest.json")
    write_sealed(target / "manifest.json", manifest | {"run": manifest["run"] | {"passes": 2}})
    with refused("manifest.json was replaced while this run was writing"):
        next(steps)
    assert not (target / "blocks" / "00001").exists()


def test_a_folder_that_can_not_be_written_ends_in_a_sentence(folder, tmp_path, monkeypatch):
    source, rtn = open_model(folder), method("rtn", group=32)
    for name in ("blocks", "outside"):
        steps = quantize_stream(source, tmp_path / name, rtn)
        next(steps)
        steps.close()
        shutil.rmtree(tmp_path / name / name)
        (tmp_path / name / name).write_text("in its place")
        with refused(str(tmp_path / name / name), "File exists"):
            quantize_to_folder(source, tmp_path / name, rtn)
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "q"):
        with refused(str(place), "Not a directory"):
            quantize_to_folder(source, place, rtn)
    next(quantize_stream(source, tmp_path / "read-only", rtn))

    def read_only(path: Path, *_, **__) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with refused(str(tmp_path / "read-only"), "can't be written (Permission denied)"):
        quantize_to_folder(source, tmp_path / "read-only", rtn)
    with refused("item can't be written (Permission denied)"):
        write_item(tmp_path / "item", {}, {})


@dataclass(frozen=True)
class Ours(Int):
    """A user's own format, which no checkpoint can hold."""


def test_a_users_own_format_is_refused_before_the_folder_is_made(folder, tmp_path):
    for own in (
        Method(Ours(4, 32)),
        Method(Int(4, 32, scale=Ours(8, 2, symmetric=True))),
        Method(Int(4, 32), activation=Activation(Ours(8, "channel", symmetric=True))),
    ):
        with refused("layers.1.mlp.up.kernel", "Ours", "quantize the loaded model"):
            quantize_to_folder(
                open_model(folder), str(tmp_path / "q"), [(r"layers\.1\.mlp\.up", own), ("", GPTQ3)], TOKENS
            )
        assert not (tmp_path / "q").exists()


def test_a_disk_that_fills_up_ends_in_one_sentence_and_keeps_finished_blocks(folder, tmp_path):
    """A limit on the size of files stands for the disk: the operating system refuses the write in the same way."""
    script = (
        "import resource, signal, sys, numpy as np\n"
        "from pathlib import Path\n"
        "import jquant, jquant.pipeline.to_disk as s\n"
        "from jquant.io.load import open_model\n"
        "steps = s.quantize_stream(open_model(sys.argv[1]), Path(sys.argv[2]), jquant.method('rtn', group=32))\n"
        "next(steps)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))\n"
        "try:\n    next(steps)\n"
        "except jquant.InputError as full:\n    print(full)\n"
    )
    target = tmp_path / "q"
    done = subprocess.run([sys.executable, "-c", script, folder, target], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "00001 can't be written" in done.stdout
    assert [path.name for path in (target / "blocks").iterdir()] == ["00000"]
    quantize_to_folder(open_model(folder), target, method("rtn", group=32))
    quantize_to_folder(open_model(folder), tmp_path / "whole", method("rtn", group=32))
    assert files(target) == files(tmp_path / "whole")


def arguments(folder: Path, calibration: Path, output: Path, *more: str) -> list[str]:
    settings = [f"model.path={folder}", f"output={output}", f"calibration.data={calibration}", *more]
    return ["model=local", "method=gptq", "group=32", "calibration.samples=16", "calibration.context=32", *settings]


WORKER = """
import sys
from pathlib import Path
import numpy as np
import jquant
from jquant.methods import method
from jquant.pipeline.to_disk import quantize_stream
tokens = np.load(sys.argv[3])
for layer in quantize_stream(jquant.open_model(sys.argv[1]), Path(sys.argv[2]), method("gptq", group=32), tokens):
    print(layer, flush=True)
    sys.stdin.readline()
"""


def test_a_killed_process_leaves_the_bytes_of_one_that_was_not(folder, tmp_path):
    np.save(tmp_path / "tokens.npy", TOKENS)
    arguments = [folder, tmp_path / "killed", tmp_path / "tokens.npy"]
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    for layer in (0, 1):
        assert process.stdout.readline() == f"{layer}\n"
        if layer == 0:
            process.stdin.write("\n")
            process.stdin.flush()
    process.kill()
    process.communicate()
    assert len(list((tmp_path / "killed" / "blocks").glob("0*"))) == 2
    for target in ("killed", "not killed"):
        quantize_to_folder(open_model(folder), tmp_path / target, method("gptq", group=32), TOKENS)
    assert files(tmp_path / "killed") == files(tmp_path / "not killed")


# What asks the operating system to change a folder, or to keep what was written; Orbax's own writes come in between.
CHANGES = ("mkdir", "rename", "replace", "rmdir", "unlink", "fsync")


def test_a_run_that_dies_at_any_change_of_its_folder_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    """The folder as it is before each change is what a process that dies there leaves."""
    model = checkpoints.llama(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    source, target = open_model(checkpoints.save(tmp_path / "float", model)), tmp_path / "finished"
    states: dict[tuple, dict[str, bytes]] = {}

    def note(state: dict[str, bytes]) -> None:
        states.setdefault(tuple(sorted(state.items())), state)

    def noted(change: Callable) -> Callable:
        def first_note(*args, **options):
            with suppress(FileNotFoundError):  # Orbax renames files meanwhile
                note(state := files(target))
                beside = sorted(name for name in state if name.startswith(("blocks/.", "outside/.")))
                note({name: state[name] for name in state if name not in beside[::2]})  # half of an unfinished item
            return change(*args, **options)

        return first_note

    with monkeypatch.context() as patched:
        for name in CHANGES:
            patched.setattr(os, name, noted(getattr(os, name)))
        quantize_to_folder(source, target, GPTQ3, TOKENS)
    finished = files(target)
    assert [sum(f"blocks/0000{layer}/item.json" in state for state in states.values()) > 0 for layer in (0, 1)] == [
        True
    ] * 2
    assert len(states) > 20
    for number, state in enumerate(states.values()):
        left = tmp_path / str(number)
        for name, content in state.items():
            (left / name).parent.mkdir(parents=True, exist_ok=True)
            (left / name).write_bytes(content)
        quantize_to_folder(source, left, GPTQ3, TOKENS)
        written = files(left)
        assert written.keys() == finished.keys(), sorted(state)
        assert [name for name in finished if written[name] != finished[name]] == []


def test_the_commands_quantize_and_evaluate_from_disk_and_bad_input_ends_in_one_sentence(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(checkpoints.random_text(4000, seed=4))
    done = run_here("quantize", *arguments(folder, text, tmp_path / "q", "method=rtn"))
    assert done.returncode == 0, done.stderr
    evaluation = [f"evaluation.data={text}", "evaluation.windows=3", "evaluation.context=32"]
    evaluation += [f"results={tmp_path / 'results'}", f"reference={folder}"]
    done = run_in_process_of_its_own("evaluate", "model=local", f"model.path={tmp_path / 'q'}", *evaluation)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    loaded = load_model(tmp_path / "q")
    expected = jquant.perplexity(loaded, text.read_text(), context=32, windows=3)
    assert told["perplexity"] == pytest.approx(expected.value, rel=1e-5)
    assert told["scored_tokens"] == expected.scored_tokens
    compared = jquant.compare(load_model(folder), {"q": loaded}, text.read_text(), context=32, windows=3)["q"]
    assert told["kl"] == pytest.approx(compared.kl, rel=1e-3)
    for more, part in (
        (["method=gptqq"], "gptqq"),
        (["method=gptq_tuned"], "target='model'"),
        ([f"model.path={tmp_path / 'q'}", f"output={tmp_path / 'r'}"], "quantized already"),
        (["method=rtn", "bits=3"], "holds another run"),
        (["mesh.data=9"], "takes 9 devices; there are 8"),
    ):
        run = run_in_process_of_its_own if more == ["method=gptqq"] else run_here
        failed = run("quantize", *arguments(folder, text, tmp_path / "q", *more))
        assert failed.returncode == 2, failed.stderr
        assert failed.stderr.startswith("error: ")
        assert part in failed.stderr
        assert len(failed.stderr.splitlines()) == 1
    assert not (tmp_path / "r").exists()


def test_a_checkpoint_remembers_the_tokens_that_it_was_fitted_to(folder, tmp_path):
    source, text = open_model(folder), checkpoints.random_text(4000, seed=4)
    tokens = windows(source.tokenizer.encode(text), 96, 8)
    model = quantize_to_folder(source, tmp_path / "q", GPTQ3, tokens).load()
    with refused("occurs in the calibration text", "allow_overlap"):
        jquant.perplexity(model, text, context=96, windows=2)
    assert jquant.perplexity(model, text, context=96, windows=2, allow_overlap=True).value > 1
    other = checkpoints.random_text(4000, seed=5)
    assert jquant.perplexity(model, other, context=96, windows=2).value > 1
    hashes = tmp_path / "q" / "calibration.safetensors"
    data = bytearray(hashes.read_bytes())
    data[-1] ^= 1
    hashes.write_bytes(data)
    with refused("calibration.safetensors", "checksum"):
        load_model(tmp_path / "q")
