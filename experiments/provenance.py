"""Where a figure comes from: code, packages, machine, and hashes of what went in."""

import functools
import hashlib
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jquant

ROOT = Path(__file__).parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "optax", "gguf", "safetensors", "tokenizers", "transformers")


def digest(*arrays: Any) -> str:
    """SHA-256 over the arrays' shapes and bytes, 16 hexadecimal digits."""
    total = hashlib.sha256()
    for array in map(np.asarray, arrays):
        total.update(f"{array.shape}{array.dtype}".encode())
        total.update(np.ascontiguousarray(array).view(np.uint8).data)
    return total.hexdigest()[:16]


def fingerprint(value: Any) -> str:
    """SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


@functools.cache
def versions() -> dict[str, Any]:
    """Code, package and device identification of this process."""
    sources = sorted([*(ROOT / "jquant").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")])
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    return {
        "code_version": f"{jquant.__version__}, commit {_commit()}, sources {code}",
        "packages": {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()},
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
