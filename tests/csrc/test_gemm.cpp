// Micro-kernels, and the loop nest around them with its epilogue, against sums in double precision.
#include <algorithm>
#include <cstring>
#include <vector>

#include "bounds.h"
#include "gemm.h"
#include "guarded.h"
#include "paths.h"
#include "reference.h"
#include "runner.h"

namespace torch_ext::test {
namespace {

constexpr DType kTypes[] = {DType::kF32, DType::kBF16};

// ---- one micro-kernel -----------------------------------------------------------------------------------------------

/// Runs a micro-kernel on a block and a panel that were packed by the formulas here, not by the packers.
void check_ukernel(const GemmPath& path, const UKernel& u, size_t steps) {
  const GemmKernel& g = *path.kernel;
  context("%s, %zu steps", u.name, steps);
  const size_t k = steps * g.k_step;
  std::vector<double> lhs(u.mr * k), rhs(g.nr * k);
  const GuardedBytes block(u.mr * k * dtype_bytes(g.lhs_type)), panel(g.nr * k * dtype_bytes(g.rhs_type));
  const auto put = [](const GuardedBytes& bytes, DType t, size_t at, float x) {
    if (t == DType::kF32) {
      bytes.as<float>()[at] = x;
    } else {
      bytes.as<bf16>()[at] = reference_bf16(x);
    }
  };
  for (size_t p = 0; p < k; ++p) {
    for (size_t i = 0; i < u.mr; ++i) {
      const float x = rounded_to(g.lhs_type, random_source().value());
      lhs[i * k + p] = x;
      put(block, g.lhs_type, block_index(g, u.mr, steps, i, p), x);
    }
    for (size_t j = 0; j < g.nr; ++j) {
      const float x = rounded_to(g.rhs_type, random_source().value());
      rhs[j * k + p] = x;
      put(panel, g.rhs_type, panel_index(g, j, p), x);
    }
  }
  // Rows apart, so that what lies between them must stay as it is.
  const size_t ld_tile = g.nr + 4;
  constexpr float kUntouched = 12345.0f;
  const Guarded<float> tile(u.mr * ld_tile - 4);
  std::fill(tile.get(), tile.get() + u.mr * ld_tile - 4, kUntouched);
  run_ukernel(u, steps, block.data(), panel.data(), tile.get(), ld_tile);
  for (size_t i = 0; i + 1 < u.mr; ++i) {
    for (size_t j = g.nr; j < ld_tile; ++j) {
      EXPECT(tile[i * ld_tile + j] == kUntouched, "element %zu past row %zu of the tile was written", j - g.nr, i);
    }
  }
  for (size_t i = 0; i < u.mr; ++i) {
    for (size_t j = 0; j < g.nr; ++j) {
      double sum = 0, sum_abs = 0;
      for (size_t p = 0; p < k; ++p) {
        sum += lhs[i * k + p] * rhs[j * k + p];
        sum_abs += std::fabs(lhs[i * k + p] * rhs[j * k + p]);
      }
      const double got = tile[i * ld_tile + j];
      EXPECT(within(got, sum, product_bound(sum_abs, k)), "tile (%zu, %zu): %.9g, expected %.9g +- %.2g", i, j, got,
             sum, product_bound(sum_abs, k));
    }
  }
}

TORCH_EXT_TEST(every_ukernel_multiplies) {
  for (const GemmPath& path : gemm_paths()) {
    for (size_t i = 0; i < path.kernel->ukernel_count; ++i) {
      for (const size_t steps : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 97, 192, 768}) {
        if (options().quick && steps > 192) continue;
        check_ukernel(path, path.kernel->ukernels[i], steps);
      }
    }
  }
}

// ---- whole products -------------------------------------------------------------------------------------------------

enum class Residual { kNone, kF32, kBF16 };

struct Case {
  size_t m, n, k;
  DType lhs_type = DType::kBF16, weight_type = DType::kF32, out_type = DType::kF32;
  bool bias = false;
  Residual residual = Residual::kNone;
  Activation activation = Activation::kNone;
  size_t gap = 0;      ///< of the leading dimensions of lhs, weight, residual and output
  size_t threads = 1;  ///< for plan_gemm, if `plan` is empty
  GemmPlan plan = {0, 0};
};

/// w [n, k] packed by pack_weight_panels, x [m, k], run as the plan says, each task by itself.
struct Product {
  Product(const GemmPath& path, const Case& c)
      : path(path),
        c(c),
        lhs(c.lhs_type, c.m, c.k, c.k + c.gap),
        weight(c.weight_type, c.n, c.k, c.k + c.gap),
        residual(c.residual == Residual::kBF16 ? DType::kBF16 : DType::kF32, c.m, c.n, c.n + 2 * c.gap),
        bias(c.n),
        out(c.out_type, c.m, c.n, c.n + c.gap) {
    context("%s: m %zu n %zu k %zu, x %s, w %s, out %s, bias %d, residual %d, %s, ld +%zu, threads %zu, plan %zux%zu",
            path.name().c_str(), c.m, c.n, c.k, dtype_name(c.lhs_type), dtype_name(c.weight_type),
            dtype_name(c.out_type), c.bias, static_cast<int>(c.residual), activation_name(c.activation), c.gap,
            c.threads, c.plan.row_tasks, c.plan.panel_tasks);
    lhs.fill(random_source());
    weight.fill(random_source());
    residual.fill(random_source());
    for (size_t j = 0; j < c.n; ++j) bias[j] = random_source().value();
  }

  void run() {
    const GemmKernel& g = *path.kernel;
    const GuardedBytes payload(packed_payload_bytes(g, c.n, c.k));
    pack_weight_panels(g, c.n, c.k, weight.data(), weight.type, weight.ld, payload.data(), 0, g.panels(c.n));
    GemmProblem problem = problem_of(lhs, payload, out);
    problem.activation = c.activation;
    problem.epilogue.bias = c.bias ? bias.get() : nullptr;
    problem.epilogue.residual = c.residual == Residual::kNone ? nullptr : residual.data();
    problem.epilogue.ld_residual = residual.ld;
    problem.epilogue.residual_type = residual.type;
    const GemmPlan plan = c.plan.tasks() ? c.plan : plan_gemm(g, c.m, c.n, c.k, c.threads);
    for (size_t task = plan.tasks(); task-- > 0;) run_gemm_task(g, *path.vec, problem, plan, task);
    out.expect_gaps_untouched();
  }

  void expect_right() const {
    const GemmKernel& g = *path.kernel;
    std::vector<double> a(c.m * c.k), b(c.n * c.k);
    for (size_t i = 0; i < c.m; ++i) {
      for (size_t p = 0; p < c.k; ++p) a[i * c.k + p] = rounded_to(g.lhs_type, lhs.get(i, p));
    }
    for (size_t j = 0; j < c.n; ++j) {
      for (size_t p = 0; p < c.k; ++p) b[j * c.k + p] = rounded_to(g.rhs_type, weight.get(j, p));
    }
    for (size_t i = 0; i < c.m; ++i) {
      for (size_t j = 0; j < c.n; ++j) {
        double sum = 0, sum_abs = 0;
        for (size_t p = 0; p < c.k; ++p) {
          const double product = a[i * c.k + p] * b[j * c.k + p];
          sum += product;
          sum_abs += std::fabs(product);
        }
        const double z = sum + (c.bias ? static_cast<double>(bias[j]) : 0.0);
        const double r = c.residual == Residual::kNone ? 0.0 : static_cast<double>(residual.get(i, j));
        const double y = reference_activation(c.activation, z);
        const double bound = epilogue_bound(c.activation, z, product_bound(sum_abs, c.k), y, r, c.out_type);
        EXPECT(within(out.get(i, j), y + r, bound), "(%zu, %zu): %.9g, expected %.9g +- %.2g", i, j,
               static_cast<double>(out.get(i, j)), y + r, bound);
      }
    }
  }

  const GemmPath path;
  const Case c;
  Matrix lhs, weight, residual;
  Guarded<float> bias;
  Matrix out;
};

void check_product(const GemmPath& path, const Case& c, const char* use = "gemm") {
  Product product(path, c);
  product.run();
  product.expect_right();
  cover_use(path, use);
  if (path.kernel->widens(c.m, c.k)) cover_use(path, "gemm wide");
}

/// Goes through the combinations of types and epilogue one after the other.
Case varied(size_t index, size_t m, size_t n, size_t k) {
  Case c{m, n, k};
  c.lhs_type = kTypes[index % 2];
  c.weight_type = kTypes[index / 2 % 2];
  c.out_type = kTypes[index / 4 % 2];
  c.bias = index / 3 % 2;
  c.residual = static_cast<Residual>(index % 3);
  c.activation = static_cast<Activation>(index % 5 % kActivationCount);
  c.gap = index % 7 < 3 ? index % 7 : 0;
  return c;
}

TORCH_EXT_TEST(products_are_right_at_every_edge) {
  for (const GemmPath& path : gemm_paths()) {
    const GemmKernel& g = *path.kernel;
    const size_t mr = g.max_mr(), nr = g.nr;
    size_t index = 0;
    const auto go = [&](size_t m, size_t n, size_t k) { check_product(path, varied(index++, m, n, k)); };
    for (const size_t k : {1, 3, 4, 5, 7, 8, 9, 13, 17, 31}) {
      if (options().quick && k > 9) continue;
      for (const size_t n : {size_t{1}, nr - 1, nr, nr + 1, 2 * nr + 5}) {
        for (size_t m = 1; m <= mr + 1; ++m) go(m, n, k);
      }
    }
    for (const size_t m : {mr - 1, mr, mr + 1, 2 * mr - 1, 2 * mr, 2 * mr + 1, size_t{23}, size_t{37}}) {
      for (const size_t n : {7, 11, 13, 29, 31, 47}) go(m, n, options().quick ? 11 : 61);
    }
  }
}

TORCH_EXT_TEST(products_are_right_for_every_combination_of_types_and_epilogue) {
  for (const GemmPath& path : gemm_paths()) {
    for (const DType lhs : kTypes) {
      for (const DType weight : kTypes) {
        for (const DType out : kTypes) {
          for (size_t a = 0; a < kActivationCount; ++a) {
            for (const Residual residual : {Residual::kNone, Residual::kF32, Residual::kBF16}) {
              for (const bool bias : {false, true}) {
                Case c{path.kernel->max_mr() + 2, path.kernel->nr + 3, 10};
                c.lhs_type = lhs;
                c.weight_type = weight;
                c.out_type = out;
                c.activation = static_cast<Activation>(a);
                c.residual = residual;
                c.bias = bias;
                if (!options().quick || (a + bias) % 2 == 0) check_product(path, c);
              }
            }
          }
        }
      }
    }
  }
}

// Hidden and intermediate sizes of MiniLM (384, 1536; 1152 = q, k and v) and BERT-base (768, 3072); under emulation two
// panels of the columns only.
TORCH_EXT_TEST(products_are_right_for_sizes_of_bert) {
  constexpr struct {
    size_t n, k;
  } kLayers[] = {{1152, 384}, {384, 384}, {1536, 384}, {384, 1536}, {768, 768}, {3072, 768}, {768, 3072}};
  for (const GemmPath& path : gemm_paths()) {
    size_t index = 0;
    for (const auto& layer : kLayers) {
      const size_t n = options().quick ? path.kernel->nr + layer.n % 7 + 1 : layer.n;
      Case c = varied(index, index % 3 == 0 ? 1 : path.kernel->max_mr() + index, n, layer.k);
      c.threads = 1 + index % 3;
      check_product(path, c);
      ++index;
    }
  }
}

// Whether a panel is widened depends on the number of rows, which results must not.
TORCH_EXT_TEST(products_with_wide_panels_are_those_with_narrow_ones) {
  for (const GemmPath& path : gemm_paths()) {
    if (!path.kernel->wide) continue;
    Case c{path.kernel->wide->least_rows, path.kernel->nr + 3, 41};
    EXPECT(path.kernel->widens(c.m, c.k), "%zu rows are not multiplied with wide panels", c.m);
    c.lhs_type = DType::kF32;
    check_product(path, c);
    Product wide(path, c);
    // Sums of small integers are exact, whether or not the compiler contracts products and sums.
    for (Matrix* const matrix : {&wide.lhs, &wide.weight}) {
      float* const x = static_cast<float*>(matrix->data());
      for (size_t i = 0; i < (matrix == &wide.lhs ? c.m : c.n) * matrix->ld; ++i)
        x[i] = static_cast<float>(i * 7 % 17) - 8;
    }
    wide.run();
    GemmKernel narrow_kernel = *path.kernel;
    narrow_kernel.wide = nullptr;
    GemmPath narrow_path = path;
    narrow_path.kernel = &narrow_kernel;
    Product narrow(narrow_path, c);
    std::memcpy(narrow.lhs.data(), wide.lhs.data(), c.m * wide.lhs.ld * sizeof(float));
    std::memcpy(narrow.weight.data(), wide.weight.data(), c.n * wide.weight.ld * sizeof(float));
    narrow.run();
    for (size_t i = 0; i < c.m; ++i) {
      for (size_t j = 0; j < c.n; ++j) {
        EXPECT(wide.out.get(i, j) == narrow.out.get(i, j), "(%zu, %zu): %.9g and %.9g", i, j,
               static_cast<double>(wide.out.get(i, j)), static_cast<double>(narrow.out.get(i, j)));
      }
    }
  }
}

// 512 KiB of packed rows make a chunk: more rows than that take the chunk loop round twice.
TORCH_EXT_TEST(products_are_right_beyond_one_chunk_of_rows) {
  for (const GemmPath& path : gemm_paths()) {
    Case c{300, 3, 1024};
    if (path.kernel->lhs_type == DType::kF32) c.m = 150;
    if (options().quick) c = {c.m / 2 + 5, 1, 2048};
    c.lhs_type = kTypes[path.kernel->nr % 8 / 4];
    check_product(path, c);
  }
}

TORCH_EXT_TEST(products_of_nothing_are_bias) {
  for (const GemmPath& path : gemm_paths()) {
    Case c{3, path.kernel->nr + 1, 0};
    c.bias = true;
    check_product(path, c);
    c.m = 0;
    check_product(path, c);
  }
}

TORCH_EXT_TEST(random_products_are_right) {
  Random shapes(random_source().bits());
  for (const GemmPath& path : gemm_paths()) {
    for (size_t i = 0; i < options().random; ++i) {
      const size_t budget = options().quick ? 20000 : 2000000;
      Case c = varied(shapes.below(1 << 20), 1, 1, 1);
      c.k = shapes.between(1, shapes.coin() ? 40 : options().quick ? 300 : 3100);
      c.n = shapes.between(1, std::max<size_t>(1, std::min<size_t>(shapes.coin() ? 70 : 700, budget / c.k)));
      c.m = shapes.between(1, std::max<size_t>(1, std::min<size_t>(shapes.coin() ? 9 : 150, budget / c.k / c.n)));
      c.gap = shapes.coin() ? 0 : shapes.below(20);
      c.threads = shapes.between(1, 9);
      if (shapes.coin()) c.plan = {shapes.between(1, 4), shapes.between(1, 5)};
      check_product(path, c, "gemm random");
    }
  }
}

TORCH_EXT_TEST(tiny_and_subnormal_operands_are_right) {
  for (const GemmPath& path : gemm_paths()) {
    for (const float spread : {0x1p-60f, 0x1p-64f, 0x1p-130f}) {  // products near, below and far below 2^-126
      Case c{5, path.kernel->nr + 1, 33};
      c.lhs_type = DType::kF32;
      Product product(path, c);
      product.lhs.fill(random_source(), 0.0f, spread);
      product.weight.fill(random_source(), 0.0f, spread == 0x1p-130f ? 1.0f : spread);
      product.run();
      product.expect_right();
    }
  }
}

TORCH_EXT_TEST(nan_and_infinity_in_inputs_reach_their_outputs_and_no_others) {
  for (const GemmPath& path : gemm_paths()) {
    const size_t m = path.kernel->max_mr() + 3, n = path.kernel->nr + 3, k = 13;
    for (const float bad : {NAN, INFINITY}) {
      for (size_t i = 0; i < m + n; ++i) {
        Case c{m, n, k};
        c.lhs_type = kTypes[i % 2];
        c.out_type = kTypes[i / 2 % 2];
        c.activation = bad == bad ? Activation::kNone : static_cast<Activation>(i % kActivationCount);
        Product product(path, c);
        const size_t p = i % k;
        if (i < m) {
          product.lhs.set(i, p, bad);
        } else {
          product.weight.set(i - m, p, bad);
        }
        product.run();
        for (size_t row = 0; row < m; ++row) {
          for (size_t col = 0; col < n; ++col) {
            const bool touched = i < m ? row == i : col == i - m;
            EXPECT(std::isfinite(product.out.get(row, col)) == !touched, "%g in %s %zu: (%zu, %zu) is %g",
                   static_cast<double>(bad), i < m ? "row" : "column", i < m ? i : i - m, row, col,
                   static_cast<double>(product.out.get(row, col)));
          }
        }
      }
    }
  }
}

// ---- the grid -------------------------------------------------------------------------------------------------------

std::vector<uint8_t>* g_stored;

void pack_nothing(size_t, size_t, size_t, const void*, size_t, void*) {}
void multiply_nothing(size_t, const void*, const void*, float*, size_t) {}
void count_stores(const float*, size_t, size_t rows, size_t cols, const Epilogue& ep, size_t row0, size_t col0) {
  for (size_t i = row0; i < row0 + rows; ++i) {
    for (size_t j = col0; j < col0 + cols; ++j) ++(*g_stored).at(i * ep.ld_out + j);
  }
}

/// Runs a plan of a family with kernels that only count: every element of [m, n] must be stored once, but for columns below
/// `taken`, which another task has taken.
void check_grid(const GemmPath& path, size_t m, size_t n, size_t k, const GemmPlan& plan, PanelQueue* queue = nullptr,
                size_t taken = 0) {
  GemmKernel g = *path.kernel;
  std::vector<UKernel> ukernels(g.ukernels, g.ukernels + g.ukernel_count);
  for (UKernel& u : ukernels) u.run = multiply_nothing;
  g.ukernels = ukernels.data();
  g.pack_lhs_f32 = g.pack_lhs_bf16 = pack_nothing;
  g.begin = g.end = nullptr;  // instructions that this CPU may lack
  g.wide = nullptr;
  g.add_outliers = nullptr;
  g.strassen_winograd = nullptr;
  VecKernels vec = *path.vec;
  for (auto& store : vec.store_tile) store = count_stores;
  std::vector<uint8_t> stored(m * n);
  g_stored = &stored;
  GemmProblem problem;
  problem.m = m;
  problem.n = n;
  problem.k = k;
  problem.ld_lhs = k;
  problem.epilogue.ld_out = n;
  for (size_t task = 0; task < plan.tasks(); ++task) run_gemm_task(g, vec, problem, plan, task, queue);
  for (size_t i = 0; i < m * n; ++i) {
    EXPECT(stored[i] == (i % n >= taken), "(%zu, %zu) of %zux%zu stored %u times", i / n, i % n, m, n, stored[i]);
  }
}

TORCH_EXT_TEST(every_grid_stores_every_element_once) {
  for (const GemmPath& path : all_gemm_paths()) {
    for (const size_t m : {0, 1, 7, 8, 9, 33, 100}) {
      for (const size_t n : {1, 11, 12, 13, 97, 130}) {
        for (size_t rows = 1; rows <= 6; ++rows) {
          for (size_t panels = 1; panels <= 6; ++panels) {
            context("%s m %zu n %zu, grid %zux%zu", path.name().c_str(), m, n, rows, panels);
            check_grid(path, m, n, 16, {rows, panels});
            PanelQueue queue({rows, panels});
            EXPECT(queue.used() == (panels > 1), "a queue for %zu panel tasks", panels);
            check_grid(path, m, n, 16, {rows, panels}, &queue);
          }
        }
      }
    }
  }
}

TORCH_EXT_TEST(tasks_take_what_others_leave_of_a_row) {
  for (const GemmPath& path : all_gemm_paths()) {
    const size_t m = path.kernel->max_mr(), panels = 40, n = panels * path.kernel->nr;
    const GemmPlan plan{1, 4};
    PanelQueue queue(plan);
    context("%s", path.name().c_str());
    // One is slow: it has the first part, and the others do the rest.
    size_t first = 1, last = 0;
    EXPECT(queue.take(3, panels, 1, 1, first, last) && first == 0 && last == panels / 8, "took %zu to %zu", first,
           last);
    check_grid(path, m, n, 16, plan, &queue, last * path.kernel->nr);
    EXPECT(!queue.take(3, panels, 1, 1, first, last), "%zu to %zu were left", first, last);
    PanelQueue at_least(plan);
    EXPECT(at_least.take(0, panels, 30, 1, first, last) && last == 30, "took to %zu", last);
    EXPECT(at_least.take(0, panels, 30, 1, first, last) && first == 30 && last == panels, "took %zu to %zu", first,
           last);
    PanelQueue pairs(plan);
    for (size_t next = 0; next < panels - 1; next = last) {
      EXPECT(pairs.take(0, panels - 1, 1, 2, first, last) && first == next, "took %zu instead of %zu", first, next);
      EXPECT(last == panels - 1 || last % 2 == 0, "took to %zu of %zu", last, panels - 1);
    }
  }
}

TORCH_EXT_TEST(plans_use_the_threads_and_store_every_element_once) {
  for (const GemmPath& path : all_gemm_paths()) {
    for (const size_t m : {0, 1, 5, 16, 33, 130, 500}) {
      for (const size_t n : {1, 13, 384, 1152}) {
        for (const size_t k : {1, 384, 3072}) {
          for (const size_t threads : {0, 1, 2, 3, 7, 16, 64}) {
            context("%s m %zu n %zu k %zu, %zu threads", path.name().c_str(), m, n, k, threads);
            const GemmPlan plan = plan_gemm(*path.kernel, m, n, k, threads);
            const size_t most = std::max<size_t>(1, threads);
            EXPECT(plan.tasks() >= 1 && plan.tasks() <= most, "%zu x %zu tasks", plan.row_tasks, plan.panel_tasks);
            EXPECT(plan.tasks() == 1 || m * n * k / plan.tasks() >= kMinTaskMacs, "%zu tasks are too small",
                   plan.tasks());
            // With work enough for all, no more than half of the threads may idle.
            const size_t units = (m + path.kernel->max_mr() - 1) / path.kernel->max_mr() * path.kernel->panels(n);
            if (m * n * k >= most * kMinTaskMacs && units >= 8 * most) {
              EXPECT(2 * plan.tasks() >= most, "only %zu tasks", plan.tasks());
            }
            if (!options().quick || threads == 7) check_grid(path, m, n, k, plan);
            const GemmPlan finer = finer_plan(*path.kernel, m, k, plan);
            EXPECT(finer.panel_tasks == plan.panel_tasks && finer.row_tasks >= plan.row_tasks, "finer: %zu x %zu tasks",
                   finer.row_tasks, finer.panel_tasks);
            EXPECT(plan.tasks() > 1 || finer.tasks() == 1, "one task became %zu", finer.tasks());
            if (finer.tasks() == 1 || (options().quick && threads != 7)) continue;
            PanelQueue queue(finer);
            check_grid(path, m, n, k, finer, &queue);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace torch_ext::test
