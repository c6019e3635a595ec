/// Packed weights as tensors: header checked, payload found.
#pragma once

#include "dispatch.h"
#include "ops/tensor_util.h"
#include "packing/packed_weight.h"

namespace torch_ext {

struct Packed {
  PackedHeader header;
  char* data;
  char* payload() const { return data + payload_offset(header); }
  const uint8_t* metadata() const { return reinterpret_cast<const uint8_t*>(data) + sizeof(PackedHeader); }
};

/// Throws unless `packed` is a packed weight of this version.
Packed read_packed(const char* op, const Tensor& packed);

/// The same for one that lies in `bytes` bytes at `data`, inside of another packed object.
Packed read_packed(const char* op, char* data, size_t bytes);

/// Throws unless the weight lies as this process' kernel takes it.
void check_layout(const char* op, const PackedHeader& h, Layout layout, size_t nr, size_t kr);

/// A packed weight with header and metadata, and where its payload belongs, which is not initialized.
Tensor new_packed(const Tensor& like, const PackedHeader& h, const uint8_t* metadata, char** payload);

/// oneDNN's view of a weight in layout kOnednn, valid as long as its bytes are.
Tensor opaque_view(const Packed& p);

/// act(x W^T + bias) for a weight in layout kOnednn or kPlain, by PyTorch's own linear: x bf16 [m, k] -> bf16 [m, n].
Tensor linear_by_torch(const Tensor& x, const Packed& packed, const Tensor& bias, Activation activation);

/// The kernels of ours for weights of the kind that lie in `layout` (s8, fp32 or bf16); null where PyTorch multiplies.
const GemmKernel* own_kernel(Layout layout);

/// Who computes linear layers of bf16 weights in this process. Throws if TORCH_EXT_ISA asks for what this PyTorch lacks.
LinearEngine linear_engine();

}  // namespace torch_ext
