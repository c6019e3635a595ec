/// The head of a task on rows of hidden states: out(norm(activation(dense(x)))), or out(x), and an activation. Knows
/// nothing of torch.
#pragma once

#include <cstddef>

#include "encoder.h"

namespace torch_ext {

/// A packed head, as pointers into it.
struct HeadModel {
  Matrix dense;  ///< packed is null where there is none
  Activation activation = Activation::kNone;
  Norm norm;  ///< weight is null where there is none
  float layer_norm_eps = 0.0f;
  Matrix out;
  Activation out_activation = Activation::kNone;
};

/// out [rows, out.n()] fp32 of x [rows, k] of `type`, on the threads of `host`. All matrices are of kernels of ours.
void run_head(const HeadModel& head, const void* x, DType type, size_t rows, const Dispatch& dispatch,
              EncoderHost& host, float* out);

}  // namespace torch_ext
