"""What decides a run's figures: its methods and their code, without comments and docstrings.

`describe` describes a method with all its fields. `code_of` is a digest of modules: those that do the work, those that
define the methods' parts (also a user's own), and all that these import. Imports are followed name by name, so other
names of a package do not count: GPTQ's digest does not depend on `Stochastic`, and a new row of METHODS changes no
digest.
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

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "optax")  # those that compute
# Modules that decide no figure unless named: methods' names, progress, downloads; scripts and plots.
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
    """A method, a plan, or any part of them, as JSON: types by their full names, all fields, arrays by a digest."""
    return _described(value, [])


def differences(earlier: Any, now: Any, path: str = "") -> list[str]:
    """Where two descriptions differ, e.g. "rounding.damping 0.01, now 0.05"."""
    if isinstance(earlier, dict) and isinstance(now, dict) and earlier.get("type") == now.get("type"):
        pairs = [(str(key), earlier.get(key), now.get(key)) for key in dict.fromkeys([*earlier, *now])]
    elif isinstance(earlier, list) and isinstance(now, list) and len(earlier) == len(now):
        pairs = [(str(index), old, new) for index, (old, new) in enumerate(zip(earlier, now, strict=True))]
    else:
        return [] if earlier == now else [f"{path} {_short(earlier)}, now {_short(now)}".strip()]
    named = [(f"{path}.{_short(key)}" if path else _short(key), old, new) for key, old, new in pairs]
    return [line for key, old, new in named for line in differences(old, new, key)]


def _short(described: Any) -> str:
    if isinstance(described, dict) and "type" in described:
        return str(described["type"]).rpartition(".")[2][:60]
    text = described if isinstance(described, str) else json.dumps(described)
    text = " ".join(text.encode(errors="backslashreplace").decode().split())
    return text if len(text) <= 60 else f"{text[:59]}…"


def _described(value: Any, met: list[Any], around: tuple[int, ...] = ()) -> Any:
    """A description; classes and functions in it are added to `met`; cycles end."""
    if isinstance(value, Enum):
        met.append(type(value))
        return {"type": _full_name(type(value)), "name": value.name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if id(value) in around:
        return "around it"
    inner = partial(_described, met=met, around=(*around, id(value)))
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else repr(key): inner(held) for key, held in value.items()}
    if isinstance(value, Set):
        return sorted(map(inner, value), key=json.dumps)
    if type(value) in (list, tuple):
        return [inner(held) for held in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return {"type": "array", "dtype": str(value.dtype), "shape": list(value.shape), "digest": array_digest(value)}
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, partial):
        return {
            "type": "partial",
            "of": inner(value.func),
            "args": inner([*value.args, value.keywords]),
        }
    if isinstance(value, MethodType):
        return {"type": "method", "of": inner(value.__func__), "self": inner(value.__self__)}
    if isinstance(value, type):
        met.append(value)
        return {"type": _full_name(value)}
    function = inspect.unwrap(value) if callable(value) else None
    if isinstance(function, FunctionType):
        met.append(function)
        held = [cell.cell_contents for cell in function.__closure__ or ()]
        made_with = inner([held, function.__defaults__, function.__kwdefaults__])
        code = digest(json.dumps(_bytecode(function.__code__, function.__doc__)).encode())  # lambdas share a name
        return {"type": _full_name(function), "code": code, "with": made_with}
    met.append(type(value))
    state = (
        {field.name: getattr(value, field.name) for field in fields(value)} if is_dataclass(value) else _state(value)
    )
    return {"type": _full_name(type(value)), **{name: inner(held) for name, held in state.items()}}


def _state(value: Any) -> dict[str, Any]:
    """The attributes of an object that is no dataclass; its name if it has none."""
    slots = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ())]
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return held | vars(value) if hasattr(value, "__dict__") else held or {"name": getattr(value, "__name__", "")}


def _full_name(definition: Any) -> str:
    return f"{getattr(definition, '__module__', None)}.{getattr(definition, '__qualname__', '')}"


# ---- the code that it uses -------------------------------------------------------------------------------------------


def code_of(values: Any, modules: Iterable[str] = ()) -> str:
    """A digest of the code on which figures depend.

    Args:
      values: methods or plans; the code of their classes and functions counts, wherever it is defined.
      modules: names of the modules that do the work, e.g. "jquant.pipeline.to_disk".
    """
    met: list[Any] = []
    _described(values, met)
    roots, loose = set(modules), {}
    while met:
        definition = met.pop()
        module, name = str(getattr(definition, "__module__", None)), _full_name(definition)
        in_module = hasattr(sys.modules.get(module), name[len(module) + 1 :].partition(".")[0]) and module != "__main__"
        if in_module and module.partition(".")[0] in (*PACKAGES, *sys.stdlib_module_names):
            continue
        if in_module and _file(module):
            roots.add(module)
        elif name not in loose:  # of a notebook or a script, whose other code does not count
            loose[name] = [_text(definition)]
            loose[name] += [_described(sorted(_globals(definition).items()), met)]
            met += [kind for kind in getattr(definition, "__mro__", ())[1:] if kind is not object]
    texts = {name: _source(name, _stamp(name)) for name in _reached(roots)}
    return digest(json.dumps([texts, loose], sort_keys=True).encode())


def _reached(roots: Set[str]) -> set[str]:
    """These modules and all that they import, directly or not."""
    reached, todo = set(), list(roots)
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            imported = _imported(name, _stamp(name))
            todo += [module for module in imported if module not in ASIDE and module.partition(".")[0] not in SCRIPTS]
    return reached


@lru_cache(None)
def _imported(name: str, stamp: Any) -> frozenset[str]:
    """The modules that define what a module imports, except installed ones and Python's own."""
    nodes, homes, aliases = _nodes(name, stamp), set(), {}
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and _is_ours(source := _absolute(node, name), name):
            # Of a package's own file only its definitions count, so only imports that they use are followed.
            needed = [
                alias.name for alias in node.names if not _is_package(name) or (alias.asname or alias.name) in used
            ]
            homes |= {_home(source, alias) for alias in needed}
        elif isinstance(node, ast.Import):
            ours = [alias for alias in node.names if _is_ours(alias.name, name)]
            homes |= {alias.name for alias in ours}
            aliases |= {alias.asname or alias.name.partition(".")[0]: alias.name for alias in ours}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            homes.add(_home(aliases[node.value.id], node.attr))
    return frozenset(homes)


def _is_ours(name: str, importer: str) -> bool:
    """Whether a module is jquant's, in the importer's package, or a user's file that is not installed."""
    top, file = name.partition(".")[0], _file(name)
    return file is not None and (top in ("jquant", importer.partition(".")[0]) or not file.startswith(INSTALLED))


def _home(module: str, name: str) -> str:
    """The module that defines a name which `module` offers."""
    source, own_name = _from_others(module, _stamp(module)).get(name, (module, name))
    if source != module:
        return _home(source, own_name) if _is_ours(source, module) else module
    return f"{module}.{name}" if _is_package(module) and _file(f"{module}.{name}") else module


@lru_cache(None)
def _from_others(module: str, stamp: Any) -> dict[str, tuple[str, str]]:
    """Each name that a module imports -> (its module, its name there)."""
    nodes = [node for node in _nodes(module, stamp) if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: (_absolute(node, module), alias.name) for node in nodes for alias in node.names}


def _absolute(node: ast.ImportFrom, module: str) -> str:
    package = module if _is_package(module) else module.rpartition(".")[0]
    return resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module or ""


def _is_package(module: str) -> bool:
    return Path(_file(module) or "").name == "__init__.py"


def _file(module: str) -> str | None:
    """A module's file; None if it has none."""
    loaded = sys.modules.get(module)
    try:
        file = getattr(loaded, "__file__", None) if loaded else getattr(find_spec(module), "origin", None)
    except (ImportError, ValueError):
        return None
    return file if file and Path(file).is_file() else None


def _stamp(module: str) -> Any:
    """A value that changes when a module's file does."""
    if (file := _file(module)) is None:
        return None
    status = Path(file).stat()
    return file, status.st_mtime_ns, status.st_size


class _Bare(ast.NodeTransformer):
    """Removes docstrings, and other statements that are only a string."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        """Removes a statement that is only a string."""
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


@lru_cache(None)
def _tree(module: str, stamp: Any) -> ast.Module:
    """A module's code without docstrings; empty if it is no Python file."""
    return _Bare().visit(ast.parse(Path(stamp[0]).read_bytes() if stamp and stamp[0].endswith(".py") else ""))


@lru_cache(None)
def _nodes(module: str, stamp: Any) -> tuple[ast.AST, ...]:
    """What can import or use a name; a walk through all code takes longer than anything else here."""
    kept = ast.Name | ast.Attribute | ast.Import | ast.ImportFrom
    return tuple(node for node in ast.walk(_tree(module, stamp)) if isinstance(node, kept))


@lru_cache(None)
def _source(module: str, stamp: Any) -> str:
    """A digest of a module's code; of a package's own file without imports and `__all__`."""
    if stamp is None or not stamp[0].endswith(".py"):
        return digest(Path(stamp[0]).read_bytes()) if stamp else ""
    body = [node for node in _tree(module, stamp).body if not (_is_package(module) and _offers(node))]
    return digest("".join(map(ast.dump, body)).encode())


def _offers(statement: ast.stmt) -> bool:
    names = [target.id for target in getattr(statement, "targets", ()) if isinstance(target, ast.Name)]
    return isinstance(statement, ast.ImportFrom | ast.Import) or names == ["__all__"]


# ---- code that has no module -----------------------------------------------------------------------------------------


def _text(definition: Any) -> Any:
    """The code of a class or function: its source or, without source, its bytecode."""
    try:
        return ast.dump(_Bare().visit(ast.parse(textwrap.dedent(inspect.getsource(definition)))))
    except (OSError, TypeError, SyntaxError):
        return [_bytecode(function.__code__, function.__doc__) for function in _functions(definition)]


def _bytecode(code: CodeType, docstring: str | None = None) -> list[Any]:
    """A code object without its docstring and line numbers."""
    kept = [held for held in code.co_consts if held is None or held != docstring]
    constants = [_bytecode(held) if isinstance(held, CodeType) else repr(held) for held in kept]
    return [code.co_name, code.co_code.hex(), code.co_names, code.co_varnames, constants]


def _functions(definition: Any) -> Iterator[FunctionType]:
    """The functions of a class; or the function itself."""
    for held in vars(definition).values() if isinstance(definition, type) else [definition]:
        for function in (held, *(getattr(held, part, None) for part in ("__func__", "fget", "func"))):
            function = inspect.unwrap(function) if callable(function) else function
            if isinstance(function, FunctionType):
                yield function


def _globals(definition: Any) -> dict[str, Any]:
    """The globals that a function, or the functions of a class, read."""
    read, todo = {}, [(function.__code__, function.__globals__) for function in _functions(definition)]
    while todo:
        code, names = todo.pop()
        read |= {name: names[name] for name in code.co_names if name in names}
        todo += [(inner, names) for inner in code.co_consts if isinstance(inner, CodeType)]
    return read
