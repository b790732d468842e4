// The optimizer over flat buffers: AdamW in one pass, and the sum of squares that a global norm needs.
#include <utility>

#include "parallel.h"
#include "simd.h"
#include "stopgo.h"

namespace stopgo {
namespace {

constexpr int64_t kChunk = 32768;  // values of a task; whole vectors for every instruction set

// float64 lanes, half as many as a vector of floats has.
typedef double Doubles __attribute__((vector_size(4 * kLanes)));

struct TwoDoubles {
  Doubles low, high;
};

STOPGO_INLINE TwoDoubles doubles(Floats x) {
#if defined(__AVX512BW__)
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))};
#elif defined(__AVX2__)
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
#else
  return {Doubles{x[0], x[1]}, Doubles{x[2], x[3]}};
#endif
}

constexpr int64_t kAhead = 4096;  // bytes: a single stream comes at the memory's speed only if it is asked for early

// In float64 throughout: squares of large gradients do not overflow, and the order of the sum does not show.
template <class T>
double square_sum_of_chunk(const T* x, int64_t n) {
  TwoDoubles even{}, odd{};
  for_vectors(n, [&](int64_t i, auto lanes) STOPGO_INLINE_LAMBDA {
    __builtin_prefetch(x + i + kAhead / sizeof(T));
    const TwoDoubles value = doubles(load(x + i, lanes));
    even.low += value.low * value.low;
    even.high += value.high * value.high;
    std::swap(even, odd);
  });
  const Doubles all = (even.low + even.high) + (odd.low + odd.high);
  double total = 0;
  for (int i = 0; i < kLanes / 2; ++i) total += all[i];
  return total;
}

template <class T>
double square_sum(int64_t n, const T* x) {
  const int64_t chunks = chunks_of(n, kChunk);
  double* sums = call_scratch().get<double>(chunks);
  for_chunks(n, 1, kChunk, [=](int64_t chunk, int64_t first, int64_t last) {
    sums[chunk] = square_sum_of_chunk(x + first, last - first);
  });
  double total = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total += sums[chunk];
  return total;
}

struct Rule {
  double lr, beta1, beta2, eps, weight_decay;
};

template <class T>
void adamw(const Rule& rule, int64_t n, const T* gradient, float* p, float* m, float* v, T* weights) {
  const auto single = [](double x) { return static_cast<float>(x); };
  const float lr = single(rule.lr), beta1 = single(rule.beta1), beta2 = single(rule.beta2), eps = single(rule.eps);
  const float rest1 = single(1 - rule.beta1), rest2 = single(1 - rule.beta2);  // of the doubles: 1 - 0.999f is off by 1e-5
  const float decay = single(rule.lr * rule.weight_decay);
  for_chunks(n, 1, kChunk, [=](int64_t, int64_t first, int64_t last) {
    for_vectors(last - first, [=](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
      const int64_t i = first + c;
      for (const float* ahead : {p + i, m + i, v + i}) __builtin_prefetch(ahead + kAhead / 2 / sizeof(float), 1);
      __builtin_prefetch(gradient + i + kAhead / 2 / sizeof(T));
      const Floats g = load(gradient + i, lanes);
      const Floats mean = load(m + i, lanes) * beta1 + g * rest1;
      const Floats square = load(v + i, lanes) * beta2 + g * g * rest2;
      const Floats moved = load(p + i, lanes) - lr * mean / (square_root(square) + eps);
      const Floats value = moved - decay * moved;
      store(m + i, mean, lanes);
      store(v + i, square, lanes);
      store(p + i, value, lanes);
      if (weights != nullptr) stream(weights + i, value, lanes);
    });
    finish_streams();
  });
}

}  // namespace
}  // namespace stopgo

using namespace stopgo;

extern "C" {

double stopgo_square_sum(int32_t dtype, int64_t n, const void* x) {
  double total = 0;
  with_dtype(dtype, [&](auto zero) { total = square_sum(n, static_cast<const decltype(zero)*>(x)); });
  return total;
}

void stopgo_adamw(int32_t dtype, int64_t n, const void* gradient, float* p, float* m, float* v, void* weights, double lr,
                  double beta1, double beta2, double eps, double weight_decay, const float* skipped) {
  if (*skipped != 0.0f) return;
  with_dtype(dtype, [=](auto zero) {
    using T = decltype(zero);
    adamw({lr, beta1, beta2, eps, weight_decay}, n, static_cast<const T*>(gradient), p, m, v, static_cast<T*>(weights));
  });
}

}  // extern "C"
