"""GGUF blocks become QTensors and come back bit for bit, and stand for the weights that the gguf package reads."""

from dataclasses import replace

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.errors import InputError
from jquant.formats import GGUF
from jquant.io.gguf.blocks import LAYOUTS, block_size, from_blocks, to_blocks
from jquant.qtensor import bits_per_weight, dequantize

KINDS = list(GGUF)
NAN_HALF = np.array([0xFE, 0x7D], np.uint8)  # not the canonical NaN


def gguf_type(kind: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[kind]


def random_rows(kind: str, rows: int = 96, blocks: int = 3) -> tuple[np.ndarray, int]:
    """Blocks of random bytes, every twelfth with NaN for a scale, and the weights in a row."""
    weights, size = block_size(kind)
    raw = np.random.default_rng(KINDS.index(kind)).integers(0, 256, (rows * blocks, size), dtype=np.uint8)
    start = list(LAYOUTS[kind]).index("d")
    at = sum(list(LAYOUTS[kind].values())[:start])
    raw[::12, at : at + 2] = NAN_HALF
    return raw.reshape(rows, -1), blocks * weights


@pytest.mark.parametrize("kind", KINDS)
def test_any_bytes_survive_the_round_trip(kind):
    raw, n = random_rows(kind)
    np.testing.assert_array_equal(to_blocks(from_blocks(raw, kind, n), kind), raw)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the gguf package multiplies infinities by zero
@pytest.mark.parametrize("kind", KINDS)
def test_decodes_any_bytes_as_the_gguf_package_does(kind):
    raw, n = random_rows(kind)
    theirs = gguf.dequantize(raw, gguf_type(kind))
    ours = np.asarray(dequantize(from_blocks(raw, kind, n))).T
    nan = np.isnan(theirs)
    assert 0 < nan.mean() < 0.5
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours.view(np.uint32)[~nan], theirs.view(np.uint32)[~nan])


@pytest.mark.parametrize("kind", KINDS)
def test_memory_holds_the_files_bytes_and_no_more(kind):
    assert block_size(kind) == gguf.GGML_QUANT_SIZES[gguf_type(kind)]
    raw, n = random_rows(kind)
    assert bits_per_weight(from_blocks(raw, kind, n)) == 8 * raw.nbytes / (len(raw) * n)


def test_the_default_models_tensors_survive_the_round_trip(default_gguf):
    kinds = set()
    for tensor in gguf.GGUFReader(default_gguf).tensors:
        if tensor.name in ("token_embd.weight", "blk.11.ffn_down.weight"):
            kind, raw = tensor.tensor_type.name, np.array(tensor.data[:64])
            q = from_blocks(raw, kind, int(tensor.shape[0]))
            np.testing.assert_array_equal(to_blocks(q, kind), raw)
            np.testing.assert_array_equal(dequantize(q).T, gguf.dequantize(raw, tensor.tensor_type))
            kinds.add(kind)
    assert kinds == {"Q8_0", "Q4_1"}


@pytest.mark.parametrize(
    ("kind", "cut", "in_features", "said"),
    [
        ("Q9_9", 0, 64, "Q9_9"),
        ("Q4_0", 1, 96, "53 bytes are no Q4_0 row of 96"),
        ("Q4_0", 0, 64, "54 bytes are no Q4_0 row of 64"),
        ("Q4_K", 0, 767, "Q4_K row of 767"),
    ],
)
def test_rows_that_are_no_blocks_are_refused(kind, cut, in_features, said):
    raw, _ = random_rows(kind if kind in GGUF else "Q4_0")
    with pytest.raises(InputError, match=said):
        from_blocks(raw[:, : raw.shape[1] - cut], kind, in_features)


def test_a_weight_in_another_format_or_with_a_part_of_a_block_is_refused():
    q = from_blocks(*(random_rows("Q4_0")[0], "Q4_0", 96))
    with pytest.raises(InputError, match="Q5_0 takes a matrix in its own format"):
        to_blocks(q, "Q5_0")
    with pytest.raises(InputError, match="multiple of 32 inputs"):
        to_blocks(replace(q, in_features=95), "Q4_0")
    stacked = replace(q, codes=jnp.stack([q.codes] * 2), scale=jnp.stack([q.scale] * 2))
    with pytest.raises(InputError, match="takes a matrix"):
        to_blocks(stacked, "Q4_0")
