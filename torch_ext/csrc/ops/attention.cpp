// varlen_attention.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "ops/ops.h"

namespace torch_ext {
namespace {

// Heads of sequences in order, cut into at most `parts` runs of about equal work. Entry t is the first head of run t,
// counted over all sequences.
std::vector<size_t> balance(const Sequences& sequences, size_t heads, size_t head_size, size_t parts) {
  std::vector<size_t> cost(sequences.count);
  size_t total = 0;
  for (size_t s = 0; s < sequences.count; ++s) {
    cost[s] = attention_cost(static_cast<size_t>(sequences.offsets[s + 1] - sequences.offsets[s]), head_size);
    total += cost[s] * heads;
  }
  // Below this a second thread costs more than it saves: about 10 microseconds of one core.
  constexpr size_t kMinRunCost = 256 * 1024;
  parts = std::max<size_t>(1, std::min(parts, total / kMinRunCost));
  std::vector<size_t> starts{0};
  size_t done = 0;
  for (size_t s = 0; s < sequences.count; ++s) {
    for (size_t h = 0; h < heads; ++h) {
      if (done >= total * starts.size() / parts && starts.size() < parts && s * heads + h > starts.back()) {
        starts.push_back(s * heads + h);
      }
      done += cost[s];
    }
  }
  starts.push_back(sequences.count * heads);
  return starts;
}

}  // namespace

Tensor varlen_attention(const Tensor& qkv, const Tensor& cu_seqlens, int64_t num_heads,
                        const std::optional<double>& scale) {
  const char* const op = "varlen_attention";
  check_cpu(op, "qkv", qkv);
  const DType type = float_type(op, "qkv", qkv);
  STD_TORCH_CHECK(num_heads >= 1 && qkv.dim() == 2 && qkv.size(1) > 0 && qkv.size(1) % (3 * num_heads) == 0, op,
                  ": expected qkv [T, 3 * H] with H a multiple of num_heads=", num_heads, ", got ", describe(qkv));
  const int64_t tokens = qkv.size(0), hidden = qkv.size(1) / 3;
  const Sequences sequences = check_sequences(op, cu_seqlens, tokens);
  STD_TORCH_CHECK(!scale || *scale > 0, op, ": expected scale > 0, got ", *scale);
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
  const Dispatch& d = dispatch();
  const GemmKernel& kernel = attention_gemm(d, type);
  const std::vector<size_t> starts =
      balance(sequences, problem.heads, problem.head_size, torch::stable::get_num_threads());
  parallel_tasks(starts.size() - 1, [&](size_t t) {
    for (size_t i = starts[t]; i < starts[t + 1]; ++i) {
      run_attention_head(kernel, *d.vec, problem, i / problem.heads, i % problem.heads);
    }
  });
  return out;
}

}  // namespace torch_ext
