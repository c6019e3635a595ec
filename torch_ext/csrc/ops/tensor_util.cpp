#include "ops/tensor_util.h"

#include <algorithm>

namespace torch_ext {
namespace {

std::string type_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "fp32";
    case ScalarType::BFloat16:
      return "bf16";
    case ScalarType::Half:
      return "fp16";
    case ScalarType::Double:
      return "fp64";
    case ScalarType::Int:
      return "i32";
    case ScalarType::Long:
      return "i64";
    case ScalarType::Byte:
      return "u8";
    case ScalarType::Char:
      return "i8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "dtype " + std::to_string(static_cast<int>(t));
  }
}

}  // namespace

std::string describe(const Tensor& t) {
  std::string s = type_name(t.scalar_type()) + " [";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

DType float_type(const char* op, const char* argument, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, op, ": expected ", argument,
                  " in fp32 or bf16, got ", describe(t), "; convert it with .to(torch.bfloat16)");
  return type == ScalarType::Float ? DType::kF32 : DType::kBF16;
}

Activation parse_activation(const char* op, const std::string& name) {
  std::string known;
  for (size_t i = 0; i < kActivationCount; ++i) {
    if (name == kActivationNames[i]) return static_cast<Activation>(i);
    known += (i == 0 ? "" : i + 1 == kActivationCount ? " or " : ", ") + std::string(kActivationNames[i]);
  }
  STD_TORCH_CHECK(false, op, ": expected activation ", known, ", got '", name, "'");
  return Activation::kNone;
}

void check_cpu(const char* op, const char* argument, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": expected ", argument, " on the CPU; move it there with .cpu()");
  check_inference_only(op, argument, t);
}

Tensor as_f32_vector(const char* op, const char* argument, const Tensor& t, int64_t n) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n, op, ": expected ", argument, " of shape [", n, "], got ",
                  describe(t));
  check_cpu(op, argument, t);
  if (float_type(op, argument, t) == DType::kF32) return as_contiguous(t);
  return torch::stable::to(t, ScalarType::Float);
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

Sequences check_sequences(const char* op, const Tensor& cu_seqlens, int64_t tokens) {
  check_cpu(op, "cu_seqlens", cu_seqlens);
  STD_TORCH_CHECK(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, op,
                  ": expected cu_seqlens i32 [B + 1], got ", describe(cu_seqlens));
  Sequences s{as_contiguous(cu_seqlens), nullptr, static_cast<size_t>(cu_seqlens.size(0)) - 1, 0};
  s.offsets = static_cast<const int32_t*>(s.holder.const_data_ptr());
  STD_TORCH_CHECK(s.offsets[0] == 0, op, ": expected cu_seqlens to start at 0, got ", s.offsets[0]);
  for (size_t i = 0; i < s.count; ++i) {
    STD_TORCH_CHECK(s.offsets[i] <= s.offsets[i + 1], op, ": expected cu_seqlens that do not decrease, got ",
                    s.offsets[i], " before ", s.offsets[i + 1], " at ", i);
    s.longest = std::max(s.longest, static_cast<size_t>(s.offsets[i + 1] - s.offsets[i]));
  }
  STD_TORCH_CHECK(s.offsets[s.count] == tokens, op, ": expected cu_seqlens to end at the number of tokens, ", tokens,
                  ", got ", s.offsets[s.count]);
  return s;
}

Tensor check_attended(const char* op, const Tensor& attended, const Sequences& sequences) {
  check_cpu(op, "attended", attended);
  STD_TORCH_CHECK(attended.scalar_type() == ScalarType::Int && attended.dim() == 1 &&
                      attended.size(0) == static_cast<int64_t>(sequences.count),
                  op, ": expected attended i32 [", sequences.count, "], got ", describe(attended));
  const Tensor checked = as_contiguous(attended);
  const auto* const counts = static_cast<const int32_t*>(checked.const_data_ptr());
  for (size_t i = 0; i < sequences.count; ++i) {
    const int32_t length = sequences.offsets[i + 1] - sequences.offsets[i];
    STD_TORCH_CHECK(counts[i] >= std::min(length, 1) && counts[i] <= length, op, ": expected attended from 1 to the ",
                    length, " tokens of sequence ", i, ", got ", counts[i]);
  }
  return checked;
}

}  // namespace torch_ext
