// Row kernels for aarch64 with FEAT_BF16: those of NEON with the hardware's rounding to bf16.
#include <type_traits>

#include "kernels/families.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include "cpu_features.h"
#include "kernels/target_region.h"

TARGET_REGION_BEGIN("arch=armv8.2-a+bf16", "bf16")

namespace torch_ext {
namespace vec_neon_bf16 {

#define TORCH_EXT_VEC_NEON 1
#define TORCH_EXT_VEC_NEON_BF16 1
#define TORCH_EXT_VEC_WIDTH 4
#define TORCH_EXT_VEC_NAME "neon_bf16_fmla"
#define TORCH_EXT_VEC_FEATURES (kFeatureNeon | kFeatureBf16)
// clang-format off: the order matters
#include "kernels/vec/simd.inl"
#include "kernels/vec/rows.inl"
#include "kernels/vec/instance.inl"
// clang-format on

}  // namespace vec_neon_bf16

extern const VecKernels kVecNeonBf16 = vec_neon_bf16::kKernels;

}  // namespace torch_ext

TARGET_REGION_END

#endif
