"""Independent reference implementations in float64 NumPy, written from the papers, for the tests to compare with.

Nothing here imports the package or shares code with it. Plain loops, one weight row at a time; meant for matrices of
up to a few hundred rows.

Conventions (this project's, not the papers'):
- A weight matrix is [in, out] and a linear layer is y = x @ W. The papers write y = W x with W [out, in], so the
  "columns" that GPTQ quantizes one after another are *rows* here.
- Groups run along `in`: row i belongs to group i // group, in the original numbering whatever the order of
  quantization ("static groups"). The last group may be short; group=None is one group per output column.
- The Gram matrix is H = sum_t w_t x_t x_t^T, [in, in]. GPTQ's Hessian is 2 H; a common factor changes no code.
- Rounding is half to even (`np.rint`).
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy.typing import DTypeLike

# ------------------------------------------------------------------------------------------------- integer grids


def group_slices(rows: int, group: int | None) -> list[slice]:
    """Return the row ranges of the groups, in order; the last may be short (convention)."""
    size = rows if group is None else group
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def int_grid(
    w: Float[np.ndarray, "in out"],
    bits: int,
    group: int | None,
    symmetric: bool,
    scale_dtype: DTypeLike | None = None,
) -> tuple[Float[np.ndarray, "groups out"], Float[np.ndarray, "groups out"]]:
    """Return (scale, zero) of the min-max grid of every group, both float64.

    Asymmetric: as in the code of GPTQ (arXiv 2210.17323, quant.py): the range is widened to include 0,
    scale = (max - min) / (2^bits - 1), zero = clip(round(-min / scale), 0, 2^bits - 1).
    Symmetric (convention, for bits >= 2): scale = absmax / (2^(bits-1) - 1), zero = 0. GPTQ's own symmetric grid
    divides 2 absmax by 2^bits - 1 instead.
    A scale of 0 becomes 1: for an all-zero group, and for one whose scale underflows `scale_dtype` (conventions; GPTQ
    gives an all-zero group the range [-1, 1]).
    With `scale_dtype`, the float64 scale is rounded through that dtype before the zero point is chosen.
    """
    w = np.asarray(w, np.float64)
    scales, zeros = [], []
    for rows in group_slices(w.shape[0], group):
        if symmetric:
            scale = np.abs(w[rows]).max(axis=0) / (2 ** (bits - 1) - 1)
        else:
            low = np.minimum(w[rows].min(axis=0), 0.0)
            high = np.maximum(w[rows].max(axis=0), 0.0)
            scale = (high - low) / (2**bits - 1)
        if scale_dtype is not None:
            scale = scale.astype(scale_dtype).astype(np.float64)
        scale = np.where(scale == 0.0, 1.0, scale)
        zero = np.zeros_like(scale) if symmetric else np.clip(np.rint(-low / scale), 0, 2**bits - 1)
        scales.append(scale)
        zeros.append(zero)
    return np.stack(scales), np.stack(zeros)


def _round_row(
    row: Float[np.ndarray, " out"],
    scale: Float[np.ndarray, " out"],
    zero: Float[np.ndarray, " out"],
    bits: int,
    symmetric: bool,
) -> tuple[Float[np.ndarray, " out"], Float[np.ndarray, " out"]]:
    """Round one weight row to its grid: code = clip(round(w / scale) + zero), value = (code - zero) * scale.

    The zero point is added after rounding, as in GPTQ's quant.py (arXiv 2210.17323). Adding it before would send a tie
    the other way wherever the zero point is odd.
    """
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    code = np.clip(np.rint(row / scale) + zero, lowest, highest)
    return code, (code - zero) * scale


def int_round(
    w: Float[np.ndarray, "in out"],
    scale: Float[np.ndarray, "groups out"],
    zero: Float[np.ndarray, "groups out"],
    bits: int,
    group: int | None,
    symmetric: bool,
) -> tuple[Int[np.ndarray, "in out"], Float[np.ndarray, "in out"]]:
    """Round every weight to the nearest point of a given grid (RTN); return (codes int64, values float64).

    The baseline that the GPTQ paper (arXiv 2210.17323) calls RTN. Symmetric codes are signed, in
    [-2^(bits-1), 2^(bits-1) - 1]; asymmetric ones are in [0, 2^bits - 1].
    """
    w = np.asarray(w, np.float64)
    codes, values = np.zeros(w.shape, np.int64), np.zeros(w.shape)
    for g, rows in enumerate(group_slices(w.shape[0], group)):
        codes[rows], values[rows] = _round_row(w[rows], scale[g], zero[g], bits, symmetric)
    return codes, values


# ------------------------------------------------------------------------------------------------------- packing


def pack_bits(codes: Int[np.ndarray, " n"], bits: int) -> UInt8[np.ndarray, " bytes"]:
    """Pack unsigned codes into a little-endian bit stream of ceil(n * bits / 8) bytes (convention, no paper).

    Bit b of code i is bit (i * bits + b) of the stream, and stream bit k is bit k % 8 of byte k // 8. The stream is
    padded with zeros to whole bytes. Raises ValueError for a code outside [0, 2^bits - 1]: signed
    codes must be offset first.
    """
    codes = np.asarray(codes, np.int64)
    if codes.size and (codes.min() < 0 or codes.max() >= 2**bits):
        raise ValueError(f"codes must lie in [0, {2**bits - 1}]")
    stream = np.zeros(-(-codes.size * bits // 8) * 8, np.int64)
    for b in range(bits):
        stream[b : codes.size * bits : bits] = (codes >> b) & 1
    packed = np.zeros(stream.size // 8, np.int64)
    for k in range(8):
        packed += stream[k::8] << k
    return packed.astype(np.uint8)


def unpack_bits(packed: UInt8[np.ndarray, " bytes"], bits: int, n: int) -> Int[np.ndarray, " n"]:
    """Return the first n codes (int64) of a stream written by `pack_bits` (convention, no paper)."""
    packed = np.asarray(packed, np.uint8).astype(np.int64)
    codes = np.zeros(n, np.int64)
    for i in range(n):
        for b in range(bits):
            k = i * bits + b
            codes[i] |= ((packed[k // 8] >> (k % 8)) & 1) << b
    return codes


# --------------------------------------------------------------------------- rounding with error compensation


def output_error(
    w: Float[np.ndarray, "in out"], w_hat: Float[np.ndarray, "in out"], gram: Float[np.ndarray, "in in"]
) -> float:
    """Return trace((W - Ŵ)^T H (W - Ŵ)), the squared output error summed over tokens and outputs.

    The layer-wise objective of GPTQ (arXiv 2210.17323, Eq. 1), written with the Gram matrix.
    """
    delta = np.asarray(w, np.float64) - np.asarray(w_hat, np.float64)
    return float(np.sum(delta * (np.asarray(gram, np.float64) @ delta)))


def _damped(
    w: Float[np.ndarray, "in out"], gram: Float[np.ndarray, "in in"], damping: float
) -> tuple[Float[np.ndarray, "in out"], Float[np.ndarray, "in in"]]:
    """Return float64 copies of W with dead rows zeroed and of the damped H.

    Paper (arXiv 2210.17323, step 3, Cholesky reformulation): a fraction of the mean diagonal, there 1 %, is added to
    the diagonal. From the paper's code (gptq.py): a channel with H_ii = 0 is dead, its weights become 0 and H_ii
    becomes 1; the mean is taken afterwards, so the ones count in it.
    """
    w, h = np.array(w, np.float64), np.array(gram, np.float64)
    dead = np.diag(h) == 0.0
    w[dead] = 0.0
    h[dead, dead] = 1.0
    return w, h + damping * np.mean(np.diag(h)) * np.eye(len(h))


def gptq(
    w: Float[np.ndarray, "in out"],
    gram: Float[np.ndarray, "in in"],
    scale: Float[np.ndarray, "groups out"],
    zero: Float[np.ndarray, "groups out"],
    bits: int,
    group: int | None,
    symmetric: bool,
    damping: float,
    order: Int[np.ndarray, " in"],
) -> tuple[Int[np.ndarray, "in out"], Float[np.ndarray, "in out"]]:
    """GPTQ with a given static grid (arXiv 2210.17323, Algorithm 1); return (codes int64, values float64).

    H^-1 = U^T U with U upper triangular; position i is rounded, its error divided by U_ii, and that error times row i
    of U taken off every position still to come. The blocks of Algorithm 1 (B = 128, "lazy batch updates") only
    regroup the same sums and are left out. `order[i]` is the row of W quantized i-th (convention: W and H are permuted
    first, as in the paper's code for act-order); results are returned in the original numbering.
    """
    w, h = _damped(w, gram, damping)
    size = len(h) if group is None else group
    order = np.asarray(order)
    w = w[order]
    upper = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    codes, values = np.zeros(w.shape, np.int64), np.zeros(w.shape)
    for i, row in enumerate(order):
        g = row // size
        codes[row], values[row] = _round_row(w[i], scale[g], zero[g], bits, symmetric)
        error = (w[i] - values[row]) / upper[i, i]
        w[i:] -= np.outer(upper[i, i:], error)
    return codes, values


def obq_fixed_order(
    w: Float[np.ndarray, "in out"],
    gram: Float[np.ndarray, "in in"],
    scale: Float[np.ndarray, "groups out"],
    zero: Float[np.ndarray, "groups out"],
    bits: int,
    group: int | None,
    symmetric: bool,
    damping: float,
    order: Int[np.ndarray, " in"],
) -> tuple[Int[np.ndarray, "in out"], Float[np.ndarray, "in out"]]:
    """Optimal Brain Quantization in a fixed order, without Cholesky; return (codes int64, values float64).

    The update of OBQ (arXiv 2208.11580) as GPTQ restates it (arXiv 2210.17323, Eq. 2 and 3): rounding weight q moves
    the others by -(w_q - quant(w_q)) / [H^-1]_qq * [H^-1]_:q, and q then leaves the inverse by one step of Gaussian
    elimination. OBQ picks q greedily for every output on its own; the fixed order shared by all outputs is GPTQ's
    "step 1". Same arguments as `gptq`, whose codes it must reproduce; nothing is permuted here.
    """
    w, h = _damped(w, gram, damping)
    size = len(h) if group is None else group
    inverse = np.linalg.inv(h)
    codes, values = np.zeros(w.shape, np.int64), np.zeros(w.shape)
    for q in order:
        g = q // size
        codes[q], values[q] = _round_row(w[q], scale[g], zero[g], bits, symmetric)
        column, pivot = inverse[:, q].copy(), inverse[q, q]
        w -= np.outer(column, (w[q] - values[q]) / pivot)
        inverse -= np.outer(column, column) / pivot
        # Exactly zero in exact arithmetic; set so that rounding errors cannot move rows that are already quantized.
        inverse[q, :] = inverse[:, q] = 0.0
    return codes, values


def babai(
    w: Float[np.ndarray, "in out"],
    gram: Float[np.ndarray, "in in"],
    scale: Float[np.ndarray, "groups out"],
    zero: Float[np.ndarray, "groups out"],
    bits: int,
    group: int | None,
    symmetric: bool,
    damping: float,
    order: Int[np.ndarray, " in"],
) -> tuple[Int[np.ndarray, "in out"], Float[np.ndarray, "in out"]]:
    """Babai's nearest plane by back-substitution (arXiv 2507.18553); return (codes int64, values float64).

    H = R^T R with R upper triangular, so that the output error is ||R (w - ŵ)||^2, and from the last position to the
    first ŵ_j = Q(w_j + sum_{k>j} (r_jk / r_jj) (w_k - ŵ_k)): no inverse, and w itself is never changed. The paper shows
    that this equals GPTQ run back to front. Convention: `order` is the order of quantization as in `gptq`, so H is
    permuted by the reversed order. Clipping to the code range (absent from Babai) happens inside Q, and dead channels
    are handled as in `gptq`.
    """
    w, h = _damped(w, gram, damping)
    size = len(h) if group is None else group
    back = np.asarray(order)[::-1]
    r = np.linalg.cholesky(h[np.ix_(back, back)]).T
    codes, values, error = np.zeros(w.shape, np.int64), np.zeros(w.shape), np.zeros(w.shape)
    for j in reversed(range(len(back))):
        row = back[j]
        g = row // size
        target = w[row] + (r[j, j + 1 :] / r[j, j]) @ error[j + 1 :]
        codes[row], values[row] = _round_row(target, scale[g], zero[g], bits, symmetric)
        error[j] = w[row] - values[row]
    return codes, values


def block_ldlq(
    w: Float[np.ndarray, "in out"],
    gram: Float[np.ndarray, "in in"],
    damping: float,
    firsts: Int[np.ndarray, " tiles"],
    tile: int,
    near: Callable[[Float[np.ndarray, "tile out"]], Float[np.ndarray, "tile out"]],
) -> Float[np.ndarray, "in out"]:
    """Block LDLQ (QuIP#, arXiv 2402.04396, Eq. 5); return the values, float64.

    Blocks of `tile` rows are rounded one after another, each to the values nearest to what would be best for it, if it
    and all later rows were real numbers, given the errors of the rows that are fixed. `firsts`: each block's first row,
    in the order of quantization.
    """
    w, h = _damped(w, gram, damping)
    blocks = [np.arange(first, first + tile) for first in firsts]
    values = np.zeros(w.shape)
    for place, block in enumerate(blocks):
        fixed = np.concatenate(blocks[:place]) if place else np.zeros(0, int)
        free = np.concatenate(blocks[place:])
        # With the fixed rows' errors e, the free rows' best real values solve H_free,free d = -H_free,fixed e.
        shift = np.linalg.solve(h[np.ix_(free, free)], h[np.ix_(free, fixed)] @ (w - values)[fixed])
        values[block] = near(w[block] + shift[:tile])
    return values


# ----------------------------------------------------------------------------------------------------------- AWQ


def awq_error(
    w: Float[np.ndarray, "in out"],
    gram: Float[np.ndarray, "in in"],
    s: Float[np.ndarray, " in"],
    quantize: Callable[[np.ndarray], np.ndarray],
) -> float:
    """Return the output error of diag(1/s) Q(diag(s) W), arXiv 2306.00978, Eq. 4 (squared norm).

    `quantize` maps a weight matrix [in, out] to its quantized *values*; the caller chooses the format.
    """
    w, s = np.asarray(w, np.float64), np.asarray(s, np.float64)[:, None]
    return output_error(w, np.asarray(quantize(s * w), np.float64) / s, gram)


def awq_search(
    ws: Sequence[Float[np.ndarray, "in out"]],
    grams: Sequence[Float[np.ndarray, "in in"]],
    absmean: Float[np.ndarray, " in"],
    quantize: Callable[[np.ndarray], np.ndarray],
    steps: int = 20,
    floor: float = 1e-4,
) -> tuple[Float[np.ndarray, " in"], float, float]:
    """Search AWQ's input scales; return (s, alpha, error) with the error summed over the matrices.

    Paper (arXiv 2306.00978, Eq. 5): s = absmean^alpha with absmean the mean |x| of each input channel, alpha from a
    grid over [0, 1]. From the paper's code (llm-awq, auto_scale.py): alpha = i / steps for i < steps, so that 1 is
    never tried; absmean^alpha is kept at or above 1e-4 (`floor`), which also serves dead channels; s is divided by
    sqrt(max(s) * min(s)); the first alpha wins a tie. Convention: the error is that of each matrix's own output,
    where the paper's code takes the output of the attention or MLP block.
    """
    best: tuple[np.ndarray, float, float] | None = None
    for i in range(steps):
        alpha = i / steps
        s = np.maximum(np.asarray(absmean, np.float64) ** alpha, floor)
        s = s / np.sqrt(s.max() * s.min())
        error = sum(awq_error(w, gram, s, quantize) for w, gram in zip(ws, grams, strict=True))
        if best is None or error < best[2]:
            best = (s, alpha, error)
    if best is None:
        raise ValueError("steps must be at least 1")
    return best


# ----------------------------------------------------------------------------------------------------------- NF4


def nf4_table() -> Float[np.ndarray, "16"]:
    """Return the 16 NormalFloat4 levels, float32, ascending (arXiv 2305.14314, appendix E)."""
    negative = [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
    ]
    positive = [
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
    return np.array([*negative, 0.0, *positive], np.float32)


def nf4_quantize(
    w_flat: Float[np.ndarray, " n"], block: int = 64
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " blocks"], Float[np.ndarray, " n"]]:
    """Blockwise NF4; return (codes int64, absmax float32, values float32), bit for bit bitsandbytes 0.50.2 on CPU.

    Paper (arXiv 2305.14314, sections 2 and 3): divide each block of 64 by its absmax and take the nearest level.
    The float32 details are those of bitsandbytes (backends/default/ops.py, quantize_4bit):
    - a full block is multiplied by the float32 reciprocal of its absmax, a short last block is divided by it;
    - the nearest level is found by the float32 midpoints, and a value exactly on one takes the *lower* level
      (toward -1, on both sides of 0);
    - the absmax is kept from 0 by 1e-38; a short last block also stores that floor, a full block stores its own absmax.
    """
    w = np.asarray(w_flat, np.float32)
    table, tiny, one = nf4_table(), np.float32(1e-38), np.float32(1)
    midpoints = (table[:-1] + table[1:]) / np.float32(2)
    codes, values = np.zeros(w.size, np.int64), np.zeros(w.size, np.float32)
    maxima = []
    for start in range(0, w.size, block):
        x = w[start : start + block]
        absmax = np.abs(x).max()
        if x.size == block:
            scaled = x * (one / np.maximum(absmax, tiny))
        else:
            absmax = np.maximum(absmax, tiny)
            scaled = x / absmax
        # The number of midpoints strictly below the value: equality leaves it in the lower cell.
        code = (midpoints[None, :] < np.clip(scaled, -one, one)[:, None]).sum(axis=1)
        codes[start : start + block] = code
        values[start : start + block] = table[code] * absmax
        maxima.append(absmax)
    return codes, np.array(maxima, np.float32), values


# ----------------------------------------------------------------------------------------------- model and scores


def _log_softmax(logits: Float[np.ndarray, "... vocab"]) -> Float[np.ndarray, "... vocab"]:
    """Return log softmax over the last axis in float64."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _attention_weights(
    q: Float[np.ndarray, "tokens query_heads dim"],
    k: Float[np.ndarray, "tokens kv_heads dim"],
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Float[np.ndarray, "query_heads tokens tokens"]:
    """Return the causal attention matrix of each query head, rows being queries (see `attention`)."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    tokens, heads, dim = q.shape
    shared = heads // k.shape[1]
    weights = np.zeros((heads, tokens, tokens))
    for h in range(heads):
        for t in range(tokens):
            first = 0 if window is None else max(0, t - window + 1)
            scores = k[first : t + 1, h // shared] @ q[t, h] * (1 / np.sqrt(dim) if scale is None else scale)
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            weights[h, t, first : t + 1] = np.exp(_log_softmax(scores))
    return weights


def attention(
    q: Float[np.ndarray, "tokens query_heads dim"],
    k: Float[np.ndarray, "tokens kv_heads dim"],
    v: Float[np.ndarray, "tokens kv_heads dim"],
    **options: float | int | None,
) -> Float[np.ndarray, "tokens query_heads dim"]:
    """Causal scaled dot-product attention in float64 (arXiv 1706.03762, Eq. 1), with 1 / sqrt(dim).

    Grouped queries (arXiv 2305.13245): query head h reads key/value head h // (query_heads / kv_heads).

    Options: another `scale`; `softcap`, scores s become c tanh(s / c) (Gemma 2, arXiv 2408.00118, Sec. 2); `window`, a
    query sees so many tokens, its own among them (Mistral, arXiv 2310.06825, Sec. 2, and transformers' masks).
    """
    weights = _attention_weights(q, k, **options)
    v = np.asarray(v, np.float64)
    shared = len(weights) // v.shape[1]
    return np.stack([weights[h] @ v[:, h // shared] for h in range(len(weights))], axis=1)


def attention_mass(
    q: Float[np.ndarray, "tokens query_heads dim"],
    k: Float[np.ndarray, "tokens kv_heads dim"],
    **options: float | int | None,
) -> Float[np.ndarray, " tokens"]:
    """Return the attention each key token receives, summed over queries and averaged over query heads.

    The entries sum to the number of tokens. No equation of a paper; the attention-concentration weights of RSQ
    (arXiv 2503.01820) are a relative.
    """
    return _attention_weights(q, k, **options).sum(axis=1).mean(axis=0)


def rope(
    x: Float[np.ndarray, "tokens heads dim"], base: float, scaling: dict[str, float] | None = None
) -> Float[np.ndarray, "tokens heads dim"]:
    """Rotary position embedding at positions 0, 1, ..., float64 (arXiv 2104.09864, Eq. 14 and 15).

    Paper: pair i is turned by position * base^(-2 i / dim). Convention (transformers): pair i is the coordinates
    (i, i + dim / 2), where the paper pairs neighbours (2i, 2i + 1). `scaling` is Llama 3.1's change of the frequencies
    (transformers, modeling_rope_utils.py), with the keys factor, low_freq_factor, high_freq_factor and
    original_max_position_embeddings: with n = original length / wavelength turns, a frequency is kept for
    n > high_freq_factor, divided by `factor` for n < low_freq_factor, and interpolated linearly in n between.
    """
    x = np.asarray(x, np.float64)
    tokens, _, dim = x.shape
    half = dim // 2
    out = np.zeros_like(x)
    for i in range(half):
        frequency = float(base) ** (-2.0 * i / dim)
        if scaling is not None:
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns = scaling["original_max_position_embeddings"] * frequency / (2.0 * np.pi)
            if turns < low:
                frequency = frequency / scaling["factor"]
            elif turns <= high:
                kept = (turns - low) / (high - low)
                frequency = kept * frequency + (1.0 - kept) * frequency / scaling["factor"]
        angle = (np.arange(tokens) * frequency)[:, None]
        first, second = x[..., i], x[..., i + half]
        out[..., i] = first * np.cos(angle) - second * np.sin(angle)
        out[..., i + half] = second * np.cos(angle) + first * np.sin(angle)
    return out


def perplexity(logits: Float[np.ndarray, "tokens vocab"], tokens: Int[np.ndarray, " tokens"]) -> float:
    """Return exp of the mean negative log-likelihood (nats) of tokens[1:] under logits[:-1] (textbook definition)."""
    predicted = _log_softmax(logits)[:-1]
    target = np.asarray(tokens)[1:]
    return float(np.exp(-predicted[np.arange(len(target)), target].mean()))


def kl(p_logits: Float[np.ndarray, "... vocab"], q_logits: Float[np.ndarray, "... vocab"]) -> float:
    """Return KL(p || q) = sum p (log p - log q) in nats, averaged over all positions (textbook definition)."""
    log_p, log_q = _log_softmax(p_logits), _log_softmax(q_logits)
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())


# ----------------------------------------------------------------------------------- orders, and scales after rounding


def min_pivot(
    gram: Float[np.ndarray, "in in"], damping: float
) -> tuple[Int[np.ndarray, " in"], Float[np.ndarray, " in"]]:
    """Return (order of quantization, D of the LDL^T) of the min-pivot order (arXiv 2507.18553).

    H = L D L^T, damped as in `gptq`, is eliminated step by step, the row with the smallest diagonal of what remains
    first. Back-substitution ends with the rows eliminated first, so the order of quantization is the reverse; D is
    returned in that order too. The sum of D is what bounds the output error of Babai's nearest plane.
    """
    _, h = _damped(np.zeros((len(gram), 1)), gram, damping)
    left, eliminated, pivots = list(range(len(h))), [], []
    while left:
        row = min(left, key=lambda i: h[i, i])
        pivots.append(h[row, row])
        h = h - np.outer(h[:, row], h[row]) / h[row, row]
        left.remove(row)
        eliminated.append(row)
    return np.array(eliminated[::-1]), np.array(pivots[::-1])


def pivots(gram: Float[np.ndarray, "in in"], damping: float, order: Int[np.ndarray, " in"]) -> Float[np.ndarray, " in"]:
    """Return D of `min_pivot` for any order of quantization: the squared diagonal of `babai`'s R."""
    _, h = _damped(np.zeros((len(gram), 1)), gram, damping)
    back = np.asarray(order)[::-1]
    return np.diag(np.linalg.cholesky(h[np.ix_(back, back)]))[::-1] ** 2


def best_scales(
    w: Float[np.ndarray, " in"], directions: Float[np.ndarray, "in scales"], gram: Float[np.ndarray, "in in"]
) -> Float[np.ndarray, " scales"]:
    """Return the s that minimises (w - B s)^T H (w - B s) for one column of weights (ordinary least squares).

    H = X^T X with X = sqrt(D) V^T from its eigenvectors, so that H may be singular; then min ||X w - X B s||.
    """
    values, vectors = np.linalg.eigh(np.asarray(gram, np.float64))
    x = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
    return np.linalg.lstsq(x @ np.asarray(directions, np.float64), x @ np.asarray(w, np.float64), rcond=None)[0]
