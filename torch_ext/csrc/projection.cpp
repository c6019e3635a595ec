#include "projection.h"

#include <cstdint>
#include <vector>

#include "gemm.h"
#include "packing/packed_weight.h"

namespace torch_ext {

void project_rows(const Dispatch& dispatch, const Projection& p, float* out) {
  const GemmKernel& kernel = *dispatch.gemm_f32;
  std::vector<float> normed;
  if (p.norm_weight) {
    normed.resize(p.rows * p.k);
    for (size_t i = 0; i < p.rows; ++i) {
      dispatch.vec->sum_layer_norm_row(p.k, p.table + i * p.k, nullptr, nullptr, nullptr, p.norm_weight, p.norm_bias,
                                       p.eps, normed.data() + i * p.k, DType::kF32);
    }
  }
  std::vector<char> memory(packed_payload_bytes(kernel, p.n, p.k) + kPackedAlignment);
  char* const panels = memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) % kPackedAlignment);
  pack_weight_panels(kernel, p.n, p.k, p.weight, DType::kF32, p.k, panels, 0, kernel.panels(p.n));
  GemmProblem problem;
  problem.m = p.rows;
  problem.n = p.n;
  problem.k = p.k;
  problem.lhs = p.norm_weight ? normed.data() : p.table;
  problem.ld_lhs = p.k;
  problem.lhs_type = DType::kF32;
  problem.panels = panels;
  problem.epilogue.bias = p.bias;
  problem.epilogue.residual = p.residual;
  problem.epilogue.ld_residual = p.n;
  problem.epilogue.out = out;
  problem.epilogue.ld_out = p.n;
  run_gemm_task(kernel, *dispatch.vec, problem, {}, 0);
}

}  // namespace torch_ext
