"""Models as files and folders that other tools load; folders are read back by `jquant.io.export.read`.

Nothing is rounded here. A format of folders is a file: `to_tensors` and `from_tensors` move one weight's bits,
`why_not` says what the format can't hold.
"""

import difflib
from pathlib import Path

from jquant.errors import InputError
from jquant.io.export import awq, bitsandbytes, compressed_tensors, gptq, plain
from jquant.io.export.base import FolderFormat
from jquant.io.export.folder import write
from jquant.io.export.gguf import write_gguf

FORMATS: dict[str, FolderFormat] = {
    "gptq": gptq.folder_format(1),
    "gptq_v2": gptq.folder_format(2),
    "awq": awq.FORMAT,
    "compressed-tensors": compressed_tensors.FORMAT,
    "bitsandbytes": bitsandbytes.FORMAT,
    "plain": plain.FORMAT,
}


GGUF = "gguf"


def export(model: object, path: str | Path, format: str = GGUF, force: bool = False) -> None:
    """Writes a model as other tools load it, completely or not at all. Weights keep the bits that they have.

    Args:
      model: a `LanguageModel`, or files (`open_model`), which are read and written block by block.
      path: of a file for "gguf", of a folder for the others.
      format: "gguf" (`write_gguf`), or a format of folders (`write_folder`): "plain", "gptq", "gptq_v2", "awq",
        "compressed-tensors", "bitsandbytes".
      force: whether to replace what is there.

    Raises:
      InputError: no such format; a weight that it can't hold, which the message names with a format that can; the path
        is taken or can't be written.
    """
    if format == GGUF:
        write_gguf(model, path, force=force)  # pyright: ignore[reportArgumentType]
    else:
        write_folder(model, path, format, force)


def write_folder(model: object, path: str | Path, format: str, force: bool = False) -> None:
    """Writes a model as a folder with config.json, safetensors, tokenizer and README.md, completely or not at all.

    Weights that are not quantized are written in the model's dtype. Above 5 GB the tensors are cut into shards.

    Args:
      model: a `LanguageModel`, or files (`open_model`), which are read and written block by block.
      path: the folder; a new or empty one.
      format: a key of `FORMATS`.
      force: whether to replace a folder that holds a model.

    Raises:
      InputError: no such format; a part that the format can't say, such as rotated inputs, which the message names with
        formats that can; no config.json can be written; the folder is not empty or can't be written.
    """
    if format not in FORMATS:
        near = difflib.get_close_matches(format, [GGUF, *FORMATS], n=3, cutoff=0.0)
        raise InputError(f"There is no format {format!r}; the nearest names are {', '.join(near)}.")
    write(model, Path(path).expanduser().resolve(), format, FORMATS, force)


__all__ = ["FORMATS", "FolderFormat", "export", "write_folder", "write_gguf"]
