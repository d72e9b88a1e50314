"""GGUF and Hugging Face folders: right values from every storage type, one sentence for every broken file."""

import json
import pickle
import shutil
from pathlib import Path

import checkpoints
import gguf
import jax
import numpy as np
import pytest
import torch
from checkpoints import refused
from flax import nnx
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file, save_file

from jquant.io.load import LanguageModel, load_from_config, load_model

forward = jax.jit(lambda decoder, tokens: decoder(tokens))

TOKENS = np.random.default_rng(0).integers(0, checkpoints.VOCAB, (1, 100), np.int32)
PROJECTIONS = {  # ours -> (llama.cpp's, whether its rows are rotary)
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.o": "attn_output",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}


def kernel(model: LanguageModel, path: str, layer: int) -> np.ndarray:
    module = model.decoder.segments[0]
    for name in path.split("."):
        module = getattr(module, name)
    return np.asarray(module.kernel.get_value()[layer])


# ---- GGUF: values ---------------------------------------------------------------------------------------------------

# Rows of 256, which the k-quants need.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
KINDS = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K"


@pytest.mark.parametrize("kind", KINDS.split())
def test_every_storage_type_is_read_as_gguf_reads_it(tmp_path, kind):
    model = checkpoints.llama(**WIDE)
    tensors, expected = checkpoints.gguf_tensors(model), {}
    for seed, name in enumerate(list(tensors)):
        if "attn_norm" in name or "ffn_norm" in name or "output_norm" in name:
            continue
        data, expected[name] = checkpoints.stored(tensors[name], Kind[kind], seed)
        tensors[name] = (data, Kind[kind])
    loaded = load_model(checkpoints.write_gguf(tmp_path / "x.gguf", model, tensors))
    assert loaded.stored_as == f"gguf {kind}"
    heads = {"attn_q": 4, "attn_k": 2}
    for path, short in PROJECTIONS.items():
        name = f"blk.0.{short}.weight"
        ours = kernel(loaded, path, 0).T
        if short in heads:
            ours = checkpoints.interleaved(ours, heads[short])
        np.testing.assert_array_equal(ours, expected[name], err_msg=name)
    np.testing.assert_array_equal(np.asarray(loaded.decoder.embedding.get_value()), expected["token_embd.weight"])
    np.testing.assert_array_equal(np.asarray(loaded.decoder.head.kernel.get_value()).T, expected["output.weight"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"rope_parameters": checkpoints.LLAMA3_ROPE},
        {"head_dim": 24, "num_key_value_heads": 1},
    ],
    ids=["untied", "tied", "rope_freqs", "head_dim"],
)
def test_one_checkpoint_exported_both_ways_gives_equal_logits(tmp_path, changes):
    model = checkpoints.llama(**changes)
    folder = load_model(checkpoints.save(tmp_path / "folder", model))
    file = load_model(checkpoints.write_gguf(tmp_path / "x.gguf", model))
    assert (file.decoder.head is None) == model.config.tie_word_embeddings
    assert file.config.context_length == folder.config.context_length == 512
    ours = np.asarray(forward(file.decoder, TOKENS))
    assert checkpoints.relative(ours, np.asarray(forward(folder.decoder, TOKENS))) <= 1e-5
    assert checkpoints.relative(ours, checkpoints.logits(model, TOKENS)) <= 1e-4
    text = "abcd efgh, aé."
    assert file.tokenizer.encode(text).tolist() == folder.tokenizer.encode(text).tolist()


def test_progress_counts_every_tensor(tmp_path):
    calls = []
    model = checkpoints.llama()
    path = checkpoints.write_gguf(tmp_path / "x.gguf", model)
    load_model(path, progress=lambda *call: calls.append(call))
    total = len(model.state_dict())
    assert calls == [("load", done, total) for done in range(1, total + 1)]


def test_a_tied_head_is_no_second_copy(tmp_path):
    decoder = load_model(checkpoints.save(tmp_path, checkpoints.llama(tie_word_embeddings=True))).decoder
    shapes = [leaf.shape for leaf in jax.tree.leaves(nnx.state(decoder))]
    assert shapes.count((checkpoints.VOCAB, 64)) == 1
    assert (64, checkpoints.VOCAB) not in shapes


# ---- GGUF: refusals -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> torch.nn.Module:
    return checkpoints.llama(num_hidden_layers=2, hidden_size=32, intermediate_size=48)


def test_a_truncated_gguf_is_refused_wherever_it_is_cut(tmp_path, small):
    whole = checkpoints.write_gguf(tmp_path / "x.gguf", small).read_bytes()
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    last = reader.tensors[-1]
    end = int(last.data_offset + last.n_bytes)
    starts = [int(tensor.data_offset) for tensor in reader.tensors]
    cut = tmp_path / "cut.gguf"
    cuts = [0, 3, 4, 8, 23, 24, 40, *range(50, starts[0], starts[0] // 12), starts[0] - 1, *starts[:3], end - 1]
    for size in cuts:
        cut.write_bytes(whole[:size])
        with refused("cut.gguf"):
            load_model(cut)


@pytest.mark.parametrize(
    "content", [b"no such format at all, sorry", b"GGUF" + bytes(60), b"GGUF\x03\0\0\0" + b"\xff" * 60, b"{}"]
)
def test_another_format_is_refused(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with refused("x.gguf"):
        load_model(tmp_path / "x.gguf")


def test_another_architecture_is_refused(tmp_path, small):
    with refused("x.gguf", "'mpt'", "gemma3, llama, qwen2"):
        load_model(checkpoints.write_gguf(tmp_path / "x.gguf", small, architecture="mpt"))


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "token_embd.weight", "output_norm.weight"])
def test_a_missing_gguf_tensor_is_named(tmp_path, small, name):
    tensors = checkpoints.gguf_tensors(small)
    del tensors[name]
    with refused("x.gguf", name):
        load_model(checkpoints.write_gguf(tmp_path / "x.gguf", small, tensors))


@pytest.mark.parametrize("field", ["llama.block_count", "llama.attention.layer_norm_rms_epsilon"])
def test_a_missing_gguf_field_is_named(tmp_path, small, field):
    with refused("x.gguf", field):
        load_model(checkpoints.write_gguf(tmp_path / "x.gguf", small, without=(field,)))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.ffn_down.weight", (32, 40)),
        ("blk.0.ffn_down.weight", (48, 32)),
        ("blk.0.attn_q.weight", (40, 32)),
        ("blk.0.attn_q.weight", (36, 32)),  # not even a whole number of heads
        ("blk.0.attn_norm.weight", (31,)),
        ("token_embd.weight", (checkpoints.VOCAB - 1, 32)),
    ],
)
def test_a_wrong_gguf_shape_is_named(tmp_path, small, name, shape):
    tensors = checkpoints.gguf_tensors(small) | {name: np.ones(shape, np.float32)}
    with refused(name):
        load_model(checkpoints.write_gguf(tmp_path / "x.gguf", small, tensors))


def test_rope_freqs_of_the_wrong_length_are_refused(tmp_path, small):
    tensors = checkpoints.gguf_tensors(small) | {"rope_freqs.weight": np.ones(3, np.float32)}
    with refused("rope_freqs"):
        load_model(checkpoints.write_gguf(tmp_path / "x.gguf", small, tensors))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gguf_weight_that_is_not_finite_is_named(tmp_path, small, value):
    tensors = checkpoints.gguf_tensors(small)
    tensors["blk.1.attn_k.weight"] = tensors["blk.1.attn_k.weight"].copy()
    tensors["blk.1.attn_k.weight"][3, 5] = value
    with refused("blk.1.attn_k.weight", "NaN"):
        load_model(checkpoints.write_gguf(tmp_path / "x.gguf", small, tensors))


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, small) -> Path:
    return checkpoints.save(tmp_path / "folder", small)


def edit(folder: Path, drop: tuple[str, ...] = (), **changes) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))
    return folder


@pytest.mark.parametrize("rope", [checkpoints.LLAMA3_ROPE, {"rope_type": "default", "rope_theta": 777.0}])
@pytest.mark.parametrize("old_name", ["rope_type", "type"])
def test_old_and_new_config_forms_read_alike(tmp_path, rope, old_name):
    folder = checkpoints.save(tmp_path, checkpoints.llama(rope_parameters=rope, num_hidden_layers=1))
    assert "rope_parameters" in json.loads((folder / "config.json").read_text())
    new = load_model(folder)
    scaling = {old_name if k == "rope_type" else k: v for k, v in rope.items() if k != "rope_theta"}
    edit(
        folder,
        drop=("rope_parameters",),
        rope_theta=rope["rope_theta"],
        rope_scaling=None if rope["rope_type"] == "default" else scaling,
    )
    old = load_model(folder)
    assert old.config == new.config
    assert new.config.rope_base == rope["rope_theta"]
    assert (new.config.rope_divisors is None) == (rope["rope_type"] == "default")


def test_config_defaults_are_transformers(folder, small):
    """Fields that old files leave out: key/value heads equal heads, head_dim = hidden / heads, rope base 10,000."""
    edit(folder, drop=("num_key_value_heads", "head_dim", "rope_parameters", "tie_word_embeddings"))
    weights = load_file(folder / "model.safetensors")
    for name in list(weights):
        if "k_proj" in name or "v_proj" in name:
            weights[name] = np.repeat(weights[name], 2, axis=0)
    save_file(weights, folder / "model.safetensors")
    config = load_model(folder).config
    assert (config.kv_heads, config.head_dim, config.rope_base, config.tied) == (4, 8, 10000.0, False)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "mpt"}, ["config.json", "'mpt'", "llama, mistral, qwen2"]),
        ({"model_type": None}, ["config.json", "model_type"]),
        ({"attention_bias": True}, ["config.json", "attention_bias"]),
        ({"mlp_bias": True}, ["config.json", "mlp_bias"]),
        ({"hidden_act": "gelu"}, ["config.json", "'gelu'"]),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, ["config.json", "'longrope'"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["config.json", "'dynamic'"]),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, ["config.json", "factor"]),
        ({"num_key_value_heads": 3}, ["4", "3", "heads"]),
        ({"hidden_size": 64}, ["shape"]),
        ({"num_hidden_layers": 3}, ["model.layers.2."]),
    ],
)
def test_an_unusable_config_is_refused(folder, changes, parts):
    with refused(*parts):
        load_model(edit(folder, **changes))


@pytest.mark.parametrize("field", ["vocab_size", "rms_norm_eps", "num_attention_heads"])
def test_a_missing_config_field_is_named(folder, field):
    with refused("config.json", field):
        load_model(edit(folder, drop=(field,)))


def test_a_missing_config_is_named(folder):
    (folder / "config.json").unlink()
    with refused("config.json is missing"):
        load_model(folder)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[]", b"null"])
def test_a_broken_config_is_named(folder, content):
    (folder / "config.json").write_bytes(content)
    with refused("config.json"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 200, 0.5, -1])
def test_a_truncated_safetensors_file_is_named(folder, keep):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with refused("model.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("shard", ["model-00009-of-00009.safetensors", "../x.safetensors", "/etc/hostname", ".."])
def test_an_index_naming_a_missing_or_outside_shard_is_refused(tmp_path, small, shard):
    folder = checkpoints.save(tmp_path / "folder", small, max_shard_size="50KB")
    shutil.copy(next(folder.glob("model-*.safetensors")), tmp_path / "x.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused(shard):
        load_model(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_refused(tmp_path, small, content):
    folder = checkpoints.save(tmp_path, small, max_shard_size="50KB")
    (folder / "model.safetensors.index.json").write_text(content)
    with refused(str(folder)):
        load_model(folder)


def rewritten(folder: Path, name: str, values: np.ndarray | None) -> Path:
    weights = load_file(folder / "model.safetensors")
    weights.pop(name)
    save_file(weights if values is None else weights | {name: values}, folder / "model.safetensors")
    return folder


UP = "model.layers.1.mlp.up_proj.weight"


def test_a_missing_safetensors_tensor_is_named(folder):
    with refused(UP):
        load_model(rewritten(folder, UP, None))


def test_a_wrong_safetensors_shape_is_named(folder):
    with refused(UP, "shape"):
        load_model(rewritten(folder, UP, np.ones((32, 48), np.float32)))


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_safetensors_weight_that_is_not_finite_is_named(folder, value, dtype):
    values = np.ones((48, 32), dtype)
    values[40, 3] = value
    with refused(UP, "NaN"):
        load_model(rewritten(folder, UP, values))


def test_integer_weights_are_refused(folder):
    with refused(UP, "I8"):
        load_model(rewritten(folder, UP, np.ones((48, 32), np.int8)))


class Exploding:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def test_pickled_weights_are_refused_unopened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Exploding()))
    with refused(str(folder), "model.safetensors"):
        load_model(folder)


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/nowhere/model", "/nowhere/x.gguf", "x.gguf", Path("nowhere")])
def test_a_path_that_is_not_there_is_named(path):
    with refused(str(path), "not exist"):
        load_model(path)


def test_an_unknown_name_lists_those_there_are():
    with refused("smollm2_135", "smollm2_135m,", "local"):
        load_model("smollm2_135")


def test_a_configured_path_wins_over_the_source(folder):
    config = {"name": "mine", "path": str(folder), "dtype": "bfloat16", "source": {"hub": "a/b", "revision": "main"}}
    model = load_from_config(config)
    assert model.name == "mine"
    assert model.decoder.embedding.get_value().dtype.name == "bfloat16"
    with refused("/nowhere"):
        load_from_config(config | {"path": "/nowhere"})


def test_a_config_names_a_tokenizer_elsewhere(tmp_path, folder):
    (tmp_path / "words").mkdir()
    (folder / "tokenizer.json").rename(tmp_path / "words" / "tokenizer.json")
    config = {"name": "mine", "path": str(folder), "tokenizer": str(tmp_path / "words"), "source": None}
    assert load_from_config(config).tokenizer.vocab_size == checkpoints.VOCAB
    with refused(str(folder), "tokenizer"):
        load_from_config(config | {"tokenizer": None})
