// exp, log and the normal distribution for vectors of float32. The coefficients are minimax fits made for these ranges;
// tests/native/test_native.cpp measures the errors that the comments state.
#pragma once
#include "simd.h"

namespace stopgo {

// c0 + c1 x + c2 x^2 + ...
STOPGO_INLINE Floats polynomial(Floats, float c0) { return broadcast(c0); }
template <class... Higher>
STOPGO_INLINE Floats polynomial(Floats x, float c0, Higher... higher) {
  return fma(polynomial(x, higher...), x, broadcast(c0));
}

STOPGO_INLINE Floats reciprocal(Floats x) {
#if defined(__AVX512BW__)
  const Floats guess = _mm512_rcp14_ps(x);  // and one step of Newton: within 1 ulp, at half the cost of a division
  return guess * (2.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

// e^x within 2 ulp; 0 below -104 (also at -infinity), subnormals on the way, infinity above 88.8, NaN for NaN.
STOPGO_INLINE Floats exp(Floats x) {
  x = minimum(broadcast(89.0f), maximum(broadcast(-104.0f), x));  // this way round, a NaN stays one
  // x = n ln 2 + r. Adding 1.5 * 2^23 rounds to an integer; ln 2 is split so that n times its first part is exact.
  const Floats shifted = fma(x, broadcast(1.44269504f), broadcast(12582912.0f)), n = shifted - 12582912.0f;
  const Floats r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), x));
  const Floats tail = polynomial(r, 0.5f, 1.66665211e-1f, 4.16683890e-2f, 8.36871006e-3f, 1.38146128e-3f);
  const Floats y = fma(tail, r * r, r) + 1.0f;
#if defined(__AVX512BW__)
  return _mm512_scalef_ps(y, n);
#else
  // In two steps, since 2^n itself may be out of range.
  const Ints whole = bits_as<Ints>(shifted) - 0x4B400000, half = whole >> 1;
  return y * bits_as<Floats>((half + 127) << 23) * bits_as<Floats>((whole - half + 127) << 23);
#endif
}

// 2 atanh(s) for |s| <= 1/3.
STOPGO_INLINE Floats twice_atanh(Floats s) {
  const Floats u = s * s;
  const Floats series = polynomial(u, 0.333333373f, 0.199994385f, 0.143084422f, 0.107138291f, 0.121504672f);
  return 2.0f * fma(series, u * s, s);
}

// log(1 + e) for 0 <= e <= 1, within 2 ulp.
STOPGO_INLINE Floats log1p_of_fraction(Floats e) { return twice_atanh(e / (e + 2.0f)); }

// log(x) for normal positive x, within 2 ulp; what it gives elsewhere is finite and not the logarithm.
STOPGO_INLINE Floats log(Floats x) {
  // x = 2^n m, m from sqrt(1/2) to sqrt(2).
  const Ints shifted = bits_as<Ints>(x) - 0x3F3504F3, n = shifted >> 23;
  const Floats m = bits_as<Floats>((shifted & 0x007FFFFF) + 0x3F3504F3);
  const Floats k = __builtin_convertvector(n, Floats);
  return k * 0.693359375f + (twice_atanh((m - 1.0f) / (m + 1.0f)) + k * -2.12194440e-4f);
}

// The distribution and, but for the factor 1 / sqrt(2 pi), the density of the standard normal.
struct Normal {
  Floats below, density;
};

// `below` within 1.1e-7, on the left also within 2e-6 of itself down to z = -6, and 0 and 1 at infinity; `density`
// within 7e-8.
STOPGO_INLINE Normal normal(Floats z) {
  const Floats u = z * z, density = exp(u * -0.5f);
  // Around 0, an even polynomial times z; elsewhere the density times what varies slowly, seen from the left.
  const Floats slope = polynomial(u, 3.98942113e-1f, -6.64882585e-2f, 9.96583048e-3f, -1.17515039e-3f, 1.05931314e-4f,
                                  -5.71508735e-6f);
  const Floats center = fma(slope, z, broadcast(0.5f));
  const Floats t = reciprocal(fma(minimum(broadcast(100.0f), absolute(z)), broadcast(0.41f), broadcast(1.0f)));
  const Floats slow = polynomial(t, 0.163581744f, 0.163172349f, 0.140267953f, 0.0569685027f, 0.0926160440f,
                                 -0.192252666f, 0.0762890950f);
  const Floats tail = t * density * slow;
  const Floats outside = z > 0.0f ? 1.0f - tail : tail;
  return {u < 2.25f ? center : outside, density};
}

constexpr float kDensityFactor = 0.398942280f;  // 1 / sqrt(2 pi)

}  // namespace stopgo
