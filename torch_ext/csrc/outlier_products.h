/// Products of the outliers of packed blocks: see Outlier in kernels/gemm_kernel.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/gemm_kernel.h"

namespace torch_ext {

/// Adds the products of outliers to the tiles of one task of a product, in fp32.
///
/// A column of products is often that of many rows: models have channels that are large in every text. So the columns of
/// the panel that were met last are kept, dequantized.
class OutlierProducts {
 public:
  /// For weights of depth `k`. Does nothing with kernels that keep no outliers.
  OutlierProducts(const GemmKernel& kernel, size_t k) : kernel_(kernel) {
    if (!kernel.outliers) return;
    outliers_at_ = kernel.outliers_at(1, k);
    scales_at_ = kernel.nr * kernel.steps(k) * kernel.k_step;
    for (uint64_t& key : keys_) key = UINT64_MAX;
  }

  /// `tile` is the product of a block of `mr` rows with the panel of index `panel`, packed (not widened) at `data`.
  void add(const char* block, size_t mr, size_t panel, const char* data, float* tile) {
    if (!outliers_at_) return;
    const char* const outliers = block + mr * outliers_at_;
    uint32_t count;
    std::memcpy(&count, outliers, sizeof count);
    if (count) add_some(count, outliers + sizeof count, panel, data, tile);
  }

 private:
  typedef float v4f __attribute__((vector_size(16)));
  typedef int32_t v4i __attribute__((vector_size(16)));

  void add_some(uint32_t count, const char* outliers, size_t panel, const char* data, float* tile);
  void dequantize(const char* data, size_t p, v4f* weights);

  static constexpr size_t kKept = 16;
  const GemmKernel& kernel_;
  size_t outliers_at_ = 0;  ///< of blocks, for each row
  size_t scales_at_ = 0;    ///< of panels
  uint64_t keys_[kKept];    ///< panel and product
  v4f weights_[kKept][kMaxNr / 4];
};

}  // namespace torch_ext
