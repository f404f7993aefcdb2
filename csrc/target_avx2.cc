// AVX2 with FMA: x86 since Haswell and Zen.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "kernels.h"
#include "targets.h"
#include "tuning.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
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
bool RunsHere() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
}  // namespace

const Target kAvx2Target = {"avx2", RunsHere, avx2::MakeKernels<float>(),
                            avx2::MakeKernels<double>()};

}  // namespace sepconv
#endif
