#include "ops/packed.h"

#include <cstring>

#include "ops/onednn.h"

namespace torch_ext {

LinearEngine linear_engine() {
  const LinearEngine engine = dispatch().isa->linear;
  if (engine == LinearEngine::kOnednn && !onednn_available()) {
    STD_TORCH_CHECK(!dispatch().forced,
                    "TORCH_EXT_ISA=onednn: this PyTorch has no prepacked bf16 linear on this CPU; "
                    "unset it or use TORCH_EXT_ISA=torch");
    return LinearEngine::kTorch;
  }
  return engine;
}

const GemmKernel* own_kernel(Layout layout) {
  const Dispatch& d = dispatch();
  if (is_s8(layout)) return d.gemm_s8;
  if (layout == Layout::kF32Rows) return d.gemm_f32;
  return linear_engine() == LinearEngine::kOwn ? d.gemm_bf16 : nullptr;
}

Packed read_packed(const char* op, char* data, size_t bytes) {
  Packed p;
  p.data = data;
  STD_TORCH_CHECK(bytes >= sizeof p.header, op, ": expected a packed weight, got ", bytes, " bytes");
  std::memcpy(&p.header, data, sizeof p.header);
  const PackedHeader& h = p.header;
  STD_TORCH_CHECK(std::memcmp(h.magic, kPackedMagic, sizeof h.magic) == 0, op,
                  ": expected a weight packed by torch_ext::pack_linear_weight, got bytes without its header");
  STD_TORCH_CHECK(h.version == kPackedVersion, op, ": the weight was packed in format ", h.version,
                  ", this torch_ext reads format ", kPackedVersion, "; pack it again");
  const bool has_metadata = h.metadata_bytes <= bytes - sizeof h;
  STD_TORCH_CHECK(has_metadata && header_checksum(h, h.metadata_bytes ? p.metadata() : nullptr) == h.checksum, op,
                  ": the packed weight is damaged: its header has another checksum than it says; pack it again");
  const size_t offset = payload_offset(h);
  STD_TORCH_CHECK(h.n > 0 && h.k > 0 && offset <= bytes && h.payload_bytes <= bytes - offset, op,
                  ": the packed weight is damaged: its header says [", h.n, ", ", h.k, "] in ", h.payload_bytes,
                  " bytes after ", offset, ", there are ", bytes);
  return p;
}

Packed read_packed(const char* op, const Tensor& packed) {
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.dim() == 2 &&
                      packed.is_contiguous() && packed.numel() >= static_cast<int64_t>(sizeof(PackedHeader)),
                  op, ": expected a weight packed by torch_ext::pack_linear_weight, got ", describe(packed));
  const Packed p = read_packed(op, static_cast<char*>(const_cast<void*>(packed.const_data_ptr())),
                               static_cast<size_t>(packed.numel()));
  STD_TORCH_CHECK(static_cast<int64_t>(p.header.n) == packed.size(0), op,
                  ": the packed weight is damaged: its header says [", p.header.n, ", ", p.header.k, "], its shape is ",
                  describe(packed));
  return p;
}

Tensor opaque_view(const Packed& p) {
  return onednn_view(p.payload(), static_cast<int64_t>(p.header.n), static_cast<int64_t>(p.header.k), p.metadata(),
                     static_cast<size_t>(p.header.metadata_bytes));
}

void check_layout(const char* op, const PackedHeader& h, Layout layout, size_t nr, size_t kr) {
  STD_TORCH_CHECK(h.layout == layout && h.nr == nr && h.kr == kr, op, ": the weight is packed as ",
                  layout_name(h.layout), " ", h.nr, "x", h.kr, ", but TORCH_EXT_ISA ", dispatch().isa->name, " takes ",
                  layout_name(layout), " ", nr, "x", kr, "; pack it again in this process");
}

Tensor new_packed(const Tensor& like, const PackedHeader& h, const uint8_t* metadata, char** payload) {
  const int64_t n = static_cast<int64_t>(h.n);
  const int64_t bytes = static_cast<int64_t>(payload_offset(h) + h.payload_bytes);
  Tensor packed = new_tensor(like, {n, (bytes + n - 1) / n}, ScalarType::Byte);
  char* const data = static_cast<char*>(packed.mutable_data_ptr());
  std::memset(data, 0, payload_offset(h));
  PackedHeader checked = h;
  checked.checksum = header_checksum(h, metadata);
  std::memcpy(data, &checked, sizeof checked);
  if (h.metadata_bytes) std::memcpy(data + sizeof h, metadata, h.metadata_bytes);
  // The bytes that round the last row up.
  std::memset(data + bytes, 0, static_cast<size_t>(packed.numel() - bytes));
  *payload = data + payload_offset(h);
  return packed;
}

}  // namespace torch_ext
