"""The origin of a figure: code, packages, machine, and hashes of its inputs."""

import functools
import hashlib
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

import jquant
from jquant.kernels.choose import in_use as products_in_use
from jquant.provenance import array_digest as digest
from jquant.provenance import code_of, describe, packages

__all__ = ["ROOT", "digest", "fingerprint", "identified", "versions"]

ROOT = Path(__file__).parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "optax", "gguf", "safetensors", "tokenizers", "transformers")


def identified(origin: dict[str, Any], methods: Any, script: str) -> dict[str, Any]:
    """A row's origin with versions, and a fingerprint of what decides its figures.

    Args:
      origin: settings and data.
      methods: the methods, by name.
      script: the module that measures. The fingerprint covers its code and the methods', with all that they use
        (`jquant.provenance`). The commit, comments and the printed `composition` do not count.
    """
    origin = origin | versions() | {"products": products_in_use()}
    deciding = {key: value for key, value in origin.items() if key not in ("code_version", "composition")}
    return origin | {"fingerprint": fingerprint([deciding, describe(methods), code_of(methods, [script])])}


def fingerprint(value: Any) -> str:
    """SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


@functools.cache
def versions() -> dict[str, Any]:
    """This process's code, packages and device."""
    kinds = [("jquant", "*.py"), ("jquant", "*.h"), ("jquant", "*.cc"), ("experiments", "*.py")]
    sources = sorted(path for folder, kind in kinds for path in (ROOT / folder).rglob(kind))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    return {
        "code_version": f"{jquant.__version__}, commit {_commit()}, sources {code}",
        "packages": packages(PACKAGES) | {"python": platform.python_version()},
        "device": f"{jax.devices()[0].device_kind} × {jax.device_count()}, host {_processor()}, {os.cpu_count()} cores",
    }


def _commit() -> str:
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
