// Softmax over keys that come tile by tile (Milakov and Gimelshein 2018), on fragments as mma.sync and wgmma leave them:
// a lane holds two rows, `lane / 4` and 8 below, and four lanes share a row. Scores are in units of 1 / scale.
//
//   most   the largest score so far            sum   of exp(score - most), this lane's part of it
//
// What has been summed under an older `most` shrinks by exp(old - new), and so does the output.
#pragma once
#include "attention/rules.cuh"

namespace attention {

constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;

PTX_INLINE float quad_max(float x) {
  x = max(x, __shfl_xor_sync(0xffffffff, x, 1));
  return max(x, __shfl_xor_sync(0xffffffff, x, 2));
}
PTX_INLINE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

struct Softmax {
  float most[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};

  // The scores x of n more keys become exp(score - most). factor[r]: what the output of row r so far is to be
  // multiplied with. `scale_log2` is scale * log2(e): exponentials are powers of two here.
  template <int n>
  PTX_INLINE void add(float (&x)[n / 2], float scale_log2, float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = most[r];
#pragma unroll
      for (int i = 2 * r; i < n / 2; i += 4) top = max(top, max(x[i], x[i + 1]));
      top = quad_max(top);
      const float shift = top == -INFINITY ? 0.f : top * scale_log2;  // nothing seen yet: exp(-inf - 0) = 0
      factor[r] = ptx::exp2_approx(most[r] * scale_log2 - shift);
      most[r] = top;
      float total = 0.f;
#pragma unroll
      for (int i = 2 * r; i < n / 2; i += 4)
#pragma unroll
        for (int j = i; j < i + 2; ++j) total += x[j] = ptx::exp2_approx(x[j] * scale_log2 - shift);
      sum[r] = sum[r] * factor[r] + total;
    }
  }

  // After the last keys. factor[r] divides the output of row r by its sum; returns lse in lse[r]. `sink` is the score
  // of a head's sink, or -inf. A row that saw nothing has factor 0 and, without a sink, lse -inf.
  PTX_INLINE void finish(float scale_log2, float sink, float (&factor)[2], float (&lse)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = quad_sum(sum[r]), seen = most[r] * scale_log2, beside = sink * log2_e;
      const float top = max(seen, beside);
      if (top == -INFINITY) {
        factor[r] = 0.f;
        lse[r] = total - INFINITY;  // NaN if the scores are
        continue;
      }
      const float shrunk = ptx::exp2_approx(seen - top);  // 1 unless the sink is above all scores
      const float all = total * shrunk + ptx::exp2_approx(beside - top);
      factor[r] = shrunk / all;
      lse[r] = (top + log2f(all)) * ln_2;
    }
  }
};

// Rows 0 and 1 of a lane's fragment times factor[0] and factor[1].
template <int n>
PTX_INLINE void multiply_rows(float (&x)[n / 2], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < n / 2; ++i) x[i] *= factor[i / 2 % 2];
}

// Probabilities as the left operand of the product with V: accumulators 8j .. 8j + 7 of a lane are its part of the
// fragment for keys 16j .. 16j + 15, of mma.sync and of wgmma alike. Nothing has to move between lanes.
template <class T, int n>
PTX_INLINE void to_operand(const float (&x)[n / 2], uint32_t (&a)[n / 16][4]) {
#pragma unroll
  for (int j = 0; j < n / 16; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) a[j][i] = pack<T>(x[8 * j + 2 * i], x[8 * j + 2 * i + 1]);
}

}  // namespace attention
