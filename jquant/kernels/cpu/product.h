// x @ w for packed codes of w: the arithmetic, without XLA. Compiled once for each instruction set.
//
// A weight lies in tiles of TILE outputs, so that one vector holds one code of many outputs and no sum crosses lanes.
// The data are three parts, each `[tiles, groups, …, TILE]`:
//
//   words     the codes, in units of CODES inputs (Layout below); a group is filled up to whole units, and x with zeros
//             alike, so that no loop has a remainder
//   scales    float32 or float16
//   offsets   none, or float32 or float16; or int8: zeros, where the offset is -scale · zero
//
//   value of a weight = scale · level(code) + offset
//
// A product of one row reads all parts once, and x from cache: it is bound by the data's bytes. Codes of all groups lie
// together because CPUs fetch ahead only where addresses grow evenly: with each group's scales between them, the default
// model's products took twice the time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace jquant {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define JQUANT_AVX512 1
constexpr int LANES = 16;
constexpr int FEW = 4;      // rows whose sums are held in registers while codes are decoded
constexpr int PASS = 4;     // vectors of outputs beside them
#elif defined(__AVX2__) && defined(__FMA__)
#define JQUANT_AVX2 1
constexpr int LANES = 8;
constexpr int FEW = 2;
constexpr int PASS = 4;
#else
constexpr int LANES = 4;
constexpr int FEW = 2;
constexpr int PASS = 4;
#endif

constexpr int TILE = 64;             // outputs side by side
constexpr int64_t DEPTH = 256;       // inputs whose weights are decoded at a time for many rows: 64 kB
constexpr int64_t BLOCK_ROWS = 192;  // rows of a task: their sums in a tile are 48 kB
constexpr int MANY = 6;              // rows whose sums are held in registers there

// A call within the inner loops would spill the registers that hold their sums.
#define JQUANT_INLINE __attribute__((always_inline)) inline

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

template <typename V, typename T>
JQUANT_INLINE V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <typename V, typename T>
JQUANT_INLINE void store(T* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

JQUANT_INLINE Floats floats(Ints v) { return __builtin_convertvector(v, Floats); }

// The 16 levels of a code, by its lowest four bits. Codes of fewer bits have the table repeated, so that the bits of
// their neighbours do not matter.
struct Levels {
#if defined(JQUANT_AVX512)
  __m512 all;
  explicit Levels(const float* levels) : all(_mm512_loadu_ps(levels)) {}
  JQUANT_INLINE Floats operator[](Words index) const { return (Floats)_mm512_permutexvar_ps((__m512i)index, all); }
#elif defined(JQUANT_AVX2)
  __m256 low, high;
  explicit Levels(const float* levels) : low(_mm256_loadu_ps(levels)), high(_mm256_loadu_ps(levels + 8)) {}
  JQUANT_INLINE Floats operator[](Words index) const {
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)index, 28));  // bit 3 to the sign
    return (Floats)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, (__m256i)index),
                                    _mm256_permutevar8x32_ps(high, (__m256i)index), upper);
  }
#else
  float all[16];
  explicit Levels(const float* levels) { std::copy(levels, levels + 16, all); }
  JQUANT_INLINE Floats operator[](Words index) const {
    Floats v;
    for (int lane = 0; lane < LANES; ++lane) v[lane] = all[index[lane] & 15];
    return v;
  }
#endif
};

// sum + Σ of four products: of unsigned bytes of `codes` and signed bytes of `inputs`, in each lane.
JQUANT_INLINE Ints dot4(Ints sum, Words codes, int32_t inputs) {
#if defined(JQUANT_AVX512)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(inputs));
#elif defined(JQUANT_AVX2)
  // Pairs of 16 bits do not saturate, as pairs of bytes would.
  const __m256i x = _mm256_set1_epi32(inputs), even = _mm256_set1_epi32(0x00ff00ff);
  const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
  const __m256i a = _mm256_madd_epi16(_mm256_and_si256((__m256i)codes, even), x_even);
  const __m256i b = _mm256_madd_epi16(_mm256_and_si256(_mm256_srli_epi16((__m256i)codes, 8), even), x_odd);
  return sum + (Ints)a + (Ints)b;
#else
  for (int byte = 0; byte < 4; ++byte) {
    sum += (Ints)(codes >> (8 * byte) & 255u) * (int32_t)(int8_t)((uint32_t)inputs >> (8 * byte));
  }
  return sum;
#endif
}

// Where the code of each of a unit's inputs lies. Input i = 4 k + r is in byte r, as `dot4` reads it, and there it is
// the k-th code from below. Three bits are two planes: the low two bits as of two-bit codes, the high ones beside them.
template <int WIDTH>
struct Layout {
  static constexpr int WORDS = 1;
  static constexpr int CODES = 32 / WIDTH;

  JQUANT_INLINE static Words index(const Words* word, int i) { return word[0] >> (8 * (i % 4) + WIDTH * (i / 4)); }
  JQUANT_INLINE static Floats level(const Words* word, int i, const Levels& levels) { return levels[index(word, i)]; }
  JQUANT_INLINE static Words four(const Words* word, int k) {
    return word[0] >> (WIDTH * k) & (uint32_t)(((1 << WIDTH) - 1) * 0x01010101);
  }
};

template <>
struct Layout<3> {
  static constexpr int WORDS = 3;
  static constexpr int CODES = 32;

  JQUANT_INLINE static Words index(const Words* word, int i) {
    const Words low = word[i / 16] >> (8 * (i % 4) + 2 * (i % 16 / 4));
    const int at = 8 * (i % 4) + i / 4;
    const Words high = at >= 2 ? word[2] >> std::max(at - 2, 0) : word[2] << std::max(2 - at, 0);
    return (low & 3u) | (high & ~3u);
  }
  JQUANT_INLINE static Floats level(const Words* word, int i, const Levels& levels) { return levels[index(word, i)]; }
  JQUANT_INLINE static Words four(const Words* word, int k) {
    return (word[k / 4] >> (2 * (k % 4)) & 0x03030303u) | (word[2] >> k & 0x01010101u) << 2;
  }
};

// Eight bits are signed and their own levels; `dot4` gets them with 128 added.
template <>
struct Layout<8> {
  static constexpr int WORDS = 1;
  static constexpr int CODES = 4;

  JQUANT_INLINE static Floats level(const Words* word, int i, const Levels&) {
    return floats((Ints)(word[0] << (24 - 8 * i)) >> 24);
  }
  JQUANT_INLINE static Words four(const Words* word, int) { return word[0] ^ 0x80808080u; }
};

enum Kind { NONE = 0, FLOAT32 = 1, FLOAT16 = 2, INT8 = 3 };  // of scales and offsets

inline int64_t bytes_of(int kind) { return kind == FLOAT32 ? 4 : kind == FLOAT16 ? 2 : kind == INT8 ? 1 : 0; }

struct Weight {
  const uint8_t* data;     // words, scales, offsets
  const float* levels;     // [16]; not read for eight bits
  int64_t in, out, group;  // rows, columns, rows under one scale
  int32_t centre;          // what `dot4`'s codes exceed their levels by
  int scale, offset;       // Kind

  int64_t tiles() const { return (out + TILE - 1) / TILE; }
  int64_t groups() const { return (in + group - 1) / group; }
};

JQUANT_INLINE Floats halves(const uint8_t* from) {
#if defined(JQUANT_AVX512)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(JQUANT_AVX2)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
  Floats v;
  for (int lane = 0; lane < LANES; ++lane) {
    uint16_t half;
    std::memcpy(&half, from + 2 * lane, 2);
    // Subnormal halves as integers: XLA's threads read subnormal floats as zeros.
    const uint32_t size = half & 0x7fffu, bits = (size << 13) + (112u << 23);
    float value;
    std::memcpy(&value, &bits, 4);
    if (size < 0x400u) value = (float)size * 0x1p-24f;
    v[lane] = half & 0x8000u ? -value : value;
  }
  return v;
#endif
}

// LANES values of a kind from column `column` on.
JQUANT_INLINE Floats values(const uint8_t* grid, int kind, int64_t column) {
  if (kind == FLOAT32) return load<Floats>(grid + 4 * column);
  if (kind == FLOAT16) return halves(grid + 2 * column);
  return __builtin_convertvector(load<Bytes>(grid + column), Floats);
}

// Where the parts of a weight are, and what is in them. `n` is the number of a group: tile · groups + group.
template <int WIDTH>
struct Parts {
  const int64_t padded, units;  // of a group: inputs, units of codes
  const uint8_t *words, *scales, *offsets;
  const int scale_kind, offset_kind;

  explicit Parts(const Weight& w)
      : padded((w.group + Layout<WIDTH>::CODES - 1) / Layout<WIDTH>::CODES * Layout<WIDTH>::CODES),
        units(padded / Layout<WIDTH>::CODES),
        words(w.data),
        scales(words + w.tiles() * w.groups() * units * Layout<WIDTH>::WORDS * TILE * 4),
        offsets(scales + w.tiles() * w.groups() * TILE * bytes_of(w.scale)),
        scale_kind(w.scale),
        offset_kind(w.offset) {}

  // The words of a unit, counted from the first group's, for LANES columns from `column` on.
  JQUANT_INLINE void load_unit(Words* word, int64_t unit, int column) const {
    constexpr int COUNT = Layout<WIDTH>::WORDS;
#pragma GCC unroll 8
    for (int j = 0; j < COUNT; ++j) word[j] = load<Words>(words + ((unit * COUNT + j) * TILE + column) * 4);
  }
  JQUANT_INLINE Floats scale(int64_t n, int column) const { return values(scales, scale_kind, n * TILE + column); }
  // scale · sum + offset · inputs: of a group's inputs the sum of products with levels, and their own sum.
  JQUANT_INLINE Floats scaled(int64_t n, int column, Floats scale, Floats sum, float inputs) const {
    if (offset_kind == NONE) return sum * scale;
    const Floats v = values(offsets, offset_kind, n * TILE + column);
    return offset_kind == INT8 ? (sum - v * inputs) * scale : sum * scale + v * inputs;
  }
};

// Inputs in the order of the codes.
struct Inputs {
  std::vector<float> values;   // [rows, groups, padded group], zeros between
  std::vector<float> sums;     // [rows, groups]: of the inputs of each group
  // Of inputs rounded to eight bits, in pieces that share a scale and lie in one group:
  std::vector<int8_t> codes;   // [rows, pieces, padded piece]
  std::vector<float> scales;   // [rows, pieces]
  std::vector<int32_t> totals; // [rows, pieces]: of the codes of each piece
  int64_t stride = 0;          // of a row
  int64_t piece = 0;           // padded
};

template <int WIDTH>
Inputs spread(const Weight& w, const float* x, int64_t rows) {
  Inputs inputs;
  const int64_t padded = Parts<WIDTH>(w).padded, groups = w.groups();
  inputs.stride = groups * padded;
  inputs.values.assign(rows * inputs.stride, 0.0f);
  if (w.offset) inputs.sums.assign(rows * groups, 0.0f);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * w.group, count = std::min(w.group, w.in - begin);
      const float* from = x + row * w.in + begin;
      std::copy(from, from + count, &inputs.values[row * inputs.stride + g * padded]);
      if (w.offset) {
        float sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += from[i];
        inputs.sums[row * groups + g] = sum;
      }
    }
  }
  return inputs;
}

// Symmetric codes of eight bits, round(x · (1 / absmax · 127)) in this order, half to even: jquant.activations' codes.
// `block` inputs share a scale; block divides the group or the group the block.
template <int WIDTH>
Inputs rounded(const Weight& w, const float* x, int64_t rows, int64_t block) {
  Inputs inputs;
  const int64_t piece = std::min(block, w.group), padded = Parts<WIDTH>(w).padded;
  inputs.piece = piece == w.group ? padded : piece;
  inputs.stride = w.groups() * padded;
  const int64_t pieces = inputs.stride / inputs.piece;
  inputs.codes.assign(rows * inputs.stride, 0);
  inputs.scales.assign(rows * pieces, 0.0f);
  inputs.totals.assign(rows * pieces, 0);
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = x + row * w.in;
    for (int64_t begin = 0; begin < w.in; begin += block) {
      const int64_t end = std::min(begin + block, w.in);
      float largest = 0;
      for (int64_t i = begin; i < end; ++i) {
        largest = std::isnan(from[i]) ? from[i] : std::max(largest, std::fabs(from[i]));
        if (std::isnan(largest)) break;
      }
      const float inverse = std::min(1.0f / largest, 0x1p120f) * 127.0f;
      for (int64_t first = begin; first < end; first += piece) {
        const int64_t at = row * pieces + first / piece;
        int8_t* to = &inputs.codes[at * inputs.piece];
        int32_t total = 0;
        for (int64_t i = first; i < std::min(first + piece, end); ++i) {
          const float code = std::nearbyint(from[i] * inverse);
          to[i - first] = code >= -127.0f && code <= 127.0f ? (int8_t)code : 0;  // of NaN nothing is left but the scale
          total += to[i - first];
        }
        inputs.scales[at] = largest / 127.0f;
        inputs.totals[at] = total;
      }
    }
  }
  return inputs;
}

// The columns of a tile that exist.
inline void store_tile(const Weight& w, int64_t tile, const float* sums, float* y) {
  const int64_t count = std::min<int64_t>(TILE, w.out - tile * TILE);
  std::copy(sums, sums + count, y + tile * TILE);
}

// ROWS rows times one tile. Codes are decoded in registers, one operation or two each, and used at once.
template <int WIDTH, int ROWS>
void few_rows(const Weight& w, int64_t tile, const Inputs& inputs, int64_t row, float* y) {
  using L = Layout<WIDTH>;
  const Levels levels(w.levels);
  const Parts<WIDTH> parts(w);
  const int64_t groups = w.groups();
  float sums[ROWS][TILE];
  for (int pass = 0; pass < TILE; pass += PASS * LANES) {
    Floats total[ROWS][PASS] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t n = tile * groups + g;
      const float* x = &inputs.values[row * inputs.stride + g * parts.padded];
      Floats sum[ROWS][PASS] = {};
      for (int64_t unit = 0; unit < parts.units; ++unit) {
#pragma GCC unroll 8
        for (int c = 0; c < PASS; ++c) {
          Words word[L::WORDS];
          parts.load_unit(word, n * parts.units + unit, pass + c * LANES);
#pragma GCC unroll 32
          for (int i = 0; i < L::CODES; ++i) {
            const Floats value = L::level(word, i, levels);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) sum[r][c] += value * x[r * inputs.stride + unit * L::CODES + i];
          }
        }
      }
#pragma GCC unroll 8
      for (int c = 0; c < PASS; ++c) {
        const Floats scale = parts.scale(n, pass + c * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          const float in_group = w.offset ? inputs.sums[(row + r) * groups + g] : 0.0f;
          total[r][c] += parts.scaled(n, pass + c * LANES, scale, sum[r][c], in_group);
        }
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      for (int c = 0; c < PASS; ++c) store(&sums[r][pass + c * LANES], total[r][c]);
    }
  }
  for (int r = 0; r < ROWS; ++r) store_tile(w, tile, sums[r], y + (row + r) * w.out);
}

// The values of `count` inputs' weights from input `begin` (of the padded order) on, `[count, TILE]`.
template <int WIDTH>
void decode(const Weight& w, int64_t tile, int64_t begin, int64_t count, float* panel) {
  using L = Layout<WIDTH>;
  const Levels levels(w.levels);
  const Parts<WIDTH> parts(w);
  for (int64_t first = 0; first < count; first += L::CODES) {
    const int64_t n = tile * w.groups() + (begin + first) / parts.padded;
    const int64_t unit = n * parts.units + (begin + first) % parts.padded / L::CODES;
    for (int column = 0; column < TILE; column += LANES) {
      Words word[L::WORDS];
      parts.load_unit(word, unit, column);
      const Floats scale = parts.scale(n, column), offset = parts.scaled(n, column, scale, Floats{}, 1.0f);
#pragma GCC unroll 32
      for (int i = 0; i < L::CODES; ++i) {
        store(panel + (first + i) * TILE + column, L::level(word, i, levels) * scale + offset);
      }
    }
  }
}

// sums `[ROWS, TILE]` += x `[ROWS, depth]` @ panel `[depth, TILE]`.
template <int ROWS>
void add_product(const float* x, int64_t stride, const float* panel, int64_t depth, float* sums) {
  for (int pass = 0; pass < TILE; pass += PASS * LANES) {
    Floats sum[ROWS][PASS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < PASS; ++c) sum[r][c] = load<Floats>(sums + r * TILE + pass + c * LANES);
    }
    for (int64_t i = 0; i < depth; ++i) {
      Floats value[PASS];
#pragma GCC unroll 8
      for (int c = 0; c < PASS; ++c) value[c] = load<Floats>(panel + i * TILE + pass + c * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < PASS; ++c) sum[r][c] += value[c] * x[r * stride + i];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < PASS; ++c) store(sums + r * TILE + pass + c * LANES, sum[r][c]);
    }
  }
}

// Many rows times one tile: a panel of the tile is decoded once and multiplied by all rows.
template <int WIDTH>
void many_rows(const Weight& w, int64_t tile, const Inputs& inputs, int64_t row, int64_t rows, float* y) {
  std::vector<float> panel(DEPTH * TILE), sums(rows * TILE, 0.0f);
  for (int64_t begin = 0; begin < inputs.stride; begin += DEPTH) {
    const int64_t depth = std::min(DEPTH, inputs.stride - begin);
    decode<WIDTH>(w, tile, begin, depth, panel.data());
    const float* x = &inputs.values[row * inputs.stride + begin];
    int64_t r = 0;
    for (; r + MANY <= rows; r += MANY) {
      add_product<MANY>(x + r * inputs.stride, inputs.stride, panel.data(), depth, &sums[r * TILE]);
    }
    for (; r < rows; ++r) add_product<1>(x + r * inputs.stride, inputs.stride, panel.data(), depth, &sums[r * TILE]);
  }
  for (int64_t r = 0; r < rows; ++r) store_tile(w, tile, &sums[r * TILE], y + (row + r) * w.out);
}

// ROWS rows of rounded inputs times one tile, in integers within a piece.
template <int WIDTH, int ROWS>
void rounded_rows(const Weight& w, int64_t tile, const Inputs& inputs, int64_t row, float* y) {
  using L = Layout<WIDTH>;
  const Parts<WIDTH> parts(w);
  const int64_t groups = w.groups(), units = inputs.piece / L::CODES, pieces = parts.units / units;  // of a group
  float sums[ROWS][TILE];
  for (int pass = 0; pass < TILE; pass += PASS * LANES) {
    Floats total[ROWS][PASS] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t n = tile * groups + g;
      Floats in_group[ROWS][PASS] = {};
      float of_inputs[ROWS] = {};
      for (int64_t p = 0; p < pieces; ++p) {
        const int64_t piece = g * pieces + p, unit = n * parts.units + p * units;
        const int8_t* codes = &inputs.codes[row * inputs.stride + piece * inputs.piece];
        Ints sum[ROWS][PASS] = {};
        for (int64_t u = 0; u < units; ++u) {
#pragma GCC unroll 8
          for (int c = 0; c < PASS; ++c) {
            Words word[L::WORDS];
            parts.load_unit(word, unit + u, pass + c * LANES);
#pragma GCC unroll 8
            for (int k = 0; k < L::CODES / 4; ++k) {
              const Words four = L::four(word, k);
#pragma GCC unroll 8
              for (int r = 0; r < ROWS; ++r) {
                int32_t inputs_of_four;
                std::memcpy(&inputs_of_four, codes + r * inputs.stride + u * L::CODES + 4 * k, 4);
                sum[r][c] = dot4(sum[r][c], four, inputs_of_four);
              }
            }
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          const int64_t at = (row + r) * groups * pieces + piece;
          const float scale = inputs.scales[at];
          of_inputs[r] += scale * (float)inputs.totals[at];
#pragma GCC unroll 8
          for (int c = 0; c < PASS; ++c) in_group[r][c] += floats(sum[r][c] - w.centre * inputs.totals[at]) * scale;
        }
      }
#pragma GCC unroll 8
      for (int c = 0; c < PASS; ++c) {
        const Floats scale = parts.scale(n, pass + c * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          total[r][c] += parts.scaled(n, pass + c * LANES, scale, in_group[r][c], of_inputs[r]);
        }
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      for (int c = 0; c < PASS; ++c) store(&sums[r][pass + c * LANES], total[r][c]);
    }
  }
  for (int r = 0; r < ROWS; ++r) store_tile(w, tile, sums[r], y + (row + r) * w.out);
}

// y [rows, out] = x [rows, in] @ w, x rounded first if `block` is not 0. `each(tasks, f)` runs f(0) … f(tasks − 1), in
// any order and on any threads.
template <int WIDTH, typename Each>
void product(const Weight& w, const float* x, int64_t rows, int64_t block, float* y, const Each& each) {
  const int64_t tiles = w.tiles();
  if (block) {
    const Inputs inputs = rounded<WIDTH>(w, x, rows, block);
    const int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    each(tiles * blocks, [&](int64_t task) {
      const int64_t tile = task / blocks, first = task % blocks * BLOCK_ROWS, end = std::min(first + BLOCK_ROWS, rows);
      int64_t row = first;
      for (; row + FEW <= end; row += FEW) rounded_rows<WIDTH, FEW>(w, tile, inputs, row, y);
      for (; row < end; ++row) rounded_rows<WIDTH, 1>(w, tile, inputs, row, y);
    });
    return;
  }
  const Inputs inputs = spread<WIDTH>(w, x, rows);
  if (rows <= FEW) {
    each(tiles, [&](int64_t tile) {
      if (rows == FEW) return few_rows<WIDTH, FEW>(w, tile, inputs, 0, y);
      for (int64_t row = 0; row < rows; ++row) few_rows<WIDTH, 1>(w, tile, inputs, row, y);
    });
    return;
  }
  const int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  each(tiles * blocks, [&](int64_t task) {
    const int64_t first = task % blocks * BLOCK_ROWS;
    many_rows<WIDTH>(w, task / blocks, inputs, first, std::min(BLOCK_ROWS, rows - first), y);
  });
}

template <typename Each>
void product(int64_t width, const Weight& w, const float* x, int64_t rows, int64_t block, float* y, const Each& each) {
  switch (width) {
    case 2: return product<2>(w, x, rows, block, y, each);
    case 3: return product<3>(w, x, rows, block, y, each);
    case 4: return product<4>(w, x, rows, block, y, each);
    default: return product<8>(w, x, rows, block, y, each);
  }
}

}  // namespace jquant
