"""The C++ products with packed weights: against float64, under sanitizers, and what happens where they can't be had."""

import logging
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import problem

from jquant.activations import Activation, quantize_inputs
from jquant.errors import InputError
from jquant.formats import GGUF, MXFP8_E4M3, NF4, SEQ, Codebook, Float, Int, double_quantized, tile_of
from jquant.kernels import choose
from jquant.kernels.choose import products
from jquant.kernels.cpu import build, tiled
from jquant.kernels.cpu.attention import attend
from jquant.kernels.cpu.tiled import Tiled
from jquant.methods import METHODS
from jquant.qtensor import QTensor, dequantize, prepared, quantize
from jquant.ranges import MinMax

HERE = Path(__file__).parent
KERNELS = Path(build.__file__).parent
FORMATS = sorted(
    {
        row(bits, 64, symmetric).format
        for row in METHODS.values()
        # Others have no kernel.
        if tile_of(format := row(4, 64, False).format) == (1, 1) and not hasattr(format, "own_levels")
        for bits in (2, 3, 4, 8)
        for symmetric in (False, True)
    }
    | {Int(3, 16), Int(3, 24, True), Int(2, "tensor"), Int(5, 20, True), Int(4, (24, 5)), Int(6, 16, zero="float")}
    | {
        SEQ(2),
        SEQ(3),
        Codebook(tuple(map(float, range(11))), 16),
        Codebook((-1.0, -0.3, 0.4, 0.9), 16),
        NF4(64, double_quantized()),
    }
    | {Int(4, "channel"), Float(2, 1, (16, 6), "float8_e8m0fnu")},
    key=repr,
)
TAKEN = [format for format in FORMATS if isinstance(format, Int) or format.bits <= 4]
SHAPES = [(576, 192), (577, 65), (300, 1)]
INPUTS = {group: Activation(Int(8, group, True, "float32", full_range=False)) for group in (32, 64, "channel")}

needs_compiler = pytest.mark.skipif(build.target() is None, reason="there is no C++ compiler")


@cache
def weight(format, shape) -> QTensor:
    w = problem(shape, 5)[0]
    return jax.jit(lambda w: quantize(w, *MinMax()(w, format), format))(w)


def fits(format, shape) -> bool:
    group = format.group
    return not isinstance(group, tuple) or (group[0] <= shape[0] and group[1] <= shape[1])


def rows_of(count: int, features: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(count).standard_normal((count, features)), jnp.float32)


def assert_product(got, x, values) -> None:
    """x @ values in float64, up to 2e-6 of the sum of the terms' magnitudes."""
    x, values = np.asarray(x, np.float64), np.asarray(values, np.float64)
    beyond = np.abs(np.asarray(got, np.float64) - x @ values) - 2e-6 * (np.abs(x) @ np.abs(values))
    assert beyond.max() <= 0


@needs_compiler
@pytest.mark.parametrize("format", TAKEN, ids=str)
def test_products_are_those_of_the_dequantized_matrix(format):
    for shape in SHAPES:
        if fits(format, shape):
            q = weight(format, shape)
            ready = prepared(q)
            assert isinstance(ready, Tiled)
            assert ready.shape == shape
            for count in (1, 2, 4, 7, 16):
                x = rows_of(count, shape[0])
                assert_product(x @ ready, x, dequantize(q))


@needs_compiler
@pytest.mark.parametrize("group", INPUTS)
@pytest.mark.parametrize("format", [Int(bits, 64, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)])
def test_inputs_are_rounded_as_the_activation_says(format, group):
    for shape in SHAPES[:2]:
        q = replace(weight(format, shape), activation=INPUTS[group])
        ready = prepared(q)
        assert ready.layout.block > 0  # in integers
        for count in (1, 3, 4, 9):
            x = rows_of(count, shape[0])
            assert_product(x @ ready, quantize_inputs(x, INPUTS[group]), dequantize(q))


@needs_compiler
@pytest.mark.parametrize(
    "activation",
    [
        Activation(outliers=2.5),
        Activation(Int(4, 32, True)),
        Activation(Int(8, "tensor", True, "float32"), static=True),
    ],
    ids=str,
)
def test_other_activations_are_rounded_before_the_product(activation):
    scale = jnp.full((1, 1), 0.05) if activation.static else None
    q = replace(weight(Int(4, 64), (576, 192)), activation=activation, input_scale=scale)
    for count in (1, 5):
        x = rows_of(count, 576)
        np.testing.assert_allclose(x @ prepared(q), x @ q, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("name", build.INSTRUCTIONS)
def test_every_set_of_instructions_gives_the_same_products(name, monkeypatch, tmp_path):
    if not build._cpu_flags().issuperset(build.INSTRUCTIONS[name][0]):
        pytest.skip(f"this CPU has no {name}")
    monkeypatch.setattr(build, "instructions", lambda: name)
    library = build.target.__wrapped__()
    assert name in library
    monkeypatch.setattr(tiled, "target", lambda: library)
    for format in (Int(2, 64), Int(3, 64), Int(4, 64, True), Int(8, 64), NF4()):
        q = weight(format, (577, 65))
        for count in (1, 4, 9):
            x = rows_of(count, 577)
            assert_product(x @ prepared(q), x, dequantize(q))
            if isinstance(format, Int):
                ready = prepared(replace(q, activation=INPUTS[64]))
                assert_product(x @ ready, quantize_inputs(x, INPUTS[64]), dequantize(q))


@needs_compiler
@pytest.mark.parametrize("name", build.INSTRUCTIONS)
def test_sanitizers_find_nothing(name, tmp_path):
    """Odd shapes, on arrays without spare room, under the address and undefined-behaviour sanitizers."""
    needs, options = build.INSTRUCTIONS[name]
    if not build._cpu_flags().issuperset(needs):
        pytest.skip(f"this CPU has no {name}")
    program = tmp_path / "product"
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = [*build._compiler(), "-std=c++17", "-O1", "-w", *options.split(), *checks, f"-I{KERNELS}"]
    made = subprocess.run([*command, HERE / "cpu_product.cc", "-o", program], capture_output=True, text=True)
    if made.returncode and "cannot find" in made.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert made.returncode == 0, made.stderr
    ran = subprocess.run([program], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "288 products\n"), ran.stdout + ran.stderr


@needs_compiler
def test_stacked_layers_are_sliced_by_a_scan():
    q = jax.tree.map(lambda a: jnp.stack([a, a[::-1], 2 * a]), weight(Int(4, 32), (64, 70)))
    x = rows_of(5, 64)
    step = lambda x, q: (x, x @ q)  # noqa: E731
    got = jax.lax.scan(step, x, prepared(q))[1]
    np.testing.assert_allclose(got, jax.lax.scan(step, x, q)[1], rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_inputs_of_16_bits_give_outputs_of_their_dtype(dtype):
    q = weight(Int(4, 64), (576, 192))
    x = rows_of(3, 576).astype(dtype)
    got = x[None] @ prepared(q)
    assert (got.shape, got.dtype) == ((1, 3, 192), x.dtype)
    wanted = np.asarray(x, np.float64) @ np.asarray(dequantize(q), np.float64)
    np.testing.assert_allclose(np.asarray(got[0], np.float64), wanted, rtol=1e-2, atol=1e-2)


@needs_compiler
def test_nan_and_infinite_inputs_spoil_their_own_row_alone():
    q = weight(Int(4, 64), (576, 192))
    for ready in (prepared(q), prepared(replace(q, activation=INPUTS[64]))):
        for bad in (np.nan, np.inf):
            x = rows_of(5, 576)
            y = np.asarray(x.at[2, 100].set(bad) @ ready)
            assert not np.isfinite(y[2]).any()
            np.testing.assert_array_equal(np.delete(y, 2, 0), np.delete(np.asarray(x @ ready), 2, 0))


@needs_compiler
@pytest.mark.parametrize(("heads", "shared", "d"), [(9, 3, 64), (4, 4, 16), (8, 1, 80)])
def test_attention_of_one_query_is_that_of_float64(heads, shared, d):
    rng = np.random.default_rng(d)
    q, k, v = (rng.standard_normal((2, h, t, d)).astype("float32") for h, t in ((heads, 1), (shared, 70), (shared, 70)))
    k[:, :, 50:], v[:, :, 50:] = np.nan, np.nan  # slots that are not filled are not read
    for length in (1, 16, 33, 50):
        got = jax.jit(attend)(q, k, v, jnp.int32(length))
        keys, values = (np.repeat(x[:, :, :length].astype(np.float64), heads // shared, 1) for x in (k, v))
        scores = (q.astype(np.float64) * keys).sum(-1) / d**0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        wanted = (weights[..., None] * values).sum(-2) / weights.sum(-1)[..., None]
        np.testing.assert_allclose(got[:, :, 0], wanted, rtol=1e-5, atol=2e-6)
    bad = q.copy()
    bad[1, 0, 0, 3] = np.nan
    got = np.asarray(attend(jnp.asarray(bad), jnp.asarray(k), jnp.asarray(v), jnp.int32(9)))
    assert np.isnan(got[1, 0]).all()
    assert np.isfinite(got[0]).all()


@needs_compiler
def test_attention_is_chosen_for_heads_of_whole_vectors_in_float32():
    like = jnp.ones(4)
    assert choose.attention(like, 64) is attend
    assert choose.attention(like, 24) is None
    assert choose.attention(like.astype("bfloat16"), 64) is None
    with products("plain"):
        assert choose.attention(like, 64) is None


@pytest.mark.parametrize("format", [MXFP8_E4M3, GGUF["Q4_K"].scale.__class__(8, 16)], ids=str)
def test_formats_without_a_kernel_stay_as_they_are(format):
    q = weight(format, (96, 64))
    assert prepared(q) is q


def test_the_plain_path_can_be_forced():
    q = weight(Int(4, 64), (576, 192))
    with products("plain"):
        assert prepared(q) is q
    with pytest.raises(InputError, match='Products are "fast" or "plain"'), products("quick"):
        pass


def test_weights_on_several_devices_stay_as_they_are():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    q = jax.device_put(weight(Int(4, 64, True), (576, 192)), split)
    assert prepared(q) is q


@pytest.fixture
def forgotten():
    """`target` looks again, now and after the test."""
    build.target.cache_clear()
    build._version.cache_clear()
    yield
    build.target.cache_clear()
    build._version.cache_clear()


@pytest.fixture
def in_cache(monkeypatch, tmp_path) -> Path:
    """An empty cache."""
    monkeypatch.setenv("JQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def assert_plain(caplog, why: str) -> None:
    """The plain path, the same product, and one line that says why."""
    q = weight(Int(4, 64), (576, 192))
    with caplog.at_level(logging.WARNING):
        assert prepared(q) is q
        assert prepared(q) is q
    assert [why in record.message for record in caplog.records] == [True], caplog.text
    assert "without C++ code" in caplog.text


@pytest.mark.usefixtures("forgotten", "in_cache")
def test_without_a_compiler_one_line_says_so(monkeypatch, caplog):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert_plain(caplog, "there is no C++ compiler")


@pytest.mark.usefixtures("forgotten", "in_cache")
@pytest.mark.parametrize(
    ("compiler", "why"),
    [("/no/such/c++", "CXX names '/no/such/c++'"), ("false", "false failed with 1"), ("true", "can't be written")],
)
def test_a_compiler_that_fails_leaves_nothing_and_is_named(monkeypatch, caplog, in_cache, compiler, why):
    monkeypatch.setenv("CXX", compiler)
    assert_plain(caplog, why)
    assert not in_cache.exists() or list(in_cache.iterdir()) == []


@pytest.mark.usefixtures("forgotten")
def test_a_cache_that_cannot_be_written_is_named(monkeypatch, caplog, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JQUANT_CACHE", str(tmp_path / "file"))
    assert_plain(caplog, f"{tmp_path}/file/kernels can't be written")


@needs_compiler
def test_a_damaged_library_is_compiled_again_and_never_loaded(in_cache, caplog, monkeypatch):
    monkeypatch.setattr(build, "OPTIONS", build.OPTIONS.replace("-O3", "-O0"))
    library = build.build("plain", in_cache)
    whole = library.read_bytes()
    assert build.build("plain", in_cache).stat().st_mtime_ns == library.stat().st_mtime_ns  # kept
    for damage in (whole[:1000], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        library.write_bytes(damage)
        with caplog.at_level(logging.WARNING):
            assert build.build("plain", in_cache) == library
        assert library.read_bytes() == whole
    assert "is damaged" in caplog.text
    assert {path.suffix for path in in_cache.iterdir()} == {".so", ".sha256"}


@needs_compiler
def test_a_library_is_compiled_anew_for_other_options(in_cache, monkeypatch):
    libraries = set()
    for options in ("-O0", "-O0 -DOTHER"):
        monkeypatch.setattr(build, "OPTIONS", build.OPTIONS.replace("-O3", options))
        libraries.add(build.build("plain", in_cache))
        monkeypatch.undo()
    assert len(libraries) == 2


def test_a_cpu_without_vector_instructions_gets_plain_code(monkeypatch):
    monkeypatch.setattr(build, "_cpu_flags", lambda: frozenset({"sse2"}))
    assert build.instructions() == "plain"
    monkeypatch.setattr(build, "_cpu_flags", lambda: frozenset({"avx2", "fma", "f16c", "avx512f"}))
    assert build.instructions() == "avx2"
