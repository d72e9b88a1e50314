// Attention of one query a head to the keys and values of past tokens, as generation computes it token by token.
//
// The queries of `group` heads share keys and values `[slots, d]`, of which the first `length` are there; the others are
// not read. Bound by the bytes of those, once they no longer fit into cache.
#pragma once

#include "product.h"

namespace jquant {

constexpr int64_t ROWS_OF_KEYS = 64;  // keys, or values, that all queries read before the next ones: 16 kB for heads of 64

JQUANT_INLINE float sum(Floats v) {
#if defined(JQUANT_AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int lane = 0; lane < LANES; ++lane) total += v[lane];
  return total;
#endif
}

// exp(x) for x ≤ 0, with an error of a few units in the last place; 0 below -88, NaN for NaN. x = n ln 2 + r with
// |r| ≤ ln 2 / 2, and exp(r) is its Taylor polynomial of degree 7.
JQUANT_INLINE Floats exponential(Floats x) {
  x = x < -88.0f ? -88.0f - Floats{} : x;
  const Floats steps = x * 1.44269504f - 0.5f;
  const Ints n = __builtin_convertvector(steps, Ints);  // towards zero: x ≤ 0
  const Floats whole = floats(n);
  const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
  Floats p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Ints scale = (n + 127) << 23;  // 2ⁿ, or 0 for n = -127
  return p * load<Floats>(&scale);
}

// out += Σ weights[s] · v[s] over values from `begin` to `end`, for VECTORS · LANES channels.
template <int VECTORS>
void mix(const float* weights, const float* v, int64_t begin, int64_t end, int64_t d, float* out) {
  Floats mixed[VECTORS];
#pragma GCC unroll 4
  for (int c = 0; c < VECTORS; ++c) mixed[c] = load<Floats>(out + c * LANES);
  for (int64_t s = begin; s < end; ++s) {
#pragma GCC unroll 4
    for (int c = 0; c < VECTORS; ++c) mixed[c] += load<Floats>(v + s * d + c * LANES) * weights[s];
  }
#pragma GCC unroll 4
  for (int c = 0; c < VECTORS; ++c) store(out + c * LANES, mixed[c]);
}

// out [group, d] = softmax(q kᵀ / √d) v; d is a multiple of LANES.
inline void attend(const float* q, const float* k, const float* v, int64_t length, int64_t group, int64_t d, float* out) {
  const int64_t padded = (length + LANES - 1) / LANES * LANES;
  std::vector<float> weights(group * padded, -INFINITY);
  const float scale = 1.0f / std::sqrt((float)d);
  for (int64_t begin = 0; begin < length; begin += ROWS_OF_KEYS) {
    const int64_t end = std::min(begin + ROWS_OF_KEYS, length);
    for (int64_t head = 0; head < group; ++head) {
      for (int64_t s = begin; s < end; ++s) {
        Floats products = {};
        for (int64_t c = 0; c < d; c += LANES) products += load<Floats>(q + head * d + c) * load<Floats>(k + s * d + c);
        weights[head * padded + s] = sum(products) * scale;
      }
    }
  }
  std::vector<float> inverse(group);
  for (int64_t head = 0; head < group; ++head) {
    float* of_head = &weights[head * padded];
    const float largest = *std::max_element(of_head, of_head + length);
    Floats total = {};
    for (int64_t s = 0; s < padded; s += LANES) {
      const Floats e = exponential(load<Floats>(of_head + s) - largest);
      store(of_head + s, e);
      total += e;
    }
    inverse[head] = 1.0f / sum(total);
  }
  std::fill(out, out + group * d, 0.0f);
  for (int64_t begin = 0; begin < length; begin += ROWS_OF_KEYS) {
    const int64_t end = std::min(begin + ROWS_OF_KEYS, length);
    for (int64_t head = 0; head < group; ++head) {
      int64_t c = 0;
      for (; c + 4 * LANES <= d; c += 4 * LANES) mix<4>(&weights[head * padded], v + c, begin, end, d, out + head * d + c);
      for (; c < d; c += LANES) mix<1>(&weights[head * padded], v + c, begin, end, d, out + head * d + c);
    }
  }
  for (int64_t head = 0; head < group; ++head) {
    for (int64_t c = 0; c < d; ++c) out[head * d + c] *= inverse[head];
  }
}

}  // namespace jquant
