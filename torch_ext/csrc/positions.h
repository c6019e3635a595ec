/// Tables of rotary and relative positions, which an encoder's sizes determine. Knows nothing of torch.
#pragma once

#include <cstddef>

namespace torch_ext {

/// table [positions, head_size]: the cosines of each position's angles, then their sines. Pair i of a head turns by
/// theta^(-2 i / head_size) per position; frequencies and angles are rounded to fp32, as models were trained with.
void fill_rotary_table(size_t positions, size_t head_size, double theta, float* table);

/// The bucket of the distance `position of key - position of query`: one for each small one, then wider and wider ones; keys
/// at or before the query take the first half of them. From `reach` on, all are in a half's last bucket.
size_t relative_bucket(long distance, size_t buckets, size_t reach);

/// table [heads, 2 * reach + 1] of biases [buckets, heads]; column reach + d is for keys d behind the query.
void fill_relative_bias(const float* bias, size_t buckets, size_t heads, size_t reach, float* table);

}  // namespace torch_ext
