/// PyTorch's prepacked oneDNN linear, as bytes: a weight that oneDNN reordered is kept in our packed tensor together
/// with oneDNN's description of its layout, and handed back to PyTorch without a copy at every call.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ops/tensor_util.h"

namespace torch_ext {

/// Whether this PyTorch has prepacked bf16 linear layers on this CPU.
bool onednn_available();

/// The number of rows to fill a product up to, at least `rows`. oneDNN makes code for every new number of rows: 10 to 30
/// ms and some MB each, as much as running a batch. With powers of two up to 16, multiples of 16 up to 128, of 32 up to
/// 512 and then eighths of a power of two, there are few, for 4 % more rows on average.
int64_t onednn_preferred_rows(int64_t rows);

/// A weight reordered by oneDNN.
struct OnednnWeight {
  Tensor tensor;                  ///< opaque
  std::vector<uint8_t> metadata;  ///< oneDNN's layout, serialized by PyTorch
  size_t bytes;                   ///< of the reordered data
};
OnednnWeight onednn_reorder(const Tensor& weight_bf16);

/// The opaque tensor over `data`, which must outlive it and be 64-byte aligned.
Tensor onednn_view(void* data, int64_t n, int64_t k, const uint8_t* metadata, size_t metadata_bytes);

/// Row-major bf16 [n, k].
Tensor onednn_to_dense(const Tensor& opaque);

/// Whether onednn_linear takes this activation.
bool onednn_fuses(Activation activation);

/// Rows of `x` as given are multiplied, whatever onednn_preferred_rows says.
/// act(x W^T + bias), or x W^T + bias + residual where `residual` is given (then without activation). x bf16 [m, k],
/// residual bf16 [m, n] -> bf16 [m, n]. Raises on an activation that is not fused.
Tensor onednn_linear(const Tensor& x, const Tensor& opaque, const Tensor* bias, Activation activation,
                     const Tensor* residual);

}  // namespace torch_ext
