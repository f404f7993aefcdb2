// The dozen vector operations of the kernels, for one instruction set. Compiled once per target:
// the including file opens a target region and a namespace and defines
//   SEPCONV_VECTOR_BYTES   width of a vector
//   SEPCONV_SIMD_AVX512 or SEPCONV_SIMD_AVX2, where masked loads exist as instructions.
// Everything else is compiler vector arithmetic, so the same text serves every width. There is no
// include guard.
//
// a * b + c is contracted to a fused multiply-add by the compiler (-ffp-contract=fast) wherever the
// target has one.

#define SEPCONV_INLINE inline __attribute__((always_inline))
// Of pairs of bfloat16: without the instructions they are for tests alone, and compile in half the
// time out of line.
#if defined(SEPCONV_SIMD_AVX512)
#define SEPCONV_PAIRS_INLINE SEPCONV_INLINE
#else
#define SEPCONV_PAIRS_INLINE inline __attribute__((noinline))
#endif

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(SEPCONV_VECTOR_BYTES)));
  // Pairs of bfloat16 pass as floats.
  typedef float unaligned __attribute__((vector_size(SEPCONV_VECTOR_BYTES), aligned(2), may_alias));
  typedef int32_t mask __attribute__((vector_size(SEPCONV_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(SEPCONV_VECTOR_BYTES)));
  typedef double unaligned
      __attribute__((vector_size(SEPCONV_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t mask __attribute__((vector_size(SEPCONV_VECTOR_BYTES)));
};
template <typename T>
using Vec = typename VectorOf<T>::type;
template <typename T>
inline constexpr int kLanes = SEPCONV_VECTOR_BYTES / sizeof(T);

template <typename T>
SEPCONV_INLINE Vec<T> Load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(from);
}
template <typename T>
SEPCONV_INLINE void Store(T* to, Vec<T> value) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(to) = value;
}

// To whole vectors of memory that is not read soon, past the caches where there is an instruction
// for it; see StreamsArrive.
#if defined(SEPCONV_SIMD_AVX512)
SEPCONV_INLINE void Stream(float* to, Vec<float> value) { _mm512_stream_ps(to, value); }
SEPCONV_INLINE void Stream(double* to, Vec<double> value) { _mm512_stream_pd(to, value); }
#elif defined(SEPCONV_SIMD_AVX2)
SEPCONV_INLINE void Stream(float* to, Vec<float> value) { _mm256_stream_ps(to, value); }
SEPCONV_INLINE void Stream(double* to, Vec<double> value) { _mm256_stream_pd(to, value); }
#else
template <typename T>
SEPCONV_INLINE void Stream(T* to, Vec<T> value) {
  Store(to, value);
}
#endif

template <typename T, size_t... I>
SEPCONV_INLINE Vec<T> SetLanes(T value, std::index_sequence<I...>) {
  return Vec<T>{((void)I, value)...};
}
template <typename T>
SEPCONV_INLINE Vec<T> Set(T value) {
  return SetLanes<T>(value, std::make_index_sequence<kLanes<T>>());
}

// Lanewise `condition ? yes : no`; a NaN in a comparison counts as false.
template <typename M, typename V>
SEPCONV_INLINE V Select(M condition, V yes, V no) {
  return condition ? yes : no;
}
// Both let a NaN in `value` through.
template <typename V>
SEPCONV_INLINE V AtLeast(V value, V low) {
  return Select(value < low, low, value);
}
template <typename V>
SEPCONV_INLINE V AtMost(V value, V high) {
  return Select(value > high, high, value);
}

// The first `count` lanes; memory behind them is not touched, and loaded lanes behind them are
// zero.
#if defined(SEPCONV_SIMD_AVX512)
SEPCONV_INLINE Vec<float> LoadFirst(const float* from, int count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
}
SEPCONV_INLINE Vec<double> LoadFirst(const double* from, int count) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), from);
}
SEPCONV_INLINE void StoreFirst(float* to, int count, Vec<float> value) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), value);
}
SEPCONV_INLINE void StoreFirst(double* to, int count, Vec<double> value) {
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << count) - 1), value);
}
#elif defined(SEPCONV_SIMD_AVX2)
SEPCONV_INLINE __m256i FirstLanesMask(int count, float) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
SEPCONV_INLINE __m256i FirstLanesMask(int count, double) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
SEPCONV_INLINE Vec<float> LoadFirst(const float* from, int count) {
  return _mm256_maskload_ps(from, FirstLanesMask(count, 0.0f));
}
SEPCONV_INLINE Vec<double> LoadFirst(const double* from, int count) {
  return _mm256_maskload_pd(from, FirstLanesMask(count, 0.0));
}
SEPCONV_INLINE void StoreFirst(float* to, int count, Vec<float> value) {
  _mm256_maskstore_ps(to, FirstLanesMask(count, 0.0f), value);
}
SEPCONV_INLINE void StoreFirst(double* to, int count, Vec<double> value) {
  _mm256_maskstore_pd(to, FirstLanesMask(count, 0.0), value);
}
#else
// From any address, as above.
template <typename T>
SEPCONV_INLINE Vec<T> LoadFirst(const T* from, int count) {
  Vec<T> value = {};
  for (int i = 0; i < count; ++i) {
    T lane;
    std::memcpy(&lane, reinterpret_cast<const char*>(from) + i * sizeof(T), sizeof(T));
    value[i] = lane;
  }
  return value;
}
template <typename T>
SEPCONV_INLINE void StoreFirst(T* to, int count, Vec<T> value) {
  for (int i = 0; i < count; ++i) to[i] = value[i];
}
#endif

// sum += a * b with all three in registers. Left to itself, the compiler folds the load of a vector
// that several products share into each of them; the micro-kernel then waits for the load ports
// (72 % of the FMA peak from L1 on Zen 3; 88 % this way).
#if defined(SEPCONV_SIMD_AVX512)
SEPCONV_INLINE void MultiplyAdd(Vec<float>& sum, Vec<float> a, Vec<float> b) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
SEPCONV_INLINE void MultiplyAdd(Vec<double>& sum, Vec<double> a, Vec<double> b) {
  asm("vfmadd231pd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

#elif defined(SEPCONV_SIMD_AVX2)
SEPCONV_INLINE void MultiplyAdd(Vec<float>& sum, Vec<float> a, Vec<float> b) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
}
SEPCONV_INLINE void MultiplyAdd(Vec<double>& sum, Vec<double> a, Vec<double> b) {
  asm("vfmadd231pd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
}
#else
template <typename V>
SEPCONV_INLINE void MultiplyAdd(V& sum, V a, V b) {
  sum += a * b;
}
#endif

// The same where one of the factors is loaded for this product alone: the load may be folded into
// it. Not written as an expression, of which GCC makes two roundings below -O2: loops that compute
// pixels of one image must agree to the bit.
#if defined(SEPCONV_SIMD_AVX512)
SEPCONV_INLINE void MultiplyAddLoaded(Vec<float>& sum, Vec<float> a, Vec<float> b) {
  sum = _mm512_fmadd_ps(a, b, sum);
}
SEPCONV_INLINE void MultiplyAddLoaded(Vec<double>& sum, Vec<double> a, Vec<double> b) {
  sum = _mm512_fmadd_pd(a, b, sum);
}
#elif defined(SEPCONV_SIMD_AVX2)
SEPCONV_INLINE void MultiplyAddLoaded(Vec<float>& sum, Vec<float> a, Vec<float> b) {
  sum = _mm256_fmadd_ps(a, b, sum);
}
SEPCONV_INLINE void MultiplyAddLoaded(Vec<double>& sum, Vec<double> a, Vec<double> b) {
  sum = _mm256_fmadd_pd(a, b, sum);
}
#else
template <typename V>
SEPCONV_INLINE void MultiplyAddLoaded(V& sum, V a, V b) {
  sum += a * b;
}
#endif

// Units of kUnit lanes of both in turn, a0 b0 a1 b1 ..., taken from the lower or the upper half of
// every span of kSpan lanes.
template <bool kUpper, int kUnit, int kSpan, int kLane>
inline constexpr int kInterleaved = kLane / kSpan * kSpan + (kUpper ? kSpan / 2 : 0) +
                                    kLane % kSpan / kUnit / 2 * kUnit + kLane % kUnit;
template <bool kUpper, int kUnit, int kSpan, typename T, size_t... I>
SEPCONV_INLINE Vec<T> InterleaveLanes(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
  constexpr int kL = kLanes<T>;
#if defined(__clang__)
  return __builtin_shufflevector(
      a, b, (kInterleaved<kUpper, kUnit, kSpan, I> + static_cast<int>(I) / kUnit % 2 * kL)...);
#else
  // What GCC before 12 knows.
  using Mask = typename VectorOf<T>::mask;
  return __builtin_shuffle(
      a, b,
      Mask{(kInterleaved<kUpper, kUnit, kSpan, I> + static_cast<int>(I) / kUnit % 2 * kL)...});
#endif
}
template <bool kUpper, int kUnit, int kSpan, typename T>
SEPCONV_INLINE Vec<T> Interleave(Vec<T> a, Vec<T> b) {
  return InterleaveLanes<kUpper, kUnit, kSpan, T>(a, b, std::make_index_sequence<kLanes<T>>());
}

// The 16-bit storage types: the low half of every 32-bit lane.
typedef uint32_t Bits32 __attribute__((vector_size(SEPCONV_VECTOR_BYTES)));
typedef uint16_t Bits16 __attribute__((vector_size(SEPCONV_VECTOR_BYTES / 2)));
typedef uint16_t FullBits16 __attribute__((vector_size(SEPCONV_VECTOR_BYTES)));
typedef uint16_t UnalignedFullBits16
    __attribute__((vector_size(SEPCONV_VECTOR_BYTES), aligned(2), may_alias));
typedef uint16_t UnalignedBits16
    __attribute__((vector_size(SEPCONV_VECTOR_BYTES / 2), aligned(2), may_alias));

// Lanewise to and from 32 bits, and the lesser of two. GCC makes more of the plain forms than the
// one instruction each that they are.
#if defined(SEPCONV_SIMD_AVX512)
SEPCONV_INLINE Bits32 ToBits32(Bits16 bits) {
  return reinterpret_cast<Bits32>(
      _mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(bits)));
}
SEPCONV_INLINE Bits16 ToBits16(Bits32 bits) {
  return reinterpret_cast<Bits16>(
      _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(bits)));
}
SEPCONV_INLINE Bits32 Lesser(Bits32 a, Bits32 b) {
  return reinterpret_cast<Bits32>(
      _mm512_maskz_min_epu32(0xffff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
SEPCONV_INLINE FullBits16 Lesser(FullBits16 a, FullBits16 b) {
  return reinterpret_cast<FullBits16>(
      _mm512_min_epu16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
#else
SEPCONV_INLINE Bits32 ToBits32(Bits16 bits) { return __builtin_convertvector(bits, Bits32); }
SEPCONV_INLINE Bits16 ToBits16(Bits32 bits) { return __builtin_convertvector(bits, Bits16); }
template <typename V>
SEPCONV_INLINE V Lesser(V a, V b) {
  return Select(a < b, a, b);
}
#endif

// a0 b0 a1 b1 ... of the lower or the upper halves.
template <bool kUpper, size_t... I>
SEPCONV_INLINE FullBits16 InterleaveBits(FullBits16 a, FullBits16 b, std::index_sequence<I...>) {
  constexpr int kL = SEPCONV_VECTOR_BYTES / 2;
#if defined(__clang__)
  return __builtin_shufflevector(
      a, b, (kInterleaved<kUpper, 1, kL, I> + static_cast<int>(I) % 2 * kL)...);
#else
  return __builtin_shuffle(
      a, b, FullBits16{(kInterleaved<kUpper, 1, kL, I> + static_cast<int>(I) % 2 * kL)...});
#endif
}
template <bool kUpper>
SEPCONV_PAIRS_INLINE FullBits16 InterleaveBits(FullBits16 a, FullBits16 b) {
  return InterleaveBits<kUpper>(a, b, std::make_index_sequence<SEPCONV_VECTOR_BYTES / 2>());
}

// The first `count` of them; see LoadFirst and StoreFirst.
#if defined(SEPCONV_SIMD_AVX512)
SEPCONV_INLINE Bits16 LoadBitsFirst(const void* from, int count) {
  return reinterpret_cast<Bits16>(
      _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from));
}
SEPCONV_INLINE void StoreBitsFirst(void* to, int count, Bits16 value) {
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << count) - 1),
                           reinterpret_cast<__m256i>(value));
}
SEPCONV_INLINE void StoreBitsFirst(void* to, int count, FullBits16 value) {
  _mm512_mask_storeu_epi16(to, static_cast<__mmask32>((uint64_t{1} << count) - 1),
                           reinterpret_cast<__m512i>(value));
}
#else
SEPCONV_INLINE Bits16 LoadBitsFirst(const void* from, int count) {
  Bits16 bits = {};
  std::memcpy(&bits, from, static_cast<size_t>(count) * sizeof(uint16_t));
  return bits;
}
template <typename V>
SEPCONV_INLINE void StoreBitsFirst(void* to, int count, V value) {
  std::memcpy(to, &value, static_cast<size_t>(count) * sizeof(uint16_t));
}
#endif

// Vector forms of Widen and Narrow in storage.h, which says what they do.
template <typename S>
SEPCONV_INLINE Vec<float> WidenLanes(Bits16 stored);
template <>
SEPCONV_INLINE Vec<float> WidenLanes<BFloat16>(Bits16 stored) {
  return reinterpret_cast<Vec<float>>(ToBits32(stored) << 16);
}
template <typename S>
SEPCONV_INLINE Bits16 NarrowLanes(Vec<float> value);
template <>
SEPCONV_INLINE Bits16 NarrowLanes<BFloat16>(Vec<float> value) {
  const Bits32 bits = reinterpret_cast<Bits32>(value);
  const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return ToBits16(Select(value != value, (bits >> 16) | 0x40u, rounded));
}
#if defined(SEPCONV_SIMD_AVX512)
// With all lanes in the mask, because GCC 12 warns of an uninitialized value in the plain ones.
template <>
SEPCONV_INLINE Vec<float> WidenLanes<Float16>(Bits16 stored) {
  return _mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(stored));
}
template <>
SEPCONV_INLINE Bits16 NarrowLanes<Float16>(Vec<float> value) {
  return reinterpret_cast<Bits16>(_mm512_maskz_cvtps_ph(0xffff, value, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(SEPCONV_SIMD_AVX2)
template <>
SEPCONV_INLINE Vec<float> WidenLanes<Float16>(Bits16 stored) {
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(stored));
}
template <>
SEPCONV_INLINE Bits16 NarrowLanes<Float16>(Vec<float> value) {
  return reinterpret_cast<Bits16>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
#else
template <>
SEPCONV_INLINE Vec<float> WidenLanes<Float16>(Bits16 stored) {
  const Bits32 bits = __builtin_convertvector(stored, Bits32);
  const Bits32 sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  const Vec<float> scaled = reinterpret_cast<Vec<float>>(magnitude << 13) * 0x1p112f;
  const Bits32 infinite = (magnitude << 13) | 0x7f800000u;
  return reinterpret_cast<Vec<float>>(
      sign | Select(magnitude >= 0x7c00u, infinite, reinterpret_cast<Bits32>(scaled)));
}
template <>
SEPCONV_INLINE Bits16 NarrowLanes<Float16>(Vec<float> value) {
  const Bits32 bits = reinterpret_cast<Bits32>(value);
  const Bits32 sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const Vec<float> aligned = reinterpret_cast<Vec<float>>(magnitude) + 0.5f;
  const Bits32 subnormal = reinterpret_cast<Bits32>(aligned) - 0x3f000000u;
  const Bits32 normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  const Bits32 none = {};
  Bits32 half = Select(magnitude < 0x38800000u, subnormal, normal);
  half = Select(magnitude >= 0x477ff000u, none + 0x7c00u, half);
  half = Select(magnitude > 0x7f800000u, none + 0x7e00u, half);
  return __builtin_convertvector(sign | half, Bits16);
}
#endif

// Pairs of bfloat16. With AVX-512, only where the CPU has AVX512_BF16 too; elsewhere for tests. The
// instructions take subnormal numbers for zero, as operands and as sums.
SEPCONV_INLINE Vec<float> Load(const BFloat16Pair* from) {
  return Load(reinterpret_cast<const float*>(from));
}
SEPCONV_INLINE void Store(BFloat16Pair* to, Bits32 value) {
  Store(reinterpret_cast<float*>(to), reinterpret_cast<Vec<float>>(value));
}
SEPCONV_INLINE Vec<float> Set(BFloat16Pair pair) { return Set(std::bit_cast<float>(pair)); }
#if defined(SEPCONV_SIMD_AVX512)
SEPCONV_INLINE void Stream(BFloat16* to, FullBits16 value) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<__m512i>(value));
}
// sum += the products of both halves, in every lane.
SEPCONV_INLINE void AddDotOfPairs(Vec<float>& sum, Vec<float> a, Vec<float> b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
SEPCONV_INLINE Bits16 NarrowNormal(Vec<float> value) {
  Bits16 bits;
  asm("vcvtneps2bf16 %1, %0" : "=v"(bits) : "v"(value));
  return bits;
}
SEPCONV_INLINE FullBits16 NarrowNormal(Vec<float> first, Vec<float> second) {
  FullBits16 bits;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(bits) : "v"(first), "v"(second));
  return bits;
}
#else
SEPCONV_INLINE void AddDotOfPairs(Vec<float>& sum, Vec<float> a, Vec<float> b) {
  const Bits32 x = reinterpret_cast<Bits32>(a), y = reinterpret_cast<Bits32>(b);
  const Bits32 upper = Bits32{} + 0xffff0000u;
  sum += reinterpret_cast<Vec<float>>(x & upper) * reinterpret_cast<Vec<float>>(y & upper);
  sum += reinterpret_cast<Vec<float>>(x << 16) * reinterpret_cast<Vec<float>>(y << 16);
}
SEPCONV_PAIRS_INLINE Bits16 NarrowNormal(Vec<float> value) { return NarrowLanes<BFloat16>(value); }
SEPCONV_PAIRS_INLINE FullBits16 NarrowNormal(Vec<float> first, Vec<float> second) {
  const Bits16 halves[2] = {NarrowLanes<BFloat16>(first), NarrowLanes<BFloat16>(second)};
  FullBits16 bits;
  std::memcpy(&bits, halves, sizeof(bits));
  return bits;
}
SEPCONV_INLINE void Stream(BFloat16* to, FullBits16 value) {
  *reinterpret_cast<UnalignedFullBits16*>(to) = value;
}
#endif

// Vectors of the compute type from and to memory of the storage type.
SEPCONV_INLINE Vec<float> LoadStored(const float* from) { return Load(from); }
SEPCONV_INLINE Vec<double> LoadStored(const double* from) { return Load(from); }
template <typename S>
SEPCONV_INLINE Vec<float> LoadStored(const S* from) {
  return WidenLanes<S>(*reinterpret_cast<const UnalignedBits16*>(from));
}
SEPCONV_INLINE void StoreStored(float* to, Vec<float> value) { Store(to, value); }
SEPCONV_INLINE void StoreStored(double* to, Vec<double> value) { Store(to, value); }
template <typename S>
SEPCONV_INLINE void StoreStored(S* to, Vec<float> value) {
  *reinterpret_cast<UnalignedBits16*>(to) = NarrowLanes<S>(value);
}
SEPCONV_INLINE Vec<float> LoadStoredFirst(const float* from, int count) {
  return LoadFirst(from, count);
}
SEPCONV_INLINE Vec<double> LoadStoredFirst(const double* from, int count) {
  return LoadFirst(from, count);
}
template <typename S>
SEPCONV_INLINE Vec<float> LoadStoredFirst(const S* from, int count) {
  return WidenLanes<S>(LoadBitsFirst(from, count));
}
SEPCONV_INLINE void StoreStoredFirst(float* to, int count, Vec<float> value) {
  StoreFirst(to, count, value);
}
SEPCONV_INLINE void StoreStoredFirst(double* to, int count, Vec<double> value) {
  StoreFirst(to, count, value);
}
template <typename S>
SEPCONV_INLINE void StoreStoredFirst(S* to, int count, Vec<float> value) {
  StoreBitsFirst(to, count, NarrowLanes<S>(value));
}

// To the storage type and back.
template <typename S>
SEPCONV_INLINE Vec<ComputeType<S>> Rounded(Vec<ComputeType<S>> value) {
  if constexpr (std::is_same_v<S, ComputeType<S>>) {
    return value;
  } else {
    return WidenLanes<S>(NarrowLanes<S>(value));
  }
}

// Either a whole vector or its first lanes, decided at compile time.
template <bool kWhole, typename S>
SEPCONV_INLINE Vec<ComputeType<S>> LoadLanes(const S* from, int count) {
  if constexpr (kWhole) {
    return LoadStored(from);
  } else {
    return LoadStoredFirst(from, count);
  }
}
template <bool kWhole, typename T>
SEPCONV_INLINE void StoreLanes(T* to, int count, Vec<T> value) {
  if constexpr (kWhole) {
    Store(to, value);
  } else {
    StoreFirst(to, count, value);
  }
}
