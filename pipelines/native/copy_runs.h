// Copying many runs of values at once, converting on the way: from a feature store's memory map into a batch.
//
// A flat C interface without torch headers, called through ctypes, which lets go of Python's lock meanwhile.
#pragma once
#include <cstdint>

extern "C" {

int32_t stopgo_pipelines_abi_version();

// Run i: `lengths[i]` values of type `from` at the address `sources[i]` become values of type `to` at `targets[i]`.
//
// Types: 0 float32, 1 bfloat16, 2 float16, 3 uint8; `to` is 0 or 1. Rounded to nearest even; a NaN stays one. Where the
// types are equal it is a copy. Addresses need no alignment. Runs do not overlap.
// `threads` threads share the runs, each about as many values.
void stopgo_copy_runs(int32_t from, int32_t to, int64_t runs, const int64_t* sources, const int64_t* targets,
                      const int64_t* lengths, int32_t threads);

// Where the parts of a store's records lie: addresses, one an image, aligned to the type that they are of.
struct StopgoRecords {
  int32_t type;  // of the features
  int64_t width;
  const int64_t* means;     // float32 [width]
  const int64_t* boxes;     // float32 [regions, 4]: x1, y1, x2, y2 in pixels
  const int64_t* scales;    // float32 [regions], read where the type is uint8
  const int64_t* features;  // [regions, width]
};

// Images whole, from a store to a batch. Image `rows[i]` of the store fills the batch's rows from `first[i]` on: its mean
// where `global_row` is 1, then its first `counts[i]` regions. `features`: [rows, width] of type `to`, or null; uint8 values
// are multiplied by their row's scale. `locations`: float32 [rows, 5] or null: x1/w, y1/h, x2/w, y2/h, area fraction, in
// shares of `sizes` [images, 2]: width, height; the global row's are 0, 0, 1, 1, 1.
void stopgo_gather_records(const StopgoRecords* records, int32_t to, int64_t images, const int64_t* rows, const int64_t* counts,
                   const int64_t* first, int32_t global_row, const int32_t* sizes, char* features, float* locations,
                   int32_t threads);
}
