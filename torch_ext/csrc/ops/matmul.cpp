// matmul, bmm, addmm: products of two tensors, neither of which is packed beforehand. Nothing is kept after a call.
//
// fp32 products, and all on engines without kernels of ours, are PyTorch's own. It is called through the dispatcher;
// torch_ext.accelerate() routes nothing back here, since it routes bf16 alone and products only on engines of ours.
// Longer than other files, since the three ops share how operands are read in place.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu_features.h"
#include "direct_product.h"
#include "dispatch.h"
#include "gemm.h"
#include "ops/ops.h"
#include "ops/packed.h"

// From torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h, which a build for the stable ABI cannot include. The
// dispatcher's stable entry takes no Scalar, so aten::addmm is out of its reach. Weak, so that the library loads anyway.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle out, AtenTensorHandle bias,
                                                              AtenTensorHandle a, AtenTensorHandle b, double beta,
                                                              double alpha);
}

namespace torch_ext {
namespace {

namespace stable = torch::stable;
using torch::headeronly::IntHeaderOnlyArrayRef;
using Sizes = std::vector<int64_t>;

// A packed right-hand side of up to half of the second-level cache stays in the thread's scratch memory, beside the rows; a
// larger one is packed by all threads together.
size_t rhs_scratch_bytes() { return second_level_cache_bytes() / 2; }
// Most memory that right-hand sides packed together take, unless a single one is larger.
constexpr size_t kSharedRhsBytes = 64 * 1024 * 1024;

Tensor new_tensor_of(const Tensor& like, const Sizes& sizes, ScalarType type) {
  return stable::new_empty(like, IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), type);
}

/// fn(item) for item in [0, count), in `parts` contiguous parts of equal size, one thread each.
template <typename F>
void parallel_parts(size_t parts, size_t count, const F& fn) {
  parts = std::min(parts, count);
  if (parts == 0) return;
  parallel_tasks(parts, [&](size_t part) {
    for (size_t i = count * part / parts; i < count * (part + 1) / parts; ++i) fn(i);
  });
}

// ---- operands -------------------------------------------------------------------------------------------------------

/// A tensor as a batch of matrices; strides in elements.
struct Matrices {
  Tensor tensor;
  Sizes batch, batch_strides;
  int64_t rows, cols, row_stride, col_stride;

  const char* data() const { return static_cast<const char*>(tensor.const_data_ptr()); }
};

/// The last two dimensions are the matrix. One dimension is a row on the left side and a column on the right.
Matrices as_matrices(const Tensor& t, bool left) {
  const int64_t dim = t.dim();
  if (dim == 1) {
    const int64_t size = t.size(0), stride = t.stride(0);
    return {.tensor = t,
            .batch = {},
            .batch_strides = {},
            .rows = left ? 1 : size,
            .cols = left ? size : 1,
            .row_stride = left ? 0 : stride,
            .col_stride = left ? stride : 0};
  }
  Matrices m{.tensor = t,
             .batch = {},
             .batch_strides = {},
             .rows = t.size(dim - 2),
             .cols = t.size(dim - 1),
             .row_stride = t.stride(dim - 2),
             .col_stride = t.stride(dim - 1)};
  for (int64_t i = 0; i + 2 < dim; ++i) {
    m.batch.push_back(t.size(i));
    m.batch_strides.push_back(t.stride(i));
  }
  return m;
}

/// Rows whose elements are adjacent.
Matrices left_operand(const Tensor& t) {
  const Matrices m = as_matrices(t, true);
  return m.col_stride == 1 || m.cols == 1 ? m : as_matrices(stable::contiguous(t), true);
}

/// Rows or columns whose elements are adjacent.
Matrices right_operand(const Tensor& t) {
  const Matrices m = as_matrices(t, false);
  const bool adjacent = m.row_stride == 1 || m.col_stride == 1 || m.rows == 1 || m.cols == 1;
  return adjacent ? m : as_matrices(stable::contiguous(t), false);
}

bool is_transposed(const Matrices& right) {
  if (right.row_stride == 1) return right.col_stride != 1 || right.cols == 1;
  return right.rows == 1 && right.col_stride != 1;
}

Sizes broadcast(const char* op, const Tensor& a, const Tensor& b, const Sizes& left, const Sizes& right) {
  Sizes sizes(std::max(left.size(), right.size()), 1);
  for (size_t i = 0; i < sizes.size(); ++i) {
    const int64_t l = i < left.size() ? left[left.size() - 1 - i] : 1;
    const int64_t r = i < right.size() ? right[right.size() - 1 - i] : 1;
    STD_TORCH_CHECK(l == r || l == 1 || r == 1, op, ": expected batch dimensions that broadcast, got ", describe(a),
                    " and ", describe(b));
    sizes[sizes.size() - 1 - i] = l == 1 ? r : l;
  }
  return sizes;
}

/// Offset of each matrix of the broadcast batch in the operand, in elements.
Sizes batch_offsets(const Sizes& batch, const Matrices& m) {
  Sizes offsets(1, 0);
  for (size_t i = 0; i < batch.size(); ++i) {
    const size_t missing = batch.size() - m.batch.size();
    const int64_t stride = i < missing || m.batch[i - missing] == 1 ? 0 : m.batch_strides[i - missing];
    Sizes next;
    next.reserve(offsets.size() * static_cast<size_t>(batch[i]));
    for (const int64_t offset : offsets) {
      for (int64_t j = 0; j < batch[i]; ++j) next.push_back(offset + j * stride);
    }
    offsets.swap(next);
  }
  return offsets;
}

/// Makes the left side's batch more rows of one matrix, where its rows are equally far apart.
bool fold_batch(Matrices& left) {
  int64_t stride = left.row_stride, rows = left.rows;
  for (size_t i = left.batch.size(); i-- > 0;) {
    if (left.batch[i] == 1) continue;
    if (rows == 1) {
      stride = left.batch_strides[i];
    } else if (left.batch_strides[i] != stride * rows) {
      return false;
    }
    rows *= left.batch[i];
  }
  left.rows = rows;
  left.row_stride = stride;
  left.batch.clear();
  left.batch_strides.clear();
  return true;
}

// ---- products on kernels of ours ------------------------------------------------------------------------------------

/// A batch of bf16 products; at least one, none empty.
struct Product {
  size_t m, n, k;
  const char *lhs, *rhs;
  size_t ld_lhs, ld_rhs;
  bool transposed;  ///< the right-hand side lies [n, k] in memory, not [k, n]
  /// One product of the batch: elements from the start of each operand and of the output.
  struct Item {
    int64_t lhs, rhs;
    size_t out;
  };
  std::vector<Item> items;   ///< those of the same right-hand side one after the other
  std::vector<size_t> ends;  ///< past the last item of each right-hand side
};

constexpr size_t kElement = sizeof(bf16);

Epilogue offset_epilogue(const Epilogue& ep, size_t elements) {
  Epilogue at = ep;
  at.out = static_cast<char*>(ep.out) + elements * dtype_bytes(ep.out_type);
  return at;
}

/// Few rows: see direct_product.h.
void run_direct(const Product& p, const VecKernels& vec, const Epilogue& ep, size_t parts) {
  constexpr size_t kUnit = 32;  // columns: a cache line of bf16
  const size_t units = (p.n + kUnit - 1) / kUnit;
  const size_t splits = std::min(units, (parts + p.items.size() - 1) / p.items.size());
  const GemmKernel& widener = *dispatch().gemm_f32;
  const size_t ld = widener.steps(p.k) * widener.k_step;
  parallel_parts(parts, p.items.size() * splits, [&](size_t task) {
    const Product::Item& item = p.items[task / splits];
    const size_t split = task % splits;
    const size_t first = units * split / splits * kUnit, last = std::min(p.n, units * (split + 1) / splits * kUnit);
    float* const lhs = static_cast<float*>(thread_scratch(ScratchSlot::kLhs, p.m * ld * sizeof(float)));
    float* const tile = static_cast<float*>(thread_scratch(ScratchSlot::kRhs, p.m * (last - first) * sizeof(float)));
    widener.pack_lhs_bf16(p.m, p.m, p.k, p.lhs + item.lhs * int64_t{kElement}, p.ld_lhs, lhs);
    direct_product(p.m, p.k, lhs, ld, reinterpret_cast<const bf16*>(p.rhs) + item.rhs, p.ld_rhs, p.transposed, first,
                   last - first, tile);
    vec.store_tile[static_cast<size_t>(Activation::kNone)](tile, last - first, p.m, last - first,
                                                           offset_epilogue(ep, item.out), 0, first);
  });
}

void run_product(const Product& p, const Epilogue& ep) {
  const Dispatch& d = dispatch();
  const GemmKernel& kernel = *d.gemm_bf16;
  const size_t threads = stable::get_num_threads();
  const size_t macs = p.items.size() * p.m * p.n * p.k;
  const size_t parts = std::min(threads, std::max<size_t>(1, macs / kMinTaskMacs));
  if (direct_product_wins(kernel, p.m)) {
    run_direct(p, *d.vec, ep, parts);
    return;
  }

  const size_t payload = packed_payload_bytes(kernel, p.n, p.k), panels = kernel.panels(p.n);
  const auto pack = [&](size_t source, size_t first, size_t last, void* to) {
    const Product::Item& item = p.items[p.ends[source] - 1];
    (p.transposed ? pack_weight_panels : pack_weight_panels_kxn)(kernel, p.n, p.k, p.rhs + item.rhs * int64_t{kElement},
                                                                 DType::kBF16, p.ld_rhs, to, first, last);
  };
  const auto multiply = [&](const Product::Item& item, const void* packed, const GemmPlan& plan, size_t task) {
    GemmProblem problem;
    problem.m = p.m;
    problem.n = p.n;
    problem.k = p.k;
    problem.lhs = p.lhs + item.lhs * int64_t{kElement};
    problem.ld_lhs = p.ld_lhs;
    problem.lhs_type = DType::kBF16;
    problem.panels = packed;
    problem.epilogue = offset_epilogue(ep, item.out);
    run_gemm_task(kernel, *d.vec, problem, plan, task);
  };
  const auto first_item = [&](size_t source) { return source == 0 ? 0 : p.ends[source - 1]; };

  // Each thread packs the right-hand sides of its own products, if there are enough of them.
  const size_t sources = p.ends.size();
  if (payload <= rhs_scratch_bytes() && (parts == 1 || sources % parts == 0 || sources >= 4 * parts)) {
    parallel_parts(parts, sources, [&](size_t source) {
      void* const packed = thread_scratch(ScratchSlot::kRhs, payload);
      pack(source, 0, panels, packed);
      for (size_t i = first_item(source); i < p.ends[source]; ++i) multiply(p.items[i], packed, GemmPlan(), 0);
    });
    return;
  }

  // Otherwise all threads pack some of them, then multiply.
  const size_t round = std::clamp<size_t>(kSharedRhsBytes / payload, 1, sources);
  const std::unique_ptr<char, decltype(&std::free)> memory(
      static_cast<char*>(std::aligned_alloc(kPackedAlignment, round_up(round * payload, kPackedAlignment))),
      &std::free);
  STD_TORCH_CHECK(memory, "matmul: out of memory for a packed operand of ", round * payload, " bytes");
  char* const packed = memory.get();
  for (size_t begin = 0; begin < sources; begin += round) {
    const size_t end = std::min(sources, begin + round);
    const size_t first = first_item(begin), count = p.ends[end - 1] - first;
    const GemmPlan plan = plan_gemm(kernel, p.m, p.n, p.k, (parts + count - 1) / count);
    if (plan.row_tasks == 1 && count == end - begin) {
      // Every panel belongs to one task, which packs it right before it reads it.
      parallel_parts(parts, count * plan.tasks(), [&](size_t task) {
        const size_t i = task / plan.tasks();
        const PanelRange range = task_panels(kernel, p.n, plan, task % plan.tasks());
        pack(begin + i, range.first, range.last, packed + i * payload);
        multiply(p.items[first + i], packed + i * payload, plan, task % plan.tasks());
      });
      continue;
    }
    parallel_parts(parts, (end - begin) * panels, [&](size_t panel) {
      const size_t i = panel / panels;
      pack(begin + i, panel % panels, panel % panels + 1, packed + i * payload);
    });
    std::vector<size_t> source_of(count);
    for (size_t source = begin; source < end; ++source) {
      std::fill(source_of.begin() + static_cast<ptrdiff_t>(first_item(source) - first),
                source_of.begin() + static_cast<ptrdiff_t>(p.ends[source] - first), source - begin);
    }
    parallel_parts(parts, count * plan.tasks(), [&](size_t task) {
      const size_t i = task / plan.tasks();
      multiply(p.items[first + i], packed + source_of[i] * payload, plan, task % plan.tasks());
    });
  }
}

/// left [batch..., m, k] times right [batch..., k, n], stored by the epilogue, whose output is contiguous [batch..., m, n].
void multiply_own(Matrices left, const Matrices& right, const Sizes& batch, const Epilogue& epilogue) {
  Epilogue ep = epilogue;
  Sizes items = batch;
  const bool one_right = std::all_of(right.batch.begin(), right.batch.end(), [](int64_t size) { return size == 1; });
  if (one_right && fold_batch(left)) items.clear();
  const bool transposed = is_transposed(right);
  Product p{
      .m = static_cast<size_t>(left.rows),
      .n = static_cast<size_t>(right.cols),
      .k = static_cast<size_t>(left.cols),
      .lhs = left.data(),
      .rhs = right.data(),
      .ld_lhs = static_cast<size_t>(left.row_stride),
      .ld_rhs = static_cast<size_t>(transposed ? right.col_stride : right.row_stride),
      .transposed = transposed,
      .items = {},
      .ends = {},
  };
  const Sizes lhs = batch_offsets(items, left);
  const Sizes rhs = items.empty() ? Sizes(1, 0) : batch_offsets(items, right);
  for (size_t i = 0; i < lhs.size(); ++i) p.items.push_back({lhs[i], rhs[i], i * p.m * p.n});
  std::stable_sort(p.items.begin(), p.items.end(), [](const auto& x, const auto& y) { return x.rhs < y.rhs; });
  for (size_t i = 1; i <= p.items.size(); ++i) {
    if (i == p.items.size() || p.items[i].rhs != p.items[i - 1].rhs) p.ends.push_back(i);
  }
  ep.ld_out = p.n;
  run_product(p, ep);
}

// ---- products of PyTorch --------------------------------------------------------------------------------------------

Tensor to_type(const Tensor& t, ScalarType type) { return t.scalar_type() == type ? t : stable::to(t, type); }

Tensor multiply_torch(const Tensor& a, const Tensor& b, ScalarType out_type) {
  // PyTorch's bf16 product does not give out its fp32 sums, and computes in fp32 what the CPU has no instructions for.
  const bool widen = a.scalar_type() == ScalarType::BFloat16 &&
                     (out_type == ScalarType::Float || linear_engine() == LinearEngine::kTorch);
  const Tensor product =
      widen ? stable::matmul(stable::to(a, ScalarType::Float), stable::to(b, ScalarType::Float)) : stable::matmul(a, b);
  return to_type(product, out_type);
}

// ---- checks ---------------------------------------------------------------------------------------------------------

void check_operands(const char* op, const Tensor& a, const Tensor& b) {
  check_cpu(op, "a", a);
  check_cpu(op, "b", b);
  float_type(op, "a", a);
  float_type(op, "b", b);
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), op, ": expected a and b of one dtype, got ", describe(a), " and ",
                  describe(b), "; convert one with .to()");
}

bool is_own(const Tensor& a) {
  return a.scalar_type() == ScalarType::BFloat16 && linear_engine() == LinearEngine::kOwn;
}

Tensor multiply(const char* op, const Tensor& a, const Tensor& b, ScalarType out_type) {
  const int64_t da = a.dim(), db = b.dim();
  STD_TORCH_CHECK(da >= 1 && db >= 1, op, ": expected a [..., M, K] and b [..., K, N], got ", describe(a), " and ",
                  describe(b));
  const int64_t k = a.size(da - 1);
  STD_TORCH_CHECK(b.size(db == 1 ? 0 : db - 2) == k, op, ": expected b with K=", k, ", as a ends with, got ",
                  describe(a), " and ", describe(b));
  Matrices left = as_matrices(a, true), right = as_matrices(b, false);
  const Sizes batch = broadcast(op, a, b, left.batch, right.batch);
  Sizes sizes = batch;
  if (da > 1) sizes.push_back(left.rows);
  if (db > 1) sizes.push_back(right.cols);
  const int64_t numel = std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
  if (numel == 0) return new_tensor_of(a, sizes, out_type);
  if (k == 0) {
    Tensor out = new_tensor_of(a, sizes, out_type);
    stable::zero_(out);
    return out;
  }
  if (!is_own(a)) return multiply_torch(a, b, out_type);
  left = left_operand(a);
  right = right_operand(b);
  const Tensor out = new_tensor_of(a, sizes, out_type);
  Epilogue ep;
  ep.out = out.mutable_data_ptr();
  ep.out_type = out_type == ScalarType::Float ? DType::kF32 : DType::kBF16;
  multiply_own(left, right, batch, ep);
  return out;
}

// ---- addmm ----------------------------------------------------------------------------------------------------------

/// beta * bias, as the epilogue adds it: one fp32 row, or a matrix of any float type.
struct Addend {
  std::optional<Tensor> row, matrix;

  void put_into(Epilogue& ep) const {
    if (row) ep.bias = static_cast<const float*>(row->const_data_ptr());
    if (matrix) {
      ep.residual = matrix->const_data_ptr();
      ep.residual_type = matrix->scalar_type() == ScalarType::Float ? DType::kF32 : DType::kBF16;
      ep.ld_residual = static_cast<size_t>(matrix->stride(0));
    }
  }
};

Addend make_addend(const Tensor& bias, double beta, int64_t m, int64_t n) {
  Addend addend;
  if (beta == 0) return addend;
  const int64_t dim = bias.dim();
  const bool one_row = dim < 2 || bias.size(0) == 1;
  if (!one_row && beta == 1 && bias.size(1) == n && bias.stride(1) == 1) {
    addend.matrix = bias;
    return addend;
  }
  Tensor wide = new_tensor(bias, {one_row ? 1 : m, n}, ScalarType::Float);
  stable::copy_(wide, bias);
  if (beta != 1) {
    float* const data = static_cast<float*>(wide.mutable_data_ptr());
    const size_t count = static_cast<size_t>(wide.numel());
    const float factor = static_cast<float>(beta);
    dispatch().vec->scale_rows(1, count, data, count, &factor, data, count, DType::kF32);
  }
  (one_row ? addend.row : addend.matrix) = wide;
  return addend;
}

/// alpha * product + addend for an fp32 product that is overwritten.
void finish_addmm(const Tensor& product, double alpha, const Epilogue& ep) {
  const VecKernels& vec = *dispatch().vec;
  float* const tile = static_cast<float*>(product.mutable_data_ptr());
  const size_t n = static_cast<size_t>(product.size(1));
  const int64_t grain = std::max<int64_t>(1, 16384 / static_cast<int64_t>(n));
  stable::parallel_for(0, product.size(0), grain, [&](int64_t begin, int64_t end) {
    const size_t row = static_cast<size_t>(begin), rows = static_cast<size_t>(end - begin);
    float* const first = tile + row * n;
    const float factor = static_cast<float>(alpha);
    if (alpha != 1) vec.scale_rows(1, rows * n, first, rows * n, &factor, first, rows * n, DType::kF32);
    vec.store_tile[static_cast<size_t>(Activation::kNone)](first, n, rows, n, ep, row, 0);
  });
}

}  // namespace

Tensor matmul(const Tensor& a, const Tensor& b, const std::optional<ScalarType>& out_dtype) {
  const char* const op = "matmul";
  check_operands(op, a, b);
  STD_TORCH_CHECK(!out_dtype || *out_dtype == ScalarType::Float || *out_dtype == ScalarType::BFloat16, op,
                  ": expected out_dtype torch.float32 or torch.bfloat16");
  return multiply(op, a, b, out_dtype ? *out_dtype : a.scalar_type());
}

Tensor bmm(const Tensor& a, const Tensor& b) {
  const char* const op = "bmm";
  check_operands(op, a, b);
  STD_TORCH_CHECK(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(2) == b.size(1), op,
                  ": expected a [B, M, K] and b [B, K, N], got ", describe(a), " and ", describe(b));
  return multiply(op, a, b, a.scalar_type());
}

Tensor addmm(const Tensor& bias, const Tensor& a, const Tensor& b, double beta, double alpha) {
  const char* const op = "addmm";
  check_operands(op, a, b);
  check_cpu(op, "bias", bias);
  STD_TORCH_CHECK(bias.scalar_type() == a.scalar_type(), op, ": expected bias of the dtype of a and b, got ",
                  describe(bias), " and ", describe(a), "; convert it with .to()");
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), op, ": expected a [M, K] and b [K, N], got ",
                  describe(a), " and ", describe(b));
  const int64_t m = a.size(0), n = b.size(1), k = a.size(1), dim = bias.dim();
  STD_TORCH_CHECK(dim <= 2 && (dim < 1 || bias.size(dim - 1) == n || bias.size(dim - 1) == 1) &&
                      (dim < 2 || bias.size(0) == m || bias.size(0) == 1),
                  op, ": expected bias that broadcasts to [", m, ", ", n, "], got ", describe(bias));
  const ScalarType type = a.scalar_type();
  const Tensor out = new_tensor(a, {m, n}, type);
  if (m == 0 || n == 0) return out;
  if (!is_own(a) && linear_engine() != LinearEngine::kTorch && k != 0 && aoti_torch_cpu_addmm_out) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), bias.get(), a.get(), b.get(), beta, alpha));
    return out;
  }
  const Addend addend = make_addend(bias, beta, m, n);
  Epilogue ep;
  ep.out = out.mutable_data_ptr();
  ep.out_type = type == ScalarType::Float ? DType::kF32 : DType::kBF16;
  ep.ld_out = static_cast<size_t>(n);
  addend.put_into(ep);
  if (is_own(a) && k != 0 && alpha == 1) {
    multiply_own(left_operand(a), right_operand(b), {}, ep);
  } else {
    finish_addmm(as_contiguous(multiply(op, a, b, ScalarType::Float)), alpha, ep);
  }
  return out;
}

int64_t weight_fingerprint(const Tensor& weight) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == ScalarType::BFloat16 && weight.dim() == 2,
                  "_weight_fingerprint: expected a weight in bf16 [N, K] on the CPU, got ", describe(weight));
  const uint16_t* const data = static_cast<const uint16_t*>(weight.const_data_ptr());
  const int64_t n = weight.size(0), k = weight.size(1);
  const int64_t samples = std::min<int64_t>(64, n * k);
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  for (int64_t i = 0; i < samples; ++i) {
    const int64_t row = i * n / samples, col = i * 40503 % k;
    hash = (hash ^ data[row * weight.stride(0) + col * weight.stride(1)]) * 1099511628211u;
  }
  return static_cast<int64_t>(hash >> 1);
}

}  // namespace torch_ext
