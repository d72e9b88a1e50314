"""The small text files beside a Hugging Face model's weights, which an export hands on as they came."""

import json
from collections.abc import Mapping
from pathlib import Path

from jquant.errors import InputError
from jquant.io.files import check_plain

MODEL = ("config.json", "generation_config.json")
WORDS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
LIMIT = 1 << 24  # bytes; the largest in use, tokenizer_config.json with many added tokens, have under a million


def read_source_files(model: Path, words: Path | None) -> dict[str, str]:
    """The texts of these files by name, as far as they are there and UTF-8.

    Args:
      model: a folder with config.json, or a .gguf file, which has none of them.
      words: a folder with a tokenizer.
    """
    found = {}
    for folder, names in ((model, MODEL), (words or model, WORDS)):
        for name in names:
            try:
                if check_plain(folder / name) <= LIMIT:
                    found[name] = (folder / name).read_text(encoding="utf-8")
            except (InputError, OSError, ValueError):  # missing, or nothing that an export could hand on
                continue
    return found


def to_bytes(files: Mapping[str, str]) -> bytes:
    """The files as one, for a checkpoint."""
    return json.dumps(dict(files), indent=1, sort_keys=True, ensure_ascii=False).encode()
