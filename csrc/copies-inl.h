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

#if defined(SEPCONV_SIMD_AVX512)
// The least magnitude above zero, as bits less one; zero itself becomes the greatest.
SEPCONV_INLINE Bits16 LeastOf(Bits16 least, Bits16 stored) {
  const Bits16 magnitude = (stored & uint16_t{0x7fff}) - uint16_t{1};
  return Select(magnitude < least, magnitude, least);
}
SEPCONV_INLINE uint16_t LeastLane(Bits16 least) {
  uint16_t result = 0xffff;
  for (int i = 0; i < kLanes<float>; ++i)
    result = std::min(result, static_cast<uint16_t>(least[i]));
  return result;
}
SEPCONV_INLINE Bits16 LoadBits(const BFloat16* from, int count) {
  Bits16 bits = {};
  std::memcpy(&bits, from, static_cast<size_t>(count) * sizeof(BFloat16));
  return bits;
}

// See PairKernels.
inline uint16_t PackPairs(const BFloat16* from, int64_t stride, int64_t rows, int64_t count,
                          int64_t width, float* to) {
  constexpr int kL = kLanes<float>;
  Bits16 least = Bits16{} - uint16_t{1};
  for (int64_t r = 0; r < rows; r += 2) {
    for (int64_t c = 0; c < width; c += kL) {
      const int lanes = static_cast<int>(std::clamp<int64_t>(count - c, 0, kL));
      const BFloat16* at = from + r * stride + c;
      // A whole vector is one load; memcpy of a variable length would be a call.
      const Bits16 even = lanes == kL ? LoadBits(at, kL) : LoadBits(at, lanes);
      Bits16 odd = {};
      if (r + 1 < rows)
        odd = lanes == kL ? LoadBits(at + stride, kL) : LoadBits(at + stride, lanes);
      least = LeastOf(LeastOf(least, even), odd);
      const Bits32 pairs =
          __builtin_convertvector(even, Bits32) | (__builtin_convertvector(odd, Bits32) << 16);
      Store(to + r / 2 * width + c, reinterpret_cast<Vec<float>>(pairs));
    }
  }
  return LeastLane(least);
}

inline uint16_t NarrowToPairs(const float* from, int64_t stride, int64_t rows, int64_t count,
                              float* to, int64_t to_stride) {
  constexpr int kL = kLanes<float>;
  Bits16 least = Bits16{} - uint16_t{1};
  for (int64_t r = 0; r < rows; ++r) {
    BFloat16* out = reinterpret_cast<BFloat16*>(to + r * to_stride);
    for (int64_t c = 0; c < count; c += kL) {
      const int lanes = static_cast<int>(std::min<int64_t>(count - c, kL));
      const float* at = from + r * stride + c;
      const Bits16 bits = NarrowLanes<BFloat16>(lanes == kL ? Load(at) : LoadFirst(at, lanes));
      least = LeastOf(least, bits);
      *reinterpret_cast<UnalignedBits16*>(out + c) = bits;
    }
  }
  return LeastLane(least);
}
#endif

template <typename S>
constexpr RowCopies<S> MakeCopies() {
  return {LoadRows<S>, LoadRowsTransposed<S>, StoreRows<S>, StoreRowsTransposed<S>, RoundRows<S>};
}
