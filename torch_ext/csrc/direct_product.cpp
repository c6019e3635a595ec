// Memory bounds these products on large matrices, so they use the vectors of the ABI baseline (NEON, SSE2): no instance
// for each instruction set.
#include "direct_product.h"

#include <algorithm>

namespace torch_ext {
namespace {

typedef float v4f __attribute__((vector_size(16)));
typedef uint32_t v4u __attribute__((vector_size(16)));
typedef uint16_t v4h __attribute__((vector_size(8)));

inline v4f widen4(const bf16* p) {
  v4h h;
  __builtin_memcpy(&h, p, sizeof h);
  return (v4f)(__builtin_convertvector(h, v4u) << 16);
}

inline float widen1(bf16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &u, sizeof f);
  return f;
}

inline v4f load4(const float* p) {
  v4f v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline void store4(float* p, v4f v) { __builtin_memcpy(p, &v, sizeof v); }

inline float sum4(v4f v) { return (v[0] + v[2]) + (v[1] + v[3]); }

// `kCols` columns that lie along memory: dot products, four partial sums each.
template <size_t kRows, size_t kCols>
void dot_columns(size_t k, const float* lhs, size_t ld_lhs, const bf16* rhs, size_t ld, float* tile, size_t ld_tile) {
  v4f acc[kRows][kCols] = {};
  size_t p = 0;
  for (; p + 4 <= k; p += 4) {
    v4f b[kCols];
#pragma GCC unroll 4
    for (size_t j = 0; j < kCols; ++j) b[j] = widen4(rhs + j * ld + p);
#pragma GCC unroll 4
    for (size_t i = 0; i < kRows; ++i) {
      const v4f a = load4(lhs + i * ld_lhs + p);
#pragma GCC unroll 4
      for (size_t j = 0; j < kCols; ++j) acc[i][j] += a * b[j];
    }
  }
  for (size_t i = 0; i < kRows; ++i) {
    for (size_t j = 0; j < kCols; ++j) {
      float sum = sum4(acc[i][j]);
      for (size_t q = p; q < k; ++q) sum += lhs[i * ld_lhs + q] * widen1(rhs[j * ld + q]);
      tile[i * ld_tile + j] = sum;
    }
  }
}

template <size_t kRows>
void dot_all(size_t k, const float* lhs, size_t ld_lhs, const bf16* rhs, size_t ld, size_t cols, float* tile) {
  size_t j = 0;
  for (; j + 4 <= cols; j += 4) dot_columns<kRows, 4>(k, lhs, ld_lhs, rhs + j * ld, ld, tile + j, cols);
  for (; j < cols; ++j) dot_columns<kRows, 1>(k, lhs, ld_lhs, rhs + j * ld, ld, tile + j, cols);
}

// `kSteps` rows of the right-hand side, each read from left to right and added to all columns: the prefetchers follow
// that many streams, and the tile is loaded and stored once for each kSteps products.
template <size_t kRows, size_t kSteps>
void add_steps(const float* lhs, size_t ld_lhs, const bf16* rhs, size_t ld, size_t cols, float* tile) {
  constexpr size_t kVectors = kRows <= 2 ? 4 : 2;
  size_t j = 0;
  for (; j + 4 * kVectors <= cols; j += 4 * kVectors) {
    v4f acc[kRows][kVectors];
#pragma GCC unroll 4
    for (size_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; ++v) acc[i][v] = load4(tile + i * cols + j + 4 * v);
    }
#pragma GCC unroll 8
    for (size_t p = 0; p < kSteps; ++p) {
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; ++v) {
        const v4f b = widen4(rhs + p * ld + j + 4 * v);
#pragma GCC unroll 4
        for (size_t i = 0; i < kRows; ++i) acc[i][v] += lhs[i * ld_lhs + p] * b;
      }
    }
#pragma GCC unroll 4
    for (size_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; ++v) store4(tile + i * cols + j + 4 * v, acc[i][v]);
    }
  }
  for (; j < cols; ++j) {
    for (size_t i = 0; i < kRows; ++i) {
      float sum = tile[i * cols + j];
      for (size_t p = 0; p < kSteps; ++p) sum += lhs[i * ld_lhs + p] * widen1(rhs[p * ld + j]);
      tile[i * cols + j] = sum;
    }
  }
}

template <size_t kRows>
void add_all(size_t k, const float* lhs, size_t ld_lhs, const bf16* rhs, size_t ld, size_t cols, float* tile) {
  std::fill(tile, tile + kRows * cols, 0.0f);
  size_t p = 0;
  for (; p + 8 <= k; p += 8) add_steps<kRows, 8>(lhs + p, ld_lhs, rhs + p * ld, ld, cols, tile);
  for (; p < k; ++p) add_steps<kRows, 1>(lhs + p, ld_lhs, rhs + p * ld, ld, cols, tile);
}

}  // namespace

void direct_product(size_t rows, size_t k, const float* lhs, size_t ld_lhs, const bf16* rhs, size_t ld, bool transposed,
                    size_t first, size_t cols, float* tile) {
  using Run = void (*)(size_t, const float*, size_t, const bf16*, size_t, size_t, float*);
  static constexpr Run kDot[kMaxDirectRows] = {dot_all<1>, dot_all<2>, dot_all<3>, dot_all<4>};
  static constexpr Run kAdd[kMaxDirectRows] = {add_all<1>, add_all<2>, add_all<3>, add_all<4>};
  if (transposed) {
    kDot[rows - 1](k, lhs, ld_lhs, rhs + first * ld, ld, cols, tile);
  } else {
    kAdd[rows - 1](k, lhs, ld_lhs, rhs + first, ld, cols, tile);
  }
}

}  // namespace torch_ext
