"""Memory on a tiny model: the formula of weights and cache is what the compiled program takes."""

import json

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run_here
from flax import nnx

from experiments.memory import packed, stored_bits
from jquant import Int, method
from jquant.evaluation.generation import LEAST_MEMORY, _step, empty_cache, unstack
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Decoder, outside_of


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    checkpoints.save(folder / "model", checkpoints.llama(hidden_size=64, intermediate_size=128))
    return folder


def run(place, *more):
    tiny = "{model_type:llama,vocab_size:97,hidden_size:64,intermediate_size:96,num_hidden_layers:3,"
    tiny += "num_attention_heads:4,num_key_value_heads:2,max_position_embeddings:64,rms_norm_eps:1e-5}"
    return run_here(
        "memory",
        *("model=local", f"model.path={place / 'model'}", f"results={place}", "methods=[fp32,rtn]"),
        *("group=32", "batches=[2]", "contexts=[32]", "examples.llama2_7b=null"),
        f"examples.llama2_70b={{method:rtn,batch:2,context:64,config:{tiny}}}",
        *more,
    )


@pytest.mark.parametrize("cache_bits", [pytest.param("null", marks=pytest.mark.slow), "4"])
def test_the_formula_of_weights_and_cache_is_what_the_program_takes(place, cache_bits):
    done = run(place, f"cache_bits={cache_bits}", f"name=of_{cache_bits}", "cache_group=16")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (place / f"of_{cache_bits}/memory.jsonl").read_text().splitlines()]
    assert len(rows) == 2 + 1
    for row in rows:
        formula, compiled = row["formula"], row["compiled"]
        assert formula["weights"] == pytest.approx(compiled["weights"], rel=0.01)  # codes pack by 8 rows
        assert formula["cache"] == pytest.approx(compiled["cache"], rel=0.01 if cache_bits == "null" else 0.3)
        assert 0.2 < formula["activations"] / compiled["activations"] < 2
        assert (row["resident"] is None) == (row["protocol"]["model"] == "llama2_70b")
    assert (place / f"of_{cache_bits}/memory.md").read_text().count("| RTN-4 |") == 2


def test_stored_bits_are_the_formats_of_the_papers():
    shape = (4096, 4096)
    assert stored_bits(Int(4, 64), shape) == 4 + (16 + 4) / 64
    assert stored_bits(Int(8, "channel", symmetric=True), shape) == 8 + 16 / 4096
    assert stored_bits(method("nf4").format, shape) == 4.5
    assert stored_bits(method("nf4_double").format, shape) == pytest.approx(4.127, abs=5e-4)  # QLoRA, §3


def test_a_prompt_does_not_dequantize_all_layers_at_once():
    """By default XLA's CPU scheduler does; in a program of 4 layers that takes 4 times one layer's weights."""
    config = DecoderConfig(64, 576, 1536, 4, 9, 3, 64, 1e-5, 1e4, None, True, 256)
    decoder = nnx.jit(lambda: Decoder(config, nnx.Rngs(0)))()
    decoder = packed(decoder, Int(4, 64))
    leaves, structure = jax.tree.flatten((outside_of(decoder), unstack(decoder)))
    arguments = (structure, leaves, jnp.zeros((1, 256), np.int32), empty_cache(decoder, 1, 256))
    lowered = jax.jit(_step, static_argnums=0, donate_argnums=3).lower(*arguments)
    temporary = lambda options: lowered.compile(compiler_options=options).memory_analysis().temp_size_in_bytes  # noqa: E731
    # XLA's default; the tests' own flags change it.
    default = temporary({"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_CONCURRENCY_OPTIMIZED"})
    least = temporary(LEAST_MEMORY)
    layer = 4 * 576 * (2 * (576 + 192) + 3 * 1536)
    assert least < layer < 3 * layer < default


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("methods=[gguf_q4_k_m]", "gguf_q4_k_m has a method for each weight; experiments.memory takes one for all."),
        ("contexts=[0]", "contexts is a list, each of which takes a whole number from 1, not [0]."),
        ("cache_bits=0", "cache_bits takes a whole number from 2, or null, not 0."),
        ("examples.llama2_70b.config.hidden_size=0", "examples.llama2_70b.config: hidden_size"),
    ],
)
def test_bad_settings_are_refused(place, setting, message):
    done = run(place, setting, "name=refused")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr
    assert not (place / "refused").exists()
