/// Attention over sequences that lie one after the other, without padding. Knows nothing of torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/gemm_kernel.h"
#include "kernels/vec_kernels.h"

namespace torch_ext {

struct AttentionProblem {
  const void* qkv = nullptr;  ///< [T, 3 * heads * head_size]: queries, keys, values, each head after head
  void* out = nullptr;        ///< [T, heads * head_size]
  DType type = DType::kBF16;
  const int32_t* cu_seqlens = nullptr;  ///< [sequences + 1], not decreasing, from 0 to T
  size_t sequences = 0;
  size_t heads = 0, head_size = 0;
  float scale = 1.0f;
};

/// Work of the head of one sequence of `length` tokens, in products; used to balance threads.
inline size_t attention_cost(size_t length, size_t head_size) { return length * (2 * length + 16) * head_size; }

/// out = softmax(scale * Q K^T) V for head `head` of sequence `sequence`. Scores exist for one block of rows at a
/// time: memory is O(length * head_size) for each thread.
void run_attention_head(const GemmKernel& kernel, const VecKernels& vec, const AttentionProblem& problem,
                        size_t sequence, size_t head);

}  // namespace torch_ext
