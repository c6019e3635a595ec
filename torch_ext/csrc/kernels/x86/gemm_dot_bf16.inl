// Micro-kernels on VDPBF16PS, which adds to each of sixteen f32 the products of two bf16 with two bf16, and the packers of
// their layout. Included by vec_avx512_bf16.cpp and gemm_amx.cpp, after simd.inl, gemm_f32.inl and softmax_pack.inl; kDotStep,
// the products of a step, is theirs.
//
// Blocks hold the rows' parts of a step one after the other: element (i, p) of mr rows lies at
//   ((p / kDotStep) * mr + i) * kDotStep + p % kDotStep
// Panels hold pairs of products, column after column: element (j, p) lies at  ((p / 2) * 32 + j) * 2 + p % 2.
//
// Worked example: column 5, product 3 -> ((1 * 32) + 5) * 2 + 1 = 75.
//
// Register use of eight rows: 16 accumulators, 2 panel vectors, 1 pair of a row at a time.

constexpr size_t kDotNr = 32;
static_assert(kDotNr == kNr);

template <size_t kMr>
static void ukernel_dot(size_t steps, const void* lhs_block, const void* rhs_panel, float* tile, size_t ld_tile) {
  const bf16* lhs = static_cast<const bf16*>(lhs_block);
  const bf16* rhs = static_cast<const bf16*>(rhs_panel);
  __m512 acc[kMr][2] = {};
  for (size_t s = 0; s < steps; ++s) {
    for (size_t p = 0; p < kDotStep; p += 2) {
      const __m512bh b0 = (__m512bh)_mm512_loadu_si512(rhs), b1 = (__m512bh)_mm512_loadu_si512(rhs + 32);
#pragma GCC unroll 8
      for (size_t i = 0; i < kMr; ++i) {
        int32_t two;
        __builtin_memcpy(&two, lhs + i * kDotStep + p, sizeof two);
        const __m512bh a = (__m512bh)_mm512_set1_epi32(two);
        acc[i][0] = _mm512_dpbf16_ps(acc[i][0], a, b0);
        acc[i][1] = _mm512_dpbf16_ps(acc[i][1], a, b1);
      }
      rhs += 2 * kDotNr;
    }
    lhs += kMr * kDotStep;
  }
#pragma GCC unroll 8
  for (size_t i = 0; i < kMr; ++i) {
    store(tile + i * ld_tile, (vf)acc[i][0]);
    store(tile + i * ld_tile + kWidth, (vf)acc[i][1]);
  }
}

// The parts of kDotStep products that a row consists of. bf16 is moved, not converted, so that NaN and subnormal numbers
// stay what they are.
TORCH_EXT_INLINE void copy_step(const bf16* s, bf16* d) { __builtin_memcpy(d, s, kDotStep * sizeof(bf16)); }
TORCH_EXT_INLINE void copy_step(const float* s, bf16* d) {
  if constexpr (kDotStep < kWidth) {
    put_n(d, get_n(s, kDotStep), kDotStep);
  } else {
    for (size_t p = 0; p < kDotStep; p += kWidth) store_bf16(d + p, load(s + p));
  }
}

template <typename Src>
static void pack_rows_dot(size_t rows, size_t block_rows, size_t k, const void* src, size_t ld, void* dst) {
  const size_t stride = block_rows * kDotStep;
  for (size_t i = 0; i < block_rows; ++i) {
    bf16* d = static_cast<bf16*>(dst) + i * kDotStep;
    if (i >= rows) {
      for (size_t p = 0; p < k; p += kDotStep, d += stride) __builtin_memset(d, 0, kDotStep * sizeof(bf16));
      continue;
    }
    const Src* const s = static_cast<const Src*>(src) + i * ld;
    size_t p = 0;
    for (; p + kDotStep <= k; p += kDotStep, d += stride) copy_step(s + p, d);
    if (p < k) {
      Src rest[kDotStep] = {};
      __builtin_memcpy(rest, s + p, (k - p) * sizeof(Src));
      copy_step(rest, d);
    }
  }
}

TORCH_EXT_INLINE bf16 narrow_one(bf16 x) { return x; }
TORCH_EXT_INLINE bf16 narrow_one(float x) {
  bf16 h;
  put_one(&h, x);
  return h;
}

// Source [n, k]: two products of a column lie side by side already. Pairs of bf16 are moved as if they were fp32.
template <typename Src>
static void pack_panel_nxk_dot(size_t cols, size_t block_cols, size_t k, const void* src, size_t ld, void* dst) {
  if constexpr (std::is_same_v<Src, bf16>) {
    if (k % 2 == 0 && ld % 2 == 0) {
      pack_panel_nxk<float, float>(cols, block_cols, k / 2, src, ld / 2, dst);
      const size_t written = (k / 2 + kKStep - 1) / kKStep * kKStep * 2;
      const size_t padded = (k + kDotStep - 1) / kDotStep * kDotStep;
      if (written < padded) {
        __builtin_memset(static_cast<bf16*>(dst) + written * block_cols, 0,
                         (padded - written) * block_cols * sizeof(bf16));
      }
      return;
    }
  }
  const Src* const s = static_cast<const Src*>(src);
  bf16* const d = static_cast<bf16*>(dst);
  const size_t padded = (k + kDotStep - 1) / kDotStep * kDotStep;
  for (size_t j = 0; j < block_cols; ++j) {
    for (size_t p = 0; p < padded; ++p) {
      d[(p / 2 * block_cols + j) * 2 + p % 2] = j < cols && p < k ? narrow_one(s[j * ld + p]) : bf16{0};
    }
  }
}

// Sixteen columns of row p as the low half of each pair.
template <typename Src>
TORCH_EXT_INLINE vu get_low_halves(const Src* s, size_t left) {
  vh h = {};
  if constexpr (std::is_same_v<Src, bf16>) {
    if (left >= kWidth) {
      __builtin_memcpy(&h, s, sizeof h);
    } else {
      __builtin_memcpy(&h, s, left * sizeof(bf16));
    }
  } else {
    bf16 lanes[kWidth];
    store_bf16(lanes, left < kWidth ? get_n(s, left) : load(s));
    __builtin_memcpy(&h, lanes, sizeof h);
  }
  return __builtin_convertvector(h, vu);
}

template <typename Src>
static void pack_panel_kxn_dot(size_t cols, size_t k, const void* src, size_t ld, void* dst) {
  const Src* const s = static_cast<const Src*>(src);
  const size_t padded = (k + kDotStep - 1) / kDotStep * kDotStep;
  for (size_t p = 0; p < padded; p += 2) {
    for (size_t j = 0; j < kDotNr; j += kWidth) {
      const size_t left = cols > j ? cols - j : 0;
      vu pairs = {};
      if (left && p < k) pairs = get_low_halves(s + p * ld + j, left);
      if (left && p + 1 < k) pairs |= get_low_halves(s + (p + 1) * ld + j, left) << 16;
      __builtin_memcpy(static_cast<bf16*>(dst) + p * kDotNr + 2 * j, &pairs, sizeof pairs);
    }
  }
}

/// The table of a family on this layout.
static constexpr GemmKernel dot_family(uint32_t required_features, const UKernel* ukernels, size_t ukernel_count) {
  return {
      .name = "bf16p32x2",
      .required_features = required_features,
      .layout = Layout::kBf16Dots,
      .nr = kDotNr,
      .kr = 2,
      .k_step = kDotStep,
      .lhs_type = DType::kBF16,
      .rhs_type = DType::kBF16,
      .pack_lhs_f32 = pack_rows_dot<float>,
      .pack_lhs_bf16 = pack_rows_dot<bf16>,
      .pack_rhs_nxk_f32 = pack_panel_nxk_dot<float>,
      .pack_rhs_nxk_bf16 = pack_panel_nxk_dot<bf16>,
      .pack_rhs_kxn_f32 = pack_panel_kxn_dot<float>,
      .pack_rhs_kxn_bf16 = pack_panel_kxn_dot<bf16>,
      .ukernels = ukernels,
      .ukernel_count = ukernel_count,
      .softmax_pack = softmax_pack_steps<kDotStep>,
  };
}
