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

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(SEPCONV_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(SEPCONV_VECTOR_BYTES), aligned(4), may_alias));
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
template <typename T>
SEPCONV_INLINE Vec<T> LoadFirst(const T* from, int count) {
  Vec<T> value = {};
  for (int i = 0; i < count; ++i) value[i] = from[i];
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

// The lanes of both in turn, a0 b0 a1 b1 ...: the lower halves of a and b, or the upper ones.
template <bool kUpper, typename T, size_t... I>
SEPCONV_INLINE Vec<T> InterleaveLanes(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
  constexpr int kL = kLanes<T>, kFirst = kUpper ? kL / 2 : 0;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (kFirst + static_cast<int>(I) / 2 + (I % 2) * kL)...);
#else
  // What GCC before 12 knows.
  using Mask = typename VectorOf<T>::mask;
  return __builtin_shuffle(a, b, Mask{(kFirst + static_cast<int>(I) / 2 + (I % 2) * kL)...});
#endif
}
template <bool kUpper, typename T>
SEPCONV_INLINE Vec<T> Interleave(Vec<T> a, Vec<T> b) {
  return InterleaveLanes<kUpper, T>(a, b, std::make_index_sequence<kLanes<T>>());
}

// Either a whole vector or its first lanes, decided at compile time.
template <bool kWhole, typename T>
SEPCONV_INLINE Vec<T> LoadLanes(const T* from, int count) {
  if constexpr (kWhole) {
    return Load(from);
  } else {
    return LoadFirst(from, count);
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
