#include "runner.h"

#include <signal.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "dispatch.h"
#include "paths.h"

namespace torch_ext::test {
namespace {

constexpr size_t kMaxFailuresOfATest = 8;

// A sanitizer's own report of a crash says more than ours.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

struct TestCase {
  const char* name;
  void (*body)();
};

std::vector<TestCase>& tests() {
  static std::vector<TestCase> all;
  return all;
}

Options g_options;
Random g_random(0);
const char* g_name = "(no test)";
char g_context[512];
size_t g_failures = 0;

struct TooManyFailures {};

uint64_t hash(const char* s) {
  uint64_t h = 0xcbf29ce484222325u;
  for (; *s; ++s) h = (h ^ static_cast<unsigned char>(*s)) * 0x100000001b3u;
  return h;
}

void write_error(const char* s) {
  if (write(STDERR_FILENO, s, std::strlen(s)) < 0) _exit(3);
}

void on_crash(int signal) {
  write_error("CRASH in ");
  write_error(g_name);
  write_error(signal == SIGSEGV || signal == SIGBUS ? ": memory outside of a buffer was used"
              : signal == SIGILL                    ? ": illegal instruction"
                                                    : ": signal");
  write_error("\n  while: ");
  write_error(g_context);
  write_error("\n");
  _exit(3);
}

int usage(const char* program, const char* wrong) {
  std::fprintf(stderr,
               "%s: unknown argument %s\n"
               "usage: %s [--list] [--kernels] [--report] [--filter TEXT] [--skip TEXT] [--seed N] [--random N] "
               "[--quick] [--verbose]\n"
               "  --list       print the names of the tests\n"
               "  --kernels    print the names of all micro-kernels that are compiled in\n"
               "  --report     print what dispatch chose, as JSON; 1 if it refuses TORCH_EXT_ISA\n"
               "  --filter     run the tests whose name contains TEXT; coverage is not judged then\n"
               "  --skip       leave out the tests whose name contains TEXT; coverage is judged\n"
               "  --seed       seed of all random data\n"
               "  --random     number of random shapes in each randomized test\n"
               "  --quick      trimmed sizes, for emulators\n"
               "  --verbose    print the largest errors that were measured\n",
               program, wrong, program);
  return 2;
}

int report() {
  try {
    std::printf("%s\n", isa_report_json().c_str());
    return 0;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}

/// True if the test passed.
bool run(const TestCase& test) {
  g_name = test.name;
  g_context[0] = 0;
  g_failures = 0;
  g_random = Random(g_options.seed ^ hash(test.name));
  try {
    test.body();
  } catch (const TooManyFailures&) {
    std::printf("  ... stopped after %zu failures\n", g_failures);
  } catch (const std::exception& e) {
    fail(__FILE__, __LINE__, "unexpected exception: %s", e.what());
  }
  std::printf("%-4s %s\n", g_failures ? "FAIL" : "ok", test.name);
  std::fflush(stdout);
  return g_failures == 0;
}

}  // namespace

const Options& options() { return g_options; }
Random& random_source() { return g_random; }

bool register_test(const char* name, void (*body)()) {
  tests().push_back({name, body});
  return true;
}

void context(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::vsnprintf(g_context, sizeof g_context, format, args);
  va_end(args);
}

void fail(const char* file, int line, const char* format, ...) {
  const char* const slash = std::strrchr(file, '/');
  std::printf("  %s:%d: ", slash ? slash + 1 : file, line);
  va_list args;
  va_start(args, format);
  std::vprintf(format, args);
  va_end(args);
  std::printf("%s%s\n", g_context[0] ? "\n    while: " : "", g_context);
  if (++g_failures >= kMaxFailuresOfATest && !std::uncaught_exceptions()) throw TooManyFailures();
}

void note(const char* format, ...) {
  if (!g_options.verbose) return;
  va_list args;
  va_start(args, format);
  std::printf("     ");
  std::vprintf(format, args);
  std::printf("\n");
  va_end(args);
}

static int run_all() {
  std::string features;
  for (const std::string& f : feature_names(cpu_features())) features += " " + f;
  std::printf("seed %llu, %zu random cases, %s sizes, %s:%s\n", static_cast<unsigned long long>(g_options.seed),
              g_options.random, g_options.quick ? "trimmed" : "full", architecture_name(), features.c_str());
  size_t ran = 0, failed = 0;
  for (const TestCase& test : tests()) {
    const std::string name = test.name;
    if (name.find(g_options.filter) == std::string::npos) continue;
    if (!g_options.skip.empty() && name.find(g_options.skip) != std::string::npos) continue;
    ++ran;
    failed += !run(test);
  }
  size_t missed = 0;
  if (g_options.filter.empty()) {
    for (const std::string& path : uncovered_paths()) {
      std::printf("FAIL this CPU has the path %s, and no test ran it\n", path.c_str());
      ++missed;
    }
    std::printf("%zu paths covered\n", covered_paths());
    for (const std::string& path : paths_of_other_cpus()) std::printf("not on this CPU: %s\n", path.c_str());
  }
  std::printf("%zu tests, %zu failed, ", ran, failed);
  if (g_options.filter.empty()) {
    std::printf("%zu paths missed\n", missed);
  } else {
    std::printf("coverage not judged\n");
  }
  return ran == 0 || failed || missed;
}

static int main_with(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const bool has_value = i + 1 < argc;
    if (arg == "--list") {
      for (const TestCase& test : tests()) std::printf("%s\n", test.name);
      return 0;
    } else if (arg == "--kernels") {
      for (const std::vector<GemmPath>* const all : {&all_gemm_paths(), &all_s8_paths()}) {
        for (const GemmPath& path : *all) {
          for (size_t u = 0; u < path.kernel->ukernel_count; ++u) std::printf("%s\n", path.kernel->ukernels[u].name);
        }
      }
      return 0;
    } else if (arg == "--report") {
      return report();
    } else if (arg == "--quick") {
      g_options.quick = true;
    } else if (arg == "--verbose") {
      g_options.verbose = true;
    } else if (arg == "--filter" && has_value) {
      g_options.filter = argv[++i];
    } else if (arg == "--skip" && has_value) {
      g_options.skip = argv[++i];
    } else if (arg == "--seed" && has_value) {
      g_options.seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (arg == "--random" && has_value) {
      g_options.random = std::strtoull(argv[++i], nullptr, 10);
    } else {
      return usage(argv[0], argv[i]);
    }
  }
  if (!kSanitized) {
    for (const int signal_number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) signal(signal_number, on_crash);
  }
  return run_all();
}

}  // namespace torch_ext::test

int main(int argc, char** argv) { return torch_ext::test::main_with(argc, argv); }
