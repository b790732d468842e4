#include "copy_runs.h"

#include <thread>
#include <vector>

#include "convert.h"
#include "stream.h"

namespace {

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
  const Stream stream = best_stream();
  const int64_t size = bytes_of(from);
  divide(runs, lengths, threads, [=](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (lengths[i] == 0) continue;  // its addresses may be null, which memcpy does not take
      if (from == to)
        copy(writable(targets[i]), at(sources[i]), lengths[i] * size, at(sources[i + 1 < last ? i + 1 : i]), stream);
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
