#include "../../pipelines/native/copy_runs.h"
#include "check.h"

using namespace check;

namespace {

constexpr int32_t kUint8 = 3;
constexpr int64_t kWidth = 33, kRegions[] = {2, 0, 5, 1200};  // the last is long enough to go past the caches

int64_t address(const void* p) { return reinterpret_cast<int64_t>(p); }

// A feature store in memory.
struct Store {
  explicit Store(int32_t type) : type(type) {
    Random random(2);
    for (int64_t n : kRegions) {
      features.emplace_back(type == kUint8 ? kFloat32 : type, n * kWidth), means.emplace_back(kFloat32, kWidth);
      boxes.emplace_back(kFloat32, n * 4), scales.emplace_back(kFloat32, n), bytes.emplace_back(n * kWidth);
      for (size_t i = 0; i < bytes.back().size(); ++i) bytes.back()[i] = static_cast<uint8_t>(i * 7);
      for (int64_t i = 0; i < n * kWidth; ++i) features.back().set(i, random.normal());
      for (int64_t i = 0; i < kWidth; ++i) means.back().set(i, random.normal());
      for (int64_t i = 0; i < n * 4; ++i) boxes.back().set(i, static_cast<double>(i % 4 * 2 + i / 4 % 3));
      for (int64_t i = 0; i < n; ++i) scales.back().set(i, 0.25 * static_cast<double>(i % 9 + 1));
    }
    for (size_t i = 0; i < features.size(); ++i) {
      means_at.push_back(address(means[i].data())), boxes_at.push_back(address(boxes[i].data()));
      scales_at.push_back(address(scales[i].data()));
      features_at.push_back(address(type == kUint8 ? bytes[i].data() : features[i].data()));
    }
  }

  StopgoRecords records() const {
    return {type, kWidth, means_at.data(), boxes_at.data(), scales_at.data(), features_at.data()};
  }

  double value(int64_t image, int64_t region, int64_t k) const {
    const int64_t i = region * kWidth + k;
    return type == kUint8 ? bytes[image][i] * scales[image][region] : features[image][i];
  }

  // The k-th of the five numbers of a region's box.
  double place(int64_t image, int64_t region, int64_t k, double width, double height) const {
    if (k < 4) return rounded(boxes[image][region * 4 + k] / (k % 2 ? height : width), kFloat32);
    const auto side = [&](int64_t a) {
      return rounded(place(image, region, a + 2, width, height) - place(image, region, a, width, height), kFloat32);
    };
    return rounded(side(0) * side(1), kFloat32);
  }

  int32_t type;
  std::vector<Values> features, means, boxes, scales;
  std::vector<std::vector<uint8_t>> bytes;
  std::vector<int64_t> means_at, boxes_at, scales_at, features_at;
};

}  // namespace

// Runs of unlike lengths out of order, at odd addresses, by one thread and by more than there are runs.
TEST(runs_are_copied_and_converted) {
  const std::vector<int64_t> lengths = {0, 1, 3, 17, 64, 129, 70001, 1};
  for (int32_t from : kDtypes)
    for (int32_t to : {kFloat32, kBFloat16})
      for (int32_t threads : {1, 2, 9}) {
        where = text("from ", from, " to ", to, ", ", threads, " threads");
        Random random(1);
        std::vector<Values> in, out;
        std::vector<int64_t> sources, targets;
        for (int64_t n : lengths) {
          in.emplace_back(from, n), out.emplace_back(to, n);
          for (int64_t i = 0; i < n; ++i) in.back().set(i, random.normal() * (i % 5 ? 1.0 : 1e-6));
        }
        for (size_t i = 0; i < in.size(); ++i)
          sources.push_back(address(in[i].data())), targets.push_back(address(out[i].data()));
        stopgo_copy_runs(from, to, static_cast<int64_t>(lengths.size()), sources.data(), targets.data(),
                         lengths.data(), threads);
        for (size_t i = 0; i < in.size(); ++i)
          for (int64_t j = 0; j < lengths[i]; ++j)
            expect(out[i][j] == rounded(in[i][j], to), text("run ", i, " value ", j, ": ", out[i][j]));
      }
}

// Images whole, in any order, some without a region, to rows with gaps between them.
TEST(records_are_gathered) {
  const std::vector<int64_t> rows = {2, 0, 1, 3, 2};
  for (int32_t from : {kFloat32, kBFloat16, kFloat16, kUint8})
    for (int32_t to : {kFloat32, kBFloat16})
      for (int64_t global_row : {0, 1})
        for (int32_t threads : {1, 3}) {
          where = text("from ", from, " to ", to, ", global row ", global_row, ", ", threads, " threads");
          Store store(from);
          std::vector<int64_t> counts, first;
          std::vector<int32_t> sizes;
          int64_t end = 1;
          for (int64_t row : rows) {
            counts.push_back(kRegions[row]), first.push_back(end);
            sizes.push_back(40), sizes.push_back(8);
            end += global_row + kRegions[row] + 2;
          }
          Values features(to, std::vector<double>(end * kWidth, -1)), places(kFloat32, std::vector<double>(end * 5, -1));
          const StopgoRecords records = store.records();
          stopgo_gather_records(&records, to, static_cast<int64_t>(rows.size()), rows.data(), counts.data(), first.data(),
                                static_cast<int32_t>(global_row), sizes.data(), static_cast<char*>(features.data()),
                                places.floats(), threads);
          int64_t row = 0;
          const auto expect_row = [&](auto value, auto place) {
            for (int64_t k = 0; k < kWidth; ++k) expect(features[row * kWidth + k] == value(k), text(row, " value ", k));
            for (int64_t k = 0; k < 5; ++k) expect(places[row * 5 + k] == place(k), text(row, " place ", k));
            ++row;
          };
          const auto untouched = [](int64_t) { return -1.0; };
          for (size_t i = 0; i < rows.size(); ++i) {
            while (row < first[i]) expect_row(untouched, untouched);
            if (global_row)
              expect_row([&](int64_t k) { return rounded(store.means[rows[i]][k], to); },
                         [](int64_t k) { return k < 2 ? 0.0 : 1.0; });
            for (int64_t region = 0; region < counts[i]; ++region)
              expect_row([&](int64_t k) { return rounded(store.value(rows[i], region, k), to); },
                         [&](int64_t k) { return store.place(rows[i], region, k, 40, 8); });
          }
          while (row < end) expect_row(untouched, untouched);
        }
}

TEST(no_run_at_all) {
  where = "";
  stopgo_copy_runs(kFloat32, kBFloat16, 0, nullptr, nullptr, nullptr, 4);
  const StopgoRecords records = {kFloat32, 8, nullptr, nullptr, nullptr, nullptr};
  stopgo_gather_records(&records, kFloat32, 0, nullptr, nullptr, nullptr, 1, nullptr, nullptr, nullptr, 4);
  expect(stopgo_pipelines_abi_version() == 2, "version");
}
