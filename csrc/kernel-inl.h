// The micro-kernels: one text, compiled once per target inside its region and namespace. The
// including file has included simd.h and defined `kTuning`. No checks here: the loops hand over
// whole tiles and tails.

#include "copies-inl.h"
#include "math-inl.h"

// Every third row of A has its own pointer: one addressing mode reaches base, base + s and base + 2
// s, so that the rows need few address registers and no index arithmetic.
template <int kRows, bool kUnitRows>
inline constexpr int kBases = kUnitRows ? 1 : (kRows + 2) / 3;

// pointer += count, with the sum in a register from here on. Left to itself, the compiler keeps an
// offset for every row and step on the stack: one more load per row.
template <typename T>
SEPCONV_INLINE void Advance(const T*& pointer, int64_t count) {
  pointer += count;
  asm("" : "+r"(pointer));
}

// One step of the depth: kRows broadcasts times kVectors loads, all products into the accumulators.
// kPairs: the elements of A and B are not floats, but pairs of bfloat16 neighbours in depth.
template <typename T, int kRows, int kVectors, bool kUnitRows, bool kPairs>
SEPCONV_INLINE void MicroStep(Vec<T> (&sum)[kRows][kVectors],
                              const T* const (&base)[kBases<kRows, kUnitRows>], int64_t row_stride,
                              int64_t depth_offset, const T* b) {
  Vec<T> column[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) column[v] = Load(b + v * kLanes<T>);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const T* row = kUnitRows ? base[0] + r : base[kUnitRows ? 0 : r / 3] + (r % 3) * row_stride;
    const Vec<T> x = Set(row[depth_offset]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kPairs) {
        AddDotOfPairs(sum[r][v], x, column[v]);
      } else {
        MultiplyAdd(sum[r][v], x, column[v]);
      }
    }
  }
}

// What a register tile does beside its sums: nothing, or every four steps of the depth one row of
// what comes next.
enum class Beside { kNothing, kFetch, kFetchRows, kCopy };

template <typename T, int kVectors>
SEPCONV_INLINE void CopyRow(const char* from, T* to) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v)
    Store(to + v * kLanes<T>, Load(reinterpret_cast<const T*>(from) + v * kLanes<T>));
}

// The sums of a register tile over the whole depth. A loop for each thing done beside, because
// there are no issue slots to spare.
template <typename T, int kRows, int kVectors, bool kUnitRows, bool kPairs, Beside kBeside>
SEPCONV_INLINE void MicroLoop(const GemmArgs<T>& g, const T* a, const char* ahead, T* ahead_to,
                              Vec<T> (&sum)[kRows][kVectors]) {
  const int64_t row_stride = kUnitRows ? 1 : g.a_row_stride;
  const int64_t depth_stride = kUnitRows ? g.a_depth_stride : 1;
  const int64_t b_stride = g.b_stride;
  const T* b = g.b;
  const T* base[kBases<kRows, kUnitRows>];
#pragma GCC unroll 16
  for (int i = 0; i < kBases<kRows, kUnitRows>; ++i) base[i] = a + 3 * i * row_stride;

  int64_t k = 0;
  for (; k + 4 <= g.depth; k += 4) {
    if constexpr (kBeside == Beside::kFetch) {
      __builtin_prefetch(ahead, 0, 2);
      __builtin_prefetch(ahead + g.ahead_row_bytes - 1, 0, 2);
      ahead += g.ahead_stride;
    }
    if constexpr (kBeside == Beside::kFetchRows) {
      // As much as the tile itself reads of A in four steps.
      constexpr int kBytes = kRows * 4 * static_cast<int>(sizeof(T));
#pragma GCC unroll 16
      for (int byte = 0; byte < kBytes; byte += static_cast<int>(kCacheLineBytes))
        __builtin_prefetch(ahead + byte, 0, 3);
      ahead += kBytes;
    }
    if constexpr (kBeside == Beside::kCopy) {
      // Far enough ahead for memory, and near enough that rows a power of two apart, which share a
      // few sets of L2, are still there.
      const char* far = ahead + kCopyFetchRows * g.ahead_stride;
      __builtin_prefetch(far, 0, 2);
      __builtin_prefetch(far + g.ahead_row_bytes - 1, 0, 2);
      CopyRow<T, kVectors>(ahead, ahead_to);
      ahead += g.ahead_stride;
      ahead_to += b_stride;
    }
#pragma GCC unroll 4
    for (int step = 0; step < 4; ++step) {
      MicroStep<T, kRows, kVectors, kUnitRows, kPairs>(sum, base, row_stride,
                                                       kUnitRows ? 0 : step * depth_stride, b);
      b += b_stride;
      if constexpr (kUnitRows) Advance(base[0], depth_stride);
    }
    if constexpr (!kUnitRows) {
#pragma GCC unroll 16
      for (int i = 0; i < kBases<kRows, kUnitRows>; ++i) base[i] += 4;
    }
  }
  for (; k < g.depth; ++k) {
    MicroStep<T, kRows, kVectors, kUnitRows, kPairs>(sum, base, row_stride, 0, b);
    b += b_stride;
#pragma GCC unroll 16
    for (int i = 0; i < kBases<kRows, kUnitRows>; ++i) base[i] += depth_stride;
  }
}

// The sums of a register tile, with bias and clamp, to C.
template <typename T, int kRows, int kVectors, bool kStreams>
SEPCONV_INLINE void FinishRows(const GemmArgs<T>& g, const Vec<T> (&sum)[kRows][kVectors], T* c) {
  constexpr int kL = kLanes<T>;
  const int last = static_cast<int>(g.columns - (kVectors - 1) * kL);  // lanes of the last vector
  Vec<T> bias[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    bias[v] = !g.bias                          ? Vec<T>{}
              : v + 1 < kVectors || last == kL ? Load(g.bias + v * kL)
                                               : LoadFirst(g.bias + v * kL, last);
  }
  const Vec<T> low = Set(g.low), high = Set(g.high);
  const bool clamps = g.low > -std::numeric_limits<T>::infinity();
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    T* to = c + r * g.c_stride;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vec<T> value = sum[r][v] + bias[v];
      if (clamps) value = AtMost(AtLeast(value, low), high);
      if constexpr (kStreams) {
        Stream(to + v * kL, value);
      } else if (v + 1 < kVectors || last == kL) {
        Store(to + v * kL, value);
      } else {
        StoreFirst(to + v * kL, last, value);
      }
    }
  }
}

// One register tile. kRows x kVectors accumulators run over the depth and are never spilled.
// kUnitRows: the rows of A are neighbours in memory (A transposed); otherwise the depth is.
template <typename T, int kRows, int kVectors, bool kUnitRows, bool kPairs>
void MicroKernel(const GemmArgs<T>& g, const T* a, T* c, const char* ahead, T* ahead_to) {
  constexpr int kL = kLanes<T>;
  Vec<T> sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec<T>{};
  }
  if (kUnitRows) {
    // Rows of a weight gradient are pages apart and in no register yet: they come meanwhile.
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(c + r * g.c_stride, 1);
  }
  if (ahead_to) {
    MicroLoop<T, kRows, kVectors, kUnitRows, kPairs, Beside::kCopy>(g, a, ahead, ahead_to, sum);
  } else if (!kUnitRows && ahead && g.fetch_rows) {
    MicroLoop<T, kRows, kVectors, kUnitRows, kPairs, Beside::kFetchRows>(g, a, ahead, nullptr, sum);
  } else if (!kUnitRows && ahead) {
    MicroLoop<T, kRows, kVectors, kUnitRows, kPairs, Beside::kFetch>(g, a, ahead, nullptr, sum);
  } else {
    MicroLoop<T, kRows, kVectors, kUnitRows, kPairs, Beside::kNothing>(g, a, nullptr, nullptr, sum);
  }

  const int last = static_cast<int>(g.columns - (kVectors - 1) * kL);  // lanes of the last vector
  if (g.accumulate) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      T* to = c + r * g.c_stride;
#pragma GCC unroll 4
      for (int v = 0; v + 1 < kVectors; ++v) Store(to + v * kL, Load(to + v * kL) + sum[r][v]);
      to += (kVectors - 1) * kL;
      if (last == kL) {
        Store(to, Load(to) + sum[r][kVectors - 1]);
      } else {
        StoreFirst(to, last, LoadFirst(to, last) + sum[r][kVectors - 1]);
      }
    }
    return;
  }
  if (g.before) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += Load(g.before + (r * kVectors + v) * kL);
    }
  }
  if (g.streams) {
    FinishRows<T, kRows, kVectors, true>(g, sum, c);
  } else {
    FinishRows<T, kRows, kVectors, false>(g, sum, c);
  }
}

template <typename T>
using MicroKernelPointer = void (*)(const GemmArgs<T>&, const T*, T*, const char*, T*);

// Micro-kernels for 1, 2, ... rows.
template <typename T, int kVectors, bool kUnitRows, bool kPairs, size_t... R>
SEPCONV_INLINE MicroKernelPointer<T> MicroKernelFor(int64_t rows, std::index_sequence<R...>) {
  static constexpr MicroKernelPointer<T> kTable[] = {
      MicroKernel<T, R + 1, kVectors, kUnitRows, kPairs>...};
  return kTable[rows - 1];
}

// A register tile whose depth is cut into blocks. The blocks before the last one are summed up in
// memory, in rows of whole vectors.
template <typename T, int kRows, int kVectors>
void MicroKernelInBlocks(MicroKernelPointer<T> kernel, const GemmArgs<T>& g, int64_t block,
                         const T* a, T* c, int64_t rows, const char* ahead, T* ahead_to) {
  constexpr int64_t kColumns = kVectors * kLanes<T>;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  alignas(kCacheLineBytes) T before[kRows * kColumns];
  GemmArgs<T> part = g;
  part.depth = block;
  part.columns = part.c_stride = kColumns;
  part.bias = nullptr;
  part.streams = false;
  part.low = -kInfinity;
  part.high = kInfinity;
  int64_t k = 0;
  for (; k + block < g.depth; k += block) {
    part.accumulate = k > 0;
    kernel(part, a + k, before, ahead, ahead_to);
    part.b += block * g.b_stride;
    if (ahead)
      ahead += g.fetch_rows ? block * rows * static_cast<int64_t>(sizeof(T))
                            : block / 4 * g.ahead_stride;
    if (ahead_to) ahead_to += block / 4 * g.b_stride;
  }
  GemmArgs<T> last = g;
  last.depth = g.depth - k;
  last.b = part.b;
  last.before = before;
  kernel(last, a + k, c, ahead, ahead_to);
}

// Steps of the depth in one chain of additions: blocks of nearly equal size, all but the last one
// of whole unrolled steps, so that what is done beside goes on where it was.
SEPCONV_INLINE int64_t SumBlock(int64_t depth) {
  const int64_t blocks = (depth + kSumDepth - 1) / kSumDepth;
  return ((depth + blocks - 1) / blocks + 3) / 4 * 4;
}

template <typename T, int kVectors, bool kUnitRows, bool kPairs>
void GemmPanel(const GemmArgs<T>& g) {
  // Rows are shared out evenly: 49 rows in tiles of at most 14 are 13 + 12 + 12 + 12, not 14 + 14 +
  // 14 + 7.
  constexpr int kRows = kTuning.micro_rows[kVectors - 1];
  // The weight gradient has short depths, of a chunk of pixels. Products of pairs lose more to
  // bfloat16.
  constexpr bool kBlocks = !kUnitRows && !kPairs;
  const int64_t block = kBlocks ? SumBlock(g.depth) : g.depth;
  const int64_t tiles = (g.rows + kRows - 1) / kRows;
  const int64_t small = g.rows / tiles, larger = g.rows % tiles;
  constexpr auto kRowCounts = std::make_index_sequence<kRows>();
  const T* a = g.a;
  T* c = g.c;
  const int64_t fetch_lines = (g.fetch_bytes + kCacheLineBytes - 1) / kCacheLineBytes;
  int64_t fetched = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t rows = small + (tile < larger);
    // The first four tiles fetch or copy a quarter of the rows each.
    const bool busy = g.ahead && tile < 4;
    const char* ahead = busy ? g.ahead + tile * (g.depth / 4) * g.ahead_stride : nullptr;
    T* ahead_to = busy && g.ahead_to ? g.ahead_to + tile * (g.depth / 4) * g.b_stride : nullptr;
    if (!kUnitRows && g.fetch_rows)
      ahead = reinterpret_cast<const char*>(a + kFetchTiles * rows * g.a_row_stride);
    const int64_t fetch_end = fetch_lines * (tile + 1) / tiles;
    for (; fetched < fetch_end; ++fetched)
      __builtin_prefetch(g.fetch + fetched * kCacheLineBytes, 0, 2);
    const auto kernel = MicroKernelFor<T, kVectors, kUnitRows, kPairs>(rows, kRowCounts);
    if (!kBlocks || block >= g.depth) {
      kernel(g, a, c, ahead, ahead_to);
    } else {
      MicroKernelInBlocks<T, kRows, kVectors>(kernel, g, block, a, c, rows, ahead, ahead_to);
    }
    a += rows * g.a_row_stride;
    c += rows * g.c_stride;
  }
  for (int64_t k = std::min<int64_t>(tiles, 4) * (g.depth / 4); g.ahead_to && k < g.depth; ++k)
    CopyRow<T, kVectors>(g.ahead + k * g.ahead_stride, g.ahead_to + k * g.b_stride);
}

template <typename T, bool kUnitRows, bool kPairs, size_t... V>
SEPCONV_INLINE void GemmByVectors(const GemmArgs<T>& g, std::index_sequence<V...>) {
  static constexpr void (*kTable[])(const GemmArgs<T>&) = {
      GemmPanel<T, V + 1, kUnitRows, kPairs>...};
  kTable[(g.columns - 1) / kLanes<T>](g);
}

template <typename T>
void Gemm(const GemmArgs<T>& g) {
  if (g.rows == 0) return;
  constexpr auto kVectorCounts = std::make_index_sequence<kTuning.micro_vectors>();
  if (g.a_row_stride == 1) {
    GemmByVectors<T, true, false>(g, kVectorCounts);
  } else {
    GemmByVectors<T, false, false>(g, kVectorCounts);
  }
}

#if defined(SEPCONV_SIMD_AVX512)
// For CPUs with AVX512_BF16 alone.
inline void GemmOfPairs(const GemmArgs<float>& g) {
  if (g.rows == 0) return;
  GemmByVectors<float, false, true>(g, std::make_index_sequence<kTuning.micro_vectors>());
}
#endif

// kPixels x kVectors accumulators; every tap loads its weights once for all pixels of the block.
template <typename T, int kPixels, int kVectors, bool kWhole>
SEPCONV_INLINE void DepthwiseBlock(const DepthwiseArgs<T>& d, int64_t pixel, int64_t channel,
                                   int count) {
  constexpr int kL = kLanes<T>;
  Vec<T> sum[kPixels][kVectors];
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[p][v] = d.bias ? LoadLanes<kWhole>(d.bias + channel + v * kL, count) : Vec<T>{};
    }
  }
  const int64_t stride = d.source_stride;
  const int64_t offset = pixel * stride + channel;
  if (kWhole && d.num_taps > 0) {
    // The columns that the next block reads first in the lowest row, which no block has read yet.
    const T* next = d.taps[d.num_taps - 1].source + offset + kPixels * stride;
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) __builtin_prefetch(next + p * stride);
  }
  for (int64_t t = 0; t < d.num_taps; ++t) {
    const T* weight = d.taps[t].weight + channel;
    const T* source = d.taps[t].source + offset;
    Vec<T> w[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) w[v] = LoadLanes<kWhole>(weight + v * kL, count);
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        MultiplyAddLoaded(sum[p][v], w[v], LoadLanes<kWhole>(source + p * stride + v * kL, count));
      }
    }
  }
  T* out = d.out + pixel * d.out_stride + channel;
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      StoreLanes<kWhole>(out + p * d.out_stride + v * kL, count, sum[p][v]);
  }
}

// The same where each row of the window has kWindow neighbouring columns, one pixel apart: a column
// is then loaded once for all pixels of the block that read it.
template <typename T, int kPixels, int kVectors, int kWindow>
SEPCONV_INLINE void DepthwiseWindowBlock(const DepthwiseArgs<T>& d, int64_t pixel,
                                         int64_t channel) {
  constexpr int kL = kLanes<T>;
  Vec<T> sum[kVectors][kPixels];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const Vec<T> bias = d.bias ? Load(d.bias + channel + v * kL) : Vec<T>{};
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) sum[v][p] = bias;
  }
  const int64_t stride = d.source_stride;
  const int64_t offset = pixel * stride + channel;
  const T* next = d.taps[d.num_taps - 1].source + offset + kPixels * stride;
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) __builtin_prefetch(next + p * stride);
  for (int64_t t = 0; t < d.num_taps; t += kWindow) {
    const T* row = d.taps[t].source + offset;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vec<T> weight[kWindow];
#pragma GCC unroll 8
      for (int j = 0; j < kWindow; ++j) weight[j] = Load(d.taps[t + j].weight + channel + v * kL);
#pragma GCC unroll 16
      for (int column = 0; column < kPixels + kWindow - 1; ++column) {
        const Vec<T> x = Load(row + column * stride + v * kL);
#pragma GCC unroll 8
        for (int j = 0; j < kWindow; ++j) {
          if (column - j >= 0 && column - j < kPixels)
            MultiplyAdd(sum[v][column - j], x, weight[j]);
        }
      }
    }
  }
  T* out = d.out + pixel * d.out_stride + channel;
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) Store(out + p * d.out_stride + v * kL, sum[v][p]);
  }
}

// Whether the taps are whole rows of `window` neighbouring columns.
template <typename T>
SEPCONV_INLINE bool IsWindow(const DepthwiseArgs<T>& d, int window) {
  if (d.num_taps == 0 || d.num_taps % window != 0) return false;
  for (int64_t t = 0; t < d.num_taps; ++t) {
    if (t % window != 0 && d.taps[t].source != d.taps[t - 1].source + d.source_stride) return false;
  }
  return true;
}

template <typename T, int kPixels, int kWindow = 0>
SEPCONV_INLINE void DepthwisePixels(const DepthwiseArgs<T>& d, int64_t pixel) {
  constexpr int kL = kLanes<T>, kV = kTuning.depthwise_vectors;
  int64_t channel = 0;
  if constexpr (kWindow > 0) {
    for (; channel + kV * kL <= d.channels; channel += kV * kL)
      DepthwiseWindowBlock<T, kPixels, kV, kWindow>(d, pixel, channel);
  }
  for (; channel + kV * kL <= d.channels; channel += kV * kL) {
    DepthwiseBlock<T, kPixels, kV, true>(d, pixel, channel, kL);
  }
  for (; channel + kL <= d.channels; channel += kL)
    DepthwiseBlock<T, kPixels, 1, true>(d, pixel, channel, kL);
  if (channel < d.channels) {
    DepthwiseBlock<T, kPixels, 1, false>(d, pixel, channel, static_cast<int>(d.channels - channel));
  }
}

// Pixels outside, channels inside: every tap then reads its row of memory from front to back, as
// prefetchers like it.
template <typename T>
void Depthwise(const DepthwiseArgs<T>& d) {
  constexpr int kP = kTuning.depthwise_pixels;
  int64_t pixel = 0;
  if (d.pixels >= kP) {
    if (IsWindow(d, 3)) {
      for (; pixel + kP <= d.pixels; pixel += kP) DepthwisePixels<T, kP, 3>(d, pixel);
    } else if (IsWindow(d, 5)) {
      for (; pixel + kP <= d.pixels; pixel += kP) DepthwisePixels<T, kP, 5>(d, pixel);
    }
  }
  for (; pixel + kP <= d.pixels; pixel += kP) DepthwisePixels<T, kP>(d, pixel);
  for (; pixel < d.pixels; ++pixel) DepthwisePixels<T, 1>(d, pixel);
}

// A window that slides along kRows rows of pixels: every column of the source is loaded once, for
// all windows that reach it. sum[r][j] belongs to the pixel whose window has the present column as
// its column j; when the window moves on, the sums move to the next j, which renames registers and
// computes nothing. Every pixel is summed up in the same order, whatever rows and pixels share the
// call.
template <typename T, int kWindow, int kRows, bool kWhole>
SEPCONV_INLINE void SlideStrip(const SlideArgs<T>& d, int64_t channel, int count) {
  constexpr int kSources = kRows + kWindow - 1;
  Vec<T> weight[kWindow][kWindow];
#pragma GCC unroll 8
  for (int i = 0; i < kWindow; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kWindow; ++j) {
      const T* from = d.weights + (i * kWindow + j) * d.weight_stride + channel;
      weight[i][j] = LoadLanes<kWhole>(from, count);
    }
  }
  const Vec<T> bias = d.bias ? LoadLanes<kWhole>(d.bias + channel, count) : Vec<T>{};
  Vec<T> sum[kRows][kWindow];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kWindow; ++j) sum[r][j] = bias;
  }
  const T* source[kSources];
#pragma GCC unroll 16
  for (int i = 0; i < kSources; ++i) source[i] = d.sources[i];
  int64_t from = d.first_column * d.source_stride + channel;
  int64_t to = channel - (kWindow - 1) * d.out_stride;
  for (int64_t step = 0; step < d.pixels + kWindow - 1; ++step) {
    if (const int64_t column = d.first_column + step; 0 <= column && column < d.width) {
      Vec<T> x[kSources];
#pragma GCC unroll 16
      for (int i = 0; i < kSources; ++i) {
        const bool met = kRows > 1 || source[i];  // Several rows are summed where all sources are.
        x[i] = met ? LoadLanes<kWhole>(source[i] + from, count) : Vec<T>{};
      }
#pragma GCC unroll 8
      for (int i = 0; i < kWindow; ++i) {
        if (kRows == 1 && !source[i]) continue;
#pragma GCC unroll 8
        for (int j = 0; j < kWindow; ++j) {
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) MultiplyAdd(sum[r][j], x[i + r], weight[i][j]);
        }
      }
    }
    if (step >= kWindow - 1) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        StoreLanes<kWhole>(d.out + to + r * d.out_row_stride, count, sum[r][kWindow - 1]);
    }
    from += d.source_stride;
    to += d.out_stride;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int j = kWindow - 1; j > 0; --j) sum[r][j] = sum[r][j - 1];
      sum[r][0] = bias;
    }
  }
}

template <typename T, int kWindow, int kRows>
void SlideChannels(const SlideArgs<T>& d) {
  constexpr int kL = kLanes<T>;
  int64_t channel = 0;
  for (; channel + kL <= d.channels; channel += kL)
    SlideStrip<T, kWindow, kRows, true>(d, channel, kL);
  if (channel < d.channels)
    SlideStrip<T, kWindow, kRows, false>(d, channel, static_cast<int>(d.channels - channel));
}

template <typename T, int kWindow, size_t... R>
SEPCONV_INLINE void SlideByRows(const SlideArgs<T>& d, std::index_sequence<R...>) {
  static constexpr void (*kTable[])(const SlideArgs<T>&) = {SlideChannels<T, kWindow, R + 1>...};
  kTable[d.rows - 1](d);
}

template <typename T>
void Slide(const SlideArgs<T>& d) {
  constexpr auto kRows = std::make_index_sequence<kTuning.slide_rows[0]>();
  constexpr auto kWideRows = std::make_index_sequence<kTuning.slide_rows[1]>();
  switch (d.window) {
    case 3:
      return SlideByRows<T, 3>(d, kRows);
    case 5:
      return SlideByRows<T, 5>(d, kWideRows);
    default:
      return SlideByRows<T, 7>(d, kWideRows);
  }
}

template <typename T, int kTaps, int kVectors, bool kWhole>
void GradientBlock(const DepthwiseGradientArgs<T>& d, const Tap<T>* taps, int64_t channel,
                   int count) {
  constexpr int kL = kLanes<T>;
  Vec<T> sum[kTaps][kVectors];
  const T* source[kTaps];
#pragma GCC unroll 16
  for (int t = 0; t < kTaps; ++t) {
    source[t] = taps[t].source + channel;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[t][v] = Vec<T>{};
  }
  const T* gradient = d.gradient + channel;
  int64_t offset = 0;
  for (int64_t p = 0; p < d.pixels; ++p) {
    Vec<T> g[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) g[v] = LoadLanes<kWhole>(gradient + v * kL, count);
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        MultiplyAddLoaded(sum[t][v], g[v], LoadLanes<kWhole>(source[t] + offset + v * kL, count));
      }
    }
    gradient += d.gradient_stride;
    offset += d.source_stride;
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTaps; ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* to = taps[t].weight_sum + channel + v * kL;
      StoreLanes<kWhole>(to, count, LoadLanes<kWhole>(to, count) + sum[t][v]);
    }
  }
}

template <typename T, int kVectors, bool kWhole, size_t... N>
SEPCONV_INLINE void GradientStrip(const DepthwiseGradientArgs<T>& d, int64_t channel, int count,
                                  std::index_sequence<N...>) {
  using Pointer = void (*)(const DepthwiseGradientArgs<T>&, const Tap<T>*, int64_t, int);
  static constexpr Pointer kTable[] = {GradientBlock<T, N + 1, kVectors, kWhole>...};
  // Taps in groups of nearly equal size: a lone last tap would wait for its own additions.
  const int64_t groups = (d.num_taps + kTuning.gradient_taps - 1) / kTuning.gradient_taps;
  const Tap<T>* taps = d.taps;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t size = d.num_taps / groups + (group < d.num_taps % groups);
    kTable[size - 1](d, taps, channel, count);
    taps += size;
  }
}

template <typename T>
void DepthwiseGradient(const DepthwiseGradientArgs<T>& d) {
  constexpr int kL = kLanes<T>, kV = kTuning.depthwise_vectors;
  constexpr auto kTapCounts = std::make_index_sequence<kTuning.gradient_taps>();
  int64_t channel = 0;
  for (; channel + kV * kL <= d.channels; channel += kV * kL) {
    GradientStrip<T, kV, true>(d, channel, kL, kTapCounts);
  }
  for (; channel + kL <= d.channels; channel += kL)
    GradientStrip<T, 1, true>(d, channel, kL, kTapCounts);
  if (channel < d.channels) {
    GradientStrip<T, 1, false>(d, channel, static_cast<int>(d.channels - channel), kTapCounts);
  }
}

// All kWindow x kWindow sums stay in registers for all rows, and each column is loaded once for the
// pixels of its row that read it.
template <typename T, int kWindow, bool kWhole>
void WindowGradientStrip(const WindowGradientArgs<T>& d, int64_t channel, int count) {
  Vec<T> sum[kWindow][kWindow];
#pragma GCC unroll 8
  for (int i = 0; i < kWindow; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kWindow; ++j) sum[i][j] = Vec<T>{};
  }
  // Step t reads column first_column + t, which is column j of the window of pixel t - j.
  const int64_t pixels = d.pixels;
  const int64_t begin = std::max<int64_t>(0, -d.first_column);
  const int64_t end = std::min(pixels + kWindow - 1, d.width - d.first_column);
  const int64_t stride = d.source_stride, gradient_stride = d.gradient_stride;
  const int64_t first = (d.first_column + begin) * stride + channel;
  for (int64_t r = 0; r < d.rows; ++r) {
    const T* const* source = d.sources + r;
    const T* next = d.gradient + r * d.gradient_row_stride + begin * gradient_stride + channel;
    // g[j] is that of pixel t - j.
    Vec<T> g[kWindow];
#pragma GCC unroll 8
    for (int j = 0; j + 1 < kWindow; ++j) {
      const bool exists = begin - 1 - j >= 0 && begin - 1 - j < pixels;
      g[j] = exists ? LoadLanes<kWhole>(next - (1 + j) * gradient_stride, count) : Vec<T>{};
    }
    int64_t offset = first;
    for (int64_t t = begin; t < end; ++t) {
#pragma GCC unroll 8
      for (int j = kWindow - 1; j > 0; --j) g[j] = g[j - 1];
      if (t < pixels) g[0] = LoadLanes<kWhole>(next, count);
      next += gradient_stride;
      if (t >= kWindow - 1 && t < pixels) {
#pragma GCC unroll 8
        for (int i = 0; i < kWindow; ++i) {
          if (!source[i]) continue;
          const Vec<T> x = LoadLanes<kWhole>(source[i] + offset, count);
#pragma GCC unroll 8
          for (int j = 0; j < kWindow; ++j) MultiplyAdd(sum[i][j], x, g[j]);
        }
      } else {
        // Some pixels do not exist. A product with zero in their place would not do: the column may
        // be infinite.
#pragma GCC unroll 8
        for (int i = 0; i < kWindow; ++i) {
          if (!source[i]) continue;
          const Vec<T> x = LoadLanes<kWhole>(source[i] + offset, count);
#pragma GCC unroll 8
          for (int j = 0; j < kWindow; ++j) {
            if (0 <= t - j && t - j < pixels) MultiplyAdd(sum[i][j], x, g[j]);
          }
        }
      }
      offset += stride;
    }
  }
  T* to = d.weight_sums + channel;
#pragma GCC unroll 8
  for (int i = 0; i < kWindow; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kWindow; ++j) {
      T* at = to + (i * kWindow + j) * d.weight_stride;
      StoreLanes<kWhole>(at, count, LoadLanes<kWhole>(at, count) + sum[i][j]);
    }
  }
}

template <typename T, int kWindow>
void WindowGradientChannels(const WindowGradientArgs<T>& d) {
  constexpr int kL = kLanes<T>;
  int64_t channel = 0;
  for (; channel + kL <= d.channels; channel += kL)
    WindowGradientStrip<T, kWindow, true>(d, channel, kL);
  if (channel < d.channels)
    WindowGradientStrip<T, kWindow, false>(d, channel, static_cast<int>(d.channels - channel));
}

template <typename T>
void WindowGradient(const WindowGradientArgs<T>& d) {
  if (d.window == 3) return WindowGradientChannels<T, 3>(d);
  if constexpr (kTuning.gradient_window >= 5) return WindowGradientChannels<T, 5>(d);
}

template <typename T, Activation kActivation>
struct ActivateOp {
  static SEPCONV_INLINE Vec<T> Run(Vec<T> x, Vec<T>) { return Activate<T, kActivation>(x); }
};
template <typename T, Activation kActivation>
struct SlopeFromInputOp {
  static SEPCONV_INLINE Vec<T> Run(Vec<T> z, Vec<T> gradient) {
    return gradient * SlopeFromInput<T, kActivation>(z);
  }
};
template <typename T, Activation kActivation>
struct SlopeFromOutputOp {
  static SEPCONV_INLINE Vec<T> Run(Vec<T> y, Vec<T> gradient) {
    return gradient * SlopeFromOutput<T, kActivation>(y);
  }
};

// out[i] = Op(value[i], other[i]) over a run of elements.
template <typename T, typename Op>
void Elementwise(const T* value, const T* other, T* out, int64_t count) {
  constexpr int kL = kLanes<T>;
  int64_t i = 0;
  for (; i + kL <= count; i += kL) Store(out + i, Op::Run(Load(value + i), Load(other + i)));
  if (i < count) {
    const int rest = static_cast<int>(count - i);
    StoreFirst(out + i, rest, Op::Run(LoadFirst(value + i, rest), LoadFirst(other + i, rest)));
  }
}

template <typename T, template <typename, Activation> class Op, size_t... A>
SEPCONV_INLINE auto ElementwiseFor(Activation activation, std::index_sequence<A...>) {
  using Pointer = void (*)(const T*, const T*, T*, int64_t);
  static constexpr Pointer kTable[] = {Elementwise<T, Op<T, static_cast<Activation>(A)>>...};
  return kTable[static_cast<int64_t>(activation)];
}
template <typename T, template <typename, Activation> class Op>
SEPCONV_INLINE auto ElementwiseFor(Activation activation) {
  return ElementwiseFor<T, Op>(activation, std::make_index_sequence<kNumActivations>());
}

template <typename T>
void ActivateRows(Activation activation, T* data, int64_t rows, int64_t columns, int64_t stride) {
  const auto run = ElementwiseFor<T, ActivateOp>(activation);
  for (int64_t r = 0; r < rows; ++r)
    run(data + r * stride, data + r * stride, data + r * stride, columns);
}

template <typename T>
void GradientTimesSlopeFromInput(Activation activation, const T* gradient, const T* z, T* out,
                                 int64_t count) {
  ElementwiseFor<T, SlopeFromInputOp>(activation)(z, gradient, out, count);
}

template <typename T>
void GradientTimesSlopeFromOutput(Activation activation, const T* gradient, const T* y, T* out,
                                  int64_t count) {
  ElementwiseFor<T, SlopeFromOutputOp>(activation)(y, gradient, out, count);
}

// Several rows at once, so that no addition waits for the one before.
template <typename T, int kVectors, bool kWhole>
SEPCONV_INLINE void AddColumnSumsOf(const T* data, int64_t rows, int64_t stride, int count,
                                    T* sums) {
  constexpr int kL = kLanes<T>, kRows = 4;
  Vec<T> sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) sum[i][v] = Vec<T>{};
  }
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        sum[i][v] += LoadLanes<kWhole>(data + (r + i) * stride + v * kL, count);
    }
  }
  for (; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      sum[0][v] += LoadLanes<kWhole>(data + r * stride + v * kL, count);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const Vec<T> total = (sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v]);
    StoreLanes<kWhole>(sums + v * kL, count, LoadLanes<kWhole>(sums + v * kL, count) + total);
  }
}

template <typename T>
void AddColumnSums(const T* data, int64_t rows, int64_t columns, int64_t stride, T* sums) {
  constexpr int kL = kLanes<T>, kV = 2;
  int64_t c = 0;
  for (; c + kV * kL <= columns; c += kV * kL)
    AddColumnSumsOf<T, kV, true>(data + c, rows, stride, kL, sums + c);
  for (; c + kL <= columns; c += kL)
    AddColumnSumsOf<T, 1, true>(data + c, rows, stride, kL, sums + c);
  if (c < columns)
    AddColumnSumsOf<T, 1, false>(data + c, rows, stride, static_cast<int>(columns - c), sums + c);
}

// As many independent multiply-adds as the micro-kernel has, from registers alone: the peak to
// compare with.
template <typename T, bool kPairs>
void FmaChains(int64_t steps, T* result) {
  constexpr int kChains = kTuning.micro_rows[kTuning.micro_vectors - 1] * kTuning.micro_vectors;
  Vec<T> sum[kChains];
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) sum[i] = Set(T(i));
  Vec<T> x = Set(T(0.5)), y = Set(T(1));
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) {
      if constexpr (kPairs) {
        AddDotOfPairs(sum[i], x, y);
      } else {
        sum[i] = sum[i] * x + y;
      }
    }
  }
  Vec<T> total = {};
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) total += sum[i];
  *result = total[0];
}

template <typename T>
constexpr Kernels<T> MakeKernels() {
  return {kLanes<T>,
          kTuning.micro_rows[kTuning.micro_vectors - 1],
          kTuning.micro_vectors * kLanes<T>,
          {kTuning.slide_rows[0], kTuning.slide_rows[1]},
          Gemm<T>,
          Depthwise<T>,
          Slide<T>,
          DepthwiseGradient<T>,
          kTuning.gradient_window,
          WindowGradient<T>,
          ActivateRows<T>,
          GradientTimesSlopeFromInput<T>,
          GradientTimesSlopeFromOutput<T>,
          AddColumnSums<T>,
          FmaChains<T, false>,
          2 * kTuning.micro_rows[kTuning.micro_vectors - 1] * kTuning.micro_vectors * kLanes<T>};
}

constexpr Target MakeTarget(const char* name, bool (*runs_here)(),
                            const PairKernels* pairs = nullptr) {
  return {name,
          runs_here,
          MakeKernels<float>(),
          MakeKernels<double>(),
          MakeCopies<float>(),
          MakeCopies<double>(),
          MakeCopies<BFloat16>(),
          MakeCopies<Float16>(),
          pairs};
}
