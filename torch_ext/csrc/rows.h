/// How row-wise work is cut, and where its rows stand in their sequences. Knows nothing of torch.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace torch_ext {

/// Elements that are worth a thread of their own in row-wise work.
constexpr size_t kRowGrain = 32 * 1024;

/// fn(token, position) for tokens [begin, end), in order, of sequences that lie one after the other: `cu_seqlens` has
/// `sequences` + 1 entries, and a position is counted from the start of the token's sequence.
template <typename F>
void for_each_position(const int32_t* cu_seqlens, size_t sequences, size_t begin, size_t end, const F& fn) {
  const auto first = static_cast<int32_t>(begin);
  size_t s = static_cast<size_t>(std::upper_bound(cu_seqlens, cu_seqlens + sequences + 1, first) - cu_seqlens) - 1;
  for (size_t t = begin; t < end; ++t) {
    while (t >= static_cast<size_t>(cu_seqlens[s + 1])) ++s;
    fn(t, t - static_cast<size_t>(cu_seqlens[s]));
  }
}

}  // namespace torch_ext
