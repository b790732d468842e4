// Products of small matrices that lie in scratch memory: C = A B, C in float32. The inside of attention.
//
// A unit is 32 bits: one float32, or two bfloat16 that are neighbours along the sum. A is [rows][depth] of units,
// B [depth][columns] of units, C [rows][columns] of floats; `ld` is the distance of their rows. Math says how:
//   SingleMath  units of float32, any instruction set
//   PairMath    units of two bfloat16, AVX512-BF16
//   TileMath    units of two bfloat16, AMX
// The depth is what `depth_of` says: padded with zeros. Rows and columns are padded to the next multiple of kPad, with
// anything: A and B may be read that far, C may be overwritten that far.
#pragma once
#include "simd.h"

#if defined(STOPGO_AMX)
#include <cstdio>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace stopgo {

constexpr int64_t kPad = 16;

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The distance of rows in scratch: an odd number of cache lines, so that a column does not fall into few sets of the
// cache.
constexpr int64_t ld_of(int64_t columns) {
  const int64_t lines = round_up(columns, kPad) / kPad;
  return (lines + 1 - lines % 2) * kPad;
}

struct Units {
  uint32_t* at;
  int64_t ld;

  uint32_t* row(int64_t r) const { return at + r * ld; }
  Units from(int64_t row, int64_t column) const { return {at + row * ld + column, ld}; }
};

struct Sums {
  float* at;
  int64_t ld;

  float* row(int64_t r) const { return at + r * ld; }
  Sums from(int64_t row, int64_t column) const { return {at + row * ld + column, ld}; }
};

// Units that hold n values along the sum, and as many as Math wants there.
template <class Math>
constexpr int64_t units_of(int64_t n) {
  return (n + Math::kPerUnit - 1) / Math::kPerUnit;
}
template <class Math>
constexpr int64_t depth_of(int64_t n) {
  return round_up(units_of<Math>(n), Math::kDepth);
}

namespace gemm {

// --- Vectors: a block of C stays in registers, a unit of A is broadcast against vectors of B -------------------------

constexpr int kBlockRows = 6;
constexpr int kBlockVectors = kLanes == 16 ? 4 : 2;

template <class Math, int kRows, int kVectors>
inline void block(int64_t depth, const uint32_t* a, int64_t a_ld, const uint32_t* b, int64_t b_ld, float* c,
                  int64_t c_ld, bool add) {
  Floats sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = add ? load(c + r * c_ld + v * kLanes) : Floats{};
  for (int64_t k = 0; k < depth; ++k, b += b_ld) {
    Words right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) right[v] = raw_load<Words>(b + v * kLanes, Whole{});
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Words left = Words{} + a[r * a_ld + k];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Math::multiply_add(sum[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(c + r * c_ld + v * kLanes, sum[r][v]);
}

// The instance of `block` for what is left of rows and vectors.
template <class Math, int kRows, int kVectors>
inline void block_of(int64_t rows, int64_t vectors, int64_t depth, const uint32_t* a, int64_t a_ld, const uint32_t* b,
                     int64_t b_ld, float* c, int64_t c_ld, bool add) {
  if constexpr (kRows > 1) {
    if (rows < kRows)
      return block_of<Math, kRows - 1, kVectors>(rows, vectors, depth, a, a_ld, b, b_ld, c, c_ld, add);
  }
  if constexpr (kVectors > 1) {
    if (vectors < kVectors)
      return block_of<Math, kRows, kVectors - 1>(rows, vectors, depth, a, a_ld, b, b_ld, c, c_ld, add);
  }
  block<Math, kRows, kVectors>(depth, a, a_ld, b, b_ld, c, c_ld, add);
}

template <class Math>
void by_vectors(int64_t rows, int64_t columns, int64_t depth, Units a, Units b, Sums c, bool add) {
  const int64_t vectors = (columns + kLanes - 1) / kLanes;
  for (int64_t v = 0; v < vectors; v += kBlockVectors)  // outside: a panel of B stays in the nearest cache
    for (int64_t r = 0; r < rows; r += kBlockRows)
      block_of<Math, kBlockRows, kBlockVectors>(rows - r, vectors - v, depth, a.row(r), a.ld, b.at + v * kLanes, b.ld,
                                                c.row(r) + v * kLanes, c.ld, add);
}

}  // namespace gemm

struct SingleMath {
  static constexpr int64_t kPerUnit = 1, kDepth = 1, kStoreRows = 5 * gemm::kBlockRows;
  struct Session {};

  static STOPGO_INLINE Floats multiply_add(Floats sum, Words a, Words b) {
    return sum + bits_as<Floats>(a) * bits_as<Floats>(b);
  }
  static void product(int64_t rows, int64_t columns, int64_t depth, Units a, Units b, Sums c, bool add = false) {
    gemm::by_vectors<SingleMath>(rows, columns, depth, a, b, c, add);
  }
};

#if defined(__AVX512BF16__)
struct PairMath {
  static constexpr int64_t kPerUnit = 2, kDepth = 1, kStoreRows = 5 * gemm::kBlockRows;
  struct Session {};

  static STOPGO_INLINE Floats multiply_add(Floats sum, Words a, Words b) {
    return _mm512_dpbf16_ps(sum, bits_as<__m512bh>(a), bits_as<__m512bh>(b));
  }
  static void product(int64_t rows, int64_t columns, int64_t depth, Units a, Units b, Sums c, bool add = false) {
    gemm::by_vectors<PairMath>(rows, columns, depth, a, b, c, add);
  }
};
#endif

#if defined(STOPGO_AMX)
// Tiles of 16 rows of 64 bytes. Not on the stack: GCC would think that only the first bytes of it are read.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline constexpr TileConfig kTileConfig{};

struct TileMath {
  static constexpr int64_t kPerUnit = 2, kDepth = 16, kStoreRows = 32;

  // The tiles of one thread. Who used them before (oneDNN does) left other shapes behind; and tiles in use make every
  // switch of threads dearer.
  class Session {
   public:
    Session() {
      static const bool granted = request_tiles();
      if (!granted) {
        std::fprintf(stderr, "stopgo: this system does not grant the AMX tiles; choose STOPGO_ISA=avx512bf16\n");
        std::abort();
      }
      _tile_loadconfig(&kTileConfig);
    }
    ~Session() { _tile_release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

   private:
    // Linux hands the tiles out on request, once for all threads: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA.
    static bool request_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
  };

  static void product(int64_t rows, int64_t columns, int64_t depth, Units a, Units b, Sums c, bool add = false) {
    asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
    for (int64_t n = 0; n < columns; n += 32)
      for (int64_t r = 0; r < rows; r += 32) {
        const bool two_rows = rows - r > 16, two_columns = columns - n > 16;
        const auto run = two_rows ? (two_columns ? tiles<2, 2> : tiles<2, 1>)
                                  : (two_columns ? tiles<1, 2> : tiles<1, 1>);
        run(depth, a.row(r), 4 * a.ld, b.at + n, 4 * b.ld, c.row(r) + n, 4 * c.ld, add);
      }
    asm volatile("" ::: "memory");
  }

 private:
  // 16 kRows x 16 kColumns of C in tiles 0..3, A in 4 and 5, B in 6 and 7. Strides in bytes.
  template <int kRows, int kColumns>
  static void tiles(int64_t depth, const uint32_t* a, int64_t a_bytes, const uint32_t* b, int64_t b_bytes, float* c,
                    int64_t c_bytes, bool add) {
    const uint32_t* a1 = a + 4 * a_bytes;  // 16 rows on, in units
    float* c1 = c + 4 * c_bytes;
    if (add) {
      _tile_loadd(0, c, c_bytes);
      if (kColumns > 1) _tile_loadd(1, c + 16, c_bytes);
      if (kRows > 1) _tile_loadd(2, c1, c_bytes);
      if (kRows > 1 && kColumns > 1) _tile_loadd(3, c1 + 16, c_bytes);
    } else {
      _tile_zero(0);
      if (kColumns > 1) _tile_zero(1);
      if (kRows > 1) _tile_zero(2);
      if (kRows > 1 && kColumns > 1) _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += 16, b += 4 * b_bytes) {
      _tile_loadd(4, a + k, a_bytes);
      _tile_loadd(6, b, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if (kColumns > 1) {
        _tile_loadd(7, b + 16, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (kRows > 1) {
        _tile_loadd(5, a1 + k, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
      }
      if (kRows > 1 && kColumns > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    if (kColumns > 1) _tile_stored(1, c + 16, c_bytes);
    if (kRows > 1) _tile_stored(2, c1, c_bytes);
    if (kRows > 1 && kColumns > 1) _tile_stored(3, c1 + 16, c_bytes);
  }
};
#endif

}  // namespace stopgo
