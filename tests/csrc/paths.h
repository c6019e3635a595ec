/// Every path that is compiled for this architecture. Tests call kernels through the helpers below, which note what
/// ran: a path that this CPU has and that no test ran is a failure.
#pragma once

#include <string>
#include <vector>

#include "gemm.h"
#include "guarded.h"
#include "kernels/gemm_kernel.h"
#include "kernels/vec_kernels.h"

namespace torch_ext::test {

/// A family of matrix kernels, with the row kernels that it is used with.
struct GemmPath {
  const GemmKernel* kernel;
  const VecKernels* vec;
  uint32_t required_features;
  std::string engine;  ///< as micro-kernels are named after it: "neon_bfmmla"
  std::string name() const { return std::string(kernel->name) + " " + engine; }
};

const std::vector<GemmPath>& all_gemm_paths();
const std::vector<const VecKernels*>& all_vec_paths();

/// Families of s8, which quantize their rows and so have tests of their own (test_s8.cpp).
const std::vector<GemmPath>& all_s8_paths();
std::vector<GemmPath> s8_paths();

/// Those whose features this CPU has.
std::vector<GemmPath> gemm_paths();
std::vector<const VecKernels*> vec_paths();

void cover(const std::string& path);
size_t covered_paths();
std::vector<std::string> uncovered_paths();
std::vector<std::string> paths_of_other_cpus();

/// The index formulas in the comments of the kernels and packers, written anew:
/// the element of a panel that holds product p of column j, and the one of a block of `mr` rows with product p of row i.
size_t panel_index(const GemmKernel& g, size_t j, size_t p);
size_t block_index(const GemmKernel& g, size_t mr, size_t steps, size_t i, size_t p);

/// The six packers of a family.
enum class Packer { kLhs, kRhsNxk, kRhsKxn };
constexpr Packer kPackers[] = {Packer::kLhs, Packer::kRhsNxk, Packer::kRhsKxn};
const char* packer_name(Packer p);
/// Packs `rows` rows (kLhs, kRhsNxk) or columns (kRhsKxn) of `src`; `block_rows` is ignored by kRhsKxn.
void pack(const GemmPath& path, Packer packer, DType type, size_t rows, size_t block_rows, size_t k, const void* src,
          size_t ld, void* dst);

void run_ukernel(const UKernel& ukernel, size_t steps, const void* lhs, const void* rhs, float* tile, size_t ld_tile);
void store_tile(const VecKernels& vec, Activation a, const float* tile, size_t ld_tile, size_t rows, size_t cols,
                const Epilogue& ep, size_t row0, size_t col0);
float softmax_row(const VecKernels& vec, float* s, size_t n, float scale);
float softmax_row_to_bf16(const VecKernels& vec, float* s, size_t n, float scale);
void scale_rows(const VecKernels& vec, size_t rows, size_t n, const float* s, size_t ld, const float* factors,
                void* out, size_t ld_out, DType out_type);
void softmax_pack(const GemmPath& path, size_t rows, size_t block_rows, size_t n, float scale, float* s, size_t ld,
                  float* sums, void* block);
void sum_layer_norm_row(const VecKernels& vec, size_t n, const void* a, const void* b, const void* c,
                        const float* b_scale, const float* weight, const float* bias, float eps, void* out, DType t);
void sum_rms_norm_row(const VecKernels& vec, size_t n, const void* a, const void* b, const void* c, const float* weight,
                      float eps, void* out, DType t);
void rotate_row(const VecKernels& vec, size_t heads, size_t head_size, const float* cos, const float* sin,
                const void* x, void* out, DType t);
void gate_row(const VecKernels& vec, Activation a, size_t n, const void* x, const void* gate, void* out, DType t);
void accumulate_row(const VecKernels& vec, size_t n, const void* x, DType t, float* acc);
void max_row(const VecKernels& vec, size_t n, const void* x, DType t, float* acc);
float sum_squares(const VecKernels& vec, size_t n, const float* x);

/// Notes a whole product or attention of a family: "gemm", "attention f32", ...
void cover_use(const GemmPath& path, const char* use);

/// `lhs` [m, k] times a packed weight, into `out` [m, n]: no bias, residual or activation.
GemmProblem problem_of(const Matrix& lhs, const GuardedBytes& panels, const Matrix& out);

}  // namespace torch_ext::test
