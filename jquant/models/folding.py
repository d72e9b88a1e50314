"""Exact rewrites of a whole decoder before it is quantized: rotations, and permutations of the MLP's channels.

RMSNorm without gain commutes with an orthogonal matrix. So a network with rotated residual stream, value heads and MLP
activations gives the same outputs, and its weights and activations have no outliers (QuaRot, arXiv 2404.00456, §4;
SpinQuant, arXiv 2405.16406, Fig. 1, R1, R2 and R4). The rotated decoder can be quantized by any method.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from jquant.errors import InputError
from jquant.models.adapters import Adapted
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Block, Decoder
from jquant.models.families import Family, bias_of, family_of
from jquant.models.params import flat_params, to_state, weight_name
from jquant.qtensor import QTensor
from jquant.rotations import Kind, Rotation, apply

Stack = dict[str, Array]  # "attention.q.kernel" -> a parameter of one layer, or of several, stacked


def rotate(
    decoder: Decoder,
    residual: bool = True,
    heads: bool = True,
    mlp: bool = True,
    seed: int | None = 0,
    kind: Kind = "hadamard",
) -> Decoder:
    """A decoder with the same logits and rotated weights and activations; computed in float32.

    Args:
      decoder: float; left untouched. Embedding, head and last norm are shared with it and stay tied.
      residual: fold the gains of the blocks' norms into the projections that read them, and rotate the residual stream.
        The model then runs one fast transform after the embedding and one before the last norm.
      heads: rotate each value head's channels and the rows of `o` that read them; free when the model runs.
      mlp: rotate the input of `down`, by a fast transform when the model runs. A transform that scales those channels
        (AWQ, SmoothQuant) can then not be folded into `up`.
      seed: of the rotations' random signs; None for no signs.
      kind: see `Rotation`.

    Raises:
      InputError: a block's weight is quantized; the residual stream or the MLP is rotated already; what `rotations`
        finds.
    """
    _check_float(decoder, "rotate")
    if residual and decoder.norm.rotation is not None:
        raise InputError("The decoder's residual stream is rotated already: rotate the original model.")
    if mlp and any(segment.mlp.rotation is not None for segment in decoder.segments):
        raise InputError("The decoder's MLP is rotated already: rotate the original model.")
    turns = rotations(decoder.config, residual, heads, mlp, seed, kind)
    rotated = rotate_outside(decoder, turns)
    for segment in rotated.segments:
        _rotate_segment(segment, turns)
    return rotated


class Rotated:
    """A source of blocks (`pipeline.driver.Source`), each rotated as it is read; `turns` come from `rotations`."""

    def __init__(self, source: Any, turns: Mapping[str, Rotation]):
        self.source, self.turns = source, turns

    @property
    def config(self) -> DecoderConfig:
        """The decoder's shape."""
        return self.source.config

    def outside(self) -> Decoder:
        """The decoder without its blocks."""
        return rotate_outside(self.source.outside(), self.turns)

    def blocks(self, first: int = 0) -> Iterator[Block]:
        """Blocks from layer `first` on."""
        for block in self.source.blocks(first):
            yield rotate_block(block, self.turns) if self.turns else block


def rotations(
    config: DecoderConfig,
    residual: bool = True,
    heads: bool = True,
    mlp: bool = True,
    seed: int | None = 0,
    kind: Kind = "hadamard",
) -> dict[str, Rotation]:
    """The rotations of `rotate`, by name: of the "stream", each "head", and the MLP's "inner" channels.

    Raises:
      InputError: a rotation of the residual stream, where norms stand between it and what is added to it, or where
        norms subtract the mean.
    """
    if residual and config.norm == "layer":
        raise InputError(
            f"{config.family} has LayerNorms, which subtract the mean of the channels: a rotation of the residual "
            f"stream is exact for RMSNorm alone, so rotate with residual=False."
        )
    if residual and config.post_norms:
        raise InputError(
            f"{config.family} normalises the outputs of attention and MLP before they enter the residual stream, and "
            f"no rotation folds through the gains of these norms: rotate with residual=False."
        )
    widths = {"stream": (residual, config.hidden), "head": (heads, config.head_dim), "inner": (mlp, config.ffn)}
    return {name: Rotation(width, seed, kind) for name, (turned, width) in widths.items() if turned}


def rotate_outside(decoder: Decoder, turns: Mapping[str, Rotation]) -> Decoder:
    """`rotate` for the decoder outside its blocks."""
    rotated = nnx.clone(decoder)
    rotated.norm.rotation = turns.get("stream", rotated.norm.rotation)
    return rotated


def rotate_block(block: Block, turns: Mapping[str, Rotation]) -> Block:
    """`rotate` for a float block."""
    graph, state = nnx.split(block)
    segment = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[None], state))
    _rotate_segment(segment, turns)
    graph, state = nnx.split(segment)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], state))


def _rotate_segment(segment: Block, turns: Mapping[str, Rotation]) -> None:
    nnx.update(segment, to_state(_rotate_stack(flat_params(segment), segment.attention.config, **turns)))
    segment.mlp.rotation = turns.get("inner", segment.mlp.rotation)


def permute_mlp(decoder: Decoder, order: Int[Array | np.ndarray, "layers ffn"]) -> Decoder:
    """A decoder with the same logits and the MLPs' inner channels in another order.

    Columns of `gate` and `up` and rows of `down` move together, so the groups of `down` hold channels that are adjacent
    in `order` (`transforms.sort_channels` makes one).

    Args:
      decoder: float; left untouched.
      order: per layer, the old channel that comes first, second, …

    Raises:
      InputError: a block's weight is quantized; the MLP is rotated already; a row of `order` is no permutation.
    """
    _check_float(decoder, "permute")
    layers, ffn = decoder.config.layers, decoder.config.ffn
    if order.shape != (layers, ffn):
        raise InputError(f"{layers} layers with {ffn} inner channels cannot take an order of shape {order.shape}.")
    for index, row in enumerate(np.asarray(order)):
        if not np.array_equal(np.sort(row), np.arange(ffn)):
            raise InputError(f"The order of layer {index} is no permutation of its {ffn} inner channels.")
    if any(segment.mlp.rotation is not None for segment in decoder.segments):
        raise InputError("The decoder's MLP is rotated, and rotated channels cannot be permuted: permute first.")
    permuted, first = nnx.clone(decoder), 0
    for segment in permuted.segments:
        stack = flat_params(segment)
        count = jax.tree.leaves(stack)[0].shape[0]
        stack = _permute_stack(stack, jnp.asarray(order[first : first + count]), decoder.config)
        nnx.update(segment, to_state(stack))
        first += count
    return permuted


@partial(jax.jit, static_argnames=("config", "stream", "head", "inner"))
def _rotate_stack(
    stack: Stack,
    config: DecoderConfig,
    stream: Rotation | None = None,
    head: Rotation | None = None,
    inner: Rotation | None = None,
) -> Stack:
    """Layer by layer, so that one layer's float32 copies are alive at a time."""
    family = family_of(config)
    return jax.lax.map(partial(_rotate_layer, family=family, stream=stream, head=head, inner=inner), stack)


def _rotate_layer(
    layer: Stack, family: Family, stream: Rotation | None, head: Rotation | None, inner: Rotation | None
) -> Stack:
    rotated = {path: leaf.astype(jnp.float32) for path, leaf in layer.items()}
    if stream is not None:
        for site in family.sites:
            if site.producer.endswith(".scale"):
                for path in site.weights:
                    rotated[path] = _rotate_rows(rotated[site.producer][:, None] * rotated[path], stream)
                rotated[site.producer] = jnp.ones_like(rotated[site.producer])
        for path in family.writers:
            for written in (path, bias_of(path)):
                if written in rotated:
                    rotated[written] = apply(rotated[written], stream)
    if head is not None:
        site = family.site("attention_output")
        for made in (site.producer, bias_of(site.producer)):
            if made in rotated:
                rotated[made] = _rotate_heads(rotated[made], head)
        for path in site.weights:
            rotated[path] = _rotate_heads(rotated[path].T, head).T
    if inner is not None:
        for path in family.site("mlp_output").weights:
            rotated[path] = _rotate_rows(rotated[path], inner)
    return {path: leaf.astype(layer[path].dtype) for path, leaf in rotated.items()}


def _rotate_rows(w: Float[Array, "in out"], rotation: Rotation) -> Float[Array, "in out"]:
    """Qᵀ w: (x Q)(Qᵀ w) = x w."""
    return apply(w.T, rotation).T


def _rotate_heads(w: Float[Array, "*in out"], rotation: Rotation) -> Float[Array, "*in out"]:
    """Rotates every head's columns by one rotation: query heads that share a value head need the same."""
    return apply(w.reshape(*w.shape[:-1], -1, rotation.size), rotation).reshape(w.shape)


@partial(jax.jit, static_argnames="config")
def _permute_stack(stack: Stack, order: Int[Array, "l ffn"], config: DecoderConfig) -> Stack:
    permuted, family = dict(stack), family_of(config)
    for path in family.site("mlp_input").weights:
        permuted[path] = jnp.take_along_axis(permuted[path], order[:, None, :], -1)
        if (bias := bias_of(path)) in permuted:
            permuted[bias] = jnp.take_along_axis(permuted[bias], order, -1)
    for path in family.site("mlp_output").weights:
        permuted[path] = jnp.take_along_axis(permuted[path], order[:, :, None], -2)
    return permuted


def _check_float(decoder: Decoder, verb: str) -> None:
    first = 0
    for segment in decoder.segments:
        stack = flat_params(segment)
        for path, leaf in stack.items():
            if isinstance(leaf, QTensor | Adapted):
                kind = "quantized" if isinstance(leaf, QTensor) else "adapted"
                raise InputError(f"{weight_name(first, path)} is {kind}: {verb} the float model.")
        first += jax.tree.leaves(stack)[0].shape[0]
