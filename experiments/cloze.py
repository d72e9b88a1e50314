"""Multiple-choice items made from a text: which of four continuations follows a paragraph's beginning.

A paragraph is a line of the text. All continuations have the same number of words and stand at the same place of their
paragraphs. The three wrong ones come from the next long enough paragraphs, which often are of the same article.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jquant.cache_folder import cache_dir
from jquant.errors import InputError
from jquant.io.files import write_text

CHOICES = 4
NAME = "cloze"


def cloze_items(text: str, count: int, beginning: int, continuation: int, seed: int) -> list[dict[str, Any]]:
    """`count` items: the first `beginning` words of a paragraph, four continuations, and the number of the true one.

    Args:
      text: where they come from; words are what single spaces divide.
      count: of the items, each from a paragraph of its own.
      beginning: words of the context.
      continuation: words of a choice.
      seed: draws the paragraphs and the order of the choices.

    Raises:
      InputError: the text has too few long paragraphs.
    """
    length = beginning + continuation
    paragraphs = [words[:length] for words in (line.split(" ") for line in text.split("\n")) if len(words) >= length]
    if len(paragraphs) < max(count, CHOICES):
        raise InputError(
            f"The text has {len(paragraphs)} paragraphs of {length} words or more, too few for {count} items: set "
            f"cloze.items, cloze.beginning or cloze.continuation lower, or give a longer text."
        )
    rng = np.random.default_rng(seed)
    items = []
    for index in np.sort(rng.choice(len(paragraphs), count, replace=False)):
        order = rng.permutation(CHOICES)
        choices = [paragraphs[(index + place) % len(paragraphs)][beginning:] for place in order]
        items.append(
            {
                "context": " ".join(paragraphs[index][:beginning]),
                "choices": [" ".join(words) for words in choices],
                "label": int(np.argmin(order)),
            }
        )
    return items


def write_task(items: list[dict[str, Any]]) -> Path:
    """A folder in the cache with the items as a task of the harness: a YAML file and JSON lines. The same items have
    the same folder."""
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    folder = cache_dir() / "tasks" / f"{NAME}-{hashlib.sha256(lines.encode()).hexdigest()[:16]}"
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    task = {
        "task": NAME,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{NAME}.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": metrics,
    }
    write_text(folder / f"{NAME}.jsonl", lines)
    write_text(folder / f"{NAME}.yaml", yaml.safe_dump(task, sort_keys=False))
    return folder
