// Step 04: a thread computes 8 elements below each other instead of one. The element of B that it reads from shared
// memory stays in a register for 8 FMAs: 9 loads for 8 FMAs where step 03 needs 16.
//
// The tile grows to 64 x 64 (an element from global memory now serves 64 FMAs) and the slice shrinks to 8 along k. All
// 32 threads of a warp have the same 8 rows, so their reads of A are broadcasts.
// Limit: shared memory still, more than one load an FMA, though the compiler can fetch A four k at a time.
// Refuses: anything but f32, swiglu.
#include "matmul/launch.cuh"

namespace matmul {
namespace {

constexpr int tile = 64, tile_k = 8, thread_rows = 8;
constexpr int threads = tile * tile / thread_rows;

struct Shared {
  float a[tile][tile_k];  // row, k
  float b[tile_k][tile];  // k, column
};

template <bool a_along_k, bool b_along_k>
__global__ void __launch_bounds__(threads)
    register_tile_1d(Operand<float, a_along_k> a, Operand<float, b_along_k> b, Epilogue<float, float> epilogue) {
  auto& shared = simt::dynamic_shared<Shared>();
  const Tile corner = tile_of_block<tile, tile>(epilogue.m, epilogue.n);
  const int row = threadIdx.x / tile * thread_rows, column = threadIdx.x % tile;

  const auto store_a = [&](int line, int k, float x) { shared.a[line][k] = x; };
  const auto store_b = [&](int line, int k, float x) { shared.b[k][line] = x; };
  float sum[thread_rows] = {};
  for (int slice = 0; slice < a.depth; slice += tile_k) {
    load_slice<tile, tile_k, threads>(a, corner.row, slice, store_a);
    load_slice<tile, tile_k, threads>(b, corner.column, slice, store_b);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < tile_k; ++k) {
      const float b_value = shared.b[k][column];
#pragma unroll
      for (int i = 0; i < thread_rows; ++i) sum[i] += shared.a[row + i][k] * b_value;
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < thread_rows; ++i)
    epilogue.store(blockIdx.z, corner.row + row + i, corner.column + column, sum[i]);
}

}  // namespace

void register_tile_1d_04(const Problem& problem) {
  require_f32(problem, "register_tile_1d_04");
  refuse_swiglu(problem, "register_tile_1d_04");
  for_layout<float, Epilogue<float, float>>(problem, [](auto a, auto b, auto epilogue, const Problem& part) {
    simt::launch(register_tile_1d<a.along_k, b.along_k>, grid_of_tiles(part, tile, tile, threads, sizeof(Shared)), a, b,
                 epilogue);
  });
}

}  // namespace matmul
