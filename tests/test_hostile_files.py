"""Files that are damaged, or made to do harm: each is read as it means to be, or refused in one sentence, at once."""

import json
import logging
import os
import shlex
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import checkpoints
import gguf
import jax
import numpy as np
import pytest
import torch
import transformers
from checkpoints import refused
from flax import nnx
from safetensors.numpy import load_file, save_file

from jquant.io.gguf import read_header, read_metadata
from jquant.io.kept import Kept
from jquant.io.load import load_model, open_model
from jquant.io.safetensors import SafetensorsCheckpoint
from jquant.io.tokenizer import tokenizer_from_folder, tokenizer_from_gguf
from jquant.models.config import config_from_gguf, config_from_hf
from jquant.models.decoder import Decoder, parameter_shapes
from jquant.models.params import flat_params

TOKENS = np.random.default_rng(0).integers(0, checkpoints.VOCAB, (1, 100), np.int32)
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
forward = jax.jit(lambda decoder, tokens: decoder(tokens))


@pytest.fixture(scope="module")
def small() -> torch.nn.Module:
    return checkpoints.llama(**SMALL)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, small) -> Path:
    return checkpoints.save(tmp_path_factory.mktemp("saved") / "folder", small)


@pytest.fixture
def folder(tmp_path, saved) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "folder"))


@pytest.fixture(scope="module")
def written(tmp_path_factory, small) -> Path:
    return checkpoints.write_gguf(tmp_path_factory.mktemp("written") / "x.gguf", small)


def edit(folder: Path, file: str = "config.json", drop: tuple[str, ...] = (), **changes) -> Path:
    content = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({key: value for key, value in content.items() if key not in drop}))
    return folder


def gguf_with(path: Path, small: torch.nn.Module, tensors=None, **fields) -> Path:
    """A GGUF file of the small model with further or other header fields; underscores for the first two dots."""
    kinds = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}

    def add(writer: gguf.GGUFWriter) -> None:
        for key, value in fields.items():
            writer.kv_data[0].pop(key, None)
            getattr(writer, kinds[type(value)])(key, value)

    return checkpoints.write_gguf(path, small, tensors, also=add)


# ---- nothing runs, nothing hangs ------------------------------------------------------------------------------------


def test_python_in_a_model_folder_does_not_run_whatever_is_answered(tmp_path, folder):
    """Without tokenizer.json transformers would ask on standard input whether to run the folder's own classes."""
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Words: pass\n")
    own = {"AutoTokenizer": ["own.Words", None], "AutoConfig": "own.Words"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Words", "auto_map": own}))
    edit(folder, auto_map=own)
    command = [sys.executable, "-c", f"from jquant.io.load import load_model; load_model({str(folder)!r})"]
    done = subprocess.run(
        ["bash", "-c", f"yes | {shlex.join(command)}"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=120,
    )
    assert "InputError" in done.stderr.splitlines()[-1]
    assert "tokenizer" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with refused(name, "plain file"):
        load_model(folder)


def test_a_pipe_in_the_place_of_a_gguf_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.gguf")
    with refused("x.gguf", "plain file"):
        load_model(tmp_path / "x.gguf")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
def test_json_nested_100000_deep_is_refused(folder, name):
    (folder / name).write_text("[" * 100_000)
    with refused(name, "nested"):
        load_model(folder)


def test_a_flipped_bit_in_an_array_length_is_refused_at_once(tmp_path, written):
    data = bytearray(written.read_bytes())
    key = b"tokenizer.ggml.token_type"
    at = data.index(key) + len(key) + 4 + 4  # kind, kind of its members
    (count,) = struct.unpack_from("<Q", data, at)
    assert count == checkpoints.VOCAB
    data[at + 5] ^= 1
    (tmp_path / "x.gguf").write_bytes(data)
    with refused("x.gguf", "no room"):
        load_model(tmp_path / "x.gguf")


@pytest.mark.parametrize("at", [8, 16])
def test_a_count_of_tensors_or_keys_beyond_the_file_is_refused_at_once(tmp_path, written, at):
    data = bytearray(written.read_bytes())
    data[at + 5] ^= 1
    (tmp_path / "x.gguf").write_bytes(data)
    with refused("x.gguf", "no room"):
        load_model(tmp_path / "x.gguf")


def test_arrays_nested_2000_deep_are_refused(tmp_path):
    key = b"general.deep"
    nested = struct.pack("<IQ", 9, 1) * 2000 + struct.pack("<IQB", 0, 1, 7)
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key + struct.pack("<I", 9)
    (tmp_path / "x.gguf").write_bytes(header + nested)
    with refused("x.gguf", "nested"):
        load_model(tmp_path / "x.gguf")


def test_a_head_of_a_billion_channels_is_refused_before_its_frequencies_are_computed(folder):
    with refused("head_dim", "1000000000"):
        load_model(edit(folder, head_dim=1_000_000_000, rope_parameters=checkpoints.LLAMA3_ROPE))


def test_a_sentencepiece_token_of_400000_characters_is_refused_at_once(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["a", "b" * 400_000])
    writer.add_token_scores([0.0, -1.0])
    writer.add_token_types([1, 1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with refused("x.gguf", "400,000 characters"):
        tokenizer_from_gguf(tmp_path / "x.gguf")


def test_an_expression_that_backtracks_for_ever_ends_in_a_sentence(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = tokenizer_from_folder(folder)
    assert len(tokenizer.encode("aaaa"))
    with refused("tokenizer", "retry-limit"):
        tokenizer.encode("a" * 40 + "!")


def test_two_tokens_of_one_id_are_refused(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    first, second = list(content["model"]["vocab"])[-2:]
    content["model"]["vocab"][first] = content["model"]["vocab"][second]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with refused("folder", "two tokens one id"):
        tokenizer_from_folder(folder)


def test_an_id_of_a_billion_is_refused(folder):
    """The library would walk through all ids up to it, and keep those without a token: 4 GB."""
    content = json.loads((folder / "tokenizer.json").read_text())
    last = list(content["model"]["vocab"])[-1]
    for index in (1_000_000_000, 100_000):  # the second is read, and beyond the model's rows
        content["model"]["vocab"][last] = index
        (folder / "tokenizer.json").write_text(json.dumps(content))
        if index < 1 << 20:
            assert tokenizer_from_folder(folder).backend.token_to_id(last) == index
        else:
            with refused("folder", "1,000,000,000"):
                tokenizer_from_folder(folder)


# ---- config.json ----------------------------------------------------------------------------------------------------

KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *(
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
        "rope_theta",
    ),
)
NUMBERS = [-1, 0, 10**9, 10**30, "8", [8], {}, 2.5, True, float("nan"), float("inf")]


@pytest.mark.parametrize("key", KEYS)
def test_a_field_of_another_type_or_size_is_named(saved, key):
    raw = json.loads((saved / "config.json").read_text())
    for value in [-1, "yes", 1, []] if key == "tie_word_embeddings" else NUMBERS:
        if key == "rms_norm_eps" and value == 0:
            continue
        if (key in ("rope_theta", "max_position_embeddings") and value == 10**9) or (key, value) == ("rope_theta", 2.5):
            continue  # no model has these, but one could
        drop = {"rope_parameters": None} if key == "rope_theta" else {}
        with refused("config.json", key):
            config_from_hf(raw | drop | {key: value}, "config.json")


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic'"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "'longrope'"),
        ({"rope_type": ["linear"]}, "rope_type"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 0}, "factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, "beta_fast"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 3}, "beta_slow"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 3}, "truncate"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}, "low_freq_factor"),
        ({"rope_type": "default", "rope_theta": -1}, "rope_theta"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
        ("linear", "rope_parameters"),
    ],
)
def test_rope_settings_that_are_not_known_are_named(saved, rope, named):
    raw = json.loads((saved / "config.json").read_text())
    with refused("config.json", named):
        config_from_hf(raw | {"rope_parameters": rope}, "config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [("quantization_config", {"bits": 4}), ("sliding_window", 64), ("attention_bias", "yes"), ("num_experts", 8)],
)
def test_a_key_that_would_change_the_model_is_refused_by_name(folder, key, value):
    with refused("config.json", key):
        load_model(edit(folder, **{key: value}))


def test_unknown_keys_are_listed_in_one_warning(folder, caplog):
    with caplog.at_level(logging.WARNING):
        open_model(edit(folder, mystery=1, another=2))
    [record] = [record for record in caplog.records if "mystery" in record.getMessage()]
    assert "another" in record.getMessage()
    assert "config.json" in record.getMessage()


def test_a_top_level_rope_theta_counts_where_rope_parameters_has_none(folder):
    edit(folder, rope_parameters={"rope_type": "default"}, rope_theta=777.0)
    assert open_model(folder).config.rope_base == 777.0
    theirs = transformers.LlamaConfig.from_pretrained(folder).rope_parameters["rope_theta"]
    assert theirs == 777.0


YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5},
        YARN,
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3},
        YARN | {"truncate": False, "mscale": 0.7, "mscale_all_dim": 1.1},
    ],
    ids=["linear", "yarn", "yarn-set", "yarn-deepseek"],
)
def test_scaled_rotary_positions_give_transformers_logits(tmp_path, rope):
    model = checkpoints.llama(rope_parameters=rope, num_hidden_layers=1, head_dim=32)
    loaded = load_model(checkpoints.save(tmp_path, model))
    expected = checkpoints.logits(model, TOKENS)
    assert checkpoints.relative(np.asarray(forward(loaded.decoder, TOKENS)), expected) <= 1e-4
    plain = checkpoints.llama(
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0}, num_hidden_layers=1, head_dim=32
    )
    assert checkpoints.relative(checkpoints.logits(plain, TOKENS), expected) > 1e-2  # the scaling is seen


# ---- tensors --------------------------------------------------------------------------------------------------------


def test_a_file_with_more_layers_than_its_config_is_refused(folder):
    with refused("would not be used", "layers.1.", "1 layers"):
        open_model(edit(folder, num_hidden_layers=1))


def test_a_tensor_that_would_not_be_used_is_named(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(
        weights | {"model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32)}, folder / "model.safetensors"
    )
    with refused("q_norm", "would not be used"):
        open_model(folder)


def test_biases_count_unless_they_are_zero(folder):
    weights, name = load_file(folder / "model.safetensors"), "model.layers.0.self_attn.q_proj.bias"
    save_file(weights | {name: np.zeros(32, np.float32)}, folder / "model.safetensors")
    open_model(folder)
    save_file(weights | {name: np.full(32, 0.1, np.float32)}, folder / "model.safetensors")
    with refused(name):
        open_model(folder)


def test_a_tied_model_with_another_head_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    with refused("lm_head.weight"):
        open_model(edit(folder, tie_word_embeddings=True))
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, folder / "model.safetensors")
    assert open_model(folder).config.tied


def test_shapes_are_compared_before_anything_is_allocated(folder):
    """A vocabulary of 16 million would be 2 GB here."""
    with refused("embed_tokens", "shape"):
        open_model(edit(folder, vocab_size=16_000_000))


def sharded(tmp_path: Path, small: torch.nn.Module) -> tuple[Path, dict]:
    folder = checkpoints.save(tmp_path / "sharded", small, max_shard_size="50KB")
    return folder, json.loads((folder / "model.safetensors.index.json").read_text())


def test_a_tensor_in_two_shards_is_refused(tmp_path, small):
    folder, index = sharded(tmp_path, small)
    first, second = sorted(set(index["weight_map"].values()))[:2]
    name = next(tensor for tensor, shard in index["weight_map"].items() if shard == first)
    save_file(load_file(folder / second) | {name: load_file(folder / first)[name] * 2}, folder / second)
    with refused(name, first, second):
        open_model(folder)


@pytest.mark.parametrize("fault", ["moved", "left out", "invented"])
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path, small, fault):
    folder, index = sharded(tmp_path, small)
    first, second = sorted(set(index["weight_map"].values()))[:2]
    name = next(tensor for tensor, shard in index["weight_map"].items() if shard == first)
    if fault == "moved":
        index["weight_map"][name] = second
    elif fault == "left out":
        del index["weight_map"][name]
    else:
        index["weight_map"][name := "model.layers.7.mlp.up_proj.weight"] = first
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused(name):
        open_model(folder)


@pytest.mark.parametrize("target", ["..", "x.safetensors", "/dev/zero", "../folder"])
def test_a_link_in_the_place_of_a_shard_leads_to_a_file_or_is_refused(tmp_path, small, target):
    """The hub's cache consists of links, so links are followed; what they lead to must be a plain file."""
    folder, index = sharded(tmp_path, small)
    first = index["weight_map"]["model.norm.weight"]
    (folder / first).rename(tmp_path / "blob")
    (folder / first).symlink_to(tmp_path / "blob")
    open_model(folder)
    (folder / "x.safetensors").symlink_to(target)
    moved = {name: "x.safetensors" if shard == first else shard for name, shard in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": moved}))
    with refused("x.safetensors"):
        open_model(folder)


@pytest.mark.parametrize("shard", ["../sharded/{}", "./{}", "up/sharded/{}", "/etc/passwd", "..", "~", "{}/"])
def test_a_shard_outside_the_folder_is_refused_even_where_there_is_one(tmp_path, small, shard):
    folder, index = sharded(tmp_path, small)
    (folder / "up").symlink_to("..")
    names = {name: shard.format(value) for name, value in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": names}))
    with refused("sharded"):
        open_model(folder)


@pytest.mark.parametrize("shard", ["\ud800.safetensors", "a\0b.safetensors", "", "."])
def test_a_shard_name_that_is_no_text_is_refused(tmp_path, small, shard):
    folder, index = sharded(tmp_path, small)
    index["weight_map"]["model.norm.weight"] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused("shard"):
        open_model(folder)


def test_a_value_beyond_the_dtype_is_refused_after_the_cast(folder):
    weights, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 5] = 70_000
    save_file(weights, folder / "model.safetensors")
    assert load_model(folder, dtype="bfloat16").config.layers == 2
    with refused(name, "70000", "float16"):
        load_model(folder, dtype="float16")


@pytest.mark.parametrize("dtype", ["int8", "float64", "complex64", "float", "nonsense"])
def test_a_dtype_that_weights_cannot_have_is_refused(folder, dtype):
    with refused("dtype", dtype, "bfloat16"):
        open_model(folder, dtype=dtype)


@pytest.mark.parametrize(("key", "value"), [("bos_token_id", 999), ("bos_token_id", -5), ("eos_token_id", [1, 320])])
def test_a_special_token_outside_the_vocabulary_is_refused(folder, key, value):
    (folder / "generation_config.json").unlink()
    with refused(key, "320 tokens"):
        open_model(edit(folder, **{key: value}))


@pytest.mark.parametrize("value", [1.5, "\ud800", ["x" * 5000, 1.5]])
def test_a_special_token_of_another_type_is_refused(folder, value):
    (folder / "generation_config.json").unlink()
    with refused("bos_token_id"):
        open_model(edit(folder, bos_token_id=value))


# Dtypes and shapes that NumPy does not have: (dtype, shape, bytes).
STRANGE = [
    ("F8_E4M3FNUZ", [4], 4),
    ("F4", [2, 2], 2),
    ("I64", [0, 2**62], 0),
    ("U8", [1] * 70, 1),
    ("F32", [0, 2**63], 0),
]


def test_a_dtype_of_two_lines_is_refused_in_one(folder):
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw.replace(b'"F32"', b'"\\n"', 1))
    with refused("model.safetensors", "not a whole"):
        open_model(folder)


@pytest.mark.parametrize(("dtype", "shape", "size"), STRANGE)
def test_a_tensor_that_numpy_has_no_array_for_is_named(folder, dtype, shape, size):
    """In place of a bias, which is read where no weight asks for it."""
    raw, name = (folder / "model.safetensors").read_bytes(), "model.layers.0.self_attn.q_proj.bias"
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :] + bytes(size))
    with refused(name):
        open_model(folder)


@pytest.mark.parametrize(("dtype", "shape"), [("F4", [16]), ("F8_E4M3FNUZ", [8]), ("U8", [1] * 70 + [8])])
def test_cached_arrays_that_numpy_has_no_array_for_are_computed_again(tmp_path, dtype, shape):
    made = {"a": np.arange(2, dtype=np.float32)}
    kept = Kept(tmp_path, {})
    kept.arrays(0, {"a": (2,)}, made.copy)
    header = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, 8]}}).encode()
    kept.path(0).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    np.testing.assert_array_equal(kept.arrays(0, {"a": (2,)}, made.copy)["a"], made["a"])


def test_layers_that_the_file_does_not_have_take_no_time(tmp_path):
    """Gemma's windows alternate, so each of its layers was traced: 256 took a minute."""
    folder = checkpoints.save(tmp_path / "folder", checkpoints.of_family("gemma2"))
    edit(folder, num_hidden_layers=1 << 12, layer_types=["sliding_attention", "full_attention"] * (1 << 11))
    begin = time.process_time()
    with refused("lacks the tensor"):
        open_model(folder)
    assert time.process_time() - begin < 20


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_shapes_from_one_layer_are_those_of_the_whole_decoder(tmp_path, family):
    folder = checkpoints.save(tmp_path / "folder", checkpoints.of_family(family))
    config = SafetensorsCheckpoint(folder).config
    params = flat_params(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))
    assert parameter_shapes(config) == {name: leaf.shape for name, leaf in params.items()}


# ---- GGUF -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scores", ["0.5"] * checkpoints.VOCAB),
        ("token_type", [1.0] * checkpoints.VOCAB),
        ("tokens", list(range(checkpoints.VOCAB))),
        ("bos_token_id", [-1] * checkpoints.VOCAB),
    ],
)
def test_arrays_of_another_type_are_named(tmp_path, small, name, value):
    key, kind = f"tokenizer.ggml.{name}", {"tokenizer.ggml.model": "llama"} if name == "scores" else {}
    with refused("x.gguf", key):
        tokenizer_from_gguf(gguf_with(tmp_path / "x.gguf", small, **kind, **{key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.dimension_count", 4),
        ("llama.attention.scale", 1.0),
        ("llama.attention.sliding_window", 64),
        ("llama.attention.value_length", 4),
        ("llama.expert_count", 8),
        ("llama.rope.scaling.type", "longrope"),
        ("llama.rope.scaling.attn_factor", 2.0),
        ("llama.logit_scale", 2.0),
        ("llama.final_logit_softcapping", 30.0),
        ("general.type", "adapter"),
        ("split.count", 4),
        ("llama.block_count", 1),
        ("llama.block_count", 2.0),
        ("llama.attention.head_count", [4, 4]),
        ("llama.rope.freq_base", -1.0),
        ("llama.attention.layer_norm_rms_epsilon", -1.0),
        ("general.alignment", 3),
    ],
)
def test_a_gguf_key_that_would_change_the_model_is_refused_by_name(tmp_path, small, key, value):
    with refused("x.gguf", "would not be used" if key == "llama.block_count" and value == 1 else key):
        open_model(gguf_with(tmp_path / "x.gguf", small, **{key: value}))


def test_a_negative_gguf_scaling_factor_is_refused(tmp_path, small):
    with refused("x.gguf", "llama.rope.scaling", "factor", "-1.0"):
        open_model(gguf_with(tmp_path / "x.gguf", small, **{"llama.rope.scaling.factor": -1.0}))


def test_neutral_gguf_keys_are_read_as_what_they_say(tmp_path, small):
    neutral = {"llama.rope.dimension_count": 8, "llama.attention.scale": 8**-0.5, "llama.expert_count": 0}
    assert open_model(gguf_with(tmp_path / "x.gguf", small, **neutral)).config.head_dim == 8


def test_unknown_gguf_keys_are_listed_in_one_warning(tmp_path, small, caplog):
    with caplog.at_level(logging.WARNING):
        open_model(gguf_with(tmp_path / "x.gguf", small, **{"llama.mystery": 1, "llama.attention.other": 2.0}))
    [record] = [record for record in caplog.records if "llama.mystery" in record.getMessage()]
    assert "llama.attention.other" in record.getMessage()


@pytest.mark.parametrize("kind", ["linear", "no type", "old name", "yarn"])
def test_scaled_positions_in_gguf_are_those_of_the_same_model_in_a_folder(tmp_path, kind):
    rope = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0} if kind != "yarn" else YARN
    model = checkpoints.llama(rope_parameters=rope, **SMALL)
    fields = {
        "linear": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        "no type": {"llama.rope.scaling.factor": 4.0},
        "old name": {"llama.rope.scale_linear": 4.0},
        "yarn": {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 32,
        },
    }[kind]
    file = open_model(gguf_with(tmp_path / "x.gguf", model, **fields))
    folder = open_model(checkpoints.save(tmp_path / "folder", model))
    assert file.config.rope_divisors == folder.config.rope_divisors is not None
    assert file.config.rope_magnitude == folder.config.rope_magnitude
    none = gguf_with(tmp_path / "none.gguf", model, **fields | {"llama.rope.scaling.type": "none"})
    assert open_model(none).config.rope_divisors is None


def test_rope_freqs_and_linear_scaling_multiply(tmp_path, small):
    tensors = checkpoints.gguf_tensors(small) | {"rope_freqs.weight": np.array([1, 2, 4, 8], np.float32)}
    path = gguf_with(tmp_path / "x.gguf", small, tensors, **{"llama.rope.scaling.factor": 2.0})
    assert open_model(path).config.rope_divisors == (2.0, 4.0, 8.0, 16.0)


def test_gguf_biases_count_unless_they_are_zero(tmp_path, small):
    tensors = checkpoints.gguf_tensors(small)
    open_model(gguf_with(tmp_path / "x.gguf", small, tensors | {"blk.0.attn_q.bias": np.zeros(32, np.float32)}))
    with refused("blk.0.attn_q.bias"):
        open_model(gguf_with(tmp_path / "x.gguf", small, tensors | {"blk.0.attn_q.bias": np.ones(32, np.float32)}))


def infos(data: bytes) -> dict[str, int]:
    """Of each tensor, where in the file its offset stands."""
    places = {}
    for name in gguf_names(data):
        key = struct.pack("<Q", len(name)) + name.encode()
        at = data.index(key) + len(key)
        (axes,) = struct.unpack_from("<I", data, at)
        places[name] = at + 4 + 8 * axes + 4
    return places


def gguf_names(data: bytes) -> list[str]:
    return [f"blk.{layer}.{part}.weight" for layer in (0, 1) for part in ("attn_q", "attn_k", "ffn_up", "ffn_down")]


@pytest.mark.parametrize("moved", [-32, 32, 8, 1, -(1 << 40), 1 << 40])
def test_tensors_that_do_not_follow_each_other_are_refused(tmp_path, written, moved):
    data = bytearray(written.read_bytes())
    for name, at in infos(bytes(data)).items():
        other = bytearray(data)
        (offset,) = struct.unpack_from("<Q", data, at)
        struct.pack_into("<Q", other, at, (offset + moved) % (1 << 64))
        (tmp_path / "x.gguf").write_bytes(other)
        with refused("x.gguf", "is at" if offset or moved else name):
            read_header(tmp_path / "x.gguf")


def test_two_tensors_with_their_places_exchanged_are_refused(tmp_path, written):
    data = bytearray(written.read_bytes())
    places = infos(bytes(data))
    first, second = places["blk.0.attn_q.weight"], places["blk.1.attn_q.weight"]
    data[first : first + 8], data[second : second + 8] = data[second : second + 8], data[first : first + 8]
    (tmp_path / "x.gguf").write_bytes(data)
    with refused("x.gguf", "is at"):
        open_model(tmp_path / "x.gguf")


def test_gguf_reader_of_the_package_sees_the_same_tensors(written):
    """Names, shapes, types, places and values as the format's own reader has them."""
    header, theirs = read_header(written), gguf.GGUFReader(written)
    assert list(header.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        ours = header.tensors[tensor.name]
        assert (ours.shape, ours.kind) == (tuple(reversed(tensor.shape.tolist())), tensor.tensor_type)
        assert (ours.offset, ours.nbytes) == (tensor.data_offset, tensor.n_bytes)
    for key, value in read_metadata(written).items():
        told = theirs.fields[key].contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == told


def test_a_key_or_tensor_that_comes_twice_is_refused(tmp_path, written):
    data = written.read_bytes()
    twice = data.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight", 1)
    (tmp_path / "twice.gguf").write_bytes(twice)
    with refused("twice.gguf", "blk.0.attn_q.weight", "twice"):
        open_model(tmp_path / "twice.gguf")
    key = data.replace(b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id", 1)
    (tmp_path / "key.gguf").write_bytes(key)
    with refused("key.gguf", "eos_token_id", "twice"):
        open_model(tmp_path / "key.gguf")


def test_config_from_gguf_names_what_is_missing(written):
    header = read_metadata(written)
    for key in ("llama.embedding_length", "llama.context_length", "llama.attention.head_count"):
        with refused("x.gguf", key):
            config_from_gguf({k: v for k, v in header.items() if k != key}, False, None, "x.gguf")
