// Micro-kernels gemm_f32_qs8dx_qs8cxp12x8_{2,4,6,8}x12_neon_smmla.
//
// SMMLA Vd.4S, Vn.16B, Vm.16B takes two rows of eight s8 from each side and adds their 2 x 2 products, exactly, in s32:
//
//   Vd = [ d00 d01 d10 d11 ],  Vn = [ n(0,0..7) n(1,0..7) ],  Vm = [ m(0,0..7) m(1,0..7) ]
//
// https://developer.arm.com/documentation/ddi0602/latest/SIMD-FP-Instructions/SMMLA--vector---Signed-8-bit-integer-matrix-multiply-accumulate--vector--
//
// Layouts s8p12x8 and s8p<mr>x8: see vec/quantize.inl. After the last step the pointers stand at the scales.
#include "kernels/families.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include "cpu_features.h"
#include "kernels/neon/mmla_asm.h"
#include "kernels/target_region.h"

TARGET_REGION_BEGIN("arch=armv8.2-a+i8mm", "i8mm")

namespace torch_ext {
namespace {

#define TORCH_EXT_VEC_NEON 1
#define TORCH_EXT_VEC_WIDTH 4
// clang-format off: the order matters
#include "kernels/vec/simd.inl"
#include "kernels/vec/quantize.inl"
// clang-format on

constexpr size_t kNr = 12;
constexpr size_t kPanelPairs = kNr / 2;
constexpr size_t kKr = 8;

// Register maps and instruction counts of the loops: kernels/neon/mmla_asm.h.

// clang-format off: one instruction per line

// Scales of the columns to registers c0..c2, those of up to eight rows to r0 and r1.
#define LOAD_COLUMN_SCALES(c0, c1, c2)          \
  "ldp q" #c0 ", q" #c1 ", [%[rhs]] \n"         \
  "ldr q" #c2 ", [%[rhs], #32] \n"

// v0..v5 from s32 to f32, times scales: of the columns, and of the two rows in elements `even` and `odd` of register r.
#define DEQUANTIZE_ROW_PAIR(c0, c1, c2, r, even, odd)                                      \
  "scvtf v0.4s, v0.4s \n" "scvtf v1.4s, v1.4s \n" "scvtf v2.4s, v2.4s \n"                  \
  "scvtf v3.4s, v3.4s \n" "scvtf v4.4s, v4.4s \n" "scvtf v5.4s, v5.4s \n"                  \
  "fmul v0.4s, v0.4s, v" #c0 ".4s \n" "fmul v1.4s, v1.4s, v" #c1 ".4s \n"                  \
  "fmul v2.4s, v2.4s, v" #c2 ".4s \n" "fmul v3.4s, v3.4s, v" #c0 ".4s \n"                  \
  "fmul v4.4s, v4.4s, v" #c1 ".4s \n" "fmul v5.4s, v5.4s, v" #c2 ".4s \n"                  \
  "fmul v0.4s, v0.4s, v" #r ".s[" #even "] \n" "fmul v1.4s, v1.4s, v" #r ".s[" #even "] \n" \
  "fmul v2.4s, v2.4s, v" #r ".s[" #even "] \n" "fmul v3.4s, v3.4s, v" #r ".s[" #odd "] \n"  \
  "fmul v4.4s, v4.4s, v" #r ".s[" #odd "] \n" "fmul v5.4s, v5.4s, v" #r ".s[" #odd "] \n"

void gemm_f32_qs8dx_qs8cxp12x8_8x12_neon_smmla(size_t steps, const void* lhs, const void* rhs, float* tile,
                                               size_t ld_tile) {
  size_t quads = steps / 4, rest = steps % 4;
  __asm__ volatile(
      MMLA_LOOP_8("smmla", ".16b")
      MMLA_UNZIP_ROW_PAIR(8, 12, 16, 20, 24, 28)
      // The accumulators of the first row pair are free now.
      LOAD_COLUMN_SCALES(8, 12, 16)
      "ldp q20, q24, [%[lhs]] \n"
      DEQUANTIZE_ROW_PAIR(8, 12, 16, 20, 0, 1) MMLA_STORE_ROW_PAIR
      MMLA_UNZIP_ROW_PAIR(9, 13, 17, 21, 25, 29)
      DEQUANTIZE_ROW_PAIR(8, 12, 16, 20, 2, 3) MMLA_STORE_ROW_PAIR
      MMLA_UNZIP_ROW_PAIR(10, 14, 18, 22, 26, 30)
      DEQUANTIZE_ROW_PAIR(8, 12, 16, 24, 0, 1) MMLA_STORE_ROW_PAIR
      MMLA_UNZIP_ROW_PAIR(11, 15, 19, 23, 27, 31)
      DEQUANTIZE_ROW_PAIR(8, 12, 16, 24, 2, 3) MMLA_STORE_ROW_PAIR
      : [lhs] "+r"(lhs), [rhs] "+r"(rhs), [tile] "+r"(tile), [quads] "+r"(quads), [rest] "+r"(rest)
      : [ld] "r"(ld_tile * sizeof(float))
      : MMLA_CLOBBERS_8);
}

void gemm_f32_qs8dx_qs8cxp12x8_2x12_neon_smmla(size_t steps, const void* lhs, const void* rhs, float* tile,
                                               size_t ld_tile) {
  size_t quads = steps / 4, rest = steps % 4;
  __asm__ volatile(
      MMLA_LOOP_2("smmla", ".16b")
      MMLA_ADD_SETS("add")
      MMLA_UNZIP_ROW_PAIR(8, 9, 10, 11, 12, 13)
      LOAD_COLUMN_SCALES(14, 15, 16)
      "ldr d17, [%[lhs]] \n"
      DEQUANTIZE_ROW_PAIR(14, 15, 16, 17, 0, 1) MMLA_STORE_ROW_PAIR
      : [lhs] "+r"(lhs), [rhs] "+r"(rhs), [tile] "+r"(tile), [quads] "+r"(quads), [rest] "+r"(rest)
      : [ld] "r"(ld_tile * sizeof(float))
      : MMLA_CLOBBERS_2);
}

#undef DEQUANTIZE_ROW_PAIR
#undef LOAD_COLUMN_SCALES

// clang-format on

inline float32x4_t join_halves(int32x4_t a, int32x4_t b, bool high) {
  const int64x2_t x = vreinterpretq_s64_s32(a), y = vreinterpretq_s64_s32(b);
  return vcvtq_f32_s32(vreinterpretq_s32_s64(high ? vzip2q_s64(x, y) : vzip1q_s64(x, y)));
}

// Two or three row pairs: 6 * kPairs accumulators leave registers for the compiler.
template <size_t kPairs>
inline __attribute__((always_inline)) void row_pairs(size_t steps, const void* lhs_block, const void* rhs_panel,
                                                     float* tile, size_t ld_tile) {
  const int8_t* lhs = static_cast<const int8_t*>(lhs_block);
  const int8_t* rhs = static_cast<const int8_t*>(rhs_panel);
  int32x4_t acc[kPairs][kPanelPairs] = {};
  for (size_t s = 0; s < steps; ++s) {
#pragma GCC unroll 6
    for (size_t j = 0; j < kPanelPairs; ++j) {
      const int8x16_t b = vld1q_s8(rhs + j * 16);
#pragma GCC unroll 3
      for (size_t i = 0; i < kPairs; ++i) acc[i][j] = vmmlaq_s32(acc[i][j], vld1q_s8(lhs + i * 16), b);
    }
    lhs += kPairs * 16;
    rhs += kPanelPairs * 16;
  }
  const float* const row_scales = reinterpret_cast<const float*>(lhs);
  const float* const column_scales = reinterpret_cast<const float*>(rhs);
#pragma GCC unroll 3
  for (size_t i = 0; i < kPairs; ++i) {
#pragma GCC unroll 3
    for (size_t j = 0; j < kPanelPairs; j += 2) {
      const float32x4_t scales = vld1q_f32(column_scales + 2 * j);
      vst1q_f32(tile + 2 * i * ld_tile + 2 * j,
                vmulq_n_f32(vmulq_f32(join_halves(acc[i][j], acc[i][j + 1], false), scales), row_scales[2 * i]));
      vst1q_f32(tile + (2 * i + 1) * ld_tile + 2 * j,
                vmulq_n_f32(vmulq_f32(join_halves(acc[i][j], acc[i][j + 1], true), scales), row_scales[2 * i + 1]));
    }
  }
}

void gemm_f32_qs8dx_qs8cxp12x8_4x12_neon_smmla(size_t steps, const void* lhs, const void* rhs, float* tile,
                                               size_t ld_tile) {
  row_pairs<2>(steps, lhs, rhs, tile, ld_tile);
}

void gemm_f32_qs8dx_qs8cxp12x8_6x12_neon_smmla(size_t steps, const void* lhs, const void* rhs, float* tile,
                                               size_t ld_tile) {
  row_pairs<3>(steps, lhs, rhs, tile, ld_tile);
}

constexpr UKernel kUKernels[] = {
    {"gemm_f32_qs8dx_qs8cxp12x8_2x12_neon_smmla", 2, gemm_f32_qs8dx_qs8cxp12x8_2x12_neon_smmla},
    {"gemm_f32_qs8dx_qs8cxp12x8_4x12_neon_smmla", 4, gemm_f32_qs8dx_qs8cxp12x8_4x12_neon_smmla},
    {"gemm_f32_qs8dx_qs8cxp12x8_6x12_neon_smmla", 6, gemm_f32_qs8dx_qs8cxp12x8_6x12_neon_smmla},
    {"gemm_f32_qs8dx_qs8cxp12x8_8x12_neon_smmla", 8, gemm_f32_qs8dx_qs8cxp12x8_8x12_neon_smmla},
};

constexpr GemmKernel kFamily = s8_family<kNr, kKr, kKr>("qs8cxp12x8", kFeatureNeon | kFeatureI8mm, kUKernels, 4);

}  // namespace

extern const GemmKernel kGemmSmmla = kFamily;

}  // namespace torch_ext

TARGET_REGION_END

#endif
