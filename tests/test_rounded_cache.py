"""Rounded keys and values: what attention reads, what generation keeps, what training learns with."""

from dataclasses import replace
from pathlib import Path

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import refused
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.cache import compare
from experiments.tables import read_rows
from jquant import NF4, NVFP4, Activation, CacheFormat, Int, Stored, Tuning, method, with_cache
from jquant.evaluation.generation import generate_ids, in_steps, step
from jquant.io.load import LanguageModel, load_model
from jquant.learning.losses import model_loss
from jquant.learning.tuning import begun, split, tune
from jquant.models.cache import Cache
from jquant.models.decoder import Decoder
from jquant.pipeline.in_memory import quantize_decoder

ROOT = Path(__file__).parents[1]
TOKENS = np.random.default_rng(5).integers(0, checkpoints.VOCAB, (4, 24), np.int32)
FOUR, EIGHT = (Stored(Int(bits, "channel", symmetric=True, scale="float32")) for bits in (4, 8))
CACHE = CacheFormat(keys=EIGHT, values=Stored(Int(4, 8, scale="float32")))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    return load_model(checkpoints.save(tmp_path_factory.mktemp("tiny"), checkpoints.llama(initializer_range=0.2)))


@pytest.fixture(scope="module")
def quantized(model) -> Decoder:
    return quantize_decoder(model.decoder, method("rtn", 3, 16))[0]


def rounded(x: np.ndarray, bits: int, group: int | None) -> np.ndarray:
    """In float64: symmetric over a token's head, or asymmetric over runs of its channels."""
    x = x.astype(np.float64)
    if group is None:
        step = np.abs(x).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
        return np.round(x / step) * step
    runs = x.reshape(*x.shape[:-1], -1, group)
    low, high = np.minimum(runs.min(-1, keepdims=True), 0), np.maximum(runs.max(-1, keepdims=True), 0)
    step = (high - low) / (2**bits - 1)
    zero = np.round(-low / step)
    return ((np.clip(np.round(runs / step) + zero, 0, 2**bits - 1) - zero) * step).reshape(x.shape)


def test_keys_and_values_are_rounded_per_token_and_head_and_gradients_pass():
    for stored, bits, group in ((CACHE.keys, 8, None), (CACHE.values, 4, 8)):
        x = jax.random.normal(jax.random.key(bits), (2, 3, 5, 16))
        ours, back = jax.vjp(lambda x, stored=stored: CACHE.in_text(x, stored).rounded, x)
        np.testing.assert_allclose(ours, rounded(np.asarray(x), bits, group), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(back(ours)[0], ours)


def test_generation_reads_the_keys_and_values_that_evaluation_does(model):
    decoder = with_cache(model.decoder, CACHE)
    assert np.abs(decoder(jnp.asarray(TOKENS)) - model.decoder(jnp.asarray(TOKENS))).max() > 1e-3
    ids = list(generate_ids(decoder, TOKENS[0, :8], tokens=10))
    text = np.concatenate([TOKENS[0, :8], ids])[None]
    assert ids == np.asarray(decoder(jnp.asarray(text))).argmax(-1)[0, 7:-1].tolist()


def test_training_learns_under_the_rounded_cache_and_keeps_it(model, quantized):
    stage = Tuning(30, 4, 1e-2, weight_rate=1e-2, compute="float32")
    student = with_cache(quantized, CacheFormat(FOUR, FOUR))

    def loss(decoder: Decoder) -> float:
        start, parts = begun(split(decoder), stage, model.decoder)
        return float(model_loss(start(), (parts, model.decoder), jnp.asarray(jnp.asarray(TOKENS)), stage))

    trained = tune(student, model.decoder, TOKENS, stage, progress=False)
    assert trained.segments[0].attention.cached == CacheFormat(FOUR, FOUR)
    assert loss(student) > loss(quantized)
    assert loss(trained) < 0.8 * loss(student)


def test_it_is_a_choice_for_a_run_that_a_saved_model_does_not_hold(model, quantized, tmp_path):
    replace(model, decoder=with_cache(quantized, CACHE)).save(tmp_path / "saved")
    loaded = load_model(tmp_path / "saved").decoder
    np.testing.assert_array_equal(loaded(jnp.asarray(TOKENS)), quantized(jnp.asarray(TOKENS)))
    np.testing.assert_array_equal(
        with_cache(loaded, CACHE)(jnp.asarray(TOKENS)), with_cache(quantized, CACHE)(jnp.asarray(TOKENS))
    )
    np.testing.assert_array_equal(
        with_cache(with_cache(loaded, CACHE), None)(jnp.asarray(TOKENS)), quantized(jnp.asarray(TOKENS))
    )


MANY = {
    "keys of blocks of tokens": CacheFormat(Stored(Int(3, 4), "channel"), Stored(Int(2, 8)), recent=5),
    "rotated": CacheFormat(Stored(Int(4, 16), rotate=True), Stored(Int(4, "channel"), rotate=True), recent=1),
    "before the rotary embedding": CacheFormat(Stored(Int(4, 8), "channel"), before_rotary=True, first=3),
    "values of blocks of tokens": CacheFormat(None, Stored(NF4(8), "channel"), recent=3, first=2),
    "quantized scales": CacheFormat(Stored(Int(4, 8, scale=Int(6, 2, symmetric=True))), Stored(NVFP4), first=1),
}


@pytest.mark.parametrize("cached", MANY.values(), ids=MANY)
@pytest.mark.parametrize("prompt", [1, 2, 9])
def test_a_packed_cache_token_by_token_gives_the_logits_of_the_whole_text(model, cached, prompt):
    """Evaluation of a text reads, at every token, what generation reads from its codes."""
    decoder, text = with_cache(model.decoder, cached), jnp.asarray(TOKENS)
    wanted = decoder(text)
    assert np.abs(wanted - model.decoder(text)).max() > 1e-3
    leaves, structure = jax.tree.flatten(in_steps(decoder))
    cache = Cache.init(decoder.config, len(TOKENS), 32, jnp.float32, cached)
    logits, cache = step(structure, leaves, text[:, :prompt], cache)
    got, programs = [logits], 0
    for place in range(prompt, text.shape[1]):
        logits, cache = step(structure, leaves, text[:, place : place + 1], cache)
        got.append(logits)
        programs = step._cache_size() if place == prompt else programs
    np.testing.assert_allclose(np.stack(got, 1), wanted[:, prompt - 1 :], rtol=1e-3, atol=1e-3)
    assert step._cache_size() == programs  # one for all tokens after the first of them


def test_which_tokens_are_past_follows_from_their_number():
    cached = CacheFormat(Stored(Int(3, 4), "channel"), recent=5, first=2)
    past = [cached.past(np.int64(length), cached.keys) for length in range(1, 21)]
    by_hand = []
    for length in range(1, 21):
        whole = [begin for begin in range(2, 100, 4) if begin + 4 <= length - 5]
        by_hand.append(whole[-1] + 4 if whole else 2)
    assert past == by_hand


def test_its_bytes_are_those_of_codes_scales_and_recent_tokens(model):
    config, slots = model.config, 1024
    plain = Cache.init(config, 1, slots, jnp.float16).nbytes
    assert plain == 2 * config.layers * config.kv_heads * config.head_dim * slots * 2
    cached = CacheFormat(Stored(Int(4, 8, True)), Stored(Int(2, 32, True), "channel"), recent=16, first=4)
    tokens = config.layers * config.kv_heads * config.head_dim
    codes = tokens * (4 / 8 * (slots - 4) + 2 / 8 * 1024)
    scales = tokens * 2 * ((slots - 4) / 8 + 1024 / 32)
    floats = tokens * 2 * (16 + 1 + 4 + 16 + 32 + 4)
    assert Cache.init(config, 1, slots, jnp.float16, cached).nbytes == codes + scales + floats


def test_wrong_formats_are_refused(model):
    with refused("the group 'tensor'"):
        Stored(Int(4, "tensor", symmetric=True))  # would let a token see those after it
    with refused("the group 'channel'"):
        Stored(Int(4, "channel"), "channel")
    with refused("stores a format"):
        Stored(Activation())
    with refused("axis", "'head'"):
        Stored(Int(4, 8), "head")
    with refused("keys", "Stored"):
        CacheFormat(keys=Int(8, "channel", symmetric=True))
    with refused("recent", "-1"):
        CacheFormat(recent=-1)
    with refused("CacheFormat or None"):
        with_cache(model.decoder, FOUR)
    with refused("larger than"):
        with_cache(model.decoder, CacheFormat(keys=Stored(Int(4, 128))))


def settings_of(*overrides: str) -> dict:
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return OmegaConf.to_container(compose("cache", list(overrides)), resolve=True)  # pyright: ignore


def test_the_table_of_caches_compares_each_with_the_float_one_and_keeps_its_rows(tmp_path, capsys):
    folder = checkpoints.save(tmp_path / "model", checkpoints.llama(num_hidden_layers=1))
    (tmp_path / "text.txt").write_text(checkpoints.random_text(300, 3))
    grid = ["cache.bits=[8,2]", "cache.group=8", "cache.keys=[channel]", "cache.rotate=[false]", "cache.kept=[[3,1]]"]
    settings = settings_of(
        "model=local", f"model.path={folder}", f"evaluation.data={tmp_path / 'text.txt'}", f"results={tmp_path}", *grid,
        "evaluation.context=64", "evaluation.windows=3", "cache.tokens=256",
    )  # fmt: skip
    compare(settings)
    plain, eight, two = read_rows(tmp_path / "cache", "cache.jsonl")
    assert (plain["method"], eight["method"], two["method"]) == ("float", "8 bits", "2 bits")
    assert plain["kl"] == 0 < eight["kl"] < two["kl"]
    assert plain["megabytes"] == 2 * 2 * 16 * 256 * 2 / 1e6 > eight["megabytes"] > two["megabytes"]
    low, high = two["change_percent"][1:]
    assert low < 100 * (two["perplexity"] / plain["perplexity"] - 1) < high
    table = (tmp_path / "cache" / "cache.md").read_text()
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 5
    compare(settings)
    assert len(read_rows(tmp_path / "cache", "cache.jsonl")) == 3
    with refused("cache.kept", "pair"):
        compare(settings | {"cache": settings["cache"] | {"kept": [[3]]}})
