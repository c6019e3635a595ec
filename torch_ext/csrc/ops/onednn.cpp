#include "ops/onednn.h"

#include <algorithm>
#include <array>

// From torch/csrc/inductor/aoti_torch/c/shim_cpu.h, which a build for the stable ABI cannot include. PyTorch exports them
// where it was built with oneDNN; weak, so that the library loads elsewhere, too.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(AtenTensorHandle x, AtenTensorHandle weight,
                                                                      AtenTensorHandle* bias, const char* attribute,
                                                                      const double** scalars, int64_t scalar_count,
                                                                      const char** algorithm, AtenTensorHandle* out);
__attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise_binary(AtenTensorHandle x, AtenTensorHandle other,
                                                                             AtenTensorHandle weight,
                                                                             AtenTensorHandle* bias,
                                                                             const char* attribute,
                                                                             AtenTensorHandle* out);
}

namespace torch_ext {
namespace {

namespace stable = torch::stable;

struct FusedActivation {
  const char* attribute = nullptr;
  const char* algorithm = nullptr;
};

// PyTorch's names of the activations it fuses; without an attribute it does not.
constexpr FusedActivation fused_activation(Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return {.attribute = "none"};
    case Activation::kGelu:
      return {.attribute = "gelu", .algorithm = "none"};
    case Activation::kGeluTanh:
      return {.attribute = "gelu", .algorithm = "tanh"};
    case Activation::kRelu:
      return {.attribute = "relu"};
    case Activation::kTanh:
      return {.attribute = "tanh"};
    case Activation::kSilu:
      return {.attribute = "swish"};
    default:
      return {};
  }
}

bool query_available() {
  if (!aoti_torch_cpu__linear_pointwise || !aoti_torch_cpu__linear_pointwise_binary) return false;
  std::array<StableIValue, 1> stack{};
  if (torch_call_dispatcher("mkldnn::_is_mkldnn_bf16_supported", "", stack.data(), TORCH_ABI_VERSION) != 0) {
    return false;
  }
  return stable::detail::to<bool>(stack[0]);
}

}  // namespace

bool onednn_available() {
  static const bool available = query_available();
  return available;
}

bool onednn_fuses(Activation activation) { return fused_activation(activation).attribute != nullptr; }

int64_t onednn_preferred_rows(int64_t rows) {
  int64_t power = 1;
  while (power < rows) power *= 2;
  if (power <= 16) return power;
  const int64_t step = power <= 128 ? 16 : std::max<int64_t>(32, power / 16);
  return (rows + step - 1) / step * step;
}

OnednnWeight onednn_reorder(const Tensor& weight_bf16) {
  std::array<StableIValue, 2> reorder{stable::detail::from(weight_bf16),
                                      stable::detail::from(std::optional<int64_t>())};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("mkldnn::_reorder_linear_weight", "", reorder.data(), TORCH_ABI_VERSION));
  OnednnWeight w{stable::detail::to<Tensor>(reorder[0]), {}, 0};

  std::array<StableIValue, 1> metadata{stable::detail::from(w.tensor)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("mkldnn::_get_mkldnn_serialized_md", "", metadata.data(), TORCH_ABI_VERSION));
  const Tensor serialized = stable::detail::to<Tensor>(metadata[0]);
  const uint8_t* const p = static_cast<const uint8_t*>(serialized.const_data_ptr());
  w.metadata.assign(p, p + serialized.numel());

  std::array<StableIValue, 1> bytes{stable::detail::from(w.tensor)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mkldnn::_nbytes", "", bytes.data(), TORCH_ABI_VERSION));
  w.bytes = static_cast<size_t>(stable::detail::to<int64_t>(bytes[0]));
  return w;
}

Tensor onednn_view(void* data, int64_t n, int64_t k, const uint8_t* metadata, size_t metadata_bytes) {
  const int64_t sizes[] = {n, k}, strides[] = {k, 1};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob_v2(
      data, 2, sizes, strides, 0, aoti_torch_dtype_bfloat16(), aoti_torch_device_type_cpu(), 0, &handle,
      aoti_torch_layout__mkldnn(), metadata, static_cast<int64_t>(metadata_bytes)));
  return Tensor(handle);
}

Tensor onednn_to_dense(const Tensor& opaque) {
  std::array<StableIValue, 3> stack{stable::detail::from(opaque), stable::detail::from(std::optional<ScalarType>()),
                                    stable::detail::from(std::optional<bool>())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::to_dense", "", stack.data(), TORCH_ABI_VERSION));
  return stable::detail::to<Tensor>(stack[0]);
}

Tensor onednn_linear(const Tensor& x, const Tensor& opaque, const Tensor* bias, Activation activation,
                     const Tensor* residual) {
  AtenTensorHandle bias_handle = bias ? bias->get() : nullptr;
  AtenTensorHandle* const bias_argument = bias ? &bias_handle : nullptr;
  AtenTensorHandle out = nullptr;
  if (residual) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu__linear_pointwise_binary(x.get(), residual->get(), opaque.get(), bias_argument, "add", &out));
  } else {
    const FusedActivation fused = fused_activation(activation);
    STD_TORCH_CHECK(fused.attribute, "linear: PyTorch does not fuse ",
                    kActivationNames[static_cast<size_t>(activation)]);
    const char* algorithm = fused.algorithm;
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(x.get(), opaque.get(), bias_argument, fused.attribute,
                                                            nullptr, 0, algorithm ? &algorithm : nullptr, &out));
  }
  return Tensor(out);
}

}  // namespace torch_ext
