// Instruction sets: which of them the processor has, and one pass over the file POCKETREC_LOOPS for each.
//
// A source names its file of loops and then includes this header, once. Each pass compiles the loops into a namespace
// of the instruction set's name, with POCKETREC_LANES floats in a register; POCKETREC_DISPATCH calls the best one at
// run time. Where POCKETREC_VNNI_LOOPS names a file, it is compiled last, into a namespace that it opens itself.

#include <algorithm>
#include <atomic>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define POCKETREC_X86 1
#include <immintrin.h>
#else
#define POCKETREC_X86 0
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // from inside the compiler's own intrinsics
#endif

namespace pocketrec {

enum Level : int { PORTABLE = 0, AVX2 = 1, AVX512 = 2, VNNI = 3 };

inline Level detect() {
#if POCKETREC_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vpopcntdq"))
    return __builtin_cpu_supports("avx512vnni") ? VNNI : AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return AVX2;
#endif
  return PORTABLE;
}

inline std::atomic<int> level{detect()};

}  // namespace pocketrec

namespace {
using namespace pocketrec;

namespace portable {
#define POCKETREC_LANES 4
#include POCKETREC_LOOPS
#undef POCKETREC_LANES
}  // namespace portable

#if POCKETREC_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi,bmi2")
#endif
namespace avx2 {
#define POCKETREC_LANES 8
#include POCKETREC_LOOPS
#undef POCKETREC_LANES
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,avx2,fma,f16c,popcnt,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,avx2,fma,f16c,popcnt,bmi,bmi2")
#endif
namespace avx512 {
#define POCKETREC_LANES 16
#include POCKETREC_LOOPS
#undef POCKETREC_LANES
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(POCKETREC_VNNI_LOOPS)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,avx512vnni,avx2,fma,f16c,popcnt,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,avx512vnni,avx2,fma,f16c,popcnt,bmi,bmi2")
#endif
#include POCKETREC_VNNI_LOOPS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // POCKETREC_VNNI_LOOPS

#endif  // POCKETREC_X86

}  // namespace

#if POCKETREC_X86
#define POCKETREC_DISPATCH(function, ...)                                     \
  switch (pocketrec::level.load(std::memory_order_relaxed)) {                 \
    case pocketrec::VNNI:                                                     \
    case pocketrec::AVX512: return avx512::function(__VA_ARGS__);             \
    case pocketrec::AVX2: return avx2::function(__VA_ARGS__);                 \
    default: return portable::function(__VA_ARGS__);                          \
  }
#else
#define POCKETREC_DISPATCH(function, ...) return portable::function(__VA_ARGS__);
#endif
