/// bf16 matrix product on SVE's BFMMLA, for vectors of exactly 256 bits: Neoverse V1.
#pragma once

#include "kernels/gemm_kernel.h"

namespace torch_ext {

#if defined(__aarch64__)
/// Runs with vectors of 256 bits only (kFeatureSve256): another length makes wrong products.
extern const GemmKernel kGemmSveBfmmla;
#endif

}  // namespace torch_ext
