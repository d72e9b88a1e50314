"""Folders that other tools load: their own readers find our weights bit for bit, and we read them back unchanged."""

import json
import math
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import bitsandbytes.functional as bnb
import compressed_tensors.quantization as ct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from checkpoints import LLAMA3_ROPE, gguf_tensors, llama, logits, refused, relative, save, write_gguf
from compressed_tensors.compressors import BaseCompressor
from hypothesis import given, settings
from hypothesis import strategies as st

from jquant import (
    FP4,
    FP8_E4M3,
    FP8_E5M2,
    MXFP4,
    NF3,
    NF4,
    NVFP4,
    Activation,
    InputError,
    Int,
    LanguageModel,
    double_quantized,
    load_model,
    open_model,
    rotate,
)
from jquant.formats import MXFP8_E4M3, Float, Format, block_shape
from jquant.io.checkpoint import checksum, write_sealed
from jquant.io.export import FORMATS, awq, bitsandbytes, compressed_tensors, folder, gptq, write_folder
from jquant.io.export.base import check_finite
from jquant.models.decoder import blocks, with_blocks
from jquant.models.params import flat_params, with_params
from jquant.pipeline.to_disk import quantize_to_folder
from jquant.qtensor import QTensor, Transposed, dequantize, from_codes, quantize
from jquant.ranges import MinMax

INT8_INPUTS, FLOAT8_INPUTS = Activation(), Activation(FP8_E4M3())
TOKENS = np.random.default_rng(5).integers(0, 320, (2, 24))


def weight(format: Format, rows: int = 64, out: int = 32, seed: int = 0) -> QTensor:
    """A random weight with every code, scale and zero that the format has."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**format.bits if not isinstance(format, Float) else 0x7F, (rows, out), np.uint8)
    if hasattr(format, "levels"):
        codes = codes % len(format.levels)
    if not isinstance(format.scale, str):  # quantized scales
        w = jnp.asarray(rng.standard_normal((rows, out)), jnp.float32)
        return quantize(w, *MinMax()(w, format), format)
    down, across = block_shape(format, (rows, out))
    grid = (-(-rows // down), -(-out // across))
    scale = rng.uniform(0.01, 0.02, grid).astype(np.float32)
    if format.scale == "float8_e8m0fnu":
        scale = 2.0 ** rng.integers(-9, 3, grid)
    scale = jnp.asarray(scale, jnp.float32).astype(format.scale)
    zero = None
    if format.has_zero:
        zero = jnp.asarray(rng.integers(1, 2**format.bits, grid, np.uint8))
        if format.zero == "float":
            zero = scale
    return from_codes(jnp.asarray(codes), scale, zero, format)


def same(ours: QTensor, theirs: QTensor) -> None:
    """Formats, codes, scales and zeros are equal to the last bit."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def back(name: str, q: QTensor) -> QTensor:
    """The weight as its own format's reader gives it back."""
    config = FORMATS[name].quantization_config({"m": q}, [])
    reader = {"awq": awq, "bitsandbytes": bitsandbytes, "compressed-tensors": compressed_tensors}.get(name, gptq)
    return reader.from_tensors(FORMATS[name].to_tensors(q, "float32"), config, q.shape)


# ---- GPTQ, from the format's definition ------------------------------------------------------------------------------

# (word, lowest bit, bits) of the parts of each of 32 codes of 3 bits, which fill three words.
THREE = (
    [[(0, 3 * i, 3)] for i in range(10)]
    + [[(0, 30, 2), (1, 0, 1)]]
    + [[(1, 1 + 3 * i, 3)] for i in range(10)]
    + [[(1, 31, 1), (2, 0, 2)]]
    + [[(2, 2 + 3 * i, 3)] for i in range(10)]
)


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of columns of int32 words, by the places of their bits."""
    if bits == 3:
        places, per = THREE, 3
    else:
        places, per = [[(0, bits * i, bits)] for i in range(32 // bits)], 1
    chunks = words.view(np.uint32).astype(np.uint64).reshape(-1, per, words.shape[1])
    codes = []
    for parts in places:
        code, shift = np.zeros((len(chunks), words.shape[1]), np.uint64), 0
        for word, lowest, width in parts:
            code |= (chunks[:, word] >> np.uint64(lowest) & np.uint64(2**width - 1)) << np.uint64(shift)
            shift += width
        codes.append(code)
    return np.stack(codes, 1).reshape(-1, words.shape[1]).astype(np.int64)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group", "rows", "out"), [(2, 16, 48, 80), (3, 32, 96, 32), (4, 64, 192, 40), (8, "channel", 36, 20)]
)
def test_gptq_words_hold_our_weights(bits, group, rows, out, symmetric, version):
    q = weight(Int(bits, group, symmetric), rows, out)
    tensors = gptq.to_tensors(q, version)
    assert {name: array.dtype for name, array in tensors.items()} == {
        "qweight": np.int32,
        "qzeros": np.int32,
        "scales": np.float16,
        "g_idx": np.int32,
    }
    assert tensors["qweight"].shape == (rows * bits // 32, out)
    codes = unpacked(tensors["qweight"], bits)
    zeros = unpacked(np.ascontiguousarray(tensors["qzeros"].T), bits).T + (version == 1)
    at = tensors["g_idx"]
    values = tensors["scales"].astype(np.float32)[at] * (codes - zeros[at]).astype(np.float32)
    np.testing.assert_array_equal(values, dequantize(q))
    assert gptq.why_not(q, version) is None
    same(q, back("gptq" if version == 1 else "gptq_v2", q))


def test_gptq_has_the_shapes_of_the_default_models_projection():
    tensors = gptq.to_tensors(weight(Int(4, 64, symmetric=True), 576, 576), 1)
    shapes = {"qweight": (72, 576), "qzeros": (9, 72), "scales": (9, 576), "g_idx": (576,)}
    assert {name: array.shape for name, array in tensors.items()} == shapes
    assert set(tensors["qzeros"].view(np.uint32).ravel()) == {0x77777777}


def test_a_zero_of_0_is_for_version_2_alone():
    q = weight(Int(4, 32))
    zero = np.array(q.zero)
    zero[0, 0] &= 0xF0
    q = replace(q, zero=jnp.asarray(zero))
    assert "zero 0" in gptq.why_not(q, 1)
    assert gptq.why_not(q, 2) is None
    same(q, back("gptq_v2", q))
    tensors = gptq.to_tensors(q, 1)
    with pytest.raises(InputError, match="qzeros holds 15"):
        gptq.from_tensors(tensors, gptq.quantization_config({"m": q}, [], 1), q.shape)


# ---- AWQ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "rows", "out"), [(32, 64, 24), ("channel", 33, 8)])
def test_awq_words_hold_our_weights(group, rows, out, symmetric):
    q = weight(Int(4, group, symmetric), rows, out)
    tensors = awq.to_tensors(q)

    def columns(words: np.ndarray) -> np.ndarray:
        wide = np.zeros((len(words), words.shape[1] * 8), np.int64)
        for place, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            wide[:, column::8] = words.view(np.uint32) >> np.uint32(4 * place) & np.uint32(15)
        return wide

    assert tensors["scales"].dtype == np.float16
    at = np.arange(rows) // (rows if group == "channel" else group)
    zeros, scales = columns(tensors["qzeros"])[at], tensors["scales"].astype(np.float32)[at]
    np.testing.assert_array_equal(scales * (columns(tensors["qweight"]) - zeros).astype(np.float32), dequantize(q))
    same(q, back("awq", q))


# ---- compressed-tensors ----------------------------------------------------------------------------------------------


def decompressed(q: QTensor) -> torch.Tensor:
    """The weight `[out, in]` as the library reads it."""
    config = ct.QuantizationConfig.model_validate(compressed_tensors.quantization_config({"m": q}, ["lm_head"]))
    [scheme] = config.config_groups.values()
    tensors = safetensors.torch.load(safetensors.numpy.save(compressed_tensors.to_tensors(q)))
    if q.format == MXFP8_E4M3:
        # Its compressor works in bfloat16, which rounds; the same values in float32.
        return tensors["weight"].float() * torch.exp2(tensors["weight_scale"].float() - 127).repeat_interleave(32, 1)
    return BaseCompressor.get_value_from_registry(scheme.format).decompress(tensors, scheme)["weight"]


CT = [
    *(Int(bits, 32, symmetric) for bits in (2, 3, 4, 5, 8) for symmetric in (True, False)),
    Int(4, "channel", symmetric=True, scale="float32"),
    Int(8, "channel", scale="bfloat16"),
    FP8_E4M3(),
    FP8_E4M3("tensor"),
    FP8_E4M3((32, 16)),
    FP8_E4M3(16, "float16"),
    MXFP4,
    MXFP8_E4M3,
]


@pytest.mark.parametrize("format", CT, ids=str)
def test_compressed_tensors_library_reads_our_weights(format):
    q = weight(format, 96, 48)
    theirs = decompressed(q)
    ours = np.asarray(dequantize(q)).T
    assert theirs.shape == ours.shape
    # The library rounds the product to the scales' dtype; products with MXFP4's are exact in bfloat16.
    np.testing.assert_array_equal(torch.tensor(ours).to(theirs.dtype).float(), theirs.float())
    same(q, back("compressed-tensors", q))


@pytest.mark.parametrize("format", [Int(8, "channel", symmetric=True, scale="float32"), FP8_E4M3()], ids=str)
def test_compressed_tensors_library_reads_weights_with_quantized_inputs(format):
    inputs = INT8_INPUTS if isinstance(format, Int) else FLOAT8_INPUTS
    q = replace(weight(format), activation=inputs)
    config = compressed_tensors.quantization_config({"m": q}, [])
    assert config["format"] == ("int-quantized" if isinstance(format, Int) else "float-quantized")
    np.testing.assert_array_equal(decompressed(q), np.asarray(dequantize(q)).T)
    same(q, back("compressed-tensors", q))


def test_compressed_tensors_library_reads_nvfp4():
    q = weight(NVFP4)
    for scale in (q.scale.scale, jnp.full((1, 1), 2.0**-9, jnp.float32)):
        q = replace(q, scale=replace(q.scale, scale=scale))
        read = back("compressed-tensors", q)
        same(replace(q, scale=replace(q.scale, scale=read.scale.scale)), read)
        np.testing.assert_allclose(read.scale.scale, scale, rtol=2**-23)
    # With a power of two the reciprocal is exact; the library's products are bfloat16.
    same(q, read)
    ours = torch.tensor(np.asarray(dequantize(q)).T).to(torch.bfloat16)
    assert torch.equal(decompressed(q), ours)


def test_config_groups_are_told_apart_by_name_or_by_what_fits():
    weights = {"a": weight(Int(4, 32)), "b": weight(Int(8, 32)), "c": weight(Int(4, "channel"), 32)}
    weights["d"] = weight(Int(4, 32), 32)  # has the tensors of c
    config = compressed_tensors.quantization_config(weights, ["lm_head"])
    assert [group["targets"] for group in config["config_groups"].values()] == [["a", "d"], ["b"], ["c"]]
    for name, q in weights.items():
        same(q, compressed_tensors.from_tensors(compressed_tensors.to_tensors(q), config, q.shape, name))
    same(
        weights["b"],
        compressed_tensors.from_tensors(compressed_tensors.to_tensors(weights["b"]), config, (64, 32), "x"),
    )
    with pytest.raises(InputError, match="several config_groups"):
        compressed_tensors.from_tensors(compressed_tensors.to_tensors(weights["d"]), config, (32, 32), "x")


# ---- bitsandbytes ----------------------------------------------------------------------------------------------------

BNB = [NF4(), FP4(), NF4(32, double_quantized()), FP4(64, double_quantized())]


@pytest.mark.parametrize("format", BNB, ids=["nf4", "fp4", "nf4 nested", "fp4 nested"])
def test_bitsandbytes_reads_our_weights_and_we_its(format):
    q = weight(format, 128, 320)  # more scales than one nested block
    tensors = {name: torch.tensor(array) for name, array in bitsandbytes.to_tensors(q, "float32").items()}
    packed = tensors.pop("weight")
    state = bnb.QuantState.from_dict({name.removeprefix("weight."): t for name, t in tensors.items()}, "cpu")
    theirs = bnb.dequantize_4bit(packed, state).numpy()
    np.testing.assert_array_equal(theirs, np.asarray(dequantize(q)).T)
    same(q, back("bitsandbytes", q))
    w = torch.tensor(np.random.default_rng(1).standard_normal((64, 256)), dtype=torch.float32)
    nested = not isinstance(format.scale, str)
    kind = "nf4" if len(format.levels) == 16 else "fp4"
    packed, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=nested, quant_type=kind)
    stored = {f"weight.{name}": t.numpy() for name, t in state.as_dict(packed=True).items()} | {
        "weight": packed.numpy()
    }
    read = bitsandbytes.from_tensors(stored, {"load_in_4bit": True}, (256, 64))
    np.testing.assert_array_equal(dequantize(read).T, bnb.dequantize_4bit(packed, state).numpy())


# ---- any weight ------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([("gptq", 2), ("gptq", 4), ("gptq_v2", 3), ("gptq_v2", 8), ("awq", 4), ("compressed-tensors", 3)]),
    st.booleans(),
    st.sampled_from([16, 32, "channel"]),
    st.sampled_from([(1, 1), (2, 3)]),  # each shape is a program of its own
    st.integers(0, 2**16),
)
def test_any_integers_come_back(kind, symmetric, group, times, seed):
    (name, bits), (down, across) = kind, times
    same(q := weight(Int(bits, group, symmetric), 32 * down, 32 * across, seed), back(name, q))


# ---- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A tiny Llama with Llama 3's rotary scaling and files beside it."""
    path = save(tmp_path_factory.mktemp("original") / "tiny", llama(rope_parameters=LLAMA3_ROPE, intermediate_size=128))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "extra": 1}))
    return path


@pytest.fixture(scope="module")
def tiny(original) -> LanguageModel:
    return load_model(original, progress=False)


def packed(model: LanguageModel, *formats: Format | None, activation: Activation | None = None) -> LanguageModel:
    """The model with random weights in these formats, taken in turn; None leaves a weight as it is."""
    layers, turn = [], 0
    for block in blocks(model.decoder):
        kernels = {path: leaf for path, leaf in flat_params(block).items() if path.endswith("kernel")}
        for path, leaf in kernels.items():
            if (format := formats[turn % len(formats)]) is not None:
                kernels[path] = replace(weight(format, *leaf.shape, turn), activation=activation)
            turn += 1
        layers.append(with_params(block, kernels))
    return replace(model, decoder=with_blocks(model.decoder, layers))


def same_model(ours: LanguageModel, theirs: LanguageModel) -> None:
    """Every parameter is the same to the last bit."""
    mine, read = flat_params(ours.decoder), flat_params(theirs.decoder)
    assert mine.keys() == read.keys()
    for name, leaf in mine.items():
        same(leaf, read[name])


WHOLE = {
    "gptq": (Int(4, 32, symmetric=True), Int(8, 32, symmetric=True), None),
    "gptq_v2": (Int(3, 32),),
    "awq": (Int(4, 16), Int(4, 16), None),
    "compressed-tensors": (Int(4, 32), None, FP8_E4M3(), Int(8, "channel", symmetric=True), MXFP4),
    "bitsandbytes": (NF4(32, double_quantized()), None),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_folder_comes_back_bit_for_bit(tiny, tmp_path, name):
    model = packed(tiny, *WHOLE[name])
    write_folder(model, tmp_path / "out", name)
    read = load_model(tmp_path / "out", progress=False)
    same_model(model, read)
    assert read.stored_as == f"safetensors {name.removesuffix('_v2')}"
    assert (read.config, read.source_files["tokenizer_config.json"]) == (
        tiny.config,
        tiny.source_files["tokenizer_config.json"],
    )
    assert read.tokenizer.backend.to_str() == tiny.tokenizer.backend.to_str()
    write_folder(open_model(tmp_path / "out"), tmp_path / "again", name)  # block by block
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


@pytest.mark.parametrize("text", ["[]", "3", '{"model_type": NaN}', '{"x": "\\ud800"}', "{"])
def test_an_original_config_that_can_not_be_written_again_is_refused(tiny, tmp_path, text):
    model = replace(packed(tiny, NF4(32)), source_files=dict(tiny.source_files) | {"config.json": text})
    with refused("config.json"):
        write_folder(model, tmp_path / "out", "plain")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("texts", [{"config.json": "\ud800"}, {"\ud800": "{}"}, {"config.json": 3}])
def test_texts_of_a_checkpoint_that_are_no_texts_are_refused(tiny, tmp_path, texts):
    """Checksums are forged."""
    tiny.save(tmp_path / "saved")
    source, manifest = tmp_path / "saved/source.json", tmp_path / "saved/manifest.json"
    source.write_text(json.dumps(texts))
    content = json.loads(manifest.read_text())
    del content["sha256"]
    content["files"]["source.json"] = checksum(source)
    write_sealed(manifest, content)
    with refused("source.json", "no object of texts"):
        load_model(tmp_path / "saved", progress=False)


def test_config_is_the_original_ones_and_says_the_dtype(original, tiny, tmp_path):
    write_folder(packed(tiny, NF4(32)), tmp_path / "out", "plain")
    theirs, ours = (json.loads((path / "config.json").read_text()) for path in (original, tmp_path / "out"))
    assert ours == theirs | {"dtype": "float32"}
    assert (tmp_path / "out/tokenizer_config.json").read_bytes() == (original / "tokenizer_config.json").read_bytes()
    assert (tmp_path / "out/generation_config.json").read_bytes() == (original / "generation_config.json").read_bytes()
    rope = transformers.AutoConfig.from_pretrained(tmp_path / "out").rope_parameters
    assert rope == transformers.AutoConfig.from_pretrained(original).rope_parameters
    card = (tmp_path / "out/README.md").read_text()
    assert "safetensors F32" in card
    assert "without calibration text" in card
    assert "5.000 bits per weight" in card


def theirs_of(path: Path, **options) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("plain", (Int(3, 32), NF4(32))),
        ("bitsandbytes", (NF4(), None)),
        ("bitsandbytes", (FP4(32, double_quantized()),)),
        ("compressed-tensors", (Int(4, 32), None)),
        ("compressed-tensors", (Int(8, "channel", symmetric=True), FP8_E4M3(), Int(4, 16, symmetric=True))),
    ],
)
def test_transformers_computes_our_logits(tiny, tmp_path, name, formats):
    model, how = packed(tiny, *formats), {}
    write_folder(model, tmp_path, name)
    if formats[0] == Int(4, 32):
        # Without this it has no place for packed zeros: on its meta device the library leaves them unpacked.
        how["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    theirs = logits(theirs_of(tmp_path, **how), TOKENS)
    assert relative(np.asarray(model.decoder(jnp.asarray(TOKENS))), theirs) < 1e-2
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert words.encode("abc def", add_special_tokens=False) == model.tokenizer.encode("abc def").tolist()


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq"])
def test_transformers_reads_the_settings(tiny, tmp_path, name):
    write_folder(packed(tiny, Int(4, 32)), tmp_path, name)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    read = (transformers.AwqConfig if name == "awq" else transformers.GPTQConfig).from_dict(settings)
    assert (read.bits, read.group_size) == (4, 32)
    if name == "awq":
        assert (read.zero_point, read.format) == (True, "gemm")
    else:
        assert (read.sym, read.format, read.desc_act) == (False, name, False)


def test_tied_embeddings_are_stored_once_and_large_models_in_shards(tmp_path, monkeypatch):
    save(tmp_path / "m", llama(tie_word_embeddings=True))
    model = packed(load_model(tmp_path / "m", progress=False), Int(4, 32))
    monkeypatch.setattr(folder, "SHARD", 30_000)
    write_folder(model, tmp_path / "out", "gptq")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 2
    held = [name for file in files for name in safetensors.numpy.load_file(tmp_path / "out" / file)]
    assert sorted(held) == sorted(index["weight_map"])
    assert "lm_head.weight" not in held
    assert index["metadata"]["total_size"] == sum(
        array.nbytes for file in files for array in safetensors.numpy.load_file(tmp_path / "out" / file).values()
    )
    same_model(model, load_model(tmp_path / "out", progress=False))


def test_a_saved_model_keeps_the_files_for_exports(tiny, original, tmp_path):
    model = packed(tiny, Int(4, 32))
    model.save(tmp_path / "saved")
    assert load_model(tmp_path / "saved", progress=False).source_files == tiny.source_files
    write_folder(open_model(tmp_path / "saved"), tmp_path / "a", "gptq")
    write_folder(model, tmp_path / "b", "gptq")
    for file in sorted(tmp_path.glob("b/*")):
        assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes()
    damaged = tmp_path / "saved/source.json"
    damaged.write_bytes(damaged.read_bytes()[:-3])
    with refused("source.json"):
        load_model(tmp_path / "saved", progress=False)
    assert "config.json" in open_model(original).source_files


def test_a_packed_folder_is_not_quantized_again(tiny, tmp_path):
    write_folder(packed(tiny, Int(4, 32)), tmp_path / "out", "gptq")
    with refused("is quantized already"):
        quantize_to_folder(open_model(tmp_path / "out"), tmp_path / "q", "rtn")


# ---- models from .gguf files -----------------------------------------------------------------------------------------


def gguf_model(path: Path, divisors: np.ndarray | None = None, **rope) -> LanguageModel:
    model = llama(**rope)

    tensors = gguf_tensors(model)
    if divisors is not None:
        tensors["rope_freqs.weight"] = divisors
    return load_model(write_gguf(path, model, tensors), progress=False)


def test_a_gguf_file_gets_a_config_and_a_tokenizer(tmp_path):
    model = gguf_model(tmp_path / "m.gguf")
    model = replace(model, tokenizer=replace(model.tokenizer, add_bos=True, chat_template="{{ messages }}"))
    write_folder(model, tmp_path / "out", "plain")
    assert relative(np.asarray(model.decoder(jnp.asarray(TOKENS))), logits(theirs_of(tmp_path / "out"), TOKENS)) < 1e-3
    read = load_model(tmp_path / "out", progress=False)
    assert read.config == model.config
    told = ("bos_id", "eos_ids", "add_bos", "chat_template")
    assert [getattr(read.tokenizer, key) for key in told] == [getattr(model.tokenizer, key) for key in told]
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words("abc")["input_ids"] == [0, *model.tokenizer.encode("abc")]


def test_llama_3_releases_rotary_scaling_is_found_and_another_refused(tmp_path):
    release = LLAMA3_ROPE | {"factor": 32.0, "original_max_position_embeddings": 8192, "rope_theta": 5e5}
    model = gguf_model(tmp_path / "m.gguf", rope_parameters=release)
    assert model.config.rope_divisors is not None
    write_folder(model, tmp_path / "out", "plain")
    rope = json.loads((tmp_path / "out/config.json").read_text())["rope_parameters"]
    assert rope == release
    linear = gguf_model(tmp_path / "l.gguf", np.full(8, 4.0, np.float32))
    write_folder(linear, tmp_path / "linear", "plain")
    assert load_model(tmp_path / "linear", progress=False).config == linear.config
    with refused("rope_divisors", "original folder"):
        write_folder(gguf_model(tmp_path / "o.gguf", np.linspace(1, 2, 8, dtype=np.float32)), tmp_path / "o", "plain")
    assert not (tmp_path / "o").exists()


# ---- what can't be written -------------------------------------------------------------------------------------------

FLOAT_ZERO = Int(4, 32, zero="float")


@pytest.mark.parametrize(
    ("name", "format", "said"),
    [
        ("awq", Int(3, 32), ("3 bits", "holds 4", '"gptq_v2"')),
        ("gptq", Int(5, 32), ("5 bits", '"compressed-tensors"')),
        ("gptq", FLOAT_ZERO, ("zeros are floats", '"plain" can hold it')),
        ("compressed-tensors", FLOAT_ZERO, ("zeros are floats", '"plain"')),
        ("gptq", NF4(32), ("NF4(32)", '"bitsandbytes"')),
        ("gptq", Int(4, (32, 16)), ("(32, 16)", '"plain"')),
        ("gptq", Int(4, 24), ("groups of 24 do not divide its 64", '"plain"')),
        ("gptq", Int(4, 32, scale="float32"), ("stored as float32", '"compressed-tensors"')),
        ("compressed-tensors", FP8_E5M2(), ("Float", '"plain"')),
        ("compressed-tensors", NF3(32), ("NF3(32)", '"plain"')),
        ("bitsandbytes", NF4("channel"), ("'channel'", '"plain"')),
        ("bitsandbytes", NF4(48), ("48", "mix two columns", '"plain"')),
        ("bitsandbytes", NF4(32, "float16"), ("float16", '"plain"')),
    ],
)
def test_what_a_format_cannot_say_is_named_with_a_format_that_can(tiny, tmp_path, name, format, said):
    with refused("layers.0.attention.", *said):
        write_folder(packed(tiny, None, format), tmp_path / "out", name)
    assert not list(tmp_path.iterdir())


def test_other_things_that_no_folder_can_say(tiny, original, tmp_path):
    write = partial(write_folder, path=tmp_path / "out")
    quantized = packed(tiny, Int(4, 32))
    with refused("layers.0.", "inputs are quantized", '"compressed-tensors"'):
        write(packed(tiny, Int(8, 32, symmetric=True), activation=INT8_INPUTS), format="gptq")
    with refused("inputs are quantized", "save keeps it"):
        write(packed(tiny, Int(8, 32, symmetric=True), activation=Activation(outliers=6.0)), format="plain")
    with refused("residual stream is rotated"):
        write(replace(tiny, decoder=rotate(tiny.decoder)), format="plain")
    with refused("layers.0.mlp.down.kernel reads rotated inputs"):
        write(replace(tiny, decoder=rotate(tiny.decoder, residual=False)), format="plain")
    with refused("There is no format 'gguf2'", "gptq_v2"):
        write(quantized, format="gguf2")
    with refused("AWQ layout holds weights of one format", "compressed-tensors"):
        write(packed(tiny, Int(4, 32), Int(4, 16)), format="awq")
    with refused("bitsandbytes holds weights of one format"):
        write(packed(tiny, NF4(), FP4()), format="bitsandbytes")
    head = with_params(tiny.decoder, {"head.kernel": weight(Int(4, 32), 64, 320)})
    with refused("lm_head is quantized", "gptq_v2"):
        write(replace(quantized, decoder=with_params(quantized.decoder, flat_params(head))), format="awq")
    embedding = with_params(tiny.decoder, {"embedding": Transposed(weight(Int(4, 32), 64, 320))})
    with refused("embedding is quantized", "plain"):
        write(replace(tiny, decoder=embedding), format="gptq")
    other = replace(
        tiny, source_files={"config.json": (original / "config.json").read_text().replace("1e-05", "1e-06")}
    )
    with refused("describes another decoder"):
        write(other, format="plain")
    assert not list(tmp_path.iterdir())
    write(replace(tiny, decoder=embedding), format="plain")
    write(replace(quantized, decoder=head), format="gptq", force=True)
    same_model(replace(quantized, decoder=head), load_model(tmp_path / "out", progress=False))


def test_a_folder_is_written_whole_or_not_at_all(tiny, tmp_path, monkeypatch):
    model, out = packed(tiny, Int(4, 32)), tmp_path / "out"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(folder, "_write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            write_folder(model, out, "gptq")
        assert not list(tmp_path.iterdir())
        during.setattr(shutil, "rmtree", lambda *_, **__: None)  # the process has no time to tidy up
        with pytest.raises(KeyboardInterrupt):
            write_folder(model, out, "gptq")
    assert not out.exists()
    write_folder(model, out, "gptq")
    before = (out / "model.safetensors").read_bytes()
    with refused("not an empty folder"):
        write_folder(model, out, "plain")
    with monkeypatch.context() as during:
        during.setattr(folder, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            write_folder(model, out, "plain", force=True)
    assert (out / "model.safetensors").read_bytes() == before
    write_folder(model, out, "plain", force=True)
    assert load_model(out, progress=False).stored_as == "safetensors F32"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/diary.txt").write_text("dear diary")
    with refused("not an empty folder"):  # holds no model
        write_folder(model, tmp_path / "notes", "plain", force=True)
    if os.geteuid():  # root may write anywhere
        (tmp_path / "closed").mkdir(0o500)
        with refused("can't be written"):
            write_folder(model, tmp_path / "closed/out", "plain")


# ---- damaged folders -------------------------------------------------------------------------------------------------

MODULE = "model.layers.1.mlp.up_proj"


def edit(path: Path, change) -> Path:
    """Changes the tensors of a folder by `change(tensors)`."""
    file = path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)
    return path


def set_to(end: str, value, tensors: dict) -> None:
    name = f"{MODULE}.{end}"
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value(tensors[name])


def first(value, array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.ravel()[0] = value
    return array


DAMAGES = [
    ("gptq", "qzeros", None, "qzeros is missing, where int32 of shape (2, 16) belongs"),
    ("gptq", "qweight", lambda a: a.astype(np.int64), "qweight is int64"),
    ("gptq", "qweight", lambda a: a[:-1], "qweight is int32 of shape (7, 128)"),
    ("gptq", "g_idx", lambda a: a[::-1].copy(), "order of its own (desc_act)"),
    ("gptq", "scales", partial(first, np.nan), "NaN"),
    ("compressed-tensors", "weight_scale", lambda a: first(2.5e37, a.astype(np.float32)), "weights are infinite"),
    ("awq", "qzeros", lambda a: a[:, :-1].copy(), "qzeros is int32 of shape (2, 15)"),
    ("awq", "scales", lambda a: a.astype(np.float64), "scales is float64"),
    ("compressed-tensors", "weight_shape", partial(first, 7), "weight_shape says [7, 64]"),
    ("compressed-tensors", "weight_packed", lambda a: a[:, :-1].copy(), "weight_packed is int32"),
    ("compressed-tensors", "weight_zero_point", None, "weight_zero_point is missing"),
    ("bitsandbytes", "weight.quant_map", lambda a: a[::-1].copy(), "other values than bitsandbytes' nf4"),
    ("bitsandbytes", "weight.absmax", partial(first, np.inf), "infinite"),
    ("bitsandbytes", "weight.absmax", lambda a: a[:-1], "weight.absmax is float32"),
    ("bitsandbytes", "weight.quant_state.bitsandbytes__nf4", lambda a: a[:-2], "no JSON object"),
    ("bitsandbytes", "weight.quant_state.bitsandbytes__nf4", None, "is missing"),
]


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory) -> Path:
    """A folder in each format."""
    path = tmp_path_factory.mktemp("exported")
    for name in ("gptq", "awq", "compressed-tensors", "bitsandbytes"):
        write_folder(packed(tiny, NF4(32) if name == "bitsandbytes" else Int(4, 32)), path / name, name)
    return path


@pytest.mark.parametrize(("name", "end", "value", "said"), DAMAGES)
def test_tensors_that_do_not_fit_are_named_with_their_file(exported, tmp_path, name, end, value, said):
    shutil.copytree(exported / name, tmp_path / "m")
    edit(tmp_path / "m", partial(set_to, end, value))
    with refused("model.safetensors", MODULE, said):
        load_model(tmp_path / "m", progress=False)


def test_a_tensor_too_many_is_named(exported, tmp_path):
    shutil.copytree(exported / "gptq", tmp_path / "m")
    edit(tmp_path / "m", lambda tensors: tensors.update({f"{MODULE}.perm": np.zeros(3, np.int32)}))
    with refused("perm has no place"):
        load_model(tmp_path / "m", progress=False)
    edit(tmp_path / "m", lambda tensors: tensors.update({"model.extra.qweight": np.zeros(3, np.int32)}))
    with refused("model.extra.qweight", "would not be used"):
        open_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("gptq", {"bits": 8}, "qweight is int32 of shape"),
        ("gptq", {"bits": "4"}, "bits='4'"),
        ("gptq", {"bits": 5}, "5 bits"),
        ("gptq", {"group_size": 48}, "groups of 48 do not divide"),
        ("gptq", {"checkpoint_format": "marlin"}, "marlin"),
        ("gptq", {"quant_method": "hqq"}, "'hqq'; jquant reads gptq, awq"),
        ("gptq", {"pack_dtype": "int16"}, "int16"),
        ("awq", {"version": "gemv"}, "gemv"),
        ("compressed-tensors", {"config_groups": {}}, "config_groups"),
        ("compressed-tensors", {"config_groups": {"g": {"weights": {"num_bits": 4, "type": "int"}}}}, "tensor"),
        ("bitsandbytes", {"load_in_4bit": False}, "not in 4 bits"),
        ("gptq", {"bits": 10**400}, "bits"),
        ("gptq", {"pack_dtype": "x" * 5000}, "pack_dtype"),
        ("compressed-tensors", {"config_groups": {"g": {"targets": 5}}}, "targets='5'"),
        ("compressed-tensors", {"config_groups": {"g": {"weights": {"num_bits": 10**400, "group_size": 32}}}}, "bits"),
        (
            "compressed-tensors",
            {"config_groups": {"g": {"weights": {"num_bits": 4, "strategy": "a\nb"}}}},
            "scales are for",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(exported, tmp_path, name, settings, said):
    shutil.copytree(exported / name, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["quantization_config"] |= settings
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    with refused(said):
        load_model(tmp_path / "m", progress=False)


def test_codes_that_do_not_fill_their_words_are_refused():
    """48 codes of 3 bits are 4.5 words; the good case is 64."""
    config = {"bits": 3, "group_size": 16, "checkpoint_format": "gptq_v2"}
    for rows in (64, 48):
        tensors = {
            "qweight": np.zeros((rows * 3 // 32, 32), np.int32),
            "qzeros": np.zeros((rows // 16, 3), np.int32),
            "scales": np.ones((rows // 16, 32), np.float16),
            "g_idx": np.arange(rows, dtype=np.int32) // 16,
        }
        if rows == 64:
            assert dequantize(gptq.from_tensors(tensors, config, (rows, 32))).shape == (64, 32)
        else:
            with refused("48 × 32 codes of 3 bits do not fill"):
                gptq.from_tensors(tensors, config, (rows, 32))


def test_blocks_larger_than_the_weight_are_one_block():
    """DeepSeek's blocks of 128 × 128 of a smaller weight; a file may say any size."""
    q = weight(FP8_E4M3("tensor"))
    tensors = compressed_tensors.to_tensors(q)
    tensors["weight_scale"] = tensors["weight_scale"].reshape(1, 1)
    for size in (128, 10**30):
        scheme = {"format": "float-quantized", "weights": {"num_bits": 8, "type": "float", "strategy": "block"}}
        scheme["weights"]["block_structure"] = [size, size]
        read = compressed_tensors.from_tensors(tensors, {"config_groups": {"g": scheme}}, q.shape)
        np.testing.assert_array_equal(dequantize(read), dequantize(q))


@pytest.mark.parametrize("value", [10**400, True, "0", math.nan])
def test_a_mean_of_the_statistics_that_is_no_finite_number_is_refused(value):
    q = weight(NF4(32, double_quantized()))
    tensors, name = bitsandbytes.to_tensors(q, "float32"), "weight.quant_state.bitsandbytes__nf4"
    config = FORMATS["bitsandbytes"].quantization_config({"m": q}, [])
    state = json.loads(tensors[name].tobytes())
    tensors[name] = np.frombuffer(json.dumps(state | {"nested_offset": value}).encode(), np.uint8)
    with refused("NaN" if value != value else "nested_offset"):
        check_finite(bitsandbytes.from_tensors(tensors, config, q.shape))
