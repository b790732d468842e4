// From rows of a tensor to the operands of gemm.h and back, and from one operand to its transpose.
//
// Two forms of a matrix [rows][width]:
//   by rows   [rows][depth of width]    left operand of a sum over columns; its transpose is a right one
//   by depth  [depth of rows][columns]  right operand of a sum over rows
// With pairs of bfloat16, "by depth" joins two rows; and its columns, so those of its products too, stand in another
// order: of each 32, the even ones first, then the odd ones. That takes no shuffle on the way in, and one on the way
// out.
#pragma once
#include "gemm.h"

namespace stopgo {

// Rows of a tensor: `stride` elements apart; T const where they are only read.
template <class T>
struct Rows {
  T* at;
  int64_t stride;

  T* row(int64_t r) const { return at + r * stride; }
  Rows from(int64_t r) const { return {row(r), stride}; }
};

constexpr Units kNowhere = {nullptr, 0};

// Zeros in the rows first to end, in as many columns; where either is empty, nothing.
inline void zero_rows(Units out, int64_t first, int64_t end, int64_t columns) {
  for (int64_t r = first; r < end; ++r) {
    uint32_t* to = out.row(r);
    for_vectors(columns, [=](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA { raw_store(to + c, Words{}, lanes); });
  }
}

// The next head's values stand right behind this one's, and its turn is next: into the second cache with them.
STOPGO_INLINE void ask_for(const void* at) { __builtin_prefetch(at, 0, 2); }
STOPGO_INLINE void ask_for_writing(const void* at) { __builtin_prefetch(at, 1, 2); }

// What depends on how many values a unit holds.
template <int64_t kPerUnit>
struct Layout;

template <>
struct Layout<1> {
  // Columns of a matrix by depth, and of its products.
  static constexpr int64_t columns(int64_t width) { return round_up(width, kPad); }

  // x [rows][width] in the forms that are wanted; a row's units beyond its depth are not written.
  template <class T>
  static void pack(Rows<const T> x, int64_t rows, int64_t width, Units by_rows, Units by_depth) {
    for (const Units out : {by_rows, by_depth}) {
      if (out.at == nullptr) continue;
      for (int64_t r = 0; r < rows; ++r) {
        const T* from = x.row(r);
        uint32_t* to = out.row(r);
        for_vectors(width, [=](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
          ask_for(from + c + width);
          raw_store(to + c, bits_as<Words>(load(from + c, lanes)), lanes);
        });
      }
    }
  }

  // Part of a row of a product with a matrix by depth, times f. `next`: how far behind it the next head's values go.
  template <class T>
  static STOPGO_INLINE void unpack(const float* sums, float f, int64_t width, T* to, int64_t next) {
    for_vectors(width, [=](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
      ask_for_writing(to + c + next);
      store(to + c, load(sums + c) * f, lanes);
    });
  }

  // Rows r (even) and r + 1 of kLanes columns, by depth and by rows.
  static STOPGO_INLINE void put_by_depth(Units out, int64_t r, int64_t column, Floats a, Floats b) {
    raw_store(out.row(r) + column, bits_as<Words>(a), Whole{});
    raw_store(out.row(r + 1) + column, bits_as<Words>(b), Whole{});
  }
  static STOPGO_INLINE void put_by_rows(Units out, int64_t r, int64_t column, Floats a, Floats b) {
    put_by_depth(out, r, column, a, b);
  }
};

#if defined(__AVX512BF16__)
template <>
struct Layout<2> {
  static constexpr int64_t columns(int64_t width) { return round_up(width, 2 * kPad); }

  static void pack(Rows<const BFloat16> x, int64_t rows, int64_t width, Units by_rows, Units by_depth) {
    for (int64_t r = 0; r < rows; r += 2) {
      const bool paired = r + 1 < rows;
      const BFloat16 *first = x.row(r), *second = x.row(r + paired);
      for (int64_t c = 0; c < width; c += 32) {
        const __mmask32 there = values_from(c, width);
        ask_for(first + c + width);
        ask_for(second + c + width);
        const Words a = bits_as<Words>(_mm512_maskz_loadu_epi16(there, first + c));
        const Words b = bits_as<Words>(_mm512_maskz_loadu_epi16(paired ? there : 0, second + c));
        if (by_rows.at != nullptr) {
          raw_store(by_rows.row(r) + c / 2, a, Whole{});
          if (paired) raw_store(by_rows.row(r + 1) + c / 2, b, Whole{});
        }
        if (by_depth.at != nullptr) {
          raw_store(by_depth.row(r / 2) + c, (a & 0xFFFFu) | (b << 16), Whole{});
          raw_store(by_depth.row(r / 2) + c + 16, (a >> 16) | (b & 0xFFFF0000u), Whole{});
        }
      }
    }
  }

  static STOPGO_INLINE void unpack(const float* sums, float f, int64_t width, BFloat16* to, int64_t next) {
    for (int64_t c = 0; c < width; c += 32) {
      ask_for_writing(to + c + next);
      const __m512i both = joined(load(sums + c) * f, load(sums + c + 16) * f);
      _mm512_mask_storeu_epi16(to + c, values_from(c, width), both);
    }
  }

  static STOPGO_INLINE void put_by_depth(Units out, int64_t r, int64_t column, Floats a, Floats b) {
    raw_store(out.row(r / 2) + column, joined(a, b), Whole{});
  }
  // Row r + 1 is written even where the matrix ends before.
  static STOPGO_INLINE void put_by_rows(Units out, int64_t r, int64_t column, Floats a, Floats b) {
    store(reinterpret_cast<BFloat16*>(out.row(r)) + column, a);
    store(reinterpret_cast<BFloat16*>(out.row(r + 1)) + column, b);
  }

  // Units of a bfloat16 of a in the low half and one of b in the high half.
  static STOPGO_INLINE __m512i joined(Floats a, Floats b) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, bits_as<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
  }

 private:
  static STOPGO_INLINE __mmask32 values_from(int64_t column, int64_t width) {
    return width - column >= 32 ? ~__mmask32{0} : (__mmask32{1} << (width - column)) - 1;
  }
};
#endif

namespace turning {

#if defined(__AVX512BW__)
typedef __m512i Wide;
STOPGO_INLINE Wide low_units(Wide a, Wide b) { return _mm512_unpacklo_epi32(a, b); }
STOPGO_INLINE Wide high_units(Wide a, Wide b) { return _mm512_unpackhi_epi32(a, b); }
STOPGO_INLINE Wide low_pairs(Wide a, Wide b) { return _mm512_unpacklo_epi64(a, b); }
STOPGO_INLINE Wide high_pairs(Wide a, Wide b) { return _mm512_unpackhi_epi64(a, b); }
#elif defined(__AVX2__)
typedef __m256i Wide;
STOPGO_INLINE Wide low_units(Wide a, Wide b) { return _mm256_unpacklo_epi32(a, b); }
STOPGO_INLINE Wide high_units(Wide a, Wide b) { return _mm256_unpackhi_epi32(a, b); }
STOPGO_INLINE Wide low_pairs(Wide a, Wide b) { return _mm256_unpacklo_epi64(a, b); }
STOPGO_INLINE Wide high_pairs(Wide a, Wide b) { return _mm256_unpackhi_epi64(a, b); }
#elif defined(__SSE2__)
typedef __m128i Wide;
STOPGO_INLINE Wide low_units(Wide a, Wide b) { return _mm_unpacklo_epi32(a, b); }
STOPGO_INLINE Wide high_units(Wide a, Wide b) { return _mm_unpackhi_epi32(a, b); }
STOPGO_INLINE Wide low_pairs(Wide a, Wide b) { return _mm_unpacklo_epi64(a, b); }
STOPGO_INLINE Wide high_pairs(Wide a, Wide b) { return _mm_unpackhi_epi64(a, b); }
#endif

#if defined(__SSE2__)
STOPGO_INLINE __m128i four_units(const uint32_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }

// Four units of the rows 0, 4, 8 and so on, a quarter of the vector each.
STOPGO_INLINE Wide quarters(const uint32_t* in, [[maybe_unused]] int64_t ld) {
#if defined(__AVX512BW__)
  Wide v = _mm512_castsi128_si512(four_units(in));
  v = _mm512_inserti32x4(v, four_units(in + 4 * ld), 1);
  v = _mm512_inserti32x4(v, four_units(in + 8 * ld), 2);
  return _mm512_inserti32x4(v, four_units(in + 12 * ld), 3);
#elif defined(__AVX2__)
  return _mm256_inserti128_si256(_mm256_castsi128_si256(four_units(in)), four_units(in + 4 * ld), 1);
#else
  return four_units(in);
#endif
}

// out[c][r] = in[r][c] for kLanes rows and four columns.
STOPGO_INLINE void turn_four_columns(const uint32_t* in, int64_t in_ld, uint32_t* out, int64_t out_ld) {
  const Wide row0 = quarters(in, in_ld), row1 = quarters(in + in_ld, in_ld);
  const Wide row2 = quarters(in + 2 * in_ld, in_ld), row3 = quarters(in + 3 * in_ld, in_ld);
  const Wide a = low_units(row0, row1), b = high_units(row0, row1);
  const Wide c = low_units(row2, row3), d = high_units(row2, row3);
  raw_store(out, low_pairs(a, c), Whole{});
  raw_store(out + out_ld, high_pairs(a, c), Whole{});
  raw_store(out + 2 * out_ld, low_pairs(b, d), Whole{});
  raw_store(out + 3 * out_ld, high_pairs(b, d), Whole{});
}
#endif

}  // namespace turning

// out [columns][rows] = the transpose of in [rows][columns]; both are turned up to the next multiple of kPad.
inline void transpose(Units in, int64_t rows, int64_t columns, Units out) {
#if defined(__SSE2__)
  for (int64_t r = 0; r < round_up(rows, kPad); r += kLanes)
    for (int64_t c = 0; c < round_up(columns, kPad); c += 4)
      turning::turn_four_columns(in.row(r) + c, in.ld, out.row(c) + r, out.ld);
#else
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) out.row(c)[r] = in.row(r)[c];
#endif
}

}  // namespace stopgo
