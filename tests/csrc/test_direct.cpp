// Products of few rows on a matrix that is not packed, against sums in double precision; buffers end at unmapped pages.
#include <cmath>

#include "bounds.h"
#include "direct_product.h"
#include "guarded.h"
#include "reference.h"
#include "runner.h"

namespace torch_ext::test {
namespace {

/// Columns [first, first + cols) of a product with n columns.
void check_direct(size_t rows, size_t k, size_t n, bool transposed, size_t first, size_t cols) {
  context("%zux%zux%zu%s, columns %zu to %zu", rows, k, n, transposed ? ", transposed" : "", first, first + cols);
  Matrix lhs(DType::kF32, rows, k, k + 3);
  Matrix rhs(DType::kBF16, transposed ? n : k, transposed ? k : n, (transposed ? k : n) + 5);
  lhs.fill(random_source());
  rhs.fill(random_source());
  const Guarded<float> tile(rows * cols);
  direct_product(rows, k, static_cast<const float*>(lhs.data()), lhs.ld, static_cast<const bf16*>(rhs.data()), rhs.ld,
                 transposed, first, cols, tile.get());
  for (size_t i = 0; i < rows; ++i) {
    for (size_t j = 0; j < cols; ++j) {
      double sum = 0, sum_abs = 0;
      for (size_t p = 0; p < k; ++p) {
        const double product =
            static_cast<double>(lhs.get(i, p)) * (transposed ? rhs.get(first + j, p) : rhs.get(p, first + j));
        sum += product;
        sum_abs += std::fabs(product);
      }
      const double got = tile[i * cols + j];
      EXPECT(within(got, sum, product_bound(sum_abs, k)), "row %zu, column %zu: got %g, expected %g", i, j, got, sum);
    }
  }
}

TORCH_EXT_TEST(direct_products) {
  for (size_t rows = 1; rows <= kMaxDirectRows; ++rows) {
    for (const bool transposed : {false, true}) {
      for (const size_t k : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 97}) {
        for (const size_t n : {1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 67}) check_direct(rows, k, n, transposed, 0, n);
      }
      check_direct(rows, 24, 100, transposed, 32, 68);
      check_direct(rows, 24, 100, transposed, 64, 32);
      check_direct(rows, 768, 50, transposed, 0, 50);
    }
  }
}

}  // namespace
}  // namespace torch_ext::test
