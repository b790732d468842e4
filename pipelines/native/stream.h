// Long copies past the caches: a batch is far larger than they are, the one who reads it is another core or a GPU, and a
// store that does not first read the line that it overwrites saves a third of the traffic.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kLong = 64 << 10;  // bytes
// Bytes that are asked for before they are read: two pages, whose addresses are looked up then. They are asked into the second
// cache: on their way to the first they would hold the few buffers that stores past the caches need too.
constexpr int64_t kAhead = 8192;

inline void ask(const char* line) { __builtin_prefetch(line, 0, 2); }

inline void ask(const char* source, int64_t n) {
  for (int64_t i = 0; i < n; i += 64) ask(source + i);
}

// stream(target, source, n, ahead): meanwhile the n bytes from `ahead` on are asked for.
using Stream = void (*)(char*, const char*, int64_t, const char*);

void stream_plain(char* target, const char* source, int64_t n, const char*) {
  std::memcpy(target, source, static_cast<size_t>(n));
}

#if defined(__x86_64__)
// `target` is aligned to a line of 64 bytes, and n a multiple of four lines.
__attribute__((target("avx512f"))) void stream_avx512(char* target, const char* source, int64_t n, const char* ahead) {
  for (int64_t i = 0; i < n; i += 256) {
    __m512i line[4];
    for (int k = 0; k < 4; ++k) ask(ahead + i + 64 * k);
    for (int k = 0; k < 4; ++k) line[k] = _mm512_loadu_si512(source + i + 64 * k);
    for (int k = 0; k < 4; ++k) _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i + 64 * k), line[k]);
  }
  _mm_sfence();
}

__attribute__((target("avx2"))) void stream_avx2(char* target, const char* source, int64_t n, const char* ahead) {
  for (int64_t i = 0; i < n; i += 256) {
    __m256i half[8];
    for (int k = 0; k < 4; ++k) ask(ahead + i + 64 * k);
    for (int k = 0; k < 8; ++k) half[k] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i + 32 * k));
    for (int k = 0; k < 8; ++k) _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i + 32 * k), half[k]);
  }
  _mm_sfence();
}
#endif

Stream best_stream() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return stream_avx512;
  if (__builtin_cpu_supports("avx2")) return stream_avx2;
#endif
  return stream_plain;
}

// Copies n bytes, and asks for what is read `next`.
void copy(char* target, const char* source, int64_t n, const char* next, Stream stream) {
  if (n < kLong) {
    std::memcpy(target, source, static_cast<size_t>(n));
    return;
  }
  const int64_t head = -reinterpret_cast<int64_t>(target) & 63, body = (n - head) / 256 * 256 - kAhead;
  std::memcpy(target, source, static_cast<size_t>(head));
  target += head, source += head;
  stream(target, source, body, source + kAhead);
  target += body, source += body;
  stream(target, source, kAhead, next);
  std::memcpy(target + kAhead, source + kAhead, static_cast<size_t>(n - head - body - kAhead));
}

}  // namespace
