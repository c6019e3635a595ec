#include "runtime/safetensors.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "runtime/error.h"
#include "runtime/json.h"

namespace torch_ext::runtime {
namespace {

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // as the format has it

struct NamedType {
  const char *stored, *name;
  size_t bytes;
};
// In the order of ElementType.
constexpr NamedType kTypes[] = {{"F32", "fp32", 4}, {"F16", "fp16", 2}, {"BF16", "bf16", 2}, {"I8", "i8", 1}};

std::optional<ElementType> find_type(const std::string& stored) {
  for (size_t i = 0; i < sizeof kTypes / sizeof kTypes[0]; ++i) {
    if (stored == kTypes[i].stored) return static_cast<ElementType>(i);
  }
  return std::nullopt;
}

bool is_natural(const Json& value) { return value.is(Json::Kind::kInteger) && value.integer >= 0; }

}  // namespace

size_t element_bytes(ElementType type) { return kTypes[static_cast<size_t>(type)].bytes; }
const char* element_name(ElementType type) { return kTypes[static_cast<size_t>(type)].name; }

std::string describe(const std::vector<uint64_t>& shape) {
  std::string s = "[";
  for (const uint64_t size : shape) s += (s.size() > 1 ? ", " : "") + std::to_string(size);
  return s + "]";
}

std::string describe(const TensorView& tensor) {
  return std::string(element_name(tensor.type)) + " " + describe(tensor.shape);
}

SafetensorsFile SafetensorsFile::open(const std::string& path) {
  const File file = File::open_to_read(path);
  const size_t size = file.size(path);
  const auto sound = [&](bool condition, const auto&... what) {
    expect(condition, path, " is damaged, or is not a safetensors file: ", what...);
  };
  uint64_t header_bytes = 0;
  sound(size >= sizeof header_bytes, "it has ", size, " bytes");
  SafetensorsFile result;
  result.mapping_ = Mapping::of_file(file.fd(), size, false, path);
  const char* const data = result.mapping_.data();
  std::memcpy(&header_bytes, data, sizeof header_bytes);
  sound(header_bytes <= kMaxHeaderBytes && header_bytes <= size - sizeof header_bytes, "its header of ", header_bytes,
        " bytes does not fit ", size, " bytes");
  Json header;
  try {
    header = parse_json({data + sizeof header_bytes, static_cast<size_t>(header_bytes)});
  } catch (const Error& error) {
    sound(false, error.what());
  }
  sound(header.is(Json::Kind::kObject), "its header is no object");
  const size_t start = sizeof header_bytes + static_cast<size_t>(header_bytes), room = size - start;
  std::vector<std::pair<uint64_t, uint64_t>> places;
  for (const auto& [name, entry] : header.fields) {
    sound(entry.is(Json::Kind::kObject), "its header has no object for ", name);
    if (name == "__metadata__") {
      for (const auto& [key, value] : entry.fields) {
        sound(value.is(Json::Kind::kString), "its metadata ", key, " is no string");
        result.metadata_[key] = value.string;
      }
      continue;
    }
    const Json *type = entry.find("dtype"), *shape = entry.find("shape"), *offsets = entry.find("data_offsets");
    sound(type && type->is(Json::Kind::kString) && shape && shape->is(Json::Kind::kArray) && offsets &&
              offsets->is(Json::Kind::kArray) && offsets->items.size() == 2 && is_natural(offsets->items[0]) &&
              is_natural(offsets->items[1]),
          "its header does not describe ", name);
    const auto begin = static_cast<uint64_t>(offsets->items[0].integer);
    const auto end = static_cast<uint64_t>(offsets->items[1].integer);
    sound(begin <= end && end <= room, name, " lies from byte ", begin, " to ", end, " of ", room);
    places.emplace_back(begin, end);
    const std::optional<ElementType> known = find_type(type->string);
    if (!known) continue;
    TensorView tensor{.type = *known, .shape = {}, .data = data + start + begin, .mapped = true};
    uint64_t bytes = element_bytes(*known);
    for (const Json& dimension : shape->items) {
      sound(is_natural(dimension), "the shape of ", name, " has other things than sizes");
      const auto n = static_cast<uint64_t>(dimension.integer);
      sound(n == 0 || bytes <= room / n, name, " has more elements than the file bytes");
      bytes *= n;
      tensor.shape.push_back(n);
    }
    sound(bytes == end - begin, name, " ", describe(tensor), " takes ", bytes, " bytes, its place has ", end - begin);
    result.tensors_[name] = std::move(tensor);
  }
  std::sort(places.begin(), places.end());
  uint64_t covered = 0;
  for (const auto& [begin, end] : places) {
    sound(begin == covered, "its tensors leave a gap or overlap at byte ", std::min(begin, covered), " of ", room);
    covered = end;
  }
  sound(covered == room, "its tensors end at byte ", covered, " of ", room);
  return result;
}

}  // namespace torch_ext::runtime
