"""Adapters: PEFT is the oracle of what they compute and store, float64 NumPy of LoftQ, checksums of a frozen base."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from checkpoints import refused
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_pipeline import leaves, same_bytes

import jquant
from experiments import qlora
from jquant import LoRA, Tuning, add_adapters, load_adapters, merge_adapters, save_adapters, train_adapters
from jquant.evaluation.perplexity import Reference, score
from jquant.io.language_model import LanguageModel
from jquant.learning import loop, lora
from jquant.learning.objectives import next_token_loss
from jquant.models.adapters import Adapted, drop, values_of
from jquant.models.decoder import Decoder, blocks
from jquant.models.families import LLAMA
from jquant.models.params import flat_params, with_params
from jquant.models.size import size_of
from jquant.parallel.mesh import Devices

# Ranks and alphas that differ by weight and by layer; k has no adapter, and o one in the first layer alone.
RULES = [
    (r"attention\.k", None),
    (r"layers\.1\.attention\.q", LoRA(3, 9)),
    (r"layers\.1\.attention\.o", None),
    (r"mlp\.down", LoRA(2, 6)),
    ("", LoRA(4, 8)),
]
# Most tests share these, and so their compiled programs.
PLAIN, DROPPED = LoRA(4, 8), LoRA(4, 8, dropout=0.5)
STAGE = Tuning(16, windows=4, rate=1e-2, text=1.0)


@pytest.fixture(scope="module")
def torch_model():
    return checkpoints.llama()


@pytest.fixture(scope="module")
def model(tmp_path_factory, torch_model) -> LanguageModel:
    folder = checkpoints.save(tmp_path_factory.mktemp("tiny"), torch_model)
    return jquant.load_model(folder, progress=False)


@pytest.fixture(scope="module")
def base(model) -> LanguageModel:
    return jquant.quantize(model, "nf4_double", progress=False)


@pytest.fixture(scope="module")
def tokens(model) -> np.ndarray:
    """Windows of one text; the last eight are held out."""
    return jquant.data.windows(model.tokenizer.encode(checkpoints.random_text(700, seed=3)), 32, 24)


@pytest.fixture(scope="module")
def trained(base, tokens) -> LanguageModel:
    return train_adapters(add_adapters(base, RULES), tokens[:16], STAGE, progress=False)


@pytest.fixture(scope="module")
def peft() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


def adapters(model: LanguageModel) -> dict[str, Adapted]:
    return {name: leaf for name, leaf in flat_params(model.decoder).items() if isinstance(leaf, Adapted)}


def frozen(model: LanguageModel) -> list[jax.Array]:
    """All arrays but those of adapters."""
    params = flat_params(model.decoder)
    return jax.tree.leaves([leaf.base if isinstance(leaf, Adapted) else leaf for leaf in params.values()])


def loss_of(model: LanguageModel, tokens: np.ndarray) -> float:
    return float(score(model.decoder, tokens).nll.mean())


def logits_of(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(logits(model.decoder, tokens))


@jax.jit
def logits(decoder: Decoder, tokens: jax.Array) -> jax.Array:
    return decoder(tokens)


# ---- the kernel ------------------------------------------------------------------------------------------------------


def test_an_adapter_that_is_not_trained_changes_no_bit(base, tokens):
    for rules in (RULES, DROPPED):
        assert np.array_equal(logits_of(add_adapters(base, rules), tokens), logits_of(base, tokens))


def test_the_start_is_pefts(base):
    kernels = adapters(add_adapters(base, LoRA(16, 32), seed=1))
    assert len(kernels) == 7
    for name, kernel in kernels.items():
        rows, a = kernel.shape[-2], np.asarray(kernel.a)
        assert a.shape == (2, rows, 16), name
        assert 0.95 < np.abs(a).max() * rows**0.5 <= 1
        assert abs(a.std() * (3 * rows) ** 0.5 - 1) < 0.1  # of a uniform distribution
        assert not np.any(kernel.b)
    firsts = [
        np.asarray(kernel.a)[layer, 0, 0] * kernel.shape[-2] ** 0.5 for kernel in kernels.values() for layer in (0, 1)
    ]
    assert len({*firsts}) == 14  # each weight draws its own
    again, other = (adapters(add_adapters(base, LoRA(16, 32), seed=seed)) for seed in (1, 2))
    assert same_bytes(kernels, again)
    assert not same_bytes(kernels, other)


def test_value_and_gradients_are_the_closed_form():
    rng = np.random.default_rng(0)
    x, w, a, b, slope = (rng.normal(size=shape) for shape in ((3, 5, 8), (8, 6), (8, 2), (2, 6), (3, 5, 6)))
    short = [jnp.asarray(v, jnp.float32) for v in (x, a, b)]
    kernel = lambda a, b: Adapted(jnp.asarray(w, jnp.float32), a, b, alpha=6.0)  # noqa: E731
    y, back = jax.vjp(lambda x, a, b: x @ kernel(a, b), *short)
    np.testing.assert_allclose(y, x @ w + 3 * x @ a @ b, rtol=1e-4, atol=1e-4)
    at_x, at_a, at_b = back(jnp.asarray(slope, jnp.float32))
    flat, g = x.reshape(-1, 8), slope.reshape(-1, 6)
    np.testing.assert_allclose(at_x, slope @ (w + 3 * a @ b).T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(at_a, 3 * flat.T @ g @ b.T, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(at_b, 3 * (flat @ a).T @ g, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(kernel(*short[1:]).merged(), w + 3 * a @ b, rtol=1e-5, atol=1e-5)
    assert np.array_equal(np.asarray(x, np.float32) @ kernel(*short[1:]), y)  # NumPy leaves the product to the kernel


def test_dropout_keeps_the_expectation_and_follows_the_key():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.float32)
    kernel = Adapted(
        jnp.zeros((8, 6)), *(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 2), (2, 6))), 2.0, 0.25
    )
    dropped = lambda seed: x @ replace(kernel, keys=jax.random.split(jax.random.key(seed), 2))  # noqa: E731
    assert np.array_equal(dropped(1), dropped(1))
    assert not np.array_equal(dropped(1), dropped(2))
    mean = np.mean(jax.vmap(dropped)(jnp.arange(4000)), 0)
    np.testing.assert_allclose(mean, x @ kernel, atol=0.25)  # five standard errors
    mask = np.asarray(drop(jnp.ones((2, 50, 40)), jax.random.split(jax.random.key(0), 2), 0.25))
    assert {*np.unique(mask)} == {np.float32(0), np.float32(1 / 0.75)}
    assert abs((mask == 0).mean() - 0.25) < 0.03
    assert not np.array_equal(mask[0], mask[1])


def test_masks_differ_by_layer_weight_and_window_but_not_by_how_windows_are_split(base, tokens):
    model = add_adapters(base, DROPPED)
    student, learned = lora.split(model.decoder)
    learned = jax.tree.map(lambda v: v + 0.01, learned)
    keys = jax.random.split(jax.random.key(0), 4)
    drawing = replace(student, keys=keys)
    drawn = [drawing._keys_of(number, kernel) for number, kernel in enumerate(student.kernels.values())]
    assert {draw.shape for draw in drawn} == {(2, 4)}
    assert (
        len({tuple(key) for draw in drawn for key in np.asarray(jax.random.key_data(draw)).reshape(-1, 2)}) == 7 * 2 * 4
    )
    loss = jax.jit(lora.adapter_loss, static_argnums=3)
    frozen_parts, data = (student, lora.outside_of(base.decoder)), jax.random.key_data(keys)
    value = lambda which: loss(learned, frozen_parts, (tokens[which], data[which]), STAGE)  # noqa: E731
    whole, halves = value(slice(0, 4)), [value(slice(0, 2)), value(slice(2, 4))]
    assert abs(whole - np.mean(halves)) < 1e-5
    other = loss(learned, frozen_parts, (tokens[:4], data[::-1]), STAGE)
    assert abs(whole - other) > 1e-4


# ---- training --------------------------------------------------------------------------------------------------------


def test_training_lowers_the_held_out_loss_and_leaves_the_base_bit_for_bit(base, trained, tokens):
    assert loss_of(trained, tokens[16:]) < loss_of(base, tokens[16:]) - 0.3
    fresh = add_adapters(base, RULES)
    assert same_bytes(frozen(trained), frozen(fresh))
    assert {name: kernel.shape for name, kernel in adapters(trained).items()} == {
        name: kernel.shape for name, kernel in adapters(fresh).items()
    }
    for name, kernel in adapters(trained).items():
        assert np.any(kernel.b), name
        assert np.all(np.asarray(jnp.any(kernel.a != adapters(fresh)[name].a, (-1, -2)))), name


def test_the_same_twice_gives_the_same_bytes_and_the_given_model_stays(base, tokens):
    fresh = add_adapters(base, DROPPED)
    before = jax.tree.map(np.array, leaves(fresh.decoder))
    first, again, other = (
        train_adapters(replace(fresh, decoder=decoder), tokens[:8], STAGE, progress=False)
        for decoder in (fresh.decoder, fresh.decoder, add_adapters(base, DROPPED, seed=1).decoder)
    )
    assert same_bytes(leaves(first.decoder), leaves(again.decoder))
    assert not same_bytes(leaves(first.decoder), leaves(other.decoder))
    assert same_bytes(before, leaves(fresh.decoder))


def test_the_optimizer_keeps_moments_of_adapters_alone(base, tokens, monkeypatch):
    model, states, calls = add_adapters(base, RULES), [], []
    expected = lora.optimizer_bytes(model, STAGE)
    monkeypatch.setattr(loop, "step", lambda state, *_, **__: states.append(state) or (state, jnp.float32(1), True))
    train_adapters(model, tokens[:4], STAGE, progress=lambda *call, **figures: calls.append((*call, figures["loss"])))
    shapes = {leaf.shape for kernel in adapters(model).values() for leaf in (kernel.a, kernel.b)}
    numbers = sum(kernel.a.size + kernel.b.size for kernel in adapters(model).values())
    every = jax.tree.leaves(states[0].moments)
    assert {leaf.shape for leaf in every if leaf.ndim} == shapes
    assert expected == 2 * 4 * numbers + 4 * sum(not leaf.ndim for leaf in every)  # and counts of steps
    assert expected == sum(leaf.nbytes for leaf in every)
    assert calls == [("tune", number, 16, 1.0) for number in range(1, 17)]


def test_a_training_that_ended_early_goes_on_to_the_same_bytes(base, tokens, tmp_path):
    fresh, journal = add_adapters(base, DROPPED), jquant.Journal(tmp_path, every=4)

    def end_early(_: str, done: int, *__, **___) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_adapters(fresh, tokens[:8], STAGE, journal=journal, progress=end_early)
    calls = []
    told = lambda _, done, *__, **___: calls.append(done)  # noqa: E731
    resumed = train_adapters(fresh, tokens[:8], STAGE, journal=journal, progress=told)
    assert calls == list(range(5, 17))
    whole = train_adapters(fresh, tokens[:8], STAGE, progress=False)
    assert same_bytes(leaves(resumed.decoder), leaves(whole.decoder))
    with refused("another training", "model"):
        train_adapters(add_adapters(base, DROPPED, seed=1), tokens[:8], STAGE, journal=journal, progress=False)


def test_a_mesh_learns_the_same_adapters(base, tokens):
    fresh, stage = add_adapters(base, DROPPED), replace(STAGE, windows=4, compute="float32", steps=4)
    losses: dict[Any, list[float]] = {None: [], Devices(4, 2): []}
    for devices, seen in losses.items():
        told = lambda *_, loss, **__: seen.append(loss)  # noqa: B023, E731
        train_adapters(fresh, tokens[:8], stage, devices=devices, progress=told)
    one, eight = losses.values()
    np.testing.assert_allclose(eight, one, rtol=1e-5)


def test_a_teacher_brings_the_model_closer_to_it(model, base, tokens):
    fresh = add_adapters(base, PLAIN)
    student = train_adapters(fresh, tokens[:16], replace(STAGE, text=0.0, rate=3e-3), model, progress=False)
    reference = Reference(model.decoder, score(model.decoder, tokens[16:]).hidden)
    before, after = (score(of.decoder, tokens[16:], reference=reference).kl.mean() for of in (base, student))
    assert after < 0.9 * before


def test_what_was_trained_on_is_not_judged_on(trained, base):
    assert base.calibrated_on is None
    text = checkpoints.random_text(700, seed=3)
    with refused("occurs in the calibration text"):
        jquant.perplexity(trained, text, context=32, windows=4, progress=False)
    assert jquant.perplexity(trained, checkpoints.random_text(200, seed=8), context=32, windows=2, progress=False) > 1


# ---- PEFT ------------------------------------------------------------------------------------------------------------


def with_values(torch_model, model: LanguageModel):
    """A copy of the transformers model that holds a model's dequantized base."""
    copy = type(torch_model)(torch_model.config).eval()
    copy.load_state_dict(torch_model.state_dict())
    state = copy.state_dict()
    for layer, block in enumerate(blocks(model.decoder)):
        for path in LLAMA.weights:
            kernel = flat_params(block)[path]
            values = values_of(kernel.base if isinstance(kernel, Adapted) else kernel)
            state[LLAMA.hf[f"layers.{path}"].format(layer)].copy_(torch.from_numpy(np.array(values.T)))
    return copy


def test_peft_reads_a_saved_adapter_and_gives_the_same_logits_and_gradients(
    peft, torch_model, trained, tokens, tmp_path
):
    save_adapters(tmp_path / "adapter", trained)
    theirs = peft.PeftModel.from_pretrained(with_values(torch_model, trained), tmp_path / "adapter", is_trainable=True)
    for name, parameter in theirs.named_parameters():
        assert ("lora_" in name) == parameter.requires_grad
    ours = logits_of(trained, tokens[:4])
    assert np.abs(ours - checkpoints.logits(theirs, tokens[:4])).max() < 1e-4
    # Without adapters the model is another.
    assert np.abs(ours - checkpoints.logits(with_values(torch_model, trained), tokens[:4])).max() > 0.1

    batch = torch.as_tensor(np.asarray(tokens[:4], np.int64))
    theirs.double()(batch, labels=batch).loss.backward()
    slopes = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters() if "lora_" in name}
    kernels = adapters(trained)

    def exact(pairs):
        params = {name: replace(kernels[name], **pair) for name, pair in pairs.items()}
        return next_token_loss(with_params(trained.decoder, params)(jnp.asarray(tokens[:4])), jnp.asarray(tokens[:4]))

    student, learned = lora.split(trained.decoder)
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 4))
    batch, outside = (jnp.asarray(tokens[:4]), keys), lora.outside_of(trained.decoder)
    short = jax.jit(jax.grad(lora.adapter_loss), static_argnums=3)(learned, (student, outside), batch, STAGE)
    full = jax.jit(jax.grad(exact))({name: {"a": kernel.a, "b": kernel.b} for name, kernel in kernels.items()})
    compared = 0
    for path, name in ((path, ".".join(map(str, path))) for path in learned):
        _, segment, part, projection, _ = name.split(".")
        hf = LLAMA.hf[f"layers.{part}.{projection}.kernel"].format(segment).removesuffix(".weight")
        for key, of in (("a", "lora_A"), ("b", "lora_B")):
            wanted = slopes[f"base_model.model.{hf}.{of}.default.weight"].T
            size = np.abs(wanted).max()
            assert np.abs(np.asarray(full[name][key][0]) - wanted).max() < 1e-4 * size, name
            assert np.abs(np.asarray(short[path][key][0]) - wanted).max() < 0.05 * size, name  # products in bfloat16
            compared += 1
    assert compared == len(slopes) == 2 * (6 + 5)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 8,
         "rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
        {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8,
         "rank_pattern": {r".*\.0\..*|x": 2, "q_proj": 3}, "alpha_pattern": {r"layers\.[1-9]+\..*(k|v)_proj": 3}},
        {"target_modules": "all-linear", "r": 3, "lora_alpha": 6, "exclude_modules": ["k_proj"]},
        {"target_modules": r".*layers\.0\..*(gate|up)_proj", "r": 2, "lora_alpha": 5, "lora_dropout": 0.1},
        {"target_modules": ["v_proj", "o_proj"], "r": 2, "lora_alpha": 2, "layers_to_transform": [1]},
    ],
    ids=["patterns", "regexes", "all-linear", "regex", "one layer"],
)  # fmt: skip
def test_an_adapter_that_peft_wrote_gives_the_same_logits_here(peft, settings, torch_model, base, tokens, tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(**settings, init_lora_weights=False, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(with_values(torch_model, base), config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers deprecates what PEFT calls
        theirs.save_pretrained(tmp_path)
    ours = load_adapters(base, tmp_path)
    assert np.abs(logits_of(ours, tokens[:4]) - checkpoints.logits(theirs, tokens[:4])).max() < 1e-4
    assert np.abs(logits_of(ours, tokens[:4]) - logits_of(base, tokens[:4])).max() > 0.1


def test_an_adapter_is_read_as_it_was_written(trained, base, tmp_path):
    save_adapters(tmp_path / "adapter", trained)
    read = load_adapters(base, tmp_path / "adapter")
    assert same_bytes(leaves(read.decoder), leaves(trained.decoder))
    assert jax.tree.structure(adapters(read)) == jax.tree.structure(adapters(trained))
    assert np.array_equal(read.calibrated_on, trained.calibrated_on)
    with refused("adapter", "not an empty folder"):
        save_adapters(tmp_path / "adapter", trained)
    assert not [path for path in tmp_path.iterdir() if path.name != "adapter"]


def test_a_save_that_fails_leaves_no_folder(trained, tmp_path, monkeypatch):
    def full(path, data):
        if path.name == "adapter_model.safetensors":
            raise jquant.InputError(f"{path} can't be written (No space left on device).")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)

    monkeypatch.setattr("jquant.io.files.write_bytes", full)
    with refused("No space left"):
        save_adapters(tmp_path / "adapter", trained)
    assert not list(tmp_path.iterdir())


A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"


def without(name):
    return lambda f: f.tensors.pop(name)


def changed(name, function):
    return lambda f: f.tensors.update({name: function(f.tensors[name])})


def configured(**values):
    return lambda f: f.config.update(values)


WRONG = {
    "a renamed tensor": (lambda f: f.tensors.update({A + "x": f.tensors.pop(A)}), A + "x", "has no place"),
    "a layer that the model lacks": (
        lambda f: f.tensors.update({A.replace("layers.1", "layers.2"): f.tensors[A]}), "layers.2", "has no place"),
    "a missing half": (without(B), B, "lacks the tensor"),
    "a transposed tensor": (changed(A, lambda v: np.ascontiguousarray(v.T)), A, "[64, 3]", "[3, 64]"),
    "another rank than configured": (configured(rank_pattern={"q_proj": 5}), "q_proj.lora_A.weight", "[5, 64]"),
    "a flat tensor": (changed(B, np.ravel), B, "[128]", "[64, 2]"),
    "integers": (changed(A, lambda v: v.astype(np.int32)), A, "I32"),
    "NaN": (changed(B, lambda v: v * np.nan), B, "NaN"),
    "another kind of adapter": (configured(peft_type="IA3"), "adapter_config.json", "'IA3'"),
    "DoRA": (configured(use_dora=True), "use_dora=True"),
    "rsLoRA": (configured(use_rslora=True), "use_rslora=True"),
    "trained biases": (configured(bias="all"), "bias='all'"),
    "trained modules": (configured(modules_to_save=["lm_head"]), "modules_to_save=['lm_head']"),
    "a start that changes the base": (configured(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "a target that is no projection": (configured(target_modules=["lm_head"]), "'lm_head'", "no projection"),
    "no target": (configured(target_modules=None), "target_modules is None"),
    "a target that is no regex": (configured(target_modules="(q_proj"), "adapter_config.json", "unterminated"),
    "a rank of 0": (configured(r=0), "adapter_config.json", "rank", "0"),
    "an alpha in words": (configured(lora_alpha="much"), "adapter_config.json", "lora_alpha is 'much'"),
    "a rank in words": (configured(rank_pattern={"q_proj": "3"}), "adapter_config.json", "rank_pattern"),
    "a dropout of 1": (configured(lora_dropout=1.0), "adapter_config.json", "dropout", "1.0"),
    "no rank": (lambda f: f.config.pop("r"), "r is None"),
    "a target that takes for ever": (
        configured(target_modules="(([a-z._0-9]+)+)+!"), "adapter_config.json", "takes longer"),
    "a rank's pattern that takes for ever": (
        configured(rank_pattern={"(.|.)*(.|.)*(.|.)*(.|.)*!": 3}), "adapter_config.json", "takes longer"),
    "a pattern nested too deeply": (configured(target_modules="(" * 5000), "adapter_config.json", "no regular"),
    "a target of 5000 characters": (configured(target_modules=["x" * 5000]), "no projection"),
    "a long setting": (configured(**{"x" * 5000: "x" * 5000}), "none of the settings"),
    "an unknown setting": (configured(twist=3), "twist=3"),
    "no configuration": (lambda f: (f.folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "a truncated configuration": (
        lambda f: (f.folder / "adapter_config.json").write_text('{"r": 4'), "adapter_config.json", "not JSON"),
    "a truncated file": (
        lambda f: (f.folder / "adapter_model.safetensors").write_bytes(f.raw[:-40]), "model.safetensors", "whole"),
    "no file": (lambda f: (f.folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "a pickle file alone": (
        lambda f: (f.folder / "adapter_model.safetensors").rename(f.folder / "adapter_model.bin"), "run code"),
    "other hashes": (
        lambda f: (f.folder / "calibration.safetensors").write_bytes(safetensors.numpy.save({"x": np.zeros(3)})),
        "calibration.safetensors", "hashes"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_adapter_is_refused(case, trained, base, tmp_path):
    spoil, *parts = WRONG[case]
    folder = tmp_path / "adapter"
    save_adapters(folder, trained)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    raw = weights.read_bytes()
    files = SimpleNamespace(
        folder=folder, config=json.loads(config.read_text()), tensors=safetensors.numpy.load(raw), raw=raw
    )
    same = json.dumps(files.config), {name: value.tobytes() for name, value in files.tensors.items()}
    spoil(files)
    if json.dumps(files.config) != same[0]:
        config.write_text(json.dumps(files.config))
    if files.tensors.keys() != same[1].keys() or any(
        v.tobytes() != same[1][n] or v.ndim != 2 for n, v in files.tensors.items()
    ):
        safetensors.numpy.save_file(files.tensors, weights)
    elif case == "a transposed tensor":
        raise AssertionError("the bytes did not change")
    with refused(*parts):
        load_adapters(base, folder)


# ---- LoftQ -----------------------------------------------------------------------------------------------------------


def distance(model: LanguageModel, exact: LanguageModel, path: str) -> float:
    """Frobenius norm of a projection's error over all layers."""
    theirs = flat_params(exact.decoder)[f"segments.0.{path}"]
    return float(jnp.linalg.norm(values_of(flat_params(model.decoder)[f"segments.0.{path}"]) - theirs))


def test_loftq_is_the_truncated_svd_of_the_error_and_comes_closer(model, base):
    zero = add_adapters(base, LoRA(4, 12))
    first = add_adapters(base, LoRA(4, 12, start="loftq"), model)
    assert same_bytes(frozen(first), frozen(base))
    for path in LLAMA.weights:
        assert distance(first, model, path) < 0.97 * distance(zero, model, path)
        w, kernel = flat_params(model.decoder)[f"segments.0.{path}"], flat_params(first.decoder)[f"segments.0.{path}"]
        for layer in (0, 1):
            error = np.asarray(w[layer], np.float64) - np.asarray(values_of(kernel.base)[layer], np.float64)
            u, s, vt = np.linalg.svd(error, full_matrices=False)
            product = 3 * np.asarray(kernel.a[layer], np.float64) @ np.asarray(kernel.b[layer], np.float64)
            np.testing.assert_allclose(product, u[:, :4] * s[:4] @ vt[:4], atol=2e-5)
            norms = [np.linalg.norm(kernel.a[layer], axis=0), np.linalg.norm(kernel.b[layer], axis=1)]
            np.testing.assert_allclose(norms, [np.sqrt(s[:4] / 3)] * 2, rtol=1e-3)  # split evenly


def test_loftq_needs_the_float_weights_that_were_rounded(model, base):
    start = LoRA(4, start="loftq")
    with refused("float_model"):
        add_adapters(base, start)
    with refused("is not quantized"):
        add_adapters(model, start, model)
    with refused("The float model's layers.0.attention", "is not float"):
        add_adapters(base, start, base)
    gain = "segments.0.mlp_norm.scale"  # AWQ divides it by what it scales the weights by
    scaled = with_params(base.decoder, {gain: flat_params(base.decoder)[gain] * 2})
    with refused("layers.0", "without a transform"):
        add_adapters(replace(base, decoder=scaled), start, model)
    with refused("rotation"):
        add_adapters(base, start, replace(model, decoder=jquant.rotate(model.decoder)))


# ---- rules, merging, and the rest of the library ---------------------------------------------------------------------


def test_ranks_follow_the_rules(trained):
    ranks = {name: kernel.rank for name, kernel in adapters(trained).items()}
    assert ranks == {
        **{f"segments.{i}.mlp.{p}.kernel": r for i in (0, 1) for p, r in (("gate", 4), ("up", 4), ("down", 2))},
        **{f"segments.{i}.attention.v.kernel": 4 for i in (0, 1)},
        "segments.0.attention.q.kernel": 4, "segments.1.attention.q.kernel": 3, "segments.0.attention.o.kernel": 4,
    }  # fmt: skip
    assert {kernel.alpha for kernel in adapters(trained).values()} == {6, 8, 9}
    assert len(trained.decoder.segments) == 2  # layers that differ are not stacked


def test_merged_weights_give_the_adapted_models_logits(trained, base, tokens):
    merged = merge_adapters(trained)
    assert np.abs(logits_of(merged, tokens) - logits_of(trained, tokens)).max() < 1e-4
    assert np.abs(logits_of(base, tokens) - logits_of(trained, tokens)).max() > 0.1
    assert {str(leaf.dtype) for leaf in flat_params(merged.decoder).values()} == {"float32"}
    assert len(merged.decoder.segments) == 1
    assert "merged with adapters" in merged.stored_as
    assert np.array_equal(merged.calibrated_on, trained.calibrated_on)
    again = jquant.quantize(merged, "nf4", progress=False)
    assert loss_of(again, tokens[16:]) < loss_of(base, tokens[16:])


def test_a_float_base_takes_adapters_too(model, tokens):
    fresh = add_adapters(model, PLAIN)
    tuned = train_adapters(fresh, tokens[:16], STAGE, progress=False)
    assert same_bytes(frozen(tuned), frozen(model))
    assert loss_of(tuned, tokens[16:]) < loss_of(model, tokens[16:])
    assert np.abs(logits_of(merge_adapters(tuned), tokens) - logits_of(tuned, tokens)).max() < 1e-4


def test_quantized_inputs_stay_quantized_under_an_adapter(model, tokens):
    base = jquant.quantize(model, "w8a8", progress=False)
    tuned = train_adapters(add_adapters(base, PLAIN), tokens[:16], STAGE, progress=False)
    assert same_bytes(frozen(tuned), frozen(base))
    assert loss_of(tuned, tokens[16:]) < loss_of(base, tokens[16:])


def test_an_adapted_model_generates_prints_and_counts_its_bytes(trained, base, tmp_path):
    assert "".join(jquant.generate(trained, "abc", tokens=3))
    assert "with an adapter of rank 3" in repr(trained)
    more = sum(leaf.nbytes for kernel in adapters(trained).values() for leaf in (kernel.a, kernel.b))
    assert size_of(trained.decoder).total == size_of(base.decoder).total + more
    assert size_of(trained.decoder).weights == size_of(base.decoder).weights
    jquant.outliers(trained, checkpoints.random_text(100, seed=8), context=32, windows=1, progress=False)
    with refused("layers.0.attention.q.kernel has an adapter", "merge_adapters"):
        jquant.quantize(trained, "nf4")
    with refused("has an adapter", "save_adapters"):
        trained.save(tmp_path / "whole")
    with refused("layers.0", "adapted", "rotate the float model"):
        jquant.rotate(add_adapters(merge_adapters(trained), LoRA(2)).decoder)
    assert not list(tmp_path.iterdir())


OPTIONS = {
    "rank": [0, -1, True],
    "alpha": [0, -1.0, float("inf"), float("nan")],
    "dropout": [1.0, -0.1, float("nan"), True],
}


@pytest.mark.parametrize(
    ("option", "value"), [(option, value) for option, values in OPTIONS.items() for value in values]
)
def test_an_option_out_of_range_is_refused(option, value):
    with refused(f"{option}"):
        LoRA(**{option: value})
    assert LoRA(1, 0.5, 0.0, "loftq").rank == 1


def test_what_cannot_have_adapters_is_refused(base, trained, model):
    with refused("layers.0.attention.k.kernel is 64 × 32", "at most 32, not 33"):
        add_adapters(base, LoRA(33))
    assert adapters(add_adapters(base, [(r"attention\.k", LoRA(32))]))
    with refused("'attention.z'", "layers.0.attention.q.kernel"):
        add_adapters(base, [("attention.z", LoRA(2))])
    with refused("not a regular expression"):
        add_adapters(base, [("(", LoRA(2))])
    with refused("give no weight an adapter"):
        add_adapters(base, [("", None)])
    with refused("share a dropout"):
        add_adapters(base, [("mlp", LoRA(2, dropout=0.1)), ("", LoRA(2))])
    with refused("has an adapter already"):
        add_adapters(trained, LoRA(2))
    with refused("seed"):
        add_adapters(base, LoRA(2), seed=-1)
    for refuse in (merge_adapters, lambda plain: save_adapters("nowhere", plain)):
        with refused("has no adapter"):
            refuse(model)
    assert not Path("nowhere").exists()


def test_what_cannot_be_trained_is_refused(model, base, trained, tokens, tmp_path):
    fresh = add_adapters(base, LoRA(2))
    kernels = {name: replace(kernel, b=kernel.b * jnp.nan) for name, kernel in adapters(trained).items()}
    broken = with_params(trained.decoder, kernels)
    refusals = {
        "has no adapter": (base, tokens, STAGE),
        "ids from 0 to 319": (fresh, tokens + 320 - tokens.min(), STAGE),
        "leave no prediction": (fresh, tokens[:, :1], STAGE),
        "target is": (fresh, tokens, Tuning(target="block")),
        "weight_rate": (fresh, tokens, replace(STAGE, weight_rate=0.1)),
        "text=0.5 learns from a teacher": (fresh, tokens, replace(STAGE, text=0.5)),
        "merge_adapters(teacher)": (fresh, tokens, replace(STAGE, text=0.5), trained),
        "not finite": (replace(trained, decoder=broken), tokens, STAGE),
    }
    for part, given in refusals.items():
        with refused(part):
            train_adapters(*given, progress=False)
    other = jquant.load_model(checkpoints.save(tmp_path, checkpoints.llama(seed=1)), progress=False)
    with refused("The teacher's embedding differs"):
        train_adapters(fresh, tokens, replace(STAGE, text=0.5), other, progress=False)


# ---- the experiment --------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path, torch_model) -> dict:
    """The experiment's settings, for the small model and a text of its own."""
    folder = checkpoints.save(tmp_path / "model", torch_model)
    (tmp_path / "text").write_text(checkpoints.random_text(700, seed=3))
    given = ["model=local", f"model.path={folder}", f"results={tmp_path / 'results'}", f"output={tmp_path / 'adapter'}",
             f"training.data={tmp_path / 'text'}", "training.context=32", "training.steps=3", "training.rate=0.01",
             "training.warmup=1", "lora.rank=4", "evaluation.windows=2"]  # fmt: skip
    with initialize_config_dir(str(qlora.CONFIGS), version_base=None):
        return OmegaConf.to_container(compose("qlora", given), resolve=True)  # pyright: ignore[reportReturnType]


def test_the_experiment_trains_saves_and_keeps_its_row(settings, base, tmp_path, capsys, monkeypatch):
    row = qlora.qlora(settings)
    printed = capsys.readouterr().out
    assert row["loss_after"] < row["loss_before"]
    assert f"held-out loss {row['loss_before']:.4f} → {row['loss_after']:.4f}" in printed
    assert row["base_sha256_before"] == row["base_sha256_after"]
    assert f"base {row['base_sha256_before']} → {row['base_sha256_after']}" in printed
    assert 8 * row["adapter_bytes"] // 4 <= row["optimizer_bytes"] < 8 * row["adapter_bytes"] // 4 + 16
    adapted = load_adapters(base, tmp_path / "adapter")
    ids = base.tokenizer.encode((tmp_path / "text").read_text())
    _, held_out = qlora.split_text(base.tokenizer, settings["training"], 2)
    assert abs(loss_of(adapted, held_out) - row["loss_after"]) < 1e-5
    assert np.array_equal(held_out.ravel(), ids[round(0.9 * len(ids)) :][: held_out.size])
    monkeypatch.setattr(qlora, "train_adapters", None)  # the row is kept
    assert qlora.qlora(settings) == json.loads(json.dumps(row))
    with refused("adapter", "not an empty folder"):
        qlora.qlora(settings | {"seed": 1})


def test_the_experiment_refuses_a_text_whose_end_is_in_the_rest(settings, tmp_path):
    text = checkpoints.random_text(300, seed=3)
    (tmp_path / "text").write_text(text + text)
    with refused("The held-out part of training.data", "occurs"):
        qlora.qlora(settings)
    with refused("method=gptq", "calibration text"):
        qlora.qlora(settings | {"method": "gptq"})
    with refused("training.held_out"):
        qlora.qlora(settings | {"training": settings["training"] | {"held_out": 1.0}})
