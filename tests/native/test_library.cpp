// What the kernels stand on: the library's own words, vectors in parts, conversions, elementary functions.
#include "../../kernels/native/elementary.h"
#include "check.h"

using namespace check;

namespace {

// f of vectors of x against `truth` of each value: the largest error in units of the last place, and absolute.
struct Errors {
  double ulp = 0, absolute = 0;
};

template <class F, class G>
Errors errors(double low, double high, F&& f, G&& truth) {
  constexpr int kSteps = 200000;
  Errors worst;
  for (int i = 0; i < kSteps; i += stopgo::kLanes) {
    float x[stopgo::kLanes], y[stopgo::kLanes];
    for (int lane = 0; lane < stopgo::kLanes; ++lane)
      x[lane] = static_cast<float>(low + (high - low) * (i + lane) / kSteps);
    stopgo::store(y, f(stopgo::load(x)));
    for (int lane = 0; lane < stopgo::kLanes; ++lane) {
      const double t = truth(static_cast<double>(x[lane])), error = std::fabs(y[lane] - t);
      int exponent;
      std::frexp(t, &exponent);
      worst.ulp = std::max(worst.ulp, error / std::ldexp(1.0, std::max(exponent - 24, -149)));
      worst.absolute = std::max(worst.absolute, error);
    }
  }
  return worst;
}

template <class F>
float one(F&& f, float x) {
  return f(stopgo::broadcast(x))[0];
}

template <class T>
void convert_both_ways(int32_t dtype) {
  const auto narrowed = [](float x) { return stopgo::narrow(stopgo::broadcast(x), T{})[0]; };
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {  // every value there is
    const auto wide = stopgo::widen(stopgo::Halves{} + static_cast<uint16_t>(bits), T{});
    Values expected(dtype, 1);
    const uint16_t raw = static_cast<uint16_t>(bits);
    std::memcpy(expected.data(), &raw, 2);
    const double truth = expected[0];
    where = text("bits ", bits);
    if (std::isnan(truth)) {
      expect(std::isnan(wide[0]) && std::isnan(stopgo::widen(stopgo::Halves{} + narrowed(wide[0]), T{})[0]),
             "a NaN is lost");
    } else {
      expect(wide[0] == truth, "widened wrongly");
      const bool subnormal = dtype == kBFloat16 && (bits & 0x7F80u) == 0;  // the instruction flushes those
      expect(narrowed(wide[0]) == raw || subnormal, "narrowed wrongly");
    }
  }
  Random random(1);
  for (int i = 0; i < 100000; ++i) {
    const float x = static_cast<float>(random.normal() * std::ldexp(1.0, static_cast<int>(random.below(40)) - 26));
    Values expected(dtype, 1);
    expected.set(0, x);
    uint16_t raw;
    std::memcpy(&raw, expected.data(), 2);
    where = text("x = ", x);
    expect(narrowed(x) == raw, "not rounded to nearest even");
  }
}

}  // namespace

TEST(version_and_instruction_set) {
  expect(stopgo_abi_version() == 4, "another version of the interface");
  expect(std::strlen(stopgo_isa()) > 0, "no name");
}

TEST(conversions_of_bfloat16) { convert_both_ways<stopgo::BFloat16>(kBFloat16); }

TEST(conversions_of_float16) {
  convert_both_ways<stopgo::Float16>(kFloat16);
  const auto narrowed = [](float x) { return stopgo::narrow(stopgo::broadcast(x), stopgo::Float16{})[0]; };
  where.clear();
  expect(narrowed(65519.996f) == 0x7BFF && narrowed(65520.0f) == 0x7C00 && narrowed(-1e30f) == 0xFC00, "overflow");
}

TEST(parts_of_vectors) {
  for (int n = 1; n < stopgo::kLanes; ++n) {
    std::vector<float> from(static_cast<size_t>(n), 3.0f), to(static_cast<size_t>(n));
    const stopgo::Floats v = stopgo::load(from.data(), stopgo::Part{n});
    stopgo::store(to.data(), v + 1.0f, stopgo::Part{n});
    expect(stopgo::sum(v) == 3.0f * static_cast<float>(n), "a part is not filled with zeros");
    expect(to == std::vector<float>(static_cast<size_t>(n), 4.0f), "a part is not stored");
    expect(stopgo::largest(stopgo::only(v - 5.0f, stopgo::Part{n}, -9.0f)) == -2.0f, "lanes chosen");
  }
}

TEST(exp) {
  const auto f = [](stopgo::Floats x) { return stopgo::exp(x); };
  const auto truth = [](double x) { return std::exp(x); };
  for (const auto& [low, high] : {std::pair{-104.0, -80.0}, {-80.0, -1.0}, {-1.0, 1.0}, {1.0, 88.7}})
    expect(errors(low, high, f, truth).ulp <= 2, text("more than 2 ulp between ", low, " and ", high));
  expect(one(f, -INFINITY) == 0 && one(f, -1e30f) == 0 && one(f, -200.0f) == 0, "not 0 far below");
  expect(one(f, 0.0f) == 1 && one(f, 1e30f) == INFINITY && std::isnan(one(f, NAN)), "special values");
}

TEST(logarithms) {
  const auto f = [](stopgo::Floats x) { return stopgo::log(x); };
  const auto truth = [](double x) { return std::log(x); };
  for (const auto& [low, high] : {std::pair{1.2e-38, 1e-30}, {1e-6, 0.5}, {0.5, 2.0}, {2.0, 1e30}})
    expect(errors(low, high, f, truth).ulp <= 2, text("log: more than 2 ulp between ", low, " and ", high));
  const auto g = [](stopgo::Floats x) { return stopgo::log1p_of_fraction(x); };
  expect(errors(0, 1, g, [](double x) { return std::log1p(x); }).ulp <= 2, "log1p: more than 2 ulp");
}

TEST(normal_distribution) {
  const auto below = [](stopgo::Floats z) { return stopgo::normal(z).below; };
  const auto density = [](stopgo::Floats z) { return stopgo::normal(z).density; };
  const auto truth = [](double z) { return 0.5 * std::erfc(-z / std::sqrt(2.0)); };
  expect(errors(-14, 14, below, truth).absolute <= 1.1e-7, "off by more than 1.1e-7");
  expect(errors(-6, 0, below, truth).ulp * 0x1p-23 <= 3e-6, "the left tail has lost its digits");
  expect(errors(-14, 14, density, [](double z) { return std::exp(-z * z / 2); }).absolute <= 7e-8, "density");
  expect(one(below, -INFINITY) == 0 && one(below, INFINITY) == 1 && std::isnan(one(below, NAN)), "special values");
}
