"""Generated text: what the full forward pass says, token by token; reproducible sampling; streaming; batches."""

from dataclasses import replace

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from checkpoints import refused, relative

import jquant
from jquant import CacheFormat, Int, Stored, with_cache
from jquant.evaluation.generation import _among, generate_batch, generate_ids, in_steps, step, unstack
from jquant.io.load import LanguageModel, load_model
from jquant.kernels.cpu import build
from jquant.models.cache import Cache
from jquant.qtensor import prepared

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
def wide(tmp_path_factory) -> LanguageModel:
    """Whose rows are whole groups of every format."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "initializer_range": 0.1}
    return load_model(checkpoints.save(tmp_path_factory.mktemp("wide"), checkpoints.llama(**shape)))


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


@pytest.mark.skipif(build.target() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("method", ["rtn-4", "rtn-2", "int8", "nf4_double", "q4_k", "fp8_e4m3"])
def test_weights_of_one_input_are_multiplied_at_once(wide, method):
    """Those of a kernel: q, k and v; gate and up. Logits are those of one product each."""
    decoder = jquant.quantize(wide, method, progress=False).decoder
    leaves, structure = jax.tree.flatten(in_steps(decoder))
    layers = jax.tree.unflatten(structure, leaves)[1]
    taken = method != "fp8_e4m3"
    assert {layer.attention.q is None for layer in layers} == {taken}
    assert {layer.mlp.together is not None for layer in layers} == {taken}
    tokens, cache = jnp.arange(7)[None], Cache.init(decoder.config, 1, 8, jnp.float32)
    logits, _ = step(structure, leaves, tokens, cache)
    np.testing.assert_allclose(logits, prepared(decoder)(tokens)[:, -1], rtol=1e-4, atol=1e-5)


def test_weights_of_several_formats_are_multiplied_one_by_one(wide):
    rules = [(r"attention\.k", "int8"), (r"mlp\.up", None), ("", "rtn-4")]
    layers = in_steps(jquant.quantize(wide, rules, progress=False).decoder)[1]
    assert all(layer.attention.together is None and layer.mlp.together is None for layer in layers)


def test_a_quantized_model_generates_its_own_text(tiny, quantized):
    assert list(generate_ids(tiny.decoder, PROMPT, tokens=20)) != list(
        generate_ids(quantized.decoder, PROMPT, tokens=20)
    )


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


# ---- many prompts at once -------------------------------------------------------------------------------------------

PROMPTS = np.random.default_rng(3).integers(2, checkpoints.VOCAB, (5, 11), np.int32)
KEYS = jax.random.split(jax.random.key(7), 5)


@pytest.mark.parametrize("which", ["tiny", "quantized"])
def test_every_row_of_a_batch_is_greedy_as_alone(which, request):
    decoder = request.getfixturevalue(which).decoder
    ids = generate_batch(decoder, PROMPTS, KEYS, tokens=20)
    assert ids.shape == (5, 20)
    assert ids.tolist() == [list(generate_ids(decoder, prompt, tokens=20)) for prompt in PROMPTS]
    assert len({tuple(row) for row in ids.tolist()}) == 5


def test_logits_of_a_batch_are_those_of_each_row_alone_within_rounding(tiny):
    leaves, structure = jax.tree.flatten((tiny.decoder, unstack(tiny.decoder)))

    def logits(prompts: np.ndarray) -> np.ndarray:
        """After the prompt and after one token more, which reads the cache."""
        cache = Cache.init(tiny.config, len(prompts), 16, np.float32)
        first, cache = step(structure, leaves, prompts[:, :-1], cache)
        return np.stack([first, step(structure, leaves, prompts[:, -1:], cache)[0]], 1)

    together = logits(PROMPTS)
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert relative(row, logits(prompt[None])[0]) < 1e-5
    assert relative(together[0], together[1]) > 0.1


@pytest.mark.parametrize("top_k", [None, 5])
def test_a_row_depends_on_its_own_prompt_and_key_alone(tiny, top_k):
    options = {"tokens": 20, "temperature": 1.5, "top_k": top_k}
    ids = generate_batch(tiny.decoder, PROMPTS, KEYS, **options)
    others = generate_batch(tiny.decoder, PROMPTS[::-1], KEYS[::-1], **options)
    np.testing.assert_array_equal(others[::-1], ids)
    for place in range(5):
        alone = generate_batch(tiny.decoder, PROMPTS[[place]], KEYS[np.array([place])], **options)
        np.testing.assert_array_equal(alone[0], ids[place])
    one_prompt = generate_batch(tiny.decoder, PROMPTS[[0] * 5], KEYS, **options)
    assert len({tuple(row) for row in one_prompt.tolist()}) == 5
    np.testing.assert_array_equal(one_prompt[0], ids[0])


def test_fewer_tokens_are_the_first_of_more(tiny):
    ids = generate_batch(tiny.decoder, PROMPTS, KEYS, tokens=20, temperature=1.5)
    np.testing.assert_array_equal(generate_batch(tiny.decoder, PROMPTS, KEYS, tokens=1, temperature=1.5), ids[:, :1])
    np.testing.assert_array_equal(generate_batch(tiny.decoder, PROMPTS, KEYS, tokens=9, temperature=1.5), ids[:, :9])
    assert generate_batch(tiny.decoder, PROMPTS, KEYS, tokens=0).shape == (5, 0)


@pytest.mark.parametrize("top_k", [None, 12])
def test_tokens_drawn_in_a_batch_follow_the_softmax(tiny, top_k):
    """Chi-square of the first tokens of 3,000 texts with one prompt; the vocabulary has two and a half blocks."""
    prompts, keys = np.repeat(PROMPTS[:1, :3], 3000, 0), jax.random.split(jax.random.key(1), 3000)
    drawn = generate_batch(tiny.decoder, prompts, keys, tokens=1, temperature=1.3, top_k=top_k)[:, 0]
    logits = np.asarray(forward(tiny.decoder, prompts[:1]))[0, -1].astype(np.float64) / 1.3
    p = np.exp(logits - logits.max())
    if top_k is not None:
        p[p < np.sort(p)[-top_k]] = 0
    expected, observed = 3000 * p / p.sum(), np.bincount(drawn, minlength=checkpoints.VOCAB)
    assert observed[expected == 0].sum() == 0
    often = expected >= 5
    assert often.sum() >= 10
    rare = [] if top_k else [(observed[~often].sum(), expected[~often].sum())]
    pairs = np.array([*zip(observed[often], expected[often], strict=True), *rare])
    assert scipy.stats.chisquare(*pairs.T).pvalue > 1e-3


@pytest.mark.parametrize("vocab", [100, 1000])
def test_the_most_likely_tokens_are_those_of_a_sort(vocab):
    """Whole numbers: many logits are equal, and those equal to the k-th stay."""
    logits = jnp.asarray(np.random.default_rng(0).integers(-40, 40, (3, vocab)), jnp.float32)
    for k in (1, 2, 7, 50, vocab):
        least = np.sort(logits)[:, -k, None]
        np.testing.assert_array_equal(_among(logits, k), np.where(logits < least, -np.inf, logits))


RAGGED = [PROMPTS[0], PROMPTS[1, :3], PROMPTS[2, :7], PROMPTS[3, :3], PROMPTS[4, :10]]


@pytest.mark.parametrize(
    ("options", "cached"),
    [({}, True), ({"temperature": 1.5}, False), ({"temperature": 1.5, "top_k": 5}, True)],
    ids=str,
)
def test_prompts_of_several_lengths_go_on_as_alone(tiny, cached, options):
    """Also with a packed cache, whose tokens are rounded by their positions."""
    packed = Stored(Int(8, 4, symmetric=True), "channel")
    decoder = with_cache(tiny.decoder, CacheFormat(packed, packed, recent=2, first=1) if cached else None)
    together = generate_batch(decoder, RAGGED, KEYS, tokens=9, **options)
    for row, (prompt, ids) in enumerate(zip(RAGGED, together, strict=True)):
        [alone] = generate_batch(decoder, [prompt], KEYS[np.array([row])], tokens=9, **options)
        np.testing.assert_array_equal(ids, alone)


def test_texts_arrive_together_and_end_each_by_itself(tiny):
    prompts = ["abcd efgh", "ab", "abc abc abc abc"]
    alone = [list(generate_ids(tiny.decoder, tiny.tokenizer.encode(prompt), tokens=20)) for prompt in prompts]
    stop = next(i for i, token in enumerate(alone[0]) if i > 1 and token not in {*alone[0][:i], *alone[1], *alone[2]})
    stopping = replace(tiny, tokenizer=replace(tiny.tokenizer, eos_ids=(alone[0][stop],)))
    pieces = list(jquant.generate_many(stopping, prompts, tokens=20))
    texts = ["".join(piece for row, piece in pieces if row == number) for number in range(3)]
    assert texts == [tiny.tokenizer.decode(ids) for ids in (alone[0][:stop], alone[1], alone[2])]
    order = [row for row, _ in pieces]
    assert order[-1] != 0
    assert order != sorted(order)  # piece by piece, not text by text


def test_the_longest_prompt_decides_whether_the_context_is_exceeded(tiny):
    long = np.tile(PROMPT, 27)[:290]
    with refused("290", "11", "300"):
        generate_batch(tiny.decoder, [PROMPT, long], KEYS[:2], tokens=11)
    assert generate_batch(tiny.decoder, [PROMPT, long], KEYS[:2], tokens=10).shape == (2, 10)


@pytest.mark.parametrize(
    ("prompts", "keys", "options", "parts"),
    [
        (PROMPTS, KEYS[:4], {}, ["5 prompts", "[4]"]),
        (PROMPTS[:1], KEYS[0], {}, ["1 prompts", "[]"]),
        (PROMPTS, jax.random.key_data(KEYS), {}, ["typed keys", "uint32 [5, 2]"]),
        (PROMPTS, KEYS, {"tokens": 290}, ["11", "290", "300"]),
        (PROMPTS, KEYS, {"tokens": -1}, ["tokens", "-1"]),
        (PROMPTS, KEYS, {"temperature": float("nan")}, ["temperature", "nan"]),
        (PROMPTS, KEYS, {"top_k": 321}, ["top_k=321", "320"]),
        (PROMPTS + 300, KEYS, {}, ["ids", "319"]),
        (PROMPTS[0], KEYS, {}, ["int32 [11]"]),
        (PROMPTS[:, :0], KEYS, {}, ["no tokens"]),
        ([], KEYS[:0], {}, ["no tokens"]),
    ],
)
def test_a_batch_that_can_not_be_continued_is_refused(tiny, prompts, keys, options, parts):
    with refused(*parts):
        generate_batch(tiny.decoder, prompts, keys, **({"tokens": 3} | options))
