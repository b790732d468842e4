// Runs the tests of the native kernels over their flat C interface.
//   test_native [part of a name]...
#include <omp.h>

#include <cstdio>
#include <cstring>

#include "check.h"

namespace check {

std::string where;

static int failures;

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

void fail(const std::string& what) {
  ++failures;
  std::printf("  FAILED %s%s%s\n", where.c_str(), where.empty() ? "" : ": ", what.c_str());
}

void expect_same_bits_on_two_threads(const std::function<std::vector<Values>()>& run) {
  const int before = omp_get_max_threads();
  omp_set_num_threads(1);
  const std::vector<Values> alone = run(), again = run();
  omp_set_num_threads(2);
  const std::vector<Values> together = run();
  omp_set_num_threads(before);
  for (size_t i = 0; i < alone.size(); ++i) {
    expect(alone[i] == again[i], text("result ", i, " differs between two runs"));
    expect(alone[i] == together[i], text("result ", i, " differs between one thread and two"));
  }
}

bool kept(const Site& site, int64_t key, int64_t row, int64_t column, int64_t tile) {
  const int64_t eighth = tile / 8, in_tile = column % tile;
  uint32_t c[4] = {static_cast<uint32_t>(key), static_cast<uint32_t>(row),
                   static_cast<uint32_t>(column / tile * eighth + in_tile % eighth), site.site};
  uint32_t k[2] = {site.seed, site.step};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{c[0]} * 0xD2511F53u, p1 = uint64_t{c[2]} * 0xCD9E8D57u;
    const uint32_t next[4] = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(p1),
                              static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(p0)};
    std::memcpy(c, next, sizeof c);
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  const int64_t lane = in_tile / eighth;
  return ((c[lane / 2] >> (lane % 2 * 16)) & 0xFFFFu) >= site.threshold;
}

}  // namespace check

int main(int count, char** arguments) {
  int ran = 0, failed = 0;
  for (const check::Test& test : check::tests()) {
    bool wanted = count < 2;
    for (int i = 1; i < count; ++i) wanted |= test.name.find(arguments[i]) != std::string::npos;
    if (!wanted) continue;
    const int before = check::failures;
    check::where.clear();
    test.body();
    const bool good = check::failures == before;
    std::printf("%s %s\n", good ? "ok    " : "FAILED", test.name.c_str());
    ++ran;
    failed += !good;
  }
  std::printf("%d tests for %s, %d failed\n", ran, stopgo_isa(), failed);
  return failed != 0 || ran == 0;
}
