// The parts of a LayerNorm that its fused forms share.
#pragma once
#include <cmath>
#include <type_traits>
#include <utility>

#include "columns.h"
#include "philox.h"
#include "simd.h"

namespace stopgo {

// Scratch of a row in float32 and its dropout decisions behind it.
inline int64_t row_floats(int64_t width) {
  return whole_vectors(width) + (Decisions::size(width, row_tile(width)) + 3) / 4;
}

struct Moments {
  float mean, rstd;
};

// Of a row whose sum is `total`: the mean first, then the squares of what is left, so that a large mean costs no
// digits. The mean is taken off the row.
STOPGO_INLINE Moments center(float* row, int64_t width, float total, float eps) {
  const float mean = total / static_cast<float>(width);
  Floats even{}, odd{};
  for_vectors(width, [&](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
    const Floats off = only(load(row + c) - mean, lanes);
    store(row + c, off);
    even += off * off;
    std::swap(even, odd);
  });
  const float variance = sum(even + odd) / static_cast<float>(width);
  return {mean, 1.0f / std::sqrt(variance + eps)};
}

// y = row rstd weight + shift of a row without its mean; then(column, y, lanes) stores it.
template <class Then>
STOPGO_INLINE void normalise(const float* row, int64_t width, float rstd, const float* weight, const float* shift,
                             Then&& then) {
  for_vectors(width, [&](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
    then(c, load(row + c) * rstd * load(weight + c) + load(shift + c), lanes);
  });
}

// What the gradient of one row needs besides its values. With n = (z - mean) rstd and g = dy weight:
// dz = rstd (g - mean(g) - n mean(g n)).
struct RowGradient {
  float rstd, mean_g, mean_gn;  // the means times rstd

  STOPGO_INLINE Floats dz(Floats g, Floats n) const { return g * rstd - (n * mean_gn + mean_g); }
};

// z(column, lanes) is the sum before the norm, dy(column, lanes) the gradient after it. n goes to normal[0:width].
template <class Sum, class Upstream>
STOPGO_INLINE RowGradient row_gradient(int64_t width, float mean, float rstd, const float* weight, float* normal,
                                       Sum&& z, Upstream&& dy) {
  Floats sum_g{}, sum_gn{};
  for_vectors(width, [&](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
    const Floats n = (z(c, lanes) - mean) * rstd, g = dy(c, lanes) * load(weight + c);
    store(normal + c, n);
    sum_g += g;
    sum_gn += g * n;
  });
  const float share = rstd / static_cast<float>(width);
  return {rstd, sum(sum_g) * share, sum(sum_gn) * share};
}

// group(row, constant) for every group of rows of a chunk: kTogether of them, which share one trip to the column sums,
// then single ones.
constexpr int kTogether = 4;

// Scratch of a group: its rows one after the other, then their decisions.
inline int64_t group_floats(int64_t width) { return kTogether * row_floats(width); }

template <class Group>
STOPGO_INLINE void for_groups(int64_t first, int64_t last, Group&& group) {
  for (; first + kTogether <= last; first += kTogether) group(first, std::integral_constant<int, kTogether>{});
  for (; first < last; ++first) group(first, std::integral_constant<int, 1>{});
}

}  // namespace stopgo
