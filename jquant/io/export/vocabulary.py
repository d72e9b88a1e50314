"""A tokenizer as a GGUF file describes it: the inverse of `jquant.io.tokenizer.tokenizer_from_gguf`."""

import json
from typing import Any

from gguf import TokenType

from jquant.errors import InputError
from jquant.io.tokenizer import PRE_TOKENIZERS, Tokenizer


def vocabulary(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """The `tokenizer.*` entries of a GGUF file.

    Args:
      tokenizer: byte-level BPE, or SentencePiece BPE with byte fallback.
      size: rows of the embedding; those without a token get one that is marked as unused.

    Raises:
      InputError: another kind of tokenizer; a byte-level one that llama.cpp has no name for; more tokens than rows.
    """
    spec = json.loads(tokenizer.backend.to_str())
    model, added = spec["model"], {token["id"]: token["special"] for token in spec["added_tokens"]}
    if model["type"] != "BPE":
        raise InputError(f"GGUF holds byte-pair tokenizers; this one is of the type {model['type']}.")
    tokens, types = [f"[PAD{i}]" for i in range(size)], [TokenType.UNUSED] * size
    for token, index in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        if index >= size:
            raise InputError(f"The token {token[:40]!r} has the id {index}; the model's embedding has {size} rows.")
        tokens[index] = token
        types[index] = TokenType.NORMAL
        if index in added:
            types[index] = TokenType.CONTROL if added[index] else TokenType.USER_DEFINED
        elif token == model.get("unk_token"):
            types[index] = TokenType.UNKNOWN
        elif model["byte_fallback"] and token.startswith("<0x"):
            types[index] = TokenType.BYTE
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    if model["byte_fallback"]:
        # llama.cpp merges the pair whose result has the highest score first.
        rank = {merge.replace(" ", "", 1): -float(i) for i, merge in reversed(list(enumerate(merges)))}
        scores = [rank.get(token, -float(len(merges))) for token in tokens]
        kind: dict[str, Any] = {"model": "llama", "scores": scores, "add_space_prefix": _begins_with_space(spec)}
    else:
        kind = {"model": "gpt2", "pre": tokenizer.pre or _pre(spec), "merges": merges}
    fields = kind | {
        "tokens": tokens,
        "token_type": [int(kind) for kind in types],
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": next(iter(tokenizer.eos_ids), None),
        "unknown_token_id": next((i for i, kind in enumerate(types) if kind == TokenType.UNKNOWN), None),
        "add_bos_token": tokenizer.add_bos,
    }
    named = {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None}
    return named if tokenizer.chat_template is None else named | {"tokenizer.chat_template": tokenizer.chat_template}


def _steps(part: dict[str, Any] | None, of: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer."""
    if part is None:
        return []
    return [step for each in part[of] for step in _steps(each, of)] if part["type"] == "Sequence" else [part]


def _begins_with_space(spec: dict[str, Any]) -> bool:
    cuts = _steps(spec["pre_tokenizer"], "pretokenizers")
    prepends = any(step["type"] == "Prepend" for step in _steps(spec["normalizer"], "normalizers"))
    return prepends or any(step.get("prepend_scheme", "never") != "never" for step in cuts)


def _pre(spec: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts text before it merges."""
    steps = _steps(spec["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        split = steps[0]["pattern"].get("Regex")
        for name, pre in PRE_TOKENIZERS.items():
            if pre.split == split and pre.ignore_merges == spec["model"].get("ignore_merges", False):
                return name
    raise InputError(
        f"The tokenizer cuts text in a way ({', '.join(kinds)}) for which jquant knows no name of llama.cpp's; it "
        f"knows {', '.join(PRE_TOKENIZERS)}."
    )
