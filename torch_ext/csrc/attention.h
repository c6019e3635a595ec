/// Attention over sequences that lie one after the other, without padding. Knows nothing of torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/gemm_kernel.h"
#include "kernels/vec_kernels.h"
#include "position_scores.h"

namespace torch_ext {

/// No limit on how far a token sees.
constexpr size_t kNoWindow = SIZE_MAX;

struct AttentionProblem {
  const void* qkv = nullptr;  ///< [T, (heads + 2 * kv_heads) * head_size]: queries, keys, values, each head after head
  void* out = nullptr;        ///< [T, heads * head_size]
  DType type = DType::kBF16;
  const int32_t* cu_seqlens = nullptr;  ///< [sequences + 1], not decreasing, from 0 to T
  const int32_t* attended = nullptr;    ///< [sequences], of each the first tokens that are keys, 1 or more; null: all
  size_t sequences = 0;
  size_t heads = 0, head_size = 0;
  size_t kv_heads = 0;  ///< of keys and values, each for heads / kv_heads of queries; 0: as many as of queries
  float scale = 1.0f;
  size_t window = kNoWindow;  ///< a token sees keys at most this many positions away
  bool causal = false;        ///< and none behind itself
  const float* relative_bias =
      nullptr;  ///< [heads, 2 * bias_reach + 1] or null: see `add_relative_bias` in attention.cpp
  size_t bias_reach = 0;
  PositionTables positions;  ///< of disentangled attention; their scores are scaled, too
};

/// Heads of sequences in order, cut into at most `parts` runs of about equal work, none too small to be worth a thread.
/// Entry t is the first head of run t, counted over all sequences; the last entry is their number.
std::vector<size_t> balance_heads(const AttentionProblem& problem, size_t parts);

/// out = softmax(scale * (Q K^T + positions) + bias) V for head `head` of sequence `sequence`. Scores exist for one block of rows at a
/// time: memory is O(length * head_size) for each thread. A row that sees no key, where keys are few and the window is small,
/// is 0.
void run_attention_head(const GemmKernel& kernel, const VecKernels& vec, const AttentionProblem& problem,
                        size_t sequence, size_t head);

}  // namespace torch_ext
