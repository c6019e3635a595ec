// Wide panels of gemm_pmaddwd.cpp, which includes this: four columns of s8 in three of s16.
//
// VPMADDWD's factors have 16 bits and weights have 8, so that one factor holds two of them, b + 256 c, and a sum of products
// is B + 256 C, where B and C are the sums of both columns. Those of 512 products are within 512 * 127^2 < 2^23: they overlap,
// and one such sum does not tell them apart. Three sums of four columns b, c, d, e do:
//
//   S1 = B + 256 C      S2 = D + 256 E      S3 = C - 255 D + E
//
//   With  C = (S1 >> 8) + s  and  E = (S2 >> 8) + t:   D = S2 - 256 E   and so   C + 65281 E = S3 + 255 S2
//   s + 65281 t = S3 + 255 S2 - (S1 >> 8) - 65281 (S2 >> 8) = z
//
// s = -floor(B / 256) and t = -floor(D / 256) are within 32,259, less than half of 65,281: t is z / 65281 rounded to the nearest
// integer. Everything is exact: S1 and S2 are within 257 * 512 * 127^2 < 2^31, and z is; S3 matters modulo 2^32. In fp32 the
// quotient is within 0.004 of that of integers, and s / 65281 is within 0.4942.
//
// Factors stay within 16 bits, with a row's element added (the identity of gemm_pmaddwd.cpp): 257 * 127 + 127 < 2^15. So
// products, and the sums that they are added to, are three quarters of the ordinary ones.
//
//   wide panel, s16, 192 bytes for each step: even and odd products of b + 256 c, of d + 256 e, of c - 255 d + e, where b to e
//     are columns 0..7, 8..15, 16..23, 24..31; then 32 scales in f32, then for each chunk of kChunk products and each of
//     the three vectors of eight the sums of b0 b1 + b2 b3, in s32

constexpr size_t kPackedVectors = 3;
constexpr size_t kPackedStep = kPackedVectors * 2 * 16;  // elements
constexpr size_t kChunkSteps = kChunk / kStep;
constexpr size_t kChunkTerms = kPackedVectors * kWidth;
constexpr size_t kPackedExtraBytes = kNr * sizeof(float) + kMostChunks * kChunkTerms * sizeof(int32_t);

TORCH_EXT_INLINE __m256i load_s16(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

/// The even or the odd products of one step.
TORCH_EXT_INLINE void pack_step(const int8_t* from, int16_t* to, __m256i& first, __m256i& second, __m256i& third) {
  const __m256i b = widen_half(from), c = widen_half(from + 32), d = widen_half(from + 64), e = widen_half(from + 96);
  const __m256i high_d = _mm256_slli_epi16(d, 8);
  first = _mm256_add_epi16(b, _mm256_slli_epi16(c, 8));
  second = _mm256_add_epi16(d, _mm256_slli_epi16(e, 8));
  third = _mm256_sub_epi16(_mm256_add_epi16(_mm256_add_epi16(c, d), e), high_d);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), first);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), second);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 64), third);
}

/// WidePanels::widen.
void pack_columns(size_t steps, const void* panel, void* wide) {
  const int8_t* from = static_cast<const int8_t*>(panel);
  int16_t* to = static_cast<int16_t*>(wide);
  float* const scales = reinterpret_cast<float*>(to + steps * kPackedStep);
  __builtin_memcpy(scales, from + steps * kNr * kStep, kNr * sizeof(float));
  __m256i* terms = reinterpret_cast<__m256i*>(scales + kNr);
  do {
    const size_t chunk = steps < kChunkSteps ? steps : kChunkSteps;
    steps -= chunk;
    __m256i first = {}, second = {}, third = {};
    for (size_t s = 0; s < chunk; ++s, from += kNr * kStep, to += kPackedStep) {
      __m256i even[kPackedVectors], odd[kPackedVectors];
      pack_step(from, to, even[0], even[1], even[2]);
      pack_step(from + 16, to + 16, odd[0], odd[1], odd[2]);
      first = _mm256_add_epi32(first, _mm256_madd_epi16(even[0], odd[0]));
      second = _mm256_add_epi32(second, _mm256_madd_epi16(even[1], odd[1]));
      third = _mm256_add_epi32(third, _mm256_madd_epi16(even[2], odd[2]));
    }
    _mm256_storeu_si256(terms++, first);
    _mm256_storeu_si256(terms++, second);
    _mm256_storeu_si256(terms++, third);
  } while (steps);
}

/// acc += products of one row's four elements at `a` with a step of a wide panel.
TORCH_EXT_INLINE void multiply_row_packed(const int16_t* a, __m256i even0, __m256i odd0, __m256i even1,
                                          const int16_t* panel, __m256i (&acc)[kPackedVectors]) {
  __m256i x, y, u, v;
  __asm__(
      "vpbroadcastd %[even], %[x]\n\t"
      "vpbroadcastd %[odd], %[y]\n\t"
      "vpaddw %[odd0], %[x], %[u]\n\t"
      "vpaddw %[even0], %[y], %[v]\n\t"
      "vpmaddwd %[u], %[v], %[u]\n\t"
      "vpaddd %[u], %[acc0], %[acc0]\n\t"
      "vpaddw %[odd1], %[x], %[u]\n\t"
      "vpaddw %[even1], %[y], %[v]\n\t"
      "vpmaddwd %[u], %[v], %[u]\n\t"
      "vpaddd %[u], %[acc1], %[acc1]\n\t"
      "vpaddw %[odd2], %[x], %[x]\n\t"
      "vpaddw %[even2], %[y], %[y]\n\t"
      "vpmaddwd %[x], %[y], %[x]\n\t"
      "vpaddd %[x], %[acc2], %[acc2]"
      : [acc0] "+x"(acc[0]), [acc1] "+x"(acc[1]), [acc2] "+x"(acc[2]), [x] "=&x"(x), [y] "=&x"(y), [u] "=&x"(u),
        [v] "=&x"(v)
      : [even] "m"(*reinterpret_cast<const int32_t (*)[1]>(a)),
        [odd] "m"(*reinterpret_cast<const int32_t (*)[1]>(a + 2)), [even0] "x"(even0), [odd0] "x"(odd0),
        [even1] "x"(even1), [odd1] "m"(*reinterpret_cast<const __m256i(*)[1]>(panel + 48)),
        [even2] "m"(*reinterpret_cast<const __m256i(*)[1]>(panel + 64)),
        [odd2] "m"(*reinterpret_cast<const __m256i(*)[1]>(panel + 80)));
}

/// Sums of four columns from those of three: see above.
TORCH_EXT_INLINE void tell_apart(const vu (&packed)[kPackedVectors], vu (&sums)[4]) {
  const vu high1 = (vu)((vi)packed[0] >> 8), high2 = (vu)((vi)packed[1] >> 8);
  const vu z = packed[2] + (packed[1] << 8) - packed[1] - high1 - (high2 << 16) + (high2 << 8) - high2;
  const vf quotient = __builtin_convertvector((vi)z, vf) * (1.0f / 65281.0f);
  // To the nearest integer whatever the rounding mode.
  const vu t =
      (vu)_mm256_cvttps_epi32(_mm256_round_ps((__m256)quotient, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  // Times 255, of the lower halves: t fits 16 bits.
  const vu t255 = (vu)_mm256_madd_epi16((__m256i)t, _mm256_set1_epi32(255));
  const vu c = high1 + z - (t << 16) + t255, e = high2 + t;
  sums[0] = packed[0] - (c << 8);
  sums[1] = c;
  sums[2] = packed[1] - (e << 8);
  sums[3] = e;
}

/// What completes sums of one chunk.
struct ChunkEnd {
  const float *column_terms, *row_terms, *column_scales, *row_scales;
  bool first, last;
};

/// Adds the products of `steps` steps of kRows rows to the tile: as s32, unless the chunk is the last one.
template <size_t kRows>
TORCH_EXT_INLINE void multiply_chunk(size_t steps, const int16_t* lhs, size_t stride, const int16_t* rhs,
                                     const ChunkEnd& end, size_t first_row, float* tile, size_t ld_tile) {
  __m256i acc[kRows][kPackedVectors] = {};
  for (size_t s = 0; s < steps; ++s) {
    const __m256i even0 = load_s16(rhs), odd0 = load_s16(rhs + 16), even1 = load_s16(rhs + 32);
#pragma GCC unroll 3
    for (size_t i = 0; i < kRows; ++i) multiply_row_packed(lhs + i * kStep, even0, odd0, even1, rhs, acc[i]);
    lhs += stride;
    rhs += kPackedStep;
  }
#pragma GCC unroll 3
  for (size_t i = 0; i < kRows; ++i) {
    vu packed[kPackedVectors], sums[4];
    const uint32_t term = load_term(end.row_terms + first_row + i);
#pragma GCC unroll 3
    for (size_t v = 0; v < kPackedVectors; ++v) {
      packed[v] = (vu)acc[i][v] - load_terms(end.column_terms + v * kWidth) - term;
    }
    tell_apart(packed, sums);
    float* const row = tile + (first_row + i) * ld_tile;
#pragma GCC unroll 4
    for (size_t v = 0; v < 4; ++v) {
      if (!end.first) sums[v] += load_terms(row + v * kWidth);
      const vf scaled = __builtin_convertvector((vi)sums[v], vf) * load(end.column_scales + v * kWidth) *
                        end.row_scales[first_row + i];
      store(row + v * kWidth, end.last ? scaled : (vf)sums[v]);
    }
  }
}

template <size_t kMr>
void packed_tile(size_t steps, const void* lhs_block, const void* rhs_panel, float* tile, size_t ld_tile) {
  constexpr size_t kFirst = first_rows(kMr, 3);
  const int16_t* lhs = static_cast<const int16_t*>(lhs_block);
  const int16_t* rhs = static_cast<const int16_t*>(rhs_panel);
  const float* const row_scales = reinterpret_cast<const float*>(lhs + steps * kMr * kStep);
  const float* const column_scales = reinterpret_cast<const float*>(rhs + steps * kPackedStep);
  ChunkEnd end = {column_scales + kNr, row_scales + 2 * kMr, column_scales, row_scales, true, false};
  // A chunk's part of the panel stays in the first-level cache for all rows.
  do {
    const size_t chunk = steps < kChunkSteps ? steps : kChunkSteps;
    steps -= chunk;
    end.last = steps == 0;
    multiply_chunk<kFirst>(chunk, lhs, kMr * kStep, rhs, end, 0, tile, ld_tile);
    if constexpr (kFirst < kMr) {
      multiply_chunk<kMr - kFirst>(chunk, lhs + kFirst * kStep, kMr * kStep, rhs, end, kFirst, tile, ld_tile);
    }
    lhs += chunk * kMr * kStep;
    rhs += chunk * kPackedStep;
    end.row_terms += kMr;
    end.column_terms += kChunkTerms;
    end.first = false;
  } while (steps);
}
