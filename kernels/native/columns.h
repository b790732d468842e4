// Vectors along the columns: parameters converted once a call, and gradients summed over rows.
#pragma once
#include "parallel.h"
#include "simd.h"

namespace stopgo {

inline int64_t whole_vectors(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

// to[0:width] = from in float32, zeros up to whole vectors.
template <class T>
inline void convert(const T* from, int64_t width, float* to) {
  for_vectors(width, [=](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA { store(to + c, load(from + c, lanes)); });
}

// Column sums of chunks of rows, for each of `kinds` gradients: float32 [chunks, kinds, width in whole vectors].
class ColumnSums {
 public:
  ColumnSums(float* memory, int64_t kinds, int64_t width)
      : memory_(memory), width_(width), stride_(whole_vectors(width)), chunk_stride_(kinds * stride_) {}

  static int64_t size(int64_t rows, int64_t kinds, int64_t width) {
    return chunks_of(rows) * kinds * whole_vectors(width);
  }

  // The sums of one chunk, set to zero.
  float* start(int64_t chunk) const {
    float* sums = memory_ + chunk * chunk_stride_;
    std::memset(sums, 0, static_cast<size_t>(chunk_stride_) * sizeof(float));
    return sums;
  }

  // put(column, sum over all chunks in their order, lanes) for every vector of columns of one kind.
  template <class Put>
  void finish(int64_t chunks, int64_t kind, Put&& put) const {
    const float* sums = memory_ + kind * stride_;
    const int64_t chunk_stride = chunk_stride_;
    for_chunks(width_, chunks, kColumns, [=](int64_t, int64_t first, int64_t last) {
      for_vectors(last - first, [=](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
        Floats total{};
        for (int64_t chunk = 0; chunk < chunks; ++chunk) total += load(sums + chunk * chunk_stride + first + c);
        put(first + c, total, lanes);
      });
    });
  }

  template <class T>
  void finish_into(int64_t chunks, int64_t kind, T* out) const {
    finish(chunks, kind, [=](int64_t c, Floats total, auto lanes) STOPGO_INLINE_LAMBDA {
      store(out + c, total, lanes);
    });
  }

 private:
  static constexpr int64_t kColumns = 256;  // a task; whole vectors for every instruction set
  float* memory_;
  int64_t width_, stride_, chunk_stride_;
};

}  // namespace stopgo
