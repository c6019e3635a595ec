/// bf16 matrix product on BFMMLA (FEAT_BF16): Neoverse N2, V1, V2 and later.
#pragma once

#include "kernels/gemm_kernel.h"

namespace torch_ext {

#if defined(__aarch64__)
extern const GemmKernel kGemmBfmmla;
#endif

}  // namespace torch_ext
