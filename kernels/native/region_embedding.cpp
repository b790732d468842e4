// y = dropout(LayerNorm(x + feature_bias + boxes location_weight^T + location_bias) * weight + shift), both directions.
#include "columns.h"
#include "layernorm.h"
#include "parallel.h"
#include "philox.h"
#include "stopgo.h"

namespace stopgo {
namespace {

constexpr int kSides = 5;  // values of a box

// What all rows share, in float32: both biases as one, and the location weight turned to [kSides, width].
struct Shared {
  const float *bias, *location, *weight, *shift;

  static int64_t size(int64_t width) { return (3 + kSides) * whole_vectors(width); }
};

template <class T>
Shared share(float* memory, int64_t width, const T* feature_bias, const T* location_weight, const T* location_bias,
             const T* weight, const T* shift) {
  const int64_t padded = whole_vectors(width);
  float *bias = memory, *location = bias + padded, *gain = location + kSides * padded, *offset = gain + padded;
  for_vectors(width, [=](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
    store(bias + c, load(feature_bias + c, lanes) + load(location_bias + c, lanes));
  });
  std::memset(location, 0, static_cast<size_t>(kSides * padded) * sizeof(float));
  for (int64_t c = 0; c < width; ++c)
    for (int k = 0; k < kSides; ++k) location[k * padded + c] = load_one(location_weight + c * kSides + k);
  convert(weight, width, gain);
  if (shift != nullptr) convert(shift, width, offset);
  return {bias, location, gain, offset};
}

struct Box {
  float side[kSides];
};

STOPGO_INLINE Box box_of(const float* boxes, int64_t row) {
  Box box;
  std::memcpy(box.side, boxes + row * kSides, sizeof box.side);
  return box;
}

// The sum before the norm.
template <class T, class Lanes>
STOPGO_INLINE Floats embedded(const T* x, const Shared& shared, int64_t padded, const Box& box, int64_t c,
                              Lanes lanes) {
  Floats z = load(x + c, lanes) + load(shared.bias + c);
  for (int k = 0; k < kSides; ++k) z += load(shared.location + k * padded + c) * box.side[k];
  return z;
}

template <class T>
struct Forward {
  Site site;
  int64_t rows, width;
  const T *x, *feature_bias;
  const float* boxes;
  const T *location_weight, *location_bias, *weight, *shift;
  const int64_t *row_key, *row_index;
  float eps;
  T* y;
  float *mean, *rstd;

  template <bool kDrop>
  void run() const {
    const int64_t padded = whole_vectors(width);
    const Shared shared = share(call_scratch().get<float>(Shared::size(width)), width, feature_bias, location_weight,
                                location_bias, weight, shift);
    const float scale = site.scale();
    const int64_t tile = row_tile(width);
    for_chunks(rows, width, [=](int64_t, int64_t first, int64_t last) {
      float* row = own_scratch().get<float>(row_floats(width));
      const Decisions keep(reinterpret_cast<uint8_t*>(row + padded));
      for (int64_t r = first; r < last; ++r) {
        if (kDrop) keep.draw(site, row_key[r], row_index[r], width, tile);
        const T* x_row = x + r * width;
        T* y_row = y + r * width;
        const Box box = box_of(boxes, r);
        Floats total{};
        for_vectors(width, [&](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
          const Floats z = embedded(x_row, shared, padded, box, c, lanes);
          store(row + c, z);
          total += z;
        });
        const Moments m = center(row, width, sum(total), eps);
        const auto put = [=](int64_t c, Floats value, auto lanes) STOPGO_INLINE_LAMBDA {
          store(y_row + c, kDrop ? keep.scaled(c, value, scale) : value, lanes);
        };
        normalise(row, width, m.rstd, shared.weight, shared.shift, put);
        if (mean != nullptr) mean[r] = m.mean;
        if (rstd != nullptr) rstd[r] = m.rstd;
      }
    });
  }
};

template <class T>
struct Backward {
  Site site;
  int64_t rows, width;
  const T *dy, *x, *feature_bias;
  const float* boxes;
  const T *location_weight, *location_bias, *weight;
  const float *mean, *rstd;
  const int64_t *row_key, *row_index;
  T *dx, *dfeature_bias, *dlocation_weight, *dweight, *dshift;

  enum Kind { kLocation, kBias = kSides, kWeight, kShift, kKinds };

  template <bool kDrop>
  void run() const {
    float* memory = call_scratch().get<float>(Shared::size(width) + ColumnSums::size(rows, kKinds, width));
    const Shared shared = share<T>(memory, width, feature_bias, location_weight, location_bias, weight, nullptr);
    const ColumnSums sums(memory + Shared::size(width), kKinds, width);
    for_chunks(rows, width, [=](int64_t chunk, int64_t first, int64_t last) {
      float* normal = own_scratch().get<float>(group_floats(width));
      float* chunk_sums = sums.start(chunk);
      for_groups(first, last, [=](int64_t r, auto count) { group<kDrop, count>(r, shared, normal, chunk_sums); });
    });
    const int64_t chunks = chunks_of(rows);
    for (int k = 0; k < kSides; ++k)
      sums.finish(chunks, kLocation + k, [=](int64_t c, Floats total, auto lanes) {
        for (int i = 0; i < count(lanes); ++i) store_one(dlocation_weight + (c + i) * kSides + k, total[i]);
      });
    sums.finish_into(chunks, kBias, dfeature_bias);
    sums.finish_into(chunks, kWeight, dweight);
    sums.finish_into(chunks, kShift, dshift);
  }

  // Rows r .. r + kRows; normal: group_floats(width).
  template <bool kDrop, int kRows>
  void group(int64_t r, const Shared shared, float* normal, float* chunk_sums) const {
    // Copies, since the compiler must take it that a store changes what `this` points to.
    const int64_t n = width, padded = whole_vectors(n), tile = row_tile(n), keep_size = Decisions::size(n, tile);
    const T *x_rows = x + r * n, *dy_rows = dy + r * n;
    T* dx_rows = dx + r * n;
    const float scale = site.scale();
    uint8_t* keep = reinterpret_cast<uint8_t*>(normal + kRows * padded);
    // The gradient after the norm: what dropout let through.
    const auto upstream = [=](int i, int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
      const Floats d = load(dy_rows + i * n + c, lanes);
      return kDrop ? Decisions(keep + i * keep_size).scaled(c, d, scale) : d;
    };
    RowGradient gradient[kRows];
    Box box[kRows];
    for (int i = 0; i < kRows; ++i) {
      if (kDrop) Decisions(keep + i * keep_size).draw(site, row_key[r + i], row_index[r + i], n, tile);
      const T* x_row = x_rows + i * n;
      const Box here = box[i] = box_of(boxes, r + i);
      gradient[i] = row_gradient(
          n, mean[r + i], rstd[r + i], shared.weight, normal + i * padded,
          [=](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA { return embedded(x_row, shared, padded, here, c, lanes); },
          [=](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA { return upstream(i, c, lanes); });
    }
    for_vectors(n, [=](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
      Floats total[kKinds];
      for (int kind = 0; kind < kKinds; ++kind) total[kind] = load(chunk_sums + kind * padded + c);
      const Floats weights = load(shared.weight + c);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const Floats normal_values = load(normal + i * padded + c), d = upstream(i, c, lanes);
        const Floats dz = gradient[i].dz(d * weights, normal_values);
        store(dx_rows + i * n + c, dz, lanes);
        for (int k = 0; k < kSides; ++k) total[kLocation + k] += dz * box[i].side[k];
        total[kBias] += dz;
        total[kWeight] += d * normal_values;
        total[kShift] += d;
      }
      for (int kind = 0; kind < kKinds; ++kind) store(chunk_sums + kind * padded + c, total[kind]);
    });
  }
};

template <class Op>
void run(const Op& op) {
  if (op.site.threshold != 0)
    op.template run<true>();
  else
    op.template run<false>();
}

}  // namespace
}  // namespace stopgo

using namespace stopgo;

extern "C" {

void stopgo_region_embedding_forward(
    int32_t dtype, int64_t rows, int64_t width, const void* x, const void* feature_bias, const float* boxes,
    const void* location_weight, const void* location_bias, const void* weight, const void* shift,
    const int64_t* row_key, const int64_t* row_index, uint32_t seed, uint32_t step, uint32_t site, uint32_t threshold,
    float eps, void* y, float* mean, float* rstd) {
  with_dtype(dtype, [=](auto zero) {
    using T = decltype(zero);
    const auto in = [](const void* p) { return static_cast<const T*>(p); };
    run(Forward<T>{{seed, step, site, threshold}, rows, width, in(x), in(feature_bias), boxes, in(location_weight),
                   in(location_bias), in(weight), in(shift), row_key, row_index, eps, static_cast<T*>(y), mean, rstd});
  });
}

void stopgo_region_embedding_backward(
    int32_t dtype, int64_t rows, int64_t width, const void* dy, const void* x, const void* feature_bias,
    const float* boxes, const void* location_weight, const void* location_bias, const void* weight, const float* mean,
    const float* rstd, const int64_t* row_key, const int64_t* row_index, uint32_t seed, uint32_t step, uint32_t site,
    uint32_t threshold, void* dx, void* dfeature_bias, void* dlocation_weight, void* dweight, void* dshift) {
  with_dtype(dtype, [=](auto zero) {
    using T = decltype(zero);
    const auto in = [](const void* p) { return static_cast<const T*>(p); };
    const auto out = [](void* p) { return static_cast<T*>(p); };
    run(Backward<T>{{seed, step, site, threshold}, rows, width, in(dy), in(x), in(feature_bias), boxes,
                    in(location_weight), in(location_bias), in(weight), mean, rstd, row_key, row_index, out(dx),
                    out(dfeature_bias), out(dlocation_weight), out(dweight), out(dshift)});
  });
}

}  // extern "C"
