"""Model families: tensor names in files, and the sites in a block where weights are quantized.

All that an algorithm must know of a family is declared here: which projections read one input, which parameter produces
that input (and can absorb a channel scale), and which token weights suit each projection.
"""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Family:
    """A block's sites, and names in the decoder -> names in files.

    Attributes:
      sites: in the order in which a block computes them. Sites whose producer is a norm's gain read the residual
        stream.
      writers: the projections whose outputs are added to the residual stream.
      hf: names in Hugging Face's files; `{}` stands for the layer. Both formats store kernels `[out, in]`.
      gguf: names in GGUF files.
    """

    sites: tuple[Site, ...]
    writers: tuple[str, ...]
    hf: dict[str, str]
    gguf: dict[str, str]

    @property
    def weights(self) -> tuple[str, ...]:
        """The projections of a block, in the order in which it computes them."""
        return tuple(path for site in self.sites for path in site.weights)

    def site(self, tap: str) -> Site:
        """The site of a tap."""
        return next(site for site in self.sites if site.tap == tap)


K, V = "attention.k.kernel", "attention.v.kernel"

LLAMA = Family(
    sites=(
        Site(
            "attention_input",
            ("attention.q.kernel", K, V),
            "attention_norm.scale",
            ((K, "attention_mass"), (V, "attention_mass")),
        ),
        Site("attention_output", ("attention.o.kernel",), V),
        Site("mlp_input", ("mlp.gate.kernel", "mlp.up.kernel"), "mlp_norm.scale"),
        Site("mlp_output", ("mlp.down.kernel",), "mlp.up.kernel"),
    ),
    writers=("attention.o.kernel", "mlp.down.kernel"),
    hf={
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
    },
    gguf={
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
    },
)


FAMILIES = {"llama": LLAMA}


def family_of(config: DecoderConfig) -> Family:
    """The family that a decoder's configuration names.

    Raises:
      InputError: there is no family of that name.
    """
    if config.family not in FAMILIES:
        raise InputError(f"There is no model family {config.family!r}; there are {', '.join(FAMILIES)}.")
    return FAMILIES[config.family]


def shared_channels(site: Site, config: DecoderConfig) -> tuple[int, ...] | None:
    """The producer's channel behind each channel of a site; None if they are the same.

    With grouped queries, the heads that share a key/value head read the same channels of v.
    """
    if site.producer != V:
        return None
    per_kv = config.heads // config.kv_heads
    return tuple((head // per_kv) * config.head_dim + i for head in range(config.heads) for i in range(config.head_dim))
