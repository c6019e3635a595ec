/// Which kernels run on this CPU.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "kernels/gemm_kernel.h"
#include "kernels/vec_kernels.h"

namespace torch_ext {

/// Who computes a linear layer of bf16 weights.
enum class LinearEngine {
  kOwn,     ///< a GemmKernel of ours
  kOnednn,  ///< PyTorch's prepacked oneDNN linear
  kTorch,   ///< PyTorch's aten::linear
};

/// A level of the instruction set. Kernels may use what it requires, and those of its optional features that the CPU has.
struct Isa {
  const char* name;  ///< what TORCH_EXT_ISA takes
  uint32_t required_features;
  uint32_t optional_features = 0;
  LinearEngine linear = LinearEngine::kOwn;
};

/// The levels of this architecture, best first.
std::span<const Isa> isas();

/// Every family that is compiled for this architecture, in order of preference; the last one of each list runs everywhere.
std::span<const GemmKernel* const> bf16_kernels();
std::span<const GemmKernel* const> s8_kernels();
std::span<const GemmKernel* const> f32_kernels();
std::span<const VecKernels* const> row_kernels();

/// A level, and the first kernel of each list that runs on it.
struct Dispatch {
  const Isa* isa = nullptr;
  const GemmKernel* gemm_bf16 = nullptr;  ///< linear layers where `isa->linear` is kOwn, and attention everywhere
  const GemmKernel* gemm_s8 = nullptr;
  const GemmKernel* gemm_f32 = nullptr;
  const VecKernels* vec = nullptr;
  bool forced = false;

  /// The matrix kernels for packed weights in `layout`; null: PyTorch computes with it.
  const GemmKernel* gemm_for(Layout layout) const;
};

/// The kernels of a level on a CPU with `features`, which has those that the level requires.
Dispatch kernels_of(const Isa& isa, uint32_t features);

/// The choice for this process: the first level whose features the CPU has, or the one that the environment variable
/// TORCH_EXT_ISA names. Made at the first call. Throws std::runtime_error if TORCH_EXT_ISA names none, or one that this
/// CPU cannot run.
const Dispatch& dispatch();

/// The same for a process that has no PyTorch to compute with: the first level whose linear layers run on kernels of ours.
/// Throws std::runtime_error where `dispatch` does, and if TORCH_EXT_ISA names a level that needs PyTorch.
const Dispatch& own_dispatch();

/// The kernels of ours for weights of the kind that lie in `layout` (s8, fp32 or bf16), whether or not it is their layout;
/// null where `engine`, which multiplies bf16, is not kOwn.
const GemmKernel* own_kernel(const Dispatch& d, LinearEngine engine, Layout layout);

/// The matrix kernels that attention uses for operands of type `t` under this dispatch. Where bf16 is multiplied in fp32
/// anyway, its keys and values are widened once, as they are packed.
inline const GemmKernel& attention_gemm(const Dispatch& d, DType t) {
  return t == DType::kBF16 && d.gemm_bf16->lhs_type == DType::kBF16 ? *d.gemm_bf16 : *d.gemm_f32;
}

/// JSON: architecture, chosen ISA, candidates with what they require, CPU features, kernel names.
std::string isa_report_json();

}  // namespace torch_ext
