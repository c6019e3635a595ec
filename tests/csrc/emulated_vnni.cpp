// The micro-kernels of gemm_dpbusd.inl with VPDPBUSD spelled out in AVX2, so that their loops, packing and corrections run
// on CPUs without the instruction, too.
#include "kernels/gemm_kernel.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <type_traits>

#include "cpu_features.h"
#include "kernels/target_region.h"

TARGET_REGION_BEGIN("avx2,fma,f16c", "avx2,fma,f16c")

namespace torch_ext::test {
namespace {

#define TORCH_EXT_VEC_AVX2 1
#define TORCH_EXT_VEC_WIDTH 8
// clang-format off: the order matters
#include "kernels/vec/simd.inl"
#include "kernels/vec/quantize.inl"
// clang-format on

typedef __m256i vdot;
TORCH_EXT_INLINE vdot load_dot(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
TORCH_EXT_INLINE vdot broadcast_dot(int32_t four) { return _mm256_set1_epi32(four); }

/// Bytes 0 and 2 of each word, then 1 and 3, as products of 16 bits.
TORCH_EXT_INLINE void add_dot(vdot& acc, vdot a, vdot b) {
  const vdot low = _mm256_set1_epi16(0xff);
  const vdot even = _mm256_madd_epi16(_mm256_and_si256(a, low), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  const vdot odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
  acc = _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
#include "kernels/x86/gemm_dpbusd.inl"

constexpr UKernel kUKernels[] = {
    {"gemm_f32_qs8dx_qs8cxp16x4_1x16_emulated_vnni", 1, dot_tile<1>},
    {"gemm_f32_qs8dx_qs8cxp16x4_2x16_emulated_vnni", 2, dot_tile<2>},
    {"gemm_f32_qs8dx_qs8cxp16x4_4x16_emulated_vnni", 4, dot_tile<4>},
    {"gemm_f32_qs8dx_qs8cxp16x4_6x16_emulated_vnni", 6, dot_tile<6>},
};

constexpr GemmKernel kFamily = s8_family<kNr, kKr, kKr, 0x80>("qs8cxp16x4", kFeatureAvx2Fma, kUKernels, 4);

}  // namespace

extern const GemmKernel kEmulatedVnni = kFamily;

}  // namespace torch_ext::test

TARGET_REGION_END

#endif
