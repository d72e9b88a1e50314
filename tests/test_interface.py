"""What users want of the interface: models that are saved and compared, short reprs, names with widths, progress."""

import inspect
import io
import re
import typing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import jax
import numpy as np
import pytest
from checkpoints import refused
from flax import nnx
from rich.console import Console

import jquant
from jquant import (
    AWQ,
    GGUF,
    METHODS,
    NF4,
    Activation,
    Hadamard,
    Int,
    LanguageModel,
    LlamaCpp,
    Method,
    Perplexity,
    QTensor,
    Tuning,
    double_quantized,
    load_model,
    method,
    open_model,
    quantize_to_folder,
)
from jquant import progress as progress_module
from jquant.evaluation import rows as results
from jquant.evaluation.compare import FLOAT
from jquant.evaluation.perplexity import Reference, Scores, score
from jquant.io import save
from jquant.methods import leaves_open
from jquant.models.decoder import blocks, with_blocks
from jquant.progress import showing
from jquant.report import Report
from paper_figures import perplexity_bits

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "initializer_range": 0.1}
TOKENS = np.random.default_rng(0).integers(0, checkpoints.VOCAB, (4, 24), np.int32)
TURNED = {"rotation": Hadamard()}
EVERYTHING = [
    ("attention.q", Method(NF4(32, double_quantized()), **TURNED)),
    ("attention.k", Method(Int(8, "channel", True), activation=Activation(Int(8, "tensor", True), True), **TURNED)),
    ("attention.v", Method(GGUF["Q4_K"], LlamaCpp(), **TURNED)),
    ("mlp.down", None),
    ("", replace(method("gptq-3", group=32), **TURNED)),
]
TEXTS = [checkpoints.random_text(1500, seed=seed) for seed in (1, 2)]
CALIBRATED = {"calibration": TEXTS[0], "samples": 4, "context": 32, "progress": False}

forward = jax.jit(lambda decoder, tokens: decoder(tokens))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return checkpoints.save(tmp_path_factory.mktemp("interface") / "float", checkpoints.llama(**SHAPE))


@pytest.fixture(scope="module")
def model(folder) -> LanguageModel:
    return load_model(folder)


@pytest.fixture(scope="module")
def rounded(model) -> LanguageModel:
    return jquant.quantize(model, "rtn", group=32)


@pytest.fixture(scope="module")
def kinds(model, rounded) -> dict[str, LanguageModel]:
    tuned = replace(method("rtn", group=32), tuning=(Tuning(2, text=0.15),))
    return {
        "float": model,
        "rotated": replace(model, decoder=jquant.rotate(model.decoder)),
        "rounded": rounded,
        "everything": jquant.quantize(model, EVERYTHING, **CALIBRATED),
        "tuned": jquant.quantize(model, tuned, **CALIBRATED),
    }


def leaves(decoder) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(decoder))]


# ---- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float", "rotated", "rounded", "everything", "tuned"])
def test_a_saved_model_is_loaded_bit_for_bit_with_all_that_is_known_of_it(kinds, tmp_path, kind):
    saved = kinds[kind]
    saved.save(str(tmp_path / "q"))
    loaded = load_model(str(tmp_path / "q"))
    assert jax.tree.structure(nnx.split(loaded.decoder)) == jax.tree.structure(nnx.split(saved.decoder))
    pairs = list(zip(leaves(loaded.decoder), leaves(saved.decoder), strict=True))
    assert all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)
    assert forward(loaded.decoder, TOKENS).tobytes() == forward(saved.decoder, TOKENS).tobytes()
    assert list(loaded.report) == list(saved.report)
    for weight, info in saved.report.items():
        for figure, value in vars(info).items():
            assert np.array_equal(getattr(loaded.report[weight], figure), value, equal_nan=True), (weight, figure)
    assert (loaded.calibrated_on is None) == (saved.calibrated_on is None) == (kind not in ("everything", "tuned"))
    assert np.array_equal(loaded.calibrated_on, saved.calibrated_on)
    assert (loaded.name, loaded.stored_as, loaded.config) == (saved.name, saved.stored_as, saved.config)
    assert loaded.tokenizer.encode("a b c").tolist() == saved.tokenizer.encode("a b c").tolist()
    assert open_model(tmp_path / "q").quantized == (kind not in ("float", "rotated"))


def test_a_model_that_was_loaded_can_be_saved_again(rounded, tmp_path):
    rounded.save(tmp_path / "first")
    load_model(tmp_path / "first").save(tmp_path / "second")
    for path in (tmp_path / "first").rglob("*"):
        if path.is_file():
            assert (tmp_path / "second" / path.relative_to(tmp_path / "first")).read_bytes() == path.read_bytes()


def test_what_quantize_to_folder_writes_is_what_saving_writes(folder, rounded, tmp_path):
    """But for the manifest, which says what run it was."""
    rounded.save(tmp_path / "saved")
    quantize_to_folder(open_model(folder), tmp_path / "run", method("rtn", group=32))
    files = {path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert len(files) > 20
    for name in files - {Path("manifest.json"), Path(".lock")}:
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(rounded, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with refused(str(tmp_path / "mine"), "not an empty folder"):
        rounded.save(tmp_path / "mine")
    with refused("notes.txt", "not an empty folder"):
        rounded.save(tmp_path / "mine" / "notes.txt")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]
    (tmp_path / "empty").mkdir()
    rounded.save(tmp_path / "empty")
    assert load_model(tmp_path / "empty").report.keys() == rounded.report.keys()


@dataclass(frozen=True)
class Mine(Int):
    """A user's own format."""


def test_a_format_of_ones_own_is_refused_by_the_weights_name(model, tmp_path):
    own = jquant.quantize(model, [("mlp.up", Method(Mine(4, 32)))])
    with refused("layers.0.mlp.up.kernel: a checkpoint can't hold a Mine; it knows Int"):
        own.save(tmp_path / "q")
    assert not list(tmp_path.iterdir())


def test_a_decoder_that_its_configuration_does_not_describe_is_refused(model, tmp_path):
    decoder = nnx.clone(model.decoder)
    decoder.segments[0].mlp_norm.eps = 1e-3
    with refused("layers.0 differs from what the model's configuration describes"):
        replace(model, decoder=decoder).save(tmp_path / "q")
    decoder = nnx.clone(model.decoder)
    decoder.norm.eps = 1e-3
    with refused("The decoder differs from"):
        replace(model, decoder=decoder).save(tmp_path / "q")
    with refused("has 1 layers, its configuration 2"):
        decoder = with_blocks(model.decoder, list(blocks(model.decoder))[:1])
        replace(model, decoder=decoder).save(tmp_path / "q")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def stopping(monkeypatch):
    """Stops a save before its n-th write, 1 for the first; tells how many there were."""
    writes = {"done": 0, "stop": 0}

    def stopped(write):
        def counted(*arguments):
            writes["done"] += 1
            if writes["done"] == writes["stop"]:
                raise KeyboardInterrupt
            return write(*arguments)

        return counted

    for owner, name in ((save, "write_item"), (save, "write_bytes"), (save, "write_sealed"), (save.os, "rename")):
        monkeypatch.setattr(owner, name, stopped(getattr(owner, name)))
    return writes


def test_a_killed_save_leaves_no_folder_that_loads(rounded, tmp_path, monkeypatch, stopping):
    """Killed before each of its writes, so that nothing is tidied up."""
    monkeypatch.setattr(save, "shutil", type("Dead", (), {"rmtree": staticmethod(lambda *_, **__: None)}))
    rounded.save(tmp_path / "whole")
    total = stopping["done"]
    assert total > 10
    for stop in range(1, total + 1):
        stopping |= {"done": 0, "stop": stop}
        with pytest.raises(KeyboardInterrupt):
            rounded.save(tmp_path / f"{stop}" / "q")
        [left] = (tmp_path / f"{stop}").iterdir()
        assert left.name.startswith(".q.")
        if stop < total:  # the last one is the name itself
            with pytest.raises(jquant.InputError):
                load_model(left)


def test_an_interrupted_save_leaves_nothing(rounded, tmp_path, stopping):
    stopping["stop"] = 3
    with pytest.raises(KeyboardInterrupt):
        rounded.save(tmp_path / "q")
    assert not list(tmp_path.iterdir())


def test_a_saved_model_is_no_run_that_goes_on_and_a_run_no_place_to_save_to(folder, rounded, model, tmp_path):
    rounded.save(tmp_path / "saved")
    with refused(str(tmp_path / "saved"), "holds a saved model, not a run"):
        quantize_to_folder(open_model(folder), tmp_path / "saved", method("rtn", group=32))
    quantize_to_folder(open_model(folder), tmp_path / "run", method("rtn", group=32))
    with refused(str(tmp_path / "run"), "not an empty folder"):
        rounded.save(tmp_path / "run")
    with refused("saved is quantized already"):
        quantize_to_folder(open_model(tmp_path / "saved"), tmp_path / "again", "rtn")
    model.save(tmp_path / "float")
    with refused("float was saved by jquant"):
        quantize_to_folder(open_model(tmp_path / "float"), tmp_path / "again", "rtn")
    assert not (tmp_path / "again").exists()


def test_a_saved_model_is_loaded_in_the_dtype_that_is_asked_for(model, rounded, tmp_path):
    model.save(tmp_path / "float")
    half = load_model(tmp_path / "float", dtype="bfloat16")
    assert {leaf.dtype for leaf in leaves(half.decoder)} == {np.dtype("bfloat16")}
    assert forward(half.decoder, TOKENS).dtype == "bfloat16"
    half.save(tmp_path / "half")
    assert load_model(tmp_path / "half").decoder.embedding.get_value().dtype == "bfloat16"
    assert open_model(tmp_path / "half").computed_in == "bfloat16"
    rounded.save(tmp_path / "q")
    narrow = load_model(tmp_path / "q", dtype="float16").decoder
    assert narrow.norm.scale.get_value().dtype == "float16"
    ours, theirs = (decoder.segments[0].mlp.up.kernel.get_value() for decoder in (narrow, rounded.decoder))
    assert np.array_equal(ours.codes, theirs.codes)
    assert ours.scale.dtype == theirs.scale.dtype
    with refused("dtype='int8'"):
        load_model(tmp_path / "q", dtype="int8")
    wide = nnx.clone(model.decoder)
    wide.embedding.set_value(wide.embedding.get_value().at[0, 0].set(70_000.0))
    replace(model, decoder=wide).save(tmp_path / "wide")
    with refused("embedding holds values up to 70000, more than float16 can"):
        load_model(tmp_path / "wide", dtype="float16")


# ---- names and paths ------------------------------------------------------------------------------------------------


def test_a_name_may_have_a_width_everywhere(model, folder, tmp_path):
    assert method("gptq-3") == method("gptq", bits=3)
    assert method("rtn-2", group=32, symmetric=True) == METHODS["rtn"](2, 32, True)
    q = jquant.quantize(model, [("mlp", "rtn-3"), ("attention.v", "nf4"), ("", "rtn")], group=32, bits=5)
    formats = {name.split(".", 2)[2]: leaf.format for name, leaf in params(q) if isinstance(leaf, QTensor)}
    assert formats["mlp.up.kernel"] == Int(3, 32)
    assert formats["attention.v.kernel"] == NF4()
    assert formats["attention.q.kernel"] == Int(5, 32)
    written = quantize_to_folder(open_model(str(folder)), str(tmp_path / "q"), [("mlp", "int8"), ("", None)])
    assert written.load().report.keys() == {(layer, f"mlp.{name}.kernel") for layer in (0, 1) for name in MLP}


MLP = ("gate", "up", "down")


def params(model: LanguageModel) -> list:
    from jquant.models.params import flat_params

    return list(flat_params(model.decoder).items())


@pytest.mark.parametrize("name", ["gptq-", "gptq-x", "int8-4", "nothing-3"])
def test_a_width_that_no_method_takes_is_refused_with_the_nearest_names(name):
    with refused(f"no method '{name}'", "nearest names"):
        method(name)


REFUSED = {
    "nf4": ("nf4", {"bits": 4}, "nf4 has its own bits: leave bits=4 out"),
    "int8": ("int8", {"symmetric": True}, "int8 has its own symmetric"),
    "q4_k": ("q4_k", {"group": 64}, "q4_k has its own group: leave group=64 out"),
    "a width in the name": ("gptq-3", {"bits": 4}, "gptq-3 has its own bits: leave bits=4 out"),
    "a Method": (Method(Int(4), transform=AWQ()), {"group": 32}, "A Method has its own group"),
    "a plan": ([("mlp", "nf4"), ("", "rtn-3")], {"bits": 4}, "Every method of the plan has its own bits"),
    "symmetric as it is": ("rtn_symmetric", {"symmetric": False}, "rtn_symmetric has its own symmetric"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_method_has_of_its_own_is_not_ignored(model, case):
    chosen, given, sentence = REFUSED[case]
    with refused(sentence):
        jquant.quantize(model, chosen, **given)
    if isinstance(chosen, str):
        with refused(sentence):
            method(chosen, **given)


def test_defaults_are_those_of_before():
    assert method("gptq") == METHODS["gptq"](4, 64, False)
    assert leaves_open("gptq") == {"bits", "group", "symmetric"}
    assert leaves_open("gptq-3") == {"group", "symmetric"}
    assert leaves_open("nf4") == set()


def test_every_path_may_be_a_string():
    """And a method its name."""
    taken = 0
    functions = [getattr(jquant, name) for name in jquant.__all__]
    functions += [LanguageModel.save, perplexity_bits.draw]
    for function in filter(inspect.isfunction, functions):
        for name, hint in typing.get_type_hints(function).items():
            choices = typing.get_args(hint)
            if name != "return" and Path in (hint, *choices):
                assert str in choices, (function.__name__, name)
                taken += 1
            if name == "method":
                assert str in (hint, *choices), function.__name__
    assert taken >= 5


# ---- comparing ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison(model, kinds):
    others = {"RTN <4>": kinds["rounded"], "plan": kinds["everything"]}
    return jquant.compare(model, others, TEXTS[1], context=64, windows=5, progress=False)


def test_a_comparison_holds_what_each_figure_is_alone(comparison, model, kinds):
    tokens = jquant.data.windows(model.tokenizer.encode(TEXTS[1]), 64, 5)
    base = score(model.decoder, tokens)
    assert list(comparison.models) == [model.name, "RTN <4>", "plan"]
    for name, other in {model.name: model, "RTN <4>": kinds["rounded"], "plan": kinds["everything"]}.items():
        found, alone = comparison[name], score(other.decoder, tokens, reference=Reference(model.decoder, base.hidden))
        assert found.perplexity == jquant.perplexity(other, TEXTS[1], context=64, windows=5)
        assert found.kl == pytest.approx(float(alone.kl.mean()), abs=1e-6)
        assert found.top1 == alone.agrees.mean()
        difference = alone.window_nll - base.window_nll
        half = 2.776445 * difference.std(ddof=1) / 5**0.5  # Student's t, 4 degrees of freedom
        expected = [100 * np.expm1(difference.mean() + shift) for shift in (0, -half, half)]
        assert found.change == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert comparison["RTN <4>"].size.bits_per_weight == 4 + 16 / 32 + 4 / 32
    assert comparison[model.name].size.megabytes == sum(leaf.nbytes for leaf in leaves(model.decoder)) / 1e6


def test_a_comparison_is_a_short_table_in_text_and_in_a_notebook(comparison, model):
    lines = repr(comparison).splitlines()
    assert len(lines) == 1 + 3 + 1
    assert len({len(line) for line in lines[:4]}) == 1  # aligned
    assert lines[2].startswith("RTN <4>")
    assert f"{comparison['plan'].perplexity:.3f}" in lines[3]
    assert f"{comparison['plan'].kl:.4f}" in lines[3]
    assert f"to {model.name}." in lines[4]
    written = comparison._repr_html_()
    assert written.count("<tr>") == 4
    assert "<td>RTN &lt;4&gt;</td>" in written
    assert f"{comparison['plan'].change}" in written


def test_its_rows_are_drawn_as_those_of_a_table(comparison, tmp_path):
    rows = comparison.rows()
    assert [row["method"] for row in rows] == [FLOAT, "RTN <4>", "plan"]
    assert [results.name(row) for row in rows] == ["FP32", "RTN <4>", "plan"]
    kind, ends = results.intervals(rows)
    assert "paired by window" in kind
    low, high = ends[1]
    assert rows[0]["perplexity"] * (1 + comparison["RTN <4>"].change.high / 100) == pytest.approx(high)
    assert low < rows[1]["perplexity"] < high
    assert all(path.exists() for path in perplexity_bits.draw(rows, str(tmp_path)))


def test_what_can_not_be_compared_is_refused(model, kinds, rounded, comparison, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eval.txt").write_text(TEXTS[1])
    with refused("no model 'RNT'; the nearest names are RTN <4>"):
        comparison["RNT"]
    how = {"context": 64, "windows": 5, "progress": False}
    with refused("The evaluation text occurs in the calibration text", "allow_overlap"):
        jquant.compare(model, {"plan": kinds["everything"]}, TEXTS[0], **how)
    with refused("'eval.txt' is the name of a file", "jquant.load_text('eval.txt')"):
        jquant.perplexity(model, "eval.txt", progress=False)
    with refused("'wiki_utf8' is the name of a text, not its text"):
        jquant.quantize(model, "gptq", calibration="wiki_utf8", progress=False)
    with refused("'GPTQ' is 'gptq'"):
        inspect.unwrap(jquant.compare)(  # without the tests' own check of types
            model, {"GPTQ": "gptq"}, TEXTS[1], **how
        )
    for others in (TEXTS[1], [rounded]):
        with refused("compare takes the other models by their names, {'GPTQ': q}, not "):
            inspect.unwrap(jquant.compare)(model, others, TEXTS[1], **how)
    for name in (model.name, FLOAT):
        with refused(f"'{name}' is the name of the model"):
            jquant.compare(model, {name: rounded}, TEXTS[1], **how)


def test_models_that_read_a_text_otherwise_are_refused(model, rounded):
    class Other:
        bos_id = None

        def encode(self, text: str) -> np.ndarray:
            return model.tokenizer.encode(text)[::-1].copy()

    other = replace(rounded)
    object.__setattr__(other, "tokenizer", Other())
    with refused("RTN reads the text as other tokens"):
        jquant.compare(model, {"RTN": other}, TEXTS[1], context=64, windows=5)


# ---- reprs and numbers ----------------------------------------------------------------------------------------------


def test_a_model_says_in_a_few_lines_what_it_is(kinds):
    told = repr(kinds["everything"])
    assert len(told) < 900
    assert len(told.splitlines()) <= 4
    for part in ("2 layers, 64 wide", "Int(bits=3, group=32)", "2 of float32", "bits/weight", "MB", "Report of 12 "):
        assert part in told
    told = repr(kinds["float"])
    assert "14 of float32; 32.000 bits/weight" in told
    assert "Report" not in told


def test_a_qtensor_says_its_shape_format_bits_and_size(rounded, kinds):
    q = rounded.decoder.segments[0].mlp.up.kernel.get_value()
    assert repr(q) == "QTensor(2 × 64 × 96, Int(bits=4, group=32), 4.625 bits/weight, 0.0071 MB)"
    double = kinds["everything"].decoder.segments[0].attention.q.kernel.get_value()
    assert "NF4(32, scale=" in repr(double)
    assert len(repr(double)) < 300
    abstract = jax.eval_shape(lambda: q)
    assert repr(abstract) == repr(q)
    assert "NoneType" in repr(jax.tree.map(lambda _: None, q))
    assert "inputs Activation(" in repr(kinds["everything"].decoder.segments[0].attention.k.kernel.get_value())


def test_a_method_is_short_when_it_is_shown_and_complete_in_rows(kinds):
    both = Method(Int(3, 32), rounding=jquant.GPTQ(damping=0.05), transform=AWQ())
    assert str(both) == "Method(format=Int(bits=3, group=32), rounding=GPTQ(damping=0.05), transform=AWQ())"
    said = []
    both._repr_pretty_(SimpleNamespace(text=said.append), False)
    assert said == [str(both)]
    assert repr(both).startswith("Method(format=Int(bits=3, group=32, symmetric=False,")
    assert len(str(method("qat", bits=2))) < 250
    called = {"nf4": "NF4(64)", "nf3": "NF3(64)", "fp4": "FP4(64)", "mxfp4": "MXFP4", "nvfp4": "NVFP4"}
    called["nf4_double"] = "NF4(64, scale=double_quantized(256))"
    assert {name: str(method(name)) for name in called} == {k: f"Method(format={v})" for k, v in called.items()}
    assert str(method("q4_k")).startswith("Method(format=Q4_K, ")


def test_a_weight_is_found_by_its_name(model, kinds):
    q = kinds["everything"]
    told = "QTensor(64 × 96, Int(bits=3, group=32), 3.594 bits/weight, 0.00276 MB)"
    assert repr(q.weight("layers.1.mlp.up.kernel")) == told
    up = next(islice(blocks(model.decoder), 1, None)).mlp.up.kernel.get_value()
    np.testing.assert_array_equal(model.weight("layers.1.mlp.up.kernel"), up)
    with refused("'layers.1.mlp.pu.kernel'; the nearest names are layers.1.mlp.up.kernel"):
        model.weight("layers.1.mlp.pu.kernel")
    with refused("no weight 'norm'"):
        jquant.gram(model, "norm", TEXTS[0], samples=2, context=32)


@pytest.mark.parametrize("token_weights", ["uniform", "attention"])
def test_the_gram_matrix_of_a_weights_inputs_is_the_one_that_it_is_rounded_by(model, token_weights):
    """Rounded by hand, the weight has the codes that `quantize` chooses."""
    name, how = "layers.1.attention.v.kernel", {"samples": 4, "context": 32}
    gram = jquant.gram(model, name, TEXTS[0], token_weights=token_weights, **how)
    assert gram.shape == (64, 64)
    format, w = Int(3, 32), model.weight(name)
    rounded = jquant.GPTQ()(w, jquant.Grid.of(*jquant.MinMax()(w, format), format, w.shape), gram=gram)
    chosen = Method(format, rounding=jquant.GPTQ(), token_weights=token_weights)
    q = jquant.quantize(model, [(name, chosen)], calibration=TEXTS[0], inputs="float", **how)
    codes = jquant.formats.unpack(q.weight(name).codes, 3, 64)
    assert (np.asarray(codes) == np.asarray(rounded.codes)).mean() > 0.999  # ties may fall otherwise


def test_a_report_says_how_much_was_lost_and_where_most(kinds):
    report = kinds["everything"].report
    told = repr(report)
    shares = {weight: info.error / info.energy for weight, info in report.items() if info.energy > 0}
    layer, path = max(shares, key=shares.__getitem__)
    assert told.startswith("Report of 12 weights in 2 layers: they lose ")
    assert f"layers.{layer}.{path} {max(shares.values()):.3g}" in told
    assert len(told) < 250
    assert "no error is known" in repr(kinds["rounded"].report)
    assert "rounded to nearest" not in told
    assert report["layers.0.mlp.gate.kernel"] is report[0, "mlp.gate.kernel"]
    with refused("no weight 'layers.0.mlp.gate'; the nearest names are layers.0.mlp.gate.kernel"):
        report["layers.0.mlp.gate"]
    assert re.match(r"SolveInfo\(error=[\d.e-]+, energy=[\d.e+]+, damping=", repr(report[layer, path]))
    assert "ShapeDtypeStruct" in repr(jax.eval_shape(lambda: report[layer, path]))
    one = Report({(layer, path): report[layer, path]})
    assert repr(one).startswith("Report of 1 weight in 1 layer: ")


def test_a_perplexity_compares_and_formats_as_its_value():
    one, other = (Perplexity(value, 0.5, 4, 64, 64, 252, False) for value in (20.25, 21.5))
    assert one < other
    assert one < 20.5 <= other
    assert one == 20.25 == Perplexity(20.25, 0.1, 1, 8, 8, 7, True)
    assert hash(one) == hash(20.25)
    assert f"{one:.2f}" == "20.25"
    assert sorted([other, one])[0] is one
    assert other - one == 1.25
    assert (one.value, one.stderr, one.windows) == (20.25, 0.5, 4)
    assert str(one) == "20.2500 ±0.5000 (4 windows of 64 tokens, no BOS, 252 scored tokens)"


def test_one_token_has_no_standard_error():
    assert np.isnan(Scores(np.ones((1, 1)), None, None, np.zeros((1, 2, 1))).stderr)


# ---- progress -------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test turns."""
    now = [0.0]
    monkeypatch.setattr(progress_module, "monotonic", lambda: now[0])
    return now


def test_in_a_log_a_line_is_printed_now_and_then(clock):
    log = io.StringIO()
    with showing(True, "gptq-3", Console(file=log)) as tell:
        for done in range(1, 31):
            clock[0] += 4
            tell("quantize", done, 30, error=0.1234, loss=float("nan"))
    lines = log.getvalue().splitlines()
    assert lines[0] == "gptq-3: quantize 3/30 layers, error 0.123, 108 s left"
    assert len(lines) == 10  # every 12 of 120 seconds


def test_what_takes_no_time_prints_nothing_in_a_log(clock):
    log = io.StringIO()
    with showing(True, console=Console(file=log)) as tell:
        tell("load", 1, 2)
        tell("load", 2, 2)
    assert not log.getvalue()


def test_a_terminal_has_bars_and_jupyter_without_widgets_lines(clock, monkeypatch):
    shown = io.StringIO()
    with showing(True, console=Console(file=shown, force_terminal=True, width=80)) as tell:
        tell("evaluate", 4, 32)
    assert "evaluate" in shown.getvalue()
    assert "4/32" in shown.getvalue()
    monkeypatch.setattr(progress_module, "find_spec", lambda name: None)
    log = io.StringIO()
    with showing(True, console=Console(file=log, force_jupyter=True)) as tell:
        assert type(tell).__name__ == "_Lines"


def test_progress_is_on_unless_it_is_switched_off_and_a_function_is_told_itself(model, monkeypatch):
    consoles = []

    def console(**_):
        consoles.append(Console(file=io.StringIO(), force_terminal=True))
        return consoles[-1]

    monkeypatch.setattr(progress_module, "Console", console)
    jquant.quantize(model, "rtn", group=32)
    jquant.perplexity(model, TEXTS[1], context=64, windows=1)
    jquant.outliers(model, TEXTS[1], context=64, windows=1, group=32)
    for stage, made in zip(("quantize", "evaluate", "observe"), consoles, strict=True):
        assert stage in made.file.getvalue()
    consoles.clear()
    calls = []
    jquant.quantize(model, "rtn", group=32, progress=False)
    jquant.perplexity(model, TEXTS[1], context=64, windows=1, progress=lambda *call: calls.append(call))
    assert not consoles
    assert calls == [("evaluate", 1, 1)]
