#include "packing/encoder_sections.h"

#include <cstring>

#include "check.h"

namespace torch_ext {
namespace {

uint64_t encoder_checksum(const EncoderHeader& h, const void* sections) {
  return checksum(sections, h.sections * sizeof(Section), checksum(&h, offsetof(EncoderHeader, checksum)));
}

// The sections of a packed encoder whose header is sound.
class Sections {
 public:
  Sections(const char* op, const EncoderHeader& h, const Dispatch& dispatch, LinearEngine engine)
      : op_(op),
        data_(reinterpret_cast<const char*>(&h)),
        bytes_(h.bytes),
        type_(DType{h.type}),
        table_(reinterpret_cast<const Section*>(&h + 1)),
        dispatch_(dispatch),
        engine_(engine) {}

  // Null for an empty section. `bytes` is what it must hold, if it is not empty.
  const char* get(size_t index, uint64_t bytes) const {
    const Section& s = table_[index];
    if (s.bytes == 0) return nullptr;
    check(s.bytes == bytes && s.offset <= bytes_ && s.bytes <= bytes_ - s.offset && s.offset % kPackedAlignment == 0,
          op_, ": the packed encoder is damaged: section ", index, " has ", s.bytes, " bytes, expected ", bytes);
    return data_ + s.offset;
  }
  const float* floats(size_t index, uint64_t count) const {
    return reinterpret_cast<const float*>(get(index, count * sizeof(float)));
  }
  const void* table(size_t index, uint64_t rows, uint64_t width) const {
    return get(index, rows * width * dtype_bytes(type_));
  }
  Norm norm(size_t index, uint64_t width) const {
    return {.weight = floats(index, width), .bias = floats(index + 1, width)};
  }
  Norm rms_norm(size_t index, uint64_t width) const { return {.weight = floats(index, width)}; }
  // The matrix in section `index` and its bias in the next one.
  Matrix matrix(size_t index, uint64_t n, uint64_t k) const {
    const char* const data = get(index, table_[index].bytes);
    if (!data) return {};
    const PackedHeader h = read_packed_header(op_, data, static_cast<size_t>(table_[index].bytes));
    check(h.n == n && h.k == k, op_, ": the packed encoder is damaged: section ", index, " holds a matrix of ", h.n,
          "x", h.k, ", expected ", n, "x", k);
    check((h.layout == Layout::kF32Rows) == (type_ == DType::kF32), op_,
          ": expected all matrices in fp32 or none, got section ", index, " packed as ", layout_name(h.layout));
    const char* const isa = dispatch_.isa->name;
    if (const GemmKernel* const own = own_kernel(dispatch_, engine_, h.layout)) {
      check_layout(op_, h, own->layout, own->nr, own->kr, isa);
    } else {
      check_layout(op_, h, engine_ == LinearEngine::kOnednn ? Layout::kOnednn : Layout::kPlain, 0, 0, isa);
    }
    return {h, data, floats(index + 1, n)};
  }

 private:
  const char* op_;
  const char* data_;
  uint64_t bytes_;
  DType type_;
  const Section* table_;
  const Dispatch& dispatch_;
  LinearEngine engine_;
};

}  // namespace

SectionKind section_kind(size_t index) {
  const bool layered = index >= kEncoderSections;
  const size_t kind = layered ? (index - kEncoderSections) % kLayerSections : index;
  const bool matrix = layered ? kind == kQkvWeight || kind == kOutWeight || kind == kUpWeight || kind == kDownWeight
                              : kind == kProjectionWeight;
  if (matrix) return SectionKind::kMatrix;
  const bool table = layered ? kind == kPositionKeys || kind == kPositionQueries : kind <= kTokenTypeTable;
  return table ? SectionKind::kTable : SectionKind::kFloats;
}

EncoderLayout lay_out_encoder(const std::vector<uint64_t>& section_bytes) {
  EncoderLayout layout;
  layout.bytes = sizeof(EncoderHeader) + section_bytes.size() * sizeof(Section);
  for (const uint64_t bytes : section_bytes) {
    layout.bytes = round_up(static_cast<size_t>(layout.bytes), kPackedAlignment);
    layout.sections.push_back({layout.bytes, bytes});
    layout.bytes += bytes;
  }
  return layout;
}

void write_encoder_header(EncoderHeader h, const EncoderLayout& layout, char* data) {
  std::memcpy(h.magic, kEncoderMagic, sizeof h.magic);
  h.version = kEncoderVersion;
  h.sections = static_cast<uint32_t>(layout.sections.size());
  h.bytes = layout.bytes;
  h.checksum = encoder_checksum(h, layout.sections.data());
  const size_t table_bytes = layout.sections.size() * sizeof(Section);
  std::memcpy(data, &h, sizeof h);
  std::memcpy(data + sizeof h, layout.sections.data(), table_bytes);
  uint64_t written = sizeof h + table_bytes;
  for (const Section& s : layout.sections) {
    std::memset(data + written, 0, static_cast<size_t>(s.offset - written));
    written = s.offset + s.bytes;
  }
}

const EncoderHeader& read_encoder_header(const char* op, const void* data, size_t bytes) {
  check(bytes >= sizeof(EncoderHeader), op, ": expected an encoder packed by torch_ext.Encoder, got ", bytes, " bytes");
  const EncoderHeader& h = *static_cast<const EncoderHeader*>(data);
  check(std::memcmp(h.magic, kEncoderMagic, sizeof h.magic) == 0, op,
        ": expected an encoder packed by torch_ext.Encoder, got bytes without its header");
  check(h.version == kEncoderVersion, op, ": the encoder was packed in format ", h.version,
        ", this torch_ext reads format ", kEncoderVersion, "; pack it again");
  check(h.hidden_size > 0 && h.bytes <= bytes && h.num_layers > 0 &&
            h.sections == kEncoderSections + uint64_t{h.num_layers} * kLayerSections &&
            sizeof h + h.sections * sizeof(Section) <= h.bytes,
        op, ": the packed encoder is damaged: its header does not fit its ", bytes, " bytes");
  check(encoder_checksum(h, &h + 1) == h.checksum, op,
        ": the packed encoder is damaged: its header has another checksum than it says; pack it again");
  return h;
}

EncoderModel read_encoder(const char* op, const void* data, size_t bytes, const Dispatch& d, LinearEngine engine) {
  EncoderModel m;
  const EncoderHeader& h = read_encoder_header(op, data, bytes);
  m.header = h;
  const Sections s(op, h, d, engine);
  const uint64_t width = h.hidden_size, e = h.embedding_size, wide = h.intermediate_size;
  const uint64_t angles = uint64_t{h.max_positions} * h.head_size, context = uint64_t{h.num_heads} * h.head_size;
  m.word = s.table(kWordTable, h.vocab_size, e);
  m.position = s.table(kPositionTable, uint64_t{h.max_positions} + h.position_offset, e);
  m.token_type = s.table(kTokenTypeTable, h.type_vocab_size, e);
  m.embedding_norm = s.norm(kEmbeddingNormWeight, e);
  m.projection = s.matrix(kProjectionWeight, width, e);
  m.final_norm = s.norm(kFinalNormWeight, width);
  m.relative_bias = s.floats(kRelativeBias, uint64_t{h.num_heads} * (2 * uint64_t{h.bias_reach} + 1));
  m.rotary = s.floats(kRotaryTable, angles);
  m.rotary_local = s.floats(kRotaryTableLocal, angles);
  const bool known_type = DType{h.type} == DType::kF32 || DType{h.type} == DType::kBF16;
  const auto whole_norm = [&](const Norm& norm) { return norm.weight && (h.rms_norm || norm.bias); };
  const bool sound = known_type && h.num_kv_heads > 0 && h.num_heads % h.num_kv_heads == 0 && h.head_size > 0 &&
                     h.activation < kActivationCount && m.word &&
                     (h.embedding_norm ? whole_norm(m.embedding_norm) && !h.rms_norm : h.norm_first && e == width) &&
                     (e == width || m.projection.packed) && (!h.norm_first || whole_norm(m.final_norm)) &&
                     (h.global_every || !h.window) && (h.padding_id < 0 || h.position_offset > 0) &&
                     (h.position_reach == 0 || h.position_reach > h.position_span / 2 + 1);
  check(sound, op, ": the packed encoder is damaged: something that every encoder has is missing");
  m.layers.resize(h.num_layers);
  for (size_t i = 0; i < h.num_layers; ++i) {
    const size_t first = kEncoderSections + i * kLayerSections;
    EncoderLayer& layer = m.layers[i];
    layer.qkv = s.matrix(first + kQkvWeight, context + 2 * uint64_t{h.num_kv_heads} * h.head_size, width);
    layer.out = s.matrix(first + kOutWeight, width, context);
    layer.attention_norm = s.norm(first + kAttentionNormWeight, width);
    layer.attention_norm.residual_scale = s.floats(first + kAttentionResidualScale, width);
    layer.up = s.matrix(first + kUpWeight, h.gated_ffn ? 2 * wide : wide, width);
    layer.down = s.matrix(first + kDownWeight, width, wide);
    layer.ffn_norm = s.norm(first + kFfnNormWeight, width);
    layer.ffn_norm.residual_scale = s.floats(first + kFfnResidualScale, width);
    layer.ffn_shift = s.floats(first + kFfnShift, wide);
    check(!layer.ffn_shift || !h.gated_ffn, op, ": the packed encoder is damaged: layer ", i,
          " has a shift after a gate");
    layer.local = h.window && i % h.global_every != h.global_first;
    if (!h.embedding_norm) {
      layer.query_norm = s.rms_norm(first + kQueryNormWeight, h.head_size);
      layer.key_norm = s.rms_norm(first + kKeyNormWeight, h.head_size);
      layer.attention_post_norm = s.rms_norm(first + kAttentionPostNormWeight, width);
      layer.ffn_post_norm = s.rms_norm(first + kFfnPostNormWeight, width);
      check(!layer.query_norm.weight == !layer.key_norm.weight, op, ": the packed encoder is damaged: layer ", i,
            " has a norm of queries or of keys, not of both");
    }
    if (h.position_span) {
      layer.position_keys = s.table(first + kPositionKeys, 2 * uint64_t{h.position_span}, width);
      layer.position_queries = s.table(first + kPositionQueries, 2 * uint64_t{h.position_span}, width);
      const EncoderLayer& other = m.layers[0];
      check((layer.position_keys || layer.position_queries) && !layer.position_keys == !other.position_keys &&
                !layer.position_queries == !other.position_queries,
            op, ": the packed encoder is damaged: layer ", i, " has no relative positions, or others than the first");
    }
    const bool whole = layer.qkv.packed && layer.out.packed && layer.up.packed && layer.down.packed &&
                       whole_norm(layer.ffn_norm) &&
                       (layer.attention_norm.weight ? whole_norm(layer.attention_norm) : h.norm_first && i == 0);
    check(whole, op, ": the packed encoder is damaged: layer ", i, " is not complete");
  }
  return m;
}

}  // namespace torch_ext
