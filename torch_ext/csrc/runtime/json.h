/// JSON as it stands in the headers of safetensors files (RFC 8259), read into a tree.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace torch_ext::runtime {

struct Json {
  enum class Kind { kNull, kBool, kInteger, kNumber, kString, kArray, kObject };
  Kind kind = Kind::kNull;
  bool boolean = false;
  int64_t integer = 0;  ///< of a number without fraction and exponent that fits
  double number = 0.0;  ///< of every number
  std::string string;
  std::vector<Json> items;  ///< of an array
  struct Field;
  std::vector<Field> fields;  ///< of an object, in their order

  bool is(Kind k) const { return kind == k; }
  /// Null if this is no object, or has no such field.
  const Json* find(std::string_view name) const;
};

struct Json::Field {
  std::string name;
  Json value;
};

/// Throws an `Error` of kind kValue that names the place, unless `text` is one JSON value in UTF-8, with objects that name no
/// field twice, nested at most 32 deep.
Json parse_json(std::string_view text);

/// `text` in quotes, escaped.
std::string quoted(std::string_view text);

}  // namespace torch_ext::runtime
