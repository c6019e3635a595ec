#include "runtime/spec.h"

#include <algorithm>
#include <optional>
#include <span>
#include <variant>

#include "runtime/error.h"
#include "runtime/json.h"

namespace torch_ext::runtime {
namespace {

template <typename Spec>
struct Field {
  const char* name;
  std::variant<std::string Spec::*, int64_t Spec::*, double Spec::*, bool Spec::*> member;
  bool required = false;
};

constexpr Field<EncoderSpec> kEncoderFields[] = {
    {"architecture", &EncoderSpec::architecture, true},
    {"hidden_size", &EncoderSpec::hidden_size, true},
    {"num_layers", &EncoderSpec::num_layers, true},
    {"num_heads", &EncoderSpec::num_heads, true},
    {"intermediate_size", &EncoderSpec::intermediate_size, true},
    {"activation", &EncoderSpec::activation, true},
    {"max_positions", &EncoderSpec::max_positions, true},
    {"position_offset", &EncoderSpec::position_offset, true},
    {"layer_norm_eps", &EncoderSpec::layer_norm_eps, true},
    {"vocab_size", &EncoderSpec::vocab_size, true},
    {"type_vocab_size", &EncoderSpec::type_vocab_size, true},
    {"embedding_size", &EncoderSpec::embedding_size},
    {"absolute_positions", &EncoderSpec::absolute_positions},
    {"relative_attention_buckets", &EncoderSpec::relative_attention_buckets},
    {"relative_attention_max_distance", &EncoderSpec::relative_attention_max_distance},
    {"rotary_theta", &EncoderSpec::rotary_theta},
    {"rotary_theta_local", &EncoderSpec::rotary_theta_local},
    {"window", &EncoderSpec::window},
    {"global_every", &EncoderSpec::global_every},
    {"norm_first", &EncoderSpec::norm_first},
    {"norm_first_attention", &EncoderSpec::norm_first_attention},
    {"gated_ffn", &EncoderSpec::gated_ffn},
    {"padding_id", &EncoderSpec::padding_id},
    {"position_span", &EncoderSpec::position_span},
    {"position_reach", &EncoderSpec::position_reach},
    {"content_to_position", &EncoderSpec::content_to_position},
    {"position_to_content", &EncoderSpec::position_to_content},
    {"num_kv_heads", &EncoderSpec::num_kv_heads},
    {"head_size", &EncoderSpec::head_size},
    {"global_first", &EncoderSpec::global_first},
    {"attention_scale", &EncoderSpec::attention_scale},
    {"embedding_scale", &EncoderSpec::embedding_scale},
    {"rotary_factor", &EncoderSpec::rotary_factor},
    {"causal", &EncoderSpec::causal},
    {"rms_norm", &EncoderSpec::rms_norm},
    {"embedding_norm", &EncoderSpec::embedding_norm},
    {"head_norms", &EncoderSpec::head_norms},
    {"post_norms", &EncoderSpec::post_norms},
    {"dropped_id", &EncoderSpec::dropped_id},
};

constexpr Field<HeadSpec> kHeadFields[] = {
    {"task", &HeadSpec::task, true},
    {"hidden_size", &HeadSpec::hidden_size, true},
    {"activation", &HeadSpec::activation, true},
    {"norm", &HeadSpec::norm, true},
    {"layer_norm_eps", &HeadSpec::layer_norm_eps, true},
    {"num_outputs", &HeadSpec::num_outputs, true},
    {"dense", &HeadSpec::dense},
    {"dense_size", &HeadSpec::dense_size},
    {"pooling", &HeadSpec::pooling},
    {"out_activation", &HeadSpec::out_activation},
};

void set(std::string& to, const Json& value, const char* name) {
  expect(value.is(Json::Kind::kString), "expected ", name, " of type str");
  to = value.string;
}
void set(int64_t& to, const Json& value, const char* name) {
  expect(value.is(Json::Kind::kInteger), "expected ", name, " of type int");
  to = value.integer;
}
void set(double& to, const Json& value, const char* name) {
  expect(value.is(Json::Kind::kInteger) || value.is(Json::Kind::kNumber), "expected ", name, " of type float");
  to = value.number;
}
void set(bool& to, const Json& value, const char* name) {
  expect(value.is(Json::Kind::kBool), "expected ", name, " of type bool");
  to = value.boolean;
}

template <typename Spec>
Spec parse(const Json& tree, std::span<const Field<Spec>> known) {
  expect(tree.is(Json::Kind::kObject), "expected an object");
  Spec spec;
  for (const auto& [name, value] : tree.fields) {
    const auto field = std::find_if(known.begin(), known.end(), [&](const Field<Spec>& f) { return f.name == name; });
    expect(field != known.end(), "this torch_ext does not know its field '", name, "': update torch-ext");
    std::visit([&](auto member) { set(spec.*member, value, field->name); }, field->member);
  }
  for (const Field<Spec>& field : known) {
    expect(!field.required || tree.find(field.name), "field '", field.name, "' is missing");
  }
  return spec;
}

// Sizes are multiplied with each other in 64 bits: each is below 2^30.
void expect_size(int64_t value, int64_t least, const char* name) {
  expect(value >= least && value < int64_t{1} << 30, "expected ", name, " of at least ", least, ", got ", value);
}

// What is not finite, or too large for fp32, would make every result NaN.
void expect_number(double value, const char* name) {
  expect(value >= 0.0 && value <= 3e38, "expected ", name, " of at least 0, got ", value);
}

void add_linear(Shapes& shapes, const std::string& name, int64_t rows, int64_t columns) {
  shapes[name + ".weight"] = {static_cast<uint64_t>(rows), static_cast<uint64_t>(columns)};
  shapes[name + ".bias"] = {static_cast<uint64_t>(rows)};
}

void add_norm(Shapes& shapes, const std::string& name, int64_t size) {
  shapes[name + ".weight"] = shapes[name + ".bias"] = {static_cast<uint64_t>(size)};
}

bool ends_with(std::string_view s, std::string_view end) { return s.ends_with(end); }

constexpr const char* kHeadTasks[] = {"text-classification", "token-classification", "question-answering", "fill-mask",
                                      "feature-extraction"};

// Architectures whose positions are counted over tokens other than padding. In files from before padding_id was a field it
// is the row before the first token's.
constexpr const char* kCountedWithoutPadding[] = {"roberta", "xlm-roberta", "camembert", "mpnet"};

}  // namespace

Activation activation_of(const std::string& name) {
  for (size_t i = 0; i < kActivationCount; ++i) {
    if (name == kActivationNames[i]) return static_cast<Activation>(i);
  }
  fail(ErrorCode::kValue, "unknown activation '", name, "'");
}

EncoderSpec parse_encoder_spec(std::string_view json) {
  const Json tree = parse_json(json);
  EncoderSpec s = parse<EncoderSpec>(tree, kEncoderFields);
  if (!tree.find("padding_id")) {
    for (const char* const name : kCountedWithoutPadding) {
      if (s.architecture == name) s.padding_id = s.position_offset - 1;
    }
  }
  expect_size(s.hidden_size, 1, "hidden_size");
  expect_size(s.num_layers, 1, "num_layers");
  expect_size(s.num_heads, 1, "num_heads");
  expect_size(s.intermediate_size, 1, "intermediate_size");
  expect_size(s.max_positions, 1, "max_positions");
  expect_size(s.vocab_size, 1, "vocab_size");
  expect_size(s.global_every, 1, "global_every");
  expect_size(s.position_offset, 0, "position_offset");
  expect_size(s.type_vocab_size, 0, "type_vocab_size");
  expect_size(s.embedding_size, 0, "embedding_size");
  expect_size(s.window, 0, "window");
  expect_number(s.rotary_theta, "rotary_theta");
  expect_number(s.rotary_theta_local, "rotary_theta_local");
  expect_number(s.layer_norm_eps, "layer_norm_eps");
  // Names of weights, and tables of positions, are made before the first weight is looked for.
  expect(s.num_layers <= 1 << 12, "expected num_layers of at most 4096, got ", s.num_layers);
  expect(s.rotary_theta == 0.0 || s.max_positions <= 1 << 22, "expected max_positions of at most 4194304, got ",
         s.max_positions);
  expect(s.padding_id == -1 || (s.padding_id >= 0 && s.padding_id < int64_t{1} << 30 && s.position_offset > 0),
         "expected padding_id -1, or an id and position_offset of at least 1, got ", s.padding_id, " and ",
         s.position_offset);
  expect_size(s.num_kv_heads, 0, "num_kv_heads");
  expect_size(s.head_size, 0, "head_size");
  expect_size(s.global_first, 0, "global_first");
  expect_number(s.attention_scale, "attention_scale");
  expect(s.embedding_scale > 0.0 && s.embedding_scale < 1e30 && s.rotary_factor > 0.0 && s.rotary_factor < 1e30,
         "expected embedding_scale and rotary_factor above 0, got ", s.embedding_scale, " and ", s.rotary_factor);
  expect(s.head_size > 0 || s.hidden_size % s.num_heads == 0, "num_heads=", s.num_heads,
         " does not divide hidden_size=", s.hidden_size);
  expect(s.num_heads % s.kv_heads() == 0, "num_kv_heads=", s.num_kv_heads, " does not divide num_heads=", s.num_heads);
  expect(s.rotary_theta == 0.0 || s.size_of_heads() % 2 == 0, "rotary positions need heads of an even size, got ",
         s.size_of_heads());
  expect(s.global_first < s.global_every, "expected global_first below global_every=", s.global_every, ", got ",
         s.global_first);
  expect(s.embedding_norm ? !s.rms_norm && !s.head_norms && !s.post_norms && s.embedding_scale == 1.0
                          : s.norm_first && s.norm_first_attention && s.embedding_size == 0,
         "rms_norm, head_norms, post_norms and embedding_scale need embedding_norm=False, and that needs norm_first, "
         "norm_first_attention and no embedding_size");
  expect(s.dropped_id >= -1 && s.dropped_id < int64_t{1} << 30 && (s.dropped_id < 0 || !s.embedding_norm),
         "expected dropped_id -1, or an id and embedding_norm=False, got ", s.dropped_id);
  expect(s.rms_norm || !s.post_norms, "post_norms=True needs rms_norm=True");
  expect(s.position_span == 0 || (s.kv_heads() == s.num_heads && s.size_of_heads() * s.num_heads == s.hidden_size),
         "expected as many heads of keys as of queries, which are as wide as the encoder, with a position_span");
  const int64_t buckets = s.relative_attention_buckets, distance = s.relative_attention_max_distance;
  expect(buckets == 0 ||
             (buckets >= 4 && buckets % 4 == 0 && buckets < 1 << 20 && distance > buckets / 4 && distance < 1 << 20),
         "expected relative_attention_buckets divisible by 4, and relative_attention_max_distance above a quarter of ",
         "them, got ", buckets, " and ", distance);
  expect(s.norm_first_attention || s.norm_first, "norm_first_attention=False means nothing without norm_first");
  expect_size(s.position_span, 0, "position_span");
  expect_size(s.position_reach, 0, "position_reach");
  expect((s.position_span > 0) == (s.content_to_position || s.position_to_content),
         "expected position_span of at least 1 with content_to_position or position_to_content, and 0 without, got ",
         s.position_span);
  expect(s.position_reach == 0 || (s.position_span >= 2 && s.position_reach > s.position_span / 2 + 1),
         "expected position_reach 0, or above position_span / 2 + 1 for a position_span of at least 2, got ",
         s.position_reach, " for ", s.position_span);
  activation_of(s.activation);
  return s;
}

HeadSpec parse_head_spec(std::string_view json) {
  HeadSpec s = parse<HeadSpec>(parse_json(json), kHeadFields);
  expect(std::any_of(std::begin(kHeadTasks), std::end(kHeadTasks), [&](const char* name) { return s.task == name; }),
         "unknown task '", s.task, "'");
  expect(s.pooling == "cls" || s.pooling == "mean" || s.pooling == "lasttoken", "unknown pooling '", s.pooling, "'");
  expect_size(s.hidden_size, 1, "hidden_size");
  expect_size(s.num_outputs, 1, "num_outputs");
  expect_size(s.dense_size, 0, "dense_size");
  expect_number(s.layer_norm_eps, "layer_norm_eps");
  expect(s.dense || (s.activation == "none" && !s.norm && !s.dense_size),
         "activation, norm and dense_size mean nothing without a dense layer");
  activation_of(s.activation);
  activation_of(s.out_activation);
  return s;
}

Shapes weight_shapes(const EncoderSpec& s) {
  const int64_t hidden = s.hidden_size, wide = s.intermediate_size, embedded = s.embedded();
  const int64_t context = s.num_heads * s.size_of_heads(), qkv = context + 2 * s.kv_heads() * s.size_of_heads();
  const auto add_norm = [&s](Shapes& to, const std::string& name, int64_t size) {
    to[name + ".weight"] = {static_cast<uint64_t>(size)};
    if (!s.rms_norm) to[name + ".bias"] = {static_cast<uint64_t>(size)};
  };
  const auto table = [&](int64_t rows) {
    return std::vector<uint64_t>{static_cast<uint64_t>(rows), static_cast<uint64_t>(embedded)};
  };
  Shapes shapes;
  shapes["embeddings.word"] = table(s.vocab_size);
  if (s.absolute_positions) shapes["embeddings.position"] = table(s.max_positions + s.position_offset);
  if (s.type_vocab_size) shapes["embeddings.token_type"] = table(s.type_vocab_size);
  if (s.embedding_norm) add_norm(shapes, "embeddings.norm", embedded);
  if (s.embedding_size) add_linear(shapes, "embeddings.projection", hidden, embedded);
  if (s.relative_attention_buckets) {
    shapes["relative_attention_bias"] = {static_cast<uint64_t>(s.relative_attention_buckets),
                                         static_cast<uint64_t>(s.num_heads)};
  }
  const std::vector<uint64_t> positions = {2 * static_cast<uint64_t>(s.position_span), static_cast<uint64_t>(hidden)};
  for (int64_t i = 0; i < s.num_layers; ++i) {
    const std::string prefix = "layers." + std::to_string(i);
    add_linear(shapes, prefix + ".attention.qkv", qkv, hidden);
    add_linear(shapes, prefix + ".attention.out", hidden, context);
    if (s.head_norms) {
      for (const char* const part : {"query", "key"}) {
        shapes[prefix + ".attention." + part + "_norm.weight"] = {static_cast<uint64_t>(s.size_of_heads())};
      }
    }
    if (s.post_norms) {
      add_norm(shapes, prefix + ".attention.post_norm", hidden);
      add_norm(shapes, prefix + ".ffn.post_norm", hidden);
    }
    if (i || s.norm_first_attention) add_norm(shapes, prefix + ".attention.norm", hidden);
    if (s.content_to_position) shapes[prefix + ".attention.position_keys"] = positions;
    if (s.position_to_content) shapes[prefix + ".attention.position_queries"] = positions;
    add_linear(shapes, prefix + ".ffn.up", s.gated_ffn ? 2 * wide : wide, hidden);
    add_linear(shapes, prefix + ".ffn.down", hidden, wide);
    add_norm(shapes, prefix + ".ffn.norm", hidden);
  }
  if (s.norm_first) add_norm(shapes, "final_norm", hidden);
  return shapes;
}

Shapes optional_shapes(const EncoderSpec& s) {
  Shapes shapes;
  for (int64_t i = 0; i < s.num_layers; ++i) {
    if (!s.gated_ffn) shapes[joined("layers.", i, ".ffn.shift")] = {static_cast<uint64_t>(s.intermediate_size)};
    if (s.norm_first) continue;
    for (const char* const part : {"attention", "ffn"}) {
      shapes[joined("layers.", i, ".", part, ".residual_scale")] = {static_cast<uint64_t>(s.hidden_size)};
    }
  }
  return shapes;
}

Shapes weight_shapes(const HeadSpec& s) {
  Shapes shapes;
  if (s.dense) add_linear(shapes, "head.dense", s.width(), s.hidden_size);
  if (s.norm) add_norm(shapes, "head.norm", s.width());
  add_linear(shapes, "head.out", s.num_outputs, s.width());
  return shapes;
}

bool is_matrix(std::string_view name) { return ends_with(name, ".weight") && !ends_with(name, "norm.weight"); }

bool is_table(std::string_view name) {
  return name == "embeddings.word" || name == "embeddings.position" || name == "embeddings.token_type" ||
         ends_with(name, ".attention.position_keys") || ends_with(name, ".attention.position_queries");
}

}  // namespace torch_ext::runtime
