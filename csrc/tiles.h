// What forward and backward share: where taps read, staged input rows, and rows of pixels in either
// layout.
#ifndef SEPCONV_TILES_H_
#define SEPCONV_TILES_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "parallel.h"
#include "sepconv.h"
#include "storage.h"
#include "tuning.h"

namespace sepconv {

// One kernel column over a run of pixels: pixel t reads source column first + t * step, for begin
// <= t < end.
struct ColumnTap {
  int64_t kernel_column, first, begin, end;
};

// A row of pixels cut into segments within which the same kernel columns read inside the image.
class ColumnPlan {
 public:
  struct Segment {
    int64_t begin, end;
    std::vector<ColumnTap> taps;
  };

  ColumnPlan() = default;
  ColumnPlan(int64_t num_pixels, int64_t step, const std::vector<ColumnTap>& taps) : step_(step) {
    std::vector<int64_t> cuts = {0, num_pixels};
    for (const ColumnTap& tap : taps) {
      for (const int64_t cut : {tap.begin, tap.end})
        cuts.push_back(std::clamp<int64_t>(cut, 0, num_pixels));
    }
    std::sort(cuts.begin(), cuts.end());
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      if (cuts[i] == cuts[i + 1]) continue;
      Segment segment{cuts[i], cuts[i + 1], {}};
      for (const ColumnTap& tap : taps) {
        if (tap.begin <= cuts[i] && cuts[i + 1] <= tap.end) segment.taps.push_back(tap);
      }
      segments_.push_back(std::move(segment));
    }
  }

  const std::vector<Segment>& segments() const { return segments_; }
  int64_t step() const { return step_; }

 private:
  std::vector<Segment> segments_;
  int64_t step_ = 1;
};

// One kernel row that reads inside the image: pixel 0 of source column 0, as if it were there.
template <typename X>
struct SourceRow {
  int64_t kernel_row;
  const X* data;
};

// Calls run(first pixel, number of pixels, taps, number of taps) for each segment within [begin,
// end). Tap sources point at the segment's first pixel. `taps` has room for every kernel tap.
template <typename X, typename Run>
void ForEachSegment(const ColumnPlan& plan, int64_t begin, int64_t end, const SourceRow<X>* rows,
                    int64_t num_rows, int64_t column_stride, int64_t kernel_width,
                    int64_t tap_stride, const ComputeType<X>* weights, ComputeType<X>* weight_sums,
                    Tap<X>* taps, Run&& run) {
  for (const ColumnPlan::Segment& segment : plan.segments()) {
    const int64_t first = std::max(begin, segment.begin), last = std::min(end, segment.end);
    if (first >= last) continue;
    int64_t num_taps = 0;
    for (int64_t r = 0; r < num_rows; ++r) {
      for (const ColumnTap& tap : segment.taps) {
        const int64_t weight = (rows[r].kernel_row * kernel_width + tap.kernel_column) * tap_stride;
        taps[num_taps++] = {rows[r].data + (tap.first + first * plan.step()) * column_stride,
                            weights ? weights + weight : nullptr,
                            weight_sums ? weight_sums + weight : nullptr};
      }
    }
    run(first, last - first, taps, num_taps);
  }
}

// Everything that is derived once per call.
template <typename S>
struct Problem {
  using T = ComputeType<S>;

  Problem(const Geometry& geometry, const void* x_data, const void* depthwise_bias_data)
      : g(geometry),
        target(CurrentTargetTable()),
        kernels(KernelsOf<T>(target)),
        copies(CopiesOf<S>(target)),
        depth(geometry.depthwise_channels()),
        filters(geometry.out_channels),
        image_pixels(geometry.out_height * geometry.out_width),
        pixels(geometry.pixels()),
        x(static_cast<const S*>(x_data)),
        depthwise_bias_stored(static_cast<const S*>(depthwise_bias_data)) {
    std::vector<ColumnTap> taps;
    for (int64_t j = 0; j < g.kernel_width; ++j) {
      // Pixel ow reads column ow * stride + shift, which must lie in [0, in_width).
      const int64_t shift = j * g.dilation_width - g.pad_left;
      taps.push_back({j, shift, shift < 0 ? CeilDiv(-shift, g.stride_width) : 0,
                      shift >= g.in_width ? 0 : CeilDiv(g.in_width - shift, g.stride_width)});
    }
    columns = ColumnPlan(g.out_width, g.stride_width, taps);
    // Rows of x are read in place where they already are what the depthwise kernel wants.
    const bool has_slide = g.kernel_height == g.kernel_width && HasSlide(g.kernel_width) &&
                           g.stride_height == g.stride_width;
    slides_by_one = has_slide && g.stride_width == 1;
    slides = slides_by_one ||
             (has_slide && g.stride_width == 2 && g.dilation_height == 1 && g.dilation_width == 1);
    slide_rows = slides && g.dilation_height == 1 ? kernels.SlideRows(g.kernel_width) : 1;
    rows_lie_ready = !g.channels_first() && g.depth_multiplier == 1 &&
                     g.input_activation == static_cast<int64_t>(Activation::kLinear);
    rows_in_place = std::is_same_v<S, T> && rows_lie_ready;
  }

  int64_t row_reach() const { return (g.kernel_height - 1) * g.dilation_height + 1; }
  Activation activation() const { return static_cast<Activation>(g.activation); }
  Activation depthwise_activation() const {
    return static_cast<Activation>(g.depthwise_activation);
  }
  Activation input_activation() const { return static_cast<Activation>(g.input_activation); }
  int64_t macs() const { return pixels * depth * (filters + g.kernel_height * g.kernel_width); }
  // Row length of a tile of `columns` elements.
  template <typename E = T>
  static int64_t TileStride(int64_t columns) {
    return RoundUp(columns, kBufferAlignment / sizeof(E)) +
           kTileRowPadBytes / static_cast<int64_t>(sizeof(E));
  }

  // The same of a tile of pairs, whose rows may be read sixteen at once: they lie as near as they
  // can without sharing too few sets of L1.
  static int64_t PairTileStride(int64_t columns) {
    const int64_t stride = RoundUp(columns, kBufferAlignment / sizeof(BFloat16));
    const bool shares_sets = stride * static_cast<int64_t>(sizeof(BFloat16)) % kPairRowBytes == 0;
    return stride + shares_sets * kTileRowPadBytes / static_cast<int64_t>(sizeof(BFloat16));
  }

  const Geometry& g;
  const Target& target;  // one for the whole call
  const Kernels<T>& kernels;
  const RowCopies<S>& copies;
  const int64_t depth, filters, image_pixels, pixels;
  const S* x;
  const S* depthwise_bias_stored;
  // In the compute type; set by the loops, because widening them needs a buffer.
  const T* depthwise_kernel = nullptr;
  const T* depthwise_bias = nullptr;
  const T* bias = nullptr;
  ColumnPlan columns;
  bool rows_lie_ready = false;  // but for the type
  bool rows_in_place = false;
  bool slides = false;  // the depthwise stage is a sliding window
  bool slides_by_one = false;
  int64_t slide_rows = 1;  // output rows that it computes at once
};

inline int64_t ThreadsFor(int64_t macs) {
  return std::max<int64_t>(1, std::min(GetNumThreads(), macs / kMinMacsPerThread));
}

// Copies of the small weights in the compute type, where they are stored in another.
template <typename S>
class WidenedWeights {
 public:
  using T = ComputeType<S>;
  WidenedWeights(Problem<S>& problem, const void* depthwise_kernel, const void* depthwise_bias,
                 const void* bias)
      : taps_(problem.g.kernel_height * problem.g.kernel_width * problem.depth),
        // A plan has no weights, and must not fail where there is no memory for them.
        buffer_(std::is_same_v<S, T> || !depthwise_kernel
                    ? 0
                    : (taps_ + problem.depth + problem.filters) * sizeof(T)) {
    T* to = buffer_.template As<T>();
    problem.depthwise_kernel = Widened(problem.copies, depthwise_kernel, taps_, to);
    problem.depthwise_bias = Widened(problem.copies, depthwise_bias, problem.depth, to + taps_);
    problem.bias = Widened(problem.copies, bias, problem.filters, to + taps_ + problem.depth);
  }

 private:
  static const T* Widened(const RowCopies<S>& copies, const void* stored, int64_t count, T* to) {
    if (!stored) return nullptr;
    const S* from = static_cast<const S*>(stored);
    if constexpr (std::is_same_v<S, T>) {
      return from;
    } else {
      copies.load(from, count, 1, count, count, to, count);
      return to;
    }
  }
  int64_t taps_;
  Buffer buffer_;
};

// Copies columns [column_begin, column_end) of one input row, each channel `multiplier` times, to
// out[column][depthwise channel]; the depthwise channels are [q_begin, q_end).
template <typename S>
void CopyInputRow(const Problem<S>& p, int64_t image, int64_t row, int64_t column_begin,
                  int64_t column_end, int64_t q_begin, int64_t q_end, int64_t multiplier,
                  ComputeType<S>* out, int64_t out_stride) {
  const Geometry& g = p.g;
  const int64_t columns = column_end - column_begin, channels = q_end - q_begin;
  const int64_t channel_stride = g.channels_first() ? g.in_height * g.in_width : 1;
  const int64_t column_stride = g.channels_first() ? 1 : g.in_channels;
  const S* from = p.x + image * g.in_height * g.in_width * g.in_channels +
                  (row * g.in_width + column_begin) * column_stride +
                  q_begin / multiplier * channel_stride;
  if (multiplier == 1) {
    if (g.channels_first()) {
      p.copies.load_transposed(from, channel_stride, columns, channels, channels, out, out_stride);
    } else {
      p.copies.load(from, column_stride, columns, channels, channels, out, out_stride);
    }
    return;
  }
  for (int64_t w = 0; w < columns; ++w) {
    const S* channel = from;
    for (int64_t q = 0, m = q_begin % multiplier; q < channels; ++q) {
      out[q] = Widen(*channel);
      if (++m == multiplier) {
        m = 0;
        channel += channel_stride;
      }
    }
    from += column_stride;
    out += out_stride;
  }
}

// The input rows of one strip of depthwise channels, as the depthwise kernel wants them: in place,
// or staged on first use (transposed, widened, activated, repeated) in a ring of as many rows as
// one output row can reach.
template <typename S>
class InputRows {
 public:
  using T = ComputeType<S>;

  static int64_t NumSlots(const Problem<S>& p) { return NumSlots(p, p.slide_rows); }
  // For `rows` neighbouring output rows at once.
  static int64_t NumSlots(const Problem<S>& p, int64_t rows) {
    return std::min((rows - 1) * p.g.stride_height + p.row_reach(), p.g.in_height);
  }
  // Elements of staging memory for `columns` columns and `channels` channels.
  static int64_t StagedElements(const Problem<S>& p, int64_t columns, int64_t channels) {
    return StagedElements(p, columns, channels, NumSlots(p));
  }
  static int64_t StagedElements(const Problem<S>& p, int64_t columns, int64_t channels,
                                int64_t slots) {
    return p.rows_in_place ? 0 : slots * columns * channels;
  }

  InputRows(const Problem<S>& problem, T* staged, int64_t* staged_row)
      : InputRows(problem, staged, staged_row, NumSlots(problem)) {}
  InputRows(const Problem<S>& problem, T* staged, int64_t* staged_row, int64_t slots)
      : p_(problem), staged_(staged), staged_row_(staged_row), slots_(slots) {}

  // Chooses the strip [q_begin, q_end) and the columns of x that will be read.
  void SetStrip(int64_t q_begin, int64_t q_end, int64_t column_begin, int64_t column_end) {
    q_begin_ = q_begin;
    q_end_ = q_end;
    column_begin_ = column_begin;
    column_end_ = column_end;
  }
  // The staging memory holds nothing of the present strip yet.
  void Forget() { std::fill_n(staged_row_, slots_, -1); }

  int64_t column_stride() const { return p_.rows_in_place ? p_.g.in_channels : q_end_ - q_begin_; }

  // X is the type of the rows: that of x in place, that of the sums staged.

  // The rows that output row `out_row` of `image` reads; returns their number.
  template <typename X>
  int64_t Rows(int64_t image, int64_t out_row, SourceRow<X>* rows) {
    int64_t count = 0;
    for (int64_t i = 0; i < p_.g.kernel_height; ++i) {
      const int64_t row = out_row * p_.g.stride_height + i * p_.g.dilation_height - p_.g.pad_top;
      if (const X* data = RowOrNull<X>(image, row)) rows[count++] = {i, data};
    }
    return count;
  }
  // Column 0 of a row of x, as if it were there; null outside the image.
  template <typename X = T>
  const X* RowOrNull(int64_t image, int64_t row) {
    return row >= 0 && row < p_.g.in_height ? Row<X>(image, row) : nullptr;
  }

  // Input row `row` of `image`, which exists.
  template <typename X = T>
  const X* Row(int64_t image, int64_t row) {
    const Geometry& g = p_.g;
    if constexpr (std::is_same_v<S, X>) {
      if (p_.rows_in_place || !std::is_same_v<X, T>)
        return p_.x + (image * g.in_height + row) * g.in_width * g.in_channels + q_begin_;
    }
    if constexpr (std::is_same_v<X, T>) return StagedRow(image, row);
  }

 private:
  const T* StagedRow(int64_t image, int64_t row) {
    const Geometry& g = p_.g;
    const int64_t tag = image * g.in_height + row, slot = tag % slots_;
    const int64_t columns = column_end_ - column_begin_, channels = q_end_ - q_begin_;
    T* data = staged_ + slot * columns * channels;
    if (staged_row_[slot] != tag) {
      staged_row_[slot] = tag;
      CopyInputRow(p_, image, row, column_begin_, column_end_, q_begin_, q_end_, g.depth_multiplier,
                   data, channels);
      if (p_.input_activation() != Activation::kLinear) {
        p_.kernels.activate(p_.input_activation(), data, 1, columns * channels, columns * channels);
      }
    }
    return data - column_begin_ * channels;
  }

  const Problem<S>& p_;
  T* staged_;
  int64_t* staged_row_;
  int64_t slots_;
  int64_t q_begin_ = 0, q_end_ = 0, column_begin_ = 0, column_end_ = 0;
};

// How many rows from `row` on, up to `row_end`, a sliding window computes at once: several only
// where every row that they read is inside the image.
template <typename S>
int64_t RowsAtOnce(const Problem<S>& p, int64_t row, int64_t row_end) {
  const int64_t top = row * p.g.stride_height - p.g.pad_top;
  if (top < 0) return 1;
  const int64_t inside = FloorDiv(p.g.in_height - p.g.kernel_height - top, p.g.stride_height) + 1;
  return std::clamp<int64_t>(std::min(row_end - row, inside), 1, p.slide_rows);
}

// Where the depthwise stage of a tile reads and writes, and by which kernels.
template <typename S, typename X, typename U>
struct DepthwiseStage {
  const Problem<S>& p;
  const DepthwiseKernels<X, U>& kernels;
  InputRows<S>& input;
  SourceRow<X>* rows;  // as many as the kernel has
  Tap<X>* taps;        // likewise
  int64_t q_begin, q_end;
  int64_t out_stride;
  LeastLanes* least = nullptr;
};

// Output rows [out_row, out_row + num_rows), pixels [begin, end) of each, by a sliding window.
template <typename S, typename X, typename U>
void SlideOver(const DepthwiseStage<S, X, U>& stage, int64_t image, int64_t out_row,
               int64_t num_rows, int64_t begin, int64_t end, U* out) {
  const Problem<S>& p = stage.p;
  const Geometry& g = p.g;
  const int64_t q_begin = stage.q_begin, q_end = stage.q_end, out_stride = stage.out_stride;
  const X* sources[kMaxSlideSources];
  const int64_t num_sources = g.kernel_height + (num_rows - 1) * g.stride_height;
  for (int64_t i = 0; i < num_sources; ++i) {
    const int64_t row = out_row * g.stride_height - g.pad_top + i * g.dilation_height;
    sources[i] = stage.input.template RowOrNull<X>(image, row);
  }
  // With dilation, which goes with a stride of one, the pixels at a distance of `step` are a row of
  // their own, of every step-th column of the source.
  const int64_t step = g.dilation_width, stride = stage.input.column_stride();
  for (int64_t phase = 0; phase < std::min(step, end - begin); ++phase) {
    const int64_t column = begin * g.stride_width + phase - g.pad_left;
    const int64_t first = FloorDiv(column, step);
    const int64_t shift = column - first * step;
    const X* shifted[kMaxSlideSources];
    for (int64_t i = 0; i < num_sources; ++i)
      shifted[i] = sources[i] ? sources[i] + shift * stride : nullptr;
    stage.kernels.slide(
        {g.kernel_width, g.stride_width, num_rows, CeilDiv(end - begin - phase, step),
         q_end - q_begin, shifted, step * stride, first, CeilDiv(g.in_width - shift, step),
         p.depthwise_kernel + q_begin, p.depth,
         p.depthwise_bias ? p.depthwise_bias + q_begin : nullptr, out + phase * out_stride,
         step * out_stride, (end - begin) * out_stride, stage.least});
  }
}

// Depthwise output of pixels [begin, end) of one output row, before bias-free activation, to
// out[pixel][channel].
template <typename S, typename X, typename U>
void DepthwiseRow(const DepthwiseStage<S, X, U>& stage, int64_t image, int64_t out_row,
                  int64_t begin, int64_t end, U* out) {
  const Problem<S>& p = stage.p;
  if (p.slides) return SlideOver(stage, image, out_row, 1, begin, end, out);
  const int64_t num_rows = stage.input.Rows(image, out_row, stage.rows);
  const int64_t q_begin = stage.q_begin, column_stride = stage.input.column_stride();
  ForEachSegment<X>(p.columns, begin, end, stage.rows, num_rows, column_stride, p.g.kernel_width,
                    p.depth, p.depthwise_kernel + q_begin, nullptr, stage.taps,
                    [&](int64_t first, int64_t count, const Tap<X>* taps, int64_t num_taps) {
                      stage.kernels.taps({taps, num_taps, count, stage.q_end - q_begin,
                                          p.columns.step() * column_stride,
                                          p.depthwise_bias ? p.depthwise_bias + q_begin : nullptr,
                                          out + (first - begin) * stage.out_stride,
                                          stage.out_stride, stage.least});
                    });
}

// The same of whole rows [row_begin, row_end), one behind the other.
template <typename S, typename X, typename U>
void DepthwiseRows(const DepthwiseStage<S, X, U>& stage, int64_t image, int64_t row_begin,
                   int64_t row_end, U* out) {
  const int64_t width = stage.p.g.out_width;
  for (int64_t row = row_begin; row < row_end;) {
    const int64_t count = stage.p.slides ? RowsAtOnce(stage.p, row, row_end) : 1;
    U* to = out + (row - row_begin) * width * stage.out_stride;
    if (count > 1) {
      SlideOver(stage, image, row, count, 0, width, to);
    } else {
      DepthwiseRow(stage, image, row, 0, width, to);
    }
    row += count;
  }
}

// Rounds to the storage type and back, where an unfused network would store the value.
template <typename S>
void RoundToStorage(const Problem<S>& p, ComputeType<S>* data, int64_t rows, int64_t columns,
                    int64_t stride) {
  if constexpr (!std::is_same_v<S, ComputeType<S>>) p.copies.round(data, rows, columns, stride);
}

// Pixels [begin, end) of a flattened [batch][height][width] x channels tensor, either layout, cut
// at images. Calls run(pointer to the first pixel and channel, pixels, index of the first pixel).
template <typename Pointer, typename Run>
void ForEachImagePart(const Geometry& g, Pointer data, int64_t channels, int64_t image_pixels,
                      int64_t begin, int64_t end, int64_t channel, Run&& run) {
  if (!g.channels_first()) return run(data + begin * channels + channel, end - begin, int64_t{0});
  for (int64_t pixel = begin; pixel < end;) {
    const int64_t image = pixel / image_pixels, within = pixel % image_pixels;
    const int64_t count = std::min(end - pixel, image_pixels - within);
    run(data + (image * channels + channel) * image_pixels + within, count, pixel - begin);
    pixel += count;
  }
}

// Reads [begin, end) x [channel, channel + count) of a tensor into out[pixel][channel].
template <typename S>
void LoadPixels(const Problem<S>& p, const S* data, int64_t channels, int64_t image_pixels,
                int64_t begin, int64_t end, int64_t channel, int64_t count, ComputeType<S>* out,
                int64_t out_stride) {
  ForEachImagePart(p.g, data, channels, image_pixels, begin, end, channel,
                   [&](const S* from, int64_t pixels, int64_t first) {
                     auto* to = out + first * out_stride;
                     if (p.g.channels_first()) {
                       p.copies.load_transposed(from, image_pixels, pixels, count, count, to,
                                                out_stride);
                     } else {
                       p.copies.load(from, channels, pixels, count, count, to, out_stride);
                     }
                   });
}

// The reverse: writes from[pixel][channel].
template <typename S>
void StorePixels(const Problem<S>& p, const ComputeType<S>* from, int64_t from_stride, S* data,
                 int64_t channels, int64_t image_pixels, int64_t begin, int64_t end,
                 int64_t channel, int64_t count) {
  ForEachImagePart(p.g, data, channels, image_pixels, begin, end, channel,
                   [&](S* to, int64_t pixels, int64_t first) {
                     const auto* source = from + first * from_stride;
                     if (p.g.channels_first()) {
                       p.copies.store_transposed(source, from_stride, pixels, count, to,
                                                 image_pixels);
                     } else {
                       p.copies.store(source, from_stride, pixels, count, to, channels);
                     }
                   });
}

// Columns cut into panels of nearly equal numbers of whole vectors, none wider than a micro-kernel:
// 128 columns in panels of at most 3 vectors of 8 are 3 + 3 + 3 + 3 + 2 + 2 vectors, not 5 x 3 + 1.
class Panels {
 public:
  Panels() = default;
  template <typename T>
  Panels(int64_t columns, const Kernels<T>& kernels)
      : columns_(columns),
        lanes_(kernels.lanes),
        vectors_(CeilDiv(columns, kernels.lanes)),
        count_(CeilDiv(vectors_ * lanes_, kernels.columns)) {}

  int64_t count() const { return count_; }
  int64_t begin(int64_t panel) const { return vectors_ * panel / count_ * lanes_; }
  int64_t columns(int64_t panel) const {
    return std::min(columns_, begin(panel + 1)) - begin(panel);
  }
  // Width in whole vectors: the row length of a packed panel, which starts at element begin *
  // depth.
  int64_t width(int64_t panel) const { return begin(panel + 1) - begin(panel); }
  int64_t packed_columns() const { return vectors_ * lanes_; }

 private:
  int64_t columns_ = 0, lanes_ = 1, vectors_ = 0, count_ = 1;
};

// Packs rows [k_begin, k_end) of a [depth][columns] matrix, from panel `first_panel` on, as
// panel[depth][width], zero-filled. Row blocks outside, panels inside: rows are read in the order
// of memory, where a panel on its own would touch one line of a new page at every step.
template <typename S>
void PackPanels(const RowCopies<S>& copies, const S* matrix, int64_t depth, int64_t stride,
                int64_t k_begin, int64_t k_end, const Panels& panels, int64_t first_panel,
                ComputeType<S>* packed) {
  for (int64_t panel = first_panel; panel < panels.count(); ++panel) {
    const int64_t column = panels.begin(panel), count = panels.columns(panel),
                  width = panels.width(panel);
    copies.load(matrix + k_begin * stride + column, stride, k_end - k_begin, count, width,
                packed + (column - panels.begin(first_panel)) * depth + k_begin * width, width);
  }
}

// Zeros from the last vector of each row on, which whoever wrote `columns` elements has filled, up
// to the depth of the pairs.
inline void FillDepth(const PairKernels& pairs, int64_t lanes, int64_t columns, int64_t rows,
                      BFloat16* to, int64_t stride) {
  const int64_t begin = RoundUp(columns, lanes), end = 2 * pairs.Depth(columns);
  for (int64_t row = 0; begin < end && row < rows; ++row)
    std::fill(to + row * stride + begin, to + row * stride + end, BFloat16{0});
}

// Packs rows [k_begin, k_end) of one panel as pairs of neighbours in depth, with the last row also
// the zeros behind it; k_begin is even.
// `packed` is where panel 0 starts.
inline void PackPairsOfPanel(const PairKernels& pairs, const BFloat16* matrix, int64_t depth,
                             int64_t stride, int64_t k_begin, int64_t k_end, const Panels& panels,
                             int64_t panel, BFloat16Pair* packed, LeastLanes* least) {
  const int64_t column = panels.begin(panel), width = panels.width(panel);
  BFloat16Pair* panel_at = packed + column * pairs.Depth(depth);
  pairs.pack(matrix + k_begin * stride + column, stride, k_end - k_begin, panels.columns(panel),
             width, panel_at + k_begin / 2 * width, least);
  if (k_end == depth)
    std::fill(panel_at + CeilDiv(depth, 2) * width, panel_at + pairs.Depth(depth) * width,
              BFloat16Pair{});
}

// Runs a loop over a call with products of pairs where it has them, and, where those have lost what
// floats keep, once more without.
template <typename Loop, typename... Args>
void RunLoop(const Args&... args) {
  Loop loop(args..., true);
  if (!loop.uses_pairs()) {
    const Buffer buffer(loop.ScratchBytes());
    loop.Run(buffer.As<char>());
    return;
  }
  // Memory for both ways beforehand, because nothing may be written where there is not enough.
  Loop without_pairs(args..., false);
  const Buffer buffer(std::max(loop.ScratchBytes(), without_pairs.ScratchBytes()));
  if (!loop.Run(buffer.As<char>())) without_pairs.Run(buffer.As<char>());
}

}  // namespace sepconv

#endif  // SEPCONV_TILES_H_
