// How work is cut: fixed chunks of rows, whatever the number of threads, so that sums over rows have the same bits on
// one thread or many; and the scratch memory that goes with it.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace stopgo {

constexpr int64_t kChunkRows = 32;
constexpr int64_t kWorthThreads = 16384;  // values; below, waking a thread costs more than it does

// Memory that grows to the largest request and stays, aligned to a cache line.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // n elements of any content; the previous request's are gone.
  template <class T>
  T* get(int64_t n) {
    const size_t wanted = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
    if (wanted > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(64, wanted);
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = wanted;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Of the thread that runs a chunk.
inline Scratch& own_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

// Of the thread that makes a call: what the workers hand back, or read together.
inline Scratch& call_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

inline int64_t chunks_of(int64_t rows, int64_t chunk = kChunkRows) { return (rows + chunk - 1) / chunk; }

// f(number, first, last) for every chunk of rows, in parallel where it is worth it.
template <class F>
inline void for_chunks(int64_t rows, int64_t width, int64_t chunk, F&& f) {
  const int64_t chunks = chunks_of(rows, chunk);
#pragma omp parallel for schedule(static) if (chunks > 1 && rows * width > kWorthThreads)
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t first = c * chunk;
    f(c, first, first + chunk < rows ? first + chunk : rows);
  }
}

template <class F>
inline void for_chunks(int64_t rows, int64_t width, F&& f) {
  for_chunks(rows, width, kChunkRows, f);
}

}  // namespace stopgo
