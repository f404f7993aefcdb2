// Activations and their slopes on vectors. Compiled once per target, inside its region and
// namespace (see simd.h).
//
// Single precision: exp by range reduction to |r| <= ln(2)/2; tanh near 0, expm1 near 0 and the
// complementary error function by polynomials. The coefficients are our own Chebyshev fits: `python
// tools/fit_activations.py` prints them with their errors, all below half a unit in the last place
// of the quantity they approximate. Double precision: the C library, lane by lane; double is for
// gradient checks, not for speed.

using F = Vec<float>;

SEPCONV_INLINE F Exp(F x) {
  // Results below the smallest normal number flush to it, results above the largest become
  // infinite.
  const F high = Set(88.72284f), low = Set(-87.33654f);
  const F clamped = AtLeast(AtMost(x, high), low);
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const F magic = Set(12582912.0f);
  const F shifted = clamped * Set(1.44269504f) + magic;
  const F n = shifted - magic;
  const F r = (clamped - n * Set(0.693359375f)) - n * Set(-2.12194440e-4f);  // ln(2) in two parts
  F p = Set(0.001392625083f);
  p = p * r + Set(0.008363232884f);
  p = p * r + Set(0.04166655421f);
  p = p * r + Set(0.1666657667f);
  p = p * r + Set(0.5f);
  p = p * r * r + r + Set(1.0f);
  using I = typename VectorOf<float>::mask;
  // Two factors 2^(n/2), because n may be 128.
  const I whole = reinterpret_cast<I>(shifted) - reinterpret_cast<I>(magic);
  const I half = whole >> 1;
  const F scale_a = reinterpret_cast<F>((half + 127) << 23);
  const F scale_b = reinterpret_cast<F>((whole - half + 127) << 23);
  const F result = p * scale_a * scale_b;
  return Select(x > high, Set(__builtin_inff()), result);
}

SEPCONV_INLINE F Sigmoid(F x) { return Set(1.0f) / (Set(1.0f) + Exp(-x)); }

SEPCONV_INLINE F Abs(F x) { return Select(x < Set(0.0f), -x, x); }

SEPCONV_INLINE F Tanh(F x) {
  const F square = x * x;
  F p = Set(-0.006045165097f);
  p = p * square + Set(0.02096132911f);
  p = p * square + Set(-0.05384326318f);
  p = p * square + Set(0.1333271885f);
  p = p * square + Set(-0.3333332843f);
  const F near_zero = p * square * x + x;
  const F magnitude = Abs(x);
  const F far = Set(1.0f) - Set(2.0f) / (Exp(magnitude + magnitude) + Set(1.0f));
  return Select(magnitude < Set(0.625f), near_zero, Select(x < Set(0.0f), -far, far));
}

SEPCONV_INLINE F ExpMinusOneBelowZero(F x) {
  F p = Set(0.001164287033f);
  p = p * x + Set(0.008238221347f);
  p = p * x + Set(0.04164992996f);
  p = p * x + Set(0.1666656276f);
  p = p * x + Set(0.4999999896f);
  return Select(x > Set(-0.5f), p * x * x + x, Exp(x) - Set(1.0f));
}

// The standard normal distribution function, erfc(-x / sqrt(2)) / 2, with
// erfc(v) = t exp(-v^2) polynomial(t), t = 1 / (1 + v/2), for v >= 0.
SEPCONV_INLINE F NormalCdf(F x) {
  const F v = Abs(x) * Set(0.707106781f);
  const F t = Set(1.0f) / (Set(1.0f) + Set(0.5f) * v);
  F p = Set(0.03795032551f);
  p = p * t + Set(-0.2045616511f);
  p = p * t + Set(0.4180938966f);
  p = p * t + Set(-0.3467121499f);
  p = p * t + Set(0.03446830323f);
  p = p * t + Set(-0.001414983665f);
  p = p * t + Set(0.07089172186f);
  p = p * t + Set(0.1810285839f);
  p = p * t + Set(0.2459932007f);
  p = p * t + Set(0.2821707443f);
  p = p * t + Set(0.2820920117f);
  const F half_erfc = Set(0.5f) * t * p * Exp(-v * v);
  return Select(x > Set(0.0f), Set(1.0f) - half_erfc, half_erfc);
}

using D = Vec<double>;

template <typename Function>
SEPCONV_INLINE D PerLane(D x, Function function) {
  D result = x;
  for (int i = 0; i < kLanes<double>; ++i) result[i] = function(x[i]);
  return result;
}
inline double SigmoidOf(double x) { return 1.0 / (1.0 + std::exp(-x)); }
inline double NormalCdfOf(double x) { return 0.5 * std::erfc(-x * 0.70710678118654752440); }
inline double ExpOf(double x) { return std::exp(x); }
inline double ExpMinusOneOf(double x) { return std::expm1(x); }
inline double TanhOf(double x) { return std::tanh(x); }
SEPCONV_INLINE D Exp(D x) { return PerLane(x, ExpOf); }
SEPCONV_INLINE D Sigmoid(D x) { return PerLane(x, SigmoidOf); }
SEPCONV_INLINE D Tanh(D x) { return PerLane(x, TanhOf); }
SEPCONV_INLINE D ExpMinusOneBelowZero(D x) { return PerLane(AtMost(x, Set(0.0)), ExpMinusOneOf); }
SEPCONV_INLINE D NormalCdf(D x) { return PerLane(x, NormalCdfOf); }

// x/6 + 1/2, clamped.
template <typename T, typename V = Vec<T>>
SEPCONV_INLINE V HardSigmoid(V x) {
  return AtLeast(AtMost(x * Set(T(1.0 / 6.0)) + Set(T(0.5)), Set(T(1))), Set(T(0)));
}

template <typename T, Activation kActivation, typename V = Vec<T>>
SEPCONV_INLINE V Activate(V x) {
  const V zero = Set(T(0));
  if constexpr (kActivation == Activation::kRelu) return AtLeast(x, zero);
  if constexpr (kActivation == Activation::kRelu6) return AtMost(AtLeast(x, zero), Set(T(6)));
  if constexpr (kActivation == Activation::kLeakyRelu) return Select(x < zero, x * Set(T(0.2)), x);
  if constexpr (kActivation == Activation::kSigmoid) return Sigmoid(x);
  if constexpr (kActivation == Activation::kTanh) return Tanh(x);
  if constexpr (kActivation == Activation::kSilu) return x * Sigmoid(x);
  if constexpr (kActivation == Activation::kGelu) return x * NormalCdf(x);
  if constexpr (kActivation == Activation::kHardSigmoid) return HardSigmoid<T>(x);
  if constexpr (kActivation == Activation::kHardSilu) return x * HardSigmoid<T>(x);
  if constexpr (kActivation == Activation::kElu)
    return Select(x < zero, ExpMinusOneBelowZero(x), x);
  return x;
}

// Slope at the pre-activation z. At a kink: relu, relu6 and hard_sigmoid 0, leaky_relu and elu 1.
template <typename T, Activation kActivation, typename V = Vec<T>>
SEPCONV_INLINE V SlopeFromInput(V z) {
  const V zero = Set(T(0)), one = Set(T(1));
  if constexpr (kActivation == Activation::kRelu) return Select(z > zero, one, zero);
  if constexpr (kActivation == Activation::kRelu6)
    return Select(z > zero, Select(z < Set(T(6)), one, zero), zero);
  if constexpr (kActivation == Activation::kLeakyRelu) return Select(z < zero, Set(T(0.2)), one);
  if constexpr (kActivation == Activation::kSigmoid) {
    const V s = Sigmoid(z);
    return s * (one - s);
  }
  if constexpr (kActivation == Activation::kTanh) {
    const V t = Tanh(z);
    return one - t * t;
  }
  if constexpr (kActivation == Activation::kSilu) {
    const V s = Sigmoid(z);
    return s * (one + z * (one - s));
  }
  if constexpr (kActivation == Activation::kGelu) {
    // d/dz z cdf(z) = cdf(z) + z pdf(z), pdf(z) = exp(-z^2 / 2) / sqrt(2 pi)
    return NormalCdf(z) + z * Exp(z * z * Set(T(-0.5))) * Set(T(0.39894228040143267794));
  }
  if constexpr (kActivation == Activation::kHardSigmoid)
    return Select(z > Set(T(-3)), Select(z < Set(T(3)), Set(T(1.0 / 6.0)), zero), zero);
  if constexpr (kActivation == Activation::kHardSilu)
    return Select(z > Set(T(-3)), Select(z < Set(T(3)), z * Set(T(1.0 / 3.0)) + Set(T(0.5)), one),
                  zero);
  if constexpr (kActivation == Activation::kElu) return Select(z < zero, Exp(z), one);
  return one;
}

// Slope from the activation's output, for those of which it follows (SlopeFollowsFromOutput).
template <typename T, Activation kActivation, typename V = Vec<T>>
SEPCONV_INLINE V SlopeFromOutput(V y) {
  const V zero = Set(T(0)), one = Set(T(1));
  if constexpr (kActivation == Activation::kSigmoid) return y * (one - y);
  if constexpr (kActivation == Activation::kTanh) return one - y * y;
  if constexpr (kActivation == Activation::kHardSigmoid)
    return Select(y > zero, Select(y < one, Set(T(1.0 / 6.0)), zero), zero);
  if constexpr (kActivation == Activation::kElu) return Select(y < zero, y + one, one);
  return SlopeFromInput<T, kActivation>(
      y);  // relu, relu6, leaky_relu: the output has the sign and kinks of z
}
