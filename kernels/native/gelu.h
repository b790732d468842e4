// GELU and its slope for one vector.
#pragma once
#include <algorithm>
#include <cmath>

#include "elementary.h"

namespace stopgo {

struct GeluAndSlope {
  Floats y, slope;
};

// In float32's precision.
struct ExactGelu {
  STOPGO_INLINE Floats y(Floats z) const { return z * normal(z).below; }
  STOPGO_INLINE GeluAndSlope both(Floats z) const {
    const Normal n = normal(z);
    return {z * n.below, n.below + z * n.density * kDensityFactor};
  }
};

#if defined(__AVX512BW__) || defined(__AVX2__)

// table[i] for the lowest bits i of each lane.
STOPGO_INLINE Floats lookup(const float (&table)[kLanes], Words i) {
#if defined(__AVX512BW__)
  return _mm512_permutexvar_ps(bits_as<__m512i>(i), _mm512_load_ps(table));
#else
  return _mm256_permutevar8x32_ps(_mm256_load_ps(table), bits_as<__m256i>(i));
#endif
}

// Polynomials over intervals of |z|, as many as a register has lanes: a lookup of a coefficient is one permutation. y
// within 4.5e-6 of z, the slope within 2.2e-5, far below a rounding of the 16-bit types, at less than half the cost.
class TableGelu {
 public:
  TableGelu() {
    const auto below = [](double a) { return 0.5 * std::erfc(a / std::sqrt(2.0)); };
    const auto density = [](double a) { return std::exp(-0.5 * a * a) / std::sqrt(2.0 * kPi); };
    fit(below, below_);
    fit([=](double a) { return 0.5 - below(a) + a * density(a); }, slope_);
  }

  // gelu(z) = max(z, 0) - a Phi(-a), a = |z|.
  STOPGO_INLINE Floats y(Floats z) const { return y(z, at(z)); }

  // gelu'(z) = 1/2 +- (1/2 - Phi(-a) + a phi(a)).
  STOPGO_INLINE GeluAndSlope both(Floats z) const {
    const Place place = at(z);
    const Words sign = bits_as<Words>(z) & 0x80000000u;
    const Floats off_half = bits_as<Floats>(bits_as<Words>(place.value(slope_)) ^ sign);
    return {y(z, place), off_half + 0.5f};
  }

 private:
  static constexpr int kCoefficients = kLanes == 16 ? 4 : 6;
  static constexpr float kEnd = 6.04f;  // from there on, both functions are their limits
  static constexpr double kWidth = kEnd / (kLanes - 0.51);  // of an interval; the first one is half as wide
  static constexpr double kPi = 3.14159265358979323846;
  using Table = float[kCoefficients][kLanes];

  // |z|, and its interval's number in the low bits of an integer.
  struct Place {
    Floats a;
    Words interval;

    STOPGO_INLINE Floats value(const Table& table) const {
      Floats sum = lookup(table[kCoefficients - 1], interval);
#pragma GCC unroll 8
      for (int k = kCoefficients - 2; k >= 0; --k) sum = fma(sum, a, lookup(table[k], interval));
      return sum;
    }
  };

  STOPGO_INLINE Floats y(Floats z, const Place& place) const {
    return fma(-place.a, place.value(below_), maximum(z, Floats{}));
  }

  STOPGO_INLINE static Place at(Floats z) {
    const Floats a = minimum(broadcast(kEnd), absolute(z));  // this way round, a NaN stays one
    // 1.5 * 2^23: the sum is rounded to an integer, which stands in its low bits.
    return {a, bits_as<Words>(fma(a, broadcast(static_cast<float>(1 / kWidth)), broadcast(12582912.0f)))};
  }

  // Newton's interpolation in Chebyshev's nodes, multiplied out.
  template <class F>
  static void fit(F&& f, Table& table) {
    for (int i = 0; i < kLanes; ++i) {
      double power[kCoefficients] = {};
      double node[kCoefficients], difference[kCoefficients];
      const double low = std::max(i - 0.5, 0.0) * kWidth, high = (i + 0.5) * kWidth;
      for (int k = 0; k < kCoefficients; ++k) {
        node[k] = 0.5 * (low + high) + 0.5 * (high - low) * std::cos(kPi * (k + 0.5) / kCoefficients);
        difference[k] = f(node[k]);
      }
      for (int order = 1; order < kCoefficients; ++order)
        for (int k = kCoefficients - 1; k >= order; --k)
          difference[k] = (difference[k] - difference[k - 1]) / (node[k] - node[k - order]);
      for (int k = kCoefficients - 1; k >= 0; --k) {  // power = power * (x - node[k]) + difference[k]
        for (int j = kCoefficients - 1; j > 0; --j) power[j] = power[j - 1] - node[k] * power[j];
        power[0] = difference[k] - node[k] * power[0];
      }
      for (int k = 0; k < kCoefficients; ++k) table[k][i] = static_cast<float>(power[k]);
    }
  }

  alignas(64) Table below_, slope_;
};

inline ExactGelu gelu_for(float) { return {}; }
template <class T>
inline const TableGelu& gelu_for(T) {
  static const TableGelu table;
  return table;
}

#else

template <class T>
inline ExactGelu gelu_for(T) {
  return {};
}

#endif

}  // namespace stopgo
