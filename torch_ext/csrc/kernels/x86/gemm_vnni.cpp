// Micro-kernels gemm_f32_qs8dx_qs8cxp32x4_{1,2,4,8}x32_avx512_vnni.
//
// VPDPBUSD adds to each of sixteen s32 the products of four u8 with four s8. Rows are stored as q + 128, unsigned, so
// that a sum is too large by 128 times the sum of the column; the panel ends with that, too:
//
//   panel: s8p32x4 (see vec/quantize.inl), then 32 scales in f32, then 32 times 128 * sum over p of q(j, p), in s32
//
// Register use of eight rows: 16 accumulators, 2 panel vectors, 1 row at a time.
#include "kernels/x86/gemm_vnni.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <type_traits>

#include "kernels/target_region.h"

TARGET_REGION_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512vnni",
                    "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512vnni")

namespace torch_ext {
namespace {

#define TORCH_EXT_VEC_AVX512 1
#define TORCH_EXT_VEC_WIDTH 16
// clang-format off: the order matters
#include "kernels/vec/simd.inl"
#include "kernels/vec/quantize.inl"
// clang-format on

constexpr size_t kNr = 32;
constexpr size_t kKr = 4;

template <size_t kMr>
void dot_tile(size_t steps, const void* lhs_block, const void* rhs_panel, float* tile, size_t ld_tile) {
  const int8_t* lhs = static_cast<const int8_t*>(lhs_block);
  const int8_t* rhs = static_cast<const int8_t*>(rhs_panel);
  __m512i acc[kMr][2] = {};
  for (size_t s = 0; s < steps; ++s) {
    const __m512i b0 = _mm512_loadu_si512(rhs), b1 = _mm512_loadu_si512(rhs + 64);
#pragma GCC unroll 8
    for (size_t i = 0; i < kMr; ++i) {
      int32_t four;
      __builtin_memcpy(&four, lhs + i * kKr, sizeof four);
      const __m512i a = _mm512_set1_epi32(four);
      acc[i][0] = _mm512_dpbusd_epi32(acc[i][0], a, b0);
      acc[i][1] = _mm512_dpbusd_epi32(acc[i][1], a, b1);
    }
    lhs += kMr * kKr;
    rhs += kNr * kKr;
  }
  const float* const row_scales = reinterpret_cast<const float*>(lhs);
  const float* const column_scales = reinterpret_cast<const float*>(rhs);
  const int32_t* const excess = reinterpret_cast<const int32_t*>(rhs) + kNr;
#pragma GCC unroll 2
  for (size_t v = 0; v < 2; ++v) {
    vi over;
    __builtin_memcpy(&over, excess + v * kWidth, sizeof over);
    const vf columns = load(column_scales + v * kWidth);
#pragma GCC unroll 8
    for (size_t i = 0; i < kMr; ++i) {
      const vf x = __builtin_convertvector((vi)acc[i][v] - over, vf) * columns;
      store(tile + i * ld_tile + v * kWidth, x * row_scales[i]);
    }
  }
}

constexpr UKernel kUKernels[] = {
    {"gemm_f32_qs8dx_qs8cxp32x4_1x32_avx512_vnni", 1, dot_tile<1>},
    {"gemm_f32_qs8dx_qs8cxp32x4_2x32_avx512_vnni", 2, dot_tile<2>},
    {"gemm_f32_qs8dx_qs8cxp32x4_4x32_avx512_vnni", 4, dot_tile<4>},
    {"gemm_f32_qs8dx_qs8cxp32x4_8x32_avx512_vnni", 8, dot_tile<8>},
};

constexpr GemmKernel kTable = s8_family<kKr, kKr, 0x80>("qs8cxp32x4", kNr, kUKernels, 4);

}  // namespace

extern const GemmKernel kGemmVnni = kTable;

}  // namespace torch_ext

TARGET_REGION_END

#endif
