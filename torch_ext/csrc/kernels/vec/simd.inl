// One vector type of TORCH_EXT_VEC_WIDTH floats and what the row kernels need of it. Included inside a namespace
// and a target region by each instance (see ../neon/vec_neon.cpp); never included on its own.
//
// Arithmetic is written with the compilers' vector extensions (GCC and Clang). Where those do not reach one
// instruction, TORCH_EXT_VEC_NEON / _NEON_BF16 / _AVX2 / _AVX512 / _AVX512_BF16 select an intrinsic.

constexpr size_t kWidth = TORCH_EXT_VEC_WIDTH;

typedef float vf __attribute__((vector_size(4 * TORCH_EXT_VEC_WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * TORCH_EXT_VEC_WIDTH)));
typedef uint32_t vu __attribute__((vector_size(4 * TORCH_EXT_VEC_WIDTH)));
typedef uint16_t vh __attribute__((vector_size(2 * TORCH_EXT_VEC_WIDTH)));

#define TORCH_EXT_INLINE static inline __attribute__((always_inline))

TORCH_EXT_INLINE vf splat(float x) {
  vf v = {};
  return v + x;
}

TORCH_EXT_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

TORCH_EXT_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

TORCH_EXT_INLINE vi as_int(vf v) { return (vi)v; }
TORCH_EXT_INLINE vf as_float(vi v) { return (vf)v; }

/// max and min that give `x` when `x` is NaN: `bound` comes first.
TORCH_EXT_INLINE vf max_nan(vf bound, vf x) {
#if defined(TORCH_EXT_VEC_NEON)
  return (vf)vmaxq_f32((float32x4_t)bound, (float32x4_t)x);
#elif defined(TORCH_EXT_VEC_AVX512)
  return (vf)_mm512_maskz_max_ps(0xffff, (__m512)bound, (__m512)x);
#elif defined(TORCH_EXT_VEC_AVX2)
  return (vf)_mm256_max_ps((__m256)bound, (__m256)x);
#else
  return (bound > x) ? bound : x;
#endif
}

TORCH_EXT_INLINE vf min_nan(vf bound, vf x) {
#if defined(TORCH_EXT_VEC_NEON)
  return (vf)vminq_f32((float32x4_t)bound, (float32x4_t)x);
#elif defined(TORCH_EXT_VEC_AVX512)
  return (vf)_mm512_maskz_min_ps(0xffff, (__m512)bound, (__m512)x);
#elif defined(TORCH_EXT_VEC_AVX2)
  return (vf)_mm256_min_ps((__m256)bound, (__m256)x);
#else
  return (bound < x) ? bound : x;
#endif
}

/// The larger; NaN if either is.
TORCH_EXT_INLINE vf max_or_nan(vf a, vf b) {
  const vf m = max_nan(a, b);
  return (a == a) ? m : a;
}

/// The words of bf16 elements, for intrinsics that take them.
TORCH_EXT_INLINE const uint16_t* as_words(const bf16* p) { return reinterpret_cast<const uint16_t*>(p); }
TORCH_EXT_INLINE uint16_t* as_words(bf16* p) { return reinterpret_cast<uint16_t*>(p); }

TORCH_EXT_INLINE vf load_bf16(const bf16* p) {
#if defined(TORCH_EXT_VEC_NEON)
  return (vf)vshll_n_u16(vld1_u16(as_words(p)), 16);
#elif defined(TORCH_EXT_VEC_AVX512)
  // GCC 12 converts and joins halves otherwise.
  __m256i h;
  __builtin_memcpy(&h, p, sizeof h);
  return (vf)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, h), 16);
#else
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}

/// Rounds to nearest even; NaN stays NaN. AVX-512's instruction takes subnormal numbers for zero.
TORCH_EXT_INLINE void store_bf16(bf16* p, vf v) {
#if defined(TORCH_EXT_VEC_NEON_BF16)
  const bfloat16x4_t h = vcvt_bf16_f32((float32x4_t)v);
  __builtin_memcpy(p, &h, sizeof h);
#elif defined(TORCH_EXT_VEC_AVX512_BF16)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  __builtin_memcpy(p, &h, sizeof h);
#else
  const vu u = (vu)v;
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu quiet = (u >> 16) | 0x40u;
  const vu is_number = (vu)(v == v);
  const vu words = (rounded & is_number) | (quiet & ~is_number);
#if defined(TORCH_EXT_VEC_AVX512)
  const __m256i h = _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)words);
#else
  const vh h = __builtin_convertvector(words, vh);
#endif
  __builtin_memcpy(p, &h, sizeof h);
#endif
}

#if !defined(TORCH_EXT_VEC_NEON)
/// Neighbouring groups of kStep lanes exchanged.
template <size_t kStep>
TORCH_EXT_INLINE vf exchange(vf v) {
#if TORCH_EXT_VEC_WIDTH == 16
  if constexpr (kStep == 8) return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  if constexpr (kStep == 4) return __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  if constexpr (kStep == 2) return __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  if constexpr (kStep == 1) return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif TORCH_EXT_VEC_WIDTH == 8
  if constexpr (kStep == 4) return __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  if constexpr (kStep == 2) return __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  if constexpr (kStep == 1) return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
#else
  if constexpr (kStep == 2) return __builtin_shufflevector(v, v, 2, 3, 0, 1);
  if constexpr (kStep == 1) return __builtin_shufflevector(v, v, 1, 0, 3, 2);
#endif
  return v;
}
#endif

TORCH_EXT_INLINE float sum_lanes(vf v) {
#if defined(TORCH_EXT_VEC_NEON)
  return vaddvq_f32((float32x4_t)v);
#else
  if constexpr (kWidth > 8) v = v + exchange<8>(v);
  if constexpr (kWidth > 4) v = v + exchange<4>(v);
  v = v + exchange<2>(v);
  return (v + exchange<1>(v))[0];
#endif
}

TORCH_EXT_INLINE float max_lanes(vf v) {
#if defined(TORCH_EXT_VEC_NEON)
  return vmaxvq_f32((float32x4_t)v);
#else
  if constexpr (kWidth > 8) v = max_nan(v, exchange<8>(v));
  if constexpr (kWidth > 4) v = max_nan(v, exchange<4>(v));
  v = max_nan(v, exchange<2>(v));
  return max_nan(v, exchange<1>(v))[0];
#endif
}

/// v with minus infinity in the lanes from n on. Written as a choice, not as stores before the load: a load right behind
/// narrower stores to the same place waits for them.
TORCH_EXT_INLINE vf mask_lanes(vf v, size_t n) {
  vi lane;
  for (size_t i = 0; i < kWidth; ++i) lane[i] = static_cast<int32_t>(i);
  const vi inside = lane < static_cast<int32_t>(n < kWidth ? n : kWidth);
  return inside ? v : splat(-__builtin_inff());
}

/// Loads and stores of type T (float or bf16), whole vectors and the first n < kWidth elements.
template <typename T>
struct Io;

template <>
struct Io<float> {
  TORCH_EXT_INLINE vf get(const float* p) { return load(p); }
  TORCH_EXT_INLINE void put(float* p, vf v) { store(p, v); }
};

template <>
struct Io<bf16> {
  TORCH_EXT_INLINE vf get(const bf16* p) { return load_bf16(p); }
  TORCH_EXT_INLINE void put(bf16* p, vf v) { store_bf16(p, v); }
};

/// Two vectors to one place: one store where a register holds both.
template <typename T>
TORCH_EXT_INLINE void put_two(T* p, vf a, vf b) {
#if defined(TORCH_EXT_VEC_NEON_BF16)
  if constexpr (std::is_same_v<T, bf16>) {
    const bfloat16x8_t low = vcvtq_low_bf16_f32((float32x4_t)a);
    return vst1q_bf16(reinterpret_cast<bfloat16_t*>(p), vcvtq_high_bf16_f32(low, (float32x4_t)b));
  }
#endif
#if defined(TORCH_EXT_VEC_AVX2)
  // NaN is looked for in both at once, and both are packed by one instruction.
  if constexpr (std::is_same_v<T, bf16>) {
    const __m256 unordered = _mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q);
    if (__builtin_expect(_mm256_testz_ps(unordered, unordered), 1)) {
      const vu x = (vu)a, y = (vu)b;
      const vu low = (x + 0x7fffu + ((x >> 16) & 1u)) >> 16, high = (y + 0x7fffu + ((y >> 16) & 1u)) >> 16;
      // Within halves of 128 bits.
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)low, (__m256i)high), 0xd8);
      __builtin_memcpy(p, &packed, sizeof packed);
      return;
    }
  }
#endif
  Io<T>::put(p, a);
  Io<T>::put(p + kWidth, b);
}

template <typename T>
TORCH_EXT_INLINE vf get_n(const T* p, size_t n) {
  T lanes[kWidth] = {};
  __builtin_memcpy(lanes, p, n * sizeof(T));
  return Io<T>::get(lanes);
}

template <typename T>
TORCH_EXT_INLINE void put_n(T* p, vf v, size_t n) {
  T lanes[kWidth];
  Io<T>::put(lanes, v);
  __builtin_memcpy(p, lanes, n * sizeof(T));
}

/// exp(x), relative error below 3e-7 (about 2 ulp) for x in [-87, 88]; below -87 it gives exp(-87), above 88 exp(88).
/// 2^n * p(r), n = round(x / ln 2), |r| <= ln(2) / 2, with p the Taylor polynomial of degree 7 (its remainder,
/// r^8 / 8!, is 5e-9 there).
TORCH_EXT_INLINE vf exp_approx(vf x) {
  x = min_nan(splat(88.0f), max_nan(splat(-87.0f), x));
  // 1.5 * 2^23 + 127: adding it rounds to an integer, and leaves n with the bias of an exponent in the low bits.
  const vf shifter = splat(12583039.0f);
  const vf shifted = x * 1.44269504f + shifter;
  const vf n = shifted - shifter;
  const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts, the first exact in products
  vf p = splat(1.0f / 5040.0f);
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // A product, not a sum of bits, so that NaN stays NaN whatever its low bits are.
  return p * as_float(as_int(shifted) << 23);
}

/// 2^t for t <= 0, where the result is rounded to bf16 afterwards: relative error below 1e-4, a twentieth of that
/// rounding; below -126 it gives 2^-126. 2^n * p(r), n = round(t), |r| <= 1/2, with p of degree 3 (least-maximum fit of
/// the relative error, 7.5e-5).
TORCH_EXT_INLINE vf exp2_to_bf16(vf t) {
  t = max_nan(splat(-126.0f), t);
  const vf shifter = splat(12583039.0f);  // as in exp_approx
  const vf shifted = t + shifter;
  const vf r = t - (shifted - shifter);
  vf p = splat(5.517166802e-02f);
  p = p * r + 2.426111221e-01f;
  p = p * r + 6.932609857e-01f;
  p = p * r + 9.999280735e-01f;
  return p * as_float(as_int(shifted) << 23);
}

/// x * Phi(x), the exact (erf) GELU: absolute error below 2e-6, relative to |x| below 5e-7 for x > 1.
/// Phi(x) = 1/2 + x P(x^2) / Q(x^2) with P of degree 4 and Q of degree 5, a least-maximum fit of erf(x / sqrt 2) / x
/// on [0, 5.2] (error of the fit 1.2e-7); outside x is clamped, where Phi is 0 or 1 to single precision.
TORCH_EXT_INLINE vf gelu(vf x) {
  const vf low = max_nan(splat(-5.2f), x);
  const vf c = min_nan(splat(5.2f), low);
  const vf t = c * c;
  vf p = splat(0.5f * 1.168135013191e-05f);
  p = p * t + 0.5f * 6.285323909469e-04f;
  p = p * t + 0.5f * 1.103750188000e-02f;
  p = p * t + 0.5f * 9.918745812195e-02f;
  p = p * t + 0.5f * 7.978838346587e-01f;
  vf q = splat(5.019034947416e-07f);
  q = q * t + 1.127418485696e-04f;
  q = q * t + 2.703763733552e-03f;
  q = q * t + 3.733998923882e-02f;
  q = q * t + 2.909738091019e-01f;
  q = q * t + 1.0f;
  return low * ((c * p) / q + 0.5f);
}

/// The same where the result is rounded to bf16: error below 5e-5, absolute for x < 1, relative above. Phi(x) = 1/2 + x P(x^2)
/// with P of degree 8, a least-maximum fit of x Phi(x) on [-4.25, 4.25]; outside x is clamped. No division.
TORCH_EXT_INLINE vf gelu_to_bf16(vf x) {
  const vf low = max_nan(splat(-4.25f), x);
  const vf c = min_nan(splat(4.25f), low);
  const vf t = c * c;
#if defined(TORCH_EXT_VEC_NEON)
  // FMLA overwrites what it adds to, so that each step of Horner's takes a copy of a constant: pairs of terms take half of
  // them.
  const vf squared = t * t;
  vf p = splat(4.547075141e-11f);
  p = p * squared + (splat(1.986159887e-07f) - t * 4.515306039e-09f);
  p = p * squared + (splat(8.848916424e-05f) - t * 5.147515820e-06f);
  p = p * squared + (splat(9.718779330e-03f) - t * 1.079078130e-03f);
  p = p * squared + (splat(3.988192195e-01f) - t * 6.619028189e-02f);
#else
  vf p = splat(4.547075141e-11f);
  p = p * t - 4.515306039e-09f;
  p = p * t + 1.986159887e-07f;
  p = p * t - 5.147515820e-06f;
  p = p * t + 8.848916424e-05f;
  p = p * t - 1.079078130e-03f;
  p = p * t + 9.718779330e-03f;
  p = p * t - 6.619028189e-02f;
  p = p * t + 3.988192195e-01f;
#endif
  return low * (c * p + 0.5f);
}

#if defined(TORCH_EXT_VEC_AVX2)
/// The same of several vectors, step by step for all of them: one after the other they leave little for the CPU to do while
/// it waits, since its registers hold the intermediate results of two or three.
template <size_t kCount>
TORCH_EXT_INLINE void gelu_to_bf16(vf (&x)[kCount]) {
  constexpr float kTerms[] = {4.547075141e-11f,  -4.515306039e-09f, 1.986159887e-07f,
                              -5.147515820e-06f, 8.848916424e-05f,  -1.079078130e-03f,
                              9.718779330e-03f,  -6.619028189e-02f, 3.988192195e-01f};
  vf c[kCount], t[kCount], p[kCount];
#pragma GCC unroll 4
  for (size_t v = 0; v < kCount; ++v) {
    c[v] = min_nan(splat(4.25f), max_nan(splat(-4.25f), x[v]));
    t[v] = c[v] * c[v];
    p[v] = splat(kTerms[0]);
  }
#pragma GCC unroll 8
  for (size_t i = 1; i < sizeof kTerms / sizeof kTerms[0]; ++i) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kCount; ++v) p[v] = p[v] * t[v] + kTerms[i];
  }
#pragma GCC unroll 4
  for (size_t v = 0; v < kCount; ++v) x[v] = max_nan(splat(-4.25f), x[v]) * (c[v] * p[v] + 0.5f);
}
#endif

/// x / (1 + exp(-x)). Relative error below 1e-6; below -87 it gives silu(-87), which is -1.4e-36.
TORCH_EXT_INLINE vf silu(vf x) {
  const vf low = max_nan(splat(-87.0f), x);
  return low / (exp_approx(-low) + 1.0f);
}

/// x / (1 + exp(-1.702 x)), the GELU of CLIP. Relative error below 1e-6 + 3e-7 |x|, since the product is rounded before exp;
/// below -51 it gives quick_gelu(-51).
TORCH_EXT_INLINE vf quick_gelu(vf x) {
  const vf low = max_nan(splat(-51.0f), x);
  return low / (exp_approx(low * -1.702f) + 1.0f);
}

/// 1 / (1 + exp(-x)). Relative error below 1e-6; below -87 it gives sigmoid(-87), which is 1.6e-38.
TORCH_EXT_INLINE vf sigmoid(vf x) { return 1.0f / (exp_approx(-x) + 1.0f); }

/// x, and below 0 a hundredth of it.
TORCH_EXT_INLINE vf leaky_relu(vf x) { return max_nan(x * 0.01f, x); }

/// GELU in its tanh form: x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3))). Absolute error below 5e-7, relative below
/// 5e-7 for x > 1.
TORCH_EXT_INLINE vf gelu_tanh(vf x) {
  const vf low = max_nan(splat(-12.0f), x);  // exp(-2u) is above 1e40 there: the result is 0
  const vf u = low * (low * low * 0.0713548163f + 1.5957691216f);
  return low / (exp_approx(-u) + 1.0f);
}

/// tanh(x): 1 - 2 / (exp(2x) + 1); near zero, where that cancels, its odd Taylor polynomial. Relative error below 2e-6.
TORCH_EXT_INLINE vf tanh_approx(vf x) {
  const vf c = min_nan(splat(10.0f), max_nan(splat(-10.0f), x));
  const vf far = 1.0f - 2.0f / (exp_approx(c + c) + 1.0f);
  const vf t = c * c;
  vf p = splat(-1382.0f / 155925.0f);
  p = p * t + 62.0f / 2835.0f;
  p = p * t - 17.0f / 315.0f;
  p = p * t + 2.0f / 15.0f;
  p = p * t - 1.0f / 3.0f;
  const vf near = c * (p * t) + c;
  const vi is_near = (vi)(t < splat(0.25f * 0.25f));
  return as_float((as_int(near) & is_near) | (as_int(far) & ~is_near));
}
