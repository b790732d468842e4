// Bias and erf-GELU: y = z Phi(z), z = x + bias; its gradient; and the column sums that a bias's gradient is.
#include "columns.h"
#include "gelu.h"
#include "parallel.h"
#include "stopgo.h"

namespace stopgo {
namespace {

template <class T>
void forward(int64_t rows, int64_t width, const T* x, const T* bias, T* y) {
  float* b = call_scratch().get<float>(whole_vectors(width));
  convert(bias, width, b);
  const auto& gelu = gelu_for(T{});
  for_chunks(rows, width, [=, &gelu](int64_t, int64_t first, int64_t last) {
    for (int64_t at = first * width; at < last * width; at += width)
      for_vectors(width, [=, &gelu](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
        store(y + at + c, gelu.y(load(x + at + c, lanes) + load(b + c)), lanes);
      });
  });
}

template <class T>
void backward(int64_t rows, int64_t width, const T* dy, const T* x, const T* bias, T* dx, T* dbias, T* y) {
  float* b = call_scratch().get<float>(whole_vectors(width) + ColumnSums::size(rows, 1, width));
  convert(bias, width, b);
  const ColumnSums sums(b + whole_vectors(width), 1, width);
  const auto& gelu = gelu_for(T{});
  for_chunks(rows, width, [=, &gelu](int64_t chunk, int64_t first, int64_t last) {
    float* db = sums.start(chunk);
    for (int64_t at = first * width; at < last * width; at += width)
      for_vectors(width, [=, &gelu](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
        const GeluAndSlope g = gelu.both(load(x + at + c, lanes) + load(b + c));
        const Floats dz = load(dy + at + c, lanes) * g.slope;
        store(dx + at + c, dz, lanes);
        store(db + c, load(db + c) + dz);
        if (y != nullptr) store(y + at + c, g.y, lanes);
      });
  });
  sums.finish_into(chunks_of(rows), 0, dbias);
}

template <class T>
void column_sums(int64_t rows, int64_t width, const T* x, int64_t x_stride, T* out) {
  const ColumnSums sums(call_scratch().get<float>(ColumnSums::size(rows, 1, width)), 1, width);
  for_chunks(rows, width, [=](int64_t chunk, int64_t first, int64_t last) {
    float* total = sums.start(chunk);
    for (int64_t r = first; r < last; ++r)
      for_vectors(width, [=](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
        store(total + c, load(total + c) + load(x + r * x_stride + c, lanes));
      });
  });
  sums.finish_into(chunks_of(rows), 0, out);
}

}  // namespace
}  // namespace stopgo

using namespace stopgo;

extern "C" {

void stopgo_bias_gelu_forward(int32_t dtype, int64_t rows, int64_t width, const void* x, const void* bias, void* y) {
  with_dtype(dtype, [=](auto zero) {
    using T = decltype(zero);
    forward(rows, width, static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(y));
  });
}

void stopgo_bias_gelu_backward(int32_t dtype, int64_t rows, int64_t width, const void* dy, const void* x,
                               const void* bias, void* dx, void* dbias, void* y) {
  with_dtype(dtype, [=](auto zero) {
    using T = decltype(zero);
    backward(rows, width, static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<const T*>(bias),
             static_cast<T*>(dx), static_cast<T*>(dbias), static_cast<T*>(y));
  });
}

void stopgo_column_sums(int32_t dtype, int64_t rows, int64_t width, const void* x, int64_t x_stride, void* out) {
  with_dtype(dtype, [=](auto zero) {
    using T = decltype(zero);
    column_sums(rows, width, static_cast<const T*>(x), x_stride, static_cast<T*>(out));
  });
}

}  // extern "C"
