// What happens to a sum before it is stored: d = activation(alpha * sum + bias) + beta * c. One place for every step.
// Branches here are the same in all threads of the grid, so they cost next to nothing beside the product.
#pragma once
#include "matmul.h"
#include "simt/simt.cuh"

namespace matmul {

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); }
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

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

  // The same where c and d have another type than the struct was made with.
  template <class Other>
  __device__ __forceinline__ Epilogue<In, Other> with_output() const {
    return {reinterpret_cast<Other*>(d), reinterpret_cast<const Other*>(c), bias, ldc, ldd, stride_c, stride_d, m, n,
            alpha, beta, activation};
  }

  // d is the bare sum: nothing to apply.
  __device__ __forceinline__ bool plain() const {
    return alpha == 1.f && !bias && !c && activation == Activation::none;
  }

  // Two neighbouring elements can be stored as one: none straddles the end of a row, all are aligned.
  __device__ __forceinline__ bool pairs() const {
    return (reinterpret_cast<uintptr_t>(d) % (2 * sizeof(Out)) | ldd % 2 | stride_d % 2 | n % 2) == 0;
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

  // Stores the elements of `count` neighbouring columns; `column` and `count` are even. Under swiglu each two make one.
  template <int count>
  __device__ __forceinline__ void store_run(int batch, int row, int column, const float (&sum)[count]) const {
    activate(row, column, sum, [&](int first, int columns, const auto& x) { write(batch, row, first, columns, x); });
  }

  // The same up to the store: write(column of d, columns of d, elements).
  template <int count, class Write>
  __device__ __forceinline__ void activate(int row, int column, const float (&sum)[count], Write write) const {
    if (row >= m || column >= n) return;
    if (activation == Activation::swiglu) {
      float x[count / 2];
#pragma unroll
      for (int i = 0; i < count / 2; ++i) {
        const int gate = min(column + 2 * i, n - 2);  // the bias ends at n, a run may not
        x[i] = silu(linear(sum[2 * i], gate)) * linear(sum[2 * i + 1], gate + 1);
      }
      write(column / 2, n / 2, x);
    } else {
      float x[count];
#pragma unroll
      for (int i = 0; i < count; ++i) {
        x[i] = linear(sum[i], min(column + i, n - 1));
        if (activation == Activation::gelu) x[i] = gelu(x[i]);
      }
      write(column, n, x);
    }
  }

  // Stores the elements of two neighbouring columns; `column` is even. Under swiglu they make one element.
  __device__ __forceinline__ void store_pair(int batch, int row, int column, float first, float second) const {
    const float sums[2] = {first, second};
    store_run(batch, row, column, sums);
  }

  template <int width>
  struct alignas(width * sizeof(Out)) Run {
    Out x[width];
  };

  // Adds beta * c to neighbours in a row of d, which has `columns`, and stores them: in one access where they are all
  // inside and lie at a multiple of their size.
  template <int width>
  __device__ __forceinline__ void write(int batch, int row, int column, int columns, const float (&x)[width]) const {
    Out* const to = d + batch * stride_d + row * ldd + column;
    const Out* const from = c ? c + batch * stride_c + row * ldc + column : nullptr;
    const auto addresses = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
    if (column + width <= columns && addresses % sizeof(Run<width>) == 0) {
      Run<width> addend, run;
      if (from) addend = *reinterpret_cast<const Run<width>*>(from);
#pragma unroll
      for (int i = 0; i < width; ++i) run.x[i] = Out(from ? x[i] + beta * float(addend.x[i]) : x[i]);
      *reinterpret_cast<Run<width>*>(to) = run;
    } else {
#pragma unroll
      for (int i = 0; i < width; ++i)
        if (column + i < columns) to[i] = Out(from ? x[i] + beta * float(from[i]) : x[i]);
    }
  }
};

// For kernels that write f32 or the type of the inputs, as they are told when they run: a kernel for each type would
// differ in its last lines alone.
template <class In>
struct EitherEpilogue {
  Epilogue<In, In> same;
  bool f32;

  static EitherEpilogue of(const Problem& p) { return {Epilogue<In, In>::of(p), p.out == DataType::f32}; }

  __device__ __forceinline__ bool plain() const { return same.plain(); }

  template <int count>
  __device__ __forceinline__ void store_run(int batch, int row, int column, const float (&sum)[count]) const {
    same.activate(row, column, sum, [&](int first, int columns, const auto& x) {
      visit([&](const auto& epilogue) { epilogue.write(batch, row, first, columns, x); });
    });
  }

  // Calls store(epilogue) with the epilogue of the right type.
  template <class Store>
  __device__ __forceinline__ void visit(Store store) const {
    if (f32) store(same.template with_output<float>());
    else store(same);
  }
};

}  // namespace matmul
