"""Quantizing from disk to disk: the bytes of the loaded model's run, whatever happens to the process."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import checkpoints
import jax
import numpy as np
import pytest
from checkpoints import refused
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
    Int,
    LlamaCpp,
    LossSearch,
    Method,
    Search,
    Tuning,
    double_quantized,
)
from jquant.evaluation.perplexity import score, score_from_disk
from jquant.io.checkpoint import block_folder, read_item
from jquant.io.load import LanguageModel, QuantizedFile, load_model, open_model
from jquant.methods import method
from jquant.pipeline import quantize_decoder
from jquant.sharding import MODEL, Devices
from jquant.streaming import quantize_stream, quantize_to_folder

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
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", METHODS)
def test_the_checkpoint_holds_what_quantizing_the_loaded_model_gives(model, folder, tmp_path, name):
    done = []
    written = quantize_to_folder(
        open_model(folder),
        tmp_path / "q",
        METHODS[name],
        TOKENS,
        batch=4,
        progress=lambda *told, **_: done.append(told),
    )
    expected, report = quantize_decoder(model.decoder, METHODS[name], TOKENS, batch=4)
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


def test_a_checkpoint_is_as_small_as_its_format_says(tmp_path):
    """4 bits, and a group of 128 with a scale of 16 bits and a zero of 4: 4.16 bits a weight, within 2 %."""
    made = checkpoints.llama(hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8)
    folder = checkpoints.save(tmp_path / "float", made)
    quantize_to_folder(open_model(folder), tmp_path / "q", method("rtn", group=128))
    weights = 2 * (2 * 512 * 512 + 2 * 512 * 64 * made.config.num_key_value_heads + 3 * 512 * 1024)
    size = sum(len(content) for name, content in files(tmp_path / "q").items() if name.startswith("blocks"))
    assert size == pytest.approx(weights * 4.16 / 8, rel=0.02)


def test_perplexity_from_disk_is_that_of_the_loaded_model(model, folder, tmp_path):
    quantize_to_folder(open_model(folder), tmp_path / "q", GPTQ3, TOKENS, batch=4)
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
        how = {"batch": 4, "inputs": inputs}
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
        how = {"batch": 4, "devices": devices}
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
    with refused(str(target), "methods: Method(format=Int(bits=3", "bits=4", "28 weights"):
        quantize_to_folder(open_model(folder), target, replace(GPTQ3, format=Int(4, 32)), TOKENS)
    with refused(str(target), "calibration"):
        quantize_to_folder(open_model(folder), target, GPTQ3, TOKENS[:8])
    with refused(str(target), "inputs: quantized, now float"):
        quantize_to_folder(open_model(folder), target, GPTQ3, TOKENS, inputs="float")
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
    expected, _ = quantize_decoder(model.decoder, GPTQ3, TOKENS, batch=4)
    devices = Devices(2, 2)
    written = quantize_to_folder(open_model(folder), tmp_path / "q", GPTQ3, TOKENS, batch=4, devices=devices)
    loaded = written.load().decoder
    assert all(map(np.array_equal, states(loaded), states(expected)))
    columns = Devices(1, 8)

    def place(name: str, of: jax.ShapeDtypeStruct) -> NamedSharding:
        return NamedSharding(columns.mesh, P(None, MODEL) if name.endswith("codes") else P())

    params = read_item(block_folder(tmp_path / "q", 1), place)
    codes = params["mlp.up.kernel"].codes
    assert codes.sharding.spec == P(None, MODEL)
    assert np.array_equal(codes, next(islice(written.blocks(), 1, None)).mlp.up.kernel.get_value().codes)
    for stop in (1, 3):
        steps = quantize_stream(open_model(folder), tmp_path / str(stop), GPTQ3, TOKENS, batch=4, devices=devices)
        assert [next(steps) for _ in range(stop)] == list(range(stop))
        steps.close()
        quantize_to_folder(open_model(folder), tmp_path / str(stop), GPTQ3, TOKENS, batch=4, devices=devices)
        assert files(tmp_path / str(stop)) == files(tmp_path / "q")


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
        ({"tokens": TOKENS, "held_out": 16}, "held_out=16 of 16"),
        ({"tokens": TOKENS, "passes": 0}, "passes takes a whole number from 1, not 0"),
        ({"tokens": TOKENS, "devices": Devices(3)}, "16 windows"),
        ({"tokens": TOKENS, "memory_gb": -1}, "memory_gb"),
    ):
        with refused(part):
            quantize_to_folder(open_model(folder), tmp_path / "q", GPTQ3, **how)
    assert not (tmp_path / "q").exists()


def test_damage_is_found_and_named_and_mended_by_the_same_command(folder, tmp_path):
    target = tmp_path / "q"
    quantize_to_folder(open_model(folder), target, GPTQ3, TOKENS, batch=4)
    whole = files(target)
    codes = max((target / "blocks" / "00001" / "mlp.up.kernel.codes").iterdir(), key=lambda path: path.stat().st_size)
    flipped = bytearray(codes.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    for broken in (bytes(flipped), codes.read_bytes()[:-3]):
        codes.write_bytes(broken)
        with refused(str(codes), "delete", "00001"):
            load_model(target)
        with refused(str(codes)):
            quantize_to_folder(open_model(folder), target, GPTQ3, TOKENS, batch=4)
    shutil.rmtree(target / "blocks" / "00001")
    with refused("00001"):
        load_model(target)
    quantize_to_folder(open_model(folder), target, GPTQ3, TOKENS, batch=4)
    assert files(target) == whole
    codes.unlink()
    with refused(str(codes)):
        load_model(target)
    (target / "manifest.json").write_text("{")
    with refused("manifest.json", "damaged"):
        load_model(target)


def test_a_disk_that_fills_up_ends_in_one_sentence_and_keeps_finished_blocks(folder, tmp_path):
    """A limit on the size of files stands for the disk: the operating system refuses the write in the same way."""
    script = (
        "import resource, signal, sys, numpy as np\n"
        "from pathlib import Path\n"
        "import jquant, jquant.streaming as s\n"
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


def command(folder: Path, calibration: Path, output: Path, *more: str) -> list[str]:
    settings = [f"model.path={folder}", f"output={output}", f"calibration.data={calibration}", *more]
    shape = ["group=32", "calibration.samples=16", "calibration.context=32"]
    return [sys.executable, "-m", "experiments.quantize", "model=local", "method=gptq", *shape, *settings]


WORKER = """
import sys, time
from pathlib import Path
import jax, numpy as np
import jquant
from jquant.io.hub import cache_dir
from jquant.methods import method
from jquant.sharding import MODEL, Devices
from jquant.streaming import quantize_to_folder
jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
tokens = np.random.default_rng(0).integers(0, 320, (10, 24), np.int32)
print("ready", flush=True)
sys.stdin.readline()
begin = time.monotonic()
quantize_to_folder(jquant.open_model(sys.argv[1]), Path(sys.argv[2]), method("gptq", group=32), tokens)
print(time.monotonic() - begin, flush=True)
"""


def test_a_process_killed_ten_times_at_random_moments_leaves_the_bytes_of_one_that_was_not(folder, tmp_path):
    """From when it begins to work, so that few moments fall into its imports."""

    def begun(target: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, folder, target],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.flush()
        return process

    for target in ("cold", "whole"):  # the second finds its programs compiled
        seconds = float(begun(tmp_path / target).communicate()[0])
    rng, killed, found = np.random.default_rng(0), 0, []
    for _ in range(10):
        process = begun(tmp_path / "killed")
        time.sleep(rng.uniform(0, 1.5) * seconds)
        killed += process.poll() is None
        process.kill()
        process.communicate()
        found.append(len(list((tmp_path / "killed").glob("blocks/0*"))))
        if found[-1] == 4:
            shutil.rmtree(tmp_path / "killed")  # it was too slow for this moment: another beginning
    quantize = begun(tmp_path / "killed").communicate()
    assert float(quantize[0]) > 0
    assert killed >= 5, found
    assert files(tmp_path / "killed") == files(tmp_path / "whole") == files(tmp_path / "cold")


def test_the_commands_quantize_and_evaluate_from_disk_and_bad_input_ends_in_one_sentence(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(checkpoints.random_text(4000, seed=4))
    done = subprocess.run(command(folder, text, tmp_path / "q", "method=rtn"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    evaluate = [sys.executable, "-m", "experiments.evaluate", "model=local", f"model.path={tmp_path / 'q'}"]
    evaluate += [f"evaluation.data={text}", "evaluation.windows=3", "evaluation.context=32"]
    done = subprocess.run(evaluate, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    loaded = load_model(tmp_path / "q")
    expected = jquant.perplexity(loaded, text.read_text(), context=32, windows=3)
    assert told["perplexity"] == pytest.approx(expected.value, rel=1e-5)
    assert told["scored_tokens"] == expected.scored_tokens
    for more, part in (
        (["method=gptqq"], "gptqq"),
        (["method=gptq_tuned"], "target='model'"),
        ([f"model.path={tmp_path / 'q'}", f"output={tmp_path / 'r'}"], "quantized already"),
        (["method=rtn", "bits=3"], "holds another run"),
        (["mesh.data=2"], "takes 2 devices; there are 1"),
    ):
        failed = subprocess.run(command(folder, text, tmp_path / "q", *more), cwd=ROOT, capture_output=True, text=True)
        assert failed.returncode == 2, failed.stderr
        assert failed.stderr.startswith("error: ")
        assert part in failed.stderr
        assert len(failed.stderr.splitlines()) == 1
    assert not (tmp_path / "r").exists()
