"""Model families: tensor names in files, and the sites in a block where weights are quantized.

All that an algorithm must know of a family is declared here: which projections read one input, which parameter produces
that input (and can absorb a channel scale), and which token weights suit each projection. What the decoder computes
follows from `DecoderConfig`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from jquant.errors import InputError
from jquant.models.config import DecoderConfig


@dataclass(frozen=True)
class Site:
    """A distinct input within a block.

    Attributes:
      tap: its name among the block's taps.
      weights: the projections that read it, as paths into the block's parameters.
      producer: the parameter whose last axis makes its channels: a norm's gain, or a projection's kernel.
      token_weights: projection -> the tap `[b, t]` that weights tokens in its Gram matrix. Later tokens read k and v in
        proportion to the attention that these receive.
    """

    tap: str
    weights: tuple[str, ...]
    producer: str
    token_weights: tuple[tuple[str, str], ...] = ()


K, V = "attention.k.kernel", "attention.v.kernel"
SITES = (
    Site(
        "attention_input",
        ("attention.q.kernel", K, V),
        "attention_norm.scale",
        ((K, "attention_mass"), (V, "attention_mass")),
    ),
    Site("attention_output", ("attention.o.kernel",), V),
    Site("mlp_input", ("mlp.gate.kernel", "mlp.up.kernel"), "mlp_norm.scale"),
    Site("mlp_output", ("mlp.down.kernel",), "mlp.up.kernel"),
)
_UNGATED_SITES = tuple(replace(site, weights=("mlp.up.kernel",)) if site.tap == "mlp_input" else site for site in SITES)


@dataclass(frozen=True)
class Family:
    """A block's sites, and names in the decoder -> names in files.

    Parameters with one name in a file are one tensor there (`fused_with`, `columns`).

    Attributes:
      hf: names in Hugging Face's files; `{}` stands for the layer. Both formats store kernels `[out, in]`.
      gguf: names in GGUF files.
      hf_norm_offset: what is added to a norm's values in Hugging Face's files to get its gain. Gemma's files hold w for
        a gain of 1 + w; an exporter must subtract the offset. GGUF files hold gains.
      hf_prefix: what all names but the head's begin with in transformers' files, and in some files don't.
      hf_buffers: how names end that are no parameters, such as causal masks.
      hf_turned: whether Hugging Face's files hold the blocks' kernels `[in, out]` (GPT-2's Conv1D).
      hf_by_head: whether fused q, k and v follow one another within each head.
      gguf_interleaved: whether GGUF files hold the rows (2i, 2i + 1) of q and k where Hugging Face's hold (i, i + d/2).
      sites: in the order in which a block computes them. Sites whose producer is a norm's gain read the residual
        stream.
      writers: the projections whose outputs are added to the residual stream, through a norm in families with
        `DecoderConfig.post_norms`.
    """

    hf: dict[str, str]
    gguf: dict[str, str]
    hf_norm_offset: float = 0.0
    hf_prefix: str = ""
    hf_buffers: tuple[str, ...] = ()
    hf_turned: bool = False
    hf_by_head: bool = False
    gguf_interleaved: bool = False
    sites: tuple[Site, ...] = SITES
    writers: tuple[str, ...] = ("attention.o.kernel", "mlp.down.kernel")

    def fused_with(self, format: str, name: str) -> tuple[str, ...]:
        """The parameters that share a tensor of a file with this one, itself among them, in their order there."""
        names = getattr(self, format)
        return tuple(other for other in names if names[other] == names[name])

    def columns(
        self, format: str, name: str, widths: Mapping[str, int], head_dim: int
    ) -> slice | Int[np.ndarray, " out"]:
        """A parameter's outputs among those of its tensor; `widths` has the outputs of each of `fused_with`."""
        fused = tuple(widths)
        if format == "hf" and self.hf_by_head and len(fused) > 1:
            own = np.arange(widths[name])
            return own + (own // head_dim * (len(fused) - 1) + fused.index(name)) * head_dim
        begin = sum(widths[other] for other in fused[: fused.index(name)])
        return slice(begin, begin + widths[name])

    @property
    def weights(self) -> tuple[str, ...]:
        """The projections of a block, in the order in which it computes them."""
        return tuple(path for site in self.sites for path in site.weights)

    def site(self, tap: str) -> Site:
        """The site of a tap."""
        return next(site for site in self.sites if site.tap == tap)


_HF = {
    "embedding": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "head.kernel": "lm_head.weight",
    "layers.attention_norm.scale": "model.layers.{}.input_layernorm.weight",
    "layers.attention.q.kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers.attention.k.kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers.attention.v.kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers.attention.o.kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers.mlp_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers.mlp.gate.kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers.mlp.up.kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers.mlp.down.kernel": "model.layers.{}.mlp.down_proj.weight",
}
_GGUF = {
    "embedding": "token_embd.weight",
    "norm.scale": "output_norm.weight",
    "head.kernel": "output.weight",
    "layers.attention_norm.scale": "blk.{}.attn_norm.weight",
    "layers.attention.q.kernel": "blk.{}.attn_q.weight",
    "layers.attention.k.kernel": "blk.{}.attn_k.weight",
    "layers.attention.v.kernel": "blk.{}.attn_v.weight",
    "layers.attention.o.kernel": "blk.{}.attn_output.weight",
    "layers.mlp_norm.scale": "blk.{}.ffn_norm.weight",
    "layers.mlp.gate.kernel": "blk.{}.ffn_gate.weight",
    "layers.mlp.up.kernel": "blk.{}.ffn_up.weight",
    "layers.mlp.down.kernel": "blk.{}.ffn_down.weight",
}
_HF_BIASES = {
    "layers.attention.q.bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers.attention.k.bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers.attention.v.bias": "model.layers.{}.self_attn.v_proj.bias",
}
_GGUF_BIASES = {
    "layers.attention.q.bias": "blk.{}.attn_q.bias",
    "layers.attention.k.bias": "blk.{}.attn_k.bias",
    "layers.attention.v.bias": "blk.{}.attn_v.bias",
}
_HF_QK_NORMS = {
    "layers.attention.q_norm.scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers.attention.k_norm.scale": "model.layers.{}.self_attn.k_norm.weight",
}
_GGUF_QK_NORMS = {
    "layers.attention.q_norm.scale": "blk.{}.attn_q_norm.weight",
    "layers.attention.k_norm.scale": "blk.{}.attn_k_norm.weight",
}
# Gemma's names: post_attention_layernorm is the norm before the MLP in Llama, and after attention here.
_HF_POST_NORMS = {
    "layers.attention_post_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers.mlp_norm.scale": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers.mlp_post_norm.scale": "model.layers.{}.post_feedforward_layernorm.weight",
}
_GGUF_POST_NORMS = {
    "layers.attention_post_norm.scale": "blk.{}.post_attention_norm.weight",
    "layers.mlp_post_norm.scale": "blk.{}.post_ffw_norm.weight",
}
_HF_FUSED = dict.fromkeys(
    ("layers.attention.q.kernel", "layers.attention.k.kernel", "layers.attention.v.kernel"),
    "model.layers.{}.self_attn.qkv_proj.weight",
) | dict.fromkeys(("layers.mlp.gate.kernel", "layers.mlp.up.kernel"), "model.layers.{}.mlp.gate_up_proj.weight")
_GGUF_FUSED = dict.fromkeys(
    ("layers.attention.q.kernel", "layers.attention.k.kernel", "layers.attention.v.kernel"),
    "blk.{}.attn_qkv.weight",
) | dict.fromkeys(("layers.mlp.gate.kernel", "layers.mlp.up.kernel"), "blk.{}.ffn_up.weight")


def _both(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    """Names of a block's kernels and gains, and of the bias beside each."""
    weights = {f"layers.{path}": f"{prefix}{name}.weight" for path, name in names.items()}
    return weights | {f"layers.{bias_of(path)}": f"{prefix}{name}.bias" for path, name in names.items()}


def bias_of(path: str) -> str:
    """The path of the bias beside a kernel or a gain, whether the block has one or not."""
    return f"{path.rpartition('.')[0]}.bias"


_HF_GPT2 = {
    "embedding": "transformer.wte.weight",
    "positions": "transformer.wpe.weight",
    "norm.scale": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "head.kernel": "lm_head.weight",
} | _both(
    "transformer.h.{}.",
    {
        "attention_norm.scale": "ln_1",
        "attention.q.kernel": "attn.c_attn",
        "attention.k.kernel": "attn.c_attn",
        "attention.v.kernel": "attn.c_attn",
        "attention.o.kernel": "attn.c_proj",
        "mlp_norm.scale": "ln_2",
        "mlp.up.kernel": "mlp.c_fc",
        "mlp.down.kernel": "mlp.c_proj",
    },
)
_HF_OPT = {
    "embedding": "model.decoder.embed_tokens.weight",
    "positions": "model.decoder.embed_positions.weight",
    "norm.scale": "model.decoder.final_layer_norm.weight",
    "norm.bias": "model.decoder.final_layer_norm.bias",
    "head.kernel": "lm_head.weight",
} | _both(
    "model.decoder.layers.{}.",
    {
        "attention_norm.scale": "self_attn_layer_norm",
        "attention.q.kernel": "self_attn.q_proj",
        "attention.k.kernel": "self_attn.k_proj",
        "attention.v.kernel": "self_attn.v_proj",
        "attention.o.kernel": "self_attn.out_proj",
        "mlp_norm.scale": "final_layer_norm",
        "mlp.up.kernel": "fc1",
        "mlp.down.kernel": "fc2",
    },
)
_HF_NEOX = {
    "embedding": "gpt_neox.embed_in.weight",
    "norm.scale": "gpt_neox.final_layer_norm.weight",
    "norm.bias": "gpt_neox.final_layer_norm.bias",
    "head.kernel": "embed_out.weight",
} | _both(
    "gpt_neox.layers.{}.",
    {
        "attention_norm.scale": "input_layernorm",
        "attention.q.kernel": "attention.query_key_value",
        "attention.k.kernel": "attention.query_key_value",
        "attention.v.kernel": "attention.query_key_value",
        "attention.o.kernel": "attention.dense",
        "mlp_norm.scale": "post_attention_layernorm",
        "mlp.up.kernel": "mlp.dense_h_to_4h",
        "mlp.down.kernel": "mlp.dense_4h_to_h",
    },
)
_GGUF_NEOX = {
    "embedding": "token_embd.weight",
    "norm.scale": "output_norm.weight",
    "norm.bias": "output_norm.bias",
    "head.kernel": "output.weight",
} | _both(
    "blk.{}.",
    {
        "attention_norm.scale": "attn_norm",
        "attention.q.kernel": "attn_qkv",
        "attention.k.kernel": "attn_qkv",
        "attention.v.kernel": "attn_qkv",
        "attention.o.kernel": "attn_output",
        "mlp_norm.scale": "ffn_norm",
        "mlp.up.kernel": "ffn_up",
        "mlp.down.kernel": "ffn_down",
    },
)

# llama.cpp's converter interleaves the rotary rows of Llama and of the models that it converts as Llama.
LLAMA = Family(_HF, _GGUF, gguf_interleaved=True)
GEMMA2 = Family(_HF | _HF_POST_NORMS, _GGUF | _GGUF_POST_NORMS, hf_norm_offset=1.0)
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "smollm3": LLAMA,
    "qwen2": Family(_HF | _HF_BIASES, _GGUF | _GGUF_BIASES),
    "qwen3": Family(_HF | _HF_QK_NORMS, _GGUF | _GGUF_QK_NORMS),
    "gemma2": GEMMA2,
    "gemma3_text": replace(GEMMA2, hf=GEMMA2.hf | _HF_QK_NORMS, gguf=GEMMA2.gguf | _GGUF_QK_NORMS),
    "phi3": Family(_HF | _HF_FUSED, _GGUF | _GGUF_FUSED),
    "gpt2": Family(
        _HF_GPT2,
        _GGUF_NEOX | {"positions": "position_embd.weight"},
        hf_prefix="transformer.",
        hf_buffers=(".attn.bias", ".attn.masked_bias"),
        hf_turned=True,
        sites=_UNGATED_SITES,
    ),
    "opt": Family(_HF_OPT, {}, hf_prefix="model.", sites=_UNGATED_SITES),
    "gpt_neox": Family(
        _HF_NEOX,
        _GGUF_NEOX,
        hf_prefix="gpt_neox.",
        hf_buffers=(".attention.bias", ".attention.masked_bias"),
        hf_by_head=True,
        sites=_UNGATED_SITES,
    ),
}


def family_of(config: DecoderConfig) -> Family:
    """The family that a decoder's configuration names.

    Raises:
      InputError: there is no family of that name.
    """
    if config.family not in FAMILIES:
        raise InputError(f"There is no model family {config.family!r}; there are {', '.join(FAMILIES)}.")
    return FAMILIES[config.family]


def features_of(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a block's projections, by path."""
    hidden, ffn = config.hidden, config.ffn
    heads, kv_heads = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        "attention.q.kernel": (hidden, heads),
        K: (hidden, kv_heads),
        V: (hidden, kv_heads),
        "attention.o.kernel": (heads, hidden),
        "mlp.gate.kernel": (hidden, ffn),
        "mlp.up.kernel": (hidden, ffn),
        "mlp.down.kernel": (ffn, hidden),
    }


def absorbs(site: Site, config: DecoderConfig) -> bool:
    """Whether the producer can absorb positive scales of a site's channels.

    f(x / s) = f(x) / s holds for the product with a gate and for ReLU, and for no other activation.
    """
    return site.tap != "mlp_output" or config.gated or config.activation == "relu"


def shared_channels(site: Site, config: DecoderConfig) -> tuple[int, ...] | None:
    """The producer's channel behind each channel of a site; None if they are the same.

    With grouped queries, the heads that share a key/value head read the same channels of v.
    """
    if site.producer != V:
        return None
    per_kv = config.heads // config.kv_heads
    return tuple((head // per_kv) * config.head_dim + i for head in range(config.heads) for i in range(config.head_dim))
