#include "packed.h"

#include <cstring>
#include <memory>
#include <type_traits>

#include "sepconv.h"
#include "tiles.h"

namespace sepconv {
namespace {

template <typename S>
PackedPointwise* Pack(const void* data, int64_t depth, int64_t filters) {
  using T = ComputeType<S>;
  const S* matrix = static_cast<const S*>(data);
  const Target& target = CurrentTargetTable();
  const Panels panels(filters, KernelsOf<T>(target));
  const bool pairs = std::is_same_v<S, BFloat16> && target.pairs;
  const int64_t rows = pairs ? target.pairs->Depth(depth) : depth;
  auto* packed = new PackedPointwise{target, pairs, LeastLanes(),
                                     Buffer(rows * panels.packed_columns() * int64_t{sizeof(T)})};
  if (!pairs) {
    PackPanels<S>(CopiesOf<S>(target), matrix, depth, filters, 0, depth, panels, 0,
                  packed->data.template As<T>());
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    for (int64_t panel = 0; panel < panels.count(); ++panel)
      PackPairsOfPanel(*target.pairs, matrix, depth, filters, 0, depth, panels, panel,
                       packed->data.template As<BFloat16Pair>(), &packed->least);
  }
  return packed;
}

PackedPointwise* Pack(const void* data, int64_t depth, int64_t filters, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return Pack<float>(data, depth, filters);
    case DType::kFloat64:
      return Pack<double>(data, depth, filters);
    case DType::kBFloat16:
      return Pack<BFloat16>(data, depth, filters);
    case DType::kFloat16:
      return Pack<Float16>(data, depth, filters);
  }
  return nullptr;
}

}  // namespace

struct PackedWeights {
  Geometry geometry;
  DType dtype;
  Buffer copies;
  ForwardArgs args;  // without x and y
  std::unique_ptr<const PackedPointwise> pointwise;
};

std::shared_ptr<const PackedWeights> PackWeights(const Geometry& geometry, DType dtype,
                                                 const ForwardArgs& weights) {
  Sizes sizes;
  Validate(geometry, dtype, &sizes);
  const auto bytes_of = [&](int64_t size) {
    return RoundUp(size * ElementSize(dtype), kBufferAlignment);
  };
  const int64_t bytes = bytes_of(sizes.depthwise_kernel) + bytes_of(sizes.pointwise_kernel) +
                        bytes_of(sizes.depthwise_bias) + bytes_of(sizes.bias);
  // Not by make_shared, which would have to move the memory.
  std::shared_ptr<PackedWeights> packed(
      new PackedWeights{geometry, dtype, Buffer(bytes), ForwardArgs(), nullptr});
  char* to = packed->copies.As<char>();
  const auto copy = [&](const void* from, int64_t size) -> const void* {
    if (!from) return nullptr;
    const char* begin = to;
    std::memcpy(to, from, static_cast<size_t>(size * ElementSize(dtype)));
    to += bytes_of(size);
    return begin;
  };
  ForwardArgs& args = packed->args;
  args.depthwise_kernel = copy(weights.depthwise_kernel, sizes.depthwise_kernel);
  args.pointwise_kernel = copy(weights.pointwise_kernel, sizes.pointwise_kernel);
  args.depthwise_bias = copy(weights.depthwise_bias, sizes.depthwise_bias);
  args.bias = copy(weights.bias, sizes.bias);
  packed->pointwise.reset(
      Pack(args.pointwise_kernel, geometry.depthwise_channels(), geometry.out_channels, dtype));
  args.packed = packed->pointwise.get();
  return packed;
}

DType DTypeOf(const PackedWeights& weights) { return weights.dtype; }

bool Fit(const PackedWeights& weights, const Geometry& g) {
  const Geometry& packed = weights.geometry;
  return g.kernel_height == packed.kernel_height && g.kernel_width == packed.kernel_width &&
         g.in_channels == packed.in_channels && g.depth_multiplier == packed.depth_multiplier &&
         g.out_channels == packed.out_channels &&
         g.has_depthwise_bias == packed.has_depthwise_bias && g.has_bias == packed.has_bias;
}

void ForwardPacked(const Geometry& geometry, const PackedWeights& weights, const void* x, void* y) {
  ForwardArgs args = weights.args;
  args.x = x;
  args.y = y;
  Forward(geometry, weights.dtype, args);
}

}  // namespace sepconv
