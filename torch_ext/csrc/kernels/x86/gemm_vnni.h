/// s8 matrix product on VPDPBUSD (AVX-512 VNNI).
#pragma once

#include "kernels/gemm_kernel.h"

namespace torch_ext {

#if defined(__x86_64__)
extern const GemmKernel kGemmVnni;
#endif

}  // namespace torch_ext
