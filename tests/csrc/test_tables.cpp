// The tables themselves: names against rows, order of priority, completeness of the lists that the other tests use.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "dispatch.h"
#include "packing/packed_weight.h"
#include "paths.h"
#include "runner.h"

namespace torch_ext::test {
namespace {

std::vector<std::string> split(const std::string& s, char separator) {
  std::vector<std::string> parts(1);
  for (const char c : s) {
    if (c == separator) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

// Rows of s8 are quantized dynamically (qs8dx), columns once, per channel (qs8cx).
const char* type_word(DType t, bool left) {
  return t == DType::kF32 ? "f32" : t == DType::kBF16 ? "bf16" : left ? "qs8dx" : "qs8cx";
}

// "bf16p12x4": type, p, nr x kr
void expect_layout_word(const std::string& word, const GemmKernel& g) {
  EXPECT(word == std::string(type_word(g.rhs_type, false)) + "p" + std::to_string(g.nr) + "x" + std::to_string(g.kr),
         "%s: the table says %s, nr %zu, kr %zu", word.c_str(), type_word(g.rhs_type, false), g.nr, g.kr);
}

// gemm_<destination>_<left>_<right>p<nr>x<kr>_<mr>x<nr>_<engine>
TORCH_EXT_TEST(every_ukernel_name_matches_its_row) {
  std::vector<GemmPath> families = all_gemm_paths();
  families.insert(families.end(), all_s8_paths().begin(), all_s8_paths().end());
  for (const GemmPath& path : families) {
    const GemmKernel& g = *path.kernel;
    expect_layout_word(g.name, g);
    for (size_t i = 0; i < g.ukernel_count; ++i) {
      const UKernel& u = g.ukernels[i];
      context("%s", u.name);
      const std::vector<std::string> words = split(u.name, '_');
      EXPECT(words.size() >= 6, "expected gemm_<dst>_<lhs>_<rhs>_<tile>_<engine>");
      if (words.size() < 6) continue;
      EXPECT(words[0] == "gemm" && words[1] == "f32", "expected gemm_f32_...: tiles are f32");
      EXPECT(words[2] == type_word(g.lhs_type, true), "the left side is %s in the table", type_word(g.lhs_type, true));
      expect_layout_word(words[3], g);
      EXPECT(words[4] == std::to_string(u.mr) + "x" + std::to_string(g.nr), "the table says tile %zux%zu", u.mr, g.nr);
      std::string engine = words[5];
      for (size_t w = 6; w < words.size(); ++w) engine += "_" + words[w];
      EXPECT(engine == path.engine, "engine %s, but it is a kernel of %s", engine.c_str(), path.engine.c_str());
    }
  }
}

TORCH_EXT_TEST(row_kernels_have_the_names_of_their_instructions) {
  const std::vector<std::string> expected =
#if defined(__aarch64__)
      {"neon_bf16_fmla", "neon_fmla", "portable"};
#elif defined(__x86_64__)
      {"avx512_amx_fma", "avx512_bf16_fma", "avx512_fma", "avx2_fma", "portable"};
#else
      {"portable"};
#endif
  EXPECT(all_vec_paths().size() == expected.size(), "%zu row kernels", all_vec_paths().size());
  for (size_t i = 0; i < std::min(all_vec_paths().size(), expected.size()); ++i) {
    EXPECT(expected[i] == all_vec_paths()[i]->name, "%s, expected %s", all_vec_paths()[i]->name, expected[i].c_str());
  }
}

TORCH_EXT_TEST(every_family_is_well_formed) {
  std::vector<std::string> names;
  std::vector<GemmPath> families = all_gemm_paths();
  families.insert(families.end(), all_s8_paths().begin(), all_s8_paths().end());
  for (const GemmPath& path : families) {
    const GemmKernel& g = *path.kernel;
    context("%s", path.name().c_str());
    EXPECT(g.ukernel_count > 0 && g.ukernels[0].mr <= 2, "no kernel for a single row");
    for (size_t i = 0; i < g.ukernel_count; ++i) {
      names.emplace_back(g.ukernels[i].name);
      EXPECT(i == 0 || g.ukernels[i - 1].mr < g.ukernels[i].mr, "micro-kernels must ascend by mr");
    }
    EXPECT(g.max_mr() <= kMaxMr && g.nr <= kMaxNr, "a tile of %zux%zu does not fit kMaxMr x kMaxNr", g.max_mr(), g.nr);
    EXPECT(g.k_step % g.kr == 0, "a step of %zu is no multiple of kr %zu", g.k_step, g.kr);
    for (size_t rows = 1; rows <= g.max_mr(); ++rows) {
      const UKernel& u = g.ukernel_for(rows);
      EXPECT(u.mr >= rows && (&u == g.ukernels || (&u)[-1].mr < rows), "%zu rows got mr %zu", rows, u.mr);
    }
    for (const size_t k : {0, 1, 3, 4, 5, 768}) {
      EXPECT(g.steps(k) * g.k_step >= k && (k == 0 || (g.steps(k) - 1) * g.k_step < k), "steps(%zu) = %zu", k,
             g.steps(k));
    }
    const bool bf16_panels =
        g.layout == Layout::kBf16Pairs || g.layout == Layout::kBf16Rows || g.layout == Layout::kBf16Dots;
    EXPECT(bf16_panels == (g.rhs_type == DType::kBF16), "layout and type of the panels disagree");
    EXPECT((g.layout == Layout::kS8Groups) == (g.rhs_type == DType::kS8) &&
               (g.lhs_type == DType::kS8) == (g.rhs_type == DType::kS8),
           "layout and type of s8 panels disagree");
  }
  std::sort(names.begin(), names.end());
  EXPECT(std::unique(names.begin(), names.end()) == names.end(), "two micro-kernels have one name");
}

TORCH_EXT_TEST(the_best_candidates_come_first) {
  size_t count = 0;
  const Isa* const isas = isa_candidates(&count);
  EXPECT(count >= 1 && isas[count - 1].required_features == kFeatureNone, "the last candidate must run everywhere");
  EXPECT(std::string(isas[count - 1].name) == "portable", "the last candidate is %s", isas[count - 1].name);
  for (size_t i = 0; i < count; ++i) {
    for (size_t j = i + 1; j < count; ++j) {
      const uint32_t first = isas[i].required_features, later = isas[j].required_features;
      EXPECT(later == first || (later & first) != first, "%s needs all that %s needs and more, but comes later",
             isas[j].name, isas[i].name);
      EXPECT(std::string(isas[i].name) != isas[j].name, "two candidates are called %s", isas[i].name);
    }
  }
  const std::vector<std::string> expected =
#if defined(__aarch64__)
      {"sve_bf16", "neon_i8mm", "neon_bf16", "neon_dotprod", "neon", "portable"};
#elif defined(__x86_64__)
      {"amx", "avx512_bf16", "onednn", "torch", "portable"};
#else
      {"portable"};
#endif
  EXPECT(count == expected.size(), "%zu candidates, expected %zu", count, expected.size());
  for (size_t i = 0; i < std::min(count, expected.size()); ++i) {
    EXPECT(expected[i] == isas[i].name, "candidate %zu is %s, expected %s", i, isas[i].name, expected[i].c_str());
  }
}

TORCH_EXT_TEST(row_kernels_are_chosen_by_features) {
  // all_vec_paths() is in the order of preference.
  uint32_t bits = 0;
  for (const VecKernels* const vec : all_vec_paths()) bits |= vec->required_features;
  for (uint32_t features = bits;; features = (features - 1) & bits) {  // every subset
    const VecKernels* expected = nullptr;
    for (const VecKernels* const vec : all_vec_paths()) {
      if (!expected && (vec->required_features & ~features) == 0) expected = vec;
    }
    const VecKernels& got = best_vec_kernels(features);
    EXPECT(&got == expected, "features 0x%x: %s, expected %s", features, got.name, expected->name);
    if (features == 0) break;
  }
}

TORCH_EXT_TEST(dispatch_uses_no_kernel_that_the_tests_do_not_know) {
  size_t count = 0;
  const Isa* const isas = isa_candidates(&count);
  const auto known = [](const GemmKernel* g) {
    return std::any_of(all_gemm_paths().begin(), all_gemm_paths().end(),
                       [g](const GemmPath& path) { return path.kernel == g; });
  };
  for (size_t i = 0; i < count; ++i) {
    context("candidate %s", isas[i].name);
    EXPECT((isas[i].linear == LinearEngine::kOwn) == (isas[i].gemm != nullptr), "own kernels need a table");
    EXPECT(!isas[i].gemm || known(isas[i].gemm), "its matrix kernels are not in paths.cpp");
    EXPECT(!isas[i].gemm_s8 || std::any_of(all_s8_paths().begin(), all_s8_paths().end(),
                                           [&](const GemmPath& path) { return path.kernel == isas[i].gemm_s8; }),
           "its s8 kernels are not in paths.cpp");
    const bool vec_known = std::count(all_vec_paths().begin(), all_vec_paths().end(), isas[i].vec) > 0;
    EXPECT(!isas[i].vec || vec_known, "its row kernels are not in paths.cpp");
    for (const VecKernels* const vec : all_vec_paths()) {
      if (isas[i].vec && isas[i].vec != vec) continue;
      for (const DType t : {DType::kF32, DType::kBF16}) {
        const GemmKernel& g = attention_gemm({&isas[i], vec->gemm_s8, vec, false}, t);
        EXPECT(known(&g), "attention uses %s, which is not in paths.cpp", g.name);
        EXPECT(t == DType::kBF16 || g.lhs_type == DType::kF32, "fp32 attention in %s", g.name);
      }
    }
  }
}

TORCH_EXT_TEST(packed_header_says_what_was_packed) {
  const PackedHeader h = make_packed_header(Layout::kBf16Pairs, 768, 3072, 12, 4, 65, 999);
  EXPECT(std::string(h.magic, sizeof h.magic) == "TXPACKED", "magic %.8s", h.magic);
  EXPECT(h.version == kPackedVersion && h.layout == Layout::kBf16Pairs && h.n == 768 && h.k == 3072 && h.nr == 12 &&
             h.kr == 4 && h.metadata_bytes == 65 && h.payload_bytes == 999,
         "a field got lost");
  EXPECT(payload_offset(h) == 64 + 128, "65 bytes of metadata: payload at %zu, expected 192", payload_offset(h));
  const PackedHeader plain = make_packed_header(Layout::kPlain, 1, 1, 0, 0, 0, 2);
  EXPECT(payload_offset(plain) == 64, "payload at %zu, expected 64", payload_offset(plain));
  for (const Layout a : {Layout::kBf16Pairs, Layout::kBf16Rows, Layout::kF32Rows, Layout::kPlain, Layout::kOnednn}) {
    EXPECT(std::string(layout_name(a)) != "unknown", "layout %u has no name", static_cast<unsigned>(a));
  }
}

}  // namespace
}  // namespace torch_ext::test
