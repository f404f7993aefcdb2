#include <algorithm>
#include <string>

#include "sepconv.h"

namespace sepconv {
namespace {

// No array can outgrow the address space of one process. Sizes, positions and work counts below
// 2^48 leave a factor of 2^15 for everything later code does with them: rounding up to tiles,
// adding margins, counting bits.
constexpr int64_t kLimit = int64_t{1} << 48;
// Multiply-adds of one call: a thousand cores would work on them for days.
constexpr int64_t kWorkLimit = int64_t{1} << 60;

// Whether the product exceeds `limit`. An empty extent counts as one: an empty array may still not
// have rows too long to address. Factors are at least 0.
template <typename... Factors>
bool ProductExceeds(int64_t limit, Factors... factors) {
  int64_t product = 1;
  const bool overflow =
      (__builtin_mul_overflow(product, std::max<int64_t>(factors, 1), &product) || ...);
  return overflow || product > limit;
}

std::string Named(const char* name, int64_t value) {
  return std::string(name) + "=" + std::to_string(value);
}

std::string OutOfRange(const char* name, int64_t value, int64_t low, int64_t high) {
  std::string message = "`";
  message.append(name).append(value < low ? "` must be at least " : "` must be at most ");
  message.append(std::to_string(value < low ? low : high)).append(". Received: ");
  return message.append(Named(name, value));
}

std::string TooLarge(const char* what, int limit_bits, const Geometry& geometry) {
  std::string message = "the ";
  message.append(what).append(" must be at most 2^").append(std::to_string(limit_bits));
  const char* separator = ". Received: ";
#define SEPCONV_FIELD(name)                                      \
  message.append(separator).append(Named(#name, geometry.name)); \
  separator = ", ";
  SEPCONV_GEOMETRY_FIELDS(SEPCONV_FIELD)
#undef SEPCONV_FIELD
  return message;
}

// Whether the last tap of the last output position lies beyond kLimit.
bool ReachesTooFar(int64_t out_size, int64_t stride, int64_t kernel_size, int64_t dilation) {
  int64_t start, window, reach;
  return __builtin_mul_overflow(std::max<int64_t>(out_size - 1, 0), stride, &start) ||
         __builtin_mul_overflow(kernel_size - 1, dilation, &window) ||
         __builtin_add_overflow(start, window, &reach) || reach > kLimit;
}

}  // namespace

std::string Validate(const Geometry& geometry, DType dtype, Sizes* sizes) {
  const Geometry& g = geometry;
  const int64_t dtype_code = static_cast<int64_t>(dtype);
  if (dtype_code < 0 || dtype_code > static_cast<int64_t>(DType::kFloat16)) {
    return OutOfRange("dtype", dtype_code, 0, static_cast<int64_t>(DType::kFloat16));
  }

  struct Rule {
    const char* name;
    int64_t value, low, high;
  };
  const Rule rules[] = {
      {"batch", g.batch, 0, kLimit},
      {"in_height", g.in_height, 0, kLimit},
      {"in_width", g.in_width, 0, kLimit},
      {"in_channels", g.in_channels, 1, kLimit},
      {"depth_multiplier", g.depth_multiplier, 1, kLimit},
      {"out_height", g.out_height, 0, kLimit},
      {"out_width", g.out_width, 0, kLimit},
      {"out_channels", g.out_channels, 1, kLimit},
      {"kernel_height", g.kernel_height, 1, kLimit},
      {"kernel_width", g.kernel_width, 1, kLimit},
      {"stride_height", g.stride_height, 1, kLimit},
      {"stride_width", g.stride_width, 1, kLimit},
      {"dilation_height", g.dilation_height, 1, kLimit},
      {"dilation_width", g.dilation_width, 1, kLimit},
      {"pad_top", g.pad_top, 0, kLimit},
      {"pad_left", g.pad_left, 0, kLimit},
      {"layout", g.layout, 0, 1},
      {"input_activation", g.input_activation, 0, kNumActivations - 1},
      {"depthwise_activation", g.depthwise_activation, 0, kNumActivations - 1},
      {"activation", g.activation, 0, kNumActivations - 1},
      {"has_depthwise_bias", g.has_depthwise_bias, 0, 1},
      {"has_bias", g.has_bias, 0, 1},
  };
  static_assert(sizeof(rules) / sizeof(Rule) == kNumGeometryFields);
  for (const Rule& rule : rules) {
    if (rule.value < rule.low || rule.value > rule.high) {
      return OutOfRange(rule.name, rule.value, rule.low, rule.high);
    }
  }

  const int64_t bytes = ElementSize(dtype);
  if (ProductExceeds(kLimit, g.batch, g.in_height, g.in_width, g.in_channels, bytes)) {
    return TooLarge("bytes of `x`", 48, g);
  }
  if (ProductExceeds(kLimit, g.batch, g.out_height, g.out_width, g.out_channels, bytes)) {
    return TooLarge("bytes of `y`", 48, g);
  }
  if (ProductExceeds(kLimit, g.kernel_height, g.kernel_width, g.in_channels, g.depth_multiplier,
                     bytes)) {
    return TooLarge("bytes of `depthwise_kernel`", 48, g);
  }
  if (ProductExceeds(kLimit, g.in_channels, g.depth_multiplier, g.out_channels, bytes)) {
    return TooLarge("bytes of `pointwise_kernel`", 48, g);
  }
  if (ReachesTooFar(g.out_height, g.stride_height, g.kernel_height, g.dilation_height) ||
      ReachesTooFar(g.out_width, g.stride_width, g.kernel_width, g.dilation_width)) {
    return TooLarge("reach of the last window", 48, g);
  }
  // The sum cannot overflow: both terms are sizes of arrays checked above.
  const int64_t macs_per_output = g.out_channels + g.kernel_height * g.kernel_width;
  if (ProductExceeds(kWorkLimit, g.batch, g.out_height, g.out_width, g.in_channels,
                     g.depth_multiplier, macs_per_output)) {
    return TooLarge("number of multiply-adds", 60, g);
  }

  if (sizes != nullptr) {
    sizes->x = g.batch * g.in_height * g.in_width * g.in_channels;
    sizes->y = g.batch * g.out_height * g.out_width * g.out_channels;
    sizes->depthwise_kernel = g.kernel_height * g.kernel_width * g.in_channels * g.depth_multiplier;
    sizes->pointwise_kernel = g.depthwise_channels() * g.out_channels;
    sizes->depthwise_bias = g.has_depthwise_bias ? g.depthwise_channels() : 0;
    sizes->bias = g.has_bias ? g.out_channels : 0;
  }
  return std::string();
}

}  // namespace sepconv
