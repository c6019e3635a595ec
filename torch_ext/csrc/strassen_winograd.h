/// One level of Strassen's product of matrices, in Winograd's variant with seven products and fifteen sums (J. Cohen, M.
/// Roth: On the Implementation of Strassen's Fast Multiplication Algorithm, Acta Informatica 6, 1976). For CPUs whose
/// products are all that takes time: an eighth of them is saved, and more than half of that remains after the sums.
///
/// Halves of the rows are the packed blocks of a pair, those of the columns the panels of a pair, and the steps are cut in two:
///
///   rows     A11 A12 (upper block)          columns  B11 (left panel) B12 (right panel)
///            A21 A22 (lower block)                   B21              B22
///
///   S1 = A21 + A22   S2 = S1 - A11   S3 = A11 - A21   S4 = A12 - S2
///   T1 = B12 - B11   T2 = B22 - T1   T3 = B22 - B12   T4 = T2 - B21
///
///   P1 = A11 B11   P2 = A12 B21   P3 = S4 B22   P4 = A22 T4   P5 = S1 T1   P6 = S2 T2   P7 = S3 T3
///
///   upper left = P1 + P2            upper right = P1 + P6 + P5 + P3
///   lower left = P1 + P6 + P7 - P4  lower right = P1 + P6 + P7 + P5
///
/// A result is rounded differently from the one of eight products, and depends, in its last bits, on the row and the column that
/// it is paired with.
#pragma once

#include <functional>

#include "gemm.h"

namespace torch_ext {

/// Whether run_strassen_winograd takes `rows` rows.
inline bool suits_strassen_winograd(const GemmKernel& kernel, size_t rows, size_t k) {
  constexpr size_t kMostK = 4096;  // more would take megabytes for the sums of one block
  const StrassenWinograd* const s = kernel.strassen_winograd;
  return s && rows >= s->least_rows && k >= s->least_k && k <= kMostK && k % (16 * kernel.k_step) == 0;
}

/// Most pairs of blocks that are packed at a time.
constexpr size_t kMostStrassenPairs = 64;

/// Whether so many rows, which run_strassen_winograd takes, are packed at once, so that their task may take panel after panel.
inline bool strassen_winograd_at_once(const GemmKernel& kernel, size_t rows) {
  return rows / (2 * kernel.strassen_winograd->rows) <= kMostStrassenPairs;
}

/// Other panels for a task that has done its own; false if there are none. Ranges begin with the first panel of a pair.
using TakePanels = std::function<bool(PanelRange& next)>;

/// What run_gemm_task does for one task: these rows times these panels, then times those that `take` gives, if it is not
/// null: strassen_winograd_at_once(rows) then.
void run_strassen_winograd(const GemmKernel& kernel, const VecKernels& vec, const GemmProblem& problem, GemmRows rows,
                           PanelRange panels, const TakePanels& take);

}  // namespace torch_ext
