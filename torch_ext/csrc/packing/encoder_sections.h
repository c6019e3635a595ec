/// Writing and reading packed encoders (packed_encoder.h). Knows nothing of torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "dispatch.h"
#include "encoder.h"
#include "packing/packed_encoder.h"

namespace torch_ext {

/// What a section holds.
enum class SectionKind {
  kMatrix,  ///< a packed weight
  kTable,   ///< rows of the header's type
  kFloats,
};
SectionKind section_kind(size_t index);

/// Places sections of the given sizes one after the other.
struct EncoderLayout {
  std::vector<Section> sections;
  uint64_t bytes = 0;  ///< of the whole packed encoder
};
EncoderLayout lay_out_encoder(const std::vector<uint64_t>& section_bytes);

/// Writes the header, whose magic, version, sections, bytes and checksum are filled in, and the table of sections; the gaps
/// between sections become zero.
void write_encoder_header(EncoderHeader h, const EncoderLayout& layout, char* data);

/// The header at `data`. Throws std::runtime_error unless it is sound and fits `bytes`.
const EncoderHeader& read_encoder_header(const char* op, const void* data, size_t bytes);

/// Pointers into the packed encoder at `data`, which must outlive them. `engine` multiplies with matrices of bf16; where it
/// is not kOwn they lie in its layout. Throws std::runtime_error unless everything is there, in the right size, as the
/// kernels of `d` take it.
EncoderModel read_encoder(const char* op, const void* data, size_t bytes, const Dispatch& d, LinearEngine engine);

}  // namespace torch_ext
