// s8 matrix micro-kernels on the vector type of simd.inl, for CPUs without an instruction for products of bytes. Needs
// quantize.inl and gemm_f32.inl. Layout s8p<R>x1: see quantize.inl. Panels are as wide as those of fp32.

template <size_t kMr>
static void ukernel_s8(size_t steps, const void* lhs_block, const void* rhs_panel, float* tile, size_t ld_tile) {
  const int8_t* lhs = static_cast<const int8_t*>(lhs_block);
  const int8_t* rhs = static_cast<const int8_t*>(rhs_panel);
  vi acc[kMr][kPanelVectors] = {};
  for (size_t p = 0; p < steps * kKStep; ++p) {
    vi b[kPanelVectors];
#pragma GCC unroll 4
    for (size_t v = 0; v < kPanelVectors; ++v) {
      vb bytes;
      __builtin_memcpy(&bytes, rhs + v * kWidth, sizeof bytes);
      b[v] = __builtin_convertvector(bytes, vi);
    }
#pragma GCC unroll 8
    for (size_t i = 0; i < kMr; ++i) {
#pragma GCC unroll 4
      for (size_t v = 0; v < kPanelVectors; ++v) acc[i][v] += b[v] * static_cast<int32_t>(lhs[i]);
    }
    lhs += kMr;
    rhs += kNr;
  }
  const float* const row_scales = reinterpret_cast<const float*>(lhs);
  const float* const column_scales = reinterpret_cast<const float*>(rhs);
#pragma GCC unroll 8
  for (size_t i = 0; i < kMr; ++i) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kPanelVectors; ++v) {
      const vf scale = load(column_scales + v * kWidth) * row_scales[i];
      store(tile + i * ld_tile + v * kWidth, __builtin_convertvector(acc[i][v], vf) * scale);
    }
  }
}

#define TORCH_EXT_STRING(x) #x
#define TORCH_EXT_UKERNEL(mr)                                                                                       \
  {"gemm_f32_qs8dx_qs8cxp" TORCH_EXT_VEC_NR "x1_" TORCH_EXT_STRING(mr) "x" TORCH_EXT_VEC_NR "_" TORCH_EXT_VEC_NAME, \
   mr, ukernel_s8<mr>}

static constexpr UKernel kUKernelsS8[] = {TORCH_EXT_UKERNEL(1), TORCH_EXT_UKERNEL(2), TORCH_EXT_UKERNEL(4),
                                          TORCH_EXT_UKERNEL(TORCH_EXT_VEC_MAIN_MR)};
#undef TORCH_EXT_UKERNEL
#undef TORCH_EXT_STRING

static constexpr GemmKernel kFamilyS8 =
    s8_family<kNr, 1, kKStep>("qs8cxp" TORCH_EXT_VEC_NR "x1", TORCH_EXT_VEC_FEATURES, kUKernelsS8, 4);
