#include "gemm.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu_features.h"
#include "outlier_products.h"
#include "packing/packed_weight.h"
#include "strassen_winograd.h"

namespace torch_ext {
namespace {

// Packed rows that one pass over the weight's panels uses: half of the second-level cache, so that a panel and the output
// stay beside them.
size_t lhs_chunk_bytes() { return second_level_cache_bytes() / 2; }

// Rows that are worth reading the weights for: see kMinShareTokens in encoder.cpp.
constexpr size_t kMinFinerRows = 128;

// Products that are worth taking from a queue: some microseconds, against a tenth of one for the taking.
constexpr size_t kMinTakenMacs = kMinTaskMacs / 4;

using Range = GemmRows;

// Part `index` of `parts` of [0, count), in whole multiples of `unit`.
Range split(size_t count, size_t unit, size_t parts, size_t index) {
  const size_t units = (count + unit - 1) / unit;
  const size_t begin = units * index / parts * unit, end = units * (index + 1) / parts * unit;
  return {std::min(begin, count), std::min(end, count)};
}

// Rows that are worth widening the panels for again, where more of them would not stay in the second-level cache.
constexpr size_t kLeastWideRows = 384;

// Rows that are packed at a time, whole main blocks.
size_t rows_at_a_time(const GemmKernel& kernel, size_t k) {
  const size_t main_rows = kernel.max_mr(), row_bytes = kernel.lhs_block_bytes(1, k);
  return std::max(kernel.widens(kLeastWideRows, k) ? round_up(kLeastWideRows, main_rows) : main_rows,
                  lhs_chunk_bytes() / std::max<size_t>(row_bytes, 1) / main_rows * main_rows);
}

// Rows of the next block: whole main blocks, then one block for what is left.
size_t block_rows(const GemmKernel& kernel, size_t left) {
  return left >= kernel.max_mr() ? kernel.max_mr() : kernel.ukernel_for(left).mr;
}

}  // namespace

GemmPlan plan_gemm(const GemmKernel& kernel, size_t m, size_t n, size_t k, size_t threads) {
  GemmPlan best;
  const size_t macs = m * n * k;
  const size_t useful = std::max<size_t>(1, macs / kMinTaskMacs);
  const size_t parts = std::min(threads, useful);
  if (parts <= 1) return best;
  const size_t row_units = (m + kernel.max_mr() - 1) / kernel.max_mr();
  const size_t panel_units = kernel.panels(n);
  // Costs in products: reading one weight element from beyond the cache is taken as 8 products, packing one element
  // of the rows as 4. They decide only between grids of equal balance.
  constexpr size_t kWeightCost = 8, kPackCost = 4;
  size_t best_cost = SIZE_MAX;
  for (size_t rows = 1; rows <= std::min(parts, row_units); ++rows) {
    const size_t panels = std::min(parts / rows, panel_units);
    const size_t task_rows = std::min((row_units + rows - 1) / rows * kernel.max_mr(), m);
    const size_t task_columns = std::min((panel_units + panels - 1) / panels * kernel.nr, n);
    const size_t cost = k * (task_rows * task_columns + kPackCost * task_rows + kWeightCost * task_columns);
    if (cost < best_cost) {
      best_cost = cost;
      best = {rows, panels};
    }
  }
  return best;
}

GemmPlan finer_plan(const GemmKernel& kernel, size_t m, size_t k, GemmPlan plan) {
  if (plan.tasks() <= 1) return plan;
  if (plan.panel_tasks > 1) {
    // As many rows as are packed at a time: nothing is packed or read more often.
    const size_t chunk_rows = rows_at_a_time(kernel, k);
    plan.row_tasks = std::max(plan.row_tasks, (m + chunk_rows - 1) / chunk_rows);
  } else {
    plan.row_tasks = std::clamp(m / kMinFinerRows, plan.row_tasks, 4 * plan.row_tasks);
  }
  return plan;
}

GemmRows task_rows(const GemmKernel& kernel, size_t m, const GemmPlan& plan, size_t task) {
  return split(m, kernel.max_mr(), plan.row_tasks, task / plan.panel_tasks);
}

bool PanelQueue::take(size_t task, size_t count, size_t least, size_t unit, size_t& first, size_t& last) {
  std::atomic<size_t>& taken = taken_[task / panel_tasks_];
  first = taken.load(std::memory_order_relaxed);
  do {
    if (first >= count) return false;
    // Half of an equal share of what is left: large parts first, small ones to even the ends out.
    last = std::min(count, first + round_up(std::max(least, (count - first) / (2 * panel_tasks_)), unit));
  } while (!taken.compare_exchange_weak(first, last, std::memory_order_relaxed));
  return true;
}

void run_gemm_task(const GemmKernel& kernel, const VecKernels& vec, const GemmProblem& problem, const GemmPlan& plan,
                   size_t task, PanelQueue* queue) {
  const size_t k = problem.k, nr = kernel.nr, steps = kernel.steps(k);
  const Range rows = task_rows(kernel, problem.m, plan, task);
  Range panels = split(kernel.panels(problem.n), 1, plan.panel_tasks, task % plan.panel_tasks);
  const PackRowsFn pack = problem.lhs_type == DType::kF32 ? kernel.pack_lhs_f32 : kernel.pack_lhs_bf16;
  const auto store = vec.store_tile[static_cast<size_t>(problem.activation)];
  const size_t row_bytes = kernel.lhs_block_bytes(1, k), panel_bytes = kernel.rhs_panel_bytes(k);
  const size_t main_rows = kernel.max_mr(), chunk_rows = rows_at_a_time(kernel, k);
  const char* const lhs = static_cast<const char*>(problem.lhs);
  const char* const weight = static_cast<const char*>(problem.panels);
  OutlierProducts outliers(kernel, k);
  alignas(64) float tile[kMaxMr * kMaxNr];
  const GemmSession session(kernel);
  const bool by_pairs = suits_strassen_winograd(kernel, rows.end - rows.begin, k);
  // Rows that do not fit into the cache at once come to each panel several times: then a task keeps its own.
  const bool takes = queue && queue->used() && rows.end - rows.begin <= chunk_rows &&
                     (!by_pairs || strassen_winograd_at_once(kernel, rows.end - rows.begin));
  const size_t least_panels = kMinTakenMacs / std::max<size_t>(1, (rows.end - rows.begin) * k * nr) + 1;
  const auto take = [&] {
    const size_t unit = by_pairs ? 2 : 1;  // so that the same panels are a pair whoever takes them
    return queue->take(task, kernel.panels(problem.n), least_panels, unit, panels.begin, panels.end);
  };
  if (takes && !take()) return;
  if (by_pairs) {
    const auto take_next = [&](PanelRange& next) {
      if (!take()) return false;
      next = {panels.begin, panels.end};
      return true;
    };
    const PanelRange first{panels.begin, panels.end};
    run_strassen_winograd(kernel, vec, problem, rows, first, takes ? TakePanels(take_next) : nullptr);
    return;
  }
  // Whether there is a panel at `panel`, or another one to take, where `panel` goes on then.
  const auto more = [&](size_t& panel) {
    if (panel < panels.end) return true;
    if (!takes || !take()) return false;
    panel = panels.begin;
    return true;
  };

  for (size_t chunk = rows.begin; chunk < rows.end; chunk += chunk_rows) {
    const size_t chunk_end = std::min(rows.end, chunk + chunk_rows);
    char* const packed =
        static_cast<char*>(thread_scratch(ScratchSlot::kLhs, row_bytes * round_up(chunk_end - chunk, main_rows)));
    char* block = packed;
    for (size_t row = chunk; row < chunk_end;) {
      const size_t mr = block_rows(kernel, chunk_end - row), valid = std::min(mr, chunk_end - row);
      pack(valid, mr, k, lhs + row * problem.ld_lhs * dtype_bytes(problem.lhs_type), problem.ld_lhs, block);
      block += mr * row_bytes;
      row += valid;
    }
    char* const wide = kernel.widens(chunk_end - chunk, k)
                           ? static_cast<char*>(thread_scratch(ScratchSlot::kWidePanel, kernel.wide_panel_bytes(k)))
                           : nullptr;
    const UKernel* const ukernels = wide ? kernel.wide->ukernels : kernel.ukernels;
    for (size_t panel = panels.begin; more(panel); ++panel) {
      const size_t column = panel * nr, columns = std::min(nr, problem.n - column);
      const char* rhs = weight + panel * panel_bytes;
      if (wide) {
        kernel.wide->widen(steps, rhs, wide);
        rhs = wide;
      }
      block = packed;
      const UKernel* ukernel = ukernels + kernel.ukernel_count - 1;
      for (size_t row = chunk; row < chunk_end;) {
        const size_t left = chunk_end - row;
        if (left < main_rows) ukernel = ukernels + kernel.ukernel_index(left);
        const size_t mr = ukernel->mr, valid = std::min(mr, left);
        ukernel->run(steps, block, rhs, tile, nr);
        outliers.add(block, mr, panel, weight + panel * panel_bytes, tile);
        store(tile, nr, valid, columns, problem.epilogue, row, column);
        block += mr * row_bytes;
        row += valid;
      }
    }
  }
}

PanelRange task_panels(const GemmKernel& kernel, size_t n, const GemmPlan& plan, size_t task) {
  const Range range = split(kernel.panels(n), 1, plan.panel_tasks, task % plan.panel_tasks);
  return {range.begin, range.end};
}

size_t packed_payload_bytes(const GemmKernel& kernel, size_t n, size_t k) {
  return kernel.panels(n) * kernel.rhs_panel_bytes(k);
}

void pack_weight_panels(const GemmKernel& kernel, size_t n, size_t k, const void* weight, DType type, size_t ld,
                        void* payload, size_t first, size_t last) {
  const PackRowsFn pack = type == DType::kF32 ? kernel.pack_rhs_nxk_f32 : kernel.pack_rhs_nxk_bf16;
  const size_t panel_bytes = kernel.rhs_panel_bytes(k);
  for (size_t panel = first; panel < last; ++panel) {
    const size_t column = panel * kernel.nr;
    pack(std::min(kernel.nr, n - column), kernel.nr, k,
         static_cast<const char*>(weight) + column * ld * dtype_bytes(type), ld,
         static_cast<char*>(payload) + panel * panel_bytes);
  }
}

void pack_weight_panels_kxn(const GemmKernel& kernel, size_t n, size_t k, const void* source, DType type, size_t ld,
                            void* payload, size_t first, size_t last) {
  const PackColsFn pack = type == DType::kF32 ? kernel.pack_rhs_kxn_f32 : kernel.pack_rhs_kxn_bf16;
  const size_t panel_bytes = kernel.rhs_panel_bytes(k);
  for (size_t panel = first; panel < last; ++panel) {
    const size_t column = panel * kernel.nr;
    pack(std::min(kernel.nr, n - column), k, static_cast<const char*>(source) + column * dtype_bytes(type), ld,
         static_cast<char*>(payload) + panel * panel_bytes);
  }
}

void unpack_weight(const GemmKernel& kernel, size_t n, size_t k, const void* payload, void* weight) {
  const size_t nr = kernel.nr, panel_bytes = kernel.rhs_panel_bytes(k), bytes = dtype_bytes(kernel.rhs_type);
  char* to = static_cast<char*>(weight);
  for (size_t column = 0; column < n; ++column) {
    const char* const panel = static_cast<const char*>(payload) + column / nr * panel_bytes;
    for (size_t p = 0; p < k; ++p, to += bytes) {
      std::memcpy(to, panel + kernel.panel_index(column % nr, p) * bytes, bytes);
    }
  }
}

// Bytes of products at the start of a panel of s8.
static size_t s8_products(const GemmKernel& kernel, size_t k) { return kernel.nr * kernel.steps(k) * kernel.k_step; }

void pack_weight_panels_s8(const GemmKernel& kernel, size_t n, size_t k, const int8_t* weight, const float* scales,
                           void* payload, size_t first, size_t last) {
  const size_t nr = kernel.nr, panel_bytes = kernel.rhs_panel_bytes(k), products = s8_products(kernel, k);
  for (size_t panel = first; panel < last; ++panel) {
    char* const data = static_cast<char*>(payload) + panel * panel_bytes;
    std::memset(data, 0, panel_bytes);
    for (size_t j = 0; j < std::min(nr, n - panel * nr); ++j) {
      const size_t column = panel * nr + j;
      const int8_t* const q = weight + column * k;
      for (size_t p = 0; p < k; ++p) data[kernel.panel_index(j, p)] = static_cast<char>(q[p]);
      std::memcpy(data + products + j * sizeof(float), scales + column, sizeof(float));
      if (kernel.column_term) {
        const int32_t term = kernel.column_term(q, k);
        std::memcpy(data + products + (nr + j) * sizeof(float), &term, sizeof term);
      }
    }
  }
}

void unpack_weight_s8(const GemmKernel& kernel, size_t n, size_t k, const void* payload, int8_t* weight,
                      float* scales) {
  const size_t nr = kernel.nr, panel_bytes = kernel.rhs_panel_bytes(k), products = s8_products(kernel, k);
  unpack_weight(kernel, n, k, payload, weight);
  for (size_t column = 0; column < n; ++column) {
    const char* const panel = static_cast<const char*>(payload) + column / nr * panel_bytes;
    std::memcpy(scales + column, panel + products + column % nr * sizeof(float), sizeof(float));
  }
}

namespace {

struct Scratch {
  void* data[static_cast<size_t>(ScratchSlot::kCount)] = {};
  size_t bytes[static_cast<size_t>(ScratchSlot::kCount)] = {};
  ~Scratch() {
    for (void* d : data) std::free(d);
  }
};

}  // namespace

static Scratch& this_threads_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

void* thread_scratch(ScratchSlot slot, size_t bytes) {
  Scratch& scratch = this_threads_scratch();
  const size_t i = static_cast<size_t>(slot);
  if (scratch.bytes[i] < bytes) {
    std::free(scratch.data[i]);
    scratch.bytes[i] = 0;
    const size_t rounded = round_up(bytes, 4096);
    scratch.data[i] = std::aligned_alloc(64, rounded);
    if (!scratch.data[i]) throw std::bad_alloc();
    scratch.bytes[i] = rounded;
  }
  return scratch.data[i];
}

void trim_thread_scratch(ScratchSlot slot, size_t bytes) {
  Scratch& scratch = this_threads_scratch();
  const size_t i = static_cast<size_t>(slot);
  if (scratch.bytes[i] <= bytes) return;
  std::free(scratch.data[i]);
  scratch.data[i] = nullptr;
  scratch.bytes[i] = 0;
}

void free_thread_scratch() {
  for (size_t slot = 0; slot < static_cast<size_t>(ScratchSlot::kCount); ++slot) {
    trim_thread_scratch(static_cast<ScratchSlot>(slot), 0);
  }
}

}  // namespace torch_ext
