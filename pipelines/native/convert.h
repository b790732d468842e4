// Values of one type to values of another. One loop per pair of types, compiled for AVX-512, AVX2 and plain x86-64 or
// anything else, chosen when the process runs. Values are moved by memcpy, since addresses need no alignment; compilers turn
// that into vector loads and stores.
#pragma once
#include <cstdint>
#include <cstring>

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

int64_t bytes_of(int32_t type) { return type == kFloat32 ? 4 : type == kUint8 ? 1 : 2; }

}  // namespace
