// Row kernels for x86-64 with AVX-512 BF16, those of AVX-512 with the hardware's rounding to bf16, and bf16 products on
// VDPBF16PS.
#include <type_traits>

#include "kernels/families.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu_features.h"
#include "kernels/target_region.h"

TARGET_REGION_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512bf16",
                    "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512bf16")

namespace torch_ext {
namespace vec_avx512_bf16 {

#define TORCH_EXT_VEC_AVX512 1
#define TORCH_EXT_VEC_AVX512_BF16 1
#define TORCH_EXT_VEC_WIDTH 16
#define TORCH_EXT_VEC_NR "32"
#define TORCH_EXT_VEC_MAIN_MR 8
#define TORCH_EXT_VEC_NAME "avx512_bf16_fma"
#define TORCH_EXT_VEC_FEATURES (kFeatureAvx512 | kFeatureAvx512Bf16)
// clang-format off: the order matters
#include "kernels/vec/simd.inl"
#include "kernels/vec/rows.inl"
#include "kernels/vec/gemm_f32.inl"
#include "kernels/vec/softmax_pack.inl"
// clang-format on

constexpr size_t kDotStep = 8;
#include "kernels/x86/gemm_dot_bf16.inl"

// Of eight rows: 16 accumulators.
static constexpr UKernel kDotUKernels[] = {
    {"gemm_f32_bf16_bf16p32x2_1x32_avx512_bf16_dot", 1, ukernel_dot<1>},
    {"gemm_f32_bf16_bf16p32x2_2x32_avx512_bf16_dot", 2, ukernel_dot<2>},
    {"gemm_f32_bf16_bf16p32x2_4x32_avx512_bf16_dot", 4, ukernel_dot<4>},
    {"gemm_f32_bf16_bf16p32x2_8x32_avx512_bf16_dot", 8, ukernel_dot<8>},
};

static constexpr GemmKernel kFamilyDot = dot_family(TORCH_EXT_VEC_FEATURES, kDotUKernels, 4);

#include "kernels/vec/instance.inl"

}  // namespace vec_avx512_bf16

extern const VecKernels kVecAvx512Bf16 = vec_avx512_bf16::kKernels;
extern const GemmKernel kGemmAvx512Bf16Dot = vec_avx512_bf16::kFamilyDot;

}  // namespace torch_ext

TARGET_REGION_END

#endif
