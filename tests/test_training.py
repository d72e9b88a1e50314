"""The training loop: resuming after a kill, the journal's files, accumulation, schedules, orders, refusals."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import refused
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline import leaves, same_bytes

from jquant import SEQ, CacheFormat, Int, Journal, Options, Stored, Tuning, with_cache
from jquant.io.checkpoint import checksum, write_sealed
from jquant.io.load import load_model
from jquant.learning import loop
from jquant.learning import teacher as teaching
from jquant.learning.losses import model_loss
from jquant.learning.objectives import top_k
from jquant.learning.teacher import batches_of
from jquant.learning.tuning import begun, split, tune
from jquant.methods import method
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Decoder
from jquant.parallel.mesh import Devices
from jquant.pipeline.in_memory import quantize_decoder
from jquant.qtensor import QTensor

TOKENS = np.random.default_rng(5).integers(0, checkpoints.VOCAB, (6, 32), np.int32)
STAGE = Tuning(7, 2, 3e-3, weight_rate=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    small = checkpoints.llama(initializer_range=0.08, hidden_size=32, intermediate_size=64, num_attention_heads=2)
    return checkpoints.save(tmp_path_factory.mktemp("tiny"), small)


@pytest.fixture(scope="module")
def decoder(folder):
    return load_model(folder).decoder


@pytest.fixture(scope="module")
def quantized(decoder):
    return quantize_decoder(decoder, method("rtn", 2, 16))[0]


# ---- resuming -------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def figures(folder: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in metrics(folder)]


@pytest.fixture(scope="module")
def whole(decoder, quantized, tmp_path_factory) -> tuple[Decoder, list[dict]]:
    """What a training gives that nothing ends, with a journal and without, and its metrics."""
    place = tmp_path_factory.mktemp("whole")
    trained = tune(quantized, decoder, TOKENS, STAGE, journal=Journal(place, every=2), progress=False)
    assert same_bytes(leaves(trained), leaves(tune(quantized, decoder, TOKENS, STAGE, progress=False)))
    return trained, figures(place)


@pytest.mark.parametrize("at", [1, 2, 3, 6])
def test_a_training_that_ended_early_goes_on_to_the_same_bytes_and_metrics(decoder, quantized, whole, tmp_path, at):
    def end_early(stage: str, done: int, total: int, /, **_: float) -> None:
        if done == at:
            raise Killed

    journal = Journal(tmp_path / "parts", every=2)
    with pytest.raises(Killed):
        tune(quantized, decoder, TOKENS, STAGE, journal=journal, progress=end_early)
    assert [line["step"] for line in metrics(tmp_path / "parts")] == list(range(1, at + 1))
    calls = []
    resumed = tune(
        quantized, decoder, TOKENS, STAGE, journal=journal, progress=lambda *call, **_: calls.append(call[1])
    )
    assert calls == list(range(at // 2 * 2 + 1, 8))
    assert same_bytes(leaves(resumed), leaves(whole[0]))
    assert figures(tmp_path / "parts") == whole[1]
    assert [path.name for path in (tmp_path / "parts/state").iterdir()] == ["7"]


def test_a_finished_training_is_read_not_repeated(decoder, quantized, tmp_path):
    first, again = (
        tune(quantized, decoder, TOKENS, STAGE, journal=Journal(tmp_path), progress=False) for _ in range(2)
    )
    assert same_bytes(leaves(first), leaves(again))
    assert len(metrics(tmp_path)) == 7


LONG = replace(STAGE, steps=60)
SCRIPT = """
import resource, sys, time, numpy as np
from jquant import Journal, Tuning, method
from jquant.io.load import load_model
from jquant.learning.losses import model_loss
from jquant.learning.tuning import begun, split, tune
from jquant.parallel.mesh import Devices
from jquant.pipeline.in_memory import quantize_decoder
from jquant.qtensor import QTensor
decoder = load_model(sys.argv[1]).decoder
tokens = np.load(sys.argv[2])
quantized = quantize_decoder(decoder, method("rtn", 2, 16))[0]
def show(stage, done, total, **figures):
    print(done, flush=True)
    time.sleep(0.1 * (done > 12))  # else it might end before it is killed
    if done == int(sys.argv[4]):  # from now on no file may grow beyond this
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
stage = Tuning(60, 2, 3e-3, weight_rate=0.01)
tune(quantized, decoder, tokens, stage, journal=Journal(sys.argv[3], every=5), progress=show)
"""


@pytest.fixture(scope="module")
def unbroken(decoder, quantized) -> Decoder:
    return tune(quantized, decoder, TOKENS, LONG, progress=False)


def test_a_killed_process_loses_nothing_but_the_steps_after_its_checkpoint(
    folder, decoder, quantized, unbroken, tmp_path
):
    np.save(tmp_path / "tokens.npy", TOKENS)
    place = tmp_path / "run"
    command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "tokens.npy"), str(place), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) >= 12:
                os.kill(process.pid, signal.SIGKILL)
                break
    kept = max(int(path.name) for path in (place / "state").iterdir() if path.name.isdigit())
    assert 10 <= kept < 60
    resumed = tune(quantized, decoder, TOKENS, LONG, journal=Journal(place, every=100), progress=False)
    assert [line["step"] for line in metrics(place)] == list(range(1, 61))
    assert same_bytes(leaves(resumed), leaves(unbroken))


def test_a_full_disk_ends_in_one_sentence_and_keeps_the_checkpoint_before(
    folder, decoder, quantized, unbroken, tmp_path
):
    np.save(tmp_path / "tokens.npy", TOKENS)
    place = tmp_path / "run"
    command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "tokens.npy"), str(place), "12"]
    process = subprocess.run(command, capture_output=True, text=True)
    last = process.stderr.strip().splitlines()[-1]
    assert process.returncode == 1
    assert re.search("InputError: .*state/15 can't be written .* The checkpoint of step 10 is kept.", last)
    resumed = tune(quantized, decoder, TOKENS, LONG, journal=Journal(place, every=100), progress=False)
    assert same_bytes(leaves(resumed), leaves(unbroken))


def test_a_journal_of_another_training_is_refused_with_what_differs(decoder, quantized, tmp_path):
    tune(quantized, decoder, TOKENS, STAGE, journal=Journal(tmp_path), progress=False)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    rounded = CacheFormat(keys=Stored(Int(8, "channel", True)))
    for changed, said in (
        ({"tuning": replace(STAGE, rate=1e-3)}, "tuning.rate 0.003, now 0.001"),
        ({"tokens": TOKENS[:4]}, "tokens"),
        ({"student": with_cache(quantized, rounded)}, "quantized"),
        ({"teacher": with_cache(decoder, rounded)}, "float"),
    ):
        given = {"tuning": STAGE, "tokens": TOKENS, "student": quantized, "teacher": decoder} | changed
        parts = (given["student"], given["teacher"], given["tokens"], given["tuning"])
        with refused("another training", said):
            tune(*parts, journal=Journal(tmp_path), progress=False)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with refused("thesis.txt", "run.json"):
        tune(quantized, decoder, TOKENS, STAGE, journal=Journal(tmp_path / "other"), progress=False)


def test_evaluations_stand_in_the_metrics(decoder, quantized, tmp_path):
    seen = []

    def evaluate(module) -> dict[str, float]:
        seen.append(leaves(module))
        return {"kl": float(len(seen))}

    journal = Journal(tmp_path, evaluate=evaluate, evaluate_every=3)
    final = tune(quantized, decoder, TOKENS, STAGE, journal=journal, progress=False)
    assert [(line["step"], line["kl"]) for line in metrics(tmp_path) if "kl" in line] == [(3, 1), (6, 2), (7, 3)]
    assert same_bytes(seen[-1], leaves(final))
    assert not same_bytes(seen[0], seen[1])


def test_a_damaged_checkpoint_is_refused_by_its_file(decoder, quantized, tmp_path):
    tune(quantized, decoder, TOKENS, STAGE, journal=Journal(tmp_path), progress=False)
    largest = max((tmp_path / "state").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    largest.write_bytes(largest.read_bytes()[:-1] + b"x")
    with refused(str(tmp_path / "state/7"), "checksum"):
        tune(quantized, decoder, TOKENS, STAGE, journal=Journal(tmp_path), progress=False)


@pytest.mark.parametrize(
    "line", ["[]", '{"step": null}', '{"step": 1}', "1e999", "[" * 9999, '{"step": 7, "seconds": "x"}']
)
def test_lines_of_metrics_that_are_none_of_ours_are_dropped_or_count_no_seconds(decoder, quantized, tmp_path, line):
    tune(quantized, decoder, TOKENS, STAGE, journal=Journal(tmp_path), progress=False)
    before = leaves(tune(quantized, decoder, TOKENS, STAGE, journal=Journal(tmp_path), progress=False))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    assert same_bytes(
        before, leaves(tune(quantized, decoder, TOKENS, STAGE, journal=Journal(tmp_path), progress=False))
    )


@pytest.mark.parametrize("counts", [{}, [], {"leaf_99999": 1}, "x", None])
def test_a_checkpoint_with_other_counts_is_refused(decoder, quantized, tmp_path, counts):
    tune(quantized, decoder, TOKENS, STAGE, journal=Journal(tmp_path), progress=False)
    [path] = tmp_path.glob("state/*/item.json")
    write_sealed(
        path,
        {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"} | {"counts": counts},
    )
    with refused("item.json", "counts"):
        tune(quantized, decoder, TOKENS, STAGE, journal=Journal(tmp_path), progress=False)


@pytest.mark.parametrize("part", [".zarray", "its values"])
def test_arrays_that_would_take_more_memory_than_their_files_are_refused(decoder, quantized, tmp_path, part):
    """A piece of 4 GB made tensorstore abort the process; checksums are forged."""
    tune(quantized, decoder, TOKENS, STAGE, journal=Journal(tmp_path), progress=False)
    [item] = tmp_path.glob("state/*/item.json")
    array = sorted(item.parent.glob("*/.zarray"))[0].parent
    part = part if part == ".zarray" else next(path.name for path in array.glob("[!.]*"))
    if part == ".zarray":
        facts = json.loads((array / part).read_text())
        (array / part).write_text(json.dumps(facts | {"chunks": [*facts["chunks"][:-1], 1_000_000_000]}))
    else:
        (array / part).write_bytes(b"")
    content = json.loads(item.read_text())
    del content["sha256"]
    content["files"] |= {f"{array.name}/{part}": checksum(array / part)}
    write_sealed(item, content)
    with refused(array.name, "pieces" if part == ".zarray" else "too few"):
        tune(quantized, decoder, TOKENS, STAGE, journal=Journal(tmp_path), progress=False)


def test_a_training_that_diverges_ends_in_a_sentence_and_keeps_its_checkpoint(decoder, quantized, tmp_path):
    wild = replace(STAGE, rate=1e4, schedule="constant")
    with refused("Tuning of the model, step 3 of 7", "lower rate", str(tmp_path)):
        tune(quantized, decoder, TOKENS, wild, journal=Journal(tmp_path, every=1), progress=False)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["2"]


def test_one_compilation_serves_all_rates_schedules_and_orders(decoder, quantized):
    def compiled() -> int:
        before = loop.step._cache_size()
        for stage in stages:
            tune(quantized, decoder, TOKENS, stage, progress=False)
        return loop.step._cache_size() - before

    first = replace(STAGE, b2=0.98)  # a program that no other test has compiled
    stages = [first]
    assert compiled() == 1
    others = ({"rate": 1e-3}, {"weight_rate": 2e-3, "seed": 1}, {"schedule": "linear", "warmup": 2, "steps": 4})
    stages = [replace(first, **other) for other in others]
    assert compiled() == 0
    stages = [replace(first, weight_rate=0.0)]
    assert compiled() == 1


def test_every_parameter_moves_by_its_own_rate_and_the_schedules_factor(decoder, quantized):
    """Adam's first step is as large as the rate, whatever the gradient is."""
    stage = Tuning(10, 2, 3e-3, weight_rate=2e-3, norm_rate=1e-3, begin="weights", warmup=4, compute="float32")
    start, student = begun(split(quantized), stage, decoder)
    before = jax.tree.map(np.asarray, start())
    state = loop.State(start(), loop.optimizer(stage).init(start()))
    program, rates = loop.Program.of(model_loss, stage), loop.rates_of(stage, 1)
    state, _, finite = loop.step(state, (student, decoder), jnp.asarray(TOKENS[:2]), rates, program)
    assert finite
    for path, each in state.learned.items():
        for name, leaf in each.items():
            rate = {"weight": 2e-3, "norm": 1e-3}.get(name, 3e-3) / 2  # the second of four steps of warming up
            moved = np.abs(np.asarray(leaf) - before[path][name])
            if name == "shift" and not moved.any():
                continue  # no weight of this matrix lies beyond its grid
            assert np.median(moved[moved > 0]) == pytest.approx(rate, rel=0.02), (path, name)


# ---- meshes ---------------------------------------------------------------------------------------------------------

WIDE = Tuning(20, 8, 3e-3, weight_rate=0.01, norm_rate=1e-3, compute="float32", text=0.3)


@pytest.fixture(scope="module")
def on_one(decoder, quantized) -> list[float]:
    return losses_of(decoder, quantized, None)


def losses_of(decoder, quantized, devices) -> list[float]:
    losses = []
    tune(quantized, decoder, TOKENS, WIDE, devices=devices, progress=lambda *_, loss, **__: losses.append(loss))
    return losses


@pytest.mark.parametrize("mesh", [(8, 1), (4, 2), (1, 8)])
def test_a_mesh_takes_the_same_steps(decoder, quantized, on_one, mesh):
    assert len(on_one) == 20
    assert on_one[-1] < on_one[0]
    np.testing.assert_allclose(losses_of(decoder, quantized, Devices(*mesh)), on_one, rtol=1e-5)


def wide_decoder(layers: int) -> Decoder:
    config = DecoderConfig(
        vocab_size=checkpoints.VOCAB, hidden=64, ffn=128, layers=layers, heads=4, kv_heads=2, head_dim=16,
        norm_eps=1e-5, rope_base=1e4, rope_divisors=None, tied=True, context_length=64,
    )  # fmt: skip
    return Decoder(config, nnx.Rngs(0))


def test_parameters_moments_and_work_are_split_and_collectives_do_not_grow_with_depth():
    """An eighth of the state lies on each device; each computes about an eighth of the products."""
    devices, collectives = Devices(4, 2), {}
    for layers in (4, 8):
        small = wide_decoder(layers)
        quantized, _ = quantize_decoder(small, method("rtn", 2, 16))
        start, student = begun(split(quantized), WIDE, small)
        learned = start()
        compiled = {}
        for mesh in (None, devices):
            cut = mesh.parameters if mesh else (lambda tree: tree)
            state = cut(loop.State(learned, loop.optimizer(WIDE).init(learned)))
            batch = mesh.place(TOKENS[[0, 1, 2, 3, 4, 5, 0, 1]], "data") if mesh else TOKENS[[0, 1, 2, 3, 4, 5, 0, 1]]
            program = loop.Program.of(model_loss, WIDE, mesh)
            compiled[mesh] = loop.step.lower(
                state, cut((student, small)), batch, loop.rates_of(WIDE, 0), program
            ).compile()
        sizes = [program.memory_analysis().argument_size_in_bytes for program in compiled.values()]
        assert sizes[1] < sizes[0] / 7
        flops = [program.cost_analysis()["flops"] for program in compiled.values()]
        assert flops[1] < flops[0] / 5
        found = re.findall(
            r"(all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(", compiled[devices].as_text()
        )
        collectives[layers] = Counter(found)
    assert collectives[4] == collectives[8]
    assert collectives[4]["all-gather"]


def test_windows_that_do_not_divide_over_the_mesh_are_refused(decoder, quantized):
    with refused("windows / accumulate = 3", "data=4"):
        tune(quantized, decoder, TOKENS, replace(STAGE, windows=3), devices=Devices(4, 2))
    plan = replace(method("rtn", 2, 16), tuning=(replace(STAGE, windows=3),))
    with refused("windows / accumulate = 3", "data=4"):
        quantize_decoder(decoder, plan, TOKENS, Options(devices=Devices(4, 2)))


# ---- the step -------------------------------------------------------------------------------------------------------


def test_every_window_comes_once_an_epoch_in_another_order():
    stage = Tuning(windows=4, seed=3)
    steps = [loop.windows_of(step, 10, stage) for step in range(5)]
    epochs = np.concatenate(steps).reshape(2, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert (epochs[0] != epochs[1]).any()
    assert (np.concatenate(steps) == np.concatenate([loop.windows_of(s, 10, stage) for s in range(5)])).all()
    assert (steps[0] != loop.windows_of(0, 10, replace(stage, seed=4))).any()


def test_accumulated_gradients_are_those_of_the_whole_batch(decoder, quantized):
    one, two = (
        tune(quantized, decoder, TOKENS, replace(STAGE, windows=4, accumulate=parts, compute="float32", steps=3))
        for parts in (1, 2)
    )
    for (path, a), b in zip(leaves(one).items(), leaves(two).values(), strict=True):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            assert np.mean(np.abs(x - y) > 1e-3 * np.abs(x).max()) < 0.01, path


@pytest.mark.parametrize("optimizer", ["adam", "lion", "adafactor"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_every_optimizer_and_schedule_lowers_the_loss(decoder, quantized, optimizer, schedule):
    rate = 1e-2
    stage = Tuning(30, 6, rate, weight_rate=rate, optimizer=optimizer, schedule=schedule, warmup=2, clip=10.0)
    losses = []
    tune(quantized, decoder, TOKENS, stage, progress=lambda *_, loss, **__: losses.append(loss))
    assert losses[-1] < 0.97 * losses[0]


def oracle_loss(student, teacher, text: float, reverse: float | str, top: int | None = None) -> float:
    """The loss in float64 from the logits of both, as the papers write it; of the `top` likeliest and all others."""
    log = lambda logits: logits - np.log(np.exp(logits).sum(-1, keepdims=True))  # noqa: E731
    log_q, log_p = (log(np.asarray(model(jnp.asarray(TOKENS)), np.float64))[:, :-1] for model in (student, teacher))
    of_text = lambda values: np.take_along_axis(values, TOKENS[:, 1:, None], -1)  # noqa: E731
    share, learned = np.exp(of_text(log_p)).mean() if reverse == "confidence" else reverse, of_text(log_q).mean()
    if top:
        order = np.argsort(-log_p, -1)
        for values in (likeliest := [np.take_along_axis(log, order, -1) for log in (log_p, log_q)]):
            values[..., top] = np.log(np.exp(values[..., top:]).sum(-1))
        log_p, log_q = (values[..., : top + 1] for values in likeliest)
    forward, backward = (np.exp(log_p) * (log_p - log_q)).sum(-1), (np.exp(log_q) * (log_q - log_p)).sum(-1)
    return (1 - text) * ((1 - share) * forward + share * backward).mean() - text * learned


LOSSES = [
    (0.0, 0.0, None), (1.0, 0.0, None), (0.3, 0.0, None), (0.0, 1.0, None), (0.2, 0.5, None), (0.0, "confidence", None),
    (0.0, 0.0, 5), (0.3, 0.5, 1), (0.0, 0.0, checkpoints.VOCAB - 1),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reverse", "top"), LOSSES)
def test_losses_are_those_of_float64(decoder, quantized, tmp_path, monkeypatch, text, reverse, top):
    monkeypatch.setenv("JQUANT_CACHE", str(tmp_path))
    stage = replace(STAGE, text=text, reverse=reverse, compute="float32", top_k=top)
    start, student = begun(split(quantized), stage, decoder)
    teacher, batch_of = batches_of(decoder, TOKENS, stage, lambda *_: None)
    batch = jax.tree.map(jnp.asarray, batch_of(np.arange(len(TOKENS))))
    found = jax.jit(model_loss, static_argnums=3)(start(), (student, teacher), batch, stage)
    assert float(found) == pytest.approx(oracle_loss(quantized, decoder, text, reverse, top), rel=1e-5, abs=1e-7)


def test_a_teachers_likeliest_tokens_are_computed_once(decoder, quantized, tmp_path, monkeypatch):
    monkeypatch.setenv("JQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(teaching, "WINDOWS", 4)
    stage, calls = replace(STAGE, top_k=5), []
    first = tune(quantized, decoder, TOKENS, stage, progress=lambda *call, **_: calls.append(call))
    assert [call for call in calls if call[0] == "teach"] == [("teach", 4, 6), ("teach", 6, 6)]
    monkeypatch.setattr(teaching, "_predictions", lambda *_: pytest.fail("computed again"))
    again = tune(quantized, decoder, TOKENS, stage, progress=False)
    assert same_bytes(leaves(first), leaves(again))
    assert len(list((tmp_path / "teacher").rglob("*.safetensors"))) == 2
    with pytest.raises(pytest.fail.Exception, match="computed again"):  # other predictions of the same arrays
        tune(
            quantized,
            with_cache(decoder, CacheFormat(keys=Stored(Int(8, "channel", True)))),
            TOKENS,
            stage,
            progress=False,
        )
    exact = replace(stage, compute="float32", windows=4, steps=3)
    monkeypatch.undo()
    monkeypatch.setenv("JQUANT_CACHE", str(tmp_path))
    losses = []
    for parts, mesh in ((1, None), (2, None), (1, Devices(2, 2))):
        each = replace(exact, accumulate=parts)
        show = lambda stage, *_, loss=0.0, **__: losses.append(loss) if stage == "tune" else None  # noqa: E731
        tune(quantized, decoder, TOKENS, each, devices=mesh, progress=show)
    np.testing.assert_allclose(losses[3:6], losses[:3], rtol=1e-4)
    np.testing.assert_allclose(losses[6:], losses[:3], rtol=1e-4)
    with refused(f"top_k={checkpoints.VOCAB}", "tokens"):
        tune(quantized, decoder, TOKENS, replace(stage, top_k=checkpoints.VOCAB), progress=False)
    for wrong in ({"top_k": 0}, {"top_k": True}, {"top_k": 3, "reverse": "confidence"}):
        with refused("top_k"):
            replace(STAGE, **wrong)


# With and without padding, in blocks of 1 to 17.
SIZES = [(1, 1), (2, 2), (7, 3), (67, 16), (129, 128), (300, 1), (300, 75), (301, 3), (299, 17)]


# Of few sizes: each is a program of its own.
@settings(deadline=None, max_examples=50)
@given(st.sampled_from(SIZES), st.integers(0, 2**16))
def test_the_k_largest_are_those_of_a_sort(sizes, seed):
    n, k = sizes
    values = np.random.default_rng(seed).permutation(3 * n)[:n].astype(np.float32)
    found, at = top_k(jnp.stack([values, -values]), k)
    np.testing.assert_array_equal(found, [np.sort(values)[::-1][:k], np.sort(-values)[::-1][:k]])
    np.testing.assert_array_equal(np.take_along_axis(np.stack([values, -values]), np.asarray(at), -1), found)


@pytest.mark.parametrize("weight_rate", [0.0, 0.01])
def test_learned_levels_become_those_of_the_format(decoder, quantized, weight_rate, folder, tmp_path):
    student = quantize_decoder(decoder, replace(method("rtn", 2, 16), format=SEQ(2, 16)))[0]
    stage = Tuning(20, 6, 2e-3, weight_rate=weight_rate, level_rate=1e-2, compute="float32")
    without, trained = (
        tune(student, decoder, TOKENS, each, progress=False) for each in (replace(stage, level_rate=0.0), stage)
    )
    assert oracle_loss(trained, decoder, 0.0, 0.0) < oracle_loss(without, decoder, 0.0, 0.0)
    replace(load_model(folder), decoder=trained).save(tmp_path / "saved")
    assert same_bytes(leaves(load_model(tmp_path / "saved").decoder), leaves(trained))
    formats = {leaf.format for leaf in leaves(trained).values() if isinstance(leaf, QTensor)}
    assert len(formats) == 7
    assert all(sorted(format.levels) == list(format.levels) != list(SEQ(2, 16).levels) for format in formats)
    start, parts = begun(split(student), stage, decoder)
    # Levels move so far that some change places.
    moved = jax.tree.map(lambda leaf: leaf + 0.6 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), start())
    tokens = jnp.asarray(TOKENS)
    np.testing.assert_allclose(parts.module(moved)(tokens), parts.packed(moved)(tokens), rtol=1e-4, atol=1e-4)
    with refused("level_rate=0.01", "codebook"):
        tune(quantized, decoder, TOKENS, stage, progress=False)


def test_what_is_trained_is_what_is_deployed(decoder, quantized):
    """The fake-quantized decoder's logits are the packed one's, at the start and after training."""
    start, student = begun(split(quantized), STAGE, decoder)
    moved = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), start())
    for learned in (start(), moved):
        ours, packed = student.module(learned), student.packed(learned)
        tokens = jnp.asarray(TOKENS)
        np.testing.assert_allclose(ours(tokens), packed(tokens), rtol=1e-4, atol=1e-4)
    changed = [
        np.mean(np.asarray(a.codes) != np.asarray(b.codes))
        for a, b in zip(*(filter(is_quantized, leaves(each).values()) for each in (quantized, packed)), strict=True)
    ]
    assert min(changed) > 0.01


def is_quantized(leaf) -> bool:
    return isinstance(leaf, QTensor)


def test_schedules_rise_and_fall():
    factors = {
        name: [float(loop.schedule(Tuning(10, schedule=name, warmup=2))(step)) for step in range(10)]
        for name in ("cosine", "linear", "constant")
    }
    for name, values in factors.items():
        assert values[:3] == pytest.approx([0.5, 1, 1]), name
    np.testing.assert_allclose(factors["linear"][2:], 1 - np.arange(8) / 8, rtol=1e-6)
    np.testing.assert_allclose(factors["cosine"][2:], (1 + np.cos(np.pi * np.arange(8) / 8)) / 2, rtol=1e-5)
    assert factors["constant"][2:] == [1] * 8


def test_norms_are_learned_if_asked(decoder, quantized):
    plain, normed = (tune(quantized, decoder, TOKENS, replace(STAGE, norm_rate=rate)) for rate in (0.0, 1e-3))
    for path, leaf in leaves(decoder).items():
        if "norm" in path:
            assert same_bytes(leaves(plain)[path], leaf)
            assert not same_bytes(leaves(normed)[path], leaf)


def test_metrics_go_to_tensorboard_if_asked(decoder, quantized, tmp_path):
    pytest.importorskip("tensorboardX")
    tune(quantized, decoder, TOKENS, STAGE, journal=Journal(tmp_path, tensorboard=True), progress=False)
    assert any((tmp_path / "tensorboard").iterdir())
