/// The ops behind torch.ops.torch_ext.*, on tensors. Their contract is in torch_ext/ops.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "ops/tensor_util.h"

namespace torch_ext {

enum class LinearEngine;
/// Who multiplies in this process: that of dispatch(), without oneDNN where this PyTorch cannot prepack for it.
LinearEngine linear_engine();

Tensor pack_linear_weight(const Tensor& weight, bool transposed);
Tensor unpack_linear_weight(const Tensor& packed);
Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, const std::string& activation,
              const std::optional<ScalarType>& out_dtype, const std::optional<Tensor>& residual);
Tensor matmul(const Tensor& a, const Tensor& b, const std::optional<ScalarType>& out_dtype);
Tensor bmm(const Tensor& a, const Tensor& b);
Tensor addmm(const Tensor& bias, const Tensor& a, const Tensor& b, double beta, double alpha);
/// A hash of 64 elements all over a weight: accelerate() tells by it that a weight was written to past its version.
int64_t weight_fingerprint(const Tensor& weight);
Tensor varlen_attention(const Tensor& qkv, const Tensor& cu_seqlens, int64_t num_heads,
                        const std::optional<double>& scale);
Tensor add_layer_norm(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, const Tensor& bias,
                      double eps);
Tensor embed_layer_norm(const Tensor& input_ids, const Tensor& cu_seqlens, const std::optional<Tensor>& token_type_ids,
                        const Tensor& word, const Tensor& position, const std::optional<Tensor>& token_type,
                        const Tensor& weight, const Tensor& bias, double eps, int64_t position_offset);
Tensor pool(const Tensor& hidden, const Tensor& cu_seqlens, const std::string& mode, bool normalize);
std::string isa_report();

/// At least `rows`: the number of rows that a caller with a choice gives to `linear`, because each new number costs.
int64_t preferred_rows(int64_t rows);

}  // namespace torch_ext
