"""bitsandbytes' 4 bits, NF4 and FP4, as transformers saves them.

    weight                 uint8   [in · out / 2, 1]   two codes a byte, the first in the high 4 bits
    weight.absmax          float32 [blocks]            or uint8 codes, if the statistics are quantized too
    weight.quant_map       float32 [16]                the value of each code
    weight.nested_absmax, weight.nested_quant_map      float32 scales and the 256 values of absmax' codes
    weight.quant_state.bitsandbytes__nf4               uint8, JSON with block size, shape and the statistics' mean

Blocks run along the flattened rows of the weight `[out, in]`. They are our groups along `in` where the group divides
`in`. FP4's codes are in another order than ours, and have a second zero (−0), which is read as 0.

Source: bitsandbytes 0.50, `functional.QuantState.as_dict`, and transformers' `Bnb4bitDeserialize`.
"""

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, UInt8

from jquant.errors import InputError
from jquant.formats import Codebook, double_quantized, dynamic_levels, pack, unpack
from jquant.formats.codebook import FP4_LEVELS, NF4_LEVELS
from jquant.io.export.base import FolderFormat, Tensors, check_tensors, group_of, only_kind, setting, transposed
from jquant.parts import brief
from jquant.qtensor import QTensor

TITLE = "bitsandbytes"
LEVELS = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}
# Our code of each of FP4's codes: 3 bits of magnitude in the order 0, least, 8, 12, 4, 6, 2, 3 twelfths, and a sign.
_MAGNITUDES = np.array([0, 1, 6, 7, 4, 5, 2, 3])
FROM_CODE = {"nf4": np.arange(16), "fp4": np.concatenate([7 + _MAGNITUDES, 7 - _MAGNITUDES])}
NESTED = 256  # scales that share one of their own
STATE = "weight.quant_state.bitsandbytes__"


def why_not(q: QTensor) -> str | None:
    """Why a weight can't be written so; None if it can. See `FolderFormat`."""
    format, group = q.format, getattr(q.format, "group", None)
    if len(q.shape) != 2:
        return f"it is stacked, {q.shape}, and {TITLE} holds matrices"
    if q.activation is not None:
        return f"its inputs are quantized ({brief(q.activation)}), and {TITLE}' 4 bits hold weights only"
    if not isinstance(format, Codebook) or format.levels not in LEVELS.values():
        return f"it is {brief(format)}, and {TITLE} holds NF4 and FP4"
    if format.scale not in ("float32", double_quantized(NESTED)):
        stored = format.scale if isinstance(format.scale, str) else brief(format.scale)
        return f"its scales are stored as {stored}, and {TITLE} holds float32 or double_quantized()"
    if not isinstance(group, int) or q.in_features % group:
        return (
            f"its group {group!r} does not divide its {q.in_features} inputs, so {TITLE}' blocks would mix two columns"
        )
    return None if q.in_features * q.shape[1] % 2 == 0 else f"it has an odd number of weights, which {TITLE} would pad"


def to_tensors(q: QTensor, dtype: str) -> Tensors:
    """The tensors of a weight `[in, out]` that `why_not` accepts; `dtype` is what it is dequantized to."""
    kind, group = _kind(q), q.format.group  # pyright: ignore[reportAttributeAccessIssue]
    to_code = np.zeros(16, np.uint8)
    to_code[FROM_CODE[kind][::-1]] = np.arange(16, dtype=np.uint8)[::-1]  # the first code of a value: 0, not −0
    codes = to_code[transposed(unpack(q.codes, 4, q.in_features))].reshape(-1, 2)
    state = {"quant_type": kind, "blocksize": group, "dtype": dtype, "shape": [q.shape[1], q.in_features]}
    tensors = {
        "weight": codes[:, :1] << 4 | codes[:, 1:],
        "weight.quant_map": _values(kind),
    }
    if isinstance(q.scale, QTensor):
        nested: Any = q.scale
        tensors["weight.absmax"] = np.asarray(nested.codes).reshape(-1)
        tensors["weight.nested_absmax"] = np.asarray(nested.scale).reshape(-1)
        tensors["weight.nested_quant_map"] = np.array(dynamic_levels(), np.float32)
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": float(nested.zero.item())}
    else:
        tensors["weight.absmax"] = transposed(q.scale).reshape(-1)
    return tensors | {STATE + kind: np.frombuffer(json.dumps(state).encode(), np.uint8)}


def from_tensors(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], shape: tuple[int, int]) -> QTensor:
    """The weight `[in, out]` of these tensors, bit for bit; arguments as of `gptq.from_tensors`.

    Raises:
      InputError: tensors are missing, or of another dtype or shape; blocks that mix two columns; another table of
        values; 8 bits (LLM.int8()).
    """
    if not setting(config, "load_in_4bit", bool, bool(config.get("_load_in_4bit"))):
        raise InputError("it is not in 4 bits (load_in_4bit), and jquant reads NF4 and FP4")
    kinds = [kind for kind in LEVELS if STATE + kind in tensors]
    if len(kinds) != 1:
        raise InputError(f"{STATE}nf4 or …fp4 is missing")
    (kind,), (rows, out) = kinds, shape
    state = _state(tensors[STATE + kind])
    group = group_of(setting(state, "blocksize", int), rows)
    if state.get("shape") != [out, rows] or group == "channel" or rows * out % 2:
        raise InputError(f"its state has shape={reprlib.repr(state.get('shape'))}, where {[out, rows]} belongs")
    blocks, nested = rows // group * out, "nested_offset" in state
    if nested and setting(state, "nested_blocksize", int) != NESTED:
        raise InputError(
            f"its state has nested_blocksize={str(state['nested_blocksize'])[:20]}, and jquant reads {NESTED}"
        )
    expected: dict[str, Any] = {
        "weight": (("uint8",), (rows * out // 2, 1)),
        "weight.absmax": (("uint8" if nested else "float32",), (blocks,)),
        "weight.quant_map": (("float32",), (16,)),
        STATE + kind: (("uint8",), tensors[STATE + kind].shape),
    }
    if nested:
        expected["weight.nested_absmax"] = (("float32",), (-(-blocks // NESTED),))
        expected["weight.nested_quant_map"] = (("float32",), (256,))
    check_tensors(tensors, expected)
    tables = {"quant_map": _values(kind), "nested_quant_map": np.array(dynamic_levels(), np.float32)}
    for name, values in list(tables.items())[: 1 + nested]:
        if not np.array_equal(tensors[f"weight.{name}"], values):
            raise InputError(f"{name} holds other values than bitsandbytes' {kind}")
    pairs = tensors["weight"]
    codes = FROM_CODE[kind].astype(np.uint8)[np.concatenate([pairs >> 4, pairs & 15], 1)].reshape(out, rows)
    absmax = tensors["weight.absmax"]
    if not nested:
        scale: Any = jnp.asarray(transposed(absmax.reshape(out, -1)))
    else:
        offset = setting(state, "nested_offset", float)
        own = jnp.asarray(tensors["weight.nested_absmax"].reshape(-1, 1))
        table = double_quantized(min(NESTED, blocks))
        scale = QTensor(jnp.asarray(absmax.reshape(-1, 1)), own, jnp.full((1, 1), offset, jnp.float32), table, blocks)
    format = Codebook(LEVELS[kind], group, double_quantized(NESTED) if nested else "float32")
    return QTensor(pack(jnp.asarray(transposed(codes)), 4), scale, None, format, rows)


def quantization_config(weights: Mapping[str, QTensor], floats: Sequence[str]) -> dict[str, Any]:
    """The entry of config.json.

    Raises:
      InputError: weights of both NF4 and FP4, or some with quantized statistics.
    """
    kind, nested = only_kind(weights, TITLE, lambda q: (_kind(q), isinstance(q.scale, QTensor)))
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(floats),
    }


def _kind(q: QTensor) -> str:
    return next(kind for kind, levels in LEVELS.items() if levels == getattr(q.format, "levels", None))


def _values(kind: str) -> Float32[np.ndarray, "16"]:
    """bitsandbytes' table: the value of each code."""
    return np.array(LEVELS[kind], np.float32)[FROM_CODE[kind]]


def _state(stored: UInt8[np.ndarray, " n"]) -> dict[str, Any]:
    try:
        state = json.loads(stored.tobytes().decode())
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise InputError("its quant_state is no JSON object")
    return state


FORMAT = FolderFormat(why_not, to_tensors, quantization_config)
