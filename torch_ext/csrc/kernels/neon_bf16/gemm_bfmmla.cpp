// Micro-kernels gemm_f32_bf16_bf16p12x4_{2,4,6,8}x12_neon_bfmmla and the packers of their layout.
//
// BFMMLA Vd.4S, Vn.8H, Vm.8H takes two rows of four bf16 from each side and adds their 2 x 2 products:
//
//   Vd = [ d00 d01 d10 d11 ],  Vn = [ n(0,0..3) n(1,0..3) ],  Vm = [ m(0,0..3) m(1,0..3) ]
//   d(i,j) += sum over p < 4 of n(i,p) * m(j,p)
//
// https://developer.arm.com/documentation/ddi0602/latest/SIMD-FP-Instructions/BFMMLA--BFloat16-floating-point-matrix-multiply-accumulate-into-2x2-matrix-
//
// Layout bf16p<R>x4, used by panels (R = nr = 12) and blocks (R = mr): for every step of four products, the rows one
// after the other, four products each, so that two neighbouring rows are one operand.
//
//   step 0: (0,0..3) (1,0..3) | (2,0..3) (3,0..3) | ... (R-1,0..3)       8 * R bytes
//   step 1: (0,4..7) (1,4..7) | ...
//
//   element (i, p) lies at  ((p / 4) * R + i) * 4 + p % 4
//
// Worked example: R = 12, row 5, product 6 -> ((1 * 12) + 5) * 4 + 2 = 70.
//
// Edges: packers fill rows past the last and products past k with zeros; the micro-kernels know whole tiles only.
// Tiles are f32, row stride 12.
#include "kernels/neon_bf16/gemm_bfmmla.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include "kernels/target_region.h"

TARGET_REGION_BEGIN("arch=armv8.2-a+bf16", "bf16")

namespace torch_ext {
namespace {

constexpr size_t kNr = 12;
constexpr size_t kPanelPairs = kNr / 2;
constexpr size_t kKr = 4;

// ---- micro-kernels ------------------------------------------------------------------------------------------------

// clang-format off: one instruction per line

// The kernels of eight and of two rows are assembly: the loop of the first needs all 32 vector registers, and compilers
// that hoist a load spill an accumulator; the second, unrolled, suffers the same way.
//
//   v0..v3    block: rows 0-1, 2-3, 4-5, 6-7 of one step
//   v4..v7    panel: two column pairs at a time; four registers, so that loads run ahead of use
//   v8..v31   accumulators: v(8 + 4 j + i) holds rows 2i, 2i+1 and columns 2j, 2j+1
//
// One step: 24 BFMMLA, 5 LDP (10 vectors). The main loop takes 4 steps and 4 instructions of loop control: 120
// instructions for 96 BFMMLA.

// Column pair in register `b`, accumulators a0..a3.
#define BFMMLA_COLUMN_PAIR(b, a0, a1, a2, a3)   \
  "bfmmla v" #a0 ".4s, v0.8h, v" #b ".8h \n"    \
  "bfmmla v" #a1 ".4s, v1.8h, v" #b ".8h \n"    \
  "bfmmla v" #a2 ".4s, v2.8h, v" #b ".8h \n"    \
  "bfmmla v" #a3 ".4s, v3.8h, v" #b ".8h \n"

// One step at byte offsets of the two pointers. The offsets are written out: LDP takes literals.
#define STEP(lhs0, lhs1, rhs0, rhs1, rhs2)                \
  "ldp q0, q1, [%[lhs], #" #lhs0 "] \n"                   \
  "ldp q4, q5, [%[rhs], #" #rhs0 "] \n"                   \
  "ldp q2, q3, [%[lhs], #" #lhs1 "] \n"                   \
  "ldp q6, q7, [%[rhs], #" #rhs1 "] \n"                   \
  BFMMLA_COLUMN_PAIR(4, 8, 9, 10, 11)                     \
  BFMMLA_COLUMN_PAIR(5, 12, 13, 14, 15)                   \
  "ldp q4, q5, [%[rhs], #" #rhs2 "] \n"                   \
  BFMMLA_COLUMN_PAIR(6, 16, 17, 18, 19)                   \
  BFMMLA_COLUMN_PAIR(7, 20, 21, 22, 23)                   \
  BFMMLA_COLUMN_PAIR(4, 24, 25, 26, 27)                   \
  BFMMLA_COLUMN_PAIR(5, 28, 29, 30, 31)

#define ZERO(r) "movi v" #r ".2d, #0 \n"

// Two rows of the tile from the six accumulators of one row pair: low halves are the even row, high halves the odd.
#define STORE_ROW_PAIR(a0, a1, a2, a3, a4, a5, even0, even2, odd0, odd2) \
  "zip1 v0.2d, v" #a0 ".2d, v" #a1 ".2d \n"                              \
  "zip1 v1.2d, v" #a2 ".2d, v" #a3 ".2d \n"                              \
  "zip1 v2.2d, v" #a4 ".2d, v" #a5 ".2d \n"                              \
  "zip2 v3.2d, v" #a0 ".2d, v" #a1 ".2d \n"                              \
  "zip2 v4.2d, v" #a2 ".2d, v" #a3 ".2d \n"                              \
  "zip2 v5.2d, v" #a4 ".2d, v" #a5 ".2d \n"                              \
  "stp q0, q1, [%[tile], #" #even0 "] \n"                                \
  "str q2, [%[tile], #" #even2 "] \n"                                    \
  "stp q3, q4, [%[tile], #" #odd0 "] \n"                                 \
  "str q5, [%[tile], #" #odd2 "] \n"

void gemm_f32_bf16_bf16p12x4_8x12_neon_bfmmla(size_t steps, const void* lhs, const void* rhs, float* tile) {
  size_t quads = steps / 4, rest = steps % 4;
  __asm__ volatile(
      ZERO(8) ZERO(9) ZERO(10) ZERO(11) ZERO(12) ZERO(13) ZERO(14) ZERO(15)
      ZERO(16) ZERO(17) ZERO(18) ZERO(19) ZERO(20) ZERO(21) ZERO(22) ZERO(23)
      ZERO(24) ZERO(25) ZERO(26) ZERO(27) ZERO(28) ZERO(29) ZERO(30) ZERO(31)
      "cbz %[quads], 2f \n"
      "1: \n"
      STEP(0, 32, 0, 32, 64)
      STEP(64, 96, 96, 128, 160)
      STEP(128, 160, 192, 224, 256)
      STEP(192, 224, 288, 320, 352)
      "add %[lhs], %[lhs], #256 \n"
      "subs %[quads], %[quads], #1 \n"
      "add %[rhs], %[rhs], #384 \n"
      "b.ne 1b \n"
      "2: \n"
      "cbz %[rest], 4f \n"
      "3: \n"
      STEP(0, 32, 0, 32, 64)
      "add %[lhs], %[lhs], #64 \n"
      "subs %[rest], %[rest], #1 \n"
      "add %[rhs], %[rhs], #96 \n"
      "b.ne 3b \n"
      "4: \n"
      STORE_ROW_PAIR(8, 12, 16, 20, 24, 28, 0, 32, 48, 80)
      STORE_ROW_PAIR(9, 13, 17, 21, 25, 29, 96, 128, 144, 176)
      STORE_ROW_PAIR(10, 14, 18, 22, 26, 30, 192, 224, 240, 272)
      STORE_ROW_PAIR(11, 15, 19, 23, 27, 31, 288, 320, 336, 368)
      : [lhs] "+r"(lhs), [rhs] "+r"(rhs), [quads] "+r"(quads), [rest] "+r"(rest)
      : [tile] "r"(tile)
      : "cc", "memory", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v14",
        "v15", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30",
        "v31");
}

// Two rows: six accumulators would not hide the latency of BFMMLA, so that even and odd steps have a set each.
//
//   v0..v3    block, one register for each of four steps
//   v8..v13   accumulators of steps 0 and 2: columns 2j, 2j+1 in v(8 + j)
//   v14..v19  accumulators of steps 1 and 3
//   v20..v31  panel, two steps at a time
//
// Four steps: 24 BFMMLA, 14 LDP and 4 instructions of loop control.
#define ROW_PAIR_STEP(a, rhs0, rhs1, rhs2, b0, b1, b2, b3, b4, b5, c0, c1, c2, c3, c4, c5) \
  "ldp q" #b0 ", q" #b1 ", [%[rhs], #" #rhs0 "] \n"                                        \
  "ldp q" #b2 ", q" #b3 ", [%[rhs], #" #rhs1 "] \n"                                        \
  "ldp q" #b4 ", q" #b5 ", [%[rhs], #" #rhs2 "] \n"                                        \
  "bfmmla v" #c0 ".4s, v" #a ".8h, v" #b0 ".8h \n"                                         \
  "bfmmla v" #c1 ".4s, v" #a ".8h, v" #b1 ".8h \n"                                         \
  "bfmmla v" #c2 ".4s, v" #a ".8h, v" #b2 ".8h \n"                                         \
  "bfmmla v" #c3 ".4s, v" #a ".8h, v" #b3 ".8h \n"                                         \
  "bfmmla v" #c4 ".4s, v" #a ".8h, v" #b4 ".8h \n"                                         \
  "bfmmla v" #c5 ".4s, v" #a ".8h, v" #b5 ".8h \n"

#define EVEN_STEP(a, rhs0, rhs1, rhs2) \
  ROW_PAIR_STEP(a, rhs0, rhs1, rhs2, 20, 21, 22, 23, 24, 25, 8, 9, 10, 11, 12, 13)
#define ODD_STEP(a, rhs0, rhs1, rhs2) \
  ROW_PAIR_STEP(a, rhs0, rhs1, rhs2, 26, 27, 28, 29, 30, 31, 14, 15, 16, 17, 18, 19)
#define ADD_SETS(even, odd) "fadd v" #even ".4s, v" #even ".4s, v" #odd ".4s \n"

void gemm_f32_bf16_bf16p12x4_2x12_neon_bfmmla(size_t steps, const void* lhs, const void* rhs, float* tile) {
  size_t quads = steps / 4, rest = steps % 4;
  __asm__ volatile(
      ZERO(8) ZERO(9) ZERO(10) ZERO(11) ZERO(12) ZERO(13) ZERO(14) ZERO(15) ZERO(16) ZERO(17) ZERO(18) ZERO(19)
      "cbz %[quads], 2f \n"
      "1: \n"
      "ldp q0, q1, [%[lhs]] \n"
      "ldp q2, q3, [%[lhs], #32] \n"
      EVEN_STEP(0, 0, 32, 64)
      ODD_STEP(1, 96, 128, 160)
      EVEN_STEP(2, 192, 224, 256)
      ODD_STEP(3, 288, 320, 352)
      "add %[lhs], %[lhs], #64 \n"
      "subs %[quads], %[quads], #1 \n"
      "add %[rhs], %[rhs], #384 \n"
      "b.ne 1b \n"
      "2: \n"
      "cbz %[rest], 4f \n"
      "3: \n"
      "ldr q0, [%[lhs]], #16 \n"
      EVEN_STEP(0, 0, 32, 64)
      "subs %[rest], %[rest], #1 \n"
      "add %[rhs], %[rhs], #96 \n"
      "b.ne 3b \n"
      "4: \n"
      ADD_SETS(8, 14) ADD_SETS(9, 15) ADD_SETS(10, 16) ADD_SETS(11, 17) ADD_SETS(12, 18) ADD_SETS(13, 19)
      STORE_ROW_PAIR(8, 9, 10, 11, 12, 13, 0, 32, 48, 80)
      : [lhs] "+r"(lhs), [rhs] "+r"(rhs), [quads] "+r"(quads), [rest] "+r"(rest)
      : [tile] "r"(tile)
      : "cc", "memory", "v0", "v1", "v2", "v3", "v4", "v5", "v8", "v9", "v10", "v11", "v12", "v13", "v14", "v15", "v16",
        "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30", "v31");
}

#undef ADD_SETS
#undef ODD_STEP
#undef EVEN_STEP
#undef ROW_PAIR_STEP
#undef BFMMLA_COLUMN_PAIR
#undef STEP
#undef ZERO
#undef STORE_ROW_PAIR

// clang-format on

// Two or three row pairs: 6 * kPairs accumulators leave registers for the compiler.
template <size_t kPairs>
inline __attribute__((always_inline)) void row_pairs(size_t steps, const void* lhs_block, const void* rhs_panel,
                                                     float* tile) {
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
      vst1q_f32(tile + 2 * i * kNr + 2 * j, vreinterpretq_f32_f64(vzip1q_f64(a, b)));
      vst1q_f32(tile + (2 * i + 1) * kNr + 2 * j, vreinterpretq_f32_f64(vzip2q_f64(a, b)));
    }
  }
}

void gemm_f32_bf16_bf16p12x4_4x12_neon_bfmmla(size_t steps, const void* lhs, const void* rhs, float* tile) {
  row_pairs<2>(steps, lhs, rhs, tile);
}

void gemm_f32_bf16_bf16p12x4_6x12_neon_bfmmla(size_t steps, const void* lhs, const void* rhs, float* tile) {
  row_pairs<3>(steps, lhs, rhs, tile);
}

// ---- packers ------------------------------------------------------------------------------------------------------

inline uint16x8_t load_eight(const uint16_t* p) { return vld1q_u16(p); }

inline uint16x8_t load_eight(const float* p) {
  const bfloat16x8_t low = vcvtq_low_bf16_f32(vld1q_f32(p));
  return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(low, vld1q_f32(p + 4)));
}

/// The first n < 8 elements, the others zero.
template <typename T>
inline uint16x8_t load_some(const T* p, size_t n) {
  T lanes[8] = {};
  __builtin_memcpy(lanes, p, n * sizeof(T));
  return load_eight(lanes);
}

inline uint16x8_t low_halves(uint16x8_t a, uint16x8_t b) {
  return vreinterpretq_u16_u64(vzip1q_u64(vreinterpretq_u64_u16(a), vreinterpretq_u64_u16(b)));
}

inline uint16x8_t high_halves(uint16x8_t a, uint16x8_t b) {
  return vreinterpretq_u16_u64(vzip2q_u64(vreinterpretq_u64_u16(a), vreinterpretq_u64_u16(b)));
}

// Source rows become rows of the block: two rows of eight products are two operands.
template <typename T>
void pack_rows(size_t rows, size_t block_rows, size_t k, const void* src, size_t ld, void* dst) {
  const size_t step_stride = block_rows * kKr;
  for (size_t i = 0; i < block_rows; i += 2) {
    uint16_t* d = static_cast<uint16_t*>(dst) + i * kKr;
    if (i >= rows) {
      for (size_t p = 0; p < k; p += kKr, d += step_stride) vst1q_u16(d, vdupq_n_u16(0));
      continue;
    }
    const T* const r0 = static_cast<const T*>(src) + i * ld;
    // A lone last row is paired with itself, and its partner cleared.
    const bool pair = i + 1 < rows;
    const T* const r1 = pair ? r0 + ld : r0;
    const uint16x8_t keep = vdupq_n_u16(pair ? 0xffff : 0);
    size_t p = 0;
    for (; p + 8 <= k; p += 8, d += 2 * step_stride) {
      const uint16x8_t a = load_eight(r0 + p), b = vandq_u16(load_eight(r1 + p), keep);
      vst1q_u16(d, low_halves(a, b));
      vst1q_u16(d + step_stride, high_halves(a, b));
    }
    if (p < k) {
      const uint16x8_t a = load_some(r0 + p, k - p), b = vandq_u16(load_some(r1 + p, k - p), keep);
      vst1q_u16(d, low_halves(a, b));
      if (k - p > kKr) vst1q_u16(d + step_stride, high_halves(a, b));
    }
  }
}

// Eight columns of four products, one product from each row, become four operands.
inline void store_columns(uint16x8_t r0, uint16x8_t r1, uint16x8_t r2, uint16x8_t r3, size_t pairs, uint16_t* d) {
  const uint16x8_t a = vzip1q_u16(r0, r2), b = vzip1q_u16(r1, r3);
  vst1q_u16(d, vzip1q_u16(a, b));
  vst1q_u16(d + 8, vzip2q_u16(a, b));
  if (pairs > 2) {
    const uint16x8_t c = vzip2q_u16(r0, r2), e = vzip2q_u16(r1, r3);
    vst1q_u16(d + 16, vzip1q_u16(c, e));
    vst1q_u16(d + 24, vzip2q_u16(c, e));
  }
}

// Source [k, n]: the panel's columns are columns of the source.
template <typename T>
void pack_cols(size_t cols, size_t k, const void* src, size_t ld, void* dst) {
  const T* const s = static_cast<const T*>(src);
  uint16_t* d = static_cast<uint16_t*>(dst);
  const uint16x8_t zero = vdupq_n_u16(0);
  for (size_t p = 0; p < k; p += kKr, d += kNr * kKr) {
    for (size_t j = 0; j < kNr; j += 8) {
      const size_t left = cols > j ? cols - j : 0;
      uint16x8_t r[kKr];
      for (size_t i = 0; i < kKr; ++i) {
        const T* const row = s + (p + i) * ld + j;
        r[i] = p + i >= k || left == 0 ? zero : left >= 8 ? load_eight(row) : load_some(row, left);
      }
      store_columns(r[0], r[1], r[2], r[3], (kNr - j) / 2, d + j * kKr);
    }
  }
}

constexpr UKernel kUKernels[] = {
    {"gemm_f32_bf16_bf16p12x4_2x12_neon_bfmmla", 2, gemm_f32_bf16_bf16p12x4_2x12_neon_bfmmla},
    {"gemm_f32_bf16_bf16p12x4_4x12_neon_bfmmla", 4, gemm_f32_bf16_bf16p12x4_4x12_neon_bfmmla},
    {"gemm_f32_bf16_bf16p12x4_6x12_neon_bfmmla", 6, gemm_f32_bf16_bf16p12x4_6x12_neon_bfmmla},
    {"gemm_f32_bf16_bf16p12x4_8x12_neon_bfmmla", 8, gemm_f32_bf16_bf16p12x4_8x12_neon_bfmmla},
};

constexpr GemmKernel kTable = {"bf16p12x4",
                               Layout::kBf16Pairs,
                               kNr,
                               kKr,
                               kKr,
                               DType::kBF16,
                               DType::kBF16,
                               pack_rows<float>,
                               pack_rows<uint16_t>,
                               pack_rows<float>,
                               pack_rows<uint16_t>,
                               pack_cols<float>,
                               pack_cols<uint16_t>,
                               kUKernels,
                               4};

}  // namespace

extern const GemmKernel kGemmBfmmla = kTable;

}  // namespace torch_ext

TARGET_REGION_END

#endif
