// Transpose of a matrix of 16-bit values. oneDNN's AMX products read a transposed left operand at less than half their speed;
// turning it around first, in cache-line blocks, costs a tenth of what that loses.

#include <algorithm>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "stopgo.h"

namespace {

constexpr int64_t kRows = 32;     // 64 bytes of an output row: whole cache lines are written
constexpr int64_t kColumns = 64;  // output rows that one block touches

#if defined(__SSE2__)
// 8 x 8 values: out[c][r] = x[r][c].
inline void turn_8x8(const uint16_t* x, int64_t x_stride, uint16_t* out, int64_t out_stride) {
  __m128i a[8], b[8];
  for (int r = 0; r < 8; ++r) a[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + r * x_stride));
  for (int r = 0; r < 4; ++r) {
    b[2 * r] = _mm_unpacklo_epi16(a[2 * r], a[2 * r + 1]);
    b[2 * r + 1] = _mm_unpackhi_epi16(a[2 * r], a[2 * r + 1]);
  }
  for (int r = 0; r < 2; ++r) {
    a[4 * r] = _mm_unpacklo_epi32(b[4 * r], b[4 * r + 2]);
    a[4 * r + 1] = _mm_unpackhi_epi32(b[4 * r], b[4 * r + 2]);
    a[4 * r + 2] = _mm_unpacklo_epi32(b[4 * r + 1], b[4 * r + 3]);
    a[4 * r + 3] = _mm_unpackhi_epi32(b[4 * r + 1], b[4 * r + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    b[2 * c] = _mm_unpacklo_epi64(a[c], a[c + 4]);
    b[2 * c + 1] = _mm_unpackhi_epi64(a[c], a[c + 4]);
  }
  for (int c = 0; c < 8; ++c) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + c * out_stride), b[c]);
}
#endif

void turn_block(int64_t rows, int64_t columns, const uint16_t* x, int64_t x_stride, uint16_t* out, int64_t out_stride) {
  int64_t whole_columns = 0, whole_rows = 0;
#if defined(__SSE2__)
  whole_columns = columns / 8 * 8, whole_rows = rows / 8 * 8;
  for (int64_t c = 0; c < whole_columns; c += 8)
    for (int64_t r = 0; r < whole_rows; r += 8) turn_8x8(x + r * x_stride + c, x_stride, out + c * out_stride + r, out_stride);
#endif
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = c < whole_columns ? whole_rows : 0; r < rows; ++r) out[c * out_stride + r] = x[r * x_stride + c];
}

}  // namespace

extern "C" void stopgo_transpose(int64_t rows, int64_t columns, const void* x, int64_t x_stride, void* out) {
  const auto* from = static_cast<const uint16_t*>(x);
  auto* to = static_cast<uint16_t*>(out);
  const int64_t strips = (columns + kColumns - 1) / kColumns;
#pragma omp parallel for schedule(static) if (rows * columns > 65536)
  for (int64_t strip = 0; strip < strips; ++strip) {
    const int64_t first = strip * kColumns, n = std::min(kColumns, columns - first);
    for (int64_t row = 0; row < rows; row += kRows)
      turn_block(std::min(kRows, rows - row), n, from + row * x_stride + first, x_stride, to + first * rows + row, rows);
  }
}
