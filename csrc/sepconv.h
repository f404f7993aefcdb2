// The framework-free interface of the fused depthwise-separable convolution.
//
//   D[n,y,x,q] = a_mid( b_mid[q] + sum_ij a_in(X[n, y*sh + i*dh - top, x*sw + j*dw - left, q / M])
//   * Kd[i,j,q] ) Y[n,y,x,f] = a_out( bias[f] + sum_q D[n,y,x,q] * Kp[q,f] )
//
// Outside the image a_in(X) is zero. D exists one tile at a time and is never stored.
//
// Whatever mode the caller's thread is in, arithmetic follows IEEE 754 with subnormals, so results
// depend on the arguments and the target alone.
#ifndef SEPCONV_SEPCONV_H_
#define SEPCONV_SEPCONV_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace sepconv {

// Numbers are shared with spec.py (`ACTIVATIONS`); a test compares the two lists.
enum class Activation : int64_t {
  kLinear = 0,
  kRelu,
  kRelu6,
  kLeakyRelu,
  kSigmoid,
  kTanh,
  kSilu,
  kGelu,
  kHardSigmoid,
  kHardSilu,
  kElu,
};
inline constexpr const char* kActivationNames[] = {
    "linear", "relu", "relu6",        "leaky_relu", "sigmoid", "tanh",
    "silu",   "gelu", "hard_sigmoid", "hard_silu",  "elu"};
inline constexpr int64_t kNumActivations = 11;

enum class Layout : int64_t { kChannelsLast = 0, kChannelsFirst = 1 };

// How elements are stored. Sums run in float, for kFloat64 in double.
enum class DType : int64_t { kFloat32 = 0, kFloat64, kBFloat16, kFloat16 };
inline int64_t ElementSize(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Every integer of one call, in the order in which it crosses every border as a flat int64 array.
#define SEPCONV_GEOMETRY_FIELDS(X) \
  X(batch)                         \
  X(in_height)                     \
  X(in_width)                      \
  X(in_channels)                   \
  X(depth_multiplier)              \
  X(out_height)                    \
  X(out_width)                     \
  X(out_channels)                  \
  X(kernel_height)                 \
  X(kernel_width)                  \
  X(stride_height)                 \
  X(stride_width)                  \
  X(dilation_height)               \
  X(dilation_width)                \
  X(pad_top)                       \
  X(pad_left)                      \
  X(layout)                        \
  X(input_activation)              \
  X(depthwise_activation)          \
  X(activation)                    \
  X(has_depthwise_bias)            \
  X(has_bias)

struct Geometry {
#define SEPCONV_FIELD(name) int64_t name;
  SEPCONV_GEOMETRY_FIELDS(SEPCONV_FIELD)
#undef SEPCONV_FIELD

  int64_t depthwise_channels() const { return in_channels * depth_multiplier; }
  int64_t pixels() const { return batch * out_height * out_width; }
  bool channels_first() const { return layout == static_cast<int64_t>(Layout::kChannelsFirst); }
};

#define SEPCONV_FIELD(name) +1
inline constexpr int64_t kNumGeometryFields = 0 SEPCONV_GEOMETRY_FIELDS(SEPCONV_FIELD);
#undef SEPCONV_FIELD
static_assert(sizeof(Geometry) == kNumGeometryFields * sizeof(int64_t));

// Number of elements of each array of a call.
struct Sizes {
  int64_t x, y, depthwise_kernel, pointwise_kernel, depthwise_bias, bias;
};

// Empty when `geometry` describes a computable call; otherwise what is wrong with it. Fills `sizes`
// (may be null). Every product is checked for 64-bit overflow, so no later arithmetic on sizes can
// wrap.
std::string Validate(const Geometry& geometry, DType dtype, Sizes* sizes);

struct PackedPointwise;

// Arrays of a forward call: dense, in the layout of the geometry. Absent biases are null.
struct ForwardArgs {
  const void* x;
  const void* depthwise_kernel;  // [kernel_height][kernel_width][in_channels][depth_multiplier]
  const void* pointwise_kernel;  // [in_channels * depth_multiplier][out_channels]
  const void* depthwise_bias;    // [in_channels * depth_multiplier] or null
  const void* bias;              // [out_channels] or null
  void* y;
  const PackedPointwise* packed = nullptr;  // of `pointwise_kernel`, or null; see PackWeights
};

// Arrays of a backward call. `y` may be null: it is then recomputed where the slope of the
// activation needs it. Every gradient is overwritten. A null gradient is not computed.
struct BackwardArgs {
  const void* dy;
  const void* x;
  const void* depthwise_kernel;
  const void* pointwise_kernel;
  const void* depthwise_bias;
  const void* bias;
  const void* y;
  void* dx;
  void* d_depthwise_kernel;
  void* d_pointwise_kernel;
  void* d_depthwise_bias;
  void* d_bias;
};

// `geometry` must have passed Validate. Both throw std::bad_alloc, before anything is written, if
// scratch memory cannot be had; nothing else is thrown. Results are bitwise the same for every
// number of threads.
void Forward(const Geometry& geometry, DType dtype, const ForwardArgs& args);
void Backward(const Geometry& geometry, DType dtype, const BackwardArgs& args);

// Copies of the weights of many forward calls, with the pointwise kernel in the order in which the
// forward pass of the target in force reads it. Any number of threads may use them at once.
struct PackedWeights;
// Of a geometry that passed Validate; x and y are not looked at. Throws std::bad_alloc.
std::shared_ptr<const PackedWeights> PackWeights(const Geometry& geometry, DType dtype,
                                                 const ForwardArgs& weights);
DType DTypeOf(const PackedWeights& weights);
// Whether calls of this geometry have weights of these sizes.
bool Fit(const PackedWeights& weights, const Geometry& geometry);
// Forward with them, which must fit: the same results, to the bit.
void ForwardPacked(const Geometry& geometry, const PackedWeights& weights, const void* x, void* y);

// True when the slope of the activation follows from its output, so that saving `y` spares
// recomputing it.
bool SlopeFollowsFromOutput(Activation activation);

// How a call is cut into work: names and values of what the loops decide from the geometry, the
// target and the number of threads. Empty for an output without pixels.
using Plan = std::vector<std::pair<const char*, int64_t>>;
Plan PlanForward(const Geometry& geometry, DType dtype);
Plan PlanBackward(const Geometry& geometry, DType dtype);  // of all gradients, y given

// Threads used by a call; 0 restores the default (OMP_NUM_THREADS, else the CPUs this process may
// use).
void SetNumThreads(int64_t num_threads);
int64_t GetNumThreads();

// Instruction sets: the best one this CPU runs, unless SEPCONV_TARGET or SetTarget names another.
std::vector<std::string> AvailableTargets();  // best first; those this CPU can run
std::string CurrentTarget();
bool SetTarget(
    const std::string& name);  // "" restores the automatic choice; false if it cannot run here

// Tile constants of the current target, for tests that must straddle them and for plans shown to
// the user.
struct TileConstants {
  int64_t lanes, rows, columns, forward_pixels, backward_pixels, backward_channels,
      backward_slab_pixels;
};
TileConstants CurrentTileConstants(DType dtype);

// Gigaflops of one thread that does nothing but independent multiply-adds on registers, over a few
// milliseconds: what the forward pass of a compute-bound layer is measured against. Multiply-adds
// count as two.
double FmaPeakGflops(DType dtype);

}  // namespace sepconv

#endif  // SEPCONV_SEPCONV_H_
