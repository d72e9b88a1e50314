"""Text to token ids and back, from a GGUF file or a Hugging Face folder.

The `tokenizers` library does the work; this module builds its object from a file. transformers can do that for GGUF
too, but imports torch, which jquant never does; the tests compare the two on long texts.

Files are not trusted: no code in them runs. All that the libraries raise on a damaged file, panics of their compiled
code too, becomes an InputError.
"""

import os
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from jquant.errors import InputError
from jquant.io.files import JSON_LIMIT, check_plain, is_text, read_json
from jquant.io.gguf.header import read_metadata

_WAY_OUT = "model.tokenizer=<folder with tokenizer.json> would do instead"


@dataclass(frozen=True)
class Tokenizer:
    """A byte-pair tokenizer and the ids that generation needs.

    Attributes:
        backend: the `tokenizers.Tokenizer` that does the work.
        bos_id: the id that opens a text, if the model has one.
        eos_ids: the ids at which generation stops.
        add_bos: whether the model expects `bos_id` before a text; `encode` never adds it, the caller decides.
        chat_template: the Jinja source that lays out a conversation, if the file carries one.
        pre: the name by which a GGUF file says how text is cut before byte pairs are merged, if the file is one.
    """

    backend: tokenizers.Tokenizer = field(repr=False)
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos: bool = False
    chat_template: str | None = field(default=None, repr=False)
    pre: str | None = None

    @property
    def vocab_size(self) -> int:
        """The number of distinct tokens; a model's embedding may have more rows, for padding."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> np.ndarray:
        """Tokenizes `text` as one piece and adds no special tokens.

        A special token's name inside the text becomes that token, as in transformers' default
        (`split_special_tokens=False`): do not pass untrusted text where that matters. Bytes for which the vocabulary
        has no token yield no id (SmolLM2 lacks six control characters and most of the planes above U+3FFFF).

        Returns:
            int32 ids, shape [tokens].

        Raises:
            InputError: `text` holds an unpaired surrogate; the tokenizer's own expressions fail on it.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError("the text holds an unpaired surrogate; read its file with encoding='utf-8'") from error
        with _sentences("The tokenizer fails on this text"):
            return np.array(self.backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of `ids`, with special tokens by name; bytes that are no UTF-8 become U+FFFD."""
        with _sentences("The tokenizer can't spell these ids"):
            return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def stream(self, ids: Iterable[SupportsIndex]) -> Iterator[str]:
        """Yields the text of `ids` as they arrive, in whole characters; the pieces join to `decode(ids)`."""
        text = GrowingText(self)
        yield from filter(None, map(text.add, ids))
        if rest := text.end():
            yield rest


class GrowingText:
    """A text whose ids arrive one by one; its pieces join to what `Tokenizer.decode` gives."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.decoder = tokenizer, decoders.DecodeStream(skip_special_tokens=False)
        self.seen: list[int] = []
        self.printed = 0  # characters

    def add(self, token: SupportsIndex) -> str:
        """What one more id makes certain, in whole characters."""
        self.seen.append(int(token))
        piece = self.decoder.step(self.tokenizer.backend, self.seen[-1]) or ""
        self.printed += len(piece)
        return piece

    def end(self) -> str:
        """An unfinished character at the end, which DecodeStream never returns."""
        return self.tokenizer.decode(self.seen)[self.printed :]


# ---- GGUF -----------------------------------------------------------------------------------------------------------

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Pre(NamedTuple):
    """How text is cut before byte pairs are merged: one row per `tokenizer.ggml.pre`."""

    split: str
    nfc: bool = False
    ignore_merges: bool = False  # a piece that is a token stays one, whatever its merges
    add_bos: bool = False  # if the file has no add_bos_token


# Expressions: llama.cpp (src/llama-vocab.cpp, "original regex from tokenizer.json") and transformers 5.23
# (integrations/gguf, Qwen2Tokenizer, TikTokenConverter) agree; GPT-2's is the one in tokenizers' ByteLevel.
# ignore_merges: llama.cpp and transformers' TikTokenConverter and MistralConverter. nfc: Qwen2Tokenizer.
# Two names follow transformers' GGUF loader and not llama.cpp. `smollm`: llama.cpp first cuts out each digit, so that
# "\n\n1" begins with one token, not two; that gives 304,978 ids for WikiText-2 (joined), but the reference figures have
# 304,986. `default`: llama.cpp has its own rule for unknown origins.
PRE_TOKENIZERS = {
    "gpt-2": _Pre(_GPT2),
    "default": _Pre(_GPT2),
    "smollm": _Pre(_GPT2),
    "llama-bpe": _Pre(_LLAMA3, ignore_merges=True, add_bos=True),
    "llama3": _Pre(_LLAMA3, ignore_merges=True, add_bos=True),
    "llama-v3": _Pre(_LLAMA3, ignore_merges=True, add_bos=True),
    "tekken": _Pre(_TEKKEN, ignore_merges=True, add_bos=True),
    "qwen2": _Pre(_QWEN2, nfc=True),
}

_CONTROL, _USER_DEFINED = 3, 4  # gguf.TokenType
# Most characters of a SentencePiece token: it is cut at every place to find its merge. Training's default limit is 16.
_LONGEST = 512


def tokenizer_from_gguf(path: str | os.PathLike[str]) -> Tokenizer:
    """Builds the tokenizer that a GGUF file describes in its `tokenizer.ggml.*` fields.

    Reads byte-level BPE (`model` "gpt2") with the pre-tokenizers of the table above, and SentencePiece BPE ("llama").
    Only the metadata is read, so the file may be cut off inside its tensors.

    Raises:
        InputError: the file is unreadable or truncated, lacks a field, or has another kind of tokenizer.

    Source: the GGUF specification (ggml/docs/gguf.md); compared with transformers 5.23's
    `integrations/gguf/gguf_tokenizer_mapping.py`.
    """
    fields = _Fields(path, read_metadata(path))
    tokens, kind = fields.members("tokens", str), fields.get("model", str)
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise InputError(f"{path} lists a token twice in tokenizer.ggml.tokens; {_WAY_OUT}")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise InputError(
            f"{path} has a tokenizer of kind {kind[:50]!r}, which jquant does not build from GGUF; {_WAY_OUT}"
        )
    with _sentences(f"{path} holds an unusable tokenizer", _WAY_OUT):  # for example a merge of unknown tokens
        backend, add_bos = builders[kind](fields, vocab)
        _add_special_tokens(backend, fields, tokens)
    eos = (fields.token_id(name, len(tokens)) for name in ("eos", "eot", "eom"))
    template = fields.metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        bos_id=fields.token_id("bos", len(tokens)),
        eos_ids=tuple(dict.fromkeys(i for i in eos if i is not None)),
        add_bos=fields.get("add_bos_token", bool, add_bos),
        chat_template=template if isinstance(template, str) else None,
        pre=fields.get("pre", str) if kind == "gpt2" else None,
    )


@contextmanager
def _sentences(what: str, way_out: str = "") -> Iterator[None]:
    """Turns what the tokenizers library raises into an InputError.

    It raises bare Exceptions and, from compiled code, panics, which `except Exception` does not catch.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{what} ({reason})" + (f"; {way_out}" if way_out else ".")) from error


class _Fields(NamedTuple):
    """A file's metadata by short names; errors name file and field."""

    path: Any
    metadata: dict[str, Any]

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        value = value.tolist() if isinstance(value, np.ndarray) else value
        if not isinstance(value, kind):
            fault = "no" if value is None else "an ill-typed"
            raise InputError(f"{self.path} has {fault} field tokenizer.ggml.{name}; {_WAY_OUT}")
        return value

    def members(self, name: str, kind: type) -> list[Any]:
        """An array whose members are of one type."""
        values = self.get(name, list)
        if not all(type(value) is kind for value in values):
            raise InputError(f"{self.path} has an ill-typed field tokenizer.ggml.{name}; {_WAY_OUT}")
        return values

    def token_id(self, name: str, vocab_size: int) -> int | None:
        index = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is not None and not (type(index) is int and 0 <= index < vocab_size):
            told = " ".join(str(index).split())[:50]
            raise InputError(f"{self.path} gives tokenizer.ggml.{name}_token_id {told} of {vocab_size}; {_WAY_OUT}")
        return index


def _byte_level(fields: _Fields, vocab: dict[str, int]) -> tuple[tokenizers.Tokenizer, bool]:
    """Byte-level BPE (GPT-2 and its descendants), and whether texts begin with BOS by default."""
    name = fields.get("pre", str)
    if name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise InputError(f"{fields.path} uses the pre-tokenizer {name[:50]!r}; jquant knows {known}; {_WAY_OUT}")
    pre = PRE_TOKENIZERS[name]
    merges = [tuple(merge.split(" ")) for merge in fields.members("merges", str)]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pre.split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _sentencepiece(fields: _Fields, vocab: dict[str, int]) -> tuple[tokenizers.Tokenizer, bool]:
    """SentencePiece BPE with byte fallback, its merges recovered from the scores (transformers' `generate_merges`)."""
    architecture = str(fields.metadata.get("general.architecture", ""))
    if architecture.startswith("phi3"):  # other spaces
        raise InputError(f"{fields.path} has the SentencePiece dialect of {architecture}; {_WAY_OUT}")
    if longest := next((token for token in vocab if len(token) > _LONGEST), None):
        raise InputError(f"{fields.path} has a token of {len(longest):,} characters; {_WAY_OUT}")
    merges = [
        (score, token[:cut], token[cut:])
        for token, score in zip(vocab, fields.members("scores", float), strict=True)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    made = {left + right: score for score, left, right in merges}
    if len(set(made.values())) < len(made) / 2:
        raise InputError(f"{fields.path} has scores that do not order its merges; {_WAY_OUT}")
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    model = models.BPE(vocab, [merge[1:] for merge in merges], fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    prefix = fields.get("add_space_prefix", bool, True)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if prefix else "never", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend, True


def _add_special_tokens(backend: tokenizers.Tokenizer, fields: _Fields, tokens: list[str]) -> None:
    """Adds control and user-defined tokens, and those with a role: their names in a text are matched as one token."""
    types = fields.members("token_type", int)
    roles = {fields.token_id(role, len(tokens)) for role in ("bos", "eos", "unknown", "padding")}
    special = {i for i, (_, kind) in enumerate(zip(tokens, types, strict=True)) if kind == _CONTROL or i in roles}
    plain = {i for i, kind in enumerate(types) if kind == _USER_DEFINED} - special
    backend.add_special_tokens([AddedToken(tokens[i], normalized=False, special=True) for i in sorted(special)])
    backend.add_tokens([AddedToken(tokens[i], normalized=False, special=False) for i in sorted(plain)])


# ---- Hugging Face folder --------------------------------------------------------------------------------------------

_HOLES = 1 << 20  # most ids without a token
# Without one of these, transformers 5 silently builds an empty tokenizer from config.json.
_VOCABULARIES = ("*.model", "vocab.*", "tekken.json", "*.tiktoken")


def tokenizer_from_folder(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face model folder.

    `tokenizer.json` is read directly. Without it transformers converts the folder's files, which may import torch; the
    folder's own code never runs. BOS and EOS come from the first of generation_config.json, tokenizer_config.json and
    config.json that names them.

    Raises:
        InputError: there is no such folder, no tokenizer in it, or a file of it is broken.
    """
    folder = Path(path)
    generation, settings, config = (
        read_json(folder / name) if (folder / name).exists() else {}
        for name in ("generation_config.json", "tokenizer_config.json", "config.json")
    )
    backend = _backend(folder)
    check_ids(backend, str(folder))
    backend.no_truncation()  # tokenizer.json may hold such settings of whoever saved it
    backend.no_padding()
    bos, eos = (_special_ids(backend, (generation, settings, config), name, folder) for name in ("bos", "eos"))
    template, jinja = settings.get("chat_template"), folder / "chat_template.jinja"
    if jinja.exists():
        check_plain(jinja)
        template = jinja.read_text(encoding="utf-8", errors="replace")
    with _sentences(f"{folder} holds an unusable tokenizer", _WAY_OUT):
        add_bos = bool(bos) and backend.encode("").ids[:1] == [bos[0]]  # whether the file's post-processor adds it
    return Tokenizer(
        backend,
        bos_id=bos[0] if bos else None,
        eos_ids=eos,
        add_bos=add_bos,
        chat_template=template if isinstance(template, str) else None,
    )


def check_ids(backend: tokenizers.Tokenizer, where: str) -> None:
    """Raises InputError for two tokens of one id, or ids far beyond their number: the library walks through all."""
    ids = backend.get_vocab(with_added_tokens=False).values()
    if len(set(ids)) < len(ids):
        raise InputError(f"{where} holds a tokenizer that gives two tokens one id; {_WAY_OUT}")
    if max(ids, default=0) > len(ids) + _HOLES:
        raise InputError(f"{where} holds a tokenizer with {len(ids):,} tokens and the id {max(ids):,}; {_WAY_OUT}")


def _backend(folder: Path) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    vocabularies = [vocabulary for pattern in _VOCABULARIES for vocabulary in folder.glob(pattern)]
    if not file.exists() and not vocabularies:
        raise InputError(f"{folder} holds no tokenizer; give model.tokenizer a folder with tokenizer.json")
    if file.exists() and check_plain(file) > JSON_LIMIT:
        raise InputError(f"{file} has more than {JSON_LIMIT:,} bytes.")
    with _sentences(f"{folder} holds a tokenizer that cannot be read", _WAY_OUT):
        if file.exists():
            return tokenizers.Tokenizer.from_file(str(file))
        for vocabulary in [*vocabularies, *folder.glob("*.json"), *folder.glob("merges.txt")]:
            check_plain(vocabulary)
        from transformers import AutoTokenizer  # slow to import, and rarely needed

        # Without trust_remote_code=False it would ask on standard input whether to run the folder's code.
        return AutoTokenizer.from_pretrained(
            folder, use_fast=True, local_files_only=True, trust_remote_code=False
        ).backend_tokenizer


def _special_ids(
    backend: tokenizers.Tokenizer, sources: Iterable[dict[str, Any]], name: str, folder: Path
) -> tuple[int, ...]:
    """The ids of `bos` or `eos` from the first source that has them, as an id, a token, or a list of either."""
    for source in sources:
        value = source.get(f"{name}_token_id", source.get(f"{name}_token"))
        entries = value if isinstance(value, list) else [value]
        tokens = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
        if any((token is not None and type(token) not in (int, str)) or not is_text(str(token)) for token in tokens):
            raise InputError(
                f"{folder}: {name}_token_id takes an id, a token or a list of them, not {reprlib.repr(value)}."
            )
        ids = [backend.token_to_id(token) if isinstance(token, str) else token for token in tokens]
        if ids := [i for i in ids if i is not None]:
            return tuple(ids)
    return ()
