/// What the kernels are compared with, written to be obvious, in double precision.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels/gemm_kernel.h"
#include "kernels/vec_kernels.h"

namespace torch_ext::test {

inline uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

inline float float_from_bits(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

inline float bf16_to_f32(bf16 h) { return float_from_bits(static_cast<uint32_t>(h.bits) << 16); }

inline bool bf16_is_nan(bf16 h) { return (h.bits & 0x7f80) == 0x7f80 && (h.bits & 0x7f) != 0; }

/// The nearest bf16; of two that are as near, the one whose last bit is zero; NaN for NaN.
inline bf16 reference_bf16(float x) {
  if (std::isnan(x)) return {0x7fc0};
  const uint32_t u = float_bits(x), low = u & 0xffff;
  const uint16_t down = static_cast<uint16_t>(u >> 16);  // towards zero
  if (low < 0x8000) return {down};
  if (low > 0x8000) return {static_cast<uint16_t>(down + 1)};
  return {static_cast<uint16_t>(down + (down & 1))};
}

/// x as a kernel sees it that keeps its operands in `t`.
inline float rounded_to(DType t, float x) { return t == DType::kF32 ? x : bf16_to_f32(reference_bf16(x)); }

inline double reference_activation(Activation a, double x) {
  switch (a) {
    case Activation::kNone:
      return x;
    case Activation::kGelu:
      return x < -40 ? -0.0 : 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::kGeluTanh: {
      // 0.5 x (1 + tanh u) = x / (1 + exp(-2 u)), without the cancellation of the first form
      const double u = std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x);
      return x < -40 ? -0.0 : x / (1.0 + std::exp(-2.0 * u));
    }
    case Activation::kRelu:
      return x < 0 ? 0.0 : x;
    case Activation::kTanh:
      return std::tanh(x);
    case Activation::kSilu:
      return x < -700 ? -0.0 : x / (1.0 + std::exp(-x));
    case Activation::kSigmoid:
      return x < -700 ? 0.0 : 1.0 / (1.0 + std::exp(-x));
    case Activation::kLeakyRelu:
      return x < 0 ? static_cast<double>(0.01f) * x : x;
    case Activation::kQuickGelu:
      return x < -400 ? -0.0 : x / (1.0 + std::exp(-1.702 * x));
  }
  return NAN;
}

inline const char* activation_name(Activation a) { return kActivationNames[static_cast<size_t>(a)]; }

inline const char* dtype_name(DType t) { return t == DType::kF32 ? "f32" : "bf16"; }

/// Softmax of `scale` times the scores.
inline std::vector<double> reference_softmax(const std::vector<double>& scores, double scale) {
  double largest = -INFINITY, sum = 0;
  for (const double s : scores) largest = std::fmax(largest, s * scale);
  std::vector<double> p;
  for (const double s : scores) p.push_back(std::exp(s * scale - largest));
  for (const double x : p) sum += x;
  for (double& x : p) x /= sum;
  return p;
}

}  // namespace torch_ext::test
