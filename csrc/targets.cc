#include "targets.h"

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <string>
#include <vector>

#include "sepconv.h"
#include "tuning.h"

namespace sepconv {
namespace {

// Best first. The emulated ones are for tests and never chosen by themselves.
const Target* const kTargets[] = {
#if defined(SEPCONV_PORTABLE_ONLY)
    &kPortableTarget,
#elif defined(__x86_64__)
    &kAmxBf16Target,  &kAvx512Bf16Target,     &kAvx512Target,      &kAvx2Target,
    &kPortableTarget, &kEmulatedAvx512Target, &kEmulatedAmxTarget,
#elif defined(__aarch64__)
    &kNeonTarget,
    &kPortableTarget,
#else
    &kPortableTarget,
#endif
};

const Target* FindTarget(const std::string& name) {
  for (const Target* target : kTargets) {
    if (name == target->name) return target->runs_here() ? target : nullptr;
  }
  return nullptr;
}

// What SEPCONV_TARGET names, else the best. The name was checked when the module was loaded (see
// bind/module.cc); here a wrong one means the best.
const Target* DefaultTarget() {
  const char* forced = std::getenv("SEPCONV_TARGET");
  if (const Target* target = forced ? FindTarget(forced) : nullptr) return target;
  for (const Target* target : kTargets) {
    if (target->runs_here() && target->pays_here()) return target;
  }
  return &kPortableTarget;
}

std::atomic<const Target*> current{nullptr};

}  // namespace

const Target& CurrentTargetTable() {
  const Target* target = current.load(std::memory_order_acquire);
  if (target) return *target;
  target = DefaultTarget();
  current.store(target, std::memory_order_release);
  return *target;
}

std::vector<std::string> AvailableTargets() {
  std::vector<std::string> names;
  for (const Target* target : kTargets) {
    if (target->runs_here()) names.push_back(target->name);
  }
  return names;
}

std::string CurrentTarget() { return CurrentTargetTable().name; }

bool SetTarget(const std::string& name) {
  const Target* target = name.empty() ? DefaultTarget() : FindTarget(name);
  if (!target) return false;
  current.store(target, std::memory_order_release);
  return true;
}

TileConstants CurrentTileConstants(DType dtype) {
  const Target& target = CurrentTargetTable();
  const bool wide = dtype == DType::kFloat64;
  return {wide ? target.f64.lanes : target.f32.lanes,
          wide ? target.f64.rows : target.f32.rows,
          wide ? target.f64.columns : target.f32.columns,
          kForwardMaxPixels,
          kBackwardPixels,
          kBackwardChannels,
          kBackwardSlabPixels};
}

namespace {
template <typename T>
double GflopsOf(void (*chains)(int64_t, T*), int64_t flops) {
  constexpr int64_t kSteps = 200 * 1000;
  T result;
  chains(kSteps / 10, &result);  // wakes the clock and the wide units up
  const auto begin = std::chrono::steady_clock::now();
  chains(kSteps, &result);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  return static_cast<double>(kSteps * flops) / seconds.count() * 1e-9;
}
}  // namespace

double FmaPeakGflops(DType dtype) {
  const Target& target = CurrentTargetTable();
  if (dtype == DType::kFloat64) return GflopsOf(target.f64.fma_chains, target.f64.fma_chain_flops);
  if (dtype == DType::kBFloat16 && target.pairs)
    return GflopsOf(target.pairs->chains, target.pairs->chain_flops);
  return GflopsOf(target.f32.fma_chains, target.f32.fma_chain_flops);
}

bool SlopeFollowsFromOutput(Activation activation) {
  switch (activation) {
    case Activation::kRelu:
    case Activation::kRelu6:
    case Activation::kLeakyRelu:
    case Activation::kSigmoid:
    case Activation::kTanh:
    case Activation::kHardSigmoid:
    case Activation::kElu:
      return true;
    case Activation::kLinear:  // needs nothing at all
    case Activation::kSilu:
    case Activation::kGelu:
    case Activation::kHardSilu:
      return false;
  }
  return false;
}

}  // namespace sepconv
