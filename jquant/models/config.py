"""A decoder's configuration, read from a Hugging Face config.json or a GGUF header.

Every known key that changes what the model computes is read, or refused by name. Unknown keys are listed in one
warning.
"""

import logging
import math
import reprlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import Any

import numpy as np

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
REAL = {
    "norm_eps": (0.0, 1.0),
    "rope_base": (1.0, 1e12),
    "rope_magnitude": (0.01, 100.0),
    "local_rope_base": (1.0, 1e12),
    "attention_scale": (1e-6, 1e3),
    "attention_softcap": (1e-3, 1e6),
    "logits_softcap": (1e-3, 1e6),
    "embedding_scale": (1e-3, 1e6),
}
OPTIONAL = ("local_rope_base", "attention_scale", "attention_softcap", "logits_softcap")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")
NORMS = ("rms", "layer")
QKV = ("attention.q", "attention.k", "attention.v")
UNGATED = (*QKV, "attention.o", "mlp.up", "mlp.down")
PROJECTIONS = {*UNGATED, "mlp.gate"}


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder's shape; hashable, so it can be static under jit.

    `family` names the table of its tensors and sites (`models/families.py`).

    `rope_divisors` divides each of the rotary frequencies: linear scaling, YaRN, Llama-3's rule and a GGUF
    file's rope_freqs tensor can all be written so. `rope_magnitude` multiplies the rotated
    queries and keys (YaRN).

    Attributes:
      biases: the projections that have a bias, e.g. "attention.q".
      qk_norm: whether each head's queries and keys are normalised before their rotary embedding.
      post_norms: whether the outputs of attention and MLP are normalised before they enter the residual stream.
      activation: of the MLP's gate, or of `up` without one; one of ACTIVATIONS.
      windows: for each layer the number of tokens that a query sees, its own among them, or None for all; None if all
        layers see all.
      local_rope_base: the rotary base of layers with a window, which then scale no frequency; None if all layers have
        the same.
      no_rope: the layers without rotary positions.
      attention_scale: what scores are multiplied by; None for 1/√head_dim.
      attention_softcap: scores s become c · tanh(s / c).
      logits_softcap: logits likewise.
      embedding_scale: what embeddings are multiplied by.
      norm: "rms", or "layer" for LayerNorms with biases; qk_norm's are RMSNorms.
      gated: whether the MLP has a gate: down(activation(gate(x)) · up(x)), else down(activation(up(x))).
      rotary_dim: how many of a head's channels have rotary positions, the first ones; None for all.
      position_offset: the row of position 0 in a table of learned positions, which are added to the embeddings; None
        without a table.
      parallel_residual: whether attention and MLP read the same residual stream, and not one after the other.

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
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    post_norms: bool = False
    activation: str = "silu"
    windows: tuple[int | None, ...] | None = None
    local_rope_base: float | None = None
    no_rope: tuple[int, ...] = ()
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embedding_scale: float = 1.0
    norm: str = "rms"
    gated: bool = True
    rotary_dim: int | None = None
    position_offset: int | None = None
    parallel_residual: bool = False

    def __post_init__(self) -> None:
        for item in fields(self):
            _check(item.name, getattr(self, item.name), item.name)
        if self.windows is not None and len(self.windows) != self.layers:
            raise InputError(f"{len(self.windows)} windows are not one for each of {self.layers} layers.")
        if any(layer >= self.layers for layer in self.no_rope):
            raise InputError(f"no_rope names layer {max(self.no_rope)}; there are {self.layers}.")
        if self.heads % self.kv_heads:
            raise InputError(f"{self.heads} attention heads cannot share {self.kv_heads} key/value heads evenly.")
        if self.rotary_channels > self.head_dim:
            raise InputError(f"Heads of {self.head_dim} channels have no {self.rotary_channels} rotary ones.")
        if self.rotary_channels % 2 and len(set(self.no_rope)) < self.layers:
            of = "Heads of" if self.rotary_dim is None else "Heads with rotary_dim"
            raise InputError(f"{of} {self.rotary_channels} channels have no rotary pairs: it takes an even number.")
        pairs = self.rotary_channels // 2
        if self.rope_divisors is not None and len(self.rope_divisors) != pairs:
            raise InputError(
                f"{len(self.rope_divisors)} rope_divisors (rope_freqs) are not one for each of {pairs} pairs of rotary "
                f"channels."
            )
        if not self.gated and "mlp.gate" in self.biases:
            raise InputError("An MLP without a gate has no bias of it (mlp.gate).")

    @property
    def rotary_channels(self) -> int:
        """How many channels of a head have rotary positions, in layers with these."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def window(self, layer: int) -> int | None:
        """How many tokens a layer's queries see, their own among them; None for all."""
        return None if self.windows is None else self.windows[layer]

    @property
    def ropes(self) -> tuple["Rope", ...]:
        """The rotary embeddings of the layers, each once."""
        usual = Rope(self.rope_base, self.rope_divisors, self.rope_magnitude)
        return (usual,) if self.local_rope_base is None else (usual, Rope(self.local_rope_base))

    def rope(self, layer: int) -> int | None:
        """Which of `ropes` a layer has; None if it has no rotary positions."""
        if layer in self.no_rope:
            return None
        return int(self.local_rope_base is not None and self.window(layer) is not None)

    @property
    def runs(self) -> tuple[range, ...]:
        """The layers, in runs of equal window and rotary embedding."""
        runs = groupby(range(self.layers), key=lambda layer: (self.window(layer), self.rope(layer)))
        ends = [list(run)[-1] + 1 for _, run in runs]
        return tuple(range(begin, end) for begin, end in zip([0, *ends], ends, strict=False))


@dataclass(frozen=True)
class Rope:
    """A rotary embedding; fields as in `DecoderConfig`."""

    base: float
    divisors: tuple[float, ...] | None = None
    magnitude: float = 1.0


def _check(field: str, value: Any, name: str) -> Any:
    """The value if it can be a DecoderConfig's `field`; errors call it `name`."""
    if field in MOST:
        if type(value) is int and 1 <= value <= MOST[field]:
            return value
        expected = f"a whole number from 1 to {MOST[field]}"
    elif field in REAL:
        least, most = REAL[field]
        if field in OPTIONAL and value is None:
            return value
        if type(value) in (int, float) and least <= value <= most:
            return float(value)
        expected = f"a number from {least:g} to {most:g}"
    elif field in ("tied", "qk_norm", "post_norms", "gated", "parallel_residual"):
        if type(value) is bool:
            return value
        expected = "true or false"
    elif field in ("activation", "norm"):
        names = ACTIVATIONS if field == "activation" else NORMS
        if value in names:
            return value
        expected = _list(names)
    elif field in ("rotary_dim", "position_offset"):
        least, most = (2, MOST["head_dim"]) if field == "rotary_dim" else (0, 1 << 10)
        if value is None or (type(value) is int and least <= value <= most):
            return value
        expected = f"a whole number from {least} to {most}"
    elif field == "biases":
        if isinstance(value, tuple) and set(value) <= PROJECTIONS:
            return value
        expected = "names of projections"
    elif field in ("windows", "no_rope"):
        least, none = (1, (None,)) if field == "windows" else (0, ())
        whole = lambda item: type(item) is int and least <= item <= MOST["context_length"]  # noqa: E731
        absent = field == "windows" and value is None
        if absent or (isinstance(value, tuple) and all(item in none or whole(item) for item in value)):
            return value
        expected = "whole numbers"
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
_HF_GPT2 = {
    "vocab_size": "vocab_size",
    "n_embd": "hidden",
    "n_inner": "ffn",
    "n_layer": "layers",
    "n_head": "heads",
    "layer_norm_epsilon": "norm_eps",
    "n_positions": "context_length",
    "tie_word_embeddings": "tied",
    "activation_function": "activation",
}
_HF_OPT = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden",
    "ffn_dim": "ffn",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "max_position_embeddings": "context_length",
    "tie_word_embeddings": "tied",
    "activation_function": "activation",
}
_HF_NEOX = {key: name for key, name in _HF.items() if name not in ("kv_heads", "head_dim", "norm_eps", "rope_base")} | {
    "layer_norm_eps": "norm_eps",
    "rotary_emb_base": "rope_base",
    "use_parallel_residual": "parallel_residual",
    "hidden_act": "activation",
}
# Activations of MLPs without a gate: transformers' names -> ours.
_HF_ACTIVATIONS = {"relu": "relu", "gelu": "gelu"} | dict.fromkeys(
    ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh"
)
# Keys that change what the model computes, with the values at which they do not.
_HF_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "layer_types": (),
    "partial_rotary_factor": (1.0,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "rope_interleaved": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "use_bidirectional_attention": (False,),
    "attention_multiplier": (),
    "residual_multiplier": (1.0,),
    "embedding_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "num_local_experts": (0,),
    "num_experts": (0,),
}
# Keys that change nothing here: settings of training, running, sampling or labels.
_HF_IDLE = frozenset(
    """model_type architectures attention_dropout auto_map attn_implementation _attn_implementation bos_token_id
    eos_token_id cache_implementation _sliding_window_pattern resid_pdrop embd_pdrop
    pad_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id chunk_size_feed_forward dtype torch_dtype
    initializer_range is_decoder id2label label2id is_llama_config name_or_path _name_or_path output_attentions
    output_hidden_states pretraining_tp prefix problem_type return_dict task_specific_params tokenizer_class torchscript
    tf_legacy_loss transformers_version transformers.js_config unsloth_fixed unsloth_version use_bfloat16 use_cache
    cross_attention_hidden_size finetuning_task pruned_heads attn_pdrop n_ctx reorder_and_upcast_attn summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj dropout activation_dropout layerdrop
    init_std hidden_dropout classifier_dropout""".split()  # noqa: SIM905
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


@dataclass(frozen=True)
class _Variant:
    """How a family's files differ from Llama's.

    Attributes:
      fields: of DecoderConfig, which the files do not say.
      keys: config.json's keys -> fields.
      defaults: config.json's keys beyond Llama's, or with other defaults: what transformers takes if they are missing.
      fixed: replaces entries of `_HF_FIXED`.
      rope_kinds: the kinds of rope scaling.
      gguf: likewise `defaults`, of a GGUF header's keys without the architecture.
      gguf_fields: likewise `fields`, where llama.cpp fixes more.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rope_kinds: Collection[str] = tuple(_ROPE_KINDS)
    gguf: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=lambda: _HF)
    gguf_fields: Mapping[str, Any] = field(default_factory=dict)


_QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "query_pre_attn_scalar": 256} | {
    "sliding_window": 4096, "layer_types": None, "final_logit_softcapping": None, "tie_word_embeddings": True
}  # fmt: skip
_GELU = ("gelu_pytorch_tanh",)
_OLDER = {"norm": "layer", "gated": False, "biases": UNGATED}
_VARIANTS = {
    "llama": _Variant(),
    "mistral": _Variant(defaults={"sliding_window": 4096}),
    "qwen2": _Variant({"biases": QKV}, _QWEN_WINDOWS),
    "qwen3": _Variant({"qk_norm": True}, _QWEN_WINDOWS | {"head_dim": 128}),
    "smollm3": _Variant(
        defaults={
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
        },
        gguf={"no_rope_layer_interval": 4},  # fixed in llama.cpp
    ),
    "gemma2": _Variant(
        {"post_norms": True, "activation": "gelu_tanh"},
        _GEMMA
        | {"sliding_window_pattern": 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        {"hidden_act": _GELU, "hidden_activation": _GELU},
        gguf={
            "attention.sliding_window": 4096,
            "attention.sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3_text": _Variant(
        {"post_norms": True, "activation": "gelu_tanh", "qk_norm": True},
        _GEMMA | {"sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
        {"hidden_act": _GELU, "hidden_activation": _GELU},
        gguf={
            "attention.sliding_window": 0,
            "attention.sliding_window_pattern": 6,
            "final_logit_softcapping": 0.0,
            "rope.freq_base_swa": 1e4,
        },
    ),
    # transformers takes Phi-3's "yarn" for "longrope".
    "phi3": _Variant(
        defaults={"sliding_window": None}, rope_kinds=("default",), gguf={"attention.sliding_window": 0}
    ),
    "gpt2": _Variant(
        _OLDER | {"position_offset": 0},
        {"layer_norm_epsilon": 1e-5, "n_positions": 1024, "tie_word_embeddings": True,
         "activation_function": "gelu_new"},
        {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
        rope_kinds=(),
        keys=_HF_GPT2,
        gguf_fields={"activation": "gelu_tanh"},
    ),
    "opt": _Variant(
        _OLDER | {"position_offset": 2, "norm_eps": 1e-5},
        {"tie_word_embeddings": True, "activation_function": "relu", "do_layer_norm_before": True,
         "word_embed_proj_dim": None},
        {"enable_bias": (True,), "layer_norm_elementwise_affine": (True,), "_remove_final_layer_norm": (False,)},
        rope_kinds=(),
        keys=_HF_OPT,
    ),
    "gpt_neox": _Variant(
        _OLDER,
        {"layer_norm_eps": 1e-5, "rotary_pct": 0.25, "rotary_emb_base": 1e4, "use_parallel_residual": True,
         "hidden_act": "gelu"},
        {"attention_bias": (True,)},
        rope_kinds=("default", "linear"),
        keys=_HF_NEOX,
        gguf={"use_parallel_residual": True, "rope.dimension_count": None},
        gguf_fields={"activation": "gelu_tanh"},  # llama.cpp's only GELU, whatever the model was trained with
    ),
}  # fmt: skip
HF_FAMILIES = tuple(_VARIANTS)
# llama.cpp's architectures; its converter writes Mistral as llama.
GGUF_FAMILIES = {
    "gemma3": "gemma3_text",
    **{name: name for name in _VARIANTS if name not in ("mistral", "gemma3_text", "gpt_neox", "opt")},
    "gptneox": "gpt_neox",
}
_SLIDING, _FULL = "sliding_attention", "full_attention"


def config_from_hf(raw: Mapping[str, Any], source: str) -> DecoderConfig:
    """Reads a parsed config.json; `source` names the file in errors.

    Raises:
      InputError: another architecture, an unsupported variant of it, or a field that is missing, of another type, or
        out of range.
    """
    family = _known(raw.get("model_type"), HF_FAMILIES, f"{source}: model_type")
    variant = _VARIANTS[family]
    keys = variant.keys
    fixed = {key: of for key, of in _HF_FIXED.items() if key not in {**variant.defaults, **keys}} | dict(variant.fixed)
    if "activation" in keys.values():
        fixed.pop("hidden_act", None)
        fixed |= {key: tuple(_HF_ACTIVATIONS) for key, name in keys.items() if name == "activation"}
    _refuse_variants(raw, fixed, source, family)
    rope_keys = {"rope_parameters", "rope_scaling", "original_max_position_embeddings"} if variant.rope_kinds else set()
    _warn(raw.keys() - {*keys, *fixed, *_HF_IDLE, *variant.defaults, *rope_keys}, source)
    raw = {**variant.defaults, **raw}
    read = _hf_shape(raw, variant, source)
    settled = {
        "kv_heads": read["heads"],
        "head_dim": read["hidden"] // read["heads"],
        "tied": False,
        "context_length": 2048,
    } | read
    special = _hf_layers(raw, settled["layers"], source) | _hf_scales(raw, settled["hidden"], source)
    special |= _hf_positions(raw, settled, variant, source)
    ropes = _hf_ropes(raw, {**settled, **special}, variant, source)
    return _settled(settled, ropes, special, variant.fields, {"family": family})


def _hf_shape(raw: Mapping[str, Any], variant: _Variant, source: str) -> dict[str, Any]:
    """The fields of the keys that are there; `raw` has the family's defaults.

    Raises:
      InputError: a key that has no default is missing, or a value is no such field's.
    """
    # transformers writes null for a field that is not set.
    given = {key: value for key in variant.keys if (value := raw.get(key)) is not None}
    given |= {key: _HF_ACTIVATIONS[given[key]] for key in given if variant.keys[key] == "activation"}
    read = {variant.keys[key]: _check(variant.keys[key], value, f"{source}: {key}") for key, value in given.items()}
    if "n_inner" in variant.keys and "hidden" in read:
        read.setdefault("ffn", 4 * read["hidden"])
    for key, name in variant.keys.items():
        if name in ("vocab_size", "hidden", "ffn", "layers", "heads", "norm_eps") and name not in read:
            raise InputError(f"{source} lacks {key!r}.")
    if "head_dim" not in read and read["hidden"] % read["heads"]:
        key = next(key for key, name in variant.keys.items() if name == "hidden")
        raise InputError(f"{source}: {key} {read['hidden']} is no multiple of {read['heads']} attention heads.")
    return read


def _hf_positions(raw: Mapping[str, Any], shape: Mapping[str, Any], variant: _Variant, source: str) -> dict[str, Any]:
    """The fields of learned positions, and of rotary ones on a part of each head.

    Raises:
      InputError: a part that is no pairs of channels; OPT-350M's norms and embeddings.
    """
    if "do_layer_norm_before" in variant.defaults and (
        raw["do_layer_norm_before"] is not True or raw["word_embed_proj_dim"] not in (None, shape["hidden"])
    ):
        raise InputError(
            f"{source}: jquant's opt decoder knows norms before attention and MLP (do_layer_norm_before true) and "
            f"embeddings of hidden_size channels (word_embed_proj_dim); OPT-350M has others."
        )
    if not variant.rope_kinds:
        return {"no_rope": tuple(range(shape["layers"]))}
    if "rotary_pct" not in variant.defaults:
        return {}
    rope = raw.get("rope_parameters") or raw.get("rope_scaling")
    rope = rope if isinstance(rope, dict) else {}  # `_hf_rope` refuses others
    told = rope.get("partial_rotary_factor")
    key, values = ("rotary_pct", raw) if told is None else ("partial_rotary_factor", rope)
    part = _number(values, key, source, 0, 1)
    turned = int(part * shape["head_dim"])
    if turned < 2 or turned % 2:
        raise InputError(
            f"{source}: {key} {part:g} turns {turned} of each head's {shape['head_dim']} channels, which are no "
            f"pairs: it takes an even number from 2."
        )
    return {} if turned == shape["head_dim"] else {"rotary_dim": turned}


def _settled(*parts: Mapping[str, Any]) -> DecoderConfig:
    """The configuration that parts of it make up, the later ones first."""
    values: dict[str, Any] = {}
    for part in parts:
        values |= part
    return DecoderConfig(**values)


def _known(value: Any, families: Collection[str], name: str) -> str:
    """A family's name in a file, if it is one of those that load."""
    if not isinstance(value, str) or value not in families:
        raise InputError(f"{name} is {reprlib.repr(value)}; jquant loads {', '.join(families)}.")
    return value


def _hf_layers(raw: Mapping[str, Any], layers: int, source: str) -> dict[str, Any]:
    """The fields `windows` and `no_rope`; `raw` has the family's defaults."""
    no_rope = _hf_no_rope(raw, layers, source)
    used, kinds = raw.get("use_sliding_window", True), raw.get("layer_types")
    if type(used) is not bool:
        raise InputError(f"{source}: use_sliding_window takes true or false, not {reprlib.repr(used)}.")
    if kinds is not None and not (
        isinstance(kinds, list) and len(kinds) == layers and all(kind in (_SLIDING, _FULL) for kind in kinds)
    ):
        raise InputError(
            f"{source}: layer_types takes {_FULL!r} or {_SLIDING!r} for each of {layers} layers, not "
            f"{reprlib.repr(kinds)}."
        )
    if raw.get("sliding_window") is None or not used:
        if kinds and _SLIDING in kinds:
            raise InputError(f"{source}: layer_types has {_SLIDING!r}, but no sliding_window is set.")
        return {"no_rope": no_rope}
    if kinds is not None:
        slides = [kind == _SLIDING for kind in kinds]
    elif "no_rope_layers" in raw:
        slides = [layer in no_rope for layer in range(layers)]
    elif "sliding_window_pattern" in raw:
        pattern = _whole(raw, "sliding_window_pattern", source)
        slides = [(layer + 1) % pattern != 0 for layer in range(layers)]
    else:
        first = _number(raw, "max_window_layers", source, 0, MOST["layers"], 0)
        slides = [layer >= first for layer in range(layers)]
    return {"no_rope": no_rope, "windows": _windows(slides, _whole(raw, "sliding_window", source))}


def _hf_no_rope(raw: Mapping[str, Any], layers: int, source: str) -> tuple[int, ...]:
    """The layers without rotary positions: those with a 0, or every so many layers one."""
    if "no_rope_layers" not in raw:
        return ()
    interval, rotary = _whole(raw, "no_rope_layer_interval", source), raw["no_rope_layers"]
    if rotary is None:
        return tuple(range(interval - 1, layers, interval))
    if not isinstance(rotary, list) or len(rotary) < layers or not all(item in (0, 1) for item in rotary):
        raise InputError(f"{source}: no_rope_layers takes 0 or 1 for each layer, not {reprlib.repr(rotary)}.")
    return tuple(layer for layer in range(layers) if not rotary[layer])


def _windows(slides: Iterable[Any], window: int) -> tuple[int | None, ...] | None:
    windows = tuple(window if sliding else None for sliding in slides)
    return windows if any(windows) else None


def _whole(raw: Mapping[str, Any], key: str, name: str) -> int:
    if type(value := raw[key]) is not int or not 1 <= value <= MOST["context_length"]:
        name = name if name.endswith(".") else f"{name}: "
        raise InputError(f"{name}{key} takes a whole number from 1, not {reprlib.repr(value)}.")
    return value


def _hf_scales(raw: Mapping[str, Any], hidden: int, source: str) -> dict[str, Any]:
    """The fields that Gemma's scales and caps set."""
    read: dict[str, Any] = {}
    for key, name in (("attn_logit_softcapping", "attention_softcap"), ("final_logit_softcapping", "logits_softcap")):
        if raw.get(key) is not None:
            read[name] = _check(name, raw[key], f"{source}: {key}")
    if raw.get("query_pre_attn_scalar") is not None:
        read["attention_scale"] = _number(raw, "query_pre_attn_scalar", source, 1e-3, 1e6) ** -0.5
        read["embedding_scale"] = hidden**0.5
    return read


def _hf_ropes(raw: Mapping[str, Any], shape: Mapping[str, Any], variant: _Variant, source: str) -> dict[str, Any]:
    """The rope fields; Gemma 3 has two kinds of layers, whose settings transformers 5 writes by the layers' kind."""
    if not variant.rope_kinds:
        return {"rope_base": 10000.0, "rope_divisors": None}
    if "rope_local_base_freq" not in raw:
        return _hf_rope(raw, shape, source, variant.rope_kinds)
    by_kind = raw.get("rope_parameters")
    if not isinstance(by_kind, dict) or not by_kind.keys() & {_SLIDING, _FULL}:
        base = _check("local_rope_base", raw["rope_local_base_freq"], f"{source}: rope_local_base_freq")
        return _hf_rope(raw, shape, source, variant.rope_kinds) | {"local_rope_base": base}
    if surplus := by_kind.keys() - {_SLIDING, _FULL}:
        raise InputError(f"{source}: rope_parameters has no place for {_list(sorted(surplus))}.")
    ropes = {}
    for kind, base in ((_FULL, shape["rope_base"]), (_SLIDING, raw["rope_local_base_freq"])):
        kinds = variant.rope_kinds if kind == _FULL else ("default",)
        own = {**raw, "rope_parameters": by_kind.get(kind), "rope_scaling": None}
        ropes[kind] = _hf_rope(own, {**shape, "rope_base": base}, f"{source}: {kind}", kinds)
    return ropes[_FULL] | {"local_rope_base": ropes[_SLIDING]["rope_base"]}


def _hf_rope(raw: Mapping[str, Any], shape: Mapping[str, Any], source: str, kinds: Collection[str]) -> dict[str, Any]:
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
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(f"{name}: rope_type {reprlib.repr(kind)} is not supported; jquant knows {_list(kinds)}.")
    base = _check("rope_base", rope.get("rope_theta", shape.get("rope_base", 10000.0)), f"{name}: rope_theta")
    if "rotary_dim" not in shape:
        _refuse_variants(rope, {"partial_rotary_factor": (1.0,)}, name, str(raw["model_type"]))
    idle = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
    if surplus := rope.keys() - idle - _ROPE_KINDS[kind]:
        raise InputError(f"{name}: rope_type {kind!r} does not take {_list(sorted(surplus))}.")
    context = raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    rope["original_max_position_embeddings"] = context or shape["context_length"]
    divisors, magnitude = _scaling(kind, rope, base, shape.get("rotary_dim", shape["head_dim"]), name)
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


def _refuse_variants(values: Mapping[str, Any], fixed: Mapping[str, Collection[Any]], source: str, family: str) -> None:
    """Raises InputError for a key that asks for a variant which jquant's decoder does not have."""
    for key, allowed in fixed.items():
        value = values.get(key)
        if value is None or (type(value) in (bool, int, float, str) and value in allowed):
            continue
        other = f"only {_list(allowed)}" if allowed else "only models without it"
        raise InputError(f"{source}: {key} is {reprlib.repr(value)}; jquant's {family} decoder knows {other}.")


def _warn(unknown: Iterable[str], source: str) -> None:
    if names := sorted(unknown):
        some = ", ".join(name[:40] for name in names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        log.warning("%s has keys that jquant does not know and leaves out: %s", source, some)


def _list(values: Iterable[Any]) -> str:
    return ", ".join(map(repr, values))


# ---- GGUF -----------------------------------------------------------------------------------------------------------

# Keys without the architecture, which they begin with.
_GGUF = {
    "vocab_size": "vocab_size",
    "embedding_length": "hidden",
    "feed_forward_length": "ffn",
    "block_count": "layers",
    "attention.head_count": "heads",
    "attention.head_count_kv": "kv_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "context_length": "context_length",
    "rope.freq_base": "rope_base",
}
_GGUF_LAYER_NORM = {"attention.layer_norm_epsilon" if name == "norm_eps" else key: name for key, name in _GGUF.items()}
_GGUF_GENERAL: dict[str, tuple[Any, ...]] = {"general.type": ("model",), "split.count": (0, 1)}
_GGUF_FIXED: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "tensor_data_layout": ("Meta AI original pth",),  # llama.cpp always interleaves rotary rows so
    "use_parallel_residual": (False,),
}
_GGUF_ROPE = {  # key -> Hugging Face's name
    "rope.scaling.factor": "factor",
    "rope.scale_linear": "factor",  # in files of 2023
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
_GGUF_READ = {
    *_GGUF,
    *_GGUF_FIXED,
    *_GGUF_ROPE,
    "attention.scale",
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.finetuned",  # says how the model was made
}
# Layers of the models (Gemma 2 and 3 of 27B) whose queries llama.cpp scales by 1/√(hidden / heads); no key says so.
_GGUF_SCALED = {"gemma2": 46, "gemma3_text": 62}


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
    architecture = _known(header.get("general.architecture"), GGUF_FAMILIES, f"{source}: general.architecture")
    family, prefix = GGUF_FAMILIES[architecture], f"{architecture}."
    variant = _VARIANTS[family]
    keys = _GGUF_LAYER_NORM if variant.fields.get("norm") == "layer" else _GGUF
    fixed = {prefix + key: allowed for key, allowed in _GGUF_FIXED.items() if key not in variant.gguf}
    _refuse_variants(header, {**fixed, **_GGUF_GENERAL}, source, family)
    own = {key.removeprefix(prefix): value for key, value in header.items() if key.startswith(prefix)}
    _warn((prefix + key for key in own.keys() - _GGUF_READ - keys.keys() - variant.gguf.keys()), source)
    read = {name: _check(name, own[key], f"{source}: {prefix}{key}") for key, name in keys.items() if key in own}
    if "vocab_size" not in read and isinstance(header.get("tokenizer.ggml.tokens"), list):
        read["vocab_size"] = len(header["tokenizer.ggml.tokens"])
    for key, name in keys.items():
        if name not in read and name not in ("kv_heads", "head_dim", "rope_base"):
            raise InputError(f"{source} lacks the GGUF key {prefix + key!r}.")
    if "head_dim" not in read and read["hidden"] % read["heads"]:
        raise InputError(f"{source}: {read['hidden']} channels are no multiple of {read['heads']} attention heads.")
    settled = {"kv_heads": read["heads"], "head_dim": read["hidden"] // read["heads"], "rope_base": 10000.0} | read
    width = settled["head_dim"]
    for key in sorted({"attention.value_length", "rope.dimension_count"} - variant.gguf.keys()):
        value = own.get(key, width)
        if type(value) is not int or value != width:
            raise InputError(
                f"{source}: {prefix}{key} is {reprlib.repr(value)}; jquant takes the head's width, {width}."
            )
    scale = own.get("attention.scale", 0)
    if scale != 0 and not (isinstance(scale, float) and math.isclose(scale, width**-0.5, rel_tol=1e-5)):
        raise InputError(f"{source}: {prefix}attention.scale is {reprlib.repr(scale)}; jquant takes 1/√{width}.")
    special = _gguf_special({**variant.gguf, **own}, settled, family, f"{source}: {prefix}")
    turned = special.get("rotary_dim", width)
    divisors, magnitude = _gguf_rope(own, {**settled, "head_dim": turned}, f"{source}: {prefix}")
    if rope_divisors is not None and len(rope_divisors) != turned // 2:
        raise InputError(f"{source}: rope_freqs.weight has {len(rope_divisors)} values, not {turned // 2}.")
    if divisors and rope_divisors:
        divisors = tuple(map(math.prod, zip(divisors, rope_divisors, strict=True)))
    ropes = {"rope_divisors": divisors or rope_divisors, "rope_magnitude": magnitude}
    return _settled(settled, ropes, special, variant.fields, variant.gguf_fields, {"tied": tied, "family": family})


def _gguf_special(own: Mapping[str, Any], shape: Mapping[str, Any], family: str, name: str) -> dict[str, Any]:
    """The fields beyond Llama's; `own` has the family's defaults, and 0 in it stands for none."""
    read: dict[str, Any] = {}
    layers, variant = shape["layers"], _VARIANTS[family]
    unset = lambda key: type(own[key]) in (int, float) and own[key] == 0  # noqa: E731
    takes = {"attn_logit_softcapping": "attention_softcap", "final_logit_softcapping": "logits_softcap"}
    for key, to in (takes | {"rope.freq_base_swa": "local_rope_base"}).items():
        if key in variant.gguf and not unset(key):
            read[to] = _check(to, own[key], name + key)
    if "no_rope_layer_interval" in variant.gguf:
        interval = variant.gguf["no_rope_layer_interval"]
        read["no_rope"] = tuple(range(interval - 1, layers, interval))
    if "attention.sliding_window" in variant.gguf and not unset("attention.sliding_window"):
        window, key = _whole(own, "attention.sliding_window", name), "attention.sliding_window_pattern"
        pattern = own.get(key, 0)
        if type(pattern) is int and pattern >= 0:  # every so many layers one sees all; 0: none does
            slides = [not pattern or (layer + 1) % pattern != 0 for layer in range(layers)]
        elif isinstance(pattern, np.ndarray) and pattern.shape == (layers,):
            slides = pattern.tolist()
        else:
            raise InputError(
                f"{name}{key} takes a number, or one value for each of {layers} layers, not {reprlib.repr(pattern)}."
            )
        read["windows"] = _windows(slides, window)
    if "use_parallel_residual" in variant.gguf:
        key = "use_parallel_residual"
        read["parallel_residual"] = _check("parallel_residual", own[key], name + key)
    if own.get("rope.dimension_count") and "rope.dimension_count" in variant.gguf:
        turned = _check("rotary_dim", own["rope.dimension_count"], f"{name}rope.dimension_count")
        read |= {} if turned == shape["head_dim"] else {"rotary_dim": turned}
    if not variant.rope_kinds:
        read["no_rope"] = tuple(range(layers))
    if variant.fields.get("post_norms"):
        read["embedding_scale"] = shape["hidden"] ** 0.5
        if layers == _GGUF_SCALED[family]:
            read["attention_scale"] = (shape["hidden"] / shape["heads"]) ** -0.5
    return read


def _gguf_rope(own: Mapping[str, Any], shape: Mapping[str, Any], name: str) -> tuple[tuple[float, ...] | None, float]:
    """Divisors and magnitude. As in llama.cpp, a factor without a type is linear scaling, and a factor of 0 none."""
    rope = {ours: own[key] for key, ours in _GGUF_ROPE.items() if own.get(key) not in (None, 0)}
    kind = own.get("rope.scaling.type", "linear")
    if kind == "none" or (kind == "linear" and "factor" not in rope):
        return None, 1.0
    if kind not in ("linear", "yarn"):
        raise InputError(
            f"{name}rope.scaling.type {reprlib.repr(kind)} is not supported; jquant knows none, linear, yarn."
        )
    rope.setdefault("original_max_position_embeddings", shape["context_length"])
    return _scaling(kind, rope, shape["rope_base"], shape["head_dim"], f"{name}rope.scaling")
