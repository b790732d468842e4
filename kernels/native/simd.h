// Vectors of floats as wide as the instruction set that this file is compiled for: 16, 8 or 4 lanes, by the vector
// extensions of GCC and Clang; intrinsics only where those have no word for it. Everything is float32 between a load
// and a store. Elementary functions (exp, log, the normal distribution) are in elementary.h.
//
// A row is walked in whole vectors and one part of a vector:
//   for_vectors(width, [&](int64_t c, auto lanes) { store(y + c, load(x + c, lanes) + load(b + c, lanes), lanes); });
// A part loads zeros beyond its lanes, stores nothing there, and reads no byte outside the row.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AMX_BF16__) || defined(__AMXBF16__)  // GCC's name, and that of Clang before 15
#define STOPGO_AMX 1
#endif

#define STOPGO_INLINE inline __attribute__((always_inline))
#define STOPGO_INLINE_LAMBDA __attribute__((always_inline))

namespace stopgo {

#if defined(__AVX512BW__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// How much of a vector is meant.
struct Whole {};
struct Part {
  int n;  // the first n lanes, 0 < n < kLanes
};

STOPGO_INLINE int count(Whole) { return kLanes; }
STOPGO_INLINE int count(Part part) { return part.n; }

// f(column, Whole) for every whole vector of a row, f(column, Part) for what is left.
template <class F>
STOPGO_INLINE void for_vectors(int64_t width, F&& f) {
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) f(c, Whole{});
  if (c < width) f(c, Part{static_cast<int>(width - c)});
}

STOPGO_INLINE Floats broadcast(float x) { return x - Floats{}; }  // not a sum, which would turn -0 into 0

// Bits moved between types of the same size.
template <class To, class From>
STOPGO_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// b where either is a NaN.
STOPGO_INLINE Floats maximum(Floats a, Floats b) {
#if defined(__AVX512BW__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
STOPGO_INLINE Floats minimum(Floats a, Floats b) {
#if defined(__AVX512BW__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
STOPGO_INLINE Floats absolute(Floats x) { return bits_as<Floats>(bits_as<Words>(x) & 0x7FFFFFFFu); }

// a * b + c, rounded once where the instruction set can: spelt out where the same bits are wanted wherever it is
// inlined.
STOPGO_INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512BW__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

STOPGO_INLINE Floats square_root(Floats x) {
#if defined(__AVX512BW__)
  return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#elif defined(__SSE2__)
  return _mm_sqrt_ps(x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// --- Conversions ---------------------------------------------------------------------------------

// Integers of other sizes, by intrinsics where GCC's own conversion takes a vector apart first.
STOPGO_INLINE Words words(Halves x) {
#if defined(__AVX512BW__)
  return bits_as<Words>(_mm512_cvtepu16_epi32(bits_as<__m256i>(x)));
#elif defined(__AVX2__)
  return bits_as<Words>(_mm256_cvtepu16_epi32(bits_as<__m128i>(x)));
#elif defined(__SSE2__)
  return bits_as<Words>(_mm_unpacklo_epi16(_mm_cvtsi64_si128(bits_as<long long>(x)), _mm_setzero_si128()));
#else
  return __builtin_convertvector(x, Words);
#endif
}
STOPGO_INLINE Words words(Bytes x) {
#if defined(__AVX512BW__)
  return bits_as<Words>(_mm512_cvtepu8_epi32(bits_as<__m128i>(x)));
#elif defined(__AVX2__)
  return bits_as<Words>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bits_as<long long>(x))));
#elif defined(__SSE2__)
  const __m128i none = _mm_setzero_si128();
  return bits_as<Words>(_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(bits_as<int>(x)), none), none));
#else
  return __builtin_convertvector(x, Words);
#endif
}
STOPGO_INLINE Halves halves(Words x) {  // of values below 2^16
#if defined(__AVX512BW__)
  return bits_as<Halves>(_mm512_cvtepi32_epi16(bits_as<__m512i>(x)));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(bits_as<__m256i>(x), bits_as<__m256i>(x));
  return bits_as<Halves>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#elif defined(__SSE2__)
  const __m128i as_signed = _mm_srai_epi32(_mm_slli_epi32(bits_as<__m128i>(x), 16), 16);  // so that packing is exact
  return bits_as<Halves>(_mm_cvtsi128_si64(_mm_packs_epi32(as_signed, as_signed)));
#else
  return __builtin_convertvector(x, Halves);
#endif
}

STOPGO_INLINE Floats widen(Halves x, BFloat16) {
#if defined(__AVX512BW__)
  // A permutation that puts each value into an upper half: one instruction where widening and shifting are two.
  const __m512i place =
      _mm512_set_epi32(0xF0000, 0xE0000, 0xD0000, 0xC0000, 0xB0000, 0xA0000, 0x90000, 0x80000,  //
                       0x70000, 0x60000, 0x50000, 0x40000, 0x30000, 0x20000, 0x10000, 0);
  const __m512i from = _mm512_castsi256_si512(bits_as<__m256i>(x));
  return bits_as<Floats>(_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, place, from));
#else
  return bits_as<Floats>(words(x) << 16);
#endif
}

STOPGO_INLINE Halves narrow(Floats x, BFloat16) {
#if defined(__AVX512BF16__)
  return bits_as<Halves>(_mm512_cvtneps_pbh(x));
#else
  const Words bits = bits_as<Words>(x);
  const Words rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  const Words quiet_nan = bits | 0x400000u;
  return halves((x == x ? rounded : quiet_nan) >> 16);
#endif
}

STOPGO_INLINE Floats widen(Halves x, Float16) {
#if defined(__AVX512BW__)
  return _mm512_cvtph_ps(bits_as<__m256i>(x));
#elif defined(__F16C__) && defined(__AVX2__)
  return _mm256_cvtph_ps(bits_as<__m128i>(x));
#else
  const Words bits = words(x), sign = (bits & 0x8000u) << 16;
  // The exponent of float32 is 112 larger; a product by 2^112 adds that, and makes subnormals normal on the way.
  const Words finite = bits_as<Words>(bits_as<Floats>((bits & 0x7FFFu) << 13) * 0x1p112f);
  const Words special = ((bits & 0x3FFu) << 13) | 0x7F800000u;
  return bits_as<Floats>(sign | ((bits & 0x7C00u) == 0x7C00u ? special : finite));
#endif
}

STOPGO_INLINE Halves narrow(Floats x, Float16) {
#if defined(__AVX512BW__)
  return bits_as<Halves>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__) && defined(__AVX2__)
  return bits_as<Halves>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const Words bits = bits_as<Words>(x), size = bits & 0x7FFFFFFFu, sign = (bits >> 16) & 0x8000u;
  const Words normal = (size + 0xFFFu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
  // Added to 0.5, a float32's last place is that of a subnormal float16: the adder rounds.
  const Words subnormal = bits_as<Words>(bits_as<Floats>(size) + 0.5f) - 0x3F000000u;
  const Words special = size > 0x7F800000u ? Words{} + 0x7E00u : Words{} + 0x7C00u;
  const Words finite = size < (113u << 23) ? subnormal : normal;
  return halves(sign | (size < (143u << 23) ? finite : special));
#endif
}

// --- Loads and stores ----------------------------------------------------------------------------

template <class Vector, class T>
STOPGO_INLINE Vector raw_load(const T* p, Whole) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class Vector, class T>
STOPGO_INLINE void raw_store(T* p, Vector v, Whole) {
  std::memcpy(p, &v, sizeof v);
}

template <class Vector, class T>
STOPGO_INLINE Vector raw_load(const T* p, Part part) {
  Vector v{};
  std::memcpy(&v, p, part.n * sizeof(T));
  return v;
}

template <class Vector, class T>
STOPGO_INLINE void raw_store(T* p, Vector v, Part part) {
  std::memcpy(p, &v, part.n * sizeof(T));
}

#if defined(__AVX512BW__)
STOPGO_INLINE __mmask16 mask_of(Part part) { return static_cast<__mmask16>((1u << part.n) - 1); }

template <>
STOPGO_INLINE Floats raw_load<Floats, float>(const float* p, Part part) {
  return _mm512_maskz_loadu_ps(mask_of(part), p);
}
template <>
STOPGO_INLINE void raw_store<Floats, float>(float* p, Floats v, Part part) {
  _mm512_mask_storeu_ps(p, mask_of(part), v);
}
template <>
STOPGO_INLINE Halves raw_load<Halves, uint16_t>(const uint16_t* p, Part part) {
  return bits_as<Halves>(_mm256_maskz_loadu_epi16(mask_of(part), p));
}
template <>
STOPGO_INLINE void raw_store<Halves, uint16_t>(uint16_t* p, Halves v, Part part) {
  _mm256_mask_storeu_epi16(p, mask_of(part), bits_as<__m256i>(v));
}
template <>
STOPGO_INLINE Bytes raw_load<Bytes, uint8_t>(const uint8_t* p, Part part) {
  return bits_as<Bytes>(_mm_maskz_loadu_epi8(mask_of(part), p));
}
#endif

template <class Lanes>
STOPGO_INLINE Floats load(const float* p, Lanes lanes) {
  return raw_load<Floats>(p, lanes);
}
template <class T, class Lanes>
STOPGO_INLINE Floats load(const T* p, Lanes lanes) {
  return widen(raw_load<Halves>(&p->bits, lanes), T{});
}

template <class Lanes>
STOPGO_INLINE void store(float* p, Floats v, Lanes lanes) {
  raw_store(p, v, lanes);
}
template <class T, class Lanes>
STOPGO_INLINE void store(T* p, Floats v, Lanes lanes) {
  raw_store(&p->bits, narrow(v, T{}), lanes);
}

// Stores past the caches, for memory that is written whole and not read soon: it need not be fetched first. A thread that
// did so calls `finish_streams` before others read. Where p is not aligned, ordinary stores.
template <class T, class Lanes>
STOPGO_INLINE void stream(T* p, Floats v, Lanes lanes) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(T) == 2)
    if (count(lanes) == kLanes && reinterpret_cast<uintptr_t>(p) % 32 == 0)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits_as<__m256i>(narrow(v, T{})));
#endif
  store(p, v, lanes);
}
inline void finish_streams() {
#if defined(__AVX512BW__)
  _mm_sfence();
#endif
}

// One value.
template <class T>
STOPGO_INLINE float load_one(const T* p) {
  return load(p, Part{1})[0];
}
template <class T>
STOPGO_INLINE void store_one(T* p, float x) {
  store(p, broadcast(x), Part{1});
}

template <class T>
STOPGO_INLINE Floats load(const T* p) {
  return load(p, Whole{});
}
template <class T>
STOPGO_INLINE void store(T* p, Floats v) {
  store(p, v, Whole{});
}

// --- Lanes chosen --------------------------------------------------------------------------------

STOPGO_INLINE Ints lane_numbers() {
  Ints lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane;
}

// v in the lanes that are meant, `other` beyond them.
STOPGO_INLINE Floats only(Floats v, Whole, float = 0.0f) { return v; }
STOPGO_INLINE Floats only(Floats v, Part part, float other = 0.0f) {
  return lane_numbers() < part.n ? v : broadcast(other);
}

// --- Over the lanes, always in the same order ----------------------------------------------------

template <class F>
STOPGO_INLINE float fold(Floats v, F&& f) {
  float lane[kLanes];
  std::memcpy(lane, &v, sizeof v);
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lane[i] = f(lane[i], lane[i + n]);
  return lane[0];
}

STOPGO_INLINE float sum(Floats v) {
#if defined(__AVX512BW__)
  return _mm512_reduce_add_ps(v);
#else
  return fold(v, [](float a, float b) { return a + b; });
#endif
}

STOPGO_INLINE float largest(Floats v) {
#if defined(__AVX512BW__)
  return _mm512_reduce_max_ps(v);
#else
  return fold(v, [](float a, float b) { return a > b ? a : b; });
#endif
}

// --- Dtypes of the interface ---------------------------------------------------------------------

// f(T{}) for the element type of a dtype code.
template <class F>
inline void with_dtype(int32_t dtype, F&& f) {
  switch (dtype) {
    case 0: return f(float{});
    case 1: return f(BFloat16{});
    case 2: return f(Float16{});
    default: std::abort();  // the interface has three
  }
}

}  // namespace stopgo
