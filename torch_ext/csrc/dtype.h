/// Element types of matrices, as C++ types and as values.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace torch_ext {

/// One bf16 element in memory: the upper half of an fp32's bits. It has no arithmetic: kernels widen it to fp32 or hand it
/// to instructions for bf16.
struct bf16 {
  uint16_t bits;

  bool operator==(const bf16&) const = default;
};
static_assert(sizeof(bf16) == 2 && alignof(bf16) == 2 && std::is_trivial_v<bf16>);

/// The same number in fp32.
inline float widened(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float widened(float x) { return x; }

/// Element types of matrices in memory. Values are stored in headers of packed weights: append only.
/// kS16 holds values of s8 in packed blocks alone.
enum class DType : uint8_t { kF32 = 0, kBF16 = 1, kS8 = 2, kS16 = 3 };

/// Bytes of one element.
constexpr size_t dtype_bytes(DType t) {
  switch (t) {
    case DType::kF32:
      return 4;
    case DType::kBF16:
    case DType::kS16:
      return 2;
    case DType::kS8:
      break;
  }
  return 1;
}

/// The DType of a C++ type; an element type without one does not compile.
template <typename T>
struct DTypeOf;
template <>
struct DTypeOf<float> : std::integral_constant<DType, DType::kF32> {};
template <>
struct DTypeOf<bf16> : std::integral_constant<DType, DType::kBF16> {};
template <>
struct DTypeOf<int8_t> : std::integral_constant<DType, DType::kS8> {};

template <typename T>
constexpr DType dtype_of = DTypeOf<T>::value;

}  // namespace torch_ext
