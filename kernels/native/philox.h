// Philox 4x32-10 for rows of dropout decisions. The definition is in kernels/dropout.py; tests hold both to it bit for
// bit.
#pragma once
#include "simd.h"

namespace stopgo {

// Where a dropout happens: random coordinates and the rate. threshold 0: there is none.
struct Site {
  uint32_t seed, step, site, threshold;

  float scale() const { return 65536.0f / static_cast<float>(65536 - static_cast<int32_t>(threshold)); }
};

inline int64_t row_tile(int64_t width) { return (width + 7) / 8 * 8; }

namespace philox {

constexpr uint32_t kM0 = 0xD2511F53u, kM1 = 0xCD9E8D57u, kW0 = 0x9E3779B9u, kW1 = 0xBB67AE85u;
constexpr int kRounds = 10;

// Counters live in 64-bit lanes, since the products are 64 bits wide: the low half counts, the high half may hold
// anything.
typedef uint64_t Longs __attribute__((vector_size(4 * kLanes)));

// The low halves' 64-bit products.
STOPGO_INLINE Longs product(Longs a, uint32_t b) {
#if defined(__AVX512BW__)
  return bits_as<Longs>(_mm512_mul_epu32(bits_as<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return bits_as<Longs>(_mm256_mul_epu32(bits_as<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return bits_as<Longs>(_mm_mul_epu32(bits_as<__m128i>(a), _mm_set1_epi64x(b)));
#else
  return (a & 0xFFFFFFFFu) * static_cast<uint64_t>(b);
#endif
}

struct Draw {
  Longs c0, c1, c2, c3;
};

// The lanes of even and of odd numbers, in order.
STOPGO_INLINE Words interleave(Longs even, Longs odd) {
#if defined(__AVX512BW__)
  return bits_as<Words>(_mm512_mask_mov_epi32(bits_as<__m512i>(even), 0xAAAA, bits_as<__m512i>(odd << 32)));
#else
  return bits_as<Words>((even & 0xFFFFFFFFu) | (odd << 32));
#endif
}

// The four words of kLanes consecutive blocks.
struct Blocks {
  Words word[4];
};

// The blocks of one row, from its first one on.
class RowDraws {
 public:
  RowDraws(const Site& site, uint32_t key, uint32_t row) {
    for (uint32_t i = 0; i < kRounds; ++i) {
      k0_[i] = site.seed + i * kW0;
      k1_[i] = site.step + i * kW1;
    }
    // Of the first two rounds' four products, two are the same for all blocks, and one only counts up.
    const uint64_t p0 = static_cast<uint64_t>(key) * kM0;
    first_c0_ = row ^ k0_[0];
    first_c2_ = static_cast<uint32_t>(p0 >> 32) ^ site.site ^ k1_[0];
    first_c3_ = static_cast<uint32_t>(p0);
    for (int i = 0; i < kLanes / 2; ++i) even_[i] = 2 * static_cast<uint64_t>(i) * kM1;
  }

  STOPGO_INLINE Blocks next() {
    const Draw a = draw(even_), b = draw(even_ + kM1);
    even_ += static_cast<uint64_t>(kLanes) * kM1;
    return {{interleave(a.c0, b.c0), interleave(a.c1, b.c1), interleave(a.c2, b.c2), interleave(a.c3, b.c3)}};
  }

 private:
  STOPGO_INLINE Draw draw(Longs by_block) const {
    Draw d;
    const Longs p0 = product((by_block >> 32) ^ static_cast<uint64_t>(first_c0_), kM0);  // round 2
    const uint64_t p1 = static_cast<uint64_t>(first_c2_) * kM1;
    d.c0 = by_block ^ ((p1 >> 32) ^ k0_[1]);
    d.c1 = Longs{} + p1;
    d.c2 = (p0 >> 32) ^ static_cast<uint64_t>(first_c3_ ^ k1_[1]);
    d.c3 = p0;
#pragma GCC unroll 8
    for (int round = 2; round < kRounds; ++round) {
      const Longs q0 = product(d.c0, kM0), q1 = product(d.c2, kM1);
      d.c0 = (q1 >> 32) ^ d.c1 ^ static_cast<uint64_t>(k0_[round]);
      d.c1 = q1;
      d.c2 = (q0 >> 32) ^ d.c3 ^ static_cast<uint64_t>(k1_[round]);
      d.c3 = q0;
    }
    return d;
  }

  uint32_t k0_[kRounds], k1_[kRounds], first_c0_, first_c2_, first_c3_;
  Longs even_;  // the first product of the blocks of even numbers
};

// Runs of consecutive blocks of one tile are runs of columns, once for each lane. put(group, first, n, column) for each
// run: blocks first .. first + n of the group of kLanes blocks, whose lane 0 starts at `column`.
template <class Group, class Put>
STOPGO_INLINE void for_runs(int64_t width, int64_t tile, Group&& next_group, Put&& put) {
  const int64_t eighth = tile / 8;
  for (int64_t start = 0, in_tile = 0; start < width;) {
    const auto group = next_group();
    for (int64_t i = 0; i < kLanes && start < width;) {
      const int64_t n = eighth - in_tile < kLanes - i ? eighth - in_tile : kLanes - i;
      put(group, i, n, start + in_tile);
      i += n;
      in_tile += n;
      if (in_tile == eighth) start += tile, in_tile = 0;
    }
  }
}

}  // namespace philox

// The decisions of one row: drawn once, asked for a vector of columns at a time. Columns are cut into tiles of `tile`,
// a multiple of eight; within one, column c is lane c / (tile / 8) of block c % (tile / 8).
#if defined(__AVX512BW__)

class Decisions {  // a bit a column
 public:
  // Bytes of memory that a row takes.
  static int64_t size(int64_t width, int64_t tile) { return (width + tile - 1) / tile * tile / 8 + 8; }

  explicit Decisions(uint8_t* memory) : bits_(memory) {}

  void draw(const Site& site, int64_t key, int64_t row, int64_t width, int64_t tile) const {
    const int64_t eighth = tile / 8;
    philox::RowDraws draws(site, static_cast<uint32_t>(key), static_cast<uint32_t>(row));
    const auto next = [&]() STOPGO_INLINE_LAMBDA { return decide(draws.next(), site.threshold); };
    if (eighth % kLanes == 0) {
      for (int64_t start = 0; start < width; start += tile)
        for (int64_t b = 0; b < eighth; b += kLanes) {
          const Kept group = next();
          uint8_t* at = bits_ + (start + b) / 8;
          for (int lane = 0; lane < 8; ++lane) std::memcpy(at + lane * (eighth / 8), &group.lane[lane], 2);
        }
      return;
    }
    std::memset(bits_, 0, static_cast<size_t>(size(width, tile)));
    philox::for_runs(width, tile, next, [=](const Kept& group, int64_t first, int64_t n, int64_t column) {
      for (int lane = 0; lane < 8; ++lane) {
        const int64_t to = column + lane * eighth;
        const uint32_t run = group.lane[lane] >> first & ((1u << n) - 1);
        uint32_t there;
        std::memcpy(&there, bits_ + to / 8, 4);
        there |= run << (to % 8);
        std::memcpy(bits_ + to / 8, &there, 4);
      }
    });
  }

  // v * scale where the column is kept, 0 elsewhere. Columns from c on, a multiple of kLanes.
  STOPGO_INLINE Floats scaled(int64_t c, Floats v, float scale) const {
    return _mm512_maskz_mul_ps(at(c), v, broadcast(scale));
  }
  // The same, + other.
  STOPGO_INLINE Floats scaled(int64_t c, Floats v, float scale, Floats other) const {
    return _mm512_mask3_fmadd_ps(v, broadcast(scale), other, at(c));
  }
  // 1 or 0 for each column.
  STOPGO_INLINE Bytes bytes(int64_t c) const { return bits_as<Bytes>(_mm_maskz_set1_epi8(at(c), 1)); }

 private:
  struct Kept {
    uint16_t lane[8];  // a bit a block
  };

  STOPGO_INLINE static Kept decide(const philox::Blocks& blocks, uint32_t threshold) {
    Kept kept{};
    if (threshold > 0xFFFF) return kept;
    const __m512i least = _mm512_set1_epi16(static_cast<int16_t>(threshold));
    for (int word = 0; word < 4; ++word) {
      const __mmask32 both = _mm512_cmpge_epu16_mask(bits_as<__m512i>(blocks.word[word]), least);
      kept.lane[2 * word] = static_cast<uint16_t>(_pext_u32(both, 0x55555555u));
      kept.lane[2 * word + 1] = static_cast<uint16_t>(_pext_u32(both, 0xAAAAAAAAu));
    }
    return kept;
  }

  STOPGO_INLINE __mmask16 at(int64_t c) const {
    uint16_t mask;
    std::memcpy(&mask, bits_ + c / 8, 2);
    return mask;
  }

  uint8_t* bits_;
};

#else

class Decisions {  // a byte a column, 1 or 0
 public:
  static int64_t size(int64_t width, int64_t tile) { return (width + tile - 1) / tile * tile + kLanes; }

  explicit Decisions(uint8_t* memory) : kept_(memory) {}

  void draw(const Site& site, int64_t key, int64_t row, int64_t width, int64_t tile) const {
    const int64_t eighth = tile / 8;
    philox::RowDraws draws(site, static_cast<uint32_t>(key), static_cast<uint32_t>(row));
    const auto next = [&]() STOPGO_INLINE_LAMBDA { return decide(draws.next(), site.threshold); };
    philox::for_runs(width, tile, next, [=](const Kept& group, int64_t first, int64_t n, int64_t column) {
      const auto at = [=](int lane) STOPGO_INLINE_LAMBDA { return kept_ + column + lane * eighth; };
      const auto from = [&](int lane) STOPGO_INLINE_LAMBDA { return group.lane[lane / 2 + lane % 2 * 4] + first; };
      if (n == kLanes)
        for (int lane = 0; lane < 8; ++lane) std::memcpy(at(lane), from(lane), kLanes);
      else
        for (int lane = 0; lane < 8; ++lane) std::memcpy(at(lane), from(lane), static_cast<size_t>(n));
    });
  }

  STOPGO_INLINE Floats scaled(int64_t c, Floats v, float scale) const {
    return bits_as<Floats>(bits_as<Words>(v * scale) & -words(bytes(c)));
  }
  STOPGO_INLINE Floats scaled(int64_t c, Floats v, float scale, Floats other) const {
    return scaled(c, v, scale) + other;
  }
  STOPGO_INLINE Bytes bytes(int64_t c) const { return raw_load<Bytes>(kept_ + c, Whole{}); }

 private:
  struct Kept {
    uint8_t lane[8][kLanes];  // a byte a block; lanes 0, 2, 4, 6, 1, 3, 5, 7
  };

  STOPGO_INLINE static Kept decide(const philox::Blocks& blocks, uint32_t threshold) {
    Kept kept{};
    if (threshold > 0xFFFF) return kept;
#if defined(__AVX2__)
    const __m256i least = _mm256_set1_epi16(static_cast<int16_t>(threshold)), none = _mm256_setzero_si256();
    __m256i low[4], high[4];  // -1 where kept, in 32 bits
    for (int word = 0; word < 4; ++word) {
      const __m256i w = bits_as<__m256i>(blocks.word[word]);
      const __m256i both = _mm256_cmpeq_epi16(_mm256_subs_epu16(least, w), none);
      low[word] = _mm256_srai_epi32(_mm256_slli_epi32(both, 16), 16);
      high[word] = _mm256_srai_epi32(both, 16);
    }
    const auto pack = [](const __m256i(&x)[4]) STOPGO_INLINE_LAMBDA {
      const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(x[0], x[1]), _mm256_packs_epi32(x[2], x[3]));
      const __m256i in_order = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      return _mm256_and_si256(in_order, _mm256_set1_epi8(1));
    };
    const __m256i even = pack(low), odd = pack(high);
    std::memcpy(kept.lane[0], &even, sizeof even);
    std::memcpy(kept.lane[4], &odd, sizeof odd);
#else
    for (int lane = 0; lane < 8; ++lane) {
      const Words word = blocks.word[lane / 2], drawn = lane & 1 ? word >> 16 : word & 0xFFFFu;
      for (int i = 0; i < kLanes; ++i) kept.lane[lane / 2 + lane % 2 * 4][i] = drawn[i] >= threshold;
    }
#endif
    return kept;
  }

  uint8_t* kept_;
};

#endif

}  // namespace stopgo
