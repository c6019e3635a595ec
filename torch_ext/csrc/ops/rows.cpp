// add_layer_norm, add_rms_norm, rotary_embedding, gate, embed_layer_norm, pool, _rotary_table, _relative_bias_table, _isa_report: what works row by row.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "dispatch.h"
#include "gemm.h"
#include "ops/ops.h"
#include "pool.h"
#include "positions.h"
#include "rows.h"

namespace torch_ext {
namespace {

int64_t row_grain(int64_t width) { return std::max<int64_t>(1, int64_t{kRowGrain} / std::max<int64_t>(width, 1)); }

const char* row_of(const Tensor& t, int64_t row, int64_t width, DType type) {
  return static_cast<const char*>(t.const_data_ptr()) + static_cast<size_t>(row * width) * dtype_bytes(type);
}

Tensor check_table(const char* op, const char* argument, const Tensor& t, int64_t width, ScalarType type) {
  check_cpu(op, argument, t);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == width && t.scalar_type() == type, op, ": expected ", argument,
                  " [rows, ", width, "] of the word table's dtype, got ", describe(t));
  return as_contiguous(t);
}

// A layer norm with `bias`, an RMS norm without.
Tensor add_norm(const char* op, const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
                const Tensor* bias, double eps, const std::optional<Tensor>& residual_scale) {
  check_cpu(op, "x", x);
  const DType type = float_type(op, "x", x);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) >= 1, op, ": expected x [T, H], got ", describe(x));
  const int64_t rows = x.size(0), width = x.size(1);
  const Tensor w = as_f32_vector(op, "weight", weight, width);
  std::optional<Tensor> b;
  if (bias) b = as_f32_vector(op, "bias", *bias, width);
  const Tensor source = as_contiguous(x);
  std::optional<Tensor> added;
  if (residual) {
    check_cpu(op, "residual", *residual);
    STD_TORCH_CHECK(residual->dim() == 2 && residual->size(0) == rows && residual->size(1) == width &&
                        residual->scalar_type() == x.scalar_type(),
                    op, ": expected residual like x, ", describe(x), ", got ", describe(*residual));
    added = as_contiguous(*residual);
  }
  std::optional<Tensor> factors;
  if (residual_scale) {
    STD_TORCH_CHECK(residual, op, ": expected a residual for residual_scale, got none");
    factors = as_f32_vector(op, "residual_scale", *residual_scale, width);
  }
  const Tensor out = new_tensor(x, {rows, width}, x.scalar_type());
  const VecKernels& vec = *dispatch().vec;
  const float* const wp = static_cast<const float*>(w.const_data_ptr());
  const float* const bp = b ? static_cast<const float*>(b->const_data_ptr()) : nullptr;
  const size_t n = static_cast<size_t>(width), row_bytes = n * dtype_bytes(type);
  const char* const xp = static_cast<const char*>(source.const_data_ptr());
  const char* const rp = added ? static_cast<const char*>(added->const_data_ptr()) : nullptr;
  const float* const fp = factors ? static_cast<const float*>(factors->const_data_ptr()) : nullptr;
  char* const op_out = static_cast<char*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, row_grain(width), [&](int64_t begin, int64_t end) {
    for (size_t i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
      const char* const added_row = rp ? rp + i * row_bytes : nullptr;
      const float e = static_cast<float>(eps);
      if (bp) {
        vec.sum_layer_norm_row(n, xp + i * row_bytes, added_row, nullptr, fp, wp, bp, e, op_out + i * row_bytes, type);
      } else {
        vec.sum_rms_norm_row(n, xp + i * row_bytes, added_row, nullptr, wp, e, op_out + i * row_bytes, type);
      }
    }
  });
  return out;
}

}  // namespace

Tensor add_layer_norm(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, const Tensor& bias,
                      double eps, const std::optional<Tensor>& residual_scale) {
  return add_norm("add_layer_norm", x, residual, weight, &bias, eps, residual_scale);
}

Tensor add_rms_norm(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, double eps) {
  return add_norm("add_rms_norm", x, residual, weight, nullptr, eps, std::nullopt);
}

Tensor rotary_embedding(const Tensor& qkv, const Tensor& cu_seqlens, int64_t num_heads, const Tensor& cos_sin) {
  const char* const op = "rotary_embedding";
  check_cpu(op, "qkv", qkv);
  const DType type = float_type(op, "qkv", qkv);
  STD_TORCH_CHECK(qkv.dim() == 2 && num_heads > 0 && qkv.size(1) > 0 && qkv.size(1) % (6 * num_heads) == 0, op,
                  ": expected qkv [T, 3 * H] with H / num_heads even, got ", describe(qkv), " for ", num_heads,
                  " heads");
  const int64_t tokens = qkv.size(0), width = qkv.size(1) / 3;
  const int64_t head_size = width / num_heads;
  check_cpu(op, "cos_sin", cos_sin);
  STD_TORCH_CHECK(cos_sin.dim() == 2 && cos_sin.size(1) == head_size && cos_sin.scalar_type() == ScalarType::Float, op,
                  ": expected cos_sin fp32 [P, ", head_size, "], got ", describe(cos_sin));
  const Sequences sequences = check_sequences(op, cu_seqlens, tokens);
  STD_TORCH_CHECK(static_cast<int64_t>(sequences.longest) <= cos_sin.size(0), op, ": a sequence of ", sequences.longest,
                  " tokens is longer than the ", cos_sin.size(0), " positions of cos_sin; truncate it");
  const Tensor source = as_contiguous(qkv), angles = as_contiguous(cos_sin);
  const Tensor out = new_tensor(qkv, {tokens, 3 * width}, qkv.scalar_type());
  const VecKernels& vec = *dispatch().vec;
  const float* const table = static_cast<const float*>(angles.const_data_ptr());
  char* const result = static_cast<char*>(out.mutable_data_ptr());
  const size_t row_bytes = static_cast<size_t>(3 * width) * dtype_bytes(type);
  torch::stable::parallel_for(0, tokens, row_grain(3 * width), [&](int64_t begin, int64_t end) {
    const auto rotate = [&](size_t t, size_t position) {
      const float* const cos = table + position * static_cast<size_t>(head_size);
      const char* const row = row_of(source, static_cast<int64_t>(t), 3 * width, type);
      char* const to = result + t * row_bytes;
      vec.rotate_row(static_cast<size_t>(2 * num_heads), static_cast<size_t>(head_size), cos, cos + head_size / 2, row,
                     to, type);
      const size_t rotated = row_bytes / 3 * 2;
      std::memcpy(to + rotated, row + rotated, row_bytes - rotated);
    };
    for_each_position(sequences.offsets, sequences.count, static_cast<size_t>(begin), static_cast<size_t>(end), rotate);
  });
  return out;
}

Tensor gate(const Tensor& x, const std::string& activation) {
  const char* const op = "gate";
  check_cpu(op, "x", x);
  const DType type = float_type(op, "x", x);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) >= 2 && x.size(1) % 2 == 0, op, ": expected x [T, 2 * I], got ",
                  describe(x));
  const Activation act = parse_activation(op, activation);
  const int64_t rows = x.size(0), width = x.size(1) / 2;
  const Tensor source = as_contiguous(x);
  const Tensor out = new_tensor(x, {rows, width}, x.scalar_type());
  const auto gate_row = dispatch().vec->gate_row[static_cast<size_t>(act)];
  char* const result = static_cast<char*>(out.mutable_data_ptr());
  const size_t half_bytes = static_cast<size_t>(width) * dtype_bytes(type);
  torch::stable::parallel_for(0, rows, row_grain(2 * width), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const char* const row = row_of(source, t, 2 * width, type);
      gate_row(static_cast<size_t>(width), row, row + half_bytes, result + static_cast<size_t>(t) * half_bytes, type);
    }
  });
  return out;
}

Tensor embed_layer_norm(const Tensor& input_ids, const Tensor& cu_seqlens, const std::optional<Tensor>& token_type_ids,
                        const Tensor& word, const std::optional<Tensor>& position,
                        const std::optional<Tensor>& token_type, const Tensor& weight, const Tensor& bias, double eps,
                        int64_t position_offset, int64_t padding_id) {
  const char* const op = "embed_layer_norm";
  check_cpu(op, "word", word);
  const DType type = float_type(op, "word", word);
  STD_TORCH_CHECK(word.dim() == 2 && word.size(1) >= 1, op, ": expected word [V, H], got ", describe(word));
  STD_TORCH_CHECK(input_ids.dim() == 1, op, ": expected input_ids i64 [T], got ", describe(input_ids));
  const int64_t tokens = input_ids.size(0), width = word.size(1);
  const Tensor words = as_contiguous(word);
  std::optional<Tensor> positions;
  if (position) positions = check_table(op, "position", *position, width, word.scalar_type());
  const Tensor ids = check_ids(op, "input_ids", input_ids, tokens, word.size(0));
  const Sequences sequences = check_sequences(op, cu_seqlens, tokens);
  STD_TORCH_CHECK(!position || (position_offset >= 0 && position_offset <= position->size(0)), op,
                  ": expected position_offset from 0 to the ", position ? position->size(0) : 0,
                  " rows of position, got ", position_offset);
  STD_TORCH_CHECK(padding_id >= -1 && (padding_id < 0 || !position || position_offset >= 1), op,
                  ": expected padding_id -1, or an id and position_offset of at least 1, whose row before is that of "
                  "padding, got ",
                  padding_id, " and ", position_offset);
  STD_TORCH_CHECK(!position || static_cast<int64_t>(sequences.longest) <= position->size(0) - position_offset, op,
                  ": a sequence of ", sequences.longest, " tokens is longer than the ",
                  position ? position->size(0) - position_offset : 0, " positions of the model; truncate it");
  STD_TORCH_CHECK(!token_type_ids || token_type, op, ": token_type_ids given, but the model has no token types");
  std::optional<Tensor> types, type_ids;
  if (token_type) types = check_table(op, "token_type", *token_type, width, word.scalar_type());
  if (token_type_ids) type_ids = check_ids(op, "token_type_ids", *token_type_ids, tokens, token_type->size(0));
  const Tensor w = as_f32_vector(op, "weight", weight, width), b = as_f32_vector(op, "bias", bias, width);
  const Tensor out = new_tensor(word, {tokens, width}, word.scalar_type());
  if (tokens == 0) return out;

  const VecKernels& vec = *dispatch().vec;
  const int64_t* const id = static_cast<const int64_t*>(ids.const_data_ptr());
  const int64_t* const type_id = type_ids ? static_cast<const int64_t*>(type_ids->const_data_ptr()) : nullptr;
  const float* const wp = static_cast<const float*>(w.const_data_ptr());
  const float* const bp = static_cast<const float*>(b.const_data_ptr());
  char* const op_out = static_cast<char*>(out.mutable_data_ptr());
  const size_t row_bytes = static_cast<size_t>(width) * dtype_bytes(type);
  torch::stable::parallel_for(0, tokens, row_grain(width), [&](int64_t begin, int64_t end) {
    const auto embed = [&](size_t t, size_t row) {
      const char* const type_row = types ? row_of(*types, type_id ? type_id[t] : 0, width, type) : nullptr;
      const char* const position_row = positions ? row_of(*positions, static_cast<int64_t>(row), width, type) : nullptr;
      vec.sum_layer_norm_row(static_cast<size_t>(width), row_of(words, id[t], width, type), position_row, type_row,
                             nullptr, wp, bp, static_cast<float>(eps), op_out + t * row_bytes, type);
    };
    for_each_position_row(sequences.offsets, sequences.count, static_cast<size_t>(begin), static_cast<size_t>(end),
                          static_cast<size_t>(position_offset), id, padding_id, embed);
  });
  return out;
}

Tensor pool(const Tensor& hidden, const Tensor& cu_seqlens, const std::string& mode, bool normalize) {
  const char* const op = "pool";
  check_cpu(op, "hidden", hidden);
  const DType type = float_type(op, "hidden", hidden);
  STD_TORCH_CHECK(hidden.dim() == 2 && hidden.size(1) >= 1, op, ": expected hidden [T, H], got ", describe(hidden));
  const std::optional<Pooling> pooling = find_pooling(mode);
  STD_TORCH_CHECK(pooling, op, ": expected mode one of ", pooling_names(), "; got '", mode, "'");
  const int64_t tokens = hidden.size(0), width = hidden.size(1);
  const Sequences sequences = check_sequences(op, cu_seqlens, tokens);
  for (size_t s = 0; s < sequences.count; ++s) {
    STD_TORCH_CHECK(sequences.offsets[s] < sequences.offsets[s + 1], op, ": sequence ", s,
                    " has no tokens, so nothing to pool");
  }
  const Tensor source = as_contiguous(hidden);
  const Tensor out = new_tensor(hidden, {static_cast<int64_t>(sequences.count), width}, ScalarType::Float);
  const VecKernels& vec = *dispatch().vec;
  const PoolProblem problem{.hidden = source.const_data_ptr(),
                            .type = type,
                            .width = static_cast<size_t>(width),
                            .cu_seqlens = sequences.offsets,
                            .mode = *pooling,
                            .normalize = normalize,
                            .kept = static_cast<size_t>(width),
                            .out = static_cast<float*>(out.mutable_data_ptr())};
  const int64_t count = std::max<int64_t>(1, static_cast<int64_t>(sequences.count));
  torch::stable::parallel_for(0, static_cast<int64_t>(sequences.count),
                              row_grain(width * std::max<int64_t>(1, tokens / count)), [&](int64_t begin, int64_t end) {
                                pool_texts(problem, vec, static_cast<size_t>(begin), static_cast<size_t>(end));
                              });
  return out;
}

Tensor rotary_table(const Tensor& like, int64_t positions, int64_t head_size, double theta, double factor) {
  STD_TORCH_CHECK(positions >= 1 && head_size >= 2 && head_size % 2 == 0 && theta > 0.0 && factor > 0.0,
                  "_rotary_table: expected positions of at least 1, an even head_size and a positive theta, got ",
                  positions, ", ", head_size, " and ", theta);
  const Tensor table = new_tensor(like, {positions, head_size}, ScalarType::Float);
  fill_rotary_table(static_cast<size_t>(positions), static_cast<size_t>(head_size), theta, factor,
                    static_cast<float*>(table.mutable_data_ptr()));
  return table;
}

Tensor relative_bias_table(const Tensor& bias, int64_t reach) {
  const char* const op = "_relative_bias_table";
  check_cpu(op, "bias", bias);
  STD_TORCH_CHECK(bias.dim() == 2 && bias.scalar_type() == ScalarType::Float && bias.size(0) >= 4 &&
                      bias.size(0) % 4 == 0 && reach > bias.size(0) / 4,
                  op,
                  ": expected fp32 [buckets, heads] with buckets a multiple of 4 and reach above a quarter of them, ",
                  "got ", describe(bias), " and ", reach);
  const Tensor source = as_contiguous(bias);
  const Tensor table = new_tensor(bias, {bias.size(1), 2 * reach + 1}, ScalarType::Float);
  fill_relative_bias(static_cast<const float*>(source.const_data_ptr()), static_cast<size_t>(bias.size(0)),
                     static_cast<size_t>(bias.size(1)), static_cast<size_t>(reach),
                     static_cast<float*>(table.mutable_data_ptr()));
  return table;
}

std::string isa_report() { return isa_report_json(); }

}  // namespace torch_ext
