/// fp32 numbers as text: the fewest digits that read back as the same number.
#pragma once

#include <cstddef>

namespace torch_ext {

/// The longest text of a number, such as `-0.00000117549435`.
constexpr size_t kFloatTextBytes = 17;
/// Room that `write_float` needs: it writes more than it keeps.
constexpr size_t kFloatRoomBytes = 32;

/// Writes a finite number as JSON has it, such as `0.1`, `-2.0` or `1.5e-9`, and returns the end. Of the shortest texts that
/// read back as `value` it is the one nearest to `value`. NaN and infinity, which JSON lacks, become `null`.
char* write_float(float value, char* out);

}  // namespace torch_ext
