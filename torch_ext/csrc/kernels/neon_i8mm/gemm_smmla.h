/// s8 matrix product on SMMLA (FEAT_I8MM): Neoverse N2, V1, V2 and later.
#pragma once

#include "kernels/gemm_kernel.h"

namespace torch_ext {

#if defined(__aarch64__)
extern const GemmKernel kGemmSmmla;
#endif

}  // namespace torch_ext
