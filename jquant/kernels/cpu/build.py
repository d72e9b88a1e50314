"""Compiles the C++ of this folder on first use, and keeps the library in the cache."""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import jax

from jquant.cache_folder import cache_dir
from jquant.errors import InputError

log = logging.getLogger(__name__)

SOURCES = ("product.h", "attention.h", "ffi.cc")
PRODUCT, ATTEND = "JquantProduct", "JquantAttend"
# The instructions that a library is compiled for, best first: what the CPU must have, and the compiler's options.
INSTRUCTIONS = {
    "avx512": (
        ("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "fma"),
        "-mavx512f -mavx512bw -mavx512vl -mavx512vnni -mfma",
    ),
    "avx2": (("avx2", "fma", "f16c"), "-mavx2 -mfma -mf16c"),
    "plain": ((), ""),
}
OPTIONS = "-std=c++17 -O3 -shared -fPIC -w"
SECONDS = 300  # that a compiler may take


@cache
def target() -> str | None:
    """The ending of the names under which XLA knows PRODUCT and ATTEND; None if they can't be had.

    One logged line then says why.
    """
    try:
        library = build(instructions(), cache_dir() / "kernels")
        loaded = ctypes.CDLL(str(library))
        handlers = {name: getattr(loaded, name) for name in (PRODUCT, ATTEND)}
    except (InputError, OSError, AttributeError) as why:
        log.warning("Packed weights are multiplied without C++ code, at a quarter of its speed or less: %s", why)
        return None
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(f"{name}-{library.stem}", jax.ffi.pycapsule(handler), platform="cpu")
    return library.stem


def instructions() -> str:
    """The best of INSTRUCTIONS that this CPU has."""
    flags = _cpu_flags()
    return next(name for name, (needs, _) in INSTRUCTIONS.items() if flags.issuperset(needs))


def build(name: str, folder: Path) -> Path:
    """The compiled library for INSTRUCTIONS[name], from the folder if it holds an undamaged one.

    The file's name is a digest of all that decides it: sources, XLA's headers, compiler and options; beside it lies its
    SHA-256. It appears completely or not at all.

    Raises:
      InputError: there is no compiler, it fails, or the folder can't be written.
    """
    here, command = Path(__file__).parent, [*_compiler(), *shlex.split(f"{OPTIONS} {INSTRUCTIONS[name][1]}")]
    sources = b"".join((here / source).read_bytes() for source in SOURCES)
    facts = [jax.__version__, platform.machine(), _version(command[0]), *command]
    library = folder / f"{name}-{hashlib.sha256(sources + repr(facts).encode()).hexdigest()[:16]}.so"
    known = library.with_suffix(".sha256")
    if library.is_file() and known.is_file():
        if known.read_text().strip() == hashlib.sha256(library.read_bytes()).hexdigest():
            return library
        log.warning("%s is damaged; it is compiled again.", library)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            _run([*command, "-isystem", jax.ffi.include_dir(), str(here / "ffi.cc"), "-o", str(made)])
            digest = made.with_suffix(".sha256")
            digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
            os.replace(digest, known)
            os.replace(made, library)
    except OSError as failed:
        raise InputError(f"{folder} can't be written ({failed.strerror}).") from None
    return library


def _compiler() -> list[str]:
    """$CXX with its options, or the first C++ compiler on the path."""
    for command in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if command and shutil.which(shlex.split(command)[0]):
            return shlex.split(command)
        if command and command == os.environ.get("CXX"):
            raise InputError(f"CXX names {command!r}, which can't be run.")
    raise InputError("there is no C++ compiler: c++, g++ and clang++ are not on the path, and CXX is not set.")


@cache
def _version(compiler: str) -> str:
    return _run([compiler, "--version"])


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, errors="replace")
    except subprocess.TimeoutExpired:
        raise InputError(f"{command[0]} did not end within {SECONDS} s.") from None
    except OSError as failed:
        raise InputError(f"{command[0]} can't be run ({failed.strerror}).") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-1:]
        raise InputError(f"{command[0]} failed with {done.returncode}: {(lines or ['it says nothing'])[0][:300]}")
    return done.stdout


def _cpu_flags() -> frozenset[str]:
    """What an x86 CPU can do, by Linux's names; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())
