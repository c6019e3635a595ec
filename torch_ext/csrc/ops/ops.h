/// The ops behind torch.ops.torch_ext.*, on tensors. Their contract is in torch_ext/ops.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "ops/tensor_util.h"

namespace torch_ext {

Tensor pack_linear_weight(const Tensor& weight, bool transposed);
Tensor unpack_linear_weight(const Tensor& packed);
/// Weights of an fp32 encoder, which are not rounded.
Tensor pack_linear_weight_fp32(const Tensor& weight);
Tensor unpack_linear_weight_fp32(const Tensor& packed);
Tensor pack_linear_weight_int8(const Tensor& weight, const std::optional<Tensor>& scale);
std::tuple<Tensor, Tensor> unpack_linear_weight_int8(const Tensor& packed);
Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, const std::string& activation,
              const std::optional<ScalarType>& out_dtype, const std::optional<Tensor>& residual);
Tensor matmul(const Tensor& a, const Tensor& b, const std::optional<ScalarType>& out_dtype);
Tensor bmm(const Tensor& a, const Tensor& b);
Tensor addmm(const Tensor& bias, const Tensor& a, const Tensor& b, double beta, double alpha);
/// A hash of 64 elements all over a weight: accelerate() tells by it that a weight was written to past its version.
int64_t weight_fingerprint(const Tensor& weight);
Tensor varlen_attention(const Tensor& qkv, const Tensor& cu_seqlens, int64_t num_heads,
                        const std::optional<double>& scale, const std::optional<int64_t>& window,
                        const std::optional<Tensor>& relative_bias, const std::optional<Tensor>& position_keys,
                        const std::optional<Tensor>& position_queries, int64_t position_reach, bool causal,
                        const std::optional<Tensor>& attended);
Tensor add_layer_norm(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, const Tensor& bias,
                      double eps, const std::optional<Tensor>& residual_scale);
Tensor add_rms_norm(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, double eps);
Tensor rotary_embedding(const Tensor& qkv, const Tensor& cu_seqlens, int64_t num_heads, const Tensor& cos_sin);
Tensor gate(const Tensor& x, const std::string& activation);
Tensor embed_layer_norm(const Tensor& input_ids, const Tensor& cu_seqlens, const std::optional<Tensor>& token_type_ids,
                        const Tensor& word, const std::optional<Tensor>& position,
                        const std::optional<Tensor>& token_type, const Tensor& weight, const Tensor& bias, double eps,
                        int64_t position_offset, int64_t padding_id);
Tensor pool(const Tensor& hidden, const Tensor& cu_seqlens, const std::string& mode, bool normalize);
/// fp32 [positions, head_size], on the device of `like`; see positions.h.
Tensor rotary_table(const Tensor& like, int64_t positions, int64_t head_size, double theta, double factor);
/// fp32 [heads, 2 * reach + 1] of fp32 [buckets, heads].
Tensor relative_bias_table(const Tensor& bias, int64_t reach);
/// Everything that an encoder's forward pass reads, as one byte tensor [hidden_size, bytes / hidden_size]. `weights` are
/// in the order of packing/packed_encoder.h, empty ones for what the model has not got; matrices and tables of 1 MB and
/// more are without content afterwards: their memory is given back as they are copied.
Tensor pack_encoder(const std::vector<Tensor>& weights, int64_t hidden_size, int64_t num_layers, int64_t num_heads,
                    int64_t intermediate_size, const std::string& activation, double layer_norm_eps,
                    int64_t max_positions, int64_t position_offset, int64_t padding_id, int64_t window,
                    int64_t global_every, bool norm_first, bool gated_ffn, int64_t position_span,
                    int64_t position_reach, int64_t num_kv_heads, int64_t head_size, int64_t global_first,
                    double attention_scale, double embedding_scale, bool causal, bool rms_norm, bool embedding_norm,
                    int64_t dropped_id);
/// Where the sections of a packed encoder are: i64 [sections, 2], offset and bytes.
Tensor encoder_sections(const Tensor& packed);
Tensor encoder_forward(const Tensor& input_ids, const Tensor& cu_seqlens, const std::optional<Tensor>& token_type_ids,
                       const Tensor& packed, bool fp32, const std::optional<Tensor>& attended);
std::string isa_report();

/// At least `rows`: the number of rows that a caller with a choice gives to `linear`, because each new number costs.
int64_t preferred_rows(int64_t rows);

}  // namespace torch_ext
