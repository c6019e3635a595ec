// Row kernels and fp32 matrix kernels for x86-64 with AVX-512 F, BW, VL and DQ.
#include <type_traits>

#include "kernels/families.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu_features.h"
#include "kernels/target_region.h"

TARGET_REGION_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c",
                    "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

namespace torch_ext {
namespace vec_avx512 {

#define TORCH_EXT_VEC_AVX512 1
#define TORCH_EXT_VEC_WIDTH 16
#define TORCH_EXT_VEC_NR "32"
#define TORCH_EXT_VEC_MAIN_MR 8
#define TORCH_EXT_VEC_NAME "avx512_fma"
#define TORCH_EXT_VEC_FEATURES (kFeatureAvx512)
// clang-format off: the order matters
#include "kernels/vec/simd.inl"
#include "kernels/vec/rows.inl"
#include "kernels/vec/gemm_f32.inl"
#include "kernels/vec/instance.inl"
// clang-format on

}  // namespace vec_avx512

extern const VecKernels kVecAvx512 = vec_avx512::kKernels;
extern const GemmKernel kGemmF32Avx512 = vec_avx512::kFamilyF32;
extern const GemmKernel kGemmBf16Avx512 = vec_avx512::kFamilyBf16;

}  // namespace torch_ext

TARGET_REGION_END

#endif
