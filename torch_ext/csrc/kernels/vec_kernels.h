/// Row kernels written once with portable vectors and compiled for each instruction set: epilogue of the matrix
/// product, softmax, normalization, embedding, pooling. Raw pointers only; sizes in elements.
#pragma once

#include "kernels/activation.h"
#include "kernels/gemm_kernel.h"

namespace torch_ext {

/// Most floats in a vector of any instance.
constexpr size_t kMaxVecWidth = 16;

/// What happens to a tile of the product on its way to memory:
/// out = act(tile + bias) + residual, rounded once to the output's type.
struct Epilogue {
  const float* bias = nullptr;     ///< [n] or null
  const void* residual = nullptr;  ///< [m, n], row stride `ld_residual`, or null
  size_t ld_residual = 0;
  DType residual_type = DType::kF32;
  void* out = nullptr;  ///< [m, n], row stride `ld_out`
  size_t ld_out = 0;
  DType out_type = DType::kF32;
};

struct VecKernels {
  const char* name;
  uint32_t required_features;  ///< bits of cpu_features.h

  /// Stores tile [rows, cols] (row stride `ld_tile`) as rows row0.. and columns col0.. of the output.
  /// One entry for each Activation.
  void (*store_tile[kActivationCount])(const float* tile, size_t ld_tile, size_t rows, size_t cols, const Epilogue& ep,
                                       size_t row0, size_t col0);

  /// s[j] = exp(scale * (s[j] - max s)) for j < n; returns the sum of the results. n >= 1. `s` has room for n rounded
  /// up to kMaxVecWidth elements; those past n hold nothing of use afterwards.
  float (*softmax_row)(float* s, size_t n, float scale);

  /// The same where what is computed from the results is rounded to bf16: relative error below 1e-4.
  float (*softmax_row_to_bf16)(float* s, size_t n, float scale);

  /// out(i, j) = s(i, j) * factors[i]; rows are `ld` and `ld_out` elements apart.
  void (*scale_rows)(size_t rows, size_t n, const float* s, size_t ld, const float* factors, void* out, size_t ld_out,
                     DType out_type);

  /// out = (v - mean v) / sqrt(var v + eps) * weight + bias over one row of n, with v = a + b + c summed in fp32;
  /// b and c may be null. With `b_scale` [n], v = a + b_scale * b; b is there then, and c is null. a, b, c and out have
  /// type `t`; out may be a, b or c.
  void (*sum_layer_norm_row)(size_t n, const void* a, const void* b, const void* c, const float* b_scale,
                             const float* weight, const float* bias, float eps, void* out, DType t);

  /// out = v / sqrt(mean v^2 + eps) * weight, with v, and what may be what, as above.
  void (*sum_rms_norm_row)(size_t n, const void* a, const void* b, const void* c, const float* weight, float eps,
                           void* out, DType t);

  /// Turns the pairs (x[i], x[i + head_size / 2]) of each head by the angle i: cos[i], sin[i], i < head_size / 2.
  /// x and out hold heads * head_size elements of type `t`; out may be x. head_size is even.
  void (*rotate_row)(size_t heads, size_t head_size, const float* cos, const float* sin, const void* x, void* out,
                     DType t);

  /// out[j] = act(x[j]) * gate[j], all of type `t`; out may be x or gate. One entry for each Activation.
  void (*gate_row[kActivationCount])(size_t n, const void* x, const void* gate, void* out, DType t);

  /// out[j] = a[j] + b[j], all of type `t`; out may be a or b.
  void (*add_row)(size_t n, const void* a, const void* b, void* out, DType t);

  /// acc[j] += x[j] and acc[j] = max(acc[j], x[j]), which is NaN if either is.
  void (*accumulate_row)(size_t n, const void* x, DType t, float* acc);
  void (*max_row)(size_t n, const void* x, DType t, float* acc);

  /// Sum of squares.
  float (*sum_squares)(size_t n, const float* x);
};

}  // namespace torch_ext
