// Micro-kernels on VPDPBUSD, which adds to each s32 of a vector the products of four u8 with four s8. Included by
// gemm_avx512_vnni.cpp and gemm_avx_vnni.cpp, after simd.inl and quantize.inl; theirs are
//
//   void add_dot(vdot& acc, vdot a, vdot b)   the instruction on their vectors; in assembly, since GCC 12 copies each
//                                             accumulator from register to register before and after the intrinsic
//   vdot load_dot(const int8_t*), broadcast_dot(int32_t)
//
// Rows are stored as q + 128, unsigned, so that a sum is too large by 128 times the sum of the column; the panel ends
// with that, too:
//
//   panel: s8p<nr>x4 (see vec/quantize.inl), then nr scales in f32, then nr times 128 * sum over p of q(j, p), in s32
//
// nr is two vectors of s32. Register use of mr rows: 2 mr accumulators, 2 panel vectors, 1 row at a time.

constexpr size_t kNr = 2 * kWidth;
constexpr size_t kKr = 4;

template <size_t kMr>
static void dot_tile(size_t steps, const void* lhs_block, const void* rhs_panel, float* tile, size_t ld_tile) {
  const int8_t* lhs = static_cast<const int8_t*>(lhs_block);
  const int8_t* rhs = static_cast<const int8_t*>(rhs_panel);
  vdot acc[kMr][2] = {};
  for (size_t s = 0; s < steps; ++s) {
    const vdot b0 = load_dot(rhs), b1 = load_dot(rhs + kWidth * kKr);
#pragma GCC unroll 8
    for (size_t i = 0; i < kMr; ++i) {
      int32_t four;
      __builtin_memcpy(&four, lhs + i * kKr, sizeof four);
      const vdot a = broadcast_dot(four);
      add_dot(acc[i][0], a, b0);
      add_dot(acc[i][1], a, b1);
    }
    lhs += kMr * kKr;
    rhs += kNr * kKr;
  }
  const float* const row_scales = reinterpret_cast<const float*>(lhs);
  const float* const column_scales = reinterpret_cast<const float*>(rhs);
  const int32_t* const excess = reinterpret_cast<const int32_t*>(rhs) + kNr;
#pragma GCC unroll 2
  for (size_t v = 0; v < 2; ++v) {
    vu over;  // unsigned, since differences wrap
    __builtin_memcpy(&over, excess + v * kWidth, sizeof over);
    const vf columns = load(column_scales + v * kWidth);
#pragma GCC unroll 8
    for (size_t i = 0; i < kMr; ++i) {
      const vf x = __builtin_convertvector((vi)((vu)acc[i][v] - over), vf) * columns;
      store(tile + i * ld_tile + v * kWidth, x * row_scales[i]);
    }
  }
}
