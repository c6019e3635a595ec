// varlen_attention.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "ops/ops.h"

namespace torch_ext {
Tensor varlen_attention(const Tensor& qkv, const Tensor& cu_seqlens, int64_t num_heads,
                        const std::optional<double>& scale, const std::optional<int64_t>& window,
                        const std::optional<Tensor>& relative_bias) {
  const char* const op = "varlen_attention";
  check_cpu(op, "qkv", qkv);
  const DType type = float_type(op, "qkv", qkv);
  STD_TORCH_CHECK(num_heads >= 1 && qkv.dim() == 2 && qkv.size(1) > 0 && qkv.size(1) % (3 * num_heads) == 0, op,
                  ": expected qkv [T, 3 * H] with H a multiple of num_heads=", num_heads, ", got ", describe(qkv));
  const int64_t tokens = qkv.size(0), hidden = qkv.size(1) / 3;
  const Sequences sequences = check_sequences(op, cu_seqlens, tokens);
  STD_TORCH_CHECK(!scale || *scale > 0, op, ": expected scale > 0, got ", *scale);
  STD_TORCH_CHECK(!window || *window >= 0, op, ": expected window of at least 0, got ", *window);
  std::optional<Tensor> bias;
  if (relative_bias) {
    check_cpu(op, "relative_bias", *relative_bias);
    STD_TORCH_CHECK(relative_bias->scalar_type() == ScalarType::Float && relative_bias->dim() == 2 &&
                        relative_bias->size(0) == num_heads && relative_bias->size(1) % 2 == 1,
                    op, ": expected relative_bias fp32 [", num_heads, ", 2 * R + 1], got ", describe(*relative_bias));
    bias = as_contiguous(*relative_bias);
  }
  const Tensor source = as_contiguous(qkv);
  const Tensor out = new_tensor(qkv, {tokens, hidden}, qkv.scalar_type());
  if (tokens == 0) return out;

  AttentionProblem problem;
  problem.qkv = source.const_data_ptr();
  problem.out = out.mutable_data_ptr();
  problem.type = type;
  problem.cu_seqlens = sequences.offsets;
  problem.sequences = sequences.count;
  problem.heads = static_cast<size_t>(num_heads);
  problem.head_size = static_cast<size_t>(hidden / num_heads);
  problem.scale = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(problem.head_size)));
  if (window) problem.window = static_cast<size_t>(*window);
  if (bias) {
    problem.relative_bias = static_cast<const float*>(bias->const_data_ptr());
    problem.bias_reach = static_cast<size_t>(bias->size(1) / 2);
  }
  const Dispatch& d = dispatch();
  const GemmKernel& kernel = attention_gemm(d, type);
  const std::vector<size_t> starts = balance_heads(problem, torch::stable::get_num_threads());
  parallel_tasks(starts.size() - 1, [&](size_t t) {
    for (size_t i = starts[t]; i < starts[t + 1]; ++i) {
      run_attention_head(kernel, *d.vec, problem, i / problem.heads, i % problem.heads);
    }
  });
  return out;
}

}  // namespace torch_ext
