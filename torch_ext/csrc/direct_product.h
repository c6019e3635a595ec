/// Products of a few rows with a matrix that is read once, as it lies in memory. Knows nothing of torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/gemm_kernel.h"

namespace torch_ext {

/// Most rows that direct_product() takes.
constexpr size_t kMaxDirectRows = 4;

/// Whether a product of `rows` rows is cheaper without packing the right-hand side.
///
/// Packing costs about 0.6 instructions an element of the right-hand side, and writes it to memory once more. The direct
/// product widens the element (0.4) and spends a quarter of an FMA on it for each row; after packing, BFMMLA takes about
/// 0.1 for each row, and fp32 kernels as much as here. So the direct way wins for two rows where there is BFMMLA, and for
/// as many as its registers hold where there is not.
inline bool direct_product_wins(const GemmKernel& kernel, size_t rows) {
  return rows <= (kernel.lhs_type == DType::kBF16 ? 2 : kMaxDirectRows);
}

/// tile[i][j] = sum over p < k of lhs[i][p] * rhs(p, first + j)      i < rows, j < cols
///
/// lhs: f32 [rows, k], rows `ld_lhs` apart. rhs: bf16; element (p, j) lies at p * ld + j, or at j * ld + p if
/// `transposed`. tile: f32, rows `cols` apart. Reads nothing past the last element.
void direct_product(size_t rows, size_t k, const float* lhs, size_t ld_lhs, const bf16* rhs, size_t ld, bool transposed,
                    size_t first, size_t cols, float* tile);

}  // namespace torch_ext
