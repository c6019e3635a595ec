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
#include "kernels/neon_bf16/gemm_bfmmla.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include "kernels/neon/mmla_asm.h"
#include "kernels/target_region.h"

TARGET_REGION_BEGIN("arch=armv8.2-a+bf16", "bf16")

namespace torch_ext {
namespace {

constexpr size_t kNr = 12;
constexpr size_t kPanelPairs = kNr / 2;
constexpr size_t kKr = 4;

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
