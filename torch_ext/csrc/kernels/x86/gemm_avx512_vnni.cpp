// Micro-kernels gemm_f32_qs8dx_qs8cxp32x4_{1,2,4,8}x32_avx512_vnni: see gemm_dpbusd.inl.
#include "kernels/families.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <type_traits>

#include "cpu_features.h"
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

typedef __m512i vdot;
TORCH_EXT_INLINE vdot load_dot(const int8_t* p) { return _mm512_loadu_si512(p); }
TORCH_EXT_INLINE vdot broadcast_dot(int32_t four) { return _mm512_set1_epi32(four); }
TORCH_EXT_INLINE void add_dot(vdot& acc, vdot a, vdot b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}
#include "kernels/x86/gemm_dpbusd.inl"

constexpr UKernel kUKernels[] = {
    {"gemm_f32_qs8dx_qs8cxp32x4_1x32_avx512_vnni", 1, dot_tile<1>},
    {"gemm_f32_qs8dx_qs8cxp32x4_2x32_avx512_vnni", 2, dot_tile<2>},
    {"gemm_f32_qs8dx_qs8cxp32x4_4x32_avx512_vnni", 4, dot_tile<4>},
    {"gemm_f32_qs8dx_qs8cxp32x4_8x32_avx512_vnni", 8, dot_tile<8>},
};

constexpr GemmKernel kFamily =
    s8_family<kNr, kKr, kKr, 0x80>("qs8cxp32x4", kFeatureAvx512 | kFeatureAvx512Vnni, kUKernels, 4);

}  // namespace

extern const GemmKernel kGemmAvx512Vnni = kFamily;

}  // namespace torch_ext

TARGET_REGION_END

#endif
