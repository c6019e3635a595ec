/// Tables of rotary and relative positions, which an encoder's sizes determine. Knows nothing of torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace torch_ext {

/// table [positions, head_size]: the cosines of each position's angles, then their sines. Pair i of a head turns by
/// theta^(-2 i / head_size) * factor per position; frequencies and angles are rounded to fp32, as models were trained with.
void fill_rotary_table(size_t positions, size_t head_size, double theta, double factor, float* table);

/// The bucket of the distance `position of key - position of query`: one for each small one, then wider and wider ones; keys
/// at or before the query take the first half of them. From `reach` on, all are in a half's last bucket.
size_t relative_bucket(long distance, size_t buckets, size_t reach);

/// table [heads, 2 * reach + 1] of biases [buckets, heads]; column reach + d is for keys d behind the query.
void fill_relative_bias(const float* bias, size_t buckets, size_t heads, size_t reach, float* table);

/// The row of a table of `2 * span` relative positions, for a key `distance` before its query: span + distance, from 0 to the
/// last one. With a `reach` distances from span / 2 on share rows, wider and wider ones, until `reach` - 1 takes the last one;
/// it is above span / 2 + 1 then.
size_t position_row(long distance, size_t span, size_t reach);

/// rows [2 * longest - 1] for keys (index - (longest - 1)) behind their query.
void fill_position_rows(size_t longest, size_t span, size_t reach, int32_t* rows);

}  // namespace torch_ext
