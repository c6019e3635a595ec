#include "head.h"

#include <algorithm>
#include <vector>

#include "gemm.h"
#include "rows.h"

namespace torch_ext {
namespace {

// act(x W^T + bias), fp32.
void linear(const Matrix& matrix, const void* x, DType type, size_t rows, Activation activation,
            const Dispatch& dispatch, EncoderHost& host, float* out) {
  const GemmKernel& kernel = *dispatch.gemm_for(matrix.header.layout);
  GemmProblem problem;
  problem.m = rows;
  problem.n = matrix.n();
  problem.k = problem.ld_lhs = matrix.k();
  problem.lhs = x;
  problem.lhs_type = type;
  problem.panels = matrix.payload();
  problem.activation = activation;
  problem.epilogue.bias = matrix.bias;
  problem.epilogue.out = out;
  problem.epilogue.ld_out = problem.n;
  problem.epilogue.out_type = DType::kF32;
  const GemmPlan plan =
      finer_plan(kernel, rows, problem.k, plan_gemm(kernel, rows, problem.n, problem.k, host.threads()));
  PanelQueue queue(plan);
  run_tasks(host, plan.tasks(),
            [&](size_t task) { run_gemm_task(kernel, *dispatch.vec, problem, plan, task, &queue); });
}

}  // namespace

void run_head(const HeadModel& head, const void* x, DType type, size_t rows, const Dispatch& dispatch,
              EncoderHost& host, float* out) {
  if (rows == 0) return;
  std::vector<float> hidden;
  if (head.dense.packed) {
    const size_t n = head.dense.n();
    hidden.resize(rows * n);
    linear(head.dense, x, type, rows, head.activation, dispatch, host, hidden.data());
    if (head.norm.weight) {
      const size_t tasks = std::clamp<size_t>(rows * n / kRowGrain, 1, host.threads());
      run_tasks(host, tasks, [&](size_t task) {
        for (size_t row = rows * task / tasks; row < rows * (task + 1) / tasks; ++row) {
          float* const at = hidden.data() + row * n;
          dispatch.vec->sum_layer_norm_row(n, at, nullptr, nullptr, nullptr, head.norm.weight, head.norm.bias,
                                           head.layer_norm_eps, at, DType::kF32);
        }
      });
    }
    x = hidden.data();
    type = DType::kF32;
  }
  linear(head.out, x, type, rows, head.out_activation, dispatch, host, out);
}

}  // namespace torch_ext
