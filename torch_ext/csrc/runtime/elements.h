/// Elements of tensors in files, as fp32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "dtype.h"
#include "runtime/safetensors.h"

namespace torch_ext::runtime {

inline float widen_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 0x1f,
                 fraction = half & 0x3ff;
  if (exponent == 0) {  // zero, or a subnormal number: fraction / 2^24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0xff : exponent + 112) << 23 | fraction << 13;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <typename T>
T element(const char* data, size_t i) {
  T x;
  std::memcpy(&x, data + i * sizeof x, sizeof x);
  return x;
}

inline float float_at(const TensorView& t, size_t i) {
  switch (t.type) {
    case ElementType::kF32:
      return element<float>(t.data, i);
    case ElementType::kF16:
      return widen_f16(element<uint16_t>(t.data, i));
    case ElementType::kBF16:
      return widened(element<bf16>(t.data, i));
    case ElementType::kS8:
      break;
  }
  return static_cast<float>(element<int8_t>(t.data, i));
}

/// All of a tensor.
inline std::vector<float> floats_of(const TensorView& t) {
  std::vector<float> values(t.elements());
  for (size_t i = 0; i < values.size(); ++i) values[i] = float_at(t, i);
  return values;
}

}  // namespace torch_ext::runtime
