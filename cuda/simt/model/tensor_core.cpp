// The inner loops of the tensor cores: a block of 4 x 16 results stays in registers over the 16 products of each. Built
// several times on x86-64, for the vector units that may be there; the loader picks.
#include "tensor_core.h"

namespace simt::model {

namespace {

#if defined(__x86_64__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define SIMT_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4"), optimize("O3")))
#else
#define SIMT_CLONES
#endif

template <int columns>  // in eights
__attribute__((always_inline)) inline void block_of_four_rows(float* c, const float* a, const float* b) {
  Eight<float> sum[4][columns], right[columns];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < columns; ++j) memcpy(&sum[i][j], c + i * tile_pitch + 8 * j, 32);
  for (int k = 0; k < 16; ++k) {
    for (int j = 0; j < columns; ++j) memcpy(&right[j], b + k * tile_pitch + 8 * j, 32);
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < columns; ++j) sum[i][j] += a[k * tile_pitch + i] * right[j];
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < columns; ++j) memcpy(c + i * tile_pitch + 8 * j, &sum[i][j], 32);
}

}  // namespace

SIMT_CLONES void multiply_accumulate(float* c, const float* a, const float* b, int m, int n) {
  int column = 0;
  for (; column + 16 <= n; column += 16)
    for (int row = 0; row < m; row += 4) block_of_four_rows<2>(c + row * tile_pitch + column, a + row, b + column);
  if (column < n)
    for (int row = 0; row < m; row += 4) block_of_four_rows<1>(c + row * tile_pitch + column, a + row, b + column);
}

}  // namespace simt::model
