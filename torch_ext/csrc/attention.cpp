#include "attention.h"

#include <algorithm>

#include "gemm.h"
#include "packing/packed_weight.h"

namespace torch_ext {
namespace {

// What one head needs of this thread's scratch memory, each part 64-byte aligned.
struct HeadScratch {
  char *keys, *values, *queries, *probabilities;
  float* scores;
};

HeadScratch carve(const GemmKernel& kernel, size_t length, size_t head_size, size_t ld_scores) {
  const size_t sizes[] = {
      kernel.panels(length) * kernel.rhs_panel_bytes(head_size),
      kernel.panels(head_size) * kernel.rhs_panel_bytes(length),
      kernel.lhs_block_bytes(kernel.max_mr(), head_size),
      kernel.lhs_block_bytes(kernel.max_mr(), length),
      kernel.max_mr() * ld_scores * sizeof(float),
  };
  size_t offsets[5], total = 0;
  for (size_t i = 0; i < 5; ++i) {
    offsets[i] = total;
    total += round_up(sizes[i], kPackedAlignment);
  }
  char* const base = static_cast<char*>(thread_scratch(ScratchSlot::kAttention, total));
  return {base + offsets[0], base + offsets[1], base + offsets[2], base + offsets[3],
          reinterpret_cast<float*>(base + offsets[4])};
}

}  // namespace

void run_attention_head(const GemmKernel& kernel, const VecKernels& vec, const AttentionProblem& problem,
                        size_t sequence, size_t head) {
  const size_t first = static_cast<size_t>(problem.cu_seqlens[sequence]);
  const size_t length = static_cast<size_t>(problem.cu_seqlens[sequence + 1]) - first;
  if (length == 0) return;
  const size_t d = problem.head_size, hidden = problem.heads * d, ld = 3 * hidden, nr = kernel.nr;
  const size_t element = dtype_bytes(problem.type);
  const bool f32 = problem.type == DType::kF32;
  const PackRowsFn pack_queries = f32 ? kernel.pack_lhs_f32 : kernel.pack_lhs_bf16;
  const PackRowsFn pack_keys = f32 ? kernel.pack_rhs_nxk_f32 : kernel.pack_rhs_nxk_bf16;
  const PackColsFn pack_values = f32 ? kernel.pack_rhs_kxn_f32 : kernel.pack_rhs_kxn_bf16;
  const size_t ld_scores = round_up(length, kMaxVecWidth);
  const HeadScratch s = carve(kernel, length, d, ld_scores);
  const char* const queries = static_cast<const char*>(problem.qkv) + (first * ld + head * d) * element;
  const char* const keys = queries + hidden * element;
  const char* const values = keys + hidden * element;
  char* const out = static_cast<char*>(problem.out) + (first * hidden + head * d) * element;
  const size_t key_panel = kernel.rhs_panel_bytes(d), value_panel = kernel.rhs_panel_bytes(length);

  for (size_t j = 0; j < length; j += nr) {
    pack_keys(std::min(nr, length - j), nr, d, keys + j * ld * element, ld, s.keys + j / nr * key_panel);
  }
  for (size_t j = 0; j < d; j += nr) {
    pack_values(std::min(nr, d - j), length, values + j * element, ld, s.values + j / nr * value_panel);
  }

  alignas(64) float tile[kMaxMr * kMaxNr];
  Epilogue to_scores;
  to_scores.out = s.scores;
  to_scores.ld_out = ld_scores;
  const auto store_scores = vec.store_tile[static_cast<size_t>(Activation::kNone)];

  for (size_t row = 0; row < length;) {
    const UKernel& ukernel = kernel.ukernel_for(std::min(kernel.max_mr(), length - row));
    const size_t rows = std::min(ukernel.mr, length - row);
    pack_queries(rows, ukernel.mr, d, queries + row * ld * element, ld, s.queries);
    for (size_t j = 0; j < length; j += nr) {
      ukernel.run(kernel.steps(d), s.queries, s.keys + j / nr * key_panel, tile, nr);
      store_scores(tile, nr, rows, std::min(nr, length - j), to_scores, 0, j);
    }
    float factors[kMaxMr];
    for (size_t i = 0; i < rows; ++i) {
      factors[i] = 1.0f / vec.softmax_row(s.scores + i * ld_scores, length, problem.scale);
    }
    kernel.pack_lhs_f32(rows, ukernel.mr, length, s.scores, ld_scores, s.probabilities);
    for (size_t j = 0; j < d; j += nr) {
      ukernel.run(kernel.steps(length), s.probabilities, s.values + j / nr * value_panel, tile, nr);
      for (size_t i = 0; i < rows; ++i) {
        vec.scale_row(tile + i * nr, std::min(nr, d - j), factors[i], out + ((row + i) * hidden + j) * element,
                      problem.type);
      }
    }
    row += rows;
  }
}

}  // namespace torch_ext
