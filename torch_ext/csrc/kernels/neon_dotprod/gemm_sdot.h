/// s8 matrix product on SDOT (FEAT_DotProd): Neoverse N1 (Graviton2, Ampere Altra) and later.
#pragma once

#include "kernels/gemm_kernel.h"

namespace torch_ext {

#if defined(__aarch64__)
extern const GemmKernel kGemmSdot;
#endif

}  // namespace torch_ext
