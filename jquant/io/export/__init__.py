"""Models as Hugging Face folders that other tools load, and back (`jquant.io.export.read`), without requantizing.

A format is a file: `to_tensors` and `from_tensors` move one weight's bits, `why_not` says what the format can't hold.
"""

from pathlib import Path

from jquant.errors import InputError
from jquant.io.export import awq, bitsandbytes, compressed_tensors, gptq, plain
from jquant.io.export.base import FolderFormat
from jquant.io.export.folder import write

FORMATS: dict[str, FolderFormat] = {
    "gptq": gptq.folder_format(1),
    "gptq_v2": gptq.folder_format(2),
    "awq": awq.FORMAT,
    "compressed-tensors": compressed_tensors.FORMAT,
    "bitsandbytes": bitsandbytes.FORMAT,
    "plain": plain.FORMAT,
}


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
        raise InputError(f"There is no format {format!r} of folders; there are {', '.join(FORMATS)}.")
    write(model, Path(path).expanduser().resolve(), format, FORMATS, force)


__all__ = ["FORMATS", "FolderFormat", "write_folder"]
