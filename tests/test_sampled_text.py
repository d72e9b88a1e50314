"""Text sampled by a model: what a window holds; the same windows again, read, resumed, or after damage."""

import logging
from dataclasses import replace
from pathlib import Path

import checkpoints
import jax
import numpy as np
import pytest
from checkpoints import refused

from jquant import CacheFormat, Int, Stored, with_cache
from jquant.evaluation import sampled_text
from jquant.evaluation.sampled_text import LIKELIEST, sample_text
from jquant.io.files import read_json
from jquant.io.load import LanguageModel, load_model

forward = jax.jit(lambda decoder, tokens: decoder(tokens))

CONTEXT, BATCH = 12, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    folder = checkpoints.save(tmp_path_factory.mktemp("tiny"), checkpoints.llama(max_position_embeddings=40))
    return load_model(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setitem(sampled_text.BATCHES, "cpu", BATCH)
    monkeypatch.setenv("JQUANT_CACHE", str(tmp_path))
    return tmp_path / "sampled"


def sampled(model, count: int = 5, **options) -> np.ndarray:
    return sample_text(model, count, CONTEXT, **({"progress": False} | options))


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The lengths of the prompts that `generate_batch` continued."""
    lengths, generate_batch = [], sampled_text.generate_batch

    def counted(decoder, prompts, *arguments, **options):
        lengths.append(prompts.shape[1])
        return generate_batch(decoder, prompts, *arguments, **options)

    monkeypatch.setattr(sampled_text, "generate_batch", counted)
    return lengths


def test_windows_begin_with_bos_and_differ(model):
    tokens = sampled(model)
    assert tokens.shape == (5, CONTEXT)
    assert tokens.dtype == np.int32
    assert (tokens[:, 0] == model.tokenizer.bos_id).all()
    assert ((tokens >= 0) & (tokens < checkpoints.VOCAB)).all()
    assert len({tuple(row) for row in tokens.tolist()}) == 5


def test_without_bos_windows_begin_with_a_random_token_and_the_most_likely_ones_after_it(model):
    tokens = sampled(model.decoder, 9)
    assert len(set(tokens[:, 0].tolist())) > 6
    likeliest = np.asarray(forward(model.decoder, tokens)).argmax(-1)[:, :-1] == tokens[:, 1:]
    assert likeliest[:, :LIKELIEST].all()
    assert not likeliest[:, LIKELIEST:].all()
    without = replace(model, tokenizer=replace(model.tokenizer, bos_id=None))
    np.testing.assert_array_equal(sampled(without, 9), tokens)
    assert sample_text(model.decoder, 2, 2, progress=False).shape == (2, 2)


def test_an_end_of_sequence_token_does_not_end_a_window(model, monkeypatch, tmp_path):
    """Every token that was sampled ends a text in the second model; the windows stay as they were."""
    tokens = sampled(model)
    ending = replace(model, tokenizer=replace(model.tokenizer, eos_ids=tuple(set(tokens.reshape(-1).tolist()))))
    monkeypatch.setenv("JQUANT_CACHE", str(tmp_path / "other"))
    np.testing.assert_array_equal(sampled(ending), tokens)


@pytest.mark.parametrize("part", ["bos", "random"])
def test_windows_depend_on_the_seed_and_their_number_alone(model, part, monkeypatch, tmp_path):
    source = model if part == "bos" else model.decoder
    tokens = sampled(source, 6)
    monkeypatch.setenv("JQUANT_CACHE", str(tmp_path / "other"))
    np.testing.assert_array_equal(sampled(source, 4), tokens[:4])
    np.testing.assert_array_equal(sampled(source, 6), tokens)
    other_seed = sampled(source, 6, seed=1)
    assert not (other_seed == tokens).all(1).any()


def test_a_second_call_computes_nothing_and_a_larger_count_only_what_is_missing(model, calls):
    tokens = sampled(model, 4)
    assert calls == [1, 1]
    np.testing.assert_array_equal(sampled(model, 4), tokens)
    np.testing.assert_array_equal(sampled(model, 6)[:4], tokens)
    assert calls == [1, 1]
    assert sampled(model, 7).shape == (7, CONTEXT)
    assert calls == [1, 1, 1]


def test_what_decides_the_text_is_in_the_recipe_and_makes_a_folder_of_its_own(model, cache, calls):
    sampled(model, 1)
    [folder] = cache.iterdir()
    recipe = read_json(folder / "recipe.json")
    assert recipe["seed"] == 0
    assert recipe["context"] == CONTEXT
    assert {"model", "temperature", "batch", "code", "packages"} <= set(recipe)
    scaled = jax.tree.map(lambda leaf: leaf, model.decoder)
    scaled.embedding.set_value(1.01 * scaled.embedding.get_value())
    for source, options in [
        (model, {"seed": 1}),
        (model, {"temperature": 1.1}),
        (model.decoder, {}),
        (replace(model, decoder=scaled), {}),
        (replace(model, decoder=with_cache(model.decoder, CacheFormat(keys=Stored(Int(8, "channel", True))))), {}),
    ]:
        before = len(list(cache.iterdir()))
        sampled(source, 1, **options)
        assert len(list(cache.iterdir())) == before + 1, options
    calls.clear()
    sampled(replace(model, name="another name"), 1)
    assert calls == []


def test_a_killed_run_goes_on_after_its_last_batch(model, cache, calls):
    done = []

    def kill(stage: str, tokens: int, total: int, /, **figures: float) -> None:
        done.append((stage, tokens, total))
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampled(model, 9, progress=kill)
    assert done == [("generate", 36, 108), ("generate", 72, 108)]
    calls.clear()
    tokens = sampled(model, 9)
    assert calls == [1]
    for file in cache.rglob("*"):
        assert not file.name.startswith("."), file
    np.testing.assert_array_equal(sampled(model, 9), tokens)


def _flip(data: bytes) -> bytes:
    return data[:-7] + bytes([data[-7] ^ 1]) + data[-6:]


DAMAGES = {
    "a bit": _flip,
    "cut": lambda data: data[:-5],
    "empty": lambda data: b"",
    "not safetensors": lambda data: b"x" * len(data),
    "other name": lambda data: data.replace(b'"tokens"', b'"tokenz"'),
    "no digest": lambda data: data.replace(b'"digest"', b'"digesx"'),
    "other shape": lambda data: data.replace(b"[3,12]", b"[12,3]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_sampled_again(model, cache, calls, caplog, damage):
    tokens = sampled(model, 6)
    first, second = sorted(cache.rglob("*.safetensors"))
    good = second.read_bytes()
    second.write_bytes(DAMAGES[damage](good))
    assert second.read_bytes() != good
    calls.clear()
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(sampled(model, 6), tokens)
    assert calls == [1]
    assert [record.getMessage() for record in caplog.records] == [f"{second} is damaged; it is computed again."]
    assert second.read_bytes() == good
    caplog.clear()
    sampled(model, 6)
    assert caplog.records == []
    assert first.exists()


@pytest.mark.parametrize(
    ("count", "context", "options", "parts"),
    [
        (0, 12, {}, ["count", "0"]),
        (2.5, 12, {}, ["count", "2.5"]),
        (2, 1, {}, ["context", "1"]),
        (2, 41, {}, ["40", "context"]),
        (2, 12, {"seed": -1}, ["seed", "-1"]),
        (2, 12, {"temperature": 0.0}, ["temperature=0"]),
        (2, 12, {"temperature": float("inf")}, ["temperature", "inf"]),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_computed(
    model, cache, calls, count, context, options, parts
):
    options = {"progress": False} | options
    refuse = sample_text.__wrapped__ if isinstance(count, float) else sample_text  # without the tests' type checks
    with refused(*parts):
        refuse(model, count, context, **options)
    assert calls == []
    assert not cache.exists()
    assert sampled(model, 2).shape == (2, CONTEXT)


def test_a_cache_that_can_not_be_written_is_refused(model, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("JQUANT_CACHE", str(blocked))
    with refused(str(blocked), "can't be written"):
        sampled(model, 1)
