#include "copy_runs.h"

#include <thread>
#include <vector>

#include "convert.h"
#include "stream.h"

namespace {

constexpr int64_t kRowsAhead = 2;  // rows that are asked for before they are converted

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

// A region's x1/w, y1/h, x2/w, y2/h and share of the area; before them those of the whole image.
void locate(int64_t address, int64_t n, const int32_t* size, int32_t global_row, float* target) {
  const float* boxes = reinterpret_cast<const float*>(address);
  const float width = static_cast<float>(size[0]), height = static_cast<float>(size[1]);
  if (global_row) {
    for (int k = 0; k < 5; ++k) target[k] = k < 2 ? 0.0f : 1.0f;
    target += 5;
  }
  for (int64_t i = 0; i < n; ++i, boxes += 4, target += 5) {
    const float left = boxes[0] / width, top = boxes[1] / height, right = boxes[2] / width, bottom = boxes[3] / height;
    target[0] = left, target[1] = top, target[2] = right, target[3] = bottom;
    target[4] = (right - left) * (bottom - top);
  }
}

// How the features of a store become values of a type.
struct Features {
  StopgoRecords records;
  int64_t row_bytes;  // in the batch
  Convert mean_row, region_row;
  Stream stream;  // where nothing is converted

  Features(const StopgoRecords& from, int32_t to)
      : records(from), row_bytes(from.width * bytes_of(to)), mean_row(best(kFloat32, to)),
        region_row(best(from.type, to)), stream(from.type == to ? best_stream() : nullptr) {}

  void mean(int64_t image, char* target) const { mean_row(at(records.means[image]), target, records.width, 1.0f); }

  void regions(int64_t image, int64_t n, char* target) const {
    const char* source = at(records.features[image]);
    if (stream) return copy(target, source, n * row_bytes, source, stream);
    const float* scales = records.type == kUint8 ? reinterpret_cast<const float*>(records.scales[image]) : nullptr;
    const int64_t stored_bytes = records.width * bytes_of(records.type);
    for (int64_t row = 0; row < n; ++row, source += stored_bytes, target += row_bytes) {
      if (row + kRowsAhead < n) ask(source + kRowsAhead * stored_bytes, stored_bytes);
      region_row(source, target, records.width, scales ? scales[row] : 1.0f);
    }
  }

  // What is read of an image before anything of it has been asked for.
  void ask_ahead(int64_t image, int64_t n, int32_t global_row) const {
    const int64_t stored_bytes = n * records.width * bytes_of(records.type);
    if (global_row) ask(at(records.means[image]), 4 * records.width);
    if (records.type == kUint8) ask(at(records.scales[image]), 4 * n);
    ask(at(records.features[image]), stored_bytes < kAhead ? stored_bytes : kAhead);
  }
};

}  // namespace

int32_t stopgo_pipelines_abi_version() { return 2; }

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

void stopgo_gather_records(const StopgoRecords* records, int32_t to, int64_t images, const int64_t* rows, const int64_t* counts,
                   const int64_t* first, int32_t global_row, const int32_t* sizes, char* features, float* locations,
                   int32_t threads) {
  const int64_t row_bytes = records->width * bytes_of(to);
  const Features move(*records, to);
  divide(images, counts, threads, [=](int64_t begin, int64_t end) {
    const auto ask_ahead = [=](int64_t i) {
      if (locations) ask(at(records->boxes[rows[i]]), 16 * counts[i]);
      if (features) move.ask_ahead(rows[i], counts[i], global_row);
    };
    if (begin < end) ask_ahead(begin);
    for (int64_t i = begin; i < end; ++i) {
      if (i + 1 < end) ask_ahead(i + 1);
      if (features) {
        char* target = features + first[i] * row_bytes;
        if (global_row) move.mean(rows[i], target);
        if (counts[i]) move.regions(rows[i], counts[i], target + global_row * row_bytes);
      }
      if (locations) locate(records->boxes[rows[i]], counts[i], sizes + 2 * i, global_row, locations + first[i] * 5);
    }
  });
}
