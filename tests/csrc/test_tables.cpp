// The tables themselves: names against rows, order of priority, completeness of the lists that the other tests use.
#include <algorithm>
#include <cstdio>
#include <span>
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
  return t == DType::kF32 ? "f32" : t == DType::kBF16 ? "bf16" : left ? "qs8dx" : "qs8cx";  // kS16 holds qs8dx
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
      {"avx512_bf16_fma", "avx512_fma", "avx2_fma", "portable"};
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
    const bool bf16_panels = g.layout == Layout::kBf16Pairs || g.layout == Layout::kBf16Rows ||
                             g.layout == Layout::kBf16Dots || g.layout == Layout::kBf16Halves;
    EXPECT(bf16_panels == (g.rhs_type == DType::kBF16), "layout and type of the panels disagree");
    EXPECT(is_s8(g.layout) == (g.rhs_type == DType::kS8) &&
               (g.lhs_type == DType::kS8 || g.lhs_type == DType::kS16) == (g.rhs_type == DType::kS8),
           "layout and type of s8 panels disagree");
  }
  std::sort(names.begin(), names.end());
  EXPECT(std::unique(names.begin(), names.end()) == names.end(), "two micro-kernels have one name");
}

TORCH_EXT_TEST(the_best_candidates_come_first) {
  const std::span<const Isa> all = isas();
  EXPECT(!all.empty() && all.back().required_features == kFeatureNone, "the last candidate must run everywhere");
  EXPECT(std::string(all.back().name) == "portable", "the last candidate is %s", all.back().name);
  for (size_t i = 0; i < all.size(); ++i) {
    for (size_t j = i + 1; j < all.size(); ++j) {
      const uint32_t first = all[i].required_features, later = all[j].required_features;
      EXPECT(later == first || (later & first) != first, "%s needs all that %s needs and more, but comes later",
             all[j].name, all[i].name);
      EXPECT(std::string(all[i].name) != all[j].name, "two candidates are called %s", all[i].name);
    }
  }
  const std::vector<std::string> expected =
#if defined(__aarch64__)
      {"sve_bf16", "neon_i8mm", "neon_bf16", "neon_dotprod", "neon", "portable"};
#elif defined(__x86_64__)
      {"amx", "avx512_bf16", "avx512", "onednn", "avx_vnni", "avx2", "torch", "portable"};
#else
      {"portable"};
#endif
  EXPECT(all.size() == expected.size(), "%zu candidates, expected %zu", all.size(), expected.size());
  for (size_t i = 0; i < std::min(all.size(), expected.size()); ++i) {
    EXPECT(expected[i] == all[i].name, "candidate %zu is %s, expected %s", i, all[i].name, expected[i].c_str());
  }
}

template <typename Kernel>
void expect_last_runs_everywhere(std::span<const Kernel* const> list) {
  EXPECT(list.back()->required_features == kFeatureNone, "%s comes last and needs features", list.back()->name);
  for (size_t i = 0; i < list.size(); ++i) {
    for (size_t j = i + 1; j < list.size(); ++j) {
      const uint32_t first = list[i]->required_features, later = list[j]->required_features;
      EXPECT(later == first || (later & first) != first, "%s needs all that %s needs and more, but comes later",
             list[j]->name, list[i]->name);
    }
  }
}

TORCH_EXT_TEST(every_list_ends_with_what_runs_everywhere) {
  expect_last_runs_everywhere(bf16_kernels());
  expect_last_runs_everywhere(s8_kernels());
  expect_last_runs_everywhere(f32_kernels());
  expect_last_runs_everywhere(row_kernels());
}

template <typename Kernel>
void expect_first_that_fits(const Isa& isa, std::span<const Kernel* const> list, uint32_t allowed, const Kernel* got) {
  for (const Kernel* const kernel : list) {
    if ((kernel->required_features & ~allowed) != 0) continue;
    EXPECT(got == kernel, "%s with features 0x%x: %s, expected %s", isa.name, allowed, got->name, kernel->name);
    return;
  }
}

TORCH_EXT_TEST(a_level_gets_the_first_kernels_that_it_allows) {
  uint32_t bits = 0;
  for (const Isa& isa : isas()) bits |= isa.required_features;
  for (const auto& list : {bf16_kernels(), s8_kernels()}) {
    for (const GemmKernel* const kernel : list) bits |= kernel->required_features;
  }
  for (uint32_t features = bits;; features = (features - 1) & bits) {  // every subset
    for (const Isa& isa : isas()) {
      if ((isa.required_features & ~features) != 0) continue;
      const Dispatch d = kernels_of(isa, features);
      const uint32_t allowed = features & (isa.required_features | isa.optional_features);
      expect_first_that_fits(isa, bf16_kernels(), allowed, d.gemm_bf16);
      expect_first_that_fits(isa, s8_kernels(), allowed, d.gemm_s8);
      expect_first_that_fits(isa, f32_kernels(), allowed, d.gemm_f32);
      expect_first_that_fits(isa, row_kernels(), allowed, d.vec);
      EXPECT(d.isa == &isa && !d.forced, "%s: another level came out", isa.name);
    }
    if (features == 0) break;
  }
}

TORCH_EXT_TEST(levels_get_the_kernels_that_they_are_named_after) {
  struct Expected {
    const char *isa, *bf16, *s8;
  };
  constexpr Expected kExpected[] = {
#if defined(__aarch64__)
      {"sve_bf16", "8x24_sve256_bfmmla", "8x12_neon_smmla"}, {"neon_i8mm", "8x12_neon_bfmmla", "8x12_neon_smmla"},
      {"neon_bf16", "8x12_neon_bfmmla", "8x12_neon_sdot"},   {"neon_dotprod", "6x12_neon_fmla", "8x12_neon_sdot"},
      {"neon", "6x12_neon_fmla", "6x12_neon_fmla"},
#elif defined(__x86_64__)
      {"amx", "32x32_amx", "6x32_avx2_pmaddwd"},          {"avx512_bf16", "8x32_avx512_bf16_dot", "6x32_avx2_pmaddwd"},
      {"avx512", "8x32_avx512_fma", "6x32_avx2_pmaddwd"}, {"avx_vnni", "6x16_avx2_fma", "6x16_avx_vnni"},
      {"avx2", "6x16_avx2_fma", "6x32_avx2_pmaddwd"},
#endif
      {"portable", "8x12_portable", "8x12_portable"},
  };
  const auto ends_with = [](const GemmKernel& g, const std::string& end) {
    const std::string name = g.ukernels[g.ukernel_count - 1].name;
    return name.size() > end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0;
  };
  for (const Expected& e : kExpected) {
    const auto isa =
        std::find_if(isas().begin(), isas().end(), [&](const Isa& i) { return i.name == std::string(e.isa); });
    EXPECT(isa != isas().end(), "no level %s", e.isa);
    if (isa == isas().end()) continue;
    uint32_t features = isa->required_features;
    if (features & kFeatureAvx512) features |= kFeatureAvx2Fma;  // every such CPU has them
    const Dispatch d = kernels_of(*isa, features);
    EXPECT(ends_with(*d.gemm_bf16, e.bf16), "%s: bf16 on %s, expected %s", e.isa, d.gemm_bf16->ukernels[0].name,
           e.bf16);
    EXPECT(ends_with(*d.gemm_s8, e.s8), "%s: s8 on %s, expected %s", e.isa, d.gemm_s8->ukernels[0].name, e.s8);
    const GemmKernel* const attention = d.gemm_bf16->lhs_type == DType::kBF16 ? d.gemm_bf16 : d.gemm_f32;
    EXPECT(attention_gemm(d, DType::kBF16).name == attention->name, "%s: attention of bf16 on other kernels", e.isa);
    EXPECT(attention_gemm(d, DType::kF32).lhs_type == DType::kF32, "%s: attention of fp32 in bf16", e.isa);
  }
}

TORCH_EXT_TEST(sizes_of_caches_are_read) {
  EXPECT(parse_cache_size("512K\n") == 512u << 10 && parse_cache_size("2M") == 2u << 20 && parse_cache_size("64") == 64,
         "a size came out wrong");
  for (const char* const text : {"", "K", "unknown", "99999999999999999999K"}) {
    EXPECT(parse_cache_size(text) == 0, "%s is %zu bytes", text, parse_cache_size(text));
  }
  EXPECT(second_level_cache_bytes() >= 256u << 10 && second_level_cache_bytes() <= 2u << 20, "%zu bytes",
         second_level_cache_bytes());
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
  for (const Layout a : {Layout::kBf16Pairs, Layout::kBf16Rows, Layout::kF32Rows, Layout::kPlain, Layout::kOnednn,
                         Layout::kS8Groups, Layout::kBf16Dots, Layout::kBf16Halves, Layout::kS8Crossed}) {
    EXPECT(std::string(layout_name(a)) != "unknown", "layout %u has no name", static_cast<unsigned>(a));
  }
}

}  // namespace
}  // namespace torch_ext::test
