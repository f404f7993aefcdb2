// Fuzz target of sepconv.h: any 22 integers, any dtype, any target. Validate either names a fault
// or the call must compute: within its arrays, without undefined behaviour (the sanitizers look),
// every element written, and to the same bits on one thread and on three.
//
// The bytes of an input are read in order; missing ones count as zero. Each integer of the geometry
// starts with a byte that says how it is written: small, near a power of two, or raw.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "sepconv.h"

namespace sepconv {
namespace {

// Larger calls only cost time: the sizes at which loops change shape lie below.
constexpr int64_t kMaxElements = int64_t{1} << 16;
constexpr int64_t kMaxMacs = int64_t{1} << 20;

[[noreturn]] void Fail(const char* what, const Geometry& g) {
  std::fprintf(stderr, "FAILED: %s\n", what);
#define SEPCONV_FIELD(name) \
  std::fprintf(stderr, "  " #name "=%lld\n", static_cast<long long>(g.name));
  SEPCONV_GEOMETRY_FIELDS(SEPCONV_FIELD)
#undef SEPCONV_FIELD
  std::fprintf(stderr, "  target %s\n", CurrentTarget().c_str());
  std::abort();
}

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  uint8_t Byte() {
    if (size_ == 0) return 0;
    --size_;
    return *data_++;
  }
  int64_t Raw() {
    uint64_t value = 0;
    for (int i = 0; i < 8; ++i) value = value << 8 | Byte();
    return static_cast<int64_t>(value);
  }
  // A field whose usual values are `low`, ..., `low + range - 1`.
  int64_t Integer(int64_t low, int64_t range) {
    const uint8_t form = Byte();
    if (form < 248) return low + form % range;
    if (form == 255) return Raw();
    const uint8_t step = Byte();
    if (form < 252) return low + step % 128;
    const int shift = step >> 2;
    const uint64_t near = (uint64_t{1} << shift) + (step & 3) - 2;
    return static_cast<int64_t>(form == 254 ? ~near : near);
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

// Exactly as long as the geometry says, so that the address sanitizer sees every access beyond.
class Memory {
 public:
  Memory(int64_t count, DType dtype)
      : bytes_(static_cast<size_t>(count * ElementSize(dtype))),
        data_(new unsigned char[bytes_ == 0 ? 1 : bytes_]) {
    std::memset(data_.get(), 0xff, bytes_);  // a NaN in every dtype: what is not written shows
  }
  unsigned char* data() const { return data_.get(); }
  size_t bytes() const { return bytes_; }

  // Values 1/2, 1, -1 and 0, exact in every dtype.
  void Fill(DType dtype, uint32_t seed) {
    static constexpr uint64_t kBits[4][4] = {
        {0x3f000000, 0x3f800000, 0xbf800000, 0},
        {0x3fe0000000000000, 0x3ff0000000000000, 0xbff0000000000000, 0},
        {0x3f00, 0x3f80, 0xbf80, 0},
        {0x3800, 0x3c00, 0xbc00, 0},
    };
    const size_t element = static_cast<size_t>(ElementSize(dtype));
    for (size_t at = 0; at < bytes_; at += element) {
      seed = seed * 1664525 + 1013904223;
      std::memcpy(data() + at, &kBits[static_cast<size_t>(dtype)][seed >> 30], element);
    }
  }

  bool HasNan(DType dtype) const {
    const size_t element = static_cast<size_t>(ElementSize(dtype));
    for (size_t at = 0; at < bytes_; at += element) {
      uint64_t bits = 0;
      std::memcpy(&bits, data() + at, element);
      const uint64_t infinity = dtype == DType::kFloat64    ? 0x7ff0000000000000
                                : dtype == DType::kFloat32  ? 0x7f800000
                                : dtype == DType::kBFloat16 ? 0x7f80
                                                            : 0x7c00;
      const uint64_t sign = uint64_t{1} << (8 * element - 1);
      if ((bits & ~sign) > infinity) return true;
    }
    return false;
  }

  bool operator==(const Memory& other) const {
    return bytes_ == other.bytes_ && std::memcmp(data(), other.data(), bytes_) == 0;
  }

 private:
  size_t bytes_;
  std::unique_ptr<unsigned char[]> data_;
};

struct Outputs {
  Outputs(const Sizes& s, DType dtype)
      : y(s.y, dtype),
        dx(s.x, dtype),
        d_depthwise_kernel(s.depthwise_kernel, dtype),
        d_pointwise_kernel(s.pointwise_kernel, dtype),
        d_depthwise_bias(s.depthwise_bias, dtype),
        d_bias(s.bias, dtype) {}
  std::vector<const Memory*> all() const {
    return {&y, &dx, &d_depthwise_kernel, &d_pointwise_kernel, &d_depthwise_bias, &d_bias};
  }
  Memory y, dx, d_depthwise_kernel, d_pointwise_kernel, d_depthwise_bias, d_bias;
};

void Compute(const Geometry& g, DType dtype, const Sizes& sizes, uint8_t choices) {
  Memory x(sizes.x, dtype), kernel(sizes.depthwise_kernel, dtype),
      pointwise(sizes.pointwise_kernel, dtype), between(sizes.depthwise_bias, dtype),
      bias(sizes.bias, dtype), dy(sizes.y, dtype);
  uint32_t seed = choices;
  for (Memory* input : {&x, &kernel, &pointwise, &between, &bias, &dy}) input->Fill(dtype, ++seed);
  const void* between_or_null = g.has_depthwise_bias ? between.data() : nullptr;
  const void* bias_or_null = g.has_bias ? bias.data() : nullptr;

  // Bits of `choices`: whether `y` is given, and which gradients are wanted.
  const auto run = [&](Outputs* out) {
    Forward(
        g, dtype,
        {x.data(), kernel.data(), pointwise.data(), between_or_null, bias_or_null, out->y.data()});
    const auto wanted = [&](int bit, const Memory& memory) -> void* {
      return choices >> bit & 1 ? nullptr : memory.data();
    };
    Backward(g, dtype,
             {dy.data(), x.data(), kernel.data(), pointwise.data(), between_or_null, bias_or_null,
              choices & 1 ? out->y.data() : nullptr, wanted(1, out->dx),
              wanted(2, out->d_depthwise_kernel), wanted(3, out->d_pointwise_kernel),
              g.has_depthwise_bias ? wanted(4, out->d_depthwise_bias) : nullptr,
              g.has_bias ? wanted(5, out->d_bias) : nullptr});
  };
  Outputs alone(sizes, dtype), shared(sizes, dtype);
  try {
    SetNumThreads(1);
    run(&alone);
    SetNumThreads(3);
    run(&shared);
  } catch (const std::bad_alloc&) {
    return;  // Rows of an image without pixels may be longer than any memory.
  }
  const auto single = alone.all(), triple = shared.all();
  for (size_t i = 0; i < single.size(); ++i) {
    if (!(*single[i] == *triple[i])) Fail("three threads give other bits than one", g);
    const bool written = i == 0 || !(choices >> i & 1);
    if (written && single[i]->HasNan(dtype)) Fail("an element was not written, or is NaN", g);
  }
}

int64_t Product(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product)) {
      return std::numeric_limits<int64_t>::max();
    }
  }
  return product;
}

void Fuzz(Bytes bytes) {
  const uint8_t choices = bytes.Byte();
  const uint8_t dtype_and_target = bytes.Byte();
  const auto dtype =
      static_cast<DType>((dtype_and_target & 7) == 7 ? bytes.Raw() : dtype_and_target & 3);
  static const std::vector<std::string> kTargets = AvailableTargets();
  SetTarget(kTargets[(dtype_and_target >> 3) % kTargets.size()]);

  Geometry g;
  g.batch = bytes.Integer(0, 4);
  g.in_height = bytes.Integer(0, 24);
  g.in_width = bytes.Integer(0, 24);
  g.in_channels = bytes.Integer(1, 24);
  g.depth_multiplier = bytes.Integer(1, 4);
  g.out_height = bytes.Integer(0, 16);
  g.out_width = bytes.Integer(0, 24);
  g.out_channels = bytes.Integer(1, 40);
  g.kernel_height = bytes.Integer(1, 7);
  g.kernel_width = bytes.Integer(1, 7);
  g.stride_height = bytes.Integer(1, 4);
  g.stride_width = bytes.Integer(1, 4);
  g.dilation_height = bytes.Integer(1, 4);
  g.dilation_width = bytes.Integer(1, 4);
  g.pad_top = bytes.Integer(0, 8);
  g.pad_left = bytes.Integer(0, 8);
  g.layout = bytes.Integer(0, 2);
  g.input_activation = bytes.Integer(0, kNumActivations);
  g.depthwise_activation = bytes.Integer(0, kNumActivations);
  g.activation = bytes.Integer(0, kNumActivations);
  g.has_depthwise_bias = bytes.Integer(0, 2);
  g.has_bias = bytes.Integer(0, 2);

  Sizes sizes = {-1, -1, -1, -1, -1, -1};
  const std::string fault = Validate(g, dtype, &sizes);
  if (fault != Validate(g, dtype, nullptr)) Fail("Validate looks at where sizes go", g);
  if (!fault.empty()) {
    if (fault.find("Received: ") == std::string::npos) Fail("a fault without its value", g);
    return;
  }
  for (const int64_t size : {sizes.x, sizes.y, sizes.depthwise_kernel, sizes.pointwise_kernel,
                             sizes.depthwise_bias, sizes.bias}) {
    if (size < 0) Fail("a negative size passed", g);
    if (size > kMaxElements) return;
  }
  const int64_t macs = Product({g.batch, g.out_height, g.out_width, g.depthwise_channels(),
                                g.kernel_height * g.kernel_width + g.out_channels});
  if (macs > kMaxMacs) return;
  Compute(g, dtype, sizes, choices);
}

}  // namespace
}  // namespace sepconv

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  sepconv::Fuzz(sepconv::Bytes(data, size));
  return 0;
}
