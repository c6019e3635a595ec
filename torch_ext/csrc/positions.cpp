#include "positions.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

// Powers and logarithms are long double's: pow and log of double would need a newer C library than the rest.

namespace torch_ext {

void fill_rotary_table(size_t positions, size_t head_size, double theta, double factor, float* table) {
  const size_t pairs = head_size / 2;
  for (size_t i = 0; i < pairs; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_size);
    const float power = static_cast<float>(std::pow(static_cast<long double>(static_cast<float>(theta)), exponent));
    const float frequency = 1.0f / power * static_cast<float>(factor);
    for (size_t position = 0; position < positions; ++position) {
      const double angle = static_cast<float>(position) * frequency;
      table[position * head_size + i] = static_cast<float>(std::cos(angle));
      table[position * head_size + pairs + i] = static_cast<float>(std::sin(angle));
    }
  }
}

size_t relative_bucket(long distance, size_t buckets, size_t reach) {
  const size_t half = buckets / 2, single = half / 2;  // `single` distances have a bucket of their own
  const size_t size = static_cast<size_t>(std::labs(distance));
  size_t bucket = size;
  if (size >= single) {
    // The logarithm is fp32's: at the edge of a bucket its rounding decides, and models were trained with it.
    const auto log = [](float x) { return static_cast<float>(std::log(static_cast<long double>(x))); };
    const float ratio =
        log(static_cast<float>(size) / static_cast<float>(single)) /
        static_cast<float>(std::log(static_cast<long double>(reach) / static_cast<long double>(single)));
    bucket = std::min(half - 1, single + static_cast<size_t>(ratio * static_cast<float>(half - single)));
  }
  return bucket + (distance > 0 ? half : 0);
}

void fill_relative_bias(const float* bias, size_t buckets, size_t heads, size_t reach, float* table) {
  for (size_t column = 0; column < 2 * reach + 1; ++column) {
    const size_t bucket = relative_bucket(static_cast<long>(column) - static_cast<long>(reach), buckets, reach);
    for (size_t head = 0; head < heads; ++head) table[head * (2 * reach + 1) + column] = bias[bucket * heads + head];
  }
}

size_t position_row(long distance, size_t span, size_t reach) {
  const size_t size = static_cast<size_t>(std::labs(distance)), middle = span / 2;
  size_t bucket = size;
  if (reach && size > middle) {
    // In fp32, as above.
    const auto log = [](float x) { return static_cast<float>(std::log(static_cast<long double>(x))); };
    const double widest = static_cast<double>(reach - 1) / static_cast<double>(middle);
    const float ratio = log(static_cast<float>(size) / static_cast<float>(middle)) / log(static_cast<float>(widest));
    bucket = static_cast<size_t>(std::ceil(ratio * static_cast<float>(middle - 1))) + middle;
  }
  if (distance < 0) return bucket > span ? 0 : span - bucket;
  return std::min(span + bucket, 2 * span - 1);
}

void fill_position_rows(size_t longest, size_t span, size_t reach, int32_t* rows) {
  const auto center = static_cast<long>(longest) - 1;
  for (long behind = -center; behind <= center; ++behind) {
    rows[behind + center] = static_cast<int32_t>(position_row(-behind, span, reach));
  }
}

}  // namespace torch_ext
