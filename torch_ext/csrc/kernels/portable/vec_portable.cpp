// Row kernels and fp32 matrix kernels for every CPU, in the compilers' vector extensions alone: what the other instances are
// compared with.
#include <type_traits>

#include "kernels/families.h"

#include "cpu_features.h"

namespace torch_ext {
namespace vec_portable {

#define TORCH_EXT_VEC_WIDTH 4
#define TORCH_EXT_VEC_NR "12"
#define TORCH_EXT_VEC_MAIN_MR 8
#define TORCH_EXT_VEC_NAME "portable"
#define TORCH_EXT_VEC_FEATURES (kFeatureNone)
// clang-format off: the order matters
#include "kernels/vec/simd.inl"
#include "kernels/vec/rows.inl"
#include "kernels/vec/gemm_f32.inl"
#include "kernels/vec/quantize.inl"
#include "kernels/vec/gemm_s8.inl"
#include "kernels/vec/instance.inl"
// clang-format on

}  // namespace vec_portable

extern const VecKernels kVecPortable = vec_portable::kKernels;
extern const GemmKernel kGemmF32Portable = vec_portable::kFamilyF32;
extern const GemmKernel kGemmBf16Portable = vec_portable::kFamilyBf16;
extern const GemmKernel kGemmS8Portable = vec_portable::kFamilyS8;

}  // namespace torch_ext
