// AVX-512 F/BW/DQ/VL: every server core since Skylake-SP and Zen 4. With BF16 as well (Cooper Lake,
// Sapphire Rapids, Zen 4) the same kernels, and some for pairs of bfloat16; with AMX (Sapphire
// Rapids) those multiply by tile registers.
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

#define SEPCONV_SIMD_AMX

#include "simd.h"
#include "kernel-inl.h"

// Behind what it uses.
#include "amx-inl.h"

inline constexpr PairKernels kPairKernels = MakePairKernels();
inline constexpr PairKernels kTileKernels = MakeTileKernels();

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

// Intel's cores add up pairs at half the rate of multiply-adds of floats (a Xeon with AMX: 115
// against 240 GFLOP/s; older ones were not tried), AMD's at twice that.
bool PairsPayHere() { return !__builtin_cpu_is("intel"); }

// Linux gives a process its tile registers when it asks for them.
bool RunsAmxHere() {
#if defined(__linux__)
  static const bool runs = [] {
    unsigned eax, ebx, ecx, edx;
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    if (!RunsBf16Here() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, since Linux 5.16
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return runs;
#else
  return false;
#endif
}
}  // namespace

const Target kAmxBf16Target = avx512::MakeTarget("amx_bf16", RunsAmxHere, &avx512::kTileKernels);
const Target kAvx512Bf16Target =
    avx512::MakeTarget("avx512_bf16", RunsBf16Here, &avx512::kPairKernels, PairsPayHere);
const Target kAvx512Target = avx512::MakeTarget("avx512", RunsHere);

}  // namespace sepconv
#endif
