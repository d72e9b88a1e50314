"""A table of levels of a weight's own: wherever a QTensor goes, its levels go along."""

from dataclasses import dataclass, replace

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import refused
from problems import problem

from jquant import AQLM, LNQ, RMS, Method, Rounded, Tuning
from jquant.calibration.options import Options
from jquant.evaluation.perplexity import score
from jquant.formats import NF3, Additive, Codebook, ColumnCodebook, Format, VectorCodebook, block_shape, expand, unpack
from jquant.formats.base import own_levels
from jquant.io.checkpoint import check_storable, read_item, write_item
from jquant.io.export import FORMATS as FOLDERS
from jquant.io.export.folder import _problem
from jquant.io.export.gguf import as_kind
from jquant.io.load import load_model
from jquant.kernels import matmul
from jquant.learning.fake_quant import FakeQuantized, fake_quant, fixed_codes
from jquant.models.cache import Stored
from jquant.models.decoder import Decoder
from jquant.models.params import flat_params
from jquant.parallel.mesh import Devices
from jquant.pipeline.in_memory import quantize_decoder
from jquant.qtensor import (
    Grid,
    QTensor,
    Transposed,
    bits_per_weight,
    columns_of,
    dequantize,
    joined_columns,
    packed_matrix,
    prepared,
    side_by_side,
)
from jquant.rounding import Refit, round_to_grid
from jquant.transforms import Incoherence

VECTORS = VectorCodebook(tuple(map(tuple, np.random.default_rng(0).standard_normal((64, 3)).tolist())), scale="float32")
FORMATS = [
    NF3(16),
    Codebook(tuple(map(float, range(-20, 20))), "channel"),
    VECTORS,
    Additive(2, 4, 4, group=16),
    ColumnCodebook(3),
]
every_format = pytest.mark.parametrize("format", FORMATS, ids=lambda format: type(format).__name__ + str(format.bits))
SHAPE = (48, 24)


def levels_for(format: Format, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> jax.Array:
    """A table other than that of the format, of its shape and dtype."""
    own = own_levels(format, shape)
    first = jnp.broadcast_to(jnp.asarray(format.levels, jnp.float32), (*shape[:-2], *np.shape(format.levels))) \
        if own is None else own  # fmt: skip
    noise = jax.random.normal(jax.random.key(seed), first.shape) * jnp.std(first.astype(jnp.float32)) / 4
    axis = -2 if isinstance(format, ColumnCodebook) else -1
    moved = first + noise
    return (jnp.sort(moved, axis) if isinstance(format, Codebook | ColumnCodebook) else moved).astype(first.dtype)


def weight(format: Format, seed: int = 0) -> QTensor:
    w = problem(SHAPE, seed)[0]
    grid = Grid.of(*RMS(2.5)(w, format), format, SHAPE, levels_for(format, seed=seed))
    return grid.pack(grid.encode(w))


def values(q: QTensor) -> np.ndarray:
    """What the codes stand for, looked up one by one in float64."""
    format, codes, table = q.format, np.asarray(unpack(q.codes, q.format.bits, SHAPE[0])), np.asarray(q.levels, float)
    found = np.zeros(SHAPE)
    if isinstance(format, Codebook):
        found = table[codes]
    elif isinstance(format, ColumnCodebook):
        found = np.take_along_axis(table, codes.astype(int), 0)
    else:
        tables = table if isinstance(format, Additive) else table[None]
        width, dim = (len(tables[0]) - 1).bit_length(), tables.shape[-1]
        for first, column in np.ndindex(SHAPE[0] // dim, SHAPE[1]):
            word = sum(int(codes[first * dim + i, column]) << (format.bits * i) for i in range(dim))
            for m, each in enumerate(tables):
                found[first * dim : first * dim + dim, column] += each[(word >> (width * m)) & (2**width - 1)]
    scale = expand(q.scale, block_shape(format, SHAPE), SHAPE)
    return found * np.asarray(scale, np.float64)


@every_format
def test_codes_stand_for_the_weights_own_levels_and_multiply_so(format):
    q = weight(format)
    np.testing.assert_allclose(dequantize(q), values(q), rtol=1e-5, atol=1e-7)
    plain = replace(q, levels=None)
    assert np.abs(np.asarray(dequantize(q) - dequantize(plain))).max() > 1e-3
    assert q.nbytes == plain.nbytes + q.levels.nbytes
    assert bits_per_weight(q) == pytest.approx(bits_per_weight(plain) + 8 * q.levels.nbytes / (48 * 24))
    for x in (jax.random.normal(jax.random.key(1), (3, 48)), jnp.ones((1, 48))):
        np.testing.assert_allclose(x @ q, x @ values(q), rtol=1e-4, atol=1e-5)
        turns = Incoherence().rotations(SHAPE)
        turned = replace(q, rotations=turns)
        np.testing.assert_allclose(x @ turned, x @ dequantize(turned), rtol=1e-4, atol=1e-5)
    assert prepared(q) is q  # kernels hold the format's table
    assert side_by_side([q, q]) is None


@every_format
def test_stacked_weights_have_a_table_each(format):
    layers = [weight(format, seed) for seed in (0, 1)]
    q = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    assert q.shape == (2, *SHAPE)
    np.testing.assert_array_equal(dequantize(q), jnp.stack(list(map(dequantize, layers))))
    grid = Grid.of(q.scale, None, format, q.shape, q.levels)
    w = jnp.stack([problem(SHAPE, seed)[0] for seed in (0, 1)])
    np.testing.assert_array_equal(grid.pack(grid.encode(w)).codes, q.codes)
    x = jax.random.normal(jax.random.key(1), (3, 48))
    scanned = jax.lax.scan(lambda carry, layer: (carry, x @ layer), 0, q)[1]
    np.testing.assert_allclose(scanned, x @ dequantize(q), rtol=1e-4, atol=1e-5)


@every_format
def test_large_matrices_multiply_panel_by_panel(monkeypatch, format):
    monkeypatch.setattr(matmul, "PANEL", 24 * 17)  # not whole tiles
    q, x = weight(format), jax.random.normal(jax.random.key(1), (3, 48))
    np.testing.assert_allclose(matmul.matmul(x, packed_matrix(q)), x @ values(q), rtol=1e-4, atol=1e-5)


@every_format
def test_columns_keep_their_levels_and_are_joined_if_each_has_its_own(format):
    q = weight(format)
    if block_shape(format, SHAPE)[1] == 1 and not hasattr(format, "tile"):
        some = np.array([5, 2, 2])
        np.testing.assert_array_equal(dequantize(columns_of(q, some)), dequantize(q)[:, some])
    rows = Transposed(q)[jnp.array([[1, 3]])]
    np.testing.assert_allclose(rows, dequantize(q).T[jnp.array([[1, 3]])], rtol=1e-6)
    if isinstance(format, ColumnCodebook):
        np.testing.assert_array_equal(dequantize(joined_columns([q, q])), jnp.tile(dequantize(q), (1, 2)))
    else:
        with refused("levels of their own can't be one"):
            joined_columns([q, q])


@every_format
def test_a_checkpoint_has_them(format, tmp_path):
    params = {"mlp.up.kernel": weight(format), "mlp.down.kernel": replace(weight(format, 1), levels=None)}
    check_storable(params)
    write_item(tmp_path / "item", params, {"rotation": None, "report": {}})
    read = read_item(tmp_path / "item", {name: leaf.shape for name, leaf in params.items()})
    for name, leaf in params.items():
        assert jax.tree.structure(read[name]) == jax.tree.structure(leaf)
        jax.tree.map(np.testing.assert_array_equal, read[name], leaf)


@every_format
def test_files_of_other_tools_refuse_them_but_plain_ones(format):
    q = weight(format)
    for name, folder in FOLDERS.items():
        problem = _problem(name, folder, q)
        assert problem is None if name == "plain" else problem == f"its levels are its own, which {name} can't say"
    with refused("w has levels of its own, which GGUF can't say"):
        as_kind("w", q)


@every_format
def test_learning_starts_at_them(format):
    q = weight(format)
    kernel = FakeQuantized.of(q)
    np.testing.assert_array_equal(kernel.value(), dequantize(q))
    jax.tree.map(np.testing.assert_array_equal, kernel.pack(), q)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), q)
    jax.tree.map(np.testing.assert_array_equal, FakeQuantized.of(stacked).pack(), stacked)
    still = replace(kernel, learned={"level": jnp.zeros(q.levels.shape)})
    np.testing.assert_allclose(still.value(), dequantize(q), rtol=1e-6)
    step = 0.01 * jax.random.normal(jax.random.key(0), q.levels.shape)
    moved = replace(kernel, learned={"level": step}).settled()
    assert moved.table.dtype == q.levels.dtype
    np.testing.assert_array_equal(dequantize(moved.pack()), moved.value())
    assert np.abs(np.asarray(moved.value() - kernel.value())).max() > 0


@every_format
def test_a_levels_gradient_is_that_of_the_values(format):
    q = weight(format)
    codes, scale, levels = unpack(q.codes, format.bits, 48), q.scale.astype(jnp.float32), q.levels.astype(jnp.float32)
    slope = jax.random.normal(jax.random.key(1), SHAPE)
    loss = lambda levels: jnp.sum(slope * fixed_codes(codes, scale, None, format, levels))  # noqa: E731
    exact = lambda levels: jnp.sum(slope * Grid.of(q.scale, None, format, SHAPE, levels).decode(codes))  # noqa: E731
    np.testing.assert_allclose(jax.grad(loss)(levels), jax.grad(exact)(levels), rtol=1e-4, atol=1e-4)
    w = problem(SHAPE)[0]
    np.testing.assert_array_equal(fake_quant(w, scale, None, format, levels), dequantize(q))


@dataclass(frozen=True)
class Shifted:
    """A rounding that learns a codebook: all levels a little higher."""

    needs = frozenset()

    def __call__(self, w, grid):
        grid = replace(grid, levels=jnp.asarray(grid.format.levels, jnp.float32) + 0.1)
        return Rounded(grid.encode(w), grid)


def test_a_rounding_may_learn_a_codebook_and_scales_are_refitted_to_it():
    w, gram, _ = problem(SHAPE)
    grid = Grid.of(*RMS(2.5)(w, NF3(16)), NF3(16), SHAPE)
    q, info, fits = round_to_grid(w, grid, Shifted(), {"gram": gram})
    assert bool(fits)
    table = np.asarray(NF3().levels) + 0.1
    steps = np.asarray(expand(q.scale, (16, 1), SHAPE), np.float64)
    wanted = table[np.argmin(np.abs(np.asarray(w)[..., None] - table * steps[..., None]), -1)] * steps
    np.testing.assert_allclose(dequantize(q), wanted, rtol=1e-5, atol=1e-7)
    refitted, better, _ = round_to_grid(w, grid, Refit(Shifted()), {"gram": gram})
    np.testing.assert_array_equal(refitted.levels, q.levels)
    assert float(better.error) < float(info.error)


def test_a_cache_refuses_formats_whose_tables_are_learned():
    with refused("A cache takes formats with one table for all"):
        Stored(ColumnCodebook(4))


# ------------------------------------------------------------------------------------------------ models and meshes

TOKENS = np.random.default_rng(0).integers(0, checkpoints.VOCAB, (8, 24), np.int32)
METHODS = {
    "aqlm": Method(Additive(2, 4, 4), RMS(), AQLM(turns=1, beam=2, steps=4, clusterings=3)),
    "lnq": Method(ColumnCodebook(2), RMS(), LNQ(turns=1, sweeps=1, clusterings=5)),
}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Decoder:
    model = checkpoints.llama(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_key_value_heads=4, initializer_range=0.1
    )
    return load_model(checkpoints.save(tmp_path_factory.mktemp("float"), model)).decoder


@pytest.mark.parametrize("name", ["lnq", pytest.param("aqlm", marks=pytest.mark.slow)])
def test_a_mesh_of_two_by_two_gives_what_one_device_gives(decoder, name):
    one, report = quantize_decoder(decoder, METHODS[name], TOKENS, Options(batch=2))
    devices = Devices(2, 2)
    four, its_report = quantize_decoder(decoder, METHODS[name], TOKENS, Options(batch=2, devices=devices))
    for path, info in report.items():
        np.testing.assert_allclose(its_report[path].error, info.error, rtol=0.02)
    perplexity = score(one, TOKENS).perplexity
    assert score(four, TOKENS).perplexity == pytest.approx(perplexity, rel=0.01)
    spread = devices.spread(one)
    kernels = [leaf for leaf in flat_params(spread).values() if isinstance(leaf, QTensor)]
    assert kernels
    assert all(kernel.levels.sharding.is_fully_replicated == (name == "aqlm") for kernel in kernels)
    assert score(spread, TOKENS).perplexity == pytest.approx(perplexity, rel=1e-4)


def test_levels_of_stacked_layers_are_tuned(decoder):
    for method in METHODS.values():
        stage = Tuning(2, 2, rate=1e-4, level_rate=1e-3)
        tuned, _ = quantize_decoder(decoder, replace(method, tuning=(stage,)), TOKENS, Options(batch=2))
        plain, _ = quantize_decoder(decoder, method, TOKENS, Options(batch=2))
        for path, leaf in flat_params(plain).items():
            if isinstance(leaf, QTensor):
                its = flat_params(tuned)[path]
                assert its.levels.dtype == leaf.levels.dtype
                assert np.any(np.asarray(its.levels) != np.asarray(leaf.levels))
                np.testing.assert_array_equal(its.codes, leaf.codes)
