"""Methods by name: every written file and every config's list is usable; what a file may not say is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from checkpoints import refused
from hydra import compose, initialize_config_dir

import jquant
from experiments import compositions
from experiments.compositions import find_method, needs_calibration, needs_of, takes_bits
from jquant import AWQ, GPTQ, METHODS, NF4, Activation, Codebook, Hadamard, Int, Method, MinMax, Search, method
from jquant.formats import Format, block_shape
from jquant.methods import OPEN as SETTINGS
from jquant.methods import assign

CONFIGS = Path(__file__).parents[1] / "configs"
WRITTEN = sorted(path.stem for path in (CONFIGS / "compositions").glob("*.yaml"))
SHAPES = {  # the default model's
    "attention.q": (576, 576), "attention.k": (576, 192), "attention.v": (576, 192), "attention.o": (576, 576),
    "mlp.gate": (576, 1536), "mlp.up": (576, 1536), "mlp.down": (1536, 576),
}  # fmt: skip
NAMES = {f"layers.{layer}.{path}.kernel": shape for layer in range(30) for path, shape in SHAPES.items()}
LISTS = [
    *("formats", "ranges", "rounding", "ingredients", "sensitivity", "perplexity_table"),
    *("codes", "codes_ablation", "incoherence"),
]
BASE = method("gptq", 3, 32, True)
INGREDIENTS = {  # what each file changes in gptq, at 3 bits, groups of 32, symmetric
    "awq_gptq": replace(BASE, transform=AWQ()),
    "gptq_damping": replace(BASE, rounding=GPTQ((0.001, 0.003, 0.01, 0.03, 0.1))),
    "gptq_gram_range": replace(BASE, range=Search("gram")),
    "gptq_minmax": replace(BASE, range=MinMax()),
    "gptq_norm": replace(BASE, token_weights="norm"),
    "gptq_pivot": replace(BASE, rounding=GPTQ(order="pivot")),
    "gptq_propagated": replace(BASE, error_propagation=0.5),
    "gptq_rotated": replace(BASE, rotation=Hadamard()),
    "gptq_rows": replace(BASE, rounding=GPTQ(order="rows")),
    "gptq_uniform": replace(BASE, token_weights="uniform"),
}
# GPTQ's that codes_ablation.yaml lists, or that round inputs too.
ELSEWHERE = ("gptq_a8", "gptq_incoherent", "gptq_drawn", "gptq_guided", "gptq_two_sided", "gptq_yaqa")
OPEN = "{_target_: jquant.Method, format: {_target_: jquant.Int, bits: '${bits}', group: '${group}'}}"


def find(name: str, bits: int = 4, group: int = 64, symmetric: bool = False):
    return find_method(name, bits, group, symmetric)


@pytest.fixture
def written(monkeypatch, tmp_path):
    """Makes configs/compositions/ hold one file, mine.yaml, of the given text."""

    def write(text: str) -> None:
        (tmp_path / "mine.yaml").write_text(text)
        monkeypatch.setattr(compositions, "FOLDER", tmp_path)
        monkeypatch.setattr(compositions, "load_config", lambda kind, name: yaml.safe_load(text))

    return write


# ---- what is there --------------------------------------------------------------------------------------------------


def test_there_are_files_to_find():
    assert {"awq_gptq", "gptq_nf4", "gguf_q4_k_m"} <= set(WRITTEN)
    assert not set(WRITTEN) & set(METHODS)  # a row would hide the file


@pytest.mark.parametrize("name", WRITTEN)
def test_every_file_suits_the_default_models_weights(name):
    chosen = assign(find(name), NAMES)
    assert chosen.keys() == NAMES.keys()
    for weight, one in chosen.items():
        assert isinstance(one, Method)
        rows, _ = block_shape(one.format, NAMES[weight])
        inner = one.format.scale
        spans = rows * inner.group if isinstance(inner, Format) and isinstance(inner.group, int) else rows
        assert NAMES[weight][0] % spans == 0, weight  # no short blocks, no short super-blocks
        if name.startswith("gguf"):
            assert one.activation == Activation(Int(8, 32, symmetric=True, ties="away"))
            assert not one.needs_calibration


def test_files_compose_what_they_say():
    assert find("awq_gptq") == Method(Int(4, 64), Search("diagonal"), GPTQ(), AWQ())
    assert find("gptq_nf4", bits=3, group=32) == Method(NF4(64), Search("diagonal"), GPTQ())


@pytest.mark.parametrize("name", INGREDIENTS)
def test_an_ingredients_file_is_gptq_but_for_that_ingredient_at_every_width(name):
    assert find(name, 3, 32, True) == INGREDIENTS[name] != BASE
    assert find(f"{name}-2", 3, 32, True) == find(name, 2, 32, True) != find(name, 3, 32, True)


def test_the_ablations_hold_every_ingredient_of_gptq_at_each_width():
    with initialize_config_dir(str(CONFIGS), version_base=None):
        shared, own = (compose(name, return_hydra_config=True) for name in ("ingredients", "rounding"))
    every = {
        "rtn",
        "awq",
        "learned",
        "qat",
        "efficient_qat",
        *(name for name in [*METHODS, *WRITTEN] if "gptq" in name and takes_bits(name) and name not in ELSEWHERE),
    }
    assert every >= {"gptq_plain", "gptq_refit", "gptq_loss", "gptq_tuned", *INGREDIENTS}
    # A pass over float inputs has no error to propagate, and does not make tuning cheaper.
    alone = {
        f"{name}-{bits}"
        for name in ("gptq_propagated", "gptq_tuned", "learned", "qat", "efficient_qat")
        for bits in (4, 3, 2)
    }
    assert {*shared.methods, *alone} == {"fp32", *(f"{name}-{bits}" for name in every for bits in (4, 3, 2))}
    assert set(own.methods) >= {"fp32", "gptq-4", "gptq-3", "gptq-2", *alone}
    assert set(own.methods) <= {*shared.methods, *alone}
    assert (own.baseline, shared.baseline, shared.calibration.inputs) == ("gptq", "gptq", "float")
    assert shared.calibration.held_out > 0  # gptq_damping


@pytest.mark.parametrize("config", LISTS)
def test_every_method_that_a_config_lists_is_found(config):
    with initialize_config_dir(str(CONFIGS), version_base=None):
        settings = compose(config, return_hydra_config=True)
    assert len(settings.methods) == len(set(settings.methods)) > 0
    for name in settings.methods:
        if name != "fp32":
            assign(find(name, settings.bits, settings.group, settings.symmetric), NAMES)
    if config == "sensitivity":
        assert all(isinstance(find(name), Method) for name in settings.methods)


def test_the_list_of_formats_holds_every_row_that_is_a_format_alone():
    listed = {name.partition("-")[0] for name in yaml.safe_load((CONFIGS / "formats.yaml").read_text())["methods"]}
    fixed = {name for name in METHODS if not takes_bits(name)}
    alone = {name for name in fixed if METHODS[name](4, 64, False).transform is None}
    assert fixed - alone == {"smoothquant"}
    assert alone | {name for name in WRITTEN if name.startswith("gguf")} <= listed


# ---- names ----------------------------------------------------------------------------------------------------------


def test_a_width_after_the_name_overrules_the_settings():
    assert find("gptq-3", bits=4, group=32, symmetric=True) == method("gptq", 3, 32, True)
    assert find("rtn_float_zero-2") == method("rtn_float_zero", 2, 64)
    assert find("gptq", bits=5) == method("gptq", 5, 64)


@pytest.mark.parametrize("name", ["gptqq", "gptqq-3", "gptq-", "gptq-x", "int8-4", "gguf_q4_k_m-3", "../model/local"])
def test_an_unknown_name_is_refused_with_the_three_nearest_of_rows_and_files(name):
    with pytest.raises(compositions.InputError, match=r"^There is no method .*; the nearest names are ") as caught:
        find(name)
    assert repr(name) in str(caught.value)
    nearest = str(caught.value).partition(" are ")[2].rstrip(".").split(", ")
    assert len(nearest) == 3
    assert set(nearest) <= {*METHODS, *WRITTEN}
    if name == "gguf_q4_k_m-3":
        assert nearest[0] == "gguf_q4_k_m"


@pytest.mark.parametrize("name", ["gptq-1", "gptq-9"])
def test_a_width_that_no_format_takes_is_refused(name):
    with refused("2 to 8 bits", name[-1]):
        find(name)


def test_a_file_that_refers_to_the_settings_serves_every_width(written):
    written(OPEN)
    assert takes_bits("mine")
    assert find("mine", bits=5, group=16) == Method(Int(5, 16))
    assert find("mine-3", bits=5, group=16) == Method(Int(3, 16))
    assert find("mine", group="channel") == Method(Int(4, "channel"))
    written("{_target_: jquant.Method, format: {_target_: jquant.Int, bits: 4, symmetric: '${symmetric}'}}")
    assert not takes_bits("mine")
    assert find("mine", bits=5, symmetric=True) == Method(Int(4, 128, symmetric=True))
    with refused("'mine-3'", "mine"):
        find("mine-3")


def test_a_plan_of_rows_that_leave_the_width_open_does_too(written):
    written("rules:\n- {weights: 'mlp', method: rtn}\n- {weights: '', method: q8_0}\n")
    assert find("mine-3") == [("mlp", method("rtn", 3)), ("", method("q8_0"))]
    written("rules:\n- {weights: 'mlp', method: rtn-2}\n- {weights: '', method: rtn}\n")
    assert find("mine", group=32) == [("mlp", method("rtn-2", group=32)), ("", method("rtn", group=32))]
    assert find("mine-3")[1] == ("", method("rtn-3"))


def test_only_rows_that_leave_the_width_open_take_bits():
    taking = {name for name in METHODS if takes_bits(name)}
    assert {"rtn", "gptq", "awq", "rtn_loss", "rtn_float_zero"} <= taking
    assert not taking & {"int8", "nf4", "q4_k", "mxfp4", "w8a8"}
    assert not takes_bits("gptq_nf4")
    assert not takes_bits("gptq-3")
    assert not takes_bits("nothing")


def test_a_plan_needs_calibration_where_one_of_its_methods_does():
    assert needs_calibration(method("gptq"))
    assert not needs_calibration(method("rtn"))
    assert needs_calibration([("mlp", method("rtn")), ("", method("gptq"))])
    assert not needs_calibration([("mlp", method("rtn")), ("", None)])
    assert needs_of([("mlp", find("gptq_damping")), ("", find("gptq_propagated"))]) == {"gram", "held_out", "cross"}
    assert needs_of(None) == needs_of(method("rtn")) == set()


# ---- what a file may and may not say --------------------------------------------------------------------------------


def test_a_file_of_rules_decides_by_the_first_and_leaves_weights_without_a_method_float(written):
    written(
        "rules:\n- {weights: 'layers\\.(0|29)\\.'}\n- {weights: 'mlp', method: gptq}\n- {weights: '', method: q8_0}\n"
        "activation: {_target_: jquant.Activation, outliers: 6.0}\n"
    )
    chosen = assign(find("mine", bits=3, group=32, symmetric=True), NAMES)
    assert chosen["layers.0.mlp.up.kernel"] is chosen["layers.29.attention.q.kernel"] is None
    assert sum(one is None for one in chosen.values()) == 2 * len(SHAPES)
    gptq, q8_0 = chosen["layers.10.mlp.up.kernel"], chosen["layers.10.attention.q.kernel"]
    assert gptq is not None
    assert q8_0 is not None
    assert gptq.format == Int(3, 32, symmetric=True)  # completed by the settings
    assert q8_0.format == method("q8_0").format
    assert gptq.activation == q8_0.activation == Activation(outliers=6.0)


def test_a_file_of_rules_without_an_activation_attaches_none(written):
    written("rules:\n- {weights: '', method: rtn}\n")
    assert find("mine") == [("", Method(Int(4, 64), MinMax()))]


BAD = {
    "a target of another package": ("{_target_: os.system, command: 'exit 3'}", "'os.system'"),
    "a target inside another": ("{_target_: jquant.Method, format: {_target_: os.getcwd}}", "'os.getcwd'"),
    "a function that reads files": (
        "{_target_: jquant.load_text, source: /etc/passwd}",
        "'jquant.load_text' is not one",
    ),
    "a function that reads models": (
        "{_target_: jquant.Method, format: {_target_: jquant.open_model, model: /tmp}}",
        "jquant's parts: Int, Codebook",
    ),
    "a part that jquant does not offer": ("{_target_: jquant.Method, format: {_target_: jquant.In}}", "'jquant.In'"),
    "a module of jquant": ("{_target_: jquant.io.hub.fetch}", "'jquant.io.hub.fetch'"),
    "an activation from elsewhere": (
        "{rules: [{weights: '', method: rtn}], activation: {_target_: os.getcwd}}",
        "'os.getcwd'",
    ),
    "a value out of range": ("{_target_: jquant.Method, format: {_target_: jquant.Int, bits: 9}}", "not 9"),
    "an argument that does not exist": ("{_target_: jquant.Method, format: {_target_: jquant.NF4}, formt: 1}", "formt"),
    "a part that is no method": ("{_target_: jquant.NF4}", "neither"),
    "no method at all": ("{bits: 3}", "'None'"),
    "a list in place of a method": ("[{_target_: jquant.NF4}]", "neither"),
    "a rounding by its name": (
        "{_target_: jquant.Method, format: {_target_: jquant.NF4}, rounding: GPTQ}",
        "rounding takes a part, {_target_: jquant.GPTQ}, not 'GPTQ'",
    ),
    "a format by its width": (
        "{_target_: jquant.Method, format: 4}",
        "format takes a part, {_target_: jquant.…}, not 4",
    ),
    "an argument whose name is a number": ("{_target_: jquant.NF4, 3: 4}", "strings"),
    "an argument of a part that takes none": ("{_target_: jquant.MXFP4, group: 64}", "not callable"),
    "a misspelt key beside the rules": ("{rules: [{weights: '', method: rtn}], activaton: null}", "'activaton'"),
    "an activation that is none": (
        "{rules: [{weights: '', method: rtn}], activation: {_target_: jquant.GPTQ}}",
        "jquant.Activation",
    ),
    "a rule for a number": ("{rules: [{weights: 3, method: rtn}]}", "regular expression"),
    "a rule with a list of methods": ("{rules: [{weights: '', method: [rtn]}]}", "regular expression"),
    "a rule with a misspelt key": ("{rules: [{weights: '', methd: rtn}]}", "methd"),
    "a reference to no setting": (OPEN.replace("${bits}", "${bit}"), "'bit'"),
    "a reference that does not end": (OPEN.replace("${bits}", "${bits"), "bits, group, symmetric"),
    "text that is no YAML": ("{_target_: jquant.Method", "is no YAML"),
    "a rule that is a name": ("{rules: [rtn]}", "but rtn has not"),
    "a rule that is a number": ("{rules: 3}", "a rule has weights"),
    "a rule without weights": ("{rules: [{method: rtn}]}", "a rule has weights"),
    "an unknown row": ("{rules: [{weights: '', method: gptqq}]}", "'gptqq'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_names_what_is_not_jquants_is_refused(written, case):
    text, part = BAD[case]
    written(text)
    for name in ("mine", "mine-3"):
        with refused(part, *(() if "row" in case else ("mine.yaml",))):
            find(name)


def test_parts_are_all_there_and_do_nothing_but_compose(written):
    assert set(compositions.PARTS) <= set(jquant.__all__)
    left = {
        "load_model",
        "load_text",
        "open_model",
        "quantize",
        "quantize_to_folder",
        "perplexity",
        "generate",
        "METHODS",
    }
    assert not left & set(compositions.PARTS)
    written("{_target_: jquant.Method, format: {_target_: jquant.MXFP4}}")  # a value, not a function
    assert find("mine") == Method(jquant.MXFP4)


def test_a_name_tells_which_settings_it_leaves_open(written):
    taken = lambda name: [key for key in SETTINGS if compositions.leaves_open(name, key)]  # noqa: E731
    assert taken("gptq") == ["bits", "group", "symmetric"]
    assert taken("gptq-3") == ["group", "symmetric"]
    assert taken("rtn_float_zero") == ["bits", "group"]
    assert taken("nf4") == taken("gptq_nf4") == taken("gguf_q4_0") == []
    written(OPEN.replace("}}", ", zero: float, symmetric: '${symmetric}'}}"))  # no float zero where it is symmetric
    assert "symmetric" in taken("mine")


def test_lists_in_a_file_become_what_a_format_takes(written):
    written("{_target_: jquant.Method, format: {_target_: jquant.FP8_E4M3, group: [128, 128]}}")
    assert find("mine") == method("fp8_e4m3_128x128")
    written("{_target_: jquant.Method, format: {_target_: jquant.Codebook, levels: [-1.0, 0.0, 0.5], group: 32}}")
    assert hash(find("mine")) == hash(Method(Codebook((-1.0, 0.0, 0.5), 32)))
