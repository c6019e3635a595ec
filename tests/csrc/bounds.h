/// Every tolerance of these tests, each with its reason. A result that is NaN is within no bound.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels/gemm_kernel.h"
#include "kernels/vec_kernels.h"

namespace torch_ext::test {

/// Half a unit in the last place of 1: the largest relative error of one rounded operation in fp32, and of rounding
/// to bf16, which keeps 8 bits.
constexpr double kRoundF32 = 0x1p-24;
constexpr double kRoundBf16 = 0x1p-8;
/// The smallest normal number: BFMMLA, and AVX-512's rounding to bf16, take what is below for zero.
constexpr double kSmallest = 0x1p-126;

inline double rounding_of(DType t) { return t == DType::kF32 ? kRoundF32 : kRoundBf16; }

/// A sum of k products in fp32, in any order, from data of random signs. BFMMLA rounds to odd, so that each step may
/// err by a whole unit in the last place, and it flushes subnormal products. The partial sums of such data grow like
/// sqrt(k), hence their errors add up to less than a multiple of sum |a b| that does not grow with k.
inline double product_bound(double sum_abs, size_t k) {
  return 8 * kRoundF32 * sum_abs + static_cast<double>(k) * kSmallest;
}

/// Rounding `y` once to `t`.
inline double output_bound(DType t, double y) { return rounding_of(t) * std::fabs(y) + kSmallest; }

/// exp(x) for x in [-87, 88], as simd.inl states it.
inline double exp_bound(double y) { return 3e-7 * y; }

/// act(x) = y computed for a result of type `t`, as simd.inl states it.
inline double activation_bound(Activation a, double x, double y, DType t) {
  switch (a) {
    case Activation::kNone:
    case Activation::kRelu:
      return 0;
    case Activation::kGelu:
      if (t == DType::kBF16) return 5e-5 * std::max(1.0, x);
      return x > 1 ? std::max(2e-6, 5e-7 * x) : 2e-6;
    case Activation::kGeluTanh:
      return 5e-7 * std::max(1.0, std::fabs(y));
    case Activation::kTanh:
      return 2e-6 * std::fabs(y);
    case Activation::kSilu:
      return 1e-6 * std::fabs(y) + 2e-36;
    case Activation::kSigmoid:
      return 1e-6 * y + 2e-38;
    case Activation::kLeakyRelu:
      return kRoundF32 * std::fabs(y);
    case Activation::kQuickGelu:
      return (1e-6 + 3e-7 * std::fabs(x)) * std::fabs(y) + 2e-36;
  }
  return 0;
}

/// The steepest slope of an activation: GELU's 1.13 is the largest.
constexpr double kSteepest = 1.13;

/// out = act(z) + residual rounded to `t`, where z has the error `z_bound`.
inline double epilogue_bound(Activation a, double z, double z_bound, double y, double residual, DType t) {
  const double before = kSteepest * (z_bound + kRoundF32 * std::fabs(z)) + activation_bound(a, z, y, t) +
                        (residual != 0 ? kRoundF32 * std::fabs(y + residual) : 0);
  return before + output_bound(t, std::fabs(y + residual) + before);
}

/// Layer normalization of n numbers up to `largest`, with `scale` = 1 / sqrt(var + eps). The mean is a sum of n
/// numbers in fp32, whose error grows like sqrt(n); so does that of the variance, relative to itself. An error of the
/// mean moves every result by `scale` times as much, and the variance by its square.
inline double layer_norm_bound(size_t n, double largest, double scale, double normalized, double weight, double bias,
                               DType t, double y) {
  const double relative = (4 + std::sqrt(static_cast<double>(n))) * kRoundF32;
  const double shift = relative * largest * scale;
  const double before = std::fabs(weight) * (shift + (relative + shift * shift) * std::fabs(normalized)) +
                        2 * kRoundF32 * (std::fabs(weight * normalized) + std::fabs(bias));
  return before + output_bound(t, std::fabs(y) + before);
}

/// 2^t before it is rounded to bf16, as simd.inl states it.
constexpr double kExp2ToBf16 = 1e-4;

/// RMS normalization of n numbers with the factor `scale` = 1 / sqrt(mean square + eps). `sources` is the sum of the
/// magnitudes that were added up to the number.
inline double rms_norm_bound(size_t n, double sources, double scale, double weight, DType t, double y) {
  const double relative = (4 + std::sqrt(static_cast<double>(n))) * kRoundF32;
  const double before = 2 * kRoundF32 * sources * scale * std::fabs(weight) + relative * std::fabs(y) + kSmallest;
  return before + output_bound(t, std::fabs(y) + before);
}

/// a * c +- b * s with |a c| + |b s| = `magnitude`: two products and a sum, each rounded once at most.
inline double rotation_bound(double magnitude, DType t, double y) {
  const double before = 2 * kRoundF32 * magnitude + kSmallest;
  return before + output_bound(t, std::fabs(y) + before);
}

/// act(x) * gate rounded to `t`, with act(x) = a.
inline double gate_bound(Activation activation, double x, double a, double gate, DType t) {
  const double y = std::fabs(a * gate);
  const double before = activation_bound(activation, x, a, t) * std::fabs(gate) + 2 * kRoundF32 * y + kSmallest;
  return before + output_bound(t, y + before);
}

/// A probability p of a softmax whose scores have the absolute error `score_bound`.
inline double probability_bound(double p, double score_bound, size_t n) {
  // Numerator and denominator move by exp(+-score_bound) each; the sum of n errs like sqrt(n).
  const double relative =
      std::expm1(std::min(2 * score_bound, 50.0)) + 2 * 3e-7 + (4 + std::sqrt(static_cast<double>(n))) * kRoundF32;
  // exp(-87) stands for everything below.
  return relative * p + 2e-38;
}

/// Attention: `weighted` = sum p |v|, and `sum_abs_v` = sum |v| over the column of values. Probabilities are rounded to
/// the type that the kernel keeps rows in.
inline double attention_bound(double weighted, double sum_abs_v, double score_bound, size_t n, DType probabilities,
                              DType out, double y) {
  // Numerators, and the sum of them.
  const double narrow = (probabilities == DType::kBF16 ? kRoundBf16 : 0) + (out == DType::kBF16 ? 2 * kExp2ToBf16 : 0);
  const double before =
      probability_bound(weighted, score_bound, n) + 2e-38 * sum_abs_v + narrow * weighted + product_bound(weighted, n);
  return before + output_bound(out, std::fabs(y) + before);
}

/// True if `got` is as near to `expected` as `bound` says; infinities must be equal.
inline bool within(double got, double expected, double bound) {
  return got == expected || std::fabs(got - expected) <= bound;
}

/// Keeps the largest error in units of its bound, for --verbose.
struct Worst {
  double ratio = 0, got = 0, expected = 0, at = 0;
  void see(double g, double e, double bound, double x = 0) {
    const double r = bound > 0 ? std::fabs(g - e) / bound : 0;
    if (r > ratio) *this = {r, g, e, x};
  }
};

}  // namespace torch_ext::test
