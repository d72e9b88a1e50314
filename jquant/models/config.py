"""A decoder's configuration, read from a Hugging Face config.json or a GGUF header.

Every known key that changes what the model computes is read, or refused by name. Unknown keys are listed in one
warning.
"""

import logging
import math
import reprlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from jquant.errors import InputError

log = logging.getLogger(__name__)

# The largest value of each field, far above any real model: a damaged or hostile file is refused before its size is
# allocated.
MOST = {
    "vocab_size": 1 << 24,
    "hidden": 1 << 20,
    "ffn": 1 << 22,
    "layers": 1 << 14,
    "heads": 1 << 14,
    "kv_heads": 1 << 14,
    "head_dim": 1 << 13,
    "context_length": 1 << 30,
}
REAL = {"norm_eps": (0.0, 1.0), "rope_base": (1.0, 1e12), "rope_magnitude": (0.01, 100.0)}


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder's shape; hashable, so it can be static under jit.

    `family` names the table of its tensors and sites (`models/families.py`).

    `rope_divisors` divides each of the head_dim / 2 rotary frequencies: linear scaling, YaRN, Llama-3's rule and a GGUF
    file's rope_freqs tensor can all be written so. `rope_magnitude` multiplies the rotated
    queries and keys (YaRN).

    Raises:
      InputError: a field of another type, or out of range.
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
    rope_magnitude: float = 1.0
    family: str = "llama"

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(field.name, getattr(self, field.name), field.name)
        if self.heads % self.kv_heads:
            raise InputError(f"{self.heads} attention heads cannot share {self.kv_heads} key/value heads evenly.")
        if self.head_dim % 2:
            raise InputError(f"Heads of {self.head_dim} channels have no rotary pairs: it takes an even number.")
        if self.rope_divisors is not None and len(self.rope_divisors) != self.head_dim // 2:
            raise InputError(
                f"{len(self.rope_divisors)} rope_divisors (rope_freqs) are not one for each of {self.head_dim // 2} "
                f"pairs of rotary channels."
            )


def _check(field: str, value: Any, name: str) -> Any:
    """The value if it can be a DecoderConfig's `field`; errors call it `name`."""
    if field in MOST:
        if type(value) is int and 1 <= value <= MOST[field]:
            return value
        expected = f"a whole number from 1 to {MOST[field]}"
    elif field in REAL:
        least, most = REAL[field]
        if type(value) in (int, float) and least <= value <= most:
            return float(value)
        expected = f"a number from {least:g} to {most:g}"
    elif field == "tied":
        if type(value) is bool:
            return value
        expected = "true or false"
    elif field == "family":
        if isinstance(value, str) and value.isidentifier():
            return value
        expected = "the name of a family"
    else:
        if value is None or (
            isinstance(value, tuple) and all(type(divisor) is float and 1e-6 <= divisor <= 1e6 for divisor in value)
        ):
            return value
        expected = "positive numbers"
    raise InputError(f"{name} takes {expected}, not {reprlib.repr(value)}.")


# ---- rotary positions -----------------------------------------------------------------------------------------------


def llama3_divisors(
    base: float,
    head_dim: int,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_context: float | int,
) -> tuple[float, ...]:
    """The divisor of each rotary frequency in Llama 3.1.

    Frequencies with fewer than `low_freq_factor` turns in the original context are divided by `factor`, those with more
    than `high_freq_factor` turns are kept. In between the two are blended linearly in the number of turns
    (Llama 3.1 release; transformers' rope type "llama3").
    """
    divisors = []
    for i in range(head_dim // 2):
        turns = original_context * base ** (-2 * i / head_dim) / (2 * math.pi)
        kept = min(max((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0), 1.0)
        divisors.append(1 / (kept + (1 - kept) / factor))
    return tuple(divisors)


def yarn_divisors(
    base: float,
    head_dim: int,
    factor: float,
    original_context: float | int,
    betas: tuple[float, float] = (32.0, 1.0),
    truncate: bool = True,
) -> tuple[float, ...]:
    """The divisor of each rotary frequency in YaRN (arXiv 2309.00071, Eq. 17 to 23).

    Frequencies with more than `betas[0]` turns in the original context are kept, those with fewer than `betas[1]` turns
    are divided by `factor`. In between the two are blended linearly in the pair's number. With `truncate` the ends of
    that ramp are rounded to whole pairs, as transformers and llama.cpp do.
    """

    def pair(turns: float) -> float:
        return head_dim * math.log(original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = map(pair, betas)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    slowed = [min(max((i - low) / width, 0.0), 1.0) for i in range(head_dim // 2)]
    return tuple(1 / (1 - part + part / factor) for part in slowed)


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """The factor of rotated queries and keys in YaRN (arXiv 2309.00071, Eq. 24); more with DeepSeek's `mscale`."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _number(
    values: Mapping[str, Any], key: str, name: str, least: float | int, most: float | int, default: Any = None
) -> float:
    """A number of a file, checked against its bounds; if it is null or missing, its default, if it has one."""
    value = default if values.get(key) is None else values[key]
    if value is None:
        raise InputError(f"{name} lacks {key!r}.")
    if type(value) not in (int, float) or not least <= value <= most:
        raise InputError(f"{name}: {key} takes a number from {least:g} to {most:g}, not {reprlib.repr(value)}.")
    return float(value)


# ---- Hugging Face ---------------------------------------------------------------------------------------------------

_HF = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "context_length",
    "tie_word_embeddings": "tied",
    "rope_theta": "rope_base",
}
# Keys that change what the model computes, with the values at which they do not.
_HF_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "rope_interleaved": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "attention_multiplier": (),
    "residual_multiplier": (1.0,),
    "embedding_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "num_local_experts": (0,),
    "num_experts": (0,),
}
# Keys that change nothing here: settings of training, running, sampling or labels.
_HF_IDLE = frozenset(
    """architectures attention_dropout auto_map attn_implementation _attn_implementation bos_token_id eos_token_id
    pad_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id chunk_size_feed_forward dtype torch_dtype
    initializer_range is_decoder id2label label2id is_llama_config name_or_path _name_or_path output_attentions
    output_hidden_states pretraining_tp prefix problem_type return_dict task_specific_params tokenizer_class torchscript
    tf_legacy_loss transformers_version transformers.js_config unsloth_fixed unsloth_version use_bfloat16 use_cache
    cross_attention_hidden_size finetuning_task pruned_heads""".split()  # noqa: SIM905
)
_ROPE_KINDS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


def config_from_hf(raw: Mapping[str, Any], source: str) -> DecoderConfig:
    """Reads a parsed config.json; `source` names the file in errors.

    Raises:
      InputError: another architecture, an unsupported variant of it, or a field that is missing, of another type, or
        out of range.
    """
    _refuse_variants(raw, _HF_FIXED, source, required=("model_type",))
    known = {*_HF, *_HF_FIXED, *_HF_IDLE, "rope_parameters", "rope_scaling", "original_max_position_embeddings"}
    _warn(raw.keys() - known, source)
    # transformers writes null for a field that is not set.
    read = {
        field: _check(field, raw[key], f"{source}: {key}") for key, field in _HF.items() if raw.get(key) is not None
    }
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if _HF[key] not in read:
            raise InputError(f"{source} lacks {key!r}.")
    if "norm_eps" not in read:
        raise InputError(f"{source} lacks 'rms_norm_eps'.")
    if "head_dim" not in read and read["hidden"] % read["heads"]:
        raise InputError(f"{source}: hidden_size {read['hidden']} is no multiple of {read['heads']} attention heads.")
    settled = {
        "kv_heads": read["heads"],
        "head_dim": read["hidden"] // read["heads"],
        "tied": False,
        "context_length": 2048,
    } | read
    return DecoderConfig(**settled | _hf_rope(raw, settled, source))


def _hf_rope(raw: Mapping[str, Any], shape: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The three rope fields; a top-level rope_theta is used if rope_parameters has none, as in transformers."""
    objects = {key: raw[key] for key in ("rope_parameters", "rope_scaling") if raw.get(key) is not None}
    for key, value in objects.items():
        if not isinstance(value, dict):
            raise InputError(f"{source}: {key} takes an object, not {reprlib.repr(value)}.")
    if len(objects) > 1 and raw["rope_parameters"] != raw["rope_scaling"]:
        raise InputError(f"{source}: rope_parameters and rope_scaling differ; leave one out.")
    # transformers 5 writes rope_parameters; earlier versions wrote rope_theta and rope_scaling.
    rope = {key: value for part in objects.values() for key, value in part.items() if value is not None}
    name = f"{source}: {next(iter(objects), 'rope_parameters')}"
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KINDS:
        raise InputError(f"{name}: rope_type {reprlib.repr(kind)} is not supported; jquant knows {_list(_ROPE_KINDS)}.")
    base = _check("rope_base", rope.get("rope_theta", shape.get("rope_base", 10000.0)), f"{name}: rope_theta")
    _refuse_variants(rope, {"partial_rotary_factor": (1.0,)}, name)
    idle = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
    if surplus := rope.keys() - idle - _ROPE_KINDS[kind]:
        raise InputError(f"{name}: rope_type {kind!r} does not take {_list(sorted(surplus))}.")
    context = raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    rope["original_max_position_embeddings"] = context or shape["context_length"]
    divisors, magnitude = _scaling(kind, rope, base, shape["head_dim"], name)
    return {"rope_base": base, "rope_divisors": divisors, "rope_magnitude": magnitude}


def _scaling(
    kind: str, rope: Mapping[str, Any], base: float, head_dim: int, name: str
) -> tuple[tuple[float, ...] | None, float]:
    """Divisors and magnitude of a kind of rope scaling; `rope` has Hugging Face's names."""
    if kind == "default":
        return None, 1.0
    factor = _number(rope, "factor", name, 1, 1e4)
    if kind == "linear":
        return (factor,) * (head_dim // 2), 1.0
    context = _number(rope, "original_max_position_embeddings", name, 1, MOST["context_length"])
    if kind == "llama3":
        low = _number(rope, "low_freq_factor", name, 1e-3, 1e3)
        high = _number(rope, "high_freq_factor", name, 1e-3, 1e3)
        if not low < high:
            raise InputError(f"{name}: low_freq_factor {low:g} is not below high_freq_factor {high:g}.")
        return llama3_divisors(base, head_dim, factor, low, high, context), 1.0
    fast, slow = (_number(rope, f"beta_{end}", name, 1e-3, 1e4, by) for end, by in (("fast", 32.0), ("slow", 1.0)))
    truncate = rope.get("truncate", True)
    if type(truncate) is not bool or not slow <= fast or base == 1:
        raise InputError(f"{name}: yarn takes beta_slow <= beta_fast, truncate true or false and a rope_theta over 1.")
    magnitude = yarn_magnitude(factor)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        mscale, all_dim = (_number(rope, key, name, 0, 100) for key in ("mscale", "mscale_all_dim"))
        magnitude = yarn_magnitude(factor, mscale) / yarn_magnitude(factor, all_dim)
    magnitude = _number(rope, "attention_factor", name, *REAL["rope_magnitude"], default=magnitude)
    return yarn_divisors(base, head_dim, factor, context, (fast, slow), truncate), magnitude


def _refuse_variants(
    values: Mapping[str, Any], fixed: Mapping[str, Collection[Any]], source: str, required: Iterable[str] = ()
) -> None:
    """Raises InputError for a key that asks for a variant which jquant's decoder does not have."""
    for key, allowed in fixed.items():
        value = values.get(key)
        if (value is None and key not in required) or (type(value) in (bool, int, float, str) and value in allowed):
            continue
        other = f"only {_list(allowed)}" if allowed else "only models without it"
        raise InputError(f"{source}: {key} is {reprlib.repr(value)}; jquant's Llama decoder knows {other}.")


def _warn(unknown: Iterable[str], source: str) -> None:
    if names := sorted(unknown):
        some = ", ".join(name[:40] for name in names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        log.warning("%s has keys that jquant does not know and leaves out: %s", source, some)


def _list(values: Iterable[Any]) -> str:
    return ", ".join(map(repr, values))


# ---- GGUF -----------------------------------------------------------------------------------------------------------

_GGUF = {
    "llama.vocab_size": "vocab_size",
    "llama.embedding_length": "hidden",
    "llama.feed_forward_length": "ffn",
    "llama.block_count": "layers",
    "llama.attention.head_count": "heads",
    "llama.attention.head_count_kv": "kv_heads",
    "llama.attention.key_length": "head_dim",
    "llama.attention.layer_norm_rms_epsilon": "norm_eps",
    "llama.context_length": "context_length",
    "llama.rope.freq_base": "rope_base",
}
_GGUF_FIXED: dict[str, tuple[Any, ...]] = {
    "general.architecture": ("llama",),
    "general.type": ("model",),
    "split.count": (0, 1),
    "llama.attention.causal": (True,),
    "llama.attention.clamp_kqv": (0.0,),
    "llama.attention.max_alibi_bias": (0.0,),
    "llama.attention.shared_kv_layers": (0,),
    "llama.attention.sliding_window": (0,),
    "llama.attn_logit_softcapping": (0.0,),
    "llama.embedding_scale": (0.0, 1.0),
    "llama.expert_count": (0,),
    "llama.expert_used_count": (0,),
    "llama.final_logit_softcapping": (0.0,),
    "llama.logit_scale": (0.0, 1.0),
    "llama.nextn_predict_layers": (0,),
    "llama.residual_scale": (0.0, 1.0),
    "llama.rope.scaling.alpha": (0.0,),
    "llama.rope.scaling.attn_factor": (1.0,),
    "llama.rope.scaling.yarn_attn_factor": (1.0,),
    "llama.rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "llama.rope.scaling.yarn_log_multiplier": (0.0,),
    "llama.tensor_data_layout": ("Meta AI original pth",),  # llama.cpp always interleaves rotary rows so
    "llama.use_parallel_residual": (False,),
}
_GGUF_ROPE = {  # key -> Hugging Face's name
    "llama.rope.scaling.factor": "factor",
    "llama.rope.scale_linear": "factor",  # in files of 2023
    "llama.rope.scaling.original_context_length": "original_max_position_embeddings",
    "llama.rope.scaling.yarn_beta_fast": "beta_fast",
    "llama.rope.scaling.yarn_beta_slow": "beta_slow",
}
_GGUF_READ = {
    *_GGUF,
    *_GGUF_FIXED,
    *_GGUF_ROPE,
    "llama.attention.scale",
    "llama.attention.value_length",
    "llama.rope.dimension_count",
    "llama.rope.scaling.type",
    "llama.rope.scaling.finetuned",  # says how the model was made
}


def config_from_gguf(
    header: Mapping[str, Any], tied: bool, rope_divisors: tuple[float, ...] | None, source: str
) -> DecoderConfig:
    """Reads a GGUF header's key/value pairs.

    Args:
      header: the pairs.
      tied: whether the file has no output matrix.
      rope_divisors: its rope_freqs tensor, if there is one.
      source: names the file in errors.

    Raises:
      InputError: another architecture, an unsupported variant of it, or a field that is missing, of another type, or
        out of range.
    """
    _refuse_variants(header, _GGUF_FIXED, source, required=("general.architecture",))
    _warn((key for key in header if key.startswith("llama.") and key not in _GGUF_READ), source)
    read = {field: _check(field, header[key], f"{source}: {key}") for key, field in _GGUF.items() if key in header}
    if "vocab_size" not in read and isinstance(header.get("tokenizer.ggml.tokens"), list):
        read["vocab_size"] = len(header["tokenizer.ggml.tokens"])
    for key, field in _GGUF.items():
        if field not in read and field not in ("kv_heads", "head_dim", "rope_base"):
            raise InputError(f"{source} lacks the GGUF key {key!r}.")
    if "head_dim" not in read and read["hidden"] % read["heads"]:
        raise InputError(f"{source}: {read['hidden']} channels are no multiple of {read['heads']} attention heads.")
    settled = {"kv_heads": read["heads"], "head_dim": read["hidden"] // read["heads"], "rope_base": 10000.0} | read
    width = settled["head_dim"]
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        value = header.get(key, width)
        if type(value) is not int or value != width:
            raise InputError(f"{source}: {key} is {reprlib.repr(value)}; jquant takes the head's width, {width}.")
    scale = header.get("llama.attention.scale", 0)
    if scale != 0 and not (isinstance(scale, float) and math.isclose(scale, width**-0.5, rel_tol=1e-5)):
        raise InputError(f"{source}: llama.attention.scale is {reprlib.repr(scale)}; jquant takes 1/√{width}.")
    divisors, magnitude = _gguf_rope(header, settled, source)
    if rope_divisors is not None and len(rope_divisors) != width // 2:
        raise InputError(f"{source}: rope_freqs.weight has {len(rope_divisors)} values, not {width // 2}.")
    if divisors and rope_divisors:
        divisors = tuple(map(math.prod, zip(divisors, rope_divisors, strict=True)))
    return DecoderConfig(**settled, tied=tied, rope_divisors=divisors or rope_divisors, rope_magnitude=magnitude)


def _gguf_rope(
    header: Mapping[str, Any], shape: Mapping[str, Any], source: str
) -> tuple[tuple[float, ...] | None, float]:
    """Divisors and magnitude. As in llama.cpp, a factor without a type is linear scaling, and a factor of 0 none."""
    rope = {ours: header[key] for key, ours in _GGUF_ROPE.items() if header.get(key) not in (None, 0)}
    kind = header.get("llama.rope.scaling.type", "linear")
    if kind == "none" or (kind == "linear" and "factor" not in rope):
        return None, 1.0
    if kind not in ("linear", "yarn"):
        raise InputError(
            f"{source}: llama.rope.scaling.type {reprlib.repr(kind)} is not supported; jquant knows none, linear, yarn."
        )
    rope.setdefault("original_max_position_embeddings", shape["context_length"])
    return _scaling(kind, rope, shape["rope_base"], shape["head_dim"], f"{source}: llama.rope.scaling")
