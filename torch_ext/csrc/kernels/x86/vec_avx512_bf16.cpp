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
#define TORCH_EXT_VEC_ATTENTION &kGemmDot, softmax_pack_rows
#define TORCH_EXT_VEC_FEATURES (kFeatureAvx512 | kFeatureAvx512Bf16)
// clang-format off: the order matters
#include "kernels/vec/simd.inl"
#include "kernels/vec/rows.inl"
#include "kernels/vec/gemm_f32.inl"
#include "kernels/vec/quantize.inl"
#include "kernels/vec/gemm_s8.inl"
#include "kernels/vec/softmax_pack.inl"
#include "kernels/x86/gemm_dot_bf16.inl"
#include "kernels/vec/instance.inl"
// clang-format on

}  // namespace vec_avx512_bf16

extern const VecKernels kVecAvx512Bf16 = vec_avx512_bf16::kKernels;

}  // namespace torch_ext

TARGET_REGION_END

#endif
