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
  Norm query_norm, key_norm;                ///< of each head
  Norm attention_post_norm, ffn_post_norm;  ///< of what each part adds to the residual
  const float* ffn_shift = nullptr;         ///< [intermediate_size], added after the activation; null: 0
  bool local = false;                       ///< attention within the window
  const void* position_keys = nullptr;      ///< [2 * position_span, hidden_size] of `header.type`, or null: see
  const void* position_queries = nullptr;   ///< PositionTables
};

/// A packed encoder, as pointers into it.
struct EncoderModel {
  EncoderHeader header = {};
  const void *word = nullptr, *position = nullptr, *token_type = nullptr;  ///< tables of `header.type`
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
  const int32_t* attended = nullptr;  ///< [sequences], see AttentionProblem; null: all tokens are
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

  /// act(x W^T + bias) for a matrix of a bf16 encoder in a layout that is not of a kernel of ours. x bf16 [rows, k]; the
  /// result, bf16 [rows, n], is valid until the next call but one. Never called within `parallel`.
  virtual const bf16* foreign_linear(const Matrix& matrix, const bf16* x, size_t rows, Activation activation) = 0;
};

/// fn(i) for i in [0, tasks), on the threads of `host`; a single task runs where it is.
template <typename F>
void run_tasks(EncoderHost& host, size_t tasks, const F& fn) {
  if (tasks == 1) {
    fn(size_t{0});
    return;
  }
  host.parallel(
      tasks, [](void* context, size_t i) { (*static_cast<const F*>(context))(i); },
      const_cast<void*>(static_cast<const void*>(&fn)));
}

/// A part of a batch: sequences [first, last).
struct SequenceRange {
  size_t first, last;
};

/// Groups of whole sequences, to run through all layers one after the other, each on all `threads` threads. A group's
/// activations stay in the caches, while a larger one reads the weights less often.
std::vector<SequenceRange> group_sequences(const EncoderModel& model, const EncoderBatch& batch, size_t threads);

/// Parts of whole sequences for threads that take one after the other, and run it through all layers alone: no thread
/// waits for another until the end of the batch. Largest first. Empty where the parts would be too small or too unequal, so
/// that all threads had better share each layer.
std::vector<SequenceRange> share_sequences(const EncoderModel& model, const EncoderBatch& batch, size_t threads);

/// out [tokens, hidden_size] = the last hidden state, of `header.type`.
void run_encoder(const EncoderModel& model, const EncoderBatch& batch, const Dispatch& dispatch, EncoderHost& host,
                 void* out);

}  // namespace torch_ext
