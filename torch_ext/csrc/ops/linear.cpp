// pack_linear_weight, unpack_linear_weight, linear.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "gemm.h"
#include "ops/onednn.h"
#include "ops/ops.h"
#include "ops/packed.h"

namespace torch_ext {

namespace {

namespace stable = torch::stable;
using torch::headeronly::IntHeaderOnlyArrayRef;

// ---- views of packed weights ----------------------------------------------------------------------------------------

Tensor plain_view(const Packed& p) {
  const int64_t sizes[] = {static_cast<int64_t>(p.header.n), static_cast<int64_t>(p.header.k)};
  const int64_t strides[] = {sizes[1], 1};
  return stable::from_blob(p.payload(), IntHeaderOnlyArrayRef(sizes, 2), IntHeaderOnlyArrayRef(strides, 2),
                           stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Float);
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

void linear_own(const LinearCall& call, const Packed& packed, const GemmKernel& kernel, const Tensor& out) {
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
  parallel_tasks(plan.tasks(), [&](size_t task) { run_gemm_task(kernel, *dispatch().vec, problem, plan, task); });
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
    const size_t bytes = static_cast<size_t>(call.m * call.k) * sizeof(bf16);
    char* const data = static_cast<char*>(filled.mutable_data_ptr());
    std::memcpy(data, x.const_data_ptr(), bytes);
    std::memset(data + bytes, 0, static_cast<size_t>(rows * call.k) * sizeof(bf16) - bytes);
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
  const bool fused = onednn_fuses(call.activation);
  Tensor product = onednn_linear(x, weight, bias, fused ? call.activation : Activation::kNone, nullptr);
  if (rows != call.m) product = stable::narrow(product, 0, 0, call.m);
  return finish(call, product, fused, call.x);
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

// Symmetric, each row by its largest magnitude.
void quantize_rows(const float* weight, size_t n, size_t k, int8_t* q, float* scales) {
  for (size_t j = 0; j < n; ++j) {
    const float* const row = weight + j * k;
    float largest = 0.0f;
    for (size_t p = 0; p < k; ++p) {
      const float x = std::fabs(row[p]);
      STD_TORCH_CHECK(std::isfinite(x), "pack_linear_weight_int8: weight row ", j,
                      " holds a number that is not finite");
      largest = std::max(largest, x);
    }
    const float inverse = largest < 4e-37f ? 0.0f : 127.0f / largest;
    scales[j] = largest < 4e-37f ? 0.0f : largest / 127.0f;
    for (size_t p = 0; p < k; ++p) q[j * k + p] = static_cast<int8_t>(std::lrintf(row[p] * inverse));
  }
}

}  // namespace

namespace {

/// A weight [N, K] as panels of a kernel of ours.
Tensor pack_for(const GemmKernel& kernel, const Tensor& weight, DType type) {
  const size_t n = static_cast<size_t>(weight.size(0)), k = static_cast<size_t>(weight.size(1));
  // Columns that are adjacent, as in x @ w, are packed without a copy, too; anything else is made [N, K] first.
  const bool nxk = weight.stride(1) == 1, kxn = !nxk && weight.stride(0) == 1;
  const Tensor source = nxk || kxn ? weight : stable::contiguous(weight);
  const auto pack_panels = kxn ? pack_weight_panels_kxn : pack_weight_panels;
  char* payload = nullptr;
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

/// The weight [N, K] in panels of a kernel of ours, in their type.
Tensor unpack_from(const char* op, const GemmKernel& kernel, const Packed& packed, const Tensor& like) {
  check_layout(op, packed.header, kernel.layout, kernel.nr, kernel.kr);
  const int64_t n = static_cast<int64_t>(packed.header.n), k = static_cast<int64_t>(packed.header.k);
  const Tensor weight = new_tensor(like, {n, k}, scalar_type(kernel.rhs_type));
  unpack_weight(kernel, static_cast<size_t>(n), static_cast<size_t>(k), packed.payload(), weight.mutable_data_ptr());
  return weight;
}

}  // namespace

Tensor linear_by_torch(const Tensor& x, const Packed& packed, const Tensor& bias, Activation activation) {
  const auto n = static_cast<int64_t>(packed.header.n), k = static_cast<int64_t>(packed.header.k);
  const LinearCall call{.x = x,
                        .m = x.size(0),
                        .n = n,
                        .k = k,
                        .ld = k,
                        .bias = bias,
                        .activation = activation,
                        .out_type = DType::kBF16};
  return packed.header.layout == Layout::kOnednn ? linear_onednn(call, packed) : linear_torch(call, packed);
}

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
    case LinearEngine::kOwn:
      return pack_for(*dispatch().gemm_bf16, weight, type);
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
  switch (linear_engine()) {
    case LinearEngine::kOwn:
      return unpack_from(op, *dispatch().gemm_bf16, packed, packed_tensor);
    case LinearEngine::kOnednn:
      check_layout(op, packed.header, Layout::kOnednn, 0, 0);
      return as_contiguous(onednn_to_dense(opaque_view(packed)));
    case LinearEngine::kTorch:
      break;
  }
  check_layout(op, packed.header, Layout::kPlain, 0, 0);
  return stable::to(plain_view(packed), ScalarType::BFloat16);
}

Tensor pack_linear_weight_fp32(const Tensor& weight) {
  const char* const op = "_pack_linear_weight_fp32";
  check_cpu(op, "weight", weight);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) > 0, op,
                  ": expected weight [N, K] with N and K at least 1, got ", describe(weight));
  return pack_for(*dispatch().gemm_f32, weight, float_type(op, "weight", weight));
}

Tensor unpack_linear_weight_fp32(const Tensor& packed_tensor) {
  const char* const op = "_unpack_linear_weight_fp32";
  return unpack_from(op, *dispatch().gemm_f32, read_packed(op, packed_tensor), packed_tensor);
}

Tensor pack_linear_weight_int8(const Tensor& weight, const std::optional<Tensor>& scale) {
  const char* const op = "pack_linear_weight_int8";
  check_cpu(op, "weight", weight);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) > 0 && weight.size(1) <= kMaxS8Products, op,
                  ": expected weight [N, K] with N and K at least 1 and K at most ", kMaxS8Products, ", got ",
                  describe(weight));
  const bool quantized = weight.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(quantized == scale.has_value(), op,
                  ": expected an i8 weight with its scale, or an fp32 or bf16 weight without one, got ",
                  describe(weight), scale ? " and a scale" : " and no scale");
  const size_t n = static_cast<size_t>(weight.size(0)), k = static_cast<size_t>(weight.size(1));
  const GemmKernel& kernel = *dispatch().gemm_s8;
  char* payload = nullptr;
  const Tensor packed = new_packed(
      weight, make_packed_header(kernel.layout, n, k, kernel.nr, kernel.kr, 0, packed_payload_bytes(kernel, n, k)),
      nullptr, &payload);
  Tensor q = weight, scales = weight;
  if (quantized) {
    q = as_contiguous(weight);
    scales = as_f32_vector(op, "scale", *scale, weight.size(0));
    const float* const s = static_cast<const float*>(scales.const_data_ptr());
    for (size_t j = 0; j < n; ++j) {
      STD_TORCH_CHECK(std::isfinite(s[j]) && s[j] >= 0.0f, op,
                      ": expected scales that are finite and not negative, got ", s[j], " at ", j);
    }
    const int8_t* const p = static_cast<const int8_t*>(q.const_data_ptr());
    STD_TORCH_CHECK(std::find(p, p + n * k, int8_t{-128}) == p + n * k, op,
                    ": expected a symmetric weight, from -127 to 127, got -128");
  } else {
    float_type(op, "weight", weight);
    const Tensor wide =
        as_contiguous(weight.scalar_type() == ScalarType::Float ? weight : stable::to(weight, ScalarType::Float));
    q = new_tensor(weight, {weight.size(0), weight.size(1)}, ScalarType::Char);
    scales = new_tensor(weight, {weight.size(0)}, ScalarType::Float);
    quantize_rows(static_cast<const float*>(wide.const_data_ptr()), n, k, static_cast<int8_t*>(q.mutable_data_ptr()),
                  static_cast<float*>(scales.mutable_data_ptr()));
  }
  const int8_t* const data = static_cast<const int8_t*>(q.const_data_ptr());
  const float* const scale_data = static_cast<const float*>(scales.const_data_ptr());
  stable::parallel_for(0, static_cast<int64_t>(kernel.panels(n)), 8, [&](int64_t begin, int64_t end) {
    pack_weight_panels_s8(kernel, n, k, data, scale_data, payload, static_cast<size_t>(begin),
                          static_cast<size_t>(end));
  });
  return packed;
}

std::tuple<Tensor, Tensor> unpack_linear_weight_int8(const Tensor& packed_tensor) {
  const char* const op = "unpack_linear_weight_int8";
  const Packed packed = read_packed(op, packed_tensor);
  const GemmKernel& kernel = *dispatch().gemm_s8;
  check_layout(op, packed.header, kernel.layout, kernel.nr, kernel.kr);
  const int64_t n = static_cast<int64_t>(packed.header.n), k = static_cast<int64_t>(packed.header.k);
  const Tensor weight = new_tensor(packed_tensor, {n, k}, ScalarType::Char);
  const Tensor scale = new_tensor(packed_tensor, {n}, ScalarType::Float);
  unpack_weight_s8(kernel, static_cast<size_t>(n), static_cast<size_t>(k), packed.payload(),
                   static_cast<int8_t*>(weight.mutable_data_ptr()), static_cast<float*>(scale.mutable_data_ptr()));
  return {weight, scale};
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

  LinearCall call{.x = x,
                  .m = m,
                  .n = n,
                  .k = k,
                  .ld = k,
                  .bias = bias,
                  .activation = parse_activation("linear", activation),
                  .out_type = x_type};
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
  const GemmKernel* const own = own_kernel(packed.header.layout);
  if (rows_adjacent && own) {
    call.ld = x.stride(0);
  } else if (!x.is_contiguous()) {
    call.x = stable::contiguous(x);
  }

  if (own) {
    const Tensor out = stable::new_empty(x, out_sizes, scalar_type(call.out_type));
    linear_own(call, packed, *own, out);
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
