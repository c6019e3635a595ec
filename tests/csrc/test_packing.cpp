// Packers against the index formulas in the comments of pack_bf16_pairs.inl and gemm_f32.inl, element by element.
#include <algorithm>
#include <vector>

#include "gemm.h"
#include "guarded.h"
#include "packing/packed_weight.h"
#include "paths.h"
#include "reference.h"
#include "runner.h"

namespace torch_ext::test {
namespace {

uint32_t packed_bits(DType t, const void* data, size_t at) {
  return t == DType::kF32 ? static_cast<const uint32_t*>(data)[at] : static_cast<const bf16*>(data)[at].bits;
}

uint32_t expected_bits(DType t, float x) { return t == DType::kF32 ? float_bits(x) : reference_bf16(x).bits; }

/// Packs `rows` of `block_rows` rows (columns, for kRhsKxn) of random numbers and compares every element of the result.
void check_packer(const GemmPath& path, Packer packer, DType source_type, size_t rows, size_t block_rows, size_t k,
                  size_t gap) {
  const GemmKernel& g = *path.kernel;
  const bool lhs = packer == Packer::kLhs, kxn = packer == Packer::kRhsKxn;
  const DType packed_type = lhs ? g.lhs_type : g.rhs_type;
  const size_t padded = g.steps(k) * g.k_step;
  context("%s %s from %s, %zu of %zu rows, k %zu, ld +%zu", path.name().c_str(), packer_name(packer),
          dtype_name(source_type), rows, block_rows, k, gap);
  Matrix source(source_type, kxn ? k : rows, kxn ? rows : k, (kxn ? rows : k) + gap);
  source.fill(random_source());
  const GuardedBytes packed(block_rows * padded * dtype_bytes(packed_type));
  pack(path, packer, source_type, rows, block_rows, k, source.data(), source.ld, packed.data());
  for (size_t i = 0; i < block_rows; ++i) {
    for (size_t p = 0; p < padded; ++p) {
      const bool inside = i < rows && p < k;
      const float x = !inside ? 0.0f : kxn ? source.get(p, i) : source.get(i, p);
      const size_t at = lhs ? block_index(g, block_rows, g.steps(k), i, p) : panel_index(g, i, p);
      const uint32_t got = packed_bits(packed_type, packed.data(), at), expected = expected_bits(packed_type, x);
      EXPECT(got == expected, "(%zu, %zu), at element %zu, is 0x%x, expected 0x%x (%g)", i, p, at, got, expected,
             static_cast<double>(x));
    }
  }
}

TORCH_EXT_TEST(packers_fill_every_element_and_pad_with_zeros) {
  std::vector<size_t> depths = {1, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 31, 33, 64, 67};
  if (options().quick) depths = {1, 3, 4, 5, 7, 8, 9, 17};
  for (const GemmPath& path : gemm_paths()) {
    const GemmKernel& g = *path.kernel;
    for (const DType type : {DType::kF32, DType::kBF16}) {
      for (const size_t k : depths) {
        for (size_t gap = 0; gap <= 3; gap += 3) {
          for (size_t u = 0; u < g.ukernel_count; ++u) {
            const size_t mr = g.ukernels[u].mr;
            for (size_t rows = 1; rows <= mr; ++rows) check_packer(path, Packer::kLhs, type, rows, mr, k, gap);
          }
          for (size_t cols = 1; cols <= g.nr; ++cols) {
            check_packer(path, Packer::kRhsNxk, type, cols, g.nr, k, gap);
            check_packer(path, Packer::kRhsKxn, type, cols, g.nr, k, gap);
          }
        }
      }
    }
  }
}

// "Worked examples: R = 12, row 5, product 6 -> ((1 * 12) + 5) * 4 + 2 = 70. R = 24, the same -> ((1 * 24) + 5) * 4 + 2 =
// 118", for rows "nr = 12, column j = 5, product p = 2 -> element 29 of the panel", for dots "column 5, product 3 -> 75", for
// halves "column 11, product 2 -> 39".
TORCH_EXT_TEST(worked_examples_of_the_layouts_hold) {
  for (const GemmPath& path : gemm_paths()) {
    const GemmKernel& g = *path.kernel;
    const bool pairs = g.layout == Layout::kBf16Pairs, dots = g.layout == Layout::kBf16Dots;
    const bool halves = g.layout == Layout::kBf16Halves;
    // The examples are of 12 columns, and of 24 in pairs.
    if (g.nr != 12 && !(pairs && g.nr == 24) && !dots && !halves) continue;
    const size_t column = halves ? 11 : 5, product = pairs ? 6 : dots ? 3 : 2, k = 8;
    const size_t element = pairs ? (g.nr == 12 ? 70 : 118) : dots ? 75 : halves ? 39 : 29;
    context("%s", path.name().c_str());
    for (const Packer packer : {Packer::kRhsNxk, Packer::kRhsKxn}) {
      const bool kxn = packer == Packer::kRhsKxn;
      Matrix source(DType::kF32, kxn ? k : g.nr, kxn ? g.nr : k);
      for (size_t i = 0; i < source.rows; ++i) {
        for (size_t j = 0; j < source.cols; ++j) source.set(i, j, 0.0f);
      }
      source.set(kxn ? product : column, kxn ? column : product, 1.0f);
      const GuardedBytes packed(g.rhs_panel_bytes(k));
      pack(path, packer, DType::kF32, g.nr, g.nr, k, source.data(), source.ld, packed.data());
      for (size_t at = 0; at < g.nr * k; ++at) {
        const uint32_t expected = expected_bits(g.rhs_type, at == element ? 1.0f : 0.0f);
        EXPECT(packed_bits(g.rhs_type, packed.data(), at) == expected, "%s: element %zu is 0x%x, expected 0x%x",
               packer_name(packer), at, packed_bits(g.rhs_type, packed.data(), at), expected);
      }
    }
  }
}

// Diagram of pack_bf16_pairs.inl: step 0 holds (0,0..3) (1,0..3) | (2,0..3) ..., step 1 (0,4..7) ...; diagram of
// gemm_f32.inl: a block row by row, a panel product by product.
TORCH_EXT_TEST(diagrams_of_the_layouts_hold) {
  for (const GemmPath& path : gemm_paths()) {
    const GemmKernel& g = *path.kernel;
    context("%s", path.name().c_str());
    const size_t k = 8, mr = g.max_mr();
    Matrix source(DType::kF32, std::max(mr, g.nr), k);
    for (size_t i = 0; i < source.rows; ++i) {
      for (size_t p = 0; p < k; ++p) source.set(i, p, static_cast<float>(8 * i + p));  // up to 255: exact in bf16
    }
    std::vector<float> block, panel;
    if (g.layout == Layout::kBf16Pairs) {
      for (size_t step = 0; step < 2; ++step) {
        for (size_t i = 0; i < g.nr; ++i) {
          for (size_t p = 4 * step; p < 4 * step + 4; ++p) {
            if (i < mr) block.push_back(source.get(i, p));
            panel.push_back(source.get(i, p));
          }
        }
      }
    } else {
      for (size_t i = 0; i < mr; ++i) {
        for (size_t p = 0; p < k; ++p) block.push_back(source.get(i, p));
        if (g.layout == Layout::kBf16Dots) block.resize((i + 1) * g.k_step, 0.0f);  // one step, padded
      }
      const size_t pair = g.layout == Layout::kBf16Dots ? 2 : 1;
      const bool halves = g.layout == Layout::kBf16Halves;  // columns 0 8 1 9 ...
      for (size_t p = 0; p < k; p += pair) {
        for (size_t j = 0; j < g.nr; ++j) {
          for (size_t q = p; q < p + pair; ++q) panel.push_back(source.get(halves ? j / 2 + j % 2 * 8 : j, q));
        }
      }
    }
    const GuardedBytes packed_block(g.lhs_block_bytes(mr, k)), packed_panel(g.rhs_panel_bytes(k));
    pack(path, Packer::kLhs, DType::kF32, mr, mr, k, source.data(), k, packed_block.data());
    pack(path, Packer::kRhsNxk, DType::kF32, g.nr, g.nr, k, source.data(), k, packed_panel.data());
    for (size_t at = 0; at < block.size(); ++at) {
      EXPECT(packed_bits(g.lhs_type, packed_block.data(), at) == expected_bits(g.lhs_type, block[at]),
             "block element %zu is not %g", at, static_cast<double>(block[at]));
    }
    for (size_t at = 0; at < panel.size(); ++at) {
      EXPECT(packed_bits(g.rhs_type, packed_panel.data(), at) == expected_bits(g.rhs_type, panel[at]),
             "panel element %zu is not %g", at, static_cast<double>(panel[at]));
    }
  }
}

/// Numbers whose rounding to bf16 is hard: ties both ways, neighbours of ties, subnormals, the largest, infinities.
std::vector<float> hard_to_round() {
  std::vector<float> x;
  for (const uint32_t high :
       {0x0000u, 0x0001u, 0x007fu, 0x0080u, 0x3f80u, 0x3f81u, 0x4049u, 0x7f7eu, 0x7f7fu, 0x7f80u}) {
    for (const uint32_t low : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      if (high == 0x7f80u && low != 0) continue;  // NaN
      for (const uint32_t sign : {0u, 0x80000000u}) x.push_back(float_from_bits(sign | (high << 16) | low));
    }
  }
  return x;
}

TORCH_EXT_TEST(unpack_returns_the_bf16_rounding_of_what_was_packed) {
  const std::vector<float> hard = hard_to_round();
  for (const GemmPath& path : gemm_paths()) {
    const GemmKernel& g = *path.kernel;
    if (g.rhs_type != DType::kBF16) continue;
    for (const size_t n : {size_t{1}, size_t{5}, g.nr - 1, g.nr, g.nr + 1, 2 * g.nr + 3}) {
      for (const size_t k : {1, 3, 4, 8, 13, 129}) {
        for (const DType type : {DType::kF32, DType::kBF16}) {
          context("%s n %zu k %zu from %s", path.name().c_str(), n, k, dtype_name(type));
          Matrix weight(type, n, k, k + 2);
          for (size_t i = 0; i < n; ++i) {
            for (size_t p = 0; p < k; ++p) {
              const size_t at = i * k + p;
              weight.set(i, p, at % 2 ? random_source().value() : hard[at / 2 % hard.size()]);
            }
          }
          const GuardedBytes payload(packed_payload_bytes(g, n, k));
          const size_t half = g.panels(n) / 2;
          pack_weight_panels(g, n, k, weight.data(), type, weight.ld, payload.data(), 0, half);
          pack_weight_panels(g, n, k, weight.data(), type, weight.ld, payload.data(), half, g.panels(n));
          const Guarded<bf16> unpacked(n * k);
          unpack_weight(g, n, k, payload.data(), unpacked.get());
          for (size_t i = 0; i < n * k; ++i) {
            const float x = weight.get(i / k, i % k);
            EXPECT(unpacked[i] == reference_bf16(x), "(%zu, %zu): 0x%04x, expected 0x%04x (%g)", i / k, i % k,
                   unpacked[i].bits, reference_bf16(x).bits, static_cast<double>(x));
          }
        }
      }
    }
  }
}

TORCH_EXT_TEST(packing_keeps_nan_and_infinity) {
  for (const GemmPath& path : gemm_paths()) {
    const GemmKernel& g = *path.kernel;
    for (const Packer packer : kPackers) {
      const bool lhs = packer == Packer::kLhs, kxn = packer == Packer::kRhsKxn;
      const size_t rows = lhs ? g.max_mr() : g.nr, k = 9;
      for (const uint32_t bits : {0x7f800000u, 0xff800000u, 0x7fc00000u, 0x7f800001u, 0xff80ffffu, 0x7fffffffu}) {
        for (const size_t p : {size_t{0}, size_t{3}, k - 1}) {
          context("%s %s 0x%08x at product %zu", path.name().c_str(), packer_name(packer), bits, p);
          Matrix source(DType::kF32, kxn ? k : rows, kxn ? rows : k);
          source.fill(random_source());
          const size_t i = rows - 1;
          float* const x = static_cast<float*>(source.data()) + (kxn ? p * rows + i : i * k + p);
          const uint32_t copied = bits;
          std::memcpy(x, &copied, sizeof copied);
          const DType type = lhs ? g.lhs_type : g.rhs_type;
          const GuardedBytes packed(rows * g.steps(k) * g.k_step * dtype_bytes(type));
          pack(path, packer, DType::kF32, rows, rows, k, source.data(), source.ld, packed.data());
          const size_t at = lhs ? block_index(g, rows, g.steps(k), i, p) : panel_index(g, i, p);
          const uint32_t got = packed_bits(type, packed.data(), at);
          const float value = type == DType::kF32 ? float_from_bits(got) : bf16_to_f32({static_cast<uint16_t>(got)});
          const float expected = float_from_bits(bits);
          EXPECT(std::isnan(expected) ? std::isnan(value) : value == expected, "became 0x%x", got);
        }
      }
    }
  }
}

TORCH_EXT_TEST(scratch_memory_is_aligned_and_slots_are_apart) {
  char* const a = static_cast<char*>(thread_scratch(ScratchSlot::kLhs, 100));
  char* const b = static_cast<char*>(thread_scratch(ScratchSlot::kAttention, 70000));
  EXPECT(reinterpret_cast<uintptr_t>(a) % 64 == 0 && reinterpret_cast<uintptr_t>(b) % 64 == 0, "not 64-byte aligned");
  std::memset(a, 1, 100);
  std::memset(b, 2, 70000);
  EXPECT(std::all_of(a, a + 100, [](char c) { return c == 1; }), "two slots overlap");
  EXPECT(thread_scratch(ScratchSlot::kLhs, 50) == a, "a smaller request moved the memory");
  char* const larger = static_cast<char*>(thread_scratch(ScratchSlot::kLhs, 1 << 20));
  std::memset(larger, 3, 1 << 20);
  EXPECT(std::all_of(b, b + 70000, [](char c) { return c == 2; }), "two slots overlap");
}

}  // namespace
}  // namespace torch_ext::test
