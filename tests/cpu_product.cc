// Products and attention of jquant/kernels/cpu beside sums in double, on arrays of exactly the size that they need, for the
// compiler's address and undefined-behaviour sanitizers. Prints the number of products; ends with 1 at the first error.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "attention.h"
#include "product.h"

namespace {

std::mt19937 generator(7);

int64_t whole(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
float normal() { return std::normal_distribution<float>()(generator); }

// On the heap and of this size alone: a vector's spare room would hide a read beyond its end.
template <typename T>
std::unique_ptr<T[]> array(int64_t size) {
  return std::unique_ptr<T[]>(new T[size]);
}

// A random value of a kind, written as element `i`.
double write(uint8_t* to, int kind, int64_t i) {
  if (kind == jquant::FLOAT32) {
    const float value = normal();
    std::memcpy(to + 4 * i, &value, 4);
    return value;
  }
  if (kind == jquant::INT8) return static_cast<int8_t>(to[i] = static_cast<uint8_t>(generator()));
  // float16 from its fields: signs, subnormal values and all but the largest exponents.
  const int sign = static_cast<int>(whole(0, 1)), exponent = static_cast<int>(whole(0, 16)), fraction = static_cast<int>(whole(0, 1023));
  const uint16_t half = static_cast<uint16_t>(sign << 15 | exponent << 10 | fraction);
  std::memcpy(to + 2 * i, &half, 2);
  return (sign ? -1 : 1) * std::ldexp(exponent ? 1024 + fraction : fraction, std::max(exponent, 1) - 25);
}

// Bit `b` of the code of a unit's input `i` is bit `at` of word `word`.
struct Place {
  int word, at;
};

Place place(int width, int i, int b) {
  if (width == 3 && b == 2) return {2, 8 * (i % 4) + i / 4};
  if (width == 3) return {i / 16, 8 * (i % 4) + 2 * (i % 16 / 4) + b};
  return {0, 8 * (i % 4) + width * (i / 4) + b};
}

bool check(int width, int64_t in, int64_t out, int64_t group, int64_t rows, int64_t block) {
  const int64_t codes = width == 3 ? 32 : 32 / width, words = width == 3 ? 3 : 1, tile = jquant::TILE;
  const int64_t groups = (in + group - 1) / group, units = (group + codes - 1) / codes, tiles = (out + tile - 1) / tile;
  const int scale_kind = static_cast<int>(whole(1, 2)), offset_kind = static_cast<int>(whole(0, 3));
  const int64_t blocks = tiles * groups, scales = blocks * units * words * tile * 4,
                offsets = scales + blocks * tile * jquant::bytes_of(scale_kind),
                bytes = offsets + blocks * tile * jquant::bytes_of(offset_kind);
  auto data = array<uint8_t>(bytes);
  auto levels = array<float>(16), x = array<float>(rows * in), y = array<float>(rows * out);
  std::vector<double> scale(blocks * tile), offset(blocks * tile);
  for (int64_t i = 0; i < bytes; ++i) data[i] = static_cast<uint8_t>(generator());
  for (int64_t i = 0; i < blocks * tile; ++i) {
    scale[i] = write(&data[scales], scale_kind, i);
    offset[i] = offset_kind ? write(&data[0] + offsets, offset_kind, i) : 0;
    if (offset_kind == jquant::INT8) offset[i] *= -scale[i];
  }
  const auto word = [&](int64_t r, int64_t unit, int number, int64_t column) {
    uint32_t value;
    std::memcpy(&value, &data[(((r * units + unit) * words + number) * tile + column) * 4], 4);
    return value;
  };
  const int centre = width == 8 ? 128 : 1 << (width - 1);
  for (int i = 0; i < 16; ++i) levels[i] = static_cast<float>(i % (1 << std::min(width, 4)) - centre);
  for (int64_t i = 0; i < rows * in; ++i) x[i] = normal();
  const jquant::Weight weight{data.get(), levels.get(), in, out, group, centre, scale_kind, offset_kind};
  jquant::product(width, weight, x.get(), rows, block, y.get(), [](int64_t tasks, const auto& f) {
    for (int64_t task = tasks; task-- > 0;) f(task);
  });
  std::vector<double> value(in * out), input(in);
  for (int64_t i = 0; i < in; ++i) {
    for (int64_t column = 0; column < out; ++column) {
      const int64_t n = column / tile * groups + i / group, c = column % tile;
      int code = 0;
      for (int b = 0; b < width; ++b) {
        const Place p = place(width, static_cast<int>(i % group % codes), b);
        code |= static_cast<int>(word(n, i % group / codes, p.word, c) >> p.at & 1u) << b;
      }
      const int level = width == 8 ? static_cast<int8_t>(code) : code - centre;
      value[i * out + column] = scale[n * tile + c] * level + offset[n * tile + c];
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < in; ++i) {
      const float* all = &x[row * in];
      input[i] = all[i];
      if (block) {
        const int64_t begin = i / block * block;
        float largest = 0;
        for (int64_t j = begin; j < std::min(begin + block, in); ++j) largest = std::max(largest, std::fabs(all[j]));
        input[i] = std::nearbyint(all[i] * (1.0f / largest * 127.0f)) * (largest / 127.0f);
      }
    }
    for (int64_t column = 0; column < out; ++column) {
      double wanted = 0, size = 0;
      for (int64_t i = 0; i < in; ++i) {
        wanted += value[i * out + column] * input[i];
        size += std::fabs(value[i * out + column] * input[i]);
      }
      if (!(std::fabs(y[row * out + column] - wanted) <= 2e-6 * size + 1e-6)) {
        std::printf("width %d, %ld x %ld, group %ld, %ld rows, block %ld: %g, not %g\n", width, long(in), long(out),
                    long(group), long(rows), long(block), y[row * out + column], wanted);
        return false;
      }
    }
  }
  return true;
}

bool check_attention(int64_t length, int64_t slots, int64_t group, int64_t d) {
  auto q = array<float>(group * d), k = array<float>(slots * d), v = array<float>(slots * d), out = array<float>(group * d);
  for (int64_t i = 0; i < group * d; ++i) q[i] = 3 * normal();
  for (int64_t i = 0; i < slots * d; ++i) k[i] = normal(), v[i] = normal();
  jquant::attend(q.get(), k.get(), v.get(), length, group, d, out.get());
  for (int64_t head = 0; head < group; ++head) {
    std::vector<double> weight(length);
    double total = 0;
    for (int64_t s = 0; s < length; ++s) {
      double score = 0;
      for (int64_t c = 0; c < d; ++c) score += double(q[head * d + c]) * k[s * d + c];
      total += weight[s] = std::exp(score / std::sqrt(double(d)));
    }
    for (int64_t c = 0; c < d; ++c) {
      double wanted = 0;
      for (int64_t s = 0; s < length; ++s) wanted += weight[s] / total * v[s * d + c];
      if (!(std::fabs(out[head * d + c] - wanted) <= 1e-5)) {
        std::printf("attention, length %ld, group %ld, d %ld: %g, not %g\n", long(length), long(group), long(d),
                    out[head * d + c], wanted);
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  for (int64_t d : {16, 48, 64, 128}) {
    for (int64_t length : {int64_t(1), int64_t(15), int64_t(64), whole(65, 300)}) {
      if (!check_attention(length, length, whole(1, 5), d)) return 1;
    }
  }
  int products = 0;
  for (int width : {2, 3, 4, 8}) {
    const int64_t codes = width == 3 ? 32 : 32 / width;
    for (int64_t group : {codes, int64_t(64), int64_t(577)}) {
      for (int64_t out : {int64_t(1), int64_t(64), whole(65, 130)}) {
        for (int64_t rows : {int64_t(1), int64_t(4), whole(5, 16), jquant::BLOCK_ROWS + 1}) {
          const int64_t in = rows > 16 ? whole(1, 70) : group == 577 ? 577 : whole(1, 300);
          const int64_t g = std::min(group, in);
          if (!check(width, in, out, g, rows, 0)) return 1;
          const int64_t all = (in + g - 1) / g * g;
          const int64_t block = whole(0, 1) && g % (2 * codes) == 0 ? g / 2 : whole(0, 1) ? g : all;
          if (!check(width, in, out, g, rows, block)) return 1;
          products += 2;
        }
      }
    }
  }
  std::printf("%d products\n", products);
}
