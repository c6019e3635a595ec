/// CPU features that kernels may require, read once from the operating system.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace torch_ext {

/// One bit per feature. A kernel lists the bits it needs; dispatch compares them with `cpu_features()`.
enum Feature : uint32_t {
  kFeatureNone = 0,
  // aarch64, from AT_HWCAP / AT_HWCAP2.
  kFeatureNeon = 1u << 0,
  kFeatureDotprod = 1u << 1,
  kFeatureI8mm = 1u << 2,
  kFeatureBf16 = 1u << 3,
  kFeatureSve = 1u << 4,
  kFeatureSveBf16 = 1u << 5,
  kFeatureSve256 = 1u << 6,  // SVE vectors of exactly 256 bits in the thread that asked first, see sve_vector_bytes()
  // x86-64, from CPUID and XGETBV.
  kFeatureAvx2Fma = 1u << 16,
  kFeatureAvx512 = 1u << 17,  // F, BW, VL and DQ together
  kFeatureAvx512Bf16 = 1u << 18,
  kFeatureAvx512Vnni = 1u << 19,
  kFeatureAmxBf16 = 1u << 20,  // with the operating system's leave to use tiles
  kFeatureAvxVnni = 1u << 21,  // VPDPBUSD in its VEX encoding
};

/// The features of the CPU this process runs on. Read once; never changes afterwards.
uint32_t cpu_features();

/// Bytes of a core's second-level cache as Linux describes the first CPU, read once; 1 MiB, which most of the CPUs that this
/// is for have, where it does not, and never less than 256 KiB or more than 2 MiB.
size_t second_level_cache_bytes();

/// What a description such as "512K" or "2M" in /sys/devices/system/cpu/cpu0/cache/index2/size says; 0 if nothing.
size_t parse_cache_size(const char* text);

/// Names of the bits in `features`, in the spelling of /proc/cpuinfo where that has one.
std::vector<std::string> feature_names(uint32_t features);

/// "aarch64", "x86-64" or "other".
const char* architecture_name();

}  // namespace torch_ext
