// Products of pairs of bfloat16 by tile registers: sixteen rows of A by sixteen columns of B over
// sixteen pairs of depth are one instruction. Included behind kernel-inl.h, in its namespace;
// without SEPCONV_SIMD_AMX the tiles are emulated, for tests.

inline constexpr int kTileRows = 16, kTileBytes = 64;  // at most, of a tile register
inline constexpr int kTilePairs = kTileBytes / static_cast<int>(sizeof(BFloat16Pair));

// Registers: four sums, then two tiles of A and two of B.
inline constexpr int kTileOfA = 4, kTileOfB = 6, kNumTiles = 8;

#if defined(SEPCONV_SIMD_AMX)

// Written as text, because the compiler's own functions for them want the whole file compiled for
// such CPUs. No compiler keeps anything in tile registers by itself.
struct alignas(kTileBytes) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
SEPCONV_INLINE void ConfigureTileRegisters(int rows) {
  TileConfig config = {};
  config.palette = 1;
  for (int tile = 0; tile < kNumTiles; ++tile) {
    config.row_bytes[tile] = kTileBytes;
    config.rows[tile] = static_cast<uint8_t>(tile < kTileOfB ? rows : kTilePairs);
  }
  asm volatile("ldtilecfg %0" : : "m"(config));
}
SEPCONV_INLINE void ReleaseTileRegisters() { asm volatile("tilerelease"); }
template <int kTile>
SEPCONV_INLINE void ZeroTile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
SEPCONV_INLINE void LoadTile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(kTile), "r"(from), "r"(stride) : "memory");
}
template <int kTile>
SEPCONV_INLINE void StoreTile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(kTile), "r"(to), "r"(stride) : "memory");
}
template <int kSum, int kA, int kB>
SEPCONV_INLINE void AddTileProduct() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}

#else

struct TileRegisters {
  int rows[kNumTiles];
  uint32_t lanes[kNumTiles][kTileRows][kTilePairs];
};
inline thread_local TileRegisters tile_registers;

inline void ConfigureTileRegisters(int rows) {
  tile_registers = TileRegisters();
  for (int tile = 0; tile < kNumTiles; ++tile)
    tile_registers.rows[tile] = tile < kTileOfB ? rows : kTilePairs;
}
// Calls without a configuration compute nothing.
inline void ReleaseTileRegisters() { tile_registers = TileRegisters(); }
template <int kTile>
void ZeroTile() {
  std::memset(tile_registers.lanes[kTile], 0, sizeof(tile_registers.lanes[kTile]));
}
template <int kTile>
void LoadTile(const void* from, int64_t stride) {
  for (int r = 0; r < tile_registers.rows[kTile]; ++r)
    std::memcpy(tile_registers.lanes[kTile][r], static_cast<const char*>(from) + r * stride,
                kTileBytes);
}
template <int kTile>
void StoreTile(void* to, int64_t stride) {
  for (int r = 0; r < tile_registers.rows[kTile]; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, tile_registers.lanes[kTile][r], kTileBytes);
}
// The sums of first halves and of second halves, each in order, and then their sum.
template <int kSum, int kA, int kB>
void AddTileProduct() {
  const Bits32 upper = Bits32{} + 0xffff0000u;
  for (int r = 0; r < tile_registers.rows[kSum]; ++r) {
    Vec<float> first = {}, second = {};
    for (int k = 0; k < kTilePairs; ++k) {
      const Bits32 a = Bits32{} + tile_registers.lanes[kA][r][k];
      Bits32 b;
      std::memcpy(&b, tile_registers.lanes[kB][k], sizeof(b));
      first += reinterpret_cast<Vec<float> >(a << 16) * reinterpret_cast<Vec<float> >(b << 16);
      second += reinterpret_cast<Vec<float> >(a & upper) * reinterpret_cast<Vec<float> >(b & upper);
    }
    Vec<float> sum;
    std::memcpy(&sum, tile_registers.lanes[kSum][r], sizeof(sum));
    sum += first + second;
    std::memcpy(tile_registers.lanes[kSum][r], &sum, sizeof(sum));
  }
}

#endif

// Rows are shared out evenly, as many to each tile: 49 are 4 x 13, not 3 x 16 + 1. The sums of the
// rows that are too many are not stored.
struct TileRowCut {
  explicit TileRowCut(int64_t all)
      : tiles((all + kTileRows - 1) / kTileRows), rows((all + tiles - 1) / tiles) {}
  int64_t tiles, rows;
};

inline void ConfigureTiles(int64_t rows) {
  ConfigureTileRegisters(static_cast<int>(TileRowCut(rows).rows));
}

// Rows of finished sums to C.
template <int kRows, int kVectors, typename C>
SEPCONV_INLINE void FinishTileRows(const GemmArgs<BFloat16Pair, C>& g, C* c, const float* sums) {
  Vec<float> sum[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Load(sums + (r * kVectors + v) * kLanes<float>);
  }
  StoreSums(g, c, sum);
}

// Finished sums to rows [row, row + count) of C.
template <int kVectors, typename C>
SEPCONV_INLINE void FinishTiles(const GemmArgs<BFloat16Pair, C>& g, int64_t row, int64_t count,
                                const float* sums) {
  constexpr int64_t kColumns = kVectors * kLanes<float>;
  C* c = g.c + row * g.c_stride;
  int64_t r = 0;
  for (; r + 4 <= count; r += 4)
    FinishTileRows<4, kVectors>(g, c + r * g.c_stride, sums + r * kColumns);
  for (; r < count; ++r) FinishTileRows<1, kVectors>(g, c + r * g.c_stride, sums + r * kColumns);
}

// What is done beside the products, a little at every step of them, because tile registers leave
// the rest of the core idle: the copies and fetches of GemmArgs.
template <typename C, int kVectors>
class BesideTiles {
 public:
  BesideTiles(const GemmArgs<BFloat16Pair, C>& g, int64_t steps)
      : g_(g),
        rows_(g.ahead ? g.ahead_rows : 0),
        rows_at_once_((rows_ + steps - 1) / steps),
        lines_((g.fetch_bytes + kCacheLineBytes - 1) / kCacheLineBytes),
        lines_at_once_((lines_ + steps - 1) / steps) {}

  SEPCONV_INLINE void Step() {
    const int64_t row_end = std::min(rows_, row_ + rows_at_once_);
    for (; row_ < row_end; ++row_) {
      const char* from = g_.ahead + row_ * g_.ahead_stride;
      if (g_.ahead_to) {
        FetchRow(g_, from + kCopyFetchRows * g_.ahead_stride, true);
        CopyRow<BFloat16Pair, kVectors>(g_, from, g_.ahead_to + row_ * g_.b_stride);
      } else {
        FetchRow(g_, from, false);
      }
    }
    const int64_t line_end = std::min(lines_, line_ + lines_at_once_);
    for (; line_ < line_end; ++line_) __builtin_prefetch(g_.fetch + line_ * kCacheLineBytes, 0, 2);
  }

 private:
  const GemmArgs<BFloat16Pair, C>& g_;
  const int64_t rows_, rows_at_once_, lines_, lines_at_once_;
  int64_t row_ = 0, line_ = 0;
};

// The products of kTiles x kVectors sums over `steps` tiles of depth.
template <int kTiles, int kVectors, typename C>
SEPCONV_INLINE void TileProducts(const BFloat16Pair* a, int64_t a_stride, int64_t a_tile,
                                 const BFloat16Pair* b, int64_t b_stride, int64_t steps,
                                 BesideTiles<C, kVectors>& beside) {
  const BFloat16Pair* below = a + a_tile;
  for (int64_t step = 0; step < steps; ++step) {
    LoadTile<kTileOfB>(b, b_stride);
    LoadTile<kTileOfA>(a, a_stride);
    AddTileProduct<0, kTileOfA, kTileOfB>();
    if constexpr (kVectors > 1) {
      LoadTile<kTileOfB + 1>(b + kTilePairs, b_stride);
      AddTileProduct<1, kTileOfA, kTileOfB + 1>();
    }
    if constexpr (kTiles > 1) {
      LoadTile<kTileOfA + 1>(below, a_stride);
      AddTileProduct<2, kTileOfA + 1, kTileOfB>();
      if constexpr (kVectors > 1) AddTileProduct<3, kTileOfA + 1, kTileOfB + 1>();
    }
    a += kTilePairs;
    below += kTilePairs;
    b += kTilePairs * b_stride / static_cast<int64_t>(sizeof(BFloat16Pair));
    beside.Step();
  }
}

// The depth is cut where a block of B would not stay in L1 for all rows; the sums of the blocks
// before lie in memory, for as many rows as are worked on at once.
template <typename C, int kVectors>
void TilePanel(const GemmArgs<BFloat16Pair, C>& g) {
  constexpr int64_t kColumns = kVectors * kLanes<float>;
  constexpr int64_t kGroupTiles = kTileSumRows / kTileRows;
  alignas(kCacheLineBytes) float sums[kTileSumRows * kColumns];
  const TileRowCut cut(g.rows);
  const int64_t steps = g.depth / kTilePairs;
  const int64_t blocks = (steps + kTileBlockSteps - 1) / kTileBlockSteps;
  const int64_t pair = sizeof(BFloat16Pair);
  const int64_t a_stride = g.a_row_stride * pair, b_stride = g.b_stride * pair;
  const int64_t a_tile = cut.rows * g.a_row_stride;
  const int64_t sums_stride = kColumns * static_cast<int64_t>(sizeof(float));
  BesideTiles<C, kVectors> beside(g, (cut.tiles + 1) / 2 * steps);
  for (int64_t group = 0; group < cut.tiles; group += kGroupTiles) {
    const int64_t group_end = std::min(cut.tiles, group + kGroupTiles);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t step = steps * block / blocks, step_end = steps * (block + 1) / blocks;
      const BFloat16Pair* b = g.b + step * kTilePairs * g.b_stride;
      for (int64_t tile = group; tile < group_end; tile += 2) {
        const BFloat16Pair* a = g.a + tile * a_tile + step * kTilePairs;
        float* sum = sums + (tile - group) * cut.rows * kColumns;
        float* sum_below = sum + cut.rows * kColumns;
        const bool two = tile + 1 < group_end;
        if (block == 0) {
          ZeroTile<0>();
          ZeroTile<1>();
          ZeroTile<2>();
          ZeroTile<3>();
        } else {
          LoadTile<0>(sum, sums_stride);
          if (kVectors > 1) LoadTile<1>(sum + kLanes<float>, sums_stride);
          if (two) LoadTile<2>(sum_below, sums_stride);
          if (two && kVectors > 1) LoadTile<3>(sum_below + kLanes<float>, sums_stride);
        }
        if (two) {
          TileProducts<2, kVectors>(a, a_stride, a_tile, b, b_stride, step_end - step, beside);
        } else {
          TileProducts<1, kVectors>(a, a_stride, a_tile, b, b_stride, step_end - step, beside);
        }
        StoreTile<0>(sum, sums_stride);
        if (kVectors > 1) StoreTile<1>(sum + kLanes<float>, sums_stride);
        if (two) StoreTile<2>(sum_below, sums_stride);
        if (two && kVectors > 1) StoreTile<3>(sum_below + kLanes<float>, sums_stride);
        if (block + 1 < blocks) continue;
        const int64_t row = tile * cut.rows;
        FinishTiles<kVectors>(g, row, std::min(g.rows - row, (1 + two) * cut.rows), sum);
      }
    }
  }
}

template <typename C>
void GemmOfTiles(const GemmArgs<BFloat16Pair, C>& g) {
  if (g.rows == 0) return;
  if (g.columns <= kLanes<float>) return TilePanel<C, 1>(g);
  TilePanel<C, 2>(g);
}

// The peak to compare with: products of registers alone.
inline void TileChains(int64_t steps, float* result) {
  ConfigureTileRegisters(kTileRows);
  ZeroTile<0>();
  ZeroTile<1>();
  ZeroTile<2>();
  ZeroTile<3>();
  ZeroTile<kTileOfA>();
  ZeroTile<kTileOfA + 1>();
  ZeroTile<kTileOfB>();
  ZeroTile<kTileOfB + 1>();
  for (int64_t step = 0; step < steps; ++step) {
    AddTileProduct<0, kTileOfA, kTileOfB>();
    AddTileProduct<1, kTileOfA, kTileOfB + 1>();
    AddTileProduct<2, kTileOfA + 1, kTileOfB>();
    AddTileProduct<3, kTileOfA + 1, kTileOfB + 1>();
  }
  alignas(kCacheLineBytes) float sums[kTileRows * kTilePairs];
  StoreTile<0>(sums, kTileBytes);
  *result = sums[0];
  ReleaseTileRegisters();
}

constexpr PairKernels MakeTileKernels() {
  PairKernels kernels = MakePairKernels();
  kernels.row_unit = kTileRows;
  kernels.depth_unit = kTilePairs;
  kernels.backward_pixels = kBackwardTilePixels;
  kernels.configure = ConfigureTiles;
  kernels.release = ReleaseTileRegisters;
  kernels.gemm = GemmOfTiles<float>;
  kernels.gemm_stored = GemmOfTiles<BFloat16>;
  kernels.chains = TileChains;
  kernels.chain_flops = int64_t{4} * 4 * kTileRows * kTilePairs * kTilePairs;
  return kernels;
}
