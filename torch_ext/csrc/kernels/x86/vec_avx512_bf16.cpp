// Row kernels and fp32 matrix kernels for x86-64 with AVX-512 BF16: those of AVX-512 with the hardware's rounding to bf16.
#include <type_traits>

#include "kernels/vec_kernels.h"

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
#define TORCH_EXT_VEC_ATTENTION &kGemmDot, softmax_pack_steps<kDotStep>
#define TORCH_EXT_VEC_FEATURES (kFeatureAvx512 | kFeatureAvx512Bf16)
// clang-format off: the order matters
#include "kernels/vec/simd.inl"
#include "kernels/vec/rows.inl"
#include "kernels/vec/gemm_f32.inl"
#include "kernels/vec/quantize.inl"
#include "kernels/vec/gemm_s8.inl"
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

static constexpr GemmKernel kGemmDot = {"bf16p32x2",
                                        Layout::kBf16Dots,
                                        kDotNr,
                                        2,
                                        kDotStep,
                                        DType::kBF16,
                                        DType::kBF16,
                                        pack_rows_dot<float>,
                                        pack_rows_dot<uint16_t>,
                                        pack_panel_nxk_dot<float>,
                                        pack_panel_nxk_dot<uint16_t>,
                                        pack_panel_kxn_dot<float>,
                                        pack_panel_kxn_dot<uint16_t>,
                                        kDotUKernels,
                                        4};

#include "kernels/vec/instance.inl"

}  // namespace vec_avx512_bf16

extern const VecKernels kVecAvx512Bf16 = vec_avx512_bf16::kKernels;

}  // namespace torch_ext

TARGET_REGION_END

#endif
