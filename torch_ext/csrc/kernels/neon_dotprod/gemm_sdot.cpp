// Micro-kernels gemm_f32_qs8dx_qs8cxp12x4_{2,4,8}x12_neon_sdot.
//
// SDOT Vd.4S, Vn.16B, Vm.4B[i] adds to each of four s32 the products of four s8 of Vn with the four s8 of element i of
// Vm: four columns of the panel with one row of the block.
//
// https://developer.arm.com/documentation/ddi0602/latest/SIMD-FP-Instructions/SDOT--by-element---Dot-product-signed-arithmetic--vector--by-element--
//
// Layouts s8p12x4 and s8p<mr>x4: see vec/quantize.inl.
//
// Register use of eight rows: 24 accumulators, 3 panel vectors, 2 vectors of rows. One step of four products: 24 SDOT and
// 5 vectors loaded.
#include "kernels/families.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include "cpu_features.h"
#include "kernels/target_region.h"

TARGET_REGION_BEGIN("arch=armv8.2-a+dotprod", "dotprod")

namespace torch_ext {
namespace {

#define TORCH_EXT_VEC_NEON 1
#define TORCH_EXT_VEC_WIDTH 4
// clang-format off: the order matters
#include "kernels/vec/simd.inl"
#include "kernels/vec/quantize.inl"
// clang-format on

constexpr size_t kNr = 12;
constexpr size_t kPanelVectors = kNr / 4;
constexpr size_t kKr = 4;

template <size_t kMr>
inline __attribute__((always_inline)) void dot_tile(size_t steps, const void* lhs_block, const void* rhs_panel,
                                                    float* tile, size_t ld_tile) {
  static_assert(kMr == 2 || kMr % 4 == 0);
  const int8_t* lhs = static_cast<const int8_t*>(lhs_block);
  const int8_t* rhs = static_cast<const int8_t*>(rhs_panel);
  int32x4_t acc[kMr][kPanelVectors] = {};
  for (size_t s = 0; s < steps; ++s) {
    int8x16_t b[kPanelVectors];
#pragma GCC unroll 3
    for (size_t v = 0; v < kPanelVectors; ++v) b[v] = vld1q_s8(rhs + v * 16);
    if constexpr (kMr == 2) {
      const int8x8_t a = vld1_s8(lhs);
#pragma GCC unroll 3
      for (size_t v = 0; v < kPanelVectors; ++v) {
        acc[0][v] = vdotq_lane_s32(acc[0][v], b[v], a, 0);
        acc[1][v] = vdotq_lane_s32(acc[1][v], b[v], a, 1);
      }
    } else {
#pragma GCC unroll 2
      for (size_t i = 0; i < kMr; i += 4) {
        const int8x16_t a = vld1q_s8(lhs + i * kKr);
#pragma GCC unroll 3
        for (size_t v = 0; v < kPanelVectors; ++v) {
          acc[i][v] = vdotq_laneq_s32(acc[i][v], b[v], a, 0);
          acc[i + 1][v] = vdotq_laneq_s32(acc[i + 1][v], b[v], a, 1);
          acc[i + 2][v] = vdotq_laneq_s32(acc[i + 2][v], b[v], a, 2);
          acc[i + 3][v] = vdotq_laneq_s32(acc[i + 3][v], b[v], a, 3);
        }
      }
    }
    lhs += kMr * kKr;
    rhs += kNr * kKr;
  }
  const float* const row_scales = reinterpret_cast<const float*>(lhs);
  const float* const column_scales = reinterpret_cast<const float*>(rhs);
#pragma GCC unroll 8
  for (size_t i = 0; i < kMr; ++i) {
#pragma GCC unroll 3
    for (size_t v = 0; v < kPanelVectors; ++v) {
      const float32x4_t x = vmulq_f32(vcvtq_f32_s32(acc[i][v]), vld1q_f32(column_scales + v * 4));
      vst1q_f32(tile + i * ld_tile + v * 4, vmulq_n_f32(x, row_scales[i]));
    }
  }
}

void gemm_f32_qs8dx_qs8cxp12x4_2x12_neon_sdot(size_t steps, const void* lhs, const void* rhs, float* tile,
                                              size_t ld_tile) {
  dot_tile<2>(steps, lhs, rhs, tile, ld_tile);
}

void gemm_f32_qs8dx_qs8cxp12x4_4x12_neon_sdot(size_t steps, const void* lhs, const void* rhs, float* tile,
                                              size_t ld_tile) {
  dot_tile<4>(steps, lhs, rhs, tile, ld_tile);
}

void gemm_f32_qs8dx_qs8cxp12x4_8x12_neon_sdot(size_t steps, const void* lhs, const void* rhs, float* tile,
                                              size_t ld_tile) {
  dot_tile<8>(steps, lhs, rhs, tile, ld_tile);
}

constexpr UKernel kUKernels[] = {
    {"gemm_f32_qs8dx_qs8cxp12x4_2x12_neon_sdot", 2, gemm_f32_qs8dx_qs8cxp12x4_2x12_neon_sdot},
    {"gemm_f32_qs8dx_qs8cxp12x4_4x12_neon_sdot", 4, gemm_f32_qs8dx_qs8cxp12x4_4x12_neon_sdot},
    {"gemm_f32_qs8dx_qs8cxp12x4_8x12_neon_sdot", 8, gemm_f32_qs8dx_qs8cxp12x4_8x12_neon_sdot},
};

constexpr GemmKernel kFamily = s8_family<kNr, kKr, kKr>("qs8cxp12x4", kFeatureNeon | kFeatureDotprod, kUKernels, 3);

}  // namespace

extern const GemmKernel kGemmSdot = kFamily;

}  // namespace torch_ext

TARGET_REGION_END

#endif
