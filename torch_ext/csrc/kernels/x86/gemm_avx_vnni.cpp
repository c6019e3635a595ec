// Micro-kernels gemm_f32_qs8dx_qs8cxp16x4_{1,2,4,6}x16_avx_vnni: see gemm_dpbusd.inl.
#include "kernels/families.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <type_traits>

#include "cpu_features.h"
#include "kernels/target_region.h"

TARGET_REGION_BEGIN("avx2,fma,f16c,avxvnni", "avx2,fma,f16c,avxvnni")

namespace torch_ext {
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
TORCH_EXT_INLINE void add_dot(vdot& acc, vdot a, vdot b) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
}
#include "kernels/x86/gemm_dpbusd.inl"

constexpr UKernel kUKernels[] = {
    {"gemm_f32_qs8dx_qs8cxp16x4_1x16_avx_vnni", 1, dot_tile<1>},
    {"gemm_f32_qs8dx_qs8cxp16x4_2x16_avx_vnni", 2, dot_tile<2>},
    {"gemm_f32_qs8dx_qs8cxp16x4_4x16_avx_vnni", 4, dot_tile<4>},
    {"gemm_f32_qs8dx_qs8cxp16x4_6x16_avx_vnni", 6, dot_tile<6>},
};

constexpr GemmKernel kFamily =
    s8_family<kNr, kKr, kKr, 0x80>("qs8cxp16x4", kFeatureAvx2Fma | kFeatureAvxVnni, kUKernels, 4);

}  // namespace

extern const GemmKernel kGemmAvxVnni = kFamily;

}  // namespace torch_ext

TARGET_REGION_END

#endif
