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

const GemmKernel* own_kernel(Layout layout) { return own_kernel(dispatch(), linear_engine(), layout); }

Packed read_packed(const char* op, char* data, size_t bytes) { return {read_packed_header(op, data, bytes), data}; }

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
  check_layout(op, h, layout, nr, kr, dispatch().isa->name);
}

Tensor new_packed(const Tensor& like, const PackedHeader& h, const uint8_t* metadata, char** payload) {
  const int64_t n = static_cast<int64_t>(h.n);
  const int64_t bytes = static_cast<int64_t>(payload_offset(h) + h.payload_bytes);
  Tensor packed = new_tensor(like, {n, (bytes + n - 1) / n}, ScalarType::Byte);
  char* const data = static_cast<char*>(packed.mutable_data_ptr());
  write_packed_header(h, metadata, data);
  // The bytes that round the last row up.
  std::memset(data + bytes, 0, static_cast<size_t>(packed.numel() - bytes));
  *payload = data + payload_offset(h);
  return packed;
}

}  // namespace torch_ext
