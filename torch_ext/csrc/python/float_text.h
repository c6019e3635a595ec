/// fp32 numbers as text: the fewest digits that read back as the same number.
#pragma once

#include <cstddef>

namespace torch_ext {

/// Most characters that `write_float` writes.
constexpr size_t kFloatTextBytes = 24;

/// Writes a finite number as JSON has it, such as `0.1`, `-2.0` or `1.5e-9`, and returns the end. Of the shortest texts that
/// read back as `value` it is the one nearest to `value`. NaN and infinity, which JSON lacks, become `null`.
char* write_float(float value, char* out);

}  // namespace torch_ext
