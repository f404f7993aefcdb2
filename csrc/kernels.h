// The table of functions that one target provides. The loops (forward.cc, backward.cc) know only
// this.
#ifndef SEPCONV_KERNELS_H_
#define SEPCONV_KERNELS_H_

#include <algorithm>
#include <cstdint>

#include "buffer.h"
#include "sepconv.h"
#include "storage.h"

namespace sepconv {

// The least magnitudes above zero that a worker has met, lane by lane, as bits less one; see
// PairKernels.
struct alignas(64) LeastLanes {
  static constexpr int kLanes = 16;
  LeastLanes() {
    std::fill_n(value, kLanes, 0xffffffffu);
    std::fill_n(weight, 2 * kLanes, uint16_t{0xffff});
  }
  uint32_t value[kLanes];  // of floats
  uint16_t weight[2 * kLanes];
};

// C[rows x columns] = A B, then + bias, then clamped to [low, high]; or C += A B.
// One panel: columns <= tile columns. One of A's strides is 1. B rows must be readable up to the
// next whole vector. Elements of A and B are numbers, or pairs of neighbours in depth; `depth`
// counts elements.
template <typename E, typename C = ComputeType<E>>
struct GemmArgs {
  using T = ComputeType<E>;
  int64_t rows, depth, columns;
  const E* a;
  int64_t a_row_stride, a_depth_stride;
  const E* b;
  int64_t b_stride;
  C* c;
  int64_t c_stride;
  const T* bias;  // null: none
  T low, high;    // (-inf, inf): no clamp
  bool accumulate;
  // Sums of the depth before, added like a bias: whole vectors, row by row. Null: none.
  const T* before = nullptr;
  // What comes next, meanwhile: `ahead_rows` rows, each as wide as this panel, are copied to
  // `ahead_to`[row][b_stride], or, where that is null, fetched into L2. Null: none. Not where A's
  // rows are neighbours. Rows of pairs are made of two rows of bfloat16, half a stride apart. Their
  // number is `depth`, but for the zeros that fill the depth up.
  const char* ahead = nullptr;
  int64_t ahead_rows = 0;
  int64_t ahead_stride = 0, ahead_row_bytes = 0;  // in bytes
  bool fetch_rows = false;                        // A comes from memory: fetch its next rows too
  E* ahead_to = nullptr;
  LeastLanes* least = nullptr;  // of the pairs copied
  // So many bytes of memory from here on are fetched into L2 meanwhile.
  const char* fetch = nullptr;
  int64_t fetch_bytes = 0;
  // C is made of whole aligned vectors and is written past the caches. Not where it accumulates.
  bool streams = false;
  // C is in no cache: its lines come while the sums run.
  bool fetches_c = false;
};

// One kernel tap of a run of pixels: where pixel 0 reads, and the weights (or, for the gradient,
// their sums).
template <typename X>
struct Tap {
  using T = ComputeType<X>;
  const X* source;
  const T* weight;
  T* weight_sum;
};

// u[p][c] = bias[c] + sum over taps of source[p * source_stride + c] * weight[c]
//
// X and U are the types of the source and the output: that of the sums, or BFloat16. What is stored
// as BFloat16 fills the last vector with zeros, and is watched: see PairKernels.
template <typename X, typename U = X>
struct DepthwiseArgs {
  using T = ComputeType<X>;
  const Tap<X>* taps;
  int64_t num_taps, pixels, channels, source_stride;
  const T* bias;  // null: none
  U* out;
  int64_t out_stride;
  LeastLanes* least = nullptr;
};

// Rows of pixels whose windows overlap: `window` (3, 5 or 7) neighbouring rows and columns of taps,
// at a `stride` of 1 or 2. Output row r, of as many as `SlideRows` allows, reads the source rows
// from sources[r * stride] on; pixel p the columns from first_column + p * stride on, those of them
// that are in [0, width).
//   out[r][p][c] = bias[c] + sum over i, j of sources[r * stride + i][first_column + p * stride +
//                  j][c] * weights[i * window + j][c]
// A source row that does not exist is null; there is then one output row.
template <typename X, typename U = X>
struct SlideArgs {
  using T = ComputeType<X>;
  int64_t window, stride, rows, pixels, channels;
  const X* const* sources;
  int64_t source_stride, first_column, width;
  const T* weights;
  int64_t weight_stride;
  const T* bias;  // null: none
  U* out;
  int64_t out_stride, out_row_stride;
  LeastLanes* least = nullptr;
};
inline constexpr bool HasSlide(int64_t window) { return window == 3 || window == 5 || window == 7; }
inline constexpr int64_t kMaxSlideSources = 16;

template <typename X, typename U = X>
struct DepthwiseKernels {
  void (*taps)(const DepthwiseArgs<X, U>&);
  void (*slide)(const SlideArgs<X, U>&);
};

// weight_sum[c] += sum over pixels of source[p * source_stride + c] * gradient[p * gradient_stride
// + c], per tap
template <typename T>
struct DepthwiseGradientArgs {
  const Tap<T>* taps;
  int64_t num_taps, pixels, channels, source_stride;
  const T* gradient;
  int64_t gradient_stride;
};

// The same for whole rows of pixels whose windows lie side by side: weight_sums[i * window + j] +=
// sum over rows r and pixels p of sources[r + i][first_column + p + j] * gradient[r][p], where the
// source row is not null and the column in [0, width).
template <typename T>
struct WindowGradientArgs {
  int64_t window, rows, pixels, channels;
  const T* const* sources;  // column 0
  int64_t source_stride, first_column, width;
  const T* gradient;
  int64_t gradient_stride, gradient_row_stride;
  T* weight_sums;
  int64_t weight_stride;
};

template <typename T>
struct Kernels {
  int64_t lanes, rows, columns;  // of the widest micro-kernel tile
  int64_t slide_rows[2];         // of a window of 3, and of a wider one
  int64_t whole_bytes;           // of depthwise output that stay near beside one weight panel
  void (*gemm)(const GemmArgs<T>&);
  DepthwiseKernels<T> depthwise;
  void (*depthwise_gradient)(const DepthwiseGradientArgs<T>&);
  int64_t gradient_window;  // the widest of window_gradient, which has the odd ones from 3 on
  void (*window_gradient)(const WindowGradientArgs<T>&);
  void (*activate)(Activation, T* data, int64_t rows, int64_t columns, int64_t stride);
  // out = gradient * slope(z), or gradient * slope given the activation's output y. `out` may be
  // any of the inputs.
  void (*slope_from_input)(Activation, const T* gradient, const T* z, T* out, int64_t count);
  void (*slope_from_output)(Activation, const T* gradient, const T* y, T* out, int64_t count);
  void (*add_column_sums)(const T* data, int64_t rows, int64_t columns, int64_t stride, T* sums);
  void (*fma_chains)(int64_t steps,
                     T* result);  // `fma_chain_flops` floating-point operations a step
  int64_t fma_chain_flops;

  int64_t SlideRows(int64_t window) const { return slide_rows[window > 3]; }
};

// Rows from the storage type S to the compute type, and back.
template <typename S>
struct RowCopies {
  using T = ComputeType<S>;
  // to[r * to_stride + c] = from[r * stride + c] for c < count, and zero for count <= c < width.
  void (*load)(const S* from, int64_t stride, int64_t rows, int64_t count, int64_t width, T* to,
               int64_t to_stride);
  // to[r * to_stride + c] = from[c * stride + r], likewise.
  void (*load_transposed)(const S* from, int64_t stride, int64_t rows, int64_t count, int64_t width,
                          T* to, int64_t to_stride);
  // to[r * to_stride + c] = from[r * stride + c]
  void (*store)(const T* from, int64_t stride, int64_t rows, int64_t count, S* to,
                int64_t to_stride);
  // to[c * to_stride + r] = from[r * stride + c]
  void (*store_transposed)(const T* from, int64_t stride, int64_t rows, int64_t count, S* to,
                           int64_t to_stride);
  // data[r * stride + c] as if it had been stored and loaded again.
  void (*round)(T* data, int64_t rows, int64_t count, int64_t stride);
};

// Products of matrices of bfloat16 with an instruction that adds up products of pairs. It takes
// subnormal numbers for zero, as the one that narrows floats does. So all operands are watched:
// every sum is a multiple of the product of the last places of the least operands above zero, and
// of the last place of the least bias. Where that is no subnormal, no sum is; see MayFlush.
struct PairKernels {
  // Rows of A and B are readable up to a multiple of `row_unit` rows of A and `depth_unit` pairs of
  // depth. B and the used rows of A are zero there.
  int64_t row_unit, depth_unit;
  int64_t backward_pixels;  // of a chunk, see tuning.h
  // Around the calls of the functions below with so many rows of A, on the thread that makes them.
  void (*configure)(int64_t rows);
  void (*release)();
  // A's depth stride is 1.
  void (*gemm)(const GemmArgs<BFloat16Pair, float>&);
  void (*gemm_stored)(const GemmArgs<BFloat16Pair, BFloat16>&);
  DepthwiseKernels<BFloat16> depthwise;  // of rows of x in place
  DepthwiseKernels<float, BFloat16> depthwise_staged;
  // to[r / 2][width] = rows r and r + 1 of from, zero for c >= count and r >= rows.
  void (*pack)(const BFloat16* from, int64_t stride, int64_t rows, int64_t count, int64_t width,
               BFloat16Pair* to, LeastLanes* least);
  // Weights that are packed in another way, to be watched.
  void (*watch)(const BFloat16* from, int64_t stride, int64_t rows, int64_t count,
                LeastLanes* least);
  // Rows of floats rounded. The rest of the last vector of a row is zero.
  void (*narrow)(const float* from, int64_t stride, int64_t rows, int64_t count, BFloat16* to,
                 int64_t to_stride, LeastLanes* least);
  void (*add_column_sums)(const BFloat16* data, int64_t rows, int64_t columns, int64_t stride,
                          float* sums);
  // As `fma_chains`.
  void (*chains)(int64_t steps, float* result);
  int64_t chain_flops;

  // Pairs of a packed panel in depth.
  int64_t Depth(int64_t depth) const { return RoundUp(CeilDiv(depth, 2), depth_unit); }
};

// Exponent fields of the least operands above zero. A bfloat16 with the field e > 0 is a multiple
// of 2^(e - 134), e = 0 is subnormal itself; the least normal float is 2^-126.
struct LeastOperands {
  static constexpr int kNone = 512;  // What LeastLanes of zeros alone give.
  int value = kNone, weight = kNone, bias = kNone;

  void Add(const LeastLanes& lanes) {
    for (const uint32_t bits : lanes.value)
      value = std::min(value, static_cast<int>((uint64_t{bits} + 1) >> 23));
    for (const uint16_t bits : lanes.weight) weight = std::min(weight, (bits + 1) >> 7);
  }
  // Whether a product or a sum of products could be subnormal, and so be lost.
  bool MayFlush() const {
    if (bias - 134 < -126) return true;
    if (value == kNone || weight == kNone) return false;
    return value == 0 || weight == 0 || value + weight - 2 * 134 < -126;
  }
};

struct Target {
  const char* name;
  bool (*runs_here)();
  bool (*pays_here)();  // where it runs: whether it beats those behind it in the list
  Kernels<float> f32;
  Kernels<double> f64;
  RowCopies<float> copies_f32;
  RowCopies<double> copies_f64;
  RowCopies<BFloat16> copies_bf16;
  RowCopies<Float16> copies_f16;
  const PairKernels* pairs;  // null: none
};

// The target in force; reading it is one atomic load.
const Target& CurrentTargetTable();

template <typename T>
const Kernels<T>& KernelsOf(const Target& target);
template <>
inline const Kernels<float>& KernelsOf<float>(const Target& target) {
  return target.f32;
}
template <>
inline const Kernels<double>& KernelsOf<double>(const Target& target) {
  return target.f64;
}

template <typename S>
const RowCopies<S>& CopiesOf(const Target& target);
template <>
inline const RowCopies<float>& CopiesOf<float>(const Target& target) {
  return target.copies_f32;
}
template <>
inline const RowCopies<double>& CopiesOf<double>(const Target& target) {
  return target.copies_f64;
}
template <>
inline const RowCopies<BFloat16>& CopiesOf<BFloat16>(const Target& target) {
  return target.copies_bf16;
}
template <>
inline const RowCopies<Float16>& CopiesOf<Float16>(const Target& target) {
  return target.copies_f16;
}

}  // namespace sepconv

#endif  // SEPCONV_KERNELS_H_
