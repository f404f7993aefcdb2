// AVX-512 F/BW/DQ/VL: every server core since Skylake-SP and Zen 4. With BF16 as well (Cooper Lake,
// Sapphire Rapids, Zen 4) the same kernels, and one for pairs of bfloat16.
#if defined(__x86_64__)
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
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

namespace sepconv::avx512 {

#define SEPCONV_VECTOR_BYTES 64
#define SEPCONV_SIMD_AVX512
inline constexpr TargetTuning kTuning = kAvx512Tuning;
static_assert(kTuning.vector_bytes == SEPCONV_VECTOR_BYTES);

#include "simd.h"
#include "kernel-inl.h"

inline constexpr PairKernels kPairKernels = MakePairKernels();

}  // namespace sepconv::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace sepconv {
namespace {
bool RunsHere() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool RunsBf16Here() { return RunsHere() && __builtin_cpu_supports("avx512bf16"); }
}  // namespace

const Target kAvx512Bf16Target =
    avx512::MakeTarget("avx512_bf16", RunsBf16Here, &avx512::kPairKernels);
const Target kAvx512Target = avx512::MakeTarget("avx512", RunsHere);

}  // namespace sepconv
#endif
