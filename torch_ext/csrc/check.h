/// Errors as exceptions of the standard library, with messages of several parts. Knows nothing of torch.
#pragma once

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

namespace torch_ext {

inline void append(std::string& s, std::string_view part) { s += part; }
template <typename T>
  requires std::is_arithmetic_v<T>
void append(std::string& s, T number) {
  if constexpr (std::is_floating_point_v<T>) {
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "%g", static_cast<double>(number));
    s += buffer;
  } else {
    s += std::to_string(number);
  }
}

/// The parts, words and numbers, one after the other.
template <typename... Parts>
std::string joined(const Parts&... parts) {
  std::string s;
  (append(s, parts), ...);
  return s;
}

/// Throws `Error` with a message of `parts` unless `condition` holds.
template <typename Error = std::runtime_error, typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) throw Error(joined(parts...));
}

}  // namespace torch_ext
