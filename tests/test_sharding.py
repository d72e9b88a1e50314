"""Several devices give what one gives: eight virtual ones, and two real processes."""

import re
from dataclasses import replace

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import refused
from jax.sharding import PartitionSpec as P
from problems import problem, rounded
from test_pipeline import leaves

from benchmarks import scaling
from jquant import AWQ, GGUF, GPTQ, NF4, Float, Int, LlamaCpp, Method, Search, Tuning
from jquant.calibration.options import Options
from jquant.evaluation.perplexity import score
from jquant.formats import unpack
from jquant.io.load import load_model
from jquant.methods import method
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Decoder
from jquant.parallel.mesh import MODEL, Devices
from jquant.pipeline.in_memory import quantize_decoder
from jquant.qtensor import QTensor

TOKENS = np.random.default_rng(0).integers(0, checkpoints.VOCAB, (16, 24), np.int32)
GPTQ3 = Method(Int(3, 32), Search("diagonal"), GPTQ())
METHODS = {
    "gptq": GPTQ3,
    "awq with gptq on nf4": Method(NF4(32), rounding=GPTQ(), transform=AWQ(4)),
    "k-quant": Method(GGUF["Q4_K"], LlamaCpp()),
    "propagated": replace(GPTQ3, error_propagation=0.5),
    "tuned": replace(GPTQ3, tuning=(Tuning(2, 2, target="block"),)),
}
COLLECTIVES = r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Decoder:
    model = checkpoints.llama(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_key_value_heads=4, initializer_range=0.1
    )
    return load_model(checkpoints.save(tmp_path_factory.mktemp("float"), model)).decoder


def codes(decoder: Decoder) -> dict[str, np.ndarray]:
    found = {path: leaf for path, leaf in leaves(decoder).items() if isinstance(leaf, QTensor)}
    at_home = {path: jax.device_put(q, jax.devices()[0]) for path, q in found.items()}
    return {path: np.asarray(unpack(q.codes, q.format.bits, q.in_features)) for path, q in at_home.items()}


def share_unlike(a: Decoder, b: Decoder) -> float:
    """Of the codes."""
    ours, theirs = codes(a), codes(b)
    assert ours.keys() == theirs.keys()
    assert ours
    return sum(int(np.sum(ours[path] != theirs[path])) for path in ours) / sum(one.size for one in ours.values())


CASES = [("gptq", (8, 1)), ("gptq", (2, 4)), ("k-quant", (4, 2))]
CASES += [pytest.param(name, (4, 2), marks=pytest.mark.slow) for name in METHODS if name not in ("gptq", "k-quant")]


@pytest.mark.parametrize(("name", "mesh"), CASES, ids=str)
def test_a_mesh_gives_the_codes_and_the_perplexity_of_one_device(decoder, name, mesh):
    expected, report = quantize_decoder(decoder, METHODS[name], TOKENS, Options(batch=2))
    sharded, its_report = quantize_decoder(decoder, METHODS[name], TOKENS, Options(batch=2, devices=Devices(*mesh)))
    kernels = [leaf for leaf in leaves(sharded).values() if isinstance(leaf, QTensor)]
    assert all(len(kernel.codes.sharding.device_set) == mesh[0] * mesh[1] for kernel in kernels)
    assert share_unlike(sharded, expected) == 0
    assert score(sharded, TOKENS).perplexity == pytest.approx(score(expected, TOKENS).perplexity, rel=1e-4)
    for key, info in report.items():
        np.testing.assert_allclose(its_report[key].error, info.error, rtol=1e-3)


@pytest.mark.parametrize("format", [Int(4, 32), Int(3, 32, symmetric=True), NF4(32)], ids=str)
def test_a_solve_over_columns_has_no_collective(format):
    """In the compiled program of each device; a sum over columns, as of the error it reports, would be one."""
    devices = Devices(1, 8)
    w, gram, _ = problem((64, 128))

    def solve(w, gram, reported: bool):
        q, info = rounded(GPTQ(), w, format, gram)
        return (q, info.error) if reported else q

    placed = devices.place(w, None, MODEL), devices.place(gram)
    solves = jax.jit(solve, static_argnums=2)
    assert not re.findall(COLLECTIVES, solves.lower(*placed, False).compile().as_text())
    assert re.findall(COLLECTIVES, solves.lower(*placed, True).compile().as_text())
    q = solves(*placed, False)
    assert q.codes.sharding.spec == P(None, MODEL)


def test_columns_are_split_in_whole_units_or_not_at_all():
    methods = {name: method("rtn", group=16) for name in ("even", "odd")}
    w = {"even": jnp.zeros((32, 64)), "odd": jnp.zeros((32, 72)), "float": jnp.zeros((32, 64))}
    with refused("odd", "72 columns", "model=4", "units of 8", "uneven=replicate"):
        Devices(1, 4).columns(w, methods)
    placed = Devices(1, 4, "replicate").columns(w, methods)
    assert {name: leaf.sharding.spec for name, leaf in placed.items()} == {
        "even": P(None, MODEL), "odd": P(), "float": P()
    }  # fmt: skip
    for format, split in (
        (Int(4, 16, symmetric=True), True),  # no zeros that share bytes
        (Float(4, 3, (16, 9)), True),
        (Float(4, 3, (16, 12)), False),
        (Float(4, 3, "tensor"), False),
    ):
        placed = Devices(1, 4, "replicate").columns({"odd": w["odd"]}, {"odd": Method(format)})
        assert placed["odd"].sharding.spec == (P(None, MODEL) if split else P())


def test_meshes_that_cannot_be_are_refused(decoder):
    with refused("data=4 × model=4", "16 devices", "there are 8"):
        Devices(4, 4)
    with refused("data=0"):
        Devices(0)
    with refused("16 windows", "data=3"):
        quantize_decoder(decoder, GPTQ3, TOKENS, Options(batch=2, devices=Devices(3)))
    with refused("attention.k.kernel", "64 columns", "model=3"):
        quantize_decoder(decoder, GPTQ3, TOKENS[:15], options=Options(batch=2, devices=Devices(1, 3)))


def test_the_scaling_benchmark_counts_what_the_compiled_programs_reduce():
    config = DecoderConfig(96, 64, 128, 2, 4, 2, 16, 1e-5, 1e4, None, False, 64)
    alone = scaling.count(config, Devices(1, 1), context=16, windows=8)
    assert (alone["collectives_observing"], alone["collectives_rounding"], alone["moved_gb"]) == (0, 0, 0)
    meshed = scaling.count(config, Devices(2, 4), context=16, windows=64)
    assert meshed["steps"] == 2
    # Inputs of q, of k and v, of o, of gate and up, of down; k and v count tokens by the attention they receive.
    grams = 4 * (4 * 64**2 + 128**2)
    assert alone["gram_gb"] == pytest.approx(grams / 1e9)
    # Every step a device gets its piece of them from the seven others, and in the end all pieces from them; beside Gram
    # matrices there are their weights and the errors.
    assert meshed["moved_gb"] == pytest.approx(3 * 7 / 8 * grams / 1e9, rel=0.02)
    assert meshed["moved_gb"] > 3 * 7 / 8 * grams / 1e9
    assert meshed["solve_tflop"] < alone["solve_tflop"]
