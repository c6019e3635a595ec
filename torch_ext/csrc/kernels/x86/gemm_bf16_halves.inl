// bf16 panels for AVX2, which has neither products of bf16 nor a cheap way to widen a row of them in order. Included by
// vec_avx2.cpp after gemm_f32.inl, whose blocks of rows it shares.
//
// Layout bf16p16x1, kBf16Halves: one row of 16 columns for each product, with columns j and j + 8 side by side, so that a
// row is one load of eight words of 32 bits: shifted left, they are columns 0..7 in fp32; without their low halves,
// columns 8..15.
//
//   row p:  b(0,p) b(8,p) b(1,p) b(9,p) ... b(7,p) b(15,p)
//
//   element (j, p) lies at  p * 16 + j % 8 * 2 + j / 8
//
// Many rows are multiplied with the panel in fp32, by the micro-kernels of that family.
//
// Worked example: column 11, product 2 -> 2 * 16 + 3 * 2 + 1 = 39.

// Register use of six rows: 12 accumulators, 2 vectors of columns, 1 element of a row, 1 mask.

constexpr size_t kHalf = kNr / 2;
static_assert(kHalf == kWidth);

/// acc += the element `kOffset` bytes behind `a` + kRow * stride bytes, times both vectors of columns. In assembly: GCC 12
/// would rename accumulators until it spills some, and keep a pointer for each element. Reads lhs without saying so, which
/// nothing in the micro-kernel writes to.
template <size_t kRow, size_t kOffset>
TORCH_EXT_INLINE void multiply_add_row(const float* a, const float* a3, size_t stride, __m256 low, __m256 high,
                                       __m256& acc0, __m256& acc1) {
  static_assert(kRow < 6);
  __m256 x;
#define TORCH_EXT_MULTIPLY_ADD(address)                    \
  __asm__(                                                 \
      "vbroadcastss " address                              \
      ", %[x]\n\t"                                         \
      "vfmadd231ps %[low], %[x], %[acc0]\n\t"              \
      "vfmadd231ps %[high], %[x], %[acc1]"                 \
      : [acc0] "+x"(acc0), [acc1] "+x"(acc1), [x] "=&x"(x) \
      : [base] "r"(kRow < 3 ? a : a3), [stride] "r"(stride), [offset] "i"(kOffset), [low] "x"(low), [high] "x"(high))
  if constexpr (kRow % 3 == 0) TORCH_EXT_MULTIPLY_ADD("%c[offset](%[base])");
  if constexpr (kRow % 3 == 1) TORCH_EXT_MULTIPLY_ADD("%c[offset](%[base],%[stride],1)");
  if constexpr (kRow % 3 == 2) TORCH_EXT_MULTIPLY_ADD("%c[offset](%[base],%[stride],2)");
#undef TORCH_EXT_MULTIPLY_ADD
}

template <size_t kMr, size_t kOffset>
TORCH_EXT_INLINE void multiply_add_rows(const float* a, const float* a3, size_t stride, const bf16* rhs,
                                        __m256i high_half, __m256 (&acc)[kMr][2]) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rhs + kOffset / sizeof(float) * kNr));
  const __m256 low = (__m256)_mm256_slli_epi32(words, 16), high = (__m256)_mm256_and_si256(words, high_half);
  multiply_add_row<0, kOffset>(a, a3, stride, low, high, acc[0][0], acc[0][1]);
  if constexpr (kMr > 1) multiply_add_row<1, kOffset>(a, a3, stride, low, high, acc[1][0], acc[1][1]);
  if constexpr (kMr > 2) multiply_add_row<2, kOffset>(a, a3, stride, low, high, acc[2][0], acc[2][1]);
  if constexpr (kMr > 3) multiply_add_row<3, kOffset>(a, a3, stride, low, high, acc[3][0], acc[3][1]);
  if constexpr (kMr > 4) multiply_add_row<4, kOffset>(a, a3, stride, low, high, acc[4][0], acc[4][1]);
  if constexpr (kMr > 5) multiply_add_row<5, kOffset>(a, a3, stride, low, high, acc[5][0], acc[5][1]);
}

template <size_t kMr>
static void ukernel_halves(size_t steps, const void* lhs_block, const void* rhs_panel, float* tile, size_t ld_tile) {
  const bf16* rhs = static_cast<const bf16*>(rhs_panel);
  const size_t ld = steps * kKStep, stride = ld * sizeof(float);
  const float *a = static_cast<const float*>(lhs_block), *a3 = a + 3 * ld;
  const __m256i high_half = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  __m256 acc[kMr][2] = {};
  for (size_t s = 0; s < steps; ++s) {
    multiply_add_rows<kMr, 0>(a, a3, stride, rhs, high_half, acc);
    multiply_add_rows<kMr, 4>(a, a3, stride, rhs, high_half, acc);
    multiply_add_rows<kMr, 8>(a, a3, stride, rhs, high_half, acc);
    multiply_add_rows<kMr, 12>(a, a3, stride, rhs, high_half, acc);
    a += kKStep;
    a3 += kKStep;
    rhs += kKStep * kNr;
  }
#pragma GCC unroll 8
  for (size_t i = 0; i < kMr; ++i) {
    store(tile + i * ld_tile, (vf)acc[i][0]);
    store(tile + i * ld_tile + kWidth, (vf)acc[i][1]);
  }
}

static size_t place_in_halves(size_t j, size_t p) { return p * kNr + j % kHalf * 2 + j / kHalf; }

// The bits of kWidth elements rounded to bf16, in the low halves of words.
TORCH_EXT_INLINE vu bf16_words(const bf16* s) {
  vh h;
  __builtin_memcpy(&h, s, sizeof h);
  return __builtin_convertvector(h, vu);
}
TORCH_EXT_INLINE vu bf16_words(const float* s) {
  bf16 rounded[kWidth];
  store_bf16(rounded, load(s));
  return bf16_words(rounded);
}

template <typename Src>
TORCH_EXT_INLINE vu some_bf16_words(const Src* s, size_t n) {
  Src lanes[kWidth] = {};
  __builtin_memcpy(lanes, s, (n < kWidth ? n : kWidth) * sizeof(Src));
  return bf16_words(lanes);
}

// Source [k, n]: rows of the panel are parts of rows of the source.
template <typename Src>
static void pack_panel_kxn_halves(size_t cols, size_t k, const void* src, size_t ld, void* dst) {
  const size_t padded = (k + kKStep - 1) / kKStep * kKStep;
  bf16* d = static_cast<bf16*>(dst);
  for (size_t p = 0; p < padded; ++p, d += kNr) {
    vu words = {};
    if (p < k) {
      const Src* const s = static_cast<const Src*>(src) + p * ld;
      if (cols == kNr) {
        words = bf16_words(s) | bf16_words(s + kHalf) << 16;
      } else {
        words = some_bf16_words(s, cols);
        if (cols > kHalf) words |= some_bf16_words(s + kHalf, cols - kHalf) << 16;
      }
    }
    __builtin_memcpy(d, &words, sizeof words);
  }
}

TORCH_EXT_INLINE v4u get_words(const bf16* low, const bf16* high) {
  v4h a, b;
  __builtin_memcpy(&a, low, sizeof a);
  __builtin_memcpy(&b, high, sizeof b);
  return __builtin_convertvector(a, v4u) | __builtin_convertvector(b, v4u) << 16;
}
TORCH_EXT_INLINE v4u get_words(const float* low, const float* high) {
  bf16 a[4], b[4];
  put_four(a, get_four(low));
  put_four(b, get_four(high));
  return get_words(a, b);
}

// Source [n, k]: columns of the panel are rows of the source. Four pairs of rows by four products are transposed at a
// time, as words.
template <typename Src>
static void pack_panel_nxk_halves(size_t cols, size_t block_cols, size_t k, const void* src, size_t ld, void* dst) {
  const Src* const s = static_cast<const Src*>(src);
  bf16* const d = static_cast<bf16*>(dst);
  const size_t padded = (k + kKStep - 1) / kKStep * kKStep;
  const size_t whole = cols == block_cols ? k / 4 * 4 : 0;
  for (size_t j = 0; j < kHalf; j += 4) {
    for (size_t p = 0; p < whole; p += 4) {
      const Src* const low = s + j * ld + p;
      const Src* const high = low + kHalf * ld;
      const v4u r0 = get_words(low, high), r1 = get_words(low + ld, high + ld);
      const v4u r2 = get_words(low + 2 * ld, high + 2 * ld), r3 = get_words(low + 3 * ld, high + 3 * ld);
      const v4u a = __builtin_shufflevector(r0, r1, 0, 4, 1, 5), b = __builtin_shufflevector(r0, r1, 2, 6, 3, 7);
      const v4u c = __builtin_shufflevector(r2, r3, 0, 4, 1, 5), e = __builtin_shufflevector(r2, r3, 2, 6, 3, 7);
      const v4u rows[4] = {__builtin_shufflevector(a, c, 0, 1, 4, 5), __builtin_shufflevector(a, c, 2, 3, 6, 7),
                           __builtin_shufflevector(b, e, 0, 1, 4, 5), __builtin_shufflevector(b, e, 2, 3, 6, 7)};
      for (size_t i = 0; i < 4; ++i) __builtin_memcpy(d + (p + i) * kNr + 2 * j, &rows[i], sizeof rows[i]);
    }
  }
  for (size_t j = 0; j < kNr; ++j) {
    for (size_t p = whole; p < padded; ++p) {
      put_one(d + place_in_halves(j, p), j < cols && p < k ? get_one(s + j * ld + p) : 0.0f);
    }
  }
}

static constexpr UKernel kUKernelsHalves[] = {
    {"gemm_f32_f32_bf16p16x1_1x16_avx2_fma", 1, ukernel_halves<1>},
    {"gemm_f32_f32_bf16p16x1_2x16_avx2_fma", 2, ukernel_halves<2>},
    {"gemm_f32_f32_bf16p16x1_4x16_avx2_fma", 4, ukernel_halves<4>},
    {"gemm_f32_f32_bf16p16x1_6x16_avx2_fma", 6, ukernel_halves<6>},
};

/// The panel in fp32, as kFamilyF32 has it.
static void widen_halves(size_t steps, const void* panel, void* wide) {
  const bf16* from = static_cast<const bf16*>(panel);
  float* to = static_cast<float*>(wide);
  for (size_t p = 0; p < steps * kKStep; ++p, from += kNr, to += kNr) {
    vu words;
    __builtin_memcpy(&words, from, sizeof words);
    store(to, (vf)(words << 16));
    store(to + kHalf, (vf)(words & 0xffff0000u));
  }
}

// Micro-kernels that widen lose 2 % (Zen 1) to 8 % (Haswell, by LLVM's model) to shifts and masks. Widening a panel costs what
// two or three rows do, and more where it has to leave the first-level cache.
static constexpr WidePanels kWideHalves = {
    .step_bytes = kNr * kKStep * sizeof(float),
    .ukernels = kUKernelsF32,
    .widen = widen_halves,
    .least_rows = 64,
    .most_steps = (32 << 10) / (kNr * kKStep * sizeof(float)),
};

// ---- Strassen-Winograd, in fp32 -------------------------------------------------------------------------------------

// A sum of two rows, or columns, rounds by the larger one: results of the smaller one would be less accurate. Within a
// factor of 256 they keep 16 bits at least, where bf16 has 8. Numbers so small or large that sums of products might
// leave the range of fp32, infinities and NaN, which would get into other rows, and rows of zeros are left to others.
// Arguments are bits of the largest magnitudes, in words that begin with those of a bf16.
TORCH_EXT_INLINE bool may_be_added(vu a, vu b) {
  constexpr uint32_t kLeast = (127 - 60) << 23, kMost = (127 + 60) << 23, kApart = 8 << 23;
  const vu larger = a > b ? a : b, smaller = a > b ? b : a;
  const vu wrong = (vu)(smaller < kLeast) | (vu)(larger > kMost) | (vu)(larger - smaller > kApart);
  return _mm256_testz_si256((__m256i)wrong, (__m256i)wrong);
}

TORCH_EXT_INLINE vu larger_bits(vu a, vu b) { return (vu)_mm256_max_epu32((__m256i)a, (__m256i)b); }

/// Bits of magnitudes: the larger ones of `largest` and of both vectors.
TORCH_EXT_INLINE vu largest_of(vu largest, vf a, vf b) {
  return larger_bits(larger_bits(largest, (vu)a & 0x7fffffffu), (vu)b & 0x7fffffffu);
}
/// The same for two bf16 in each word.
TORCH_EXT_INLINE vu largest_of(vu largest, vu a, vu b) {
  const __m256i both = _mm256_max_epu16((__m256i)(a & 0x7fff7fffu), (__m256i)(b & 0x7fff7fffu));
  return (vu)_mm256_max_epu16((__m256i)largest, both);
}

TORCH_EXT_INLINE vu pairs(const bf16* row) {
  vu words;
  __builtin_memcpy(&words, row, sizeof words);
  return words;
}

/// The largest lane, in all lanes.
TORCH_EXT_INLINE vu largest_bits(vu x) {
  x = larger_bits(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
  x = larger_bits(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5));
  return larger_bits(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6));
}

static bool add_rows_f32(size_t steps, const void* upper, const void* lower, void* sums) {
  const size_t row = steps * kKStep, half = TORCH_EXT_VEC_MAIN_MR * row;
  const float *a11 = static_cast<const float*>(upper), *a12 = a11 + half;
  const float *a21 = static_cast<const float*>(lower), *a22 = a21 + half;
  float* const s = static_cast<float*>(sums);
  for (size_t begin = 0; begin < half; begin += row) {
    vu largest_upper = {}, largest_lower = {};
    for (size_t i = begin; i < begin + row; i += kWidth) {
      const vf x11 = load(a11 + i), x12 = load(a12 + i), x21 = load(a21 + i), x22 = load(a22 + i);
      const vf s1 = x21 + x22, s2 = s1 - x11;
      store(s + i, s1);
      store(s + half + i, s2);
      store(s + 2 * half + i, x11 - x21);
      store(s + 3 * half + i, x12 - s2);
      largest_upper = largest_of(largest_upper, x11, x12);
      largest_lower = largest_of(largest_lower, x21, x22);
    }
    if (!may_be_added(largest_bits(largest_upper), largest_bits(largest_lower))) return false;
  }
  return true;
}

static bool add_columns_halves(size_t steps, const void* left, const void* right, void* operands) {
  const size_t half = steps * kKStep * kNr;
  const bf16 *b11 = static_cast<const bf16*>(left), *b21 = b11 + half;
  const bf16 *b12 = static_cast<const bf16*>(right), *b22 = b12 + half;
  float* const to = static_cast<float*>(operands);
  vu largest_left = {}, largest_right = {};  // of each half of a word
  for (size_t i = 0; i < half; i += kNr) {
    const vu w11 = pairs(b11 + i), w21 = pairs(b21 + i), w12 = pairs(b12 + i), w22 = pairs(b22 + i);
#pragma GCC unroll 2
    for (size_t high = 0; high < 2; ++high) {
      const auto half_of = [high](vu w) { return high ? (vf)(w & 0xffff0000u) : (vf)(w << 16); };
      const vf x11 = half_of(w11), x21 = half_of(w21), x12 = half_of(w12), x22 = half_of(w22);
      const vf t1 = x12 - x11, t2 = x22 - t1;
      float* const out = to + i + high * kHalf;
      store(out, x11);
      store(out + half, x21);
      store(out + 2 * half, x22);
      store(out + 3 * half, t2 - x21);
      store(out + 4 * half, t1);
      store(out + 5 * half, t2);
      store(out + 6 * half, x22 - x12);
    }
    largest_left = largest_of(largest_left, w11, w21);
    largest_right = largest_of(largest_right, w12, w22);
  }
  return may_be_added(largest_left << 16, largest_right << 16) &&
         may_be_added(largest_left & 0xffff0000u, largest_right & 0xffff0000u);
}

template <bool kRight>
static void finish_tiles_f32(const float* products, float* tiles) {
  constexpr size_t kSize = TORCH_EXT_VEC_MAIN_MR * kNr;
#pragma GCC unroll 2
  for (size_t i = 0; i < kSize; i += kWidth) {
    const auto p = [&](size_t q) { return load(products + (q - 1) * kSize + i); };
    const vf u2 = p(1) + p(6);
    store(tiles + i, kRight ? u2 + (p(5) + p(3)) : p(1) + p(2));
    store(tiles + kSize + i, u2 + (kRight ? p(7) + p(5) : p(7) - p(4)));
  }
}

static constexpr StrassenWinograd kStrassenWinogradHalves = {
    .rows = TORCH_EXT_VEC_MAIN_MR,
    .multiply = ukernel_f32<TORCH_EXT_VEC_MAIN_MR>,
    .add_rows = add_rows_f32,
    .add_columns = add_columns_halves,
    .finish = {finish_tiles_f32<false>, finish_tiles_f32<true>},
    .least_rows = 96,
    .least_k = 256,
};

static constexpr GemmKernel kFamilyBf16Halves = {
    .name = "bf16p16x1",
    .required_features = TORCH_EXT_VEC_FEATURES,
    .layout = Layout::kBf16Halves,
    .nr = kNr,
    .kr = 1,
    .k_step = kKStep,
    .lhs_type = DType::kF32,
    .rhs_type = DType::kBF16,
    .pack_lhs_f32 = pack_rows_f32<float>,
    .pack_lhs_bf16 = pack_rows_f32<bf16>,
    .pack_rhs_nxk_f32 = pack_panel_nxk_halves<float>,
    .pack_rhs_nxk_bf16 = pack_panel_nxk_halves<bf16>,
    .pack_rhs_kxn_f32 = pack_panel_kxn_halves<float>,
    .pack_rhs_kxn_bf16 = pack_panel_kxn_halves<bf16>,
    .ukernels = kUKernelsHalves,
    .ukernel_count = 4,
    .panel_place = place_in_halves,
    .wide = &kWideHalves,
    .strassen_winograd = &kStrassenWinogradHalves,
};
