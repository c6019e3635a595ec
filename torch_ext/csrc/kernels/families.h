/// Every family of kernels that is compiled for this architecture. Which one runs: dispatch.cpp.
#pragma once

#include "kernels/gemm_kernel.h"
#include "kernels/vec_kernels.h"

namespace torch_ext {

#if defined(__aarch64__)
extern const GemmKernel kGemmSveBfmmla, kGemmBfmmla;  // bf16
extern const GemmKernel kGemmSmmla, kGemmSdot;        // s8
extern const GemmKernel kGemmF32Neon, kGemmBf16Neon, kGemmS8Neon;
extern const VecKernels kVecNeonBf16, kVecNeon;
#elif defined(__x86_64__)
extern const GemmKernel kGemmAmx, kGemmAvx512Bf16Dot;                 // bf16
extern const GemmKernel kGemmAvx512Vnni, kGemmAvxVnni, kGemmPmaddwd;  // s8
extern const GemmKernel kGemmF32Avx512, kGemmBf16Avx512;
extern const GemmKernel kGemmF32Avx2, kGemmBf16Avx2;
extern const VecKernels kVecAvx512Bf16, kVecAvx512, kVecAvx2;
#endif
extern const GemmKernel kGemmF32Portable, kGemmBf16Portable, kGemmS8Portable;
extern const VecKernels kVecPortable;

}  // namespace torch_ext
