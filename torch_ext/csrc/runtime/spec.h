/// What an encoder and a head compute, as files of encoders say it (torch_ext/encoder/spec.py has the same fields).
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/activation.h"

namespace torch_ext::runtime {

/// Fields are described in torch_ext/encoder/spec.py, where their names are.
struct EncoderSpec {
  std::string architecture;
  int64_t hidden_size = 0, num_layers = 0, num_heads = 0, intermediate_size = 0;
  std::string activation;
  int64_t max_positions = 0, position_offset = 0;
  double layer_norm_eps = 0.0;
  int64_t vocab_size = 0, type_vocab_size = 0, embedding_size = 0;
  bool absolute_positions = true;
  int64_t relative_attention_buckets = 0, relative_attention_max_distance = 128;
  double rotary_theta = 0.0, rotary_theta_local = 0.0;
  int64_t window = 0, global_every = 1;
  bool norm_first = false, norm_first_attention = true, gated_ffn = false;
  int64_t padding_id = -1, dropped_id = -1;
  int64_t position_span = 0, position_reach = 0;
  int64_t num_kv_heads = 0, head_size = 0, global_first = 0;
  double attention_scale = 0.0, embedding_scale = 1.0, rotary_factor = 1.0;
  bool causal = false, rms_norm = false, embedding_norm = true, head_norms = false, post_norms = false;
  bool content_to_position = false, position_to_content = false;

  int64_t kv_heads() const { return num_kv_heads ? num_kv_heads : num_heads; }
  int64_t size_of_heads() const { return head_size ? head_size : hidden_size / num_heads; }
  int64_t embedded() const { return embedding_size ? embedding_size : hidden_size; }
};

struct HeadSpec {
  std::string task;
  int64_t hidden_size = 0;
  std::string activation;
  bool norm = false;
  double layer_norm_eps = 0.0;
  int64_t num_outputs = 0;
  bool dense = true;
  int64_t dense_size = 0;
  std::string pooling = "cls";
  std::string out_activation = "none";

  int64_t width() const { return dense_size ? dense_size : hidden_size; }
};

/// Read JSON. Throw kValue where a field is missing, unknown, of another type, or out of range.
EncoderSpec parse_encoder_spec(std::string_view json);
HeadSpec parse_head_spec(std::string_view json);

Activation activation_of(const std::string& name);

/// The name and shape of every weight, and of weights that may be missing.
using Shapes = std::map<std::string, std::vector<uint64_t>>;
Shapes weight_shapes(const EncoderSpec& spec);
Shapes optional_shapes(const EncoderSpec& spec);
Shapes weight_shapes(const HeadSpec& spec);

/// Whether a weight is that of a linear layer, or a table of embeddings.
bool is_matrix(std::string_view name);
bool is_table(std::string_view name);

}  // namespace torch_ext::runtime
