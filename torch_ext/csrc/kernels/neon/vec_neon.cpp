// Row kernels and fp32 matrix kernels for aarch64 with Advanced SIMD, which every aarch64 server CPU has.
#include <type_traits>

#include "kernels/vec_kernels.h"

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
#define TORCH_EXT_VEC_ATTENTION nullptr, nullptr
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

}  // namespace torch_ext

#endif
