"""Generated text: what the full forward pass says, token by token; reproducible sampling; streaming; limits."""

from dataclasses import replace

import checkpoints
import jax
import numpy as np
import pytest
import torch
from checkpoints import refused

import jquant
from jquant.evaluation.generation import generate_ids
from jquant.io.load import LanguageModel, load_model

forward = jax.jit(lambda decoder, tokens: decoder(tokens))

PROMPT = np.random.default_rng(2).integers(2, checkpoints.VOCAB, 11, np.int32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> LanguageModel:
    """Its end-of-sequence ids are taken away, so that only the test about them stops early."""
    folder = checkpoints.save(tmp_path_factory.mktemp("tiny"), checkpoints.llama(max_position_embeddings=300))
    model = load_model(folder)
    assert model.tokenizer.eos_ids == (1,)
    return replace(model, tokenizer=replace(model.tokenizer, eos_ids=()))


@pytest.fixture(scope="module")
def quantized(tiny) -> LanguageModel:
    return jquant.quantize(tiny, "rtn", bits=4, group=32)


def teacher_forced(model: LanguageModel, prompt: np.ndarray, ids: list[int]) -> np.ndarray:
    """The full forward pass's logits at each position from which one of `ids` was predicted."""
    sequence = np.concatenate([prompt, ids]).astype(np.int32)
    return np.asarray(forward(model.decoder, sequence[None]))[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("which", ["tiny", "quantized"])
def test_cached_decoding_follows_the_full_forward_pass(which, request):
    model = request.getfixturevalue(which)
    ids = list(generate_ids(model.decoder, PROMPT, tokens=20))
    assert len(ids) == 20
    assert ids == teacher_forced(model, PROMPT, ids).argmax(-1).tolist()
    assert len(set(ids)) > 3  # not one token for ever, which a stuck cache would also give


def test_a_quantized_model_generates_its_own_text(tiny, quantized):
    assert list(generate_ids(tiny.decoder, PROMPT, tokens=20)) != list(
        generate_ids(quantized.decoder, PROMPT, tokens=20)
    )


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


def test_sampling_depends_on_the_seed_alone(tiny):
    sample = lambda seed: list(generate_ids(tiny.decoder, PROMPT, tokens=20, temperature=1.5, seed=seed))  # noqa: E731
    assert sample(0) == sample(0)
    assert len({tuple(sample(seed)) for seed in range(4)}) == 4


def test_top_1_and_a_temperature_near_zero_are_greedy(tiny):
    greedy = list(generate_ids(tiny.decoder, PROMPT, tokens=20))
    assert list(generate_ids(tiny.decoder, PROMPT, tokens=20, temperature=2.0, top_k=1, seed=3)) == greedy
    assert list(generate_ids(tiny.decoder, PROMPT, tokens=20, temperature=1e-4, seed=3)) == greedy
    assert list(generate_ids(tiny.decoder, PROMPT, tokens=20, temperature=2.0, seed=3)) != greedy


def test_top_k_draws_among_the_k_most_likely_and_not_only_the_first(tiny):
    ranks = set()
    for seed in range(5):
        ids = list(generate_ids(tiny.decoder, PROMPT, tokens=20, temperature=3.0, top_k=3, seed=seed))
        logits = teacher_forced(tiny, PROMPT, ids)
        ranks |= {int((row > row[token]).sum()) for row, token in zip(logits, ids, strict=True)}
    assert ranks == {0, 1, 2}


def test_samples_follow_the_softmax_at_their_temperature(tiny):
    """How often each rank is drawn in 250 tokens: within four standard deviations of its summed probability."""
    ids = list(generate_ids(tiny.decoder, PROMPT, tokens=250, temperature=0.7, seed=5))
    logits = teacher_forced(tiny, PROMPT, ids).astype(np.float64) / 0.7
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    ranks = np.array([(row > row[token]).sum() for row, token in zip(logits, ids, strict=True)])
    for rank, share in enumerate(np.sort(p)[:, ::-1].T[:3]):
        assert abs((ranks == rank).sum() - share.sum()) < 4 * (share * (1 - share)).sum() ** 0.5
        assert share.sum() > 5


def test_pieces_join_to_the_decoded_text(tiny):
    pieces = list(jquant.generate(tiny, "abcd efgh", tokens=20, temperature=1.5, seed=1))
    ids = list(generate_ids(tiny.decoder, tiny.tokenizer.encode("abcd efgh"), tokens=20, temperature=1.5, seed=1))
    assert len(pieces) > 3
    assert "".join(pieces) == tiny.tokenizer.decode(ids)


def test_text_stops_before_an_end_token(tiny):
    ids = list(generate_ids(tiny.decoder, tiny.tokenizer.encode("abcd efgh"), tokens=20))
    stop = next(i for i, token in enumerate(ids) if i > 1 and token not in ids[:i])
    stopping = replace(tiny, tokenizer=replace(tiny.tokenizer, eos_ids=(319, ids[stop])))
    text = "".join(jquant.generate(stopping, "abcd efgh", tokens=20))
    assert text == tiny.tokenizer.decode(ids[:stop])
    assert text != tiny.tokenizer.decode(ids)


def test_a_model_that_expects_bos_gets_it(tiny):
    expecting = replace(tiny, tokenizer=replace(tiny.tokenizer, add_bos=True, bos_id=0))
    ids = tiny.tokenizer.encode("abcd efgh")
    with_bos = list(generate_ids(tiny.decoder, np.concatenate([[0], ids]).astype(np.int32), tokens=10))
    assert "".join(jquant.generate(expecting, "abcd efgh", tokens=10)) == tiny.tokenizer.decode(with_bos)
    assert with_bos != list(generate_ids(tiny.decoder, ids, tokens=10))


def test_an_empty_prompt_is_refused(tiny):
    with refused("prompt"):
        list(jquant.generate(tiny, "", tokens=3))


def test_the_context_can_be_filled_but_not_exceeded(tiny):
    prompt = np.tile(PROMPT, 26)[:280]
    ids = list(generate_ids(tiny.decoder, prompt, tokens=20))
    assert ids == teacher_forced(tiny, prompt, ids).argmax(-1).tolist()
    with refused("280", "21", "300"):
        list(generate_ids(tiny.decoder, prompt, tokens=21))


def test_no_tokens_asked_for_are_none_given(tiny):
    assert list(generate_ids(tiny.decoder, PROMPT, tokens=0)) == []
