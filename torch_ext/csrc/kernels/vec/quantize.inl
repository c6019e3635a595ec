// Rows quantized to s8 while they are packed, for the kernels of s8. Needs simd.inl.
//
// A row x is stored as q = round(x / scale) with scale = max |x| / 127, so that -127 <= q <= 127 and no value clips; a
// weight's column in the same way, once. The product is exact in s32 for k up to (2^31 - 1) / 127^2 = 133,144. Up to four
// elements of a row are kept out if no others are above half of max |x|: see Outlier in gemm_kernel.h.
//
// Layout s8p<R>x<kr>, used by blocks (R = mr) and panels (R = nr): for every group of kr products, the rows one after
// the other. Shown for R = 12, kr = 8:
//
//   group 0: (0,0..7) (1,0..7) ... (11,0..7)       8 * R bytes
//   group 1: (0,8..15) (1,8..15) ...
//   R scales, f32
//   blocks only: the outliers
//
//   element (i, p) lies at  ((p / kr) * R + i) * kr + p % kr
//
// Worked example: R = 12, kr = 8, row 5, product 10 -> ((1 * 12) + 5) * 8 + 2 = 138.

typedef uint16_t vhh __attribute__((vector_size(4 * TORCH_EXT_VEC_WIDTH)));
typedef int8_t vb __attribute__((vector_size(TORCH_EXT_VEC_WIDTH)));

TORCH_EXT_INLINE vhh magnitudes(const bf16* s) {
  vhh bits;
  __builtin_memcpy(&bits, s, sizeof bits);
  return bits & 0x7fff;
}

TORCH_EXT_INLINE vhh larger(vhh a, vhh b) {
#if defined(TORCH_EXT_VEC_NEON)
  return (vhh)vmaxq_u16((uint16x8_t)a, (uint16x8_t)b);
#else
  return (b > a) ? b : a;
#endif
}

TORCH_EXT_INLINE uint32_t largest_lane(vhh m) {
#if defined(TORCH_EXT_VEC_NEON)
  return vmaxvq_u16((uint16x8_t)m);
#elif defined(TORCH_EXT_VEC_AVX2) || defined(TORCH_EXT_VEC_AVX512)
#if defined(TORCH_EXT_VEC_AVX512)
  const __m256i half = _mm256_max_epu16(_mm512_maskz_extracti64x4_epi64(0xff, (__m512i)m, 0),
                                        _mm512_maskz_extracti64x4_epi64(0xff, (__m512i)m, 1));
#else
  const __m256i half = (__m256i)m;
#endif
  const __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  // SSE4.1 has the least of eight.
  return 0xffffu ^ static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(~eight)));
#else
  uint16_t lanes[2 * kWidth], largest = 0;
  __builtin_memcpy(lanes, &m, sizeof m);
  for (size_t i = 0; i < 2 * kWidth; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
#endif
}

TORCH_EXT_INLINE vi magnitudes(const float* s) { return as_int(load(s)) & 0x7fffffff; }

TORCH_EXT_INLINE vi larger(vi a, vi b) { return (b > a) ? b : a; }

TORCH_EXT_INLINE uint32_t largest_lane(vi m) {
#if defined(TORCH_EXT_VEC_NEON)
  return static_cast<uint32_t>(vmaxvq_s32((int32x4_t)m));
#else
  int32_t lanes[kWidth], largest = 0;
  __builtin_memcpy(lanes, &m, sizeof m);
  for (size_t i = 0; i < kWidth; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return static_cast<uint32_t>(largest);
#endif
}

/// Magnitudes at s, of which `left` are the row's, and 0 past them.
template <typename Src>
TORCH_EXT_INLINE auto magnitudes_n(const Src* s, size_t left) {
  constexpr size_t kLanes = sizeof(decltype(magnitudes(s))) / sizeof(Src);
  if (left >= kLanes) return magnitudes(s);
  Src end[kLanes] = {};
  __builtin_memcpy(end, s, left * sizeof(Src));
  return magnitudes(end);
}

/// The float whose magnitude has these upper bits.
template <typename Src>
TORCH_EXT_INLINE float float_of(uint32_t magnitude) {
  magnitude <<= 32 - 8 * sizeof(Src);
  float result;
  __builtin_memcpy(&result, &magnitude, sizeof result);
  return result;
}

/// Of lanes that are all ones or 0: as many bits each as the result has room for.
template <typename V>
TORCH_EXT_INLINE uint64_t lane_bits(V mask) {
#if defined(TORCH_EXT_VEC_AVX512)
  return _mm512_movepi8_mask((__m512i)mask);
#elif defined(TORCH_EXT_VEC_AVX2)
  return static_cast<uint32_t>(_mm256_movemask_epi8((__m256i)mask));
#elif defined(TORCH_EXT_VEC_NEON)
  return vget_lane_u64(vreinterpret_u64_u8(vshrn_n_u16((uint16x8_t)mask, 4)), 0);
#else
  uint8_t bytes[sizeof(V)];
  __builtin_memcpy(bytes, &mask, sizeof mask);
  uint64_t bits = 0;
  for (size_t i = 0; i < sizeof(V); ++i) bits |= static_cast<uint64_t>(bytes[i] & 1) << i;
  return bits;
#endif
}
#if defined(TORCH_EXT_VEC_NEON)
constexpr size_t kBitsOfByte = 4;
#else
constexpr size_t kBitsOfByte = 1;
#endif

template <typename Src>
struct LaneBits {
  static constexpr size_t kBits = sizeof(Src) * kBitsOfByte;

  static size_t count(uint64_t bits) { return static_cast<size_t>(__builtin_popcountll(bits)) / kBits; }
  static size_t first(uint64_t bits) { return static_cast<size_t>(__builtin_ctzll(bits)) / kBits; }
  static uint64_t without(uint64_t bits, size_t lane) { return bits & ~(((uint64_t{1} << kBits) - 1) << lane * kBits); }
};

/// The largest magnitude of a row, NaN if it holds one: without their sign, floats are ordered like integers, and NaN
/// comes after infinity.
struct LargestMagnitude {
  float value;
  bool few;  ///< whether the row may have outliers; most others are found not to without another look at them
};

template <typename Src>
static LargestMagnitude largest_magnitude(const Src* s, size_t k) {
  using V = decltype(magnitudes(s));
  using Bits = std::remove_reference_t<decltype(V{}[0])>;
  constexpr size_t kLanes = sizeof(V) / sizeof(Src);
  V first = {}, second = {};
  size_t p = 0;
#pragma GCC unroll 4
  for (; p + 2 * kLanes <= k; p += 2 * kLanes) {
    first = larger(first, magnitudes(s + p));
    second = larger(second, magnitudes(s + p + kLanes));
  }
  if (p < k) first = larger(first, magnitudes_n(s + p, k - p));
  if (p + kLanes < k) second = larger(second, magnitudes_n(s + p + kLanes, k - p - kLanes));
  const uint32_t bits = largest_lane(larger(first, second));
  const float value = float_of<Src>(bits);
  // Rows that are not finite have none, nor have those that are almost 0.
  if (!(value >= 1e-30f && value <= 3.4028234e38f)) return {value, false};
  // Half of it has an exponent less by one.
  const auto half = static_cast<Bits>(bits - (1u << (8 * sizeof(Src) - 9)));
  const size_t above = LaneBits<Src>::count(lane_bits(first > half)) + LaneBits<Src>::count(lane_bits(second > half));
  return {value, above <= kMaxRowOutliers};
}

/// Elements of one row that are kept out of its quantization, and the largest magnitude of the others.
struct RowOutliers {
  size_t count = 0;
  uint32_t at[kMaxRowOutliers];
  float rest;
};

/// Those of a row with this largest magnitude; `count` is 0 if more than kMaxRowOutliers are above half of it.
template <typename Src>
__attribute__((noinline)) static RowOutliers find_outliers(const Src* s, size_t k, float largest) {
  using V = decltype(magnitudes(s));
  using Bits = std::remove_reference_t<decltype(V{}[0])>;
  constexpr size_t kLanes = sizeof(V) / sizeof(Src);
  uint32_t bits;
  __builtin_memcpy(&bits, &largest, sizeof bits);
  const auto half = static_cast<Bits>((bits >> (32 - 8 * sizeof(Src))) - (1u << (8 * sizeof(Src) - 9)));
  RowOutliers found;
  V rest = {};
  size_t p = 0;
  while (p < k) {
    // Past vectors without any, four at a time.
    for (; p + 4 * kLanes <= k; p += 4 * kLanes) {
      const V four = larger(larger(magnitudes(s + p), magnitudes(s + p + kLanes)),
                            larger(magnitudes(s + p + 2 * kLanes), magnitudes(s + p + 3 * kLanes)));
      if (lane_bits(four > half)) break;
      rest = larger(rest, four);
    }
    for (const size_t end = p + 4 * kLanes; p < k && p < end; p += kLanes) {
      V v = magnitudes_n(s + p, k - p);
      const auto above = v > half;
      for (uint64_t lanes = lane_bits(above); lanes;) {
        if (found.count == kMaxRowOutliers) return {};
        const size_t lane = LaneBits<Src>::first(lanes);
        found.at[found.count++] = static_cast<uint32_t>(p + lane);
        lanes = LaneBits<Src>::without(lanes, lane);
      }
      rest = larger(rest, above ? V{} : v);
    }
  }
  found.rest = float_of<Src>(largest_lane(rest));
  return found;
}

/// The outliers of a block while its rows are packed.
class BlockOutliers {
 public:
  explicit BlockOutliers(void* at) : count_(static_cast<uint32_t*>(at)), next_(reinterpret_cast<Outlier*>(count_ + 1)) {
    *count_ = 0;
  }

  /// Adds those of a row; sets the largest magnitude to that of what is left of it.
  template <typename Src>
  RowOutliers take(size_t row, const Src* s, size_t k, LargestMagnitude& largest) {
    if (!largest.few) return {};
    const RowOutliers found = find_outliers(s, k, largest.value);
    for (size_t i = 0; i < found.count; ++i) {
      *next_++ = {static_cast<uint32_t>(row), found.at[i], get_n(s + found.at[i], 1)[0]};
    }
    *count_ += static_cast<uint32_t>(found.count);
    if (found.count) largest.value = found.rest;
    return found;
  }

 private:
  uint32_t* count_;
  Outlier* next_;
};

/// Product p of each column of a panel, in fp32.
template <size_t kNr, size_t (*kPlace)(size_t j, size_t p)>
__attribute__((noinline)) static void dequantize_column(const int8_t* products, size_t p, const float* scales,
                                                        float* column) {
#if defined(TORCH_EXT_VEC_NEON)
  if constexpr (kNr == 12 && kPlace(1, 0) == 8) {
    // The 96 bytes of eight products of all columns are two tables.
    const int8_t* const group = products + kPlace(0, p / 8 * 8);
    const uint8x16_t index = vdupq_n_u8(static_cast<uint8_t>(p % 8)) +
                             (uint8x16_t){0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 96, 96, 96};
    const int8x16_t q = vqtbx2q_s8(vqtbl4q_s8(vld1q_s8_x4(group), index), vld1q_s8_x2(group + 64), index - 64);
    const int16x8_t low = vmovl_s8(vget_low_s8(q)), high = vmovl_high_s8(q);
    store(column, (vf)vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))) * load(scales));
    store(column + 4, (vf)vcvtq_f32_s32(vmovl_high_s16(low)) * load(scales + 4));
    store(column + 8, (vf)vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))) * load(scales + 8));
    return;
  }
#elif defined(TORCH_EXT_VEC_AVX2)
  if constexpr (kPlace(1, 0) == 2 && kPlace(8, 0) == 32) {
    // Eight columns' are every other byte of 16: the lower or the upper ones of words.
    const size_t place = kPlace(0, p);
    const __m128i left = _mm_cvtsi32_si128(place % 2 ? 0 : 8);
#pragma GCC unroll 4
    for (size_t j = 0; j < kNr; j += kWidth) {
      const int8_t* const words = products + place / 2 * 2 + j / kWidth * 32;
      const __m128i upper = _mm_sll_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words)), left);
      const vi whole = (vi)_mm256_cvtepi16_epi32(_mm_srai_epi16(upper, 8));
      store(column + j, __builtin_convertvector(whole, vf) * load(scales + j));
    }
    return;
  }
#endif
  int32_t q[kNr];
#pragma GCC unroll 32
  for (size_t j = 0; j < kNr; ++j) q[j] = products[kPlace(j, p)];
#pragma GCC unroll 8
  for (size_t j = 0; j < kNr; j += kWidth) {
    vi whole;
    __builtin_memcpy(&whole, q + j, sizeof whole);
    store(column + j, __builtin_convertvector(whole, vf) * load(scales + j));
  }
}

/// AddOutliersFn of a family with panels of kNr columns, whose product p of column j lies at kPlace(j, p).
template <size_t kNr, size_t (*kPlace)(size_t j, size_t p)>
static void add_outlier_products(const Outlier* outliers, size_t count, size_t panel, const void* products,
                                 const float* scales, OutlierColumns& kept, float* tile) {
  for (const Outlier* outlier = outliers; outlier != outliers + count; ++outlier) {
    const size_t slot = outlier->p % OutlierColumns::kKept;
    const uint64_t key = uint64_t{panel} << 32 | outlier->p;
    float* const column = kept.columns[slot];
    if (kept.keys[slot] != key) {
      kept.keys[slot] = key;
      dequantize_column<kNr, kPlace>(static_cast<const int8_t*>(products), outlier->p, scales, column);
    }
    float* const row = tile + outlier->row * kNr;
    vf sums[kNr / kWidth];
#pragma GCC unroll 8
    for (size_t j = 0; j < kNr; j += kWidth) sums[j / kWidth] = load(row + j) + outlier->value * load(column + j);
#pragma GCC unroll 8
    for (size_t j = 0; j < kNr; j += kWidth) store(row + j, sums[j / kWidth]);
  }
}

/// Where products lie in layout s8p<kNr>x<kGroup>.
template <size_t kNr, size_t kGroup>
constexpr size_t place_in_groups(size_t j, size_t p) {
  return (p / kGroup * kNr + j) * kGroup + p % kGroup;
}

struct RowScale {
  float scale, inverse;
};

/// Of a row with this largest magnitude. One whose magnitudes have no reciprocal (below 3e-37) counts as zero. The
/// reciprocal of infinity is 0.
TORCH_EXT_INLINE RowScale row_scale(float largest) {
  return {largest * (1.0f / 127.0f), largest < 4e-37f ? 0.0f : 127.0f / largest};
}

// Elements quantized at a time, and the bytes of their quantized values in order.
#if defined(TORCH_EXT_VEC_NEON)
constexpr size_t kQuantized = 16;
typedef int8x16_t Quantized;

TORCH_EXT_INLINE int32x4_t quantize_four(vf v, float inverse) { return vcvtnq_s32_f32((float32x4_t)(v * inverse)); }

TORCH_EXT_INLINE Quantized narrow(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d) {
  const int16x8_t low = vuzp1q_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b));
  const int16x8_t high = vuzp1q_s16(vreinterpretq_s16_s32(c), vreinterpretq_s16_s32(d));
  return vuzp1q_s8(vreinterpretq_s8_s16(low), vreinterpretq_s8_s16(high));
}

TORCH_EXT_INLINE Quantized quantize(const float* s, float inverse) {
  return narrow(quantize_four(load(s), inverse), quantize_four(load(s + 4), inverse),
                quantize_four(load(s + 8), inverse), quantize_four(load(s + 12), inverse));
}

TORCH_EXT_INLINE Quantized quantize(const bf16* s, float inverse) {
  const uint16x8_t a = vld1q_u16(as_words(s)), b = vld1q_u16(as_words(s + 8));
  return narrow(quantize_four((vf)vshll_n_u16(vget_low_u16(a), 16), inverse),
                quantize_four((vf)vshll_high_n_u16(a, 16), inverse),
                quantize_four((vf)vshll_n_u16(vget_low_u16(b), 16), inverse),
                quantize_four((vf)vshll_high_n_u16(b, 16), inverse));
}
#else
constexpr size_t kQuantized = kWidth;
typedef vb Quantized;

template <typename Src>
TORCH_EXT_INLINE Quantized quantize(const Src* s, float inverse) {
  // 1.5 * 2^23: adding it rounds to an integer, whose low byte is the low byte of the sum.
  const vi sums = as_int(Io<Src>::get(s) * inverse + 12582912.0f);
  // GCC 12 narrows to bytes one by one.
#if defined(TORCH_EXT_VEC_AVX512)
  return (vb)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)sums);
#elif defined(TORCH_EXT_VEC_AVX2)
  const __m256i low_bytes = _mm256_shuffle_epi8((__m256i)sums, _mm256_set1_epi32(0x0c080400));
  const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(low_bytes), _mm256_extracti128_si256(low_bytes, 1));
  return (vb)_mm_cvtsi128_si64(both);
#else
  return __builtin_convertvector(sums, vb);
#endif
}
#endif

/// Stores groups of kGroup bytes, `stride` bytes apart.
template <size_t kGroup>
TORCH_EXT_INLINE void store_groups(const Quantized& q, size_t groups, size_t stride, uint8_t flip, int8_t* d) {
  int8_t bytes[kQuantized];
  __builtin_memcpy(bytes, &q, sizeof bytes);
  if (flip) {
    for (size_t i = 0; i < kQuantized; ++i) bytes[i] = static_cast<int8_t>(bytes[i] ^ flip);
  }
  for (size_t g = 0; g < groups; ++g) __builtin_memcpy(d + g * stride, bytes + g * kGroup, kGroup);
}

#if defined(TORCH_EXT_VEC_NEON)
/// Two whole groups of eight; returns where the next one comes. GCC 12 does not know stores that add a register.
TORCH_EXT_INLINE int8_t* store_two_groups(int8x16_t q, size_t stride, int8_t* d) {
  __asm__(
      "st1 {%[q].d}[0], [%[d]], %[stride]\n\t"
      "st1 {%[q].d}[1], [%[d]], %[stride]"
      : [d] "+r"(d)
      : [q] "w"(q), [stride] "r"(stride)
      : "memory");
  return d;
}
#endif

/// Completes packed rows of infinite scale, whose elements are 0 so far: infinite ones become +-127. Products are then
/// those of fp32, infinite, or NaN where an infinity meets a weight of 0. (Where several infinities meet, their sum
/// decides.)
template <typename Src, size_t kGroup, uint8_t kFlip>
__attribute__((noinline, cold)) static void mark_infinities(size_t rows, size_t k, const Src* s, size_t ld,
                                                            size_t stride, const float* scales, int8_t* d) {
  for (size_t i = 0; i < rows; ++i) {
    if (!__builtin_isinf(scales[i])) continue;
    for (size_t p = 0; p < k; ++p) {
      const float x = get_n(s + i * ld + p, 1)[0];
      if (!__builtin_isinf(x)) continue;
      d[i * kGroup + p / kGroup * stride + p % kGroup] = static_cast<int8_t>((x > 0.0f ? 127 : -127) ^ kFlip);
    }
  }
}

/// PackRowsFn of layout s8p<block_rows>x<kGroup>; k is padded to a multiple of kStep. Bytes are stored with `kFlip`
/// exclusive-or: 0x80 adds 128, for instructions that take unsigned rows.
template <typename Src, size_t kGroup, size_t kStep, uint8_t kFlip>
static void pack_rows_s8(size_t rows, size_t block_rows, size_t k, const void* src, size_t ld, void* dst) {
  const size_t padded = (k + kStep - 1) / kStep * kStep, stride = block_rows * kGroup;
  int8_t* const d = static_cast<int8_t*>(dst);
  float* const scales = reinterpret_cast<float*>(d + block_rows * padded);
  BlockOutliers outliers(scales + block_rows);
  float worst = 0.0f;
  for (size_t i = 0; i < block_rows; ++i) {
    int8_t* out = d + i * kGroup;
    size_t p = 0;
    if (i < rows) {
      const Src* const s = static_cast<const Src*>(src) + i * ld;
      LargestMagnitude largest = largest_magnitude(s, k);
      worst = largest.value > worst ? largest.value : worst;
      const RowOutliers found = outliers.take(i, s, k, largest);
      const RowScale row = row_scale(largest.value);
      const float inverse = row.inverse;
      scales[i] = row.scale;
      for (; p + kQuantized <= k; p += kQuantized) {
        const Quantized q = quantize(s + p, inverse);
#if defined(TORCH_EXT_VEC_NEON)
        if constexpr (kGroup == 8) {
          out = store_two_groups(q, stride, out);
          continue;
        }
#endif
        store_groups<kGroup>(q, kQuantized / kGroup, stride, kFlip, out);
        out += kQuantized / kGroup * stride;
      }
      if (p < k) {
        Src rest[kQuantized] = {};
        __builtin_memcpy(rest, s + p, (k - p) * sizeof(Src));
        const size_t groups = (k - p + kGroup - 1) / kGroup;
        store_groups<kGroup>(quantize(rest, inverse), groups, stride, kFlip, out);
        out += groups * stride;
        p += groups * kGroup;
      }
      for (size_t o = 0; o < found.count; ++o) {
        d[i * kGroup + found.at[o] / kGroup * stride + found.at[o] % kGroup] = static_cast<int8_t>(kFlip);
      }
    } else {
      scales[i] = 0.0f;
    }
    for (; p < padded; p += kGroup, out += stride) __builtin_memset(out, kFlip, kGroup);
  }
  if (__builtin_isinf(worst)) {
    mark_infinities<Src, kGroup, kFlip>(rows, k, static_cast<const Src*>(src), ld, stride, scales, d);
  }
}

/// 128 times the sum of a column, modulo 2^32: what rows that are stored as q + 128 add to its sums.
[[maybe_unused]] static int32_t excess_of_flipped_rows(const int8_t* q, size_t k) {
  uint32_t sum = 0;
  for (size_t p = 0; p < k; ++p) sum += static_cast<uint32_t>(q[p]);
  return static_cast<int32_t>(128 * sum);
}

/// The table of a family of s8. `kFlip` and what panels end with besides scales go together: see pack_rows_s8.
template <size_t kNr, size_t kGroup, size_t kStep, uint8_t kFlip = 0>
constexpr GemmKernel s8_family(const char* name, uint32_t required_features, const UKernel* ukernels,
                               size_t ukernel_count) {
  return {
      .name = name,
      .required_features = required_features,
      .layout = Layout::kS8Groups,
      .nr = kNr,
      .kr = kGroup,
      .k_step = kStep,
      .lhs_type = DType::kS8,
      .rhs_type = DType::kS8,
      .pack_lhs_f32 = pack_rows_s8<float, kGroup, kStep, kFlip>,
      .pack_lhs_bf16 = pack_rows_s8<bf16, kGroup, kStep, kFlip>,
      .ukernels = ukernels,
      .ukernel_count = ukernel_count,
      .row_extra_bytes = sizeof(float) + kRowOutliersBytes,
      .column_extra_bytes = sizeof(float) + (kFlip ? sizeof(int32_t) : 0),
      .add_outliers = add_outlier_products<kNr, place_in_groups<kNr, kGroup>>,
      .column_term = kFlip ? excess_of_flipped_rows : nullptr,
  };
}
