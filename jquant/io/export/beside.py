"""The files beside the weights of an exported folder: config.json, the tokenizer's files, and a model card."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from tokenizers import processors

from jquant.errors import InputError
from jquant.io.save import Origin
from jquant.io.source_files import WORDS
from jquant.io.tokenizer import Tokenizer
from jquant.models.config import DecoderConfig, config_from_hf, llama3_divisors

CONFIG, GENERATION, WORDS_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
# The factors of Llama 3.1 and 3.2, and what both releases have in common. A GGUF file stores the divisors only.
LLAMA3_FACTORS = (8.0, 32.0)
LLAMA3_REST = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def files_beside(origin: Origin, dtype: str, quantization: Mapping[str, Any] | None) -> dict[str, bytes]:
    """config.json, generation_config.json and the tokenizer's files, by name.

    They are those of the original folder, as far as it had them; config.json gets the model's dtype and the entry
    quantization_config.

    Raises:
      InputError: there is no original config.json, and a part of the configuration that none can be written for.
    """
    files = {name: text.encode() for name, text in origin.source_files.items() if name in (*WORDS, GENERATION)}
    files[CONFIG] = _json(
        _config(origin, dtype) | ({} if quantization is None else {"quantization_config": quantization})
    )
    tokens = {"bos_token_id": origin.tokenizer.bos_id, "eos_token_id": _one_or_many(origin.tokenizer.eos_ids)}
    files.setdefault(GENERATION, _json({key: value for key, value in tokens.items() if value is not None}))
    files["tokenizer.json"] = _backend(origin.tokenizer).to_str(pretty=True).encode()
    files.setdefault(WORDS_CONFIG, _json(_tokenizer_config(origin.tokenizer, origin.config)))
    return files


def card(
    origin: Origin, format: str, weights: Mapping[str, int], bits: float, calibrated_on: np.ndarray | None
) -> bytes:
    """README.md.

    Args:
      origin: the model.
      format: of the weights in the folder.
      weights: how many weights have each format, in jquant's words.
      bits: stored bits per weight of the projections.
      calibrated_on: see `LanguageModel`.
    """
    calibration = "without calibration text"
    if calibrated_on is not None:
        calibration = f"with calibration text of {len(calibrated_on):,} runs of tokens"
    rows = "\n".join(f"| `{kind}` | {count} |" for kind, count in weights.items())
    return f"""---
library_name: transformers
tags:
- jquant
---

# {origin.name}

Made from {origin.name}, whose weights were stored as {origin.stored_as}, by jquant, {calibration}.
The weights are in the format {format}, {bits:.3f} bits per weight of the projections, scales and zeros included.

| format in jquant | projections |
|---|---:|
{rows}
""".encode()


def _config(origin: Origin, dtype: str) -> dict[str, Any]:
    """config.json without quantization: the original one, or what the decoder's configuration says."""
    text = origin.source_files.get(CONFIG)
    try:
        raw: Any = json.loads(text) if text else None
        _json(raw)
        if not isinstance(raw, dict | None):
            raise ValueError
    except (ValueError, RecursionError):  # NaN and halves of surrogate pairs, which JSON can't hold, too
        raise InputError(f"{origin.name}: the config.json that it was read with is no JSON.") from None
    raw = _from_decoder(origin.config, origin.tokenizer) if raw is None else raw
    raw.pop("quantization_config", None)
    read = config_from_hf(raw, CONFIG)
    if text and read != origin.config:
        raise InputError(f"{origin.name}: the config.json that it was read with describes another decoder.")
    old = {"torch_dtype": dtype} if "torch_dtype" in raw else {}  # the key before transformers 5
    return raw | old | {"dtype": dtype}


def _from_decoder(config: DecoderConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json of a model that had none, such as a .gguf file."""
    if config.family != "llama":
        raise InputError(f"A model of the family {config.family} needs the config.json of its original folder.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.context_length,
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": _one_or_many(tokenizer.eos_ids),
        "rope_parameters": _rope(config),
    }


def _rope(config: DecoderConfig) -> dict[str, Any]:
    """Rotary settings that give the decoder's divisors again, to the rounding of float32 of .gguf files.

    Raises:
      InputError: there are none among the default, linear scaling and the released Llama 3.
    """
    base, divisors = {"rope_theta": config.rope_base}, config.rope_divisors
    if config.rope_magnitude == 1 and divisors is None:
        return base | {"rope_type": "default"}
    if config.rope_magnitude == 1 and divisors and len(set(divisors)) == 1 and divisors[0] >= 1:
        return base | {"rope_type": "linear", "factor": divisors[0]}
    for factor in LLAMA3_FACTORS if config.rope_magnitude == 1 else ():
        known = llama3_divisors(config.rope_base, config.head_dim, factor, *LLAMA3_REST.values())
        if divisors and np.allclose(known, divisors, rtol=1e-5, atol=0):
            return base | {"rope_type": "llama3", "factor": factor, **LLAMA3_REST}
    raise InputError(
        "The model's rotary scaling (rope_divisors) came without a config.json, and is neither linear nor that of a "
        "Llama 3 release: load the model from its original folder."
    )


def _backend(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer as the file's readers need it: what adds BOS is a part of it."""
    bos = tokenizer.bos_id
    if not tokenizer.add_bos or bos is None or tokenizer.backend.encode("").ids[:1] == [bos]:
        return tokenizer.backend
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    name = backend.id_to_token(bos)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name}:1 $B:1", special_tokens=[(name, bos)]
    )
    return backend


def _tokenizer_config(tokenizer: Tokenizer, config: DecoderConfig) -> dict[str, Any]:
    name = lambda index: None if index is None else tokenizer.backend.id_to_token(index)  # noqa: E731
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name(tokenizer.bos_id),
        "eos_token": name(next(iter(tokenizer.eos_ids), None)),
        "chat_template": tokenizer.chat_template,
        "model_max_length": config.context_length,
        "clean_up_tokenization_spaces": False,
    }
    return {key: value for key, value in told.items() if value is not None}


def _one_or_many(ids: tuple[int, ...]) -> Any:
    return ids[0] if len(ids) == 1 else list(ids) or None


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
