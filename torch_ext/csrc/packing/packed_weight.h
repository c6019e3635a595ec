/// The packed weight that users hold: one byte tensor that starts with this header.
///
///   byte 0            64                                  64 + metadata, rounded up to 64
///   | PackedHeader    | metadata (layout kOnednn only)    | payload: panels, or the matrix itself |
///
/// The payload of a GemmKernel's layout is panel after panel, `rhs_panel_bytes(k)` each. Every op checks the header:
/// a tensor that is no packed weight, or one packed for another instruction set, is an error.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/gemm_kernel.h"

namespace torch_ext {

struct PackedHeader {
  char magic[8];
  uint32_t version;
  Layout layout;
  uint64_t n, k;
  uint32_t nr, kr;
  uint64_t metadata_bytes;
  uint64_t payload_bytes;
  uint8_t reserved[8];
};
static_assert(sizeof(PackedHeader) == 64);

constexpr char kPackedMagic[8] = {'T', 'X', 'P', 'A', 'C', 'K', 'E', 'D'};
constexpr uint32_t kPackedVersion = 1;
constexpr size_t kPackedAlignment = 64;

constexpr size_t round_up(size_t x, size_t multiple) { return (x + multiple - 1) / multiple * multiple; }

inline PackedHeader make_packed_header(Layout layout, size_t n, size_t k, size_t nr, size_t kr, size_t metadata_bytes,
                                       size_t payload_bytes) {
  PackedHeader h = {};
  std::memcpy(h.magic, kPackedMagic, sizeof h.magic);
  h.version = kPackedVersion;
  h.layout = layout;
  h.n = n;
  h.k = k;
  h.nr = static_cast<uint32_t>(nr);
  h.kr = static_cast<uint32_t>(kr);
  h.metadata_bytes = metadata_bytes;
  h.payload_bytes = payload_bytes;
  return h;
}

inline size_t payload_offset(const PackedHeader& h) {
  return sizeof(PackedHeader) + round_up(static_cast<size_t>(h.metadata_bytes), kPackedAlignment);
}

inline const char* layout_name(Layout layout) {
  switch (layout) {
    case Layout::kBf16Pairs:
      return "bf16 pairs (BFMMLA)";
    case Layout::kBf16Rows:
      return "bf16 rows";
    case Layout::kF32Rows:
      return "fp32 rows";
    case Layout::kPlain:
      return "plain bf16 [N, K]";
    case Layout::kOnednn:
      return "oneDNN";
    case Layout::kBf16Dots:
      return "bf16 dots (VDPBF16PS)";
    case Layout::kS8Groups:
      return "int8";
  }
  return "unknown";
}

}  // namespace torch_ext
