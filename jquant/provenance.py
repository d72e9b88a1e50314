"""What decides a run's figures: its methods, and the code that they use less comments and docstrings.

`describe` says what a method is, all its fields included. `code_of` is a digest of the modules that are reached by
imports from those that do the work and from those that define the methods' parts, a user's own among them. Imports are
followed name by name, so what a package also offers does not count: GPTQ's digest knows nothing of `Stochastic`, and a
new row of METHODS changes none.
"""

import ast
import hashlib
import inspect
import json
import math
import sys
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import lru_cache, partial
from importlib import metadata
from importlib.util import find_spec, resolve_name
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import jax
import numpy as np

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "optax")  # what computes
# Of jquant and its scripts, what decides no figure unless it is asked for: methods' names, progress, downloads, plots.
ASIDE = ("jquant", "jquant.methods", "jquant.provenance", "jquant.progress", "jquant.io.hub")
SCRIPTS = ("experiments", "paper_figures")
INSTALLED = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def packages(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The versions of installed packages."""
    return {name: metadata.version(name) for name in names}


def digest(*parts: bytes) -> str:
    """SHA-256 of all parts together, 16 hexadecimal digits."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def array_digest(*arrays: Any) -> str:
    """SHA-256 over the arrays' shapes, dtypes and bytes, 16 hexadecimal digits."""
    total = hashlib.sha256()
    for array in map(np.asarray, arrays):
        total.update(f"{array.shape}{array.dtype}".encode())
        total.update(np.ascontiguousarray(array).view(np.uint8).data)
    return total.hexdigest()[:16]


# ---- what a method is ------------------------------------------------------------------------------------------------


def describe(value: Any) -> Any:
    """A method, a plan, or any part of one, as JSON: types by their full names, all fields, arrays by a digest."""
    return _described(value, [])


def differences(earlier: Any, now: Any, path: str = "") -> list[str]:
    """Where two descriptions differ, e.g. "rounding.damping 0.01, now 0.05"."""
    if isinstance(earlier, dict) and isinstance(now, dict) and earlier.get("type") == now.get("type"):
        pairs = [(str(key), earlier.get(key), now.get(key)) for key in dict.fromkeys([*earlier, *now])]
    elif isinstance(earlier, list) and isinstance(now, list) and len(earlier) == len(now):
        pairs = [(str(index), old, new) for index, (old, new) in enumerate(zip(earlier, now, strict=True))]
    else:
        return [] if earlier == now else [f"{path} {_short(earlier)}, now {_short(now)}".strip()]
    return [line for key, old, new in pairs for line in differences(old, new, f"{path}.{key}" if path else key)]


def _short(described: Any) -> str:
    if isinstance(described, dict) and "type" in described:
        return str(described["type"]).rpartition(".")[2][:60]
    told = described if isinstance(described, str) else json.dumps(described)
    return told if len(told) <= 60 else f"{told[:59]}…"


def _described(value: Any, met: list[Any], around: tuple[int, ...] = ()) -> Any:
    """A description; classes and functions on the way are added to `met`, and cycles end."""
    if isinstance(value, Enum):
        met.append(type(value))
        return {"type": _full_name(type(value)), "name": value.name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if id(value) in around:
        return "around it"
    again = partial(_described, met=met, around=(*around, id(value)))
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else repr(key): again(held) for key, held in value.items()}
    if isinstance(value, Set):
        return sorted(map(again, value), key=json.dumps)
    if type(value) in (list, tuple):
        return [again(held) for held in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return {"type": "array", "dtype": str(value.dtype), "shape": list(value.shape), "digest": array_digest(value)}
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, partial):
        return {"type": "partial", "of": again(value.func), "args": again([*value.args, value.keywords])}
    if isinstance(value, MethodType):
        return {"type": "method", "of": again(value.__func__), "self": again(value.__self__)}
    if isinstance(value, type):
        met.append(value)
        return {"type": _full_name(value)}
    function = inspect.unwrap(value) if callable(value) else None
    if isinstance(function, FunctionType):
        met.append(function)
        held = [cell.cell_contents for cell in function.__closure__ or ()]
        made_with = again([held, function.__defaults__, function.__kwdefaults__])
        code = digest(json.dumps(_bytecode(function.__code__, function.__doc__)).encode())  # lambdas have no own names
        return {"type": _full_name(function), "code": code, "with": made_with}
    met.append(type(value))
    state = {one.name: getattr(value, one.name) for one in fields(value)} if is_dataclass(value) else _state(value)
    return {"type": _full_name(type(value)), **{name: again(held) for name, held in state.items()}}


def _state(value: Any) -> dict[str, Any]:
    """What an object that is no dataclass holds; for one without attributes of its own, how it is written."""
    slots = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ())]
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return held | vars(value) if hasattr(value, "__dict__") else held or {"name": getattr(value, "__name__", "")}


def _full_name(one: Any) -> str:
    return f"{getattr(one, '__module__', None)}.{getattr(one, '__qualname__', '')}"


# ---- the code that it uses -------------------------------------------------------------------------------------------


def code_of(values: Any, modules: Iterable[str] = ()) -> str:
    """A digest of the code on which figures depend.

    Args:
      values: methods or plans; the classes and functions in them count, wherever they are defined.
      modules: those that do the work, by name, e.g. "jquant.pipeline.to_disk".
    """
    met: list[Any] = []
    _described(values, met)
    roots, loose = set(modules), {}
    while met:
        one = met.pop()
        module, name = str(getattr(one, "__module__", None)), _full_name(one)
        there = hasattr(sys.modules.get(module), name[len(module) + 1 :].partition(".")[0]) and module != "__main__"
        if there and module.partition(".")[0] in (*PACKAGES, *sys.stdlib_module_names):
            continue
        if there and _file(module):
            roots.add(module)
        elif name not in loose:  # of a notebook or a script, where the rest may be anything
            loose[name] = [_text(one)]
            loose[name] += [_described(sorted(_globals(one).items()), met)]
            met += [kind for kind in getattr(one, "__mro__", ())[1:] if kind is not object]
    texts = {name: _source(name, _stamp(name)) for name in _reached(roots)}
    return digest(json.dumps([texts, loose], sort_keys=True).encode())


def _reached(roots: Set[str]) -> set[str]:
    """The modules that these import, and those in turn."""
    found, todo = set(), list(roots)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            imported = _imported(name, _stamp(name))
            todo += [one for one in imported if one not in ASIDE and one.partition(".")[0] not in SCRIPTS]
    return found


@lru_cache(None)
def _imported(name: str, stamp: Any) -> frozenset[str]:
    """The modules, neither installed nor Python's own, in which what a module imports is defined."""
    tree, found, aliases = _tree(name, stamp), set(), {}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _is_ours(source := _absolute(node, name), name):
            # A package's own file counts for what it defines itself, and needs no more than that uses.
            wanted = [one.name for one in node.names if not _is_package(name) or (one.asname or one.name) in used]
            found |= {_home(source, one) for one in wanted}
        elif isinstance(node, ast.Import):
            ours = [one for one in node.names if _is_ours(one.name, name)]
            found |= {one.name for one in ours}
            aliases |= {one.asname or one.name.partition(".")[0]: one.name for one in ours}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            found.add(_home(aliases[node.value.id], node.attr))
    return frozenset(found)


def _is_ours(name: str, importer: str) -> bool:
    """Whether a module is jquant's, the importer's package's, or a user's file that is not installed."""
    top, file = name.partition(".")[0], _file(name)
    return file is not None and (top in ("jquant", importer.partition(".")[0]) or not file.startswith(INSTALLED))


def _home(module: str, name: str) -> str:
    """The module in which a name that another one offers is defined."""
    source, own_name = _from_others(module, _stamp(module)).get(name, (module, name))
    if source != module:
        return _home(source, own_name) if _is_ours(source, module) else module
    return f"{module}.{name}" if _is_package(module) and _file(f"{module}.{name}") else module


@lru_cache(None)
def _from_others(module: str, stamp: Any) -> dict[str, tuple[str, str]]:
    """What a module imports by name: each name's module, and its name there."""
    nodes = [node for node in ast.walk(_tree(module, stamp)) if isinstance(node, ast.ImportFrom)]
    return {one.asname or one.name: (_absolute(node, module), one.name) for node in nodes for one in node.names}


def _absolute(node: ast.ImportFrom, module: str) -> str:
    package = module if _is_package(module) else module.rpartition(".")[0]
    return resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module or ""


def _is_package(module: str) -> bool:
    return Path(_file(module) or "").name == "__init__.py"


def _file(module: str) -> str | None:
    """Where a module lies; None for those that lie nowhere."""
    loaded = sys.modules.get(module)
    try:
        file = getattr(loaded, "__file__", None) if loaded else getattr(find_spec(module), "origin", None)
    except (ImportError, ValueError):
        return None
    return file if file and Path(file).is_file() else None


def _stamp(module: str) -> Any:
    """Changes when a module's file does."""
    if (file := _file(module)) is None:
        return None
    found = Path(file).stat()
    return file, found.st_mtime_ns, found.st_size


class _Bare(ast.NodeTransformer):
    """Takes out docstrings, and other strings that are computed and dropped."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        """Drops a string that stands alone."""
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


@lru_cache(None)
def _tree(module: str, stamp: Any) -> ast.Module:
    """A module's code without docstrings; empty where it is no Python."""
    return _Bare().visit(ast.parse(Path(stamp[0]).read_bytes() if stamp and stamp[0].endswith(".py") else ""))


@lru_cache(None)
def _source(module: str, stamp: Any) -> str:
    """A digest of what a module does; of a package's own file, of what it defines, not of what it offers."""
    if stamp is None or not stamp[0].endswith(".py"):
        return digest(Path(stamp[0]).read_bytes()) if stamp else ""
    body = [node for node in _tree(module, stamp).body if not (_is_package(module) and _offers(node))]
    return digest("".join(map(ast.dump, body)).encode())


def _offers(statement: ast.stmt) -> bool:
    names = [one.id for one in getattr(statement, "targets", ()) if isinstance(one, ast.Name)]
    return isinstance(statement, ast.ImportFrom | ast.Import) or names == ["__all__"]


# ---- code that has no module -----------------------------------------------------------------------------------------


def _text(one: Any) -> Any:
    """The code of a class or function, by its source or else by its bytecode."""
    try:
        return ast.dump(_Bare().visit(ast.parse(textwrap.dedent(inspect.getsource(one)))))
    except (OSError, TypeError, SyntaxError):
        return [_bytecode(function.__code__, function.__doc__) for function in _functions(one)]


def _bytecode(code: CodeType, docstring: str | None = None) -> list[Any]:
    """A code object less its docstring and its lines' numbers."""
    told = [held for held in code.co_consts if held is None or held != docstring]
    constants = [_bytecode(held) if isinstance(held, CodeType) else repr(held) for held in told]
    return [code.co_name, code.co_code.hex(), code.co_names, code.co_varnames, constants]


def _functions(one: Any) -> Iterator[FunctionType]:
    """The functions of a class, or the one that a function is."""
    for held in vars(one).values() if isinstance(one, type) else [one]:
        for function in (held, *(getattr(held, part, None) for part in ("__func__", "fget", "func"))):
            function = inspect.unwrap(function) if callable(function) else function
            if isinstance(function, FunctionType):
                yield function


def _globals(one: Any) -> dict[str, Any]:
    """What a function, or the functions of a class, read of their module."""
    found, todo = {}, [(function.__code__, function.__globals__) for function in _functions(one)]
    while todo:
        code, names = todo.pop()
        found |= {name: names[name] for name in code.co_names if name in names}
        todo += [(inner, names) for inner in code.co_consts if isinstance(inner, CodeType)]
    return found
