#include "cpu_features.h"

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#include <sys/prctl.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace torch_ext {
namespace {

#if defined(__aarch64__) && defined(__linux__)

// Bit numbers of Linux' arch/arm64 uapi asm/hwcap.h; spelled out because the headers of older
// distributions lack the newer ones.
constexpr unsigned long kHwcapAsimd = 1ul << 1;
constexpr unsigned long kHwcapAsimdDp = 1ul << 20;
constexpr unsigned long kHwcapSve = 1ul << 22;
constexpr unsigned long kHwcap2SveBf16 = 1ul << 12;
constexpr unsigned long kHwcap2I8mm = 1ul << 13;
constexpr unsigned long kHwcap2Bf16 = 1ul << 14;

/// Bytes of this thread's SVE vectors, 0 if the system does not tell. Kernels for one length assume that it is the length
/// of every thread for as long as the process lives: it is set when a program starts, threads take their creator's, and
/// only prctl(PR_SVE_SET_VL) changes it, which a process that runs kernels of ours must leave alone.
size_t sve_vector_bytes() {
  constexpr int kPrSveGetVl = 51;  // of Linux' linux/prctl.h, which older distributions have without it
  constexpr int kPrSveVlLenMask = 0xffff;
  const int length = prctl(kPrSveGetVl, 0, 0, 0, 0);
  return length < 0 ? 0 : static_cast<size_t>(length & kPrSveVlLenMask);
}

uint32_t detect() {
  const unsigned long hwcap = getauxval(AT_HWCAP);
  const unsigned long hwcap2 = getauxval(AT_HWCAP2);
  uint32_t features = kFeatureNone;
  if (hwcap & kHwcapAsimd) features |= kFeatureNeon;
  if (hwcap & kHwcapAsimdDp) features |= kFeatureDotprod;
  if (hwcap & kHwcapSve) features |= kFeatureSve;
  if ((hwcap & kHwcapSve) && sve_vector_bytes() == 32) features |= kFeatureSve256;
  if (hwcap2 & kHwcap2SveBf16) features |= kFeatureSveBf16;
  if (hwcap2 & kHwcap2I8mm) features |= kFeatureI8mm;
  if (hwcap2 & kHwcap2Bf16) features |= kFeatureBf16;
  return features;
}

#elif defined(__aarch64__)

uint32_t detect() { return kFeatureNeon; }

#elif defined(__x86_64__)

uint64_t enabled_register_state() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux gives the tile registers, 8 KB, to processes that ask for them.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
#else
  return false;
#endif
}

uint32_t detect() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return kFeatureNone;
  const bool fma = c & (1u << 12), osxsave = c & (1u << 27), f16c = c & (1u << 29);
  if (!osxsave) return kFeatureNone;
  const uint64_t state = enabled_register_state();
  const bool ymm = (state & 0x06) == 0x06, zmm = (state & 0xe6) == 0xe6;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return kFeatureNone;
  const bool avx2 = b & (1u << 5);
  const bool avx512 = (b & (1u << 16)) && (b & (1u << 17)) && (b & (1u << 30)) && (b & (1u << 31));
  uint32_t features = kFeatureNone;
  if (ymm && avx2 && fma && f16c) features |= kFeatureAvx2Fma;
  if (zmm && avx512 && avx2 && fma) features |= kFeatureAvx512;
  if ((features & kFeatureAvx512) && (c & (1u << 11))) features |= kFeatureAvx512Vnni;
  const bool tiles = (d & (1u << 22)) && (d & (1u << 24)) && (state & 0x60000) == 0x60000;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return features;
  if ((features & kFeatureAvx2Fma) && (a & (1u << 4))) features |= kFeatureAvxVnni;
  if ((features & kFeatureAvx512) && (a & (1u << 5))) {
    features |= kFeatureAvx512Bf16;
    if (tiles && may_use_tiles()) features |= kFeatureAmxBf16;
  }
  return features;
}

#else

uint32_t detect() { return kFeatureNone; }

#endif

struct NamedFeature {
  uint32_t bit;
  const char* name;
};

constexpr NamedFeature kNames[] = {
    {kFeatureNeon, "asimd"},
    {kFeatureDotprod, "asimddp"},
    {kFeatureI8mm, "i8mm"},
    {kFeatureBf16, "bf16"},
    {kFeatureSve, "sve"},
    {kFeatureSveBf16, "svebf16"},
    {kFeatureSve256, "sve256"},
    {kFeatureAvx2Fma, "avx2+fma"},
    {kFeatureAvx512, "avx512"},
    {kFeatureAvx512Bf16, "avx512_bf16"},
    {kFeatureAvx512Vnni, "avx512_vnni"},
    {kFeatureAmxBf16, "amx_bf16"},
    {kFeatureAvxVnni, "avx_vnni"},
};

}  // namespace

uint32_t cpu_features() {
  static const uint32_t features = detect();
  return features;
}

size_t parse_cache_size(const char* text) {
  char* end = nullptr;
  const unsigned long long number = std::strtoull(text, &end, 10);
  if (end == text || number > (1u << 20)) return 0;
  const size_t unit = *end == 'K' ? size_t{1} << 10 : *end == 'M' ? size_t{1} << 20 : 1;
  return static_cast<size_t>(number) * unit;
}

static std::string first_line(const std::string& path) {
  char text[32] = {};
  std::FILE* const file = std::fopen(path.c_str(), "re");
  if (!file) return text;
  if (!std::fgets(text, sizeof text, file)) text[0] = 0;
  std::fclose(file);
  return text;
}

size_t second_level_cache_bytes() {
  static const size_t bytes = [] {
    constexpr size_t kUnknown = size_t{1} << 20, kLeast = size_t{256} << 10, kMost = size_t{2} << 20;
    for (const char index : {'0', '1', '2', '3'}) {
      const std::string folder = std::string("/sys/devices/system/cpu/cpu0/cache/index") + index + "/";
      const size_t size = parse_cache_size(first_line(folder + "size").c_str());
      if (size && first_line(folder + "level")[0] == '2') return std::clamp(size, kLeast, kMost);
    }
    return kUnknown;
  }();
  return bytes;
}

std::vector<std::string> feature_names(uint32_t features) {
  std::vector<std::string> names;
  for (const NamedFeature& f : kNames) {
    if (features & f.bit) names.emplace_back(f.name);
  }
  return names;
}

const char* architecture_name() {
#if defined(__aarch64__)
  return "aarch64";
#elif defined(__x86_64__)
  return "x86-64";
#else
  return "other";
#endif
}

}  // namespace torch_ext
