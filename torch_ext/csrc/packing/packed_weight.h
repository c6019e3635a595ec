/// The packed weight that users hold: one byte tensor that starts with this header.
///
///   byte 0            64                                  64 + metadata, rounded up to 64
///   | PackedHeader    | metadata (layout kOnednn only)    | payload: panels, or the matrix itself |
///
/// The payload of a GemmKernel's layout is panel after panel, `rhs_panel_bytes(k)` each. Every op checks the header:
/// a tensor that is no packed weight, one whose header is damaged, or one packed for another instruction set, is an error.
#pragma once

#include <cstddef>
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
  uint64_t checksum;  ///< of what comes before it, and of the metadata
};
static_assert(sizeof(PackedHeader) == 64);

constexpr char kPackedMagic[8] = {'T', 'X', 'P', 'A', 'C', 'K', 'E', 'D'};
constexpr uint32_t kPackedVersion = 2;
constexpr size_t kPackedAlignment = 64;

/// Sums of as many products of s8 fit into an s32: 127^2 * 133144 <= 2^31 - 1.
constexpr int64_t kMaxS8Products = ((int64_t{1} << 31) - 1) / (127 * 127);

constexpr size_t round_up(size_t x, size_t multiple) { return (x + multiple - 1) / multiple * multiple; }

/// FNV-1a on words of eight bytes, continued from `sum`: tells damage by accident, not by intent.
inline uint64_t checksum(const void* data, size_t bytes, uint64_t sum = 0xcbf29ce484222325) {
  const char* const p = static_cast<const char*>(data);
  for (size_t i = 0; i < bytes; i += sizeof(uint64_t)) {
    uint64_t word = 0;
    std::memcpy(&word, p + i, bytes - i < sizeof word ? bytes - i : sizeof word);
    sum = (sum ^ word) * 0x100000001b3;
    sum ^= sum >> 32;  // what is in the high bits of a word is to reach all bits
  }
  return sum;
}

/// The checksum of a header and its metadata, which may be null if there is none.
inline uint64_t header_checksum(const PackedHeader& h, const void* metadata) {
  const uint64_t sum = checksum(&h, offsetof(PackedHeader, checksum));
  return metadata ? checksum(metadata, static_cast<size_t>(h.metadata_bytes), sum) : sum;
}

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

/// Bytes of a whole packed weight.
inline size_t packed_bytes(const PackedHeader& h) { return payload_offset(h) + static_cast<size_t>(h.payload_bytes); }

/// The header of the packed weight in `bytes` bytes at `data`. Throws std::runtime_error unless it is sound.
PackedHeader read_packed_header(const char* op, const char* data, size_t bytes);

/// Throws std::runtime_error unless the weight lies as this process' kernel, of level `isa`, takes it.
void check_layout(const char* op, const PackedHeader& h, Layout layout, size_t nr, size_t kr, const char* isa);

/// Writes all that comes before the payload: the header with its checksum, and the metadata.
void write_packed_header(const PackedHeader& h, const void* metadata, char* data);

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
    case Layout::kBf16Halves:
      return "bf16 halves (AVX2)";
    case Layout::kS8Groups:
      return "int8";
    case Layout::kS8Crossed:
      return "int8 crossed (AVX2)";
  }
  return "unknown";
}

}  // namespace torch_ext
