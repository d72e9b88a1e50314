"""The numbers that fix a decoder's shape, read from a Hugging Face config.json or a GGUF header."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jquant.errors import InputError


@dataclass(frozen=True)
class DecoderConfig:
    """A Llama-family decoder; hashable, so that it can be static under jit.

    `rope_divisors` slows each rotary frequency down by its own factor (head_dim / 2 of them): the one form that
    Llama-3's scaling rule (`llama3_divisors`) and a GGUF file's rope_freqs tensor share.
    """

    vocab_size: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_base: float
    rope_divisors: tuple[float, ...] | None
    tied: bool
    context_length: int

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise InputError(f"{self.heads} attention heads cannot share {self.kv_heads} key/value heads evenly.")


def llama3_divisors(
    base: float, head_dim: int, factor: float, low_freq_factor: float, high_freq_factor: float, original_context: int
) -> tuple[float, ...]:
    """What Llama 3.1 divides each rotary frequency by.

    Frequencies that turn fewer than `low_freq_factor` times in the original context are slowed by `factor`, those that
    turn more than `high_freq_factor` times are kept, and in between the two are blended linearly in the number of turns
    (Llama 3.1 release; transformers' rope type "llama3").
    """
    divisors = []
    for i in range(head_dim // 2):
        turns = original_context * base ** (-2 * i / head_dim) / (2 * math.pi)
        kept = min(max((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0), 1.0)
        divisors.append(1 / (kept + (1 - kept) / factor))
    return tuple(divisors)


def config_from_hf(raw: Mapping[str, Any], source: str) -> DecoderConfig:
    """Reads a parsed config.json; `source` names the file in errors.

    Raises:
      InputError: another architecture, an unsupported variant of it, or a missing field.
    """
    if raw.get("model_type") != "llama":
        raise InputError(f"{source}: model_type is {raw.get('model_type')!r}; jquant reads 'llama' models so far.")
    for flag in ("attention_bias", "mlp_bias"):
        if raw.get(flag):
            raise InputError(f"{source}: {flag} is set; jquant's Llama decoder has no biases.")
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"{source}: hidden_act is {raw['hidden_act']!r}; jquant's Llama decoder uses silu.")
    # transformers 5 writes rope_parameters; before it there were rope_theta and rope_scaling.
    rope = raw.get("rope_parameters") or {"rope_theta": raw.get("rope_theta"), **(raw.get("rope_scaling") or {})}
    try:
        heads, base = raw["num_attention_heads"], float(rope.get("rope_theta") or 10000.0)
        head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
        return DecoderConfig(
            vocab_size=raw["vocab_size"],
            hidden=raw["hidden_size"],
            ffn=raw["intermediate_size"],
            layers=raw["num_hidden_layers"],
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            norm_eps=raw["rms_norm_eps"],
            rope_base=base,
            rope_divisors=_hf_divisors(rope, base, head_dim, source),
            tied=bool(raw.get("tie_word_embeddings", False)),
            context_length=raw.get("max_position_embeddings", 2048),
        )
    except KeyError as missing:
        raise InputError(f"{source} lacks {missing}.") from None


def _hf_divisors(rope: Mapping[str, Any], base: float, head_dim: int, source: str) -> tuple[float, ...] | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(f"{source}: rope_type {kind!r} is not supported; jquant knows 'default' and 'llama3'.")
    numbers = [rope[k] for k in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")]
    return llama3_divisors(base, head_dim, *numbers)


def config_from_gguf(
    fields: Mapping[str, Any], tied: bool, rope_divisors: tuple[float, ...] | None, source: str
) -> DecoderConfig:
    """Reads a GGUF header's key/value pairs.

    Args:
      fields: the pairs.
      tied: whether the file has no output matrix of its own.
      rope_divisors: its rope_freqs tensor, if there is one.
      source: names the file in errors.

    Raises:
      InputError: another architecture, or a missing field.
    """
    if fields.get("general.architecture") != "llama":
        raise InputError(
            f"{source}: general.architecture is {fields.get('general.architecture')!r}; jquant reads 'llama' so far."
        )
    try:
        heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
        return DecoderConfig(
            vocab_size=fields.get("llama.vocab_size") or len(fields["tokenizer.ggml.tokens"]),
            hidden=hidden,
            ffn=fields["llama.feed_forward_length"],
            layers=fields["llama.block_count"],
            heads=heads,
            kv_heads=fields.get("llama.attention.head_count_kv", heads),
            head_dim=fields.get("llama.attention.key_length", hidden // heads),
            norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
            rope_base=float(fields.get("llama.rope.freq_base", 10000.0)),
            rope_divisors=rope_divisors,
            tied=tied,
            context_length=fields["llama.context_length"],
        )
    except KeyError as missing:
        raise InputError(f"{source} lacks the GGUF key {missing}.") from None
