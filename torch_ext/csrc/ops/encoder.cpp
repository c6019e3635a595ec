// pack_encoder, encoder_forward: a whole encoder in one object and one call.
#include "encoder.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <map>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "gemm.h"
#include "ops/ops.h"
#include "ops/packed.h"
#include "packing/encoder_sections.h"

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

// Parts of a packed encoder from that size on are worth a call of the system.
constexpr uint64_t kLargeBytes = uint64_t{1} << 20;

// Returns the whole pages of memory whose content is not needed any more; whoever owns it may free it, or write to it.
void give_back_pages([[maybe_unused]] const void* data, [[maybe_unused]] uint64_t bytes) {
#if defined(__linux__)
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  // Memory is saved, or it is not: a failure changes no result.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
#endif
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
    held_[next_] = linear_by_torch(input, packed, bias, activation);
    return static_cast<const bf16*>(held_[next_]->const_data_ptr());
  }

 private:
  const bool fills_up_;
  const size_t threads_ = static_cast<size_t>(std::max<int64_t>(1, stable::get_num_threads()));
  // A product is read while the next one is computed.
  std::optional<Tensor> held_[2];
  size_t next_ = 0;
};

// The memory of a packed encoder, checked for being one tensor of bytes.
const void* encoder_data(const char* op, const Tensor& packed) {
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.dim() == 2 &&
                      packed.is_contiguous() && packed.numel() >= static_cast<int64_t>(sizeof(EncoderHeader)),
                  op, ": expected an encoder packed by torch_ext.Encoder, got ", describe(packed));
  const void* const data = packed.const_data_ptr();
  const EncoderHeader& h = read_encoder_header(op, data, static_cast<size_t>(packed.numel()));
  STD_TORCH_CHECK(static_cast<int64_t>(h.hidden_size) == packed.size(0), op,
                  ": the packed encoder is damaged: its header does not fit its shape, ", describe(packed));
  return data;
}

EncoderModel read_encoder(const char* op, const Tensor& packed) {
  return read_encoder(op, encoder_data(op, packed), static_cast<size_t>(packed.numel()), dispatch(), linear_engine());
}

}  // namespace

Tensor pack_encoder(const std::vector<Tensor>& weights, int64_t hidden_size, int64_t num_layers, int64_t num_heads,
                    int64_t intermediate_size, const std::string& activation, double layer_norm_eps,
                    int64_t max_positions, int64_t position_offset, int64_t padding_id, int64_t window,
                    int64_t global_every, bool norm_first, bool gated_ffn, int64_t position_span,
                    int64_t position_reach, int64_t num_kv_heads, int64_t head_size, int64_t global_first,
                    double attention_scale, double embedding_scale, bool causal, bool rms_norm, bool embedding_norm,
                    int64_t dropped_id) {
  const char* const op = "pack_encoder";
  constexpr int64_t kLargest = int64_t{1} << 30;
  for (const int64_t x : {hidden_size, num_layers, num_heads, intermediate_size, max_positions, global_every,
                          num_kv_heads, head_size, global_first + 1}) {
    STD_TORCH_CHECK(x >= 1 && x < kLargest, op, ": expected sizes and numbers of at least 1, got ", x);
  }
  STD_TORCH_CHECK(position_offset >= 0 && position_offset < kLargest && window >= 0 && window < kLargest, op,
                  ": expected position_offset and window of at least 0, got ", position_offset, " and ", window);
  STD_TORCH_CHECK(padding_id >= -1 && padding_id < kLargest && (padding_id < 0 || position_offset >= 1), op,
                  ": expected padding_id -1, or an id and position_offset of at least 1, got ", padding_id, " and ",
                  position_offset);
  STD_TORCH_CHECK(dropped_id >= -1 && dropped_id < kLargest, op, ": expected dropped_id of at least -1, got ",
                  dropped_id);
  STD_TORCH_CHECK(position_span >= 0 && position_span < kLargest && position_reach >= 0 && position_reach < kLargest,
                  op, ": expected position_span and position_reach of at least 0, got ", position_span, " and ",
                  position_reach);
  STD_TORCH_CHECK(static_cast<int64_t>(weights.size()) == kEncoderSections + num_layers * kLayerSections, op,
                  ": expected ", kEncoderSections + num_layers * kLayerSections, " weights for ", num_layers,
                  " layers, got ", weights.size());
  const DType type = float_type(op, "the word table", weights[kWordTable]);
  std::vector<Tensor> parts;
  std::vector<uint64_t> part_bytes;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    check_cpu(op, "weights", w);
    const SectionKind kind = section_kind(i);
    const ScalarType wanted = kind == SectionKind::kMatrix  ? ScalarType::Byte
                              : kind == SectionKind::kTable ? scalar_type(type)
                                                            : ScalarType::Float;
    STD_TORCH_CHECK(w.numel() == 0 || w.scalar_type() == wanted, op, ": expected weight ", i, " as ",
                    kind == SectionKind::kMatrix  ? "a packed weight"
                    : kind == SectionKind::kTable ? "a table in the dtype of the first one"
                                                  : "fp32",
                    ", got ", describe(w));
    parts.push_back(as_contiguous(w));
    const uint64_t element = kind == SectionKind::kMatrix  ? 1
                             : kind == SectionKind::kTable ? dtype_bytes(type)
                                                           : sizeof(float);
    part_bytes.push_back(static_cast<uint64_t>(w.numel()) * element);
  }
  const EncoderLayout layout = lay_out_encoder(part_bytes);
  const Tensor& word = weights[kWordTable];
  STD_TORCH_CHECK(word.dim() == 2 && word.numel() > 0, op, ": expected the word table [V, E], got ", describe(word));
  EncoderHeader h = {};
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
  h.position_span = static_cast<uint32_t>(position_span);
  h.position_reach = static_cast<uint32_t>(position_reach);
  h.num_kv_heads = static_cast<uint32_t>(num_kv_heads);
  h.head_size = static_cast<uint32_t>(head_size);
  h.global_first = static_cast<uint32_t>(global_first);
  h.attention_scale = static_cast<float>(attention_scale);
  h.embedding_scale = static_cast<float>(embedding_scale);
  h.causal = causal;
  h.rms_norm = rms_norm;
  h.embedding_norm = embedding_norm;
  h.dropped_word = static_cast<uint32_t>(dropped_id + 1);

  const int64_t row_bytes = (static_cast<int64_t>(layout.bytes) + hidden_size - 1) / hidden_size;
  const Tensor packed = new_tensor(word, {hidden_size, row_bytes}, ScalarType::Byte);
  char* const data = static_cast<char*>(packed.mutable_data_ptr());
  write_encoder_header(h, layout, data);
  std::map<const void*, size_t> readers;
  for (const Tensor& part : parts) ++readers[part.const_data_ptr()];
  for (size_t i = 0; i < parts.size(); ++i) {
    const Section& s = layout.sections[i];
    if (!s.bytes) continue;
    const char* const from = static_cast<const char*>(parts[i].const_data_ptr());
    // All in all, memory holds them once. Tables that follow from the specification are used beside the packed encoder.
    const bool last = --readers[from] == 0;
    const bool leaves = last && section_kind(i) != SectionKind::kFloats && s.bytes >= kLargeBytes;
    const uint64_t step = leaves ? kLargeBytes : s.bytes;
    for (uint64_t at = 0; at < s.bytes; at += step) {
      const uint64_t bytes = std::min(step, s.bytes - at);
      std::memcpy(data + s.offset + at, from + at, static_cast<size_t>(bytes));
      if (leaves) give_back_pages(from + at, bytes);
    }
  }
  std::memset(data + layout.bytes, 0, static_cast<size_t>(packed.numel()) - static_cast<size_t>(layout.bytes));
  read_encoder(op, packed);  // every size is checked there
  return packed;
}

Tensor encoder_sections(const Tensor& packed) {
  const EncoderHeader& h = *static_cast<const EncoderHeader*>(encoder_data("_encoder_sections", packed));
  const Tensor table = new_tensor(packed, {static_cast<int64_t>(h.sections), 2}, ScalarType::Long);
  std::memcpy(table.mutable_data_ptr(), &h + 1, h.sections * sizeof(Section));
  return table;
}

Tensor encoder_forward(const Tensor& input_ids, const Tensor& cu_seqlens, const std::optional<Tensor>& token_type_ids,
                       const Tensor& packed, bool fp32, const std::optional<Tensor>& attended) {
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
  std::optional<Tensor> counts;
  if (attended) counts = check_attended(op, *attended, sequences);
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
  batch.attended = counts ? static_cast<const int32_t*>(counts->const_data_ptr()) : nullptr;
  batch.sequences = sequences.count;
  batch.tokens = static_cast<size_t>(tokens);
  TorchHost host(has_foreign_matrices(model));
  run_encoder(model, batch, dispatch(), host, out.mutable_data_ptr());
  return out;
}

}  // namespace torch_ext
