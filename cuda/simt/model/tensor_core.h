// The arithmetic of tensor cores, for wgmma and mma.sync: 16-bit elements to floats, eight at a time, and c += a b on
// dense tiles. Accumulates in fp32; the hardware's order and truncation inside an instruction are not modelled.
#pragma once
#include <cstdint>
#include <cstring>

#include "../cpu/half.h"
#include "../cpu/model.h"

namespace simt::model {

template <class T>
struct EightOf {
  typedef T type __attribute__((vector_size(8 * sizeof(T))));
};
template <class T>
using Eight = typename EightOf<T>::type;

constexpr int tile_pitch = 256;  // floats from one row of a tile to the next

// Vectors go by reference: how they are passed by value depends on the vector units the compiler is told of.
inline void to_floats(const Eight<uint16_t>& elements, DataType type, float* target) {
  Eight<uint32_t> bits = __builtin_convertvector(elements, Eight<uint32_t>);
  if (type == DataType::bf16) {
    bits <<= 16;
  } else {
    const Eight<uint32_t> sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
    const Eight<float> scaled = (Eight<float>)magnitude * 0x1p112f;  // moves the exponent's bias, of subnormals too
    const Eight<uint32_t> special = (Eight<uint32_t>)(magnitude >= 0x0f800000u) & 0x7f800000u;  // infinity and NaN
    bits = (Eight<uint32_t>)scaled | sign | special;
  }
  memcpy(target, &bits, sizeof bits);
}

// One step of a transposition: the elements of x and y by turns.
inline void interleave(const Eight<uint16_t>& x, const Eight<uint16_t>& y, Eight<uint16_t>* low_and_high) {
#if defined(__clang__)
  low_and_high[0] = __builtin_shufflevector(x, y, 0, 8, 1, 9, 2, 10, 3, 11);
  low_and_high[1] = __builtin_shufflevector(x, y, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  low_and_high[0] = __builtin_shuffle(x, y, Eight<uint16_t>{0, 8, 1, 9, 2, 10, 3, 11});
  low_and_high[1] = __builtin_shuffle(x, y, Eight<uint16_t>{4, 12, 5, 13, 6, 14, 7, 15});
#endif
}

// Rows become columns.
inline void transpose(Eight<uint16_t> (&rows)[8]) {
  for (int round = 0; round < 3; ++round) {
    Eight<uint16_t> next[8];
    for (int i = 0; i < 4; ++i) interleave(rows[i], rows[i + 4], next + 2 * i);
    memcpy(rows, next, sizeof rows);
  }
}

// c[m][n] += sum over k < 16 of a[k][m] b[k][n]; m a multiple of 4, n of 8; rows are tile_pitch floats apart.
void multiply_accumulate(float* c, const float* a, const float* b, int m, int n);

}  // namespace simt::model
