// The micro-kernels: one text, compiled once per target inside its region and namespace. The
// including file has included simd.h and defined `kTuning`. No checks here: the loops hand over
// whole tiles and tails.

#include "copies-inl.h"
#include "math-inl.h"

template <typename E>
inline constexpr bool kIsPair = std::is_same_v<E, BFloat16Pair>;

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
template <typename E, int kRows, int kVectors, bool kUnitRows, typename T = ComputeType<E>>
SEPCONV_INLINE void MicroStep(Vec<T> (&sum)[kRows][kVectors],
                              const E* const (&base)[kBases<kRows, kUnitRows>], int64_t row_stride,
                              int64_t depth_offset, const E* b) {
  Vec<T> column[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) column[v] = Load(b + v * kLanes<E>);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const E* row = kUnitRows ? base[0] + r : base[kUnitRows ? 0 : r / 3] + (r % 3) * row_stride;
    const Vec<T> x = Set(row[depth_offset]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kIsPair<E>) {
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

template <typename E, int kVectors, typename C>
SEPCONV_INLINE void CopyRow(const GemmArgs<E, C>& g, const char* from, E* to) {
  if constexpr (!kIsPair<E>) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      Store(to + v * kLanes<E>, Load(reinterpret_cast<const E*>(from) + v * kLanes<E>));
  } else {
    const char* below = from + g.ahead_stride / 2;
    LeastWeight least(g.least);
    int v = 0;
    for (; v + 2 <= kVectors; v += 2)
      StorePairs(to + v * kLanes<E>, LoadBits<FullBits16>(from, v / 2),
                 LoadBits<FullBits16>(below, v / 2), least);
    if (v < kVectors)
      StorePairs(to + v * kLanes<E>, LoadBits<Bits16>(from, v), LoadBits<Bits16>(below, v), least);
  }
}

// Fetches a row, which is two cache lines at most. Of pairs, a line each: where rows do not begin
// with a line, the panel before has brought the first.
template <typename E, typename C>
SEPCONV_INLINE void FetchRow(const GemmArgs<E, C>& g, const char* row, bool is_copied) {
  if (!kIsPair<E> || !is_copied) {
    __builtin_prefetch(row, 0, 2);
  } else {
    __builtin_prefetch(row + g.ahead_stride / 2 + g.ahead_row_bytes - 1, 0, 2);
  }
  __builtin_prefetch(row + g.ahead_row_bytes - 1, 0, 2);
}

// The sums of a register tile over the whole depth. A loop for each thing done beside, because
// there are no issue slots to spare.
template <int kRows, int kVectors, bool kUnitRows, Beside kBeside, typename E, typename C,
          typename T = ComputeType<E>>
SEPCONV_INLINE void MicroLoop(const GemmArgs<E, C>& g, const E* a, const char* ahead, E* ahead_to,
                              Vec<T> (&sum)[kRows][kVectors]) {
  const int64_t row_stride = kUnitRows ? 1 : g.a_row_stride;
  const int64_t depth_stride = kUnitRows ? g.a_depth_stride : 1;
  const int64_t b_stride = g.b_stride;
  const E* b = g.b;
  const E* base[kBases<kRows, kUnitRows>];
#pragma GCC unroll 16
  for (int i = 0; i < kBases<kRows, kUnitRows>; ++i) base[i] = a + 3 * i * row_stride;

  int64_t k = 0;
  for (; k + 4 <= g.depth; k += 4) {
    if constexpr (kBeside == Beside::kFetch) {
      FetchRow(g, ahead, false);
      ahead += g.ahead_stride;
    }
    if constexpr (kBeside == Beside::kFetchRows) {
      // As much as the tile itself reads of A in four steps.
      constexpr int kBytes = kRows * 4 * static_cast<int>(sizeof(E));
#pragma GCC unroll 16
      for (int byte = 0; byte < kBytes; byte += static_cast<int>(kCacheLineBytes))
        __builtin_prefetch(ahead + byte, 0, 3);
      ahead += kBytes;
    }
    if constexpr (kBeside == Beside::kCopy) {
      // Far enough ahead for memory, and near enough that rows a power of two apart, which share a
      // few sets of L2, are still there.
      const char* far = ahead + kCopyFetchRows * g.ahead_stride;
      FetchRow(g, far, true);
      CopyRow<E, kVectors>(g, ahead, ahead_to);
      ahead += g.ahead_stride;
      ahead_to += b_stride;
    }
#pragma GCC unroll 4
    for (int step = 0; step < 4; ++step) {
      MicroStep<E, kRows, kVectors, kUnitRows>(sum, base, row_stride,
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
    MicroStep<E, kRows, kVectors, kUnitRows>(sum, base, row_stride, 0, b);
    b += b_stride;
#pragma GCC unroll 16
    for (int i = 0; i < kBases<kRows, kUnitRows>; ++i) base[i] += depth_stride;
  }
}

// All lanes of the last vector exist, or the first `last`. Sums that become bfloat16 are no
// subnormals.
template <bool kWhole, bool kStreams, typename C, int kVectors>
SEPCONV_INLINE void StoreRow(C* to, int last, const Vec<ComputeType<C>> (&value)[kVectors]) {
  constexpr int kL = kLanes<ComputeType<C>>;
  if constexpr (std::is_same_v<C, BFloat16>) {
    int v = 0;
    for (; v + 2 <= kVectors; v += 2) {
      const FullBits16 bits = NarrowNormal(value[v], value[v + 1]);
      if (kStreams) {
        Stream(to + v * kL, bits);
      } else if (kWhole || v + 2 < kVectors) {
        *reinterpret_cast<UnalignedFullBits16*>(to + v * kL) = bits;
      } else {
        StoreBitsFirst(to + v * kL, kL + last, bits);
      }
    }
    if (v < kVectors) {
      const Bits16 bits = NarrowNormal(value[v]);
      if (kWhole) {
        *reinterpret_cast<UnalignedBits16*>(to + v * kL) = bits;
      } else {
        StoreBitsFirst(to + v * kL, last, bits);
      }
    }
  } else {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (kStreams) {
        Stream(to + v * kL, value[v]);
      } else if (kWhole || v + 1 < kVectors) {
        Store(to + v * kL, value[v]);
      } else {
        StoreFirst(to + v * kL, last, value[v]);
      }
    }
  }
}

// The sums of a register tile, with bias and clamp, to C.
template <bool kWhole, bool kStreams, typename E, typename C, int kRows, int kVectors>
SEPCONV_INLINE void FinishRows(const GemmArgs<E, C>& g, C* c, int last,
                               const Vec<ComputeType<E>> (&sum)[kRows][kVectors]) {
  using T = ComputeType<E>;
  constexpr int kL = kLanes<T>;
  Vec<T> bias[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    bias[v] = !g.bias                      ? Vec<T>{}
              : kWhole || v + 1 < kVectors ? Load(g.bias + v * kL)
                                           : LoadFirst(g.bias + v * kL, last);
  }
  const Vec<T> low = Set(g.low), high = Set(g.high);
  const bool clamps = g.low > -std::numeric_limits<T>::infinity();
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    Vec<T> value[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      value[v] = sum[r][v] + bias[v];
      if (clamps) value[v] = AtMost(AtLeast(value[v], low), high);
    }
    StoreRow<kWhole, kStreams, C, kVectors>(c + r * g.c_stride, last, value);
  }
}

// Sums over the whole depth: to C, or added to it.
template <typename E, typename C, int kRows, int kVectors>
SEPCONV_INLINE void StoreSums(const GemmArgs<E, C>& g, C* c,
                              const Vec<ComputeType<E>> (&sum)[kRows][kVectors]) {
  using T = ComputeType<E>;
  constexpr int kL = kLanes<T>;
  const int last = static_cast<int>(g.columns - (kVectors - 1) * kL);  // lanes of the last vector
  if constexpr (std::is_same_v<C, T>) {
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
  }
  if (g.streams) {
    FinishRows<true, true>(g, c, last, sum);
  } else if (last == kL) {
    FinishRows<true, false>(g, c, last, sum);
  } else {
    FinishRows<false, false>(g, c, last, sum);
  }
}

// One register tile. kRows x kVectors accumulators run over the depth and are never spilled.
// kUnitRows: the rows of A are neighbours in memory (A transposed); otherwise the depth is.
template <typename E, typename C, int kRows, int kVectors, bool kUnitRows>
void MicroKernel(const GemmArgs<E, C>& g, const E* a, C* c, const char* ahead, E* ahead_to) {
  using T = ComputeType<E>;
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
  if (!kUnitRows && g.fetches_c) {
    constexpr int64_t kLine = kCacheLineBytes / static_cast<int64_t>(sizeof(C));
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      C* row = c + r * g.c_stride;
      for (int64_t at = 0; at < kVectors * kL - 1; at += kLine) __builtin_prefetch(row + at, 1);
      __builtin_prefetch(row + kVectors * kL - 1, 1);
    }
  }
  if (ahead_to) {
    MicroLoop<kRows, kVectors, kUnitRows, Beside::kCopy>(g, a, ahead, ahead_to, sum);
  } else if (!kUnitRows && ahead && g.fetch_rows) {
    MicroLoop<kRows, kVectors, kUnitRows, Beside::kFetchRows>(g, a, ahead, {}, sum);
  } else if (!kUnitRows && ahead) {
    MicroLoop<kRows, kVectors, kUnitRows, Beside::kFetch>(g, a, ahead, {}, sum);
  } else {
    MicroLoop<kRows, kVectors, kUnitRows, Beside::kNothing>(g, a, {}, {}, sum);
  }

  if constexpr (!kIsPair<E>) {
    if (g.before) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] += Load(g.before + (r * kVectors + v) * kL);
      }
    }
  }
  StoreSums(g, c, sum);
}

template <typename E, typename C>
using MicroKernelPointer = void (*)(const GemmArgs<E, C>&, const E*, C*, const char*, E*);

// Micro-kernels for 1, 2, ... rows.
template <typename E, typename C, int kVectors, bool kUnitRows, size_t... R>
SEPCONV_INLINE MicroKernelPointer<E, C> MicroKernelFor(int64_t rows, std::index_sequence<R...>) {
  static constexpr MicroKernelPointer<E, C> kTable[] = {
      MicroKernel<E, C, R + 1, kVectors, kUnitRows>...};
  return kTable[rows - 1];
}

// A register tile whose depth is cut into blocks. The blocks before the last one are summed up in
// memory, in rows of whole vectors.
template <typename T, int kRows, int kVectors>
void MicroKernelInBlocks(MicroKernelPointer<T, T> kernel, const GemmArgs<T>& g, int64_t block,
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

template <typename E, typename C, int kVectors, bool kUnitRows>
void GemmPanel(const GemmArgs<E, C>& g) {
  // Rows are shared out evenly: 49 rows in tiles of at most 14 are 13 + 12 + 12 + 12, not 14 + 14 +
  // 14 + 7.
  constexpr int kRows = kTuning.micro_rows[kVectors - 1];
  // The weight gradient has short depths, of a chunk of pixels. Products of pairs lose more to
  // bfloat16.
  constexpr bool kBlocks = !kUnitRows && !kIsPair<E>;
  [[maybe_unused]] const int64_t block = SumBlock(g.depth);
  const int64_t tiles = (g.rows + kRows - 1) / kRows;
  const int64_t small = g.rows / tiles, larger = g.rows % tiles;
  constexpr auto kRowCounts = std::make_index_sequence<kRows>();
  const E* a = g.a;
  C* c = g.c;
  const int64_t fetch_lines = (g.fetch_bytes + kCacheLineBytes - 1) / kCacheLineBytes;
  int64_t fetched = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t rows = small + (tile < larger);
    // The first four tiles fetch or copy a quarter of the rows each.
    const bool busy = g.ahead && tile < 4;
    const char* ahead = busy ? g.ahead + tile * (g.depth / 4) * g.ahead_stride : nullptr;
    E* ahead_to = busy && g.ahead_to ? g.ahead_to + tile * (g.depth / 4) * g.b_stride : nullptr;
    if (!kUnitRows && g.fetch_rows)
      ahead = reinterpret_cast<const char*>(a + kFetchTiles * rows * g.a_row_stride);
    const int64_t fetch_end = fetch_lines * (tile + 1) / tiles;
    for (; fetched < fetch_end; ++fetched)
      __builtin_prefetch(g.fetch + fetched * kCacheLineBytes, 0, 2);
    const auto kernel = MicroKernelFor<E, C, kVectors, kUnitRows>(rows, kRowCounts);
    if constexpr (kBlocks) {
      if (block < g.depth) {
        MicroKernelInBlocks<E, kRows, kVectors>(kernel, g, block, a, c, rows, ahead, ahead_to);
      } else {
        kernel(g, a, c, ahead, ahead_to);
      }
    } else {
      kernel(g, a, c, ahead, ahead_to);
    }
    a += rows * g.a_row_stride;
    c += rows * g.c_stride;
  }
  for (int64_t k = std::min<int64_t>(tiles, 4) * (g.depth / 4); g.ahead_to && k < g.depth; ++k)
    CopyRow<E, kVectors>(g, g.ahead + k * g.ahead_stride, g.ahead_to + k * g.b_stride);
}

template <bool kUnitRows, typename E, typename C, size_t... V>
SEPCONV_INLINE void GemmByVectors(const GemmArgs<E, C>& g, std::index_sequence<V...>) {
  static constexpr void (*kTable[])(const GemmArgs<E, C>&) = {GemmPanel<E, C, V + 1, kUnitRows>...};
  kTable[(g.columns - 1) / kLanes<E>](g);
}

template <typename T>
void Gemm(const GemmArgs<T>& g) {
  if (g.rows == 0) return;
  constexpr auto kVectorCounts = std::make_index_sequence<kTuning.micro_vectors>();
  if (g.a_row_stride == 1) {
    GemmByVectors<true>(g, kVectorCounts);
  } else {
    GemmByVectors<false>(g, kVectorCounts);
  }
}
template <typename C>
void GemmOfPairs(const GemmArgs<BFloat16Pair, C>& g) {
  if (g.rows == 0) return;
  GemmByVectors<false>(g, std::make_index_sequence<kTuning.micro_vectors>());
}

// What one call stores: sums as they are, or narrowed and watched.
template <typename U>
struct DepthwiseStore {
  explicit SEPCONV_INLINE DepthwiseStore(LeastLanes*) {}
  template <bool kWhole>
  SEPCONV_INLINE void Store(U* to, int count, Vec<U> sum) {
    StoreLanes<kWhole>(to, count, sum);
  }
  SEPCONV_INLINE void End(LeastLanes*) {}
};
template <>
struct DepthwiseStore<BFloat16> {
  explicit SEPCONV_INLINE DepthwiseStore(LeastLanes* lanes) : least(LoadLeast(*lanes)) {}
  template <bool kWhole>
  SEPCONV_INLINE void Store(BFloat16* to, int, Vec<float> sum) {
    StoreNarrowed(to, sum, least);
  }
  SEPCONV_INLINE void End(LeastLanes* lanes) { StoreLeast(*lanes, least); }
  Bits32 least;
};

// kPixels x kVectors accumulators; every tap loads its weights once for all pixels of the block.
template <int kPixels, int kVectors, bool kWhole, typename X, typename U>
SEPCONV_INLINE void DepthwiseBlock(const DepthwiseArgs<X, U>& d, int64_t pixel, int64_t channel,
                                   int count) {
  using T = ComputeType<X>;
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
    const X* next = d.taps[d.num_taps - 1].source + offset + kPixels * stride;
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) __builtin_prefetch(next + p * stride);
  }
  for (int64_t t = 0; t < d.num_taps; ++t) {
    const T* weight = d.taps[t].weight + channel;
    const X* source = d.taps[t].source + offset;
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
  U* out = d.out + pixel * d.out_stride + channel;
  DepthwiseStore<U> store(d.least);
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      store.template Store<kWhole>(out + p * d.out_stride + v * kL, count, sum[p][v]);
  }
  store.End(d.least);
}

// The same where each row of the window has kWindow neighbouring columns, one pixel apart: a column
// is then loaded once for all pixels of the block that read it.
template <int kPixels, int kVectors, int kWindow, typename X, typename U>
SEPCONV_INLINE void DepthwiseWindowBlock(const DepthwiseArgs<X, U>& d, int64_t pixel,
                                         int64_t channel) {
  using T = ComputeType<X>;
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
  const X* next = d.taps[d.num_taps - 1].source + offset + kPixels * stride;
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) __builtin_prefetch(next + p * stride);
  for (int64_t t = 0; t < d.num_taps; t += kWindow) {
    const X* row = d.taps[t].source + offset;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vec<T> weight[kWindow];
#pragma GCC unroll 8
      for (int j = 0; j < kWindow; ++j) weight[j] = Load(d.taps[t + j].weight + channel + v * kL);
#pragma GCC unroll 16
      for (int column = 0; column < kPixels + kWindow - 1; ++column) {
        const Vec<T> x = LoadStored(row + column * stride + v * kL);
#pragma GCC unroll 8
        for (int j = 0; j < kWindow; ++j) {
          if (column - j >= 0 && column - j < kPixels)
            MultiplyAdd(sum[v][column - j], x, weight[j]);
        }
      }
    }
  }
  U* out = d.out + pixel * d.out_stride + channel;
  DepthwiseStore<U> store(d.least);
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      store.template Store<true>(out + p * d.out_stride + v * kL, kL, sum[v][p]);
  }
  store.End(d.least);
}

// Whether the taps are whole rows of `window` neighbouring columns.
template <typename X, typename U>
SEPCONV_INLINE bool IsWindow(const DepthwiseArgs<X, U>& d, int window) {
  if (d.num_taps == 0 || d.num_taps % window != 0) return false;
  for (int64_t t = 0; t < d.num_taps; ++t) {
    if (t % window != 0 && d.taps[t].source != d.taps[t - 1].source + d.source_stride) return false;
  }
  return true;
}

template <int kPixels, int kWindow, typename X, typename U>
SEPCONV_INLINE void DepthwisePixels(const DepthwiseArgs<X, U>& d, int64_t pixel) {
  constexpr int kL = kLanes<ComputeType<X>>, kV = kTuning.depthwise_vectors;
  int64_t channel = 0;
  if constexpr (kWindow > 0) {
    for (; channel + kV * kL <= d.channels; channel += kV * kL)
      DepthwiseWindowBlock<kPixels, kV, kWindow>(d, pixel, channel);
  }
  for (; channel + kV * kL <= d.channels; channel += kV * kL) {
    DepthwiseBlock<kPixels, kV, true>(d, pixel, channel, kL);
  }
  for (; channel + kL <= d.channels; channel += kL)
    DepthwiseBlock<kPixels, 1, true>(d, pixel, channel, kL);
  if (channel < d.channels) {
    DepthwiseBlock<kPixels, 1, false>(d, pixel, channel, static_cast<int>(d.channels - channel));
  }
}

// Pixels outside, channels inside: every tap then reads its row of memory from front to back, as
// prefetchers like it.
template <typename X, typename U>
void Depthwise(const DepthwiseArgs<X, U>& d) {
  constexpr int kP = kTuning.depthwise_pixels;
  int64_t pixel = 0;
  if (d.pixels >= kP) {
    if (IsWindow(d, 3)) {
      for (; pixel + kP <= d.pixels; pixel += kP) DepthwisePixels<kP, 3>(d, pixel);
    } else if (IsWindow(d, 5)) {
      for (; pixel + kP <= d.pixels; pixel += kP) DepthwisePixels<kP, 5>(d, pixel);
    }
  }
  for (; pixel + kP <= d.pixels; pixel += kP) DepthwisePixels<kP, 0>(d, pixel);
  for (; pixel < d.pixels; ++pixel) DepthwisePixels<1, 0>(d, pixel);
}

// A window that slides along kRows rows of pixels: every column of the source is loaded once, for
// all windows that reach it. A step is kStride columns, the first of which is column m * kStride of
// the window of the pixel that sum[r][m] belongs to; when the window moves on, the sums move to the
// next m, which renames registers and computes nothing. Every pixel is summed up in the same order,
// whatever rows and pixels share the call.
template <int kWindow, int kStride, int kRows, bool kWhole, typename X, typename U>
SEPCONV_INLINE void SlideStrip(const SlideArgs<X, U>& d, int64_t channel, int count) {
  using T = ComputeType<X>;
  constexpr int kSources = (kRows - 1) * kStride + kWindow;
  constexpr int kSums = (kWindow - 1) / kStride + 1;
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
  Vec<T> sum[kRows][kSums];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < kSums; ++m) sum[r][m] = bias;
  }
  const X* source[kSources];
#pragma GCC unroll 16
  for (int i = 0; i < kSources; ++i) source[i] = d.sources[i];
  DepthwiseStore<U> store(d.least);
  // Copies, because for all the compiler knows a store may change the arguments.
  U* const out = d.out;
  const int64_t source_stride = d.source_stride, out_stride = d.out_stride;
  const int64_t out_row_stride = d.out_row_stride, width = d.width;
  const int64_t first_column = d.first_column, steps = d.pixels + kSums - 1;
  int64_t from = first_column * source_stride + channel;
  int64_t to = channel - (kSums - 1) * out_stride;
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 2
    for (int phase = 0; phase < kStride; ++phase) {
      const int64_t column = first_column + step * kStride + phase;
      if (0 <= column && column < width) {
        Vec<T> x[kSources];
#pragma GCC unroll 16
        for (int i = 0; i < kSources; ++i) {
          // Several rows are summed where all sources are.
          const bool met = kRows > 1 || source[i];
          x[i] = met ? LoadLanes<kWhole>(source[i] + from, count) : Vec<T>{};
        }
#pragma GCC unroll 8
        for (int i = 0; i < kWindow; ++i) {
          if (kRows == 1 && !source[i]) continue;
#pragma GCC unroll 8
          for (int m = 0; m < kSums; ++m) {
            if (m * kStride + phase >= kWindow) continue;
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r)
              MultiplyAdd(sum[r][m], x[i + r * kStride], weight[i][m * kStride + phase]);
          }
        }
      }
      if (phase == (kWindow - 1) % kStride && step >= kSums - 1) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
          store.template Store<kWhole>(out + to + r * out_row_stride, count, sum[r][kSums - 1]);
      }
      from += source_stride;
    }
    to += out_stride;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int m = kSums - 1; m > 0; --m) sum[r][m] = sum[r][m - 1];
      sum[r][0] = bias;
    }
  }
  store.End(d.least);
}

template <int kWindow, int kStride, int kRows, typename X, typename U>
void SlideChannels(const SlideArgs<X, U>& d) {
  constexpr int kL = kLanes<ComputeType<X>>;
  int64_t channel = 0;
  for (; channel + kL <= d.channels; channel += kL)
    SlideStrip<kWindow, kStride, kRows, true>(d, channel, kL);
  if (channel < d.channels)
    SlideStrip<kWindow, kStride, kRows, false>(d, channel, static_cast<int>(d.channels - channel));
}

template <int kWindow, int kStride, typename X, typename U, size_t... R>
SEPCONV_INLINE void SlideByRows(const SlideArgs<X, U>& d, std::index_sequence<R...>) {
  static constexpr void (*kTable[])(const SlideArgs<X, U>&) = {
      SlideChannels<kWindow, kStride, R + 1, X, U>...};
  kTable[d.rows - 1](d);
}

template <int kStride, typename X, typename U>
SEPCONV_INLINE void SlideByWindow(const SlideArgs<X, U>& d) {
  constexpr auto kRows = std::make_index_sequence<kTuning.slide_rows[0]>();
  constexpr auto kWideRows = std::make_index_sequence<kTuning.slide_rows[1]>();
  switch (d.window) {
    case 3:
      return SlideByRows<3, kStride>(d, kRows);
    case 5:
      return SlideByRows<5, kStride>(d, kWideRows);
    default:
      return SlideByRows<7, kStride>(d, kWideRows);
  }
}

template <typename X, typename U>
void Slide(const SlideArgs<X, U>& d) {
  if (d.stride == 1) return SlideByWindow<1>(d);
  SlideByWindow<2>(d);
}

template <typename X, typename U = X>
constexpr DepthwiseKernels<X, U> MakeDepthwise() {
  return {Depthwise<X, U>, Slide<X, U>};
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
template <typename X, int kVectors, bool kWhole, typename T = ComputeType<X>>
SEPCONV_INLINE void AddColumnSumsOf(const X* data, int64_t rows, int64_t stride, int count,
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

template <typename X, typename T = ComputeType<X>>
void AddColumnSums(const X* data, int64_t rows, int64_t columns, int64_t stride, T* sums) {
  constexpr int kL = kLanes<T>, kV = 2;
  int64_t c = 0;
  for (; c + kV * kL <= columns; c += kV * kL)
    AddColumnSumsOf<X, kV, true>(data + c, rows, stride, kL, sums + c);
  for (; c + kL <= columns; c += kL)
    AddColumnSumsOf<X, 1, true>(data + c, rows, stride, kL, sums + c);
  if (c < columns)
    AddColumnSumsOf<X, 1, false>(data + c, rows, stride, static_cast<int>(columns - c), sums + c);
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
          kTuning.whole_kilobytes * int64_t{1024},
          Gemm<T>,
          MakeDepthwise<T>(),
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

// Nothing to set up.
inline void ConfigureNothing(int64_t) {}
inline void ReleaseNothing() {}

constexpr PairKernels MakePairKernels() {
  return {
      1,
      1,
      kBackwardPixels,
      ConfigureNothing,
      ReleaseNothing,
      GemmOfPairs<float>,
      GemmOfPairs<BFloat16>,
      MakeDepthwise<BFloat16>(),
      MakeDepthwise<float, BFloat16>(),
      PackPairs,
      WatchRows,
      NarrowRows,
      AddColumnSums<BFloat16>,
      FmaChains<float, true>,
      4 * kTuning.micro_rows[kTuning.micro_vectors - 1] * kTuning.micro_vectors * kLanes<float>};
}

inline bool Always() { return true; }

constexpr Target MakeTarget(const char* name, bool (*runs_here)(),
                            const PairKernels* pairs = nullptr, bool (*pays_here)() = Always) {
  return {name,
          runs_here,
          pays_here,
          MakeKernels<float>(),
          MakeKernels<double>(),
          MakeCopies<float>(),
          MakeCopies<double>(),
          MakeCopies<BFloat16>(),
          MakeCopies<Float16>(),
          pairs};
}
