"""Tiny random Llama checkpoints, written by other projects' code: transformers' `save_pretrained`, gguf's writer."""

import functools
import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, trainers

from jquant.errors import InputError

VOCAB = 320
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # logits of a few units; transformers' default leaves them all but equal
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def llama(seed: int = 0, **changes) -> transformers.LlamaForCausalLM:
    """A random float32 Llama, norm gains random too; `changes` replaces entries of BASE."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(BASE | changes)))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


# Families, as config.json names them: their configuration, and what makes tiny models of them show every difference.
# Windows are shorter than the texts compared; Gemma's soft-caps and scales are strong enough to matter.
SLIDING = ["sliding_attention", "full_attention"]
GEMMA = {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 24, "num_hidden_layers": 3} | {
    "layer_types": [*SLIDING, "sliding_attention"], "tie_word_embeddings": True
}  # fmt: skip
FAMILIES: dict[str, tuple[type, dict]] = {
    "mistral": (transformers.MistralConfig, {"sliding_window": 24}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 24}),
    "smollm3": (transformers.SmolLM3Config, {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 1]}),
    "gemma2": (
        transformers.Gemma2Config,
        GEMMA | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3_text": (
        transformers.Gemma3TextConfig,
        GEMMA
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            }
        },
    ),
    "phi3": (transformers.Phi3Config, {"sliding_window": None}),
    "gpt2": (transformers.GPT2Config, {"n_inner": 96, "tie_word_embeddings": True}),
    "opt": (transformers.OPTConfig, {"ffn_dim": 96, "init_std": 0.2, "tie_word_embeddings": True}),
    "gpt_neox": (transformers.GPTNeoXConfig, {"rotary_pct": 0.25}),
}
# BASE's keys that these configurations do not have.
OLDER = {
    name: {"num_key_value_heads", "rms_norm_eps", *more}
    for name, more in (
        ("gpt2", {"intermediate_size"}),
        ("opt", {"intermediate_size", "initializer_range"}),
        ("gpt_neox", set()),
    )
}


def of_family(name: str, seed: int = 0, **changes) -> transformers.PreTrainedModel:
    """A random float32 model of a family, its norms and biases random too, with eager attention."""
    kind, own = FAMILIES[name]
    base = {key: value for key, value in BASE.items() if key not in OLDER.get(name, ())}
    config = kind(**(base | {"pad_token_id": 0} | own | changes))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    offset = 1.0 if name.startswith("gemma") else 0.0
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
        elif "norm" in name or ".ln_" in name:
            torch.nn.init.uniform_(parameter, 0.5 - offset, 1.5 - offset)
    return model.float().eval()


def save(folder: Path, model: transformers.PreTrainedModel, **options) -> Path:
    """Writes a folder with config.json, safetensors and tokenizer.json; `options` go to `save_pretrained`."""
    model.save_pretrained(folder, **options)
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@functools.cache
def tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE with VOCAB tokens: <s> 0, </s> 1, all bytes, and some merges."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    trained.train_from_iterator([random_text(4000, seed=9)], trainer)
    assert trained.get_vocab_size() == VOCAB
    return trained


def random_text(words: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join("".join(rng.choice(list("abcdefghij"), 4)) for _ in range(words))


def logits(model: transformers.PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """The oracle's next-token logits, `[b, t, vocab]`."""
    with torch.no_grad():
        return model(torch.as_tensor(np.asarray(tokens, np.int64))).logits.numpy()


@functools.cache
def transformers_gguf(path: Path) -> transformers.LlamaForCausalLM:
    """A GGUF file through transformers, in float32.

    transformers asks that accelerate be installed, which it needs to spread a model over devices and not here.
    """
    with mock.patch("transformers.modeling_utils.is_accelerate_available", return_value=True):
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
    return model.eval()


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max |Δ| / max |theirs|."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@contextmanager
def refused(*parts: str):
    """The body raises an InputError of one sentence that holds every part."""
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert 10 < len(message) < 500
    for part in parts:
        assert part in message


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp stores them (convert_hf_to_gguf.py, `LlamaModel.permute`)."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


# llama.cpp's names of architectures, where they differ from config.json's.
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "gpt_neox": "gptneox"}


def gguf_tensors(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """The model's tensors as llama.cpp's converter writes them, float32.

    Its names are those of the gguf package. Models that it converts as Llama (SmolLM3 is one) have
    their rotary rows interleaved; Gemma's norms become gains. GPT-2's weights are turned to `[out, in]`, and
    GPT-NeoX's q, k and v, which are fused head by head, follow one another as a whole.
    """
    config, tensors = model.config, {}
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.numpy()
        if architecture == "gpt2" and ".c_" in name:
            array = array.T
        if architecture == "gptneox" and "query_key_value" in name:
            heads = config.num_attention_heads
            array = array.reshape(heads, 3, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
        if architecture in ("llama", "smollm3") and "q_proj" in name:
            array = interleaved(array, config.num_attention_heads)
        if architecture in ("llama", "smollm3") and "k_proj" in name:
            array = interleaved(array, config.num_key_value_heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = array
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "llama3":
        half = model.config.head_dim // 2
        plain = config.rope_parameters["rope_theta"] ** (-np.arange(half) / half)
        tensors["rope_freqs.weight"] = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    return tensors


def write_gguf(
    path: Path,
    model: transformers.PreTrainedModel,
    tensors: dict[str, np.ndarray | tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
    architecture: str = "llama",
    without: tuple[str, ...] = (),
    also: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    """Writes a GGUF file with tokenizer; raw bytes come as (uint8 array, type), fields in `without` are left out.

    `also` adds fields of its own.
    """
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    elif config.model_type == "gpt_neox":
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_parallel_residual(config.use_parallel_residual)
        width = config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(int(config.rope_parameters["partial_rotary_factor"] * width))
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        rope = config.rope_parameters.get("full_attention", config.rope_parameters)
        writer.add_rope_freq_base(rope["rope_theta"])
    vocabulary = tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3, 3] + [1] * (VOCAB - 2))
    writer.add_token_merges(merges())
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for field in without:
        del writer.kv_data[0][field]
    if also:
        also(writer)
    for name, array in (gguf_tensors(model) if tensors is None else tensors).items():
        if isinstance(array, tuple):
            writer.add_tensor(name, np.ascontiguousarray(array[0]), raw_dtype=array[1])
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def merges() -> list[str]:
    return [" ".join(merge) for merge in json.loads(tokenizer().to_str())["model"]["merges"]]


def stored(values: np.ndarray, kind: gguf.GGMLQuantizationType, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of that storage type, and the float32 values that gguf reads from them.

    Where gguf cannot quantize (k-quants), the bytes are random, redrawn until every value is finite.
    """
    try:
        data = gguf.quantize(values, kind).view(np.uint8)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rng = np.random.default_rng(seed)
        data = rng.integers(0, 256, (values.size // block, size), np.uint8)
        with np.errstate(invalid="ignore"):
            while (bad := ~np.isfinite(gguf.dequantize(data, kind)).all(-1)).any():
                data[bad] = rng.integers(0, 256, (bad.sum(), size), np.uint8)
        data = data.reshape(len(values), -1)
    plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    return data, gguf.dequantize(data.view(plain[kind]) if kind in plain else data, kind).reshape(values.shape)
