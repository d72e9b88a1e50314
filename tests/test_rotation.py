"""Rotated and permuted decoders: the same logits as transformers' float model, fewer outliers, what is refused."""

from dataclasses import asdict, replace

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import refused
from flax import nnx
from flax.nnx.traversals import flatten_mapping

import jquant
from jquant.evaluation.generation import generate_ids
from jquant.io.load import load_model
from jquant.methods import Method, Tuning
from jquant.models.decoder import Decoder, blocks, with_blocks
from jquant.models.folding import permute_mlp, rotate
from jquant.models.rotary import rotary_table
from jquant.pipeline.in_memory import quantize_decoder, quantize_decoders
from jquant.rotations import Rotation, apply
from jquant.transforms import Hadamard, row_magnitude, sort_channels

forward = jax.jit(lambda decoder, tokens: decoder(tokens))

TOKENS = np.random.default_rng(1).integers(0, checkpoints.VOCAB, (2, 24), np.int32)
GRID = jquant.Int(8, 32)
NONE = {"residual": False, "heads": False, "mlp": False}
SWITCHES = {
    "residual": NONE | {"residual": True},
    "heads": NONE | {"heads": True},
    "mlp": NONE | {"mlp": True},
    "all": {},
}
# Hidden, feed-forward and head sizes with a Hadamard matrix (64, 96, 48, 72, 36, 576, 1536) and without (92, 18, 10).
SHAPES = {
    "grouped-query": {},
    "tied": {"tie_word_embeddings": True},
    "multi-head": {"hidden_size": 48, "intermediate_size": 72, "num_key_value_heads": 4},
    "one key/value head": {
        "hidden_size": 36, "intermediate_size": 92, "num_attention_heads": 2, "num_key_value_heads": 1
    },
    "explicit head_dim": {"hidden_size": 72, "head_dim": 10},
    "llama-3 rope": {"rope_parameters": checkpoints.LLAMA3_ROPE},
    "the default model's sizes": {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True, "initializer_range": 0.05,
    },
}  # fmt: skip


def loud_llama(where: str):
    """A few channels of every projection's input are far larger than the rest, or so are the weights that read them."""
    model = checkpoints.llama()
    for name, parameter in model.state_dict().items():
        if where == "loud rows" and "proj" in name:
            parameter[:, 5] *= 20
        if where == "loud inputs":
            if "embed_tokens" in name:
                parameter[:, 5] *= 20
            if "o_proj" in name or "down_proj" in name:
                parameter[5] *= 20
            if "up_proj" in name or "v_proj" in name:
                parameter[3] *= 20
    return model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """shape -> (float decoder, transformers' logits)."""
    found = {}

    def get(shape: str) -> tuple[Decoder, np.ndarray]:
        if shape not in found:
            model = checkpoints.llama(**SHAPES[shape]) if shape in SHAPES else loud_llama(shape)
            folder = checkpoints.save(tmp_path_factory.mktemp("model"), model)
            found[shape] = load_model(folder).decoder, checkpoints.logits(model, TOKENS)
        return found[shape]

    return get


@pytest.fixture(scope="module")
def decoder(loaded) -> Decoder:
    return loaded("grouped-query")[0]


def leaves(decoder: Decoder) -> dict[str, jax.Array]:
    return {".".join(map(str, k)): v for k, v in flatten_mapping(nnx.to_pure_dict(nnx.state(decoder))).items()}


def taps(decoder: Decoder, layer: int = -1) -> dict[str, jax.Array]:
    """What the projections of a layer read when the tokens run through the decoder."""
    rotary, x, seen = rotary_table(decoder.config, jnp.arange(TOKENS.shape[1])), decoder.embed(jnp.asarray(TOKENS)), []
    for block in blocks(decoder):
        x, found, _ = block(x, rotary)
        seen.append(found)
    return seen[layer]


# ---- the logits stay ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_stay_those_of_transformers(loaded, shape, switch):
    decoder, theirs = loaded(shape)
    rotated = rotate(decoder, **SWITCHES[switch])
    assert checkpoints.relative(np.asarray(forward(rotated, TOKENS)), theirs) <= 1e-4
    before, after = leaves(decoder), leaves(rotated)
    assert before.keys() == after.keys()
    moved = {path.removeprefix("segments.0.") for path in before if not np.array_equal(before[path], after[path])}
    stream = {f"attention.{n}.kernel" for n in "qkvo"} | {f"mlp.{n}.kernel" for n in ("gate", "up", "down")}
    expected = {
        "residual": stream | {"attention_norm.scale", "mlp_norm.scale"},
        "heads": {"attention.v.kernel", "attention.o.kernel"},
        "mlp": {"mlp.down.kernel"},
    }
    assert moved == (set().union(*expected.values()) if switch == "all" else expected[switch])


@pytest.mark.parametrize("options", [{"seed": None}, {"seed": 7}, {"kind": "orthogonal"}], ids=str)
def test_whatever_the_rotation_the_logits_stay(loaded, options):
    decoder, theirs = loaded("multi-head")
    rotated = rotate(decoder, **options)
    assert checkpoints.relative(np.asarray(forward(rotated, TOKENS)), theirs) <= 1e-4
    other = leaves(rotate(decoder))
    assert any(np.abs(leaf - other[path]).max() > 0.01 for path, leaf in leaves(rotated).items())


def test_one_switch_after_another_is_all_at_once(decoder):
    stepwise = decoder
    for switch in ("residual", "heads", "mlp"):
        stepwise = rotate(stepwise, **SWITCHES[switch])
    at_once = leaves(rotate(decoder))
    for path, leaf in leaves(stepwise).items():
        np.testing.assert_allclose(leaf, at_once[path], atol=1e-5, err_msg=path)


def test_the_input_is_untouched_and_tied_embeddings_stay_tied(loaded):
    decoder, _ = loaded("tied")
    before = jax.tree.map(np.array, leaves(decoder))
    rotated = rotate(decoder)
    for path, leaf in leaves(decoder).items():
        np.testing.assert_array_equal(leaf, before[path], err_msg=path)
    assert decoder.norm.rotation is None
    assert all(segment.mlp.rotation is None for segment in decoder.segments)
    assert rotated.head is None
    assert rotated.embedding.get_value() is decoder.embedding.get_value()
    np.testing.assert_array_equal(leaves(rotated)["norm.scale"], before["norm.scale"])


def test_gains_of_the_blocks_norms_become_ones(decoder):
    rotated = leaves(rotate(decoder))
    for norm in ("attention_norm", "mlp_norm"):
        np.testing.assert_array_equal(rotated[f"segments.0.{norm}.scale"], 1)
        assert np.ptp(leaves(decoder)[f"segments.0.{norm}.scale"]) > 0.1


def test_taps_are_the_rotated_inputs_and_what_the_projections_read(decoder):
    """Calibration sees what a quantized weight will meet."""
    plain, turned = taps(decoder), taps(rotate(decoder))
    gains = [leaves(decoder)[f"segments.0.{norm}.scale"][-1] for norm in ("attention_norm", "mlp_norm")]
    stream, head, inner = Rotation(64), Rotation(16), Rotation(96)
    by_head = plain["attention_output"].reshape(*TOKENS.shape, 4, 16)
    expected = {
        "attention_input": apply(plain["attention_input"] / gains[0], stream),
        "attention_output": apply(by_head, head).reshape(*TOKENS.shape, 64),
        "mlp_input": apply(plain["mlp_input"] / gains[1], stream),
        "mlp_output": apply(plain["mlp_output"], inner),
        "attention_mass": plain["attention_mass"],
    }
    assert turned.keys() == expected.keys()
    for name, tap in expected.items():
        assert checkpoints.relative(np.asarray(turned[name]), np.asarray(tap)) <= 1e-4, name


@pytest.mark.parametrize("shape", ["grouped-query", "tied"])
def test_cached_decoding_follows_the_float_model(loaded, shape):
    decoder, _ = loaded(shape)
    ids, prompt = [list(generate_ids(d, TOKENS[0, :9], tokens=12)) for d in (decoder, rotate(decoder))], TOKENS[0, :9]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) > 3
    logits = np.asarray(forward(rotate(decoder), np.concatenate([prompt, ids[1]]).astype(np.int32)[None]))
    assert ids[1] == logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()


def test_a_bfloat16_decoder_stays_one_and_comes_within_its_precision(tmp_path):
    model = checkpoints.llama()
    decoder = load_model(checkpoints.save(tmp_path, model), dtype="bfloat16").decoder
    rotated = rotate(decoder)
    assert {leaf.dtype for leaf in leaves(rotated).values()} == {jnp.dtype("bfloat16")}
    logits = forward(rotated, TOKENS)
    assert logits.dtype == jnp.bfloat16
    assert checkpoints.relative(np.asarray(logits, np.float32), checkpoints.logits(model, TOKENS)) < 0.1


# ---- static attributes ----------------------------------------------------------------------------------------------


def test_rotations_survive_splitting_merging_and_cutting_into_blocks(decoder):
    rotated = rotate(decoder, seed=3)
    exact = np.asarray(forward(rotated, TOKENS))
    for same in (nnx.merge(*nnx.split(rotated)), with_blocks(rotated, list(blocks(rotated)))):
        assert same.norm.rotation == Rotation(64, 3)
        assert [segment.mlp.rotation for segment in same.segments] == [Rotation(96, 3)]
        np.testing.assert_array_equal(forward(same, TOKENS), exact)


def test_layers_of_unlike_rotations_make_segments_of_their_own(decoder):
    mixed = [next(blocks(rotate(decoder, **SWITCHES["mlp"], seed=1))), list(blocks(decoder))[1]]
    both = with_blocks(decoder, mixed)
    assert [segment.mlp.rotation for segment in both.segments] == [Rotation(96, 1), None]
    assert checkpoints.relative(np.asarray(forward(both, TOKENS)), np.asarray(forward(decoder, TOKENS))) <= 1e-4


def test_equal_rotations_share_a_compiled_program(decoder):
    traces = []
    count = jax.jit(lambda decoder, tokens: traces.append(1) or decoder(tokens))
    for one in (rotate(decoder), rotate(decoder), rotate(decoder, seed=1)):
        count(one, TOKENS)
    assert len(traces) == 2


# ---- what it is for -------------------------------------------------------------------------------------------------


def kurtosis(x: np.ndarray) -> float:
    """Of each token's channels, 3 for a Gaussian."""
    x = np.asarray(x, np.float64)
    x = x - x.mean(-1, keepdims=True)
    return float(((x**4).mean(-1) / (x**2).mean(-1) ** 2).mean())


def test_outliers_leave_every_input(loaded):
    decoder, theirs = loaded("loud inputs")
    rotated = rotate(decoder)
    assert checkpoints.relative(np.asarray(forward(rotated, TOKENS)), theirs) <= 1e-4
    before, after = taps(decoder), taps(rotated)
    for name in ("attention_input", "attention_output", "mlp_input", "mlp_output"):
        assert kurtosis(before[name]) > 8, name
        assert kurtosis(after[name]) < 0.6 * kurtosis(before[name]), name


@pytest.mark.parametrize(
    ("where", "chosen"),
    [("loud rows", jquant.method("rtn", 6, "channel")), ("loud inputs", jquant.method("w8a8"))],
    ids=["loud rows-rtn", "loud inputs-w8a8"],
)
def test_a_rotated_decoder_is_quantized_with_less_error(loaded, where, chosen):
    decoder, exact = loaded(where)
    errors = []
    for one in (decoder, rotate(decoder)):
        logits = np.asarray(forward(quantize_decoder(one, chosen)[0], TOKENS))
        errors.append(np.linalg.norm(logits - exact) / np.linalg.norm(exact))
    assert 1e-4 < errors[1] < 0.75 * errors[0]


@pytest.mark.parametrize(
    "chosen", [Method(GRID, rounding=jquant.GPTQ()), Method(GRID, transform=jquant.AWQ(4))], ids=["gptq", "awq"]
)
def test_calibration_looks_at_the_rotated_decoder_and_folds_into_it(loaded, chosen):
    """Only the MLP's rotation, between `up` and `down`, lets no channel scale through."""
    decoder, exact = loaded("grouped-query")
    rotated = rotate(decoder, mlp=chosen.transform is None)
    quantized, report = quantize_decoder(rotated, chosen, TOKENS)
    assert all(0 < float(info.error) < 1e-3 * float(info.energy) for info in report.values())
    logits = np.asarray(forward(quantized, TOKENS))
    assert 1e-4 < np.linalg.norm(logits - exact) / np.linalg.norm(exact) < 0.05


@pytest.mark.parametrize(
    ("chosen", "hadamard"),
    [
        (Method(GRID, rounding=jquant.GPTQ()), Hadamard(seed=3)),
        (Method(GRID, transform=jquant.AWQ(4)), Hadamard(mlp=False)),
    ],
    ids=["gptq", "awq"],
)
def test_a_methods_rotation_is_that_of_the_decoder_before(loaded, chosen, hadamard):
    decoder, _ = loaded("grouped-query")
    before = jax.tree.map(np.array, leaves(decoder))
    quantized, _ = quantize_decoder(decoder, replace(chosen, rotation=hadamard), TOKENS)
    expected, _ = quantize_decoder(rotate(decoder, **asdict(hadamard)), chosen, TOKENS)
    assert jax.tree.structure(nnx.split(quantized)) == jax.tree.structure(nnx.split(expected))
    assert all(map(np.array_equal, jax.tree.leaves(leaves(quantized)), jax.tree.leaves(leaves(expected))))
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(leaves(decoder))))


def test_tuning_towards_the_float_model_goes_through_a_rotation(loaded):
    decoder, exact = loaded("grouped-query")
    rough = Method(jquant.Int(3, 32), rotation=Hadamard())
    errors = []
    for one in (rough, replace(rough, tuning=(Tuning(12, 2, 1e-2),))):
        logits = np.asarray(forward(quantize_decoder(decoder, one, TOKENS)[0], TOKENS))
        errors.append(np.linalg.norm(logits - exact) / np.linalg.norm(exact))
    assert 1e-4 < errors[1] < 0.95 * errors[0]


def test_rotations_that_cannot_be_are_refused(loaded):
    decoder, _ = loaded("grouped-query")
    plain = Method(GRID, rounding=jquant.GPTQ())
    turned = replace(plain, rotation=Hadamard())
    with refused("same rotation"):
        quantize_decoder(decoder, [("attention", plain), ("", turned)], TOKENS)
    with refused("same rotation"):
        quantize_decoders(decoder, {"plain": plain, "turned": turned}, TOKENS)
    with refused("layers.0.mlp.down", "mlp=False"):
        quantize_decoder(decoder, Method(GRID, transform=jquant.AWQ(4), rotation=Hadamard()), TOKENS)
    with refused("rotated already"):
        quantize_decoder(rotate(decoder), turned, TOKENS)
    with refused("all three are off"):
        Hadamard(residual=False, heads=False, mlp=False)
    with refused("seed", "-1"):
        Hadamard(seed=-1)


# ---- permutations ---------------------------------------------------------------------------------------------------


def orders(decoder: Decoder, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(decoder.config.ffn) for _ in range(decoder.config.layers)])


@pytest.mark.parametrize("shape", ["grouped-query", "multi-head"])
def test_permuted_channels_leave_the_logits(loaded, shape):
    decoder, theirs = loaded(shape)
    order = orders(decoder)
    permuted = permute_mlp(decoder, order)
    assert checkpoints.relative(np.asarray(forward(permuted, TOKENS)), theirs) <= 1e-4
    before, after = leaves(decoder), leaves(permuted)
    for layer, row in enumerate(order):
        for name, axis in (("gate", 1), ("up", 1), ("down", 0)):
            path = f"segments.0.mlp.{name}.kernel"
            np.testing.assert_array_equal(after[path][layer], np.take(np.asarray(before[path][layer]), row, axis))
    untouched = [path for path in before if "mlp.gate" not in path and "mlp.up" not in path and "down" not in path]
    assert all(np.array_equal(before[path], after[path]) for path in untouched)
    back = permute_mlp(permuted, np.argsort(order, -1))
    assert all(np.array_equal(leaf, before[path]) for path, leaf in leaves(back).items())


def test_segments_are_permuted_and_rotated_each_with_its_own_layers(decoder):
    first, second = blocks(decoder)
    nnx.update(second, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(second)))
    both, order = with_blocks(decoder, [first, second]), orders(decoder)
    assert len(both.segments) == 2
    permuted, rotated = permute_mlp(both, order), rotate(both)
    for layer, block in enumerate((first, second)):
        down = np.asarray(block.mlp.down.kernel.get_value())
        np.testing.assert_array_equal(permuted.segments[layer].mlp.down.kernel.get_value()[0], down[order[layer]])
        assert rotated.segments[layer].mlp.rotation == Rotation(96)
        turned = rotated.segments[layer].mlp.down.kernel.get_value()[0]
        assert turned.dtype == down.dtype
        expected = apply(apply(jnp.asarray(down, jnp.float32).T, Rotation(96)).T, Rotation(64))
        np.testing.assert_allclose(np.asarray(turned, np.float32), expected, atol=1e-5 if layer == 0 else 5e-3)


def test_permuting_then_rotating_is_exact_too(loaded):
    decoder, theirs = loaded("multi-head")
    both = rotate(permute_mlp(decoder, orders(decoder)))
    assert checkpoints.relative(np.asarray(forward(both, TOKENS)), theirs) <= 1e-4


def test_sorted_channels_put_similar_rows_into_a_group(decoder):
    """Int4 in groups of 16: rows of unlike size spoil each other's group, sorted ones do not."""
    scales = np.exp(2 * np.random.default_rng(3).standard_normal((2, 96, 1)))
    loud = nnx.clone(decoder)
    kernel = loud.segments[0].mlp.down.kernel
    kernel.set_value(kernel.get_value() * jnp.asarray(scales, jnp.float32))
    order = sort_channels(row_magnitude(kernel.get_value()))
    errors = []
    for one in (loud, permute_mlp(loud, order)):
        w = one.segments[0].mlp.down.kernel.get_value()
        q = quantize_decoder(one, Method(jquant.Int(4, 16)))[0].segments[0].mlp.down.kernel.get_value()
        # The rows count alike, as they do where quiet rows read loud channels.
        errors.append(float(jnp.mean(jnp.sum((jquant.dequantize(q) - w) ** 2, -1) / jnp.sum(w**2, -1))))
    assert errors[1] < 0.2 * errors[0]


def test_sorting_is_stable_and_ascending():
    keys = jnp.asarray([[2.0, 1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(sort_channels(keys), [[3, 1, 0, 2], [0, 1, 2, 3]])
    weight = jnp.asarray([[[1.0, -3.0], [0.0, 0.5]]], jnp.bfloat16)
    np.testing.assert_array_equal(row_magnitude(weight), [[3.0, 0.5]])


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_quantized_decoders_are_refused_by_the_tensors_name(decoder):
    plan = [(r"layers\.1\.mlp\.up", "int8")]
    quantized, _ = quantize_decoder(decoder, plan)
    for function in (rotate, lambda d: permute_mlp(d, orders(d))):
        with refused("layers.1.mlp.up.kernel", "float model"):
            function(quantized)


def test_rotating_twice_is_refused(decoder):
    rotated = rotate(decoder)
    with refused("residual stream", "already"):
        rotate(rotated)
    with refused("MLP", "already"):
        rotate(rotated, residual=False)
    rotate(rotated, **SWITCHES["heads"])


def test_impossible_orders_are_refused(decoder):
    order = orders(decoder)
    with refused("2 layers", "96", "(1, 96)"):
        permute_mlp(decoder, order[:1])
    order[1, 4] = order[1, 5]
    with refused("layer 1", "no permutation"):
        permute_mlp(decoder, order)
    with refused("rotated", "permute first"):
        permute_mlp(rotate(decoder), orders(decoder))
