// add_layer_norm, embed_layer_norm, pool, _isa_report: what works row by row.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "dispatch.h"
#include "gemm.h"
#include "ops/ops.h"

namespace torch_ext {
namespace {

// Elements that are worth a thread of their own in row-wise work.
constexpr int64_t kRowGrain = 32 * 1024;

int64_t row_grain(int64_t width) { return std::max<int64_t>(1, kRowGrain / std::max<int64_t>(width, 1)); }

const char* row_of(const Tensor& t, int64_t row, int64_t width, DType type) {
  return static_cast<const char*>(t.const_data_ptr()) + static_cast<size_t>(row * width) * dtype_bytes(type);
}

Tensor check_table(const char* op, const char* argument, const Tensor& t, int64_t width, ScalarType type) {
  check_cpu(op, argument, t);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == width && t.scalar_type() == type, op, ": expected ", argument,
                  " [rows, ", width, "] of the word table's dtype, got ", describe(t));
  return as_contiguous(t);
}

Tensor check_ids(const char* op, const char* argument, const Tensor& t, int64_t tokens, int64_t rows) {
  check_cpu(op, argument, t);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.size(0) == tokens, op, ": expected ",
                  argument, " i64 [", tokens, "], got ", describe(t));
  const Tensor ids = as_contiguous(t);
  const int64_t* const p = static_cast<const int64_t*>(ids.const_data_ptr());
  for (int64_t i = 0; i < tokens; ++i) {
    STD_TORCH_CHECK(p[i] >= 0 && p[i] < rows, op, ": expected ", argument, " from 0 to ", rows - 1, ", got ", p[i],
                    " at ", i);
  }
  return ids;
}

}  // namespace

Tensor add_layer_norm(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, const Tensor& bias,
                      double eps) {
  const char* const op = "add_layer_norm";
  check_cpu(op, "x", x);
  const DType type = float_type(op, "x", x);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) >= 1, op, ": expected x [T, H], got ", describe(x));
  const int64_t rows = x.size(0), width = x.size(1);
  const Tensor w = as_f32_vector(op, "weight", weight, width), b = as_f32_vector(op, "bias", bias, width);
  const Tensor source = as_contiguous(x);
  std::optional<Tensor> added;
  if (residual) {
    check_cpu(op, "residual", *residual);
    STD_TORCH_CHECK(residual->dim() == 2 && residual->size(0) == rows && residual->size(1) == width &&
                        residual->scalar_type() == x.scalar_type(),
                    op, ": expected residual like x, ", describe(x), ", got ", describe(*residual));
    added = as_contiguous(*residual);
  }
  const Tensor out = new_tensor(x, {rows, width}, x.scalar_type());
  const VecKernels& vec = *dispatch().vec;
  const float* const wp = static_cast<const float*>(w.const_data_ptr());
  const float* const bp = static_cast<const float*>(b.const_data_ptr());
  const size_t row_bytes = static_cast<size_t>(width) * dtype_bytes(type);
  const char* const xp = static_cast<const char*>(source.const_data_ptr());
  const char* const rp = added ? static_cast<const char*>(added->const_data_ptr()) : nullptr;
  char* const op_out = static_cast<char*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, row_grain(width), [&](int64_t begin, int64_t end) {
    for (size_t i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
      vec.sum_layer_norm_row(static_cast<size_t>(width), xp + i * row_bytes, rp ? rp + i * row_bytes : nullptr, nullptr,
                             wp, bp, static_cast<float>(eps), op_out + i * row_bytes, type);
    }
  });
  return out;
}

Tensor embed_layer_norm(const Tensor& input_ids, const Tensor& cu_seqlens, const std::optional<Tensor>& token_type_ids,
                        const Tensor& word, const Tensor& position, const std::optional<Tensor>& token_type,
                        const Tensor& weight, const Tensor& bias, double eps, int64_t position_offset) {
  const char* const op = "embed_layer_norm";
  check_cpu(op, "word", word);
  const DType type = float_type(op, "word", word);
  STD_TORCH_CHECK(word.dim() == 2 && word.size(1) >= 1, op, ": expected word [V, H], got ", describe(word));
  STD_TORCH_CHECK(input_ids.dim() == 1, op, ": expected input_ids i64 [T], got ", describe(input_ids));
  const int64_t tokens = input_ids.size(0), width = word.size(1);
  const Tensor words = as_contiguous(word);
  const Tensor positions = check_table(op, "position", position, width, word.scalar_type());
  const Tensor ids = check_ids(op, "input_ids", input_ids, tokens, word.size(0));
  const Sequences sequences = check_sequences(op, cu_seqlens, tokens);
  STD_TORCH_CHECK(position_offset >= 0 && static_cast<int64_t>(sequences.longest) + position_offset <= position.size(0),
                  op, ": a sequence of ", sequences.longest, " tokens is longer than the ",
                  position.size(0) - position_offset, " positions of the model; truncate it");
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
    const int32_t* const offsets = sequences.offsets;
    size_t s = static_cast<size_t>(std::upper_bound(offsets, offsets + sequences.count + 1, begin) - offsets) - 1;
    for (int64_t t = begin; t < end; ++t) {
      while (t >= offsets[s + 1]) ++s;
      const char* const type_row = types ? row_of(*types, type_id ? type_id[t] : 0, width, type) : nullptr;
      vec.sum_layer_norm_row(static_cast<size_t>(width), row_of(words, id[t], width, type),
                             row_of(positions, t - offsets[s] + position_offset, width, type), type_row, wp, bp,
                             static_cast<float>(eps), op_out + static_cast<size_t>(t) * row_bytes, type);
    }
  });
  return out;
}

Tensor pool(const Tensor& hidden, const Tensor& cu_seqlens, const std::string& mode, bool normalize) {
  const char* const op = "pool";
  check_cpu(op, "hidden", hidden);
  const DType type = float_type(op, "hidden", hidden);
  STD_TORCH_CHECK(hidden.dim() == 2 && hidden.size(1) >= 1, op, ": expected hidden [T, H], got ", describe(hidden));
  STD_TORCH_CHECK(mode == "mean" || mode == "cls" || mode == "max", op, ": expected mode mean, cls or max, got '", mode,
                  "'");
  const int64_t tokens = hidden.size(0), width = hidden.size(1);
  const Sequences sequences = check_sequences(op, cu_seqlens, tokens);
  for (size_t s = 0; s < sequences.count; ++s) {
    STD_TORCH_CHECK(sequences.offsets[s] < sequences.offsets[s + 1], op, ": sequence ", s,
                    " has no tokens, so nothing to pool");
  }
  const Tensor source = as_contiguous(hidden);
  const Tensor out = new_tensor(hidden, {static_cast<int64_t>(sequences.count), width}, ScalarType::Float);
  const VecKernels& vec = *dispatch().vec;
  float* const pooled = static_cast<float*>(out.mutable_data_ptr());
  const size_t n = static_cast<size_t>(width);
  const auto fold = mode == "max" ? vec.max_row : vec.accumulate_row;
  const bool whole = mode != "cls";
  torch::stable::parallel_for(
      0, static_cast<int64_t>(sequences.count),
      row_grain(width * std::max<int64_t>(1, tokens / std::max<int64_t>(1, static_cast<int64_t>(sequences.count)))),
      [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) {
          float* const acc = pooled + static_cast<size_t>(s) * n;
          const int64_t first = sequences.offsets[s], last = whole ? sequences.offsets[s + 1] : first + 1;
          std::fill(acc, acc + n, mode == "max" ? -INFINITY : 0.0f);
          for (int64_t t = first; t < last; ++t) fold(n, row_of(source, t, width, type), type, acc);
          float factor = mode == "mean" ? 1.0f / static_cast<float>(last - first) : 1.0f;
          if (normalize) {
            // The same as torch.nn.functional.normalize: the norm is at least 1e-12.
            const float norm = std::sqrt(vec.sum_squares(n, acc)) * factor;
            factor /= std::max(norm, 1e-12f);
          }
          if (factor != 1.0f) vec.scale_rows(1, n, acc, n, &factor, acc, n, DType::kF32);
        }
      });
  return out;
}

std::string isa_report() { return isa_report_json(); }

}  // namespace torch_ext
