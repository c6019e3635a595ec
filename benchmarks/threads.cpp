// How the parts of an encoder's layer are split over threads: what plan_gemm and balance_heads decide for an aarch64
// with bf16, on any machine. Prints one line of JSON for each part; threads.py makes the model of it.
//
//   threads HIDDEN WIDE HEADS TOKENS TEXT_TOKENS MOST_THREADS
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "attention.h"
#include "gemm.h"

namespace {

using namespace torch_ext;

// As the families of neon_bf16 and neon_i8mm: tiles of 8 x 12.
GemmKernel kernel_of(DType type) {
  static const auto ukernel = [] {
    UKernel u{};
    u.name = "8x12";
    u.mr = 8;
    return u;
  }();
  GemmKernel kernel{};
  kernel.name = "model";
  kernel.nr = 12;
  kernel.kr = kernel.k_step = 4;
  kernel.lhs_type = kernel.rhs_type = type;
  kernel.ukernels = &ukernel;
  kernel.ukernel_count = 1;
  return kernel;
}

// Softmax, in products for each score: about ten instructions for four scores, where a BFMMLA makes 16 products.
constexpr size_t kScoreMacs = 40;

// What one task has to do: products, and elements that it reads.
struct Load {
  size_t macs = 0, weights = 0, rows = 0;
};

void print(size_t threads, const char* part, const std::vector<Load>& loads, size_t row_tasks, size_t panel_tasks) {
  Load most, sum;
  for (const Load& load : loads) {
    if (load.macs > most.macs) most = load;
    sum.macs += load.macs;
    sum.weights += load.weights;
    sum.rows += load.rows;
  }
  std::printf(
      "{\"threads\": %zu, \"part\": \"%s\", \"tasks\": %zu, \"row_tasks\": %zu, \"panel_tasks\": %zu, \"most_macs\": "
      "%zu, \"macs\": %zu, "
      "\"most_weights\": %zu, \"weights\": %zu, \"most_rows\": %zu, \"rows\": %zu}\n",
      threads, part, loads.size(), row_tasks, panel_tasks, most.macs, sum.macs, most.weights, sum.weights, most.rows,
      sum.rows);
}

// Sizes of the ranges that run_gemm_task makes: whole units, as even as they can be.
std::vector<size_t> split(size_t count, size_t unit, size_t parts) {
  const size_t units = (count + unit - 1) / unit;
  std::vector<size_t> sizes;
  for (size_t i = 0; i < parts; ++i) {
    const size_t begin = std::min(count, units * i / parts * unit),
                 end = std::min(count, units * (i + 1) / parts * unit);
    sizes.push_back(end - begin);
  }
  return sizes;
}

void linear(const char* part, size_t m, size_t n, size_t k, size_t threads) {
  const GemmKernel kernel = kernel_of(DType::kBF16);
  const GemmPlan plan = plan_gemm(kernel, m, n, k, threads);
  std::vector<Load> loads;
  for (const size_t rows : split(m, kernel.max_mr(), plan.row_tasks)) {
    for (const size_t columns : split(n, kernel.nr, plan.panel_tasks)) {
      loads.push_back({rows * columns * k, columns * k, rows * k});
    }
  }
  print(threads, part, loads, plan.row_tasks, plan.panel_tasks);
}

void attention(size_t hidden, size_t heads, const std::vector<int32_t>& cu_seqlens, size_t threads) {
  const size_t head_size = hidden / heads;
  AttentionProblem problem;
  problem.cu_seqlens = cu_seqlens.data();
  problem.sequences = cu_seqlens.size() - 1;
  problem.heads = heads;
  problem.head_size = head_size;
  const std::vector<size_t> starts = balance_heads(problem, threads);
  std::vector<Load> loads;
  for (size_t t = 0; t + 1 < starts.size(); ++t) {
    Load load;
    for (size_t i = starts[t]; i < starts[t + 1]; ++i) {
      const size_t length = static_cast<size_t>(cu_seqlens[i / heads + 1] - cu_seqlens[i / heads]);
      load.macs += length * length * (2 * head_size + kScoreMacs);
      load.rows += 3 * length * head_size;
    }
    loads.push_back(load);
  }
  print(threads, "attention", loads, loads.size(), 1);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7) {
    std::fprintf(stderr, "usage: %s HIDDEN WIDE HEADS TOKENS TEXT_TOKENS MOST_THREADS\n", argv[0]);
    return 2;
  }
  size_t value[6];
  for (int i = 0; i < 6; ++i) {
    value[i] = std::strtoull(argv[i + 1], nullptr, 10);
    if (value[i] == 0) {
      std::fprintf(stderr, "threads: expected positive numbers, got %s\n", argv[i + 1]);
      return 2;
    }
  }
  const auto [hidden, wide, heads, tokens, text, most_threads] = value;
  std::vector<int32_t> cu_seqlens{0};
  while (static_cast<size_t>(cu_seqlens.back()) < tokens) {
    cu_seqlens.push_back(static_cast<int32_t>(std::min(tokens, cu_seqlens.back() + text)));
  }
  for (size_t threads = 1; threads <= most_threads; ++threads) {
    linear("qkv", tokens, 3 * hidden, hidden, threads);
    attention(hidden, heads, cu_seqlens, threads);
    linear("out", tokens, hidden, hidden, threads);
    linear("up", tokens, wide, hidden, threads);
    linear("down", tokens, hidden, wide, threads);
  }
  return 0;
}
