// Row kernels and fp32 matrix kernels for aarch64 with Advanced SIMD, which every aarch64 server CPU has.
#include <type_traits>

#include "kernels/families.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include "cpu_features.h"

namespace torch_ext {
namespace vec_neon {

#define TORCH_EXT_VEC_NEON 1
#define TORCH_EXT_VEC_WIDTH 4
#define TORCH_EXT_VEC_NR "12"
#define TORCH_EXT_VEC_MAIN_MR 6
#define TORCH_EXT_VEC_NAME "neon_fmla"
#define TORCH_EXT_VEC_FEATURES (kFeatureNeon)
// clang-format off: the order matters
#include "kernels/vec/simd.inl"
#include "kernels/vec/rows.inl"
#include "kernels/vec/gemm_f32.inl"
#include "kernels/vec/quantize.inl"
#include "kernels/vec/gemm_s8.inl"
#include "kernels/vec/instance.inl"
// clang-format on

}  // namespace vec_neon

extern const VecKernels kVecNeon = vec_neon::kKernels;
extern const GemmKernel kGemmF32Neon = vec_neon::kFamilyF32;
extern const GemmKernel kGemmBf16Neon = vec_neon::kFamilyBf16;
extern const GemmKernel kGemmS8Neon = vec_neon::kFamilyS8;

}  // namespace torch_ext

#endif
