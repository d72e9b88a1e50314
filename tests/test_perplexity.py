"""Perplexity and divergence against the float64 oracle; the default model's golden figures with their protocols."""

from dataclasses import replace

import checkpoints
import jax
import numpy as np
import oracle
import pytest
import torch
from checkpoints import refused
from conftest import wikitext

import jquant
from jquant.data import join_lines, windows
from jquant.evaluation.perplexity import Reference, Scores, score
from jquant.io.load import LanguageModel, load_model

forward = jax.jit(lambda decoder, tokens: decoder(tokens))

# Five windows: with batches of 4 the last is a batch of its own, and 4 × 99 scored rows are no multiple of ROWS.
CONTEXT, COUNT = 100, 5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> LanguageModel:
    return load_model(checkpoints.save(tmp_path_factory.mktemp("tiny"), checkpoints.llama()))


@pytest.fixture(scope="module")
def quantized(tiny) -> LanguageModel:
    return jquant.quantize(tiny, "rtn", bits=3, group=32)


@pytest.fixture(scope="module")
def text() -> str:
    return checkpoints.random_text(600, seed=4)


@pytest.fixture(scope="module")
def tokens(tiny, text) -> np.ndarray:
    return windows(tiny.tokenizer.encode(text), CONTEXT, COUNT)


@pytest.fixture(scope="module")
def logits(tiny, tokens) -> np.ndarray:
    return np.asarray(forward(tiny.decoder, tokens))


def oracle_nll(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """−log p of every scored token in float64, from the oracle's perplexity of two tokens at a time."""
    pairs = [[(logits[w, i : i + 2], tokens[w, i : i + 2]) for i in range(CONTEXT - 1)] for w in range(len(tokens))]
    return np.array([[np.log(oracle.perplexity(*pair)) for pair in row] for row in pairs])


def test_perplexity_and_its_error_equal_the_oracles(tiny, text, tokens, logits):
    result = jquant.perplexity(tiny, text, context=CONTEXT, windows=COUNT)
    by_window = [oracle.perplexity(*window) for window in zip(logits, tokens, strict=True)]
    expected = float(np.exp(np.log(by_window).mean()))
    nll = oracle_nll(logits, tokens)
    assert result.value == float(result) == pytest.approx(expected, rel=1e-5)
    assert result.stderr == pytest.approx(expected * nll.std(ddof=1) / np.sqrt(nll.size), rel=1e-4)
    assert (result.windows, result.context, result.bos) == (COUNT, CONTEXT, False)
    assert result.scored_tokens == COUNT * (CONTEXT - 1)


def test_every_scored_token_has_the_oracles_likelihood(tiny, tokens, logits):
    scores = score(tiny.decoder, tokens)
    assert scores.nll.shape == (COUNT, CONTEXT - 1)
    assert scores.kl is None
    assert scores.agrees is None
    np.testing.assert_allclose(scores.nll, oracle_nll(logits, tokens), atol=1e-4, rtol=0)


def test_divergence_equals_the_oracles(tiny, quantized, tokens, logits):
    reference = Reference(tiny.decoder, score(tiny.decoder, tokens).hidden)
    scores = score(quantized.decoder, tokens, reference=reference)
    other = np.asarray(forward(quantized.decoder, tokens))
    expected = [[oracle.kl(p, q) for p, q in zip(*row, strict=True)] for row in zip(logits[:, :-1], other[:, :-1])]  # noqa: B905
    assert scores.kl.mean() > 0.01
    np.testing.assert_allclose(scores.kl, expected, atol=1e-5, rtol=1e-4)
    np.testing.assert_array_equal(scores.agrees, logits[:, :-1].argmax(-1) == other[:, :-1].argmax(-1))
    assert 0 < scores.agrees.mean() < 1
    np.testing.assert_allclose(scores.nll, oracle_nll(other, tokens), atol=1e-4, rtol=0)


def test_a_model_does_not_diverge_from_itself(tiny, tokens):
    scores = score(tiny.decoder, tokens)
    again = score(tiny.decoder, tokens, reference=Reference(tiny.decoder, scores.hidden))
    assert np.abs(again.kl).max() < 1e-6
    assert again.agrees.all()
    np.testing.assert_array_equal(again.nll, scores.nll)


def test_batch_size_does_not_matter(tiny, tokens):
    by_four = score(tiny.decoder, tokens, batch=4)
    for batch in (1, 5):
        other = score(tiny.decoder, tokens, batch=batch)
        np.testing.assert_allclose(other.nll, by_four.nll, atol=2e-5, rtol=0)
        np.testing.assert_allclose(other.hidden, by_four.hidden, atol=2e-5, rtol=0)


def test_progress_is_told(tiny, tokens):
    calls = []
    score(tiny.decoder, tokens, progress=lambda *call: calls.append(call))
    assert calls == [("evaluate", 4, 5), ("evaluate", 5, 5)]


def test_the_summary_formulas_hold_on_numbers_worked_by_hand():
    scores = Scores(np.log([[2.0, 8.0], [2.0, 8.0]]).astype(np.float32), None, None, np.zeros((2, 3, 1)))
    assert scores.perplexity == pytest.approx(4.0, rel=1e-6)
    # nll = ln 4 ± ln 2: the sample deviation is ln 2 · √(4/3), over √4 tokens.
    assert scores.stderr == pytest.approx(4.0 * np.log(2) * (4 / 3) ** 0.5 / 2, rel=1e-6)


def test_each_window_has_the_mean_of_its_own_tokens(tiny, tokens, logits):
    scores = score(tiny.decoder, tokens)
    expected = [np.log(oracle.perplexity(*window)) for window in zip(logits, tokens, strict=True)]
    assert scores.window_nll.dtype == np.float64
    np.testing.assert_allclose(scores.window_nll, expected, rtol=1e-5)
    assert np.exp(scores.window_nll.mean()) == pytest.approx(scores.perplexity, rel=1e-12)


@pytest.mark.parametrize("bos", [False, True])
def test_overlapping_windows_score_each_token_once_as_transformers_predicts_it(tiny, text, bos):
    theirs, stride = checkpoints.llama(), 30
    result = jquant.perplexity(tiny, text, context=CONTEXT, stride=stride, bos=bos, windows=6)
    ids, losses = tiny.tokenizer.encode(text), {}
    for begin in range(0, 6 * stride, stride):
        window = np.concatenate([[tiny.tokenizer.bos_id] * bos, ids[begin : begin + CONTEXT - bos]]).astype(int)
        with torch.no_grad():
            predicted = torch.log_softmax(theirs(torch.tensor(window[None])).logits[0].double(), -1).numpy()
        for place in range(CONTEXT - stride, CONTEXT):
            losses[begin + place] = -predicted[place - 1, window[place]]
    assert len(losses) == 6 * stride == result.scored_tokens  # no token twice
    assert result.value == pytest.approx(np.exp(np.mean(list(losses.values()))), rel=1e-5)
    assert "6 windows of 100 tokens, one every 30" in repr(result)


def test_windows_that_touch_in_one_token_score_every_prediction(tiny, text):
    every = jquant.perplexity(tiny, text, context=CONTEXT, stride=CONTEXT - 1, windows=3)
    assert every.scored_tokens == 3 * (CONTEXT - 1)
    compared = jquant.compare(tiny, {"itself": replace(tiny)}, text, context=CONTEXT, stride=20, windows=4)
    assert compared.protocol["stride"] == 20
    assert compared.protocol["scored_tokens"] == 80 == compared["itself"].perplexity.scored_tokens
    assert compared["itself"].kl == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("stride", "message"), [(101, "stride=101 would leave out text"), (0, "stride takes a whole")])
def test_strides_that_leave_text_out_are_refused(tiny, text, stride, message):
    with refused(message):
        jquant.perplexity(tiny, text, context=CONTEXT, stride=stride)


def test_bos_opens_every_window_and_is_not_scored(tiny, text):
    result = jquant.perplexity(tiny, text, context=CONTEXT, windows=COUNT, bos=True)
    cut = windows(tiny.tokenizer.encode(text), CONTEXT, COUNT, bos=tiny.tokenizer.bos_id)
    assert (cut[:, 0] == 0).all()
    logits = np.asarray(forward(tiny.decoder, cut))
    expected = np.exp(np.mean([np.log(oracle.perplexity(*window)) for window in zip(logits, cut, strict=True)]))
    assert result.value == pytest.approx(expected, rel=1e-5)
    assert result.bos


def test_bos_is_refused_where_the_tokenizer_has_none(tiny, text):
    without = replace(tiny, tokenizer=replace(tiny.tokenizer, bos_id=None))
    with refused("BOS"):
        jquant.perplexity(without, text, context=CONTEXT, windows=1, bos=True)


def test_a_text_shorter_than_asked_is_refused(tiny, text):
    with refused("too few"):
        jquant.perplexity(tiny, "abcd", context=CONTEXT)
    with refused("10000 windows"):
        jquant.perplexity(tiny, text, context=CONTEXT, windows=10_000)


def test_windows_with_nothing_to_score_are_refused(tiny, text):
    with refused("context"):
        jquant.perplexity(tiny, text, context=1, windows=4)


# ---- golden figures: REFERENCE.md, an independent JAX implementation and transformers 5.23 --------------------------
# The default model, first 32 windows of 1024 tokens, text tokenized whole, no BOS, 1023 predictions a window scored.


@pytest.mark.parametrize(("join", "ids"), [(False, 303_415), (True, 304_986)])
def test_golden_number_of_wikitexts_tokens(default_model, join, ids):
    text = wikitext("wiki.test.raw")
    assert len(default_model.tokenizer.encode(join_lines(text) if join else text)) == ids


@pytest.mark.optimised
@pytest.mark.slow  # the same model and windows as without blank lines, below
@pytest.mark.parametrize(("join", "expected"), [(False, 23.940), (True, 24.191)])
def test_golden_perplexity_of_wikitext(default_model, join, expected):
    text = wikitext("wiki.test.raw")
    result = jquant.perplexity(default_model, join_lines(text) if join else text, windows=32)
    assert result.value == pytest.approx(expected, abs=0.01)
    assert (result.context, result.scored_tokens) == (1024, 32 * 1023)


def noblank(model: LanguageModel, count: int) -> np.ndarray:
    ids = model.tokenizer.encode(wikitext("wiki.test.noblank.raw"))
    assert len(ids) == 301_948
    return windows(ids, 1024, count)


@pytest.mark.optimised
def test_golden_perplexity_of_wikitext_without_blank_lines(default_model):
    nll = score(default_model.decoder, noblank(default_model, 32)).nll
    assert float(np.exp(nll.mean(dtype=np.float64))) == pytest.approx(24.009, abs=0.01)
    assert float(np.exp(nll[:16].mean(dtype=np.float64))) == pytest.approx(22.551, abs=0.01)


@pytest.mark.slow
@pytest.mark.optimised
def test_golden_perplexity_of_rounding_to_nearest(default_model):
    method = jquant.Method(jquant.Int(4, 64, symmetric=True))
    rounded = jquant.quantize(default_model, method)
    assert score(rounded.decoder, noblank(default_model, 16)).perplexity == pytest.approx(32.189, abs=0.05)


@pytest.mark.optimised
@pytest.mark.slow
def test_golden_perplexity_of_nf4(default_model):
    """Bitsandbytes 0.50.2, block 64, without double quantization: 30.43, under bfloat16 autocast there."""
    rounded = jquant.quantize(default_model, "nf4")
    assert score(rounded.decoder, noblank(default_model, 32)).perplexity == pytest.approx(30.43, abs=0.15)
