// Numerators of softmax, rounded to bf16 where they are used: in the packed block of the product with the values. Needs
// simd.inl. A row is read twice, for its largest score and for the exponentials; nothing is written but the block.

// 1 / ln 2 times the scale, but never zero: places past the row hold minus infinity, which it must not turn into NaN.
TORCH_EXT_INLINE float scale_to_base_2(float scale) {
  const float c = scale * 1.44269504f;
  return c > 1.2e-38f ? c : 1.2e-38f;
}

#if defined(TORCH_EXT_VEC_NEON)

TORCH_EXT_INLINE void store_pair(bf16* d, vf x, vf y) {
  const bfloat16x8_t low = vcvtq_low_bf16_f32((float32x4_t)x);
  vst1q_bf16(reinterpret_cast<bfloat16_t*>(d), vcvtq_high_bf16_f32(low, (float32x4_t)y));
}

// Layout bf16p<block_rows>x4 of gemm_bfmmla.cpp: four probabilities of one row and four of the next are one operand.
static void softmax_pack_pairs(size_t rows, size_t block_rows, size_t n, float scale, float* s, size_t ld, float* sums,
                               void* block) {
  const size_t last = (n - 1) / 4 * 4, stride = block_rows * 4;
  const float c = scale_to_base_2(scale);
  for (size_t i = 0; i < block_rows; i += 2) {
    bf16* d = static_cast<bf16*>(block) + i * 4;
    if (i >= rows) {
      for (size_t j = 0; j <= last; j += 4, d += stride) vst1q_u16(as_words(d), vdupq_n_u16(0));
      continue;
    }
    // A lone last row is its own partner, whose results nobody reads.
    const float* const a = s + i * ld;
    const float* const b = i + 1 < rows ? a + ld : a;
    const vf rest_a = mask_lanes(load(a + last), n - last), rest_b = mask_lanes(load(b + last), n - last);
    vf max_a = rest_a, max_b = rest_b;
    for (size_t j = 0; j < last; j += 4) {
      max_a = max_nan(max_a, load(a + j));
      max_b = max_nan(max_b, load(b + j));
    }
    const float offset_a = max_lanes(max_a) * c, offset_b = max_lanes(max_b) * c;
    vf sum_a = splat(0.0f), sum_b = splat(0.0f);
    for (size_t j = 0; j < last; j += 4, d += stride) {
      const vf x = exp2_to_bf16(load(a + j) * c - offset_a), y = exp2_to_bf16(load(b + j) * c - offset_b);
      sum_a = sum_a + x;
      sum_b = sum_b + y;
      store_pair(d, x, y);
    }
    const vf x = exp2_to_bf16(rest_a * c - offset_a), y = exp2_to_bf16(rest_b * c - offset_b);
    store_pair(d, x, y);
    sums[i] = sum_lanes(sum_a + x);
    if (i + 1 < rows) sums[i + 1] = sum_lanes(sum_b + y);
  }
}

#else

// Blocks of x86/gemm_dot_bf16.inl: element (i, p) lies at  ((p / kStep) * block_rows + i) * kStep + p % kStep.
template <size_t kStep>
TORCH_EXT_INLINE void store_step_part(bf16* row, size_t stride, size_t j, size_t whole, vf x) {
  bf16* const d = row + j / kStep * stride + j % kStep;
  if constexpr (kStep >= kWidth) {
    store_bf16(d, x);
  } else {
    bf16 lanes[kWidth];
    store_bf16(lanes, x);
    for (size_t p = 0; p < kWidth && j + p < whole; p += kStep) {
      __builtin_memcpy(d + p / kStep * stride, lanes + p, kStep * sizeof(bf16));
    }
  }
}

template <size_t kStep>
static void softmax_pack_steps(size_t rows, size_t block_rows, size_t n, float scale, float* s, size_t ld, float* sums,
                               void* block) {
  static_assert(kStep % kWidth == 0 || kWidth % kStep == 0);
  const size_t last = (n - 1) / kWidth * kWidth, whole = (n + kStep - 1) / kStep * kStep;
  const size_t stride = block_rows * kStep;
  const float c = scale_to_base_2(scale);
  bf16* const d = static_cast<bf16*>(block);
  // Two rows at a time, so that one computes while the other waits for its largest score.
  for (size_t i = 0; i < rows; i += 2) {
    const bool pair = i + 1 < rows;
    const float* const a = s + i * ld;
    const float* const b = pair ? a + ld : a;
    bf16* const to_a = d + i * kStep;
    bf16* const to_b = pair ? to_a + kStep : to_a;
    const vf rest_a = mask_lanes(load(a + last), n - last), rest_b = mask_lanes(load(b + last), n - last);
    vf max_a = rest_a, max_b = rest_b;
    for (size_t j = 0; j < last; j += kWidth) {
      max_a = max_nan(max_a, load(a + j));
      max_b = max_nan(max_b, load(b + j));
    }
    const float offset_a = max_lanes(max_a) * c, offset_b = max_lanes(max_b) * c;
    vf sum_a = exp2_to_bf16(rest_a * c - offset_a), sum_b = exp2_to_bf16(rest_b * c - offset_b);
    store_step_part<kStep>(to_a, stride, last, whole, sum_a);
    store_step_part<kStep>(to_b, stride, last, whole, sum_b);
    for (size_t j = 0; j < last; j += kWidth) {
      const vf x = exp2_to_bf16(load(a + j) * c - offset_a), y = exp2_to_bf16(load(b + j) * c - offset_b);
      sum_a = sum_a + x;
      sum_b = sum_b + y;
      store_step_part<kStep>(to_a, stride, j, whole, x);
      store_step_part<kStep>(to_b, stride, j, whole, y);
    }
    // Whole vectors of padding are left where a step is longer than a vector.
    for (size_t j = last + kWidth; j < whole; j += kWidth) {
      store_step_part<kStep>(to_a, stride, j, whole, splat(0.0f));
      store_step_part<kStep>(to_b, stride, j, whole, splat(0.0f));
    }
    sums[i] = sum_lanes(sum_a);
    if (pair) sums[i + 1] = sum_lanes(sum_b);
  }
  for (size_t i = rows; i < block_rows; ++i) {
    for (size_t j = 0; j < whole; j += kStep) {
      __builtin_memset(d + i * kStep + j * block_rows, 0, kStep * sizeof(bf16));
    }
  }
}

#endif
