// Assembly that the kernels on BFMMLA and on SMMLA share: the same tiles in the same registers. Both instructions take
// two rows of eight bytes from each side and add their 2 x 2 products:
//
//   Vd = [ d00 d01 d10 d11 ],  Vn = [ row 0, 8 bytes | row 1, 8 bytes ],  Vm = [ column 0, 8 bytes | column 1, 8 bytes ]
//
// Eight rows by twelve columns need all 32 vector registers, and compilers that hoist a load spill an accumulator:
//
//   v0..v3    block: rows 0-1, 2-3, 4-5, 6-7 of one step
//   v4..v7    panel: four column pairs, then the two that are left
//   v8..v31   accumulators: v(8 + 4 j + i) holds rows 2i, 2i+1 and columns 2j, 2j+1
//
// One step: 24 MMLA and 3 LD1, which load 10 vectors and advance the pointers. The main loop takes four steps: 110
// instructions for 96 MMLA.
//
// Two rows: six accumulators would not hide the latency of MMLA, so that even and odd steps have a set each.
//
//   v0..v3    block, one register for each of four steps
//   v8..v13   accumulators of steps 0 and 2: columns 2j, 2j+1 in v(8 + j)
//   v14..v19  accumulators of steps 1 and 3
//   v20..v31  panel, two steps at a time
//
// Four steps: 24 MMLA, 7 LD1 and 2 instructions of loop control.
//
// Operands of the asm statements: lhs, rhs, tile (pointers, changed), ld (bytes), quads and rest (steps / 4, steps % 4).
// `I` is the instruction, `T` the arrangement of its sources.
#pragma once

// clang-format off: one instruction per line

#define MMLA_ZERO(r) "movi v" #r ".2d, #0 \n"
#define MMLA_ZERO_8(a, b, c, d, e, f, g, h) \
  MMLA_ZERO(a) MMLA_ZERO(b) MMLA_ZERO(c) MMLA_ZERO(d) MMLA_ZERO(e) MMLA_ZERO(f) MMLA_ZERO(g) MMLA_ZERO(h)

#define MMLA_ONE(I, T, acc, a, b) I " v" #acc ".4s, v" #a T ", v" #b T " \n"

// The column pair in register `b` with all four row pairs.
#define MMLA_COLUMN_PAIR(I, T, b, a0, a1, a2, a3) \
  MMLA_ONE(I, T, a0, 0, b)                        \
  MMLA_ONE(I, T, a1, 1, b)                        \
  MMLA_ONE(I, T, a2, 2, b)                        \
  MMLA_ONE(I, T, a3, 3, b)

#define MMLA_STEP_8(I, T)                                           \
  "ld1 {v0.16b, v1.16b, v2.16b, v3.16b}, [%[lhs]], #64 \n"          \
  "ld1 {v4.16b, v5.16b, v6.16b, v7.16b}, [%[rhs]], #64 \n"          \
  MMLA_COLUMN_PAIR(I, T, 4, 8, 9, 10, 11)                           \
  MMLA_COLUMN_PAIR(I, T, 5, 12, 13, 14, 15)                         \
  MMLA_COLUMN_PAIR(I, T, 6, 16, 17, 18, 19)                         \
  MMLA_COLUMN_PAIR(I, T, 7, 20, 21, 22, 23)                         \
  "ld1 {v4.16b, v5.16b}, [%[rhs]], #32 \n"                          \
  MMLA_COLUMN_PAIR(I, T, 4, 24, 25, 26, 27)                         \
  MMLA_COLUMN_PAIR(I, T, 5, 28, 29, 30, 31)

#define MMLA_LOOP_8(I, T)                                           \
  MMLA_ZERO_8(8, 9, 10, 11, 12, 13, 14, 15)                         \
  MMLA_ZERO_8(16, 17, 18, 19, 20, 21, 22, 23)                       \
  MMLA_ZERO_8(24, 25, 26, 27, 28, 29, 30, 31)                       \
  "cbz %[quads], 2f \n"                                             \
  "1: \n"                                                           \
  MMLA_STEP_8(I, T) MMLA_STEP_8(I, T) MMLA_STEP_8(I, T) MMLA_STEP_8(I, T) \
  "subs %[quads], %[quads], #1 \n"                                  \
  "b.ne 1b \n"                                                      \
  "2: \n"                                                           \
  "cbz %[rest], 4f \n"                                              \
  "3: \n"                                                           \
  MMLA_STEP_8(I, T)                                                 \
  "subs %[rest], %[rest], #1 \n"                                    \
  "b.ne 3b \n"                                                      \
  "4: \n"

#define MMLA_ROW_PAIR(I, T, a, b0, b1, b2, b3, b4, b5, c0, c1, c2, c3, c4, c5) \
  MMLA_ONE(I, T, c0, a, b0) MMLA_ONE(I, T, c1, a, b1) MMLA_ONE(I, T, c2, a, b2) \
  MMLA_ONE(I, T, c3, a, b3) MMLA_ONE(I, T, c4, a, b4) MMLA_ONE(I, T, c5, a, b5)
#define MMLA_EVEN_STEP_2(I, T, a) MMLA_ROW_PAIR(I, T, a, 20, 21, 22, 23, 24, 25, 8, 9, 10, 11, 12, 13)
#define MMLA_ODD_STEP_2(I, T, a) MMLA_ROW_PAIR(I, T, a, 26, 27, 28, 29, 30, 31, 14, 15, 16, 17, 18, 19)
#define MMLA_TWO_PANEL_STEPS                                        \
  "ld1 {v20.16b, v21.16b, v22.16b, v23.16b}, [%[rhs]], #64 \n"      \
  "ld1 {v24.16b, v25.16b, v26.16b, v27.16b}, [%[rhs]], #64 \n"      \
  "ld1 {v28.16b, v29.16b, v30.16b, v31.16b}, [%[rhs]], #64 \n"

#define MMLA_LOOP_2(I, T)                                           \
  MMLA_ZERO_8(8, 9, 10, 11, 12, 13, 14, 15)                         \
  MMLA_ZERO(16) MMLA_ZERO(17) MMLA_ZERO(18) MMLA_ZERO(19)           \
  "cbz %[quads], 2f \n"                                             \
  "1: \n"                                                           \
  "ld1 {v0.16b, v1.16b, v2.16b, v3.16b}, [%[lhs]], #64 \n"          \
  MMLA_TWO_PANEL_STEPS                                              \
  MMLA_EVEN_STEP_2(I, T, 0)                                         \
  MMLA_ODD_STEP_2(I, T, 1)                                          \
  MMLA_TWO_PANEL_STEPS                                              \
  MMLA_EVEN_STEP_2(I, T, 2)                                         \
  MMLA_ODD_STEP_2(I, T, 3)                                          \
  "subs %[quads], %[quads], #1 \n"                                  \
  "b.ne 1b \n"                                                      \
  "2: \n"                                                           \
  "cbz %[rest], 4f \n"                                              \
  "3: \n"                                                           \
  "ldr q0, [%[lhs]], #16 \n"                                        \
  "ld1 {v20.16b, v21.16b, v22.16b, v23.16b}, [%[rhs]], #64 \n"      \
  "ld1 {v24.16b, v25.16b}, [%[rhs]], #32 \n"                        \
  MMLA_EVEN_STEP_2(I, T, 0)                                         \
  "subs %[rest], %[rest], #1 \n"                                    \
  "b.ne 3b \n"                                                      \
  "4: \n"

// Adds the sets of even and odd steps; `A` is FADD or ADD.
#define MMLA_ADD_SETS(A)                                            \
  A " v8.4s, v8.4s, v14.4s \n"   A " v9.4s, v9.4s, v15.4s \n"       \
  A " v10.4s, v10.4s, v16.4s \n" A " v11.4s, v11.4s, v17.4s \n"     \
  A " v12.4s, v12.4s, v18.4s \n" A " v13.4s, v13.4s, v19.4s \n"

// Two rows of twelve columns from the six accumulators of a row pair: the even row to v0..v2, the odd one to v3..v5.
#define MMLA_UNZIP_ROW_PAIR(a0, a1, a2, a3, a4, a5)                 \
  "zip1 v0.2d, v" #a0 ".2d, v" #a1 ".2d \n"                         \
  "zip1 v1.2d, v" #a2 ".2d, v" #a3 ".2d \n"                         \
  "zip1 v2.2d, v" #a4 ".2d, v" #a5 ".2d \n"                         \
  "zip2 v3.2d, v" #a0 ".2d, v" #a1 ".2d \n"                         \
  "zip2 v4.2d, v" #a2 ".2d, v" #a3 ".2d \n"                         \
  "zip2 v5.2d, v" #a4 ".2d, v" #a5 ".2d \n"

#define MMLA_STORE_ROW_PAIR                                         \
  "stp q0, q1, [%[tile]] \n"                                        \
  "str q2, [%[tile], #32] \n"                                       \
  "add %[tile], %[tile], %[ld] \n"                                  \
  "stp q3, q4, [%[tile]] \n"                                        \
  "str q5, [%[tile], #32] \n"                                       \
  "add %[tile], %[tile], %[ld] \n"

#define MMLA_CLOBBERS_2                                                                                               \
  "cc", "memory", "v0", "v1", "v2", "v3", "v4", "v5", "v8", "v9", "v10", "v11", "v12", "v13", "v14", "v15", "v16",    \
      "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30", "v31"
#define MMLA_CLOBBERS_8 MMLA_CLOBBERS_2, "v6", "v7"

// clang-format on
