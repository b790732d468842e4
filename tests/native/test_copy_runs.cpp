#include "../../pipelines/native/copy_runs.h"
#include "check.h"

using namespace check;

namespace {

int64_t address(const void* p) { return reinterpret_cast<int64_t>(p); }

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

TEST(rows_of_bytes_are_scaled) {
  constexpr int64_t width = 33;
  for (int32_t to : {kFloat32, kBFloat16}) {
    where = text("to ", to);
    const std::vector<int64_t> rows = {2, 0, 5};
    std::vector<std::vector<uint8_t>> in;
    std::vector<std::vector<float>> factors;
    std::vector<Values> out;
    std::vector<int64_t> sources, scales, targets;
    for (int64_t n : rows) {
      in.emplace_back(n * width), factors.emplace_back(n), out.emplace_back(to, n * width);
      for (size_t i = 0; i < in.back().size(); ++i) in.back()[i] = static_cast<uint8_t>(i * 7);
      for (size_t i = 0; i < factors.back().size(); ++i) factors.back()[i] = 0.25f * static_cast<float>(i + 1);
    }
    for (size_t i = 0; i < in.size(); ++i) {
      sources.push_back(address(in[i].data()));
      scales.push_back(address(factors[i].data()));
      targets.push_back(address(out[i].data()));
    }
    stopgo_scale_runs(to, width, 3, sources.data(), scales.data(), targets.data(), rows.data(), 2);
    for (size_t i = 0; i < in.size(); ++i)
      for (int64_t j = 0; j < rows[i] * width; ++j)
        expect(out[i][j] == rounded(in[i][j] * static_cast<double>(factors[i][j / width]), to), text(i, " ", j));
  }
}

TEST(no_run_at_all) {
  where = "";
  stopgo_copy_runs(kFloat32, kBFloat16, 0, nullptr, nullptr, nullptr, 4);
  stopgo_scale_runs(kFloat32, 8, 0, nullptr, nullptr, nullptr, nullptr, 4);
  expect(stopgo_pipelines_abi_version() == 1, "version");
}
