// AVX2 with FMA and half-precision conversions: x86 since Haswell and Zen.
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "targets.h"
#include "tuning.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace sepconv::avx2 {

#define SEPCONV_VECTOR_BYTES 32
#define SEPCONV_SIMD_AVX2
inline constexpr TargetTuning kTuning = kAvx2Tuning;
static_assert(kTuning.vector_bytes == SEPCONV_VECTOR_BYTES);

#include "simd.h"
#include "kernel-inl.h"

}  // namespace sepconv::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace sepconv {
namespace {
bool RunsHere() {
  // Older compilers do not know f16c by name.
  unsigned int eax, ebx, ecx, edx;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
}  // namespace

const Target kAvx2Target = avx2::MakeTarget("avx2", RunsHere);

}  // namespace sepconv
#endif
