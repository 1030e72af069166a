// What happens to a sum before it is stored: d = activation(alpha * sum + bias) + beta * c. One place for every step.
// Branches here are the same in all threads of the grid, so they cost next to nothing beside the product.
#pragma once
#include "matmul.h"
#include "simt/simt.cuh"

namespace matmul {

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); }
__device__ __forceinline__ float silu(float x) { return x / (1.f + __expf(-x)); }

// The element types as the kernel knows them; c and d have the type Out, bias the type In.
template <class In, class Out>
struct Epilogue {
  Out* d;
  const Out* c;
  const In* bias;
  int64_t ldc, ldd;
  int64_t stride_c, stride_d;
  int m, n;  // of the product: d has n / 2 columns under swiglu
  float alpha, beta;
  Activation activation;

  static Epilogue of(const Problem& p) {
    return {static_cast<Out*>(p.d), p.beta != 0.f ? static_cast<const Out*>(p.c) : nullptr,
            static_cast<const In*>(p.bias), p.ldc, p.ldd, p.stride_c, p.stride_d, p.m, p.n, p.alpha, p.beta,
            p.activation};
  }

  // d is the bare sum: nothing to apply.
  __device__ __forceinline__ bool plain() const {
    return alpha == 1.f && !bias && !c && activation == Activation::none;
  }

  __device__ __forceinline__ float linear(float sum, int column) const {
    float x = alpha * sum;
    if (bias) x += float(bias[column]);
    return x;
  }

  // Stores one element of matrix `batch`. Not for swiglu, which needs two sums for an element.
  __device__ __forceinline__ void store(int batch, int row, int column, float sum) const {
    if (row >= m || column >= n) return;
    float x = linear(sum, column);
    if (activation == Activation::gelu) x = gelu(x);
    if (c) x += beta * float(c[batch * stride_c + row * ldc + column]);
    d[batch * stride_d + row * ldd + column] = Out(x);
  }

  // Stores the elements of two neighbouring columns; `column` is even. Under swiglu they make one element.
  __device__ __forceinline__ void store_pair(int batch, int row, int column, float first, float second) const {
    if (activation != Activation::swiglu) {
      store(batch, row, column, first);
      store(batch, row, column + 1, second);
      return;
    }
    if (row >= m || column >= n) return;
    float x = silu(linear(first, column)) * linear(second, column + 1);
    if (c) x += beta * float(c[batch * stride_c + row * ldc + column / 2]);
    d[batch * stride_d + row * ldd + column / 2] = Out(x);
  }
};

}  // namespace matmul
