#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu_features.h"
#include "kernels/neon_bf16/gemm_bfmmla.h"
#include "kernels/neon_dotprod/gemm_sdot.h"
#include "kernels/neon_i8mm/gemm_smmla.h"
#include "kernels/sve_bf16/gemm_sve_bfmmla.h"
#include "kernels/x86/gemm_vnni.h"

namespace torch_ext {
namespace {

#if defined(__aarch64__)
const VecKernels* const kVecCandidates[] = {&kVecNeonBf16, &kVecNeon, &kVecPortable};
constexpr uint32_t kFeaturesSveBf16 =
    kFeatureNeon | kFeatureBf16 | kFeatureI8mm | kFeatureSve | kFeatureSveBf16 | kFeatureSve256;
const Isa kIsas[] = {
    {"sve_bf16", kFeaturesSveBf16, LinearEngine::kOwn, &kGemmSveBfmmla, &kGemmSmmla, &kVecNeonBf16},
    {"neon_i8mm", kFeatureNeon | kFeatureBf16 | kFeatureI8mm, LinearEngine::kOwn, &kGemmBfmmla, &kGemmSmmla,
     &kVecNeonBf16},
    {"neon_bf16", kFeatureNeon | kFeatureBf16 | kFeatureDotprod, LinearEngine::kOwn, &kGemmBfmmla, &kGemmSdot,
     &kVecNeonBf16},
    {"neon_dotprod", kFeatureNeon | kFeatureDotprod, LinearEngine::kOwn, kVecNeon.gemm_bf16, &kGemmSdot, &kVecNeon},
    {"neon", kFeatureNeon, LinearEngine::kOwn, kVecNeon.gemm_bf16, kVecNeon.gemm_s8, &kVecNeon},
    {"portable", kFeatureNone, LinearEngine::kOwn, kVecPortable.gemm_bf16, kVecPortable.gemm_s8, &kVecPortable},
};
#elif defined(__x86_64__)
const VecKernels* const kVecCandidates[] = {&kVecAmx, &kVecAvx512Bf16, &kVecAvx512, &kVecAvx2, &kVecPortable};
const Isa kIsas[] = {
    {"amx", kFeatureAvx512 | kFeatureAvx512Bf16 | kFeatureAmxBf16, LinearEngine::kOwn, kVecAmx.gemm_dot_bf16, nullptr,
     &kVecAmx},
    {"avx512_bf16", kFeatureAvx512 | kFeatureAvx512Bf16, LinearEngine::kOwn, kVecAvx512Bf16.gemm_dot_bf16, nullptr,
     &kVecAvx512Bf16},
    {"onednn", kFeatureAvx512, LinearEngine::kOnednn, nullptr, nullptr, nullptr},
    {"torch", kFeatureNone, LinearEngine::kTorch, nullptr, nullptr, nullptr},
    {"portable", kFeatureNone, LinearEngine::kOwn, kVecPortable.gemm_bf16, kVecPortable.gemm_s8, &kVecPortable},
};
#else
const VecKernels* const kVecCandidates[] = {&kVecPortable};
const Isa kIsas[] = {
    {"portable", kFeatureNone, LinearEngine::kOwn, kVecPortable.gemm_bf16, kVecPortable.gemm_s8, &kVecPortable},
};
#endif

bool runs_here(uint32_t required) { return (cpu_features() & required) == required; }

// Where the ISA does not say which kernel of s8 it takes.
const GemmKernel* best_gemm_s8(const VecKernels& vec) {
#if defined(__x86_64__)
  if (runs_here(kFeatureAvx512Vnni)) return &kGemmVnni;
#endif
  return vec.gemm_s8;
}

std::string join(const std::vector<std::string>& words) {
  std::string s;
  for (const std::string& w : words) s += (s.empty() ? "" : ", ") + w;
  return s;
}

Dispatch choose() {
  Dispatch d = {nullptr, nullptr, nullptr, false};
  const char* const wanted = std::getenv("TORCH_EXT_ISA");
  d.forced = wanted && *wanted;
  std::string names;
  for (const Isa& isa : kIsas) {
    names += (names.empty() ? "" : ", ") + std::string(isa.name);
    if (d.isa || (d.forced && std::string(wanted) != isa.name)) continue;
    if (runs_here(isa.required_features)) {
      d.isa = &isa;
    } else if (d.forced) {
      throw std::runtime_error("TORCH_EXT_ISA=" + std::string(wanted) + " needs a CPU with " +
                               join(feature_names(isa.required_features & ~cpu_features())) +
                               ", which this one has not; unset it to let torch_ext choose");
    }
  }
  if (!d.isa) {
    throw std::runtime_error("TORCH_EXT_ISA=" + std::string(wanted ? wanted : "") + " is unknown on " +
                             architecture_name() + ": expected one of " + names);
  }
  d.vec = d.isa->vec ? d.isa->vec : &best_vec_kernels(cpu_features());
  d.gemm_s8 = d.isa->gemm_s8 ? d.isa->gemm_s8 : best_gemm_s8(*d.vec);
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

const Isa* isa_candidates(size_t* count) {
  *count = sizeof kIsas / sizeof kIsas[0];
  return kIsas;
}

const VecKernels& best_vec_kernels(uint32_t features) {
  for (const VecKernels* v : kVecCandidates) {
    if ((v->required_features & features) == v->required_features) return *v;
  }
  return kVecPortable;
}

const Dispatch& dispatch() {
  static const Dispatch d = choose();
  return d;
}

const GemmKernel& attention_gemm(const Dispatch& d, DType t) {
  // Keys, values and probabilities in bf16 lose nothing that bf16 input had not lost; fp32 input stays fp32.
  return t == DType::kBF16 && d.vec->gemm_dot_bf16 ? *d.vec->gemm_dot_bf16 : *d.vec->gemm_f32;
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
  s += ", \"linear_kernels\": " + quoted_list(d.isa->gemm ? ukernel_names(*d.isa->gemm) : std::vector<std::string>());
  s += ", \"int8_kernels\": " + quoted_list(ukernel_names(*d.gemm_s8));
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
