// What a matrix product is here, and the steps of the ladder. No CUDA types: bindings include this, kernels implement it.
#pragma once
#include <cstdint>

#include "simt/types.h"

namespace matmul {

using simt::DataType;

enum class Activation : int {
  none,
  gelu,    // exact: x Phi(x)
  swiglu,  // columns alternate gate, up: out[:, j] = silu(x[:, 2j]) x[:, 2j + 1]; d and c have n / 2 columns
};

// d = activation(alpha * A B + bias) + beta * c, for each matrix of a batch.
//
// A is m x k. transpose_a false: stored row-major, lda between rows; true: stored as its k x m transpose, row-major.
// B is k x n. transpose_b false: stored row-major; true: stored as its n x k transpose (a torch Linear's weight).
// c and d are row-major. Leading dimensions and batch strides are in elements; a batch stride may be 0 for an operand
// that all products share. `in` is the type of a, b and bias (f32, bf16 or f16); `out` that of c and d: f32 or `in`.
// Sums are float32. Sizes are positive and have been checked by the caller; pointers are aligned to their elements.
struct Problem {
  int m, n, k, batch = 1;
  const void *a, *b;
  void* d;
  const void *c = nullptr, *bias = nullptr;  // null: absent. bias has n elements
  int64_t lda, ldb, ldc = 0, ldd;
  int64_t stride_a = 0, stride_b = 0, stride_c = 0, stride_d = 0;
  bool transpose_a = false, transpose_b = false;
  DataType in = DataType::f32, out = DataType::f32;
  float alpha = 1.f, beta = 0.f;  // beta 0: c is not read
  Activation activation = Activation::none;
  void* stream = nullptr;
};

// Each step starts its kernel and returns. All raise std::invalid_argument, before any launch, for what they do not take:
// 01-07 want in == out == f32; 08-16 want bf16 or f16, 09-15 the same type out; 09-16 want addresses and row strides
// that TMA can describe.
void naive_01(const Problem&);
void coalesced_02(const Problem&);
void shared_03(const Problem&);
void register_tile_1d_04(const Problem&);
void register_tile_2d_05(const Problem&);
void vectorised_06(const Problem&);
void warp_tile_07(const Problem&);
void mma_sync_08(const Problem&);
void wgmma_09(const Problem&);
void wgmma_128x128_10(const Problem&);
void producer_consumer_11(const Problem&);
void two_consumers_12(const Problem&);
void persistent_13(const Problem&);
void multicast_14(const Problem&);
void tma_store_15(const Problem&);

// The last step is a family: one kernel, several tile shapes. The dispatcher (cuda/dispatch.py) picks by shape.
//
//   tile_m x tile_n   128 x 256, 128 x 128, 64 x 64                all layouts
//                     128 x 192, 192 x 192, 64 x 256, 64 x 128     a row-major and b transposed alone
//   cluster           1 or 2; 1 for 64 x 256 and 64 x 64
//   split_k           2, 4 or 8 with 128 x 128, 2 or 4 with 64 x 64, all layouts; the slices are the cluster then
enum class Cache : int { normal, first, last };  // evicted from L2 when it is its turn, first of all, last of all
struct Tiling {
  int tile_m = 128, tile_n = 256;
  int cluster = 2;   // blocks along m that share their tile of B
  int split_k = 1;   // products over slices of k, summed through the cluster's shared memory
  int raster = 8;    // 0 Hilbert curve, 1.. groups of that many rows of tiles (of clusters of them)
  int stagger = 1;   // stages by which a consumer starts ahead of the next, so that one multiplies while one stores
  Cache cache_a = Cache::normal, cache_b = Cache::normal, cache_d = Cache::first;
};
void best_16(const Problem&, const Tiling&);

}  // namespace matmul
