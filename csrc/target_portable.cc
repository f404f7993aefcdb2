// What the compiler takes for granted on this platform: SSE2 on x86-64.
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

namespace sepconv::portable {

#define SEPCONV_VECTOR_BYTES 16
inline constexpr TargetTuning kTuning = kPortableTuning;
static_assert(kTuning.vector_bytes == SEPCONV_VECTOR_BYTES);

#include "simd.h"
#include "kernel-inl.h"

}  // namespace sepconv::portable

namespace sepconv {
namespace {
bool RunsHere() { return true; }
}  // namespace

const Target kPortableTarget = portable::MakeTarget("portable", RunsHere);

}  // namespace sepconv
