/// Products of the outliers of packed blocks: see Outlier in kernels/gemm_kernel.h.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>

#include "kernels/gemm_kernel.h"

namespace torch_ext {

/// Adds the products of outliers to the tiles of one task of a product.
class OutlierProducts {
 public:
  /// For weights of depth `k`. Does nothing with kernels that keep no outliers.
  OutlierProducts(const GemmKernel& kernel, size_t k) : add_(kernel.add_outliers) {
    if (!add_) return;
    outliers_at_ = kernel.outliers_at(1, k);
    scales_at_ = kernel.nr * kernel.steps(k) * kernel.k_step;
    std::fill(std::begin(kept_.keys), std::end(kept_.keys), UINT64_MAX);
  }

  /// `tile` is the product of a block of `mr` rows with the panel of index `panel`, packed (not widened) at `data`.
  void add(const char* block, size_t mr, size_t panel, const char* data, float* tile) {
    if (!add_) return;
    const char* const outliers = block + mr * outliers_at_;
    uint32_t count;
    std::memcpy(&count, outliers, sizeof count);
    if (!count) return;
    add_(reinterpret_cast<const Outlier*>(outliers + sizeof count), count, panel, data,
         reinterpret_cast<const float*>(data + scales_at_), kept_, tile);
  }

 private:
  const AddOutliersFn add_;
  size_t outliers_at_ = 0;  ///< of blocks, for each row
  size_t scales_at_ = 0;    ///< of panels
  OutlierColumns kept_;
};

}  // namespace torch_ext
