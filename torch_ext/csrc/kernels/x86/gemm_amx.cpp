// bf16 products on AMX tiles.
//
// Micro-kernels gemm_f32_bf16_bf16p32x2_{1,2,16,32}x32_amx: TDPBF16PS takes a tile of sixteen rows by 32 products and one of
// sixteen columns by 32 products, and adds their 16 x 16 sums of products to a tile of f32. For one and two rows,
// VDPBF16PS reads the same layout.
//
//   tmm0..tmm3  accumulators: tmm(2 i + j) holds rows 16 i.. and columns 16 j..
//   tmm4, tmm5  block: rows 0..15 and 16..31 of one step
//   tmm6, tmm7  panel: columns 0..15 and 16..31
//
// One step of 32 products: 4 TDPBF16PS and 4 tile loads. It rounds to nearest even, and takes subnormals for zero.
#include <type_traits>

#include "kernels/families.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu_features.h"
#include "kernels/target_region.h"

TARGET_REGION_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512bf16,amx-tile,amx-bf16",
                    "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512bf16,amx-tile,amx-bf16")

namespace torch_ext {
namespace amx {

#define TORCH_EXT_VEC_AVX512 1
#define TORCH_EXT_VEC_AVX512_BF16 1
#define TORCH_EXT_VEC_WIDTH 16
#define TORCH_EXT_VEC_NR "32"
#define TORCH_EXT_VEC_MAIN_MR 8
#define TORCH_EXT_VEC_NAME "avx512_amx_fma"
#define TORCH_EXT_VEC_FEATURES (kFeatureAvx512 | kFeatureAvx512Bf16 | kFeatureAmxBf16)
// clang-format off: the order matters
#include "kernels/vec/simd.inl"
#include "kernels/vec/gemm_f32.inl"
#include "kernels/vec/softmax_pack.inl"
// clang-format on

constexpr size_t kDotStep = 32;
#include "kernels/x86/gemm_dot_bf16.inl"

struct TileConfig {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

constexpr TileConfig make_tile_config() {
  TileConfig c;
  c.palette = 1;
  for (size_t i = 0; i < 8; ++i) {
    c.row_bytes[i] = 64;
    c.rows[i] = 16;
  }
  return c;
}
alignas(64) static constexpr TileConfig kTileConfig = make_tile_config();

// What the thread had before: oneDNN uses tiles, too.
static TileConfig& tiles_before() {
  alignas(64) static thread_local TileConfig config;
  return config;
}

static void begin_tiles() {
  _tile_storeconfig(&tiles_before());
  _tile_loadconfig(&kTileConfig);
}

static void end_tiles() {
  if (tiles_before().palette) {
    _tile_loadconfig(&tiles_before());
  } else {
    _tile_release();
  }
}

template <bool kTwoRowTiles>
static void ukernel_tiles(size_t steps, const void* lhs_block, const void* rhs_panel, float* tile, size_t ld_tile) {
  const bf16* lhs = static_cast<const bf16*>(lhs_block);
  const bf16* rhs = static_cast<const bf16*>(rhs_panel);
  constexpr size_t kMr = kTwoRowTiles ? 32 : 16;
  constexpr size_t kLhsBytes = kDotStep * sizeof(bf16), kRhsBytes = 2 * kDotNr * sizeof(bf16);
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwoRowTiles) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (size_t s = 0; s < steps; ++s) {
    _tile_loadd(4, lhs, kLhsBytes);
    _tile_loadd(6, rhs, kRhsBytes);
    _tile_loadd(7, rhs + 32, kRhsBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwoRowTiles) {
      _tile_loadd(5, lhs + 16 * kDotStep, kLhsBytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    lhs += kMr * kDotStep;
    rhs += kDotStep * kDotNr;
  }
  const size_t tile_bytes = ld_tile * sizeof(float);
  _tile_stored(0, tile, tile_bytes);
  _tile_stored(1, tile + 16, tile_bytes);
  if constexpr (kTwoRowTiles) {
    _tile_stored(2, tile + 16 * ld_tile, tile_bytes);
    _tile_stored(3, tile + 16 * ld_tile + 16, tile_bytes);
  }
}

static constexpr UKernel kAmxUKernels[] = {
    {"gemm_f32_bf16_bf16p32x2_1x32_amx", 1, ukernel_dot<1>},
    {"gemm_f32_bf16_bf16p32x2_2x32_amx", 2, ukernel_dot<2>},
    {"gemm_f32_bf16_bf16p32x2_16x32_amx", 16, ukernel_tiles<false>},
    {"gemm_f32_bf16_bf16p32x2_32x32_amx", 32, ukernel_tiles<true>},
};

static constexpr GemmKernel make_family() {
  GemmKernel family = dot_family(TORCH_EXT_VEC_FEATURES, kAmxUKernels, 4);
  family.begin = begin_tiles;
  family.end = end_tiles;
  return family;
}
static constexpr GemmKernel kFamilyAmx = make_family();

}  // namespace amx

extern const GemmKernel kGemmAmx = amx::kFamilyAmx;

}  // namespace torch_ext

TARGET_REGION_END

#endif
