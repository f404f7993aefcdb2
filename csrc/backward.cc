// The four gradients in one pass, the depthwise output recomputed tile by tile:
//   dz = dy * slope,  dD = dz Kp^T,  dKp = D^T dz,  dbias = sum dz,  dx = taps of dD,  dKd = sum x
//   dD.
//
// Work is cut into slices of depthwise channels, which are independent in D, dD, dx, dKd and the
// rows of dKp, and, where the slices are few, into slabs of images or rows with partial sums of
// their own, added in a fixed order. Both cuts follow from the shape alone, so every number of
// threads gives the same bits. dx is gathered, never scattered; its rows between two slabs of rows
// come last, from the rows of dD that the slabs have kept.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "float_mode.h"
#include "forward.h"
#include "tiles.h"

namespace sepconv {
namespace {

// Where a task adds up its weight gradients: the caller's arrays, or partial sums of one slab.
template <typename T>
struct WeightSums {
  T* depthwise_kernel;
  T* pointwise_kernel;
  T* depthwise_bias;
  T* bias;
};

template <typename S>
class BackwardLoop {
 public:
  using T = ComputeType<S>;

  // `may_pair`: to multiply pairs of bfloat16 at once, where the target can.
  BackwardLoop(const Geometry& g, const BackwardArgs& args, bool may_pair)
      : p_(g, args.x, args.depthwise_bias),
        weights_(p_, args.depthwise_kernel, args.depthwise_bias, args.bias),
        args_(args),
        dy_(static_cast<const S*>(args.dy)),
        y_(static_cast<const S*>(args.y)),
        pointwise_(static_cast<const S*>(args.pointwise_kernel)),
        dx_(static_cast<S*>(args.dx)),
        threads_(ThreadsFor(3 * p_.macs())) {
    // Does the slope follow from what we were given, must the output be recomputed first, or is
    // there no slope?
    recompute_slope_ =
        p_.activation() != Activation::kLinear && !(y_ && SlopeFollowsFromOutput(p_.activation()));
    // dy serves as dz in place if it has the layout and the type.
    dz_in_place_ =
        std::is_same_v<S, T> && !g.channels_first() && p_.activation() == Activation::kLinear;
    dz_stride_ = dz_in_place_       ? p_.filters
                 : recompute_slope_ ? RoundUp(p_.filters, p_.kernels.lanes)
                                    : p_.TileStride(p_.filters);
    // Packed, a panel is a few pages that all row tiles share; in place, pixels of many filters are
    // pages apart. The micro-kernel reads whole vectors.
    packs_dz_ = dz_stride_ * static_cast<int64_t>(sizeof(T)) > kUnpackedPixelBytes ||
                p_.filters % p_.kernels.lanes != 0;
    dx_in_place_ = p_.rows_in_place;
    windows_ = p_.slides_by_one && g.kernel_width <= p_.kernels.gradient_window;
    // dz must be exact in bfloat16, and the pairs of a row of the pointwise kernel whole.
    const bool exact = p_.activation() == Activation::kLinear ||
                       (!recompute_slope_ && (p_.activation() == Activation::kRelu ||
                                              p_.activation() == Activation::kRelu6));
    if (std::is_same_v<S, BFloat16> && may_pair && exact && p_.filters % 2 == 0)
      pairs_ = p_.target.pairs;
    if (pairs_) PlanPairGradient();
    PlanSlices();
    // Several slices read dz: computed once, if it is not too large.
    shares_dz_ = !dz_in_place_ && !pair_dz_in_place_ && !recompute_slope_ && slices_ > 1 &&
                 p_.pixels * dz_stride_ * static_cast<int64_t>(sizeof(T)) <= kSharedGradientBytes;
    PlanSlabs();
    PlanRows();
    PlanColumns();
    // Where it is out of L2, in one piece, and fits L2 beside the chunk.
    const int64_t element = sizeof(T), row_bytes = g.in_width * g.in_channels * element;
    fetches_input_ =
        slices_ == 1 && p_.rows_in_place && images_at_once_ == 1 &&
        g.batch * g.in_height * row_bytes > kBackwardFetchBytes &&
        chunk_rows_ * (ChunkRowBytes() + 2 * g.stride_height * row_bytes) <= kBackwardChunkBytes;
  }

  Plan plan() const {
    return {{"threads", threads_},
            {"channel_slices", slices_},
            {"slice_channels", slice_channels_},
            {"slabs", slabs_},
            {"bands_per_image", bands_},
            {"chunk_images", images_at_once_},
            {"chunk_rows", chunk_rows_},
            {"chunk_pixels", chunk_pixels_},
            {"output_recomputed", recompute_slope_},
            {"output_gradient_in_place", dz_in_place_ || pair_dz_in_place_},
            {"input_in_place", p_.rows_in_place},
            {"dot_of_pairs", pairs_ != nullptr}};
  }

  bool uses_pairs() const { return pairs_ != nullptr; }

  int64_t ScratchBytes() const { return Layout(*this).Bytes(threads_); }

  // False if the pairs have lost what floats keep, and the call must run again without them. That
  // depends on the numbers alone, not on the threads.
  bool Run(char* memory) {
    const Geometry& g = p_.g;
    const int64_t taps = g.kernel_height * g.kernel_width;
    const Layout layout(*this);
    T* packed = reinterpret_cast<T*>(memory + layout.packed_at);
    dz_ = reinterpret_cast<T*>(memory + layout.dz_at);
    pair_dz_ = reinterpret_cast<BFloat16*>(memory + layout.dz_at);
    edges_ = reinterpret_cast<T*>(memory + layout.edges_at);
    const auto scratch_of = [&](int64_t worker) {
      return ScratchOf(layout, layout.MemoryOf(worker, memory));
    };
    for (int64_t worker = 0; pairs_ && worker < threads_; ++worker) {
      *scratch_of(worker).least = LeastLanes();
      *scratch_of(worker).least_dz = LeastLanes();
    }
    if (shares_dz_) {
      ParallelFor(
          CeilDiv(p_.pixels, kBackwardPixels), threads_, [&](int64_t block, int64_t worker) {
            const int64_t begin = block * kBackwardPixels;
            const int64_t count = std::min(p_.pixels - begin, kBackwardPixels);
            const Scratch scratch = scratch_of(worker);
            if (pairs_) {
              ComputePairGradient(begin, count, pair_dz_ + begin * pair_dz_stride_, scratch);
            } else {
              ComputeOutputGradient(begin, count, dz_ + begin * dz_stride_, scratch.y_rows);
            }
          });
    }
    if (recompute_slope_) {
      const ForwardArgs forward = {
          args_.x, args_.depthwise_kernel, args_.pointwise_kernel, args_.depthwise_bias, args_.bias,
          nullptr};
      RunForward<S>(g, forward, {dy_, dz_, dz_stride_});
    }
    if (needs_depthwise_gradient() && !packs_in_time()) {
      ParallelFor(slices_, threads_, [&](int64_t slice, int64_t worker) {
        PackSlice(slice, packed + slice * packed_slice_elements_, scratch_of(worker));
      });
    }

    std::vector<WeightSums<T>> sums(slabs_);
    for (int64_t slab = 0; slab < slabs_; ++slab) {
      T* to = reinterpret_cast<T*>(memory + layout.partials_at) + slab * layout.partial;
      sums[slab] = {args_.d_depthwise_kernel ? to : nullptr,
                    args_.d_pointwise_kernel ? to + taps * p_.depth : nullptr,
                    args_.d_depthwise_bias ? to + (taps + p_.filters) * p_.depth : nullptr,
                    args_.d_bias ? to + (taps + p_.filters + 1) * p_.depth : nullptr};
      if constexpr (std::is_same_v<S, T>) {
        if (sums_in_place()) {
          sums[slab] = {static_cast<T*>(args_.d_depthwise_kernel),
                        static_cast<T*>(args_.d_pointwise_kernel),
                        static_cast<T*>(args_.d_depthwise_bias), static_cast<T*>(args_.d_bias)};
        }
      }
    }
    ParallelFor(slices_ * slabs_, threads_, [&](int64_t task, int64_t worker) {
      const Scratch scratch = scratch_of(worker);
      const int64_t slice = task % slices_, slab = task / slices_;
      T* packed_slice =
          packs_in_time() ? scratch.packed_slice : packed + slice * packed_slice_elements_;
      if (needs_depthwise_gradient() && packs_in_time()) PackSlice(slice, packed_slice, scratch);
      RunTask(slice, slab, packed_slice, sums[slab], scratch);
    });
    ParallelFor(cuts() * slices_, threads_, [&](int64_t task, int64_t worker) {
      RunEdge(task / slices_, task % slices_, scratch_of(worker));
    });
    if (!sums_in_place()) {
      AddSlabs(args_.d_depthwise_kernel, taps * p_.depth, sums, &WeightSums<T>::depthwise_kernel);
      AddSlabs(args_.d_pointwise_kernel, p_.depth * p_.filters, sums,
               &WeightSums<T>::pointwise_kernel);
      AddSlabs(args_.d_depthwise_bias, p_.depth, sums, &WeightSums<T>::depthwise_bias);
      AddSlabs(args_.d_bias, p_.filters, sums, &WeightSums<T>::bias);
    }
    if (!pairs_) return true;
    LeastOperands least, least_dz;
    for (int64_t worker = 0; worker < threads_; ++worker) {
      least.Add(*scratch_of(worker).least);
      least_dz.Add(*scratch_of(worker).least_dz);
    }
    least.value = std::min(least_dz.value, least_dz.weight);
    return !least.MayFlush();
  }

 private:
  // A slice that one task alone reads is packed by that task, and stays in its cache.
  bool packs_in_time() const { return slabs_ == 1; }
  bool sums_in_place() const { return std::is_same_v<S, T> && slabs_ == 1; }
  // Between bands, over each of which rows of dx read dD.
  int64_t cuts() const { return dx_ && edge_rows_ > 0 ? p_.g.batch * (bands_ - 1) : 0; }
  // Depth of the products of pairs: of dz and the kernel, and of D and dz.
  int64_t FilterPairs() const { return pairs_->Depth(p_.filters); }
  int64_t PixelPairs(int64_t pixels) const { return pairs_->Depth(pixels); }

  // Where things are in the scratch memory.
  struct Layout : CallLayout {
    explicit Layout(const BackwardLoop& loop) {
      const Problem<S>& p = loop.p_;
      const Geometry& g = p.g;
      const bool pairs = loop.pairs_ != nullptr;
      const int64_t taps = g.kernel_height * g.kernel_width, stride = loop.slice_stride_;
      const int64_t pixels = loop.chunk_pixels_, columns = p.kernels.columns;
      packed_at = shared.Add(loop.packs_in_time() ? 0 : loop.slices_ * loop.packed_slice_elements_,
                             sizeof(T));
      // Products of pairs may read rows behind the last one.
      dz_at = pairs ? shared.Add(loop.shares_dz_
                                     ? (p.pixels + loop.pairs_->row_unit) * loop.pair_dz_stride_
                                     : 0,
                                 sizeof(BFloat16))
                    : shared.Add(
                          loop.recompute_slope_ || loop.shares_dz_ ? p.pixels * loop.dz_stride_ : 0,
                          sizeof(T));
      partial = loop.sums_in_place() ? 0 : p.depth * (taps + p.filters + 1) + p.filters;
      partials_at = shared.Add(loop.slabs_ * partial, sizeof(T));
      edges_at = shared.Add(loop.cuts() * loop.slices_ * 2 * loop.edge_rows_ * g.out_width * stride,
                            sizeof(T));
      packed_slice_at = own.Add(loop.packs_in_time() ? loop.packed_slice_elements_ : 0, sizeof(T));
      ring_at = own.Add(loop.ring_pixels_ * stride, sizeof(T));
      tile_at = own.Add(pixels * stride, sizeof(T));
      const bool own_dz = !loop.dz_in_place_ && !loop.recompute_slope_ && !loop.shares_dz_;
      dz_tile_at = own.Add(own_dz && !pairs ? pixels * loop.dz_stride_ : 0, sizeof(T));
      dz_panels_at = own.Add(2 * (pairs ? loop.PixelPairs(pixels) : pixels) * columns, sizeof(T));
      y_rows_at = own.Add(loop.dz_in_place_ || loop.recompute_slope_
                              ? 0
                              : (1 + pairs) * kTransposeBlock * loop.dz_stride_,
                          sizeof(T));
      staged_at = own.Add(
          InputRows<S>::StagedElements(p, g.in_width, loop.slice_channels_, loop.staged_rows_),
          sizeof(T));
      staged_row_at = own.Add(loop.staged_rows_, sizeof(int64_t));
      dx_rows_at =
          own.Add(loop.dx_in_place_ ? 0 : (p.slide_rows + 1) * g.in_width * stride, sizeof(T));
      sources_at = own.Add(loop.chunk_rows_ + g.kernel_height, sizeof(T*));
      rows_at = own.Add(g.kernel_height, sizeof(SourceRow<T>));
      taps_at = own.Add(taps, sizeof(Tap<T>));
      if (!pairs) return;
      const int64_t units = loop.pairs_->row_unit, depth = loop.PixelPairs(pixels);
      pair_dz_tile_at =
          own.Add(own_dz ? (pixels + units) * loop.pair_dz_stride_ : 0, sizeof(BFloat16));
      narrow_tile_at = own.Add(pixels * stride, sizeof(BFloat16));
      tile_pairs_at = own.Add(depth * stride, sizeof(BFloat16Pair));
      columns_at =
          own.Add(RoundUp(stride, units) * loop.column_stride(depth), sizeof(BFloat16Pair));
      least_at = own.Add(2, sizeof(LeastLanes));
    }
    int64_t packed_at, dz_at, partial, partials_at, edges_at, packed_slice_at, ring_at, tile_at,
        dz_tile_at, dz_panels_at, y_rows_at, staged_at, staged_row_at, dx_rows_at, sources_at,
        rows_at, taps_at;
    int64_t pair_dz_tile_at = 0, narrow_tile_at = 0, tile_pairs_at = 0, columns_at = 0,
            least_at = 0;
  };
  // Row length of `columns`, in pairs.
  int64_t column_stride(int64_t depth) const { return p_.PairTileStride(2 * depth) / 2; }

  struct Scratch {
    T* packed_slice;
    T* ring;       // [pixel][slice channel]: dD of the rows that dx still needs
    T* tile;       // [pixel][slice channel]: D of the chunk
    T* dz_tile;    // [pixel][filter]
    T* dz_panels;  // [pixel][panel column] each: the one in use, and the next
    T* y_rows;     // [pixel of a block][filter], and with pairs as many of dz before it is narrowed
    T* staged;
    int64_t* staged_row;
    T* dx_rows;  // rows of [column][slice channel], and one of x
    const T** sources;
    SourceRow<T>* rows;
    Tap<T>* taps;
    // Where products of pairs are added up:
    BFloat16* pair_dz_tile;    // dz_tile
    BFloat16* narrow_tile;     // [pixel][slice channel]: D
    BFloat16Pair* tile_pairs;  // [pair of pixels][slice channel]
    BFloat16Pair* columns;     // [slice channel][pair of pixels]
    LeastLanes* least;         // as weights: the pointwise kernel and D
    LeastLanes* least_dz;      // the other factor of both
  };

  Scratch ScratchOf(const Layout& layout, char* mine) const {
    auto* least = reinterpret_cast<LeastLanes*>(mine + layout.least_at);
    return {reinterpret_cast<T*>(mine + layout.packed_slice_at),
            reinterpret_cast<T*>(mine + layout.ring_at),
            reinterpret_cast<T*>(mine + layout.tile_at),
            reinterpret_cast<T*>(mine + layout.dz_tile_at),
            reinterpret_cast<T*>(mine + layout.dz_panels_at),
            reinterpret_cast<T*>(mine + layout.y_rows_at),
            reinterpret_cast<T*>(mine + layout.staged_at),
            reinterpret_cast<int64_t*>(mine + layout.staged_row_at),
            reinterpret_cast<T*>(mine + layout.dx_rows_at),
            reinterpret_cast<const T**>(mine + layout.sources_at),
            reinterpret_cast<SourceRow<T>*>(mine + layout.rows_at),
            reinterpret_cast<Tap<T>*>(mine + layout.taps_at),
            reinterpret_cast<BFloat16*>(mine + layout.pair_dz_tile_at),
            reinterpret_cast<BFloat16*>(mine + layout.narrow_tile_at),
            reinterpret_cast<BFloat16Pair*>(mine + layout.tile_pairs_at),
            reinterpret_cast<BFloat16Pair*>(mine + layout.columns_at),
            least,
            least + 1};
  }

  // A run of images, or a band of rows of one image: what a task goes through in one sweep.
  struct Sweep {
    int64_t image, images, band;
    int64_t out_begin, out_end;
    int64_t in_begin, in_end;  // rows of dx that its dD rows complete
  };

  // A run of memory.
  struct Stretch {
    const char* data;
    int64_t bytes;
    // The first of `count` equal shares of it, which is then gone.
    Stretch Take(int64_t count) {
      const Stretch share = {data,
                             std::min(bytes, RoundUp(CeilDiv(bytes, count), kCacheLineBytes))};
      data += share.bytes;
      bytes -= share.bytes;
      return share;
    }
  };

  struct Channels {
    int64_t begin, end;
  };

  // Rows of dD, several behind each other: output row `first_row` + i stands in row i % num_rows.
  struct GradientRows {
    const T* data;
    int64_t first_row, num_rows;
  };

  bool needs_depthwise_gradient() const {
    return dx_ || args_.d_depthwise_kernel || args_.d_depthwise_bias;
  }

  // dy serves as dz if its rows are whole, and no multiple of a length that puts sixteen of them
  // into a few sets of L1.
  void PlanPairGradient() {
    pair_dz_in_place_ = !p_.g.channels_first() && p_.activation() == Activation::kLinear &&
                        p_.filters == 2 * FilterPairs() &&
                        p_.filters * static_cast<int64_t>(sizeof(BFloat16)) % kPairRowLimit != 0;
    pair_dz_stride_ = pair_dz_in_place_ ? p_.filters : p_.PairTileStride(p_.filters);
  }

  void PlanSlices() {
    // A channel's multiples stay together, so that dx of a channel is summed by one task.
    slice_unit_ = p_.g.depth_multiplier * CeilDiv(kSliceUnit, p_.g.depth_multiplier);
    units_ = CeilDiv(p_.depth, slice_unit_);
    int64_t wanted = CeilDiv(p_.depth, kBackwardChannels);
    // Slices alone must keep the threads busy: as many as every usual number of threads divides.
    if (p_.depth >= kTaskGroup * kSliceMinChannels && p_.pixels < 2 * kBackwardSlabPixels)
      wanted = RoundUp(wanted, kTaskGroup);
    slices_ = std::min(wanted, units_);
    slice_channels_ = std::min(p_.depth, CeilDiv(units_, slices_) * slice_unit_);
    slice_stride_ = p_.TileStride(slice_channels_);
    packed_slice_elements_ =
        needs_depthwise_gradient()
            ? RoundUp(slice_channels_, p_.kernels.lanes) * (pairs_ ? FilterPairs() : p_.filters)
            : 0;
  }

  // Slices of nearly equal numbers of whole units: 728 channels are 80 + 96 + 96 + 96 + 80 + 96 +
  // 96 + 88, not 7 x 96 + 56, of which one of two threads would get 10 % more than the other.
  int64_t SliceBegin(int64_t slice) const {
    return std::min(p_.depth, units_ * slice / slices_ * slice_unit_);
  }

  void PlanSlabs() {
    const Geometry& g = p_.g;
    const int64_t partial_bytes = p_.depth * p_.filters * static_cast<int64_t>(sizeof(T));
    int64_t slabs = std::min({CeilDiv(kBackwardTasks, slices_), p_.pixels / kBackwardSlabPixels,
                              kBackwardPartialBytes / partial_bytes});
    // As many tasks as every usual number of threads divides.
    slabs = slabs <= 1 ? 1 : RoundUp(slabs, CeilDiv(kTaskGroup, slices_));
    bands_ = 1;
    if (slabs > g.batch) {
      // Bands at least four times as high as the rows that a neighbour needs.
      edge_rows_ = CeilDiv(p_.row_reach() - 1, g.stride_height);
      bands_ = std::max<int64_t>(1, std::min(CeilDiv(slabs, g.batch),
                                             g.out_height / std::max<int64_t>(1, 4 * edge_rows_)));
    }
    slabs_ = std::min(slabs, g.batch * bands_);
  }

  // D, dD, those rows of dD that dx still needs, and dy.
  int64_t ChunkRowBytes() const {
    return p_.g.out_width * static_cast<int64_t>(sizeof(T)) * (3 * slice_stride_ + p_.filters);
  }

  void PlanRows() {
    const Geometry& g = p_.g;
    images_at_once_ = 1;
    const int64_t pixels = pairs_ ? pairs_->backward_pixels : kBackwardPixels;
    chunk_rows_ = std::max<int64_t>(1, pixels / g.out_width);
    // Where a window slides, by preference whole groups of rows.
    for (int64_t group = p_.slide_rows; group > 1; group /= 2) {
      if (RoundUp(chunk_rows_, group) * ChunkRowBytes() > kBackwardChunkBytes) continue;
      chunk_rows_ = RoundUp(chunk_rows_, group);
      break;
    }
    chunk_rows_ = std::min(chunk_rows_, g.out_height);
    if (bands_ == 1 && chunk_rows_ == g.out_height) {
      images_at_once_ = std::clamp<int64_t>(pixels / p_.image_pixels, 1, CeilDiv(g.batch, slabs_));
    }
    // A row of dx reads dD rows at most this far apart; chunks are written behind them, and never
    // wrap inside.
    const int64_t live = (g.kernel_height - 1) * g.dilation_height / g.stride_height + 2;
    ring_rows_ =
        std::min(RoundUp(live + chunk_rows_, chunk_rows_), RoundUp(g.out_height, chunk_rows_));
    // What D has staged, dKd finds again.
    staged_rows_ = images_at_once_ * InputRows<S>::NumSlots(p_, chunk_rows_);
    chunk_pixels_ = images_at_once_ * chunk_rows_ * g.out_width;
    ring_pixels_ = images_at_once_ * ring_rows_ * g.out_width;
  }

  void PlanColumns() {
    // Column iw of dx reads dD column (iw + pad - j * dilation) / stride where that is whole: one
    // plan per phase of iw.
    const Geometry& g = p_.g;
    const int64_t phases = std::min(g.stride_width, g.in_width);
    for (int64_t phase = 0; phase < phases; ++phase) {
      std::vector<ColumnTap> taps;
      for (int64_t j = 0; j < g.kernel_width; ++j) {
        const int64_t shifted = phase + g.pad_left - j * g.dilation_width;
        if (shifted % g.stride_width != 0) continue;
        const int64_t first = shifted / g.stride_width;
        taps.push_back({j, first, -first, g.out_width - first});
      }
      gather_.emplace_back(CeilDiv(g.in_width - phase, g.stride_width), 1, taps);
    }
  }

  // Rows [slice channels] of the transposed pointwise kernel as panels [filter][panel column], or
  // [pair of filters][panel column].
  void PackSlice(int64_t slice, T* packed, const Scratch& scratch) const {
    const int64_t q_begin = SliceBegin(slice), q_end = SliceBegin(slice + 1);
    const Panels panels(q_end - q_begin, p_.kernels);
    if constexpr (std::is_same_v<S, BFloat16>) {
      if (pairs_) {
        const S* rows = pointwise_ + q_begin * p_.filters;
        pairs_->watch(rows, p_.filters, q_end - q_begin, p_.filters, scratch.least);
        for (int64_t i = 0; i < panels.count(); ++i) {
          const int64_t width = panels.width(i);
          BFloat16Pair* to =
              reinterpret_cast<BFloat16Pair*>(packed) + panels.begin(i) * FilterPairs();
          // Neighbours in memory are a pair.
          TransposePairs(reinterpret_cast<const BFloat16Pair*>(rows + panels.begin(i) * p_.filters),
                         p_.filters / 2, p_.filters / 2, panels.columns(i), width, to, width);
          std::fill(to + p_.filters / 2 * width, to + FilterPairs() * width, BFloat16Pair{});
        }
        return;
      }
    }
    for (int64_t i = 0; i < panels.count(); ++i) {
      p_.copies.load_transposed(pointwise_ + (q_begin + panels.begin(i)) * p_.filters, p_.filters,
                                p_.filters, panels.columns(i), panels.width(i),
                                packed + panels.begin(i) * p_.filters, panels.width(i));
    }
  }

  // to[r * to_stride + c] = from[c * stride + r] for c < count, and zero for count <= c < width.
  void TransposePairs(const BFloat16Pair* from, int64_t stride, int64_t rows, int64_t count,
                      int64_t width, BFloat16Pair* to, int64_t to_stride) const {
    p_.target.copies_f32.load_transposed(reinterpret_cast<const float*>(from), stride, rows, count,
                                         width, reinterpret_cast<float*>(to), to_stride);
  }

  void RunTask(int64_t slice, int64_t slab, const T* packed, const WeightSums<T>& sums,
               const Scratch& scratch) const {
    const Geometry& g = p_.g;
    Task task{slice,
              SliceBegin(slice),
              SliceBegin(slice + 1),
              slice == 0,
              true,
              packed,
              sums,
              scratch,
              InputRows<S>(p_, scratch.staged, scratch.staged_row, staged_rows_)};
    const int64_t channels = task.q_end - task.q_begin;
    task.input.SetStrip(task.q_begin, task.q_end, 0, g.in_width);
    task.input.Forget();
    for (int64_t tap = 0; sums.depthwise_kernel && tap < g.kernel_height * g.kernel_width; ++tap) {
      std::fill_n(sums.depthwise_kernel + tap * p_.depth + task.q_begin, channels, T(0));
    }
    if (sums.depthwise_bias) std::fill_n(sums.depthwise_bias + task.q_begin, channels, T(0));
    if (sums.bias && task.first_slice) std::fill_n(sums.bias, p_.filters, T(0));

    const int64_t end = g.batch * bands_ * (slab + 1) / slabs_;
    for (int64_t unit = g.batch * bands_ * slab / slabs_; unit < end; unit += images_at_once_) {
      const int64_t band = unit % bands_;
      RunSweep(task, {unit / bands_, std::min(images_at_once_, end - unit), band, FirstOutRow(band),
                      FirstOutRow(band + 1), FirstInRow(band), EndInRow(band)});
    }
  }

  struct Task {
    int64_t slice, q_begin, q_end;
    bool first_slice;  // it also adds up the bias
    bool first_chunk;  // of this task: nothing to add to yet
    const T* packed;   // its rows of the pointwise kernel, transposed
    WeightSums<T> sums;
    const Scratch& scratch;
    InputRows<S> input;
  };

  int64_t FirstOutRow(int64_t band) const { return p_.g.out_height * band / bands_; }
  // Rows [FirstInRow(band), EndInRow(band)) of dx are read by rows of this band alone. Those
  // between EndInRow(band) and FirstInRow(band + 1) are read by both bands' rows, none of them more
  // than edge_rows_ from the cut.
  int64_t FirstInRow(int64_t band) const {
    if (band == 0) return 0;
    const int64_t row =
        (FirstOutRow(band) - 1) * p_.g.stride_height + p_.row_reach() - p_.g.pad_top;
    return std::clamp(row, EndInRow(band - 1), p_.g.in_height);
  }
  int64_t EndInRow(int64_t band) const {
    if (band + 1 == bands_) return p_.g.in_height;
    return std::clamp<int64_t>(FirstOutRow(band + 1) * p_.g.stride_height - p_.g.pad_top, 0,
                               p_.g.in_height);
  }
  // Where the rows of dD around the cut between bands `band` and band + 1 of an image are kept.
  T* EdgeRows(int64_t image, int64_t band, int64_t slice) const {
    return edges_ + ((image * (bands_ - 1) + band) * slices_ + slice) * 2 * edge_rows_ *
                        p_.g.out_width * slice_stride_;
  }

  // The last output row that can read input row `row`.
  int64_t LastReader(int64_t row) const {
    return std::min((row + p_.g.pad_top) / p_.g.stride_height, p_.g.out_height - 1);
  }

  // Rows of x that output row `row` reads.
  int64_t FirstRead(int64_t row) const {
    return std::clamp<int64_t>(row * p_.g.stride_height - p_.g.pad_top, 0, p_.g.in_height);
  }
  int64_t EndRead(int64_t row) const {
    return std::clamp<int64_t>(row * p_.g.stride_height - p_.g.pad_top + p_.row_reach(), 0,
                               p_.g.in_height);
  }

  // Rows [row_begin, row_end) of an array like x, or nothing where they need no fetch: in L2
  // already, or in pieces.
  Stretch InputStretch(const S* data, int64_t image, int64_t row_begin, int64_t row_end) const {
    const Geometry& g = p_.g;
    if (!fetches_input_ || !data || row_begin >= row_end) return {nullptr, 0};
    const int64_t row = g.in_width * g.in_channels;
    return {reinterpret_cast<const char*>(data + (image * g.in_height + row_begin) * row),
            (row_end - row_begin) * row * static_cast<int64_t>(sizeof(S))};
  }

  void RunSweep(Task& task, const Sweep& sweep) const {
    const int64_t begin = sweep.out_begin, end = sweep.out_end;
    int64_t next_in_row = sweep.in_begin;
    for (int64_t row = begin; row < end; row += chunk_rows_) {
      const int64_t row_end = std::min(row + chunk_rows_, end);
      const int64_t in_begin = next_in_row;
      while (dx_ && next_in_row < sweep.in_end &&
             (row_end == end || LastReader(next_in_row) < row_end))
        ++next_in_row;
      RunChunk(task, sweep, row, row_end, (row - begin) % ring_rows_,
               InputStretch(p_.x, sweep.image, row == begin ? FirstRead(row) : EndRead(row - 1),
                            EndRead(row_end - 1)),
               InputStretch(dx_, sweep.image, in_begin, next_in_row));
      if (!dx_) continue;
      for (int64_t image = 0; image < sweep.images; ++image) {
        // Several images at once stand whole, one behind the other; one image runs through the
        // ring.
        const T* ring = task.scratch.ring + image * chunk_rows_ * p_.g.out_width * slice_stride_;
        GatherInputRows({task.q_begin, task.q_end}, sweep.image + image, in_begin, next_in_row,
                        {ring, begin, ring_rows_}, task.scratch);
      }
    }
  }

  // Rows of dx that the bands on both sides of a cut complete together.
  void RunEdge(int64_t cut, int64_t slice, const Scratch& scratch) const {
    const int64_t image = cut / (bands_ - 1), band = cut % (bands_ - 1);
    const GradientRows rows = {EdgeRows(image, band, slice), FirstOutRow(band + 1) - edge_rows_,
                               2 * edge_rows_};
    GatherInputRows({SliceBegin(slice), SliceBegin(slice + 1)}, image, EndInRow(band),
                    FirstInRow(band + 1), rows, scratch);
  }

  // Keeps those of rows [row, row_end) of dD of one image that a neighbouring band needs.
  void KeepEdges(const Task& task, const Sweep& sweep, int64_t row, int64_t row_end,
                 const T* d_depthwise) const {
    const int64_t elements = p_.g.out_width * slice_stride_;
    const auto keep = [&](int64_t band, int64_t first, int64_t begin, int64_t end) {
      begin = std::max(begin, row), end = std::min(end, row_end);
      if (begin >= end) return;
      std::copy_n(d_depthwise + (begin - row) * elements, (end - begin) * elements,
                  EdgeRows(sweep.image, band, task.slice) + (begin - first) * elements);
    };
    if (sweep.band > 0)
      keep(sweep.band - 1, sweep.out_begin - edge_rows_, sweep.out_begin,
           sweep.out_begin + edge_rows_);
    if (sweep.band + 1 < bands_)
      keep(sweep.band, sweep.out_end - edge_rows_, sweep.out_end - edge_rows_, sweep.out_end);
  }

  // Output rows [row, row_end) of the sweep's images. `slot` is the ring row of the first of them.
  // `x` is what the chunk is the first to read, `dx` what will be written after it: both come from
  // memory while the products of matrices are computed.
  void RunChunk(Task& task, const Sweep& sweep, int64_t row, int64_t row_end, int64_t slot,
                Stretch x, Stretch dx) const {
    const Geometry& g = p_.g;
    const Scratch& scratch = task.scratch;
    const int64_t width = g.out_width, channels = task.q_end - task.q_begin;
    const int64_t pixel = (sweep.image * g.out_height + row) * width;
    const int64_t pixels = sweep.images * (row_end - row) * width;

    const T* dz = nullptr;
    const BFloat16* pair_dz = nullptr;
    if (pairs_) {
      pair_dz = PairGradientOf(task, pixel, pixels);
    } else {
      dz = OutputGradientOf(pixel, pixels, scratch);
    }
    T* d_depthwise = scratch.ring + slot * width * slice_stride_;
    if (needs_depthwise_gradient()) {
      if (pairs_) {
        DepthwiseOutputGradient(task, reinterpret_cast<const BFloat16Pair*>(pair_dz), pixels,
                                d_depthwise, x);
      } else {
        DepthwiseOutputGradient(task, dz, pixels, d_depthwise, x);
      }
    }
    const bool slope = p_.depthwise_activation() != Activation::kLinear;
    const bool needs_depthwise = slope || task.sums.pointwise_kernel;
    // The depthwise stage itself writes what the pairs are made of.
    const bool narrows = pairs_ && !slope;
    for (int64_t image = 0; needs_depthwise && image < sweep.images; ++image) {
      const int64_t first = image * (row_end - row) * width * slice_stride_;
      if constexpr (std::is_same_v<S, BFloat16>) {
        if (narrows) {
          DepthwiseOutput(task, pairs_->depthwise_staged, sweep.image + image, row, row_end,
                          scratch.narrow_tile + first);
          continue;
        }
      }
      DepthwiseOutput(task, p_.kernels.depthwise, sweep.image + image, row, row_end,
                      scratch.tile + first);
    }
    if (slope) {
      for (int64_t p = 0; needs_depthwise_gradient() && p < pixels; ++p) {
        T* gradient = d_depthwise + p * slice_stride_;
        p_.kernels.slope_from_input(p_.depthwise_activation(), gradient,
                                    scratch.tile + p * slice_stride_, gradient, channels);
      }
      p_.kernels.activate(p_.depthwise_activation(), scratch.tile, pixels, channels, slice_stride_);
    }
    if (needs_depthwise_gradient())
      RoundToStorage<S>(p_, d_depthwise, pixels, channels, slice_stride_);
    if (bands_ > 1 && dx_) KeepEdges(task, sweep, row, row_end, d_depthwise);

    if (task.sums.depthwise_bias) {
      p_.kernels.add_column_sums(d_depthwise, pixels, channels, slice_stride_,
                                 task.sums.depthwise_bias + task.q_begin);
    }
    if (task.sums.depthwise_kernel) {
      const int64_t rows_at_once = p_.g.dilation_height > 1 ? 1 : row_end - row;
      for (int64_t image = 0; image < sweep.images; ++image) {
        const T* gradient = d_depthwise + image * (row_end - row) * width * slice_stride_;
        for (int64_t r = row; windows_ && r < row_end; r += rows_at_once) {
          AddWindowGradient(task, sweep.image + image, r, rows_at_once,
                            gradient + (r - row) * width * slice_stride_);
        }
        for (int64_t r = row; !windows_ && r < row_end; ++r) {
          AddDepthwiseKernelGradient(task, sweep.image + image, r,
                                     gradient + (r - row) * width * slice_stride_);
        }
      }
    }
    if (task.sums.pointwise_kernel) {
      if (pairs_) {
        if (slope)
          pairs_->narrow(reinterpret_cast<const float*>(scratch.tile), slice_stride_, pixels,
                         channels, scratch.narrow_tile, slice_stride_, scratch.least);
        AddPairsToPointwise(task, pair_dz, pixels, dx);
      } else {
        AddToPointwise(task, dz, pixels, dx);
      }
    }
    if (task.sums.bias && task.first_slice && pairs_) AddToBias(task, pair_dz, pixels);
    if (task.sums.bias && task.first_slice && !pairs_ && !task.sums.pointwise_kernel) {
      p_.kernels.add_column_sums(dz, pixels, p_.filters, dz_stride_, task.sums.bias);
    }
    task.first_chunk = false;
  }

  // dD of `pixels` pixels: dz times the transposed pointwise kernel. The elements are numbers or
  // pairs of them.
  template <typename E>
  void DepthwiseOutputGradient(const Task& task, const E* dz, int64_t pixels, T* d_depthwise,
                               Stretch x) const {
    constexpr bool kPairs = std::is_same_v<E, BFloat16Pair>;
    const int64_t depth = kPairs ? FilterPairs() : p_.filters;
    const Panels panels(task.q_end - task.q_begin, p_.kernels);
    if (kPairs) pairs_->configure(pixels);
    for (int64_t i = 0; i < panels.count(); ++i) {
      const int64_t q = panels.begin(i);
      GemmArgs<E, T> gemm{pixels,
                          depth,
                          panels.columns(i),
                          dz,
                          kPairs ? pair_dz_stride_ / 2 : dz_stride_,
                          1,
                          reinterpret_cast<const E*>(task.packed) + q * depth,
                          panels.width(i),
                          d_depthwise + q,
                          slice_stride_,
                          nullptr,
                          -std::numeric_limits<ComputeType<E>>::infinity(),
                          std::numeric_limits<ComputeType<E>>::infinity(),
                          false};
      gemm.fetch_rows = !kPairs && i == 0 && (dz_in_place_ || shares_dz_);
      const Stretch share = x.Take(panels.count() - i);
      gemm.fetch = share.data;
      gemm.fetch_bytes = share.bytes;
      if constexpr (!kPairs) {
        p_.kernels.gemm(gemm);
      } else if constexpr (std::is_same_v<T, float>) {
        pairs_->gemm(gemm);
      }
    }
    if (kPairs) pairs_->release();
  }

  // Rows [row, row_end) of D, before its activation.
  template <typename U>
  void DepthwiseOutput(Task& task, const DepthwiseKernels<T, U>& kernels, int64_t image,
                       int64_t row, int64_t row_end, U* out) const {
    const DepthwiseStage<S, T, U> stage{
        p_,           kernels,    task.input,    task.scratch.rows, task.scratch.taps,
        task.q_begin, task.q_end, slice_stride_, task.scratch.least};
    DepthwiseRows(stage, image, row, row_end, out);
  }

  // The rest of a product that is added to panel `i` of the slice's rows of dKp, and fetches its
  // share of dx.
  template <typename E, typename C = ComputeType<E>>
  void AddToPanel(const Task& task, const Panels& panels, int64_t i, Stretch& dx,
                  GemmArgs<E>& gemm) const {
    gemm.rows = task.q_end - task.q_begin;
    gemm.columns = panels.columns(i);
    gemm.c = reinterpret_cast<C*>(task.sums.pointwise_kernel) + task.q_begin * p_.filters +
             panels.begin(i);
    gemm.c_stride = p_.filters;
    gemm.low = -std::numeric_limits<C>::infinity();
    gemm.high = std::numeric_limits<C>::infinity();
    gemm.accumulate = !task.first_chunk;
    const Stretch share = dx.Take(panels.count() - i);
    gemm.fetch = share.data;
    gemm.fetch_bytes = share.bytes;
  }

  // dKp += D^T dz, and the bias, whose columns are at hand.
  void AddToPointwise(Task& task, const T* dz, int64_t pixels, Stretch dx) const {
    const Scratch& scratch = task.scratch;
    const int64_t channels = task.q_end - task.q_begin;
    RoundToStorage<S>(p_, scratch.tile, pixels, channels, slice_stride_);
    const Panels panels(p_.filters, p_.kernels);
    bool copied = false;
    for (int64_t i = 0; i < panels.count(); ++i) {
      const int64_t f = panels.begin(i);
      const T* panel = dz + f;
      int64_t panel_stride = dz_stride_;
      GemmArgs<T> gemm{};
      if (packs_dz_) {
        T* copy = scratch.dz_panels + i % 2 * chunk_pixels_ * p_.kernels.columns;
        panel_stride = panels.width(i);
        if (!copied) {
          CopiesOf<T>(p_.target).load(panel, dz_stride_, pixels, panels.columns(i), panel_stride,
                                      copy, panel_stride);
        }
        panel = copy;
        // A panel as wide as this one is copied by the micro-kernel.
        copied = i + 1 < panels.count() && panels.columns(i + 1) == panel_stride;
        if (copied) {
          gemm.ahead = reinterpret_cast<const char*>(dz + panels.begin(i + 1));
          gemm.ahead_stride = dz_stride_ * static_cast<int64_t>(sizeof(T));
          gemm.ahead_row_bytes = panel_stride * static_cast<int64_t>(sizeof(T));
          gemm.ahead_to = scratch.dz_panels + (i + 1) % 2 * chunk_pixels_ * p_.kernels.columns;
        }
      }
      gemm.depth = pixels;
      gemm.a = scratch.tile;
      gemm.a_row_stride = 1;
      gemm.a_depth_stride = slice_stride_;
      gemm.b = panel;
      gemm.b_stride = panel_stride;
      AddToPanel(task, panels, i, dx, gemm);
      p_.kernels.gemm(gemm);
      if (task.sums.bias && task.first_slice) {
        p_.kernels.add_column_sums(panel, pixels, panels.columns(i), panel_stride,
                                   task.sums.bias + f);
      }
    }
  }

  // dKp += D^T dz, pairs of pixels at once.
  void AddPairsToPointwise(Task& task, const BFloat16* dz, int64_t pixels, Stretch dx) const {
    const Scratch& scratch = task.scratch;
    const int64_t channels = task.q_end - task.q_begin, depth = PixelPairs(pixels);
    const int64_t pixel_pairs = CeilDiv(pixels, 2), stride = column_stride(depth);
    pairs_->pack(scratch.narrow_tile, slice_stride_, pixels, channels,
                 RoundUp(channels, p_.kernels.lanes), scratch.tile_pairs, scratch.least);
    TransposePairs(scratch.tile_pairs, RoundUp(channels, p_.kernels.lanes), channels, pixel_pairs,
                   depth, scratch.columns, stride);
    const Panels panels(p_.filters, p_.kernels);
    bool packed = false;
    pairs_->configure(channels);
    for (int64_t i = 0; i < panels.count(); ++i) {
      const int64_t f = panels.begin(i), width = panels.width(i);
      const auto memory_of = [&](int64_t panel) {
        return reinterpret_cast<BFloat16Pair*>(scratch.dz_panels) +
               panel % 2 * PixelPairs(chunk_pixels_) * p_.kernels.columns;
      };
      BFloat16Pair* panel = memory_of(i);
      if (!packed)
        pairs_->pack(dz + f, pair_dz_stride_, pixels, panels.columns(i), width, panel,
                     scratch.least_dz);
      std::fill(panel + pixel_pairs * width, panel + depth * width, BFloat16Pair{});
      GemmArgs<BFloat16Pair, float> gemm{};
      // A panel as wide as this one is packed by the micro-kernel.
      packed = i + 1 < panels.count() && panels.columns(i + 1) == width && pixels % 2 == 0;
      if (packed) {
        gemm.ahead = reinterpret_cast<const char*>(dz + panels.begin(i + 1));
        gemm.ahead_rows = pixel_pairs;
        gemm.ahead_stride = 2 * pair_dz_stride_ * static_cast<int64_t>(sizeof(BFloat16));
        gemm.ahead_row_bytes = width * static_cast<int64_t>(sizeof(BFloat16));
        gemm.ahead_to = memory_of(i + 1);
        gemm.least = scratch.least_dz;
      }
      gemm.depth = depth;
      gemm.a = scratch.columns;
      gemm.a_row_stride = stride;
      gemm.a_depth_stride = 1;
      gemm.b = panel;
      gemm.b_stride = width;
      AddToPanel(task, panels, i, dx, gemm);
      pairs_->gemm(gemm);
    }
    pairs_->release();
  }

  // db += sums of the columns of dz.
  void AddToBias(Task& task, const BFloat16* dz, int64_t pixels) const {
    pairs_->add_column_sums(dz, pixels, p_.filters, pair_dz_stride_,
                            reinterpret_cast<float*>(task.sums.bias));
  }

  // dz of pixels [pixel, pixel + pixels), rows dz_stride_ apart.
  const T* OutputGradientOf(int64_t pixel, int64_t pixels, const Scratch& scratch) const {
    if constexpr (std::is_same_v<S, T>) {
      if (dz_in_place_) return dy_ + pixel * p_.filters;
    }
    if (recompute_slope_ || shares_dz_) return dz_ + pixel * dz_stride_;
    ComputeOutputGradient(pixel, pixels, scratch.dz_tile, scratch.y_rows);
    return scratch.dz_tile;
  }

  // dy * slope of pixels [pixel, pixel + pixels), from dy and y.
  void ComputeOutputGradient(int64_t pixel, int64_t pixels, T* to, T* y_rows) const {
    // In blocks, so that the block of y stays in L1.
    for (int64_t block = 0; block < pixels; block += kTransposeBlock) {
      const int64_t count = std::min(pixels - block, kTransposeBlock);
      T* rows = to + block * dz_stride_;
      LoadPixels(p_, dy_, p_.filters, p_.image_pixels, pixel + block, pixel + block + count, 0,
                 p_.filters, rows, dz_stride_);
      if (p_.activation() == Activation::kLinear) continue;
      LoadPixels(p_, y_, p_.filters, p_.image_pixels, pixel + block, pixel + block + count, 0,
                 p_.filters, y_rows, dz_stride_);
      for (int64_t r = 0; r < count; ++r) {
        p_.kernels.slope_from_output(p_.activation(), rows + r * dz_stride_,
                                     y_rows + r * dz_stride_, rows + r * dz_stride_, p_.filters);
      }
    }
  }

  // The same in bfloat16, rows pair_dz_stride_ apart.
  const BFloat16* PairGradientOf(const Task& task, int64_t pixel, int64_t pixels) const {
    const Scratch& scratch = task.scratch;
    if (shares_dz_) return pair_dz_ + pixel * pair_dz_stride_;
    if constexpr (std::is_same_v<S, BFloat16>) {
      if (pair_dz_in_place_) {
        const BFloat16* dy = dy_ + pixel * p_.filters;
        // What is packed is watched then.
        if (!task.sums.pointwise_kernel)
          pairs_->watch(dy, p_.filters, pixels, p_.filters, scratch.least_dz);
        // Products of pairs may read rows behind the last one.
        if (pixel + RoundUp(pixels, pairs_->row_unit) <= p_.pixels) return dy;
        std::copy_n(dy, pixels * p_.filters, scratch.pair_dz_tile);
        return scratch.pair_dz_tile;
      }
    }
    ComputePairGradient(pixel, pixels, scratch.pair_dz_tile, scratch);
    return scratch.pair_dz_tile;
  }
  void ComputePairGradient(int64_t pixel, int64_t pixels, BFloat16* to,
                           const Scratch& scratch) const {
    T* rows = scratch.y_rows + kTransposeBlock * dz_stride_;
    for (int64_t block = 0; block < pixels; block += kTransposeBlock) {
      const int64_t count = std::min(pixels - block, kTransposeBlock);
      BFloat16* narrow = to + block * pair_dz_stride_;
      ComputeOutputGradient(pixel + block, count, rows, scratch.y_rows);
      pairs_->narrow(reinterpret_cast<const float*>(rows), dz_stride_, count, p_.filters, narrow,
                     pair_dz_stride_, scratch.least_dz);
      FillDepth(*pairs_, p_.kernels.lanes, p_.filters, count, narrow, pair_dz_stride_);
    }
  }

  // Output rows [out_row, out_row + rows), where windows_; with dilation, one.
  void AddWindowGradient(Task& task, int64_t image, int64_t out_row, int64_t rows,
                         const T* gradient) const {
    const Geometry& g = p_.g;
    const T** sources = task.scratch.sources;
    const int64_t num_sources = rows + g.kernel_height - 1;
    const int64_t step = g.dilation_width, stride = task.input.column_stride();
    for (int64_t phase = 0; phase < std::min(step, g.out_width); ++phase) {
      const int64_t column = phase - g.pad_left;
      const int64_t first = FloorDiv(column, step), shift = column - first * step;
      for (int64_t i = 0; i < num_sources; ++i) {
        const T* row = task.input.RowOrNull(image, out_row - g.pad_top + i * g.dilation_height);
        sources[i] = row ? row + shift * stride : nullptr;
      }
      p_.kernels.window_gradient(
          {g.kernel_width, rows, CeilDiv(g.out_width - phase, step), task.q_end - task.q_begin,
           sources, step * stride, first, CeilDiv(g.in_width - shift, step),
           gradient + phase * slice_stride_, step * slice_stride_, g.out_width * slice_stride_,
           task.sums.depthwise_kernel + task.q_begin, p_.depth});
    }
  }

  void AddDepthwiseKernelGradient(Task& task, int64_t image, int64_t out_row,
                                  const T* gradient) const {
    const Scratch& scratch = task.scratch;
    const int64_t num_rows = task.input.Rows(image, out_row, scratch.rows);
    const int64_t column_stride = task.input.column_stride();
    ForEachSegment<T>(
        p_.columns, 0, p_.g.out_width, scratch.rows, num_rows, column_stride, p_.g.kernel_width,
        p_.depth, nullptr, task.sums.depthwise_kernel + task.q_begin, scratch.taps,
        [&](int64_t first, int64_t count, const Tap<T>* taps, int64_t num_taps) {
          p_.kernels.depthwise_gradient({taps, num_taps, count, task.q_end - task.q_begin,
                                         p_.columns.step() * column_stride,
                                         gradient + first * slice_stride_, slice_stride_});
        });
  }

  // Rows [row_begin, row_end) of dx, whose readers are all among `gradient`.
  void GatherInputRows(const Channels& q, int64_t image, int64_t row_begin, int64_t row_end,
                       const GradientRows& gradient, const Scratch& scratch) const {
    const Geometry& g = p_.g;
    for (int64_t row = row_begin; row < row_end;) {
      // Several at once only where every row that they read exists.
      const int64_t top = row + g.pad_top - (g.kernel_height - 1);
      const int64_t count =
          p_.slides_by_one && top >= 0
              ? std::clamp<int64_t>(
                    std::min(row_end - row, g.out_height - (g.kernel_height - 1) - top), 1,
                    p_.slide_rows)
              : 1;
      T* out = scratch.dx_rows;
      int64_t out_stride = slice_stride_;
      if constexpr (std::is_same_v<S, T>) {
        if (dx_in_place_) {
          out = dx_ + (image * g.in_height + row) * g.in_width * g.in_channels + q.begin;
          out_stride = g.in_channels;
        }
      }
      if (p_.slides_by_one) {
        SlideOverGradient(q, row, count, gradient, out, out_stride);
      } else {
        GatherInputRow(q, row, gradient, scratch, out, out_stride);
      }
      for (int64_t i = 0; !dx_in_place_ && i < count; ++i) {
        StoreInputRow(q, image, row + i, scratch.dx_rows + i * g.in_width * slice_stride_,
                      scratch.dx_rows + p_.slide_rows * g.in_width * slice_stride_);
      }
      row += count;
    }
  }

  // The row of dD that output row `row` left behind; null where there is none.
  const T* RowOf(const GradientRows& gradient, int64_t row) const {
    if (row < 0 || row >= p_.g.out_height) return nullptr;
    return gradient.data +
           (row - gradient.first_row) % gradient.num_rows * p_.g.out_width * slice_stride_;
  }

  // `count` rows of dx from `row` on: a window slides over dD as it does over x in the forward
  // pass, with the taps in the opposite order.
  void SlideOverGradient(const Channels& q, int64_t row, int64_t count,
                         const GradientRows& gradient, T* out, int64_t out_stride) const {
    const Geometry& g = p_.g;
    const T* sources[kMaxSlideSources];
    const int64_t num_sources = g.kernel_height + count - 1;
    for (int64_t i = 0; i < num_sources; ++i) {
      sources[i] = RowOf(gradient, row + g.pad_top - (g.kernel_height - 1 - i) * g.dilation_height);
    }
    const int64_t last_tap = g.kernel_height * g.kernel_width - 1;
    const int64_t step = g.dilation_width;
    for (int64_t phase = 0; phase < std::min(step, g.in_width); ++phase) {
      const int64_t column = phase + g.pad_left - (g.kernel_width - 1) * step;
      const int64_t first = FloorDiv(column, step), shift = column - first * step;
      const T* shifted[kMaxSlideSources];
      for (int64_t i = 0; i < num_sources; ++i)
        shifted[i] = sources[i] ? sources[i] + shift * slice_stride_ : nullptr;
      p_.kernels.depthwise.slide(
          {g.kernel_width, 1, count, CeilDiv(g.in_width - phase, step), q.end - q.begin, shifted,
           step * slice_stride_, first, CeilDiv(g.out_width - shift, step),
           p_.depthwise_kernel + last_tap * p_.depth + q.begin, -p_.depth, nullptr,
           out + phase * out_stride, step * out_stride, g.in_width * out_stride});
    }
  }

  // Row `in_row` of dx where no window slides.
  void GatherInputRow(const Channels& q, int64_t in_row, const GradientRows& gradient,
                      const Scratch& scratch, T* out, int64_t out_stride) const {
    const Geometry& g = p_.g;
    int64_t num_rows = 0;
    for (int64_t i = 0; i < g.kernel_height; ++i) {
      const int64_t shifted = in_row + g.pad_top - i * g.dilation_height;
      if (shifted < 0 || shifted % g.stride_height != 0) continue;
      if (const T* data = RowOf(gradient, shifted / g.stride_height))
        scratch.rows[num_rows++] = {i, data};
    }
    for (size_t phase = 0; phase < gather_.size(); ++phase) {
      const int64_t num_columns = CeilDiv(g.in_width - static_cast<int64_t>(phase), g.stride_width);
      ForEachSegment<T>(
          gather_[phase], 0, num_columns, scratch.rows, num_rows, slice_stride_, g.kernel_width,
          p_.depth, p_.depthwise_kernel + q.begin, nullptr, scratch.taps,
          [&](int64_t first, int64_t count, const Tap<T>* taps, int64_t num_taps) {
            p_.kernels.depthwise.taps(
                {taps, num_taps, count, q.end - q.begin, slice_stride_, nullptr,
                 out + (static_cast<int64_t>(phase) + first * g.stride_width) * out_stride,
                 g.stride_width * out_stride});
          });
    }
  }

  // From depthwise channels to input channels: sums the multiples, applies the slope of the
  // activation before, narrows and transposes.
  void StoreInputRow(const Channels& q, int64_t image, int64_t in_row, T* row, T* x_row) const {
    const Geometry& g = p_.g;
    const int64_t multiplier = g.depth_multiplier;
    const int64_t c_begin = q.begin / multiplier, channels = (q.end - q.begin) / multiplier;
    if (multiplier > 1) {
      for (int64_t w = 0; w < g.in_width; ++w) {
        T* pixel = row + w * slice_stride_;
        for (int64_t c = 0; c < channels; ++c) {
          T sum = pixel[c * multiplier];
          for (int64_t m = 1; m < multiplier; ++m) sum += pixel[c * multiplier + m];
          pixel[c] = sum;
        }
      }
    }
    if (p_.input_activation() != Activation::kLinear) {
      CopyInputRow(p_, image, in_row, 0, g.in_width, c_begin, c_begin + channels, 1, x_row,
                   slice_stride_);
      for (int64_t w = 0; w < g.in_width; ++w) {
        T* pixel = row + w * slice_stride_;
        p_.kernels.slope_from_input(p_.input_activation(), pixel, x_row + w * slice_stride_, pixel,
                                    channels);
      }
    }
    const int64_t first = (image * g.in_height + in_row) * g.in_width;
    StorePixels(p_, row, slice_stride_, dx_, g.in_channels, g.in_height * g.in_width, first,
                first + g.in_width, c_begin, channels);
  }

  // to[i] = sum over slabs, in their order.
  void AddSlabs(void* to, int64_t count, const std::vector<WeightSums<T>>& sums,
                T* WeightSums<T>::* member) const {
    if (!to) return;
    const int64_t blocks = CeilDiv(count, kReductionBlock);
    ParallelFor(blocks, ThreadsFor(count * slabs_), [&](int64_t block, int64_t) {
      const int64_t begin = block * kReductionBlock, end = std::min(count, begin + kReductionBlock);
      T* sum = sums[0].*member;
      for (int64_t slab = 1; slab < slabs_; ++slab) {
        const T* partial = sums[slab].*member;
        for (int64_t i = begin; i < end; ++i) sum[i] += partial[i];
      }
      p_.copies.store(sum + begin, end - begin, 1, end - begin, static_cast<S*>(to) + begin,
                      end - begin);
    });
  }

  Problem<S> p_;
  WidenedWeights<S> weights_;
  const BackwardArgs& args_;
  const S* dy_;
  const S* y_;
  const S* pointwise_;
  S* dx_;
  int64_t threads_;
  const PairKernels* pairs_ = nullptr;  // null: products of matrices are of the compute type
  bool recompute_slope_ = false, shares_dz_ = false, dz_in_place_ = false, dx_in_place_ = false,
       packs_dz_ = true, fetches_input_ = false, pair_dz_in_place_ = false;
  bool windows_ = false;  // dKd is summed up by window_gradient
  int64_t dz_stride_ = 0, pair_dz_stride_ = 0;
  int64_t units_ = 1, slice_unit_ = 1, slices_ = 1, slice_channels_ = 0, slice_stride_ = 0,
          packed_slice_elements_ = 0;
  int64_t slabs_ = 1, bands_ = 1, edge_rows_ = 0;
  int64_t images_at_once_ = 1, staged_rows_ = 0, chunk_rows_ = 1, ring_rows_ = 1, chunk_pixels_ = 0,
          ring_pixels_ = 0;
  std::vector<ColumnPlan> gather_;
  T* dz_ = nullptr;
  BFloat16* pair_dz_ = nullptr;
  T* edges_ = nullptr;
};

// Gradients of an empty output: sums over nothing.
void ZeroGradients(const Geometry& geometry, DType dtype, const BackwardArgs& args) {
  Sizes sizes;
  Validate(geometry, dtype, &sizes);
  const auto zero = [&](void* to, int64_t count) {
    if (to) std::memset(to, 0, static_cast<size_t>(count * ElementSize(dtype)));
  };
  zero(args.dx, sizes.x);
  zero(args.d_depthwise_kernel, sizes.depthwise_kernel);
  zero(args.d_pointwise_kernel, sizes.pointwise_kernel);
  zero(args.d_depthwise_bias, sizes.depthwise_bias);
  zero(args.d_bias, sizes.bias);
}

}  // namespace

void Backward(const Geometry& geometry, DType dtype, const BackwardArgs& args) {
  const IeeeMode mode;
  if (geometry.pixels() == 0) return ZeroGradients(geometry, dtype, args);
  switch (dtype) {
    case DType::kFloat32:
      return RunLoop<BackwardLoop<float>>(geometry, args);
    case DType::kFloat64:
      return RunLoop<BackwardLoop<double>>(geometry, args);
    case DType::kBFloat16:
      return RunLoop<BackwardLoop<BFloat16>>(geometry, args);
    case DType::kFloat16:
      return RunLoop<BackwardLoop<Float16>>(geometry, args);
  }
}

Plan PlanBackward(const Geometry& geometry, DType dtype) {
  if (geometry.pixels() == 0) return {};
  BackwardArgs args = {};
  // Nobody reads it: it says that there is one.
  args.y = &geometry;
  switch (dtype) {
    case DType::kFloat32:
      return BackwardLoop<float>(geometry, args, true).plan();
    case DType::kFloat64:
      return BackwardLoop<double>(geometry, args, true).plan();
    case DType::kBFloat16:
      return BackwardLoop<BFloat16>(geometry, args, true).plan();
    case DType::kFloat16:
      return BackwardLoop<Float16>(geometry, args, true).plan();
  }
  return {};
}

}  // namespace sepconv
