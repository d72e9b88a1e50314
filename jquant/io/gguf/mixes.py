"""Which type llama.cpp's quantizer gives each tensor of a file that is called Q4_K_M, say.

Source: `llama_tensor_get_type_impl` and `tensor_type_fallback` in llama.cpp (src/llama-quant.cpp, ggml 0.25.3), for
models without experts and files made without an importance matrix.
"""

import difflib
import re
from collections.abc import Callable

from jquant.composition import Method
from jquant.errors import InputError
from jquant.formats import GGUF, Format
from jquant.io.gguf.blocks import block_size
from jquant.models.config import DecoderConfig
from jquant.models.families import family_of, features_of
from jquant.models.params import weight_name
from jquant.ranges import LlamaCpp

# A file's name -> the type of every tensor for which there is no rule below.
MIXES: dict[str, str] = {
    "Q2_K": "Q2_K",
    "Q2_K_S": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "IQ4_NL": "IQ4_NL",
    "Q4_0": "Q4_0",
    "Q4_1": "Q4_1",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_0": "Q5_0",
    "Q5_1": "Q5_1",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K",
    "Q8_0": "Q8_0",
}
# What replaces a type whose blocks of 256 don't fill a tensor's rows.
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def gguf_mix(
    name: str, config: DecoderConfig, by: Callable[[Format], Method] = lambda format: Method(format, LlamaCpp())
) -> list[tuple[str, str | Method | None]]:
    """Rules that `quantize` takes, by which a model's weights become what llama.cpp's quantizer would make of them.

    Args:
      name: a key of `MIXES`, such as "Q4_K_M"; small letters will do.
      config: of the model.
      by: the method for each type of the blocks; by default as llama.cpp rounds it. GPTQ onto the same types is
        `lambda format: Method(format, LlamaCpp(importance=True), GPTQ())`. Embedding and head are rounded as llama.cpp
        rounds them.

    Raises:
      InputError: no such name; rows that no type can fill.
    """
    kinds = mixture(name, config)
    outside = {weight: kind for weight, kind in kinds.items() if not weight.startswith("layers.")}
    rules: list[tuple[str, str | Method | None]] = [(weight, kind.lower()) for weight, kind in outside.items()]
    for path in family_of(config).weights:
        layers: dict[str, list[str]] = {}
        for layer in range(config.layers):
            layers.setdefault(kinds[weight_name(layer, path)], []).append(str(layer))
        for kind, some in layers.items():
            rules.append((rf"^layers\.({'|'.join(some)})\.{re.escape(path)}$", by(GGUF[kind])))
    return rules


def mixture(name: str, config: DecoderConfig) -> dict[str, str]:
    """The type of every weight of a model by its name: "layers.3.attention.v.kernel", "embedding", "head".

    Raises:
      InputError: no such file's name; rows that no type can fill.
    """
    mix = name.upper()
    if mix not in MIXES:
        near = difflib.get_close_matches(mix, MIXES, n=3, cutoff=0.0)
        raise InputError(f"llama.cpp has no mixture {name!r}; the nearest names are {', '.join(near)}.")
    features, kinds = features_of(config), {}
    for layer in range(config.layers):
        for path in family_of(config).weights:
            kind = _rules(path.removesuffix(".kernel"), layer, config).get(mix) or MIXES[mix]
            kinds[weight_name(layer, path)] = _fitting(kind, features[path][0], weight_name(layer, path))
    weights, _ = block_size(MIXES[mix])
    output = "Q8_0" if config.hidden % weights or mix == "Q8_0" else "Q6_K"
    if config.tied:
        return kinds | {"embedding": _fitting(output, config.hidden, "embedding")}
    embedding = _fitting(MIXES[mix], config.hidden, "embedding")
    return kinds | {"embedding": embedding, "head": _fitting(output, config.hidden, "head")}


def _rules(projection: str, layer: int, config: DecoderConfig) -> dict[str, str | None]:
    """The types that mixtures give a projection of a layer; None, or no entry, where it has the mixture's own."""
    layers, queries = config.layers, config.heads // config.kv_heads
    first = layer < layers // 8
    more = first or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    if projection == "attention.v":
        kinds = {
            "Q2_K": "Q4_K" if queries >= 4 else "Q3_K",
            "Q2_K_S": "Q4_K" if queries >= 4 else None,
            "Q3_K_M": "Q5_K" if layer < 2 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "IQ4_NL": "Q5_K" if queries >= 4 else None,
            "Q4_K_S": "Q5_K" if layer < 4 else None,
            "Q4_K_M": "Q6_K" if more else None,
            "Q5_K_M": "Q6_K" if more else None,
        }
        if layers == 80 and queries > 1:  # what llama.cpp calls a 70B model
            kinds = {mix: "Q5_K" if (kind or MIXES[mix]) in ("Q3_K", "Q4_K") else kind for mix, kind in kinds.items()}
            kinds["Q3_K_S"] = "Q5_K"
        return kinds
    if projection == "attention.o":
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}
    if projection == "mlp.down":
        return {
            "Q2_K": "Q3_K",
            "Q2_K_S": "Q4_K" if first else None,
            "Q3_K_M": "Q5_K" if layer < layers // 16 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "IQ4_NL": "Q5_K" if first else None,
            "Q4_K_S": "Q5_K" if first else None,
            "Q4_K_M": "Q6_K" if more else None,
            "Q5_K_M": "Q6_K" if more else None,
        }
    return {}


def _fitting(kind: str, in_features: int, weight: str) -> str:
    """The type, or the one that replaces it, whose blocks fill rows of `in_features` weights."""
    for fitting in (kind, FALLBACK.get(kind, kind)):
        if in_features % block_size(fitting)[0] == 0:
            return fitting
    raise InputError(f"{weight} has rows of {in_features} weights, which no blocks of 32 fill: only F16 holds it.")
