// Strassen-Winograd products of gemm_pmaddwd.cpp, which includes this: see strassen_winograd.h.
//
// Everything stays exact. Sums of four s8 are within 508, and the two factors of a product of the inner-product identity
// within 508 + 127 or 381 + 381, so that VPMADDWD's sum of two fits s32. Sums of products wrap, as do the terms of rows
// and columns that are subtracted from them in the end; a complete tile fits s32.
//
// What product q adds up is  A_q B_q  plus a term of each row of A_q and of each column of B_q (a0 a1 + a2 a3, b0 b1 + b2 b3).
// The upper left tile is P1 + P2, whose terms are those of the whole upper block and of the whole left panel, which the
// packers leave. Each of the other tiles needs the same sum of the terms as of the products. Behind the sums of rows, and
// behind the operands of columns: terms of the upper right, lower left and lower right tile, in s32.

constexpr size_t kRows = 4;

TORCH_EXT_INLINE v16s load_s16(const int16_t* p) {
  v16s x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
TORCH_EXT_INLINE void store_s16(int16_t* p, v16s x) { __builtin_memcpy(p, &x, sizeof x); }
TORCH_EXT_INLINE vu load_terms(const void* p) {
  vu x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

/// Terms of four rows, each twice.
TORCH_EXT_INLINE vu terms_of_rows(v16s a) {
  return (vu)_mm256_madd_epi16((__m256i)a, _mm256_shuffle_epi32((__m256i)a, 0xb1));
}
/// Terms of eight columns.
TORCH_EXT_INLINE vu terms_of_columns(const v16s (&b)[2]) { return (vu)_mm256_madd_epi16((__m256i)b[0], (__m256i)b[1]); }

/// acc += products of one row's four elements at `a` with both vectors of columns of a wide panel, all in registers.
TORCH_EXT_INLINE void multiply_row_of_sums(const int16_t* a, __m256i even0, __m256i odd0, __m256i even1, __m256i odd1,
                                           __m256i& acc0, __m256i& acc1) {
  __m256i x, y, u, v;
  __asm__(
      "vpbroadcastd %[even], %[x]\n\t"
      "vpbroadcastd %[odd], %[y]\n\t"
      "vpaddw %[odd0], %[x], %[u]\n\t"
      "vpaddw %[even0], %[y], %[v]\n\t"
      "vpaddw %[odd1], %[x], %[x]\n\t"
      "vpaddw %[even1], %[y], %[y]\n\t"
      "vpmaddwd %[u], %[v], %[u]\n\t"
      "vpmaddwd %[x], %[y], %[x]\n\t"
      "vpaddd %[u], %[acc0], %[acc0]\n\t"
      "vpaddd %[x], %[acc1], %[acc1]"
      : [acc0] "+x"(acc0), [acc1] "+x"(acc1), [x] "=&x"(x), [y] "=&x"(y), [u] "=&x"(u), [v] "=&x"(v)
      : [even] "m"(*reinterpret_cast<const int32_t (*)[1]>(a)),
        [odd] "m"(*reinterpret_cast<const int32_t (*)[1]>(a + 2)), [even0] "x"(even0), [odd0] "x"(odd0),
        [even1] "x"(even1), [odd1] "x"(odd1));
}

/// Sums as they are, in s32. Four rows leave registers for the whole panel: 12 loads for 256 products in place of 22 for
/// 320, of which AMD's cores have two in each cycle, beside four of the other instructions (Zen 5: 4 % more products).
void multiply_sums(size_t steps, const void* lhs_block, const void* rhs_panel, float* tile, size_t ld_tile) {
  const int16_t* lhs = static_cast<const int16_t*>(lhs_block);
  const int16_t* rhs = static_cast<const int16_t*>(rhs_panel);
  __m256i acc[kRows][2] = {};
  for (size_t s = 0; s < steps; ++s) {
    const __m256i even0 = (__m256i)load_s16(rhs), odd0 = (__m256i)load_s16(rhs + 16);
    const __m256i even1 = (__m256i)load_s16(rhs + 32), odd1 = (__m256i)load_s16(rhs + 48);
#pragma GCC unroll 4
    for (size_t i = 0; i < kRows; ++i) {
      multiply_row_of_sums(lhs + i * kStep, even0, odd0, even1, odd1, acc[i][0], acc[i][1]);
    }
    lhs += kRows * kStep;
    rhs += kNr * kStep;
  }
#pragma GCC unroll 4
  for (size_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (size_t v = 0; v < 2; ++v) __builtin_memcpy(tile + i * ld_tile + v * kWidth, &acc[i][v], sizeof acc[i][v]);
  }
}

bool add_rows_crossed(size_t steps, const void* upper, const void* lower, void* sums) {
  const size_t half = kRows * steps * kStep;
  const int16_t *a11 = static_cast<const int16_t*>(upper), *a12 = a11 + half;
  const int16_t *a21 = static_cast<const int16_t*>(lower), *a22 = a21 + half;
  int16_t* const s = static_cast<int16_t*>(sums);
  // A vector is one step of all rows.
  vu upper_right = {}, lower_left = {}, lower_right = {};
  for (size_t i = 0; i < half; i += kRows * kStep) {
    const v16s x11 = load_s16(a11 + i), x12 = load_s16(a12 + i), x21 = load_s16(a21 + i), x22 = load_s16(a22 + i);
    const v16s s1 = x21 + x22, s2 = s1 - x11, s3 = x11 - x21, s4 = x12 - s2;
    store_s16(s + i, s1);
    store_s16(s + half + i, s2);
    store_s16(s + 2 * half + i, s3);
    store_s16(s + 3 * half + i, s4);
    const vu u2 = terms_of_rows(x11) + terms_of_rows(s2), u3 = u2 + terms_of_rows(s3), u5 = terms_of_rows(s1);
    upper_right += u2 + u5 + terms_of_rows(s4);
    lower_left += u3 - terms_of_rows(x22);
    lower_right += u3 + u5;
  }
  uint32_t terms[3][kRows];
  for (size_t i = 0; i < kRows; ++i) {
    terms[0][i] = upper_right[2 * i];
    terms[1][i] = lower_left[2 * i];
    terms[2][i] = lower_right[2 * i];
  }
  __builtin_memcpy(s + 4 * half, terms, sizeof terms);
  return true;
}

bool add_columns_crossed(size_t steps, const void* left, const void* right, void* operands) {
  const size_t half = steps * kStep * kNr;
  const int8_t *b11 = static_cast<const int8_t*>(left), *b21 = b11 + half;
  const int8_t *b12 = static_cast<const int8_t*>(right), *b22 = b12 + half;
  int16_t* const to = static_cast<int16_t*>(operands);
  uint32_t terms[3][kNr];
  for (size_t v = 0; v < 2; ++v) {
    vu upper_right = {}, lower_left = {}, lower_right = {};
    for (size_t i = v * 2 * kNr; i < half; i += kNr * kStep) {
      v16s x11[2], x22[2], t1[2], t2[2], t3[2], t4[2];  // even and odd products
#pragma GCC unroll 2
      for (size_t odd = 0; odd < 2; ++odd) {
        const size_t at = i + odd * kNr;
        x11[odd] = (v16s)widen_half(b11 + at), x22[odd] = (v16s)widen_half(b22 + at);
        const v16s x21 = (v16s)widen_half(b21 + at), x12 = (v16s)widen_half(b12 + at);
        t1[odd] = x12 - x11[odd], t2[odd] = x22[odd] - t1[odd], t3[odd] = x22[odd] - x12, t4[odd] = t2[odd] - x21;
        store_s16(to + at, x11[odd]);
        store_s16(to + half + at, x21);
        store_s16(to + 2 * half + at, x22[odd]);
        store_s16(to + 3 * half + at, t4[odd]);
        store_s16(to + 4 * half + at, t1[odd]);
        store_s16(to + 5 * half + at, t2[odd]);
        store_s16(to + 6 * half + at, t3[odd]);
      }
      const vu u2 = terms_of_columns(x11) + terms_of_columns(t2), u3 = u2 + terms_of_columns(t3);
      const vu u5 = terms_of_columns(t1);
      upper_right += u2 + u5 + terms_of_columns(x22);
      lower_left += u3 - terms_of_columns(t4);
      lower_right += u3 + u5;
    }
    __builtin_memcpy(terms[0] + v * kWidth, &upper_right, sizeof upper_right);
    __builtin_memcpy(terms[1] + v * kWidth, &lower_left, sizeof lower_left);
    __builtin_memcpy(terms[2] + v * kWidth, &lower_right, sizeof lower_right);
  }
  __builtin_memcpy(to + 7 * half, terms, sizeof terms);
  return true;
}

template <bool kRight>
void finish_tiles_crossed(const StrassenWinogradTiles& from, float* tiles) {
  constexpr size_t kSize = kRows * kNr;
  const float* const upper_scales = static_cast<const float*>(from.upper_end);
  const float* const lower_scales = static_cast<const float*>(from.lower_end);
  const float* const column_scales = static_cast<const float*>(from.panel_end);
  const float* const row_extras = static_cast<const float*>(from.row_extras);
  const float* const column_extras = static_cast<const float*>(from.column_extras);
  const float* const upper_row_terms = kRight ? row_extras : upper_scales + kRows;
  const float* const lower_row_terms = row_extras + (kRight ? 2 : 1) * kRows;
  const float* const upper_column_terms = kRight ? column_extras : column_scales + kNr;
  const float* const lower_column_terms = column_extras + (kRight ? 2 : 1) * kNr;
  const float* const products = static_cast<const float*>(from.products);
#pragma GCC unroll 2
  for (size_t v = 0; v < kNr; v += kWidth) {
    const vu upper_terms = load_terms(upper_column_terms + v), lower_terms = load_terms(lower_column_terms + v);
    const vf columns = load(column_scales + v);
#pragma GCC unroll 4
    for (size_t i = 0; i < kRows; ++i) {
      const size_t at = i * kNr + v;
      const auto p = [&](size_t q) { return load_terms(products + (q - 1) * kSize + at); };
      const vu u2 = p(1) + p(6);
      const vu upper = kRight ? u2 + p(5) + p(3) : p(1) + p(2), lower = u2 + p(7) + (kRight ? p(5) : -p(4));
      store(tiles + at, scaled_sums(upper, upper_terms, upper_row_terms + i, columns, upper_scales[i]));
      store(tiles + kSize + at, scaled_sums(lower, lower_terms, lower_row_terms + i, columns, lower_scales[i]));
    }
  }
}

constexpr StrassenWinograd kStrassenWinograd = {
    .rows = kRows,
    .multiply = multiply_sums,
    .add_rows = add_rows_crossed,
    .add_columns = add_columns_crossed,
    .finish = {finish_tiles_crossed<false>, finish_tiles_crossed<true>},
    .extra_bytes = 3 * sizeof(int32_t),
    .least_rows = 96,
    .least_k = 256,
};
