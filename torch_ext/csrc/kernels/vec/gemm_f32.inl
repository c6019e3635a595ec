// fp32 matrix micro-kernels on the vector type of simd.inl, for CPUs without a matrix instruction that fits.
//
// Layouts (f32p<nr>x1 and bf16p<nr>x1; shown for nr = 4, k = 4)
//
//   block of mr rows, fp32, row by row:        panel of nr columns, one row of nr for each product:
//     a(0,0) a(0,1) a(0,2) a(0,3)                b(0,0) b(1,0) b(2,0) b(3,0)      product 0, columns 0..3
//     a(1,0) ...                                 b(0,1) b(1,1) b(2,1) b(3,1)      product 1
//
//   block element (i, p) lies at  i * steps * 4 + p      panel element (j, p) at  p * nr + j
//
// Worked example: nr = 12, column j = 5, product p = 2 -> element 29 of the panel.
//
// Register use, main kernel: NEON 6 x 12, 18 accumulators, 3 panel vectors, 6 vectors of four products, one for each row
// (8 x 12 would need 35 of the 32 registers); AVX2 6 x 16, 12 accumulators; AVX-512 8 x 32, 16 accumulators.

constexpr size_t kPanelVectors = TORCH_EXT_VEC_WIDTH == 4 ? 3 : 2;
constexpr size_t kNr = kPanelVectors * kWidth;
constexpr size_t kKStep = 4;

template <int kLane>
TORCH_EXT_INLINE vf multiply_add_lane(vf acc, vf b, const float* a) {
#if defined(TORCH_EXT_VEC_NEON)
  return (vf)vfmaq_laneq_f32((float32x4_t)acc, (float32x4_t)b, vld1q_f32(a), kLane);
#else
  return b * a[kLane] + acc;
#endif
}

/// One product's row of a panel.
template <typename T>
struct RowsPanel {
  using Element = T;
  TORCH_EXT_INLINE void get(const T* row, vf (&b)[kPanelVectors]) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kPanelVectors; ++v) b[v] = Io<T>::get(row + v * kWidth);
  }
};

template <size_t kMr, int kLane, typename Panel>
TORCH_EXT_INLINE void multiply_add_step(vf (&acc)[kMr][kPanelVectors], const float* lhs, size_t ld,
                                        const typename Panel::Element* rhs) {
  vf b[kPanelVectors];
  Panel::get(rhs + kLane * kNr, b);
#pragma GCC unroll 8
  for (size_t i = 0; i < kMr; ++i) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kPanelVectors; ++v) acc[i][v] = multiply_add_lane<kLane>(acc[i][v], b[v], lhs + i * ld);
  }
}

template <size_t kMr, typename Panel>
TORCH_EXT_INLINE void multiply_tile(size_t steps, const void* lhs_block, const void* rhs_panel, float* tile,
                                    size_t ld_tile) {
  const float* lhs = static_cast<const float*>(lhs_block);
  const auto* rhs = static_cast<const typename Panel::Element*>(rhs_panel);
  const size_t ld = steps * kKStep;
  vf acc[kMr][kPanelVectors] = {};
  for (size_t s = 0; s < steps; ++s) {
    multiply_add_step<kMr, 0, Panel>(acc, lhs, ld, rhs);
    multiply_add_step<kMr, 1, Panel>(acc, lhs, ld, rhs);
    multiply_add_step<kMr, 2, Panel>(acc, lhs, ld, rhs);
    multiply_add_step<kMr, 3, Panel>(acc, lhs, ld, rhs);
    lhs += kKStep;
    rhs += kKStep * kNr;
  }
#pragma GCC unroll 8
  for (size_t i = 0; i < kMr; ++i) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kPanelVectors; ++v) store(tile + i * ld_tile + v * kWidth, acc[i][v]);
  }
}

template <size_t kMr>
static void ukernel_f32(size_t steps, const void* lhs_block, const void* rhs_panel, float* tile, size_t ld_tile) {
  multiply_tile<kMr, RowsPanel<float>>(steps, lhs_block, rhs_panel, tile, ld_tile);
}

// GCC's first scheduling pass would widen the panel of several products ahead, and spill accumulators for it.
template <size_t kMr>
#if !defined(__clang__)
__attribute__((optimize("no-schedule-insns")))
#endif
static void ukernel_bf16(size_t steps, const void* lhs_block, const void* rhs_panel, float* tile, size_t ld_tile) {
  multiply_tile<kMr, RowsPanel<bf16>>(steps, lhs_block, rhs_panel, tile, ld_tile);
}

// ---- packing ----------------------------------------------------------------------------------------------------

template <typename Src>
static void pack_rows_f32(size_t rows, size_t block_rows, size_t k, const void* src, size_t ld, void* dst) {
  const size_t padded = (k + kKStep - 1) / kKStep * kKStep;
  for (size_t i = 0; i < block_rows; ++i) {
    float* const d = static_cast<float*>(dst) + i * padded;
    size_t p = 0;
    if (i < rows) {
      const Src* const s = static_cast<const Src*>(src) + i * ld;
      for (; p + kWidth <= k; p += kWidth) store(d + p, Io<Src>::get(s + p));
      if (p < k) {
        put_n(d + p, get_n(s + p, k - p), k - p);
        p = k;
      }
    }
    for (; p < padded; ++p) d[p] = 0.0f;
  }
}

typedef float v4f __attribute__((vector_size(16)));
typedef uint32_t v4u __attribute__((vector_size(16)));
typedef uint16_t v4h __attribute__((vector_size(8)));

TORCH_EXT_INLINE v4f get_four(const float* p) {
  v4f v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

TORCH_EXT_INLINE v4f get_four(const bf16* p) {
  v4h h;
  __builtin_memcpy(&h, p, sizeof h);
  return (v4f)(__builtin_convertvector(h, v4u) << 16);
}

TORCH_EXT_INLINE void put_four(float* p, v4f v) { __builtin_memcpy(p, &v, sizeof v); }

TORCH_EXT_INLINE void put_four(bf16* p, v4f v) {
  const v4u u = (v4u)v;
  const v4u rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const v4u is_number = (v4u)(v == v);
  const v4h h = __builtin_convertvector((rounded & is_number) | (((u >> 16) | 0x40u) & ~is_number), v4h);
  __builtin_memcpy(p, &h, sizeof h);
}

/// Of any alignment: pairs of bf16 are read as one float (gemm_dot_bf16.inl).
TORCH_EXT_INLINE float get_one(const float* p) {
  float f;
  __builtin_memcpy(&f, p, sizeof f);
  return f;
}
TORCH_EXT_INLINE float get_one(const bf16* p) {
  const uint32_t u = static_cast<uint32_t>(p->bits) << 16;
  float f;
  __builtin_memcpy(&f, &u, sizeof f);
  return f;
}

TORCH_EXT_INLINE void put_one(float* p, float x) { *p = x; }
TORCH_EXT_INLINE void put_one(bf16* p, float x) {
  bf16 lanes[4];
  put_four(lanes, v4f{x, x, x, x});
  __builtin_memcpy(p, lanes, sizeof *p);
}

// Source [n, k]: columns of the panel are rows of the source. Four rows by four products are transposed at a time.
template <typename Src, typename Dst>
static void pack_panel_nxk(size_t cols, size_t block_cols, size_t k, const void* src, size_t ld, void* dst) {
  const Src* const s = static_cast<const Src*>(src);
  Dst* const d = static_cast<Dst*>(dst);
  const size_t padded = (k + kKStep - 1) / kKStep * kKStep;
  size_t j = 0;
  for (; j + 4 <= cols; j += 4) {
    size_t p = 0;
    for (; p + 4 <= k; p += 4) {
      const v4f r0 = get_four(s + j * ld + p), r1 = get_four(s + (j + 1) * ld + p);
      const v4f r2 = get_four(s + (j + 2) * ld + p), r3 = get_four(s + (j + 3) * ld + p);
      const v4f a = __builtin_shufflevector(r0, r1, 0, 4, 1, 5), b = __builtin_shufflevector(r0, r1, 2, 6, 3, 7);
      const v4f c = __builtin_shufflevector(r2, r3, 0, 4, 1, 5), e = __builtin_shufflevector(r2, r3, 2, 6, 3, 7);
      put_four(d + p * block_cols + j, __builtin_shufflevector(a, c, 0, 1, 4, 5));
      put_four(d + (p + 1) * block_cols + j, __builtin_shufflevector(a, c, 2, 3, 6, 7));
      put_four(d + (p + 2) * block_cols + j, __builtin_shufflevector(b, e, 0, 1, 4, 5));
      put_four(d + (p + 3) * block_cols + j, __builtin_shufflevector(b, e, 2, 3, 6, 7));
    }
    for (; p < padded; ++p) {
      for (size_t i = j; i < j + 4; ++i) {
        put_one(d + p * block_cols + i, p < k ? get_one(s + i * ld + p) : 0.0f);
      }
    }
  }
  for (; j < block_cols; ++j) {
    for (size_t p = 0; p < padded; ++p) {
      put_one(d + p * block_cols + j, j < cols && p < k ? get_one(s + j * ld + p) : 0.0f);
    }
  }
}

// Source [k, n]: rows of the panel are parts of rows of the source.
template <typename Src, typename Dst>
static void pack_panel_kxn(size_t cols, size_t k, const void* src, size_t ld, void* dst) {
  const size_t padded = (k + kKStep - 1) / kKStep * kKStep;
  for (size_t p = 0; p < padded; ++p) {
    const Src* const s = static_cast<const Src*>(src) + p * ld;
    Dst* const d = static_cast<Dst*>(dst) + p * kNr;
    size_t j = 0;
    if (p < k) {
      for (; j + kWidth <= cols; j += kWidth) Io<Dst>::put(d + j, Io<Src>::get(s + j));
      if (j < cols) {
        put_n(d + j, get_n(s + j, cols - j), cols - j);
        j = cols;
      }
    }
    for (; j < kNr; ++j) put_one(d + j, 0.0f);
  }
}

#define TORCH_EXT_STRING(x) #x
#define TORCH_EXT_UKERNEL(function, rhs, mr)                                                                        \
  {"gemm_f32_f32_" rhs "p" TORCH_EXT_VEC_NR "x1_" TORCH_EXT_STRING(mr) "x" TORCH_EXT_VEC_NR "_" TORCH_EXT_VEC_NAME, \
   mr, function<mr>}
#define TORCH_EXT_UKERNELS(function, rhs)                                                                         \
  {TORCH_EXT_UKERNEL(function, rhs, 1), TORCH_EXT_UKERNEL(function, rhs, 2), TORCH_EXT_UKERNEL(function, rhs, 4), \
   TORCH_EXT_UKERNEL(function, rhs, TORCH_EXT_VEC_MAIN_MR)}

static constexpr UKernel kUKernelsF32[] = TORCH_EXT_UKERNELS(ukernel_f32, "f32");
static constexpr UKernel kUKernelsBf16[] = TORCH_EXT_UKERNELS(ukernel_bf16, "bf16");

#undef TORCH_EXT_UKERNELS
#undef TORCH_EXT_UKERNEL
#undef TORCH_EXT_STRING

static constexpr GemmKernel kFamilyF32 = {
    .name = "f32p" TORCH_EXT_VEC_NR "x1",
    .required_features = TORCH_EXT_VEC_FEATURES,
    .layout = Layout::kF32Rows,
    .nr = kNr,
    .kr = 1,
    .k_step = kKStep,
    .lhs_type = DType::kF32,
    .rhs_type = DType::kF32,
    .pack_lhs_f32 = pack_rows_f32<float>,
    .pack_lhs_bf16 = pack_rows_f32<bf16>,
    .pack_rhs_nxk_f32 = pack_panel_nxk<float, float>,
    .pack_rhs_nxk_bf16 = pack_panel_nxk<bf16, float>,
    .pack_rhs_kxn_f32 = pack_panel_kxn<float, float>,
    .pack_rhs_kxn_bf16 = pack_panel_kxn<bf16, float>,
    .ukernels = kUKernelsF32,
    .ukernel_count = 4,
};

#if defined(TORCH_EXT_VEC_NEON)
/// A panel of bf16 in fp32, as kFamilyF32 has it.
static void widen_panel(size_t steps, const void* panel, void* wide) {
  static_assert(kKStep * kNr % 8 == 0);
  const bf16* const from = static_cast<const bf16*>(panel);
  float* const to = static_cast<float*>(wide);
  for (size_t i = 0; i < steps * kKStep * kNr; i += 8) {
    const uint16x8_t words = vld1q_u16(as_words(from + i));
    store(to + i, (vf)vshll_n_u16(vget_low_u16(words), 16));
    store(to + i + 4, (vf)vshll_high_n_u16(words, 16));
  }
}

// Each six rows pay for widening the panel in registers with a seventh of their instructions; widening it once costs what
// fourteen rows pay.
static constexpr WidePanels kWideBf16 = {
    .step_bytes = kNr * kKStep * sizeof(float),
    .ukernels = kUKernelsF32,
    .widen = widen_panel,
    .least_rows = 24,
    .most_steps = (48 << 10) / (kNr * kKStep * sizeof(float)),
};
#endif

static constexpr GemmKernel kFamilyBf16 = {
    .name = "bf16p" TORCH_EXT_VEC_NR "x1",
    .required_features = TORCH_EXT_VEC_FEATURES,
    .layout = Layout::kBf16Rows,
    .nr = kNr,
    .kr = 1,
    .k_step = kKStep,
    .lhs_type = DType::kF32,
    .rhs_type = DType::kBF16,
    .pack_lhs_f32 = pack_rows_f32<float>,
    .pack_lhs_bf16 = pack_rows_f32<bf16>,
    .pack_rhs_nxk_f32 = pack_panel_nxk<float, bf16>,
    .pack_rhs_nxk_bf16 = pack_panel_nxk<bf16, bf16>,
    .pack_rhs_kxn_f32 = pack_panel_kxn<float, bf16>,
    .pack_rhs_kxn_bf16 = pack_panel_kxn<bf16, bf16>,
    .ukernels = kUKernelsBf16,
    .ukernel_count = 4,
#if defined(TORCH_EXT_VEC_NEON)
    .wide = &kWideBf16,
#endif
};
