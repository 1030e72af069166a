// What steps 08 and 09 do to a tile of scores between the two products: mask, cap and bias, and the softmax with two
// options, both of which only move work away from what is scarce:
//   slack        in powers of two. A maximum takes the place of an older one only where it is larger by more than that,
//                and a warp multiplies its output only where one of its rows has a new one. Sum, output and lse all use
//                the one in place, so nothing is lost in float32; but the largest probability is then no longer 1,
//                which bf16 and f16 hold exactly. 0: any larger maximum. Negative: the output is always multiplied
//   polynomial   one exponential in so many is computed by FMA units, which have time while the units for
//                exponentials (16 a clock and multiprocessor) have none; 0: none
// How fast either is has not been measured yet.
#pragma once
#include "attention/softmax.cuh"

namespace attention::forward::best {

// 2^x for x <= 127: x = n + f with |f| <= 1/2, and a polynomial of degree 4 whose relative error is below 3e-6, that of
// rounding to f16 is 5e-4. 2^0 is 1 exactly. What is below 2^-126, and -inf, becomes 2^-126.
PTX_INLINE float exp2_polynomial(float x) {
  constexpr float whole = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, which its low bits then hold
  x = x < -126.f ? -126.f : x;  // not max, which would swallow a NaN
  const float rounded = x + whole, f = x - (rounded - whole);
  float p = 0.0095827f;
  p = p * f + 0.055906877f;
  p = p * f + 0.24024104f;
  p = p * f + 0.6931241f;
  p = p * f + 1.f;
  return __uint_as_float(__float_as_uint(p) + (__float_as_uint(rounded) << 23));  // n into the exponent
}

template <int slack, int polynomial>
struct RunningSoftmax : Softmax {
  // As Softmax::add. Returns whether the output has to be multiplied by `factor`: the same for all lanes of a warp.
  template <int n>
  PTX_INLINE bool add(float (&x)[n / 2], float scale_log2, float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = most[r];
#pragma unroll
      for (int i = 2 * r; i < n / 2; i += 4) top = max(top, max(x[i], x[i + 1]));
      top = quad_max(top);
      if (slack > 0 && !((top - most[r]) * scale_log2 > float(slack))) top = most[r];  // of -inf both: NaN, no growth
      const float shift = top == -INFINITY ? 0.f : top * scale_log2;  // nothing seen yet: exp(-inf - 0) = 0
      factor[r] = ptx::exp2_approx(most[r] * scale_log2 - shift);
      most[r] = top;
      float total = 0.f;
#pragma unroll
      for (int i = 2 * r; i < n / 2; i += 4) {
        constexpr int turn = polynomial > 0 ? polynomial / 2 : 1;  // pairs
        const float low = x[i] * scale_log2 - shift, high = x[i + 1] * scale_log2 - shift;
        total += x[i] = ptx::exp2_approx(low);
        const bool by_fma = polynomial > 0 && i / 4 % turn == turn - 1;
        total += x[i + 1] = by_fma ? exp2_polynomial(high) : ptx::exp2_approx(high);
      }
      sum[r] = sum[r] * factor[r] + total;
    }
    return slack < 0 || __any_sync(0xffffffff, factor[0] != 1.f || factor[1] != 1.f);
  }
};

}  // namespace attention::forward::best
