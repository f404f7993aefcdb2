// Every tile constant of the CPU kernels, with its reason. Nothing else in csrc/ holds a tile
// literal.
#ifndef SEPCONV_TUNING_H_
#define SEPCONV_TUNING_H_

#include <algorithm>
#include <cstdint>

namespace sepconv {

// Shape of the register tiles of one instruction set. A micro-kernel of v vectors of columns keeps
// micro_rows[v - 1] x v accumulators in registers.
inline constexpr int kMaxMicroVectors = 4;
struct TargetTuning {
  int vector_bytes;
  int micro_vectors;                 // widest panel, in vectors (filters)
  int micro_rows[kMaxMicroVectors];  // rows by broadcast (pixels, or depthwise channels in the
                                     // weight gradient)
  int slide_rows[2];  // output rows of a sliding depthwise window of 3, and of a wider one
  int depthwise_pixels;
  int depthwise_vectors;  // depthwise_vectors * vector_bytes = one cache line: neighbouring taps
                          // share lines
  int gradient_taps;
  int gradient_window;  // its square sums, a row of gradients and a column fill the registers
  int whole_kilobytes;  // of depthwise output that stay near beside one weight panel
};

// 32 registers: 14 x 2 = 28 accumulators + 2 columns + 1 broadcast = 31. Per step 16 loads feed 28
// FMAs; two loads and two FMAs start per cycle, so loads stay hidden. 28 independent FMAs cover 4
// cycles of latency x 2 pipes threefold.
// Sliding window of 3: 4 x 3 sums + 9 weights + 6 columns + bias = 28. The 6 loads of a column
// serve 36 FMAs, where a single row needs 3 for 9, and every line of x is fetched from L2 1.5 times
// instead of 3 times. Wider windows keep their weights in L1; a weight loaded serves both rows.
// Cores with AVX-512 have an L2 of 1 MB or more: 640 KB of depthwise output and a panel of 192 KB,
// at 10 x 10 x 1536, in place of five tiles that each read 12 MB of weights save 22 % there.
inline constexpr TargetTuning kAvx512Tuning{64, 2, {14, 14, 0, 0}, {4, 2}, 8, 1, 9, 5, 640};

// 16 registers: 6 x 2 = 12 accumulators + 2 columns + 1 broadcast leave one for the compiler; 4 x 3
// would need all 16, and spills. Per step 8 loads feed 12 FMAs, two of each a cycle. 12 >= 8 FMAs
// in flight (4 cycles x 2 pipes).
inline constexpr TargetTuning kAvx2Tuning{32, 2, {12, 6, 0, 0}, {2, 2}, 4, 2, 5, 3, 416};

// 32 registers of 4 floats: 6 x 4 = 24 accumulators + 4 columns + 1 broadcast = 29.
inline constexpr TargetTuning kNeonTuning{16, 4, {14, 12, 8, 6}, {4, 2}, 4, 4, 4, 5, 416};

// SSE2 class: 16 registers of 4 floats, no FMA: 8 accumulators leave room for products.
inline constexpr TargetTuning kPortableTuning{16, 2, {8, 4, 0, 0}, {2, 2}, 2, 2, 4, 3, 416};

// Tile registers: two tiles of A by two of B, so that four loads of 8 cycles feed four products of
// 16. What L2 gives, half a load, is not enough for both, so a block of B stays in L1: 12 steps of
// 2 KB are half of it (3 to 5 % from a depth of 500 on). The sums of so many rows wait for the next
// block.
inline constexpr int64_t kTileBlockSteps = 12;
inline constexpr int64_t kTileSumRows = 256;

// Longest chain of additions in a sum over channels or filters. The error of a chain grows with its
// length, and frameworks cut theirs at 200 to 500: one chain of 2048 had three times the error of
// torch's, and this keeps it below twice. A cut costs about one hundred cycles of the 10,000 that
// such a chain takes.
inline constexpr int64_t kSumDepth = 768;

// Bytes of cache a forward tile may fill: of the L2 of the smallest server core in use today (512
// KB), some more than half goes to the depthwise tile plus one weight panel; the rest is for x, y
// and the next panel. Twice as much is slower where L2 has 1 MB, too: x and y pass through it.
inline constexpr int64_t kForwardTileBytes = 320 * 1024;

// Narrow pointwise stages use the depthwise tile only once or twice. It comes from L2 as fast as
// from L1 then, so the tile need not be larger than it takes to slide over several rows at once.
inline constexpr int64_t kForwardNarrowTileBytes = 96 * 1024;

// A tile has at least so many rows of register tiles, also where its depth outgrows the bytes
// above: all weights are read for every tile (98 in place of 14 pixels save 6 to 11 % at 2048
// channels).
inline constexpr int64_t kForwardRegisterTiles = 7;

// Upper bound on pixels of a forward tile that is not made of whole rows: beyond it the weights are
// read seldom enough (128 / pixels bytes per cycle and core).
inline constexpr int64_t kForwardMaxPixels = 256;

// Tiles per thread from which on a tile of whole rows more or less for one of them is not noticed.
inline constexpr int64_t kManyTiles = 6;

// Input larger than this does not lie in L2, and the rows of the next tile are fetched during the
// arithmetic of this one (17 % at 147 x 147 x 64; where they are in L2 already it costs 2 %).
inline constexpr int64_t kFetchInputBytes = 2 * 1024 * 1024;

// Packed weights larger than this have left L2 when the next tile comes, and every panel is fetched
// while the one before computes (6 % at 19 x 19 x 728).
inline constexpr int64_t kFetchWeightBytes = 1024 * 1024;

inline constexpr int64_t kCacheLineBytes = 64;

// Output larger than this goes to memory past the caches, which then need not read what is
// overwritten (5 to 19 % in batches of 8 to 32). A layer that reads it next finds no less of it: x
// and y together have left an L3 of 32 MB by then, and up to 6 MB makes no difference.
// Rows that share lines, as those of 728 floats do, stay in the caches, and the lines are fetched
// while the sums run (5 to 13 % at 37 x 37 x 256 with 728 filters, batch 32, on a Xeon with AMX).
inline constexpr int64_t kStreamOutputBytes = 8 * 1024 * 1024;

// Row tiles between the fetch of a row of dy from memory and its use: a tile takes a quarter of a
// microsecond at 128 filters, memory a tenth.
inline constexpr int64_t kFetchTiles = 2;

// Where the depthwise output of all pixels fits the target's `whole_kilobytes` beside one weight
// panel, and the weights take more than this, every panel is packed just before its only use,
// while the rows of the one before are computed: the weights are then read once, where packing them
// all first would write and read them once more.
inline constexpr int64_t kForwardWholeWeightBytes = 256 * 1024;

// Rows between the fetch of a row of weights and its copy: at a row every four steps of the depth,
// 24 cycles on AVX2, time enough for memory (350 cycles).
inline constexpr int64_t kCopyFetchRows = 24;

// Up to this many pixels the pointwise weights are read in place: packing them would cost as much
// as using them.
inline constexpr int64_t kUnpackedPixels = 12;

// Backward chunk of pixels: each chunk loads and stores the weight gradient once (24 memory
// operations per 12 * pixels FMAs on AVX2), so at least ~100; more would push the dy tile (pixels *
// filters) out of L2.
inline constexpr int64_t kBackwardPixels = 112;

// The same with tile registers, which are done with 112 pixels in four steps: the sums of the
// weight gradient would take longer than the products (5 to 8 % at 14 x 14, 7 x 7, 33 x 33 x 256
// and 28 x 28, nothing elsewhere).
inline constexpr int64_t kBackwardTilePixels = 224;

// Input larger than this has left L2 since the forward pass, as has the memory of dx. What a chunk
// is going to read and write then comes during its arithmetic: 4 to 8 % at 64 x 64 x 64 and 112 x
// 112 x 32 in batches of 8. Where it is in L2 already, that costs 3 %.
inline constexpr int64_t kBackwardFetchBytes = 2 * 1024 * 1024;

// A sliding window computes several rows at once, and a chunk becomes as many, up to so many bytes
// of D, dD and dy: the L2 of the larger cores. Four rows instead of one save 15 % at 64 x 64 x 64
// and 7 % at 147 x 147 x 64; less than the L2 of small cores (512 KB) costs 5 % at 74 x 74 x 256.
inline constexpr int64_t kBackwardChunkBytes = 1024 * 1024;

// Most depthwise channels of a backward slice: the unit of parallel work without any reduction. The
// slice of the weight gradient (channels * filters) must stay in L2 while the pixels stream by;
// every slice reads dy again. From 64 to 192 there is little to choose (3 %), 128 being the best.
inline constexpr int64_t kBackwardChannels = 128;

// The weight gradient reads dy in place where a pixel takes at most this much: 112 pixels of two
// cache lines each then still find a place in L1, whose sets repeat every 4096 bytes.
inline constexpr int64_t kUnpackedPixelBytes = 256;

// Where several slices read dy * slope, or dy in another layout or type, it is computed once, up to
// so many bytes. Computed by every slice it takes 6 to 10 % at 4 to 8 slices.
inline constexpr int64_t kSharedGradientBytes = 64 * 1024 * 1024;

// Slices start at multiples of a cache line of floats.
inline constexpr int64_t kSliceUnit = 16;

// Where it can be had, the number of tasks is a multiple of this: two and four threads then have
// equal shares. Slices made narrower for it keep so many channels: from 64 to 32, one thread is 3
// to 7 % slower.
inline constexpr int64_t kTaskGroup = 4;
inline constexpr int64_t kSliceMinChannels = 48;

// Backward tasks aimed at. It must depend on nothing but the shape: partial sums are cut here, so
// the number of tasks is part of the numerical result, and the result must not depend on the
// machine or its threads. Every slab of an image costs its partial sums, written, read and added,
// and the rows of dD that are kept for its neighbours: 16 instead of 8 cost 4 % at 147 x 147.
inline constexpr int64_t kBackwardTasks = 8;

// A backward slab has at least this many output pixels, or its partial weight gradients cost more
// than they bring.
inline constexpr int64_t kBackwardSlabPixels = 1024;

// Partial weight gradients of all slabs together take at most this.
inline constexpr int64_t kBackwardPartialBytes = 64 * 1024 * 1024;

// Elements of one parallel piece of the final sum over slabs: some tens of kilobytes.
inline constexpr int64_t kReductionBlock = 8192;

// Pixels of y, or rows of the pointwise kernel, copied at once: 16 floats are a cache line.
inline constexpr int64_t kTransposeBlock = 16;

// A transposing copy reads this much of one line of memory before it turns to the next ones: four
// cache lines, or prefetchers see no direction (18 % of a forward pass at 147 x 147); not more, so
// that what it writes meanwhile stays in L1.
inline constexpr int64_t kTransposeRunBytes = 256;

// Input rows staged for one strip of channels (transposed, widened, activated or repeated) stay
// inside L2.
inline constexpr int64_t kStagedRowsBytes = 128 * 1024;

// Extra elements at the end of a tile row: a row length that is a multiple of 4096 bytes would put
// the same column of all rows into one cache set.
inline constexpr int64_t kTileRowPadBytes = 64;

// Of pairs of bfloat16, sixteen rows at a multiple of this share eight of the 64 sets of L1 or
// fewer. Others need no extra elements: without them a row of 64 channels is two cache lines, not
// three (19 x 19 x 728 takes 11 % less, 33 x 33 x 256 10 %).
inline constexpr int64_t kPairRowBytes = 512;
// A row of dy is copied only where they share four (in place 14 x 14 x 512 takes 5 % more).
inline constexpr int64_t kPairRowLimit = 1024;

// Below this many multiply-adds waking a second thread costs more than it saves (a few
// microseconds).
inline constexpr int64_t kMinMacsPerThread = 250 * 1000;

}  // namespace sepconv

#endif  // SEPCONV_TUNING_H_
