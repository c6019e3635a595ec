#pragma once
/// Refusal of tensors that require grad. The ops have no derivative, and an op without one does not fail by itself: torch
/// runs it and warns, at most, in backward().

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>

namespace torch_ext {

namespace detail {

inline bool call_is_leaf(const torch::stable::Tensor& t) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(t)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::is_leaf", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}

inline torch::stable::Tensor call_alias(const torch::stable::Tensor& t) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(t)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::alias", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

/// The stable ABI of 2.10 has no requires_grad(). A view has a grad_fn, so is no leaf, exactly if its base requires grad
/// (autograd is still active in a CPU kernel that was reached through torch's fallback for ops without a derivative).
inline bool requires_grad(const torch::stable::Tensor& t) { return !call_is_leaf(call_alias(t)); }

}  // namespace detail

/// Throws if gradients are enabled and the tensor requires grad. Free under no_grad() and inference_mode(); elsewhere two
/// small calls into torch.
inline void check_inference_only(const char* op, const char* argument, const torch::stable::Tensor& t) {
  if (!aoti_torch_grad_mode_is_enabled()) return;
  const auto type = t.scalar_type();
  if (type == torch::headeronly::ScalarType::Long || type == torch::headeronly::ScalarType::Int) return;
  STD_TORCH_CHECK(!detail::requires_grad(t), op, ": ", argument,
                  " requires grad, but torch_ext is for inference only and has no gradients: call it under "
                  "torch.inference_mode() or torch.no_grad(), or pass ",
                  argument, ".detach()");
}

}  // namespace torch_ext
