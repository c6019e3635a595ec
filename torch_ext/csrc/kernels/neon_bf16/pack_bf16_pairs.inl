// Layout bf16p<R>x4 and its packers, for every kernel on BFMMLA. Included by them inside a target region with bf16 and an
// anonymous namespace, after simd.inl.
//
// Panels (R = nr) and blocks (R = mr) have, for every step of four products, the rows one after the other, four products
// each, so that two neighbouring rows are one operand of 128 bits, and four one of 256.
//
//   step 0: (0,0..3) (1,0..3) | (2,0..3) (3,0..3) | ... (R-1,0..3)       8 * R bytes
//   step 1: (0,4..7) (1,4..7) | ...
//
//   element (i, p) lies at  ((p / 4) * R + i) * 4 + p % 4
//
// Worked examples: R = 12, row 5, product 6 -> ((1 * 12) + 5) * 4 + 2 = 70. R = 24, the same -> ((1 * 24) + 5) * 4 + 2 = 118.
//
// Rows past the last and products past k are zeros.

constexpr size_t kKr = 4;

inline uint16x8_t load_eight(const bf16* p) { return vld1q_u16(as_words(p)); }

inline uint16x8_t load_eight(const float* p) {
  const bfloat16x8_t low = vcvtq_low_bf16_f32(vld1q_f32(p));
  return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(low, vld1q_f32(p + 4)));
}

/// The first n < 8 elements, the others zero.
template <typename T>
inline uint16x8_t load_some(const T* p, size_t n) {
  T lanes[8] = {};
  __builtin_memcpy(lanes, p, n * sizeof(T));
  return load_eight(lanes);
}

inline uint16x8_t low_halves(uint16x8_t a, uint16x8_t b) {
  return vreinterpretq_u16_u64(vzip1q_u64(vreinterpretq_u64_u16(a), vreinterpretq_u64_u16(b)));
}

inline uint16x8_t high_halves(uint16x8_t a, uint16x8_t b) {
  return vreinterpretq_u16_u64(vzip2q_u64(vreinterpretq_u64_u16(a), vreinterpretq_u64_u16(b)));
}

// Source rows become rows of the block: two rows of eight products are two operands.
template <typename T>
void pack_rows(size_t rows, size_t block_rows, size_t k, const void* src, size_t ld, void* dst) {
  const size_t step_stride = block_rows * kKr;
  for (size_t i = 0; i < block_rows; i += 2) {
    bf16* d = static_cast<bf16*>(dst) + i * kKr;
    if (i >= rows) {
      for (size_t p = 0; p < k; p += kKr, d += step_stride) vst1q_u16(as_words(d), vdupq_n_u16(0));
      continue;
    }
    const T* const r0 = static_cast<const T*>(src) + i * ld;
    // A lone last row is paired with itself, and its partner cleared.
    const bool pair = i + 1 < rows;
    const T* const r1 = pair ? r0 + ld : r0;
    const uint16x8_t keep = vdupq_n_u16(pair ? 0xffff : 0);
    size_t p = 0;
    for (; p + 8 <= k; p += 8, d += 2 * step_stride) {
      const uint16x8_t a = load_eight(r0 + p), b = vandq_u16(load_eight(r1 + p), keep);
      vst1q_u16(as_words(d), low_halves(a, b));
      vst1q_u16(as_words(d + step_stride), high_halves(a, b));
    }
    if (p < k) {
      const uint16x8_t a = load_some(r0 + p, k - p), b = vandq_u16(load_some(r1 + p, k - p), keep);
      vst1q_u16(as_words(d), low_halves(a, b));
      if (k - p > kKr) vst1q_u16(as_words(d + step_stride), high_halves(a, b));
    }
  }
}

// Eight columns of four products, one product from each row, become four operands.
inline void store_columns(uint16x8_t r0, uint16x8_t r1, uint16x8_t r2, uint16x8_t r3, size_t pairs, bf16* d) {
  const uint16x8_t a = vzip1q_u16(r0, r2), b = vzip1q_u16(r1, r3);
  vst1q_u16(as_words(d), vzip1q_u16(a, b));
  vst1q_u16(as_words(d + 8), vzip2q_u16(a, b));
  if (pairs > 2) {
    const uint16x8_t c = vzip2q_u16(r0, r2), e = vzip2q_u16(r1, r3);
    vst1q_u16(as_words(d + 16), vzip1q_u16(c, e));
    vst1q_u16(as_words(d + 24), vzip2q_u16(c, e));
  }
}

// Source [k, n]: the panel's columns are columns of the source.
template <typename T, size_t kNr>
void pack_cols(size_t cols, size_t k, const void* src, size_t ld, void* dst) {
  const T* const s = static_cast<const T*>(src);
  bf16* d = static_cast<bf16*>(dst);
  const uint16x8_t zero = vdupq_n_u16(0);
  for (size_t p = 0; p < k; p += kKr, d += kNr * kKr) {
    for (size_t j = 0; j < kNr; j += 8) {
      const size_t left = cols > j ? cols - j : 0;
      uint16x8_t r[kKr];
      for (size_t i = 0; i < kKr; ++i) {
        const T* const row = s + (p + i) * ld + j;
        r[i] = p + i >= k || left == 0 ? zero : left >= 8 ? load_eight(row) : load_some(row, left);
      }
      store_columns(r[0], r[1], r[2], r[3], (kNr - j) / 2, d + j * kKr);
    }
  }
}

/// A family of this layout with panels of kNr columns. Needs softmax_pack.inl.
template <size_t kNr, size_t kCount>
constexpr GemmKernel bf16_pairs_family(const char* name, uint32_t required_features,
                                       const UKernel (&ukernels)[kCount]) {
  return {
      .name = name,
      .required_features = required_features,
      .layout = Layout::kBf16Pairs,
      .nr = kNr,
      .kr = kKr,
      .k_step = kKr,
      .lhs_type = DType::kBF16,
      .rhs_type = DType::kBF16,
      .pack_lhs_f32 = pack_rows<float>,
      .pack_lhs_bf16 = pack_rows<bf16>,
      .pack_rhs_nxk_f32 = pack_rows<float>,
      .pack_rhs_nxk_bf16 = pack_rows<bf16>,
      .pack_rhs_kxn_f32 = pack_cols<float, kNr>,
      .pack_rhs_kxn_bf16 = pack_cols<bf16, kNr>,
      .ukernels = ukernels,
      .ukernel_count = kCount,
      .softmax_pack = softmax_pack_pairs,
  };
}
