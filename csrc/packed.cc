#include "packed.h"

#include <algorithm>
#include <memory>
#include <type_traits>

#include "tiles.h"

namespace sepconv {
namespace {

template <typename S>
std::shared_ptr<const PackedPointwise> Pack(const S* matrix, int64_t depth, int64_t filters,
                                            DType dtype) {
  using T = ComputeType<S>;
  const Target& target = CurrentTargetTable();
  const Panels panels(filters, KernelsOf<T>(target));
  const bool pairs = std::is_same_v<S, BFloat16> && target.pairs;
  const int64_t rows = pairs ? CeilDiv(depth, 2) : depth;
  const int64_t bytes = rows * panels.packed_columns() * static_cast<int64_t>(sizeof(T));
  // Not by make_shared, which would have to move the memory.
  std::shared_ptr<PackedPointwise> packed(
      new PackedPointwise{target, dtype, depth, filters, pairs, 0xffff, Buffer(bytes)});
  T* data = packed->data.As<T>();
  if constexpr (std::is_same_v<S, BFloat16>) {
    for (int64_t panel = 0; pairs && panel < panels.count(); ++panel) {
      packed->least_weight = std::min(
          packed->least_weight,
          PackPairsOfPanel(*target.pairs, matrix, depth, filters, 0, depth, panels, panel, data));
    }
  }
  if (!pairs) PackPanels<S>(CopiesOf<S>(target), matrix, depth, filters, 0, depth, panels, 0, data);
  return packed;
}

}  // namespace

std::shared_ptr<const PackedPointwise> PackPointwise(const void* pointwise_kernel, int64_t depth,
                                                     int64_t filters, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return Pack(static_cast<const float*>(pointwise_kernel), depth, filters, dtype);
    case DType::kFloat64:
      return Pack(static_cast<const double*>(pointwise_kernel), depth, filters, dtype);
    case DType::kBFloat16:
      return Pack(static_cast<const BFloat16*>(pointwise_kernel), depth, filters, dtype);
    case DType::kFloat16:
      return Pack(static_cast<const Float16*>(pointwise_kernel), depth, filters, dtype);
  }
  return nullptr;
}

}  // namespace sepconv
