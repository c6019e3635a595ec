// Attention over packed sequences against softmax(scale Q K^T) V in double precision.
#include <algorithm>
#include <functional>
#include <numeric>
#include <optional>
#include <vector>

#include "attention.h"
#include "bounds.h"
#include "guarded.h"
#include "paths.h"
#include "positions.h"
#include "reference.h"
#include "runner.h"

namespace torch_ext::test {
namespace {

struct Sequences {
  Sequences(DType type, std::vector<size_t> lengths, size_t heads, size_t head_size, float scale)
      : type(type),
        lengths(lengths),
        heads(heads),
        head_size(head_size),
        hidden(heads * head_size),
        total(std::accumulate(lengths.begin(), lengths.end(), size_t{0})),
        scale(scale),
        qkv(type, total, 3 * hidden),
        out(type, total, hidden),
        cu_seqlens(lengths.size() + 1) {
    qkv.fill(random_source());
    cu_seqlens[0] = 0;
    for (size_t s = 0; s < lengths.size(); ++s) {
      cu_seqlens[s + 1] = cu_seqlens[s] + static_cast<int32_t>(lengths[s]);
    }
  }

  void run(const GemmPath& path) {
    context("%s: %zu sequences, the first of %zu, %zu heads of %zu, %s, scale %g", path.name().c_str(), lengths.size(),
            lengths[0], heads, head_size, dtype_name(type), static_cast<double>(scale));
    AttentionProblem problem;
    problem.qkv = qkv.data();
    problem.out = out.data();
    problem.type = type;
    problem.cu_seqlens = cu_seqlens.get();
    problem.attended = attended.empty() ? nullptr : attended.data();
    problem.sequences = lengths.size();
    problem.heads = heads;
    problem.head_size = head_size;
    problem.scale = scale;
    problem.window = window;
    problem.causal = causal;
    problem.relative_bias = bias.empty() ? nullptr : bias.data();
    problem.bias_reach = reach;
    if (key_positions || query_positions) {
      longest = *std::max_element(lengths.begin(), lengths.end());
      rows.resize(2 * longest - 1);
      fill_position_rows(longest, span, 0, rows.data());
      problem.positions = {key_positions ? key_positions->data() : nullptr,
                           query_positions ? query_positions->data() : nullptr, rows.data(), longest};
    }
    for (size_t s = lengths.size(); s-- > 0;) {
      for (size_t h = 0; h < heads; ++h) run_attention_head(*path.kernel, *path.vec, problem, s, h);
    }
    cover_use(path, type == DType::kF32 ? "attention f32" : "attention bf16");
  }

  float q(size_t token, size_t h, size_t c) const { return qkv.get(token, h * head_size + c); }
  float k(size_t token, size_t h, size_t c) const { return qkv.get(token, hidden + h * head_size + c); }
  float v(size_t token, size_t h, size_t c) const { return qkv.get(token, 2 * hidden + h * head_size + c); }

  /// Compares the rows of one head of one sequence; `stride` leaves rows out.
  void expect_right(const GemmPath& path, size_t s, size_t h, size_t stride) const {
    const size_t first = static_cast<size_t>(cu_seqlens[s]), n = lengths[s];
    const size_t keys = keys_of(s);
    const DType panels = path.kernel->rhs_type, rows = path.kernel->lhs_type;
    for (size_t i = 0; i < n; i += stride) {
      if (i >= keys && i - keys >= window) {
        for (size_t c = 0; c < head_size; ++c) {
          EXPECT(out.get(first + i, h * head_size + c) == 0.0f, "row %zu of %zu sees none of %zu keys", i, n, keys);
        }
        continue;
      }
      std::vector<double> scores(n);
      double score_bound = 0;
      for (size_t j = 0; j < n; ++j) {
        double sum_abs = 0;
        for (size_t c = 0; c < head_size; ++c) {
          const double product = static_cast<double>(rounded_to(rows, q(first + i, h, c))) *
                                 static_cast<double>(rounded_to(panels, k(first + j, h, c)));
          scores[j] += product;
          sum_abs += std::fabs(product);
        }
        for (const bool by_key : {false, true}) {
          const auto& table = by_key ? query_positions : key_positions;
          if (!table) continue;
          const size_t row = position_row(static_cast<long>(i) - static_cast<long>(j), span, 0);
          for (size_t c = 0; c < head_size; ++c) {
            const double product =
                static_cast<double>(rounded_to(rows_type(path), by_key ? k(first + j, h, c) : q(first + i, h, c))) *
                static_cast<double>(rounded_to(panels, table->get(row, h * head_size + c)));
            scores[j] += product;
            sum_abs += std::fabs(product);
          }
        }
        scores[j] = scores[j] * static_cast<double>(scale) + bias_of(h, i, j);
        if ((i > j ? i - j : j - i) > window || j >= keys || (causal && j > i)) scores[j] = -INFINITY;
        // The product's error, and the rounding of scale * score and scale * max.
        score_bound = std::max(score_bound, static_cast<double>(scale) *
                                                    (product_bound(sum_abs, 3 * head_size) + 4 * kRoundF32 * sum_abs) +
                                                2 * kRoundF32 * std::fabs(bias_of(h, i, j)));
      }
      const std::vector<double> p = reference_softmax(scores, 1.0);
      for (size_t c = 0; c < head_size; ++c) {
        double y = 0, weighted = 0, sum_abs_v = 0;
        for (size_t j = 0; j < keys; ++j) {
          const double value = rounded_to(panels, v(first + j, h, c));
          y += p[j] * value;
          weighted += p[j] * std::fabs(value);
          sum_abs_v += std::fabs(value);
        }
        const double got = out.get(first + i, h * head_size + c);
        const double bound = attention_bound(weighted, sum_abs_v, score_bound, n, rows, type, y);
        EXPECT(within(got, y, bound), "sequence %zu, head %zu, row %zu, column %zu: %.9g, expected %.9g +- %.2g", s, h,
               i, c, got, y, bound);
      }
    }
  }

  size_t keys_of(size_t s) const { return attended.empty() ? lengths[s] : static_cast<size_t>(attended[s]); }

  static DType rows_type(const GemmPath& path) { return path.kernel->lhs_type; }

  double bias_of(size_t h, size_t i, size_t j) const {
    if (bias.empty()) return 0;
    const auto distance = static_cast<ptrdiff_t>(j) - static_cast<ptrdiff_t>(i), r = static_cast<ptrdiff_t>(reach);
    return static_cast<double>(bias[h * (2 * reach + 1) + static_cast<size_t>(std::clamp(distance, -r, r) + r)]);
  }

  const DType type;
  const std::vector<size_t> lengths;
  const size_t heads, head_size, hidden, total;
  const float scale;
  Matrix qkv, out;
  Guarded<int32_t> cu_seqlens;
  std::vector<int32_t> attended;
  size_t window = kNoWindow, reach = 0;
  bool causal = false;
  std::vector<float> bias;
  size_t span = 0, longest = 0;
  std::optional<Matrix> key_positions, query_positions;
  std::vector<int32_t> rows;
};

void check(const GemmPath& path, DType type, std::vector<size_t> lengths, size_t heads, size_t head_size, float scale,
           size_t stride = 1) {
  Sequences x(type, lengths, heads, head_size, scale);
  x.run(path);
  for (size_t s = 0; s < lengths.size(); ++s) {
    for (size_t h = 0; h < heads; ++h) x.expect_right(path, s, h, stride);
  }
}

TORCH_EXT_TEST(attention_is_right_for_every_length) {
  std::vector<size_t> lengths = {1, 2, 7, 8, 9, 12, 13, 16, 49, 128, 300};
  if (options().quick) lengths = {1, 2, 7, 8, 9, 12, 13, 16, 49};
  for (const GemmPath& path : gemm_paths()) {
    for (const DType type : {DType::kF32, DType::kBF16}) {
      for (const size_t n : lengths) check(path, type, {n}, 2, 32, 0.17677669f, n > 64 ? 7 : n > 20 ? 3 : 1);
    }
  }
}

TORCH_EXT_TEST(attention_is_right_for_every_head_size) {
  for (const GemmPath& path : gemm_paths()) {
    for (const DType type : {DType::kF32, DType::kBF16}) {
      for (const size_t d : {1, 3, 8, 16, 32, 40, 64, 80, 128}) {
        check(path, type, {13}, 1, d, 1.0f / std::sqrt(static_cast<float>(d)), options().quick ? 5 : 1);
      }
    }
  }
}

TORCH_EXT_TEST(attention_of_several_sequences_keeps_them_apart) {
  for (const GemmPath& path : gemm_paths()) {
    for (const DType type : {DType::kF32, DType::kBF16}) {
      check(path, type, {3, 0, 17, 1, 0, 8, 12, 0}, 3, 16, 0.25f);
      check(path, type, {0}, 2, 8, 1.0f);
      check(path, type, {0, 5}, 2, 8, 1.0f);
    }
  }
}

TORCH_EXT_TEST(attention_with_extreme_scores) {
  for (const GemmPath& path : gemm_paths()) {
    for (const DType type : {DType::kF32, DType::kBF16}) {
      for (const float scale : {100.0f, 1000.0f, 0.0f}) check(path, type, {19}, 1, 16, scale);
    }
  }
}

TORCH_EXT_TEST(random_attention_is_right) {
  Random shapes(random_source().bits());
  for (const GemmPath& path : gemm_paths()) {
    for (size_t i = 0; i < options().random / 2 + 1; ++i) {
      const size_t longest = options().quick ? 20 : 140;
      std::vector<size_t> lengths(shapes.between(1, 4));
      for (size_t& n : lengths) n = shapes.below(longest);
      const size_t d = shapes.between(1, options().quick ? 40 : 130), heads = shapes.between(1, 3);
      const DType type = shapes.coin() ? DType::kF32 : DType::kBF16;
      check(path, type, lengths, heads, d, 2.0f / static_cast<float>(shapes.between(1, 20)), options().quick ? 4 : 3);
    }
  }
}

TORCH_EXT_TEST(nan_stays_in_its_rows_of_attention) {
  const size_t n = 13, d = 16, heads = 2;
  for (const GemmPath& path : gemm_paths()) {
    for (const DType type : {DType::kF32, DType::kBF16}) {
      for (size_t part = 0; part < 3; ++part) {  // query, key, value
        for (const size_t token : {size_t{0}, size_t{9}, n - 1}) {
          Sequences x(type, {4, n, 5}, heads, d, 0.25f);
          const size_t column = 5;
          x.qkv.set(4 + token, part * heads * d + d + column, NAN);  // second sequence, second head
          x.run(path);
          for (size_t i = 0; i < x.total; ++i) {
            for (size_t c = 0; c < heads * d; ++c) {
              const bool same_head = i >= 4 && i < 4 + n && c >= d;
              const bool touched = same_head && (part == 0 ? i == 4 + token : part == 1 ? true : c == d + column);
              EXPECT(std::isnan(x.out.get(i, c)) == touched, "NaN in %s of token %zu: (%zu, %zu) is %g",
                     part == 0   ? "query"
                     : part == 1 ? "key"
                                 : "value",
                     token, i, c, static_cast<double>(x.out.get(i, c)));
            }
          }
        }
      }
    }
  }
}

TORCH_EXT_TEST(local_attention_sees_its_window_only) {
  for (const GemmPath& path : gemm_paths()) {
    for (const DType type : {DType::kF32, DType::kBF16}) {
      for (const size_t window : {0, 1, 5, 12, 40}) {
        Sequences x(type, {1, 70, 9, 33}, 2, 16, 0.25f);
        x.window = window;
        // What lies outside must not reach a row, not even as 0 * NaN.
        x.run(path);
        for (size_t s = 0; s < 4; ++s) x.expect_right(path, s, 1, options().quick ? 7 : 2);
      }
    }
  }
}

TORCH_EXT_TEST(attention_adds_a_relative_bias_by_distance) {
  for (const GemmPath& path : gemm_paths()) {
    for (const DType type : {DType::kF32, DType::kBF16}) {
      for (const size_t reach : {0, 1, 7, 64}) {
        Sequences x(type, {33, 0, 12, 50}, 3, 8, 0.35f);
        x.reach = reach;
        x.bias.resize(3 * (2 * reach + 1));
        for (float& b : x.bias) b = 2 * random_source().value();
        for (const size_t window : {kNoWindow, size_t{6}}) {
          x.window = window;
          x.run(path);
          for (const size_t s : {0, 2, 3}) x.expect_right(path, static_cast<size_t>(s), 2, options().quick ? 5 : 1);
        }
      }
    }
  }
}

TORCH_EXT_TEST(attention_adds_scores_by_relative_position) {
  for (const GemmPath& path : gemm_paths()) {
    for (const DType type : {DType::kF32, DType::kBF16}) {
      for (const size_t kinds : {1, 2, 3}) {
        for (const size_t span : {1, 9, 200}) {
          for (const size_t head_size : {26, 8}) {
            // More than one block of queries, in the first of them.
            Sequences x(type, {options().quick ? size_t{150} : size_t{300}, 0, 1, 33}, 2, head_size, 0.2f);
            x.span = span;
            for (std::optional<Matrix>* const table : {&x.key_positions, &x.query_positions}) {
              if (!(kinds & (table == &x.key_positions ? 1 : 2))) continue;
              table->emplace(type, 2 * span, x.hidden);
              (*table)->fill(random_source());
            }
            x.window = span == 9 ? 40 : kNoWindow;
            x.run(path);
            for (const size_t s : {0, 2, 3}) {
              x.expect_right(path, static_cast<size_t>(s), 1, options().quick ? 17 : 5);
            }
          }
        }
      }
    }
  }
}

TORCH_EXT_TEST(attention_sees_the_first_tokens_only) {
  Random shapes(random_source().bits());
  for (const GemmPath& path : gemm_paths()) {
    for (const DType type : {DType::kF32, DType::kBF16}) {
      for (const size_t window : {kNoWindow, size_t{0}, size_t{5}, size_t{40}}) {
        for (size_t kind = 0; kind < 4; ++kind) {
          Sequences x(type, {shapes.between(1, 70), 0, shapes.between(1, 70), shapes.between(2, 33), 9}, 2, 16, 0.25f);
          for (const size_t n : x.lengths) x.attended.push_back(n ? static_cast<int32_t>(shapes.between(1, n)) : 0);
          x.attended[3] = 1;
          x.attended[4] = 9;
          x.window = window;
          x.causal = kind == 1;
          if (kind == 2) {
            x.reach = 7;
            x.bias.resize(2 * 15);
            for (float& b : x.bias) b = 2 * random_source().value();
          }
          for (std::optional<Matrix>* const table : {&x.key_positions, &x.query_positions}) {
            if (kind != 3) break;
            x.span = 9;
            table->emplace(type, 18, x.hidden);
            (*table)->fill(random_source());
          }
          // What is not a key must not reach a row, not even as 0 * NaN.
          for (size_t s = 0; s < x.lengths.size(); ++s) {
            for (size_t j = x.keys_of(s); j < x.lengths[s]; ++j) {
              for (size_t c = x.hidden; c < 3 * x.hidden; ++c) {
                x.qkv.set(static_cast<size_t>(x.cu_seqlens[s]) + j, c, NAN);
              }
            }
          }
          x.run(path);
          for (const size_t s : {0, 2, 3, 4}) x.expect_right(path, static_cast<size_t>(s), 1, options().quick ? 5 : 2);
        }
      }
    }
  }
}

TORCH_EXT_TEST(heads_are_balanced_over_threads) {
  const int32_t cu_seqlens[] = {0, 128, 128, 140, 652, 660, 1172};
  AttentionProblem problem;
  problem.cu_seqlens = cu_seqlens;
  problem.sequences = 6;
  problem.heads = 12;
  problem.head_size = 64;
  for (const size_t window : {kNoWindow, size_t{16}}) {
    problem.window = window;
    for (const size_t parts : {1, 2, 3, 7, 64, 1000}) {
      const std::vector<size_t> starts = balance_heads(problem, parts);
      EXPECT(starts.front() == 0 && starts.back() == 72 && starts.size() <= parts + 1, "%zu runs for %zu threads",
             starts.size() - 1, parts);
      EXPECT(std::adjacent_find(starts.begin(), starts.end(), std::greater_equal<size_t>()) == starts.end(),
             "an empty run among %zu", starts.size() - 1);
      // Two of the six sequences are nearly all of the work: twelve heads each, none of them in two parts.
      if (parts == 2) EXPECT(starts[1] > 36 && starts[1] < 60, "the second thread starts at head %zu", starts[1]);
    }
  }
  // A text of few keys is little work.
  problem.window = kNoWindow;
  const int32_t attended[] = {128, 0, 12, 1, 8, 512};
  problem.attended = attended;
  EXPECT(balance_heads(problem, 2)[1] > 60, "the second thread starts at head %zu", balance_heads(problem, 2)[1]);
  problem.attended = nullptr;
  const int32_t short_ones[] = {0, 3, 5};
  problem.cu_seqlens = short_ones;
  problem.sequences = 2;
  EXPECT(balance_heads(problem, 8).size() == 2, "five tokens went to %zu threads",
         balance_heads(problem, 8).size() - 1);
  // Twelve heads of 32 elements, as in MiniLM: one text of 16 tokens is worth more than one thread.
  const int32_t one_text[] = {0, 16};
  problem.cu_seqlens = one_text;
  problem.sequences = 1;
  problem.head_size = 32;
  const size_t runs = balance_heads(problem, 8).size() - 1;
  EXPECT(runs == 4, "sixteen tokens went to %zu threads", runs);
}

}  // namespace
}  // namespace torch_ext::test
