"""A user's own parts: the files that docs/extending.md shows, and what is wrong with others."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import checkpoints
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import refused
from safetensors.numpy import load_file, save_file

from experiments.compositions import find_method
from experiments.own_parts import own_method
from experiments.perplexity_table import main
from experiments.tables import chosen, label
from jquant import GPTQ, Int, Method, MinMax, Nearest, Options, Rounded, Search, load_model, method, quantize_decoder
from jquant.calibration.windows import Calibration
from jquant.models.decoder import blocks
from jquant.parallel.mesh import Devices
from jquant.pipeline.plan import make_plan
from jquant.qtensor import dequantize, quantize

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
FILE = re.compile(r"<!-- file: (\w+\.py) -->\n\n```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILES = dict(FILE.findall(PAGE.read_text()))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, checkpoints.VOCAB, (8, 32)), jnp.int32)
MODULES = [name.removesuffix(".py") for name in FILES]


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A folder with the page's files, from which Python imports."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return checkpoints.save(tmp_path_factory.mktemp("model"), checkpoints.llama())


@pytest.fixture(scope="module")
def decoder(folder):
    return load_model(folder).decoder


def test_the_pages_files_are_short():
    assert MODULES == ["my_rounding", "my_format", "my_statistic", "my_family"]
    assert max(len(text.splitlines()) for text in FILES.values()) <= 40


# ---------------------------------------------------------------------------------------------------- what they compute


def test_ties_go_up(files):
    from my_rounding import HalfUp

    format = Int(3, 8)
    scale, zero = jnp.full((2, 4), 0.5, jnp.float16), jnp.full((2, 4), 3, jnp.uint8)
    w = 0.25 * np.random.default_rng(0).integers(-9, 12, (16, 4))  # every second one lies halfway
    from jquant import Grid

    codes = HalfUp()(jnp.asarray(w, jnp.float32), Grid.of(scale, zero, format, w.shape)).codes
    np.testing.assert_array_equal(codes, np.clip(np.floor(w / 0.5 + 0.5) + 3, 0, 7))
    assert (np.asarray(codes) != np.clip(np.round(w / 0.5) + 3, 0, 7)).any()


def test_the_formats_codes_are_the_nearest_and_keep_their_values(files):
    from my_format import Power

    w = jnp.asarray(np.random.default_rng(0).standard_normal((128, 8)), jnp.float32)
    format = Power(3)
    scale, _ = MinMax()(w, format)
    q = quantize(w, scale, None, format)
    levels = np.asarray(format.decode(jnp.arange(7, dtype=jnp.uint8), jnp.float32(1), None), np.float64)
    at = np.repeat(np.asarray(scale, np.float64), 64, 0)
    nearest = np.abs(np.asarray(w, np.float64)[..., None] - at[..., None] * levels).min(-1)
    np.testing.assert_allclose(np.abs(np.asarray(dequantize(q), np.float64) - np.asarray(w)), nearest, atol=1e-6)
    assert q.codes.nbytes == 128 * 8 * 3 // 8
    np.testing.assert_array_equal(dequantize(quantize(dequantize(q), scale, None, format)), dequantize(q))


@pytest.mark.parametrize("devices", [None, (2, 2)], ids=["one device", "mesh"])
def test_the_statistic_is_observed_at_every_site_and_read_by_the_range(files, decoder, devices):
    from my_statistic import ByFourth, Fourth

    chosen = Method(Int(3, 32), ByFourth(), token_weights="uniform")
    plan, options = make_plan(decoder, chosen), Options(devices=devices and Devices(*devices))
    block, calibration = next(blocks(decoder)), Calibration(decoder, plan.layers, np.asarray(TOKENS), options)
    stats = calibration.observe(block, block, plan.layers[0], 0)
    assert {key.statistic for site in stats.values() for key in site} == {Fourth}
    x = np.asarray(block.attention_norm(decoder.embed(TOKENS)), np.float64)
    [seen] = stats["attention_input"].values()
    np.testing.assert_allclose(seen.value, np.sqrt((x**4).sum((0, 1))), rtol=1e-4)
    quantized, _ = quantize_decoder(decoder, chosen, np.asarray(TOKENS), options)
    w = block.attention.q.kernel.get_value()
    scale, zero = Search("diagonal")(w, chosen.format, gram=jnp.diag(seen.value))
    q = next(blocks(quantized)).attention.q.kernel.get_value()
    np.testing.assert_array_equal(dequantize(q), dequantize(quantize(w, scale, zero, chosen.format)))


def test_the_family_reads_tensors_by_other_names(files, folder, decoder, tmp_path):
    from my_family import FAMILIES, load

    renamed = checkpoints.save(tmp_path / "headless", checkpoints.llama(tie_word_embeddings=True))
    tensors = load_file(renamed / "model.safetensors")
    save_file({name.removeprefix("model."): of for name, of in tensors.items()}, renamed / "model.safetensors")
    with refused("lacks the tensor"):
        load_model(renamed)
    model = load(renamed)
    again = checkpoints.save(tmp_path / "usual", checkpoints.llama(tie_word_embeddings=True))
    np.testing.assert_array_equal(model.decoder(TOKENS), load_model(again).decoder(TOKENS))
    quantized, _ = quantize_decoder(model.decoder, "rtn")
    assert quantized.config.family == "headless"
    del FAMILIES["headless"]


# ------------------------------------------------------------------------------------------------------ in the settings


def test_an_import_path_stands_for_a_method(files):
    from my_format import Power
    from my_rounding import HalfUp
    from my_statistic import ByFourth

    (files / "my_methods.py").write_text(
        "from jquant import *\nPLAIN = Method(NF4())\n"
        "def mine(bits, group, symmetric): return Method(Int(bits, group, symmetric), rounding=GPTQ())\n"
        "RULES = [('mlp', 'nf4'), ('', PLAIN)]\n"
    )
    settings = {"bits": 4, "group": 32, "symmetric": True}
    grid = Int(4, 32, True)
    assert find_method("my_rounding.HalfUp", **settings) == Method(grid, rounding=HalfUp())
    assert find_method("my_rounding.HalfUp-3", **settings) == Method(Int(3, 32, True), rounding=HalfUp())
    assert find_method("my_statistic.ByFourth", **settings) == Method(grid, ByFourth())
    assert find_method("my_format.Power", **settings) == Method(Power())
    assert find_method("my_methods.PLAIN", **settings) == method("nf4")
    assert find_method("my_methods.mine-2", **settings) == Method(Int(2, 32, True), rounding=GPTQ())
    assert find_method("my_methods.RULES", **settings) == [("mlp", "nf4"), ("", method("nf4"))]
    sys.modules.pop("my_methods")


def test_a_composition_names_own_classes_with_arguments(files, monkeypatch):
    from my_format import Power

    made = {"_target_": "jquant.Method", "format": {"_target_": "my_format.Power", "bits": 3, "power": 2.0}}
    monkeypatch.setattr("experiments.compositions.load_config", lambda *_: made)
    monkeypatch.setattr("experiments.compositions._known", lambda: ["mine"])
    assert find_method("mine", 4, 64, False) == Method(Power(3, power=2.0))


def run_table(folder: Path, results: Path, monkeypatch, *methods: str) -> list[dict]:
    """The rows of a table made in this process."""
    for name, seed in (("evaluation", 1), ("calibration", 2)):
        (results / f"{name}.txt").write_text(checkpoints.random_text(600, seed))
    given = {
        "model": "local", "model.path": folder, "results": results, "name": "own", "group": 32, "bits": 3,
        "methods": f"[{','.join(methods)}]", "generation.tokens": 0,
        "evaluation.data": results / "evaluation.txt", "evaluation.windows": 2, "evaluation.context": 32,
        "calibration.data": results / "calibration.txt", "calibration.samples": 4, "calibration.context": 32,
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["perplexity_table", *(f"{key}={value}" for key, value in given.items())])
    main()
    return [json.loads(line) for line in (results / "own" / "table.jsonl").read_text().splitlines()]


def test_the_table_holds_own_parts_and_their_code_is_in_the_fingerprint(files, folder, monkeypatch, capsys):
    names = ["my_rounding.HalfUp", "my_format.Power", "my_statistic.ByFourth"]
    rows = run_table(folder, files, monkeypatch, "fp32", *names)
    by_name = {row["method"]: row for row in rows}
    assert list(by_name) == ["fp32", *names]
    assert all(row["kl"] > 0 and row["bits_per_weight"] < 6 for name, row in by_name.items() if name != "fp32")
    assert by_name["my_format.Power"]["bits_per_weight"] == pytest.approx(4.25, abs=0.1)
    said = capsys.readouterr().out
    assert "my_rounding.HalfUp " in said
    assert "my_format.Power " in said

    changed = FILES["my_rounding.py"].replace("nearer, above, codes", "nearer, codes, codes")
    (files / "my_rounding.py").write_text(changed)
    sys.modules.pop("my_rounding")
    rows = run_table(folder, files, monkeypatch, *names)
    assert [row["method"] for row in rows].count("my_rounding.HalfUp") == 2
    assert len(rows) == 5  # the others are kept


def test_nothing_is_imported_for_the_name_in_a_row_of_results(files):
    (files / "trap.py").write_text("raise SystemExit('imported')")
    row = {"method": "trap.Part", "config": {"bits": 4, "group": 64, "symmetric": False}, "protocol": {}}
    assert label(row) == "trap.Part"
    assert chosen(row) == {}


# ------------------------------------------------------------------------------------------------------------ bad parts

BAD = {
    "no module": ("nowhere.Part", "nowhere can't be imported (No module named 'nowhere')"),
    "a module that fails": ("fails.Part", "fails can't be imported (division by zero)"),
    "no such name": ("my_rounding.Halfup", "my_rounding.py defines no Halfup"),
    "no part": ("my_bad.Word", "no part"),
    "a class that takes arguments": ("my_bad.Needy", "missing 1 required positional argument: 'x'"),
    "a number": ("my_bad.NUMBER", "neither"),
    "a function of nothing": ("my_bad.nothing", "unexpected keyword"),
    "a function that returns a number": ("my_bad.number", "returned 3"),
    "a call without what it needs": ("my_bad.Deaf", "can't be called as (w, grid, gram=…)"),
    "a statistic that is none": ("my_bad.Asks", "needs the statistic Word, which lacks"),
    "a statistic with a name that is taken": ("my_bad.Twice", "name 'gram' is taken"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_an_own_part_is_said_in_one_sentence(files, case):
    (files / "fails.py").write_text("1 / 0")
    (files / "my_bad.py").write_text(
        "from dataclasses import dataclass\nfrom my_statistic import Fourth\nNUMBER = 4\nclass Word: name = 'word'\n"
        "class Gram(Fourth): name = 'gram'\n"
        "@dataclass(frozen=True)\nclass Part:\n    needs = frozenset()\n    def __call__(self, w, grid): ...\n"
        "@dataclass(frozen=True)\nclass Needy(Part):\n    x: int\n"
        "class Deaf(Part): needs = frozenset({'gram'})\n"
        "class Asks(Part): needs = frozenset({Word})\n"
        "class Twice(Part): needs = frozenset({Gram})\n"
        "def nothing(): ...\n"
        "def number(bits, group, symmetric): return 3\n"
    )
    path, sentence = BAD[case]
    with refused(path if case[:4] in ("no m", "a mo", "no p") else "", sentence):
        own_method(path, 4, 64, False)
    sys.modules.pop("my_bad", None)


@dataclass(frozen=True)
class TooFar:
    needs = frozenset()

    def __call__(self, w, grid):
        return Rounded(Nearest()(w, grid).codes.astype(jnp.int32) + 1)


def test_codes_that_the_format_does_not_have_are_found(decoder):
    with refused("layers.0.attention.q.kernel", "TooFar()", "outside of 0 to 15"):
        quantize_decoder(decoder, Method(Int(4, 32), rounding=TooFar()))


def test_two_statistics_of_one_name_are_refused():
    def fourth():
        @dataclass(frozen=True)
        class Fourth:
            name = "fourth"
            init = observe = merge = scaled = value = None

        return Fourth

    @dataclass(frozen=True)
    class Reads:
        needs: frozenset

        def __call__(self, w, grid, fourth): ...

    @dataclass(frozen=True)
    class Clips(Reads):
        def __call__(self, w, format, fourth): ...

    one = fourth()
    Method(Int(4), Clips(frozenset({one})), Reads(frozenset({one})))
    with refused("another statistic 'fourth'"):
        Method(Int(4), Clips(frozenset({one})), Reads(frozenset({fourth()})))
