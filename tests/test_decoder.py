"""The decoder against transformers in float32, its attention against the float64 oracle."""

from dataclasses import replace

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
import transformers
from flax import nnx
from test_generation import teacher_forced

import jquant
from jquant.errors import InputError
from jquant.evaluation.generation import generate_ids
from jquant.io.load import load_model
from jquant.models.config import DecoderConfig, llama3_divisors
from jquant.models.decoder import Decoder, attend, blocks, causal_attention, with_blocks
from jquant.models.families import FAMILIES, family_of
from jquant.models.rotary import rotary_table, rotate

forward = jax.jit(lambda decoder, tokens: decoder(tokens))

CONFIG = DecoderConfig(
    vocab_size=64, hidden=32, ffn=48, layers=2, heads=4, kv_heads=2, head_dim=8, norm_eps=1e-5, rope_base=10000.0,
    rope_divisors=None, tied=True, context_length=512,
)  # fmt: skip
SCALING = {k: v for k, v in checkpoints.LLAMA3_ROPE.items() if not k.startswith("rope")}


def token_ids(*shape: int, vocab: int = checkpoints.VOCAB, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, shape, np.int32)


def ours_and_theirs(folder, tokens) -> tuple[np.ndarray, np.ndarray]:
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return np.asarray(forward(load_model(folder).decoder, tokens)), checkpoints.logits(reference, tokens)


# ---- whole models ---------------------------------------------------------------------------------------------------

VARIANTS = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped-query": {},
    "one key/value head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "llama-3 rope": {"rope_parameters": checkpoints.LLAMA3_ROPE},
    "explicit head_dim": {"head_dim": 24},
    "another rope base and epsilon": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "rms_norm_eps": 0.3
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(tmp_path, variant):
    model = checkpoints.llama(**VARIANTS[variant])
    ours, theirs = ours_and_theirs(checkpoints.save(tmp_path, model), token_ids(2, 200))
    assert checkpoints.relative(ours, theirs) <= 1e-4


def test_the_variants_tell_a_wrong_model_apart():
    """Rope scaling, rope base and epsilon matter at the length compared: each alone moves the logits."""
    tokens = token_ids(1, 200)
    plain = checkpoints.logits(checkpoints.llama(), tokens)
    for variant in ("llama-3 rope", "another rope base and epsilon"):
        for changed in VARIANTS[variant].items():
            other = checkpoints.logits(checkpoints.llama(**dict([changed])), tokens)
            assert checkpoints.relative(other, plain) > 0.01, changed
    unscaled = {"rope_type": "default", "rope_theta": checkpoints.LLAMA3_ROPE["rope_theta"]}
    scaled = checkpoints.logits(checkpoints.llama(rope_parameters=checkpoints.LLAMA3_ROPE), tokens)
    assert checkpoints.relative(checkpoints.logits(checkpoints.llama(rope_parameters=unscaled), tokens), scaled) > 0.01


def test_bfloat16_storage_is_read_as_transformers_reads_it(tmp_path):
    folder = checkpoints.save(tmp_path, checkpoints.llama().to(torch.bfloat16))
    model = load_model(folder)
    assert model.stored_as == "safetensors BF16"
    assert model.decoder.embedding.get_value().dtype == jnp.float32
    ours, theirs = ours_and_theirs(folder, token_ids(2, 200))
    assert checkpoints.relative(ours, theirs) <= 1e-4


def test_a_sharded_checkpoint_equals_a_whole_one(tmp_path):
    folder = checkpoints.save(tmp_path, checkpoints.llama(), max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert not (folder / "model.safetensors").exists()
    ours, theirs = ours_and_theirs(folder, token_ids(2, 200))
    assert checkpoints.relative(ours, theirs) <= 1e-4


def test_in_bfloat16_logits_come_within_its_precision(tmp_path):
    folder, tokens = checkpoints.save(tmp_path, checkpoints.llama()), token_ids(2, 200)
    decoder = load_model(folder, dtype="bfloat16").decoder
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(decoder))} == {jnp.dtype("bfloat16")}
    ours, theirs = forward(decoder, tokens), checkpoints.logits(checkpoints.llama(), tokens)
    assert ours.dtype == jnp.bfloat16
    assert checkpoints.relative(np.asarray(ours, np.float32), theirs) < 0.1


@pytest.mark.optimised
def test_the_default_model_equals_transformers(default_gguf, default_model):
    tokens = token_ids(1, 128, vocab=49_152)
    theirs = checkpoints.logits(checkpoints.transformers_gguf(default_gguf), tokens)
    assert checkpoints.relative(np.asarray(forward(default_model.decoder, tokens)), theirs) <= 1e-4


@pytest.mark.optimised
def test_the_default_model_continues_as_transformers_does(default_gguf, default_model):
    prompt = "The capital of France is"
    ids = default_model.tokenizer.encode(prompt)
    ours = list(generate_ids(default_model.decoder, ids, tokens=8))
    assert ours == teacher_forced(default_model, ids, ours).argmax(-1).tolist()
    tokens = torch.as_tensor(ids, dtype=torch.int64)[None]
    theirs = checkpoints.transformers_gguf(default_gguf).generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=8, eos_token_id=None
    )
    assert ours == theirs[0, len(ids) :].tolist()
    assert "".join(jquant.generate(default_model, prompt, tokens=8)) == default_model.tokenizer.decode(ours)


def test_a_later_token_leaves_earlier_logits_unchanged():
    decoder, tokens = Decoder(CONFIG, nnx.Rngs(0)), token_ids(1, 150, vocab=64)
    changed = tokens.copy()
    changed[0, 130] = (changed[0, 130] + 1) % 64
    before, after = np.asarray(forward(decoder, tokens)), np.asarray(forward(decoder, changed))
    np.testing.assert_array_equal(before[:, :130], after[:, :130])
    assert (np.abs(before[:, 130:] - after[:, 130:]).max(-1) > 0).all()


def test_layers_that_differ_in_epsilon_alone_keep_their_own():
    decoder = Decoder(CONFIG, nnx.Rngs(0))
    layers, tokens = list(blocks(decoder)), jnp.asarray(token_ids(1, 16, vocab=64))
    assert len(with_blocks(decoder, layers).segments) == 1
    layers[1].mlp_norm.eps = 0.5
    mixed = with_blocks(decoder, layers)
    assert len(mixed.segments) == 2
    x = decoder.embed(tokens)
    for layer in layers:
        x = layer(x, rotary_table(CONFIG, jnp.arange(16)))[0]
    np.testing.assert_allclose(mixed(tokens), decoder.logits(decoder.norm(x)), atol=1e-6, rtol=1e-5)
    assert np.abs(np.asarray(mixed(tokens)) - np.asarray(decoder(tokens))).max() > 1e-3


def test_an_unknown_family_is_refused_by_its_name():
    assert family_of(CONFIG) is FAMILIES["llama"]
    with pytest.raises(InputError, match="'mamba'; there are llama"):
        family_of(replace(CONFIG, family="mamba"))


def test_the_program_does_not_grow_with_depth():
    def lines(layers: int) -> int:
        config = DecoderConfig(**(vars(CONFIG) | {"layers": layers}))
        decoder = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))
        tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
        return jax.jit(lambda d, t: d.hidden(t)).lower(decoder, tokens).as_text().count("\n")

    assert lines(2) == lines(7)


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [None, SCALING])
def test_rotation_equals_the_oracle(scaling):
    base, head_dim = 1000.0, 16
    divisors = None
    if scaling:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        divisors = llama3_divisors(base, head_dim, *(scaling[name] for name in names))
        assert min(divisors) == 1
        assert max(divisors) == scaling["factor"]
        assert any(1 < d < scaling["factor"] for d in divisors)
    config = DecoderConfig(**(vars(CONFIG) | {"head_dim": head_dim, "rope_base": base, "rope_divisors": divisors}))
    x = np.random.default_rng(1).normal(size=(200, 3, head_dim)).astype(np.float32)
    ours = rotate(jnp.asarray(x).transpose(1, 0, 2)[None], rotary_table(config, jnp.arange(200))[0])
    np.testing.assert_allclose(np.asarray(ours)[0].transpose(1, 0, 2), oracle.rope(x, base, scaling), atol=2e-4, rtol=0)


def qkv(tokens: int, heads: int = 4, kv_heads: int = 2, dim: int = 8) -> list[np.ndarray]:
    rng = np.random.default_rng(tokens)
    shapes = [(heads, 2.0), (kv_heads, 1.0), (kv_heads, 1.0)]
    return [s * rng.normal(size=(tokens, n, dim)).astype(np.float32) for n, s in shapes]


def heads_first(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x).transpose(1, 0, 2)[None]


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 300])
def test_attention_and_mass_equal_the_oracle_across_chunk_borders(tokens):
    q, k, v = qkv(tokens)
    out, mass = jax.jit(causal_attention)(*map(heads_first, (q, k, v)))
    np.testing.assert_allclose(np.asarray(out)[0].transpose(1, 0, 2), oracle.attention(q, k, v), atol=1e-5, rtol=0)
    np.testing.assert_allclose(np.asarray(mass)[0], oracle.attention_mass(q, k), atol=1e-4, rtol=0)


def test_attention_holds_when_chunks_outnumber_their_most():
    """Past MAX_CHUNKS × MIN_CHUNK tokens the chunks grow; one head, so that the oracle stays quick."""
    q, k, v = qkv(2100, heads=1, kv_heads=1, dim=2)
    out, mass = jax.jit(causal_attention)(*map(heads_first, (q, k, v)))
    np.testing.assert_allclose(np.asarray(out)[0].transpose(1, 0, 2), oracle.attention(q, k, v), atol=1e-5, rtol=0)
    np.testing.assert_allclose(np.asarray(mass)[0], oracle.attention_mass(q, k), atol=1e-3, rtol=0)


def test_attention_with_huge_scores_stays_finite_and_exact():
    q, k, v = qkv(129)
    out, mass = jax.jit(causal_attention)(heads_first(200 * q), heads_first(k), heads_first(v))
    np.testing.assert_allclose(
        np.asarray(out)[0].transpose(1, 0, 2), oracle.attention(200 * q, k, v), atol=1e-3, rtol=0
    )
    np.testing.assert_allclose(np.asarray(mass).sum(), 129, rtol=1e-5)


def test_attention_to_a_cache_ignores_its_empty_slots():
    q, k, v = qkv(20)
    slots = [jnp.pad(heads_first(x), ((0, 0), (0, 0), (0, 12), (0, 0)), constant_values=np.nan) for x in (k, v)]
    slots[1] = jnp.nan_to_num(slots[1], nan=99.0)
    out = attend(heads_first(q[15:]), *slots, 15)
    np.testing.assert_allclose(np.asarray(out)[0].transpose(1, 0, 2), oracle.attention(q, k, v)[15:], atol=1e-5, rtol=0)


def test_batch_rows_do_not_mix():
    parts = [qkv(40), qkv(41)]
    batched = [jnp.concatenate([heads_first(a), heads_first(b[:40])]) for a, b in zip(*parts, strict=True)]
    out, mass = jax.jit(causal_attention)(*batched)
    for row, part in enumerate(parts):
        q, k, v = (x[:40] for x in part)
        np.testing.assert_allclose(
            np.asarray(out)[row].transpose(1, 0, 2), oracle.attention(q, k, v), atol=1e-5, rtol=0
        )
        np.testing.assert_allclose(np.asarray(mass)[row], oracle.attention_mass(q, k), atol=1e-4, rtol=0)
