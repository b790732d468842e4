// Counter-based dropout: its masks, and element-wise dropout of a matrix.
#include "parallel.h"
#include "philox.h"
#include "stopgo.h"

namespace stopgo {
namespace {

template <class T>
void dropout(const Site& site, int64_t rows, int64_t width, const T* x, const int64_t* row_key,
             const int64_t* row_index, T* y) {
  if (site.threshold == 0) {
    if (rows > 0 && y != x) std::memcpy(y, x, static_cast<size_t>(rows * width) * sizeof(T));
    return;
  }
  const float scale = site.scale();
  const int64_t tile = row_tile(width);
  for_chunks(rows, width, [=](int64_t, int64_t first, int64_t last) {
    const Decisions keep(own_scratch().get<uint8_t>(Decisions::size(width, tile)));
    for (int64_t r = first; r < last; ++r) {
      keep.draw(site, row_key[r], row_index[r], width, tile);
      const T* from = x + r * width;
      T* to = y + r * width;
      for_vectors(width, [=](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
        store(to + c, keep.scaled(c, load(from + c, lanes), scale), lanes);
      });
    }
  });
}

void keep_mask(const Site& site, const int64_t* row_key, const int64_t* row_index, int64_t rows, int64_t width,
               int64_t tile, uint8_t* out) {
  for_chunks(rows, width, [=](int64_t, int64_t first, int64_t last) {
    const Decisions keep(own_scratch().get<uint8_t>(Decisions::size(width, tile)));
    for (int64_t r = first; r < last; ++r) {
      keep.draw(site, row_key[r], row_index[r], width, tile);
      uint8_t* row = out + r * width;
      for_vectors(width, [=](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA { raw_store(row + c, keep.bytes(c), lanes); });
    }
  });
}

}  // namespace
}  // namespace stopgo

using namespace stopgo;

extern "C" {

void stopgo_keep_mask(uint32_t seed, uint32_t step, uint32_t site, uint32_t threshold, const int64_t* row_key,
                      const int64_t* row_index, int64_t rows, int64_t width, int64_t tile, uint8_t* out) {
  keep_mask({seed, step, site, threshold}, row_key, row_index, rows, width, tile, out);
}

void stopgo_dropout(int32_t dtype, int64_t rows, int64_t width, const void* x, const int64_t* row_key,
                    const int64_t* row_index, uint32_t seed, uint32_t step, uint32_t site, uint32_t threshold,
                    void* y) {
  with_dtype(dtype, [=](auto zero) {
    using T = decltype(zero);
    dropout({seed, step, site, threshold}, rows, width, static_cast<const T*>(x), row_key, row_index,
            static_cast<T*>(y));
  });
}

}  // extern "C"
