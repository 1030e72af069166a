// Warp-wide matrix instructions of Ampere and up: 8x8 matrices of 16-bit elements between shared memory and registers,
// and mma.sync. Lane 8q + i of the warp gives the 16-byte row i of matrix q; register q of lane l then holds elements
// (l / 4, 2 (l % 4)) and the next one of the row; with `transpose`, of the column.
#pragma once
#include "core.cuh"

namespace ptx {

#define PTX_TRANSPOSED(INSTRUCTION) if constexpr (transpose) { INSTRUCTION(".trans"); } else { INSTRUCTION(""); }

template <bool transpose = false>
PTX_INLINE void ldmatrix_x4(uint32_t (&r)[4], const void* row SIMT_SITE) {
#define PTX_LOAD(TRANS)                                                                          \
  asm volatile("ldmatrix.sync.aligned.m8n8.x4" TRANS ".shared.b16 {%0,%1,%2,%3}, [%4];"          \
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                  \
               : "r"(shared_address(row))                                                        \
               : "memory")
  PTX(PTX_TRANSPOSED(PTX_LOAD), simt::model::ldmatrix(r, 4, transpose, row, site));
#undef PTX_LOAD
}
template <bool transpose = false>
PTX_INLINE void ldmatrix_x2(uint32_t (&r)[2], const void* row SIMT_SITE) {
#define PTX_LOAD(TRANS)                                                                          \
  asm volatile("ldmatrix.sync.aligned.m8n8.x2" TRANS ".shared.b16 {%0,%1}, [%2];"                \
               : "=r"(r[0]), "=r"(r[1])                                                          \
               : "r"(shared_address(row))                                                        \
               : "memory")
  PTX(PTX_TRANSPOSED(PTX_LOAD), simt::model::ldmatrix(r, 2, transpose, row, site));
#undef PTX_LOAD
}
template <bool transpose = false>
PTX_INLINE void ldmatrix_x1(uint32_t (&r)[1], const void* row SIMT_SITE) {
#define PTX_LOAD(TRANS)                                                                          \
  asm volatile("ldmatrix.sync.aligned.m8n8.x1" TRANS ".shared.b16 {%0}, [%1];"                   \
               : "=r"(r[0])                                                                      \
               : "r"(shared_address(row))                                                        \
               : "memory")
  PTX(PTX_TRANSPOSED(PTX_LOAD), simt::model::ldmatrix(r, 1, transpose, row, site));
#undef PTX_LOAD
}

template <bool transpose = false>
PTX_INLINE void stmatrix_x4(void* row, const uint32_t (&r)[4] SIMT_SITE) {
#define PTX_STORE(TRANS)                                                                         \
  asm volatile("stmatrix.sync.aligned.m8n8.x4" TRANS ".shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(   \
                   shared_address(row)),                                                         \
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])                                        \
               : "memory")
  PTX(PTX_TRANSPOSED(PTX_STORE), simt::model::stmatrix(row, 4, transpose, r, site));
#undef PTX_STORE
}
template <bool transpose = false>
PTX_INLINE void stmatrix_x2(void* row, const uint32_t (&r)[2] SIMT_SITE) {
#define PTX_STORE(TRANS)                                                                         \
  asm volatile("stmatrix.sync.aligned.m8n8.x2" TRANS ".shared.b16 [%0], {%1,%2};" ::"r"(         \
                   shared_address(row)),                                                         \
               "r"(r[0]), "r"(r[1])                                                              \
               : "memory")
  PTX(PTX_TRANSPOSED(PTX_STORE), simt::model::stmatrix(row, 2, transpose, r, site));
#undef PTX_STORE
}
#undef PTX_TRANSPOSED

// d (16 x 8, f32) = a (16 x 16) b (16 x 8) + c. With g = lane / 4 and t = lane % 4:
//   a[i] holds row g + 8 (i & 1), columns 2t + 8 (i >> 1) and the next; b[i] rows 2t + 8i and the next, column g;
//   c[i], d[i] row g + 8 (i >> 1), column 2t + (i & 1)
template <class T>
PTX_INLINE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const float (&c)[4] SIMT_SITE) {
  static_assert(sizeof(T) == 2, "bf16 or f16");
  constexpr bool bf16 = std::is_same_v<T, __nv_bfloat16>;
#define PTX_MMA(TYPE)                                                                            \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                            \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"                  \
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]),    \
                 "f"(c[1]), "f"(c[2]), "f"(c[3]))
  PTX(if constexpr (bf16) { PTX_MMA("bf16"); } else { PTX_MMA("f16"); },
      simt::model::mma_m16n8k16(d, a, b, c, bf16 ? simt::DataType::bf16 : simt::DataType::f16, site));
#undef PTX_MMA
}

}  // namespace ptx
