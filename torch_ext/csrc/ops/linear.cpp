// pack_linear_weight, unpack_linear_weight, linear.
#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "gemm.h"
#include "ops/onednn.h"
#include "ops/ops.h"
#include "packing/packed_weight.h"

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

namespace {

namespace stable = torch::stable;
using torch::headeronly::IntHeaderOnlyArrayRef;

Activation parse_activation(const std::string& name) {
  static constexpr const char* kNames[kActivationCount] = {"none", "gelu", "gelu_tanh", "relu", "tanh", "silu"};
  for (size_t i = 0; i < kActivationCount; ++i) {
    if (name == kNames[i]) return static_cast<Activation>(i);
  }
  STD_TORCH_CHECK(false, "linear: expected activation none, gelu, gelu_tanh, relu, tanh or silu, got '", name, "'");
  return Activation::kNone;
}

// ---- packed tensors -------------------------------------------------------------------------------------------------

struct Packed {
  PackedHeader header;
  char* data;
  char* payload() const { return data + payload_offset(header); }
  const uint8_t* metadata() const { return reinterpret_cast<const uint8_t*>(data) + sizeof(PackedHeader); }
};

Packed read_packed(const char* op, const Tensor& packed) {
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.dim() == 2 &&
                      packed.is_contiguous() && packed.numel() >= static_cast<int64_t>(sizeof(PackedHeader)),
                  op, ": expected a weight packed by torch_ext::pack_linear_weight, got ", describe(packed));
  Packed p;
  p.data = static_cast<char*>(const_cast<void*>(packed.const_data_ptr()));
  std::memcpy(&p.header, p.data, sizeof p.header);
  const PackedHeader& h = p.header;
  STD_TORCH_CHECK(std::memcmp(h.magic, kPackedMagic, sizeof h.magic) == 0, op,
                  ": expected a weight packed by torch_ext::pack_linear_weight, got ", describe(packed),
                  " without its header");
  STD_TORCH_CHECK(h.version == kPackedVersion, op, ": the weight was packed in format ", h.version,
                  ", this torch_ext reads format ", kPackedVersion, "; pack it again");
  STD_TORCH_CHECK(static_cast<int64_t>(h.n) == packed.size(0) &&
                      payload_offset(h) + h.payload_bytes <= static_cast<uint64_t>(packed.numel()),
                  op, ": the packed weight is damaged: its header says [", h.n, ", ", h.k, "], its shape is ",
                  describe(packed));
  return p;
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
  std::memcpy(data, &h, sizeof h);
  if (h.metadata_bytes) std::memcpy(data + sizeof h, metadata, h.metadata_bytes);
  // The bytes that round the last row up.
  std::memset(data + bytes, 0, static_cast<size_t>(packed.numel() - bytes));
  *payload = data + payload_offset(h);
  return packed;
}

Tensor plain_view(const Packed& p) {
  const int64_t sizes[] = {static_cast<int64_t>(p.header.n), static_cast<int64_t>(p.header.k)};
  const int64_t strides[] = {sizes[1], 1};
  return stable::from_blob(p.payload(), IntHeaderOnlyArrayRef(sizes, 2), IntHeaderOnlyArrayRef(strides, 2),
                           stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Float);
}

Tensor opaque_view(const Packed& p) {
  return onednn_view(p.payload(), static_cast<int64_t>(p.header.n), static_cast<int64_t>(p.header.k), p.metadata(),
                     static_cast<size_t>(p.header.metadata_bytes));
}

// ---- linear on each engine ------------------------------------------------------------------------------------------

struct LinearCall {
  Tensor x;  // [m, k], last dimension adjacent
  int64_t m, n, k, ld;
  std::optional<Tensor> bias;
  std::optional<Tensor> residual;  // [m, n] contiguous
  Activation activation;
  DType out_type;
};

Epilogue make_epilogue(const LinearCall& call, const float* bias, const Tensor& out) {
  Epilogue ep;
  ep.bias = bias;
  if (call.residual) {
    ep.residual = call.residual->const_data_ptr();
    ep.residual_type = float_type("linear", "residual", *call.residual);
    ep.ld_residual = static_cast<size_t>(call.n);
  }
  ep.out = out.mutable_data_ptr();
  ep.ld_out = static_cast<size_t>(call.n);
  ep.out_type = call.out_type;
  return ep;
}

void linear_own(const LinearCall& call, const Packed& packed, const Tensor& out) {
  const Dispatch& d = dispatch();
  const GemmKernel& kernel = *d.isa->gemm;
  check_layout("linear", packed.header, kernel.layout, kernel.nr, kernel.kr);
  std::optional<Tensor> bias;
  if (call.bias) bias = as_f32_vector("linear", "bias", *call.bias, call.n);
  GemmProblem problem;
  problem.m = static_cast<size_t>(call.m);
  problem.n = static_cast<size_t>(call.n);
  problem.k = static_cast<size_t>(call.k);
  problem.lhs = call.x.const_data_ptr();
  problem.ld_lhs = static_cast<size_t>(call.ld);
  problem.lhs_type = float_type("linear", "x", call.x);
  problem.panels = packed.payload();
  problem.activation = call.activation;
  problem.epilogue = make_epilogue(call, bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr, out);
  const GemmPlan plan = plan_gemm(kernel, problem.m, problem.n, problem.k, stable::get_num_threads());
  parallel_tasks(plan.tasks(), [&](size_t task) { run_gemm_task(kernel, *d.vec, problem, plan, task); });
}

// What is left to do on PyTorch's fp32 or bf16 product: activation, residual, conversion.
Tensor finish(const LinearCall& call, const Tensor& product, bool activated, const Tensor& like) {
  const Activation activation = activated ? Activation::kNone : call.activation;
  if (activation == Activation::kNone && !call.residual) {
    return product.scalar_type() == scalar_type(call.out_type) ? product
                                                               : stable::to(product, scalar_type(call.out_type));
  }
  const Tensor wide =
      as_contiguous(product.scalar_type() == ScalarType::Float ? product : stable::to(product, ScalarType::Float));
  const Tensor out = new_tensor(like, {call.m, call.n}, scalar_type(call.out_type));
  const Epilogue ep = make_epilogue(call, nullptr, out);
  const float* const tile = static_cast<const float*>(wide.const_data_ptr());
  const size_t n = static_cast<size_t>(call.n);
  const auto store = dispatch().vec->store_tile[static_cast<size_t>(activation)];
  stable::parallel_for(0, call.m, std::max<int64_t>(1, 16384 / std::max<int64_t>(call.n, 1)),
                       [&](int64_t begin, int64_t end) {
                         store(tile + static_cast<size_t>(begin) * n, n, static_cast<size_t>(end - begin), n, ep,
                               static_cast<size_t>(begin), 0);
                       });
  return out;
}

Tensor linear_onednn(const LinearCall& call, const Packed& packed) {
  check_layout("linear", packed.header, Layout::kOnednn, 0, 0);
  Tensor x =
      as_contiguous(call.x.scalar_type() == ScalarType::BFloat16 ? call.x : stable::to(call.x, ScalarType::BFloat16));
  const int64_t rows = onednn_preferred_rows(call.m);
  if (rows != call.m) {
    const Tensor filled = new_tensor(x, {rows, call.k}, ScalarType::BFloat16);
    const size_t bytes = static_cast<size_t>(call.m * call.k) * sizeof(uint16_t);
    char* const data = static_cast<char*>(filled.mutable_data_ptr());
    std::memcpy(data, x.const_data_ptr(), bytes);
    std::memset(data + bytes, 0, static_cast<size_t>(rows * call.k) * sizeof(uint16_t) - bytes);
    x = filled;
  }
  const Tensor weight = opaque_view(packed);
  std::optional<Tensor> adjacent_bias;  // PyTorch's fused linear does not look at strides
  if (call.bias) adjacent_bias = as_contiguous(*call.bias);
  const Tensor* const bias = adjacent_bias ? &*adjacent_bias : nullptr;
  // PyTorch fuses a residual where everything, the bias too, is bf16.
  const bool fuse_residual = rows == call.m && call.residual && call.activation == Activation::kNone &&
                             call.out_type == DType::kBF16 && call.residual->scalar_type() == ScalarType::BFloat16 &&
                             (!bias || bias->scalar_type() == ScalarType::BFloat16);
  if (fuse_residual) return onednn_linear(x, weight, bias, Activation::kNone, &*call.residual);
  Tensor product = onednn_linear(x, weight, bias, call.activation, nullptr);
  if (rows != call.m) product = stable::narrow(product, 0, 0, call.m);
  return finish(call, product, true, call.x);
}

Tensor linear_torch(const LinearCall& call, const Packed& packed) {
  check_layout("linear", packed.header, Layout::kPlain, 0, 0);
  // Rounded to bf16 like on every other engine, multiplied in fp32: CPUs that come here have no bf16 instructions.
  Tensor x = call.x;
  if (x.scalar_type() == ScalarType::Float) x = stable::to(x, ScalarType::BFloat16);
  x = stable::to(x, ScalarType::Float);
  std::optional<Tensor> bias;
  if (call.bias) bias = as_f32_vector("linear", "bias", *call.bias, call.n);
  std::array<StableIValue, 3> stack{stable::detail::from(x), stable::detail::from(plain_view(packed)),
                                    stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return finish(call, stable::detail::to<Tensor>(stack[0]), false, call.x);
}

}  // namespace

int64_t preferred_rows(int64_t rows) {
  STD_TORCH_CHECK(rows >= 0, "preferred_rows: expected rows of at least 0, got ", rows);
  return rows > 0 && linear_engine() == LinearEngine::kOnednn ? onednn_preferred_rows(rows) : rows;
}

Tensor pack_linear_weight(const Tensor& given, bool transposed) {
  const char* const op = "pack_linear_weight";
  check_cpu(op, "weight", given);
  STD_TORCH_CHECK(given.dim() == 2 && given.size(0) > 0 && given.size(1) > 0, op, ": expected weight ",
                  transposed ? "[K, N]" : "[N, K]", " with N and K at least 1, got ", describe(given));
  const DType type = float_type(op, "weight", given);
  const Tensor weight = transposed ? stable::transpose(given, 0, 1) : given;
  const size_t n = static_cast<size_t>(weight.size(0)), k = static_cast<size_t>(weight.size(1));
  char* payload = nullptr;
  switch (linear_engine()) {
    case LinearEngine::kOwn: {
      const GemmKernel& kernel = *dispatch().isa->gemm;
      // Columns that are adjacent, as in x @ w, are packed as they lie, too; anything else is made [N, K] first.
      const bool nxk = weight.stride(1) == 1, kxn = !nxk && weight.stride(0) == 1;
      const Tensor source = nxk || kxn ? weight : stable::contiguous(weight);
      const auto pack_panels = kxn ? pack_weight_panels_kxn : pack_weight_panels;
      const Tensor packed = new_packed(
          weight, make_packed_header(kernel.layout, n, k, kernel.nr, kernel.kr, 0, packed_payload_bytes(kernel, n, k)),
          nullptr, &payload);
      const void* const data = source.const_data_ptr();
      const size_t ld = static_cast<size_t>(source.stride(kxn ? 1 : 0));
      stable::parallel_for(0, static_cast<int64_t>(kernel.panels(n)), 8, [&](int64_t begin, int64_t end) {
        pack_panels(kernel, n, k, data, type, ld, payload, static_cast<size_t>(begin), static_cast<size_t>(end));
      });
      return packed;
    }
    case LinearEngine::kOnednn: {
      const Tensor narrow = as_contiguous(type == DType::kBF16 ? weight : stable::to(weight, ScalarType::BFloat16));
      const OnednnWeight w = onednn_reorder(narrow);
      const Tensor packed =
          new_packed(weight, make_packed_header(Layout::kOnednn, n, k, 0, 0, w.metadata.size(), w.bytes),
                     w.metadata.data(), &payload);
      std::memcpy(payload, w.tensor.data_ptr(), w.bytes);
      return packed;
    }
    case LinearEngine::kTorch:
      break;
  }
  const Tensor rounded = type == DType::kBF16 ? weight : stable::to(weight, ScalarType::BFloat16);
  const Tensor wide = as_contiguous(stable::to(rounded, ScalarType::Float));
  const Tensor packed =
      new_packed(weight, make_packed_header(Layout::kPlain, n, k, 0, 0, 0, n * k * sizeof(float)), nullptr, &payload);
  std::memcpy(payload, wide.const_data_ptr(), n * k * sizeof(float));
  return packed;
}

Tensor unpack_linear_weight(const Tensor& packed_tensor) {
  const char* const op = "unpack_linear_weight";
  const Packed packed = read_packed(op, packed_tensor);
  const int64_t n = static_cast<int64_t>(packed.header.n), k = static_cast<int64_t>(packed.header.k);
  switch (linear_engine()) {
    case LinearEngine::kOwn: {
      const GemmKernel& kernel = *dispatch().isa->gemm;
      check_layout(op, packed.header, kernel.layout, kernel.nr, kernel.kr);
      const Tensor weight = new_tensor(packed_tensor, {n, k}, ScalarType::BFloat16);
      unpack_weight(kernel, static_cast<size_t>(n), static_cast<size_t>(k), packed.payload(),
                    static_cast<uint16_t*>(weight.mutable_data_ptr()));
      return weight;
    }
    case LinearEngine::kOnednn:
      check_layout(op, packed.header, Layout::kOnednn, 0, 0);
      return as_contiguous(onednn_to_dense(opaque_view(packed)));
    case LinearEngine::kTorch:
      break;
  }
  check_layout(op, packed.header, Layout::kPlain, 0, 0);
  return stable::to(plain_view(packed), ScalarType::BFloat16);
}

Tensor linear(const Tensor& x, const Tensor& packed_tensor, const std::optional<Tensor>& bias,
              const std::string& activation, const std::optional<ScalarType>& out_dtype,
              const std::optional<Tensor>& residual) {
  const char* const op = "linear";
  check_cpu(op, "x", x);
  const DType x_type = float_type(op, "x", x);
  const Packed packed = read_packed(op, packed_tensor);
  const int64_t n = static_cast<int64_t>(packed.header.n), k = static_cast<int64_t>(packed.header.k);
  const int64_t dim = x.dim();
  STD_TORCH_CHECK(dim >= 1 && x.size(dim - 1) == k, op, ": expected x with K=", k, " (packed weight is ", n, "x", k,
                  "), got ", describe(x));
  STD_TORCH_CHECK(!out_dtype || *out_dtype == ScalarType::Float || *out_dtype == ScalarType::BFloat16, op,
                  ": expected out_dtype torch.float32 or torch.bfloat16");
  if (bias) {
    check_cpu(op, "bias", *bias);
    float_type(op, "bias", *bias);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, op, ": expected bias of shape [", n, "], got ",
                    describe(*bias));
  }

  std::vector<int64_t> sizes(static_cast<size_t>(dim));
  for (int64_t i = 0; i < dim; ++i) sizes[static_cast<size_t>(i)] = x.size(i);
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < dim; ++i) m *= sizes[static_cast<size_t>(i)];
  sizes.back() = n;
  const IntHeaderOnlyArrayRef out_sizes(sizes.data(), sizes.size());

  LinearCall call{x, m, n, k, k, bias, std::nullopt, parse_activation(activation), x_type};
  if (out_dtype) call.out_type = *out_dtype == ScalarType::Float ? DType::kF32 : DType::kBF16;
  if (residual) {
    check_cpu(op, "residual", *residual);
    float_type(op, "residual", *residual);
    bool same = residual->dim() == dim;
    for (int64_t i = 0; same && i < dim; ++i) same = residual->size(i) == sizes[static_cast<size_t>(i)];
    STD_TORCH_CHECK(same, op, ": expected residual of the output's shape, ", m, " rows of ", n, ", got ",
                    describe(*residual));
    call.residual = as_contiguous(*residual);
    if (dim != 2) {
      const int64_t flat[] = {m, n};
      call.residual = stable::view(*call.residual, IntHeaderOnlyArrayRef(flat, 2));
    }
  }
  if (m == 0) return stable::new_empty(x, out_sizes, scalar_type(call.out_type));

  const bool rows_adjacent = dim == 2 && x.stride(1) == 1 && x.stride(0) >= k;
  if (rows_adjacent && linear_engine() == LinearEngine::kOwn) {
    call.ld = x.stride(0);
  } else if (!x.is_contiguous()) {
    call.x = stable::contiguous(x);
  }

  if (linear_engine() == LinearEngine::kOwn) {
    const Tensor out = stable::new_empty(x, out_sizes, scalar_type(call.out_type));
    linear_own(call, packed, out);
    return out;
  }
  if (dim != 2) {
    const int64_t flat[] = {m, k};
    call.x = stable::view(call.x, IntHeaderOnlyArrayRef(flat, 2));
  }
  const Tensor out =
      linear_engine() == LinearEngine::kOnednn ? linear_onednn(call, packed) : linear_torch(call, packed);
  return dim == 2 ? out : stable::view(out, out_sizes);
}

}  // namespace torch_ext
