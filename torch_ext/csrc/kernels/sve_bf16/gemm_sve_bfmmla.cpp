// Micro-kernels gemm_f32_bf16_bf16p24x4_{2,4,6,8}x24_sve256_bfmmla, for SVE vectors of exactly 256 bits.
//
// BFMMLA Zda.S, Zn.H, Zm.H takes, in each 128-bit segment for itself, two rows of four bf16 from each side and adds their
// 2 x 2 products. Two rows in both segments of Zn and four columns in Zm give two rows by four columns:
//
//   Zn  = [ row 0, 4 products | row 1           ][ row 0           | row 1           ]   LD1RQH
//   Zm  = [ column 0          | column 1        ][ column 2        | column 3        ]   LDR
//   Zda = [ d00 d01 d10 d11                     ][ d02 d03 d12 d13                   ]
//
// https://developer.arm.com/documentation/ddi0602/latest/SVE-Instructions/BFMMLA--BFloat16-floating-point-matrix-multiply-accumulate-
//
// Layout of panels (R = nr = 24) and blocks (R = mr), and the packers: neon_bf16/pack_bf16_pairs.inl. A 64-bit element
// of an accumulator is two neighbouring columns of one row, so that UZP1 of two accumulators is eight columns of the
// even row, in order, and UZP2 of the odd one.
//
// Registers:
//
//   z0..z3    block: rows 0-1, 2-3, 4-5, 6-7 of one step (as many as there are), the same in both segments
//   z4..z7    panel: four vectors of four columns, then the two that are left
//   z8..z31   accumulators: z(8 + 4 j + i) holds rows 2i, 2i+1 and columns 4j..4j+3
//
//   Two rows: z0 block, z1..z6 panel; even steps add to z(8 + 4 j), odd ones to z(9 + 4 j), since six accumulators would
//   not hide the latency of BFMMLA.
//
// Why it is preferred to NEON's at this length: one cycle of Neoverse V1 starts two BFMMLA of 256 bits or four of 128, so
// that the peaks are equal, but a vector that is loaded serves twice the products, and half the accumulators hide the
// latency. LLVM 19's model of V1, every load a hit in the first-level cache, loops as GCC 12 compiles them
// (python benchmarks/mca.py --cpu neoverse-v1 --compiler gcc --filter mmla):
//
//   rows        share of the peak      instructions of 1000 products    vectors loaded for 1000 products
//             NEON, 12   SVE, 24          NEON, 12   SVE, 24                NEON, 12   SVE, 24
//     2         60 %       86 %             85.9       72.9                   72.9       36.5
//     4         60 %      100 %            109.4       54.7                   41.7       20.8
//     6         90 %      100 %             97.2       48.6                   31.2       15.6
//     8        100 %      100 %             71.6       45.6                   26.0       13.0
//
// Four steps of eight rows: 96 BFMMLA, 16 LD1RQH, 24 LDR, 4 instructions of pointers and loop control.
#include "kernels/families.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include "cpu_features.h"
#include "kernels/neon/mmla_asm.h"
#include "kernels/target_region.h"

TARGET_REGION_BEGIN("arch=armv8.2-a+sve+bf16", "sve,bf16")

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

constexpr size_t kNr = 24;

// ---- micro-kernels ------------------------------------------------------------------------------------------------

// clang-format off: one instruction per line

#define SVE_ONE(acc, a, b) "bfmmla z" #acc ".s, z" #a ".h, z" #b ".h \n"

// The immediate of LD1RQH ends at 112 bytes, so that `lhs` points 128 bytes ahead.
#define SVE_ROWS(r, row_pair) "ld1rqh {z" #r ".h}, p0/z, [%[lhs], #16 * (" #row_pair ") - 128] \n"
#define SVE_COLUMNS(r, vector) "ldr z" #r ", [%[rhs], #(" #vector "), mul vl] \n"

// QUAD, four steps, as long as there are four, then STEP, one. Both address from pointers that the loops move.
#define SVE_LOOP(QUAD, STEP, lhs_bytes)                             \
  "ptrue p0.h \n"                                                   \
  "add %[lhs], %[lhs], #128 \n"                                     \
  "cbz %[quads], 2f \n"                                             \
  "1: \n"                                                           \
  QUAD                                                              \
  "add %[lhs], %[lhs], #4 * " #lhs_bytes " \n"                      \
  "add %[rhs], %[rhs], #4 * 192 \n"                                 \
  "subs %[quads], %[quads], #1 \n"                                  \
  "b.ne 1b \n"                                                      \
  "2: \n"                                                           \
  "cbz %[rest], 4f \n"                                              \
  "3: \n"                                                           \
  STEP                                                              \
  "add %[lhs], %[lhs], #" #lhs_bytes " \n"                          \
  "add %[rhs], %[rhs], #192 \n"                                     \
  "subs %[rest], %[rest], #1 \n"                                    \
  "b.ne 3b \n"                                                      \
  "4: \n"

// Eight rows: the columns in register `b` with all four row pairs.
#define SVE_COLUMNS_8(b, a0, a1, a2, a3) SVE_ONE(a0, 0, b) SVE_ONE(a1, 1, b) SVE_ONE(a2, 2, b) SVE_ONE(a3, 3, b)
#define SVE_STEP_8(s)                                               \
  SVE_ROWS(0, 4 * s) SVE_ROWS(1, 4 * s + 1)                         \
  SVE_ROWS(2, 4 * s + 2) SVE_ROWS(3, 4 * s + 3)                     \
  SVE_COLUMNS(4, 6 * s) SVE_COLUMNS(5, 6 * s + 1)                   \
  SVE_COLUMNS(6, 6 * s + 2) SVE_COLUMNS(7, 6 * s + 3)               \
  SVE_COLUMNS_8(4, 8, 9, 10, 11)                                    \
  SVE_COLUMNS_8(5, 12, 13, 14, 15)                                  \
  SVE_COLUMNS_8(6, 16, 17, 18, 19)                                  \
  SVE_COLUMNS_8(7, 20, 21, 22, 23)                                  \
  SVE_COLUMNS(4, 6 * s + 4) SVE_COLUMNS(5, 6 * s + 5)               \
  SVE_COLUMNS_8(4, 24, 25, 26, 27)                                  \
  SVE_COLUMNS_8(5, 28, 29, 30, 31)

// Six rows.
#define SVE_COLUMNS_6(b, a0, a1, a2) SVE_ONE(a0, 0, b) SVE_ONE(a1, 1, b) SVE_ONE(a2, 2, b)
#define SVE_STEP_6(s)                                               \
  SVE_ROWS(0, 3 * s) SVE_ROWS(1, 3 * s + 1) SVE_ROWS(2, 3 * s + 2)  \
  SVE_COLUMNS(4, 6 * s) SVE_COLUMNS(5, 6 * s + 1)                   \
  SVE_COLUMNS(6, 6 * s + 2) SVE_COLUMNS(7, 6 * s + 3)               \
  SVE_COLUMNS_6(4, 8, 9, 10)                                        \
  SVE_COLUMNS_6(5, 12, 13, 14)                                      \
  SVE_COLUMNS_6(6, 16, 17, 18)                                      \
  SVE_COLUMNS_6(7, 20, 21, 22)                                      \
  SVE_COLUMNS(4, 6 * s + 4) SVE_COLUMNS(5, 6 * s + 5)               \
  SVE_COLUMNS_6(4, 24, 25, 26)                                      \
  SVE_COLUMNS_6(5, 28, 29, 30)

// Four rows.
#define SVE_COLUMNS_4(b, a0, a1) SVE_ONE(a0, 0, b) SVE_ONE(a1, 1, b)
#define SVE_STEP_4(s)                                               \
  SVE_ROWS(0, 2 * s) SVE_ROWS(1, 2 * s + 1)                         \
  SVE_COLUMNS(4, 6 * s) SVE_COLUMNS(5, 6 * s + 1)                   \
  SVE_COLUMNS(6, 6 * s + 2) SVE_COLUMNS(7, 6 * s + 3)               \
  SVE_COLUMNS_4(4, 8, 9)                                            \
  SVE_COLUMNS_4(5, 12, 13)                                          \
  SVE_COLUMNS_4(6, 16, 17)                                          \
  SVE_COLUMNS_4(7, 20, 21)                                          \
  SVE_COLUMNS(4, 6 * s + 4) SVE_COLUMNS(5, 6 * s + 5)               \
  SVE_COLUMNS_4(4, 24, 25)                                          \
  SVE_COLUMNS_4(5, 28, 29)

// Two rows, and the accumulators that the step adds to.
#define SVE_STEP_2(s, a0, a1, a2, a3, a4, a5)                       \
  SVE_ROWS(0, s)                                                    \
  SVE_COLUMNS(1, 6 * s) SVE_COLUMNS(2, 6 * s + 1)                   \
  SVE_COLUMNS(3, 6 * s + 2) SVE_COLUMNS(4, 6 * s + 3)               \
  SVE_COLUMNS(5, 6 * s + 4) SVE_COLUMNS(6, 6 * s + 5)               \
  SVE_ONE(a0, 0, 1) SVE_ONE(a1, 0, 2) SVE_ONE(a2, 0, 3)             \
  SVE_ONE(a3, 0, 4) SVE_ONE(a4, 0, 5) SVE_ONE(a5, 0, 6)
#define SVE_EVEN_STEP_2(s) SVE_STEP_2(s, 8, 12, 16, 20, 24, 28)
#define SVE_ODD_STEP_2(s) SVE_STEP_2(s, 9, 13, 17, 21, 25, 29)

// Two rows of 24 columns from the six accumulators of a row pair. The 24 columns of a tile's row are three vectors.
#define SVE_STORE_ROW_PAIR(a0, a1, a2, a3, a4, a5)                  \
  "uzp1 z0.d, z" #a0 ".d, z" #a1 ".d \n"                            \
  "uzp1 z1.d, z" #a2 ".d, z" #a3 ".d \n"                            \
  "uzp1 z2.d, z" #a4 ".d, z" #a5 ".d \n"                            \
  "uzp2 z3.d, z" #a0 ".d, z" #a1 ".d \n"                            \
  "uzp2 z4.d, z" #a2 ".d, z" #a3 ".d \n"                            \
  "uzp2 z5.d, z" #a4 ".d, z" #a5 ".d \n"                            \
  "str z0, [%[tile]] \n"                                            \
  "str z1, [%[tile], #1, mul vl] \n"                                \
  "str z2, [%[tile], #2, mul vl] \n"                                \
  "add %[tile], %[tile], %[ld] \n"                                  \
  "str z3, [%[tile]] \n"                                            \
  "str z4, [%[tile], #1, mul vl] \n"                                \
  "str z5, [%[tile], #2, mul vl] \n"                                \
  "add %[tile], %[tile], %[ld] \n"

#define SVE_ADD(a, b) "fadd z" #a ".s, z" #a ".s, z" #b ".s \n"

#define SVE_OPERANDS                                                                                              \
  : [lhs] "+r"(lhs), [rhs] "+r"(rhs), [tile] "+r"(tile), [quads] "+r"(quads), [rest] "+r"(rest)                   \
  : [ld] "r"(ld_tile * sizeof(float))                                                                             \
  : MMLA_CLOBBERS_8, "p0"

// clang-format on

void gemm_f32_bf16_bf16p24x4_8x24_sve256_bfmmla(size_t steps, const void* lhs, const void* rhs, float* tile,
                                                size_t ld_tile) {
  size_t quads = steps / 4, rest = steps % 4;
  // clang-format off: one row pair per line
  __asm__ volatile(
      MMLA_ZERO_8(8, 9, 10, 11, 12, 13, 14, 15)
      MMLA_ZERO_8(16, 17, 18, 19, 20, 21, 22, 23)
      MMLA_ZERO_8(24, 25, 26, 27, 28, 29, 30, 31)
      SVE_LOOP(SVE_STEP_8(0) SVE_STEP_8(1) SVE_STEP_8(2) SVE_STEP_8(3), SVE_STEP_8(0), 64)
      SVE_STORE_ROW_PAIR(8, 12, 16, 20, 24, 28)
      SVE_STORE_ROW_PAIR(9, 13, 17, 21, 25, 29)
      SVE_STORE_ROW_PAIR(10, 14, 18, 22, 26, 30)
      SVE_STORE_ROW_PAIR(11, 15, 19, 23, 27, 31)
      SVE_OPERANDS);
  // clang-format on
}

void gemm_f32_bf16_bf16p24x4_6x24_sve256_bfmmla(size_t steps, const void* lhs, const void* rhs, float* tile,
                                                size_t ld_tile) {
  size_t quads = steps / 4, rest = steps % 4;
  // clang-format off: one row pair per line
  __asm__ volatile(
      MMLA_ZERO_8(8, 9, 10, 12, 13, 14, 16, 17)
      MMLA_ZERO_8(18, 20, 21, 22, 24, 25, 26, 28)
      MMLA_ZERO(29) MMLA_ZERO(30)
      SVE_LOOP(SVE_STEP_6(0) SVE_STEP_6(1) SVE_STEP_6(2) SVE_STEP_6(3), SVE_STEP_6(0), 48)
      SVE_STORE_ROW_PAIR(8, 12, 16, 20, 24, 28)
      SVE_STORE_ROW_PAIR(9, 13, 17, 21, 25, 29)
      SVE_STORE_ROW_PAIR(10, 14, 18, 22, 26, 30)
      SVE_OPERANDS);
  // clang-format on
}

void gemm_f32_bf16_bf16p24x4_4x24_sve256_bfmmla(size_t steps, const void* lhs, const void* rhs, float* tile,
                                                size_t ld_tile) {
  size_t quads = steps / 4, rest = steps % 4;
  // clang-format off: one row pair per line
  __asm__ volatile(
      MMLA_ZERO_8(8, 9, 12, 13, 16, 17, 20, 21)
      MMLA_ZERO(24) MMLA_ZERO(25) MMLA_ZERO(28) MMLA_ZERO(29)
      SVE_LOOP(SVE_STEP_4(0) SVE_STEP_4(1) SVE_STEP_4(2) SVE_STEP_4(3), SVE_STEP_4(0), 32)
      SVE_STORE_ROW_PAIR(8, 12, 16, 20, 24, 28)
      SVE_STORE_ROW_PAIR(9, 13, 17, 21, 25, 29)
      SVE_OPERANDS);
  // clang-format on
}

void gemm_f32_bf16_bf16p24x4_2x24_sve256_bfmmla(size_t steps, const void* lhs, const void* rhs, float* tile,
                                                size_t ld_tile) {
  size_t quads = steps / 4, rest = steps % 4;
  // clang-format off: one row pair per line
  __asm__ volatile(
      MMLA_ZERO_8(8, 9, 12, 13, 16, 17, 20, 21)
      MMLA_ZERO(24) MMLA_ZERO(25) MMLA_ZERO(28) MMLA_ZERO(29)
      SVE_LOOP(SVE_EVEN_STEP_2(0) SVE_ODD_STEP_2(1) SVE_EVEN_STEP_2(2) SVE_ODD_STEP_2(3), SVE_EVEN_STEP_2(0), 16)
      SVE_ADD(8, 9) SVE_ADD(12, 13) SVE_ADD(16, 17) SVE_ADD(20, 21) SVE_ADD(24, 25) SVE_ADD(28, 29)
      SVE_STORE_ROW_PAIR(8, 12, 16, 20, 24, 28)
      SVE_OPERANDS);
  // clang-format on
}

constexpr UKernel kUKernels[] = {
    {"gemm_f32_bf16_bf16p24x4_2x24_sve256_bfmmla", 2, gemm_f32_bf16_bf16p24x4_2x24_sve256_bfmmla},
    {"gemm_f32_bf16_bf16p24x4_4x24_sve256_bfmmla", 4, gemm_f32_bf16_bf16p24x4_4x24_sve256_bfmmla},
    {"gemm_f32_bf16_bf16p24x4_6x24_sve256_bfmmla", 6, gemm_f32_bf16_bf16p24x4_6x24_sve256_bfmmla},
    {"gemm_f32_bf16_bf16p24x4_8x24_sve256_bfmmla", 8, gemm_f32_bf16_bf16p24x4_8x24_sve256_bfmmla},
};

constexpr GemmKernel kFamily = bf16_pairs_family<kNr>(
    "bf16p24x4", kFeatureNeon | kFeatureBf16 | kFeatureSve | kFeatureSveBf16 | kFeatureSve256, kUKernels);

}  // namespace

extern const GemmKernel kGemmSveBfmmla = kFamily;

}  // namespace torch_ext

TARGET_REGION_END

#endif
