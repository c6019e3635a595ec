// varlen_attention.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "ops/ops.h"
#include "positions.h"

namespace torch_ext {
Tensor varlen_attention(const Tensor& qkv, const Tensor& cu_seqlens, int64_t num_heads,
                        const std::optional<double>& scale, const std::optional<int64_t>& window,
                        const std::optional<Tensor>& relative_bias, const std::optional<Tensor>& position_keys,
                        const std::optional<Tensor>& position_queries, int64_t position_reach, bool causal,
                        const std::optional<Tensor>& attended) {
  const char* const op = "varlen_attention";
  check_cpu(op, "qkv", qkv);
  const DType type = float_type(op, "qkv", qkv);
  STD_TORCH_CHECK(num_heads >= 1 && qkv.dim() == 2 && qkv.size(1) > 0 && qkv.size(1) % (3 * num_heads) == 0, op,
                  ": expected qkv [T, 3 * H] with H a multiple of num_heads=", num_heads, ", got ", describe(qkv));
  const int64_t tokens = qkv.size(0), hidden = qkv.size(1) / 3;
  const Sequences sequences = check_sequences(op, cu_seqlens, tokens);
  std::optional<Tensor> counts;
  if (attended) counts = check_attended(op, *attended, sequences);
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
  std::optional<Tensor> tables[2];
  int64_t span = 0;
  for (size_t i = 0; i < 2; ++i) {
    const std::optional<Tensor>& given = i ? position_queries : position_keys;
    if (!given) continue;
    const char* const name = i ? "position_queries" : "position_keys";
    check_cpu(op, name, *given);
    STD_TORCH_CHECK(given->scalar_type() == qkv.scalar_type() && given->dim() == 2 && given->size(1) == hidden &&
                        given->size(0) >= 2 && given->size(0) % 2 == 0 && (!span || given->size(0) == 2 * span),
                    op, ": expected ", name, " [2 * S, ", hidden, "] in the dtype of qkv, got ", describe(*given));
    span = given->size(0) / 2;
    tables[i] = as_contiguous(*given);
  }
  STD_TORCH_CHECK(position_reach == 0 || position_reach > span / 2 + 1, op,
                  ": expected position_reach 0, or above S / 2 + 1, got ", position_reach, " for S=", span);
  const Tensor source = as_contiguous(qkv);
  const Tensor out = new_tensor(qkv, {tokens, hidden}, qkv.scalar_type());
  if (tokens == 0) return out;

  AttentionProblem problem;
  problem.qkv = source.const_data_ptr();
  problem.out = out.mutable_data_ptr();
  problem.type = type;
  problem.cu_seqlens = sequences.offsets;
  if (counts) problem.attended = static_cast<const int32_t*>(counts->const_data_ptr());
  problem.sequences = sequences.count;
  problem.heads = static_cast<size_t>(num_heads);
  problem.head_size = static_cast<size_t>(hidden / num_heads);
  const size_t kinds = 1 + tables[0].has_value() + tables[1].has_value();
  problem.scale = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(problem.head_size * kinds)));
  problem.causal = causal;
  if (window) problem.window = static_cast<size_t>(*window);
  if (bias) {
    problem.relative_bias = static_cast<const float*>(bias->const_data_ptr());
    problem.bias_reach = static_cast<size_t>(bias->size(1) / 2);
  }
  std::vector<int32_t> rows;
  if (kinds > 1) {
    rows.resize(2 * std::max<size_t>(sequences.longest, 1) - 1);
    fill_position_rows((rows.size() + 1) / 2, static_cast<size_t>(span), static_cast<size_t>(position_reach),
                       rows.data());
    problem.positions = {tables[0] ? tables[0]->const_data_ptr() : nullptr,
                         tables[1] ? tables[1]->const_data_ptr() : nullptr, rows.data(), (rows.size() + 1) / 2};
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
