#include "strassen_winograd.h"

#include <algorithm>
#include <iterator>
#include <type_traits>

#include "cpu_features.h"
#include "packing/packed_weight.h"

namespace torch_ext {
namespace {

constexpr size_t kProducts = 7;

// Pairs of blocks whose products are kept until their tiles are complete: each of a pair of panels' operands comes from
// the second-level cache once for so many.
constexpr size_t kGroup = 16;

// Rows that are worth adding up the panels for, where more of them would not stay in the second-level cache.
constexpr size_t kLeastChunkRows = 576;

// Products that complete the tiles of the left panel, and those that complete the right one's after them.
constexpr size_t kLeft[] = {0, 1, 5, 6, 3}, kRight[] = {4, 2};
static_assert(std::size(kLeft) + std::size(kRight) == kProducts);

/// Rows [row, row + rows) times panels [panel, panel + panels), by the ordinary loops.
void multiply_part(const GemmKernel& kernel, const VecKernels& vec, const GemmProblem& problem, GemmRows rows,
                   PanelRange panels) {
  if (rows.begin == rows.end || panels.first == panels.last) return;
  GemmKernel ordinary = kernel;
  ordinary.strassen_winograd = nullptr;
  const size_t column = panels.first * kernel.nr;
  GemmProblem part = problem;
  part.m = rows.end - rows.begin;
  part.n = std::min(panels.last * kernel.nr, problem.n) - column;
  part.lhs = static_cast<const char*>(problem.lhs) + rows.begin * problem.ld_lhs * dtype_bytes(problem.lhs_type);
  part.panels = static_cast<const char*>(problem.panels) + panels.first * kernel.rhs_panel_bytes(problem.k);
  Epilogue& e = part.epilogue;
  if (e.bias) e.bias += column;
  if (e.residual) {
    e.residual =
        static_cast<const char*>(e.residual) + (rows.begin * e.ld_residual + column) * dtype_bytes(e.residual_type);
  }
  e.out = static_cast<char*>(e.out) + (rows.begin * e.ld_out + column) * dtype_bytes(e.out_type);
  run_gemm_task(ordinary, vec, part, {}, 0);
}

/// One task: its sizes, in bytes where they are not counts, and what it does to rows and panels.
class Task {
 public:
  Task(const GemmKernel& kernel, const VecKernels& vec, const GemmProblem& problem)
      : kernel_(kernel),
        algorithm_(*kernel.strassen_winograd),
        problem_(problem),
        vec_(&vec),
        pack_(problem.lhs_type == DType::kF32 ? kernel.pack_lhs_f32 : kernel.pack_lhs_bf16),
        store_(vec.store_tile[static_cast<size_t>(problem.activation)]) {}

  /// Rows [rows.begin, rows.end), whole pairs of blocks and less than one more, times all of `panels` and what `take` gives.
  void run(GemmRows rows, PanelRange panels, const TakePanels& take);

  size_t pair_rows() const { return 2 * mr_; }

  /// Pairs whose packed rows fit into half of the second-level cache, or more where that would be few.
  size_t most_pairs() const {
    return std::clamp(second_level_cache_bytes() / 2 / pair_, (kLeastChunkRows + pair_rows() - 1) / pair_rows(),
                      kMostStrassenPairs);
  }

 private:
  const char* row(size_t i) const {
    return static_cast<const char*>(problem_.lhs) + i * problem_.ld_lhs * dtype_bytes(problem_.lhs_type);
  }
  bool pack_pair(size_t first_row, char* to) const;
  void multiply_group(const char* pairs, const bool* added, size_t count, size_t first_row, size_t panel);

  void multiply_block(const char* block, const UKernel& ukernel, size_t row, size_t rows, size_t panel) {
    alignas(64) float tile[kMaxMr * kMaxNr];
    ukernel.run(2 * steps_, block, packed_panel(panel), tile, nr_);
    store(tile, row, rows, panel);
  }

  const char* packed_panel(size_t panel) const { return static_cast<const char*>(problem_.panels) + panel * panel_; }

  void store(const float* tile, size_t row, size_t rows, size_t panel) const {
    const size_t column = panel * nr_;
    store_(tile, nr_, rows, std::min(nr_, problem_.n - column), problem_.epilogue, row, column);
  }

  const GemmKernel& kernel_;
  const StrassenWinograd& algorithm_;
  const GemmProblem& problem_;
  const VecKernels* const vec_;
  const PackRowsFn pack_;
  const std::decay_t<decltype(VecKernels::store_tile[0])> store_;
  const size_t mr_ = algorithm_.rows, nr_ = kernel_.nr, k_ = problem_.k, steps_ = kernel_.steps(k_) / 2;  // of a half
  const size_t block_ = kernel_.lhs_block_bytes(mr_, k_), panel_ = kernel_.rhs_panel_bytes(k_);
  const size_t half_block_ = mr_ * steps_ * kernel_.k_step * dtype_bytes(kernel_.lhs_type);
  const size_t operand_ = steps_ * kernel_.wide->step_bytes;
  // A pair of packed blocks, then sums of their halves.
  const size_t sums_ = round_up(2 * block_, 64), pair_ = round_up(sums_ + 4 * half_block_, 64);
  const size_t operands_bytes_ = round_up(kProducts * operand_, 64);  // of a pair of panels
  const size_t tile_ = mr_ * nr_;                                     // elements
  // Of the chunk of rows and the pair of panels at hand.
  char* operands_ = nullptr;
  float* products_ = nullptr;
};

/// Packs two whole blocks and adds up their halves; false if the sums are of no use: the blocks are ordinary ones then.
bool Task::pack_pair(size_t first_row, char* to) const {
  const size_t ld = problem_.ld_lhs;
  // Blocks of half as many products are halves of a block whatever the order in it.
  for (size_t block = 0; block < 2; ++block) {
    const char* const from = row(first_row + block * mr_);
    char* const packed = to + block * block_;
    pack_(mr_, mr_, k_ / 2, from, ld, packed);
    pack_(mr_, mr_, k_ / 2, from + k_ / 2 * dtype_bytes(problem_.lhs_type), ld, packed + half_block_);
  }
  if (algorithm_.add_rows(steps_, to, to + block_, to + sums_)) return true;
  for (size_t block = 0; block < 2; ++block) pack_(mr_, mr_, k_, row(first_row + block * mr_), ld, to + block * block_);
  return false;
}

/// A group of pairs of blocks, the first row of which is `first_row`, times panels `panel` and `panel` + 1.
void Task::multiply_group(const char* pairs, const bool* added, size_t count, size_t first_row, size_t panel) {
  const size_t blocks[kProducts] = {0,     half_block_,         sums_ + 3 * half_block_, block_ + half_block_,
                                    sums_, sums_ + half_block_, sums_ + 2 * half_block_};
  alignas(64) float tiles[kMaxMr * kMaxNr];
  const auto multiply = [&](size_t product) {
    for (size_t i = 0; i < count; ++i) {
      if (!added[i]) continue;
      algorithm_.multiply(steps_, pairs + i * pair_ + blocks[product], operands_ + product * operand_,
                          products_ + (i * kProducts + product) * tile_, nr_);
    }
  };
  const auto complete = [&](size_t right) {
    for (size_t i = 0; i < count; ++i) {
      if (!added[i]) continue;
      algorithm_.finish[right](products_ + i * kProducts * tile_, tiles);
      store(tiles, first_row + i * pair_rows(), pair_rows(), panel + right);
    }
  };
  for (const size_t product : kLeft) multiply(product);
  complete(0);
  for (const size_t product : kRight) multiply(product);
  complete(1);
}

void Task::run(GemmRows rows, PanelRange panels, const TakePanels& take) {
  const size_t pairs = (rows.end - rows.begin) / pair_rows(), rest_row = rows.begin + pairs * pair_rows();
  const size_t row_bytes = kernel_.lhs_block_bytes(1, k_);
  char* const packed = static_cast<char*>(
      thread_scratch(ScratchSlot::kLhs, pairs * pair_ + round_up(rows.end - rest_row, kernel_.max_mr()) * row_bytes));
  operands_ = static_cast<char*>(
      thread_scratch(ScratchSlot::kWidePanel, operands_bytes_ + kGroup * kProducts * tile_ * sizeof(float)));
  products_ = reinterpret_cast<float*>(operands_ + operands_bytes_);
  bool added[kMostStrassenPairs];
  for (size_t i = 0; i < pairs; ++i) added[i] = pack_pair(rows.begin + i * pair_rows(), packed + i * pair_);
  // Calls use(block, micro-kernel, first row, rows) for the rows that are no pair.
  const auto for_rest = [&](auto use) {
    char* block = packed + pairs * pair_;
    for (size_t row = rest_row; row < rows.end;) {
      const UKernel& ukernel = kernel_.ukernel_for(std::min(kernel_.max_mr(), rows.end - row));
      const size_t valid = std::min(ukernel.mr, rows.end - row);
      use(block, ukernel, row, valid);
      block += ukernel.mr * row_bytes;
      row += valid;
    }
  };
  for_rest([&](char* block, const UKernel& ukernel, size_t first, size_t valid) {
    pack_(valid, ukernel.mr, k_, row(first), problem_.ld_lhs, block);
  });

  const auto multiply_pair = [&](size_t panel) {
    for (size_t i = 0; i < pairs; i += kGroup) {
      multiply_group(packed + i * pair_, added + i, std::min(kGroup, pairs - i), rows.begin + i * pair_rows(), panel);
    }
    for (size_t p = panel; p < panel + 2; ++p) {
      for (size_t i = 0; i < 2 * pairs; ++i) {
        if (added[i / 2]) continue;
        multiply_block(packed + i / 2 * pair_ + i % 2 * block_, kernel_.ukernel_for(mr_), rows.begin + i * mr_, mr_, p);
      }
      for_rest([&](const char* block, const UKernel& ukernel, size_t first, size_t valid) {
        multiply_block(block, ukernel, first, valid, p);
      });
    }
  };
  // Panels that are left to the ordinary loops, which take the packed rows' memory: so many, then all that follow.
  PanelRange left_out[32];
  size_t left_out_count = 0;
  bool more = true;
  for (; more && left_out_count + 1 < std::size(left_out); more = take && take(panels)) {
    size_t panel = panels.first;
    for (; panel + 2 <= panels.last && left_out_count + 1 < std::size(left_out); panel += 2) {
      if (algorithm_.add_columns(steps_, packed_panel(panel), packed_panel(panel + 1), operands_)) {
        multiply_pair(panel);
      } else {
        left_out[left_out_count++] = {panel, panel + 2};
      }
    }
    if (panel < panels.last) left_out[left_out_count++] = {panel, panels.last};
  }
  for (size_t i = 0; i < left_out_count; ++i) multiply_part(kernel_, *vec_, problem_, rows, left_out[i]);
  for (; more; more = take && take(panels)) multiply_part(kernel_, *vec_, problem_, rows, panels);
}

}  // namespace

void run_strassen_winograd(const GemmKernel& kernel, const VecKernels& vec, const GemmProblem& problem, GemmRows rows,
                           PanelRange panels, const TakePanels& take) {
  Task task(kernel, vec, problem);
  // Chunks of about as many pairs each; the last one takes the rows that are no pair.
  const size_t pairs = (rows.end - rows.begin) / task.pair_rows(), most = task.most_pairs();
  const size_t chunks = take ? 1 : (pairs + most - 1) / most;
  for (size_t chunk = 0; chunk < chunks; ++chunk) {
    const size_t begin = rows.begin + pairs * chunk / chunks * task.pair_rows();
    const size_t end = rows.begin + pairs * (chunk + 1) / chunks * task.pair_rows();
    task.run({begin, chunk + 1 < chunks ? end : rows.end}, panels, take);
  }
}

}  // namespace torch_ext
