/// The loop nest around a micro-kernel: C = epilogue(A W^T) for packed W, any sizes. Knows nothing of torch.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "kernels/gemm_kernel.h"
#include "kernels/vec_kernels.h"

namespace torch_ext {

struct GemmProblem {
  size_t m = 0, n = 0, k = 0;
  const void* lhs = nullptr;  ///< [m, k], rows `ld_lhs` elements apart
  size_t ld_lhs = 0;
  DType lhs_type = DType::kBF16;
  const void* panels = nullptr;  ///< packed right-hand side
  Activation activation = Activation::kNone;
  Epilogue epilogue;
};

/// How the product is split: a grid of row ranges x panel ranges, one task each.
struct GemmPlan {
  size_t row_tasks = 1, panel_tasks = 1;
  size_t tasks() const { return row_tasks * panel_tasks; }
};

/// Chooses the grid for at most `threads` threads. Every task packs the rows it uses, so a split over panels repeats
/// packing, and a split over rows reads the weight again: the grid with the least of the most loaded task's work wins.
/// Products below `kMinTaskMacs` for each task are not split further.
GemmPlan plan_gemm(const GemmKernel& kernel, size_t m, size_t n, size_t k, size_t threads);

constexpr size_t kMinTaskMacs = 512 * 1024;

/// The plan with its rows cut further, for threads that take task after task: one on a slow core takes fewer. The panels that
/// tasks share, see PanelQueue, are cut already.
GemmPlan finer_plan(const GemmKernel& kernel, size_t m, size_t k, GemmPlan plan);

/// The rows of [0, m) that task `task` of the plan computes.
struct GemmRows {
  size_t begin, end;
};
GemmRows task_rows(const GemmKernel& kernel, size_t m, const GemmPlan& plan, size_t task);

/// Panels that the tasks of one row range take from each other, a few at a time: a task whose core is slow, or begins late,
/// leaves more of them to the others. One for each run of a plan.
class PanelQueue {
 public:
  explicit PanelQueue(const GemmPlan& plan)
      : panel_tasks_(plan.panel_tasks), used_(plan.panel_tasks > 1 && plan.row_tasks <= kMostRows) {}

  /// Whether panels are taken from here; otherwise each task has panels of its own.
  bool used() const { return used_; }

  /// Takes panels [first, last) of `count` for a task, a multiple of `unit` or all that are left; false if none are. `least` of
  /// them are worth the taking. Tasks of one row range pass the same `unit`.
  bool take(size_t task, size_t count, size_t least, size_t unit, size_t& first, size_t& last);

 private:
  static constexpr size_t kMostRows = 16;
  const size_t panel_tasks_;
  const bool used_;
  std::atomic<size_t> taken_[kMostRows] = {};
};

/// Runs task `task` of the plan. Tasks are independent of each other, but for the panels that they take from `queue`, if
/// there is one.
void run_gemm_task(const GemmKernel& kernel, const VecKernels& vec, const GemmProblem& problem, const GemmPlan& plan,
                   size_t task, PanelQueue* queue = nullptr);

/// The panels [first, last) that task `task` of the plan multiplies.
struct PanelRange {
  size_t first, last;
};
PanelRange task_panels(const GemmKernel& kernel, size_t n, const GemmPlan& plan, size_t task);

/// Bytes of the payload of a packed [n, k] weight.
size_t packed_payload_bytes(const GemmKernel& kernel, size_t n, size_t k);

/// Packs panels [first, last) of a row-major [n, k] weight with rows `ld` elements apart.
void pack_weight_panels(const GemmKernel& kernel, size_t n, size_t k, const void* weight, DType type, size_t ld,
                        void* payload, size_t first, size_t last);

/// The same for a row-major [k, n] source, rows `ld` elements apart.
void pack_weight_panels_kxn(const GemmKernel& kernel, size_t n, size_t k, const void* source, DType type, size_t ld,
                            void* payload, size_t first, size_t last);

/// Unpacks the products of a payload to a row-major [n, k] weight of the kernel's `rhs_type`.
void unpack_weight(const GemmKernel& kernel, size_t n, size_t k, const void* payload, void* weight);

/// Packs panels [first, last) of a row-major s8 [n, k] weight with one f32 scale for each row.
void pack_weight_panels_s8(const GemmKernel& kernel, size_t n, size_t k, const int8_t* weight, const float* scales,
                           void* payload, size_t first, size_t last);

/// Unpacks a payload of s8 panels to a row-major s8 [n, k] weight and its n scales.
void unpack_weight_s8(const GemmKernel& kernel, size_t n, size_t k, const void* payload, int8_t* weight, float* scales);

/// Memory of this thread, at least `bytes`, 64-byte aligned; the next call in the same slot may return the same
/// memory. Slots keep the callers in one call chain apart.
enum class ScratchSlot { kLhs, kRhs, kWidePanel, kAttention, kPositions, kEncoder, kCount };
void* thread_scratch(ScratchSlot slot, size_t bytes);

/// Gives the slot's memory back if it is more than `bytes`.
void trim_thread_scratch(ScratchSlot slot, size_t bytes);

/// Gives all slots of this thread back.
void free_thread_scratch();

}  // namespace torch_ext
