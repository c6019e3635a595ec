// Micro-kernels gemm_f32_qs8dx_qs8cxp16x4_{1,2,4,5}x16_avx2_pmaddwd and ..._wide: exact products of s8 on AVX2.
//
// VPMADDUBSW, AVX2's product of bytes, saturates. VPMADDWD is exact, but widens to 16 bits what has 8: 16 products for the
// multiplier's time of 32. So one of its products does the work of two, by S. Winograd's identity for inner products
// (A New Algorithm for Inner Product, IEEE Transactions on Computers C-17, 1968):
//
//   a0 b0 + a1 b1 = (a0 + b1) (a1 + b0) - a0 a1 - b0 b1
//
// Sums of two s8 fit 16 bits with room to spare, the terms a0 a1 belong to a row and b0 b1 to a column, and additions have
// three or four ports where the multiplier has one or two. Everything is modulo 2^32, and the result fits s32.
//
// Four products of one row and one column are two operands: `even` is elements 0 and 2, `odd` is 1 and 3.
//
//   block, s16, mr rows of 8 bytes for each step:     a0 a2 a1 a3
//     then mr scales in f32, then mr times the sum over all steps of a0 a1 + a2 a3, in s32, then the outliers
//   panel, s8, 64 bytes for each step: even products of columns 0..7, odd ones of 0..7, even ones of 8..15, odd ones:
//     b(0,0) b(0,2) b(1,0) b(1,2) ... b(7,2) | b(0,1) b(0,3) ... b(7,3) | b(8,0) b(8,2) ...
//     then 16 scales in f32, then 16 times the sum over all steps of b0 b1 + b2 b3, in s32
//
//   block element (i, p) lies at  (p / 4 * mr + i) * 4 + p % 2 * 2 + p % 4 / 2
//   panel element (j, p) at  p / 4 * 64 + j / 8 * 32 + p % 2 * 16 + j % 8 * 2 + p % 4 / 2
//
// Worked example: column 11, product 6 -> 64 + 32 + 0 + 6 + 1 = 103.
//
// Many rows are multiplied with a panel whose products were widened to 16 bits once: same order, twice the bytes.
//
// Registers of five rows: ten accumulators; a wide panel's two vectors of even products, and four for one row's operands
// and sums; else four panel vectors and two of a row. In assembly, since GCC 12 spills accumulators otherwise. One step of
// five rows, wide: 2 loads, 10 VPBROADCASTD, 20 VPADDW (10 with an operand in memory), 10 VPMADDWD, 10 VPADDD for 320
// products.
#include "kernels/families.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <type_traits>

#include "cpu_features.h"
#include "kernels/target_region.h"

TARGET_REGION_BEGIN("avx2,fma,f16c", "avx2,fma,f16c")

namespace torch_ext {
namespace {

#define TORCH_EXT_VEC_AVX2 1
#define TORCH_EXT_VEC_WIDTH 8
// clang-format off: the order matters
#include "kernels/vec/simd.inl"
#include "kernels/vec/quantize.inl"
// clang-format on

constexpr size_t kNr = 16;
constexpr size_t kStep = 4;

// ---- micro-kernels ------------------------------------------------------------------------------------------------

TORCH_EXT_INLINE __m256i widen_half(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

/// acc += products of one row's four elements at `a` with both vectors of columns, all in registers.
TORCH_EXT_INLINE void multiply_row(const int16_t* a, __m256i even0, __m256i odd0, __m256i even1, __m256i odd1,
                                   __m256i& acc0, __m256i& acc1) {
  __m256i x, y;
  __asm__(
      "vpbroadcastd %[even], %[x]\n\t"
      "vpbroadcastd %[odd], %[y]\n\t"
      "vpaddw %[odd0], %[x], %[x]\n\t"
      "vpaddw %[even0], %[y], %[y]\n\t"
      "vpmaddwd %[x], %[y], %[x]\n\t"
      "vpaddd %[x], %[acc0], %[acc0]\n\t"
      "vpbroadcastd %[even], %[x]\n\t"
      "vpbroadcastd %[odd], %[y]\n\t"
      "vpaddw %[odd1], %[x], %[x]\n\t"
      "vpaddw %[even1], %[y], %[y]\n\t"
      "vpmaddwd %[x], %[y], %[x]\n\t"
      "vpaddd %[x], %[acc1], %[acc1]"
      : [acc0] "+x"(acc0), [acc1] "+x"(acc1), [x] "=&x"(x), [y] "=&x"(y)
      : [even] "m"(*reinterpret_cast<const int32_t (*)[1]>(a)),
        [odd] "m"(*reinterpret_cast<const int32_t (*)[1]>(a + 2)), [even0] "x"(even0), [odd0] "x"(odd0),
        [even1] "x"(even1), [odd1] "x"(odd1));
}

/// The same with the odd products of a wide panel read from memory: fewer registers, fewer instructions to issue.
TORCH_EXT_INLINE void multiply_row_wide(const int16_t* a, __m256i even0, __m256i even1, const int16_t* panel,
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
      :
      [even] "m"(*reinterpret_cast<const int32_t (*)[1]>(a)), [odd] "m"(*reinterpret_cast<const int32_t (*)[1]>(a + 2)),
      [odd0] "m"(*reinterpret_cast<const __m256i(*)[1]>(panel + 16)),
      [odd1] "m"(*reinterpret_cast<const __m256i(*)[1]>(panel + 48)), [even0] "x"(even0), [even1] "x"(even1));
}

/// acc += products of `steps` steps.
template <typename Element, size_t kMr>
TORCH_EXT_INLINE void add_products(size_t steps, const int16_t* lhs, const Element* rhs, __m256i (&acc)[kMr][2]) {
  for (size_t s = 0; s < steps; ++s) {
    if constexpr (sizeof(Element) == sizeof(int8_t)) {
      const __m256i even0 = widen_half(rhs), odd0 = widen_half(rhs + 16);
      const __m256i even1 = widen_half(rhs + 32), odd1 = widen_half(rhs + 48);
#pragma GCC unroll 5
      for (size_t i = 0; i < kMr; ++i) multiply_row(lhs + i * kStep, even0, odd0, even1, odd1, acc[i][0], acc[i][1]);
    } else {
      const __m256i even0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rhs));
      const __m256i even1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rhs + 32));
#pragma GCC unroll 5
      for (size_t i = 0; i < kMr; ++i) multiply_row_wide(lhs + i * kStep, even0, even1, rhs, acc[i][0], acc[i][1]);
    }
    lhs += kMr * kStep;
    rhs += kNr * kStep;
  }
}

/// A row's sums without the terms of columns and row (of four bytes at `row_term`), scaled.
TORCH_EXT_INLINE vf scaled_sums(vu sums, vu terms, const void* row_term, vf columns, float row_scale) {
  uint32_t term;
  __builtin_memcpy(&term, row_term, sizeof term);
  // Unsigned, since differences wrap.
  return __builtin_convertvector((vi)(sums - terms - term), vf) * columns * row_scale;
}

template <typename Element, size_t kMr>
void crossed_tile(size_t steps, const void* lhs_block, const void* rhs_panel, float* tile, size_t ld_tile) {
  const int16_t* const lhs = static_cast<const int16_t*>(lhs_block);
  const Element* const rhs = static_cast<const Element*>(rhs_panel);
  __m256i acc[kMr][2] = {};
  add_products(steps, lhs, rhs, acc);
  const float* const row_scales = reinterpret_cast<const float*>(lhs + steps * kMr * kStep);
  const float* const column_scales = reinterpret_cast<const float*>(rhs + steps * kNr * kStep);
#pragma GCC unroll 2
  for (size_t v = 0; v < 2; ++v) {
    vu terms;
    __builtin_memcpy(&terms, column_scales + kNr + v * kWidth, sizeof terms);
    const vf columns = load(column_scales + v * kWidth);
#pragma GCC unroll 5
    for (size_t i = 0; i < kMr; ++i) {
      store(tile + i * ld_tile + v * kWidth,
            scaled_sums((vu)acc[i][v], terms, row_scales + kMr + i, columns, row_scales[i]));
    }
  }
}

/// The panel with its products in 16 bits.
void widen_crossed(size_t steps, const void* panel, void* wide) {
  const int8_t* from = static_cast<const int8_t*>(panel);
  int16_t* to = static_cast<int16_t*>(wide);
  for (size_t i = 0; i < steps * kNr * kStep; i += 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), widen_half(from + i));
  }
  __builtin_memcpy(to + steps * kNr * kStep, from + steps * kNr * kStep, kNr * (sizeof(float) + sizeof(int32_t)));
}

typedef int16_t v16s __attribute__((vector_size(32)));
#include "kernels/x86/strassen_winograd_pmaddwd.inl"

// ---- packing ------------------------------------------------------------------------------------------------------

/// `stride` apart are steps.
size_t place_in_block(size_t i, size_t p, size_t stride) { return i * kStep + p / 4 * stride + p % 2 * 2 + p % 4 / 2; }

constexpr size_t place_in_panel(size_t j, size_t p) { return p / 4 * 64 + j / 8 * 32 + p % 2 * 16 + j % 8 * 2 + p % 4 / 2; }

int32_t column_term(const int8_t* q, size_t k) {
  uint32_t sum = 0;
  for (size_t p = 0; p + 1 < k; p += 2) sum += static_cast<uint32_t>(q[p] * q[p + 1]);
  return static_cast<int32_t>(sum);
}

/// Eight elements quantized, as s16, each half in the order of a block.
template <typename Src>
TORCH_EXT_INLINE __m128i quantize_crossed(const Src* s, float inverse) {
  // 1.5 * 2^23: adding it rounds to an integer, whose low bits are the low bits of the sum.
  const __m256i q = (__m256i)(Io<Src>::get(s) * inverse + 12582912.0f);
  const __m256i order = _mm256_setr_epi8(0, 1, 8, 9, 4, 5, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         0, 1, 8, 9, 4, 5, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i halves = _mm256_shuffle_epi8(q, order);
  return _mm_unpacklo_epi64(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

/// Twice a0 a1 + a2 a3, of both halves, in lanes of s32.
TORCH_EXT_INLINE __m128i row_term(__m128i q) { return _mm_madd_epi16(q, _mm_shuffle_epi32(q, 0xb1)); }

/// Completes packed rows of infinite scale: see mark_infinities() of quantize.inl.
template <typename Src>
__attribute__((noinline, cold)) void mark_infinities_crossed(size_t rows, size_t k, const Src* s, size_t ld,
                                                             size_t stride, const float* scales, int16_t* d,
                                                             int32_t* terms) {
  for (size_t i = 0; i < rows; ++i) {
    if (!__builtin_isinf(scales[i])) continue;
    uint32_t term = 0;
    for (size_t p = 0; p < k; ++p) {
      const float x = get_n(s + i * ld + p, 1)[0];
      int16_t& q = d[place_in_block(i, p, stride)];
      q = !__builtin_isinf(x) ? 0 : x > 0.0f ? 127 : -127;
      if (p % 2) term += static_cast<uint32_t>(d[place_in_block(i, p - 1, stride)] * q);
    }
    terms[i] = static_cast<int32_t>(term);
  }
}

template <typename Src>
void pack_rows_crossed(size_t rows, size_t block_rows, size_t k, const void* src, size_t ld, void* dst) {
  const size_t padded = (k + kStep - 1) / kStep * kStep, stride = block_rows * kStep;
  int16_t* const d = static_cast<int16_t*>(dst);
  float* const scales = reinterpret_cast<float*>(d + block_rows * padded);
  int32_t* const terms = reinterpret_cast<int32_t*>(scales + block_rows);
  BlockOutliers outliers(terms + block_rows);
  float worst = 0.0f;
  for (size_t i = 0; i < block_rows; ++i) {
    int16_t* out = d + i * kStep;
    size_t p = 0;
    __m128i sums = _mm_setzero_si128();
    RowOutliers found;
    scales[i] = 0.0f;
    if (i < rows) {
      const Src* const s = static_cast<const Src*>(src) + i * ld;
      LargestMagnitude largest = largest_magnitude(s, k);
      worst = largest.value > worst ? largest.value : worst;
      found = outliers.take(i, s, k, largest);
      const RowScale scale = row_scale(largest.value);
      scales[i] = scale.scale;
      for (; p + 8 <= k; p += 8, out += 2 * stride) {
        const __m128i q = quantize_crossed(s + p, scale.inverse);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out), q);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out + stride), _mm_unpackhi_epi64(q, q));
        sums = _mm_add_epi32(sums, row_term(q));
      }
      if (p < k) {
        Src rest[8] = {};
        __builtin_memcpy(rest, s + p, (k - p) * sizeof(Src));
        const __m128i q = quantize_crossed(rest, scale.inverse);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out), q);
        if (k - p > kStep) _mm_storel_epi64(reinterpret_cast<__m128i*>(out + stride), _mm_unpackhi_epi64(q, q));
        sums = _mm_add_epi32(sums, row_term(q));
        p = padded;
      }
    }
    for (; p < padded; p += kStep, out += stride) __builtin_memset(out, 0, kStep * sizeof(int16_t));
    // Lanes 0 and 2: each term is in two lanes.
    uint32_t term = static_cast<uint32_t>(_mm_cvtsi128_si32(sums)) + static_cast<uint32_t>(_mm_extract_epi32(sums, 2));
    for (size_t o = 0; o < found.count; ++o) {
      // What stands there is of no use, and is in the term, multiplied with its neighbour.
      int16_t& outlier = d[place_in_block(i, found.at[o], stride)];
      term -= static_cast<uint32_t>(outlier * d[place_in_block(i, found.at[o] ^ 1, stride)]);
      outlier = 0;
    }
    terms[i] = static_cast<int32_t>(term);
  }
  if (__builtin_isinf(worst)) {
    mark_infinities_crossed(rows, k, static_cast<const Src*>(src), ld, stride, scales, d, terms);
  }
}

constexpr UKernel kUKernels[] = {
    {"gemm_f32_qs8dx_qs8cxp16x4_1x16_avx2_pmaddwd", 1, crossed_tile<int8_t, 1>},
    {"gemm_f32_qs8dx_qs8cxp16x4_2x16_avx2_pmaddwd", 2, crossed_tile<int8_t, 2>},
    {"gemm_f32_qs8dx_qs8cxp16x4_4x16_avx2_pmaddwd", 4, crossed_tile<int8_t, 4>},
    {"gemm_f32_qs8dx_qs8cxp16x4_5x16_avx2_pmaddwd", 5, crossed_tile<int8_t, 5>},
};

constexpr UKernel kWideUKernels[] = {
    {"gemm_f32_qs8dx_qs8cxp16x4_1x16_avx2_pmaddwd_wide", 1, crossed_tile<int16_t, 1>},
    {"gemm_f32_qs8dx_qs8cxp16x4_2x16_avx2_pmaddwd_wide", 2, crossed_tile<int16_t, 2>},
    {"gemm_f32_qs8dx_qs8cxp16x4_4x16_avx2_pmaddwd_wide", 4, crossed_tile<int16_t, 4>},
    {"gemm_f32_qs8dx_qs8cxp16x4_5x16_avx2_pmaddwd_wide", 5, crossed_tile<int16_t, 5>},
};

// Widening a panel costs about what multiplying one row with it does, and saves a fifth of every row.
constexpr WidePanels kWide = {.type = DType::kS16, .ukernels = kWideUKernels, .widen = widen_crossed, .least_rows = 10};

constexpr GemmKernel kFamily = {
    .name = "qs8cxp16x4",
    .required_features = kFeatureAvx2Fma,
    .layout = Layout::kS8Crossed,
    .nr = kNr,
    .kr = kStep,
    .k_step = kStep,
    .lhs_type = DType::kS16,
    .rhs_type = DType::kS8,
    .pack_lhs_f32 = pack_rows_crossed<float>,
    .pack_lhs_bf16 = pack_rows_crossed<bf16>,
    .ukernels = kUKernels,
    .ukernel_count = 4,
    .row_extra_bytes = sizeof(float) + sizeof(int32_t) + kRowOutliersBytes,
    .column_extra_bytes = sizeof(float) + sizeof(int32_t),
    .add_outliers = add_outlier_products<kNr, place_in_panel>,
    .column_term = column_term,
    .panel_place = place_in_panel,
    .wide = &kWide,
    .strassen_winograd = &kStrassenWinograd,
};

}  // namespace

extern const GemmKernel kGemmPmaddwd = kFamily;

}  // namespace torch_ext

TARGET_REGION_END

#endif
