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

// The same for rows of `width` uint8 values, each times its row's float32 scale: run i has `rows[i]` rows, and its scales
// begin at the address `scales[i]`, with the alignment of a float32.
void stopgo_scale_runs(int32_t to, int64_t width, int64_t runs, const int64_t* sources, const int64_t* scales,
                       const int64_t* targets, const int64_t* rows, int32_t threads);
}
