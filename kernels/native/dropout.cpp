// Keep masks of counter-based dropout. The definition stands in kernels/dropout.py; tests hold both to it bit for bit.
// Flat C interface, no torch headers: one build serves every torch.

#include <cstdint>
#include <vector>

namespace {

constexpr uint32_t kM0 = 0xD2511F53u, kM1 = 0xCD9E8D57u, kW0 = 0x9E3779B9u, kW1 = 0xBB67AE85u;
constexpr int kBlocks = 64;  // column blocks drawn together, so that the compiler vectorises over them

struct Words {
  uint32_t w[4][kBlocks];
};

inline void philox(uint32_t seed, uint32_t step, uint32_t item, uint32_t row, uint32_t first_block, uint32_t site,
                   int n, Words& out) {
  for (int i = 0; i < n; ++i) {
    uint32_t c0 = item, c1 = row, c2 = first_block + static_cast<uint32_t>(i), c3 = site;
    uint32_t k0 = seed, k1 = step;
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = static_cast<uint64_t>(c0) * kM0, p1 = static_cast<uint64_t>(c2) * kM1;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c1 = static_cast<uint32_t>(p1);
      c3 = static_cast<uint32_t>(p0);
      k0 += kW0;
      k1 += kW1;
    }
    out.w[0][i] = c0;
    out.w[1][i] = c1;
    out.w[2][i] = c2;
    out.w[3][i] = c3;
  }
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("default", "avx2", "arch=skylake-avx512")))
#endif
void keep_row(uint32_t seed, uint32_t step, uint32_t item, uint32_t row, uint32_t site, int64_t width, int64_t tile,
              uint32_t threshold, uint8_t* out) {
  const int64_t eighth = tile / 8;
  Words words;
  const int64_t tiles = (width + tile - 1) / tile, blocks = tiles * eighth;
  for (int64_t first = 0; first < blocks; first += kBlocks) {
    const int64_t rest = (blocks - first + 15) / 16 * 16;  // whole vectors, so that no scalar tail is left
    philox(seed, step, item, row, static_cast<uint32_t>(first), site, rest < kBlocks ? static_cast<int>(rest) : kBlocks,
           words);
    int64_t block = first;
    while (block < first + kBlocks && block < blocks) {  // runs of blocks of one tile are runs of columns
      const int64_t in_tile = block % eighth, left = eighth - in_tile;
      const int64_t here = first + kBlocks - block, run = left < here ? left : here;
      const int64_t column0 = (block / eighth) * tile + in_tile;
      for (int lane = 0; lane < 8; ++lane) {
        const int64_t column = column0 + lane * eighth;
        const int64_t room = width - column, n = run < room ? run : room;
        const uint32_t shift = (lane & 1) * 16u;
        const uint32_t* word = words.w[lane >> 1] + (block - first);
        for (int64_t i = 0; i < n; ++i) out[column + i] = ((word[i] >> shift) & 0xFFFFu) >= threshold;
      }
      block += run;
    }
  }
}

}  // namespace

extern "C" {

int32_t stopgo_abi_version() { return 1; }

// row_key, row_index: [rows]; out: [rows, width], 1 = kept.
void stopgo_keep_mask(uint32_t seed, uint32_t step, uint32_t site, const int64_t* row_key, const int64_t* row_index,
                      int64_t rows, int64_t width, int64_t tile, uint32_t threshold, uint8_t* out) {
#pragma omp parallel for schedule(static) if (rows * width > 16384)
  for (int64_t r = 0; r < rows; ++r)
    keep_row(seed, step, static_cast<uint32_t>(row_key[r]), static_cast<uint32_t>(row_index[r]), site, width, tile,
             threshold, out + r * width);
}

}  // extern "C"
