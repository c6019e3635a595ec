// Products of many rows by seven products of halves, against the ordinary loops and against sums in double precision.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "bounds.h"
#include "gemm.h"
#include "guarded.h"
#include "paths.h"
#include "reference.h"
#include "runner.h"
#include "strassen_winograd.h"

namespace torch_ext::test {
namespace {

std::vector<GemmPath> paths_that_have_it() {
  std::vector<GemmPath> paths = gemm_paths();
  std::erase_if(paths, [](const GemmPath& path) { return !path.kernel->strassen_winograd; });
  return paths;
}

// The product of halves of one family, counted.
UKernelFn g_multiply;
size_t g_multiplied;
void count_multiply(size_t steps, const void* lhs, const void* rhs, float* tile, size_t ld_tile) {
  ++g_multiplied;
  g_multiply(steps, lhs, rhs, tile, ld_tile);
}

struct Shape {
  size_t m, n, k;
};

/// x [m, k] times w [n, k], with an epilogue that `index` chooses.
struct Product {
  Product(const GemmPath& path, Shape shape, size_t index)
      : path(path),
        shape(shape),
        lhs(index % 2 ? DType::kBF16 : DType::kF32, shape.m, shape.k, shape.k + index % 3),
        weight(DType::kF32, shape.n, shape.k),
        residual(index % 5 == 1 ? DType::kBF16 : DType::kF32, shape.m, shape.n, shape.n + index % 2),
        bias(shape.n),
        index(index),
        payload(packed_payload_bytes(*path.kernel, shape.n, shape.k)) {
    Random& random = random_source();
    lhs.fill(random);
    weight.fill(random);
    residual.fill(random);
    for (size_t j = 0; j < shape.n; ++j) bias[j] = random.value();
  }

  Activation activation() const { return static_cast<Activation>(index / 7 % kActivationCount); }
  DType out_type() const { return index % 4 == 3 ? DType::kBF16 : DType::kF32; }
  bool has_bias() const { return index % 3 != 0; }
  bool has_residual() const { return index % 5 < 2; }

  void say(const GemmPlan& plan) const {
    context("%s: m %zu n %zu k %zu, case %zu, plan %zux%zu", path.name().c_str(), shape.m, shape.n, shape.k, index,
            plan.row_tasks, plan.panel_tasks);
  }

  void pack() {
    const GemmKernel& g = *path.kernel;
    pack_weight_panels(g, shape.n, shape.k, weight.data(), weight.type, weight.ld, payload.data(), 0,
                       g.panels(shape.n));
  }

  /// The product, and how many products of halves it took. With a queue, tasks take their panels from it.
  std::unique_ptr<Matrix> run(bool by_seven, const GemmPlan& plan = {}, size_t* multiplied = nullptr,
                              PanelQueue* queue = nullptr) const {
    say(plan);
    StrassenWinograd counted = *path.kernel->strassen_winograd;
    g_multiply = counted.multiply;
    g_multiplied = 0;
    counted.multiply = count_multiply;
    GemmKernel g = *path.kernel;
    g.strassen_winograd = by_seven ? &counted : nullptr;
    auto out = std::make_unique<Matrix>(out_type(), shape.m, shape.n, shape.n + index % 4);
    GemmProblem problem = problem_of(lhs, payload, *out);
    problem.activation = activation();
    problem.epilogue.bias = has_bias() ? bias.get() : nullptr;
    problem.epilogue.residual = has_residual() ? residual.data() : nullptr;
    problem.epilogue.ld_residual = residual.ld;
    problem.epilogue.residual_type = residual.type;
    for (size_t task = plan.tasks(); task-- > 0;) run_gemm_task(g, *path.vec, problem, plan, task, queue);
    out->expect_gaps_untouched();
    if (multiplied) *multiplied = g_multiplied;
    return out;
  }

  const GemmPath path;
  const Shape shape;
  Matrix lhs, weight, residual;
  Guarded<float> bias;
  const size_t index;
  GuardedBytes payload;
};

void expect_same(const Matrix& one, const Matrix& other) {
  const size_t element = dtype_bytes(one.type);
  for (size_t i = 0; i < one.rows; ++i) {
    for (size_t j = 0; j < one.cols; ++j) {
      const size_t at = (i * one.ld + j) * element;
      const bool same = std::memcmp(static_cast<const char*>(one.data()) + at,
                                    static_cast<const char*>(other.data()) + at, element) == 0;
      EXPECT(same, "(%zu, %zu): %.9g, by the ordinary loops %.9g", i, j, static_cast<double>(one.get(i, j)),
             static_cast<double>(other.get(i, j)));
    }
  }
}

/// Products of halves for whole pairs of blocks and of panels in each task. Columns of padding are as zeros are: they keep
/// to themselves.
size_t expected_products(const GemmKernel& g, Shape shape, const GemmPlan& plan) {
  size_t count = 0;
  for (size_t task = 0; task < plan.tasks(); ++task) {
    const GemmRows rows = task_rows(g, shape.m, plan, task);
    const PanelRange panels = task_panels(g, shape.n, plan, task);
    if (!suits_strassen_winograd(g, rows.end - rows.begin, shape.k)) continue;
    const size_t last = std::min(panels.last, shape.n / g.nr);
    count += (rows.end - rows.begin) / (2 * g.strassen_winograd->rows) * ((last - panels.first) / 2) * 7;
  }
  return count;
}

/// Small integers: everything is exact in fp32 as well.
void use_integers(Product& product) {
  for (Matrix* const x : {&product.lhs, &product.weight}) {
    for (size_t i = 0; i < x->rows; ++i) {
      for (size_t p = 0; p < x->cols; ++p)
        x->set(i, p, static_cast<float>(static_cast<int>(random_source().below(9))) - 4);
    }
  }
}

void check_exact(const GemmPath& path, Shape shape, size_t index, const GemmPlan& plan = {}) {
  Product product(path, shape, index);
  use_integers(product);
  product.pack();
  size_t products = 0;
  const auto got = product.run(true, plan, &products);
  expect_same(*got, *product.run(false, plan));
  EXPECT(products == expected_products(*path.kernel, shape, plan), "%zu products of halves instead of %zu", products,
         expected_products(*path.kernel, shape, plan));
  if (products) cover_use(path, "gemm strassen winograd");
}

TORCH_EXT_TEST(seven_products_are_eight_at_every_edge) {
  for (const GemmPath& path : paths_that_have_it()) {
    const GemmKernel& g = *path.kernel;
    const size_t least = g.strassen_winograd->least_rows, pair = 2 * g.strassen_winograd->rows, unit = 16 * g.k_step;
    size_t index = 0;
    for (const size_t m : {least - 1, least, least + 1, least + pair - 1, 2 * least, 20 * pair + g.max_mr() + 1}) {
      for (const size_t n : {size_t{1}, g.nr, 2 * g.nr - 1, 2 * g.nr, 3 * g.nr, 4 * g.nr + 1}) {
        for (const size_t k : {256 - unit, size_t{255}, size_t{256}, 256 + unit}) {
          if (options().quick && index % 5) {
            ++index;
            continue;
          }
          check_exact(path, {m, n, k}, index++);
        }
      }
    }
    // Several chunks of rows, and of groups in one.
    check_exact(path, {150 * g.max_mr() + 3, 2 * g.nr, 256}, 1);
    if (!options().quick) check_exact(path, {30 * g.max_mr(), 6 * g.nr, 4096}, 2);
  }
}

TORCH_EXT_TEST(random_seven_products_are_eight) {
  for (const GemmPath& path : paths_that_have_it()) {
    for (size_t i = 0; i < options().random; ++i) {
      Random& random = random_source();
      const Shape shape = {random.between(90, 400), random.between(1, 120), random.between(3, 10) * 64};
      const GemmPlan plan = {random.between(1, 3), random.between(1, 3)};
      check_exact(path, shape, random.below(1000), plan);
    }
  }
}

/// The number that row or column i is paired with, in pairs of `half`, if there is one below `count`.
size_t partner(size_t i, size_t half, size_t count) {
  const size_t pair = i / (2 * half) * 2 * half;
  return pair + 2 * half > count ? i : pair + (i - pair + half) % (2 * half);
}

double magnitude(const Matrix& x, DType rounded, size_t i, size_t other, size_t p, size_t far) {
  const auto get = [&](size_t row, size_t column) {
    return std::fabs(static_cast<double>(rounded_to(rounded, x.get(row, column))));
  };
  const double own = get(i, p) + get(i, far);
  return other == i ? own : own + get(other, p) + get(other, far);
}

/// Against sums in double precision. What is added up is four products of sums of four at most: the bound is product_bound's
/// for the sum of what those may be, where rows, or columns, are paired, and for what they are elsewhere.
void expect_right(const Product& product, const Matrix& out, bool paired) {
  const GemmKernel& g = *product.path.kernel;
  const auto [m, n, k] = product.shape;
  for (size_t i = 0; i < m; ++i) {
    const size_t other_row = paired ? partner(i, g.strassen_winograd->rows, m) : i;
    for (size_t j = 0; j < n; ++j) {
      const size_t other_column = paired ? partner(j, g.nr, g.panels(n) * g.nr) : j;
      const bool sums = other_row != i && other_column != j && other_column < n;
      double sum = 0, sum_abs = 0;
      for (size_t p = 0; p < k; ++p) {
        const double a = rounded_to(g.lhs_type, product.lhs.get(i, p)),
                     b = rounded_to(g.rhs_type, product.weight.get(j, p));
        sum += a * b;
        if (!sums) sum_abs += std::fabs(a * b);
        if (sums && p < k / 2) {
          sum_abs += magnitude(product.lhs, g.lhs_type, i, other_row, p, p + k / 2) *
                     magnitude(product.weight, g.rhs_type, j, other_column, p, p + k / 2);
        }
      }
      const double z = sum + (product.has_bias() ? static_cast<double>(product.bias[j]) : 0.0);
      const double r = product.has_residual() ? static_cast<double>(product.residual.get(i, j)) : 0.0;
      const double y = reference_activation(product.activation(), z);
      const double bound = epilogue_bound(product.activation(), z, product_bound(sum_abs, k), y, r, out.type);
      EXPECT(within(out.get(i, j), y + r, bound), "(%zu, %zu): %.9g, expected %.9g +- %.2g", i, j,
             static_cast<double>(out.get(i, j)), y + r, bound);
    }
  }
}

TORCH_EXT_TEST(seven_products_are_right) {
  for (const GemmPath& path : paths_that_have_it()) {
    const GemmKernel& g = *path.kernel;
    for (size_t index = 0; index < (options().quick ? 3 : 12); ++index) {
      Product product(path, {100 + 7 * index, 4 * g.nr + index, 256 + 64 * (index % 3)}, index);
      product.pack();
      size_t products = 0;
      const auto out = product.run(true, {}, &products);
      EXPECT(products > 0, "no products of halves");
      expect_right(product, *out, true);
    }
  }
}

/// Rows and columns beside which others would lose digits, or everything: results are as accurate as by the ordinary loops.
TORCH_EXT_TEST(rows_and_columns_of_another_size_keep_to_themselves) {
  for (const GemmPath& path : paths_that_have_it()) {
    const GemmKernel& g = *path.kernel;
    const size_t pair = 2 * g.strassen_winograd->rows;
    for (const float factor : {1e4f, 1e-4f, 0.0f, 1e30f, 1e-30f}) {
      for (const bool column : {false, true}) {
        // One pair of rows, or of panels, and one of those that have no other.
        Product product(path, {8 * pair + 5, 6 * g.nr, 256}, 0);
        Matrix& x = column ? product.weight : product.lhs;
        const size_t changed = column ? 3 * g.nr + 2 : 3 * pair + 1;
        for (size_t p = 0; p < x.cols; ++p) x.set(changed, p, factor * x.get(changed, p));
        product.pack();
        size_t products = 0;
        const auto out = product.run(true, {}, &products);
        const size_t all = expected_products(g, product.shape, {});
        EXPECT(products == (column ? all / 3 * 2 : all / 8 * 7), "%zu of %zu products of halves", products, all);
        // By its own measure: the pair's other rows, or columns, are right as if they were alone.
        for (size_t i = 0; i < product.shape.m; ++i) {
          if (!column && i / pair != changed / pair) continue;
          for (size_t j = 0; j < product.shape.n; ++j) {
            if (column && j / (2 * g.nr) != changed / (2 * g.nr)) continue;
            double sum = 0, sum_abs = 0;
            for (size_t p = 0; p < product.shape.k; ++p) {
              const double term = static_cast<double>(rounded_to(g.lhs_type, product.lhs.get(i, p))) *
                                  static_cast<double>(rounded_to(g.rhs_type, product.weight.get(j, p)));
              sum += term;
              sum_abs += std::fabs(term);
            }
            const double r = product.has_residual() ? static_cast<double>(product.residual.get(i, j)) : 0.0;
            const double bound =
                epilogue_bound(Activation::kNone, sum, product_bound(sum_abs, product.shape.k), sum, r, out->type);
            EXPECT(within(out->get(i, j), sum + r, bound), "factor %g, (%zu, %zu): %.9g, expected %.9g +- %.2g",
                   static_cast<double>(factor), i, j, static_cast<double>(out->get(i, j)), sum + r, bound);
          }
        }
      }
    }
  }
}

/// Panels that are left to the ordinary loops use up no memory of the other ones.
TORCH_EXT_TEST(columns_of_zeros_anywhere_change_nothing_else) {
  for (const GemmPath& path : paths_that_have_it()) {
    const GemmKernel& g = *path.kernel;
    for (const size_t every : {2, 5, 1000}) {
      // More pairs of panels than are kept in mind, and a panel that has no other.
      Product product(path, {options().quick ? 100u : 260u, (options().quick ? 71 : 141) * g.nr, 256}, every);
      use_integers(product);
      for (size_t j = 1; j < product.shape.n; j += every * g.nr) {
        for (size_t p = 0; p < product.shape.k; ++p) product.weight.set(j, p, 0.0f);
      }
      product.pack();
      expect_same(*product.run(true), *product.run(false));
    }
  }
}

/// Whoever takes panels, and however many at a time: the same panels are a pair, and all results the same, bit for bit.
TORCH_EXT_TEST(panels_that_tasks_take_are_paired_as_ever) {
  for (const GemmPath& path : paths_that_have_it()) {
    const GemmKernel& g = *path.kernel;
    for (const size_t panels : {7, 8, 71}) {
      for (const bool zeros : {false, true}) {
        Product product(path, {101, panels * g.nr - 3, 256}, panels);
        // More pairs that are left to the ordinary loops than are kept in mind.
        for (size_t j = 1; zeros && j < product.shape.n; j += g.nr) {
          for (size_t p = 0; p < product.shape.k; ++p) product.weight.set(j, p, 0.0f);
        }
        product.pack();
        size_t all = 0, products = 0;
        const auto alone = product.run(true, {1, 1}, &all);
        const GemmPlan plan{1, 3};
        PanelQueue queue(plan);
        expect_same(*product.run(true, plan, &products, &queue), *alone);
        EXPECT(products == all, "%zu products of halves instead of %zu", products, all);
      }
    }
  }
}

TORCH_EXT_TEST(numbers_that_are_not_finite_stay_in_their_row) {
  for (const GemmPath& path : paths_that_have_it()) {
    const GemmKernel& g = *path.kernel;
    for (const float special : {NAN, INFINITY, -INFINITY}) {
      Product product(path, {110, 4 * g.nr, 320}, 0);
      use_integers(product);
      for (const size_t row : {size_t{0}, size_t{31}, size_t{109}}) product.lhs.set(row, row + 200, special);
      product.pack();
      const auto out = product.run(true);
      expect_same(*out, *product.run(false));
      for (size_t i = 0; i < product.shape.m; ++i) {
        const bool finite = i != 0 && i != 31 && i != 109;
        for (size_t j = 0; finite && j < product.shape.n; ++j) {
          EXPECT(std::isfinite(out->get(i, j)), "(%zu, %zu) is %g", i, j, static_cast<double>(out->get(i, j)));
        }
      }
    }
  }
}

}  // namespace
}  // namespace torch_ext::test
