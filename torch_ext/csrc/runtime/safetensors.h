/// Files of safetensors, mapped and checked.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "runtime/mapping.h"

namespace torch_ext::runtime {

enum class ElementType { kF32, kF16, kBF16, kS8 };
size_t element_bytes(ElementType type);
/// "fp32", "fp16", "bf16", "i8".
const char* element_name(ElementType type);

/// A tensor in memory, row after row.
struct TensorView {
  ElementType type = ElementType::kF32;
  std::vector<uint64_t> shape;
  const char* data = nullptr;
  bool mapped = false;  ///< of a file, mapped shared and read-only: its pages may be taken out of memory once read
  size_t elements() const {
    size_t n = 1;
    for (const uint64_t size : shape) n *= static_cast<size_t>(size);
    return n;
  }
};

/// "fp32 [3, 4]".
std::string describe(const TensorView& tensor);
std::string describe(const std::vector<uint64_t>& shape);

class SafetensorsFile {
 public:
  /// Maps a file and reads its header. Throws kNotFound, or kValue where it is damaged: its tensors must cover the file
  /// without gaps and overlaps, as the format has it. Those of element types that no encoder has are left out.
  static SafetensorsFile open(const std::string& path);

  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::map<std::string, TensorView>& tensors() const { return tensors_; }

 private:
  Mapping mapping_;
  std::map<std::string, std::string> metadata_;
  std::map<std::string, TensorView> tensors_;
};

}  // namespace torch_ext::runtime
