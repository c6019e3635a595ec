/// What the runtime throws: errors that a caller can tell apart, with messages that say what was expected, what came, and
/// what to do.
#pragma once

#include <stdexcept>
#include <string>

#include "check.h"

namespace torch_ext::runtime {

enum class ErrorCode {
  kValue = 1,     ///< an argument, or what a file holds, is wrong
  kType = 2,      ///< an argument has the wrong element type
  kNotFound = 3,  ///< there is no such file
  kSystem = 4,    ///< the operating system refused
  kMemory = 5,    ///< there is not enough memory
  kInternal = 6,  ///< anything else
};

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

template <typename... Parts>
[[noreturn]] void fail(ErrorCode code, const Parts&... parts) {
  throw Error(code, joined(parts...));
}

/// Throws an error of kind kValue unless `condition` holds.
template <typename... Parts>
void expect(bool condition, const Parts&... parts) {
  if (!condition) fail(ErrorCode::kValue, parts...);
}

}  // namespace torch_ext::runtime
