/// The packed encoder that users hold: one byte tensor with everything that a forward pass reads.
///
///   | EncoderHeader | Section x sections | section 0 | section 1 | ...      each section 64-byte aligned
///
/// Sections come in the order of `EncoderSection`, then those of the first layer in the order of `LayerSection`, those of
/// the second, ... One that the model has not got is empty. Matrices of linear layers are whole packed weights, header
/// included (packed_weight.h); tables are of the header's type, the rest is fp32.
#pragma once

#include <cstdint>

namespace torch_ext {

enum EncoderSection : uint32_t {
  kWordTable,
  kPositionTable,
  kTokenTypeTable,
  kEmbeddingNormWeight,
  kEmbeddingNormBias,
  kProjectionWeight,  ///< from the width of the tables to that of the layers
  kProjectionBias,
  kFinalNormWeight,
  kFinalNormBias,
  kRelativeBias,      ///< [heads, 2 * reach + 1]
  kRotaryTable,       ///< [max_positions, head_size]: cosines, then sines
  kRotaryTableLocal,  ///< the same for layers with a window
  kEncoderSections,
};

enum LayerSection : uint32_t {
  kQkvWeight,
  kQkvBias,
  kOutWeight,
  kOutBias,
  kAttentionNormWeight,
  kAttentionNormBias,
  kAttentionResidualScale,  ///< [hidden]: factors of the residual in this norm; empty: 1
  kUpWeight,
  kUpBias,
  kDownWeight,
  kDownBias,
  kFfnNormWeight,
  kFfnNormBias,
  kFfnResidualScale,
  kPositionKeys,     ///< [2 * position_span, hidden]: what queries are multiplied with, by distance
  kPositionQueries,  ///< the same for keys
  kQueryNormWeight,  ///< [head_size] of the norm of each head's queries
  kKeyNormWeight,
  kAttentionPostNormWeight,  ///< [hidden] of the norm of what attention adds
  kFfnPostNormWeight,
  kFfnShift,  ///< [intermediate_size]: added to what the activation gives; empty: 0
  kLayerSections,
};

struct EncoderHeader {
  char magic[8];
  uint32_t version;
  uint32_t sections;
  uint64_t bytes;  ///< all of it
  uint32_t hidden_size, num_layers, num_heads, intermediate_size;
  uint32_t embedding_size, vocab_size, type_vocab_size, max_positions;
  uint32_t position_offset, window, global_every, bias_reach;
  float layer_norm_eps;
  uint8_t activation, norm_first, gated_ffn;
  uint8_t type;        ///< DType of activations and tables: kBF16, or kF32 for an encoder of fp32 weights
  int32_t padding_id;  ///< tokens with this id have no position: they take row position_offset - 1; -1: all have one
  uint32_t position_span;   ///< half the rows of the tables of relative positions; 0: there are none
  uint32_t position_reach;  ///< distances share rows up to this one; 0: each has its own
  uint32_t num_kv_heads, head_size;
  uint32_t global_first;     ///< the first layer that is global, if `window` is not 0
  float attention_scale;     ///< of scores; 0: 1 / sqrt(head_size)
  float embedding_scale;     ///< of words
  uint8_t causal, rms_norm;  ///< norms are RMS norms, which have no bias
  uint8_t embedding_norm;    ///< 0: none, and residuals are summed in fp32
  uint8_t reserved[1];
  uint32_t dropped_word;  ///< 1 + the id of words that are zero, and whose share the others make up for; 0: none
  uint32_t reserved_too;
  uint64_t checksum;  ///< of what comes before it, and of the table of sections
};
static_assert(sizeof(EncoderHeader) == 136);

struct Section {
  uint64_t offset, bytes;
};

constexpr char kEncoderMagic[8] = {'T', 'X', 'E', 'N', 'C', 'O', 'D', 'R'};
constexpr uint32_t kEncoderVersion = 6;

}  // namespace torch_ext
