// Attention over packed rows. Every (direction, item, head) is a task of its own with outputs of its own: nothing is
// added up between threads, and the bits do not depend on their number.
#include "attention.h"

namespace stopgo {
namespace {

// f(Math{}) for the arithmetic that serves tensors of T fastest on this machine.
template <class T, class F>
void with_math(F&& f) {
  if constexpr (std::is_same_v<T, BFloat16>) {
#if defined(STOPGO_AMX)
    return f(TileMath{});
#elif defined(__AVX512BF16__)
    // AMD's cores do bfloat16 dot products at twice the rate of float32, Intel's since Sapphire Rapids at half of it.
    static const bool dots_are_fast = __builtin_cpu_is("amd");
    if (dots_are_fast) return f(PairMath{});
#endif
  }
  f(SingleMath{});
}

}  // namespace
}  // namespace stopgo

using namespace stopgo;

extern "C" {

void stopgo_attention_forward(int32_t dtype, int32_t n_directions, const StopgoDirection* directions, int64_t n_items,
                              int64_t heads, int64_t head_dim) {
  with_dtype(dtype, [=](auto zero) {
    using T = decltype(zero);
    with_math<T>([=](auto math) {
      using Math = decltype(math);
      for_heads<T, Math>(n_directions, directions, n_items, heads, head_dim, attention_forward<T, Math>);
    });
  });
}

void stopgo_attention_backward(int32_t dtype, int32_t n_directions, const StopgoDirection* directions, int64_t n_items,
                               int64_t heads, int64_t head_dim) {
  with_dtype(dtype, [=](auto zero) {
    using T = decltype(zero);
    with_math<T>([=](auto math) {
      using Math = decltype(math);
      for_heads<T, Math>(n_directions, directions, n_items, heads, head_dim, attention_backward<T, Math>);
    });
  });
}

}  // extern "C"
