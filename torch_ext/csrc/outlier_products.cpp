#include "outlier_products.h"

namespace torch_ext {

void OutlierProducts::add_some(uint32_t count, const char* outliers, size_t panel, const char* data, float* tile) {
  const size_t nr = kernel_.nr;
  for (; count; --count, outliers += sizeof(Outlier)) {
    Outlier outlier;
    std::memcpy(&outlier, outliers, sizeof outlier);
    const size_t slot = outlier.p % kKept;
    const uint64_t key = uint64_t{panel} << 32 | outlier.p;
    if (keys_[slot] != key) {
      keys_[slot] = key;
      dequantize(data, outlier.p, weights_[slot]);
    }
    const v4f* const column = weights_[slot];
    float* const row = tile + outlier.row * nr;
    for (size_t j = 0; j < nr / 4; ++j) {
      v4f sum;
      std::memcpy(&sum, row + 4 * j, sizeof sum);
      sum += outlier.value * column[j];
      std::memcpy(row + 4 * j, &sum, sizeof sum);
    }
  }
}

// Product p of each column of a panel.
void OutlierProducts::dequantize(const char* data, size_t p, v4f* weights) {
  const size_t nr = kernel_.nr;
  const int8_t* const products = reinterpret_cast<const int8_t*>(data);
  alignas(16) int32_t q[kMaxNr];
  if (kernel_.panel_place) {
    for (size_t j = 0; j < nr; ++j) q[j] = products[kernel_.panel_place(j, p)];
  } else {
    const size_t kr = kernel_.kr;
    const int8_t* next = products + kernel_.panel_index(0, p);
    for (size_t j = 0; j < nr; j += 4, next += 4 * kr) {
      q[j] = next[0];
      q[j + 1] = next[kr];
      q[j + 2] = next[2 * kr];
      q[j + 3] = next[3 * kr];
    }
  }
  for (size_t j = 0; j < nr / 4; ++j) {
    v4i four;
    v4f scales;
    std::memcpy(&four, q + 4 * j, sizeof four);
    std::memcpy(&scales, data + scales_at_ + 4 * j * sizeof(float), sizeof scales);
    weights[j] = __builtin_convertvector(four, v4f) * scales;
  }
}

}  // namespace torch_ext
