#include "position_scores.h"

#include <algorithm>
#include <cstring>

#include "gemm.h"
#include "kernels/vec_kernels.h"
#include "packing/packed_weight.h"

namespace torch_ext {
namespace {

// Queries whose scores by their keys' products are in memory at a time: enough for the edges of their blocks to matter
// little, few enough for a row of scores each to stay in the second-level cache.
constexpr size_t kBlockRows = 128;

}  // namespace

// Column x of the panels belongs to keys x - (length - 1) behind their query.
PositionScores::PositionScores(const GemmKernel& kernel, const PositionTables& tables, const Head& head)
    : kernel_(kernel), head_(head), panel_bytes_(kernel.rhs_panel_bytes(head.head_size)) {
  const size_t mr = kernel.max_mr(), nr = kernel.nr, length = head.length, d = head.head_size;
  block_rows_ = std::max<size_t>(kBlockRows / mr, 1) * mr;
  const auto padded = [&](size_t n) { return round_up(round_up(n, nr), kMaxVecWidth); };
  ld_sums_ = padded(length);
  // The columns of one block of rows, which need not begin or end with a panel.
  ld_tile_ = padded(length + mr + 2 * nr);
  const size_t panels = kernel.panels(2 * length - 1);
  const size_t sizes[] = {
      tables.keys ? panels * panel_bytes_ : 0,
      tables.queries ? panels * panel_bytes_ : 0,
      kernel.lhs_block_bytes(mr, d),
      nr * d * dtype_bytes(head.type),
      mr * ld_tile_ * sizeof(float),
      tables.queries ? std::min(block_rows_, length) * ld_sums_ * sizeof(float) : 0,
  };
  size_t total = 0;
  for (const size_t size : sizes) total += round_up(size, kPackedAlignment);
  char* at = static_cast<char*>(thread_scratch(ScratchSlot::kPositions, total));
  const auto take = [&](size_t i) {
    char* const taken = at;
    at += round_up(sizes[i], kPackedAlignment);
    return sizes[i] ? taken : nullptr;
  };
  key_panels_ = take(0);
  query_panels_ = take(1);
  lhs_ = take(2);
  row_copies_ = take(3);
  tile_ = reinterpret_cast<float*>(take(4));
  sums_ = reinterpret_cast<float*>(take(5));
  if (tables.keys) pack(tables, tables.keys, key_panels_);
  if (tables.queries) pack(tables, tables.queries, query_panels_);
}

void PositionScores::pack(const PositionTables& tables, const void* table, char* panels) {
  const size_t d = head_.head_size, nr = kernel_.nr, columns = 2 * head_.length - 1;
  const size_t element = dtype_bytes(head_.type), bytes = d * element;
  const PackRowsFn pack_rows = head_.type == DType::kF32 ? kernel_.pack_rhs_nxk_f32 : kernel_.pack_rhs_nxk_bf16;
  const int32_t* const rows = tables.rows + (tables.longest - head_.length);
  const char* const from = static_cast<const char*>(table) + head_.head * bytes;
  for (size_t x = 0; x < columns; x += nr) {
    const size_t count = std::min(nr, columns - x);
    for (size_t i = 0; i < count; ++i) {
      const char* const row = from + static_cast<size_t>(rows[x + i]) * head_.hidden * element;
      std::memcpy(row_copies_ + i * bytes, row, bytes);
    }
    pack_rows(count, nr, d, row_copies_, d, panels + x / nr * panel_bytes_);
  }
}

// The products of all keys with the vectors at their distances from queries [first, first + block_rows_).
void PositionScores::compute_block(size_t first) {
  const size_t length = head_.length, nr = kernel_.nr, d = head_.head_size, mr = kernel_.max_mr();
  const PackRowsFn pack_keys = head_.type == DType::kF32 ? kernel_.pack_lhs_f32 : kernel_.pack_lhs_bf16;
  block_first_ = first;
  block_end_ = std::min(length, first + block_rows_);
  for (size_t key = 0; key < length; key += mr) {
    const UKernel& ukernel = kernel_.ukernel_for(std::min(mr, length - key));
    const size_t keys = std::min(ukernel.mr, length - key);
    pack_keys(keys, ukernel.mr, d, head_.keys + key * head_.ld * dtype_bytes(head_.type), head_.ld, lhs_);
    const size_t low = key + length - block_end_, high = key + keys - 1 + length - 1 - first;
    const size_t panel = low / nr;
    for (size_t p = panel; p * nr <= high; ++p) {
      ukernel.run(kernel_.steps(d), lhs_, query_panels_ + p * panel_bytes_, tile_ + (p - panel) * nr, ld_tile_);
    }
    for (size_t j = 0; j < keys; ++j) {
      // The column of the block's first query; those of later ones come before it.
      const float* const from = tile_ + j * ld_tile_ + (key + j + length - 1 - first - panel * nr);
      float* const to = sums_ + key + j;
      for (size_t i = 0; i < block_end_ - first; ++i) to[i * ld_sums_] = *(from - i);
    }
  }
}

void PositionScores::add(const UKernel& ukernel, const char* queries, size_t row, size_t rows, size_t begin,
                         size_t seen, float* scores, size_t ld_scores) {
  const size_t length = head_.length, nr = kernel_.nr;
  if (key_panels_) {
    const size_t low = begin + length - row - rows, high = begin + seen - 1 + length - 1 - row;
    const size_t panel = low / nr;
    for (size_t p = panel; p * nr <= high; ++p) {
      ukernel.run(kernel_.steps(head_.head_size), queries, key_panels_ + p * panel_bytes_, tile_ + (p - panel) * nr,
                  ld_tile_);
    }
    for (size_t i = 0; i < rows; ++i) {
      const float* const from = tile_ + i * ld_tile_ + (begin + length - 1 - row - i - panel * nr);
      float* const to = scores + i * ld_scores;
      for (size_t j = 0; j < seen; ++j) to[j] += from[j];
    }
  }
  if (query_panels_) {
    if (row >= block_end_) compute_block(row);
    for (size_t i = 0; i < rows; ++i) {
      const float* const from = sums_ + (row + i - block_first_) * ld_sums_ + begin;
      float* const to = scores + i * ld_scores;
      for (size_t j = 0; j < seen; ++j) to[j] += from[j];
    }
  }
}

}  // namespace torch_ext
