/// A model ready to run: packed encoder, packed head and their specifications in one piece of memory, which processes may
/// share.
///
///   | ImageHeader | specifications | packed encoder (packed_encoder.h) | sections of the head |    each 64-byte aligned
///
/// It is for one level of the instruction set, and for one version of this library: it is made from an encoder's file at the
/// start of a service, not kept for years.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "dispatch.h"
#include "encoder.h"
#include "head.h"
#include "packing/packed_encoder.h"
#include "runtime/mapping.h"
#include "runtime/safetensors.h"
#include "runtime/spec.h"

namespace torch_ext::runtime {

/// The specifications of a model, as JSON and as values.
struct Specs {
  std::string encoder_json, head_json;  ///< head_json is empty where there is no head
  std::string dtype;                    ///< "bf16", "fp32" or "int8"
  EncoderSpec encoder;
  std::optional<HeadSpec> head;
};

/// Reads the JSON into the values. Throws kValue; the message begins with `name`.
Specs parse_specs(const std::string& name, const std::string& encoder_json, const std::string& head_json,
                  const std::string& dtype);

/// Weights by name. A tensor may come in parts, which lie one after the other along its first dimension.
using Weights = std::map<std::string, std::vector<TensorView>>;

/// What a file written by torch_ext.Encoder.save() holds. `dtype` is what to run it as; empty: as it was saved.
struct ModelFile {
  SafetensorsFile file;
  Specs specs;
  Weights weights;
};
ModelFile read_model_file(const std::string& path, const std::string& dtype);

/// The same weights in fp32 may be asked for as bf16; nothing else is converted on the way.
class Image {
 public:
  /// Packs weights for the kernels of `dispatch`, on the threads of `host`. `shared`: in a sealed file of memory, see
  /// `descriptor`. Throws kValue, with `name` in front, where weights do not fit the specifications.
  static Image pack(const std::string& name, const Specs& specs, const Weights& weights, const Dispatch& dispatch,
                    EncoderHost& host, bool shared);
  /// Maps an image that another process made. Throws kValue unless it is whole and was made for the same kernels. A file of
  /// memory must be sealed, so that it cannot change or shrink any more. `fd` stays the caller's.
  static Image map(int fd, const std::string& name, const Dispatch& dispatch);
  static Image map(const std::string& path, const Dispatch& dispatch);

  /// Writes it beside `path`, then renames: the file appears under its name only when it is complete.
  void save(const std::string& path) const;
  /// A new descriptor of a sealed file of memory that holds it.
  int share() const;

  const Specs& specs() const { return specs_; }
  const EncoderModel& encoder() const { return encoder_; }
  const std::optional<HeadModel>& head() const { return head_; }
  size_t bytes() const { return mapping_.bytes(); }

 private:
  void read(const std::string& name, const Dispatch& dispatch);

  File file_;  // of the memory, if it is shared
  Mapping mapping_;
  Specs specs_;
  EncoderModel encoder_;
  std::optional<HeadModel> head_;
};

}  // namespace torch_ext::runtime
