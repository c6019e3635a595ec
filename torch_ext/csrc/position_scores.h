/// Scores by relative position, which disentangled attention (DeBERTa) adds to those by content. Knows nothing of torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/gemm_kernel.h"

namespace torch_ext {

/// A layer's vectors of relative positions, of the type of queries and keys.
struct PositionTables {
  const void* keys = nullptr;     ///< [rows, heads * head_size], which queries are multiplied with; null: they are not
  const void* queries = nullptr;  ///< the same, which keys are multiplied with
  const int32_t* rows = nullptr;  ///< [2 * longest - 1]: the row for keys (index - longest + 1) behind their query
  size_t longest = 0;             ///< the longest sequence
  explicit operator bool() const { return keys || queries; }
};

/// One head of one sequence: s(i, j) += q(i) . keys[row] + k(j) . queries[row], with the row that j - i takes. Vectors are
/// packed in the order of distances, so that a row of scores adds what lies side by side.
class PositionScores {
 public:
  struct Head {
    DType type;
    size_t length, head, head_size, hidden;
    const char* keys;  ///< the sequence's first key of this head
    size_t ld;         ///< elements from one key to the next
  };

  /// Takes scratch memory of this thread until the next one is made.
  PositionScores(const GemmKernel& kernel, const PositionTables& tables, const Head& head);

  /// Adds to the scores of queries [row, row + rows) and keys [begin, begin + seen). `queries` is their block, packed for
  /// `ukernel`. Blocks come in rising order.
  void add(const UKernel& ukernel, const char* queries, size_t row, size_t rows, size_t begin, size_t seen,
           float* scores, size_t ld_scores);

 private:
  void pack(const PositionTables& tables, const void* table, char* panels);
  void compute_block(size_t first);

  const GemmKernel& kernel_;
  const Head head_;
  size_t block_rows_, panel_bytes_, ld_tile_, ld_sums_;
  size_t block_first_ = 0, block_end_ = 0;  // queries whose scores `sums_` holds
  char *key_panels_ = nullptr, *query_panels_ = nullptr, *lhs_ = nullptr, *row_copies_ = nullptr;
  float *tile_ = nullptr, *sums_ = nullptr;
};

}  // namespace torch_ext
