// Micro-kernels gemm_f32_qs8dx_qs8cxp32x4_{1..6}x32_avx2_pmaddwd and ..._wide: exact products of s8 on AVX2.
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
//     then mr scales in f32, then mr times the sum over all steps of a0 a1 + a2 a3, in s32, then kMostChunks times the same
//     of one chunk of the steps (packed_columns.inl), then the outliers
//   panel, s8, 128 bytes for each step: even products of columns 0..7, odd ones of 0..7, even ones of 8..15, odd ones, ...:
//     b(0,0) b(0,2) b(1,0) b(1,2) ... b(7,2) | b(0,1) b(0,3) ... b(7,3) | b(8,0) b(8,2) ...
//     then 32 scales in f32, then 32 times the sum over all steps of b0 b1 + b2 b3, in s32
//
//   block element (i, p) lies at  (p / 4 * mr + i) * 4 + p % 2 * 2 + p % 4 / 2
//   panel element (j, p) at  p / 4 * 128 + j / 8 * 32 + p % 2 * 16 + j % 8 * 2 + p % 4 / 2
//
// Worked example: column 11, product 6 -> 128 + 32 + 0 + 6 + 1 = 167.
//
// Many rows are multiplied with a wide panel: see packed_columns.inl.
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

constexpr size_t kNr = 32;
constexpr size_t kStep = 4;
constexpr size_t kChunk = 512;      // products that are added up before columns are told apart
constexpr size_t kMostChunks = 20;  // of a wide panel: XLM-RoBERTa-XL has 10,240 products

// ---- micro-kernels ------------------------------------------------------------------------------------------------

TORCH_EXT_INLINE __m256i widen_half(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

/// acc += products of one row's four elements at `a` with two vectors of columns, all in registers.
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

TORCH_EXT_INLINE vu load_terms(const void* p) {
  vu x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

TORCH_EXT_INLINE uint32_t load_term(const void* p) {
  uint32_t term;
  __builtin_memcpy(&term, p, sizeof term);
  return term;
}

/// How many of a block's rows are multiplied first, where the registers hold sums of `most`: all, or half of them.
constexpr size_t first_rows(size_t rows, size_t most) { return rows <= most ? rows : (rows + 1) / 2; }

/// acc += products of one step of kRows rows with vectors kV and kV + 1 of columns, at `panel`.
template <size_t kV, size_t kRows, size_t kVectors>
TORCH_EXT_INLINE void multiply_step(const int16_t* lhs, const int8_t* panel, __m256i (&acc)[kRows][kVectors]) {
  const __m256i even0 = widen_half(panel), odd0 = widen_half(panel + 16);
  const __m256i even1 = widen_half(panel + 32), odd1 = widen_half(panel + 48);
#pragma GCC unroll 5
  for (size_t i = 0; i < kRows; ++i) {
    multiply_row(lhs + i * kStep, even0, odd0, even1, odd1, acc[i][kV], acc[i][kV + 1]);
  }
}

/// The tile of kRows rows of a block of `block_rows`, the first of which is `first`. The accumulators of all columns need
/// more registers than there are, unless there is one row.
template <size_t kRows>
TORCH_EXT_INLINE void multiply_rows(size_t steps, const int16_t* block, size_t block_rows, size_t first,
                                    const int8_t* panel, float* tile, size_t ld_tile) {
  constexpr size_t kVectors = kRows == 1 ? 4 : 2;
  const float* const row_scales = reinterpret_cast<const float*>(block + steps * block_rows * kStep);
  const float* const column_scales = reinterpret_cast<const float*>(panel + steps * kNr * kStep);
  for (size_t j = 0; j < kNr; j += kVectors * kWidth) {
    __m256i acc[kRows][kVectors] = {};
    const int16_t* lhs = block + first * kStep;
    const int8_t* rhs = panel + j * kStep;
    for (size_t s = 0; s < steps; ++s) {
      multiply_step<0>(lhs, rhs, acc);
      if constexpr (kVectors == 4) multiply_step<2>(lhs, rhs + 64, acc);
      lhs += block_rows * kStep;
      rhs += kNr * kStep;
    }
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) {
      const size_t column = j + v * kWidth;
      const vu terms = load_terms(column_scales + kNr + column);
      const vf columns = load(column_scales + column);
#pragma GCC unroll 5
      for (size_t i = 0; i < kRows; ++i) {
        // Unsigned, since differences wrap.
        const vu sums = (vu)acc[i][v] - terms - load_term(row_scales + block_rows + first + i);
        store(tile + (first + i) * ld_tile + column,
              __builtin_convertvector((vi)sums, vf) * columns * row_scales[first + i]);
      }
    }
  }
}

template <size_t kMr>
void crossed_tile(size_t steps, const void* lhs_block, const void* rhs_panel, float* tile, size_t ld_tile) {
  constexpr size_t kFirst = first_rows(kMr, 5);
  const int16_t* const block = static_cast<const int16_t*>(lhs_block);
  const int8_t* const panel = static_cast<const int8_t*>(rhs_panel);
  multiply_rows<kFirst>(steps, block, kMr, 0, panel, tile, ld_tile);
  if constexpr (kFirst < kMr) multiply_rows<kMr - kFirst>(steps, block, kMr, kFirst, panel, tile, ld_tile);
}

#include "kernels/x86/packed_columns.inl"

// ---- packing ------------------------------------------------------------------------------------------------------

/// `stride` apart are steps.
size_t place_in_block(size_t i, size_t p, size_t stride) { return i * kStep + p / 4 * stride + p % 2 * 2 + p % 4 / 2; }

constexpr size_t place_in_panel(size_t j, size_t p) {
  return p / 4 * 128 + j / 8 * 32 + p % 2 * 16 + j % 8 * 2 + p % 4 / 2;
}

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

/// Terms of the rows of a block, where they lie: of all steps, then of each chunk.
class RowTerms {
 public:
  RowTerms(int32_t* at, size_t block_rows) : at_(at), block_rows_(block_rows) {
    __builtin_memset(at, 0, block_rows * (1 + kMostChunks) * sizeof *at);
  }

  void add(size_t row, size_t p, uint32_t term) {
    add_to(at_[row], term);
    if (p < kMostChunks * kChunk) add_to(at_[(1 + p / kChunk) * block_rows_ + row], term);
  }

  void clear(size_t row) {
    for (size_t chunk = 0; chunk <= kMostChunks; ++chunk) at_[chunk * block_rows_ + row] = 0;
  }

 private:
  static void add_to(int32_t& at, uint32_t term) { at = static_cast<int32_t>(static_cast<uint32_t>(at) + term); }

  int32_t* const at_;
  const size_t block_rows_;
};

/// Completes packed rows of infinite scale: see mark_infinities() of quantize.inl.
template <typename Src>
__attribute__((noinline, cold)) void mark_infinities_crossed(size_t rows, size_t k, const Src* s, size_t ld,
                                                             size_t stride, const float* scales, int16_t* d,
                                                             RowTerms& terms) {
  for (size_t i = 0; i < rows; ++i) {
    if (!__builtin_isinf(scales[i])) continue;
    terms.clear(i);
    for (size_t p = 0; p < k; ++p) {
      const float x = get_n(s + i * ld + p, 1)[0];
      int16_t& q = d[place_in_block(i, p, stride)];
      q = !__builtin_isinf(x) ? 0 : x > 0.0f ? 127 : -127;
      if (p % 2) terms.add(i, p, static_cast<uint32_t>(d[place_in_block(i, p - 1, stride)] * q));
    }
  }
}

template <typename Src>
void pack_rows_crossed(size_t rows, size_t block_rows, size_t k, const void* src, size_t ld, void* dst) {
  const size_t padded = (k + kStep - 1) / kStep * kStep, stride = block_rows * kStep;
  int16_t* const d = static_cast<int16_t*>(dst);
  float* const scales = reinterpret_cast<float*>(d + block_rows * padded);
  int32_t* const terms_at = reinterpret_cast<int32_t*>(scales + block_rows);
  RowTerms terms(terms_at, block_rows);
  BlockOutliers outliers(terms_at + (1 + kMostChunks) * block_rows);
  float worst = 0.0f;
  for (size_t i = 0; i < block_rows; ++i) {
    int16_t* out = d + i * kStep;
    size_t p = 0;
    scales[i] = 0.0f;
    if (i < rows) {
      const Src* const s = static_cast<const Src*>(src) + i * ld;
      LargestMagnitude largest = largest_magnitude(s, k);
      worst = largest.value > worst ? largest.value : worst;
      const RowOutliers found = outliers.take(i, s, k, largest);
      const RowScale scale = row_scale(largest.value);
      scales[i] = scale.scale;
      while (p < k) {
        const size_t begin = p, end = k - p < kChunk ? k : p + kChunk;
        __m128i sums = _mm_setzero_si128();
        for (; p + 8 <= end; p += 8, out += 2 * stride) {
          const __m128i q = quantize_crossed(s + p, scale.inverse);
          _mm_storel_epi64(reinterpret_cast<__m128i*>(out), q);
          _mm_storel_epi64(reinterpret_cast<__m128i*>(out + stride), _mm_unpackhi_epi64(q, q));
          sums = _mm_add_epi32(sums, row_term(q));
        }
        if (p < end) {
          Src rest[8] = {};
          __builtin_memcpy(rest, s + p, (k - p) * sizeof(Src));
          const __m128i q = quantize_crossed(rest, scale.inverse);
          _mm_storel_epi64(reinterpret_cast<__m128i*>(out), q);
          if (k - p > kStep) _mm_storel_epi64(reinterpret_cast<__m128i*>(out + stride), _mm_unpackhi_epi64(q, q));
          sums = _mm_add_epi32(sums, row_term(q));
          p = padded;
        }
        // Lanes 0 and 2: each term is in two lanes.
        terms.add(i, begin,
                  static_cast<uint32_t>(_mm_cvtsi128_si32(sums)) + static_cast<uint32_t>(_mm_extract_epi32(sums, 2)));
      }
      for (size_t o = 0; o < found.count; ++o) {
        // What stands there is of no use, and is in the term, multiplied with its neighbour.
        const size_t at = found.at[o];
        int16_t& outlier = d[place_in_block(i, at, stride)];
        terms.add(i, at, -static_cast<uint32_t>(outlier * d[place_in_block(i, at ^ 1, stride)]));
        outlier = 0;
      }
    }
    for (; p < padded; p += kStep, out += stride) __builtin_memset(out, 0, kStep * sizeof(int16_t));
  }
  if (__builtin_isinf(worst)) {
    mark_infinities_crossed(rows, k, static_cast<const Src*>(src), ld, stride, scales, d, terms);
  }
}

constexpr UKernel kUKernels[] = {
    {"gemm_f32_qs8dx_qs8cxp32x4_1x32_avx2_pmaddwd", 1, crossed_tile<1>},
    {"gemm_f32_qs8dx_qs8cxp32x4_2x32_avx2_pmaddwd", 2, crossed_tile<2>},
    {"gemm_f32_qs8dx_qs8cxp32x4_3x32_avx2_pmaddwd", 3, crossed_tile<3>},
    {"gemm_f32_qs8dx_qs8cxp32x4_4x32_avx2_pmaddwd", 4, crossed_tile<4>},
    {"gemm_f32_qs8dx_qs8cxp32x4_5x32_avx2_pmaddwd", 5, crossed_tile<5>},
    {"gemm_f32_qs8dx_qs8cxp32x4_6x32_avx2_pmaddwd", 6, crossed_tile<6>},
};

constexpr UKernel kWideUKernels[] = {
    {"gemm_f32_qs8dx_qs8cxp32x4_1x32_avx2_pmaddwd_wide", 1, packed_tile<1>},
    {"gemm_f32_qs8dx_qs8cxp32x4_2x32_avx2_pmaddwd_wide", 2, packed_tile<2>},
    {"gemm_f32_qs8dx_qs8cxp32x4_3x32_avx2_pmaddwd_wide", 3, packed_tile<3>},
    {"gemm_f32_qs8dx_qs8cxp32x4_4x32_avx2_pmaddwd_wide", 4, packed_tile<4>},
    {"gemm_f32_qs8dx_qs8cxp32x4_5x32_avx2_pmaddwd_wide", 5, packed_tile<5>},
    {"gemm_f32_qs8dx_qs8cxp32x4_6x32_avx2_pmaddwd_wide", 6, packed_tile<6>},
};

constexpr WidePanels kWide = {
    .step_bytes = kPackedVectors * 2 * sizeof(__m256i),
    .extra_bytes = kPackedExtraBytes,
    .ukernels = kWideUKernels,
    .widen = pack_columns,
    .least_rows = 6,
    .most_steps = kMostChunks * kChunk / kStep,
};

constexpr GemmKernel kFamily = {
    .name = "qs8cxp32x4",
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
    .ukernel_count = 6,
    .row_extra_bytes = sizeof(float) + (1 + kMostChunks) * sizeof(int32_t) + kRowOutliersBytes,
    .column_extra_bytes = sizeof(float) + sizeof(int32_t),
    .add_outliers = add_outlier_products<kNr, place_in_panel>,
    .column_term = column_term,
    .panel_place = place_in_panel,
    .wide = &kWide,
};

}  // namespace

extern const GemmKernel kGemmPmaddwd = kFamily;

}  // namespace torch_ext

TARGET_REGION_END

#endif
