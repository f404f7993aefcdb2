// y = activation(bias + pointwise(depthwise(x))): tiles of pixels over threads; in each, the
// depthwise output fills a buffer that stays in L2, and the pointwise panels run over it.
#include "forward.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "float_mode.h"
#include "packed.h"
#include "tiles.h"

namespace sepconv {
namespace {

// Pixels of a tile: its depthwise output, in elements of type U, and one weight panel share the L2
// budget. Whole rows if one fits, by preference a multiple of those that the depthwise stage
// computes at once.
template <typename U, typename S>
int64_t TilePixels(const Problem<S>& p) {
  const int64_t element = sizeof(U), columns = p.kernels.columns, width = p.g.out_width;
  const int64_t pixel_bytes = p.template TileStride<U>(p.depth) * element;
  const int64_t budget = kForwardTileBytes - p.depth * columns * element;
  const bool narrow = p.filters <= 2 * columns;
  int64_t pixels = (narrow ? std::min(budget, kForwardNarrowTileBytes) : budget) / pixel_bytes;
  pixels = std::max(pixels, kForwardRegisterTiles * p.kernels.rows);
  if (narrow && p.slide_rows * width * pixel_bytes <= budget)
    pixels = std::max(pixels, p.slide_rows * width);
  if (const int64_t rows = pixels / width; rows > 0)
    return (rows < p.slide_rows ? rows : rows / p.slide_rows * p.slide_rows) * width;
  return std::min(pixels, kForwardMaxPixels);
}

template <typename S>
class ForwardLoop {
 public:
  using T = ComputeType<S>;

  // `may_pair`: to multiply pairs of bfloat16 at once, where the target can.
  ForwardLoop(const Geometry& g, const ForwardArgs& args, const OutputGradient<S>& gradient,
              bool may_pair)
      : p_(g, args.x, args.depthwise_bias),
        weights_(p_, args.depthwise_kernel, args.depthwise_bias, args.bias),
        pointwise_(static_cast<const S*>(args.pointwise_kernel)),
        y_(static_cast<S*>(args.y)),
        gradient_(gradient),
        columns_(p_.kernels.columns),
        panels_(p_.filters, p_.kernels),
        threads_(ThreadsFor(p_.macs())),
        pairs_(std::is_same_v<S, BFloat16> && may_pair && !gradient.dz ? p_.target.pairs : nullptr),
        narrows_(pairs_ && p_.depthwise_activation() == Activation::kLinear),
        depth_(pairs_ ? pairs_->Depth(p_.depth) : p_.depth),
        kept_(args.packed && &args.packed->target == &p_.target &&
                      args.packed->pairs == (pairs_ != nullptr)
                  ? args.packed
                  : nullptr) {
    if (narrows_) p_.rows_in_place = p_.rows_lie_ready;
    // Packing reads and writes the weights once; with few pixels that costs more than reading them
    // in place. A last panel that ends inside a vector is packed all the same, because the
    // micro-kernel reads whole vectors.
    const bool in_place = !kept_ && std::is_same_v<S, T> && p_.pixels <= kUnpackedPixels;
    first_packed_ = !in_place                                ? 0
                    : panels_.packed_columns() == p_.filters ? panels_.count()
                                                             : panels_.count() - 1;

    depth_stride_ = p_.TileStride(p_.depth);
    narrow_stride_ = p_.PairTileStride(p_.depth);
    tile_pixels_ = narrows_ ? TilePixels<BFloat16>(p_) : TilePixels<T>(p_);
    int64_t tiles = CeilDiv(p_.pixels, tile_pixels_);
    const int64_t element = sizeof(T), taps = g.kernel_height * g.kernel_width;
    // Several threads share such a layer by its filters, each with a depthwise output of its own.
    const bool whole = !in_place && p_.pixels * depth_stride_ * element <= p_.kernels.whole_bytes &&
                       p_.depth * p_.filters * element > kForwardWholeWeightBytes &&
                       (threads_ == 1 || p_.pixels * taps < p_.filters);
    packs_in_time_ = !kept_ && (whole || (!in_place && threads_ == 1));
    if (whole) {
      tiles = 1;
    } else if (tiles > 1 || p_.pixels >= 2 * threads_ * p_.kernels.rows) {
      tiles = RoundUp(tiles, threads_);
    }
    // Whole rows, if that does not leave a thread much more than the others.
    const int64_t even = CeilDiv(p_.pixels, tiles);
    if (tile_pixels_ >= g.out_width && (threads_ == 1 || tiles >= kManyTiles * threads_)) {
      const int64_t rows = CeilDiv(even, g.out_width);
      tile_pixels_ = (rows < p_.slide_rows ? rows : RoundUp(rows, p_.slide_rows)) * g.out_width;
    } else {
      tile_pixels_ = even;
    }
    tiles_ = CeilDiv(p_.pixels, tile_pixels_);
    // Too few tiles for the threads: each tile's filters are split, and its depthwise output
    // computed once per part.
    parts_ = std::min(panels_.count(), CeilDiv(threads_, tiles_));
    packs_two_ = packs_in_time_ && tiles_ == 1;

    activation_ = gradient_.dz ? Activation::kLinear : p_.activation();
    clamps_ = activation_ == Activation::kRelu || activation_ == Activation::kRelu6;
    const bool in_registers = clamps_ || activation_ == Activation::kLinear;
    direct_y_ =
        !g.channels_first() && !gradient_.dz && (std::is_same_v<S, T> || (pairs_ && in_registers));
    // Whole lines of memory, none of which is read again here.
    const int64_t row_bytes = p_.filters * static_cast<int64_t>(sizeof(S));
    const bool large_y = p_.pixels * row_bytes > kStreamOutputBytes;
    streams_ = direct_y_ && in_registers && large_y && row_bytes % kCacheLineBytes == 0 &&
               reinterpret_cast<uintptr_t>(y_) % kCacheLineBytes == 0;
    fetches_y_ = direct_y_ && large_y && !streams_;
    staged_columns_ = g.in_width;
    strip_ = StripChannels();
    keeps_rows_ = strip_ == p_.depth && tile_pixels_ >= g.out_width;
  }

  Plan plan() const {
    const int64_t packed = kept_ ? 0 : panels_.count() - first_packed_;
    return {{"threads", threads_},
            {"tiles", tiles_},
            {"tile_pixels", tile_pixels_},
            {"filter_parts", parts_},
            {"panels", panels_.count()},
            {"panel_filters", panels_.width(panels_.count() - 1)},
            {"panels_packed_before", packs_in_time_ ? 0 : packed},
            {"panels_packed_in_time", packs_in_time_ ? packed : 0},
            {"input_in_place", p_.rows_in_place},
            {"strip_channels", strip_},
            {"output_in_place", direct_y_},
            {"output_past_caches", streams_},
            {"dot_of_pairs", pairs_ != nullptr}};
  }

  bool uses_pairs() const { return pairs_ != nullptr; }

  int64_t ScratchBytes() const { return Layout(*this).Bytes(threads_); }

  // False if the pairs have lost what floats keep, and the call must run again without them. That
  // depends on the numbers alone, not on the threads.
  bool Run(char* memory) {
    const Layout layout(*this);
    // What is kept is not written to.
    packed_ = kept_ ? kept_->data.As<T>() : reinterpret_cast<T*>(memory + layout.packed_at);
    const auto memory_of = [&](int64_t worker) { return layout.MemoryOf(worker, memory); };
    const auto least_of = [&](int64_t worker) {
      return reinterpret_cast<LeastLanes*>(memory_of(worker) + layout.least_at);
    };
    for (int64_t worker = 0; pairs_ && worker < threads_; ++worker) {
      *least_of(worker) = LeastLanes();
      // Once: no tile writes them.
      FillDepth(*pairs_, p_.kernels.lanes, p_.depth, tile_pixels_,
                reinterpret_cast<BFloat16*>(memory_of(worker) + layout.narrow_tile_at),
                narrow_stride_);
    }
    if (pairs_ && kept_) *least_of(0) = kept_->least;
    if (!kept_ && !packs_in_time_ && first_packed_ < panels_.count()) {
      ParallelFor(CeilDiv(p_.depth, kTransposeBlock), threads_, [&](int64_t task, int64_t worker) {
        const int64_t k = task * kTransposeBlock;
        const int64_t k_end = std::min(p_.depth, k + kTransposeBlock);
        if (pairs_) {
          for (int64_t panel = 0; panel < panels_.count(); ++panel)
            PackPairs(panel, k, k_end, packed_, least_of(worker));
        } else {
          PackPanels<S>(p_.copies, pointwise_, p_.depth, p_.filters, k, k_end, panels_,
                        first_packed_, packed_);
        }
      });
    }
    for (int64_t worker = 0; keeps_rows_ && worker < threads_; ++worker) {
      auto* staged_row = reinterpret_cast<int64_t*>(memory_of(worker) + layout.staged_row_at);
      InputRows<S>(p_, nullptr, staged_row).Forget();
    }
    ParallelFor(tiles_ * parts_, threads_, [&](int64_t task, int64_t worker) {
      char* mine = memory_of(worker);
      const Scratch scratch = {reinterpret_cast<T*>(mine + layout.two_panels_at),
                               least_of(worker),
                               reinterpret_cast<T*>(mine + layout.tile_at),
                               reinterpret_cast<BFloat16*>(mine + layout.narrow_tile_at),
                               reinterpret_cast<T*>(mine + layout.panel_at),
                               reinterpret_cast<T*>(mine + layout.gradient_at),
                               reinterpret_cast<T*>(mine + layout.staged_at),
                               reinterpret_cast<int64_t*>(mine + layout.staged_row_at),
                               mine + layout.rows_at,
                               mine + layout.taps_at};
      const int64_t tile = task / parts_, part = task % parts_;
      const int64_t begin = tile * tile_pixels_, end = std::min(p_.pixels, begin + tile_pixels_);
      Depthwise(begin, end, scratch);
      Pointwise(begin, end, panels_.count() * part / parts_, panels_.count() * (part + 1) / parts_,
                NewRows(end), scratch);
      if (streams_) StreamsArrive();
    });
    if (!pairs_) return true;
    LeastOperands least;
    least.bias = LeastBias();
    for (int64_t worker = 0; worker < threads_; ++worker) least.Add(*least_of(worker));
    return !least.MayFlush();
  }

 private:
  // A run of memory.
  struct Stretch {
    const char* data;
    int64_t bytes;
  };

  // The rows of x that the tile from pixel `begin` on is the first to read, or none where they need
  // no fetch: in L2 already, or scattered.
  Stretch NewRows(int64_t begin) const {
    const Geometry& g = p_.g;
    const int64_t row_bytes = g.in_width * g.in_channels * static_cast<int64_t>(sizeof(S));
    if (begin >= p_.pixels || g.channels_first() ||
        g.batch * g.in_height * row_bytes < kFetchInputBytes)
      return {nullptr, 0};
    // Rows of the whole batch, up to the last one that an output row reads.
    const auto end_of = [&](int64_t pixel) {
      const int64_t row = pixel / g.out_width, image = row / g.out_height;
      const int64_t reach = row % g.out_height * g.stride_height - g.pad_top + p_.row_reach();
      return image * g.in_height + std::clamp<int64_t>(reach, 0, g.in_height);
    };
    const int64_t first = begin == 0 ? 0 : end_of(begin - 1);
    const int64_t last = end_of(std::min(p_.pixels, begin + tile_pixels_) - 1);
    return {reinterpret_cast<const char*>(p_.x) + first * row_bytes,
            std::max<int64_t>(0, last - first) * row_bytes};
  }

  int LeastBias() const {
    int least = LeastOperands::kNone;
    for (int64_t f = 0; p_.bias && f < p_.filters; ++f) {
      const uint32_t magnitude = std::bit_cast<uint32_t>(static_cast<float>(p_.bias[f])) << 1;
      if (magnitude != 0)
        least = std::min(least, static_cast<int>(magnitude >> std::numeric_limits<float>::digits));
    }
    return least;
  }

  // Where things are in the scratch memory.
  struct Layout : CallLayout {
    explicit Layout(const ForwardLoop& loop) {
      const Problem<S>& p = loop.p_;
      const Panels& panels = loop.panels_;
      const int64_t tile = loop.tile_pixels_, columns = loop.columns_;
      const int64_t packed = panels.packed_columns() - panels.begin(loop.first_packed_);
      packed_at = shared.Add(loop.packs_two_ || loop.kept_ ? 0 : packed * loop.depth_, sizeof(T));
      two_panels_at = own.Add(loop.packs_two_ ? 2 * loop.depth_ * columns : 0, sizeof(T));
      least_at = own.Add(loop.pairs_ ? 1 : 0, sizeof(LeastLanes));
      tile_at = own.Add(loop.narrows_ ? 0 : tile * loop.depth_stride_, sizeof(T));
      narrow_tile_at =
          own.Add(loop.pairs_ ? RoundUp(tile, loop.pairs_->row_unit) * loop.narrow_stride_ : 0,
                  sizeof(BFloat16));
      panel_at = own.Add(loop.direct_y_ ? 0 : tile * columns, sizeof(T));
      gradient_at = own.Add(loop.gradient_.dz ? tile * columns : 0, sizeof(T));
      staged_at =
          own.Add(InputRows<S>::StagedElements(p, loop.staged_columns_, loop.strip_), sizeof(T));
      staged_row_at = own.Add(InputRows<S>::NumSlots(p), sizeof(int64_t));
      rows_at = own.Add(p.g.kernel_height, sizeof(SourceRow<T>));
      taps_at = own.Add(p.g.kernel_height * p.g.kernel_width, sizeof(Tap<T>));
    }
    int64_t packed_at, two_panels_at, least_at, tile_at, narrow_tile_at, panel_at, gradient_at,
        staged_at, staged_row_at, rows_at, taps_at;
  };

  struct Scratch {
    T* two_panels;  // [depth][panel column] each: the one in use, and the next
    LeastLanes* least;
    T* tile;                // [pixel][depth]: the depthwise output
    BFloat16* narrow_tile;  // the same where the pointwise stage reads pairs
    T* panel;               // [pixel][panel column]: output before it is narrowed or transposed
    T* gradient;            // [pixel][panel column]
    T* staged;
    int64_t* staged_row;
    char* rows;  // SourceRow[kernel height]
    char* taps;  // Tap[kernel taps]
  };

  int64_t StripChannels() const {
    if (p_.rows_in_place) return p_.depth;
    const int64_t row =
        InputRows<S>::NumSlots(p_) * staged_columns_ * static_cast<int64_t>(sizeof(T));
    const int64_t fit =
        kStagedRowsBytes / std::max<int64_t>(row, 1) / p_.kernels.lanes * p_.kernels.lanes;
    return std::clamp(fit, std::min(2 * p_.kernels.lanes, p_.depth), p_.depth);
  }

  void Depthwise(int64_t begin, int64_t end, const Scratch& scratch) {
    if constexpr (std::is_same_v<S, BFloat16>) {
      if (narrows_ && p_.rows_in_place)
        return DepthwiseTile(begin, end, scratch, pairs_->depthwise, scratch.narrow_tile,
                             narrow_stride_);
      if (narrows_)
        return DepthwiseTile(begin, end, scratch, pairs_->depthwise_staged, scratch.narrow_tile,
                             narrow_stride_);
    }
    DepthwiseTile(begin, end, scratch, p_.kernels.depthwise, scratch.tile, depth_stride_);
    if (p_.depthwise_activation() != Activation::kLinear) {
      p_.kernels.activate(p_.depthwise_activation(), scratch.tile, end - begin, p_.depth,
                          depth_stride_);
    }
    if (pairs_) {
      pairs_->narrow(reinterpret_cast<const float*>(scratch.tile), depth_stride_, end - begin,
                     p_.depth, scratch.narrow_tile, narrow_stride_, scratch.least);
    } else {
      RoundToStorage<S>(p_, scratch.tile, end - begin, p_.depth, depth_stride_);
    }
  }

  // Pixels [begin, end) of the depthwise output, before its activation, to tile[pixel][stride].
  template <typename X, typename U>
  void DepthwiseTile(int64_t begin, int64_t end, const Scratch& scratch,
                     const DepthwiseKernels<X, U>& kernels, U* tile, int64_t stride) {
    const Geometry& g = p_.g;
    InputRows<S> input(p_, scratch.staged, scratch.staged_row);
    // A tile inside one row stages only the columns that it reads.
    int64_t column_begin = 0, column_end = g.in_width;
    if (const int64_t first = begin % g.out_width;
        !keeps_rows_ && first + (end - begin) <= g.out_width) {
      const int64_t reach = (g.kernel_width - 1) * g.dilation_width;
      column_begin = std::clamp<int64_t>(first * g.stride_width - g.pad_left, 0, g.in_width);
      column_end =
          std::clamp<int64_t>((first + end - begin - 1) * g.stride_width - g.pad_left + reach + 1,
                              column_begin, g.in_width);
    }
    for (int64_t q = 0; q < p_.depth; q += strip_) {
      const int64_t q_end = std::min(p_.depth, q + strip_);
      input.SetStrip(q, q_end, column_begin, column_end);
      if (!keeps_rows_) input.Forget();
      const DepthwiseStage<S, X, U> stage{p_,
                                          kernels,
                                          input,
                                          reinterpret_cast<SourceRow<X>*>(scratch.rows),
                                          reinterpret_cast<Tap<X>*>(scratch.taps),
                                          q,
                                          q_end,
                                          stride,
                                          scratch.least};
      for (int64_t pixel = begin; pixel < end;) {
        const int64_t row = pixel / g.out_width, column = pixel % g.out_width;
        const int64_t image = row / g.out_height, out_row = row % g.out_height;
        U* out = tile + (pixel - begin) * stride + q;
        if (const int64_t rows = (end - pixel) / g.out_width; column == 0 && rows > 0) {
          const int64_t row_end = std::min(out_row + rows, g.out_height);
          DepthwiseRows(stage, image, out_row, row_end, out);
          pixel += (row_end - out_row) * g.out_width;
        } else {
          const int64_t count = std::min(end - pixel, g.out_width - column);
          DepthwiseRow(stage, image, out_row, column, column + count, out);
          pixel += count;
        }
      }
    }
  }

  // Packs rows [k_begin, k_end) of a panel; `to` is where the first panel starts.
  void PackPairs(int64_t panel, int64_t k_begin, int64_t k_end, T* to, LeastLanes* least) const {
    if constexpr (std::is_same_v<S, BFloat16>) {
      PackPairsOfPanel(*pairs_, pointwise_, p_.depth, p_.filters, k_begin, k_end, panels_, panel,
                       reinterpret_cast<BFloat16Pair*>(to), least);
    }
  }

  T* PackedPanel(int64_t panel, const Scratch& scratch) const {
    return packs_two_ ? scratch.two_panels + panel % 2 * depth_ * columns_
                      : packed_ + (panels_.begin(panel) - panels_.begin(first_packed_)) * depth_;
  }

  void Pointwise(int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end, Stretch fetch,
                 const Scratch& scratch) {
    if constexpr (std::is_same_v<S, BFloat16>) {
      if (pairs_) {
        pairs_->configure(end - begin);
        if (direct_y_) {
          PointwiseTile(begin, end, panel_begin, panel_end, fetch, scratch, pairs_->gemm_stored);
        } else {
          PointwiseTile(begin, end, panel_begin, panel_end, fetch, scratch, pairs_->gemm);
        }
        return pairs_->release();
      }
    }
    PointwiseTile(begin, end, panel_begin, panel_end, fetch, scratch, p_.kernels.gemm);
  }

  // The factors are numbers or pairs of them, and C is stored as T, or as y where direct_y_.
  template <typename E, typename C>
  void PointwiseTile(int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end,
                     Stretch fetch, const Scratch& scratch, void (*run)(const GemmArgs<E, C>&)) {
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    constexpr bool kPairs = std::is_same_v<E, BFloat16Pair>;
    // relu and relu6 are clamps, which the micro-kernel applies to its registers.
    const T low = clamps_ ? 0 : -kInfinity,
            high = activation_ == Activation::kRelu6 ? 6 : kInfinity;
    const int64_t pixels = end - begin;
    const E* a = reinterpret_cast<const E*>(scratch.tile);
    int64_t a_stride = depth_stride_;
    if constexpr (kPairs) {
      a = reinterpret_cast<const E*>(scratch.narrow_tile);
      a_stride = narrow_stride_ / 2;
    }
    const bool packs_now = packs_in_time_ && begin == 0;
    const int64_t ahead_rows = kPairs ? p_.depth / 2 : p_.depth;  // of a panel that is copied
    bool packed_before = false;
    // Each panel fetches its share.
    const int64_t share = RoundUp(CeilDiv(fetch.bytes, panel_end - panel_begin), kCacheLineBytes);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t column = panels_.begin(panel), count = panels_.columns(panel);
      const E* b = nullptr;
      int64_t b_stride = panels_.width(panel);
      const S* ahead = nullptr;
      E* ahead_to = nullptr;
      if (panel >= first_packed_) b = reinterpret_cast<E*>(PackedPanel(panel, scratch));
      if (packs_now) {
        if (packed_before) {
          // The panel before did it.
        } else if (kPairs) {
          PackPairs(panel, 0, p_.depth, PackedPanel(panel, scratch) - column * depth_,
                    scratch.least);
        } else {
          p_.copies.load(pointwise_ + column, p_.filters, p_.depth, count, b_stride,
                         PackedPanel(panel, scratch), b_stride);
        }
        if (panel + 1 < panel_end) {
          ahead = pointwise_ + panels_.begin(panel + 1);
          // A panel as wide as this one is copied by the micro-kernel.
          packed_before = panels_.columns(panel + 1) == b_stride &&
                          (kPairs ? p_.depth % 2 == 0 : std::is_same_v<S, T>);
          if (packed_before) {
            ahead_to = reinterpret_cast<E*>(PackedPanel(panel + 1, scratch));
            std::fill(ahead_to + ahead_rows * b_stride, ahead_to + depth_ * b_stride, E{});
          }
        }
      }
      C* out = reinterpret_cast<C*>(scratch.panel);
      int64_t out_stride = columns_;
      if constexpr (std::is_same_v<S, E>) {
        if (panel < first_packed_) {
          b = pointwise_ + column;
          b_stride = p_.filters;
        }
      }
      if constexpr (std::is_same_v<S, C>) {
        if (direct_y_) {
          out = y_ + begin * p_.filters + column;
          out_stride = p_.filters;
        }
      }
      const T* bias = p_.bias ? p_.bias + column : nullptr;
      GemmArgs<E, C> gemm{pixels,   depth_, count,      a,    a_stride, 1,    b,
                          b_stride, out,    out_stride, bias, low,      high, false};
      if (ahead) {
        gemm.ahead = reinterpret_cast<const char*>(ahead);
        gemm.ahead_rows = ahead_rows;
        gemm.ahead_stride = (kPairs ? 2 : 1) * p_.filters * static_cast<int64_t>(sizeof(S));
        gemm.ahead_row_bytes = panels_.columns(panel + 1) * static_cast<int64_t>(sizeof(S));
        gemm.ahead_to = ahead_to;
        gemm.least = scratch.least;
      }
      if (panel + 1 < panel_end && panel >= first_packed_ && !packs_now &&
          depth_ * p_.filters * static_cast<int64_t>(sizeof(T)) > kFetchWeightBytes) {
        gemm.ahead = reinterpret_cast<const char*>(PackedPanel(panel + 1, scratch));
        gemm.ahead_rows = depth_;
        gemm.ahead_stride = panels_.width(panel + 1) * static_cast<int64_t>(sizeof(T));
        gemm.ahead_row_bytes = gemm.ahead_stride;
      }
      gemm.streams = streams_;
      gemm.fetches_c = fetches_y_;
      gemm.fetch = fetch.data;
      gemm.fetch_bytes = std::min(share, fetch.bytes);
      run(gemm);
      fetch.data += gemm.fetch_bytes;
      fetch.bytes -= gemm.fetch_bytes;
      if constexpr (std::is_same_v<C, T>) {
        FinishPanel(begin, end, column, count, out, out_stride, scratch);
      }
    }
  }

  // What the micro-kernel does not do: other activations, and stores in other types and layouts.
  void FinishPanel(int64_t begin, int64_t end, int64_t column, int64_t count, T* out,
                   int64_t out_stride, const Scratch& scratch) {
    if (gradient_.dz) {
      LoadPixels(p_, gradient_.dy, p_.filters, p_.image_pixels, begin, end, column, count,
                 scratch.gradient, columns_);
      for (int64_t p = 0; p < end - begin; ++p) {
        p_.kernels.slope_from_input(p_.activation(), scratch.gradient + p * columns_,
                                    out + p * columns_,
                                    gradient_.dz + (begin + p) * gradient_.stride + column, count);
      }
      return;
    }
    if (activation_ != Activation::kLinear && !clamps_)
      p_.kernels.activate(activation_, out, end - begin, count, out_stride);
    if (!direct_y_)
      StorePixels(p_, out, out_stride, y_, p_.filters, p_.image_pixels, begin, end, column, count);
  }

  Problem<S> p_;
  WidenedWeights<S> weights_;
  const S* pointwise_;
  S* y_;
  OutputGradient<S> gradient_;
  int64_t columns_;
  Panels panels_;
  int64_t threads_;
  const PairKernels* pairs_;     // null: the pointwise stage runs on elements of the compute type
  bool narrows_;                 // the depthwise stage itself writes what the pairs are made of
  int64_t depth_;                // of the pointwise stage, in elements or pairs
  const PackedPointwise* kept_;  // null: each call packs
  int64_t narrow_stride_ = 0, first_packed_ = 0, tile_pixels_ = 0, tiles_ = 0, parts_ = 1,
          depth_stride_ = 0, staged_columns_ = 0, strip_ = 0;
  // keeps_rows_: what one tile staged, the next ones of the same worker find again.
  // packs_in_time_: the first tile packs each panel just before it uses it; packs_two_: there is no
  // other tile, and a panel's memory serves again.
  // streams_: y goes past the caches; fetches_y_: it would, but for rows that share lines.
  Activation activation_ = Activation::kLinear;
  bool clamps_ = false, streams_ = false, fetches_y_ = false;
  bool direct_y_ = false, packs_in_time_ = false, packs_two_ = false, keeps_rows_ = false;
  T* packed_ = nullptr;
};

}  // namespace

template <typename S>
void RunForward(const Geometry& g, const ForwardArgs& args, const OutputGradient<S>& gradient) {
  if (g.pixels() == 0) return;
  RunLoop<ForwardLoop<S>>(g, args, gradient);
}
template void RunForward(const Geometry&, const ForwardArgs&, const OutputGradient<float>&);
template void RunForward(const Geometry&, const ForwardArgs&, const OutputGradient<double>&);
template void RunForward(const Geometry&, const ForwardArgs&, const OutputGradient<BFloat16>&);
template void RunForward(const Geometry&, const ForwardArgs&, const OutputGradient<Float16>&);

void Forward(const Geometry& geometry, DType dtype, const ForwardArgs& args) {
  const IeeeMode mode;
  switch (dtype) {
    case DType::kFloat32:
      return RunForward<float>(geometry, args, {});
    case DType::kFloat64:
      return RunForward<double>(geometry, args, {});
    case DType::kBFloat16:
      return RunForward<BFloat16>(geometry, args, {});
    case DType::kFloat16:
      return RunForward<Float16>(geometry, args, {});
  }
}

Plan PlanForward(const Geometry& geometry, DType dtype) {
  if (geometry.pixels() == 0) return {};
  switch (dtype) {
    case DType::kFloat32:
      return ForwardLoop<float>(geometry, {}, {}, true).plan();
    case DType::kFloat64:
      return ForwardLoop<double>(geometry, {}, {}, true).plan();
    case DType::kBFloat16:
      return ForwardLoop<BFloat16>(geometry, {}, {}, true).plan();
    case DType::kFloat16:
      return ForwardLoop<Float16>(geometry, {}, {}, true).plan();
  }
  return {};
}

}  // namespace sepconv
