"""A module's parameters by name, e.g. "attention.q.kernel"; and back."""

from typing import Any, TypeVar

from flax import nnx
from flax.nnx.traversals import flatten_mapping, unflatten_mapping

from jquant.models.adapters import Adapted
from jquant.qtensor import QTensor, Transposed

Params = dict[str, Any]  # name -> Array, QTensor, Transposed, Adapted or shape
Module = TypeVar("Module", bound=nnx.Module)


class Packed(nnx.Variable[QTensor | Transposed | Adapted]):
    """A quantized or adapted weight. It is not an `nnx.Param`, so optimizers and gradients over those leave it out."""


def flat_params(module: Any) -> Params:
    """The parameters of a module, or of its state, by name."""
    state = module if isinstance(module, nnx.State) else nnx.state(module)
    return {".".join(map(str, path)): leaf for path, leaf in flatten_mapping(nnx.to_pure_dict(state)).items()}


def to_state(params: Params) -> Any:
    """Parameters by name as a state that `nnx.merge` and `nnx.update` take."""
    paths = {tuple(int(key) if key.isdecimal() else key for key in name.split(".")): name for name in params}
    return nnx.State(unflatten_mapping({path: params[name] for path, name in paths.items()}))


def with_params(module: Module, params: Params) -> Module:
    """A copy of a module with these parameters replaced; the others are shared with it.

    A quantized or adapted weight becomes a `Packed` variable, anything else an `nnx.Param`.
    """
    kind = lambda leaf: Packed if isinstance(leaf, QTensor | Transposed | Adapted) else nnx.Param  # noqa: E731
    variables = {name: kind(leaf)(leaf) for name, leaf in params.items()}
    return nnx.merge(nnx.graphdef(module), to_state(flat_params(module) | variables))


def weight_name(layer: int, path: str) -> str:
    """A block's parameter's name in errors, rules and reports, e.g. "layers.3.attention.q.kernel"."""
    return f"layers.{layer}.{path}"
