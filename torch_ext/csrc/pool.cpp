#include "pool.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace torch_ext {
namespace {

struct Named {
  const char* name;
  Pooling mode;
};
constexpr Named kPoolings[] = {
    {"mean", Pooling::kMean},
    {"cls", Pooling::kCls},
    {"max", Pooling::kMax},
    {"lasttoken", Pooling::kLastToken},
    {"weightedmean", Pooling::kWeightedMean},
    {"mean_sqrt_len_tokens", Pooling::kMeanSqrtLength},
};

}  // namespace

std::optional<Pooling> find_pooling(std::string_view name) {
  for (const Named& known : kPoolings) {
    if (name == known.name) return known.mode;
  }
  return std::nullopt;
}

std::vector<Pooling> find_poolings(std::string_view names) {
  std::vector<Pooling> found;
  for (size_t begin = 0; begin <= names.size();) {
    const size_t end = std::min(names.find('+', begin), names.size());
    const std::optional<Pooling> known = find_pooling(names.substr(begin, end - begin));
    if (!known) return {};
    found.push_back(*known);
    begin = end + 1;
  }
  return found;
}

std::string pooling_names() {
  std::string names;
  for (const Named& known : kPoolings) names += (names.empty() ? "" : ", ") + std::string(known.name);
  return names;
}

void pool_texts(const PoolProblem& p, const VecKernels& vec, size_t begin, size_t end) {
  const size_t n = p.kept;
  std::vector<float> weighted(p.mode == Pooling::kWeightedMean ? n : 0);
  for (size_t s = begin; s < end; ++s) {
    float* const acc = p.out + s * (p.stride ? p.stride : n);
    const auto begins = static_cast<size_t>(p.cu_seqlens[s]);
    auto last = static_cast<size_t>(p.cu_seqlens[s + 1]), first = std::min(begins + p.skipped, last);
    if (first == last) {
      std::fill(acc, acc + n, 0.0f);
      continue;
    }
    if (p.mode == Pooling::kCls) last = first + 1;
    if (p.mode == Pooling::kLastToken) first = last - 1;
    const auto count = static_cast<float>(last - first);
    const auto row = [&](size_t t) { return static_cast<const char*>(p.hidden) + t * p.width * dtype_bytes(p.type); };
    const auto fold = p.mode == Pooling::kMax ? vec.max_row : vec.accumulate_row;
    std::fill(acc, acc + n, p.mode == Pooling::kMax ? -INFINITY : 0.0f);
    for (size_t t = first; t < last; ++t) {
      if (p.mode != Pooling::kWeightedMean) {
        fold(n, row(t), p.type, acc);
        continue;
      }
      // Skipped tokens keep their places: the shares of the others are 1 on average all the same.
      const float share = 2.0f * static_cast<float>(t - begins + 1) / static_cast<float>(first + last - 2 * begins + 1);
      std::fill(weighted.begin(), weighted.end(), 0.0f);
      vec.accumulate_row(n, row(t), p.type, weighted.data());
      vec.scale_rows(1, n, weighted.data(), n, &share, weighted.data(), n, DType::kF32);
      vec.accumulate_row(n, weighted.data(), DType::kF32, acc);
    }
    float factor = 1.0f;
    if (p.mode == Pooling::kMean || p.mode == Pooling::kWeightedMean) factor = 1.0f / count;
    if (p.mode == Pooling::kMeanSqrtLength) factor = 1.0f / std::sqrt(count);
    if (p.normalize) {
      // The same as torch.nn.functional.normalize: the norm is at least 1e-12. A vector whose norm is more than fp32 holds
      // becomes NaN, not zeros that look like an answer.
      const float norm = std::sqrt(vec.sum_squares(n, acc)) * factor;
      factor = std::isinf(norm) ? NAN : factor / std::max(norm, 1e-12f);
    }
    if (factor != 1.0f) vec.scale_rows(1, n, acc, n, &factor, acc, n, DType::kF32);
  }
}

}  // namespace torch_ext
