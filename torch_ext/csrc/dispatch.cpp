#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu_features.h"
#include "kernels/families.h"

namespace torch_ext {
namespace {

#if defined(__aarch64__)
constexpr Isa kIsas[] = {
    {.name = "sve_bf16",
     .required_features = kFeatureNeon | kFeatureBf16 | kFeatureI8mm | kFeatureSve | kFeatureSveBf16 | kFeatureSve256},
    {.name = "neon_i8mm", .required_features = kFeatureNeon | kFeatureBf16 | kFeatureI8mm},
    {.name = "neon_bf16", .required_features = kFeatureNeon | kFeatureBf16 | kFeatureDotprod},
    {.name = "neon_dotprod", .required_features = kFeatureNeon | kFeatureDotprod},
    {.name = "neon", .required_features = kFeatureNeon},
    {.name = "portable", .required_features = kFeatureNone},
};
constexpr const GemmKernel* kBf16Kernels[] = {&kGemmSveBfmmla, &kGemmBfmmla, &kGemmBf16Neon, &kGemmBf16Portable};
constexpr const GemmKernel* kS8Kernels[] = {&kGemmSmmla, &kGemmSdot, &kGemmS8Neon, &kGemmS8Portable};
constexpr const GemmKernel* kF32Kernels[] = {&kGemmF32Neon, &kGemmF32Portable};
constexpr const VecKernels* kRowKernels[] = {&kVecNeonBf16, &kVecNeon, &kVecPortable};
#elif defined(__x86_64__)
// CPUs with AVX-512 have VNNI or not.
constexpr uint32_t kBesideAvx512 = kFeatureAvx2Fma | kFeatureAvx512Vnni;
constexpr uint32_t kAll = ~uint32_t{0};
constexpr Isa kIsas[] = {
    {.name = "amx",
     .required_features = kFeatureAvx512 | kFeatureAvx512Bf16 | kFeatureAmxBf16,
     .optional_features = kBesideAvx512},
    {.name = "avx512_bf16",
     .required_features = kFeatureAvx512 | kFeatureAvx512Bf16,
     .optional_features = kBesideAvx512},
    {.name = "avx512", .required_features = kFeatureAvx512, .optional_features = kBesideAvx512},
    {.name = "onednn", .required_features = kFeatureAvx512, .optional_features = kAll, .linear = LinearEngine::kOnednn},
    {.name = "avx_vnni", .required_features = kFeatureAvx2Fma | kFeatureAvxVnni},
    {.name = "avx2", .required_features = kFeatureAvx2Fma},
    {.name = "torch", .required_features = kFeatureNone, .optional_features = kAll, .linear = LinearEngine::kTorch},
    {.name = "portable", .required_features = kFeatureNone},
};
constexpr const GemmKernel* kBf16Kernels[] = {&kGemmAmx, &kGemmAvx512Bf16Dot, &kGemmBf16Avx512, &kGemmBf16Avx2,
                                              &kGemmBf16Portable};
constexpr const GemmKernel* kS8Kernels[] = {&kGemmAvx512Vnni, &kGemmAvxVnni, &kGemmPmaddwd, &kGemmS8Portable};
constexpr const GemmKernel* kF32Kernels[] = {&kGemmF32Avx512, &kGemmF32Avx2, &kGemmF32Portable};
constexpr const VecKernels* kRowKernels[] = {&kVecAvx512Bf16, &kVecAvx512, &kVecAvx2, &kVecPortable};
#else
constexpr Isa kIsas[] = {{.name = "portable", .required_features = kFeatureNone}};
constexpr const GemmKernel* kBf16Kernels[] = {&kGemmBf16Portable};
constexpr const GemmKernel* kS8Kernels[] = {&kGemmS8Portable};
constexpr const GemmKernel* kF32Kernels[] = {&kGemmF32Portable};
constexpr const VecKernels* kRowKernels[] = {&kVecPortable};
#endif

bool has(uint32_t features, uint32_t required) { return (required & ~features) == 0; }

bool runs_here(uint32_t required) { return has(cpu_features(), required); }

// The first kernel of a list that needs no more than `features`.
template <typename Kernel>
const Kernel* first_of(std::span<const Kernel* const> list, uint32_t features) {
  for (const Kernel* const kernel : list) {
    if (has(features, kernel->required_features)) return kernel;
  }
  return list.back();
}

std::string join(const std::vector<std::string>& words) {
  std::string s;
  for (const std::string& w : words) s += (s.empty() ? "" : ", ") + w;
  return s;
}

Dispatch choose() {
  const Isa* chosen = nullptr;
  const char* const wanted = std::getenv("TORCH_EXT_ISA");
  const bool forced = wanted && *wanted;
  std::string names;
  for (const Isa& isa : kIsas) {
    names += (names.empty() ? "" : ", ") + std::string(isa.name);
    if (chosen || (forced && std::string(wanted) != isa.name)) continue;
    if (runs_here(isa.required_features)) {
      chosen = &isa;
    } else if (forced) {
      throw std::runtime_error("TORCH_EXT_ISA=" + std::string(wanted) + " needs a CPU with " +
                               join(feature_names(isa.required_features & ~cpu_features())) +
                               ", which this one lacks; unset it to let torch_ext choose");
    }
  }
  if (!chosen) {
    throw std::runtime_error("TORCH_EXT_ISA=" + std::string(wanted ? wanted : "") + " is unknown on " +
                             architecture_name() + ": expected one of " + names);
  }
  Dispatch d = kernels_of(*chosen, cpu_features());
  d.forced = forced;
  return d;
}

std::string quoted(const std::string& s) { return "\"" + s + "\""; }

std::string quoted_list(const std::vector<std::string>& words) {
  std::string s;
  for (const std::string& w : words) s += (s.empty() ? "" : ", ") + quoted(w);
  return "[" + s + "]";
}

std::vector<std::string> ukernel_names(const GemmKernel& g) {
  std::vector<std::string> names;
  for (size_t i = 0; i < g.ukernel_count; ++i) names.emplace_back(g.ukernels[i].name);
  return names;
}

}  // namespace

std::span<const Isa> isas() { return kIsas; }
std::span<const GemmKernel* const> bf16_kernels() { return kBf16Kernels; }
std::span<const GemmKernel* const> s8_kernels() { return kS8Kernels; }
std::span<const GemmKernel* const> f32_kernels() { return kF32Kernels; }
std::span<const VecKernels* const> row_kernels() { return kRowKernels; }

Dispatch kernels_of(const Isa& isa, uint32_t features) {
  const uint32_t allowed = (isa.required_features | isa.optional_features) & features;
  return {
      .isa = &isa,
      .gemm_bf16 = first_of(bf16_kernels(), allowed),
      .gemm_s8 = first_of(s8_kernels(), allowed),
      .gemm_f32 = first_of(f32_kernels(), allowed),
      .vec = first_of(row_kernels(), allowed),
  };
}

const GemmKernel* Dispatch::gemm_for(Layout layout) const {
  if (layout == gemm_s8->layout) return gemm_s8;
  if (layout == gemm_f32->layout) return gemm_f32;
  return isa->linear == LinearEngine::kOwn && layout == gemm_bf16->layout ? gemm_bf16 : nullptr;
}

const Dispatch& dispatch() {
  static const Dispatch d = choose();
  return d;
}

const Dispatch& own_dispatch() {
  static const Dispatch own = [] {
    const Dispatch& d = dispatch();
    if (d.isa->linear == LinearEngine::kOwn) return d;
    if (d.forced) {
      throw std::runtime_error(
          "TORCH_EXT_ISA=" + std::string(d.isa->name) +
          " computes with PyTorch, which torch_ext.runtime does without; unset it, or name another");
    }
    for (const Isa& isa : kIsas) {
      if (isa.linear == LinearEngine::kOwn && runs_here(isa.required_features)) return kernels_of(isa, cpu_features());
    }
    return d;  // not reached: the last level runs everywhere
  }();
  return own;
}

const GemmKernel* own_kernel(const Dispatch& d, LinearEngine engine, Layout layout) {
  if (is_s8(layout)) return d.gemm_s8;
  if (layout == Layout::kF32Rows) return d.gemm_f32;
  return engine == LinearEngine::kOwn ? d.gemm_bf16 : nullptr;
}

std::string isa_report_json() {
  const Dispatch& d = dispatch();
  std::string s = "{\"arch\": " + quoted(architecture_name()) + ", \"isa\": " + quoted(d.isa->name) +
                  ", \"forced\": " + (d.forced ? "true" : "false") +
                  ", \"cpu_features\": " + quoted_list(feature_names(cpu_features()));
  const char* const engine = d.isa->linear == LinearEngine::kOwn      ? "torch_ext"
                             : d.isa->linear == LinearEngine::kOnednn ? "PyTorch's prepacked oneDNN linear"
                                                                      : "PyTorch's aten::linear";
  s += ", \"linear\": " + quoted(engine);
  s += ", \"linear_kernels\": " +
       quoted_list(d.isa->linear == LinearEngine::kOwn ? ukernel_names(*d.gemm_bf16) : std::vector<std::string>());
  s += ", \"int8_kernels\": " + quoted_list(ukernel_names(*d.gemm_s8));
  s += ", \"fp32_kernels\": " + quoted_list(ukernel_names(*d.gemm_f32));
  s += ", \"attention_kernels\": " + quoted_list(ukernel_names(attention_gemm(d, DType::kBF16)));
  s += ", \"row_kernels\": " + quoted(d.vec->name) + ", \"candidates\": [";
  bool first = true;
  for (const Isa& isa : kIsas) {
    s += std::string(first ? "" : ", ") + "{\"name\": " + quoted(isa.name) +
         ", \"supported\": " + (runs_here(isa.required_features) ? "true" : "false") +
         ", \"requires\": " + quoted_list(feature_names(isa.required_features)) + "}";
    first = false;
  }
  return s + "]}";
}

}  // namespace torch_ext
