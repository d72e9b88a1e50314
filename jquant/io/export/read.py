"""Reads folders whose weights another tool packed: the tensors of `jquant.io.export`'s formats as QTensors."""

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from jquant.errors import InputError
from jquant.io.export import awq, bitsandbytes, compressed_tensors, gptq
from jquant.io.export.base import check_finite
from jquant.io.safetensors import SafetensorsCheckpoint
from jquant.models.config import DecoderConfig
from jquant.models.decoder import parameter_shapes
from jquant.models.families import family_of
from jquant.qtensor import QTensor

# (tensors, quantization_config, shape, module's name) -> weight
READERS: dict[str, Callable[[dict[str, Any], dict[str, Any], tuple[int, int], str], QTensor]] = {
    "gptq": lambda tensors, config, shape, _: gptq.from_tensors(tensors, config, shape),
    "awq": lambda tensors, config, shape, _: awq.from_tensors(tensors, config, shape),
    "bitsandbytes": lambda tensors, config, shape, _: bitsandbytes.from_tensors(tensors, config, shape),
    "compressed-tensors": compressed_tensors.from_tensors,
}
WEIGHT, STACKED = ".weight", "segments."


class PackedCheckpoint:
    """A `SafetensorsCheckpoint` with quantized weights, each under the name that it has in a float file.

    Attributes:
      config, format, files: see `SafetensorsCheckpoint`.
      description: "safetensors gptq", e.g.
      shapes: of its weights and other tensors by name, kernels `[out, in]`. Those of packed weights are what the
        decoder needs; `read` checks them.

    Raises:
      InputError: a quantization_config that jquant does not read.
    """

    format = "hf"
    quantized = True

    def __init__(self, stored: SafetensorsCheckpoint):
        settings = stored.quantization
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        if not isinstance(method, str) or method not in READERS:
            raise InputError(
                f"{stored.folder / 'config.json'}: quantization_config has quant_method={str(method)[:50]!r}; jquant "
                f"reads {', '.join(READERS)}."
            )
        self._stored, self._settings, self._reader = stored, settings, READERS[method]
        self.config: DecoderConfig = stored.config
        self.files: list[Path] = stored.files
        self.description = f"safetensors {method}"
        self._parts = _parts(stored)
        inner = {name for names in self._parts.values() for name in names.values()}
        self.shapes = {name: shape for name, shape in stored.shapes.items() if name not in inner}
        self.shapes |= {name: self._shape(name)[::-1] for name in self._parts}

    def read(self, name: str) -> Any:
        """One tensor: an array as of `SafetensorsCheckpoint.read`, or a packed weight `[in, out]`.

        Raises:
          InputError: no such tensor; tensors of a weight that are missing, or don't fit each other, the decoder, or
            quantization_config; NaN.
        """
        if name not in self._parts:
            return self._stored.read(name)
        module, parts = name.removesuffix(WEIGHT), self._parts[name]
        tensors = {end: self._stored.read_any(part) for end, part in parts.items()}
        try:
            return check_finite(self._reader(tensors, self._settings, self._shape(name), module))
        except InputError as wrong:
            file = self._stored.file_of(next(iter(parts.values())))
            raise InputError(f"{file}: {module}: {str(wrong).removesuffix('.')}.") from None

    def _shape(self, name: str) -> tuple[int, int]:
        return _kernels(self.config)[name]


def _parts(stored: SafetensorsCheckpoint) -> dict[str, dict[str, str]]:
    """The tensors of each packed weight: the weight's name -> end of a name -> a tensor's name."""
    kernels, found = _kernels(stored.config), {}
    for name in stored.shapes:
        for cut in (name.rfind("."), name.rfind(".weight.")):
            weight = name[:cut] + WEIGHT
            if cut > 0 and weight in kernels and not name.endswith(".bias"):
                found.setdefault(weight, {})[name[cut + 1 :]] = name
    floats = partial(_is_float, stored)
    return {weight: parts for weight, parts in found.items() if not floats(weight, parts)}


def _is_float(stored: SafetensorsCheckpoint, weight: str, parts: dict[str, str]) -> bool:
    return parts.keys() == {"weight"} and stored.is_float(weight)


@lru_cache(8)
def _kernels(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """The shape `[in, out]` of each kernel by its name in the file.

    Raises:
      InputError: the family's files hold several kernels as one weight.
    """
    named, found = family_of(config).hf, {}
    if len(named) != len(set(named.values())):
        raise InputError(f"Packed weights of {config.family} hold several projections, which jquant does not read.")
    for path, shape in parameter_shapes(config).items():
        if not path.endswith("kernel"):
            continue
        if path.startswith(STACKED):
            run, _, inner = path.removeprefix(STACKED).partition(".")
            for layer in config.runs[int(run)]:
                found[named[f"layers.{inner}"].format(layer)] = shape[-2:]
        else:
            found[named[path]] = shape[-2:]
    return found
