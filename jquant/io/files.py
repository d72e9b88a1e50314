"""Reading and writing files: only plain files are opened, and a file is written completely or not at all."""

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from jquant.errors import InputError

JSON_LIMIT = 1 << 28  # bytes; the largest in use, tokenizers and shard indices, have some 30 million


def check_plain(path: Path) -> int:
    """Size of a plain file in bytes.

    Raises:
      InputError: there is no such file, or it is a folder, a pipe or a device, which may never end.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise InputError(f"{path} is missing.") from None
    except (OSError, ValueError) as wrong:  # ValueError: a name with a NUL or half a surrogate pair
        raise InputError(
            f"{str(path)[:300]!r} can't be opened ({getattr(wrong, 'strerror', None) or wrong})."
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is not a plain file.")
    return status.st_size


def read_json(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """A JSON object.

    Args:
      path: of a UTF-8 file.
      limit: bytes that it may have at most.

    Raises:
      InputError: the file is missing, not plain, larger than `limit`, nested too deeply, or no JSON object.
    """
    size = check_plain(path)
    if size > limit:
        raise InputError(f"{path} has {size:,} bytes; JSON files may have {limit:,} at most.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise InputError(f"{path} is not JSON that can be read (it is nested too deeply).") from None
    except (OSError, ValueError) as broken:
        raise InputError(f"{path} is not JSON ({broken}).") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object.")
    return content


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: JSON can hold halves of surrogate pairs, which can't."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def hold(folder: Path, lock: FileLock) -> None:
    """Makes a folder and takes the lock in it.

    Raises:
      InputError: another process has the lock; the folder can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise InputError(f"{folder} is being written by another process.") from None
    except OSError as failed:
        raise InputError(f"{folder} can't be written ({failed.strerror}).") from None


def write_json(path: Path, content: Any) -> None:
    """Writes JSON; errors as of `write_text`."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file; errors as of `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file completely or not at all, even when interrupted or out of space; makes its folder if need be.

    Raises:
      InputError: the disk is full or can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        sync(path.parent)
    except OSError as failed:
        raise InputError(f"{path} can't be written ({failed.strerror}).") from None


def check_new(folder: Path) -> None:
    """Raises InputError for a folder that exists and is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not an empty folder: save into a new one.")


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes a new folder with these files by name, all of them or none, even when interrupted or out of space.

    Raises:
      InputError: the folder is not empty or can't be written.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        check_new(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        for name, data in files.items():
            write_bytes(temporary / name, data)
        os.rename(temporary, folder)
        sync(folder.parent)
    except OSError as failed:
        raise InputError(f"{folder} can't be written ({failed.strerror}).") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until what was written to a file or folder is on disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
