/// Which kernels run on this CPU.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/gemm_kernel.h"
#include "kernels/vec_kernels.h"

namespace torch_ext {

/// Who computes a linear layer.
enum class LinearEngine {
  kOwn,     ///< a GemmKernel of ours
  kOnednn,  ///< PyTorch's prepacked oneDNN linear
  kTorch,   ///< PyTorch's aten::linear
};

struct Isa {
  const char* name;  ///< what TORCH_EXT_ISA takes
  uint32_t required_features;
  LinearEngine linear;
  const GemmKernel* gemm;     ///< for weights of bf16; null unless `linear` is kOwn
  const GemmKernel* gemm_s8;  ///< for weights of s8; null: the best that the CPU has
  const VecKernels* vec;      ///< row kernels; null: the best that the CPU has
};

/// The candidates of this architecture, best first.
const Isa* isa_candidates(size_t* count);

/// The choice for this process: the first candidate whose features the CPU has, or the one that the environment
/// variable TORCH_EXT_ISA names. Made at the first call. Throws std::runtime_error if TORCH_EXT_ISA names none, or one
/// that this CPU cannot run.
struct Dispatch {
  const Isa* isa;
  const GemmKernel* gemm_s8;
  const VecKernels* vec;
  bool forced;
};
const Dispatch& dispatch();

/// The matrix kernels that attention uses for operands of type `t` under this dispatch.
const GemmKernel& attention_gemm(const Dispatch& d, DType t);

/// JSON: architecture, chosen ISA, candidates with what they require, CPU features, kernel names.
std::string isa_report_json();

}  // namespace torch_ext
