// Row kernels and fp32 matrix kernels for x86-64 with AVX2, FMA and F16C.
#include <type_traits>

#include "kernels/families.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu_features.h"
#include "kernels/target_region.h"

TARGET_REGION_BEGIN("avx2,fma,f16c", "avx2,fma,f16c")

namespace torch_ext {
namespace vec_avx2 {

#define TORCH_EXT_VEC_AVX2 1
#define TORCH_EXT_VEC_WIDTH 8
#define TORCH_EXT_VEC_NR "16"
#define TORCH_EXT_VEC_MAIN_MR 6
#define TORCH_EXT_VEC_NAME "avx2_fma"
#define TORCH_EXT_VEC_FEATURES (kFeatureAvx2Fma)
// clang-format off: the order matters
#include "kernels/vec/simd.inl"
#include "kernels/vec/rows.inl"
#include "kernels/vec/gemm_f32.inl"
#include "kernels/x86/gemm_bf16_halves.inl"
#include "kernels/vec/instance.inl"
// clang-format on

}  // namespace vec_avx2

extern const VecKernels kVecAvx2 = vec_avx2::kKernels;
extern const GemmKernel kGemmF32Avx2 = vec_avx2::kFamilyF32;
extern const GemmKernel kGemmBf16Avx2 = vec_avx2::kFamilyBf16Halves;

}  // namespace torch_ext

TARGET_REGION_END

#endif
