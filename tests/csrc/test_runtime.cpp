// The runtime without torch: JSON, safetensors, specifications, images, engines, the C interface.
#include <dirent.h>
#include <fcntl.h>
#include <locale.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../../torch_ext/include/torch_ext_runtime.h"
#include "packing/encoder_sections.h"
#include "packing/packed_weight.h"
#include "runner.h"
#include "runtime/engine.h"
#include "runtime/error.h"
#include "runtime/json.h"
#include "runtime/safetensors.h"

namespace torch_ext::test {
namespace {

using namespace torch_ext::runtime;  // NOLINT

/// The message of the error that `fn` throws; empty if it throws none.
template <typename F>
std::string error_of(const F& fn) {
  try {
    fn();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

bool says(const std::string& message, const std::string& part) { return message.find(part) != std::string::npos; }

template <typename F>
void expect_error(const F& fn, const std::string& part) {
  const std::string message = error_of(fn);
  EXPECT(!message.empty(), "no error, expected one with \"%s\"", part.c_str());
  EXPECT(says(message, part), "expected \"%s\" in: %s", part.c_str(), message.c_str());
}

/// A folder that is gone at the end.
class Folder {
 public:
  Folder() {
    char path[] = "/tmp/torch_ext_runtime.XXXXXX";
    if (!mkdtemp(path)) throw std::runtime_error("no temporary folder");
    path_ = path;
  }
  ~Folder() {
    for (const std::string& name : entries()) unlink((path_ + "/" + name).c_str());
    rmdir(path_.c_str());
  }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  std::vector<std::string> entries() const {
    std::vector<std::string> names;
    DIR* const dir = opendir(path_.c_str());
    while (const dirent* const entry = dir ? readdir(dir) : nullptr) {
      if (entry->d_name[0] != '.') names.push_back(entry->d_name);
    }
    if (dir) closedir(dir);
    return names;
  }

 private:
  std::string path_;
};

void write_file(const std::string& path, const std::string& bytes) {
  std::FILE* const file = std::fopen(path.c_str(), "w");
  if (!file || std::fwrite(bytes.data(), 1, bytes.size(), file) != bytes.size() || std::fclose(file) != 0) {
    throw std::runtime_error("cannot write " + path);
  }
}

std::string read_bytes(int fd) {
  std::string bytes(static_cast<size_t>(lseek(fd, 0, SEEK_END)), '\0');
  if (pread(fd, bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) throw std::runtime_error("read");
  return bytes;
}

std::string read_file(const std::string& path) {
  const File file = File::open_to_read(path);
  return read_bytes(file.fd());
}

size_t count_entries(const char* folder) {
  size_t count = 0;
  DIR* const dir = opendir(folder);
  while (dir && readdir(dir)) ++count;
  if (dir) closedir(dir);
  return count;
}

// ---- JSON -----------------------------------------------------------------------------------------------------------

TORCH_EXT_TEST(runtime_json_reads_what_rfc_8259_allows) {
  const Json all = parse_json(
      " \t\r\n{\"a\":[1,-0,2.5e3,1E-2,true,false,null,\"x\"],\"b\":{},\"c\":[],\"\":\"\\\"\\\\\\/\\b\\f\\n\\r\\t\","
      "\"d\":\"\\u00e9\\u20AC\\uD83D\\uDE00 \xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\"} ");
  const Json& a = *all.find("a");
  EXPECT(a.items.size() == 8 && a.items[0].integer == 1 && a.items[1].is(Json::Kind::kInteger), "a");
  EXPECT(a.items[2].number == 2500.0 && a.items[2].is(Json::Kind::kNumber) && a.items[3].number == 0.01, "numbers");
  EXPECT(a.items[4].boolean && !a.items[5].boolean && a.items[6].is(Json::Kind::kNull), "words");
  EXPECT(all.find("b")->fields.empty() && all.find("c")->items.empty() && !all.find("e"), "empty ones");
  EXPECT(all.find("")->string == "\"\\/\b\f\n\r\t", "escapes");
  const std::string text = "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80";
  EXPECT(all.find("d")->string == text + " " + text, "characters");
  EXPECT(parse_json("9223372036854775807").integer == INT64_MAX, "the largest integer");
  EXPECT(parse_json("-9223372036854775808").integer == INT64_MIN, "the smallest");
  EXPECT(parse_json("9223372036854775808").is(Json::Kind::kNumber), "one more is a number");
  EXPECT(parse_json("\"\\u0000\"").string == std::string(1, '\0'), "a zero");
  EXPECT(parse_json(std::string(32, '[') + std::string(32, ']')).is(Json::Kind::kArray), "as deep as it may be");
  for (const char* const simple : {"0", "null", "\"\"", "[[]]", "1.5", "-1e+9", "{\"a\":{\"a\":1}}"}) {
    EXPECT(error_of([&] { parse_json(simple); }).empty(), "%s is refused", simple);
  }
}

TORCH_EXT_TEST(runtime_json_refuses_the_rest) {
  const std::vector<std::string> wrong = {
      "",
      " ",
      "[",
      "]",
      "[1",
      "[1,",
      "[1,]",
      "[,1]",
      "[1 2]",
      "{",
      "{\"a\"}",
      "{\"a\":}",
      "{\"a\":1,}",
      "{a:1}",
      "{1:1}",
      "{\"a\" 1}",
      "{\"a\":1 \"b\":2}",
      "1 2",
      "01",
      "-",
      "-01",
      "+1",
      ".5",
      "1.",
      "1.e5",
      "1e",
      "1e+",
      "0x1",
      "1_0",
      "NaN",
      "Infinity",
      "-Infinity",
      "nul",
      "True",
      "'a'",
      "\"",
      "\"a",
      "\"\\\"",
      "\"\\",
      "\"\\x\"",
      "\"\\u12\"",
      "\"\\u12g4\"",
      "\"\\u\"",
      "\"a\nb\"",
      "\"\t\"",
      std::string("\"a\0b\"", 5),
      std::string("1\0", 2),
      "\xef\xbb\xbf{}",
      "[1]x",
      "/*a*/1",
      "{\"a\":1,\"a\":2}",
      "{\"a\":1,\"\\u0061\":2}",
      // Halves of surrogate pairs.
      "\"\\ud800\"",
      "\"\\udc00\"",
      "\"\\ud800x\"",
      "\"\\ud800\\n\"",
      "\"\\ud800\\ud800\"",
      "\"\\ude00\\ud83d\"",
      // Not UTF-8: half a character, a stray byte, too long a spelling, a surrogate, beyond Unicode.
      "\"\xc3\"",
      "\"\xc3\x28\"",
      "\"\x80\"",
      "\"\xff\"",
      "\"\xc0\xaf\"",
      "\"\xe0\x80\xaf\"",
      "\"\xf0\x80\x80\xaf\"",
      "\"\xed\xa0\x80\"",
      "\"\xf4\x90\x80\x80\"",
      "\"\xf5\x80\x80\x80\"",
      "\"\xe2\x82",
      std::string(34, '[') + std::string(34, ']'),
      std::string(100000, '['),
  };
  for (const std::string& text : wrong) {
    const std::string message = error_of([&] { parse_json(text); });
    EXPECT(says(message, "JSON: expected") && says(message, " at byte "), "%s: %s", text.substr(0, 40).c_str(),
           message.c_str());
  }
}

TORCH_EXT_TEST(runtime_json_survives_changed_bytes) {
  const std::string text =
      "{\"__metadata__\":{\"a\":\"\\ud83d\\ude00\\n\xc3\xa9\"},\"w\":{\"dtype\":\"F32\",\"shape\":[2,3],"
      "\"data_offsets\":[0,24]},\"x\":[-1.5e-3,true,null,{}]}";
  size_t read = 0;
  for (size_t i = 0; i < 100 * options().random; ++i) {
    std::string changed = text;
    for (size_t j = random_source().between(1, 4); j > 0; --j) {
      const size_t at = random_source().below(changed.size());
      switch (random_source().below(3)) {
        case 0:
          changed[at] = static_cast<char>(random_source().below(256));
          break;
        case 1:
          changed.erase(at, random_source().between(1, 5));
          break;
        default:
          changed.insert(at, changed, random_source().below(changed.size()), random_source().below(6));
      }
      if (changed.empty()) break;
    }
    context("%s", changed.c_str());
    read += error_of([&] { parse_json(changed); }).empty();
  }
  note("%zu of %zu were JSON", read, 100 * options().random);
}

TORCH_EXT_TEST(runtime_json_numbers_do_not_depend_on_the_locale) {
  const std::string before = setlocale(LC_NUMERIC, nullptr);
  for (const char* const name : {"de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "ru_RU.UTF-8", "C.UTF-8"}) {
    if (!setlocale(LC_NUMERIC, name)) continue;
    context("locale %s", name);
    EXPECT(parse_json("0.5").number == 0.5 && parse_json("1.25e-3").number == 0.00125, "another number");
  }
  setlocale(LC_NUMERIC, before.c_str());
}

TORCH_EXT_TEST(runtime_json_quotes) {
  const std::string text = "a\"\\\n\x01\x1f/\xc3\xa9";
  EXPECT(parse_json(quoted(text)).string == text, "%s", quoted(text).c_str());
}

// ---- safetensors ----------------------------------------------------------------------------------------------------

std::string safetensors(const std::string& header, const std::string& data) {
  const uint64_t bytes = header.size();
  return std::string(reinterpret_cast<const char*>(&bytes), sizeof bytes) + header + data;
}

TORCH_EXT_TEST(runtime_safetensors_reads_tensors) {
  const Folder folder;
  const std::string path = folder / "a";
  const float values[] = {1, 2, 3};
  write_file(path,
             safetensors(R"({"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[3],"data_offsets":[2,14]},)"
                         R"("ids":{"dtype":"I64","shape":[1],"data_offsets":[14,22]},)"
                         R"("b":{"dtype":"BF16","shape":[1,1],"data_offsets":[0,2]},)"
                         R"("none":{"dtype":"F16","shape":[0,7],"data_offsets":[22,22]}}   )",
                         "\x80\x3f" + std::string(reinterpret_cast<const char*>(values), 12) + std::string(8, '\x07')));
  const SafetensorsFile file = SafetensorsFile::open(path);
  EXPECT(file.metadata().at("k") == "v" && file.metadata().size() == 1, "metadata");
  EXPECT(file.tensors().size() == 3 && !file.tensors().count("ids"), "%zu tensors", file.tensors().size());
  EXPECT(describe(file.tensors().at("a")) == "fp32 [3]", "a is %s", describe(file.tensors().at("a")).c_str());
  EXPECT(std::memcmp(file.tensors().at("a").data, values, sizeof values) == 0, "a holds other values");
  EXPECT(describe(file.tensors().at("b")) == "bf16 [1, 1]", "b is %s", describe(file.tensors().at("b")).c_str());
  EXPECT(file.tensors().at("none").elements() == 0, "a tensor without elements");
}

TORCH_EXT_TEST(runtime_safetensors_refuses_what_is_damaged) {
  const Folder folder;
  const std::string path = folder / "a";
  const auto expect_damaged = [&](const std::string& bytes, const std::string& part) {
    write_file(path, bytes);
    context("%s", part.c_str());
    expect_error([&] { SafetensorsFile::open(path); }, path + " is damaged, or is not a safetensors file: ");
    expect_error([&] { SafetensorsFile::open(path); }, part);
  };
  const auto with = [](const std::string& entry, size_t bytes) {
    return safetensors("{\"a\":" + entry + "}", std::string(bytes, '\1'));
  };
  const std::string good = with(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})", 8);
  write_file(path, good);
  EXPECT(error_of([&] { SafetensorsFile::open(path); }).empty(), "a sound file is refused");
  for (size_t bytes = 0; bytes < good.size(); ++bytes) expect_damaged(good.substr(0, bytes), "");
  expect_damaged(good + "x", "end at byte 8 of 9");
  for (const uint64_t length : {uint64_t{0}, uint64_t{1}, good.size() - 8 + uint64_t{1}, uint64_t{100'000'001},
                                uint64_t{1} << 62, UINT64_MAX, UINT64_MAX - 7}) {
    std::string changed = good;
    std::memcpy(changed.data(), &length, sizeof length);
    expect_damaged(changed, "");
  }
  expect_damaged(safetensors("[]", ""), "no object");
  expect_damaged(safetensors("{\"a\":1}", ""), "no object for a");
  expect_damaged(safetensors(R"({"__metadata__":[]})", ""), "no object for __metadata__");
  expect_damaged(safetensors(R"({"__metadata__":{"k":1}})", ""), "metadata k is no string");
  for (const char* const entry :
       {"{}", R"({"dtype":"F32","shape":[2]})", R"({"dtype":1,"shape":[2],"data_offsets":[0,8]})",
        R"({"dtype":"F32","shape":2,"data_offsets":[0,8]})", R"({"dtype":"F32","shape":[2],"data_offsets":[0]})",
        R"({"dtype":"F32","shape":[2],"data_offsets":[0,8,8]})",
        R"({"dtype":"F32","shape":[2],"data_offsets":[0,8.0]})", R"({"dtype":"F32","shape":[2],"data_offsets":[-1,7]})",
        R"({"dtype":"F32","shape":[2],"data_offsets":["0","8"]})"}) {
    expect_damaged(with(entry, 8), "does not describe a");
  }
  expect_damaged(with(R"({"dtype":"F32","shape":[2],"data_offsets":[0,12]})", 8), "from byte 0 to 12 of 8");
  expect_damaged(with(R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})", 8), "from byte 8 to 0");
  expect_damaged(with(R"({"dtype":"F32","shape":[2],"data_offsets":[9223372036854775806,9223372036854775807]})", 8),
                 "");
  expect_damaged(with(R"({"dtype":"F32","shape":[3],"data_offsets":[0,8]})", 8), "");
  expect_damaged(with(R"({"dtype":"F32","shape":[1],"data_offsets":[0,8]})", 8), "takes 4 bytes, its place has 8");
  expect_damaged(with(R"({"dtype":"F32","shape":[-2],"data_offsets":[0,8]})", 8), "other things than sizes");
  expect_damaged(with(R"({"dtype":"F32","shape":[2.0],"data_offsets":[0,8]})", 8), "other things than sizes");
  expect_damaged(with(R"({"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]})", 8), "more elements");
  expect_damaged(with(R"({"dtype":"F32","shape":[2147483648,2147483648,4],"data_offsets":[0,8]})", 8), "more elements");
  // The format has neither gaps nor overlaps.
  const auto two = [](int a, int b, int c, int d, size_t bytes) {
    return safetensors(joined(R"({"a":{"dtype":"I8","shape":[)", b - a, R"(],"data_offsets":[)", a, ",", b,
                              R"(]},"b":{"dtype":"U8","shape":[)", d - c, R"(],"data_offsets":[)", c, ",", d, "]}}"),
                       std::string(bytes, '\1'));
  };
  write_file(path, two(4, 8, 0, 4, 8));
  EXPECT(error_of([&] { SafetensorsFile::open(path); }).empty(), "tensors in another order are refused");
  expect_damaged(two(0, 5, 4, 8, 8), "overlap at byte 4");
  expect_damaged(two(0, 4, 5, 8, 8), "gap or overlap at byte 4");
  expect_damaged(two(1, 4, 4, 8, 8), "gap or overlap at byte 0");
  expect_damaged(two(0, 8, 0, 8, 8), "overlap");
  expect_error([&] { SafetensorsFile::open(folder / "none"); }, "No such file");
  expect_error([&] { SafetensorsFile::open("/tmp"); }, "not a regular file");
  if (mkfifo((folder / "pipe").c_str(), 0600) == 0) {
    expect_error([&] { SafetensorsFile::open(folder / "pipe"); }, "not a regular file");
  }
}

// ---- specifications -------------------------------------------------------------------------------------------------

using Fields = std::map<std::string, std::string>;  // JSON of each

std::string to_json(const Fields& fields) {
  std::string s;
  for (const auto& [name, value] : fields) s += (s.empty() ? "{" : ", ") + quoted(name) + ": " + value;
  return s.empty() ? "{}" : s + "}";
}

const Fields kEncoder = {{"architecture", "\"bert\""}, {"hidden_size", "8"},       {"num_layers", "1"},
                         {"num_heads", "2"},           {"intermediate_size", "5"}, {"activation", "\"gelu\""},
                         {"max_positions", "9"},       {"position_offset", "0"},   {"layer_norm_eps", "1e-12"},
                         {"vocab_size", "6"},          {"type_vocab_size", "2"}};
const Fields kHead = {{"task", "\"fill-mask\""}, {"hidden_size", "8"},        {"activation", "\"gelu\""},
                      {"norm", "true"},          {"layer_norm_eps", "1e-12"}, {"num_outputs", "6"}};

template <typename Parse>
void expect_fields_checked(const Fields& good, const Fields& defaults, const Parse& parse) {
  EXPECT(error_of([&] { parse(to_json(good)); }).empty(), "a sound specification is refused");
  for (const auto& [name, value] : good) {
    Fields changed = good;
    changed.erase(name);
    context("%s is missing", name.c_str());
    expect_error([&] { parse(to_json(changed)); }, "field '" + name + "' is missing");
  }
  Fields all = good;
  all.insert(defaults.begin(), defaults.end());
  EXPECT(error_of([&] { parse(to_json(all)); }).empty(), "defaults are refused");
  for (const auto& [name, value] : all) {
    for (const char* const other : {"null", "[]", "{}", "\"x\"", "1", "1.5", "true"}) {
      const bool string = value[0] == '"', boolean = value == "true" || value == "false";
      const bool decimal = !string && !boolean && value.find_first_of(".e") != std::string::npos;
      const std::string given = other;
      const bool same = string ? given[0] == '"' : boolean ? given == "true" : decimal ? given[0] == '1' : given == "1";
      if (same) continue;
      Fields changed = all;
      changed[name] = other;
      context("%s is %s", name.c_str(), other);
      expect_error([&] { parse(to_json(changed)); }, "expected " + name + " of type ");
    }
  }
  Fields more = good;
  more["hidden_sizes"] = "8";
  expect_error([&] { parse(to_json(more)); }, "does not know its field 'hidden_sizes': update torch-ext");
  expect_error([&] { parse("[]"); }, "expected an object");
  expect_error([&] { parse(""); }, "JSON");
}

TORCH_EXT_TEST(runtime_specs_check_every_field) {
  const Fields encoder_defaults = {{"embedding_size", "0"},
                                   {"absolute_positions", "true"},
                                   {"relative_attention_buckets", "0"},
                                   {"relative_attention_max_distance", "128"},
                                   {"rotary_theta", "0.0"},
                                   {"rotary_theta_local", "0.0"},
                                   {"window", "0"},
                                   {"global_every", "1"},
                                   {"norm_first", "false"},
                                   {"norm_first_attention", "true"},
                                   {"gated_ffn", "false"},
                                   {"padding_id", "-1"}};
  expect_fields_checked(kEncoder, encoder_defaults, [](const std::string& json) { parse_encoder_spec(json); });
  expect_fields_checked(kHead, {{"dense", "true"}, {"dense_size", "0"}, {"pooling", "\"cls\""}},
                        [](const std::string& json) { parse_head_spec(json); });
}

TORCH_EXT_TEST(runtime_specs_check_ranges) {
  const auto expect_refused = [](const Fields& good, const Fields& change, const std::string& part, const auto& parse) {
    Fields changed = good;
    for (const auto& [name, value] : change) changed[name] = value;
    context("%s", to_json(change).c_str());
    expect_error([&] { parse(to_json(changed)); }, part);
  };
  const auto encoder = [&](const Fields& change, const std::string& part) {
    expect_refused(kEncoder, change, part, [](const std::string& json) { parse_encoder_spec(json); });
  };
  const auto head = [&](const Fields& change, const std::string& part) {
    expect_refused(kHead, change, part, [](const std::string& json) { parse_head_spec(json); });
  };
  for (const char* const name :
       {"hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions", "vocab_size", "global_every"}) {
    for (const char* const value : {"0", "-1", "1073741824", "9223372036854775807"}) {
      encoder({{name, value}}, std::string("expected ") + name + " of at least 1");
    }
  }
  for (const char* const name : {"position_offset", "type_vocab_size", "embedding_size", "window"}) {
    for (const char* const value : {"-1", "1073741824"}) encoder({{name, value}}, std::string("expected ") + name);
  }
  for (const char* const name : {"rotary_theta", "rotary_theta_local", "layer_norm_eps"}) {
    for (const char* const value : {"-1", "-1e-9", "1e999", "1e39"})
      encoder({{name, value}}, std::string("expected ") + name);
  }
  encoder({{"num_layers", "5000"}}, "num_layers of at most 4096");
  encoder({{"rotary_theta", "10.0"}, {"max_positions", "5000000"}}, "max_positions of at most");
  encoder({{"num_heads", "3"}}, "does not divide");
  encoder({{"num_heads", "8"}, {"rotary_theta", "10.0"}}, "even size");
  encoder({{"padding_id", "-2"}}, "padding_id");
  encoder({{"padding_id", "1"}}, "padding_id");
  encoder({{"padding_id", "1073741824"}, {"position_offset", "2"}}, "padding_id");
  for (const char* const buckets : {"-4", "1", "2", "6", "1048576"}) {
    encoder({{"relative_attention_buckets", buckets}}, "relative_attention_buckets");
  }
  encoder({{"relative_attention_buckets", "8"}, {"relative_attention_max_distance", "2"}}, "max_distance");
  encoder({{"relative_attention_buckets", "8"}, {"relative_attention_max_distance", "2000000"}}, "max_distance");
  encoder({{"norm_first_attention", "false"}}, "norm_first_attention");
  encoder({{"position_span", "4"}}, "position_span");
  encoder({{"content_to_position", "true"}}, "position_span");
  encoder({{"position_span", "-1"}, {"position_to_content", "true"}}, "position_span");
  encoder({{"position_span", "4"}, {"position_to_content", "true"}, {"position_reach", "3"}}, "position_reach");
  encoder({{"position_span", "1"}, {"position_to_content", "true"}, {"position_reach", "8"}}, "position_reach");
  encoder({{"activation", "\"mish\""}}, "unknown activation 'mish'");
  head({{"task", "\"summarize\""}}, "unknown task 'summarize'");
  head({{"pooling", "\"max\""}}, "unknown pooling 'max'");
  head({{"activation", "\"\""}}, "unknown activation");
  for (const char* const name : {"hidden_size", "num_outputs"}) head({{name, "0"}}, std::string("expected ") + name);
  head({{"dense_size", "-1"}}, "dense_size");
  head({{"layer_norm_eps", "-1.0"}}, "layer_norm_eps");
  head({{"dense", "false"}}, "mean nothing without a dense layer");
  // Files from before padding was told apart.
  Fields old = kEncoder;
  old["architecture"] = "\"roberta\"";
  old["position_offset"] = "2";
  EXPECT(parse_encoder_spec(to_json(old)).padding_id == 1, "RoBERTa counts without padding");
  old["padding_id"] = "-1";
  EXPECT(parse_encoder_spec(to_json(old)).padding_id == -1, "unless it says otherwise");
}

// ---- models ---------------------------------------------------------------------------------------------------------

struct StoredTensor {
  ElementType type;
  std::vector<uint64_t> shape;
  std::string bytes;
  TensorView view() const { return {type, shape, bytes.data()}; }
};

/// A small model of random weights.
struct Model {
  Fields encoder, head;  // head is empty where there is none
  std::string dtype;
  std::map<std::string, StoredTensor> tensors;

  Specs specs() const { return parse_specs("model", to_json(encoder), head.empty() ? "" : to_json(head), dtype); }
  Weights weights() const {
    Weights all;
    for (const auto& [name, tensor] : tensors) all[name] = {tensor.view()};
    return all;
  }
  std::shared_ptr<Engine> engine(const runtime::Options& options = {.threads = 1}) const {
    return Engine::from_weights("model", specs(), weights(), options);
  }
  std::string file(const Fields& more = {}) const {
    Fields metadata = {{"format", "\"torch-ext-encoder\""},
                       {"format_version", "\"1\""},
                       {"dtype", quoted(dtype)},
                       {"encoder", quoted(to_json(encoder))}};
    if (!head.empty()) metadata["head"] = quoted(to_json(head));
    for (const auto& [name, value] : more) {
      if (value.empty()) {
        metadata.erase(name);
      } else {
        metadata[name] = value;
      }
    }
    static constexpr const char* kStored[] = {"F32", "F16", "BF16", "I8"};
    Fields header = {{"__metadata__", to_json(metadata)}};
    std::string data;
    for (const auto& [name, tensor] : tensors) {
      header[name] =
          joined("{\"dtype\":\"", kStored[static_cast<size_t>(tensor.type)], "\",\"shape\":", describe(tensor.shape),
                 ",\"data_offsets\":[", data.size(), ",", data.size() + tensor.bytes.size(), "]}");
      data += tensor.bytes;
    }
    return safetensors(to_json(header), data);
  }
};

StoredTensor random_floats(ElementType type, const std::vector<uint64_t>& shape, float center, float spread) {
  StoredTensor t{type, shape, {}};
  const size_t count = t.view().elements();
  for (size_t i = 0; i < count; ++i) {
    const float x = center + spread * random_source().value();
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const auto upper = static_cast<uint16_t>(bits >> 16);
    if (type == ElementType::kF32) t.bytes.append(reinterpret_cast<const char*>(&bits), sizeof bits);
    if (type == ElementType::kBF16) t.bytes.append(reinterpret_cast<const char*>(&upper), sizeof upper);
  }
  return t;
}

void add_weights(Model& model) {
  const Specs specs = model.specs();
  Shapes shapes = weight_shapes(specs.encoder);
  if (random_source().coin()) shapes.merge(optional_shapes(specs.encoder));
  if (specs.head) shapes.merge(weight_shapes(*specs.head));
  for (const auto& [name, shape] : shapes) {
    const bool norm = name.ends_with("norm.weight") || name.ends_with("scale");
    const float spread = norm ? 0.2f : 1.0f / std::sqrt(static_cast<float>(shape.back()));
    const bool head = name.starts_with("head.");
    if (specs.dtype == "int8" && is_matrix(name) && !head && random_source().below(4)) {
      StoredTensor t{ElementType::kS8, shape, {}};
      const size_t count = t.view().elements();
      for (size_t i = 0; i < count; ++i) {
        t.bytes += static_cast<char>(static_cast<int8_t>(static_cast<int>(random_source().below(255)) - 127));
      }
      model.tensors[name] = t;
      model.tensors[name + "_scale"] = random_floats(ElementType::kF32, {shape[0]}, 0.003f, 0.002f);
      continue;
    }
    const bool narrow = specs.dtype != "fp32" && (is_matrix(name) || is_table(name));
    model.tensors[name] =
        random_floats(narrow ? ElementType::kBF16 : ElementType::kF32, shape, norm ? 1.0f : 0.0f, spread);
  }
}

Model tiny_model() {
  Model model{.encoder = kEncoder, .head = kHead, .dtype = "bf16", .tensors = {}};
  model.encoder["vocab_size"] = "3";
  model.encoder["max_positions"] = "4";
  model.encoder["intermediate_size"] = "4";
  model.head["num_outputs"] = "3";
  add_weights(model);
  return model;
}

std::string number(size_t low, size_t high) { return std::to_string(random_source().between(low, high)); }

/// All options of specifications, in every mixture that is allowed.
Model random_model() {
  Random& random = random_source();
  Model model{.encoder = kEncoder, .head = {}, .dtype = {}, .tensors = {}};
  Fields& e = model.encoder;
  static constexpr const char* kActivations[] = {"\"gelu\"",    "\"gelu_tanh\"",  "\"relu\"",
                                                 "\"silu\"",    "\"none\"",       "\"tanh\"",
                                                 "\"sigmoid\"", "\"leaky_relu\"", "\"quick_gelu\""};
  static constexpr const char* kTypes[] = {"bf16", "fp32", "int8"};
  model.dtype = kTypes[random.below(3)];
  const size_t heads = random.between(1, 3), head_size = 2 * random.between(1, 9), hidden = heads * head_size;
  e["num_heads"] = std::to_string(heads);
  e["hidden_size"] = std::to_string(hidden);
  e["num_layers"] = number(1, 3);
  e["intermediate_size"] = number(1, 40);
  e["activation"] = kActivations[random.below(std::size(kActivations))];
  e["vocab_size"] = number(1, 40);
  e["type_vocab_size"] = number(0, 3);
  e["max_positions"] = number(1, 60);
  e["layer_norm_eps"] = random.coin() ? "1e-12" : "0.00001";
  if (random.coin()) {
    e["position_offset"] = number(1, 3);
    if (random.coin()) e["padding_id"] = number(0, 3);
  }
  if (random.below(3) == 0) e["embedding_size"] = number(1, 30);
  if (random.below(3) == 0) e["absolute_positions"] = "false";
  if (random.below(3) == 0) {
    e["relative_attention_buckets"] = std::to_string(4 * random.between(1, 8));
    e["relative_attention_max_distance"] = number(20, 40);
  }
  if (random.below(3) == 0) {
    e["rotary_theta"] = "10000.0";
    if (random.coin()) e["rotary_theta_local"] = "160.0";
  }
  if (random.below(3) == 0) {
    e["window"] = number(1, 20);
    e["global_every"] = number(1, 3);
  }
  if (random.coin()) {
    e["norm_first"] = "true";
    if (random.coin()) e["norm_first_attention"] = "false";
  }
  if (random.coin()) e["gated_ffn"] = "true";
  if (random.below(3) == 0) e["causal"] = "true";
  if (random.below(4) == 0) e["attention_scale"] = "0.3";
  if (e.contains("window") && e["global_every"] == "3") e["global_first"] = number(0, 2);
  if (random.below(3) == 0 && !e.contains("embedding_size")) {
    e["norm_first"] = "true";
    e.erase("norm_first_attention");
    e["embedding_norm"] = "false";
    if (random.coin()) {
      e["rms_norm"] = "true";
      if (random.coin()) e["post_norms"] = "true";
    }
    if (random.coin()) e["head_norms"] = "true";
    if (random.coin()) e["embedding_scale"] = "7.5";
    if (random.below(3) == 0) e["dropped_id"] = number(0, 3);
    if (random.coin()) e["num_kv_heads"] = "1";
    if (random.coin()) e["head_size"] = std::to_string(2 * random.between(1, 12));
  } else if (random.below(3) == 0) {
    const size_t span = random.between(2, 20);
    e["position_span"] = std::to_string(span);
    if (random.coin()) e["position_reach"] = std::to_string(span / 2 + 1 + random.between(1, 60));
    const bool keys = random.coin();
    if (keys) e["content_to_position"] = "true";
    if (!keys || random.coin()) e["position_to_content"] = "true";
  }
  if (random.coin()) {
    Fields& h = model.head = kHead;
    static constexpr const char* kTasks[] = {"text-classification", "token-classification", "question-answering",
                                             "fill-mask", "feature-extraction"};
    h["task"] = quoted(kTasks[random.below(5)]);
    h["hidden_size"] = e["hidden_size"];
    h["num_outputs"] = number(1, 50);
    h["activation"] = kActivations[random.below(std::size(kActivations))];
    h["norm"] = random.coin() ? "true" : "false";
    if (random.below(3) == 0) h["dense_size"] = number(1, 20);
    if (random.below(3) == 0) {
      h["dense"] = "false";
      h["activation"] = "\"none\"";
      h["norm"] = "false";
      h.erase("dense_size");
    }
    if (random.coin()) h["pooling"] = "\"mean\"";
    if (random.below(3) == 0) h["out_activation"] = kActivations[random.below(std::size(kActivations))];
  }
  add_weights(model);
  return model;
}

struct Batch {
  std::vector<int64_t> ids, types;
  std::vector<int32_t> cu_seqlens{0};
  bool typed = false;
  size_t texts() const { return cu_seqlens.size() - 1; }
};

Batch random_batch(const EncoderSpec& spec, size_t most_texts) {
  Batch batch;
  const size_t texts = random_source().between(1, most_texts);
  for (size_t i = 0; i < texts; ++i) {
    const size_t length = random_source().between(1, static_cast<size_t>(spec.max_positions));
    for (size_t j = 0; j < length; ++j) {
      batch.ids.push_back(static_cast<int64_t>(random_source().below(static_cast<size_t>(spec.vocab_size))));
      batch.types.push_back(
          static_cast<int64_t>(random_source().below(static_cast<size_t>(std::max<int64_t>(1, spec.type_vocab_size)))));
    }
    batch.cu_seqlens.push_back(static_cast<int32_t>(batch.ids.size()));
  }
  batch.typed = random_source().coin();
  return batch;
}

std::unique_ptr<States> encode(const Engine& engine, const Batch& batch) {
  return engine.encode({.ids = batch.ids.data(),
                        .type_ids = batch.typed ? batch.types.data() : nullptr,
                        .cu_seqlens = batch.cu_seqlens.data(),
                        .sequences = batch.texts(),
                        .tokens = batch.ids.size()});
}

constexpr Pooling kModes[] = {Pooling::kMean,      Pooling::kCls,          Pooling::kMax,
                              Pooling::kLastToken, Pooling::kWeightedMean, Pooling::kMeanSqrtLength};

/// Everything that a batch's states can say, one after the other; [begin, end) are the texts' parts of it.
std::vector<float> answers(const Engine& engine, const Batch& batch) {
  const std::unique_ptr<States> states = encode(engine, batch);
  const Specs& specs = engine.image().specs();
  const auto width = static_cast<size_t>(specs.encoder.hidden_size);
  std::vector<float> all(states->tokens() * width);
  states->copy_hidden(all.data());
  for (size_t text = 0; text < 2; ++text) {
    for (const Pooling mode : kModes) {
      const size_t whole = states->embedding_size(), kept = text ? (whole + 1) / 2 : whole;
      std::vector<float> pooled(states->texts() * kept);
      states->pool({.modes = {mode}, .normalize = text == 1, .dimensions = text ? kept : 0}, pooled.data());
      all.insert(all.end(), pooled.begin(), pooled.end());
    }
  }
  if (!specs.head) return all;
  std::vector<float> logits;
  if (specs.head->task == "text-classification") {
    logits.resize(states->texts() * states->outputs());
    states->text_logits(logits.data());
  } else {
    logits.resize(states->tokens() * states->outputs());
    states->token_logits(nullptr, states->tokens(), logits.data());
    std::vector<int64_t> rows;
    for (size_t i = 0; i < states->tokens(); i += 3) rows.push_back(static_cast<int64_t>(states->tokens() - 1 - i));
    const size_t k = (states->outputs() + 1) / 2;
    std::vector<int64_t> indices(rows.size() * k);
    std::vector<float> scores(rows.size() * k);
    states->top_k(rows.data(), rows.size(), k, indices.data(), scores.data());
    logits.insert(logits.end(), scores.begin(), scores.end());
    for (const int64_t index : indices) logits.push_back(static_cast<float>(index));
    for (const bool sum : {false, true}) {
      const SparseVectors sparse = states->sparse({.sum = sum, .twice = !sum});
      logits.insert(logits.end(), sparse.values.begin(), sparse.values.end());
      for (const int64_t index : sparse.indices) logits.push_back(static_cast<float>(index));
      for (const int64_t bound : sparse.bounds) logits.push_back(static_cast<float>(bound));
    }
  }
  all.insert(all.end(), logits.begin(), logits.end());
  return all;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::vector<float> hidden_of(const Engine& engine, const Batch& batch) {
  const std::unique_ptr<States> states = encode(engine, batch);
  std::vector<float> hidden(states->tokens() * static_cast<size_t>(engine.image().specs().encoder.hidden_size));
  states->copy_hidden(hidden.data());
  return hidden;
}

// ---- files of models ------------------------------------------------------------------------------------------------

TORCH_EXT_TEST(runtime_opens_files) {
  const Folder folder;
  const std::string path = folder / "model";
  for (size_t i = 0; i < options().random; ++i) {
    const Model model = random_model();
    context("%s %s", to_json(model.encoder).c_str(), model.dtype.c_str());
    write_file(path, model.file());
    const std::shared_ptr<Engine> opened = Engine::open(path, {.threads = 1}), packed = model.engine();
    const Batch batch = random_batch(opened->image().specs().encoder, 5);
    EXPECT(same_bits(answers(*opened, batch), answers(*packed, batch)), "a file gives other results than its weights");
    if (model.dtype == "fp32") {
      const std::shared_ptr<Engine> rounded = Engine::open(path, {.dtype = "bf16", .threads = 1});
      Model narrow = model;
      narrow.dtype = "bf16";
      EXPECT(same_bits(hidden_of(*rounded, batch), hidden_of(*narrow.engine(), batch)), "fp32 as bf16");
    } else {
      expect_error([&] { Engine::open(path, {.dtype = "fp32"}); },
                   path + " holds " + model.dtype + " weights, fp32 was asked for: load the fp32 file instead");
    }
    expect_error([&] { Engine::open(path, {.dtype = "fp16"}); }, "unknown dtype 'fp16'; known: 'bf16', 'fp32', 'int8'");
  }
}

TORCH_EXT_TEST(runtime_refuses_damaged_files) {
  const Folder folder;
  const std::string path = folder / "model";
  const Model model = tiny_model();
  const auto refuse = [&](const std::string& bytes, const std::string& part) {
    write_file(path, bytes);
    expect_error([&] { Engine::open(path, {.threads = 1}); }, path);
    expect_error([&] { Engine::open(path, {.threads = 1}); }, part);
  };
  refuse(model.file({{"format", ""}}), "was not written by torch_ext.Encoder.save()");
  refuse(model.file({{"format", "\"pt\""}}), "was not written by torch_ext.Encoder.save()");
  refuse(model.file({{"format_version", "\"2\""}}), "has format version 2, this torch_ext reads 1");
  refuse(model.file({{"dtype", ""}}), "unknown dtype ''");
  refuse(model.file({{"encoder", ""}}), "has no valid specification of the encoder: JSON");
  refuse(model.file({{"encoder", "\"{}\""}}), "has no valid specification of the encoder: field");
  refuse(model.file({{"head", "\"[]\""}}), "has no valid specification of the head: expected an object");
  Fields wide = kHead;
  wide["hidden_size"] = "9";
  refuse(model.file({{"head", quoted(to_json(wide))}}), "expected a head of hidden_size=8, got 9");
  for (const auto& [name, tensor] : model.tensors) {
    Model changed = model;
    changed.tensors.erase(name);
    context("%s is missing", name.c_str());
    if (name.ends_with("residual_scale") || name.ends_with("shift")) continue;
    refuse(changed.file(), "missing " + name + ", unexpected none");
    changed.tensors[name + "s"] = tensor;
    refuse(changed.file(), "missing " + name + ", unexpected " + name + "s");
    changed = model;
    changed.tensors[name].shape.insert(changed.tensors[name].shape.begin(), 1);
    refuse(changed.file(), "expected " + name);
    changed = model;
    StoredTensor& other = changed.tensors[name];
    other.shape[0] *= 2;
    other.bytes += other.bytes;
    refuse(changed.file(), "expected " + name);
    changed = model;
    StoredTensor& s8 = changed.tensors[name];
    s8.type = ElementType::kS8;
    s8.bytes.resize(s8.view().elements());
    refuse(changed.file(), "expected " + name + " of fp32, fp16 or bf16, got i8");
  }
  Model scaled = model;
  scaled.tensors["layers.0.ffn.up.weight_scale"] = random_floats(ElementType::kF32, {4}, 1, 0);
  refuse(scaled.file(), "expected layers.0.ffn.up.weight of i8");
  const std::string whole = model.file();
  for (size_t bytes = 0; bytes < whole.size(); bytes += options().quick ? 37 : 1) {
    context("%zu of %zu bytes", bytes, whole.size());
    refuse(whole.substr(0, bytes), " is damaged, or is not a safetensors file: ");
  }
  // A changed byte of the header is an error, or means nothing (a space, say), or makes another model.
  uint64_t header_bytes;
  std::memcpy(&header_bytes, whole.data(), sizeof header_bytes);
  for (size_t i = 0; i < sizeof header_bytes + header_bytes; i += options().quick ? 41 : 1) {
    std::string changed = whole;
    changed[i] = static_cast<char>(changed[i] ^ (1u << random_source().below(8)));
    context("byte %zu is changed to %02x", i, static_cast<unsigned char>(changed[i]));
    write_file(path, changed);
    const std::string message = error_of([&] {
      const std::shared_ptr<Engine> engine = Engine::open(path, {.threads = 1});
      answers(*engine, random_batch(engine->image().specs().encoder, 2));
    });
    EXPECT(message.empty() || says(message, path), "%s", message.c_str());
  }
}

TORCH_EXT_TEST(runtime_int8_weights_are_checked) {
  Model model = tiny_model();
  model.dtype = "int8";
  const std::string name = "layers.0.ffn.up.weight", scale = name + "_scale";
  StoredTensor& weight = model.tensors[name];
  weight = {ElementType::kS8, {4, 8}, std::string(32, '\5')};
  expect_error([&] { model.engine(); }, "missing " + scale);
  model.tensors[scale] = random_floats(ElementType::kF32, {4}, 1, 0);
  EXPECT(error_of([&] { model.engine(); }).empty(), "sound weights are refused: %s",
         error_of([&] { model.engine(); }).c_str());
  model.tensors[scale] = random_floats(ElementType::kF32, {3}, 1, 0);
  expect_error([&] { model.engine(); }, "expected " + scale + " [4], got");
  model.tensors[scale] = random_floats(ElementType::kBF16, {4}, 1, 0);
  expect_error([&] { model.engine(); }, "expected " + scale + " of fp32");
  for (const float value : {-1.0f, INFINITY, NAN}) {
    model.tensors[scale] = random_floats(ElementType::kF32, {4}, 1, 0);
    std::memcpy(model.tensors[scale].bytes.data() + 8, &value, sizeof value);
    expect_error([&] { model.engine(); }, "scales of " + name + " that are finite and not negative, got ");
  }
  model.tensors[scale] = random_floats(ElementType::kF32, {4}, 1, 0);
  weight.bytes[31] = '\x80';
  expect_error([&] { model.engine(); }, "from -127 to 127, got -128");
  weight.bytes[31] = '\1';
  // Parts of one weight: all of fp32, fp16 and bf16, or one of i8.
  Weights parts = model.weights();
  parts[name].push_back(parts[name][0]);
  parts[name][0].shape[0] = parts[name][1].shape[0] = 2;
  expect_error([&] { Engine::from_weights("model", model.specs(), parts, {.threads = 1}); }, "in one part");
  const StoredTensor half = random_floats(ElementType::kF32, {2, 8}, 0, 1);
  parts[name][0] = half.view();
  expect_error([&] { Engine::from_weights("model", model.specs(), parts, {.threads = 1}); }, "in one part");
}

TORCH_EXT_TEST(runtime_weights_come_in_parts) {
  for (size_t i = 0; i < options().random; ++i) {
    const Model model = random_model();
    context("%s %s", to_json(model.encoder).c_str(), model.dtype.c_str());
    Weights parts = model.weights();
    std::vector<std::string> moved;  // parts need not be aligned
    moved.reserve(4 * parts.size());
    for (auto& [name, views] : parts) {
      TensorView& view = views[0];
      if (view.type == ElementType::kS8 || name.ends_with("weight_scale") || view.shape[0] < 2) continue;
      const size_t bytes = model.tensors.at(name).bytes.size() / view.shape[0],
                   first = random_source().between(1, view.shape[0] - 1);
      TensorView rest = view;
      rest.shape[0] -= first;
      moved.push_back(" " + std::string(view.data + first * bytes, rest.shape[0] * bytes));
      rest.data = moved.back().data() + 1;
      view.shape[0] = first;
      views.push_back(rest);
    }
    const std::shared_ptr<Engine> whole = model.engine(),
                                  joined = Engine::from_weights("model", model.specs(), parts, {.threads = 2});
    const Batch batch = random_batch(whole->image().specs().encoder, 4);
    EXPECT(same_bits(answers(*whole, batch), answers(*joined, batch)), "parts give other results");
  }
}

// ---- images ---------------------------------------------------------------------------------------------------------

// The layout of ImageHeader, written anew.
constexpr size_t kImageHeaderBytes = 248, kChecksumAt = 24, kIsaAt = 48, kFeaturesAt = 80, kEncoderAt = 136;

void write_word(std::string& bytes, size_t at, uint64_t word) { std::memcpy(bytes.data() + at, &word, sizeof word); }
uint64_t read_word(const std::string& bytes, size_t at) {
  uint64_t word;
  std::memcpy(&word, bytes.data() + at, sizeof word);
  return word;
}

// Both checksums as they must be.
void sign(std::string& image) {
  const size_t at = std::min<size_t>(read_word(image, kEncoderAt), image.size());
  if (image.size() - at >= sizeof(EncoderHeader)) {
    EncoderHeader h;
    std::memcpy(&h, image.data() + at, sizeof h);
    const size_t table = std::min(h.sections * sizeof(Section), image.size() - at - sizeof h);
    h.checksum = checksum(image.data() + at + sizeof h, table, checksum(&h, offsetof(EncoderHeader, checksum)));
    std::memcpy(image.data() + at, &h, sizeof h);
  }
  std::string header = image.substr(0, kImageHeaderBytes);
  write_word(header, kChecksumAt, 0);
  const uint64_t rest = checksum(image.data() + kImageHeaderBytes, image.size() - kImageHeaderBytes);
  write_word(image, kChecksumAt, checksum(header.data(), kImageHeaderBytes, rest));
}

std::string shared_image(const Engine& engine) {
  const File file(engine.image().share());
  return read_bytes(file.fd());
}

TORCH_EXT_TEST(runtime_images_are_shared_and_saved) {
  const Folder folder;
  const std::string path = folder / "image";
  for (size_t i = 0; i < options().random; ++i) {
    const Model model = random_model();
    context("%s %s", to_json(model.encoder).c_str(), model.dtype.c_str());
    const std::shared_ptr<Engine> plain = model.engine(), shared = model.engine({.threads = 2, .shared = true});
    const Batch batch = random_batch(plain->image().specs().encoder, 4);
    const std::vector<float> expected = answers(*plain, batch);
    EXPECT(same_bits(answers(*shared, batch), expected), "shared weights give other results");
    for (const Engine* const maker : {plain.get(), shared.get()}) {
      const File file(maker->image().share());
      EXPECT(fcntl(file.fd(), F_GETFD) & FD_CLOEXEC, "it would be given to programs unasked");
      EXPECT(write(file.fd(), "x", 1) < 0 && ftruncate(file.fd(), 1) != 0, "it can be changed");
      const std::shared_ptr<Engine> other = Engine::from_image(file.fd(), "the image", {.threads = 1});
      EXPECT(same_bits(answers(*other, batch), expected), "a mapped image gives other results");
      EXPECT(fcntl(file.fd(), F_GETFD) >= 0, "the descriptor is the caller's");
      const File again(other->image().share());
      EXPECT(read_bytes(again.fd()) == read_bytes(file.fd()), "what is shared again is another image");
      maker->image().save(path);
    }
    const std::shared_ptr<Engine> opened = Engine::from_image(path, {.threads = 1});
    EXPECT(same_bits(answers(*opened, batch), expected), "a saved image gives other results");
    EXPECT(opened->image().specs().encoder_json == plain->image().specs().encoder_json, "another specification");
    EXPECT(read_file(path) == shared_image(*opened), "a saved image that is shared is another one");
    EXPECT(folder.entries().size() == 1, "%zu files", folder.entries().size());
  }
  expect_error([&] { Engine::from_image(folder / "none", {}); }, "No such file");
  expect_error([&] { tiny_model().engine()->image().save(folder / "no/image"); }, "cannot write beside");
  expect_error([&] { Engine::from_image(-1, "the image", {}); }, "cannot use descriptor -1");
}

TORCH_EXT_TEST(runtime_refuses_foreign_images) {
  const Folder folder;
  const std::string path = folder / "image", good = shared_image(*tiny_model().engine());
  const auto refuse = [&](const std::string& bytes, const std::string& part) {
    write_file(path, bytes);
    expect_error([&] { Engine::from_image(path, {.threads = 1}); }, path);
    expect_error([&] { Engine::from_image(path, {.threads = 1}); }, part);
  };
  write_file(path, good);
  EXPECT(error_of([&] { Engine::from_image(path, {.threads = 1}); }).empty(), "a sound image is refused");
  for (size_t bytes = 0; bytes < good.size(); bytes += bytes < 300 || !options().quick ? 1 : 61) {
    context("%zu of %zu bytes", bytes, good.size());
    refuse(good.substr(0, bytes),
           bytes < kImageHeaderBytes ? "is no image of torch_ext.runtime: it has" : "is damaged: it says");
  }
  refuse(good + "x", "is damaged: it says");
  std::string other = good;
  other[0] = 'Y';
  refuse(other, "is no image of torch_ext.runtime");
  other = good;
  other[8] = 9;
  refuse(other, "is an image of version 9, this torch_ext reads 1: make it again");
  other = good;
  std::memcpy(other.data() + kIsaAt, "z80\0", 4);
  sign(other);
  refuse(other, "was packed for z80 on");
  refuse(other, "make it again on this kind of CPU");
  other = good;
  std::memset(other.data() + kIsaAt, 'a', 32);  // no zero at the end
  refuse(other, "was packed for aaaa");
  other = good;
  write_word(other, kFeaturesAt, read_word(other, kFeaturesAt) ^ (uint64_t{1} << 40));
  sign(other);
  refuse(other, "was packed for another CPU of kind");
  // Memory that its maker could still change.
  const int open_memory = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (open_memory >= 0 && write(open_memory, good.data(), good.size()) == static_cast<ssize_t>(good.size())) {
    const auto map = [&] { Engine::from_image(open_memory, "the image", {.threads = 1}); };
    expect_error(map, "the image is not sealed");
    fcntl(open_memory, F_ADD_SEALS, F_SEAL_SHRINK);
    expect_error(map, "the image is not sealed");
    fcntl(open_memory, F_ADD_SEALS, F_SEAL_WRITE);
    EXPECT(error_of(map).empty(), "sealed memory is refused: %s", error_of(map).c_str());
  }
  if (open_memory >= 0) close(open_memory);
}

TORCH_EXT_TEST(runtime_damaged_images_never_crash) {
  const Dispatch& dispatch = own_dispatch();
  for (const char* const dtype : {"bf16", "int8"}) {
    Model model = tiny_model();
    model.dtype = dtype;
    const std::shared_ptr<Engine> engine = model.engine();
    const std::string good = shared_image(*engine);
    const Folder folder;
    const std::string path = folder / "image";
    write_file(path, good);
    const File file(open(path.c_str(), O_RDWR | O_CLOEXEC));
    note("%zu bytes", good.size());
    // One changed byte is noticed, wherever it is.
    for (size_t i = 0; i < good.size(); i += options().quick ? 53 : 1) {
      const char changed = static_cast<char>(good[i] ^ (1u << (i % 8)));
      context("%s, byte %zu of %zu", dtype, i, good.size());
      if (pwrite(file.fd(), &changed, 1, static_cast<off_t>(i)) != 1) throw std::runtime_error("pwrite");
      const std::string message = error_of([&] { Image::map(file.fd(), "the image", dispatch); });
      EXPECT(says(message, "the image "), "%s", message.c_str());
      if (pwrite(file.fd(), &good[i], 1, static_cast<off_t>(i)) != 1) throw std::runtime_error("pwrite");
    }
    EXPECT(error_of([&] { Image::map(file.fd(), "the image", dispatch); }).empty(), "the sound image is refused");
    // With checksums that fit: an error, or a model that runs.
    size_t ran = 0;
    const size_t step = options().quick ? 101 : options().random >= 1000 ? 1 : 7;
    for (size_t i = random_source().below(step); i < good.size(); i += step) {
      std::string changed = good;
      changed[i] = static_cast<char>(changed[i] ^ (1u << random_source().below(8)));
      sign(changed);
      context("%s, byte %zu of %zu is %02x, checksums fit", dtype, i, good.size(),
              static_cast<unsigned char>(changed[i]));
      write_file(path, changed);
      const std::string message = error_of([&] {
        const std::shared_ptr<Engine> other = Engine::from_image(path, {.threads = 1});
        answers(*other, random_batch(other->image().specs().encoder, 2));
        ++ran;
      });
      EXPECT(message.empty() || says(message, path), "%s", message.c_str());
    }
    EXPECT(ran > 0, "none ran");
  }
}

// ---- engines --------------------------------------------------------------------------------------------------------

TORCH_EXT_TEST(runtime_random_batches_give_the_same_bits) {
  const size_t batches_per_model = 8, models = (options().random + batches_per_model - 1) / batches_per_model;
  for (size_t i = 0; i < models; ++i) {
    const Model model = random_model();
    std::vector<std::shared_ptr<Engine>> engines;
    for (const size_t threads : {1, 2, 3})
      engines.push_back(model.engine({.threads = threads, .shared = threads == 2}));
    const EncoderSpec& spec = engines[0]->image().specs().encoder;
    for (size_t j = 0; j < batches_per_model; ++j) {
      const Batch batch = random_batch(spec, j == 0 ? 60 : 6);  // the first is large enough to be shared out
      context("%s %s head %s, %zu texts, %zu tokens", to_json(model.encoder).c_str(), model.dtype.c_str(),
              to_json(model.head).c_str(), batch.texts(), batch.ids.size());
      const std::vector<float> expected = answers(*engines[0], batch);
      for (const float x : expected) EXPECT(std::isfinite(x), "a result is not finite");
      for (size_t e = 1; e < engines.size(); ++e) {
        EXPECT(same_bits(answers(*engines[e], batch), expected), "%zu threads give other bits", e + 1);
      }
      // One text after the other.
      const std::vector<float> together = hidden_of(*engines[0], batch);
      const auto width = static_cast<size_t>(spec.hidden_size);
      for (size_t t = 0; t < batch.texts(); ++t) {
        const int32_t begin = batch.cu_seqlens[t], end = batch.cu_seqlens[t + 1];
        Batch one{.ids = {batch.ids.begin() + begin, batch.ids.begin() + end},
                  .types = {batch.types.begin() + begin, batch.types.begin() + end},
                  .cu_seqlens = {0, end - begin},
                  .typed = batch.typed};
        const std::vector<float> alone = hidden_of(*engines[t % 3], one);
        EXPECT(std::memcmp(alone.data(), together.data() + static_cast<size_t>(begin) * width,
                           alone.size() * sizeof(float)) == 0,
               "text %zu alone gives other bits", t);
      }
    }
  }
}

TORCH_EXT_TEST(runtime_bad_input_is_refused_and_the_next_batch_is_right) {
  for (size_t i = 0; i < options().random; ++i) {
    const Model model = random_model();
    const std::shared_ptr<Engine> engine = model.engine({.threads = 2});
    const EncoderSpec& spec = engine->image().specs().encoder;
    const Batch good = random_batch(spec, 5);
    const std::vector<float> expected = answers(*engine, good);
    const auto refuse = [&](Batch bad, const std::string& part) {
      expect_error([&] { encode(*engine, bad); }, part);
      EXPECT(same_bits(answers(*engine, good), expected), "the next batch is wrong");
    };
    Batch bad = good;
    bad.ids[random_source().below(bad.ids.size())] = spec.vocab_size;
    refuse(bad, joined("expected input_ids from 0 to ", spec.vocab_size - 1, ", got ", spec.vocab_size));
    bad.ids = good.ids;
    for (const int64_t id : {int64_t{-1}, INT64_MIN, INT64_MAX}) {
      bad.ids[random_source().below(bad.ids.size())] = id;
      refuse(bad, "expected input_ids from 0 to ");
      bad.ids = good.ids;
    }
    bad.typed = true;
    bad.types.back() = std::max<int64_t>(1, spec.type_vocab_size);
    refuse(bad, joined("expected token_type_ids from 0 to ", std::max<int64_t>(1, spec.type_vocab_size) - 1));
    bad = good;
    bad.cu_seqlens.back() += 1;
    refuse(bad, "expected cu_seqlens from 0 to ");
    bad = good;
    bad.cu_seqlens.front() = 1;
    refuse(bad, "expected cu_seqlens from 0 to ");
    bad = good;
    bad.cu_seqlens.insert(bad.cu_seqlens.begin(), 0);
    refuse(bad, "expected cu_seqlens to rise, got 0 then 0: text 0 has no tokens");
    bad = good;
    bad.cu_seqlens.insert(bad.cu_seqlens.end() - 1, INT32_MAX);
    refuse(bad, "");
    bad.cu_seqlens[bad.cu_seqlens.size() - 2] = INT32_MIN;
    refuse(bad, "expected cu_seqlens to rise");
    bad = {.ids = {}, .types = {}, .cu_seqlens = {0}, .typed = false};
    refuse(bad, "expected at least one text");
    bad.cu_seqlens = {0, 0};
    refuse(bad, "text 0 has no tokens");
    bad.ids.assign(static_cast<size_t>(spec.max_positions) + 1, 0);
    bad.cu_seqlens = {0, static_cast<int32_t>(bad.ids.size())};
    refuse(bad, joined("the model takes at most ", spec.max_positions));
    const std::unique_ptr<States> states = encode(*engine, good);
    std::vector<float> out(1000);
    std::vector<int64_t> indices(1000);
    expect_error([&] { states->pool({.dimensions = states->embedding_size() + 1}, out.data()); },
                 "expected dimensions of at most");
    const int64_t rows[] = {0, static_cast<int64_t>(good.ids.size())};
    if (!engine->image().head()) {
      expect_error([&] { states->text_logits(out.data()); }, "this model has no head");
      expect_error([&] { states->token_logits(rows, 1, out.data()); }, "this model has no head");
      expect_error([&] { states->top_k(rows, 1, 1, indices.data(), out.data()); }, "this model has no head");
      expect_error([&] { states->sparse({}); }, "this model has no head");
    } else if (engine->image().specs().head->task == "text-classification") {
      expect_error([&] { states->token_logits(rows, 1, out.data()); }, "expected a head for tokens");
      expect_error([&] { states->top_k(rows, 1, 1, indices.data(), out.data()); }, "expected a head for tokens");
      expect_error([&] { states->sparse({}); }, "expected a head for tokens");
    } else {
      expect_error([&] { states->text_logits(out.data()); }, "expected a head for text-classification");
      expect_error([&] { states->token_logits(rows, 2, out.data()); }, "expected rows from 0 to");
      expect_error([&] { states->top_k(rows, 2, 1, indices.data(), out.data()); }, "expected rows from 0 to");
      expect_error([&] { states->top_k(rows, 1, 0, indices.data(), out.data()); }, "expected k from 1 to");
      expect_error([&] { states->top_k(rows, 1, states->outputs() + 1, indices.data(), out.data()); },
                   "expected k from");
    }
  }
}

TORCH_EXT_TEST(runtime_callers_at_once_get_their_own_results) {
  const Model model = random_model();
  const std::shared_ptr<Engine> first = model.engine({.threads = 3}), second = model.engine({.threads = 2});
  std::vector<Batch> batches;
  std::vector<std::vector<float>> expected;
  for (size_t i = 0; i < 4; ++i) {
    batches.push_back(random_batch(first->image().specs().encoder, 20));
    expected.push_back(answers(*first, batches.back()));
  }
  std::atomic<size_t> wrong{0};
  const auto call = [&](size_t caller) {
    for (size_t round = 0; round < (options().quick ? 3 : 25); ++round) {
      const Engine& engine = (round + caller) % 3 ? *first : *second;
      if (!same_bits(answers(engine, batches[caller]), expected[caller])) ++wrong;
    }
  };
  std::vector<std::thread> callers;
  for (size_t i = 0; i < batches.size(); ++i) callers.emplace_back(call, i);
  for (std::thread& caller : callers) caller.join();
  EXPECT(wrong == 0, "%zu batches were wrong", wrong.load());
}

TORCH_EXT_TEST(runtime_states_outlive_their_engine) {
  const Model model = tiny_model();
  std::shared_ptr<Engine> engine = model.engine({.threads = 2});
  const Batch batch = random_batch(engine->image().specs().encoder, 3);
  const std::vector<float> expected = hidden_of(*engine, batch);
  const std::unique_ptr<States> states = encode(*engine, batch);
  engine.reset();
  std::vector<float> hidden(expected.size()), pooled(states->texts() * 8);
  states->copy_hidden(hidden.data());
  states->pool({.normalize = true}, pooled.data());
  EXPECT(same_bits(hidden, expected), "other results");
}

TORCH_EXT_TEST(runtime_options_are_checked) {
  const Model model = tiny_model();
  expect_error([&] { model.engine({.threads = 5000}); }, "expected threads of at most 4096, got 5000");
  expect_error([&] { model.engine({.cpus = {0, 1 << 19}}); }, "expected CPUs that this process may run on");
  expect_error([&] { model.engine({.threads = 2, .cpus = {-1}}); }, "expected CPUs that this process may run on");
  EXPECT(model.engine({.threads = 0})->threads() == default_threads(), "as many as the process may use");
}

size_t resident_bytes() {
  size_t pages = 0;
  if (std::FILE* const file = std::fopen("/proc/self/statm", "r")) {
    if (std::fscanf(file, "%*s %zu", &pages) != 1) pages = 0;
    std::fclose(file);
  }
  return pages * static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

TORCH_EXT_TEST(runtime_open_and_close_leave_nothing_behind) {
  const Folder folder;
  const Model model = tiny_model();
  write_file(folder / "model", model.file());
  model.engine()->image().save(folder / "image");
  const size_t cycles = options().quick ? 30 : 200;
  size_t threads = 0, descriptors = 0, bytes = 0;
  for (size_t i = 0; i < cycles; ++i) {
    {
      std::shared_ptr<Engine> engine = i % 3 ? Engine::open(folder / "model", {.threads = 3, .shared = i % 3 == 1})
                                             : Engine::from_image(folder / "image", {.threads = 3});
      const File shared(engine->image().share());
      const Batch batch = random_batch(engine->image().specs().encoder, 60);
      answers(*engine, batch);
      const std::string message = error_of([&] { Engine::open(folder / "image", {.threads = 2}); });
      EXPECT(!message.empty(), "an image was opened as a model");
    }
    if (i != cycles / 4) continue;
    threads = count_entries("/proc/self/task");
    descriptors = count_entries("/proc/self/fd");
    bytes = resident_bytes();
  }
  // The system lists a thread that has ended, and was joined, for a moment longer.
  for (size_t i = 0; i < 3000 && count_entries("/proc/self/task") > threads; ++i) usleep(10000);
  EXPECT(count_entries("/proc/self/task") <= threads, "%zu threads, %zu before", count_entries("/proc/self/task"),
         threads);
  EXPECT(count_entries("/proc/self/fd") == descriptors, "%zu descriptors, %zu before", count_entries("/proc/self/fd"),
         descriptors);
#if !defined(__SANITIZE_ADDRESS__) && !defined(TORCH_EXT_THREAD_SANITIZER)
  // Pages come and go a little; an engine of these has more than 100 KiB for each of its threads.
  const size_t growth = std::max(resident_bytes(), bytes) - bytes;
  EXPECT(growth < (4 << 20) || options().quick, "%zu KiB more memory after %zu cycles", growth / 1024, cycles);
#else
  (void)bytes;
#endif
}

#if !defined(TORCH_EXT_THREAD_SANITIZER)
TORCH_EXT_TEST(runtime_works_in_a_forked_child) {
  const Model model = tiny_model();
  const std::shared_ptr<Engine> engine = model.engine({.threads = 3});
  const Batch batch = random_batch(engine->image().specs().encoder, 60);
  const std::vector<float> expected = answers(*engine, batch);
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    _exit(same_bits(answers(*engine, batch), expected) ? 0 : 1);
  }
  int status = 0;
  EXPECT(child > 0 && waitpid(child, &status, 0) == child && status == 0, "the child ended with %d", status);
  EXPECT(same_bits(answers(*engine, batch), expected), "the parent gives other results");
}
#endif

// ---- the C interface ------------------------------------------------------------------------------------------------

struct CModel {
  Model model = tiny_model();
  std::string encoder_json = to_json(model.encoder), head_json = to_json(model.head);
  std::vector<txr_tensor> tensors;
  txr_model given = {};

  CModel() {
    for (const auto& [name, t] : model.tensors) {
      tensors.push_back({.struct_size = sizeof(txr_tensor),
                         .name = name.c_str(),
                         .type = static_cast<int32_t>(t.type),
                         .dimensions = static_cast<int32_t>(t.shape.size()),
                         .shape = t.shape.data(),
                         .data = t.bytes.data(),
                         .mapped = 0});
    }
    given = {sizeof given, "the tiny one", encoder_json.c_str(), head_json.c_str(), tensors.data(), tensors.size()};
  }
};

std::string c_error(txr_status expected, const txr_error& error, txr_status status) {
  EXPECT(status == expected, "status %d, expected %d: %s", status, expected, error.message);
  return error.message;
}

TORCH_EXT_TEST(runtime_c_interface_runs_a_batch) {
  EXPECT(txr_abi_version() == TXR_ABI_VERSION && txr_default_threads() >= 1 && txr_isa_report(), "what it is");
  const CModel c;
  txr_options options = {};
  options.struct_size = sizeof options;
  options.threads = 2;
  txr_encoder* encoder = nullptr;
  txr_error error = {sizeof error, {}};
  EXPECT(txr_pack(&c.given, &options, &encoder, &error) == TXR_OK, "%s", error.message);
  txr_info info = {};
  info.struct_size = sizeof info;
  EXPECT(txr_describe(encoder, &info, &error) == TXR_OK, "%s", error.message);
  EXPECT(std::string(info.architecture) == "bert" && std::string(info.task) == "fill-mask" && info.hidden_size == 8 &&
             info.outputs == 3 && info.threads == 2 && info.image_bytes > 0,
         "the description is wrong");
  const int64_t ids[] = {0, 1, 2, 1, 0};
  const int32_t bounds[] = {0, 2, 5};
  const txr_batch batch = {sizeof batch, ids, 5, bounds, 2, nullptr, nullptr};
  txr_states* states = nullptr;
  EXPECT(txr_encode(encoder, &batch, &states, &error) == TXR_OK, "%s", error.message);
  float hidden[40], pooled[16], narrow[6], logits[15];
  EXPECT(txr_hidden(states, hidden, 40, &error) == TXR_OK, "%s", error.message);
  EXPECT(txr_pool(states, nullptr, pooled, 16, &error) == TXR_OK, "the mean is the default: %s", error.message);
  const txr_pooling first = {sizeof first, "cls", 0, 3, 0};
  EXPECT(txr_pool(states, &first, narrow, 6, &error) == TXR_OK, "%s", error.message);
  EXPECT(std::memcmp(narrow, hidden, 12) == 0 && std::memcmp(narrow + 3, hidden + 16, 12) == 0, "the first tokens");
  float wide[32], vectors[40];
  const txr_pooling both = {sizeof both, "lasttoken+cls", 0, 0, 1};
  EXPECT(txr_pool(states, &both, wide, 32, &error) == TXR_OK, "%s", error.message);
  EXPECT(std::memcmp(wide, hidden + 8, 32) == 0 && std::memcmp(wide + 8, hidden + 8, 32) == 0, "two of one text");
  EXPECT(std::memcmp(wide + 16, hidden + 32, 32) == 0 && std::memcmp(wide + 24, hidden + 24, 32) == 0, "and the next");
  const txr_pooling none = {sizeof none, "max+mean", 1, 0, 2};
  EXPECT(txr_pool(states, &none, wide, 32, &error) == TXR_OK, "%s", error.message);
  EXPECT(std::count(wide, wide + 16, 0.0f) == 16, "a text that is skipped as a whole is 0");
  EXPECT(std::memcmp(wide + 16, wide + 24, 32) == 0, "of one token, the largest is the mean");
  EXPECT(txr_token_vectors(states, 0, vectors, 40, &error) == TXR_OK, "%s", error.message);
  EXPECT(std::memcmp(vectors, hidden, sizeof hidden) == 0, "vectors of tokens are hidden states here");
  EXPECT(txr_token_vectors(states, 1, vectors, 40, &error) == TXR_OK, "%s", error.message);
  for (size_t token = 0; token < 5; ++token) {
    float squares = 0.0f;
    for (size_t j = 0; j < 8; ++j) squares += vectors[8 * token + j] * vectors[8 * token + j];
    EXPECT(std::fabs(squares - 1.0f) < 1e-5f, "token %zu has length 1", token);
  }
  EXPECT(txr_token_logits(states, nullptr, 0, logits, 15, &error) == TXR_OK, "%s", error.message);
  const int64_t rows[] = {4};
  int64_t indices[3];
  float probabilities[3];
  EXPECT(txr_top_k(states, rows, 1, 3, indices, probabilities, &error) == TXR_OK, "%s", error.message);
  EXPECT(probabilities[0] >= probabilities[1] && probabilities[1] >= probabilities[2], "an order");
  EXPECT(std::fabs(probabilities[0] + probabilities[1] + probabilities[2] - 1.0f) < 1e-5f, "they add up to 1");
  EXPECT(logits[12 + indices[0]] >= logits[12 + indices[1]], "the best one first");
  txr_sparse* sparse = nullptr;
  txr_sparse_view view = {};
  view.struct_size = sizeof view;
  EXPECT(txr_sparse_pool(states, nullptr, &sparse, &error) == TXR_OK, "%s", error.message);
  EXPECT(txr_view_sparse(sparse, &view, &error) == TXR_OK && view.texts == 2, "%s", error.message);
  EXPECT(view.bounds[0] == 0 && view.bounds[2] == static_cast<int64_t>(view.entries), "bounds of the entries");
  for (size_t text = 0, entry = 0; text < 2; ++text) {
    for (int64_t j = 0; j < 3; ++j) {
      float largest = 0.0f;
      for (int32_t i = bounds[text]; i < bounds[text + 1]; ++i) largest = std::fmax(largest, logits[3 * i + j]);
      if (largest == 0.0f) continue;
      EXPECT(entry < view.entries && view.indices[entry] == j, "output %d of text %zu", static_cast<int>(j), text);
      EXPECT(std::fabs(view.values[entry++] - std::log1p(largest)) < 1e-6f, "its value");
    }
  }
  txr_free_sparse(sparse);
  // The second text's last two tokens are seen by none: those of a program that knows no such field are.
  const int32_t attended[] = {2, 1};
  txr_batch newer = batch;
  newer.attended = attended;
  for (const bool knows : {true, false}) {
    newer.struct_size = knows ? sizeof newer : offsetof(txr_batch, attended);
    float again[40];
    txr_states* more = nullptr;
    EXPECT(txr_encode(encoder, &newer, &more, &error) == TXR_OK, "%s", error.message);
    EXPECT(txr_hidden(more, again, 40, &error) == TXR_OK, "%s", error.message);
    EXPECT(std::memcmp(again, hidden, 64) == 0, "the first text is the same");
    EXPECT((std::memcmp(again + 16, hidden + 16, 96) != 0) == knows, "the second text");
    txr_free_states(more);
  }
  txr_free_sparse(nullptr);
  // Callers' structures that end earlier or later.
  txr_info shorter = {};
  shorter.struct_size = offsetof(txr_info, hidden_size);
  shorter.hidden_size = -7;
  EXPECT(txr_describe(encoder, &shorter, nullptr) == TXR_OK && shorter.hidden_size == -7 && shorter.isa,
         "a shorter one");
  struct {
    txr_pooling pooling;
    char more[64];
  } longer = {{sizeof longer, "cls", 0, 3, 0}, {}};
  EXPECT(txr_pool(states, &longer.pooling, narrow, 6, &error) == TXR_OK, "%s", error.message);
  txr_close(encoder);
  EXPECT(txr_hidden(states, hidden, 40, &error) == TXR_OK, "states outlive the encoder: %s", error.message);
  txr_free_states(states);
  txr_free_states(nullptr);
  txr_close(nullptr);
}

TORCH_EXT_TEST(runtime_c_interface_says_what_is_wrong) {
  const CModel c;
  txr_encoder* encoder = nullptr;
  txr_states* states = nullptr;
  txr_error error = {sizeof error, {}};
  int fd = -1;
  const auto expect_value = [&](txr_status status, const char* part) {
    const std::string message = c_error(TXR_ERROR_VALUE, error, status);
    EXPECT(says(message, part), "expected \"%s\" in: %s", part, message.c_str());
  };
  c_error(TXR_ERROR_NOT_FOUND, error, txr_open("/tmp/torch_ext none", nullptr, &encoder, &error));
  EXPECT(says(error.message, "cannot open /tmp/torch_ext none: No such file"), "%s", error.message);
  c_error(TXR_ERROR_NOT_FOUND, error, txr_open_image("/tmp/torch_ext none", nullptr, &encoder, &error));
  c_error(TXR_ERROR_SYSTEM, error, txr_open_image_fd(-1, nullptr, &encoder, &error));
  expect_value(txr_open(nullptr, nullptr, &encoder, &error), "expected a path, got NULL");
  expect_value(txr_open("a", nullptr, nullptr, &error), "expected a place for the encoder");
  expect_value(txr_open_image(nullptr, nullptr, &encoder, &error), "expected a path, got NULL");
  expect_value(txr_pack(nullptr, nullptr, &encoder, &error), "expected encoder_json and tensors, got NULL");
  txr_options options = {};
  expect_value(txr_pack(&c.given, &options, &encoder, &error), "txr_options: struct_size is 0, expected sizeof");
  options.struct_size = sizeof options;
  options.cpu_count = 1;
  expect_value(txr_pack(&c.given, &options, &encoder, &error), "cpu_count is 1 without cpus");
  options.cpu_count = 0;
  options.dtype = "fp64";
  expect_value(txr_pack(&c.given, &options, &encoder, &error), "the tiny one: unknown dtype 'fp64'");
  const auto changed = [&](const auto& change) {
    CModel other;
    txr_tensor* const tensor = other.tensors.data();
    change(*tensor, other.given);
    return txr_pack(&other.given, nullptr, &encoder, &error);
  };
  expect_value(changed([](txr_tensor& t, txr_model&) { t.struct_size = 0; }), "txr_tensor: struct_size is 0");
  expect_value(changed([](txr_tensor& t, txr_model&) { t.struct_size = 50; }), "txr_tensor: struct_size is 50");
  expect_value(changed([](txr_tensor& t, txr_model&) { t.data = nullptr; }), "got NULL");
  expect_value(changed([](txr_tensor& t, txr_model&) { t.type = 4; }), "unknown type 4");
  expect_value(changed([](txr_tensor& t, txr_model&) { t.type = -1; }), "unknown type -1");
  expect_value(changed([](txr_tensor& t, txr_model&) { t.dimensions = 3; }), "expected 1 or 2 dimensions, got 3");
  static constexpr uint64_t kHuge[] = {uint64_t{1} << 40, 0};
  expect_value(changed([](txr_tensor& t, txr_model&) { t.shape = kHuge; }), "expected sizes of at least 1");
  expect_value(changed([](txr_tensor&, txr_model& m) { m.tensor_count -= 1; }), "missing ");
  EXPECT(txr_pack(&c.given, nullptr, &encoder, nullptr) == TXR_OK, "it can be packed");
  expect_value(txr_describe(encoder, nullptr, &error), "expected a txr_info");
  expect_value(txr_share(encoder, nullptr, &error), "expected a place for the descriptor");
  expect_value(txr_share(nullptr, &fd, &error), "expected an encoder, got NULL");
  expect_value(txr_save_image(encoder, nullptr, &error), "expected a path");
  expect_value(txr_release_workspace(nullptr, &error), "expected an encoder, got NULL");
  EXPECT(txr_release_workspace(encoder, &error) == TXR_OK, "%s", error.message);
  c_error(TXR_ERROR_NOT_FOUND, error, txr_save_image(encoder, "/tmp/torch_ext none/a", &error));
  const int64_t ids[] = {0, 1};
  const int32_t bounds[] = {0, 2};
  txr_batch batch = {sizeof batch, ids, 2, bounds, 1, nullptr, nullptr};
  expect_value(txr_encode(encoder, nullptr, &states, &error), "expected ids and cu_seqlens, got NULL");
  expect_value(txr_encode(nullptr, &batch, &states, &error), "expected an encoder, got NULL");
  expect_value(txr_encode(encoder, &batch, nullptr, &error), "expected a place for the states");
  const int32_t attended[] = {3};
  batch.attended = attended;
  expect_value(txr_encode(encoder, &batch, &states, &error),
               "expected attended from 1 to the 2 tokens of text 0, got 3");
  batch.attended = nullptr;
  batch.texts = 0;
  expect_value(txr_encode(encoder, &batch, &states, &error), "expected at least one text");
  batch.texts = 1;
  EXPECT(!states && txr_encode(encoder, &batch, &states, &error) == TXR_OK, "the next batch: %s", error.message);
  float out[16];
  int64_t indices[4];
  const int64_t row = 0;
  expect_value(txr_hidden(states, out, 15, &error), "expected room for 2 x 8 elements, got 15");
  expect_value(txr_hidden(states, nullptr, 16, &error), "expected a place for the result, got NULL");
  expect_value(txr_hidden(nullptr, out, 16, &error), "expected states, got NULL");
  const txr_pooling pooling = {sizeof pooling, "median", 0, 0, 0}, wide = {sizeof wide, "cls", 0, 9, 0};
  expect_value(txr_pool(states, &pooling, out, 8, &error), "expected a pooling of mean, cls, max, lasttoken");
  expect_value(txr_pool(states, &wide, out, 9, &error), "expected dimensions of at most 8, got 9");
  expect_value(txr_text_logits(states, out, 3, &error), "expected a head for text-classification");
  expect_value(txr_token_logits(states, &row, 1, out, 4, &error), "expected room for 1 x 3 elements, got 4");
  expect_value(txr_top_k(states, nullptr, 1, 1, indices, out, &error), "got NULL");
  expect_value(txr_sparse_pool(states, nullptr, nullptr, &error), "expected a place for the vectors, got NULL");
  expect_value(txr_view_sparse(nullptr, nullptr, &error), "expected sparse vectors, got NULL");
  txr_close(encoder);
  // A message that is longer than the room for it ends between two characters, and is a string.
  for (size_t room = 1; room <= 40; ++room) {
    txr_error small = {offsetof(txr_error, message) + room, {}};
    std::memset(small.message, 'x', sizeof small.message);
    txr_open("/tmp/\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\xf0\x9f\x98\x80\xc3\xa9", nullptr, &encoder, &small);
    const size_t length = strnlen(small.message, sizeof small.message);
    EXPECT(length < room && small.message[room] == 'x', "%zu bytes in %zu", length, room);
    EXPECT(error_of([&] { parse_json(quoted(std::string(small.message))); }).empty(), "room of %zu cuts a character",
           room);
  }
  txr_error none = {sizeof(size_t), {}};
  std::strcpy(none.message, "as it was");
  txr_open("/tmp/torch_ext none", nullptr, &encoder, &none);
  EXPECT(std::string(none.message) == "as it was", "written to where there is no room");
  txr_free_states(states);
}

}  // namespace
}  // namespace torch_ext::test
