// pack_encoder, encoder_forward: a whole encoder in one object and one call.
#include "encoder.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "gemm.h"
#include "ops/onednn.h"
#include "ops/ops.h"
#include "ops/packed.h"

namespace torch_ext {
namespace {

namespace stable = torch::stable;
using torch::headeronly::IntHeaderOnlyArrayRef;

Tensor view_of(const void* data, std::initializer_list<int64_t> sizes, ScalarType type) {
  const int64_t strides[] = {sizes.size() == 2 ? sizes.begin()[1] : 1, 1};
  return stable::from_blob(const_cast<void*>(data), IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()),
                           IntHeaderOnlyArrayRef(strides, sizes.size()),
                           stable::Device(torch::headeronly::DeviceType::CPU), type);
}

// Whether PyTorch multiplies with some of the matrices.
bool has_foreign_matrices(const EncoderModel& model) {
  const auto foreign = [](const Matrix& m) {
    return m.packed && (m.header.layout == Layout::kOnednn || m.header.layout == Layout::kPlain);
  };
  return foreign(model.projection) || std::any_of(model.layers.begin(), model.layers.end(), [&](const EncoderLayer& l) {
           return foreign(l.qkv) || foreign(l.out) || foreign(l.up) || foreign(l.down);
         });
}

class TorchHost : public EncoderHost {
 public:
  explicit TorchHost(bool fills_up) : fills_up_(fills_up) {}

  size_t threads() const override { return threads_; }

  void parallel(size_t tasks, void (*task)(void* context, size_t i), void* context) override {
    parallel_tasks(tasks, [&](size_t i) { task(context, i); });
  }

  size_t preferred_rows(size_t tokens) const override {
    return fills_up_ ? static_cast<size_t>(torch_ext::preferred_rows(static_cast<int64_t>(tokens))) : tokens;
  }

  const bf16* foreign_linear(const Matrix& matrix, const bf16* x, size_t rows, Activation activation) override {
    const auto m = static_cast<int64_t>(rows), n = static_cast<int64_t>(matrix.n());
    const Tensor input = view_of(x, {m, static_cast<int64_t>(matrix.k())}, ScalarType::BFloat16);
    const Tensor bias = view_of(matrix.bias, {n}, ScalarType::Float);
    const Packed packed = {matrix.header, const_cast<char*>(matrix.packed)};
    next_ = 1 - next_;
    if (matrix.header.layout == Layout::kOnednn) {
      held_[next_] = onednn_linear(input, opaque_view(packed), &bias, activation, nullptr);
    } else {
      held_[next_] = linear_plain(input, packed, bias, activation);
    }
    return static_cast<const bf16*>(held_[next_]->const_data_ptr());
  }

 private:
  const bool fills_up_;
  const size_t threads_ = static_cast<size_t>(std::max<int64_t>(1, stable::get_num_threads()));
  // A product is read while the next one is computed.
  std::optional<Tensor> held_[2];
  size_t next_ = 0;
};

uint64_t encoder_checksum(const EncoderHeader& h, const void* sections) {
  return checksum(sections, h.sections * sizeof(Section), checksum(&h, offsetof(EncoderHeader, checksum)));
}

// ---- reading a packed encoder ---------------------------------------------------------------------------------------

const EncoderHeader& read_header(const char* op, const Tensor& packed) {
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.dim() == 2 &&
                      packed.is_contiguous() && packed.numel() >= static_cast<int64_t>(sizeof(EncoderHeader)),
                  op, ": expected an encoder packed by torch_ext.Encoder, got ", describe(packed));
  const EncoderHeader& h = *static_cast<const EncoderHeader*>(packed.const_data_ptr());
  STD_TORCH_CHECK(std::memcmp(h.magic, kEncoderMagic, sizeof h.magic) == 0, op,
                  ": expected an encoder packed by torch_ext.Encoder, got ", describe(packed), " without its header");
  STD_TORCH_CHECK(h.version == kEncoderVersion, op, ": the encoder was packed in format ", h.version,
                  ", this torch_ext reads format ", kEncoderVersion, "; pack it again");
  STD_TORCH_CHECK(static_cast<int64_t>(h.hidden_size) == packed.size(0) &&
                      h.bytes <= static_cast<uint64_t>(packed.numel()) && h.num_layers > 0 &&
                      h.sections == kEncoderSections + uint64_t{h.num_layers} * kLayerSections &&
                      sizeof h + h.sections * sizeof(Section) <= h.bytes,
                  op, ": the packed encoder is damaged: its header does not fit its shape, ", describe(packed));
  STD_TORCH_CHECK(encoder_checksum(h, &h + 1) == h.checksum, op,
                  ": the packed encoder is damaged: its header has another checksum than it says; pack it again");
  return h;
}

// The sections of a packed encoder whose header is sound.
class Sections {
 public:
  Sections(const char* op, const EncoderHeader& h)
      : op_(op),
        data_(reinterpret_cast<const char*>(&h)),
        bytes_(h.bytes),
        type_(DType{h.type}),
        table_(reinterpret_cast<const Section*>(&h + 1)) {}

  // Null for an empty section. `bytes` is what it must hold, if it is not empty.
  const char* get(size_t index, uint64_t bytes) const {
    const Section& s = table_[index];
    if (s.bytes == 0) return nullptr;
    STD_TORCH_CHECK(s.bytes == bytes && s.offset <= bytes_ && s.bytes <= bytes_ - s.offset, op_,
                    ": the packed encoder is damaged: section ", index, " has ", s.bytes, " bytes, expected ", bytes);
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
  // The matrix in section `index` and its bias in the next one.
  Matrix matrix(size_t index, uint64_t n, uint64_t k) const {
    const char* const data = get(index, table_[index].bytes);
    if (!data) return {};
    const Packed packed = read_packed(op_, const_cast<char*>(data), static_cast<size_t>(table_[index].bytes));
    const PackedHeader& h = packed.header;
    STD_TORCH_CHECK(h.n == n && h.k == k, op_, ": the packed encoder is damaged: section ", index,
                    " holds a matrix of ", h.n, "x", h.k, ", expected ", n, "x", k);
    STD_TORCH_CHECK((h.layout == Layout::kF32Rows) == (type_ == DType::kF32), op_,
                    ": expected all matrices in fp32 or none, got section ", index, " packed as ",
                    layout_name(h.layout));
    if (const GemmKernel* const own = own_kernel(h.layout)) {
      check_layout(op_, h, own->layout, own->nr, own->kr);
    } else {
      check_layout(op_, h, linear_engine() == LinearEngine::kOnednn ? Layout::kOnednn : Layout::kPlain, 0, 0);
    }
    return {h, data, floats(index + 1, n)};
  }

 private:
  const char* op_;
  const char* data_;
  uint64_t bytes_;
  DType type_;
  const Section* table_;
};

EncoderModel read_encoder(const char* op, const Tensor& packed) {
  EncoderModel m;
  const EncoderHeader& h = read_header(op, packed);
  m.header = h;
  const Sections s(op, h);
  const uint64_t width = h.hidden_size, e = h.embedding_size, wide = h.intermediate_size;
  const uint64_t angles = h.num_heads ? uint64_t{h.max_positions} * (width / h.num_heads) : 0;
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
  const bool sound = known_type && h.num_heads > 0 && width % h.num_heads == 0 && h.activation < kActivationCount &&
                     m.word && m.embedding_norm.weight && m.embedding_norm.bias &&
                     (e == width || m.projection.packed) &&
                     (!h.norm_first || (m.final_norm.weight && m.final_norm.bias)) && (h.global_every || !h.window) &&
                     (h.padding_id < 0 || h.position_offset > 0);
  STD_TORCH_CHECK(sound, op, ": the packed encoder is damaged: something that every encoder has is missing");
  m.layers.resize(h.num_layers);
  for (size_t i = 0; i < h.num_layers; ++i) {
    const size_t first = kEncoderSections + i * kLayerSections;
    EncoderLayer& layer = m.layers[i];
    layer.qkv = s.matrix(first + kQkvWeight, 3 * width, width);
    layer.out = s.matrix(first + kOutWeight, width, width);
    layer.attention_norm = s.norm(first + kAttentionNormWeight, width);
    layer.attention_norm.residual_scale = s.floats(first + kAttentionResidualScale, width);
    layer.up = s.matrix(first + kUpWeight, h.gated_ffn ? 2 * wide : wide, width);
    layer.down = s.matrix(first + kDownWeight, width, wide);
    layer.ffn_norm = s.norm(first + kFfnNormWeight, width);
    layer.ffn_norm.residual_scale = s.floats(first + kFfnResidualScale, width);
    layer.local = h.window && i % h.global_every != 0;
    const bool whole = layer.qkv.packed && layer.out.packed && layer.up.packed && layer.down.packed &&
                       layer.ffn_norm.weight && layer.ffn_norm.bias &&
                       (layer.attention_norm.weight ? layer.attention_norm.bias != nullptr : h.norm_first && i == 0);
    STD_TORCH_CHECK(whole, op, ": the packed encoder is damaged: layer ", i, " is not complete");
  }
  return m;
}

}  // namespace

Tensor pack_encoder(const std::vector<Tensor>& weights, int64_t hidden_size, int64_t num_layers, int64_t num_heads,
                    int64_t intermediate_size, const std::string& activation, double layer_norm_eps,
                    int64_t max_positions, int64_t position_offset, int64_t padding_id, int64_t window,
                    int64_t global_every, bool norm_first, bool gated_ffn) {
  const char* const op = "pack_encoder";
  constexpr int64_t kLargest = int64_t{1} << 30;
  for (const int64_t x : {hidden_size, num_layers, num_heads, intermediate_size, max_positions, global_every}) {
    STD_TORCH_CHECK(x >= 1 && x < kLargest, op, ": expected sizes and numbers of at least 1, got ", x);
  }
  STD_TORCH_CHECK(position_offset >= 0 && position_offset < kLargest && window >= 0 && window < kLargest, op,
                  ": expected position_offset and window of at least 0, got ", position_offset, " and ", window);
  STD_TORCH_CHECK(padding_id >= -1 && padding_id < kLargest && (padding_id < 0 || position_offset >= 1), op,
                  ": expected padding_id -1, or an id and position_offset of at least 1, got ", padding_id, " and ",
                  position_offset);
  STD_TORCH_CHECK(static_cast<int64_t>(weights.size()) == kEncoderSections + num_layers * kLayerSections, op,
                  ": expected ", kEncoderSections + num_layers * kLayerSections, " weights for ", num_layers,
                  " layers, got ", weights.size());
  const DType type = float_type(op, "the word table", weights[kWordTable]);
  std::vector<Tensor> parts;
  std::vector<Section> table;
  uint64_t end = sizeof(EncoderHeader) + weights.size() * sizeof(Section);
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    check_cpu(op, "weights", w);
    const bool layered = i >= kEncoderSections;
    const size_t kind = layered ? (i - kEncoderSections) % kLayerSections : i;
    const bool matrix = layered ? kind == kQkvWeight || kind == kOutWeight || kind == kUpWeight || kind == kDownWeight
                                : kind == kProjectionWeight;
    const bool is_table = !layered && kind <= kTokenTypeTable;
    const ScalarType wanted = matrix ? ScalarType::Byte : is_table ? scalar_type(type) : ScalarType::Float;
    STD_TORCH_CHECK(w.numel() == 0 || w.scalar_type() == wanted, op, ": expected weight ", i, " as ",
                    matrix     ? "a packed weight"
                    : is_table ? "a table in the dtype of the first one"
                               : "fp32",
                    ", got ", describe(w));
    parts.push_back(as_contiguous(w));
    const uint64_t element = matrix ? 1 : is_table ? dtype_bytes(type) : sizeof(float);
    end = round_up(end, kPackedAlignment);
    table.push_back({end, static_cast<uint64_t>(w.numel()) * element});
    end += table.back().bytes;
  }
  const Tensor& word = weights[kWordTable];
  STD_TORCH_CHECK(word.dim() == 2 && word.numel() > 0, op, ": expected the word table [V, E], got ", describe(word));
  EncoderHeader h = {};
  std::memcpy(h.magic, kEncoderMagic, sizeof h.magic);
  h.version = kEncoderVersion;
  h.sections = static_cast<uint32_t>(weights.size());
  h.bytes = end;
  h.hidden_size = static_cast<uint32_t>(hidden_size);
  h.num_layers = static_cast<uint32_t>(num_layers);
  h.num_heads = static_cast<uint32_t>(num_heads);
  h.intermediate_size = static_cast<uint32_t>(intermediate_size);
  h.embedding_size = static_cast<uint32_t>(word.size(1));
  h.vocab_size = static_cast<uint32_t>(word.size(0));
  const Tensor &types = weights[kTokenTypeTable], &bias = weights[kRelativeBias];
  h.type_vocab_size = types.numel() ? static_cast<uint32_t>(types.size(0)) : 0;
  h.max_positions = static_cast<uint32_t>(max_positions);
  h.position_offset = static_cast<uint32_t>(position_offset);
  h.padding_id = static_cast<int32_t>(padding_id);
  h.window = static_cast<uint32_t>(window);
  h.global_every = static_cast<uint32_t>(global_every);
  h.bias_reach = bias.numel() ? static_cast<uint32_t>(bias.size(1) / 2) : 0;
  h.layer_norm_eps = static_cast<float>(layer_norm_eps);
  h.activation = static_cast<uint8_t>(parse_activation(op, activation));
  h.norm_first = norm_first;
  h.gated_ffn = gated_ffn;
  h.type = static_cast<uint8_t>(type);
  h.checksum = encoder_checksum(h, table.data());

  const int64_t row_bytes = (static_cast<int64_t>(end) + hidden_size - 1) / hidden_size;
  const Tensor packed = new_tensor(word, {hidden_size, row_bytes}, ScalarType::Byte);
  char* const data = static_cast<char*>(packed.mutable_data_ptr());
  uint64_t written = sizeof h + table.size() * sizeof(Section);
  std::memcpy(data, &h, sizeof h);
  std::memcpy(data + sizeof h, table.data(), table.size() * sizeof(Section));
  for (size_t i = 0; i < parts.size(); ++i) {
    std::memset(data + written, 0, table[i].offset - written);
    if (table[i].bytes) std::memcpy(data + table[i].offset, parts[i].const_data_ptr(), table[i].bytes);
    written = table[i].offset + table[i].bytes;
  }
  std::memset(data + written, 0, static_cast<size_t>(packed.numel()) - written);
  read_encoder(op, packed);  // every size is checked there
  return packed;
}

Tensor encoder_sections(const Tensor& packed) {
  const EncoderHeader& h = read_header("_encoder_sections", packed);
  const Tensor table = new_tensor(packed, {static_cast<int64_t>(h.sections), 2}, ScalarType::Long);
  std::memcpy(table.mutable_data_ptr(), &h + 1, h.sections * sizeof(Section));
  return table;
}

Tensor encoder_forward(const Tensor& input_ids, const Tensor& cu_seqlens, const std::optional<Tensor>& token_type_ids,
                       const Tensor& packed, bool fp32) {
  const char* const op = "encoder_forward";
  const EncoderModel model = read_encoder(op, packed);
  const EncoderHeader& h = model.header;
  STD_TORCH_CHECK(input_ids.dim() == 1, op, ": expected input_ids i64 [T], got ", describe(input_ids));
  const int64_t tokens = input_ids.size(0);
  const Tensor ids = check_ids(op, "input_ids", input_ids, tokens, h.vocab_size);
  const Sequences sequences = check_sequences(op, cu_seqlens, tokens);
  const bool limited = model.position || model.rotary;
  STD_TORCH_CHECK(!limited || sequences.longest <= h.max_positions, op, ": a sequence of ", sequences.longest,
                  " tokens is longer than the ", h.max_positions, " positions of the model; truncate it");
  std::optional<Tensor> types;
  if (token_type_ids) {
    STD_TORCH_CHECK(model.token_type, op, ": token_type_ids given, but the model has no token types");
    types = check_ids(op, "token_type_ids", *token_type_ids, tokens, h.type_vocab_size);
  }
  const DType type{h.type};
  STD_TORCH_CHECK((type == DType::kF32) == fp32, op, ": expected fp32=", fp32 ? "False" : "True",
                  " for an encoder packed in ", fp32 ? "bf16 or int8" : "fp32");
  const Tensor out = new_tensor(packed, {tokens, static_cast<int64_t>(h.hidden_size)}, scalar_type(type));
  if (tokens == 0) return out;

  EncoderBatch batch;
  batch.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  batch.type_ids = types ? static_cast<const int64_t*>(types->const_data_ptr()) : nullptr;
  batch.cu_seqlens = sequences.offsets;
  batch.sequences = sequences.count;
  batch.tokens = static_cast<size_t>(tokens);
  TorchHost host(has_foreign_matrices(model));
  run_encoder(model, batch, dispatch(), host, out.mutable_data_ptr());
  return out;
}

}  // namespace torch_ext
