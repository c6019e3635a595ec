/// Memory whose last byte is followed by an unmapped page, and matrices in it.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels/gemm_kernel.h"
#include "reference.h"
#include "runner.h"

namespace torch_ext::test {

/// `bytes` bytes that end at an unmapped page: what reads or writes past them crashes. What is in front of them, up to
/// the start of the page, is filled and compared at the end of the life, so that a write there fails the test. Starts
/// as all ones, which is NaN in every type: what was not written shows.
class GuardedBytes {
 public:
  explicit GuardedBytes(size_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    mapped_ = (bytes + page - 1) / page * page + page;
    void* const p = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(static_cast<char*>(p) + mapped_ - page, page, PROT_NONE) != 0) {
      std::perror("mmap");
      std::abort();
    }
    start_ = static_cast<unsigned char*>(p);
    front_ = mapped_ - page - bytes;
    std::memset(start_, kFront, front_);
    std::memset(data(), 0xff, bytes);
  }
  ~GuardedBytes() {
    for (size_t i = 0; i < front_; ++i) {
      if (start_[i] == kFront) continue;
      fail(__FILE__, __LINE__, "byte %zu in front of a buffer was overwritten", front_ - i);
      break;
    }
    munmap(start_, mapped_);
  }
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;

  unsigned char* data() const { return start_ + front_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data());
  }

 private:
  static constexpr unsigned char kFront = 0xa5;
  unsigned char* start_;
  size_t mapped_, front_;
};

template <typename T>
class Guarded : public GuardedBytes {
 public:
  explicit Guarded(size_t count) : GuardedBytes(count * sizeof(T)) {}
  T* get() const { return as<T>(); }
  T& operator[](size_t i) const { return as<T>()[i]; }
};

/// A row-major fp32 or bf16 matrix, rows `ld` elements apart, that ends at an unmapped page. The gaps between rows
/// hold NaN.
class Matrix {
 public:
  Matrix(DType type, size_t rows, size_t cols, size_t ld)
      : type(type),
        rows(rows),
        cols(cols),
        ld(ld),
        bytes_(rows == 0 || cols == 0 ? 0 : ((rows - 1) * ld + cols) * dtype_bytes(type)) {}
  Matrix(DType type, size_t rows, size_t cols) : Matrix(type, rows, cols, cols) {}

  const DType type;
  const size_t rows, cols, ld;

  void* data() const { return bytes_.data(); }
  float get(size_t i, size_t j) const {
    return type == DType::kF32 ? bytes_.as<float>()[i * ld + j] : bf16_to_f32(bytes_.as<bf16>()[i * ld + j]);
  }
  void set(size_t i, size_t j, float x) {
    if (type == DType::kF32) {
      bytes_.as<float>()[i * ld + j] = x;
    } else {
      bytes_.as<bf16>()[i * ld + j] = reference_bf16(x);
    }
  }
  void fill(Random& random, float center = 0.0f, float spread = 1.0f) {
    for (size_t i = 0; i < rows; ++i) {
      for (size_t j = 0; j < cols; ++j) set(i, j, center + spread * random.value());
    }
  }
  void expect_gaps_untouched() const {
    const size_t element = dtype_bytes(type);
    for (size_t i = 0; i + 1 < rows; ++i) {
      for (size_t b = (i * ld + cols) * element; b < (i + 1) * ld * element; ++b) {
        EXPECT(bytes_.data()[b] == 0xff, "written between rows %zu and %zu of the output", i, i + 1);
      }
    }
  }

 private:
  GuardedBytes bytes_;
};

}  // namespace torch_ext::test
