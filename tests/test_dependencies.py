"""What is imported is declared: the library's packages as dependencies, an experiment's in the extra `experiments`."""

import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from test_structure import ROOT, imported, trees

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# The project's own; members is docs/members.py, which docs/conf.py imports.
OWN = ("jquant", "experiments", "paper_figures", "benchmarks", "members")
BROUGHT = packages_distributions()  # package -> the distributions that have it


def names(requirements: list[str]) -> set[str]:
    """The distributions' names, as pip compares them."""
    return {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line).group()).lower() for line in requirements}


def undeclared(folder: str, requirements: list[str]) -> dict[str, str]:
    """Package -> a module of the folder that imports it, where no distribution that is required brings it."""
    declared, found = names(requirements), {}
    for module, tree in trees(folder).items():
        for package in {name.partition(".")[0] for name in imported(tree)} - sys.stdlib_module_names - {*OWN}:
            if not names(BROUGHT.get(package, [])) & declared:
                found[package] = module
    return found


def test_what_the_library_imports_is_a_dependency():
    """The extras that are imported where a user asks for them, and missed in one sentence."""
    extras = EXTRAS["tensorboard"] + EXTRAS["plot"] + EXTRAS["harness"]
    assert not undeclared("jquant", PROJECT["dependencies"] + extras)


@pytest.mark.parametrize("folder", ["experiments", "paper_figures", "docs"])
def test_what_the_experiments_import_is_a_dependency_or_in_their_extra(folder):
    names = ("experiments", "plot", "notebooks", "docs", "harness")
    extras = [requirement for name in names for requirement in EXTRAS[name]]
    assert not undeclared(folder, [*PROJECT["dependencies"], *extras])


def test_a_package_that_is_not_declared_is_found():
    jax = [line for line in PROJECT["dependencies"] if line.startswith("jax>")]
    assert undeclared("jquant", jax).keys() >= {"flax", "omegaconf", "yaml"}
    assert "jax" not in undeclared("jquant", jax)


def test_every_requirement_has_its_version_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = names([line for line in lines if "==" in line])
    accelerators = ("cuda12", "cuda13", "tpu")  # constraints.txt is of a machine without one
    extras = [of for extra, of in PROJECT["optional-dependencies"].items() if extra not in accelerators]
    for requirements in (PROJECT["dependencies"], *extras):
        assert names(requirements) - {"jquant"} <= pinned
