// Rows between the storage type and the compute type, as they are or transposed. Compiled once per
// target, like kernel-inl.h.

// Transposes, in every span of kSpan lanes, the square of kSpan / kUnit vectors `kApart` vectors
// apart with units of kUnit lanes as its elements, by perfect shuffles of all units.
template <typename T, int kUnit, int kSpan, int kApart>
SEPCONV_INLINE void TransposeUnits(Vec<T>* square) {
  constexpr int kCount = kSpan / kUnit;
#pragma GCC unroll 4
  for (int step = 1; step < kCount; step *= 2) {
    Vec<T> shuffled[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i) {
      const Vec<T> a = square[i * kApart], b = square[(i + kCount / 2) * kApart];
      shuffled[2 * i] = Interleave<false, kUnit, kSpan, T>(a, b);
      shuffled[2 * i + 1] = Interleave<true, kUnit, kSpan, T>(a, b);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) square[i * kApart] = shuffled[i];
  }
}

// A square of as many vectors as a vector has lanes: first inside 16 bytes, which one instruction
// shuffles, then with 16 bytes as the unit.
template <typename T>
SEPCONV_INLINE void TransposeSquare(Vec<T> (&square)[kLanes<T>]) {
  constexpr int kL = kLanes<T>, kInner = 16 / sizeof(T);
#pragma GCC unroll 8
  for (int i = 0; i < kL; i += kInner) TransposeUnits<T, 1, kInner, 1>(square + i);
#pragma GCC unroll 4
  for (int i = 0; i < kInner; ++i) TransposeUnits<T, kInner, kL, kInner>(square + i);
}

template <typename S, typename T = ComputeType<S>>
void LoadRows(const S* from, int64_t stride, int64_t rows, int64_t count, int64_t width, T* to,
              int64_t to_stride) {
  constexpr int kL = kLanes<T>;
  const int64_t whole = count / kL * kL;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < whole; c += kL) Store(to + c, LoadStored(from + c));
    int64_t c = whole;
    if (c < count) {
      const Vec<T> last = LoadStoredFirst(from + c, static_cast<int>(count - c));
      StoreFirst(to + c, static_cast<int>(std::min<int64_t>(width - c, kL)), last);
      c += kL;
    }
    for (; c < width; ++c) to[c] = 0;
    from += stride;
    to += to_stride;
  }
}

template <typename S, typename T = ComputeType<S>>
void StoreRows(const T* from, int64_t stride, int64_t rows, int64_t count, S* to,
               int64_t to_stride) {
  constexpr int kL = kLanes<T>;
  for (int64_t r = 0; r < rows; ++r) {
    int64_t c = 0;
    for (; c + kL <= count; c += kL) StoreStored(to + c, Load(from + c));
    if (c < count) {
      const int rest = static_cast<int>(count - c);
      StoreStoredFirst(to + c, rest, LoadFirst(from + c, rest));
    }
    from += stride;
    to += to_stride;
  }
}

// Columns of `to` in blocks of as many as a vector has lanes: their sources in channels_first are
// often a power of two apart and would push each other out of L1.
template <typename S, typename T = ComputeType<S>>
void LoadRowsTransposed(const S* from, int64_t stride, int64_t rows, int64_t count, int64_t width,
                        T* to, int64_t to_stride) {
  constexpr int kL = kLanes<T>;
  constexpr int64_t kRun = kTransposeRunBytes / sizeof(S);
  for (int64_t run = 0; run < rows; run += kRun) {
    const int64_t run_end = std::min(rows, run + kRun);
    for (int64_t c = 0; c < width; c += kL) {
      const int columns = static_cast<int>(std::min<int64_t>(width - c, kL));
      for (int64_t r = run; r < run_end; r += kL) {
        const int num_rows = static_cast<int>(std::min<int64_t>(run_end - r, kL));
        // The next columns of this run, or the first ones of the next.
        const S* ahead = c + kL < width ? from + (c + kL) * stride + r : from + r + kRun;
        for (int i = 0; i < kL; ++i) __builtin_prefetch(ahead + i * stride);
        Vec<T> square[kL];
        for (int i = 0; i < kL; ++i) {
          const S* at = from + (c + i) * stride + r;
          square[i] = c + i >= count   ? Vec<T>{}
                      : num_rows == kL ? LoadStored(at)
                                       : LoadStoredFirst(at, num_rows);
        }
        TransposeSquare<T>(square);
        T* out = to + r * to_stride + c;
        for (int i = 0; i < num_rows; ++i) {
          if (columns == kL) {
            Store(out + i * to_stride, square[i]);
          } else {
            StoreFirst(out + i * to_stride, columns, square[i]);
          }
        }
      }
    }
  }
}

template <typename S, typename T = ComputeType<S>>
void StoreRowsTransposed(const T* from, int64_t stride, int64_t rows, int64_t count, S* to,
                         int64_t to_stride) {
  constexpr int kL = kLanes<T>;
  for (int64_t c = 0; c < count; c += kL) {
    const int columns = static_cast<int>(std::min<int64_t>(count - c, kL));
    for (int64_t r = 0; r < rows; r += kL) {
      const int num_rows = static_cast<int>(std::min<int64_t>(rows - r, kL));
      Vec<T> square[kL];
      for (int i = 0; i < kL; ++i) {
        const T* at = from + (r + i) * stride + c;
        square[i] = i >= num_rows ? Vec<T>{} : columns == kL ? Load(at) : LoadFirst(at, columns);
      }
      TransposeSquare<T>(square);
      S* out = to + c * to_stride + r;
      for (int i = 0; i < columns; ++i) {
        if (num_rows == kL) {
          StoreStored(out + i * to_stride, square[i]);
        } else {
          StoreStoredFirst(out + i * to_stride, num_rows, square[i]);
        }
      }
    }
  }
}

template <typename S, typename T = ComputeType<S>>
void RoundRows(T* data, int64_t rows, int64_t count, int64_t stride) {
  constexpr int kL = kLanes<T>;
  for (int64_t r = 0; r < rows; ++r) {
    int64_t c = 0;
    for (; c + kL <= count; c += kL) Store(data + c, Rounded<S>(Load(data + c)));
    if (c < count) {
      const int rest = static_cast<int>(count - c);
      StoreFirst(data + c, rest, Rounded<S>(LoadFirst(data + c, rest)));
    }
    data += stride;
  }
}

// See LeastLanes. Bits less one are the greatest for zero.
SEPCONV_INLINE FullBits16 LesserOf(FullBits16 least, FullBits16 bits) {
  return Lesser(least, (bits & uint16_t{0x7fff}) - uint16_t{1});
}
SEPCONV_INLINE Bits32 LesserOf(Bits32 least, Vec<float> value) {
  return Lesser(least, (reinterpret_cast<Bits32>(value) & 0x7fffffffu) - 1u);
}

typedef uint16_t LeastWeights __attribute__((vector_size(SEPCONV_VECTOR_BYTES), may_alias));
typedef uint32_t LeastValues __attribute__((vector_size(SEPCONV_VECTOR_BYTES), may_alias));
SEPCONV_INLINE Bits32 LoadLeast(const LeastLanes& lanes) {
  return *reinterpret_cast<const LeastValues*>(lanes.value);
}
SEPCONV_INLINE void StoreLeast(LeastLanes& lanes, Bits32 least) {
  *reinterpret_cast<LeastValues*>(lanes.value) = least;
}

// The least weights in a register, from and to memory at either end of its life.
class LeastWeight {
 public:
  explicit SEPCONV_INLINE LeastWeight(LeastLanes* lanes)
      : memory_(reinterpret_cast<LeastWeights*>(lanes->weight)), least_(*memory_) {}
  SEPCONV_INLINE ~LeastWeight() { *memory_ = least_; }
  LeastWeight(const LeastWeight&) = delete;
  LeastWeight& operator=(const LeastWeight&) = delete;
  SEPCONV_INLINE void Keep(FullBits16 bits) { least_ = LesserOf(least_, bits); }

 private:
  LeastWeights* memory_;
  FullBits16 least_;
};

// One vector of two rows, and its part of the least weight.
SEPCONV_INLINE void StorePairs(BFloat16Pair* to, Bits16 first, Bits16 second, LeastWeight& least) {
  const Bits32 pairs = ToBits32(first) | (ToBits32(second) << 16);
  Store(to, pairs);
  least.Keep(reinterpret_cast<FullBits16>(pairs));
}
// Two vectors.
SEPCONV_INLINE void StorePairs(BFloat16Pair* to, FullBits16 first, FullBits16 second,
                               LeastWeight& least) {
  Store(to, reinterpret_cast<Bits32>(InterleaveBits<false>(first, second)));
  Store(to + kLanes<BFloat16Pair>, reinterpret_cast<Bits32>(InterleaveBits<true>(first, second)));
  least.Keep(first);
  least.Keep(second);
}
// The v-th vector from `from` on.
template <typename V>
SEPCONV_INLINE V LoadBits(const char* from, int v) {
  V bits;
  std::memcpy(&bits, from + v * static_cast<int>(sizeof(V)), sizeof(V));
  return bits;
}

inline void PackPairs(const BFloat16* from, int64_t stride, int64_t rows, int64_t count,
                      int64_t width, BFloat16Pair* to, LeastLanes* lanes_of_least) {
  constexpr int kL = kLanes<BFloat16Pair>;
  LeastWeight least(lanes_of_least);
  for (int64_t r = 0; r < rows; r += 2) {
    int64_t c = 0;
    for (; r + 1 < rows && c + 2 * kL <= count; c += 2 * kL) {
      const char* at = reinterpret_cast<const char*>(from + r * stride + c);
      const char* below = reinterpret_cast<const char*>(from + (r + 1) * stride + c);
      StorePairs(to + r / 2 * width + c, LoadBits<FullBits16>(at, 0),
                 LoadBits<FullBits16>(below, 0), least);
    }
    for (; c < width; c += kL) {
      const int lanes = static_cast<int>(std::clamp<int64_t>(count - c, 0, kL));
      const BFloat16* at = from + r * stride + c;
      const Bits16 first = LoadBitsFirst(at, lanes);
      const Bits16 second = r + 1 < rows ? LoadBitsFirst(at + stride, lanes) : Bits16{};
      StorePairs(to + r / 2 * width + c, first, second, least);
    }
  }
}

// Takes part in the least weight without being copied.
inline void WatchRows(const BFloat16* from, int64_t stride, int64_t rows, int64_t count,
                      LeastLanes* lanes_of_least) {
  constexpr int kL = kLanes<float>;
  LeastWeight least(lanes_of_least);
  for (int64_t r = 0; r < rows; ++r) {
    const BFloat16* row = from + r * stride;
    int64_t c = 0;
    for (; c + 2 * kL <= count; c += 2 * kL)
      least.Keep(LoadBits<FullBits16>(reinterpret_cast<const char*>(row + c), 0));
    for (; c < count; c += kL) {
      const int lanes = static_cast<int>(std::min<int64_t>(count - c, kL));
      least.Keep(reinterpret_cast<FullBits16>(ToBits32(LoadBitsFirst(row + c, lanes))));
    }
  }
}

// A vector of floats becomes bfloat16. Floats behind the first `count` are zero, and are stored.
SEPCONV_INLINE void StoreNarrowed(BFloat16* to, Vec<float> value, Bits32& least) {
  *reinterpret_cast<UnalignedBits16*>(to) = NarrowNormal(value);
  least = LesserOf(least, value);
}

inline void NarrowRows(const float* from, int64_t stride, int64_t rows, int64_t count, BFloat16* to,
                       int64_t to_stride, LeastLanes* watched) {
  constexpr int kL = kLanes<float>;
  Bits32 least = LoadLeast(*watched);
  for (int64_t r = 0; r < rows; ++r) {
    int64_t c = 0;
    for (; c + kL <= count; c += kL) StoreNarrowed(to + c, Load(from + c), least);
    if (c < count) StoreNarrowed(to + c, LoadFirst(from + c, static_cast<int>(count - c)), least);
    from += stride;
    to += to_stride;
  }
  StoreLeast(*watched, least);
}

template <typename S>
constexpr RowCopies<S> MakeCopies() {
  return {LoadRows<S>, LoadRowsTransposed<S>, StoreRows<S>, StoreRowsTransposed<S>, RoundRows<S>};
}
