"""jquant.io.tokenizer against transformers: its GGUF loader, and its own tokenizer classes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from conftest import wikitext
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors, trainers

from jquant.errors import InputError
from jquant.io.tokenizer import Tokenizer, tokenizer_from_folder, tokenizer_from_gguf

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ODD_TEXTS = [
    "",
    " ",
    "a  b   c\t\t\td \n \n\n  e",
    "line\r\nline\r\n\r\n\rend\n\n1. item\n\n\n22",
    "I'm sure they'll say it's FINE, DON'T you'VE 'tis ’twas",
    "0 1 12 123 1234 12345.678 1,000,000 x86_64 ²³½ ٣٤ Ⅷ",
    "日本語のテキスト、中文。한국어 텍스트 ไทย हिन्दी",
    "🎉👩‍👩‍👧‍👦🇨🇭 ❤️ e\u0301 é \u200b\u00a0\ufeff\ufffd",
    "def f(x: int) -> str:\n\tif x >= 1e-3:\n        return f'{x!r}'  # ok\n\n\nprint(f(3)) // a/b\\c",
    "NUL\0and\x01\x7f controls",
    "CamelCase mixedUPPER HTTPServer ÀÉÎ Ǆ ß",
    "  leading and trailing  ",
]
SPECIAL_TEXTS = [
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<|endoftext|>b <repo_name>x",
    "<|im_end",
    "<|im_start|><|im_start|>",
]


@pytest.fixture(scope="session")
def tokenizer(default_gguf: Path) -> Tokenizer:
    return tokenizer_from_gguf(default_gguf)


@pytest.fixture(scope="session")
def reference(default_gguf: Path):
    """The same file through transformers, which needs torch for it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(default_gguf.parent, gguf_file=default_gguf.name)


def reference_ids(reference, text: str) -> list[int]:
    return reference(text, add_special_tokens=False)["input_ids"]


# ---- the default model ----------------------------------------------------------------------------------------------


def rows_joined(text: str) -> str:
    """The literature's protocol: blank rows are empty strings, the others keep their line end."""
    return "\n\n".join(row if row.strip() else "" for row in text.splitlines(keepends=True))


@pytest.mark.parametrize(
    ("file", "join", "count"),
    [
        ("wiki.test.raw", False, 303_415),
        ("wiki.test.noblank.raw", False, 301_948),
        ("wiki.test.raw", True, 304_986),
    ],
)
def test_wikitext_is_tokenized_as_by_transformers(tokenizer, reference, file, join, count):
    text = rows_joined(wikitext(file)) if join else wikitext(file)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.shape == (count,)
    assert ids.tolist() == reference_ids(reference, text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ODD_TEXTS + SPECIAL_TEXTS)
def test_odd_text_is_tokenized_as_by_transformers(tokenizer, reference, text):
    ids = tokenizer.encode(text)
    assert ids.tolist() == reference_ids(reference, text)
    assert tokenizer.decode(ids) == text == "".join(tokenizer.stream(ids))
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=False)


# SmolLM2 has no token for these bytes (six control characters, the lead bytes of U+40000-BFFFF): no id comes of them.
UNKNOWN_BYTES = bytes([0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2])


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text("a1 \n\r\t'é日🎉"))
def test_any_text_survives_and_agrees(tokenizer, reference, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.encode().translate(None, UNKNOWN_BYTES).decode(errors="replace")
    assert ids.tolist() == reference_ids(reference, text)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=30))
def test_streamed_pieces_join_to_the_decoded_text(tokenizer, ids):
    """For any ids a model may produce, broken UTF-8 included."""
    assert "".join(tokenizer.stream(iter(ids))) == tokenizer.decode(ids)


def test_stream_yields_early_and_never_half_a_character(tokenizer):
    text = "日本 👩‍👧 ok"
    ids = tokenizer.encode(text)
    pieces = list(tokenizer.stream(ids))
    assert len(ids) > len(text)  # so characters do span tokens here
    assert len(pieces) > 1
    assert not any("\ufffd" in piece for piece in pieces)
    endless = tokenizer.stream(iter(lambda: int(ids[-1]), None))
    assert next(endless)  # the first piece comes before the ids are exhausted: these never are


def test_attributes_of_the_default_model(tokenizer, reference):
    assert tokenizer.vocab_size == len(reference) == 49_152
    assert tokenizer.bos_id == reference.bos_token_id == 1
    assert tokenizer.eos_ids == (reference.eos_token_id,) == (2,)
    assert tokenizer.add_bos is False
    assert tokenizer.chat_template == reference.chat_template


def test_decode_takes_any_integer_sequence(tokenizer):
    ids = tokenizer.encode("some text")
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == tokenizer.decode(tuple(ids)) == "some text"
    assert tokenizer.decode([]) == "" == "".join(tokenizer.stream([]))


def test_neither_torch_nor_transformers_is_imported(default_gguf):
    code = (
        "import sys; from jquant.io.tokenizer import tokenizer_from_gguf;"
        f"tokenizer_from_gguf({str(default_gguf)!r}).encode('hi');"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0


def test_an_unpaired_surrogate_is_an_input_error(tokenizer):
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.encode("a\ud800")


# ---- small files: pre-tokenizers ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def small_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges learned without any pre-tokenizer, so that only the pre-tokenizer keeps pieces apart."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        max_token_length=7,
        show_progress=False,
    )
    trained.train_from_iterator(ODD_TEXTS * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def write_gguf(path: Path, vocab: dict[str, int], drop: str | None = None, arch: str = "llama", **changes) -> Path:
    """A GGUF file with nothing but a tokenizer. `changes` replaces fields, `drop` leaves one out."""
    fields = {"model": "gpt2", "pre": "gpt-2", "tokens": sorted(vocab, key=vocab.__getitem__), "merges": []}
    fields |= {"token_type": [1] * len(vocab), "bos_token_id": 0, "eos_token_id": 0} | changes
    writer = gguf.GGUFWriter(path, arch)
    for name, value in fields.items():
        if name != drop:
            key = f"tokenizer.ggml.{name}"
            add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
            add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def joined(merges: list[tuple[str, str]]) -> list[str]:
    return [" ".join(merge) for merge in merges]


def transformers_gguf(path: Path) -> tokenizers.Tokenizer:
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    return convert_gguf_tokenizer(*get_gguf_tokenizer(str(path))[:2])[0]


@pytest.mark.parametrize("pre", ["gpt-2", "default", "smollm", "llama-bpe", "llama3", "llama-v3", "tekken", "qwen2"])
def test_pre_tokenizer_agrees_with_transformers_gguf_loader(tmp_path, small_bpe, pre):
    vocab, merges = small_bpe
    path = write_gguf(tmp_path / "x.gguf", vocab, pre=pre, merges=joined(merges))
    ours, theirs = tokenizer_from_gguf(path), transformers_gguf(path)
    if pre not in ("gpt-2", "default", "smollm", "qwen2"):
        theirs.model.ignore_merges = True  # which the loader leaves out; see the converter's test below
    if pre == "qwen2":
        theirs.normalizer = tokenizers.normalizers.NFC()  # left out too; see Qwen2Tokenizer's test below
    for text in ODD_TEXTS:
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids, text
    assert ours.add_bos == (pre not in ("gpt-2", "default", "smollm", "qwen2"))


@pytest.mark.parametrize(("pre", "name"), [("gpt-2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer")])
def test_pre_tokenizer_agrees_with_the_models_own_class(tmp_path, small_bpe, pre, name):
    import transformers

    vocab, merges = small_bpe
    ours = tokenizer_from_gguf(write_gguf(tmp_path / "x.gguf", vocab, pre=pre, merges=joined(merges)))
    token = min(vocab, key=vocab.__getitem__)  # the classes insist on special tokens; the file has the same ones
    theirs = getattr(transformers, name)(
        vocab=vocab, merges=merges, unk_token=token, bos_token=token, eos_token=token, pad_token=token
    )
    for text in ODD_TEXTS:
        assert ours.encode(text).tolist() == theirs(text, add_special_tokens=False)["input_ids"], text


def test_llama_bpe_agrees_with_the_tiktoken_converter(tmp_path):
    """Including a token no merge leads to, which `ignore_merges` finds all the same."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in [b"th", b"the", b" the", b"12", b"123", b"'L", b"'LL", b"\r\n", b"\n\n", b"zqxj", b" zqxj"]:
        ranks[token] = len(ranks)
    converter = TikTokenConverter("unused")
    converter.load_tiktoken_bpe = lambda _: ranks
    theirs = converter.converted()
    model = json.loads(theirs.to_str())["model"]
    path = write_gguf(tmp_path / "x.gguf", model["vocab"], pre="llama-bpe", merges=joined(model["merges"]))
    ours = tokenizer_from_gguf(path)
    assert len(ours.encode("zqxj zqxj")) == 2
    for text in [*ODD_TEXTS, "the the zqxj zqxjs 1234 we'LL\r\n\r\n\n\nx"]:
        assert ours.encode(text).tolist() == theirs.encode(text).ids, text


def test_control_and_user_defined_tokens(tmp_path, small_bpe):
    vocab, merges = small_bpe
    vocab = vocab | {"<ctl>": len(vocab), "<think>": len(vocab) + 1, "<｜fin▁｜>": len(vocab) + 2}
    types = [1] * (len(vocab) - 3) + [3, 4, 3]
    changes = {"token_type": types, "merges": joined(merges), "bos_token_id": vocab["<ctl>"], "add_bos_token": True}
    changes |= {"eos_token_id": vocab["<ctl>"], "eot_token_id": vocab["<｜fin▁｜>"], "eom_token_id": vocab["<ctl>"]}
    ours = tokenizer_from_gguf(write_gguf(tmp_path / "x.gguf", vocab, **changes))
    ids = ours.encode("a<think><ctl><｜fin▁｜>").tolist()
    assert ids == [vocab["a"], vocab["<think>"], vocab["<ctl>"], vocab["<｜fin▁｜>"]]
    assert ours.decode(ids) == "a<think><ctl><｜fin▁｜>"
    assert [token.special for _, token in sorted(ours.backend.get_added_tokens_decoder().items())][-3:] == [1, 0, 1]
    assert ours.add_bos
    assert ours.eos_ids == (vocab["<ctl>"], vocab["<｜fin▁｜>"])


# ---- small files: SentencePiece -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def small_sentencepiece() -> dict:
    """Fields of a file like Llama 2's: <unk>, <s>, </s>, 256 bytes, pieces scored by rank, then single characters."""
    words = """▁ the▁ ▁the ▁t he er in ing ▁a ▁an and ▁▁ ▁▁▁▁ 12 00 ''
        ▁b be bet ▁bet étr ét tr ee ▁it it it's 's 日本""".split()  # noqa: SIM905
    letters = sorted(set("".join(words)) | set("abcdefghijklmnopqrstuvwxyz0123456789.,'"))
    multi = list(dict.fromkeys(word for word in words if len(word) > 1))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *multi, *letters]
    scores = [0.0] * 259 + [-float(i // 2) for i in range(len(multi))]  # // 2: ties, which sort by length
    return {
        "model": "llama",
        "vocab": {token: index for index, token in enumerate(tokens)},
        "token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "scores": scores + [-1e4 - i for i in range(len(letters))],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


def test_sentencepiece_agrees_with_transformers(tmp_path, small_sentencepiece):
    path = write_gguf(tmp_path / "x.gguf", drop="merges", **small_sentencepiece)
    ours, theirs = tokenizer_from_gguf(path), transformers_gguf(path)
    assert (ours.bos_id, ours.eos_ids, ours.add_bos) == (1, (2,), True)
    texts = ["the bettering band", " the", "  the", "a</s> the", "x<unk>y<s>", "it's 12 00 étree", "   "]
    for text in texts + ODD_TEXTS:
        ids = ours.encode(text).tolist()
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False) == "".join(ours.stream(ids)), text


def test_sentencepiece_without_space_prefix(tmp_path, small_sentencepiece):
    from transformers import LlamaTokenizer

    path = write_gguf(tmp_path / "x.gguf", drop="merges", add_space_prefix=False, **small_sentencepiece)
    ours = tokenizer_from_gguf(path)
    model = json.loads(transformers_gguf(path).to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    theirs = LlamaTokenizer(vocab=model["vocab"], merges=merges, add_prefix_space=False)
    for text in ODD_TEXTS:
        ids = ours.encode(text)
        assert ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(ids) == text


# ---- bad files ------------------------------------------------------------------------------------------------------


def test_a_truncated_file_is_an_input_error(tmp_path, small_bpe):
    vocab, merges = small_bpe
    whole = write_gguf(tmp_path / "x.gguf", vocab, merges=joined(merges)).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [0, 3, 4, 23, 24, 30, *range(31, len(whole) - 40, 997), len(whole) - 40]:
        cut.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cut\.gguf"):
            tokenizer_from_gguf(cut)


@pytest.mark.parametrize(
    "content", [b"no such format at all, sorry", b"GGUF" + bytes(60), b"GGUF\x03\0\0\0" + b"\xff" * 60]
)
def test_another_format_is_an_input_error(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.gguf cannot be read as GGUF"):
        tokenizer_from_gguf(tmp_path / "x.gguf")


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="is missing"):
        tokenizer_from_gguf(tmp_path / "absent.gguf")


@pytest.mark.parametrize("field", ["model", "pre", "tokens", "merges", "token_type"])
def test_a_missing_field_is_named(tmp_path, field):
    path = write_gguf(tmp_path / "x.gguf", {"a": 0, "b": 1, "ab": 2}, merges=["a b"], drop=field)
    with pytest.raises(InputError, match=rf"no field tokenizer\.ggml\.{field}"):
        tokenizer_from_gguf(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "deepseek-llm"}, "pre-tokenizer 'deepseek-llm'.*model.tokenizer=<folder with tokenizer.json>"),
        ({"model": "t5"}, "kind 't5'.*model.tokenizer="),
        ({"model": "llama"}, "no field tokenizer.ggml.scores"),
        ({"model": "llama", "scores": [0.0], "merges": "x"}, "unusable"),
        ({"model": "llama", "arch": "phi3"}, "phi3"),
        ({"tokens": ["a", "b", "a"]}, "twice"),
        ({"tokens": [1, 2, 3]}, "unusable"),
        ({"tokens": "abc"}, "ill-typed field tokenizer.ggml.tokens"),
        ({"merges": ["a z"]}, "unusable.*z"),
        ({"merges": ["ab"]}, "unusable"),
        ({"token_type": [1, 1]}, "unusable"),
        ({"eos_token_id": 3}, "eos_token_id 3 of 3"),
        ({"bos_token_id": "a"}, "bos_token_id a of 3"),
        ({"add_bos_token": "yes"}, "ill-typed field tokenizer.ggml.add_bos_token"),
    ],
)
def test_an_unusable_field_is_an_input_error(tmp_path, changes, message):
    path = write_gguf(tmp_path / "x.gguf", {"a": 0, "b": 1, "ab": 2}, **({"merges": ["a b"]} | changes))
    with pytest.raises(InputError, match=message):
        tokenizer_from_gguf(path)


def test_scores_that_do_not_order_merges_are_refused(tmp_path):
    tokens = ["a", "b", "c", "ab", "bc", "abc"]
    path = write_gguf(
        tmp_path / "x.gguf", {token: i for i, token in enumerate(tokens)}, model="llama", scores=[0.0] * 6
    )
    with pytest.raises(InputError, match="scores that do not order its merges"):
        tokenizer_from_gguf(path)


# ---- folders --------------------------------------------------------------------------------------------------------


def write_json(folder: Path, **files: dict) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def folder(tmp_path, tokenizer) -> Path:
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_folder_equals_gguf(folder, tokenizer):
    ours = tokenizer_from_folder(write_json(folder, tokenizer_config={"eos_token": {"content": "<|im_end|>"}}))
    assert (ours.bos_id, ours.eos_ids, ours.add_bos, ours.chat_template) == (None, (2,), False, None)
    for text in ODD_TEXTS + SPECIAL_TEXTS:
        assert ours.encode(text).tolist() == tokenizer.encode(text).tolist()


@pytest.mark.parametrize(
    ("files", "bos", "eos"),
    [
        ({}, None, ()),
        ({"config": {"bos_token_id": 0, "eos_token_id": 5}}, 0, (5,)),
        (
            {"config": {"eos_token_id": 5}, "tokenizer_config": {"eos_token": "<|im_end|>", "bos_token": None}},
            None,
            (2,),
        ),
        (
            {"tokenizer_config": {"eos_token": "<|im_end|>"}, "generation_config": {"eos_token_id": [7, 0]}},
            None,
            (7, 0),
        ),
        ({"tokenizer_config": {"eos_token": "<unheard of>"}, "config": {"eos_token_id": 5}}, None, (5,)),
    ],
)
def test_folder_special_ids(folder, files, bos, eos):
    ours = tokenizer_from_folder(write_json(folder, **files))
    assert (ours.bos_id, ours.eos_ids) == (bos, eos)


def test_folder_settings_of_others_are_undone(folder, tokenizer):
    """Truncation and padding saved in tokenizer.json are dropped; a BOS template is reported and not applied."""
    saved = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    saved.enable_truncation(4)
    saved.enable_padding(length=8)
    saved.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    saved.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    ours = tokenizer_from_folder(write_json(folder, config={"bos_token_id": 1}))
    text = "one two three four five six seven eight nine ten"
    assert ours.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert ours.encode("").tolist() == []
    assert ours.add_bos
    assert ours.chat_template == "{{ messages }}"


def test_folder_without_tokenizer_json(tmp_path, small_bpe):
    vocab, merges = small_bpe
    write_json(
        tmp_path, vocab=vocab, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"}, config={"model_type": "gpt2"}
    )
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *joined(merges)]) + "\n", encoding="utf-8")
    gguf_file = write_gguf(tmp_path / "x.gguf", vocab, merges=joined(merges))
    ours, same = tokenizer_from_folder(tmp_path), tokenizer_from_gguf(gguf_file)
    for text in ODD_TEXTS:
        assert ours.encode(text).tolist() == same.encode(text).tolist()


def test_folder_errors(tmp_path):
    with pytest.raises(InputError, match="absent holds no tokenizer"):
        tokenizer_from_folder(tmp_path / "absent")
    write_json(tmp_path, config={"model_type": "qwen2"})  # transformers would make an empty tokenizer of this
    with pytest.raises(InputError, match="holds no tokenizer"):
        tokenizer_from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read"):
        tokenizer_from_folder(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_folder_with_broken_config(folder, content):
    (folder / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"config\.json is not"):
        tokenizer_from_folder(folder)
