// Test of the core alone: every target this CPU runs against the formula in sepconv.h, written out
// as loops in long double. Arrays end at an unreadable page and start behind NaN, so that an access
// outside of them faults or shows in a result.

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "sepconv.h"

#if defined(__SANITIZE_THREAD__)
#define SEPCONV_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define SEPCONV_TSAN 1
#endif
#endif

namespace sepconv {
namespace {

std::atomic<int> num_checks = 0;
std::atomic<int> num_failures = 0;

void Check(bool holds, const std::string& what) {
  ++num_checks;
  if (holds) return;
  ++num_failures;
  if (num_failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

// Memory between a margin of NaN and an unreadable page.
class Guarded {
 public:
  Guarded(int64_t count, DType dtype) : bytes_(count * ElementSize(dtype)) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    readable_ = (static_cast<size_t>(bytes_) + kMargin + page - 1) / page * page;
    mapped_ = readable_ + page;
    void* block =
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED ||
        mprotect(static_cast<char*>(block) + readable_, page, PROT_NONE) != 0) {
      std::perror("mmap");
      std::abort();
    }
    block_ = static_cast<unsigned char*>(block);
    std::memset(block_, kNanByte, readable_);
  }
  ~Guarded() { munmap(block_, mapped_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  unsigned char* data() const { return block_ + readable_ - bytes_; }
  int64_t bytes() const { return bytes_; }
  bool MarginIntact() const {
    return std::all_of(block_, data(), [](unsigned char byte) { return byte == kNanByte; });
  }

 private:
  static constexpr size_t kMargin = 256;
  static constexpr unsigned char kNanByte = 0xff;  // all bits set are a NaN in every dtype
  int64_t bytes_;
  size_t readable_ = 0, mapped_ = 0;
  unsigned char* block_ = nullptr;
};

using Real = long double;

uint16_t ToHalfBits(double value) {
  // Test data is exact in half precision and normal, or zero.
  if (value == 0) return std::signbit(value) ? 0x8000 : 0;
  int exponent;
  const double fraction = std::frexp(std::fabs(value), &exponent);  // in [0.5, 1)
  const int mantissa = static_cast<int>((fraction * 2 - 1) * 1024);
  return static_cast<uint16_t>((std::signbit(value) << 15) | ((exponent - 1 + 15) << 10) |
                               mantissa);
}

double FromHalfBits(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == 31)
    return mantissa ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

void Store(const Guarded& array, DType dtype, int64_t i, double value) {
  if (dtype == DType::kFloat64) {
    std::memcpy(array.data() + 8 * i, &value, 8);
    return;
  }
  const float narrow = static_cast<float>(value);
  if (dtype == DType::kFloat32) {
    std::memcpy(array.data() + 4 * i, &narrow, 4);
  } else if (dtype == DType::kBFloat16) {
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    const uint16_t high = static_cast<uint16_t>(bits >> 16);  // exact: test data has few digits
    std::memcpy(array.data() + 2 * i, &high, 2);
  } else {
    const uint16_t bits = ToHalfBits(value);
    std::memcpy(array.data() + 2 * i, &bits, 2);
  }
}

double Load(const Guarded& array, DType dtype, int64_t i) {
  if (dtype == DType::kFloat64) {
    double value;
    std::memcpy(&value, array.data() + 8 * i, 8);
    return value;
  }
  float value;
  if (dtype == DType::kFloat32) {
    std::memcpy(&value, array.data() + 4 * i, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, array.data() + 2 * i, 2);
  if (dtype == DType::kFloat16) return FromHalfBits(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  std::memcpy(&value, &wide, 4);
  return value;
}

double UnitRoundoff(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 0x1p-53;
    case DType::kFloat32:
      return 0x1p-24;
    case DType::kBFloat16:
      return 0x1p-8;
    default:
      return 0x1p-11;
  }
}

// A number and what it would be if nothing cancelled: the scale of its rounding error.
struct Tracked {
  Real value = 0, magnitude = 0;
  Tracked() = default;
  explicit Tracked(Real exact) : value(exact), magnitude(std::fabs(exact)) {}
  Tracked(Real v, Real m) : value(v), magnitude(m) {}
};
Tracked operator*(Tracked a, Tracked b) { return {a.value * b.value, a.magnitude * b.magnitude}; }
Tracked& operator+=(Tracked& a, Tracked b) {
  a.value += b.value;
  a.magnitude += b.magnitude;
  return a;
}

Real Sigmoid(Real z) { return 1 / (1 + std::exp(-z)); }

Real Value(Activation activation, Real z) {
  switch (activation) {
    case Activation::kLinear:
      return z;
    case Activation::kRelu:
      return std::max<Real>(z, 0);
    case Activation::kRelu6:
      return std::clamp<Real>(z, 0, 6);
    case Activation::kLeakyRelu:
      return z > 0 ? z : 0.2L * z;
    case Activation::kSigmoid:
      return Sigmoid(z);
    case Activation::kTanh:
      return std::tanh(z);
    case Activation::kSilu:
      return z * Sigmoid(z);
    case Activation::kGelu:
      return 0.5L * z * (1 + std::erf(z / std::sqrt(2.0L)));
    case Activation::kHardSigmoid:
      return std::clamp<Real>(z / 6 + 0.5L, 0, 1);
    case Activation::kHardSilu:
      return z * std::clamp<Real>(z / 6 + 0.5L, 0, 1);
    case Activation::kElu:
      return z > 0 ? z : std::expm1(z);
  }
  std::abort();
}

Real Slope(Activation activation, Real z) {
  switch (activation) {
    case Activation::kLinear:
      return 1;
    case Activation::kRelu:
      return z > 0;
    case Activation::kRelu6:
      return z > 0 && z < 6;
    case Activation::kLeakyRelu:
      return z >= 0 ? 1 : 0.2L;
    case Activation::kSigmoid:
      return Sigmoid(z) * (1 - Sigmoid(z));
    case Activation::kTanh:
      return 1 - std::tanh(z) * std::tanh(z);
    case Activation::kSilu:
      return Sigmoid(z) * (1 + z * (1 - Sigmoid(z)));
    case Activation::kGelu:
      return 0.5L * (1 + std::erf(z / std::sqrt(2.0L))) +
             z * std::exp(-z * z / 2) / std::sqrt(2 * std::acos(-1.0L));
    case Activation::kHardSigmoid:
      return z > -3 && z < 3 ? 1 / 6.0L : 0;
    case Activation::kHardSilu:
      return z <= -3 ? 0 : z >= 3 ? 1 : z / 3 + 0.5L;
    case Activation::kElu:
      return z > 0 ? 1 : std::exp(z);
  }
  std::abort();
}

bool SlopeJumps(Activation activation) {
  return activation == Activation::kRelu || activation == Activation::kRelu6 ||
         activation == Activation::kLeakyRelu || activation == Activation::kHardSigmoid ||
         activation == Activation::kHardSilu;
}

// |f'| <= 1.13 for every activation, so an error before it grows at most so much.
Tracked Apply(Activation activation, Tracked z) {
  if (activation == Activation::kLinear) return z;
  const Real value = Value(activation, z.value);
  return {value, std::fabs(value) + 1.13L * z.magnitude};
}

// |f''| <= 1 where the slope is continuous. Where it jumps, the cases below keep `z` exact.
Tracked ApplySlope(Activation activation, Tracked z) {
  if (activation == Activation::kLinear) return Tracked(1);
  const Real value = Slope(activation, z.value);
  return {value, std::fabs(value) + (SlopeJumps(activation) ? 0 : z.magnitude)};
}

struct Case {
  const char* name;
  Geometry geometry;
};

struct Options {
  int64_t batch = 1, height = 5, width = 6, channels = 3, multiplier = 1, filters = 4;
  int64_t kernel_height = 3, kernel_width = 3, stride_height = 1, stride_width = 1;
  int64_t dilation_height = 1, dilation_width = 1, top = 0, bottom = 0, left = 0, right = 0;
  Layout layout = Layout::kChannelsLast;
  Activation before = Activation::kLinear, between = Activation::kLinear,
             after = Activation::kLinear;
  bool depthwise_bias = false, bias = true;
};

int64_t OutSize(int64_t in, int64_t pads, int64_t kernel, int64_t dilation, int64_t stride) {
  return std::max<int64_t>(0, (in + pads - (kernel - 1) * dilation - 1 + stride) / stride);
}

Geometry Make(const Options& o) {
  return {o.batch,
          o.height,
          o.width,
          o.channels,
          o.multiplier,
          OutSize(o.height, o.top + o.bottom, o.kernel_height, o.dilation_height, o.stride_height),
          OutSize(o.width, o.left + o.right, o.kernel_width, o.dilation_width, o.stride_width),
          o.filters,
          o.kernel_height,
          o.kernel_width,
          o.stride_height,
          o.stride_width,
          o.dilation_height,
          o.dilation_width,
          o.top,
          o.left,
          static_cast<int64_t>(o.layout),
          static_cast<int64_t>(o.before),
          static_cast<int64_t>(o.between),
          static_cast<int64_t>(o.after),
          o.depthwise_bias,
          o.bias};
}

struct Inputs {
  std::vector<double> x, depthwise_kernel, pointwise_kernel, depthwise_bias, bias, dy;
};

// Multiples of 1/4 in [-1, 1]: sums of their products stay exact in float, so that a slope that
// jumps at zero is taken on the same side by the core and by the loops.
std::vector<double> Draw(std::mt19937& generator, int64_t count) {
  std::vector<double> values(count);
  for (double& value : values) value = static_cast<int>(generator() % 9) / 4.0 - 1.0;
  return values;
}

struct Truth {
  std::vector<Tracked> y, dx, d_depthwise_kernel, d_pointwise_kernel, d_depthwise_bias, d_bias;
};

Truth Reference(const Geometry& g, const Sizes& sizes, const Inputs& in) {
  const int64_t depth = g.depthwise_channels(), filters = g.out_channels;
  const auto before = static_cast<Activation>(g.input_activation);
  const auto between = static_cast<Activation>(g.depthwise_activation);
  const auto after = static_cast<Activation>(g.activation);
  const auto at = [&](int64_t n, int64_t h, int64_t w, int64_t c, int64_t height, int64_t width,
                      int64_t channels) {
    return g.channels_first() ? ((n * channels + c) * height + h) * width + w
                              : ((n * height + h) * width + w) * channels + c;
  };
  Truth t;
  t.y.resize(sizes.y);
  t.dx.resize(sizes.x);
  t.d_depthwise_kernel.resize(sizes.depthwise_kernel);
  t.d_pointwise_kernel.resize(sizes.pointwise_kernel);
  t.d_depthwise_bias.resize(sizes.depthwise_bias);
  t.d_bias.resize(sizes.bias);

  // Calls visit(index into x, index into the depthwise kernel) for every tap inside the image.
  const auto taps = [&](int64_t n, int64_t h, int64_t w, int64_t q, auto&& visit) {
    for (int64_t i = 0; i < g.kernel_height; ++i) {
      for (int64_t j = 0; j < g.kernel_width; ++j) {
        const int64_t row = h * g.stride_height + i * g.dilation_height - g.pad_top;
        const int64_t column = w * g.stride_width + j * g.dilation_width - g.pad_left;
        if (row < 0 || row >= g.in_height || column < 0 || column >= g.in_width) continue;
        visit(at(n, row, column, q / g.depth_multiplier, g.in_height, g.in_width, g.in_channels),
              (i * g.kernel_width + j) * depth + q);
      }
    }
  };

  std::vector<Tracked> z(depth), d(depth);
  for (int64_t n = 0; n < g.batch; ++n) {
    for (int64_t h = 0; h < g.out_height; ++h) {
      for (int64_t w = 0; w < g.out_width; ++w) {
        for (int64_t q = 0; q < depth; ++q) {
          z[q] = g.has_depthwise_bias ? Tracked(in.depthwise_bias[q]) : Tracked();
          taps(n, h, w, q, [&](int64_t source, int64_t weight) {
            z[q] += Apply(before, Tracked(in.x[source])) * Tracked(in.depthwise_kernel[weight]);
          });
          d[q] = Apply(between, z[q]);
        }
        std::vector<Tracked> dd(depth);
        for (int64_t f = 0; f < filters; ++f) {
          Tracked sum = g.has_bias ? Tracked(in.bias[f]) : Tracked();
          for (int64_t q = 0; q < depth; ++q)
            sum += d[q] * Tracked(in.pointwise_kernel[q * filters + f]);
          const int64_t out = at(n, h, w, f, g.out_height, g.out_width, filters);
          t.y[out] = Apply(after, sum);
          const Tracked dz = Tracked(in.dy[out]) * ApplySlope(after, sum);
          if (g.has_bias) t.d_bias[f] += dz;
          for (int64_t q = 0; q < depth; ++q) {
            t.d_pointwise_kernel[q * filters + f] += d[q] * dz;
            dd[q] += dz * Tracked(in.pointwise_kernel[q * filters + f]);
          }
        }
        for (int64_t q = 0; q < depth; ++q) {
          const Tracked dz = dd[q] * ApplySlope(between, z[q]);
          if (g.has_depthwise_bias) t.d_depthwise_bias[q] += dz;
          taps(n, h, w, q, [&](int64_t source, int64_t weight) {
            const Tracked x(in.x[source]);
            t.d_depthwise_kernel[weight] += Apply(before, x) * dz;
            t.dx[source] += ApplySlope(before, x) * Tracked(in.depthwise_kernel[weight]) * dz;
          });
        }
      }
    }
  }
  return t;
}

// Arrays of one call.
struct Run {
  Run(const Geometry& geometry, DType dtype_of_arrays, const Inputs& in)
      : g(geometry),
        dtype(dtype_of_arrays),
        sizes(SizesOf(geometry, dtype_of_arrays)),
        x(sizes.x, dtype),
        depthwise_kernel(sizes.depthwise_kernel, dtype),
        pointwise_kernel(sizes.pointwise_kernel, dtype),
        depthwise_bias(sizes.depthwise_bias, dtype),
        bias(sizes.bias, dtype),
        dy(sizes.y, dtype),
        y(sizes.y, dtype),
        dx(sizes.x, dtype),
        d_depthwise_kernel(sizes.depthwise_kernel, dtype),
        d_pointwise_kernel(sizes.pointwise_kernel, dtype),
        d_depthwise_bias(sizes.depthwise_bias, dtype),
        d_bias(sizes.bias, dtype) {
    Fill(x, in.x);
    Fill(depthwise_kernel, in.depthwise_kernel);
    Fill(pointwise_kernel, in.pointwise_kernel);
    Fill(depthwise_bias, in.depthwise_bias);
    Fill(bias, in.bias);
    Fill(dy, in.dy);
  }

  static Sizes SizesOf(const Geometry& g, DType dtype) {
    Sizes sizes;
    const std::string problem = Validate(g, dtype, &sizes);
    Check(problem.empty(), "Validate: " + problem);
    return sizes;
  }

  void Fill(const Guarded& array, const std::vector<double>& values) const {
    for (int64_t i = 0; i * ElementSize(dtype) < array.bytes(); ++i)
      Store(array, dtype, i, values[i]);
  }

  ForwardArgs Args() {
    return {x.data(),
            depthwise_kernel.data(),
            pointwise_kernel.data(),
            g.has_depthwise_bias ? depthwise_bias.data() : nullptr,
            g.has_bias ? bias.data() : nullptr,
            y.data()};
  }

  void RunForward() { Forward(g, dtype, Args()); }

  void RunBackward(bool with_y) {
    Backward(
        g, dtype,
        {dy.data(), x.data(), depthwise_kernel.data(), pointwise_kernel.data(),
         g.has_depthwise_bias ? depthwise_bias.data() : nullptr, g.has_bias ? bias.data() : nullptr,
         with_y ? y.data() : nullptr, dx.data(), d_depthwise_kernel.data(),
         d_pointwise_kernel.data(), g.has_depthwise_bias ? d_depthwise_bias.data() : nullptr,
         g.has_bias ? d_bias.data() : nullptr});
  }

  std::vector<const Guarded*> outputs() const {
    return {&y, &dx, &d_depthwise_kernel, &d_pointwise_kernel, &d_depthwise_bias, &d_bias};
  }

  std::vector<unsigned char> OutputBytes() const {
    std::vector<unsigned char> bytes;
    for (const Guarded* array : outputs())
      bytes.insert(bytes.end(), array->data(), array->data() + array->bytes());
    return bytes;
  }

  bool MarginsIntact() const {
    const auto all = outputs();
    return std::all_of(all.begin(), all.end(),
                       [](const Guarded* array) { return array->MarginIntact(); });
  }

  Geometry g;
  DType dtype;
  Sizes sizes;
  Guarded x, depthwise_kernel, pointwise_kernel, depthwise_bias, bias, dy;
  Guarded y, dx, d_depthwise_kernel, d_pointwise_kernel, d_depthwise_bias, d_bias;
};

Inputs DrawInputs(const Geometry& g, unsigned seed) {
  Sizes sizes;
  Validate(g, DType::kFloat64, &sizes);
  std::mt19937 generator(seed);
  return {Draw(generator, sizes.x),
          Draw(generator, sizes.depthwise_kernel),
          Draw(generator, sizes.pointwise_kernel),
          Draw(generator, sizes.depthwise_bias),
          Draw(generator, sizes.bias),
          Draw(generator, sizes.y)};
}

// Every element within `terms` roundings of its magnitude.
void CheckClose(const std::string& what, const Guarded& array, DType dtype,
                const std::vector<Tracked>& truth, int64_t terms) {
  const double compute = UnitRoundoff(dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32);
  // In a 16-bit type, three more roundings: of the depthwise output, of its gradient, and of the
  // result.
  const double storage = ElementSize(dtype) == 2 ? 3 * UnitRoundoff(dtype) : 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    const double got = Load(array, dtype, static_cast<int64_t>(i));
    const Real error = std::fabs(got - truth[i].value);
    const Real bound = (static_cast<double>(terms) * compute + storage) * truth[i].magnitude;
    if (error <= bound) continue;  // a NaN fails this
    Check(false, what + " [" + std::to_string(i) + "] is " + std::to_string(got) + ", expected " +
                     std::to_string(static_cast<double>(truth[i].value)) + " within " +
                     std::to_string(static_cast<double>(bound)));
    return;
  }
  Check(true, what);
}

const char* NameOf(DType dtype) {
  constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16"};
  return kNames[static_cast<int64_t>(dtype)];
}

void CheckCase(const std::string& name, const Geometry& g, DType dtype) {
  const std::string what = CurrentTarget() + " " + NameOf(dtype) + " " + name;
  const Inputs in = DrawInputs(g, 1);
  Run run(g, dtype, in);
  const Truth truth = Reference(g, run.sizes, in);

  // Activations are computed to a few units in the last place, each stage anew: a constant on top
  // of the sums.
  const int64_t taps = g.kernel_height * g.kernel_width, depth = g.depthwise_channels(),
                filters = g.out_channels;
  const int64_t forward_terms = taps + depth + 32;
  const int64_t gradient_terms = forward_terms + filters + 32;
  SetNumThreads(1);
  run.RunForward();
  CheckClose(what + " y", run.y, dtype, truth.y, forward_terms);
  std::vector<unsigned char> first;
  for (const bool with_y : {true, false}) {
    run.RunBackward(with_y);
    const std::string backward = what + (with_y ? " given y: " : " without y: ");
    const int64_t pixels = g.pixels();
    CheckClose(backward + "dx", run.dx, dtype, truth.dx,
               gradient_terms + taps * g.depth_multiplier);
    CheckClose(backward + "d_depthwise_kernel", run.d_depthwise_kernel, dtype,
               truth.d_depthwise_kernel, gradient_terms + pixels);
    CheckClose(backward + "d_pointwise_kernel", run.d_pointwise_kernel, dtype,
               truth.d_pointwise_kernel, gradient_terms + pixels);
    CheckClose(backward + "d_depthwise_bias", run.d_depthwise_bias, dtype, truth.d_depthwise_bias,
               gradient_terms + pixels);
    CheckClose(backward + "d_bias", run.d_bias, dtype, truth.d_bias, gradient_terms + pixels);
    if (with_y) first = run.OutputBytes();
  }
  Check(run.MarginsIntact(), what + " wrote in front of an array");

  for (const int64_t threads : {2, 5}) {
    SetNumThreads(threads);
    Run again(g, dtype, in);
    again.RunForward();
    again.RunBackward(true);
    Check(again.OutputBytes() == first,
          what + " differs on " + std::to_string(threads) + " threads");
  }

  // Weights that were packed before, on as few and on more threads.
  const auto packed = PackWeights(g, dtype, run.Args());
  for (const int64_t threads : {1, 3}) {
    SetNumThreads(threads);
    Run again(g, dtype, in);
    ForwardPacked(g, *packed, again.x.data(), again.y.data());
    again.RunBackward(true);
    Check(again.OutputBytes() == first, what + " differs with packed weights");
  }

  // Each gradient alone: the others are null.
  SetNumThreads(2);
  for (int wanted = 0; wanted < 5; ++wanted) {
    if ((wanted == 3 && !g.has_depthwise_bias) || (wanted == 4 && !g.has_bias)) continue;
    Run alone(g, dtype, in);
    alone.RunForward();
    Backward(g, dtype,
             {alone.dy.data(), alone.x.data(), alone.depthwise_kernel.data(),
              alone.pointwise_kernel.data(),
              g.has_depthwise_bias ? alone.depthwise_bias.data() : nullptr,
              g.has_bias ? alone.bias.data() : nullptr, alone.y.data(),
              wanted == 0 ? alone.dx.data() : nullptr,
              wanted == 1 ? alone.d_depthwise_kernel.data() : nullptr,
              wanted == 2 ? alone.d_pointwise_kernel.data() : nullptr,
              wanted == 3 ? alone.d_depthwise_bias.data() : nullptr,
              wanted == 4 ? alone.d_bias.data() : nullptr});
    const std::vector<Tracked>* expected[] = {&truth.dx, &truth.d_depthwise_kernel,
                                              &truth.d_pointwise_kernel, &truth.d_depthwise_bias,
                                              &truth.d_bias};
    CheckClose(what + " gradient " + std::to_string(wanted) + " alone",
               *alone.outputs()[wanted + 1], dtype, *expected[wanted], gradient_terms + g.pixels());
    Check(alone.MarginsIntact(), what + " wrote in front of an array");
  }
  SetNumThreads(0);
}

Options With(const std::function<void(Options&)>& change) {
  Options options;
  change(options);
  return options;
}

std::vector<Case> Cases(const TileConstants& tile) {
  const auto same3 = [](Options& o) { o.top = o.bottom = o.left = o.right = 1; };
  std::vector<Case> cases;
  const auto add = [&](const char* name, const std::function<void(Options&)>& change) {
    cases.push_back({name, Make(With(change))});
  };
  add("valid", [](Options&) {});
  add("one pixel, one channel", [](Options& o) {
    o.height = o.width = o.channels = o.filters = 1, o.kernel_height = o.kernel_width = 1;
  });
  add("padding beyond the image",
      [](Options& o) { o.height = o.width = 2, o.top = o.bottom = o.left = o.right = 4; });
  add("even kernel, unequal strides", [](Options& o) {
    o.height = 9, o.width = 8, o.kernel_height = 2, o.kernel_width = 4, o.stride_height = 2,
    o.stride_width = 3;
    o.bottom = 1, o.left = 1, o.right = 2;
  });
  add("stride with dilation", [](Options& o) {
    o.height = 11, o.width = 13, o.stride_height = 2, o.stride_width = 2, o.dilation_height = 3,
    o.dilation_width = 2;
    o.top = o.left = 2, o.bottom = o.right = 3;
  });
  add("stride beyond the kernel",
      [](Options& o) { o.height = o.width = 12, o.stride_height = o.stride_width = 5; });
  add("depth multiplier",
      [&](Options& o) { same3(o), o.multiplier = 3, o.channels = 5, o.depthwise_bias = true; });
  add("channels first", [&](Options& o) {
    same3(o), o.layout = Layout::kChannelsFirst, o.batch = 3, o.multiplier = 2, o.filters = 7,
              o.depthwise_bias = true;
  });
  add("no bias", [&](Options& o) { same3(o), o.bias = false; });
  add("empty batch", [](Options& o) { o.batch = 0; });
  add("empty output", [](Options& o) { o.height = 2; });
  add("empty image under padding",
      [](Options& o) { o.height = o.width = 0, o.top = o.bottom = o.left = o.right = 2; });
  for (const int64_t rows : {tile.rows - 1, tile.rows, tile.rows + 1, 2 * tile.rows + 1}) {
    add("pixels around a register tile", [&](Options& o) { o.height = 3, o.width = rows + 2; });
  }
  for (const int64_t columns :
       {tile.columns - 1, tile.columns, tile.columns + 1, 2 * tile.columns + 1}) {
    add("filters around a register tile", [&](Options& o) { o.filters = columns; });
    add("channels around a vector", [&](Options& o) { same3(o), o.channels = columns; });
  }
  add("more pixels than a forward tile", [&](Options& o) {
    same3(o), o.width = 19, o.height = tile.forward_pixels / 19 + 2, o.channels = tile.lanes + 1;
    o.filters = tile.columns + 1, o.batch = 2;
  });
  add("more channels than a backward slice", [&](Options& o) {
    same3(o), o.channels = tile.backward_channels + 1, o.filters = 2 * tile.columns + 3,
              o.height = 13;
    o.width = tile.backward_pixels / 13 + 2;
  });
  // One image in bands of rows, with sums of their own and rows of dx between them.
  const int64_t bands = 2 * tile.backward_slab_pixels;
  add("bands", [&](Options& o) {
    same3(o), o.width = 37, o.height = bands / 37 + 4, o.channels = tile.lanes + 1;
  });
  add("bands, kernel of 5, relu between", [&](Options& o) {
    o.kernel_height = o.kernel_width = 5, o.top = 3, o.bottom = 1, o.left = 4, o.right = 2;
    o.width = 29, o.height = bands / 30 + 9, o.between = Activation::kRelu;
  });
  add("bands, strides", [&](Options& o) {
    o.kernel_height = 7, o.kernel_width = 3, o.stride_height = 3, o.stride_width = 2;
    o.width = 63, o.height = 3 * (bands / 31 + 5), o.top = 4;
  });
  add("bands, rows that no window reads", [&](Options& o) {
    o.kernel_height = o.kernel_width = 1, o.stride_height = 2;
    o.width = 41, o.height = 2 * (bands / 41 + 3);
  });
  add("bands, dilation, channels first", [&](Options& o) {
    o.dilation_height = 3, o.dilation_width = 2, o.top = o.bottom = 3, o.left = 1;
    o.width = 27, o.height = bands / 24 + 5, o.layout = Layout::kChannelsFirst;
  });
  add("bands of each of several images", [&](Options& o) {
    same3(o), o.batch = 3, o.width = 31, o.height = bands / 31 + 3, o.multiplier = 2;
  });
  add("channels first, several tiles", [&](Options& o) {
    same3(o), o.layout = Layout::kChannelsFirst, o.width = 19,
              o.height = tile.forward_pixels / 19 + 2;
    o.channels = 2 * tile.lanes + 1, o.filters = tile.columns + 1, o.stride_width = 2, o.batch = 2;
  });
  for (int64_t code = 0; code < kNumActivations; ++code) {
    const auto activation = static_cast<Activation>(code);
    add(kActivationNames[code],
        [&](Options& o) { same3(o), o.after = activation, o.depthwise_bias = true; });
    add(kActivationNames[code],
        [&](Options& o) { same3(o), o.between = activation, o.depthwise_bias = true; });
    add(kActivationNames[code], [&](Options& o) {
      same3(o), o.before = activation, o.layout = Layout::kChannelsFirst,
                o.after = Activation::kTanh;
    });
  }
  return cases;
}

void TestEveryTargetAgainstTheFormula() {
  for (const std::string& target : AvailableTargets()) {
    Check(SetTarget(target), "SetTarget " + target);
    Check(CurrentTarget() == target, "CurrentTarget " + target);
    for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
      for (const Case& c : Cases(CurrentTileConstants(dtype))) CheckCase(c.name, c.geometry, dtype);
    }
    // An activation whose slope jumps would see the rounded depthwise output on either side of its
    // kink.
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      for (const Case& c : Cases(CurrentTileConstants(dtype))) {
        if (c.geometry.activation == 0 && c.geometry.depthwise_activation == 0 &&
            c.geometry.input_activation == 0) {
          CheckCase(c.name, c.geometry, dtype);
        }
      }
    }
  }
  Check(!SetTarget("no such target"), "SetTarget takes any name");
  Check(SetTarget(""), "SetTarget automatic");
}

// Threads cut an image into other pieces, and a pixel then falls into another depthwise loop. One
// of them left it to the compiler whether a product and a sum are rounded once: without
// optimisation by GCC, to other bits (issue 7). The inputs of the cases above are so short that
// nothing is lost.
void TestDepthwiseLoopsRoundAlikeIssue7() {
  const Geometry g = Make(With([](Options& o) {
    o.height = 90, o.width = 80, o.channels = 33, o.filters = 47, o.kernel_height = 3,
    o.kernel_width = 3, o.top = o.bottom = o.left = o.right = 1;
  }));
  Sizes sizes;
  Validate(g, DType::kFloat32, &sizes);
  std::mt19937 generator(7);
  const auto draw = [&](int64_t size) {
    std::vector<float> values(static_cast<size_t>(size));
    for (float& value : values) value = static_cast<float>(generator()) / 4e9f - 0.5f;
    return values;
  };
  const std::vector<float> x = draw(sizes.x), depthwise = draw(sizes.depthwise_kernel),
                           pointwise = draw(sizes.pointwise_kernel), bias = draw(sizes.bias);
  for (const std::string& target : AvailableTargets()) {
    SetTarget(target);
    std::vector<std::vector<float>> results;
    for (const int64_t threads : {1, 2, 5}) {
      SetNumThreads(threads);
      results.emplace_back(static_cast<size_t>(sizes.y));
      Forward(g, DType::kFloat32,
              {x.data(), depthwise.data(), pointwise.data(), nullptr,
               g.has_bias ? bias.data() : nullptr, results.back().data()});
    }
    Check(results[1] == results[0] && results[2] == results[0],
          target + ": other bits on several threads");
  }
  SetTarget("");
  SetNumThreads(0);
}

Geometry LargeGeometry() {
  return Make(With([](Options& o) {
    o.height = o.width = 24, o.channels = 100, o.filters = 50,
    o.top = o.bottom = o.left = o.right = 1;
  }));
}

void TestConcurrentCallersAgree() {
  const Geometry g = LargeGeometry();
  const Inputs in = DrawInputs(g, 2);
  SetNumThreads(2);
  Run expected(g, DType::kFloat32, in);
  expected.RunForward();
  expected.RunBackward(true);
  const std::vector<unsigned char> bytes = expected.OutputBytes();
  std::vector<int> equal(4, 0);
  std::vector<std::thread> callers;
  for (size_t i = 0; i < equal.size(); ++i) {
    callers.emplace_back([&, i] {
      Run run(g, DType::kFloat32, in);
      run.RunForward();
      run.RunBackward(true);
      equal[i] = run.OutputBytes() == bytes;
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const int e : equal) Check(e, "a concurrent caller got another result");
  SetNumThreads(0);
}

// A forked child has none of its parent's threads; it must still compute.
void TestComputesAfterFork() {
#ifndef SEPCONV_TSAN
  const Geometry g = LargeGeometry();
  const Inputs in = DrawInputs(g, 3);
  SetNumThreads(3);
  Run expected(g, DType::kFloat32, in);
  expected.RunForward();
  expected.RunBackward(true);
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);  // a child that waits for threads it does not have would wait for ever
    Run run(g, DType::kFloat32, in);
    run.RunForward();
    run.RunBackward(true);
    _exit(run.OutputBytes() == expected.OutputBytes() ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  Check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the forked child failed");
  SetNumThreads(0);
#endif
}

void TestValidateRefuses() {
  const Geometry valid = Make(Options());
  Check(Validate(valid, DType::kFloat32, nullptr).empty(), "Validate refuses a valid geometry");
  const auto refused = [&](const char* field, int64_t Geometry::* member, int64_t value) {
    Geometry g = valid;
    g.*member = value;
    const std::string message = Validate(g, DType::kFloat32, nullptr);
    Check(
        message.find(field) != std::string::npos,
        std::string(field) + "=" + std::to_string(value) + " gave the message \"" + message + "\"");
  };
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
#define SEPCONV_FIELD(name)               \
  refused(#name, &Geometry::name, -1);    \
  refused(#name, &Geometry::name, kHuge); \
  refused(#name, &Geometry::name, -kHuge - 1);
  SEPCONV_GEOMETRY_FIELDS(SEPCONV_FIELD)
#undef SEPCONV_FIELD
  refused("in_channels", &Geometry::in_channels, 0);
  refused("depth_multiplier", &Geometry::depth_multiplier, 0);
  refused("out_channels", &Geometry::out_channels, 0);
  refused("kernel_height", &Geometry::kernel_height, 0);
  refused("kernel_width", &Geometry::kernel_width, 0);
  refused("stride_height", &Geometry::stride_height, 0);
  refused("stride_width", &Geometry::stride_width, 0);
  refused("dilation_height", &Geometry::dilation_height, 0);
  refused("dilation_width", &Geometry::dilation_width, 0);
  refused("layout", &Geometry::layout, 2);
  refused("activation", &Geometry::activation, kNumActivations);
  refused("has_bias", &Geometry::has_bias, 2);
  // Products that wrap around 2^64 to something small.
  refused("bytes of `x`", &Geometry::batch, int64_t{1} << 47);
  Geometry wraps = valid;
  wraps.in_height = wraps.in_width = int64_t{1} << 32;
  Check(!Validate(wraps, DType::kFloat32, nullptr).empty(), "a wrapped product passes");
  wraps.batch = 0;  // the sizes are zero, the strides are not
  Check(!Validate(wraps, DType::kFloat32, nullptr).empty(),
        "a wrapped product of an empty batch passes");
  refused("reach", &Geometry::stride_height, int64_t{1} << 48);
  refused("reach", &Geometry::dilation_width, int64_t{1} << 48);
  Check(!Validate(valid, static_cast<DType>(4), nullptr).empty(), "an unknown dtype passes");
}

void TestThreadCountsAreKept() {
  SetNumThreads(3);
  Check(GetNumThreads() == 3, "SetNumThreads(3)");
  SetNumThreads(0);
  Check(GetNumThreads() >= 1, "SetNumThreads(0)");
}

}  // namespace
}  // namespace sepconv

// --without-fork: for emulators in which the child of a program with threads cannot start threads.
int main(int argc, char** argv) {
  const bool forks = argc < 2 || std::strcmp(argv[1], "--without-fork") != 0;
  sepconv::TestValidateRefuses();
  sepconv::TestDepthwiseLoopsRoundAlikeIssue7();
  sepconv::TestThreadCountsAreKept();
  sepconv::TestEveryTargetAgainstTheFormula();
  sepconv::TestConcurrentCallersAgree();
  if (forks) sepconv::TestComputesAfterFork();
  std::printf("%d checks, %d failures\n", sepconv::num_checks.load(), sepconv::num_failures.load());
  return sepconv::num_failures == 0 ? 0 : 1;
}
