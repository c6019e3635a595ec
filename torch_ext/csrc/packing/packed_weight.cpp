#include "packing/packed_weight.h"

#include "check.h"

namespace torch_ext {

PackedHeader read_packed_header(const char* op, const char* data, size_t bytes) {
  PackedHeader h;
  check(bytes >= sizeof h, op, ": expected a packed weight, got ", bytes, " bytes");
  std::memcpy(&h, data, sizeof h);
  check(std::memcmp(h.magic, kPackedMagic, sizeof h.magic) == 0, op,
        ": expected a weight packed by torch_ext::pack_linear_weight, got bytes without its header");
  check(h.version == kPackedVersion, op, ": the weight was packed in format ", h.version,
        ", this torch_ext reads format ", kPackedVersion, "; pack it again");
  const bool has_metadata = h.metadata_bytes <= bytes - sizeof h;
  check(has_metadata && header_checksum(h, h.metadata_bytes ? data + sizeof h : nullptr) == h.checksum, op,
        ": the packed weight is damaged: its header has another checksum than it says; pack it again");
  const size_t offset = payload_offset(h);
  check(h.n > 0 && h.k > 0 && offset <= bytes && h.payload_bytes <= bytes - offset, op,
        ": the packed weight is damaged: its header says [", h.n, ", ", h.k, "] in ", h.payload_bytes, " bytes after ",
        offset, ", there are ", bytes);
  return h;
}

void check_layout(const char* op, const PackedHeader& h, Layout layout, size_t nr, size_t kr, const char* isa) {
  check(h.layout == layout && h.nr == nr && h.kr == kr, op, ": the weight is packed as ", layout_name(h.layout), " ",
        h.nr, "x", h.kr, ", but TORCH_EXT_ISA ", isa, " takes ", layout_name(layout), " ", nr, "x", kr,
        "; pack it again in this process");
}

void write_packed_header(const PackedHeader& h, const void* metadata, char* data) {
  std::memset(data, 0, payload_offset(h));
  PackedHeader checked = h;
  checked.checksum = header_checksum(h, metadata);
  std::memcpy(data, &checked, sizeof checked);
  if (h.metadata_bytes) std::memcpy(data + sizeof h, metadata, static_cast<size_t>(h.metadata_bytes));
}

}  // namespace torch_ext
