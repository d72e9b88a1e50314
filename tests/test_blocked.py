"""The Pallas product of packed weights, step by step in JAX's interpreter; and compiled for TPUs where libtpu is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant import FP4, MXFP4, NF3, NF4, NVFP4, Activation, Int, QTensor, double_quantized
from jquant.formats import Format
from jquant.kernels.blocked import Blocked, blocked, by_columns
from jquant.parallel.mesh import Devices
from jquant.qtensor import dequantize, packed_matrix, quantize

FORMATS: dict[str, Format] = {
    "4 bits, zeros": Int(4, 64),
    "4 bits, float zeros": Int(4, 32, zero="float"),
    "4 bits": Int(4, 128, symmetric=True),
    "3 bits": Int(3, 64),
    "2 bits": Int(2, 64, symmetric=True),
    "8 bits, zeros": Int(8, 64),
    "8 bits a column": Int(8, "channel", symmetric=True),
    "8 bits, one scale": Int(8, "tensor", symmetric=True),
    "nf4": NF4(64),
    "nf4, double": NF4(64, double_quantized()),
    "nf3": NF3(64),
    "fp4": FP4(64),
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
}
LLAMA3_8B = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]
DEFAULT = [(576, 576), (576, 192), (576, 1536), (1536, 576)]


def weight(format: Format, shape: tuple[int, int], seed: int = 0) -> QTensor:
    w = jax.random.normal(jax.random.key(seed), shape)
    low, high = (jnp.full(like, bound) for like, bound in ((_grid(format, shape), -2.5), (_grid(format, shape), 3.0)))
    return quantize(w, *format.grid(low, high), format)


def _grid(format: Format, shape: tuple[int, int]) -> tuple[int, int]:
    rows = shape[0] if format.group in ("channel", "tensor") else format.group
    return -(-shape[0] // rows), 1 if format.group == "tensor" else shape[1]


def kernel(q: QTensor, platform: str, activation=None) -> Blocked | None:
    return blocked(packed_matrix(q), activation, None, platform, interpret=True)


def agree(q: QTensor, platform: str, rows: int, dtype=jnp.bfloat16) -> None:
    x = jax.random.normal(jax.random.key(1), (rows, q.shape[0]), dtype)
    w = kernel(q, platform)
    assert w is not None
    exact = np.asarray(x, np.float64) @ np.asarray(dequantize(q), np.float64)
    ours = x @ w
    assert ours.dtype == dtype
    scale = np.linalg.norm(exact) / exact.size**0.5
    limit = 1e-5 if dtype == jnp.float32 else 2**-7
    assert np.abs(np.asarray(ours, np.float64) - exact).max() < limit * 4 * scale


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_float64(name, platform):
    """Odd shapes: a short last group, columns and rows that fill no tile."""
    q = weight(FORMATS[name], (577, 70))
    if platform == "gpu" and name == "nvfp4":  # groups of 16 are smaller than a product's depth
        assert kernel(q, platform) is None
        return
    agree(q, platform, 3)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("rows", [1, 16, 17, 300])
def test_any_number_of_rows(rows, platform):
    agree(weight(Int(4, 64), (576, 192)), platform, rows)
    agree(weight(NF4(64), (576, 192)), platform, rows, jnp.float32)


@pytest.mark.parametrize("shape", [*DEFAULT, *(pytest.param(s, marks=pytest.mark.slow) for s in LLAMA3_8B)], ids=str)
def test_the_shapes_of_models(shape):
    agree(weight(Int(4, 64), shape), "tpu", 1)


def test_stacked_layers_are_scanned():
    layers = [weight(Int(4, 64), (128, 70), seed) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    w = kernel(stack, "tpu")
    assert w.shape == (3, 128, 70)
    x = jax.random.normal(jax.random.key(1), (2, 128), jnp.bfloat16)
    _, ours = jax.lax.scan(lambda _, layer: (None, x @ layer), None, w)
    for product, q in zip(ours, layers, strict=True):
        np.testing.assert_array_equal(product, x @ kernel(q, "tpu"))


def test_the_weight_takes_its_bits():
    """4 bits, and a float32 scale and offset for 64 weights."""
    w = kernel(weight(Int(4, 64), (4096, 1024)), "tpu")
    assert 8 * w.nbytes / (4096 * 1024) == 4 + 2 * 32 / 64
    assert 8 * kernel(weight(Int(4, 64, symmetric=True), (4096, 1024)), "tpu").nbytes / (4096 * 1024) == 4.5


def test_inputs_are_rounded_as_the_activation_says():
    q, eight = weight(Int(4, 64), (128, 70)), Activation(Int(8, "channel", symmetric=True))
    x = jax.random.normal(jax.random.key(1), (3, 128))
    rounded = x @ kernel(q, "tpu", eight)
    expected = x @ QTensor(q.codes, q.scale, q.zero, q.format, q.in_features, eight)
    np.testing.assert_allclose(rounded, expected, rtol=1e-5, atol=1e-4)
    assert np.abs(rounded - x @ kernel(q, "tpu")).max() > 1e-3


@pytest.mark.parametrize("format", [Int(4, 48), Int(4, 576), Int(5, 24)], ids=str)
def test_what_no_kernel_takes_is_left_to_xla(format):
    assert kernel(weight(format, (1152, 70)), "gpu") is None


@pytest.mark.parametrize("name", ["4 bits, zeros", "8 bits, one scale", "nf4, double"])
def test_each_device_multiplies_its_columns(name):
    devices, q = Devices(2, 4), weight(FORMATS[name], (128, 80))
    cut = by_columns(packed_matrix(devices.cut("kernel", q)), None, None, devices.mesh, interpret=True)
    assert cut.shape == (128, 80)
    assert cut.own.codes.sharding.spec == jax.P(None, None, ("data", "model"))
    x = jax.random.normal(jax.random.key(1), (2, 3, 128), jnp.bfloat16)
    y = jax.jit(lambda x, w: x @ w)(x, cut)
    assert y.sharding.spec == jax.P(None, None, ("data", "model"))
    np.testing.assert_array_equal(y, x @ kernel(q, "tpu"))
    assert by_columns(packed_matrix(weight(FORMATS[name], (128, 70))), None, None, devices.mesh, interpret=True) is None


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("name", ["4 bits, zeros", "4 bits", "8 bits, zeros", "8 bits a column", "nf4"])
def test_it_lowers_for_a_gpu(name, rows):
    """To Triton's code, which needs no GPU."""
    w = jax.eval_shape(lambda: blocked(packed_matrix(weight(FORMATS[name], (4096, 1024))), None, None, "gpu"))
    x = jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16)
    program = jax.jit(lambda x, w: x @ w).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" in program


@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4"])
@pytest.mark.parametrize("rows", [1, 512])
@pytest.mark.parametrize("name", ["4 bits, zeros", "4 bits", "8 bits a column", "nf4"])
def test_it_compiles_for_a_tpu(name, rows, topology, monkeypatch):
    """With the TPU's own compiler, which needs no TPU: `make pods`."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    placed = jax.sharding.SingleDeviceSharding(device)
    w = jax.eval_shape(lambda: blocked(packed_matrix(weight(FORMATS[name], (4096, 14336))), None, None, "tpu"))
    w, x = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
        (w, jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16)),
    )
    program = jax.jit(lambda x, w: x @ w).lower(x, w).compile()
    assert "tpu_custom_call" in program.as_text()
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 0.2 * memory.argument_size_in_bytes + 4 * rows * 16384
