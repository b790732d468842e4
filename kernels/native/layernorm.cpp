// y = LayerNorm(dropout(x + bias) + residual) * weight + shift, forward and backward, a row at a time.
#include "columns.h"
#include "layernorm.h"
#include "parallel.h"
#include "philox.h"
#include "stopgo.h"

namespace stopgo {
namespace {

// x + bias, dropped out, + residual.
template <bool kDrop, class T, class Lanes>
STOPGO_INLINE Floats summed(const T* x, const float* bias, const T* residual, Decisions keep, float scale, int64_t c,
                            Lanes lanes) {
  const Floats z = load(x + c, lanes) + load(bias + c), r = load(residual + c, lanes);
  return kDrop ? keep.scaled(c, z, scale, r) : z + r;
}

template <class T>
struct Forward {
  Site site;
  int64_t rows, width;
  const T *x, *bias, *residual, *weight, *shift;
  const int64_t *row_key, *row_index;
  float eps;
  T* y;
  float *mean, *rstd;

  template <bool kDrop>
  void run() const {
    const int64_t padded = whole_vectors(width);
    float* b = call_scratch().get<float>(3 * padded);
    float *w = b + padded, *s = w + padded;
    convert(bias, width, b);
    convert(weight, width, w);
    convert(shift, width, s);
    const float scale = site.scale();
    const int64_t tile = row_tile(width);
    for_chunks(rows, width, [=](int64_t, int64_t first, int64_t last) {
      float* row = own_scratch().get<float>(row_floats(width));
      const Decisions keep(reinterpret_cast<uint8_t*>(row + padded));
      for (int64_t r = first; r < last; ++r) {
        if (kDrop) keep.draw(site, row_key[r], row_index[r], width, tile);
        const T *x_row = x + r * width, *residual_row = residual + r * width;
        T* y_row = y + r * width;
        Floats even{}, odd{};
        for_vectors(width, [&](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
          const Floats z = summed<kDrop>(x_row, b, residual_row, keep, scale, c, lanes);
          store(row + c, z);
          even += z;
          std::swap(even, odd);
        });
        const Moments m = center(row, width, sum(even + odd), eps);
        normalise(row, width, m.rstd, w, s, [=](int64_t c, Floats value, auto lanes) STOPGO_INLINE_LAMBDA {
          store(y_row + c, value, lanes);
        });
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
  const T *dy, *x, *bias, *residual, *weight;
  const float *mean, *rstd;
  const int64_t *row_key, *row_index;
  T *dx, *dresidual, *dbias, *dweight, *dshift;

  enum Kind { kBias, kWeight, kShift, kKinds };

  template <bool kDrop>
  void run() const {
    const int64_t padded = whole_vectors(width);
    float* b = call_scratch().get<float>(2 * padded + ColumnSums::size(rows, kKinds, width));
    float* w = b + padded;
    convert(bias, width, b);
    convert(weight, width, w);
    const ColumnSums sums(w + padded, kKinds, width);
    for_chunks(rows, width, [=](int64_t chunk, int64_t first, int64_t last) {
      float* normal = own_scratch().get<float>(group_floats(width));
      float* chunk_sums = sums.start(chunk);
      for_groups(first, last, [=](int64_t r, auto count) { group<kDrop, count>(r, b, w, normal, chunk_sums); });
    });
    const int64_t chunks = chunks_of(rows);
    sums.finish_into(chunks, kBias, dbias);
    sums.finish_into(chunks, kWeight, dweight);
    sums.finish_into(chunks, kShift, dshift);
  }

  // Rows r .. r + kRows; normal: group_floats(width).
  template <bool kDrop, int kRows>
  void group(int64_t r, const float* b, const float* w, float* normal, float* chunk_sums) const {
    // Copies, since the compiler must take it that a store changes what `this` points to.
    const int64_t n = width, padded = whole_vectors(n);
    const T *x_rows = x + r * n, *residual_rows = residual + r * n, *dy_rows = dy + r * n;
    T *dx_rows = dx + r * n, *dresidual_rows = dresidual + r * n;
    const int64_t tile = row_tile(n), keep_size = Decisions::size(n, tile);
    const float scale = site.scale();
    uint8_t* keep = reinterpret_cast<uint8_t*>(normal + kRows * padded);
    RowGradient gradient[kRows];
    for (int i = 0; i < kRows; ++i) {
      const T *x_row = x_rows + i * n, *residual_row = residual_rows + i * n, *dy_row = dy_rows + i * n;
      const Decisions kept(keep + i * keep_size);
      if (kDrop) kept.draw(site, row_key[r + i], row_index[r + i], n, tile);
      gradient[i] = row_gradient(
          n, mean[r + i], rstd[r + i], w, normal + i * padded,
          [=](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
            return summed<kDrop>(x_row, b, residual_row, kept, scale, c, lanes);
          },
          [=](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA { return load(dy_row + c, lanes); });
    }
    float *bias_sums = chunk_sums + kBias * padded, *weight_sums = chunk_sums + kWeight * padded,
          *shift_sums = chunk_sums + kShift * padded;
    for_vectors(n, [=](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
      Floats db = load(bias_sums + c), dw = load(weight_sums + c), ds = load(shift_sums + c);
      const Floats weights = load(w + c);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const int64_t at = i * n + c, here = i * padded + c;
        const Floats normal_values = load(normal + here), d = load(dy_rows + at, lanes);
        const Floats dz = gradient[i].dz(d * weights, normal_values);
        const Floats dropped = kDrop ? Decisions(keep + i * keep_size).scaled(c, dz, scale) : dz;
        store(dresidual_rows + at, dz, lanes);
        store(dx_rows + at, dropped, lanes);
        db += dropped;
        dw += d * normal_values;
        ds += d;
      }
      store(bias_sums + c, db);
      store(weight_sums + c, dw);
      store(shift_sums + c, ds);
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

void stopgo_bias_dropout_residual_layernorm_forward(
    int32_t dtype, int64_t rows, int64_t width, const void* x, const void* bias, const void* residual,
    const void* weight, const void* shift, const int64_t* row_key, const int64_t* row_index, uint32_t seed,
    uint32_t step, uint32_t site, uint32_t threshold, float eps, void* y, float* mean, float* rstd) {
  with_dtype(dtype, [=](auto zero) {
    using T = decltype(zero);
    const auto in = [](const void* p) { return static_cast<const T*>(p); };
    run(Forward<T>{{seed, step, site, threshold}, rows, width, in(x), in(bias), in(residual), in(weight), in(shift),
                   row_key, row_index, eps, static_cast<T*>(y), mean, rstd});
  });
}

void stopgo_bias_dropout_residual_layernorm_backward(
    int32_t dtype, int64_t rows, int64_t width, const void* dy, const void* x, const void* bias, const void* residual,
    const void* weight, const float* mean, const float* rstd, const int64_t* row_key, const int64_t* row_index,
    uint32_t seed, uint32_t step, uint32_t site, uint32_t threshold, void* dx, void* dresidual, void* dbias,
    void* dweight, void* dshift) {
  with_dtype(dtype, [=](auto zero) {
    using T = decltype(zero);
    const auto in = [](const void* p) { return static_cast<const T*>(p); };
    const auto out = [](void* p) { return static_cast<T*>(p); };
    run(Backward<T>{{seed, step, site, threshold}, rows, width, in(dy), in(x), in(bias), in(residual), in(weight), mean,
                    rstd, row_key, row_index, out(dx), out(dresidual), out(dbias), out(dweight), out(dshift)});
  });
}

}  // extern "C"
