// Masks bit for bit against the definition; element-wise dropout.
#include "check.h"

using namespace check;

namespace {

const std::pair<int64_t, int64_t> kWidths[] = {{1, 8},     {5, 8},       {8, 8},      {9, 16},   {33, 40},
                                               {63, 64},   {65, 64},     {96, 96},    {101, 64}, {306, 64},
                                               {200, 200}, {1024, 1024}, {1601, 1608}};  // width, tile
const Site kSites[] = {
    {1, 2, 3, 6554}, {0xFFFFFFFFu, 0x80000000u, 77, 32768}, {5, 6, 7, 0}, {7, 6, 5, 65535}, {7, 6, 5, 65536}};

int64_t row_tile(int64_t width) { return (width + 7) / 8 * 8; }

}  // namespace

TEST(philox_known_answer) {
  // Random123's: a counter and a key of zeros give 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
  const uint32_t lanes[] = {0xe8d5, 0x6627, 0xc58d, 0xe169, 0xac4c, 0xbc57, 0xdbd8, 0x9b00};
  const int64_t zero[] = {0};
  for (size_t lane = 0; lane < 8; ++lane) {
    std::vector<uint8_t> at(8), above(8);
    stopgo_keep_mask(0, 0, 0, lanes[lane], zero, zero, 1, 8, 8, at.data());
    stopgo_keep_mask(0, 0, 0, lanes[lane] + 1, zero, zero, 1, 8, 8, above.data());
    expect(at[lane] == 1 && above[lane] == 0, text("lane ", lane));
  }
}

TEST(masks) {
  Random random(1);
  for (const auto& [width, tile] : kWidths)
    for (const Site& site : kSites)
      for (int64_t rows : {0, 1, 2, 37}) {
        where = text(rows, " rows of ", width, ", tile ", tile, ", threshold ", site.threshold);
        const auto key = random.keys(rows), row = random.keys(rows);
        std::vector<uint8_t> keep(static_cast<size_t>(rows * width), 7);
        stopgo_keep_mask(site.seed, site.step, site.site, site.threshold, key.data(), row.data(), rows, width, tile,
                         keep.data());
        int64_t wrong = 0;
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = 0; c < width; ++c)
            wrong += keep[static_cast<size_t>(r * width + c)] !=
                     kept(site, key[static_cast<size_t>(r)], row[static_cast<size_t>(r)], c, tile);
        expect(wrong == 0, text(wrong, " decisions are wrong"));
      }
}

TEST(dropout) {
  Random random(2);
  for (int32_t dtype : kDtypes)
    for (int64_t width : {1, 5, 63, 64, 65, 96, 768, 1601})
      for (uint32_t threshold : {0u, 6554u})
        for (int64_t rows : {0, 1, 2, 37}) {
          where = text("dtype ", dtype, ", ", rows, " rows of ", width, ", threshold ", threshold);
          const Site site{1, 2, 3, threshold};
          const auto key = random.keys(rows), row = random.keys(rows);
          const Values x = random.values(dtype, rows * width);
          std::vector<double> truth(static_cast<size_t>(rows * width));
          for (int64_t i = 0; i < rows * width; ++i) {
            const auto r = static_cast<size_t>(i / width);
            truth[static_cast<size_t>(i)] =
                kept(site, key[r], row[r], i % width, row_tile(width)) ? x[i] * site.scale() : 0.0;
          }
          Values apart(dtype, rows * width), in_place = x;
          stopgo_dropout(dtype, rows, width, x.data(), key.data(), row.data(), 1, 2, 3, threshold, apart.data());
          stopgo_dropout(dtype, rows, width, in_place.data(), key.data(), row.data(), 1, 2, 3, threshold,
                         in_place.data());
          expect_close("y", apart, truth, 1);
          expect(in_place == apart, "in place differs");
        }
}
