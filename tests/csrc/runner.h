/// Named tests that run one after the other in one process. A failed check does not stop a test, many do; a crash says
/// which test it was in and what that was doing; random data depends on the seed and the test's name only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

// GCC says it in its way, Clang in another.
#if defined(__SANITIZE_THREAD__)
#define TORCH_EXT_THREAD_SANITIZER
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define TORCH_EXT_THREAD_SANITIZER
#endif
#endif

namespace torch_ext::test {

struct Options {
  uint64_t seed = 20250607;
  std::string filter;    ///< run the tests whose name contains this
  std::string skip;      ///< leave out the tests whose name contains this, if it is not empty
  size_t random = 24;    ///< cases of each randomized test
  bool quick = false;    ///< trimmed sizes, for emulators
  bool verbose = false;  ///< print the largest measured errors beside their bounds
};
const Options& options();

/// splitmix64: small, and the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  size_t below(size_t n) { return static_cast<size_t>(bits() % n); }
  size_t between(size_t low, size_t high) { return low + below(high - low + 1); }
  bool coin() { return bits() >> 63; }
  /// Uniform in [-1, 1), 24 random bits.
  float value() { return static_cast<float>(static_cast<int64_t>(bits() >> 40) - (1 << 23)) / (1 << 23); }

 private:
  uint64_t state_;
};

/// The generator of the running test.
Random& random_source();

bool register_test(const char* name, void (*body)());

/// Says what the running test is about to do; shown with failures and crashes.
[[gnu::format(printf, 1, 2)]] void context(const char* format, ...);

/// Records a failure of the running test, and ends that test if there were many.
[[gnu::format(printf, 3, 4)]] void fail(const char* file, int line, const char* format, ...);

/// Prints a line if --verbose.
[[gnu::format(printf, 1, 2)]] void note(const char* format, ...);

#define TORCH_EXT_TEST(name)                                                                          \
  static void name();                                                                                 \
  [[maybe_unused]] static const bool name##_registered = torch_ext::test::register_test(#name, name); \
  static void name()

#define EXPECT(condition, ...)                                                \
  do {                                                                        \
    if (!(condition)) torch_ext::test::fail(__FILE__, __LINE__, __VA_ARGS__); \
  } while (0)

}  // namespace torch_ext::test
