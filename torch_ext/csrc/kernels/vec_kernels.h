/// Row kernels written once with portable vectors and compiled for each instruction set: epilogue of the matrix
/// product, softmax, normalization, embedding, pooling. Raw pointers only; sizes in elements.
#pragma once

#include "gemm_kernel.h"

namespace torch_ext {

enum class Activation : uint8_t { kNone, kGelu, kGeluTanh, kRelu, kTanh, kSilu };
constexpr size_t kActivationCount = 6;

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
  uint32_t required_features;

  /// Stores tile [rows, cols] (row stride `ld_tile`) as rows row0.. and columns col0.. of the output.
  /// One entry for each Activation.
  void (*store_tile[kActivationCount])(const float* tile, size_t ld_tile, size_t rows, size_t cols, const Epilogue& ep,
                                       size_t row0, size_t col0);

  /// s[j] = exp(scale * (s[j] - max s)) for j < n; returns the sum of the results. n >= 1. `s` has room for n rounded
  /// up to kMaxVecWidth elements; those past n hold nothing of use afterwards.
  float (*softmax_row)(float* s, size_t n, float scale);

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

  /// fp32 matrix product on this instruction set, with panels kept in fp32 or in bf16, and product of s8.
  const GemmKernel* gemm_f32;
  const GemmKernel* gemm_bf16;
  const GemmKernel* gemm_s8;

  /// Attention of bf16 where there is an instruction for its products, else both null: gemm_f32 and softmax_row do then.
  ///
  /// softmax_pack: numerators exp(scale * (s(i, j) - max over j of s(i, j))) of `rows` rows of n scores, rounded to bf16 and
  /// packed as a block of `block_rows` rows of `gemm_dot_bf16`; sums[i] is the sum of row i in fp32. n >= 1; rows of scores
  /// are `ld` apart and have room for n rounded up to kMaxVecWidth; they hold nothing of use afterwards.
  const GemmKernel* gemm_dot_bf16;
  void (*softmax_pack)(size_t rows, size_t block_rows, size_t n, float scale, float* s, size_t ld, float* sums,
                       void* block);
};

#if defined(__aarch64__)
extern const VecKernels kVecNeon;
extern const VecKernels kVecNeonBf16;
#elif defined(__x86_64__)
extern const VecKernels kVecAvx2;
extern const VecKernels kVecAvx512;
extern const VecKernels kVecAvx512Bf16;
extern const VecKernels kVecAmx;
#endif
extern const VecKernels kVecPortable;

/// Best first; the last one needs nothing.
const VecKernels& best_vec_kernels(uint32_t features);

}  // namespace torch_ext
