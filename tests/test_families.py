"""Every model family against transformers with eager attention, float32, on tiny random checkpoints."""

import json
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import checkpoints
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
import transformers
from checkpoints import refused
from flax import nnx
from safetensors.numpy import load_file, save_file

from jquant import (
    AWQ,
    LanguageModel,
    LoRA,
    Method,
    SmoothQuant,
    add_adapters,
    export,
    load_adapters,
    load_model,
    quantize,
    save_adapters,
)
from jquant.calibration.options import Options
from jquant.evaluation.generation import empty_cache, in_steps, step
from jquant.formats import NF4, Int
from jquant.io.export.gguf import write_gguf
from jquant.io.load import open_model
from jquant.learning.losses import head_of
from jquant.methods import method
from jquant.models.cache import CacheFormat, Stored
from jquant.models.config import DecoderConfig, config_from_gguf, config_from_hf
from jquant.models.decoder import (
    Block,
    Decoder,
    Scores,
    attend,
    blocks,
    causal_attention,
    outside_of,
    with_blocks,
    with_cache,
)
from jquant.models.families import FAMILIES, family_of
from jquant.models.folding import permute_mlp, rotate
from jquant.models.params import flat_params, with_params
from jquant.models.rotary import rotary_table
from jquant.pipeline.in_memory import quantize_decoder
from jquant.pipeline.to_disk import quantize_to_folder
from jquant.qtensor import QTensor, dequantize
from jquant.rounding import SolveInfo

forward = jax.jit(lambda decoder, tokens: decoder(tokens))

# Longer than the windows of 24 tokens.
TOKENS = np.random.default_rng(0).integers(0, checkpoints.VOCAB, (2, 72), np.int32)
PROMPT = 40
FULL, SLIDING = "full_attention", "sliding_attention"
VARIANTS: dict[str, tuple[str, dict]] = {
    **{name: (name, {}) for name in checkpoints.FAMILIES},
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "qwen2 with windows from a layer on": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "qwen3 with windows by layer": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 24, "layer_types": [SLIDING, FULL]},
    ),
    "smollm3 with windows": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 24, "no_rope_layers": None, "no_rope_layer_interval": 2},
    ),
    "gemma2 in its usual pattern": ("gemma2", {"layer_types": None, "attn_logit_softcapping": None}),
    "gemma3 with capped logits": (
        "gemma3_text",
        {"final_logit_softcapping": 2.0, "layer_types": [FULL, SLIDING, FULL]},
    ),
    "phi3 with a window": ("phi3", {"sliding_window": 24}),
    "gpt_neox, attention before the MLP": (
        "gpt_neox",
        {"use_parallel_residual": False, "rotary_pct": 1.0, "hidden_act": "gelu_new"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """variant -> (transformers' model, its folder, the loaded model); each made once."""

    @cache
    def get(variant: str) -> tuple[transformers.PreTrainedModel, Path, LanguageModel]:
        name, changes = VARIANTS[variant]
        model = checkpoints.of_family(name, **changes)
        folder = checkpoints.save(tmp_path_factory.mktemp("family"), model)
        return model, folder, load_model(folder, progress=False)

    return get


def generated(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    """Logits from the prompt's last token on, with a cache: the prompt at once, then token by token."""
    leaves, structure = jax.tree.flatten(in_steps(decoder))
    cache = empty_cache(decoder, len(tokens), tokens.shape[1])
    logits, cache = step(structure, leaves, jnp.asarray(tokens[:, :PROMPT]), cache)
    found = [logits]
    for place in range(PROMPT, tokens.shape[1]):
        logits, cache = step(structure, leaves, jnp.asarray(tokens[:, place : place + 1]), cache)
        found.append(logits)
    return np.stack(found, 1)


def difference(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())


# ---- logits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_without_a_cache_and_with_one(saved, variant):
    model, _, loaded = saved(variant)
    theirs = checkpoints.logits(model, TOKENS)
    assert np.abs(theirs).max() > 1.5
    assert difference(forward(loaded.decoder, TOKENS), theirs) <= 1e-4
    assert difference(generated(loaded.decoder, TOKENS), theirs[:, PROMPT - 1 :]) <= 1e-4


def test_the_fields_that_tell_families_apart_matter(saved):
    """Each field of a configuration that is not Llama's moves the logits: no variant passes without it."""
    usual = {field.name: field.default for field in fields(DecoderConfig)}
    moved = {}
    for variant in ("mistral", "smollm3", "gemma2", "gemma3 with capped logits"):
        decoder = saved(variant)[2].decoder
        exact = forward(decoder, TOKENS)
        for name in ("windows", "local_rope_base", "no_rope", "attention_scale", "attention_softcap", "logits_softcap",
                     "embedding_scale", "activation", "rope_divisors"):  # fmt: skip
            plain = usual[name] if name != "rope_divisors" else None
            if getattr(decoder.config, name) != plain:
                other = with_config(decoder, replace(decoder.config, **{name: plain}))
                moved[name] = difference(forward(other, TOKENS), exact)
    assert set(moved) == {"windows", "local_rope_base", "no_rope", "attention_scale", "attention_softcap",
                          "logits_softcap", "embedding_scale", "activation", "rope_divisors"}  # fmt: skip
    assert min(moved.values()) > 0.01, moved


def with_config(decoder: Decoder, config: DecoderConfig) -> Decoder:
    """The decoder with another configuration and the same parameters."""
    outside = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))
    outside.segments = nnx.List([])
    layers = [
        with_params(nnx.eval_shape(lambda layer=layer: Block(config, nnx.Rngs(0), layer)), flat_params(block))
        for layer, block in enumerate(blocks(decoder))
    ]
    return with_blocks(with_params(outside, flat_params(outside_of(decoder))), layers)


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_in_bfloat16_gemma_comes_within_its_precision(saved, dtype):
    model, folder, _ = saved("gemma3_text")
    ours = forward(load_model(folder, dtype=dtype, progress=False).decoder, TOKENS)
    assert checkpoints.relative(np.asarray(ours, np.float32), checkpoints.logits(model, TOKENS)) < 0.1


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def gguf_of(path: Path, name: str) -> tuple[transformers.PreTrainedModel, LanguageModel]:
    """A file of a family as llama.cpp's converter writes it, and the model that it was made from.

    What llama.cpp fixes is as it fixes it: scores are scaled by 1/√head_dim, and SmolLM3's fourth layer has no rope.
    """
    changes = {
        "gemma2": {"query_pre_attn_scalar": 16},
        "gemma3_text": {"query_pre_attn_scalar": 16},
        "mistral": {"sliding_window": None},
        "phi3": {"sliding_window": 24},
        "smollm3": {"no_rope_layers": None},
        "gpt_neox": {"hidden_act": "gelu_new"},
    }
    model = checkpoints.of_family(name, **changes.get(name, {}))
    config = model.config

    def also(writer: gguf.GGUFWriter) -> None:
        if getattr(config, "sliding_window", None):
            writer.add_sliding_window(config.sliding_window)
        if name == "gemma2":
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        if name == "gemma3_text":
            writer.add_sliding_window_pattern(2)
            writer.add_rope_freq_base_swa(config.rope_parameters[SLIDING]["rope_theta"])
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(config.rope_parameters[FULL]["factor"])

    architecture = checkpoints.ARCHITECTURES.get(name, name)
    file = checkpoints.write_gguf(path, model, architecture=architecture, also=also)
    return model, load_model(file, progress=False)


@pytest.mark.parametrize("name", [name for name in checkpoints.FAMILIES if name != "opt"])
def test_a_gguf_file_gives_the_logits_of_transformers(tmp_path, name):
    model, loaded = gguf_of(tmp_path / "x.gguf", name)
    assert difference(forward(loaded.decoder, TOKENS), checkpoints.logits(model, TOKENS)) <= 1e-4
    assert loaded.config.family == {"mistral": "llama"}.get(name, name)


def test_gguf_settings_of_gemma_that_llama_cpp_fixes():
    """src/models/gemma2.cpp and gemma3.cpp: defaults, the pattern of windows, and the scale of the 27B models."""
    header = {
        "vocab_size": 8, "embedding_length": 64, "feed_forward_length": 8, "attention.head_count": 4,
        "attention.key_length": 32, "attention.layer_norm_rms_epsilon": 1e-6, "context_length": 512,
        "attention.sliding_window": 32,
    }  # fmt: skip

    def read(architecture: str, layers: int, **more) -> DecoderConfig:
        own = {f"{architecture}.{key}": value for key, value in {**header, "block_count": layers, **more}.items()}
        return config_from_gguf({"general.architecture": architecture, **own}, True, None, "x.gguf")

    second = read("gemma2", 4)
    assert second.windows == (32, None, 32, None)
    assert (second.attention_softcap, second.logits_softcap, second.attention_scale) == (50.0, 30.0, None)
    assert second.embedding_scale == 8
    assert read("gemma2", 46).attention_scale == read("gemma3", 62).attention_scale == 0.25
    third = read("gemma3", 7)
    assert third.windows == (32,) * 5 + (None, 32)
    assert (third.local_rope_base, third.rope_base, third.logits_softcap) == (1e4, 1e4, None)
    assert read("gemma3", 2, **{"attention.sliding_window_pattern": np.array([False, True])}).windows == (None, 32)
    with refused("x.gguf", "sliding_window_pattern", "2 layers"):
        read("gemma3", 2, **{"attention.sliding_window_pattern": np.array([False, True, True])})


# ---- quantization ---------------------------------------------------------------------------------------------------


def state_dict(model: transformers.PreTrainedModel, decoder: Decoder) -> dict[str, torch.Tensor]:
    """A decoder's parameters under transformers' names, as an exporter would write them."""
    family, parts = family_of(decoder.config), {}
    outside = {name: leaf for name, leaf in flat_params(decoder).items() if not name.startswith("segments.")}
    named = {name: (name, leaf) for name, leaf in outside.items()}
    for layer, block in enumerate(blocks(decoder)):
        named |= {f"{layer} {path}": (f"layers.{path}", leaf) for path, leaf in flat_params(block).items()}
    for key, (name, leaf) in named.items():
        values = np.asarray(dequantize(leaf) if isinstance(leaf, QTensor) else leaf, np.float32)
        values = values.T if name.endswith("kernel") else values
        values = values - family.hf_norm_offset if name.endswith("scale") else values
        place = family.fused_with("hf", name).index(name)
        tensor = family.hf[name].format(key.split()[0]).replace("embed_out.", "lm_head.")
        parts.setdefault(tensor, {})[place] = values
    joined = {name: np.concatenate([rows[i] for i in sorted(rows)]) for name, rows in parts.items()}
    for name, rows in joined.items():
        if "query_key_value" in name:  # head by head
            heads = model.config.num_attention_heads
            joined[name] = rows.reshape(3, heads, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)
        elif ".c_" in name:  # GPT-2's are [in, out]
            joined[name] = rows.T
    return {**model.state_dict(), **{name: torch.tensor(values) for name, values in joined.items()}}


def theirs_with_our_weights(model: transformers.PreTrainedModel, decoder: Decoder) -> np.ndarray:
    copy = transformers.AutoModelForCausalLM.from_config(model.config, attn_implementation="eager").float().eval()
    copy.load_state_dict(state_dict(model, decoder))
    if decoder.head is None:
        copy.tie_weights()
    return checkpoints.logits(copy, TOKENS)


@pytest.mark.parametrize("name", checkpoints.FAMILIES)
def test_rounded_models_run_in_transformers_and_come_back_from_disk(saved, tmp_path, name):
    """RTN-4 in memory, GPTQ-4 in memory and from disk to disk; saved and loaded again with the same bits."""
    model, folder, loaded = saved(name)
    exact = np.asarray(forward(loaded.decoder, TOKENS))
    rtn = replace(loaded, decoder=quantize_decoder(loaded.decoder, method("rtn", group=32))[0])
    gptq, report = quantize_decoder(loaded.decoder, method("gptq", group=32), TOKENS[:, :48], Options(batch=2))
    quantize_to_folder(
        open_model(folder), tmp_path / "gptq", method("gptq", group=32), TOKENS[:, :48], Options(batch=2)
    )
    rtn.save(tmp_path / "rtn")
    weights = family_of(loaded.config).weights
    assert set(report) == {(layer, path) for layer in range(loaded.config.layers) for path in weights}
    for kind, decoder in (("rtn", rtn.decoder), ("gptq", gptq)):
        ours = np.asarray(forward(decoder, TOKENS))
        assert 0.01 < checkpoints.relative(ours, exact) < 1.5
        assert difference(ours, theirs_with_our_weights(model, decoder)) <= 1e-4
        again = load_model(tmp_path / kind, progress=False)
        assert again.config == loaded.config
        np.testing.assert_array_equal(np.asarray(forward(again.decoder, TOKENS)), ours, err_msg=kind)
        assert jax.tree.structure(nnx.split(again.decoder)) == jax.tree.structure(nnx.split(decoder))


# ---- exact transforms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", checkpoints.FAMILIES)
def test_channel_scales_leave_the_logits(saved, monkeypatch, name):
    """AWQ and SmoothQuant before rounding; the scaled weights run in transformers, too."""
    model, _, loaded = saved(name)
    nothing = SolveInfo(*[jnp.float32(0)] * 5)
    monkeypatch.setattr("jquant.pipeline.blocks.round_weight", lambda w, seen, chosen: (w, nothing, True))
    monkeypatch.setattr("jquant.pipeline.blocks.check_scales", lambda *_: None)
    exact = forward(loaded.decoder, TOKENS)
    before = flat_params(next(blocks(loaded.decoder)))
    plain = not loaded.config.gated and loaded.config.activation != "relu"
    for transform, least in ((AWQ(4), 1), (SmoothQuant(), len(family_of(loaded.config).weights) - plain)):
        chosen = Method(Int(4, 32), transform=transform)
        if plain:
            with refused("layers.0.mlp.down.kernel", loaded.config.activation, "mlp.up", "rule"):
                quantize_decoder(loaded.decoder, chosen, TOKENS)
            chosen = [("mlp.down", Method(Int(4, 32))), ("", chosen)]
        scaled, _ = quantize_decoder(loaded.decoder, chosen, TOKENS, Options(batch=2))
        after = flat_params(next(blocks(scaled)))
        # AWQ may leave an input as it is; SmoothQuant scales them all.
        assert sum(difference(after[path], before[path]) > 1e-3 for path in family_of(loaded.config).weights) >= least
        assert difference(forward(scaled, TOKENS), exact) <= 1e-4
    assert difference(theirs_with_our_weights(model, scaled), exact) <= 1e-4


@pytest.mark.parametrize("name", checkpoints.FAMILIES)
def test_rotations_and_permutations_leave_the_logits_or_are_refused(saved, name):
    decoder = saved(name)[2].decoder
    exact = forward(decoder, TOKENS)
    whole = not decoder.config.post_norms and decoder.config.norm == "rms"
    if not whole:
        with refused(name, "residual=False", "norm" if decoder.config.post_norms else "mean"):
            rotate(decoder)
    rotated = rotate(decoder, residual=whole)
    assert difference(forward(rotated, TOKENS), exact) <= 1e-4
    assert difference(generated(rotated, TOKENS), np.asarray(exact)[:, PROMPT - 1 :]) <= 1e-4
    order = np.stack([np.random.default_rng(layer).permutation(96) for layer in range(decoder.config.layers)])
    permuted = permute_mlp(decoder, order)
    assert difference(forward(permuted, TOKENS), exact) <= 1e-4
    up = [np.asarray(flat_params(next(blocks(d)))["mlp.up.kernel"]) for d in (decoder, permuted)]
    np.testing.assert_array_equal(up[0][:, order[0]], up[1])


def test_biases_of_all_projections_follow_the_rotations_and_permutations():
    """Qwen 2 has biases of q, k and v alone; the folds hold for a bias of any projection."""
    config = DecoderConfig(
        vocab_size=64, hidden=32, ffn=48, layers=2, heads=4, kv_heads=2, head_dim=8, norm_eps=1e-5, rope_base=1e4,
        rope_divisors=None, tied=True, context_length=128,
        biases=("attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down"),
    )  # fmt: skip
    decoder, rng = Decoder(config, nnx.Rngs(0)), np.random.default_rng(0)
    state = nnx.state(decoder)
    fresh = lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32)  # noqa: E731
    nnx.update(decoder, jax.tree.map(fresh, state))
    tokens = TOKENS[:, :24] % 64
    exact = forward(decoder, tokens)
    size = np.abs(exact).max()
    assert difference(forward(rotate(decoder), tokens), exact) <= 1e-4 * size
    order = np.stack([rng.permutation(48) for _ in range(2)])
    assert difference(forward(permute_mlp(decoder, order), tokens), exact) <= 1e-4 * size


# ---- layers that differ in what is static ---------------------------------------------------------------------------


def test_layers_that_differ_in_window_or_rope_alone_share_no_segment_and_no_program(saved):
    decoder = saved("gemma3_text")[2].decoder
    layers = list(blocks(decoder))
    assert len(decoder.segments) == len(with_blocks(decoder, layers).segments) == 3
    for attribute, values in (("window", (24, None)), ("rope", (0, 1, None))):
        nnx.update(layers[1], nnx.state(layers[0]))
        layers[1].attention.window, layers[1].attention.rope = layers[0].attention.window, layers[0].attention.rope
        assert len(with_blocks(decoder, layers[:2]).segments) == 1
        x, rotary = decoder.embed(jnp.asarray(TOKENS)), rotary_table(decoder.config, jnp.arange(TOKENS.shape[1]))
        through, outs = jax.jit(lambda block, x, rotary: block(x, rotary)[0]), []
        for value in values:
            setattr(layers[1].attention, attribute, value)
            outs.append(np.asarray(through(layers[1], x, rotary)))
            alike = getattr(layers[0].attention, attribute) == value
            assert len(with_blocks(decoder, layers[:2]).segments) == (1 if alike else 2)
        assert all(difference(a, b) > 1e-2 for i, a in enumerate(outs) for b in outs[:i])


def test_runs_are_consecutive_layers_of_one_kind(saved):
    assert saved("smollm3")[2].config.runs == (range(1), range(1, 2), range(2, 4))
    assert saved("mistral")[2].config.runs == (range(2),)
    assert [len(segment.mlp.up.kernel.get_value()) for segment in saved("smollm3")[2].decoder.segments] == [1, 1, 2]


# ---- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores",
    [Scores(window=5), Scores(window=150), Scores(softcap=1.5), Scores(0.2, 2.0, 40), Scores(window=300)],
    ids=str,
)
def test_windows_and_caps_equal_the_oracle_across_chunk_borders(scores):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(0, 1.5, (300, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    heads_first = lambda x: jnp.asarray(x).transpose(1, 0, 2)[None]  # noqa: E731
    options = {"scale": scores.scale, "softcap": scores.softcap, "window": scores.window}
    expected = oracle.attention(q, k, v, **options)
    out, mass = jax.jit(causal_attention, static_argnames="scores")(*map(heads_first, (q, k, v)), scores=scores)
    np.testing.assert_allclose(np.asarray(out)[0].transpose(1, 0, 2), expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(np.asarray(mass)[0], oracle.attention_mass(q, k, **options), atol=1e-4, rtol=0)
    for begin in (299, 100):  # one query, and several
        out = attend(heads_first(q[begin:]), heads_first(k), heads_first(v), begin, scores)
        np.testing.assert_allclose(np.asarray(out)[0].transpose(1, 0, 2), expected[begin:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "before_rotary"), [("gemma3_text", True), ("smollm3", True), ("gemma2", False)])
def test_a_rounded_cache_is_read_alike_in_a_text_and_token_by_token(saved, name, before_rotary):
    """The prompt is read as a text there, whatever the windows and ropes of the layers."""
    keys = Stored(Int(4, 8), "channel")
    cached = CacheFormat(keys, Stored(Int(4, 8)), recent=4, first=1, before_rotary=before_rotary)
    decoder = with_cache(saved(name)[2].decoder, cached)
    text, exact = np.asarray(forward(decoder, TOKENS)), np.asarray(forward(saved(name)[2].decoder, TOKENS))
    assert difference(text, exact) > 1e-2
    assert difference(generated(decoder, TOKENS), text[:, PROMPT - 1 :]) <= 1e-3


# ---- learning and adapters ------------------------------------------------------------------------------------------


def test_training_caps_the_logits(saved):
    decoder = saved("gemma2")[2].decoder
    states = decoder.hidden(jnp.asarray(TOKENS))
    assert difference(head_of(decoder, "float32")(states[0]), decoder.logits(states)[0]) <= 1e-5


@pytest.mark.parametrize("name", ["qwen2", "gemma3_text"])
def test_adapters_keep_their_places(saved, tmp_path, name):
    model = saved(name)[2]
    adapted = add_adapters(model, LoRA(4))
    assert difference(forward(adapted.decoder, TOKENS), forward(model.decoder, TOKENS)) == 0
    save_adapters(tmp_path / "a", adapted)
    again = load_adapters(model, tmp_path / "a")
    assert jax.tree.all(jax.tree.map(np.array_equal, nnx.state(again.decoder), nnx.state(adapted.decoder)))


def test_adapters_of_fused_projections_are_refused(saved, tmp_path):
    with refused("phi3", "attention.q.kernel", "merge_adapters"):
        save_adapters(tmp_path / "a", add_adapters(saved("phi3")[2], LoRA(4)))


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "parts"),
    [
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, ["'longrope'", "'default'"]),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_parameters": None}, ["'yarn'"]),
        ("phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ("gemma3_text", {"attn_logit_softcapping": 30.0}, ["attn_logit_softcapping", "gemma3_text"]),
        ("gemma3_text", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ("gemma3_text", {"rope_parameters": {FULL: {}, "other": {}}}, ["rope_parameters", "'other'"]),
        ("gemma3_text", {"rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}}}, [SLIDING, "'linear'"]),
        ("gemma2", {"hidden_activation": "gelu"}, ["hidden_activation", "'gelu'"]),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, ["layer_types"]),
        ("gemma2", {"layer_types": [FULL]}, ["layer_types", "3 layers"]),
        ("gemma2", {"sliding_window": 0}, ["sliding_window"]),
        ("gemma2", {"query_pre_attn_scalar": "16"}, ["query_pre_attn_scalar"]),
        ("mistral", {"layer_types": [FULL, FULL]}, ["layer_types"]),
        ("qwen2", {"layer_types": 3}, ["layer_types", "3"]),
        ("qwen2", {"use_sliding_window": "yes"}, ["use_sliding_window", "'yes'"]),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 9, "layer_types": None, "max_window_layers": "1"},
            ["max_window_layers"],
        ),
        ("qwen2", {"layer_types": [FULL, SLIDING]}, ["layer_types", "sliding_window"]),
        ("qwen3", {"attention_bias": True}, ["attention_bias", "qwen3"]),
        ("smollm3", {"no_rope_layers": [1, 0]}, ["no_rope_layers"]),
        ("smollm3", {"no_rope_layers": [1, 0, 2, 1]}, ["no_rope_layers"]),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx", "gpt2"]),
        ("gpt2", {"activation_function": "swish"}, ["activation_function", "'swish'", "'gelu_new'"]),
        ("gpt2", {"n_head": 5}, ["64", "5 attention heads"]),
        ("gpt2", {"add_cross_attention": True}, ["add_cross_attention"]),
        ("opt", {"do_layer_norm_before": False}, ["do_layer_norm_before", "before", "OPT-350M"]),
        ("opt", {"word_embed_proj_dim": 32}, ["word_embed_proj_dim", "OPT-350M"]),
        ("opt", {"enable_bias": False}, ["enable_bias"]),
        ("opt", {"layer_norm_elementwise_affine": False}, ["layer_norm_elementwise_affine"]),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.1}}, ["partial_rotary_factor", "16 channels"]),
        ("gpt_neox", {"rope_parameters": None, "rotary_pct": "all"}, ["rotary_pct", "'all'"]),
        ("gpt_neox", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ["'yarn'", "'linear'"]),
        ("gpt_neox", {"use_parallel_residual": "yes"}, ["use_parallel_residual", "'yes'"]),
        ("gpt_neox", {"attention_bias": False}, ["attention_bias"]),
    ],
)
def test_what_a_family_does_not_have_is_refused_by_name(saved, name, changes, parts):
    raw = json.loads((saved(name)[1] / "config.json").read_text())
    with refused("config.json", *parts):
        config_from_hf({**raw, **changes}, "config.json")


def test_defaults_of_missing_keys_are_transformers():
    shape = {
        "vocab_size": 8, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 12, "num_attention_heads": 4,
        "rms_norm_eps": 1e-6,
    }  # fmt: skip
    for name, (kind, _) in checkpoints.FAMILIES.items():
        if name in OWN_KEYS:
            continue
        ours, theirs = config_from_hf({**shape, "model_type": name}, "config.json"), kind(**shape)
        kinds = getattr(theirs, "layer_types", None) or [SLIDING] * 12
        windows = tuple(theirs.sliding_window if each == SLIDING else None for each in kinds)
        assert (ours.windows or (None,) * 12) == windows, name
        assert ours.tied == theirs.tie_word_embeddings, name
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16), name
        rope = theirs.rope_parameters
        assert ours.rope_base == rope.get(FULL, rope)["rope_theta"], name
        assert ours.attention_softcap == (getattr(theirs, "attn_logit_softcapping", None)), name
        assert ours.logits_softcap == (getattr(theirs, "final_logit_softcapping", None)), name
    assert set(FAMILIES) >= set(checkpoints.FAMILIES)


# The shapes that config.json must say, by the families' own keys.
OWN_KEYS = {
    "gpt2": {"vocab_size": 8, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "opt": {"vocab_size": 8, "hidden_size": 64, "ffn_dim": 8, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt_neox": {
        "vocab_size": 8, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_KEYS)
def test_defaults_of_families_with_their_own_keys_are_transformers(name):
    shape = OWN_KEYS[name]
    ours = config_from_hf({**shape, "model_type": name}, "config.json")
    theirs = checkpoints.FAMILIES[name][0](**shape)
    assert ours.context_length == theirs.max_position_embeddings
    assert ours.tied == theirs.tie_word_embeddings
    act = getattr(theirs, "activation_function", None) or theirs.hidden_act
    assert ours.activation == act.replace("gelu_new", "gelu_tanh")
    assert (ours.norm, ours.gated, ours.kv_heads, ours.head_dim, ours.norm_eps) == ("layer", False, 4, 16, 1e-5)
    assert ours.ffn == (256 if name == "gpt2" else 8)
    rope = getattr(theirs, "rope_parameters", None)
    if rope is None:
        assert (ours.no_rope, ours.position_offset) == ((0, 1), {"gpt2": 0, "opt": 2}[name])
    else:
        assert (ours.no_rope, ours.position_offset) == ((), None)
        assert (ours.rotary_dim, ours.rope_base) == (rope["partial_rotary_factor"] * 16, rope["rope_theta"])
        assert ours.parallel_residual == theirs.use_parallel_residual
    for key in shape:
        with refused("config.json", repr(key)):
            config_from_hf({**shape, "model_type": name, key: None}, "config.json")


def test_files_of_the_hub_have_shorter_names_and_causal_masks(saved, tmp_path):
    """As those of GPT-2 and Pythia: names without what transformers puts before them, masks, older keys."""
    for name, prefix, masks in (
        ("gpt2", "transformer.", ["h.0.attn.bias"]),
        ("gpt_neox", "", ["gpt_neox.layers.1.attention.bias", "gpt_neox.layers.0.attention.masked_bias"]),
    ):
        _, folder, loaded = saved(name)
        tensors = {key.removeprefix(prefix): values for key, values in load_file(folder / "model.safetensors").items()}
        (tmp_path / name).mkdir()
        save_file(
            tensors | {mask: np.tril(np.ones((1, 1, 8, 8), np.uint8)) for mask in masks},
            tmp_path / name / "model.safetensors",
        )
        raw = json.loads((folder / "config.json").read_text())
        if name == "gpt_neox":
            del raw["rope_parameters"]
            raw |= {"rotary_pct": 0.25, "rotary_emb_base": 10000}
        (tmp_path / name / "config.json").write_text(json.dumps(raw))
        (tmp_path / name / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
        again = load_model(tmp_path / name, progress=False)
        assert again.config == loaded.config
        assert jax.tree.all(jax.tree.map(np.array_equal, nnx.state(again.decoder), nnx.state(loaded.decoder)))


def test_texts_longer_than_the_learned_positions_are_refused(saved):
    decoder = saved("gpt2")[2].decoder
    with refused("gpt2", "512", "513"):
        decoder.embed(jnp.zeros((1, 513), jnp.int32))


# ---- exports --------------------------------------------------------------------------------------------------------

# What a GGUF file can't say of the tiny models of `checkpoints.FAMILIES`.
UNSAID = {
    "mistral": "sliding_window", "smollm3": "no_rope", "gemma2": "attention_scale", "gemma3_text": "windows",
    "opt": "llama.cpp", "gpt_neox": "activation",
}  # fmt: skip


@pytest.mark.parametrize("name", checkpoints.FAMILIES)
def test_exported_folders_and_files_hold_the_same_model_or_are_refused(saved, tmp_path, name):
    model, _, loaded = saved(name)
    expected = checkpoints.logits(model, TOKENS)
    export(loaded, tmp_path / "plain", "plain")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", attn_implementation="eager", dtype=torch.float32
    ).eval()
    assert difference(checkpoints.logits(theirs, TOKENS), expected) == 0
    if name in UNSAID:
        with refused(name, UNSAID[name]):
            write_gguf(loaded, tmp_path / "x.gguf", "F32")
    else:
        write_gguf(loaded, tmp_path / "x.gguf", "F32")
        again = load_model(tmp_path / "x.gguf", progress=False)
        assert difference(forward(again.decoder, TOKENS), expected) <= 1e-4


@pytest.mark.parametrize(("name", "format"), [("qwen2", "gptq_v2"), ("opt", "compressed-tensors")])
def test_a_packed_export_of_another_family_comes_back(saved, tmp_path, name, format):
    _, _, loaded = saved(name)
    q = quantize(loaded, "rtn", bits=4, group=32, progress=False)
    export(q, tmp_path / "packed", format)
    again = load_model(tmp_path / "packed", progress=False)
    np.testing.assert_array_equal(forward(again.decoder, TOKENS), forward(q.decoder, TOKENS))


def same(ours: LanguageModel, theirs: LanguageModel) -> None:
    """Packed weights are equal to the last bit."""
    found = flat_params(theirs.decoder)
    for path, leaf in flat_params(ours.decoder).items():
        if isinstance(leaf, QTensor):
            assert jax.tree.structure(leaf) == jax.tree.structure(found[path]), path
            for a, b in zip(jax.tree.leaves(leaf), jax.tree.leaves(found[path]), strict=True):
                np.testing.assert_array_equal(a, b, err_msg=path)


@pytest.mark.parametrize("name", ["phi3", "gpt2", "gpt_neox"])
def test_fused_weights_are_written_and_read(saved, tmp_path, name):
    """Plain and as GGUF whatever the parts' formats are, if one holds them all; packed if they have one format."""
    loaded = saved(name)[2]
    q = quantize(loaded, [("attention", "q8_0"), ("", "q4_0")], progress=False)
    export(q, tmp_path / "plain", "plain")
    again = flat_params(load_model(tmp_path / "plain", progress=False).decoder)
    for path, leaf in flat_params(q.decoder).items():
        values = dequantize(leaf) if isinstance(leaf, QTensor) else leaf
        np.testing.assert_array_equal(again[path], values, err_msg=path)
    if name == "gpt2":
        with refused(name, "turned around", "plain"):
            export(q, tmp_path / "packed", "gptq_v2")
    else:
        for format, packed in (("gptq_v2", Int(4, 32)), ("compressed-tensors", Int(4, 32)), ("bitsandbytes", NF4(32))):
            one = quantize(loaded, Method(packed), progress=False)
            export(one, tmp_path / format, format)
            same(one, load_model(tmp_path / format, progress=False))
        mixed = quantize(loaded, [("attention.v", Method(Int(8, 32))), ("", Method(Int(4, 32)))], progress=False)
        with refused("qkv_proj" if name == "phi3" else "query_key_value", "attention.q.kernel", "quantize them alike"):
            export(mixed, tmp_path / "mixed", "compressed-tensors")
    if name != "gpt_neox":
        export(q, tmp_path / "x.gguf")
        read = flat_params(load_model(tmp_path / "x.gguf", progress=False).decoder)
        np.testing.assert_array_equal(read["segments.0.attention.k.kernel"], again["segments.0.attention.k.kernel"])
        same(q, load_model(tmp_path / "x.gguf", packed=True, progress=False))
        mixed = quantize(loaded, [("attention.v", "q4_0"), ("", "q8_0")], progress=False)
        with refused("blk.0.attn_qkv.weight", "Q4_0", "Q8_0"):
            write_gguf(mixed, tmp_path / "mixed.gguf")
