/// Rows of a table, normed and led through a linear layer, and what is added to them, in fp32: what a model's weights determine once, when it is loaded.
/// Knows nothing of torch.
#pragma once

#include <cstddef>

#include "dispatch.h"

namespace torch_ext {

struct Projection {
  size_t rows, k, n;
  const float* table;                                        ///< [rows, k]
  const float *norm_weight = nullptr, *norm_bias = nullptr;  ///< [k] of a layer norm; null: there is none
  float eps = 0.0f;
  const float* weight;              ///< [n, k]
  const float* bias = nullptr;      ///< [n] or null
  const float* residual = nullptr;  ///< [rows, n], added; or null
};

/// out [rows, n] = norm(table) weight^T + bias + residual.
void project_rows(const Dispatch& dispatch, const Projection& projection, float* out);

}  // namespace torch_ext
