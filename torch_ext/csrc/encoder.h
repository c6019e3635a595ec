/// The forward pass of an encoder on packed weights, in one call. Knows nothing of torch: what it needs of it comes as
/// an `EncoderHost`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "dispatch.h"
#include "kernels/vec_kernels.h"
#include "packing/packed_encoder.h"
#include "packing/packed_weight.h"

namespace torch_ext {

/// A packed matrix [n, k] and its bias.
struct Matrix {
  PackedHeader header = {};
  const char* packed = nullptr;  ///< header included
  const float* bias = nullptr;
  size_t n() const { return static_cast<size_t>(header.n); }
  size_t k() const { return static_cast<size_t>(header.k); }
  const char* payload() const { return packed + payload_offset(header); }
};

struct Norm {
  const float* weight = nullptr;  ///< null where there is no norm
  const float* bias = nullptr;
  const float* residual_scale = nullptr;  ///< factors of the residual that is added before; null: 1
};

struct EncoderLayer {
  Matrix qkv, out, up, down;
  Norm attention_norm, ffn_norm;
  bool local = false;  ///< attention within the window
};

/// A packed encoder, as pointers into it.
struct EncoderModel {
  EncoderHeader header = {};
  const uint16_t *word = nullptr, *position = nullptr, *token_type = nullptr;
  Norm embedding_norm, final_norm;
  Matrix projection;  ///< packed is null where there is none
  const float *relative_bias = nullptr, *rotary = nullptr, *rotary_local = nullptr;
  std::vector<EncoderLayer> layers;
};

/// Texts one after the other; ids are in range.
struct EncoderBatch {
  const int64_t* ids = nullptr;       ///< [tokens]
  const int64_t* type_ids = nullptr;  ///< [tokens], or null for type 0
  const int32_t* cu_seqlens = nullptr;
  size_t sequences = 0, tokens = 0;
};

/// What the forward pass needs of its surroundings.
class EncoderHost {
 public:
  virtual ~EncoderHost() = default;

  /// Threads that `parallel` may use.
  virtual size_t threads() const = 0;

  /// Runs task(context, i) for i in [0, tasks), on several threads.
  virtual void parallel(size_t tasks, void (*task)(void* context, size_t i), void* context) = 0;

  /// Rows that `foreign_linear` is to be given for `tokens` of them; at least as many.
  virtual size_t preferred_rows(size_t tokens) const = 0;

  /// act(x W^T + bias) for a matrix in a layout that is not of a kernel of ours. x bf16 [rows, k]; the result, bf16
  /// [rows, n], is valid until the next call but one.
  virtual const uint16_t* foreign_linear(const Matrix& matrix, const uint16_t* x, size_t rows,
                                         Activation activation) = 0;
};

/// A batch in groups of whole sequences, one run through all layers after the other.
struct EncoderGroups {
  std::vector<size_t> starts;  ///< first sequence of each, and the number of sequences
  size_t most_tokens = 0;
};
EncoderGroups group_sequences(const EncoderModel& model, const EncoderBatch& batch, const EncoderHost& host);

/// Elements of workspace that `run_encoder` needs, for the rows of the largest group.
size_t encoder_workspace_elements(const EncoderModel& model, size_t rows);

/// out [tokens, hidden_size] = the last hidden state, bf16.
void run_encoder(const EncoderModel& model, const EncoderBatch& batch, const EncoderGroups& groups,
                 const Dispatch& dispatch, EncoderHost& host, uint16_t* workspace, uint16_t* out);

}  // namespace torch_ext
