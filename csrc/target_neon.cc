// NEON is part of every aarch64 CPU: no target region is needed.
#if defined(__aarch64__)
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

namespace sepconv::neon {

#define SEPCONV_VECTOR_BYTES 16
inline constexpr TargetTuning kTuning = kNeonTuning;
static_assert(kTuning.vector_bytes == SEPCONV_VECTOR_BYTES);

#include "simd.h"
#include "kernel-inl.h"

}  // namespace sepconv::neon

namespace sepconv {
namespace {
bool RunsHere() { return true; }
}  // namespace

const Target kNeonTarget = neon::MakeTarget("neon", RunsHere);

}  // namespace sepconv
#endif
