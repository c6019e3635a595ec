/// One vector for each text of a batch. Knows nothing of torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/vec_kernels.h"

namespace torch_ext {

/// How the hidden states of a text become one vector; named as sentence-transformers does.
enum class Pooling : uint8_t {
  kMean,
  kCls,            ///< the first token's
  kMax,            ///< the largest of each dimension
  kLastToken,      ///< the last token's
  kWeightedMean,   ///< token i of n, from 1, counts i / (1 + ... + n)
  kMeanSqrtLength  ///< the sum divided by the square root of the number of tokens
};

std::optional<Pooling> find_pooling(std::string_view name);

/// Those of "cls+mean", whose vectors stand side by side; none where one is unknown.
std::vector<Pooling> find_poolings(std::string_view names);

/// "mean, cls, max, ...": what `find_pooling` knows.
std::string pooling_names();

struct PoolProblem {
  const void* hidden = nullptr;  ///< [tokens, width]
  DType type = DType::kBF16;
  size_t width = 0;
  const int32_t* cu_seqlens = nullptr;  ///< no text is empty
  Pooling mode = Pooling::kMean;
  bool normalize = false;  ///< to length 1, where it is at least 1e-12; NaN where fp32 cannot hold it
  size_t kept = 0;         ///< leading dimensions that are kept, before normalization; at most `width`
  size_t skipped = 0;      ///< leading tokens that do not count; a text without others becomes 0
  size_t stride = 0;       ///< from one text to the next in `out`; 0: `kept`
  float* out = nullptr;    ///< [sequences, kept]
};

/// Pools texts [begin, end).
void pool_texts(const PoolProblem& problem, const VecKernels& vec, size_t begin, size_t end);

}  // namespace torch_ext
