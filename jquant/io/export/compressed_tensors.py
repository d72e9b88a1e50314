"""The formats of the compressed-tensors library, which vLLM and transformers read.

| format in the file | weights | tensors beside weight_scale `[out, groups]` |
|---|---|---|
| pack-quantized | `Int` | weight_packed int32 `[out, in · bits / 32]`, a bit stream along `in`; weight_shape int64 |
| int-quantized | `Int(8)` with 8-bit inputs | weight int8 `[out, in]`, codes − 128 |
| float-quantized | `Float(4, 3)` | weight float8_e4m3 `[out, in]` |
| mxfp8-quantized | `MXFP8_E4M3` | the same; scales are uint8 exponents |
| mxfp4-pack-quantized | `MXFP4` | weight_packed uint8 `[out, in / 2]`, the first of two lower; scales as before |
| nvfp4-pack-quantized | `NVFP4` | the same; scales are float8_e4m3, with weight_global_scale float32 `[1]` |

weight_zero_point is `[out, groups]`, packed along `out` where weights are packed. The library's integers are signed: it
packs code − 2^(bits − 1) with that offset added, which are our codes. All directions move bits, but one:
weight_global_scale is the reciprocal of our tensor's scale, so that scale may come back changed in its last bit.

Source: compressed-tensors 0.20, `compressors/`. Earlier versions pack widths that do not divide 32 in another way.
"""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jquant.activations import Activation
from jquant.errors import InputError
from jquant.formats import FP8_E4M3, MXFP4, MXFP8_E4M3, NVFP4, Float, Int, pack
from jquant.io.export.base import (
    E8M0,
    FLOAT8,
    SCALES,
    FolderFormat,
    Tensors,
    check_tensors,
    from_words,
    group_of,
    group_problem,
    integer_problem,
    setting,
    to_words,
    transposed,
)
from jquant.parts import brief
from jquant.qtensor import QTensor, stored_grid

TITLE = "compressed-tensors"
BITS = tuple(range(2, 9))
INT8_INPUTS, FLOAT8_INPUTS = Activation(), Activation(FP8_E4M3())
PACKED_FLOATS = {"mxfp4-pack-quantized": MXFP4, "nvfp4-pack-quantized": NVFP4}
NAN_CODES = (0x7F, 0xFF)  # of float8_e4m3fn


def why_not(q: QTensor) -> str | None:
    """Why a weight can't be written so; None if it can. See `FolderFormat`."""
    format, kind = q.format, _kind(q.format, q.activation)
    if kind in ("pack-quantized", "int-quantized"):
        return integer_problem(
            q if kind == "pack-quantized" else QTensor(q.codes, q.scale, q.zero, format, q.in_features),
            TITLE,
            BITS,
            SCALES,
        )
    if kind is None:
        inputs = f" with inputs {brief(q.activation)}" if q.activation else ""
        return f"it is {brief(format)}{inputs}, which {TITLE} does not have"
    if len(q.shape) != 2:
        return f"it is stacked, {q.shape}, and {TITLE} holds matrices"
    group = format.group  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(group, int) and (problem := group_problem(group, q.in_features, TITLE)):
        return problem
    scale = getattr(q.scale, "scale", None)
    if kind == "nvfp4-pack-quantized" and not 0 < _reciprocal(scale) < np.inf:
        return f"its tensor's scale {float(np.asarray(scale).item()):g} has no reciprocal, which {TITLE} stores"
    return None


def to_tensors(q: QTensor) -> Tensors:
    """The tensors of a weight `[in, out]` that `why_not` accepts."""
    kind, format = _kind(q.format, q.activation), q.format
    if isinstance(format, Int):
        return _integers(q, kind == "pack-quantized")
    group = format.group  # pyright: ignore[reportAttributeAccessIssue]
    if kind in PACKED_FLOATS:
        tensors = {"weight_packed": transposed(q.codes)}
    else:
        tensors = {"weight": transposed(q.codes).view(FLOAT8)}
    if kind == "nvfp4-pack-quantized":
        tensors["weight_scale"] = transposed(q.scale.codes).view(FLOAT8)
        return tensors | {"weight_global_scale": np.array([_reciprocal(q.scale.scale)], np.float32)}
    scale = transposed(q.scale)
    scale = scale.view(np.uint8) if scale.dtype == E8M0 else scale
    return tensors | {"weight_scale": scale.reshape(-1) if group == "tensor" else scale}


def from_tensors(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], shape: tuple[int, int], module: str = ""
) -> QTensor:
    """The weight `[in, out]` of these tensors, bit for bit; arguments as of `gptq.from_tensors`.

    The config's group is that which names `module`, else that which fits the tensors; groups' expressions ("re:…") are
    not evaluated.

    Raises:
      InputError: tensors are missing, or of another dtype or shape; no group fits, or groups that differ do; rows in an
        order of their own (`weight_g_idx`); another format, or inputs with static scales.
    """
    schemes = list(setting(config, "config_groups", dict).values())
    if not schemes or not all(isinstance(scheme, dict) for scheme in schemes):
        raise InputError("quantization_config has no config_groups")
    naming = [scheme for scheme in schemes if module in setting(scheme, "targets", list, [])]
    fitting, problem = [], None
    for scheme in naming or schemes:
        try:
            fitting.append(_from_scheme(tensors, scheme, str(scheme.get("format") or config.get("format")), shape))
        except InputError as wrong:
            problem = problem or wrong
    if not fitting:
        raise problem or InputError("quantization_config has no config_groups")
    if any((q.format, q.activation) != (fitting[0].format, fitting[0].activation) for q in fitting):
        raise InputError("several config_groups fit its tensors, and none names it")
    return fitting[0]


def quantization_config(weights: Mapping[str, QTensor], floats: Sequence[str]) -> dict[str, Any]:
    """The entry of config.json, with a config group for each format among the weights."""
    schemes: list[dict[str, Any]] = []
    targets: list[list[str]] = []
    for name, q in weights.items():
        scheme = _scheme(q)
        if scheme not in schemes:
            schemes.append(scheme)
            targets.append([])
        targets[schemes.index(scheme)].append(name)
    if len(schemes) == 1:
        targets = [["Linear"]]
    kinds = {scheme["format"] for scheme in schemes}
    return {
        "quant_method": "compressed-tensors",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(floats),
        "config_groups": {
            f"group_{i}": {"targets": names, **scheme}
            for i, (scheme, names) in enumerate(zip(schemes, targets, strict=True))
        },
    }


def _kind(format: Any, activation: Activation | None) -> str | None:
    """The library's name of a format; None if it has none."""
    if isinstance(format, Int):
        inputs = {None: "pack-quantized"} | ({INT8_INPUTS: "int-quantized"} if format.bits == 8 else {})
        return inputs.get(activation)
    for kind, packed in (PACKED_FLOATS | {"mxfp8-quantized": MXFP8_E4M3}).items():
        if format == packed:
            return kind if activation is None else None
    if not isinstance(format, Float) or (format.exponent, format.mantissa) != (4, 3) or format.scale not in SCALES:
        return None
    return "float-quantized" if activation in (None, FLOAT8_INPUTS) else None


def _scheme(q: QTensor) -> dict[str, Any]:
    """A config group without its targets."""
    format: Any = q.format
    kind = _kind(format, q.activation)
    weights: dict[str, Any] = {
        "num_bits": format.bits,
        "type": "int" if isinstance(format, Int) else "float",
        "symmetric": q.zero is None,
        "dynamic": False,
    }
    match format.group:
        case "channel" | "tensor":
            weights["strategy"] = format.group
        case (rows, columns):
            weights |= {"strategy": "block", "block_structure": [columns, rows]}
        case size:
            weights |= {"strategy": "group", "group_size": size}
    if kind == "nvfp4-pack-quantized":
        weights |= {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    elif format.scale == E8M0:
        weights["scale_dtype"] = "torch.uint8"
    inputs = None
    if q.activation is not None:
        inputs = {"num_bits": 8, "type": weights["type"], "symmetric": True, "strategy": "token", "dynamic": True}
    return {"format": kind, "weights": weights, "input_activations": inputs, "output_activations": None}


def _integers(q: QTensor, packed: bool) -> Tensors:
    """The tensors of integers."""
    bits, zero = q.format.bits, stored_grid(q)[1]
    tensors = {"weight_scale": transposed(q.scale)}
    if not packed:
        tensors["weight"] = (transposed(q.codes) ^ np.uint8(128)).view(np.int8)
        if zero is not None:
            tensors["weight_zero_point"] = (transposed(zero) ^ np.uint8(128)).view(np.int8)
        return tensors
    tensors["weight_packed"] = to_words(transposed(q.codes))
    tensors["weight_shape"] = np.array([q.shape[1], q.in_features], np.int64)
    if zero is not None:
        tensors["weight_zero_point"] = transposed(to_words(transposed(pack(zero.T, bits))))
    return tensors


def _from_scheme(
    tensors: Mapping[str, np.ndarray], scheme: Mapping[str, Any], kind: str, shape: tuple[int, int]
) -> QTensor:
    """`from_tensors` with one config group."""
    weights, rows, out = setting(scheme, "weights", dict), *shape
    bits, group = setting(weights, "num_bits", int), _group(weights, shape)
    symmetric, floating = setting(weights, "symmetric", bool, True), weights.get("type") == "float"
    activation = _activation(scheme.get("input_activations"), floating)
    tensors = dict(tensors)
    if kind == "float-quantized" and "weight_zero_point" in tensors and symmetric:
        del tensors["weight_zero_point"]
    if "weight_g_idx" in tensors:
        raise InputError("weight_g_idx puts the rows into groups in an order of its own, and jquant's are consecutive")
    if not floating and kind in ("pack-quantized", "int-quantized"):
        return _from_integers(tensors, bits, group, symmetric, activation, shape)
    expected = _expected_floats(kind, bits, group, rows, out)
    if expected is None or not symmetric:
        raise InputError(f"its weights are {kind[:50]!r} of {str(bits)[:20]} bits, which jquant does not read")
    check_tensors(tensors, expected)
    if kind in PACKED_FLOATS:
        codes = transposed(tensors["weight_packed"])
    else:
        codes = transposed(tensors["weight"]).view(np.uint8)
        if np.isin(codes, NAN_CODES).any():
            raise InputError("weight holds NaN")
    scale = tensors["weight_scale"]
    if kind == "nvfp4-pack-quantized":
        block_codes = transposed(scale).view(np.uint8)
        if np.isin(block_codes, NAN_CODES).any():
            raise InputError("weight_scale holds NaN")
        whole = jnp.full((1, 1), _reciprocal(tensors["weight_global_scale"]), jnp.float32)
        block_format: Any = NVFP4.scale
        blocks = QTensor(jnp.asarray(block_codes), whole, None, block_format, rows // 16)
        return QTensor(jnp.asarray(codes), blocks, None, NVFP4, rows)
    if kind in ("mxfp4-pack-quantized", "mxfp8-quantized"):
        format = MXFP4 if bits == 4 else MXFP8_E4M3
        return QTensor(jnp.asarray(codes), jnp.asarray(transposed(scale).view(E8M0)), None, format, rows)
    stored = scale.reshape(1, 1) if group == "tensor" else transposed(scale)
    return QTensor(jnp.asarray(codes), jnp.asarray(stored), None, FP8_E4M3(group, str(scale.dtype)), rows, activation)


def _expected_floats(kind: str, bits: int, group: Any, rows: int, out: int) -> dict[str, Any] | None:
    """The tensors of a weight of floats; None for formats that jquant does not read."""
    match kind, bits, group:
        case "float-quantized", 8, _:
            return {
                "weight": (("float8_e4m3fn",), (out, rows)),
                "weight_scale": (SCALES, _scale_shape(group, rows, out)),
            }
        case "mxfp8-quantized", 8, 32:
            return {"weight": (("float8_e4m3fn",), (out, rows)), "weight_scale": (("uint8",), (out, rows // 32))}
        case "mxfp4-pack-quantized", 4, 32:
            return {"weight_packed": (("uint8",), (out, rows // 2)), "weight_scale": (("uint8",), (out, rows // 32))}
        case "nvfp4-pack-quantized", 4, 16:
            return {
                "weight_packed": (("uint8",), (out, rows // 2)),
                "weight_scale": (("float8_e4m3fn",), (out, rows // 16)),
                "weight_global_scale": (("float32",), (1,)),
            }
    return None


def _from_integers(
    tensors: Mapping[str, np.ndarray],
    bits: int,
    group: Any,
    symmetric: bool,
    activation: Activation | None,
    shape: tuple[int, int],
) -> QTensor:
    rows, out = shape
    if bits not in BITS or not (group == "channel" or isinstance(group, int)):
        raise InputError(f"it has {str(bits)[:20]} bits with scales for {group!r}, which jquant does not read")
    scales, words = _scale_shape(group, rows, out), lambda n: -(-n * bits // 32)
    expected: dict[str, Any] = {"weight_scale": (SCALES, scales)}
    packed = "weight_packed" in tensors
    if packed:
        expected |= {"weight_packed": (("int32",), (out, words(rows))), "weight_shape": (("int64",), (2,))}
    else:
        expected["weight"] = (("int8",), (out, rows))
    if not symmetric:
        kind = ("int32", (words(out), scales[1])) if packed else ("int8", scales)
        expected["weight_zero_point"] = ((kind[0],), kind[1])
    check_tensors(tensors, expected)
    if packed and tensors["weight_shape"].tolist() != [out, rows]:
        raise InputError(f"weight_shape says {tensors['weight_shape'].tolist()}, where {[out, rows]} belongs")
    scale, zero = tensors["weight_scale"], None
    codes: Any
    if packed:
        codes = transposed(from_words(tensors["weight_packed"], -(-rows * bits // 8)))
        if not symmetric:
            zero = from_words(transposed(tensors["weight_zero_point"]), -(-out * bits // 8))
    elif bits == 8:
        codes = transposed(tensors["weight"]).view(np.uint8) ^ np.uint8(128)
        if not symmetric:
            zero = transposed(tensors["weight_zero_point"]).view(np.uint8) ^ np.uint8(128)
    else:
        raise InputError(f"it has {bits} bits in int8, which jquant does not read")
    format = Int(bits, group, symmetric, str(scale.dtype))
    zero = None if zero is None else jnp.asarray(zero)
    return QTensor(jnp.asarray(codes), jnp.asarray(transposed(scale)), zero, format, rows, activation)


def _group(weights: Mapping[str, Any], shape: tuple[int, int]) -> Any:
    """A format's group from a config group, no larger than the weight."""
    rows, out = shape
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy in ("channel", "tensor"):
        return strategy
    if strategy == "block":
        block = weights.get("block_structure")
        if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
            return min(block[1], rows), min(block[0], out)
    if strategy in ("group", "tensor_group"):
        return group_of(size, rows)
    raise InputError(f"its scales are for a {reprlib.repr(strategy)}, which jquant does not read")


def _scale_shape(group: Any, rows: int, out: int) -> tuple[int, ...]:
    match group:
        case "channel":
            return out, 1
        case "tensor":
            return (1,)
        case (r, c):
            return -(-out // c), -(-rows // r)
    return out, rows // group


def _activation(inputs: Any, floating: bool) -> Activation | None:
    """How inputs are rounded.

    Raises:
      InputError: other than 8 bits with a scale for each token, computed from it.
    """
    if inputs is None:
        return None
    ours = {"num_bits": 8, "type": "float" if floating else "int", "symmetric": True, "strategy": "token"}
    if not isinstance(inputs, dict) or any(inputs.get(key) != value for key, value in ours.items()):
        raise InputError("its inputs are quantized in another way than in 8 bits by token")
    if inputs.get("dynamic") is not True:
        raise InputError("its inputs have static scales, which jquant does not read")
    return FLOAT8_INPUTS if floating else INT8_INPUTS


def _reciprocal(scale: Any) -> np.float32:
    with np.errstate(divide="ignore", over="ignore"):
        return np.float32(1) / np.float32(np.asarray(scale).item())


FORMAT = FolderFormat(why_not, lambda q, dtype: to_tensors(q), quantization_config)
