// Row kernels: activations, rounding, softmax, normalization, pooling, against double precision.
#include <algorithm>
#include <limits>
#include <vector>

#include "bounds.h"
#include "cpu_features.h"
#include "guarded.h"
#include "paths.h"
#include "reference.h"
#include "runner.h"

namespace torch_ext::test {
namespace {

constexpr DType kTypes[] = {DType::kF32, DType::kBF16};
constexpr float kInf = std::numeric_limits<float>::infinity();

/// Lengths around every vector width, and hidden sizes.
std::vector<size_t> lengths() {
  std::vector<size_t> n;
  for (size_t i = 1; i <= 35; ++i) n.push_back(i);
  for (const size_t i : {63, 64, 65, 127, 300, 384, 768, 1021}) n.push_back(i);
  return n;
}

// ---- epilogue -------------------------------------------------------------------------------------------------------

TORCH_EXT_TEST(store_tile_stores_exactly_its_part) {
  const size_t row0 = 2, ld_tile = 32;
  for (const VecKernels* const vec : vec_paths()) {
    for (size_t a = 0; a < kActivationCount; ++a) {
      const Activation activation = static_cast<Activation>(a);
      for (const DType out_type : kTypes) {
        // None, fp32, bf16, and fp32 that is the same for every row.
        for (size_t residual_kind = 0; residual_kind < 4; ++residual_kind) {
          for (size_t cols = 1; cols <= ld_tile; ++cols) {
            if (options().quick && cols > 9 && cols != 12 && cols != 16 && cols != 32) continue;
            const size_t rows = 1 + (cols + a) % 8, col0 = cols % 3;
            const bool with_bias = cols % 2;
            context("%s %s, out %s, residual %zu, bias %d, %zux%zu", vec->name, activation_name(activation),
                    dtype_name(out_type), residual_kind, with_bias, rows, cols);
            Matrix tile(DType::kF32, rows, cols, ld_tile), out(out_type, row0 + rows, col0 + cols, col0 + cols + 5);
            Matrix residual(residual_kind == 2 ? DType::kBF16 : DType::kF32, row0 + rows, col0 + cols, col0 + cols + 1);
            const Guarded<float> bias(col0 + cols);
            tile.fill(random_source(), 0.0f, 4.0f);
            residual.fill(random_source());
            for (size_t j = 0; j < col0 + cols; ++j) bias[j] = random_source().value();
            Epilogue ep;
            ep.bias = with_bias ? bias.get() : nullptr;
            ep.residual = residual_kind ? residual.data() : nullptr;
            ep.ld_residual = residual_kind == 3 ? 0 : residual.ld;
            ep.residual_type = residual.type;
            ep.out = out.data();
            ep.ld_out = out.ld;
            ep.out_type = out_type;
            store_tile(*vec, activation, static_cast<const float*>(tile.data()), ld_tile, rows, cols, ep, row0, col0);
            for (size_t i = 0; i < row0 + rows; ++i) {
              for (size_t j = 0; j < col0 + cols; ++j) {
                const double got = out.get(i, j);
                if (i < row0 || j < col0) {
                  EXPECT(std::isnan(got), "(%zu, %zu) is outside and was written", i, j);
                  continue;
                }
                const double z = static_cast<double>(tile.get(i - row0, j - col0)) +
                                 (with_bias ? static_cast<double>(bias[j]) : 0.0);
                const size_t source = residual_kind == 3 ? 0 : i;
                const double r = residual_kind ? static_cast<double>(residual.get(source, j)) : 0.0;
                const double y = reference_activation(activation, z);
                const double bound = epilogue_bound(activation, z, 0, y, r, out_type);
                EXPECT(within(got, y + r, bound), "(%zu, %zu): %.9g, expected %.9g +- %.2g", i, j, got, y + r, bound);
              }
            }
            out.expect_gaps_untouched();
          }
        }
      }
    }
  }
}

/// act(x) for many x, stored as fp32.
void activate(const VecKernels& vec, Activation a, std::vector<float>& x) {
  Epilogue ep;
  ep.out = x.data();
  ep.ld_out = x.size();
  store_tile(vec, a, x.data(), x.size(), 1, x.size(), ep, 0, 0);
}

/// Every bf16 number that is finite, and fp32 numbers spread over all exponents and densely over [-12, 12].
std::vector<float> sweep() {
  std::vector<float> x;
  for (uint32_t h = 0; h < 0x10000; ++h) {
    const float f = bf16_to_f32({static_cast<uint16_t>(h)});
    if (std::isfinite(f)) x.push_back(f);
  }
  const size_t count = options().quick ? 10000 : 600000;
  for (size_t i = 0; i < count; ++i) {
    const float f = float_from_bits(static_cast<uint32_t>(random_source().bits() >> 32));
    if (std::isfinite(f)) x.push_back(f);
    x.push_back(12 * random_source().value());
    x.push_back(100 * random_source().value());
  }
  return x;
}

TORCH_EXT_TEST(activations_are_within_the_bounds_that_their_comments_state) {
  const std::vector<float> x = sweep();
  for (size_t a = 0; a < kActivationCount; ++a) {
    const Activation activation = static_cast<Activation>(a);
    std::vector<double> expected;
    for (const float v : x) expected.push_back(reference_activation(activation, v));
    for (const VecKernels* const vec : vec_paths()) {
      context("%s %s", vec->name, activation_name(activation));
      std::vector<float> y = x;
      activate(*vec, activation, y);
      Worst worst;
      for (size_t i = 0; i < x.size(); ++i) {
        const double bound = activation_bound(activation, x[i], expected[i], DType::kF32) + kSmallest;
        worst.see(y[i], expected[i], bound, x[i]);
        EXPECT(within(y[i], expected[i], bound), "x = %.9g: %.9g, expected %.9g +- %.2g", static_cast<double>(x[i]),
               static_cast<double>(y[i]), expected[i], bound);
      }
      note("%s %s: %.2f of the bound at x = %.9g: %.9g, expected %.9g", vec->name, activation_name(activation),
           worst.ratio, worst.at, worst.got, worst.expected);
    }
  }
}

TORCH_EXT_TEST(gelu_for_bf16_is_within_its_own_bound) {
  std::vector<float> x = sweep();
  for (float v = -8.0f; v < 8.0f; v += 0x1p-9f) x.push_back(v);
  std::erase_if(x, [](float v) { return v > 3.38e38f; });  // bf16 ends there
  for (const VecKernels* const vec : vec_paths()) {
    context("%s", vec->name);
    const Guarded<bf16> y(x.size());
    Epilogue ep;
    ep.out = y.get();
    ep.ld_out = x.size();
    ep.out_type = DType::kBF16;
    store_tile(*vec, Activation::kGelu, x.data(), x.size(), 1, x.size(), ep, 0, 0);
    for (size_t i = 0; i < x.size(); ++i) {
      const double expected = reference_activation(Activation::kGelu, x[i]), got = bf16_to_f32(y[i]);
      const double before = activation_bound(Activation::kGelu, x[i], expected, DType::kBF16);
      EXPECT(within(got, expected, before + output_bound(DType::kBF16, std::fabs(expected) + before)),
             "x = %.9g: %.9g, expected %.9g", static_cast<double>(x[i]), got, expected);
    }
  }
}

TORCH_EXT_TEST(activations_of_infinity_and_nan) {
  for (const VecKernels* const vec : vec_paths()) {
    for (size_t a = 0; a < kActivationCount; ++a) {
      const Activation activation = static_cast<Activation>(a);
      context("%s %s", vec->name, activation_name(activation));
      std::vector<float> x = {kInf, -kInf, 0.0f, -0.0f};
      activate(*vec, activation, x);
      const bool bounded = activation == Activation::kTanh || activation == Activation::kSigmoid;
      EXPECT(x[0] == (bounded ? 1.0f : kInf), "of inf is %g", static_cast<double>(x[0]));
      if (activation == Activation::kNone || activation == Activation::kLeakyRelu) {
        EXPECT(x[1] == -kInf, "of -inf is %g", static_cast<double>(x[1]));
      } else {
        const double limit = activation == Activation::kTanh ? -1 : 0;
        const double bound = activation_bound(activation, -100, limit, DType::kF32) + kSmallest;
        EXPECT(within(x[1], limit, bound), "of -inf is %g", static_cast<double>(x[1]));
      }
      const float origin = activation == Activation::kSigmoid ? 0.5f : 0.0f;
      EXPECT(x[2] == origin && x[3] == origin, "of zero is %g, %g", static_cast<double>(x[2]),
             static_cast<double>(x[3]));
      // Quiet and signalling, both signs, with all kinds of payload.
      std::vector<uint32_t> payloads = {0x7fc00000, 0x7f800001, 0x7fffffff, 0xffc00000, 0xff800001, 0xffffffff};
      for (size_t i = 0; i < 1000; ++i) {
        payloads.push_back(0x7f800001 + static_cast<uint32_t>(random_source().bits() % 0x7fffff));
      }
      for (const size_t length : {size_t{1}, size_t{3}, payloads.size()}) {
        for (size_t first = 0; first + length <= std::min(payloads.size(), length + 8); ++first) {
          std::vector<float> y(length);
          std::memcpy(y.data(), payloads.data() + first, length * sizeof(float));
          activate(*vec, activation, y);
          for (size_t i = 0; i < length; ++i) {
            EXPECT(std::isnan(y[i]), "of NaN 0x%08x is %g", payloads[first + i], static_cast<double>(y[i]));
          }
        }
      }
    }
  }
}

// ---- rounding to bf16 -----------------------------------------------------------------------------------------------

TORCH_EXT_TEST(bf16_rounds_to_nearest_even_exactly) {
  // Every bf16 number with the low halves that decide: below, at and above the tie.
  constexpr uint32_t kLow[] = {0x0000, 0x0001, 0x7fff, 0x8000, 0x8001, 0xffff};
  const size_t stride = options().quick ? 7 : 1;
  for (const VecKernels* const vec : vec_paths()) {
    // AVX-512's instruction takes subnormal numbers for zero.
    const bool flushes = vec->required_features & kFeatureAvx512Bf16;
    for (size_t length : {size_t{4096}, size_t{3}}) {  // whole vectors, and the part of one
      std::vector<uint32_t> x;
      for (uint32_t h = 0; h < 0x10000; h += static_cast<uint32_t>(length == 3 ? 131 : stride)) {
        for (const uint32_t low : kLow) x.push_back((h << 16) | low);
      }
      for (size_t first = 0; first < x.size(); first += length) {
        const size_t n = std::min(length, x.size() - first);
        const Guarded<float> in(n);
        const Guarded<bf16> out(n);
        std::memcpy(in.get(), &x[first], n * sizeof(float));
        context("%s, %zu numbers from 0x%08x", vec->name, n, x[first]);
        constexpr float kOne = 1.0f;
        scale_rows(*vec, 1, n, in.get(), n, &kOne, out.get(), n, DType::kBF16);
        for (size_t i = 0; i < n; ++i) {
          const uint32_t bits = x[first + i];
          const float value = float_from_bits(bits);
          if (std::isnan(value)) {
            EXPECT(bf16_is_nan(out[i]), "NaN 0x%08x became 0x%04x", bits, out[i].bits);
            continue;
          }
          const bf16 expected = flushes && std::fpclassify(value) == FP_SUBNORMAL
                                    ? bf16{static_cast<uint16_t>(bits >> 16 & 0x8000)}
                                    : reference_bf16(value);
          EXPECT(out[i] == expected, "0x%08x became 0x%04x, expected 0x%04x", bits, out[i].bits, expected.bits);
        }
      }
    }
  }
}

// ---- softmax --------------------------------------------------------------------------------------------------------

TORCH_EXT_TEST(scale_rows_multiplies) {
  for (const VecKernels* const vec : vec_paths()) {
    for (const size_t n : lengths()) {
      for (const DType type : kTypes) {
        const size_t rows = 1 + n % 4;
        context("%s %zu rows of %zu to %s", vec->name, rows, n, dtype_name(type));
        Matrix in(DType::kF32, rows, n, n + 3), out(type, rows, n, n + 2);
        in.fill(random_source());
        float factors[4];
        for (float& factor : factors) factor = 3 * random_source().value();
        scale_rows(*vec, rows, n, static_cast<const float*>(in.data()), in.ld, factors, out.data(), out.ld, type);
        out.expect_gaps_untouched();
        for (size_t i = 0; i < rows; ++i) {
          for (size_t j = 0; j < n; ++j) {
            const double y = static_cast<double>(in.get(i, j)) * static_cast<double>(factors[i]);
            const double bound = output_bound(DType::kF32, y) + output_bound(type, y);
            EXPECT(within(out.get(i, j), y, bound), "(%zu, %zu): %g, expected %g", i, j,
                   static_cast<double>(out.get(i, j)), y);
          }
        }
      }
    }
  }
}

TORCH_EXT_TEST(softmax_pack_is_right_for_every_length) {
  for (const GemmPath& path : gemm_paths()) {
    const GemmKernel& g = *path.kernel;
    if (!g.softmax_pack) continue;
    for (size_t n = 1; n <= (options().quick ? 37 : 133); ++n) {
      for (size_t u = 0; u < g.ukernel_count; ++u) {
        const size_t mr = g.ukernels[u].mr, rows = 1 + n % mr;
        const size_t ld = (n + kMaxVecWidth - 1) / kMaxVecWidth * kMaxVecWidth;
        const float scale = n % 3 ? 0.125f : 3.0f;
        context("%s, %zu of %zu rows of %zu", path.name().c_str(), rows, mr, n);
        const Guarded<float> s(rows * ld);
        std::vector<std::vector<double>> expected;
        for (size_t i = 0; i < rows; ++i) {
          std::vector<double> row(n);
          for (size_t j = 0; j < n; ++j) row[j] = s[i * ld + j] = 20 * random_source().value();
          const double largest = *std::max_element(row.begin(), row.end());
          for (double& x : row) x = std::exp(static_cast<double>(scale) * (x - largest));
          expected.push_back(row);
        }
        const GuardedBytes block(g.lhs_block_bytes(mr, n));
        float sums[kMaxMr];
        softmax_pack(path, rows, mr, n, scale, s.get(), ld, sums, block.data());
        for (size_t i = 0; i < rows; ++i) {
          double sum = 0;
          for (size_t p = 0; p < g.steps(n) * g.k_step; ++p) {
            const double y = p < n ? expected[i][p] : 0.0;
            const double got = bf16_to_f32(block.as<bf16>()[block_index(g, mr, g.steps(n), i, p)]);
            // The exponent's own rounding: 20 times the scale, in fp32, twice.
            const double bound = (kExp2ToBf16 + kRoundBf16 + 80 * static_cast<double>(scale) * kRoundF32) * y + 2e-38;
            EXPECT(within(got, y, bound), "(%zu, %zu): %g, expected %g", i, p, got, y);
            sum += y;
          }
          EXPECT(within(sums[i], sum, 2 * kExp2ToBf16 * sum), "row %zu: sum %g, expected %g", i,
                 static_cast<double>(sums[i]), sum);
        }
      }
    }
  }
}

/// Room for n scores as softmax_row documents it: n rounded up to kMaxVecWidth.
Guarded<float> score_buffer(size_t n) { return Guarded<float>((n + kMaxVecWidth - 1) / kMaxVecWidth * kMaxVecWidth); }

/// Compares softmax_row or softmax_row_to_bf16, normalized, with the reference.
void check_softmax(const VecKernels& vec, const std::vector<float>& scores, float scale, bool to_bf16) {
  const size_t n = scores.size();
  const Guarded<float> s = score_buffer(n);
  std::copy(scores.begin(), scores.end(), s.get());
  const std::vector<double> expected =
      reference_softmax(std::vector<double>(scores.begin(), scores.end()), static_cast<double>(scale));
  const double sum = (to_bf16 ? softmax_row_to_bf16 : softmax_row)(vec, s.get(), n, scale);
  EXPECT(sum >= 0.99, "the sum is %g, though the largest term is 1", sum);
  double largest = 0;
  for (const float x : scores)
    largest = std::max(largest, std::fabs(static_cast<double>(x) * static_cast<double>(scale)));
  // scale * s and scale * max s are rounded once each.
  const double score_bound = 2 * kRoundF32 * largest;
  for (size_t j = 0; j < n; ++j) {
    const double got = static_cast<double>(s[j]) / sum;
    const double bound = probability_bound(expected[j], score_bound, n) + (to_bf16 ? 2 * kExp2ToBf16 * expected[j] : 0);
    EXPECT(within(got, expected[j], bound), "%zu: %.9g, expected %.9g +- %.2g", j, got, expected[j], bound);
  }
}

void check_softmax(const VecKernels& vec, const std::vector<float>& scores, float scale) {
  for (const bool to_bf16 : {false, true}) check_softmax(vec, scores, scale, to_bf16);
}

TORCH_EXT_TEST(softmax_is_right_for_every_length) {
  for (const VecKernels* const vec : vec_paths()) {
    for (const size_t n : lengths()) {
      for (const float scale : {1.0f, 0.125f, 0.17677669f}) {
        for (const float spread : {0.0f, 1.0f, 30.0f, 400.0f}) {
          context("%s n %zu scale %g spread %g", vec->name, n, static_cast<double>(scale), static_cast<double>(spread));
          std::vector<float> scores(n);
          for (float& s : scores) s = 5 + spread * random_source().value();
          check_softmax(*vec, scores, scale);
        }
      }
    }
  }
}

TORCH_EXT_TEST(softmax_of_extreme_scores) {
  for (const VecKernels* const vec : vec_paths()) {
    for (size_t n = 1; n <= 35; ++n) {
      for (size_t at = 0; at < n; at += 1 + n / 5) {
        for (const float low : {-1e4f, -1e30f, -3e38f, -kInf}) {
          for (const float high : {-900.0f, 0.0f, 1e4f, 1e30f, 3e38f}) {
            context("%s n %zu: %g at %zu among %g", vec->name, n, static_cast<double>(high), at,
                    static_cast<double>(low));
            std::vector<float> scores(n, low);
            scores[at] = high;
            check_softmax(*vec, scores, 1.0f);
            check_softmax(*vec, std::vector<float>(n, high), 0.125f);
          }
        }
      }
    }
  }
}

TORCH_EXT_TEST(softmax_of_nan_is_nan) {
  for (const VecKernels* const vec : vec_paths()) {
    for (size_t n = 1; n <= 35; ++n) {
      for (size_t at = 0; at < n; ++at) {
        for (const uint32_t bits : {0x7fc00000u, 0x7f800001u, 0xffffffffu}) {
          context("%s n %zu, NaN 0x%08x at %zu", vec->name, n, bits, at);
          for (const auto softmax : {softmax_row, softmax_row_to_bf16}) {
            const Guarded<float> s = score_buffer(n);
            for (size_t j = 0; j < n; ++j) s[j] = random_source().value();
            std::memcpy(s.get() + at, &bits, sizeof bits);
            const float sum = softmax(*vec, s.get(), n, 1.0f);
            EXPECT(std::isnan(sum), "the sum is %g", static_cast<double>(sum));
          }
        }
      }
    }
  }
}

// softmax of (0, x) leaves exp(x) in the second place: exp for all x that softmax may meet.
TORCH_EXT_TEST(exp_is_within_the_bound_that_its_comment_states) {
  std::vector<float> x = {-0.0f, -1e-30f, -86.99f, -87.0f, -0.34657359f, -0.34657362f};
  const size_t count = options().quick ? 20000 : 1000000;
  for (size_t i = 0; i < count; ++i) x.push_back(-87.0f * static_cast<float>(i) / static_cast<float>(count));
  for (size_t i = 0; i < count / 10; ++i) x.push_back(-random_source().value() * random_source().value());
  for (float& v : x) v = v > 0 ? -v : v;
  for (const VecKernels* const vec : vec_paths()) {
    context("%s", vec->name);
    std::vector<float> y = x;
    y.push_back(0.0f);
    y.resize((y.size() + kMaxVecWidth - 1) / kMaxVecWidth * kMaxVecWidth);
    softmax_row(*vec, y.data(), x.size() + 1, 1.0f);
    Worst worst;
    for (size_t i = 0; i < x.size(); ++i) {
      const double expected = std::exp(static_cast<double>(x[i]));
      worst.see(y[i], expected, exp_bound(expected), x[i]);
      EXPECT(within(y[i], expected, exp_bound(expected)), "exp(%.9g) = %.9g, expected %.9g", static_cast<double>(x[i]),
             static_cast<double>(y[i]), expected);
    }
    note("%s exp: %.2f of the bound at x = %.9g", vec->name, worst.ratio, worst.at);
  }
}

// silu(-x) = -x / (1 + exp(x)): two more roundings than exp itself.
TORCH_EXT_TEST(exp_of_positive_numbers_is_within_the_bound_that_its_comment_states) {
  std::vector<float> x;
  const size_t count = options().quick ? 20000 : 1000000;
  for (size_t i = 1; i <= count; ++i) x.push_back(-87.0f * static_cast<float>(i) / static_cast<float>(count));
  for (const VecKernels* const vec : vec_paths()) {
    context("%s", vec->name);
    std::vector<float> y = x;
    activate(*vec, Activation::kSilu, y);
    Worst worst;
    for (size_t i = 0; i < x.size(); ++i) {
      const double expected = reference_activation(Activation::kSilu, x[i]);
      const double bound = exp_bound(std::fabs(expected)) + 2 * output_bound(DType::kF32, expected);
      worst.see(y[i], expected, bound, x[i]);
      EXPECT(within(y[i], expected, bound), "silu(%.9g) = %.9g, expected %.9g", static_cast<double>(x[i]),
             static_cast<double>(y[i]), expected);
    }
    note("%s exp(-x): %.2f of the bound at x = %.9g", vec->name, worst.ratio, worst.at);
  }
}

// ---- normalization --------------------------------------------------------------------------------------------------

struct NormCase {
  size_t n;
  DType type;
  bool with_b, with_c;
  float center, spread;
  int alias;            ///< the output is a (0), b (1), c (2) or memory of its own (-1)
  bool scaled = false;  ///< whether b has factors
};

void check_layer_norm(const VecKernels& vec, const NormCase& c) {
  context("%s n %zu %s, b %d, c %d, %g +- %g, alias %d", vec.name, c.n, dtype_name(c.type), c.with_b, c.with_c,
          static_cast<double>(c.center), static_cast<double>(c.spread), c.alias);
  Matrix a(c.type, 1, c.n), b(c.type, 1, c.n), d(c.type, 1, c.n), own(c.type, 1, c.n);
  a.fill(random_source(), c.center, c.spread);
  b.fill(random_source(), 0.0f, c.spread);
  d.fill(random_source(), 0.0f, c.spread);
  const Guarded<float> weight(c.n), bias(c.n), factors(c.n);
  for (size_t j = 0; j < c.n; ++j) {
    weight[j] = random_source().value();
    bias[j] = random_source().value();
    factors[j] = 1.0f + random_source().value();
  }
  const float eps = 1e-12f;
  std::vector<double> v(c.n);
  double mean = 0, variance = 0, largest = 0;
  for (size_t j = 0; j < c.n; ++j) {
    v[j] = a.get(0, j);
    if (c.with_b) v[j] += static_cast<double>(c.scaled ? factors[j] : 1.0f) * b.get(0, j);
    if (c.with_c) v[j] += d.get(0, j);
    mean += v[j] / static_cast<double>(c.n);
    largest = std::max(largest, std::fabs(v[j]));
  }
  for (const double x : v) variance += (x - mean) * (x - mean) / static_cast<double>(c.n);
  const double scale = 1 / std::sqrt(variance + static_cast<double>(eps));
  Matrix& out = c.alias == 0 ? a : c.alias == 1 ? b : c.alias == 2 ? d : own;
  sum_layer_norm_row(vec, c.n, a.data(), c.with_b ? b.data() : nullptr, c.with_c ? d.data() : nullptr,
                     c.scaled ? factors.get() : nullptr, weight.get(), bias.get(), eps, out.data(), c.type);
  for (size_t j = 0; j < c.n; ++j) {
    const double normalized = (v[j] - mean) * scale, w = weight[j], y = normalized * w + static_cast<double>(bias[j]);
    const double bound = layer_norm_bound(c.n, largest, scale, normalized, w, bias[j], c.type, y);
    EXPECT(within(out.get(0, j), y, bound), "%zu: %.9g, expected %.9g +- %.2g", j, static_cast<double>(out.get(0, j)),
           y, bound);
  }
}

TORCH_EXT_TEST(layer_norm_is_right_for_every_length_and_number_of_sources) {
  for (const VecKernels* const vec : vec_paths()) {
    for (const size_t n : lengths()) {
      if (n == 1) continue;  // the variance of one number is zero: below
      for (const DType type : kTypes) {
        for (int sources = 0; sources < 4; ++sources) {
          check_layer_norm(*vec, {n, type, sources % 2 == 1, sources / 2 == 1, 0.3f, 2.0f, -1});
        }
        check_layer_norm(*vec, {n, type, true, false, 0.3f, 2.0f, -1, true});
      }
    }
  }
}

TORCH_EXT_TEST(layer_norm_may_overwrite_any_source) {
  for (const VecKernels* const vec : vec_paths()) {
    for (const size_t n : {3, 16, 37, 384}) {
      for (const DType type : kTypes) {
        for (int alias = 0; alias < 3; ++alias) check_layer_norm(*vec, {n, type, true, true, 0.0f, 1.0f, alias});
        for (int alias = 0; alias < 2; ++alias) {
          check_layer_norm(*vec, {n, type, true, false, 0.0f, 1.0f, alias, true});
        }
      }
    }
  }
}

TORCH_EXT_TEST(layer_norm_with_a_large_mean) {
  for (const VecKernels* const vec : vec_paths()) {
    for (const size_t n : {33, 384, 768, 1021}) {
      for (const float center : {10.0f, -1000.0f, 30000.0f}) {
        check_layer_norm(*vec, {n, DType::kF32, false, false, center, 1.0f, -1});
      }
      check_layer_norm(*vec, {n, DType::kBF16, false, false, 100.0f, 10.0f, -1});
    }
  }
}

TORCH_EXT_TEST(layer_norm_of_a_constant_row_is_bias) {
  for (const VecKernels* const vec : vec_paths()) {
    for (const size_t n : {1, 4, 8, 32, 64, 768}) {
      context("%s n %zu", vec->name, n);
      const Guarded<float> x(n), weight(n), bias(n), out(n);
      std::fill(x.get(), x.get() + n, 2.5f);
      for (size_t j = 0; j < n; ++j) {
        weight[j] = random_source().value();
        bias[j] = random_source().value();
      }
      sum_layer_norm_row(*vec, n, x.get(), nullptr, nullptr, nullptr, weight.get(), bias.get(), 1e-12f, out.get(),
                         DType::kF32);
      for (size_t j = 0; j < n; ++j) EXPECT(out[j] == bias[j], "%zu: %g", j, static_cast<double>(out[j]));
    }
  }
}

TORCH_EXT_TEST(layer_norm_of_nan_is_nan) {
  for (const VecKernels* const vec : vec_paths()) {
    for (const size_t n : {1, 5, 16, 35}) {
      for (size_t at = 0; at < n; ++at) {
        context("%s n %zu, NaN at %zu", vec->name, n, at);
        Matrix x(DType::kBF16, 1, n), out(DType::kBF16, 1, n);
        x.fill(random_source());
        x.set(0, at, NAN);
        const std::vector<float> ones(n, 1.0f);
        sum_layer_norm_row(*vec, n, x.data(), nullptr, nullptr, nullptr, ones.data(), ones.data(), 1e-5f, out.data(),
                           DType::kBF16);
        for (size_t j = 0; j < n; ++j) EXPECT(std::isnan(out.get(0, j)), "%zu is a number", j);
      }
    }
  }
}

TORCH_EXT_TEST(rms_norm_is_right_for_every_length_and_number_of_sources) {
  const float eps = 1e-6f;
  for (const VecKernels* const vec : vec_paths()) {
    for (const size_t n : lengths()) {
      for (const DType type : kTypes) {
        for (int sources = 0; sources < 4; ++sources) {
          for (const int alias : {-1, 0, 1}) {  // memory of its own, a, b
            const bool with_b = sources % 2 == 1, with_c = sources / 2 == 1;
            context("%s n %zu %s, b %d, c %d, alias %d", vec->name, n, dtype_name(type), with_b, with_c, alias);
            Matrix a(type, 1, n), b(type, 1, n), c(type, 1, n), own(type, 1, n);
            a.fill(random_source(), 0.3f, 2.0f);
            b.fill(random_source());
            c.fill(random_source());
            const Guarded<float> weight(n);
            for (size_t j = 0; j < n; ++j) weight[j] = random_source().value();
            std::vector<double> v(n), magnitude(n);
            double squares = 0;
            for (size_t j = 0; j < n; ++j) {
              for (const Matrix* const m : {&a, with_b ? &b : nullptr, with_c ? &c : nullptr}) {
                if (!m) continue;
                v[j] += static_cast<double>(m->get(0, j));
                magnitude[j] += std::fabs(static_cast<double>(m->get(0, j)));
              }
              squares += v[j] * v[j];
            }
            const double scale = 1 / std::sqrt(squares / static_cast<double>(n) + static_cast<double>(eps));
            const Matrix& out = alias == 0 ? a : alias == 1 ? b : own;
            sum_rms_norm_row(*vec, n, a.data(), with_b ? b.data() : nullptr, with_c ? c.data() : nullptr, weight.get(),
                             eps, out.data(), type);
            for (size_t j = 0; j < n; ++j) {
              const double w = weight[j], y = v[j] * scale * w;
              const double bound = rms_norm_bound(n, magnitude[j], scale, w, type, y);
              EXPECT(within(out.get(0, j), y, bound), "%zu: %.9g, expected %.9g +- %.2g", j,
                     static_cast<double>(out.get(0, j)), y, bound);
            }
          }
        }
      }
    }
  }
}

// ---- rotary positions -----------------------------------------------------------------------------------------------

TORCH_EXT_TEST(rotation_turns_the_pairs_of_every_head) {
  for (const VecKernels* const vec : vec_paths()) {
    for (const size_t half : lengths()) {
      if (half > 128) continue;
      for (const DType type : kTypes) {
        for (const bool in_place : {false, true}) {
          const size_t size = 2 * half, heads = 1 + half % 3, n = heads * size;
          context("%s %zu heads of %zu, %s, in place %d", vec->name, heads, size, dtype_name(type), in_place);
          Matrix x(type, 1, n), own(type, 1, n);
          x.fill(random_source(), 0.0f, 3.0f);
          const Guarded<float> cos(half), sin(half);
          for (size_t j = 0; j < half; ++j) {
            const float angle = 50 * random_source().value();
            cos[j] = std::cos(angle);
            sin[j] = std::sin(angle);
          }
          std::vector<double> before(n);
          for (size_t j = 0; j < n; ++j) before[j] = x.get(0, j);
          const Matrix& out = in_place ? x : own;
          rotate_row(*vec, heads, size, cos.get(), sin.get(), x.data(), out.data(), type);
          for (size_t j = 0; j < n; ++j) {
            const size_t i = j % size % half;
            const bool second = j % size >= half;
            const double a = before[j], b = before[second ? j - half : j + half];
            const double c = cos[i], s = second ? static_cast<double>(sin[i]) : -static_cast<double>(sin[i]);
            const double y = a * c + b * s;
            const double bound = rotation_bound(std::fabs(a * c) + std::fabs(b * s), type, y);
            EXPECT(within(out.get(0, j), y, bound), "%zu: %.9g, expected %.9g +- %.2g", j,
                   static_cast<double>(out.get(0, j)), y, bound);
          }
        }
      }
    }
  }
}

// ---- gated linear units ---------------------------------------------------------------------------------------------

TORCH_EXT_TEST(gate_multiplies_the_activation) {
  for (const VecKernels* const vec : vec_paths()) {
    for (size_t a = 0; a < kActivationCount; ++a) {
      const Activation activation = static_cast<Activation>(a);
      for (const size_t n : lengths()) {
        for (const DType type : kTypes) {
          for (const int alias : {-1, 0, 1}) {  // memory of its own, x, gate
            context("%s %s n %zu %s, alias %d", vec->name, activation_name(activation), n, dtype_name(type), alias);
            Matrix x(type, 1, n), factor(type, 1, n), own(type, 1, n);
            x.fill(random_source(), 0.0f, 6.0f);
            factor.fill(random_source(), 0.0f, 2.0f);
            std::vector<double> values(n), factors(n);
            for (size_t j = 0; j < n; ++j) {
              values[j] = x.get(0, j);
              factors[j] = factor.get(0, j);
            }
            const Matrix& out = alias == 0 ? x : alias == 1 ? factor : own;
            gate_row(*vec, activation, n, x.data(), factor.data(), out.data(), type);
            for (size_t j = 0; j < n; ++j) {
              const double activated = reference_activation(activation, values[j]), y = activated * factors[j];
              const double bound = gate_bound(activation, values[j], activated, factors[j], type);
              EXPECT(within(out.get(0, j), y, bound), "%zu: %.9g, expected %.9g +- %.2g", j,
                     static_cast<double>(out.get(0, j)), y, bound);
            }
          }
        }
      }
    }
  }
}

TORCH_EXT_TEST(norms_rotations_and_gates_of_nan_are_nan) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const VecKernels* const vec : vec_paths()) {
    for (const size_t half : {1, 5, 16, 35}) {
      for (const DType type : kTypes) {
        const size_t n = 2 * half, at = half / 2;
        context("%s n %zu %s", vec->name, n, dtype_name(type));
        Matrix x(type, 1, n), out(type, 1, n);
        x.fill(random_source());
        x.set(0, at, nan);
        const std::vector<float> ones(n, 1.0f);
        sum_rms_norm_row(*vec, n, x.data(), nullptr, nullptr, ones.data(), 1e-5f, out.data(), type);
        for (size_t j = 0; j < n; ++j) EXPECT(std::isnan(out.get(0, j)), "norm: %zu is a number", j);
        rotate_row(*vec, 1, n, ones.data(), ones.data(), x.data(), out.data(), type);
        for (size_t j = 0; j < n; ++j) {
          EXPECT(std::isnan(out.get(0, j)) == (j % half == at), "rotation: %zu is %g", j,
                 static_cast<double>(out.get(0, j)));
        }
        for (size_t a = 0; a < kActivationCount; ++a) {
          Matrix good(type, 1, n), product(type, 1, n);
          good.fill(random_source());
          gate_row(*vec, static_cast<Activation>(a), n, x.data(), good.data(), product.data(), type);
          EXPECT(std::isnan(product.get(0, at)), "activated NaN is %g", static_cast<double>(product.get(0, at)));
          gate_row(*vec, static_cast<Activation>(a), n, good.data(), x.data(), product.data(), type);
          EXPECT(std::isnan(product.get(0, at)), "a gate of NaN gives %g", static_cast<double>(product.get(0, at)));
        }
      }
    }
  }
}

// ---- pooling --------------------------------------------------------------------------------------------------------

TORCH_EXT_TEST(pooling_folds_rows) {
  for (const VecKernels* const vec : vec_paths()) {
    for (const size_t n : lengths()) {
      for (const DType type : kTypes) {
        context("%s n %zu %s", vec->name, n, dtype_name(type));
        Matrix x(type, 1, n), sum(DType::kF32, 1, n), largest(DType::kF32, 1, n);
        x.fill(random_source());
        sum.fill(random_source());
        largest.fill(random_source());
        std::vector<float> sum_before(n), largest_before(n);
        for (size_t j = 0; j < n; ++j) {
          sum_before[j] = sum.get(0, j);
          largest_before[j] = largest.get(0, j);
        }
        accumulate_row(*vec, n, x.data(), type, static_cast<float*>(sum.data()));
        max_row(*vec, n, x.data(), type, static_cast<float*>(largest.data()));
        double squares = 0;
        for (size_t j = 0; j < n; ++j) {
          const float v = x.get(0, j);
          EXPECT(sum.get(0, j) == sum_before[j] + v, "sum of %zu is %g", j, static_cast<double>(sum.get(0, j)));
          EXPECT(largest.get(0, j) == std::max(largest_before[j], v), "maximum of %zu is %g", j,
                 static_cast<double>(largest.get(0, j)));
          squares += std::pow(static_cast<double>(sum.get(0, j)), 2);
        }
        const double got = sum_squares(*vec, n, static_cast<const float*>(sum.data()));
        // All terms are positive: their partial sums' errors add up like sqrt(n).
        const double bound = (2 + std::sqrt(static_cast<double>(n))) * kRoundF32 * squares;
        EXPECT(within(got, squares, bound), "sum of squares is %.9g, expected %.9g", got, squares);
      }
    }
  }
}

TORCH_EXT_TEST(pooling_keeps_nan) {
  for (const VecKernels* const vec : vec_paths()) {
    for (const size_t n : {1, 3, 4, 8, 16, 37}) {
      for (const bool first : {true, false}) {  // NaN in what is already there, or in the row that comes
        context("%s n %zu, NaN comes %s", vec->name, n, first ? "first" : "second");
        Matrix x(DType::kF32, 1, n), sum(DType::kF32, 1, n), largest(DType::kF32, 1, n);
        x.fill(random_source());
        sum.fill(random_source());
        largest.fill(random_source());
        const size_t at = n / 2;
        if (first) {
          sum.set(0, at, NAN);
          largest.set(0, at, NAN);
        } else {
          x.set(0, at, NAN);
        }
        accumulate_row(*vec, n, x.data(), DType::kF32, static_cast<float*>(sum.data()));
        max_row(*vec, n, x.data(), DType::kF32, static_cast<float*>(largest.data()));
        for (size_t j = 0; j < n; ++j) {
          EXPECT(std::isnan(sum.get(0, j)) == (j == at), "sum of %zu: %g", j, static_cast<double>(sum.get(0, j)));
          EXPECT(std::isnan(largest.get(0, j)) == (j == at), "maximum of %zu: %g", j,
                 static_cast<double>(largest.get(0, j)));
        }
        const float squares = sum_squares(*vec, n, static_cast<const float*>(sum.data()));
        EXPECT(std::isnan(squares), "sum of squares is %g", static_cast<double>(squares));
      }
    }
  }
}

}  // namespace
}  // namespace torch_ext::test
