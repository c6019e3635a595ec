// Numerators of softmax, rounded to bf16 where they are used: in the packed block of the product with the values. Needs
// simd.inl. A row is read twice, for its largest score and for the exponentials; nothing is written but the block.

// 1 / ln 2 times the scale, but never zero: places past the row hold minus infinity, which it must not turn into NaN.
TORCH_EXT_INLINE float scale_to_base_2(float scale) {
  const float c = scale * 1.44269504f;
  return c > 1.2e-38f ? c : 1.2e-38f;
}

#if defined(TORCH_EXT_VEC_NEON)

// Layout bf16p<block_rows>x4 of gemm_bfmmla.cpp: four probabilities of one row and four of the next are one operand.
static void softmax_pack_pairs(size_t rows, size_t block_rows, size_t n, float scale, float* s, size_t ld, float* sums,
                               void* block) {
  const size_t whole = (n + 3) / 4 * 4, stride = block_rows * 4;
  const float c = scale_to_base_2(scale);
  for (size_t i = 0; i < block_rows; i += 2) {
    uint16_t* d = static_cast<uint16_t*>(block) + i * 4;
    if (i >= rows) {
      for (size_t j = 0; j < whole; j += 4, d += stride) vst1q_u16(d, vdupq_n_u16(0));
      continue;
    }
    // A lone last row is its own partner, whose results nobody reads.
    float* const a = s + i * ld;
    float* const b = i + 1 < rows ? a + ld : a;
    for (size_t j = n; j < whole; ++j) a[j] = b[j] = -__builtin_inff();
    vf max_a = load(a), max_b = load(b);
    for (size_t j = 4; j < whole; j += 4) {
      max_a = max_nan(max_a, load(a + j));
      max_b = max_nan(max_b, load(b + j));
    }
    const float offset_a = max_lanes(max_a) * c, offset_b = max_lanes(max_b) * c;
    vf sum_a = splat(0.0f), sum_b = splat(0.0f);
    for (size_t j = 0; j < whole; j += 4, d += stride) {
      const vf x = exp2_to_bf16(load(a + j) * c - offset_a), y = exp2_to_bf16(load(b + j) * c - offset_b);
      sum_a = sum_a + x;
      sum_b = sum_b + y;
      const bfloat16x8_t low = vcvtq_low_bf16_f32((float32x4_t)x);
      vst1q_bf16(reinterpret_cast<bfloat16_t*>(d), vcvtq_high_bf16_f32(low, (float32x4_t)y));
    }
    sums[i] = sum_lanes(sum_a);
    if (i + 1 < rows) sums[i + 1] = sum_lanes(sum_b);
  }
}

#else

// Blocks row by row, as in gemm_dot_bf16.inl: rows of n rounded up to a multiple of kDotStep.
constexpr size_t kDotStep = 8;

static void softmax_pack_rows(size_t rows, size_t block_rows, size_t n, float scale, float* s, size_t ld, float* sums,
                              void* block) {
  const size_t whole = (n + kWidth - 1) / kWidth * kWidth, stride = (n + kDotStep - 1) / kDotStep * kDotStep;
  const float c = scale_to_base_2(scale);
  for (size_t i = 0; i < block_rows; ++i) {
    uint16_t* const d = static_cast<uint16_t*>(block) + i * stride;
    if (i >= rows) {
      __builtin_memset(d, 0, stride * sizeof(uint16_t));
      continue;
    }
    float* const a = s + i * ld;
    for (size_t j = n; j < whole; ++j) a[j] = -__builtin_inff();
    vf largest = load(a);
    for (size_t j = kWidth; j < whole; j += kWidth) largest = max_nan(largest, load(a + j));
    const float offset = max_lanes(largest) * c;
    vf sum = splat(0.0f);
    size_t j = 0;
    for (; j + kWidth <= stride; j += kWidth) {
      const vf x = exp2_to_bf16(load(a + j) * c - offset);
      sum = sum + x;
      store_bf16(d + j, x);
    }
    if (j < stride) {
      const vf x = exp2_to_bf16(load(a + j) * c - offset);
      sum = sum + x;
      put_n(d + j, x, stride - j);
    }
    sums[i] = sum_lanes(sum);
  }
}

#endif
