"""Fingerprints: what decides a figure counts, comments and the rest of the package don't."""

import importlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.provenance import identified, versions
from jquant import AWQ, GPTQ, METHODS, Codebook, Int, LlamaCpp, Method, Stochastic, method, provenance
from jquant.provenance import _reached, code_of, describe, differences

ROOT = Path(__file__).parents[1]
OWN = '''
"""A rounding of one's own."""
from dataclasses import dataclass, field

from {helper} import shift
from jquant import Nearest
from jquant.rounding.neighbours import neighbours


@dataclass(frozen=True)
class Mine(Nearest):
    """Rounds, and then some."""

    strength: float = field(default=1.0, repr=False)

    def __repr__(self):
        return "Mine()"

    def __call__(self, w, *others):
        """See `Rounding`."""
        return super().__call__(shift(w) * 1.5, *others)  # more
'''
HELPER = '''
def shift(w):
    """By a third."""
    return w + 3
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes the two modules anew with replacements in their text, and imports them: what `Mine` is then."""
    name = f"own_{tmp_path.name}"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    times = iter(range(1, 100))

    def written(*replacements: tuple[str, str]) -> type:
        for module, text in ((f"{name}_helper", HELPER), (name, OWN.format(helper=f"{name}_helper"))):
            for old, new in replacements:
                text = text.replace(old, new)
            path = tmp_path / f"{module}.py"
            path.write_text(text)
            os.utime(path, (stamp := next(times), stamp))
            importlib.invalidate_caches()
            sys.modules.pop(module, None)
        return importlib.import_module(name).Mine

    yield written
    for module in (name, f"{name}_helper"):
        sys.modules.pop(module, None)


def fingerprint(chosen: Method) -> tuple:
    return describe(chosen), code_of(chosen, ["jquant.pipeline.to_disk"])


def test_a_users_class_that_changed_under_the_same_name_and_repr_has_another_fingerprint(own):
    """A row was kept that showed 633.9 where 576.1 was right."""
    before, repeated = (fingerprint(Method(Int(4, 32), rounding=own()())) for _ in range(2))
    assert before == repeated
    for change in (("* 1.5", "* 1.6"), ("w + 3", "w + 4"), ("strength:", "force:"), ("default=1.0", "default=2.0")):
        mine = own(change)()
        assert repr(mine) == "Mine()"
        assert fingerprint(Method(Int(4, 32), rounding=mine)) != before, change
    assert fingerprint(Method(Int(4, 32), rounding=own()(2.0))) != before  # a field that repr leaves out


def test_comments_docstrings_and_layout_change_no_fingerprint(own):
    before = fingerprint(Method(Int(4, 32), rounding=own()()))
    for change in (
        ("# more", "# of another sort"),
        ("A rounding of one's own.", "Another text."),
        ("Rounds, and then some.", "Another text.\n\n    Longer."),
        ('"""See `Rounding`."""', '"""Another text."""'),
        ("By a third.", "By some."),
        ("w + 3", "(w\n            + 3)"),
    ):
        assert fingerprint(Method(Int(4, 32), rounding=own(change)())) == before, change


def test_code_counts_only_of_the_parts_that_a_method_uses(own):
    reached = lambda *parts: _reached({"jquant.pipeline.to_disk", *parts})  # noqa: E731
    gptq = reached(GPTQ.__module__)
    assert {"jquant.rounding.gptq", "jquant.qtensor", "jquant.formats.packing", "jquant.calibration.windows"} <= gptq
    assert {"jquant.io.gguf.tensors", "jquant.composition", "jquant.ranges.min_max"} <= gptq
    assert "jquant.formats" in gptq  # the table of types, which a GGUF file's loader reads
    assert not {"jquant.rounding.stochastic", "jquant.rounding.refit", "jquant.transforms.awq"} & gptq
    assert not {"jquant.ranges.llama_cpp", "jquant.methods", "jquant.io.hub", "jquant"} & gptq
    assert not any("evaluation" in name for name in gptq)
    assert reached(AWQ.__module__) - gptq == {"jquant.transforms.awq"}
    assert reached(LlamaCpp.__module__) - gptq == {"jquant.ranges.llama_cpp"}
    assert reached(Stochastic.__module__) - gptq == {"jquant.rounding.stochastic", "jquant.rounding.neighbours"}
    mine = own()
    assert {mine.__module__, f"{mine.__module__}_helper", "jquant.rounding.neighbours"} <= reached(mine.__module__)
    rows = _reached({"experiments.perplexity_table"})
    assert {"jquant.evaluation.perplexity", "jquant.evaluation.generation", "jquant.pipeline.to_disk"} <= rows
    assert not {"experiments.tables", "experiments.sweep", "paper_figures", "jquant.methods"} & rows


def test_a_comment_in_jquants_own_code_changes_nothing_and_a_constant_does(monkeypatch, tmp_path):
    """Of a module that the method uses; of another one not even a constant."""
    before = code_of(method("gptq"), ["jquant.pipeline.to_disk"])
    real = provenance._file

    def changed(module: str, old: str, new: str) -> str:
        copy = tmp_path / f"{module}{len(list(tmp_path.iterdir()))}.py"
        text = Path(real(module)).read_text()
        assert old in text
        copy.write_text(text.replace(old, new))
        monkeypatch.setattr(provenance, "_file", lambda name: str(copy) if name == module else real(name))
        return code_of(method("gptq"), ["jquant.pipeline.to_disk"])

    assert changed("jquant.rounding.gptq", '"""GPTQ', '"""Our GPTQ') == before
    assert changed("jquant.rounding.gptq", "import jax\n", "import jax  # the library\n\n") == before
    assert changed("jquant.rounding.gptq", "damping: float", "damp: float") != before
    assert changed("jquant.pipeline.blocks", "0.01 *", "0.02 *") != before
    assert changed("jquant.rounding.stochastic", "class Stochastic", "class Random") == before
    assert changed("jquant.methods", "METHODS: dict", 'MORE = {"mine": 1}\nMETHODS: dict') == before  # a new row
    monkeypatch.setattr(provenance, "_file", real)
    monkeypatch.setitem(METHODS, "mine", METHODS["gptq"])
    assert code_of(method("mine"), ["jquant.pipeline.to_disk"]) == before


def test_descriptions_hold_every_field_and_the_code_behind_functions():
    def scaled(factor: float):
        return lambda w: w * factor

    same = describe(Method(Codebook((-1.0, 0.0, 1.0), 32)))
    assert same["format"]["type"] == "jquant.formats.codebook.Codebook"
    assert same["format"]["levels"] == [-1.0, 0.0, 1.0]
    arrays = [np.zeros(3), np.zeros(3, np.float32), np.zeros((3, 1)), np.ones(3), jnp.ones(3)]
    values = [*arrays, scaled(1), scaled(2), partial(scaled, 1), partial(scaled, 2), float("nan"), 1, "1", None, {1: 2}]
    told = [repr(describe(one)) for one in values]
    assert len(set(told)) == len(told)
    around: list = []
    around.append(around)
    assert describe(around) == ["around it"]
    assert describe(lambda w: w + 1) != describe(lambda w: w + 2)
    assert code_of(jax.jit(scaled(1))) == code_of(jax.jit(scaled(1)))


def test_differences_name_the_field_and_both_values():
    one, other = describe(Method(Int(4, 32), rounding=GPTQ())), describe(Method(Int(3, 32), rounding=GPTQ(0.05)))
    assert differences(one, other) == ["format.bits 4, now 3", "rounding.damping 0.01, now 0.05"]
    assert differences(one, describe(Method(Int(4, 32)))) == ["rounding GPTQ, now Nearest"]
    assert differences(None, one) == ["null, now Method"]
    assert differences("a" * 300, 1)[0] == f"{'a' * 59}…, now 1"
    assert differences(one, one) == []


NOTEBOOK = """
import dataclasses, sys
import jquant
from jquant.provenance import code_of
SHIFT = {shift}
def helper(w):
    "{text}"
    return w + SHIFT
source = '''
@dataclasses.dataclass(frozen=True)
class Mine(jquant.Nearest):
    "{text}"
    def __call__(self, w, *others):
        "{text}"
        return super().__call__(helper(w) * {factor}, *others)
'''
exec(compile(source, "<cell 1>", "exec"))
print(code_of(jquant.Method(jquant.Int(4), rounding=Mine())))
"""


def test_a_notebooks_class_counts_with_what_it_uses_of_the_notebook():
    """No file holds it, and what else is in __main__ does not count."""
    variants = [{}, {"text": "Another."}, {"factor": 3}, {"shift": 2}]
    script = "\n".join(
        f"exec(compile({NOTEBOOK.format(**({'text': 'Text.', 'factor': 2, 'shift': 1} | one))!r}, '<cell>', 'exec'))"
        for one in variants
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plain, texts, factor, shift = done.stdout.split()
    assert plain == texts
    assert len({plain, factor, shift}) == 3


def test_a_commit_is_no_part_of_a_rows_fingerprint(monkeypatch):
    """A change of README made every row another run."""
    origin = {"config": {"bits": 4}, "composition": "at 0x7f00"}
    before = identified(origin, {"gptq": method("gptq")}, "experiments.perplexity_table")
    other = versions() | {"code_version": "0.1.0, commit 0123456, sources 89"}
    monkeypatch.setattr("experiments.provenance.versions", lambda: other)
    after = identified(origin | {"composition": "at 0x7f01"}, {"gptq": method("gptq")}, "experiments.perplexity_table")
    assert after["code_version"] != before["code_version"]
    assert after["fingerprint"] == before["fingerprint"]
    for changed in (
        identified(origin | {"config": {"bits": 3}}, {"gptq": method("gptq")}, "experiments.perplexity_table"),
        identified(origin, {"gptq": method("gptq", bits=3)}, "experiments.perplexity_table"),
        identified(origin, {"gptq": method("gptq")}, "experiments.sensitivity"),
        identified(origin, {"other": method("gptq")}, "experiments.perplexity_table"),
    ):
        assert changed["fingerprint"] != before["fingerprint"]
    monkeypatch.setattr("experiments.provenance.versions", lambda: other | {"device": "another"})
    elsewhere = identified(origin, {"gptq": method("gptq")}, "experiments.perplexity_table")
    assert elsewhere["fingerprint"] != before["fingerprint"]
