#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "gemm.h"
#include "packing/packed_weight.h"

namespace torch_ext {
namespace {

// What one head needs of this thread's scratch memory, each part 64-byte aligned.
struct HeadScratch {
  char *keys, *values, *queries, *probabilities;
  float *scores, *context;
};

HeadScratch carve(const GemmKernel& kernel, size_t keys, size_t head_size, size_t ld_scores, size_t ld_context) {
  const size_t sizes[] = {
      kernel.panels(keys) * kernel.rhs_panel_bytes(head_size),
      kernel.panels(head_size) * kernel.rhs_panel_bytes(keys),
      kernel.lhs_block_bytes(kernel.max_mr(), head_size),
      kernel.lhs_block_bytes(kernel.max_mr(), keys),
      kernel.max_mr() * ld_scores * sizeof(float),
      kernel.max_mr() * ld_context * sizeof(float),
  };
  constexpr size_t kParts = sizeof sizes / sizeof sizes[0];
  size_t offsets[kParts], total = 0;
  for (size_t i = 0; i < kParts; ++i) {
    offsets[i] = total;
    total += round_up(sizes[i], kPackedAlignment);
  }
  char* const base = static_cast<char*>(thread_scratch(ScratchSlot::kAttention, total));
  return {base + offsets[0],
          base + offsets[1],
          base + offsets[2],
          base + offsets[3],
          reinterpret_cast<float*>(base + offsets[4]),
          reinterpret_cast<float*>(base + offsets[5])};
}

// s[j] = scale * s[j] + bias[clamp(first + j - query, -reach, reach) + reach] for the n keys from `first` on.
void add_relative_bias(float* s, size_t n, size_t first, size_t query, float scale, const float* bias, size_t reach) {
  const auto key_at = [&](size_t key) { return std::clamp(key, first, first + n) - first; };
  const size_t near = key_at(query < reach ? 0 : query - reach), far = key_at(query + reach);
  for (size_t j = 0; j < near; ++j) s[j] = s[j] * scale + bias[0];
  const float* const at = bias + reach;
  const ptrdiff_t distance = static_cast<ptrdiff_t>(first) - static_cast<ptrdiff_t>(query);
  for (size_t j = near; j < far; ++j) s[j] = s[j] * scale + at[distance + static_cast<ptrdiff_t>(j)];
  for (size_t j = far; j < n; ++j) s[j] = s[j] * scale + at[reach];
}

// What of keys [first, first + n) lies outside of the `before` keys before `query`, itself, and the `behind` ones after it.
void mask_outside(float* s, size_t n, size_t first, size_t query, size_t before, size_t behind) {
  const size_t low = query < before ? 0 : query - before, high = query + behind + 1;
  std::fill(s, s + (std::clamp(low, first, first + n) - first), -INFINITY);
  std::fill(s + (std::clamp(high, first, first + n) - first), s + n, -INFINITY);
}

size_t length_of(const AttentionProblem& problem, size_t sequence) {
  return static_cast<size_t>(problem.cu_seqlens[sequence + 1] - problem.cu_seqlens[sequence]);
}

size_t keys_of(const AttentionProblem& problem, size_t sequence, size_t length) {
  return problem.attended ? std::min(length, static_cast<size_t>(problem.attended[sequence])) : length;
}

size_t attention_cost(const AttentionProblem& problem, size_t sequence) {
  const size_t length = length_of(problem, sequence), keys = keys_of(problem, sequence, length);
  const size_t all = problem.window >= length ? keys : std::min(keys, 2 * problem.window + 1);
  const size_t seen = problem.causal ? (all + 1) / 2 : all;
  const size_t products = 2 + (problem.positions.keys != nullptr) + (problem.positions.queries != nullptr);
  return length * (products * seen + 16) * problem.head_size;
}

}  // namespace

std::vector<size_t> balance_heads(const AttentionProblem& problem, size_t parts) {
  std::vector<size_t> cost(problem.sequences);
  size_t total = 0;
  for (size_t s = 0; s < problem.sequences; ++s) {
    cost[s] = attention_cost(problem, s);
    total += cost[s] * problem.heads;
  }
  // Below this a second thread costs more than it saves: about 7 us of one core (AMD EPYC 7001).
  constexpr size_t kMinRunCost = 64 * 1024;
  parts = std::max<size_t>(1, std::min(parts, total / kMinRunCost));
  std::vector<size_t> starts{0};
  size_t done = 0;
  for (size_t s = 0; s < problem.sequences && starts.size() < parts; ++s) {
    for (size_t h = 0; h < problem.heads; ++h) {
      const size_t index = s * problem.heads + h;
      if (done >= total * starts.size() / parts && starts.size() < parts && index > starts.back()) {
        starts.push_back(index);
      }
      done += cost[s];
    }
  }
  starts.push_back(problem.sequences * problem.heads);
  return starts;
}

void run_attention_head(const GemmKernel& kernel, const VecKernels& vec, const AttentionProblem& problem,
                        size_t sequence, size_t head) {
  const size_t first = static_cast<size_t>(problem.cu_seqlens[sequence]);
  const size_t length = length_of(problem, sequence), key_count = keys_of(problem, sequence, length);
  if (length == 0) return;
  const size_t d = problem.head_size, hidden = problem.heads * d, nr = kernel.nr;
  const size_t kv_heads = problem.kv_heads ? problem.kv_heads : problem.heads, ld = hidden + 2 * kv_heads * d;
  const size_t element = dtype_bytes(problem.type);
  const bool f32 = problem.type == DType::kF32;
  const PackRowsFn pack_queries = f32 ? kernel.pack_lhs_f32 : kernel.pack_lhs_bf16;
  const PackRowsFn pack_keys = f32 ? kernel.pack_rhs_nxk_f32 : kernel.pack_rhs_nxk_bf16;
  const PackColsFn pack_values = f32 ? kernel.pack_rhs_kxn_f32 : kernel.pack_rhs_kxn_bf16;
  const size_t ld_scores = round_up(round_up(key_count, nr), kMaxVecWidth), ld_context = round_up(d, nr);
  const HeadScratch s = carve(kernel, key_count, d, ld_scores, ld_context);
  const char* const qkv = static_cast<const char*>(problem.qkv) + first * ld * element;
  const char* const queries = qkv + head * d * element;
  const char* const keys = qkv + (hidden + head * kv_heads / problem.heads * d) * element;
  const char* const values = keys + kv_heads * d * element;
  char* const out = static_cast<char*>(problem.out) + (first * hidden + head * d) * element;
  const size_t key_panel = kernel.rhs_panel_bytes(d), value_panel = kernel.rhs_panel_bytes(key_count);
  const bool masked = problem.window < length || problem.causal;
  const size_t before = std::min(problem.window, length), behind = problem.causal ? 0 : before;
  const float* const bias =
      problem.relative_bias ? problem.relative_bias + head * (2 * problem.bias_reach + 1) : nullptr;

  const GemmSession session(kernel);
  for (size_t j = 0; j < key_count; j += nr) {
    pack_keys(std::min(nr, key_count - j), nr, d, keys + j * ld * element, ld, s.keys + j / nr * key_panel);
  }
  for (size_t j = 0; j < d; j += nr) {
    pack_values(std::min(nr, d - j), key_count, values + j * element, ld, s.values + j / nr * value_panel);
  }

  std::optional<PositionScores> positions;
  if (problem.positions) {
    positions.emplace(kernel, problem.positions, PositionScores::Head{problem.type, length, head, d, hidden, keys, ld});
  }

  const size_t seeing = std::min(length, key_count + before);  // Rows that see a key.
  for (size_t row = 0; row < seeing;) {
    const UKernel& ukernel = kernel.ukernel_for(std::min(kernel.max_mr(), seeing - row));
    const size_t rows = std::min(ukernel.mr, seeing - row);
    // The keys that these rows see: whole panels from the first one on.
    const size_t begin = row < before ? 0 : (row - before) / nr * nr;
    const size_t end = std::min(key_count, row + rows + behind);
    const size_t seen = end - begin;
    pack_queries(rows, ukernel.mr, d, queries + row * ld * element, ld, s.queries);
    for (size_t j = begin; j < end; j += nr) {
      ukernel.run(kernel.steps(d), s.queries, s.keys + j / nr * key_panel, s.scores + (j - begin), ld_scores);
    }
    if (positions) positions->add(ukernel, s.queries, row, rows, begin, seen, s.scores, ld_scores);
    for (size_t i = 0; (bias || masked) && i < rows; ++i) {
      float* const scores = s.scores + i * ld_scores;
      if (bias) add_relative_bias(scores, seen, begin, row + i, problem.scale, bias, problem.bias_reach);
      if (masked) mask_outside(scores, seen, begin, row + i, before, behind);
    }
    const float scale = bias ? 1.0f : problem.scale;
    float factors[kMaxMr];
    if (kernel.softmax_pack) {
      kernel.softmax_pack(rows, ukernel.mr, seen, scale, s.scores, ld_scores, factors, s.probabilities);
    } else {
      const auto softmax_row = f32 ? vec.softmax_row : vec.softmax_row_to_bf16;
      for (size_t i = 0; i < rows; ++i) factors[i] = softmax_row(s.scores + i * ld_scores, seen, scale);
      kernel.pack_lhs_f32(rows, ukernel.mr, seen, s.scores, ld_scores, s.probabilities);
    }
    for (size_t i = 0; i < rows; ++i) factors[i] = 1.0f / factors[i];
    // A panel holds one step after the other: those of the keys before `begin` are left out.
    const size_t skipped = nr * begin * dtype_bytes(kernel.rhs_type);
    for (size_t j = 0; j < d; j += nr) {
      ukernel.run(kernel.steps(seen), s.probabilities, s.values + j / nr * value_panel + skipped, s.context + j,
                  ld_context);
    }
    vec.scale_rows(rows, d, s.context, ld_context, factors, out + row * hidden * element, hidden, problem.type);
    row += rows;
  }
  for (size_t row = seeing; row < length; ++row) std::memset(out + row * hidden * element, 0, d * element);
}

}  // namespace torch_ext
