"""Arrays that take long to compute, kept in the cache by the recipe that decides them."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from jquant.cache_folder import cache_dir
from jquant.io.files import write_bytes, write_json
from jquant.provenance import array_digest, digest

log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Kept:
    """A folder of the cache: `recipe.json`, and files of arrays that were computed by that recipe.

    Attributes:
      folder: of this recipe alone.
      recipe: what decides the arrays; JSON values.
    """

    folder: Path
    recipe: dict[str, Any]

    @staticmethod
    def of(kind: str, recipe: dict[str, Any]) -> "Kept":
        """The folder of a recipe, in the cache's folder `kind`."""
        return Kept(cache_dir() / kind / digest(json.dumps(recipe, sort_keys=True).encode()), recipe)

    def path(self, number: int) -> Path:
        """Of a file."""
        return self.folder / f"{number:06}.safetensors"

    def arrays(self, number: int, shapes: Shapes, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """A file's arrays; made and written if there is no such file, or it is damaged.

        Raises:
          InputError: the folder can't be written.
        """
        arrays = self._read(number, shapes)
        if arrays is None:
            arrays = make()
            write_json(self.folder / "recipe.json", self.recipe)
            # Completely or not at all.
            facts = {"digest": array_digest(*(arrays[name] for name in sorted(arrays)))}
            write_bytes(self.path(number), safetensors.numpy.save(arrays, facts))
        return arrays

    def _read(self, number: int, shapes: Shapes) -> dict[str, np.ndarray] | None:
        if not self.path(number).is_file():
            return None
        try:
            with safe_open(self.path(number), framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in sorted(shapes)}
                stored = (file.metadata() or {}).get("digest")
            whole = {name: a.shape for name, a in arrays.items()} == dict(shapes)
            whole = whole and array_digest(*arrays.values()) == stored
        # Of a dtype or shape that NumPy does not have: the others.
        except (SafetensorError, OSError, AttributeError, TypeError, ValueError):
            whole, arrays = False, {}
        if whole:
            return arrays
        log.warning("%s is damaged; it is computed again.", self.path(number))
        return None
