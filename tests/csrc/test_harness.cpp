// What the other tests rely on: that guards fault, that bounds are no sieves, and that a seed gives the same data.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>

#include "bounds.h"
#include "guarded.h"
#include "reference.h"
#include "runner.h"

namespace torch_ext::test {
namespace {

constexpr int kFaulted = 42;

/// True if `use` faults; runs it in a process of its own.
template <typename Use>
bool faults(Use use) {
  const pid_t child = fork();
  if (child == 0) {
    for (const int signal_number : {SIGSEGV, SIGBUS}) signal(signal_number, [](int) { _exit(kFaulted); });
    use();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == kFaulted;
}

TORCH_EXT_TEST(memory_faults_right_after_its_end) {
  for (const size_t bytes : {1, 2, 8, 100, 4095, 4096, 4097, 70000}) {
    context("%zu bytes", bytes);
    const GuardedBytes memory(bytes);
    volatile unsigned char* const p = memory.data();
    EXPECT(!faults([&] { p[bytes - 1] = 1; }), "the last byte cannot be written");
    EXPECT(faults([&] { p[bytes] = 1; }), "the byte after the end can be written");
    EXPECT(faults([&] { (void)p[bytes]; }), "the byte after the end can be read");
  }
}

TORCH_EXT_TEST(rounding_of_the_reference_is_right) {
  EXPECT(reference_bf16(1.0f).bits == 0x3f80, "1 is 0x%04x", reference_bf16(1.0f).bits);
  EXPECT(reference_bf16(0x1.01p0f).bits == 0x3f80, "the tie 1 + 2^-8 goes to 0x%04x, not to even",
         reference_bf16(0x1.01p0f).bits);
  EXPECT(reference_bf16(0x1.03p0f).bits == 0x3f82, "the tie 1 + 3 * 2^-8 goes to 0x%04x",
         reference_bf16(0x1.03p0f).bits);
  EXPECT(reference_bf16(0x1.010002p0f).bits == 0x3f81, "above the tie: 0x%04x", reference_bf16(0x1.010002p0f).bits);
  EXPECT(reference_bf16(-0x1.00fffep0f).bits == 0xbf80, "below the tie: 0x%04x", reference_bf16(-0x1.00fffep0f).bits);
  EXPECT(reference_bf16(0x1.fffffep127f).bits == 0x7f80, "the largest: 0x%04x", reference_bf16(0x1.fffffep127f).bits);
  EXPECT(bf16_is_nan(reference_bf16(NAN)), "NaN is 0x%04x", reference_bf16(NAN).bits);
  EXPECT(bf16_to_f32({0x4049}) == 3.140625f, "0x4049 is %g", static_cast<double>(bf16_to_f32({0x4049})));
}

TORCH_EXT_TEST(bounds_refuse_what_is_wrong) {
  EXPECT(!within(NAN, 1, 1e30) && !within(1, NAN, 1e30), "NaN is within a bound");
  EXPECT(within(INFINITY, INFINITY, 0) && !within(INFINITY, 1, 1e30), "infinity is within a bound");
  // One product of a bf16 sum left out, or one operand rounded to bf16 that should not be, must be seen.
  EXPECT(!within(99, 100, product_bound(100, 100)), "a lost product is within the bound");
  EXPECT(!within(1 + 0x1p-9, 1, epilogue_bound(Activation::kNone, 1, product_bound(1, 1), 1, 0, DType::kF32)),
         "an operand of half the bits is within the bound");
  EXPECT(!within(1 + 0x1p-6, 1, epilogue_bound(Activation::kNone, 1, product_bound(1, 1), 1, 0, DType::kBF16)),
         "two units in the last place are within the bound");
  EXPECT(!within(2e-6, 0, layer_norm_bound(768, 1, 1, 0, 1, 0, DType::kF32, 0)), "layer norm's bound is a sieve");
}

TORCH_EXT_TEST(random_data_depend_on_the_seed_only) {
  Random a(1), b(1), c(2);
  const uint64_t first = a.bits();
  EXPECT(first == b.bits() && first != c.bits(), "seeds do not decide");
  EXPECT(Random(0).bits() == 0xe220a8397b1dcdafu, "splitmix64 gives 0x%llx first",
         static_cast<unsigned long long>(Random(0).bits()));
  double sum = 0;
  for (int i = 0; i < 1000; ++i) {
    const float x = a.value();
    EXPECT(x >= -1 && x < 1, "%g is outside of [-1, 1)", static_cast<double>(x));
    sum += static_cast<double>(x);
  }
  EXPECT(std::fabs(sum) < 100, "the mean of 1000 numbers is %g", sum / 1000);
}

}  // namespace
}  // namespace torch_ext::test
