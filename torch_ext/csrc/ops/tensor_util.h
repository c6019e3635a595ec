/// Shorthand for what the ops need of torch's stable ABI, and their common checks.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "kernels/vec_kernels.h"
#include "ops/inference_only.h"

namespace torch_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// "bf16 [3, 768]", for error messages.
std::string describe(const Tensor& t);

/// fp32 or bf16 as DType; throws for anything else.
DType float_type(const char* op, const char* argument, const Tensor& t);

inline ScalarType scalar_type(DType t) { return t == DType::kF32 ? ScalarType::Float : ScalarType::BFloat16; }

/// The activation of that name; throws for an unknown one.
Activation parse_activation(const char* op, const std::string& name);

/// Throws unless `t` is a CPU tensor that does not require grad.
void check_cpu(const char* op, const char* argument, const Tensor& t);

/// `t` in row-major order with all rows adjacent; `t` itself where it is so already.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

/// A vector of `n` elements as contiguous fp32; bf16 is converted.
Tensor as_f32_vector(const char* op, const char* argument, const Tensor& t, int64_t n);

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
}

/// One line of `parallel_for`: fn(task) for task in [0, tasks), each thread a contiguous part. `fn` must not throw.
template <typename F>
void parallel_tasks(size_t tasks, const F& fn) {
  if (tasks == 1) {
    fn(size_t{0});
    return;
  }
  torch::stable::parallel_for(0, static_cast<int64_t>(tasks), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) fn(static_cast<size_t>(t));
  });
}

/// Token ids or types checked: i64 [tokens], each from 0 to rows - 1. The tensor returned is contiguous.
Tensor check_ids(const char* op, const char* argument, const Tensor& t, int64_t tokens, int64_t rows);

/// cu_seqlens checked: i32 [B + 1], from 0 to `tokens`, not decreasing. `holder` keeps the data alive.
struct Sequences {
  Tensor holder;
  const int32_t* offsets;
  size_t count;
  size_t longest;
};
Sequences check_sequences(const char* op, const Tensor& cu_seqlens, int64_t tokens);

/// attended checked: i32 [B], of each sequence from 1 to all of its tokens.
Tensor check_attended(const char* op, const Tensor& attended, const Sequences& sequences);

}  // namespace torch_ext
