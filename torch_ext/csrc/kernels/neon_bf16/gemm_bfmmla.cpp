// Micro-kernels gemm_f32_bf16_bf16p12x4_{2,4,6,8}x12_neon_bfmmla and the packers of their layout.
//
// BFMMLA Vd.4S, Vn.8H, Vm.8H takes two rows of four bf16 from each side and adds their 2 x 2 products:
//
//   Vd = [ d00 d01 d10 d11 ],  Vn = [ n(0,0..3) n(1,0..3) ],  Vm = [ m(0,0..3) m(1,0..3) ]
//   d(i,j) += sum over p < 4 of n(i,p) * m(j,p)
//
// https://developer.arm.com/documentation/ddi0602/latest/SIMD-FP-Instructions/BFMMLA--BFloat16-floating-point-matrix-multiply-accumulate-into-2x2-matrix-
//
// Layout of panels (R = nr = 12) and blocks (R = mr), and the packers: pack_bf16_pairs.inl. They fill rows past the last
// and products past k with zeros; the micro-kernels know whole tiles only.
#include "kernels/families.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include "cpu_features.h"
#include "kernels/neon/mmla_asm.h"
#include "kernels/target_region.h"

TARGET_REGION_BEGIN("arch=armv8.2-a+bf16", "bf16")

namespace torch_ext {
namespace {

#define TORCH_EXT_VEC_NEON 1
#define TORCH_EXT_VEC_NEON_BF16 1
#define TORCH_EXT_VEC_WIDTH 4
// clang-format off: the order matters
#include "kernels/vec/simd.inl"
#include "kernels/vec/softmax_pack.inl"
#include "kernels/neon_bf16/pack_bf16_pairs.inl"
// clang-format on

constexpr size_t kNr = 12;
constexpr size_t kPanelPairs = kNr / 2;

// ---- micro-kernels ------------------------------------------------------------------------------------------------

// Register maps and instruction counts: kernels/neon/mmla_asm.h.

void gemm_f32_bf16_bf16p12x4_8x12_neon_bfmmla(size_t steps, const void* lhs, const void* rhs, float* tile,
                                              size_t ld_tile) {
  size_t quads = steps / 4, rest = steps % 4;
  // clang-format off: one row pair per line
  __asm__ volatile(
      MMLA_LOOP_8("bfmmla", ".8h")
      MMLA_UNZIP_ROW_PAIR(8, 12, 16, 20, 24, 28) MMLA_STORE_ROW_PAIR
      MMLA_UNZIP_ROW_PAIR(9, 13, 17, 21, 25, 29) MMLA_STORE_ROW_PAIR
      MMLA_UNZIP_ROW_PAIR(10, 14, 18, 22, 26, 30) MMLA_STORE_ROW_PAIR
      MMLA_UNZIP_ROW_PAIR(11, 15, 19, 23, 27, 31) MMLA_STORE_ROW_PAIR
      : [lhs] "+r"(lhs), [rhs] "+r"(rhs), [tile] "+r"(tile), [quads] "+r"(quads), [rest] "+r"(rest)
      : [ld] "r"(ld_tile * sizeof(float))
      : MMLA_CLOBBERS_8);
  // clang-format on
}

void gemm_f32_bf16_bf16p12x4_2x12_neon_bfmmla(size_t steps, const void* lhs, const void* rhs, float* tile,
                                              size_t ld_tile) {
  size_t quads = steps / 4, rest = steps % 4;
  // clang-format off: one row pair per line
  __asm__ volatile(
      MMLA_LOOP_2("bfmmla", ".8h")
      MMLA_ADD_SETS("fadd")
      MMLA_UNZIP_ROW_PAIR(8, 9, 10, 11, 12, 13) MMLA_STORE_ROW_PAIR
      : [lhs] "+r"(lhs), [rhs] "+r"(rhs), [tile] "+r"(tile), [quads] "+r"(quads), [rest] "+r"(rest)
      : [ld] "r"(ld_tile * sizeof(float))
      : MMLA_CLOBBERS_2);
  // clang-format on
}

// Two or three row pairs: 6 * kPairs accumulators leave registers for the compiler.
template <size_t kPairs>
inline __attribute__((always_inline)) void row_pairs(size_t steps, const void* lhs_block, const void* rhs_panel,
                                                     float* tile, size_t ld_tile) {
  const bfloat16_t* lhs = static_cast<const bfloat16_t*>(lhs_block);
  const bfloat16_t* rhs = static_cast<const bfloat16_t*>(rhs_panel);
  float32x4_t acc[kPairs][kPanelPairs] = {};
  for (size_t s = 0; s < steps; ++s) {
#pragma GCC unroll 6
    for (size_t j = 0; j < kPanelPairs; ++j) {
      const bfloat16x8_t b = vld1q_bf16(rhs + j * 8);
#pragma GCC unroll 3
      for (size_t i = 0; i < kPairs; ++i) acc[i][j] = vbfmmlaq_f32(acc[i][j], vld1q_bf16(lhs + i * 8), b);
    }
    lhs += kPairs * 8;
    rhs += kPanelPairs * 8;
  }
#pragma GCC unroll 3
  for (size_t i = 0; i < kPairs; ++i) {
#pragma GCC unroll 3
    for (size_t j = 0; j < kPanelPairs; j += 2) {
      const float64x2_t a = vreinterpretq_f64_f32(acc[i][j]), b = vreinterpretq_f64_f32(acc[i][j + 1]);
      vst1q_f32(tile + 2 * i * ld_tile + 2 * j, vreinterpretq_f32_f64(vzip1q_f64(a, b)));
      vst1q_f32(tile + (2 * i + 1) * ld_tile + 2 * j, vreinterpretq_f32_f64(vzip2q_f64(a, b)));
    }
  }
}

void gemm_f32_bf16_bf16p12x4_4x12_neon_bfmmla(size_t steps, const void* lhs, const void* rhs, float* tile,
                                              size_t ld_tile) {
  row_pairs<2>(steps, lhs, rhs, tile, ld_tile);
}

void gemm_f32_bf16_bf16p12x4_6x12_neon_bfmmla(size_t steps, const void* lhs, const void* rhs, float* tile,
                                              size_t ld_tile) {
  row_pairs<3>(steps, lhs, rhs, tile, ld_tile);
}

constexpr UKernel kUKernels[] = {
    {"gemm_f32_bf16_bf16p12x4_2x12_neon_bfmmla", 2, gemm_f32_bf16_bf16p12x4_2x12_neon_bfmmla},
    {"gemm_f32_bf16_bf16p12x4_4x12_neon_bfmmla", 4, gemm_f32_bf16_bf16p12x4_4x12_neon_bfmmla},
    {"gemm_f32_bf16_bf16p12x4_6x12_neon_bfmmla", 6, gemm_f32_bf16_bf16p12x4_6x12_neon_bfmmla},
    {"gemm_f32_bf16_bf16p12x4_8x12_neon_bfmmla", 8, gemm_f32_bf16_bf16p12x4_8x12_neon_bfmmla},
};

constexpr GemmKernel kFamily = bf16_pairs_family<kNr>("bf16p12x4", kFeatureNeon | kFeatureBf16, kUKernels);

}  // namespace

extern const GemmKernel kGemmBfmmla = kFamily;

}  // namespace torch_ext

TARGET_REGION_END

#endif
