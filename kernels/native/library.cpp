// What this library is: the version of its interface, and the instruction set that it was compiled for.
#include "simd.h"
#include "stopgo.h"

extern "C" {

int32_t stopgo_abi_version() { return 4; }

const char* stopgo_isa() {
#if defined(STOPGO_AMX)
  return "amx";
#elif defined(__AVX512BF16__)
  return "avx512bf16";
#elif defined(__AVX512BW__)
  return "avx512";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "portable";
#endif
}

}  // extern "C"
