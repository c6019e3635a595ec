/// What the loop nest in gemm.cpp needs to know of a family of matrix micro-kernels.
///
/// A family shares one layout of the packed right-hand side (the weight). It has one packer for each source
/// type and order, and one micro-kernel for each number of rows it can take at a time. A kernel is data: the
/// tables live beside the kernels, and dispatch.cpp lists them best first.
///
///   destination   x [m, k]  *  w [n, k]^T  ->  f32 [m, n]
///
/// Micro-kernel contract (`UKernel::run`): for `steps` steps of `k_step` products each,
///
///   tile[i][j] = sum over p < steps * k_step of  lhs(i, p) * rhs(j, p)      i < mr, j < nr
///
/// with `lhs` one packed block of `mr` rows, `rhs` one packed panel of `nr` columns, and `tile` f32, rows `ld_tile`
/// elements apart. All padding is zero and was put there by the packers, so a micro-kernel has no edges.
///
/// Families of s8 add exactly, in s32, and end with  tile[i][j] = f32(sum) * lhs_scale(i) * rhs_scale(j). A block then
/// ends with the f32 scales of its rows, a panel with those of its columns (and with the s32 corrections that the family
/// needs). The block's outliers come last: what micro-kernels leave to the loop nest.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace torch_ext {

/// How a packed weight lies in memory. Values are stored in headers of packed weights: append only.
enum class Layout : uint32_t {
  kBf16Pairs = 1,   ///< bf16, pairs of columns times four products: see neon_bf16/pack_bf16_pairs.inl
  kBf16Rows = 2,    ///< bf16, one row of nr columns for each product: see vec/gemm_f32.inl
  kF32Rows = 3,     ///< the same in fp32
  kPlain = 4,       ///< bf16 [n, k], row-major, for PyTorch's own linear
  kOnednn = 5,      ///< as oneDNN reordered it, for PyTorch's prepacked linear
  kS8Groups = 6,    ///< s8, groups of kr products of one column, with f32 scales: see vec/quantize.inl
  kBf16Dots = 7,    ///< bf16, pairs of products of one column: see x86/gemm_dot_bf16.inl
  kBf16Halves = 8,  ///< bf16, each product's row with columns j and j + nr / 2 side by side: see vec/gemm_f32.inl
  kS8Crossed = 9,   ///< s8, products 0 and 2 of four apart from 1 and 3: see x86/gemm_pmaddwd.cpp
};

/// Whether a packed weight in this layout is one of s8.
constexpr bool is_s8(Layout layout) { return layout == Layout::kS8Groups || layout == Layout::kS8Crossed; }

using UKernelFn = void (*)(size_t steps, const void* lhs, const void* rhs, float* tile, size_t ld_tile);

struct UKernel {
  const char* name;
  size_t mr;
  UKernelFn run;
};

/// Packs `rows` (1..block_rows) rows of a row-major matrix, `k` elements each, `ld` elements apart, as one block
/// of `block_rows` rows. Rows past `rows` and products past `k` (up to a whole step) are zero.
using PackRowsFn = void (*)(size_t rows, size_t block_rows, size_t k, const void* src, size_t ld, void* dst);

/// Packs `cols` (1..nr) columns of a row-major [k, n] matrix, rows `ld` elements apart, as one panel.
using PackColsFn = void (*)(size_t cols, size_t k, const void* src, size_t ld, void* dst);

/// Softmax numerators, packed as the left-hand side of the product with the values:
/// exp(scale * (s(i, j) - max over j of s(i, j))) of `rows` rows of n scores, rounded to bf16, as a block of `block_rows`
/// rows; sums[i] is the sum of row i in fp32. n >= 1; rows of scores are `ld` apart and have room for n rounded up to
/// kMaxVecWidth; they hold nothing of use afterwards.
using SoftmaxPackFn = void (*)(size_t rows, size_t block_rows, size_t n, float scale, float* s, size_t ld, float* sums,
                               void* block);

/// What a column of a weight of s8 adds to the panel beside its scale: an s32 that the micro-kernel subtracts from the
/// column's sums. `q` holds the k products of the column.
using ColumnTermFn = int32_t (*)(const int8_t* q, size_t k);

/// A panel in another form, which takes more memory and less work: what many rows are multiplied with.
struct WidePanels {
  size_t step_bytes;        ///< of the products of one step
  size_t extra_bytes = 0;   ///< of a panel, behind its products
  const UKernel* ukernels;  ///< for the same numbers of rows as the family's
  void (*widen)(size_t steps, const void* panel, void* wide);
  size_t least_rows;             ///< fewer are not worth the work
  size_t most_steps = SIZE_MAX;  ///< nor are more: the first-level cache, or the kernel, takes no more
};

/// An element of a row that is so much larger than the others that quantizing them by it would leave them few steps: 0 in
/// the block, where products are exact, and multiplied in fp32. LLM.int8() (https://arxiv.org/abs/2208.07339) does so with
/// columns of the whole input.
struct Outlier {
  uint32_t row;  ///< in the block
  uint32_t p;    ///< its product
  float value;
};

/// Most outliers of a row. Elements are taken out if they, and no more than so many, are above half of the largest
/// magnitude: the scale falls to less than half.
constexpr size_t kMaxRowOutliers = 4;

/// What blocks of s8 end with: how many outliers there are, then they themselves; room for those of `mr` rows. A multiple of
/// 8, which kernels store at a time.
constexpr size_t kRowOutliersBytes = 2 * sizeof(uint32_t) + kMaxRowOutliers * sizeof(Outlier);

/// Largest mr and nr of any family: sizes tiles on the stack.
constexpr size_t kMaxMr = 32;
constexpr size_t kMaxNr = 32;

/// Dequantized columns of panels that outliers were multiplied with last. A column of products is often that of many rows:
/// models have channels that are large in every text.
struct OutlierColumns {
  static constexpr size_t kKept = 64;
  uint64_t keys[kKept];  ///< panel and product
  alignas(64) float columns[kKept][kMaxNr];
};

/// tile(row, j) += value * rhs(j, p) for each outlier of a block, in fp32. `tile` is the block's product with the panel of
/// index `panel`, rows nr apart; `products` is the packed panel and `scales` those of its columns.
using AddOutliersFn = void (*)(const Outlier* outliers, size_t count, size_t panel, const void* products,
                               const float* scales, OutlierColumns& kept, float* tile);

/// Two blocks times two panels by seven products of half as many steps instead of eight: see strassen_winograd.h. Halves
/// of a block are its first and second half of the steps, each like a block of its own; so are sums of them. `steps` are
/// those of a half, a multiple of eight.
struct StrassenWinograd {
  size_t rows;         ///< of a block; there is an ordinary micro-kernel for so many
  UKernelFn multiply;  ///< a block of sums times a wide panel of sums
  /// S1 to S4 of two packed blocks, one after the other. False if results would be less accurate than they should: the
  /// sums are of no use then.
  bool (*add_rows)(size_t steps, const void* upper, const void* lower, void* sums);
  /// What products 1 to 7 take from two packed panels, as wide panels.
  bool (*add_columns)(size_t steps, const void* left, const void* right, void* operands);
  /// The left panel's upper and lower tile, one behind the other, rows nr apart; those of the right panel. `products` are
  /// seven tiles of the rows of a block.
  void (*finish[2])(const float* products, float* tiles);
  size_t least_rows, least_k;  ///< less is not worth the work
};

struct GemmKernel {
  const char* name;            ///< family, also the layout's name: type, p, nr x kr
  uint32_t required_features;  ///< bits of cpu_features.h that its micro-kernels and packers need
  Layout layout;               ///< id in the header of packed weights
  size_t nr, kr;               ///< panel width, and products of one column that lie side by side in a panel
  size_t k_step;               ///< products per step; k is padded with zeros to a multiple of it
  DType lhs_type;              ///< element type of packed blocks
  DType rhs_type;              ///< element type of packed panels
  PackRowsFn pack_lhs_f32;     ///< families of s8 quantize each row here, by its largest magnitude without outliers
  PackRowsFn pack_lhs_bf16;
  PackRowsFn pack_rhs_nxk_f32 = nullptr;  ///< weight rows are columns: source [n, k]; null in families of s8
  PackRowsFn pack_rhs_nxk_bf16 = nullptr;
  PackColsFn pack_rhs_kxn_f32 = nullptr;  ///< source [k, n]
  PackColsFn pack_rhs_kxn_bf16 = nullptr;
  const UKernel* ukernels;  ///< ascending mr; the last one is the main kernel
  size_t ukernel_count;
  size_t row_extra_bytes = 0;     ///< per row, at the end of a block
  size_t column_extra_bytes = 0;  ///< per column, at the end of a panel
  /// Not null: blocks end with outliers, and row_extra_bytes with kRowOutliersBytes; families of s8 alone.
  AddOutliersFn add_outliers = nullptr;
  ColumnTermFn column_term = nullptr;
  /// The element of a panel that holds product p of column j; null: ((p / kr) * nr + j) * kr + p % kr.
  size_t (*panel_place)(size_t j, size_t p) = nullptr;
  const WidePanels* wide = nullptr;                     ///< null: no other form
  const StrassenWinograd* strassen_winograd = nullptr;  ///< for families with `wide`; null: eight products
  SoftmaxPackFn softmax_pack = nullptr;                 ///< null: attention takes softmax_row and pack_lhs_f32
  /// Called on a thread before micro-kernels run there, and after; null: there is nothing to do.
  void (*begin)() = nullptr;
  void (*end)() = nullptr;

  size_t steps(size_t k) const { return (k + k_step - 1) / k_step; }
  size_t panels(size_t n) const { return (n + nr - 1) / nr; }
  size_t lhs_block_bytes(size_t mr, size_t k) const {
    return mr * (steps(k) * k_step * dtype_bytes(lhs_type) + row_extra_bytes);
  }
  size_t rhs_panel_bytes(size_t k) const {
    return nr * (steps(k) * k_step * dtype_bytes(rhs_type) + column_extra_bytes);
  }
  /// Where those of a packed block begin.
  size_t outliers_at(size_t mr, size_t k) const { return lhs_block_bytes(mr, k) - mr * kRowOutliersBytes; }
  size_t wide_panel_bytes(size_t k) const { return steps(k) * wide->step_bytes + wide->extra_bytes; }
  size_t max_mr() const { return ukernels[ukernel_count - 1].mr; }
  /// Whether `rows` rows are multiplied with wide panels.
  bool widens(size_t rows, size_t k) const { return wide && rows >= wide->least_rows && steps(k) <= wide->most_steps; }
  size_t panel_index(size_t j, size_t p) const {
    return panel_place ? panel_place(j, p) : ((p / kr) * nr + j) * kr + p % kr;
  }

  /// Index of the smallest micro-kernel that takes `rows` rows at once (rows <= max_mr()).
  size_t ukernel_index(size_t rows) const {
    size_t i = 0;
    while (ukernels[i].mr < rows) ++i;
    return i;
  }
  const UKernel& ukernel_for(size_t rows) const { return ukernels[ukernel_index(rows)]; }
};

/// Brackets the micro-kernels that a thread runs.
class GemmSession {
 public:
  explicit GemmSession(const GemmKernel& kernel) : end_(kernel.end) {
    if (kernel.begin) kernel.begin();
  }
  ~GemmSession() {
    if (end_) end_();
  }
  GemmSession(const GemmSession&) = delete;
  GemmSession& operator=(const GemmSession&) = delete;

 private:
  void (*end_)();
};

}  // namespace torch_ext
