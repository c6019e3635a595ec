// Longer than other files, since what writes an image, and what reads and checks it, must say the same.
#include "runtime/image.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <functional>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu_features.h"
#include "gemm.h"
#include "packing/encoder_sections.h"
#include "positions.h"
#include "runtime/elements.h"
#include "runtime/error.h"
#include "runtime/json.h"

namespace torch_ext::runtime {
namespace {

constexpr char kImageMagic[8] = {'T', 'X', 'I', 'M', 'A', 'G', 'E', '\0'};
constexpr uint32_t kImageVersion = 1;
constexpr int kSeals = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;

enum HeadSection { kDenseWeight, kDenseBias, kNormWeight, kNormBias, kOutWeight_, kOutBias_, kHeadSections };

struct ImageHeader {
  char magic[8];
  uint32_t version;
  uint32_t header_bytes;
  uint64_t bytes;     ///< all of it
  uint64_t checksum;  ///< of all that follows this header, continued by the header with zero here
  char architecture[16], isa[32];
  uint64_t cpu_features;  ///< that its kernels may use
  Section encoder_json, head_json, dtype, encoder;
  Section head[kHeadSections];
};
static_assert(sizeof(ImageHeader) == 248);

void copy_name(char* to, size_t size, const char* name) { std::snprintf(to, size, "%s", name); }
std::string name_in(const char* name, size_t size) { return std::string(name, strnlen(name, size)); }

uint64_t image_checksum(const ImageHeader& h, const char* data) {
  ImageHeader zeroed = h;
  zeroed.checksum = 0;
  return checksum(&zeroed, sizeof zeroed, checksum(data + sizeof h, static_cast<size_t>(h.bytes) - sizeof h));
}

// ---- elements -------------------------------------------------------------------------------------------------------

// The nearest bf16; of two that are as near, the one whose last bit is zero.
bf16 round_to_bf16(float x) {
  if (std::isnan(x)) return {0x7fc0};
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// ---- packing --------------------------------------------------------------------------------------------------------

// Elements that are packed before what was read of them leaves memory.
constexpr size_t kPieceElements = size_t{1} << 20;

// fn(begin, end) for parts of [0, count).
template <typename F>
void parallel_ranges(EncoderHost& host, size_t count, size_t grain, const F& fn) {
  const size_t tasks = std::clamp<size_t>(count / std::max<size_t>(grain, 1), 1, 4 * host.threads());
  run_tasks(host, tasks, [&](size_t i) { fn(count * i / tasks, count * (i + 1) / tasks); });
}

/// Weights of a model, checked against its specifications, and what becomes of each.
class Packer {
 public:
  Packer(const std::string& name, const Specs& specs, const Weights& weights, const Dispatch& dispatch,
         EncoderHost& host)
      : name_(name), specs_(specs), weights_(weights), dispatch_(dispatch), host_(host), fp32_(specs.dtype == "fp32") {
    check_weights();
  }

  DType type() const { return fp32_ ? DType::kF32 : DType::kBF16; }

  // Bytes of a weight of this name in the image; 0 where there is none.
  uint64_t packed_size(const std::string& weight) const {
    const std::vector<TensorView>* const parts = find(weight);
    if (!parts) return 0;
    const auto [rows, columns] = rows_and_columns(*parts);
    if (is_matrix(weight)) return packed_bytes(matrix_header(*parts));
    return rows * columns * (is_table(weight) ? dtype_bytes(type()) : sizeof(float));
  }

  void pack(const std::string& weight, char* to) const {
    const std::vector<TensorView>* const parts = find(weight);
    if (!parts) return;
    if (is_matrix(weight)) return pack_matrix(weight, *parts, to);
    const bool narrow = is_table(weight) && !fp32_;
    size_t written = 0;
    for (const TensorView& part : *parts) {
      const size_t elements = part.elements();
      char* const out = to + written * (narrow ? sizeof(bf16) : sizeof(float));
      in_pieces({part}, elements, 1, 1 << 16, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
          if (narrow) {
            const bf16 x =
                part.type == ElementType::kBF16 ? element<bf16>(part.data, i) : round_to_bf16(float_at(part, i));
            std::memcpy(out + i * sizeof x, &x, sizeof x);
          } else {
            const float x = float_at(part, i);
            std::memcpy(out + i * sizeof x, &x, sizeof x);
          }
        }
      });
      written += elements;
    }
  }

  // A weight in fp32; empty where there is none.
  std::vector<float> floats(const std::string& weight) const {
    std::vector<float> values;
    if (const std::vector<TensorView>* const parts = find(weight)) {
      const auto [rows, columns] = rows_and_columns(*parts);
      values = floats_in(*parts, 0, static_cast<size_t>(rows * columns));
    }
    return values;
  }

 private:
  const std::vector<TensorView>* find(const std::string& weight) const {
    const auto found = weights_.find(weight);
    return found == weights_.end() ? nullptr : &found->second;
  }

  // Vectors are one row.
  static std::pair<uint64_t, uint64_t> rows_and_columns(const std::vector<TensorView>& parts) {
    uint64_t rows = 0;
    for (const TensorView& part : parts) rows += part.shape[0];
    const uint64_t columns = parts[0].shape.size() == 2 ? parts[0].shape[1] : 1;
    return {rows, columns};
  }

  // fn(part, first, last) for the elements [first, last) of each part that are among [begin, end) of the weight.
  template <typename F>
  static void for_overlaps(const std::vector<TensorView>& parts, size_t begin, size_t end, const F& fn) {
    size_t start = 0;
    for (const TensorView& part : parts) {
      const size_t stop = start + part.elements();
      if (begin < stop && start < end) fn(part, std::max(begin, start) - start, std::min(end, stop) - start);
      start = stop;
    }
  }

  // Elements [begin, end) of a weight, in fp32.
  static std::vector<float> floats_in(const std::vector<TensorView>& parts, size_t begin, size_t end) {
    std::vector<float> values(end - begin);
    float* to = values.data();
    for_overlaps(parts, begin, end, [&](const TensorView& part, size_t first, size_t last) {
      for (size_t i = first; i < last; ++i) *to++ = float_at(part, i);
    });
    return values;
  }

  // fn(begin, end) for parts of [0, count), where one of `count` units has `unit` elements: a piece at a time on all
  // threads. What a piece has read of mapped files leaves memory, so that it is not there beside what is made of it.
  template <typename F>
  void in_pieces(const std::vector<TensorView>& parts, size_t count, size_t unit, size_t grain, const F& fn) const {
    const size_t piece = std::max(kPieceElements / unit, grain);
    for (size_t start = 0; start < count; start += piece) {
      const size_t size = std::min(piece, count - start);
      parallel_ranges(host_, size, grain, [&](size_t begin, size_t end) { fn(start + begin, start + end); });
      for_overlaps(parts, start * unit, (start + size) * unit, [](const TensorView& part, size_t first, size_t last) {
        const size_t bytes = element_bytes(part.type);
        if (part.mapped) forget_pages(part.data + first * bytes, (last - first) * bytes);
      });
    }
  }

  void check_weights() const {
    Shapes shapes = weight_shapes(specs_.encoder);
    for (const auto& [weight, shape] : optional_shapes(specs_.encoder)) {
      if (find(weight)) shapes[weight] = shape;
    }
    if (specs_.head) shapes.merge(weight_shapes(*specs_.head));
    std::string missing, unexpected;
    for (const auto& [weight, shape] : shapes) {
      const std::vector<TensorView>* const parts = find(weight);
      if (!parts || parts->empty()) {
        missing += (missing.empty() ? "" : ", ") + weight;
        continue;
      }
      check_shape(weight, *parts, shape);
      const auto is_s8 = [](const TensorView& part) { return part.type == ElementType::kS8; };
      if (std::none_of(parts->begin(), parts->end(), is_s8)) {
        expect(!find(weight + "_scale"), name_, ": expected ", weight, " of i8, since there is ", weight,
               "_scale, got ", describe((*parts)[0]));
        continue;
      }
      expect(is_matrix(weight) && specs_.dtype == "int8" && parts->size() == 1, name_, ": expected ", weight,
             parts->size() > 1 ? " in one part, or of fp32, fp16 or bf16, got " : " of fp32, fp16 or bf16, got ",
             describe((*parts)[0]));
      const std::string scale = weight + "_scale";
      if (const std::vector<TensorView>* const scales = find(scale)) {
        check_shape(scale, *scales, {shape[0]});
        expect(scales->size() == 1 && (*scales)[0].type == ElementType::kF32, name_, ": expected ", scale,
               " of fp32, got ", describe((*scales)[0]));
      } else {
        missing += (missing.empty() ? "" : ", ") + scale;
      }
    }
    for (const auto& [weight, parts] : weights_) {
      const bool scale = weight.ends_with("_scale") && shapes.count(weight.substr(0, weight.size() - 6));
      if (!shapes.count(weight) && !scale) unexpected += (unexpected.empty() ? "" : ", ") + weight;
    }
    expect(missing.empty() && unexpected.empty(), name_, ": weights do not fit the specification: missing ",
           missing.empty() ? "none" : missing, ", unexpected ", unexpected.empty() ? "none" : unexpected);
  }

  void check_shape(const std::string& weight, const std::vector<TensorView>& parts,
                   const std::vector<uint64_t>& shape) const {
    uint64_t rows = 0;
    for (const TensorView& part : parts) {
      const bool fits =
          part.shape.size() == shape.size() && std::equal(shape.begin() + 1, shape.end(), part.shape.begin() + 1);
      expect(fits, name_, ": expected ", weight, " ", describe(shape), ", got ", describe(part.shape));
      rows += part.shape[0];
    }
    expect(rows == shape[0], name_, ": expected ", weight, " ", describe(shape), ", got ", rows, " rows");
  }

  const GemmKernel& kernel_for(const std::vector<TensorView>& parts) const {
    if (parts[0].type == ElementType::kS8) return *dispatch_.gemm_s8;
    return fp32_ ? *dispatch_.gemm_f32 : *dispatch_.gemm_bf16;
  }

  PackedHeader matrix_header(const std::vector<TensorView>& parts) const {
    const GemmKernel& kernel = kernel_for(parts);
    const auto [n, k] = rows_and_columns(parts);
    return make_packed_header(kernel.layout, n, k, kernel.nr, kernel.kr, 0, packed_payload_bytes(kernel, n, k));
  }

  void pack_matrix(const std::string& weight, const std::vector<TensorView>& parts, char* to) const {
    const GemmKernel& kernel = kernel_for(parts);
    const PackedHeader header = matrix_header(parts);
    write_packed_header(header, nullptr, to);
    char* const payload = to + payload_offset(header);
    const auto n = static_cast<size_t>(header.n), k = static_cast<size_t>(header.k);
    if (parts[0].type == ElementType::kS8) return pack_s8(weight, kernel, parts[0], n, k, payload);
    // Packers take whole matrices of fp32 or bf16, aligned as their elements are.
    const TensorView& first = parts[0];
    const bool direct = parts.size() == 1 && (first.type == ElementType::kF32 || first.type == ElementType::kBF16) &&
                        reinterpret_cast<uintptr_t>(first.data) % element_bytes(first.type) == 0;
    const DType type = first.type == ElementType::kBF16 ? DType::kBF16 : DType::kF32;
    in_pieces(parts, kernel.panels(n), kernel.nr * k, 8, [&](size_t begin, size_t end) {
      if (direct) return pack_weight_panels(kernel, n, k, first.data, type, k, payload, begin, end);
      const size_t row = begin * kernel.nr, rows = std::min(n, end * kernel.nr) - row;
      const std::vector<float> copy = floats_in(parts, row * k, (row + rows) * k);
      char* const panels = payload + begin * kernel.rhs_panel_bytes(k);
      pack_weight_panels(kernel, rows, k, copy.data(), DType::kF32, k, panels, 0, end - begin);
    });
  }

  void pack_s8(const std::string& weight, const GemmKernel& kernel, const TensorView& q, size_t n, size_t k,
               char* payload) const {
    expect(static_cast<int64_t>(k) <= kMaxS8Products, name_, ": ", weight, " has ", k, " inputs, int8 takes at most ",
           kMaxS8Products);
    const std::vector<float> scales = floats(weight + "_scale");
    for (size_t j = 0; j < n; ++j) {
      expect(std::isfinite(scales[j]) && scales[j] >= 0.0f, name_, ": expected scales of ", weight,
             " that are finite and not negative, got ", scales[j], " at ", j);
    }
    const auto* const values = reinterpret_cast<const int8_t*>(q.data);
    expect(std::find(values, values + n * k, int8_t{-128}) == values + n * k, name_, ": expected ", weight,
           " from -127 to 127, got -128");
    in_pieces({q}, kernel.panels(n), kernel.nr * k, 8, [&](size_t begin, size_t end) {
      pack_weight_panels_s8(kernel, n, k, values, scales.data(), payload, begin, end);
    });
  }

  const std::string& name_;
  const Specs& specs_;
  const Weights& weights_;
  const Dispatch& dispatch_;
  EncoderHost& host_;
  const bool fp32_;
};

// The names of an encoder's weights, in the order of packed_encoder.h; empty for what is derived from others.
std::vector<std::string> section_names(const EncoderSpec& spec) {
  std::vector<std::string> names = {"embeddings.word",
                                    "embeddings.position",
                                    "embeddings.token_type",
                                    "embeddings.norm.weight",
                                    "embeddings.norm.bias",
                                    "embeddings.projection.weight",
                                    "embeddings.projection.bias",
                                    "final_norm.weight",
                                    "final_norm.bias",
                                    "",
                                    "",
                                    ""};
  for (int64_t i = 0; i < spec.num_layers; ++i) {
    for (const char* const part : {"attention.qkv.weight",
                                   "attention.qkv.bias",
                                   "attention.out.weight",
                                   "attention.out.bias",
                                   "attention.norm.weight",
                                   "attention.norm.bias",
                                   "attention.residual_scale",
                                   "ffn.up.weight",
                                   "ffn.up.bias",
                                   "ffn.down.weight",
                                   "ffn.down.bias",
                                   "ffn.norm.weight",
                                   "ffn.norm.bias",
                                   "ffn.residual_scale",
                                   "attention.position_keys",
                                   "attention.position_queries",
                                   "attention.query_norm.weight",
                                   "attention.key_norm.weight",
                                   "attention.post_norm.weight",
                                   "ffn.post_norm.weight",
                                   "ffn.shift"}) {
      names.push_back(joined("layers.", i, ".", part));
    }
  }
  return names;
}

constexpr const char* kHeadNames[kHeadSections] = {"head.dense.weight", "head.dense.bias", "head.norm.weight",
                                                   "head.norm.bias",    "head.out.weight", "head.out.bias"};

EncoderHeader encoder_header(const EncoderSpec& s, DType type) {
  EncoderHeader h = {};
  h.hidden_size = static_cast<uint32_t>(s.hidden_size);
  h.num_layers = static_cast<uint32_t>(s.num_layers);
  h.num_heads = static_cast<uint32_t>(s.num_heads);
  h.intermediate_size = static_cast<uint32_t>(s.intermediate_size);
  h.embedding_size = static_cast<uint32_t>(s.embedded());
  h.vocab_size = static_cast<uint32_t>(s.vocab_size);
  h.type_vocab_size = static_cast<uint32_t>(s.type_vocab_size);
  h.max_positions = static_cast<uint32_t>(s.max_positions);
  h.position_offset = static_cast<uint32_t>(s.position_offset);
  h.window = static_cast<uint32_t>(s.window);
  h.global_every = static_cast<uint32_t>(s.global_every);
  h.bias_reach = s.relative_attention_buckets ? static_cast<uint32_t>(s.relative_attention_max_distance) : 0;
  h.layer_norm_eps = static_cast<float>(s.layer_norm_eps);
  h.activation = static_cast<uint8_t>(activation_of(s.activation));
  h.norm_first = s.norm_first;
  h.gated_ffn = s.gated_ffn;
  h.type = static_cast<uint8_t>(type);
  h.padding_id = static_cast<int32_t>(s.padding_id);
  h.position_span = static_cast<uint32_t>(s.position_span);
  h.position_reach = static_cast<uint32_t>(s.position_reach);
  h.num_kv_heads = static_cast<uint32_t>(s.kv_heads());
  h.head_size = static_cast<uint32_t>(s.size_of_heads());
  h.global_first = static_cast<uint32_t>(s.global_first);
  h.attention_scale = static_cast<float>(s.attention_scale);
  h.embedding_scale = static_cast<float>(s.embedding_scale);
  h.causal = s.causal;
  h.rms_norm = s.rms_norm;
  h.embedding_norm = s.embedding_norm;
  h.dropped_word = static_cast<uint32_t>(s.dropped_id + 1);
  return h;
}

// Whether a packed encoder is that of a specification.
bool fits(const EncoderModel& model, const EncoderSpec& spec, const std::string& dtype) {
  const DType type = dtype == "fp32" ? DType::kF32 : DType::kBF16;
  EncoderHeader h = encoder_header(spec, type);
  const EncoderHeader& got = model.header;
  std::memcpy(h.magic, got.magic, sizeof h.magic);
  h.version = got.version;
  h.sections = got.sections;
  h.bytes = got.bytes;
  h.checksum = got.checksum;
  return std::memcmp(&h, &got, sizeof h) == 0 && spec.absolute_positions == (model.position != nullptr) &&
         (spec.type_vocab_size > 0) == (model.token_type != nullptr) &&
         spec.head_norms == (model.layers[0].query_norm.weight != nullptr) &&
         spec.post_norms == (model.layers[0].attention_post_norm.weight != nullptr) &&
         spec.content_to_position == (model.layers[0].position_keys != nullptr) &&
         spec.position_to_content == (model.layers[0].position_queries != nullptr) &&
         (spec.relative_attention_buckets > 0) == (model.relative_bias != nullptr) &&
         (spec.rotary_theta > 0.0) == (model.rotary != nullptr && model.rotary_local != nullptr);
}

// What follows from the specification: [relative bias, rotary angles, angles of local layers].
struct Derived {
  uint64_t bytes[3] = {};
  std::function<void(float*)> fill[3];
};

Derived derived_sections(const EncoderSpec& s, const Packer& packer) {
  Derived d;
  const auto heads = static_cast<size_t>(s.num_heads);
  if (s.relative_attention_buckets) {
    const auto reach = static_cast<size_t>(s.relative_attention_max_distance);
    d.bytes[0] = heads * (2 * reach + 1) * sizeof(float);
    d.fill[0] = [&s, &packer, heads, reach](float* table) {
      const std::vector<float> bias = packer.floats("relative_attention_bias");
      fill_relative_bias(bias.data(), static_cast<size_t>(s.relative_attention_buckets), heads, reach, table);
    };
  }
  if (s.rotary_theta > 0.0) {
    const auto positions = static_cast<size_t>(s.max_positions), size = static_cast<size_t>(s.size_of_heads());
    const double local = s.rotary_theta_local > 0.0 && s.window ? s.rotary_theta_local : s.rotary_theta;
    const double thetas[] = {s.rotary_theta, local};
    for (size_t i = 0; i < 2; ++i) {
      d.bytes[1 + i] = positions * size * sizeof(float);
      d.fill[1 + i] = [positions, size, theta = thetas[i], factor = s.rotary_factor](float* table) {
        fill_rotary_table(positions, size, theta, factor, table);
      };
    }
  }
  return d;
}

File new_memory_file(size_t bytes) {
  // The library's memfd_create would need a newer one than the rest.
  File file(static_cast<int>(syscall(SYS_memfd_create, "torch_ext image", MFD_CLOEXEC | MFD_ALLOW_SEALING)));
  if (file.fd() < 0) fail_by_errno("cannot make a file of memory");
  if (ftruncate(file.fd(), static_cast<off_t>(bytes)) != 0)
    fail_by_errno(joined("cannot get ", bytes, " bytes of memory"));
  return file;
}

void seal(const File& file) {
  if (fcntl(file.fd(), F_ADD_SEALS, kSeals) != 0) fail_by_errno("cannot seal a file of memory");
}

void write_all(int fd, const char* data, size_t bytes, const std::string& name) {
  for (size_t written = 0; written < bytes;) {
    const ssize_t n = write(fd, data + written, bytes - written);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_by_errno("cannot write " + name);
    written += static_cast<size_t>(n);
  }
}

// Writes the image at `data`, with the checksum that one of this process alone does without.
void write_image(int fd, const char* data, const std::string& name) {
  ImageHeader h;
  std::memcpy(&h, data, sizeof h);
  h.checksum = image_checksum(h, data);
  write_all(fd, reinterpret_cast<const char*>(&h), sizeof h, name);
  write_all(fd, data + sizeof h, static_cast<size_t>(h.bytes) - sizeof h, name);
}

}  // namespace

Specs parse_specs(const std::string& name, const std::string& encoder_json, const std::string& head_json,
                  const std::string& dtype) {
  Specs specs{.encoder_json = encoder_json, .head_json = head_json, .dtype = dtype, .encoder = {}, .head = {}};
  expect(dtype == "bf16" || dtype == "fp32" || dtype == "int8", name, ": unknown dtype '", dtype,
         "'; known: 'bf16', 'fp32', 'int8'");
  const auto parse = [&](const char* part, const auto& read) {
    try {
      read();
    } catch (const Error& error) {
      fail(ErrorCode::kValue, name, " has no valid specification of the ", part, ": ", error.what());
    }
  };
  parse("encoder", [&] { specs.encoder = parse_encoder_spec(encoder_json); });
  if (!head_json.empty()) parse("head", [&] { specs.head = parse_head_spec(head_json); });
  // Linear stages may follow several poolings side by side.
  const bool several = specs.head && specs.head->task == "feature-extraction" && specs.encoder.hidden_size > 0 &&
                       specs.head->hidden_size % specs.encoder.hidden_size == 0;
  expect(!specs.head || several || specs.head->hidden_size == specs.encoder.hidden_size, name,
         ": expected a head of hidden_size=", specs.encoder.hidden_size, ", got ",
         specs.head ? specs.head->hidden_size : 0);
  return specs;
}

ModelFile read_model_file(const std::string& path, const std::string& dtype) {
  ModelFile model;
  model.file = SafetensorsFile::open(path);
  const std::map<std::string, std::string>& metadata = model.file.metadata();
  const auto get = [&](const char* key) {
    const auto found = metadata.find(key);
    return found == metadata.end() ? std::string() : found->second;
  };
  expect(get("format") == "torch-ext-encoder", path,
         " was not written by torch_ext.Encoder.save(): its metadata has no format 'torch-ext-encoder'");
  expect(get("format_version") == "1", path, " has format version ", get("format_version"),
         ", this torch_ext reads 1: export the model again, or update torch-ext");
  const std::string stored = get("dtype"), wanted = dtype.empty() ? stored : dtype;
  model.specs = parse_specs(path, get("encoder"), get("head"), wanted);
  expect(stored == wanted || (stored == "fp32" && wanted == "bf16"), path, " holds ", stored, " weights, ", wanted,
         " was asked for: load the ", wanted, " file instead");
  for (const auto& [name, tensor] : model.file.tensors()) model.weights[name] = {tensor};
  return model;
}

Image Image::pack(const std::string& name, const Specs& specs, const Weights& weights, const Dispatch& dispatch,
                  EncoderHost& host, bool shared) {
  const Packer packer(name, specs, weights, dispatch, host);
  const std::vector<std::string> names = section_names(specs.encoder);
  const Derived derived = derived_sections(specs.encoder, packer);
  std::vector<uint64_t> sizes;
  for (size_t i = 0; i < names.size(); ++i) {
    const bool is_derived = i >= kRelativeBias && i <= kRotaryTableLocal;
    sizes.push_back(is_derived ? derived.bytes[i - kRelativeBias] : packer.packed_size(names[i]));
  }
  const EncoderLayout layout = lay_out_encoder(sizes);

  ImageHeader h = {};
  std::memcpy(h.magic, kImageMagic, sizeof h.magic);
  h.version = kImageVersion;
  h.header_bytes = sizeof h;
  copy_name(h.architecture, sizeof h.architecture, architecture_name());
  copy_name(h.isa, sizeof h.isa, dispatch.isa->name);
  h.cpu_features = (dispatch.isa->required_features | dispatch.isa->optional_features) & cpu_features();
  h.bytes = sizeof h;
  const auto place = [&](Section& section, uint64_t bytes) {
    h.bytes = round_up(static_cast<size_t>(h.bytes), kPackedAlignment);
    section = {h.bytes, bytes};
    h.bytes += bytes;
  };
  place(h.encoder_json, specs.encoder_json.size());
  place(h.head_json, specs.head_json.size());
  place(h.dtype, specs.dtype.size());
  place(h.encoder, layout.bytes);
  for (size_t i = 0; i < kHeadSections; ++i) place(h.head[i], specs.head ? packer.packed_size(kHeadNames[i]) : 0);

  Image image;
  const auto bytes = static_cast<size_t>(h.bytes);
  if (shared) image.file_ = new_memory_file(bytes);
  Mapping writable = shared ? Mapping::of_file(image.file_.fd(), bytes, true, "memory") : Mapping::anonymous(bytes);
  char* const data = writable.data();
  std::memcpy(data + h.encoder_json.offset, specs.encoder_json.data(), specs.encoder_json.size());
  std::memcpy(data + h.head_json.offset, specs.head_json.data(), specs.head_json.size());
  std::memcpy(data + h.dtype.offset, specs.dtype.data(), specs.dtype.size());
  char* const encoder = data + h.encoder.offset;
  write_encoder_header(encoder_header(specs.encoder, packer.type()), layout, encoder);
  for (size_t i = 0; i < names.size(); ++i) {
    char* const to = encoder + layout.sections[i].offset;
    if (!names[i].empty()) {
      packer.pack(names[i], to);
    } else if (derived.bytes[i - kRelativeBias]) {
      derived.fill[i - kRelativeBias](reinterpret_cast<float*>(to));
    }
  }
  for (size_t i = 0; i < kHeadSections; ++i) {
    if (h.head[i].bytes) packer.pack(kHeadNames[i], data + h.head[i].offset);
  }
  if (shared) h.checksum = image_checksum(h, data);
  std::memcpy(data, &h, sizeof h);
  if (shared) {
    writable = Mapping();  // no writable mapping may be left
    seal(image.file_);
    image.mapping_ = Mapping::of_file(image.file_.fd(), bytes, false, "memory");
  } else {
    image.mapping_ = std::move(writable);
  }
  image.read(name, dispatch);
  return image;
}

Image Image::map(int fd, const std::string& name, const Dispatch& dispatch) {
  Image image;
  image.file_ = File(fcntl(fd, F_DUPFD_CLOEXEC, 0));
  if (image.file_.fd() < 0) fail_by_errno("cannot use descriptor " + std::to_string(fd));
  const size_t bytes = image.file_.size(name);
  const int seals = fcntl(fd, F_GET_SEALS);  // fails for files on disk
  expect(
      seals < 0 || (seals & (F_SEAL_SHRINK | F_SEAL_WRITE)) == (F_SEAL_SHRINK | F_SEAL_WRITE) || seals == F_SEAL_SEAL,
      name, " is not sealed: its maker could change it while it is read");
  expect(bytes >= sizeof(ImageHeader), name, " is no image of torch_ext.runtime: it has ", bytes, " bytes");
  image.mapping_ = Mapping::of_file(fd, bytes, false, name);
  const char* const data = image.mapping_.data();
  ImageHeader h;
  std::memcpy(&h, data, sizeof h);
  expect(std::memcmp(h.magic, kImageMagic, sizeof h.magic) == 0, name, " is no image of torch_ext.runtime");
  expect(h.version == kImageVersion && h.header_bytes == sizeof h, name, " is an image of version ", h.version,
         ", this torch_ext reads ", kImageVersion, ": make it again");
  const std::string architecture = name_in(h.architecture, sizeof h.architecture), isa = name_in(h.isa, sizeof h.isa);
  expect(architecture == architecture_name() && isa == dispatch.isa->name, name, " was packed for ", isa, " on ",
         architecture, ", this process runs ", dispatch.isa->name, " on ", architecture_name(),
         ": make it again on this kind of CPU");
  const uint64_t features = (dispatch.isa->required_features | dispatch.isa->optional_features) & cpu_features();
  expect(h.cpu_features == features, name, " was packed for another CPU of kind ", isa, ": make it again on this one");
  expect(h.bytes == bytes, name, " is damaged: it says ", h.bytes, " bytes, there are ", bytes);
  expect(image_checksum(h, data) == h.checksum, name,
         " is damaged: it has another checksum than it says; make it again");
  image.read(name, dispatch);
  return image;
}

Image Image::map(const std::string& path, const Dispatch& dispatch) {
  return map(File::open_to_read(path).fd(), path, dispatch);
}

void Image::read(const std::string& name, const Dispatch& dispatch) {
  const char* const data = mapping_.data();
  ImageHeader h;
  std::memcpy(&h, data, sizeof h);
  const auto get = [&](const Section& s) {
    expect(s.offset <= h.bytes && s.bytes <= h.bytes - s.offset && s.offset % kPackedAlignment == 0, name,
           " is damaged: a section lies outside of it");
    return std::string_view(data + s.offset, static_cast<size_t>(s.bytes));
  };
  specs_ =
      parse_specs(name, std::string(get(h.encoder_json)), std::string(get(h.head_json)), std::string(get(h.dtype)));
  const std::string_view encoder = get(h.encoder);
  try {
    encoder_ = read_encoder(name.c_str(), encoder.data(), encoder.size(), dispatch, LinearEngine::kOwn);
    expect(fits(encoder_, specs_.encoder, specs_.dtype), name, " is damaged: its weights do not fit its specification");
    if (!specs_.head) return;
    HeadModel head;
    const HeadSpec& spec = *specs_.head;
    const auto floats = [&](HeadSection section, int64_t count) -> const float* {
      const std::string_view bytes = get(h.head[section]);
      if (bytes.empty()) return nullptr;
      expect(bytes.size() == static_cast<size_t>(count) * sizeof(float), name, " is damaged: section ",
             static_cast<int>(section), " of the head has ", bytes.size(), " bytes");
      return reinterpret_cast<const float*>(bytes.data());
    };
    const auto matrix = [&](HeadSection section, int64_t n, int64_t k) {
      const std::string_view bytes = get(h.head[section]);
      const PackedHeader packed = read_packed_header(name.c_str(), bytes.data(), bytes.size());
      const GemmKernel* const kernel = own_kernel(dispatch, LinearEngine::kOwn, packed.layout);
      expect(kernel, name, " is damaged: a matrix of the head is packed as ", layout_name(packed.layout));
      check_layout(name.c_str(), packed, kernel->layout, kernel->nr, kernel->kr, dispatch.isa->name);
      expect(static_cast<int64_t>(packed.n) == n && static_cast<int64_t>(packed.k) == k, name,
             " is damaged: a matrix of the head has other sizes than its specification");
      return Matrix{packed, bytes.data(), floats(static_cast<HeadSection>(section + 1), n)};
    };
    if (spec.dense) head.dense = matrix(kDenseWeight, spec.width(), spec.hidden_size);
    head.activation = activation_of(spec.activation);
    if (spec.norm) {
      head.norm = {.weight = floats(kNormWeight, spec.width()), .bias = floats(kNormBias, spec.width())};
      expect(head.norm.weight && head.norm.bias, name, " is damaged: the norm of the head is missing");
    }
    head.layer_norm_eps = static_cast<float>(spec.layer_norm_eps);
    head.out = matrix(kOutWeight_, spec.num_outputs, spec.width());
    head.out_activation = activation_of(spec.out_activation);
    head_ = head;
  } catch (const Error&) {
    throw;
  } catch (const std::runtime_error& error) {
    fail(ErrorCode::kValue, error.what());
  }
}

int Image::share() const {
  if (file_.fd() >= 0 && fcntl(file_.fd(), F_GET_SEALS) > F_SEAL_SEAL) {
    const int copy = fcntl(file_.fd(), F_DUPFD_CLOEXEC, 0);
    if (copy < 0) fail_by_errno("cannot copy a descriptor");
    return copy;
  }
  File file = new_memory_file(bytes());
  write_image(file.fd(), mapping_.data(), "memory");
  seal(file);
  return file.release();
}

void Image::save(const std::string& path) const {
  std::string temporary = path + ".XXXXXX";
  const File file(mkostemp(temporary.data(), O_CLOEXEC));
  if (file.fd() < 0) fail_by_errno("cannot write beside " + path);
  try {
    write_image(file.fd(), mapping_.data(), temporary);
    if (fchmod(file.fd(), 0444) != 0 || rename(temporary.c_str(), path.c_str()) != 0)
      fail_by_errno("cannot write " + path);
  } catch (...) {
    unlink(temporary.c_str());
    throw;
  }
}

}  // namespace torch_ext::runtime
