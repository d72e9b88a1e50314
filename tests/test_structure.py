"""How the code is laid out: imports run one way, the core knows no model, few functions take many parameters."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = ("formats", "ranges", "rounding", "transforms", "kernels", "qtensor", "stats", "activations")


def trees(folder: str) -> dict[str, ast.Module]:
    """The modules of a folder by name."""
    files = {path.relative_to(ROOT).with_suffix(""): path for path in (ROOT / folder).rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): ast.parse(path.read_text()) for name, path in files.items()}


def imported(tree: ast.Module) -> Iterator[str]:
    """What a module imports, names included: "jquant.formats.Int"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room(name: str) -> str:
    """The folder of jquant, or the file beside the folders, that a name belongs to."""
    return [*name.split("."), "__init__"][1]


def test_imports_between_folders_run_one_way():
    rooms: dict[str, set[str]] = {}
    for module, tree in trees("jquant").items():
        others = {room(name) for name in imported(tree) if name.startswith("jquant.")}
        rooms.setdefault(room(module), set()).update(others - {room(module)})
    assert len(rooms["pipeline"]) > 5
    list(graphlib.TopologicalSorter(rooms).static_order())  # a cycle raises


def test_experiments_are_not_imported_by_the_library_or_its_figures():
    for folder in ("jquant", "paper_figures"):
        for module, tree in trees(folder).items():
            assert not [name for name in imported(tree) if name.startswith("experiments")], module


def test_the_core_imports_no_model_and_no_flax():
    for module, tree in trees("jquant").items():
        if room(module) in CORE:
            packages = {name.partition(".")[0] for name in imported(tree)}
            assert not packages & {"flax", "transformers", "orbax"}, module
            assert not {"models", "io", "pipeline"} & {room(name) for name in imported(tree)}, module


def test_no_algorithm_names_a_model_family():
    for module, tree in trees("jquant").items():
        if room(module) not in ("models", "io"):
            assert "jquant.models.families.LLAMA" not in set(imported(tree)), module


def test_few_functions_take_more_than_six_parameters():
    wide = []
    for module, tree in (trees("jquant") | trees("experiments")).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if len([a for a in arguments if a.arg not in ("self", "cls")]) > 6:
                    wide.append(f"{module}.{node.name}")
    assert len(wide) <= 6, wide


def test_all_that_the_core_keeps_is_frozen():
    """Specifications are hashed, and arrays that share a pytree would change together."""
    for module, tree in trees("jquant").items():
        for node in ast.walk(tree) if room(module) in CORE else ():
            for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else ():
                if ast.unparse(decorator).startswith("dataclass"):
                    assert ast.unparse(decorator) == "dataclass(frozen=True)", f"{module}.{node.name}"
