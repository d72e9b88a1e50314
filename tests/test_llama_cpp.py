"""llama.cpp's scale search, against its own quantizer as libgguf 0.2.2 ships it: the bytes are the same."""

from functools import partial

import gguf
import jax
import jax.numpy as jnp
import libgguf
import numpy as np
import pytest
from problems import rounded

from jquant.errors import InputError
from jquant.formats import GGUF, Int
from jquant.io.gguf.blocks import block_size, to_blocks
from jquant.qtensor import dequantize, quantize
from jquant.ranges import LlamaCpp, MinMax
from jquant.rounding import GPTQ, Nearest

KINDS = list(GGUF)
ROWS, N = 48, 1536  # one shape, so that each search compiles once
# Where weights count, these keep the codes of the grid that their scale was fitted to.
OWN_CODES = {"Q4_0", "Q4_1", "Q5_0", "Q5_1"}
EVERY = pytest.mark.parametrize(
    ("kind", "importance"), [(k, i) for k in KINDS for i in (False, True)], ids=lambda v: str(v)
)


@partial(jax.jit, static_argnames=("kind", "importance"))
def search(w, gram, kind: str, importance: bool):
    """llama.cpp's own result, and the nearest codes on its scales."""
    range, format = LlamaCpp(importance), GGUF[kind]
    return range.quantize(w, format, gram), quantize(w, *range(w, format, gram), format)


def synthetic(case: str) -> np.ndarray:
    """Rows as GGUF has them, `[out, in]`."""
    rng = np.random.default_rng(len(case))
    normal = (0.02 * rng.standard_normal((ROWS, N))).astype(np.float32)
    match case:
        case "normal":
            return normal
        case "heavy-tailed":
            return (0.02 * rng.standard_t(2, (ROWS, N))).astype(np.float32)
        case "on a Q4_1 grid":  # so that ties abound
            step = rng.uniform(0, 0.02, (ROWS, N // 32, 1)).astype(np.float16)
            low = rng.uniform(-0.1, 0, (ROWS, N // 32, 1)).astype(np.float16)
            codes = rng.integers(0, 16, (ROWS, N // 32, 32))
            return (codes.astype(np.float32) * step + low.astype(np.float32)).reshape(ROWS, N).astype(np.float32)
        case "with zero blocks":
            normal[:, 100:700] = 0
            normal[::4] = 0
            return normal
        case "of one sign":
            return np.abs(normal) * np.where(np.arange(ROWS) % 2, 1, -1)[:, None].astype(np.float32)
    raise ValueError(case)


def mean_squares(n: int = N) -> np.ndarray:
    return (np.random.default_rng(n).uniform(0.1, 2, n) ** 3).astype(np.float32)


def theirs(x: np.ndarray, kind: str, importance: bool) -> np.ndarray:
    """libgguf's blocks, `[out, bytes]`."""
    weights = mean_squares(x.shape[1]) if importance else None
    return libgguf.quantize_rows(x, gguf.GGMLQuantizationType[kind], imatrix=weights).reshape(len(x), -1)


def gram(n: int = N) -> jax.Array:
    return jnp.diag(jnp.asarray(mean_squares(n)))


def weighted_error(weights: np.ndarray, x: np.ndarray) -> float:
    return float(np.sum((weights - x).astype(np.float64) ** 2 * mean_squares(x.shape[1])))


def differing_blocks(ours: np.ndarray, theirs: np.ndarray, kind: str) -> float:
    size = block_size(kind)[1]
    return float(np.mean((ours.reshape(-1, size) != theirs.reshape(-1, size)).any(1)))


@pytest.fixture(scope="module")
def real_weights(default_gguf) -> dict[str, np.ndarray]:
    """The down-projections, `[out, 1536]`: rows long enough for super-blocks."""
    tensors = gguf.GGUFReader(default_gguf).tensors
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in tensors if "ffn_down" in t.name}


@pytest.mark.parametrize("case", ["normal", "heavy-tailed", "on a Q4_1 grid", "with zero blocks", "of one sign"])
@EVERY
def test_the_bytes_are_llama_cpps(kind, importance, case):
    x = synthetic(case)
    own, _ = search(x.T, gram(), kind, importance)
    assert differing_blocks(to_blocks(own, kind), theirs(x, kind, importance), kind) == 0


@EVERY
def test_real_weights_get_llama_cpps_bytes(kind, importance, real_weights):
    x = np.concatenate([real_weights[f"blk.{i}.ffn_down.weight"][:16] for i in (0, 11, 29)])
    own, _ = search(x.T, gram(), kind, importance)
    assert differing_blocks(to_blocks(own, kind), theirs(x, kind, importance), kind) == 0


@pytest.mark.slow
@EVERY
def test_all_down_projections_get_llama_cpps_bytes(kind, importance, real_weights):
    for name, x in real_weights.items():
        reference = theirs(x, kind, importance)
        own, nearest = search(x.T, gram(), kind, importance)
        assert differing_blocks(to_blocks(own, kind), reference, kind) <= 1e-3, name
        read = gguf.dequantize(reference, gguf.GGMLQuantizationType[kind])
        for q in (own, nearest):
            # Where the weights lie on the grid llama.cpp's own error is 0.
            assert weighted_error(np.asarray(dequantize(q)).T, x) <= 1.001 * weighted_error(read, x) + 1e-9, name


@pytest.mark.parametrize("case", ["normal", "heavy-tailed", "with zero blocks"])
@EVERY
def test_nearest_on_its_scales_gives_llama_cpps_weights(kind, importance, case):
    x = synthetic(case)
    reference = gguf.dequantize(theirs(x, kind, importance), gguf.GGMLQuantizationType[kind])
    nearest = np.asarray(dequantize(search(x.T, gram(), kind, importance)[1])).T
    if importance and kind in OWN_CODES:
        ratio = weighted_error(nearest, x) / weighted_error(reference, x)
        assert 0.99 < ratio < 1  # on the same scales, nearest codes can only be better
    else:
        np.testing.assert_array_equal(nearest, reference)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "Q8_0"])
def test_importance_lowers_the_error_it_weighs(kind):
    x = synthetic("normal")
    plain, weighted = (np.asarray(dequantize(search(x.T, gram(), kind, i)[0])).T for i in (False, True))
    assert weighted_error(weighted, x) < 0.99 * weighted_error(plain, x)


@pytest.mark.parametrize("kind", ["Q3_K", "Q4_K"])
def test_a_short_last_super_block_is_one_of_its_own(kind):
    # llama.cpp refuses such rows; sub-blocks of zeros that fill them up change nothing in the others.
    x = synthetic("normal")[:8, :320]
    filled = gguf.dequantize(theirs(np.pad(x, ((0, 0), (0, 192))), kind, False), gguf.GGMLQuantizationType[kind])
    own, _ = search(x.T, gram(320), kind, False)
    np.testing.assert_array_equal(np.asarray(dequantize(own)).T, filled[:, :320])


@pytest.mark.parametrize(("kind", "importance"), [("Q4_1", True), ("Q5_K", False), ("IQ4_NL", False)])
def test_a_short_last_block_is_as_good_as_a_whole_one(kind, importance):
    # All of one sign and far from 0, so that filling with zeros would show.
    x = -1 - 0.1 * np.random.default_rng(0).uniform(size=(16, 264)).astype(np.float32)
    own, _ = search(x.T, gram(264), kind, importance)
    error = (np.asarray(dequantize(own)).T - x) ** 2
    assert error[:, 256:].mean() < 1.5 * error[:, :256].mean()


def test_the_filling_of_a_short_block_weighs_nothing():
    x, weights = synthetic("normal")[:16, :264], mean_squares(264)
    filled = np.pad(np.pad(x, ((0, 0), (0, 8)), mode="edge"), ((0, 0), (0, 240)))
    raw = libgguf.quantize_rows(filled, gguf.GGMLQuantizationType.Q6_K, imatrix=np.pad(weights, (0, 248)))
    own, _ = search(x.T, gram(264), "Q6_K", True)
    expected = gguf.dequantize(raw.reshape(16, -1), gguf.GGMLQuantizationType.Q6_K)
    np.testing.assert_array_equal(np.asarray(dequantize(own)).T, expected[:, :264])


def test_the_program_does_not_grow_with_the_matrix():
    def operations(n: int) -> int:
        w = jax.ShapeDtypeStruct((n, 4), jnp.float32)
        return str(jax.make_jaxpr(lambda w: LlamaCpp().quantize(w, GGUF["Q4_K"]))(w)).count(" = ")

    assert operations(512) == operations(2048)


def test_gptq_on_its_scales_loses_less_than_nearest():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((2000, 256)) @ rng.standard_normal((256, 256))
    h, w = jnp.asarray(inputs.T @ inputs / 2000, jnp.float32), jnp.asarray(synthetic("normal")[:8, :256].T)
    range, format = LlamaCpp(importance=True), GGUF["Q4_K"]

    @jax.jit
    def errors(w, h):
        return [rounded(rounding, w, format, h, range=range)[1].error for rounding in (GPTQ(), Nearest())]

    by_gptq, by_nearest = errors(w, h)
    assert by_gptq < 0.7 * by_nearest


def test_what_it_cannot_do_is_refused():
    w = jnp.ones((64, 4))
    with pytest.raises(InputError, match=r"no block type for Int\(bits=4, group=64"):
        LlamaCpp()(w, Int(4, 64))
    with pytest.raises(InputError, match="Importance weights for Q4_K need calibration text"):
        LlamaCpp(importance=True)(w, GGUF["Q4_K"])
    assert LlamaCpp(importance=True).needs == {"gram"}
    assert LlamaCpp().needs == MinMax().needs == frozenset()
