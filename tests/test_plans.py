"""Plans: which weight gets which method, what is refused before any work, and segments of unlike layers."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from checkpoints import refused
from flax import nnx
from flax.nnx.traversals import flatten_mapping, unflatten_mapping

from jquant.evaluation.generation import generate_ids
from jquant.formats import MXFP4, NF4, Int
from jquant.methods import METHODS, Method, assign, method
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Decoder, blocks, with_blocks
from jquant.pipeline.in_memory import quantize_decoder
from jquant.pipeline.plan import make_plan
from jquant.qtensor import QTensor, dequantize
from jquant.ranges import MinMax
from jquant.rounding import GPTQ
from jquant.transforms import AWQ

forward = jax.jit(lambda decoder, tokens: decoder(tokens))

CONFIG = DecoderConfig(
    vocab_size=64, hidden=32, ffn=48, layers=3, heads=4, kv_heads=2, head_dim=8, norm_eps=1e-5, rope_base=10000.0,
    rope_divisors=None, tied=True, context_length=512,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 64, (4, 32), np.int32)
PROJECTIONS = [f"attention.{n}.kernel" for n in "qkvo"] + [f"mlp.{n}.kernel" for n in ("gate", "up", "down")]
NAMES = [f"layers.{i}.{path}" for i in range(3) for path in PROJECTIONS]
RTN = Method(Int(4, 16))


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """Random weights, large enough that rounding shows in the logits."""
    made = Decoder(CONFIG, nnx.Rngs(0))
    return nnx.merge(
        nnx.graphdef(made), jax.tree.map(lambda leaf: 8 * leaf if leaf.ndim == 3 else leaf, nnx.state(made))
    )


def layers(decoder: Decoder) -> list[dict[str, jax.Array | QTensor]]:
    """Every layer's parameters by path."""
    flat = [flatten_mapping(nnx.to_pure_dict(nnx.state(block))) for block in blocks(decoder)]
    return [{".".join(map(str, path)): leaf for path, leaf in layer.items()} for layer in flat]


def formats(decoder: Decoder) -> dict[str, object]:
    """Name -> format of every quantized weight."""
    return {
        f"layers.{i}.{path}": leaf.format
        for i, layer in enumerate(layers(decoder))
        for path, leaf in layer.items()
        if isinstance(leaf, QTensor)
    }


def with_dequantized(decoder: Decoder, quantized: Decoder) -> Decoder:
    """The float decoder with the values that the quantized one's weights stand for."""
    changed = []
    for block, params in zip(blocks(decoder), layers(quantized), strict=True):
        values = {p: dequantize(leaf) if isinstance(leaf, QTensor) else leaf for p, leaf in params.items()}
        nnx.update(block, unflatten_mapping({tuple(p.split(".")): leaf for p, leaf in values.items()}))
        changed.append(block)
    return with_blocks(decoder, changed)


# ---- rules ----------------------------------------------------------------------------------------------------------


def test_the_first_rule_found_in_a_name_decides_and_the_rest_stay_float():
    plan = [(r"layers\.0\.", None), (r"attention\.v", "q8_0"), (r"attention", RTN)]
    chosen = assign(plan, NAMES)
    assert set(chosen) == set(NAMES)
    for name, found in chosen.items():
        wanted = method("q8_0") if "attention.v" in name else RTN if "attention" in name else None
        assert found == (None if "layers.0." in name else wanted), name


def test_a_method_alone_is_for_every_weight():
    assert assign(RTN, NAMES) == dict.fromkeys(NAMES, RTN)


@pytest.mark.parametrize(
    ("plan", "rule"),
    [
        ([("mlp.gaet", "rtn")], "mlp.gaet"),
        ([("", "rtn"), ("attention", "nf4")], "attention"),  # hidden by the rule before it
        ([("mlp", "rtn"), (r"mlp\.down", "nf4"), ("", None)], r"mlp\\.down"),
        ([(r"layers\.3\.", "rtn")], r"layers\\.3"),
    ],
)
def test_a_rule_that_decides_for_no_weight_is_refused_by_its_text(decoder, plan, rule):
    with refused(rule, "no weight"):
        assign(plan, NAMES)
    with refused(rule, "layers.0.attention.q.kernel"):
        quantize_decoder(decoder, plan)


def test_a_rule_that_is_no_regular_expression_is_refused_by_its_text():
    with refused("'mlp.(gate'", "regular expression"):
        assign([("mlp.(gate", "rtn")], NAMES)


def test_a_rule_with_an_unknown_method_is_refused_with_the_nearest_names():
    with refused("'q4_l'", "the nearest names are ", "q4_k"):
        assign([("mlp", "q4_l")], NAMES)


# ---- what a decoder must allow --------------------------------------------------------------------------------------


def test_projections_that_read_one_input_must_share_a_transform(decoder):
    awq = Method(Int(4, 16), transform=AWQ(steps=2))
    for plan in ([("attention.q", awq), ("", RTN)], [(r"layers\.1\.mlp\.up", RTN), ("", awq)]):
        with refused("transform", "mlp.up.kernel" if "up" in plan[0][0] else "attention.k.kernel", plan[0][0][-1]):
            make_plan(decoder, plan)
    # Other sites and other layers may differ, and so may the rest of the method.
    other = Method(NF4(16), rounding=GPTQ(), transform=AWQ(steps=2))
    make_plan(decoder, [("attention.[qk]", awq), ("attention.v", other), (r"layers\.0\.mlp", awq), ("mlp", RTN)])


def test_a_plan_of_another_number_of_layers_is_refused(decoder):
    plan = make_plan(decoder, RTN)
    assert make_plan(decoder, plan) is plan
    with refused("2 layers", "has 3"):
        make_plan(decoder, replace(plan, layers=plan.layers[:2]))


@pytest.mark.parametrize("format", [Int(4, 40), NF4(64), Int(4, (16, 32)), MXFP4])
def test_a_group_larger_than_a_weight_names_the_weight(decoder, format):
    path = {40: "attention.q", 64: "attention.q", (16, 32): "attention.k", 32: None}[format.group]
    if path is None:
        assert len(make_plan(decoder, Method(format)).layers) == 3
        return
    with refused(f"layers.0.{path}.kernel", "larger"):
        quantize_decoder(decoder, Method(format))
    with refused(f"layers.2.{path}.kernel", "larger"):
        quantize_decoder(decoder, [(r"layers\.[01]\.", RTN), ("", Method(format))])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_its_name_if_it_would_be_quantized(decoder, bad):
    broken = nnx.clone(decoder)
    kernel = broken.segments[0].mlp.up.kernel
    kernel.set_value(kernel.get_value().at[1, 3, 5].set(bad))
    with refused("layers.1.mlp.up.kernel", "NaN"):
        quantize_decoder(broken, RTN)
    quantize_decoder(broken, [("mlp.up", None), ("", RTN)])


def test_a_decoder_with_a_quantized_weight_is_refused_by_the_weights_name_whatever_the_plan(decoder):
    half, _ = quantize_decoder(decoder, [(r"layers\.1\.mlp", RTN)])
    for plan in (RTN, [("attention", RTN)]):
        with refused("layers.1.mlp.gate.kernel", "already"):
            quantize_decoder(half, plan)


# ---- what comes out -------------------------------------------------------------------------------------------------

MIXED = [
    (r"layers\.0\.mlp", Method(NF4(16))),
    (r"layers\.0\.", None),
    (r"attention\.v", Method(Int(8, "channel", True))),
    (r"layers\.1\.", Method(MXFP4)),
    (r"mlp\.down", Method(Int(3, 16), rounding=GPTQ())),
]


@pytest.fixture(scope="module")
def mixed(decoder):
    return quantize_decoder(decoder, MIXED, TOKENS)


def test_every_weight_has_the_format_of_its_rule(decoder, mixed):
    quantized, report = mixed
    wanted = {name: one.format for name, one in assign(MIXED, NAMES).items() if one is not None}
    assert formats(quantized) == wanted
    assert {f"layers.{i}.{path}" for i, path in report} == set(wanted)
    for before, after in zip(layers(decoder), layers(quantized), strict=True):
        for path, leaf in after.items():
            if not isinstance(leaf, QTensor):
                np.testing.assert_array_equal(leaf, before[path], err_msg=path)


def test_unlike_layers_form_segments_and_their_logits_are_those_of_the_dequantized_weights(decoder, mixed):
    quantized, _ = mixed
    assert len(quantized.segments) == 3
    same = with_dequantized(decoder, quantized)
    assert len(same.segments) == 1
    wanted, got = np.asarray(forward(same, TOKENS)), np.asarray(forward(quantized, TOKENS))
    assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert np.abs(wanted - np.asarray(forward(decoder, TOKENS))).max() > 0.01 * np.abs(wanted).max()


def test_equal_neighbours_share_a_segment(decoder):
    runs = lambda plan: [  # noqa: E731
        jax.tree.leaves(segment)[0].shape[0] for segment in quantize_decoder(decoder, plan)[0].segments
    ]
    assert runs(RTN) == [3]
    assert runs([(r"layers\.0\.", None), ("", RTN)]) == [1, 2]
    assert runs([(r"layers\.1\.", RTN)]) == [1, 1, 1]


def test_decoding_on_segments_follows_the_full_forward_pass(mixed):
    quantized, _ = mixed
    ids = list(generate_ids(quantized, TOKENS[0, :7], tokens=12))
    logits = np.asarray(forward(quantized, np.concatenate([TOKENS[0, :7], ids]).astype(np.int32)[None]))[0, 6:-1]
    assert ids == logits.argmax(-1).tolist()
    assert len(set(ids)) > 3


def test_one_layer_alone_gets_the_codes_it_gets_in_a_whole_run_of_round_to_nearest(decoder):
    whole, alone = (layers(quantize_decoder(decoder, plan)[0]) for plan in (RTN, [(r"layers\.1\.", RTN)]))
    for path in PROJECTIONS:
        assert isinstance(alone[1][path], QTensor)
        for a, b in zip(jax.tree.leaves(alone[1][path]), jax.tree.leaves(whole[1][path]), strict=True):
            np.testing.assert_array_equal(a, b)
        assert not isinstance(alone[0][path], QTensor)


def test_awq_scales_the_projections_that_stay_float_beside_the_quantized_ones(decoder):
    """k reads what q reads: without its share of the fold the network would be another one."""
    plan = [("attention.q", Method(Int(8, 16), transform=AWQ(steps=8)))]
    quantized, _ = quantize_decoder(decoder, plan, TOKENS)
    moved = np.abs(
        np.asarray(layers(quantized)[0]["attention.k.kernel"] / layers(decoder)[0]["attention.k.kernel"]) - 1
    )
    assert moved.max() > 0.05
    exact, ours = (np.asarray(forward(d, TOKENS)) for d in (decoder, quantized))
    assert np.linalg.norm(ours - exact) < 0.02 * np.linalg.norm(exact)


def test_a_plan_of_names_takes_the_names_own_widths(decoder):
    quantized, _ = quantize_decoder(decoder, [("mlp.down", "mxfp4"), ("attention.o", "int8")])
    assert set(formats(quantized).values()) == {MXFP4, METHODS["int8"](4, 64, False).format}
    assert MinMax() == method("int8").range
