// How elements are stored, and the way to and from the type in which sums run.
#ifndef SEPCONV_STORAGE_H_
#define SEPCONV_STORAGE_H_

#include <bit>
#include <cstdint>

namespace sepconv {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// Neighbours in depth, whose products one instruction adds up.
struct BFloat16Pair {
  BFloat16 first, second;
};

template <typename S>
struct ComputeTypeOf {
  using type = float;
};
template <>
struct ComputeTypeOf<double> {
  using type = double;
};
template <typename S>
using ComputeType = typename ComputeTypeOf<S>::type;

inline float Widen(float value) { return value; }
inline double Widen(double value) { return value; }
inline float Widen(BFloat16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }
inline float Widen(Float16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // Moving the exponent by a multiplication serves normal and subnormal numbers alike.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t bits =
      magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : std::bit_cast<uint32_t>(scaled);
  return std::bit_cast<float>(bits | sign);
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
template <typename S>
S Narrow(ComputeType<S> value);
template <>
inline float Narrow<float>(float value) {
  return value;
}
template <>
inline double Narrow<double>(double value) {
  return value;
}
template <>
inline BFloat16 Narrow<BFloat16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(value != value ? (bits >> 16) | 0x40u : rounded)};
}
template <>
inline Float16 Narrow<Float16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520: everything from here on rounds to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // 2^-14: subnormal; adding 2^-1 * ulp-aligned rounds the
                                         // last bit for us
    const float aligned = std::bit_cast<float>(magnitude) + 0.5f;
    half = std::bit_cast<uint32_t>(aligned) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

}  // namespace sepconv

#endif  // SEPCONV_STORAGE_H_
