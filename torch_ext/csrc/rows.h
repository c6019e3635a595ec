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

/// fn(token, row) as above, with the row of a table of positions that the token takes: `offset` for the first token of a
/// sequence, offset + 1 for the next. Tokens whose id is `padding_id` are not counted and take row offset - 1; a negative
/// `padding_id` is no token's.
template <typename F>
void for_each_position_row(const int32_t* cu_seqlens, size_t sequences, size_t begin, size_t end, size_t offset,
                           const int64_t* ids, int64_t padding_id, const F& fn) {
  if (padding_id < 0) {
    return for_each_position(cu_seqlens, sequences, begin, end, [&](size_t t, size_t place) { fn(t, place + offset); });
  }
  size_t counted = 0;
  for_each_position(cu_seqlens, sequences, begin, end, [&](size_t t, size_t place) {
    if (t == begin) {
      counted = place - static_cast<size_t>(std::count(ids + t - place, ids + t, padding_id));
    } else if (place == 0) {
      counted = 0;
    }
    fn(t, ids[t] == padding_id ? offset - 1 : offset + counted++);
  });
}

}  // namespace torch_ext
