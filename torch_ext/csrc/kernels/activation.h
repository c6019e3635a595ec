/// The activations, in one list from which everything that depends on them is made.
#pragma once

#include <cstddef>
#include <cstdint>

namespace torch_ext {

/// X(enumerator, name in Python, function of simd.inl for fp32 output, function for bf16 output). The order is that of
/// the values in packed encoders: append only. One more also needs its formula in the tests' reference.
#define TORCH_EXT_ACTIVATIONS(X)                      \
  X(kNone, "none", identity, identity)                \
  X(kGelu, "gelu", gelu, gelu_to_bf16)                \
  X(kGeluTanh, "gelu_tanh", gelu_tanh, gelu_tanh)     \
  X(kRelu, "relu", relu, relu)                        \
  X(kTanh, "tanh", tanh_approx, tanh_approx)          \
  X(kSilu, "silu", silu, silu)                        \
  X(kQuickGelu, "quick_gelu", quick_gelu, quick_gelu) \
  X(kSigmoid, "sigmoid", sigmoid, sigmoid)            \
  X(kLeakyRelu, "leaky_relu", leaky_relu, leaky_relu)

#define TORCH_EXT_ENUMERATOR(enumerator, name, f32, bf16) enumerator,
enum class Activation : uint8_t { TORCH_EXT_ACTIVATIONS(TORCH_EXT_ENUMERATOR) };
#undef TORCH_EXT_ENUMERATOR

#define TORCH_EXT_NAME(enumerator, name, f32, bf16) name,
constexpr const char* kActivationNames[] = {TORCH_EXT_ACTIVATIONS(TORCH_EXT_NAME)};
#undef TORCH_EXT_NAME

constexpr size_t kActivationCount = sizeof kActivationNames / sizeof kActivationNames[0];

}  // namespace torch_ext
