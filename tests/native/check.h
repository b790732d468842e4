// A small test harness: named tests, numbers of every dtype of the interface, comparison with float64.
//
//   TEST(gelu_forward) { for (int32_t dtype : kDtypes) { ... expect_close("y", y, truth); } }
//
// main is in test_native.cpp: it runs every test, or those whose names contain an argument.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../../kernels/native/stopgo.h"

namespace check {

struct Test {
  std::string name;
  std::function<void()> body;
};

std::vector<Test>& tests();

struct Registered {
  Registered(const char* name, std::function<void()> body) { tests().push_back({name, std::move(body)}); }
};

#define TEST(name)                                                \
  static void test_##name();                                      \
  static check::Registered registered_##name(#name, test_##name); \
  static void test_##name()

// Failures of the test at work are printed and counted; it goes on. `where` says which case is at work.
void fail(const std::string& what);
extern std::string where;

inline void expect(bool holds, const std::string& what) {
  if (!holds) fail(what);
}

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  ((out << parts), ...);
  return out.str();
}

// --- Numbers
// ----------------------------------------------------------------------------------------------------------

constexpr int32_t kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2;
constexpr int32_t kDtypes[] = {kFloat32, kBFloat16, kFloat16};

struct Format {
  int digits;  // of the significand, the hidden one too
  int min_exponent;  // of the smallest normal value, 2^min_exponent
  int size;  // bytes
};
inline Format format_of(int32_t dtype) {
  return dtype == kFloat32 ? Format{24, -126, 4} : dtype == kBFloat16 ? Format{8, -126, 2} : Format{11, -14, 2};
}

// The nearest value of a dtype, ties to even, written apart from the kernels. Finite values in range.
inline double rounded(double x, int32_t dtype) {
  if (x == 0.0) return x;
  const Format f = format_of(dtype);
  int exponent;
  std::frexp(x, &exponent);
  const int last_place = std::max(exponent - f.digits, f.min_exponent + 1 - f.digits);
  return std::ldexp(std::nearbyint(std::ldexp(x, -last_place)), last_place);
}

// n values of a dtype in memory of exactly their size, so that a sanitizer sees a byte too far.
class Values {
 public:
  Values(int32_t dtype, int64_t n) : dtype_(dtype), n_(n), data_(static_cast<size_t>(n * format_of(dtype).size)) {}
  Values(int32_t dtype, const std::vector<double>& values) : Values(dtype, static_cast<int64_t>(values.size())) {
    for (int64_t i = 0; i < n_; ++i) set(i, values[static_cast<size_t>(i)]);
  }

  int32_t dtype() const { return dtype_; }
  int64_t size() const { return n_; }
  void* data() { return data_.data(); }
  const void* data() const { return data_.data(); }
  float* floats() { return reinterpret_cast<float*>(data_.data()); }
  bool operator==(const Values& other) const { return data_ == other.data_; }

  void set(int64_t i, double value) {
    const double x = rounded(value, dtype_);
    if (dtype_ == kFloat16) {
      const double size = std::fabs(x);
      const int sign = std::signbit(x) ? 0x8000 : 0;
      int exponent = 0;
      std::frexp(size, &exponent);
      const int bits = size < 0x1p-14
                           ? static_cast<int>(std::ldexp(size, 24))
                           : ((exponent + 14) << 10) + static_cast<int>(std::ldexp(size, 11 - exponent)) - 1024;
      put(i, static_cast<uint16_t>(sign | bits));
    } else {
      const float value32 = static_cast<float>(x);
      uint32_t bits;
      std::memcpy(&bits, &value32, 4);
      if (dtype_ == kFloat32)
        put(i, bits);
      else
        put(i, static_cast<uint16_t>(bits >> 16));
    }
  }

  double operator[](int64_t i) const {
    if (dtype_ == kFloat32) return get<float>(i);
    const uint32_t bits = get<uint16_t>(i);
    if (dtype_ == kBFloat16) {
      const uint32_t wide = bits << 16;
      float value;
      std::memcpy(&value, &wide, 4);
      return value;
    }
    const int exponent = (bits >> 10) & 31, digits = bits & 1023;
    const double size = exponent == 31 ? (digits ? NAN : INFINITY)
                        : exponent     ? std::ldexp(1024 + digits, exponent - 25)
                                       : std::ldexp(digits, -24);
    return bits & 0x8000 ? -size : size;
  }

 private:
  template <class Raw>
  void put(int64_t i, Raw raw) {
    std::memcpy(data_.data() + static_cast<size_t>(i) * sizeof raw, &raw, sizeof raw);
  }
  template <class Raw>
  Raw get(int64_t i) const {
    Raw raw;
    std::memcpy(&raw, data_.data() + static_cast<size_t>(i) * sizeof raw, sizeof raw);
    return raw;
  }

  int32_t dtype_;
  int64_t n_;
  std::vector<unsigned char> data_;
};

// The same numbers wherever it runs.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  double normal() {  // Box and Muller's, since std::normal_distribution differs between libraries
    const double u = (static_cast<double>(engine_() >> 11) + 0.5) * 0x1p-53,
                 v = static_cast<double>(engine_() >> 11) * 0x1p-53;
    return std::sqrt(-2 * std::log(u)) * std::cos(6.283185307179586 * v);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }

  Values values(int32_t dtype, int64_t n, double scale = 1.0, double center = 0.0) {
    Values made(dtype, n);
    for (int64_t i = 0; i < n; ++i) made.set(i, center + scale * normal());
    return made;
  }
  std::vector<int64_t> keys(int64_t n) {
    std::vector<int64_t> made(static_cast<size_t>(n));
    for (int64_t& key : made) key = below(int64_t{1} << 32);
    return made;
  }

 private:
  std::mt19937_64 engine_;
};

// --- Comparison
// -------------------------------------------------------------------------------------------------------

// Every value is the truth rounded once, but for the float32 arithmetic before, `slack` roundings of the largest value,
// and for `absolute`.
inline void expect_close(const std::string& what, const Values& found, const std::vector<double>& truth,
                         double slack = 16, double absolute = 0) {
  expect(found.size() == static_cast<int64_t>(truth.size()), what + ": another number of values");
  const Format f = format_of(found.dtype());
  double largest = 0;
  for (double value : truth) largest = std::max(largest, std::fabs(value));
  for (int64_t i = 0; i < found.size(); ++i) {
    const double t = truth[static_cast<size_t>(i)];
    const double rounding = std::ldexp(std::fabs(t), -f.digits) + std::ldexp(1.0, f.min_exponent - f.digits);
    const double allowed = rounding + slack * 0x1p-24 * largest + absolute;
    if (!(std::fabs(found[i] - t) <= allowed)) {
      fail(text(what, "[", i, "] = ", found[i], ", in float64 ", t, ", allowed ", allowed));
      return;  // one line a result is enough
    }
  }
}

// The results of run(threads) have the same bits for one thread and for two.
void expect_same_bits_on_two_threads(const std::function<std::vector<Values>()>& run);

// Coordinates of dropout; threshold 0 is none. 6554 is p = 0.1.
struct Site {
  uint32_t seed, step, site, threshold;
  double scale() const { return 65536.0 / (65536.0 - threshold); }
};

// The decisions, written from the definition in kernels/dropout.py, one value at a time.
bool kept(const Site& site, int64_t key, int64_t row, int64_t column, int64_t tile);

}  // namespace check
