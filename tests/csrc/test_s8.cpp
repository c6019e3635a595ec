// The kernels of s8: quantizing packers, exact sums, whole products.
#include <algorithm>
#include <vector>

#include "bounds.h"
#include "gemm.h"
#include "guarded.h"
#include "paths.h"
#include "reference.h"
#include "runner.h"

namespace torch_ext::test {
namespace {

size_t padded_depth(const GemmKernel& g, size_t k) { return g.steps(k) * g.k_step; }

/// Kernels of VPDPBUSD keep rows as q + 128, and say so by what else their panels hold; those of VPMADDWD in 16 bits.
int stored_offset(const GemmKernel& g) { return g.lhs_type == DType::kS8 && g.column_term ? 128 : 0; }

int stored_value(const GemmKernel& g, const unsigned char* block, size_t r, size_t i, size_t p) {
  const size_t at = block_index(g, r, 0, i, p);
  if (g.lhs_type == DType::kS16) return reinterpret_cast<const int16_t*>(block)[at];
  return stored_offset(g) ? static_cast<int>(block[at]) - 128 : static_cast<int8_t>(block[at]);
}

void store_value(const GemmKernel& g, unsigned char* block, size_t r, size_t i, size_t p, int value) {
  const size_t at = block_index(g, r, 0, i, p);
  if (g.lhs_type == DType::kS16) {
    reinterpret_cast<int16_t*>(block)[at] = static_cast<int16_t>(value);
  } else {
    block[at] = static_cast<unsigned char>(value + stored_offset(g));
  }
}

size_t scales_at(const GemmKernel& g, size_t r, size_t k) { return r * padded_depth(g, k) * dtype_bytes(g.lhs_type); }

const float* scales_of(const GemmKernel& g, const unsigned char* data, size_t r, size_t k) {
  return reinterpret_cast<const float*>(data + scales_at(g, r, k));
}

std::vector<Outlier> outliers_of(const GemmKernel& g, const unsigned char* block, size_t r, size_t k) {
  const unsigned char* const at = block + g.outliers_at(r, k);
  uint32_t count;
  std::memcpy(&count, at, sizeof count);
  std::vector<Outlier> found(std::min<size_t>(count, r * kMaxRowOutliers));
  EXPECT(found.size() == count, "%u outliers in %zu rows", count, r);
  if (!found.empty()) std::memcpy(found.data(), at + sizeof count, found.size() * sizeof(Outlier));
  return found;
}

/// Of a finite row: the products that are more than half of the largest magnitude, none if they are more than four.
std::vector<size_t> expected_outliers(const Matrix& source, size_t i, size_t k) {
  float largest = 0;
  for (size_t p = 0; p < k; ++p) largest = std::max(largest, std::fabs(source.get(i, p)));
  std::vector<size_t> above;
  for (size_t p = 0; p < k; ++p) {
    if (std::fabs(source.get(i, p)) > largest / 2) above.push_back(p);
  }
  if (above.size() > kMaxRowOutliers) above.clear();
  return above;
}

/// Multiplies up to five elements of every second row, so that they stand out.
void spike(Matrix& source, size_t rows, size_t k) {
  Random& random = random_source();
  for (size_t i = 0; i < rows; i += 2) {
    for (size_t n = random.below(6); n > 0; --n) {
      const size_t p = random.below(static_cast<uint32_t>(k));
      source.set(i, p, source.get(i, p) * 16.0f + 1.0f);
    }
  }
}

int random_q(Random& random) { return static_cast<int>(random.below(255)) - 127; }

void check_packer(const GemmPath& path, DType type, size_t rows, size_t block_rows, size_t k, size_t gap) {
  const GemmKernel& g = *path.kernel;
  context("%s from %s, %zu of %zu rows, k %zu, ld +%zu", path.name().c_str(), dtype_name(type), rows, block_rows, k,
          gap);
  Matrix source(type, rows, k, k + gap);
  source.fill(random_source(), 0.0f, 3.0f);
  spike(source, rows, k);
  const size_t zero_row = rows / 2;
  if (rows > 1) {
    for (size_t p = 0; p < k; ++p) source.set(zero_row, p, 0.0f);
  }
  const GuardedBytes packed(g.lhs_block_bytes(block_rows, k));
  pack(path, Packer::kLhs, type, rows, block_rows, k, source.data(), source.ld, packed.data());
  const float* const scales = scales_of(g, packed.data(), block_rows, k);
  const std::vector<Outlier> outliers = outliers_of(g, packed.data(), block_rows, k);
  size_t next = 0;
  for (size_t i = 0; i < block_rows; ++i) {
    const std::vector<size_t> apart = i < rows ? expected_outliers(source, i, k) : std::vector<size_t>();
    const auto is_apart = [&](size_t p) { return std::find(apart.begin(), apart.end(), p) != apart.end(); };
    for (const size_t p : apart) {
      const Outlier found = next < outliers.size() ? outliers[next] : Outlier{};
      EXPECT(found.row == i && found.p == p && found.value == source.get(i, p),
             "outlier %zu is %g at (%u, %u), expected %g at (%zu, %zu)", next, static_cast<double>(found.value),
             found.row, found.p, static_cast<double>(source.get(i, p)), i, p);
      ++next;
    }
    double largest = 0;
    for (size_t p = 0; i < rows && p < k; ++p) {
      if (!is_apart(p)) largest = std::max(largest, std::fabs(static_cast<double>(source.get(i, p))));
    }
    const double scale = largest / 127;
    EXPECT(within(scales[i], scale, 2 * kRoundF32 * scale), "row %zu: scale %g, expected %g", i,
           static_cast<double>(scales[i]), scale);
    for (size_t p = 0; p < padded_depth(g, k); ++p) {
      const int q = stored_value(g, packed.data(), block_rows, i, p);
      const double x = i < rows && p < k && !is_apart(p) ? static_cast<double>(source.get(i, p)) : 0.0;
      EXPECT(q >= -127 && q <= 127, "(%zu, %zu) is %d", i, p, q);
      // Half a step, and the rounding of x / scale.
      EXPECT(std::fabs(q * scale - x) <= scale * (0.5 + 127 * 4 * kRoundF32), "(%zu, %zu) is %d, expected %g", i, p, q,
             scale > 0 ? x / scale : 0.0);
    }
  }
  EXPECT(next == outliers.size(), "%zu outliers, expected %zu", outliers.size(), next);
}

TORCH_EXT_TEST(s8_packers_quantize_every_row_without_its_outliers) {
  for (const GemmPath& path : s8_paths()) {
    for (const DType type : {DType::kF32, DType::kBF16}) {
      for (const size_t k : {1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 67, 130}) {
        for (size_t u = 0; u < path.kernel->ukernel_count; ++u) {
          const size_t mr = path.kernel->ukernels[u].mr;
          for (size_t rows = 1; rows <= mr; ++rows) check_packer(path, type, rows, mr, k, k % 3);
        }
      }
    }
  }
}

TORCH_EXT_TEST(s8_rows_keep_up_to_four_outliers_apart) {
  for (const GemmPath& path : s8_paths()) {
    const GemmKernel& g = *path.kernel;
    const size_t mr = g.max_mr(), k = 77;
    for (const DType type : {DType::kF32, DType::kBF16}) {
      for (size_t first = 0; first < k; ++first) {
        for (size_t count = 0; count <= 5; ++count) {
          context("%s from %s, %zu outliers from %zu", path.name().c_str(), dtype_name(type), count, first);
          Matrix source(type, 1, k);
          // Exactly half of the largest is no outlier.
          for (size_t p = 0; p < k; ++p) source.set(0, p, p % 3 ? 4.0f : -0.5f);
          for (size_t n = 0; n < count; ++n) source.set(0, (first + 13 * n) % k, n % 2 ? 8.0f : -8.0f);
          const GuardedBytes packed(g.lhs_block_bytes(mr, k));
          pack(path, Packer::kLhs, type, 1, mr, k, source.data(), k, packed.data());
          const bool apart = count >= 1 && count <= kMaxRowOutliers;
          const std::vector<Outlier> found = outliers_of(g, packed.data(), mr, k);
          EXPECT(found.size() == (apart ? count : 0), "%zu were found", found.size());
          const float scale = scales_of(g, packed.data(), mr, k)[0] * 127;
          const float largest = apart || count == 0 ? 4.0f : 8.0f;
          EXPECT(std::fabs(scale - largest) < 1e-5f, "scaled by %g", static_cast<double>(scale));
        }
      }
    }
  }
}

TORCH_EXT_TEST(s8_rows_that_are_not_finite_or_tiny_keep_to_themselves) {
  for (const GemmPath& path : s8_paths()) {
    const GemmKernel& g = *path.kernel;
    const size_t mr = g.max_mr(), k = 37;
    for (const DType type : {DType::kF32, DType::kBF16}) {
      for (size_t at = 0; at < k; ++at) {
        context("%s from %s, special number at %zu", path.name().c_str(), dtype_name(type), at);
        Matrix source(type, 3, k);
        source.fill(random_source());
        source.set(1, at, at % 2 ? NAN : -NAN);
        for (size_t p = 0; p < k; ++p) source.set(2, p, p == at ? 1e-38f : 0.0f);
        const GuardedBytes packed(g.lhs_block_bytes(mr, k));
        pack(path, Packer::kLhs, type, 3, mr, k, source.data(), source.ld, packed.data());
        const float* const scales = scales_of(g, packed.data(), mr, k);
        EXPECT(std::isfinite(scales[0]), "a row beside one with NaN has scale %g", static_cast<double>(scales[0]));
        EXPECT(std::isnan(scales[1]), "a row with NaN has scale %g", static_cast<double>(scales[1]));
        for (size_t p = 0; p < k; ++p) {
          const int q = stored_value(g, packed.data(), mr, 2, p);
          EXPECT(q == 0, "a row of at most 1e-38 has %d at %zu", q, p);
        }
        source.set(1, at, at % 2 ? INFINITY : -INFINITY);
        source.set(1, k - 1 - at, -source.get(1, at));
        pack(path, Packer::kLhs, type, 3, mr, k, source.data(), source.ld, packed.data());
        EXPECT(std::isfinite(scales[0]), "a row beside one with infinity has scale %g", static_cast<double>(scales[0]));
        EXPECT(std::isinf(scales[1]) && scales[1] > 0.0f, "a row with infinity has scale %g",
               static_cast<double>(scales[1]));
        for (size_t p = 0; p < padded_depth(g, k); ++p) {
          const float x = p < k ? source.get(1, p) : 0.0f;
          const int q = stored_value(g, packed.data(), mr, 1, p);
          EXPECT(q == (std::isinf(x) ? (x > 0.0f ? 127 : -127) : 0), "%g beside infinity is %d", static_cast<double>(x),
                 q);
        }
      }
    }
  }
}

/// gemm_pmaddwd.cpp: behind the scales of a block's rows, the sums of what neighbours of a row give, of all products and
/// of each chunk of them.
void store_row_terms(unsigned char* terms, size_t rows, size_t i, const int* row, size_t k) {
  constexpr size_t kChunk = 512, kChunks = 20;
  uint32_t sums[1 + kChunks] = {};
  for (size_t p = 0; p + 1 < k; p += 2) {
    const auto term = static_cast<uint32_t>(row[p] * row[p + 1]);
    sums[0] += term;
    if (p / kChunk < kChunks) sums[1 + p / kChunk] += term;
  }
  for (size_t s = 0; s <= kChunks; ++s) std::memcpy(terms + (s * rows + i) * sizeof *sums, sums + s, sizeof *sums);
}

/// Magnitudes of a product are random, or 127 with signs by row and by column: bit 0 of `signs` is that of columns 0 to 7,
/// the next one that of 8 to 15, and so on, and neighbours differ.
constexpr int kRandom = -1;

/// Sums must be equal, bit by bit: scales are powers of two.
void check_ukernel(const GemmPath& path, const UKernel& u, size_t steps, int signs, bool wide = false) {
  const GemmKernel& g = *path.kernel;
  const bool extreme = signs != kRandom;
  context("%s, %zu steps, signs %d%s", u.name, steps, signs, wide ? ", wide" : "");
  const size_t k = steps * g.k_step, ld_tile = g.nr + 4;
  std::vector<int> lhs(u.mr * k);
  std::vector<int8_t> rhs(g.nr * k);
  const GuardedBytes block(g.lhs_block_bytes(u.mr, k));
  std::vector<float> row_scales(u.mr), column_scales(g.nr);
  for (size_t i = 0; i < u.mr; ++i) {
    for (size_t p = 0; p < k; ++p) {
      lhs[i * k + p] = extreme ? (i % 2 ? -127 : 127) : random_q(random_source());
      store_value(g, block.data(), u.mr, i, p, lhs[i * k + p]);
    }
    row_scales[i] = std::ldexp(1.0f, static_cast<int>(i) - 4);
    unsigned char* const scales = block.data() + scales_at(g, u.mr, k);
    std::memcpy(scales + i * sizeof(float), &row_scales[i], sizeof(float));
    if (g.lhs_type == DType::kS16) store_row_terms(scales + u.mr * sizeof(float), u.mr, i, lhs.data() + i * k, k);
  }
  for (size_t j = 0; j < g.nr; ++j) {
    for (size_t p = 0; p < k; ++p) {
      const bool negative = (signs >> j / 8 & 1) != static_cast<int>(j % 2);
      rhs[j * k + p] = static_cast<int8_t>(extreme ? (negative ? -127 : 127) : random_q(random_source()));
    }
    column_scales[j] = std::ldexp(1.0f, static_cast<int>(j % 7) - 3);
  }
  const GuardedBytes panel(g.rhs_panel_bytes(k));
  pack_weight_panels_s8(g, g.nr, k, rhs.data(), column_scales.data(), panel.data(), 0, 1);
  const Guarded<float> tile(u.mr * ld_tile - 4);
  constexpr float kUntouched = 12345.0f;
  std::fill(tile.get(), tile.get() + u.mr * ld_tile - 4, kUntouched);
  if (wide) {
    const GuardedBytes wide_panel(g.wide_panel_bytes(k));
    g.wide->widen(steps, panel.data(), wide_panel.data());
    run_ukernel(g.wide->ukernels[&u - g.ukernels], steps, block.data(), wide_panel.data(), tile.get(), ld_tile);
  } else {
    run_ukernel(u, steps, block.data(), panel.data(), tile.get(), ld_tile);
  }
  for (size_t i = 0; i < u.mr; ++i) {
    for (size_t j = 0; j < g.nr; ++j) {
      int64_t sum = 0;
      for (size_t p = 0; p < k; ++p) sum += static_cast<int64_t>(lhs[i * k + p]) * rhs[j * k + p];
      const float expected = static_cast<float>(static_cast<int32_t>(sum)) * column_scales[j] * row_scales[i];
      EXPECT(tile[i * ld_tile + j] == expected, "tile (%zu, %zu): %.9g, expected %.9g", i, j,
             static_cast<double>(tile[i * ld_tile + j]), static_cast<double>(expected));
    }
    for (size_t j = g.nr; i + 1 < u.mr && j < ld_tile; ++j) {
      EXPECT(tile[i * ld_tile + j] == kUntouched, "element %zu past row %zu of the tile was written", j - g.nr, i);
    }
  }
}

TORCH_EXT_TEST(s8_ukernels_add_exactly) {
  for (const GemmPath& path : s8_paths()) {
    const GemmKernel& g = *path.kernel;
    for (size_t i = 0; i < g.ukernel_count; ++i) {
      for (const size_t steps : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 97, 127, 128, 129, 192, 768, 1024, 2560}) {
        if (options().quick && steps > 192) continue;
        check_ukernel(path, g.ukernels[i], steps, kRandom);
        check_ukernel(path, g.ukernels[i], steps, 0);
        if (!g.wide || steps > g.wide->most_steps) continue;
        check_ukernel(path, g.ukernels[i], steps, kRandom, true);
        for (int signs = 0; signs < 1 << g.nr / 8; ++signs) check_ukernel(path, g.ukernels[i], steps, signs, true);
      }
      // The largest depth that pack_linear_weight_int8 takes: one product more does not fit into an s32.
      if (!options().quick) check_ukernel(path, g.ukernels[i], 133144 / g.k_step, 0);
    }
  }
}

void check_product(const GemmPath& path, size_t m, size_t n, size_t k, size_t index, const char* use) {
  const GemmKernel& g = *path.kernel;
  const DType x_type = index % 2 ? DType::kBF16 : DType::kF32, out_type = index % 3 ? DType::kF32 : DType::kBF16;
  const auto activation = static_cast<Activation>(index % kActivationCount);
  const bool with_bias = index % 4 != 1, with_residual = index % 5 == 2;
  context("%s: m %zu n %zu k %zu, x %s, out %s, %s, bias %d, residual %d", path.name().c_str(), m, n, k,
          dtype_name(x_type), dtype_name(out_type), activation_name(activation), with_bias, with_residual);
  Random& random = random_source();
  Matrix x(x_type, m, k, k + index % 3);
  x.fill(random);
  if (index % 7 < 3) spike(x, m, k);
  std::vector<int8_t> q(n * k), q_back(n * k);
  std::vector<float> scales(n), scales_back(n);
  for (int8_t& value : q) value = static_cast<int8_t>(random_q(random));
  for (float& scale : scales) scale = (random.value() + 1.5f) / 127;
  const Guarded<float> bias(n);
  for (size_t j = 0; j < n; ++j) bias[j] = random.value();
  Matrix residual(DType::kF32, m, n), out(out_type, m, n, n + index % 2);
  residual.fill(random);

  const GuardedBytes payload(packed_payload_bytes(g, n, k));
  pack_weight_panels_s8(g, n, k, q.data(), scales.data(), payload.data(), 0, g.panels(n));
  unpack_weight_s8(g, n, k, payload.data(), q_back.data(), scales_back.data());
  EXPECT(q == q_back && scales == scales_back, "the weight changed in packing");

  GemmProblem problem = problem_of(x, payload, out);
  problem.activation = activation;
  problem.epilogue.bias = with_bias ? bias.get() : nullptr;
  problem.epilogue.residual = with_residual ? residual.data() : nullptr;
  problem.epilogue.ld_residual = residual.ld;
  problem.epilogue.residual_type = residual.type;
  const GemmPlan plan = plan_gemm(g, m, n, k, index % 6 + 1);
  for (size_t task = plan.tasks(); task-- > 0;) run_gemm_task(g, *path.vec, problem, plan, task);
  out.expect_gaps_untouched();
  cover_use(path, use);
  if (g.widens(m, k)) cover_use(path, "gemm wide");

  // What the rows are quantized to is the packer's affair, tested above.
  for (size_t i = 0; i < m; ++i) {
    const GuardedBytes block(g.lhs_block_bytes(1, k));
    (x_type == DType::kF32 ? g.pack_lhs_f32 : g.pack_lhs_bf16)(
        1, 1, k, static_cast<const char*>(x.data()) + i * x.ld * dtype_bytes(x_type), x.ld, block.data());
    const double row_scale = static_cast<double>(scales_of(g, block.data(), 1, k)[0]);
    const std::vector<Outlier> outliers = outliers_of(g, block.data(), 1, k);
    for (size_t j = 0; j < n; ++j) {
      int64_t sum = 0;
      for (size_t p = 0; p < k; ++p) sum += stored_value(g, block.data(), 1, 0, p) * q[j * k + p];
      double product = static_cast<double>(sum) * row_scale * static_cast<double>(scales[j]);
      double rounded = 3 * std::fabs(product);  // The sum's conversion to fp32, and two products.
      for (const Outlier& outlier : outliers) {
        const double value = static_cast<double>(outlier.value) * q[j * k + outlier.p] * static_cast<double>(scales[j]);
        product += value;
        rounded += 6 * std::fabs(value);  // Two products, and sums with up to four of them.
      }
      const double z = product + (with_bias ? static_cast<double>(bias[j]) : 0.0);
      const double r = with_residual ? static_cast<double>(residual.get(i, j)) : 0.0;
      const double y = reference_activation(activation, z);
      const double bound = epilogue_bound(activation, z, kRoundF32 * rounded, y, r, out_type);
      EXPECT(within(static_cast<double>(out.get(i, j)), y + r, bound), "(%zu, %zu): %.9g, expected %.9g +- %.2g", i, j,
             static_cast<double>(out.get(i, j)), y + r, bound);
    }
  }
}

TORCH_EXT_TEST(s8_products_of_infinities_are_those_of_fp32) {
  for (const GemmPath& path : s8_paths()) {
    const GemmKernel& g = *path.kernel;
    for (const size_t k : {41, 601}) {
      const size_t m = g.max_mr() + 1, n = g.nr + 3;
      std::vector<int8_t> q(n * k);
      const std::vector<float> scales(n, 0.25f);
      for (size_t i = 0; i < q.size(); ++i) q[i] = static_cast<int8_t>(static_cast<int>(i % 5) - 2);
      const GuardedBytes payload(packed_payload_bytes(g, n, k));
      pack_weight_panels_s8(g, n, k, q.data(), scales.data(), payload.data(), 0, g.panels(n));
      for (const DType type : {DType::kF32, DType::kBF16}) {
        context("%s from %s", path.name().c_str(), dtype_name(type));
        Matrix x(type, m, k), out(DType::kF32, m, n);
        x.fill(random_source());
        // Every second row has an infinity, each at another place; the last one has NaN.
        for (size_t i = 0; i < m; i += 2) x.set(i, (i * 97) % k, i % 4 ? -INFINITY : INFINITY);
        x.set(m - 1, k - 1, NAN);
        const GemmProblem problem = problem_of(x, payload, out);
        const GemmPlan plan = plan_gemm(g, m, n, k, 1);
        for (size_t task = 0; task < plan.tasks(); ++task) run_gemm_task(g, *path.vec, problem, plan, task);
        for (size_t i = 0; i < m; ++i) {
          for (size_t j = 0; j < n; ++j) {
            const float y = out.get(i, j);
            double exact = 0;
            for (size_t p = 0; p < k; ++p) exact += static_cast<double>(x.get(i, p)) * q[j * k + p];
            const bool right = std::isnan(exact)   ? std::isnan(y)
                               : std::isinf(exact) ? static_cast<double>(y) == exact
                                                   : std::isfinite(y);
            EXPECT(right, "(%zu, %zu): %g, in fp32 %g", i, j, static_cast<double>(y), exact);
          }
        }
      }
    }
  }
}

TORCH_EXT_TEST(s8_products_are_right_at_every_edge) {
  for (const GemmPath& path : s8_paths()) {
    const size_t mr = path.kernel->max_mr(), nr = path.kernel->nr;
    size_t index = 0;
    for (const size_t m : {size_t{1}, size_t{2}, size_t{3}, mr - 1, mr, mr + 1, 2 * mr + 3}) {
      for (const size_t n : {size_t{1}, nr - 1, nr, nr + 1, 2 * nr + 5}) {
        for (const size_t k : {1, 7, 8, 9, 33}) check_product(path, m, n, k, index++, "gemm");
      }
    }
    // Several chunks of products, where a kernel has such.
    for (const size_t k : {511, 512, 513, 1030}) check_product(path, mr + 3, nr + 1, k, index++, "gemm");
    if (!options().quick) {
      for (const size_t k : {3072, 4096, 10240, 10244}) check_product(path, 19, 96, k, 0, "gemm");
    }
  }
}

TORCH_EXT_TEST(random_s8_products_are_right) {
  for (const GemmPath& path : s8_paths()) {
    for (size_t i = 0; i < options().random; ++i) {
      Random& random = random_source();
      const size_t m = random.between(1, 40), n = random.between(1, 80), k = random.between(1, i % 8 ? 300 : 1500);
      check_product(path, m, n, k, random.below(60), "gemm random");
    }
  }
}

}  // namespace
}  // namespace torch_ext::test
