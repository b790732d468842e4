// One loop per pair of types, compiled for AVX-512, AVX2 and plain x86-64 or anything else, chosen when the process runs.
// Values are moved by memcpy, since addresses need no alignment; compilers turn that into vector loads and stores.
//
// Long copies between equal types go past the caches: a batch is far larger than they are, the one who reads it is another
// core or a GPU, and a store that does not first read the line that it overwrites saves a third of the traffic.
#include "copy_runs.h"

#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

enum Type : int32_t { kFloat32, kBFloat16, kFloat16, kUint8 };

INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct Float32 {
  using Stored = uint32_t;
  static INLINE float load(uint32_t bits) { return float_of(bits); }
  static INLINE uint32_t store(float value) { return bits_of(value); }
};

struct BFloat16 {
  using Stored = uint16_t;
  static INLINE float load(uint16_t bits) { return float_of(uint32_t(bits) << 16); }
  static INLINE uint16_t store(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>(value == value ? rounded : 0x7FC0);
  }
};

struct Float16 {
  using Stored = uint16_t;
  // The exponent is moved from a bias of 15 to one of 127; infinities, NaNs and subnormal values need a second move.
  static INLINE float load(uint16_t half) {
    const uint32_t shifted = uint32_t(half & 0x7FFF) << 13;
    const uint32_t exponent = shifted & 0x0F800000;
    uint32_t bits = shifted + 0x38000000;
    bits += exponent == 0x0F800000 ? 0x38000000 : exponent == 0 ? 0x00800000 : 0;
    const uint32_t normal = bits_of(float_of(bits) - float_of(0x38800000));
    return float_of((exponent == 0 ? normal : bits) | uint32_t(half & 0x8000) << 16);
  }
};

struct Uint8 {
  using Stored = uint8_t;
  static INLINE float load(uint8_t value) { return static_cast<float>(value); }
};

template <class From, class To>
INLINE void convert(const char* source, char* target, int64_t n, float scale) {
  for (int64_t i = 0; i < n; ++i) {
    typename From::Stored in;
    std::memcpy(&in, source + i * sizeof in, sizeof in);
    float value = From::load(in);
    if (sizeof in == 1) value *= scale;
    const typename To::Stored out = To::store(value);
    std::memcpy(target + i * sizeof out, &out, sizeof out);
  }
}

using Convert = void (*)(const char*, char*, int64_t, float);

template <class From, class To>
void convert_plain(const char* source, char* target, int64_t n, float scale) {
  convert<From, To>(source, target, n, scale);
}

#if defined(__x86_64__)
template <class From, class To>
__attribute__((target("avx2"))) void convert_avx2(const char* source, char* target, int64_t n, float scale) {
  convert<From, To>(source, target, n, scale);
}

template <class From, class To>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))) void convert_avx512(
    const char* source, char* target, int64_t n, float scale) {
  convert<From, To>(source, target, n, scale);
}
#endif

template <class From, class To>
Convert best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return convert_avx512<From, To>;
  if (__builtin_cpu_supports("avx2")) return convert_avx2<From, To>;
#endif
  return convert_plain<From, To>;
}

template <class From>
Convert best(int32_t to) {
  return to == kFloat32 ? best<From, Float32>() : best<From, BFloat16>();
}

Convert best(int32_t from, int32_t to) {
  switch (from) {
    case kFloat32: return best<Float32>(to);
    case kBFloat16: return best<BFloat16>(to);
    case kFloat16: return best<Float16>(to);
    default: return best<Uint8>(to);
  }
}

constexpr int64_t kLong = 64 << 10;  // bytes
constexpr int64_t kAhead = 8192;  // bytes that are asked for before they are read: two pages, whose addresses are looked up then

using Copy = void (*)(char*, const char*, int64_t);

void copy_plain(char* target, const char* source, int64_t n) { std::memcpy(target, source, static_cast<size_t>(n)); }

#if defined(__x86_64__)
// `target` is aligned to a line of 64 bytes, and n a multiple of four lines.
__attribute__((target("avx512f"))) void stream_avx512(char* target, const char* source, int64_t n) {
  for (int64_t i = 0; i < n; i += 256) {
    __m512i line[4];
    for (int k = 0; k < 4; ++k) _mm_prefetch(source + i + kAhead + 64 * k, _MM_HINT_T0);
    for (int k = 0; k < 4; ++k) line[k] = _mm512_loadu_si512(source + i + 64 * k);
    for (int k = 0; k < 4; ++k) _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i + 64 * k), line[k]);
  }
  _mm_sfence();
}

__attribute__((target("avx2"))) void stream_avx2(char* target, const char* source, int64_t n) {
  for (int64_t i = 0; i < n; i += 256) {
    __m256i half[8];
    for (int k = 0; k < 4; ++k) _mm_prefetch(source + i + kAhead + 64 * k, _MM_HINT_T0);
    for (int k = 0; k < 8; ++k) half[k] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i + 32 * k));
    for (int k = 0; k < 8; ++k) _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i + 32 * k), half[k]);
  }
  _mm_sfence();
}
#endif

Copy best_stream() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return stream_avx512;
  if (__builtin_cpu_supports("avx2")) return stream_avx2;
#endif
  return copy_plain;
}

void copy(char* target, const char* source, int64_t n, Copy stream) {
  if (n < kLong) return copy_plain(target, source, n);
  const int64_t head = -reinterpret_cast<int64_t>(target) & 63, body = (n - head) / 256 * 256;
  copy_plain(target, source, head);
  stream(target + head, source + head, body);
  copy_plain(target + head + body, source + head + body, n - head - body);
}

int64_t bytes_of(int32_t type) { return type == kFloat32 ? 4 : type == kUint8 ? 1 : 2; }

const char* at(int64_t address) { return reinterpret_cast<const char*>(address); }
char* writable(int64_t address) { return reinterpret_cast<char*>(address); }

// work(first run, last run) on each thread, divided where the sum of lengths is.
template <class Work>
void divide(int64_t runs, const int64_t* lengths, int32_t threads, const Work& work) {
  int64_t total = 0;
  for (int64_t i = 0; i < runs; ++i) total += lengths[i];
  std::vector<std::thread> others;
  int64_t first = 0, done = 0;
  for (int32_t part = 1; part < threads; ++part) {
    int64_t last = first;
    while (last < runs && done < total / threads * part) done += lengths[last++];
    if (last > first) others.emplace_back(work, first, last);
    first = last;
  }
  work(first, runs);
  for (std::thread& other : others) other.join();
}

}  // namespace

int32_t stopgo_pipelines_abi_version() { return 1; }

void stopgo_copy_runs(int32_t from, int32_t to, int64_t runs, const int64_t* sources, const int64_t* targets,
                      const int64_t* lengths, int32_t threads) {
  const Convert convert_run = best(from, to);
  const Copy stream = best_stream();
  const int64_t size = bytes_of(from);
  divide(runs, lengths, threads, [=](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (lengths[i] == 0) continue;  // its addresses may be null, which memcpy does not take
      if (from == to)
        copy(writable(targets[i]), at(sources[i]), lengths[i] * size, stream);
      else
        convert_run(at(sources[i]), writable(targets[i]), lengths[i], 1.0f);
    }
  });
}

void stopgo_scale_runs(int32_t to, int64_t width, int64_t runs, const int64_t* sources, const int64_t* scales,
                       const int64_t* targets, const int64_t* rows, int32_t threads) {
  const Convert convert_row = best(kUint8, to);
  const int64_t size = bytes_of(to);
  divide(runs, rows, threads, [=](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const float* scale = reinterpret_cast<const float*>(scales[i]);
      for (int64_t row = 0; row < rows[i]; ++row)
        convert_row(at(sources[i]) + row * width, writable(targets[i]) + row * width * size, width, scale[row]);
    }
  });
}
