// The 64-byte vectors and the tile shapes of the AVX-512 target on a CPU with AVX2: slow, never
// chosen by itself. With it every tile edge of the AVX-512 target is tested on machines that do not
// have the instructions. So are the kernels for pairs of bfloat16, with tile registers too.
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
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace sepconv::emulated_avx512 {

#define SEPCONV_VECTOR_BYTES 64
inline constexpr TargetTuning kTuning = kAvx512Tuning;
static_assert(kTuning.vector_bytes == SEPCONV_VECTOR_BYTES);

#include "simd.h"
#include "kernel-inl.h"

// Behind what it uses.
#include "amx-inl.h"

inline constexpr PairKernels kPairKernels = MakePairKernels();
inline constexpr PairKernels kTileKernels = MakeTileKernels();

}  // namespace sepconv::emulated_avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace sepconv {
namespace {
bool RunsHere() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
}  // namespace

const Target kEmulatedAvx512Target =
    emulated_avx512::MakeTarget("emulated_avx512", RunsHere, &emulated_avx512::kPairKernels);
const Target kEmulatedAmxTarget =
    emulated_avx512::MakeTarget("emulated_amx", RunsHere, &emulated_avx512::kTileKernels);

}  // namespace sepconv
#endif
