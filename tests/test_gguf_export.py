"""GGUF files that jquant writes: read back bit for bit by the gguf package, by jquant, and by llama.cpp where it is."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import checkpoints
import gguf
import jax
import jax.numpy as jnp
import libllama
import numpy as np
import pytest
import tokenizers
from checkpoints import refused
from conftest import wikitext
from flax import nnx
from omegaconf import OmegaConf
from tokenizers import decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel

from jquant import (
    GGUF,
    GPTQ,
    NF4,
    Activation,
    Int,
    LlamaCpp,
    Method,
    load_model,
    open_model,
    perplexity,
    quantize,
    rotate,
)
from jquant.io.export.gguf import write_gguf
from jquant.io.export.vocabulary import vocabulary
from jquant.io.gguf.blocks import block_size
from jquant.io.gguf.mixes import MIXES, gguf_mix, mixture
from jquant.io.language_model import LanguageModel
from jquant.io.tokenizer import Tokenizer, tokenizer_from_gguf
from jquant.methods import decide
from jquant.models.config import config_from_hf
from jquant.models.params import flat_params, with_params
from jquant.qtensor import QTensor, dequantize

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "tie_word_embeddings": True}
TEXT = "abcd efgh, aé 123.\n\n4 jj"
forward = jax.jit(lambda decoder, tokens: decoder(tokens))


def load(folder: Path, **changes) -> LanguageModel:
    return load_model(checkpoints.save(folder, checkpoints.llama(**changes)), progress=False)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> LanguageModel:
    return load(tmp_path_factory.mktemp("wide"), **WIDE)


def read(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file as the gguf package reads it, float32."""
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def arrays(model: LanguageModel) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in flat_params(model.decoder).items()}


# ---- values ---------------------------------------------------------------------------------------------------------


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
def test_floats_are_those_of_another_writer(tmp_path, changes):
    theirs = checkpoints.llama(**changes)
    model = load_model(checkpoints.save(tmp_path / "folder", theirs), progress=False)
    write_gguf(model, tmp_path / "ours.gguf", floats="F32")
    found, expected = read(tmp_path / "ours.gguf"), checkpoints.gguf_tensors(theirs)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        if name == "rope_freqs.weight":
            np.testing.assert_allclose(found[name], values, rtol=1e-6)
        else:
            np.testing.assert_array_equal(found[name], values, err_msg=name)
    again = load_model(tmp_path / "ours.gguf", progress=False)
    same = {"rope_divisors": None, "norm_eps": 1e-5}  # float32 in the file
    assert replace(again.config, **same) == replace(model.config, **same)
    assert again.config.norm_eps == np.float32(1e-5)
    for name, values in arrays(model).items():
        np.testing.assert_array_equal(arrays(again)[name], values, err_msg=name)
    assert again.tokenizer.encode(TEXT).tolist() == model.tokenizer.encode(TEXT).tolist()
    assert (again.tokenizer.bos_id, again.tokenizer.eos_ids) == (model.tokenizer.bos_id, model.tokenizer.eos_ids)


@pytest.mark.parametrize("kind", GGUF)
def test_codes_and_scales_survive_bit_for_bit(tmp_path, wide, kind):
    method = Method(GGUF[kind])
    q = quantize(wide, [("embedding", method), ("", method)], progress=False)
    write_gguf(q, tmp_path / "x.gguf")
    found = read(tmp_path / "x.gguf")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    again = arrays(load_model(tmp_path / "x.gguf", progress=False))
    packed = load_model(tmp_path / "x.gguf", packed=True, progress=False)
    for name, leaf in flat_params(q.decoder).items():
        ours = flat_params(packed.decoder)[name]
        assert jax.tree.structure(ours) == jax.tree.structure(leaf)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(leaf), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    write_gguf(packed, tmp_path / "again.gguf")
    files = [gguf.GGUFReader(tmp_path / name).tensors for name in ("x.gguf", "again.gguf")]
    assert [(t.name, t.tensor_type, t.data.tobytes()) for t in files[0]] == [
        (t.name, t.tensor_type, t.data.tobytes()) for t in files[1]
    ]
    for name, leaf in flat_params(q.decoder.segments[0]).items():
        if isinstance(leaf, QTensor):
            np.testing.assert_array_equal(again[f"segments.0.{name}"], dequantize(leaf), err_msg=name)
    down = dequantize(flat_params(q.decoder.segments[0])["mlp.down.kernel"])[1]
    np.testing.assert_array_equal(found["blk.1.ffn_down.weight"], down.T)
    np.testing.assert_array_equal(again["embedding"], dequantize(q.decoder.embedding.get_value().weight).T)
    assert {kinds[name] for name in kinds if "norm" not in name} == {kind}


@pytest.mark.parametrize(
    ("format", "kind"),
    [
        (Int(4, 64, symmetric=True), "Q4_0"),
        (Int(5, 96, symmetric=True, full_range=False), "Q5_0"),
        (Int(8, 32, symmetric=True), "Q8_0"),
        (Int(4, 64, zero="float"), "Q4_1"),
        (Int(5, 32, zero="float"), "Q5_1"),
    ],
    ids=str,
)
def test_integers_without_integer_zeros_are_exact_in_a_block_type(tmp_path, wide, format, kind):
    q = quantize(wide, Method(format), progress=False)
    write_gguf(q, tmp_path / "x.gguf", floats="F32")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert {t.tensor_type.name for t in reader.tensors} == {kind, "F32"}
    down = dequantize(flat_params(q.decoder.segments[0])["mlp.down.kernel"])[1]
    np.testing.assert_array_equal(read(tmp_path / "x.gguf")["blk.1.ffn_down.weight"], down.T)


def test_gptq_onto_a_mixture_is_written_and_its_logits_are_those_in_memory(tmp_path, wide):
    rules = gguf_mix("q4_k_m", wide.config, lambda format: Method(format, LlamaCpp(importance=True), GPTQ()))
    tokens = np.random.default_rng(0).integers(0, checkpoints.VOCAB, (1, 64), np.int32)
    text = checkpoints.random_text(3000, seed=1)
    q = quantize(wide, rules, calibration=text, samples=16, context=64, progress=False)
    write_gguf(q, tmp_path / "x.gguf", floats="F32")
    again = load_model(tmp_path / "x.gguf", progress=False)
    found, expected = (np.asarray(forward(model.decoder, tokens[:1])) for model in (again, q))
    assert checkpoints.relative(found, expected) <= 1e-5


@pytest.mark.parametrize("floats", ["F32", "F16", "BF16"])
def test_a_model_on_disk_gives_the_same_file_as_one_in_memory(tmp_path, wide, floats):
    q = quantize(wide, [("mlp", "q4_k"), ("attention.v", "q6_k")], progress=False)
    q.save(tmp_path / "saved")
    write_gguf(q, tmp_path / "memory.gguf", floats)
    write_gguf(open_model(tmp_path / "saved"), tmp_path / "disk.gguf", floats)
    assert (tmp_path / "memory.gguf").read_bytes() == (tmp_path / "disk.gguf").read_bytes()
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "disk.gguf").tensors}
    assert kinds == {"F32", floats, "Q4_K", "Q6_K"}
    stored = jnp.asarray(wide.decoder.embedding.get_value(), {"F32": "f4", "F16": "f2", "BF16": "bfloat16"}[floats])
    np.testing.assert_array_equal(read(tmp_path / "disk.gguf")["token_embd.weight"], stored.astype("f4"))


# ---- mixtures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"])
def test_mixtures_of_the_default_model_are_those_that_llama_cpp_made(default_model, name):
    """The rules in configs/compositions/ were read from files that llama.cpp's own quantizer wrote."""
    path = Path(__file__).parents[1] / "configs" / "compositions" / f"gguf_{name.lower()}.yaml"
    rules = OmegaConf.load(path).rules
    rules = rules if isinstance(rules, list) or OmegaConf.is_list(rules) else [rules]
    kinds = mixture(name, default_model.config)
    weights = [weight for weight in kinds if weight.startswith("layers.")]
    expected = decide([(rule.weights, rule.method.upper()) for rule in rules], weights)
    assert {weight: kinds[weight] for weight in weights} == expected
    assert kinds["embedding"] == "Q8_0"


@pytest.mark.parametrize(
    ("name", "published"), [("Q8_0", 8.50), ("Q6_K", 6.56), ("Q5_K_M", 5.70), ("Q4_K_M", 4.89), ("Q2_K", 3.16)]
)
def test_bits_per_weight_of_llama_3_8b_are_the_published_ones(name, published):
    """The table of llama.cpp's README; its Q2_K counts the file's bytes, the head and the embedding included."""
    raw = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
    }
    config = config_from_hf(raw, "Llama-3-8B")
    widths = {
        "attention.q": (4096, 4096),
        "attention.k": (4096, 1024),
        "attention.v": (4096, 1024),
        "attention.o": (4096, 4096),
        "mlp.gate": (4096, 14336),
        "mlp.up": (4096, 14336),
        "mlp.down": (14336, 4096),
    }
    bits = weights = 0
    for weight, kind in mixture(name, config).items():
        path = weight.removesuffix(".kernel").partition(".")[2].partition(".")[2]
        size = np.prod(widths.get(path, (4096, 128256)))
        members, nbytes = block_size(kind)
        bits, weights = bits + 8 * nbytes * size / members, weights + size
    assert bits / weights == pytest.approx(published, abs=0.011)


def test_every_mixture_quantizes_and_is_written(tmp_path, wide):
    for name in MIXES:
        q = quantize(wide, gguf_mix(name, wide.config, Method), progress=False)
        write_gguf(q, tmp_path / f"{name}.gguf")
        kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        assert kinds["token_embd.weight"] == mixture(name, wide.config)["embedding"]
        assert kinds["blk.0.ffn_gate.weight"] == MIXES[name]


# ---- tokenizers -----------------------------------------------------------------------------------------------------


def sentencepiece() -> tokenizers.Tokenizer:
    """BPE with byte fallback, as converted from SentencePiece."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdefghij", "ab", "▁ab", "cd", "abcd"]
    merges = [("a", "b"), ("▁", "ab"), ("c", "d"), ("ab", "cd")]
    backend = tokenizers.Tokenizer(
        BPE({t: i for i, t in enumerate(tokens)}, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def cut(*steps: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(checkpoints.tokenizer().to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return backend


def test_a_sentencepiece_tokenizer_comes_back(tmp_path, wide):
    model = replace(wide, tokenizer=Tokenizer(sentencepiece(), 1, (2,), add_bos=True))
    write_gguf(model, tmp_path / "x.gguf")
    again = tokenizer_from_gguf(tmp_path / "x.gguf")
    text = "abcd ab  cdab é abcabcd</s>"
    assert again.encode(text).tolist() == model.tokenizer.encode(text).tolist()
    assert (again.bos_id, again.eos_ids, again.add_bos) == (1, (2,), True)
    types = gguf.GGUFReader(tmp_path / "x.gguf").fields["tokenizer.ggml.token_type"].contents()
    assert types[:5] == [2, 3, 3, 6, 6]  # unknown, control, control, byte, byte
    assert set(types[len(sentencepiece().get_vocab()) :]) == {5}  # unused


def test_pre_tokenizers_have_llama_cpps_names():
    digits = cut(pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False))
    assert vocabulary(Tokenizer(digits), 320)["tokenizer.ggml.pre"] == "smollm"
    assert vocabulary(Tokenizer(checkpoints.tokenizer()), 320)["tokenizer.ggml.pre"] == "gpt-2"
    assert vocabulary(Tokenizer(digits, pre="tekken"), 320)["tokenizer.ggml.pre"] == "tekken"


def test_tokenizers_that_gguf_cannot_hold_are_refused():
    with refused("Whitespace", "smollm"):
        vocabulary(Tokenizer(cut(pre_tokenizers.Whitespace())), 320)
    with refused("WordLevel"):
        vocabulary(Tokenizer(tokenizers.Tokenizer(WordLevel({"a": 0}, "a"))), 320)
    with refused("300 rows"):
        vocabulary(Tokenizer(checkpoints.tokenizer()), 300)


def test_the_default_models_tokenizer_is_described_as_in_its_file(default_model, default_gguf):
    ours, theirs = vocabulary(default_model.tokenizer, 49152), gguf.GGUFReader(default_gguf).fields
    for key, value in ours.items():
        assert value == theirs[key].contents(), key
    assert ours.keys() >= {f"tokenizer.ggml.{key}" for key in ("pre", "tokens", "merges", "bos_token_id")}


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_what_gguf_cannot_hold_is_refused_and_nothing_is_written(tmp_path, wide):
    path = tmp_path / "x.gguf"
    with refused("layers.0.mlp.up.kernel", "NF4", "Q4_K"):
        write_gguf(quantize(wide, [("mlp.up", Method(NF4()))], progress=False), path)
    with refused("layers.0.attention.q.kernel", "Int"):
        write_gguf(quantize(wide, [("attention.q", "rtn")], bits=4, group=32, progress=False), path)
    with refused("rotated", "residual"):
        write_gguf(replace(wide, decoder=rotate(wide.decoder, heads=False, mlp=False)), path)
    with refused("layers.0.mlp.down.kernel", "mlp=False"):
        write_gguf(replace(wide, decoder=rotate(wide.decoder, residual=False)), path)
    with refused("F32, F16, BF16", "'F8'"):
        write_gguf(wide, path, floats="F8")
    with refused("rope_magnitude=1.2"):
        write_gguf(_with_config(wide, replace(wide.config, rope_magnitude=1.2)), path)
    assert list(tmp_path.iterdir()) == []


def _with_config(model: LanguageModel, config) -> LanguageModel:
    decoder = nnx.clone(model.decoder)
    decoder.config = config
    return replace(model, decoder=decoder)


def test_values_beyond_float16_are_refused_by_name(tmp_path, wide):
    embedding = wide.decoder.embedding.get_value().at[3, 4].set(1e5)
    model = replace(wide, decoder=with_params(wide.decoder, {"embedding": embedding}))
    with refused("embedding", "100000", "F32"):
        write_gguf(model, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []
    write_gguf(model, tmp_path / "x.gguf", "BF16")


def test_an_existing_file_is_kept_unless_told(tmp_path, wide):
    path = tmp_path / "x.gguf"
    path.write_text("mine")
    with refused("x.gguf", "force=True"):
        write_gguf(wide, path)
    assert path.read_text() == "mine"
    write_gguf(wide, path, force=True)
    assert len(read(path)) == 20
    with refused(str(tmp_path)):
        write_gguf(wide, tmp_path, force=True)


def test_unknown_mixtures_are_refused_with_the_nearest(wide):
    with refused("q4_k_x", "Q4_K_M", "Q4_K_S"):
        gguf_mix("q4_k_x", wide.config)
    with refused("layers.0.mlp.down.kernel", "500"):
        mixture("Q4_0", replace(wide.config, ffn=500))


def test_a_full_disk_leaves_nothing_but_one_sentence(tmp_path, wide):
    q = quantize(wide, "q8_0", progress=False)
    q.save(tmp_path / "saved")
    code = (
        "import resource, sys, jquant\n"
        "from jquant.io.export.gguf import write_gguf\n"
        "model = jquant.open_model(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    write_gguf(model, sys.argv[2])\n"
        "except jquant.InputError as error:\n"
        "    print(error)\n"
    )
    out = tmp_path / "out" / "x.gguf"
    ended = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "saved", out],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[1],
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(f"{out} can't be written (")
    assert list(out.parent.iterdir()) == []


# ---- llama.cpp ------------------------------------------------------------------------------------------------------


def with_llama_cpp(test):
    missing = importlib.util.find_spec("xllamacpp") is None
    return pytest.mark.skipif(missing, reason="llama.cpp is not installed: make interop")(test)


@with_llama_cpp
@pytest.mark.parametrize("changes", [{}, {"rope_parameters": checkpoints.LLAMA3_ROPE}], ids=["plain", "rope_freqs"])
def test_llama_cpp_computes_our_logits(tmp_path, changes):
    model = load(tmp_path / "folder", **(WIDE | changes))
    write_gguf(model, tmp_path / "x.gguf", "F32")
    tokens = np.random.default_rng(1).integers(0, checkpoints.VOCAB, 200).astype(np.int32)
    with libllama.Model(tmp_path / "x.gguf", 256) as theirs:
        found, ids = theirs.logits(tokens), theirs.encode(TEXT)
    assert checkpoints.relative(found, np.asarray(forward(model.decoder, tokens[None]))[0]) <= 1e-4
    assert ids.tolist() == model.tokenizer.encode(TEXT).tolist()


@with_llama_cpp
@pytest.mark.parametrize("kind", GGUF)
def test_llama_cpp_computes_with_our_blocks(tmp_path, wide, kind):
    group = 256 if kind.endswith("_K") else 32
    inputs = Activation(Int(8, group, symmetric=True, scale="float32", ties="away"))  # llama.cpp's, too, are rounded
    q = quantize(wide, Method(GGUF[kind], activation=inputs), progress=False)
    write_gguf(q, tmp_path / "x.gguf", "F32")
    tokens = np.random.default_rng(1).integers(0, checkpoints.VOCAB, 200).astype(np.int32)
    with libllama.Model(tmp_path / "x.gguf", 256) as theirs:
        found = theirs.logits(tokens)
    ours = np.asarray(forward(q.decoder, tokens[None]))[0]
    # Inputs near a tie get codes that differ by one; weights in a wrong place would give an error of about 1.
    assert np.linalg.norm(found - ours) <= 0.05 * np.linalg.norm(ours)


@pytest.mark.slow
@with_llama_cpp
def test_perplexity_of_the_default_model_by_llama_cpp(tmp_path, default_model):
    """8 windows of 1,024 tokens; as mixture Q4_K_M."""
    text = wikitext("wiki.test.noblank.raw")
    inputs = Activation(Int(8, 32, symmetric=True, ties="away"))  # llama.cpp's, too, are rounded so
    method = lambda format: Method(format, LlamaCpp(), activation=inputs)  # noqa: E731
    q = quantize(default_model, gguf_mix("Q4_K_M", default_model.config, method), progress=False)
    write_gguf(q, tmp_path / "x.gguf")
    windows = default_model.tokenizer.encode(text)[: 8 * 1024].reshape(8, 1024)
    ours = perplexity(q, text, windows=8, progress=False).value
    assert libllama.perplexity(tmp_path / "x.gguf", windows) == pytest.approx(ours, rel=0.005)


def test_metadata_says_what_llama_cpp_asks_for(tmp_path, wide):
    write_gguf(wide, tmp_path / "x.gguf")
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    found = {key: fields[key].contents() for key in fields if key.startswith(("llama.", "general."))}
    assert found | {"llama.attention.layer_norm_rms_epsilon": 1e-5} == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": wide.name,
        "general.quantized_by": "jquant",
        "general.quantization_version": 2,
        "general.file_type": 1,
        "llama.vocab_size": checkpoints.VOCAB,
        "llama.context_length": 512,
        "llama.embedding_length": 256,
        "llama.block_count": 2,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 64,
        "llama.attention.value_length": 64,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0,
    }
