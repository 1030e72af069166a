// Step 05: a thread computes 8 x 8 elements. For each k it takes 8 elements of A and 8 of B into registers and makes
// all 64 products of them: 16 loads for 64 FMAs, a quarter of a load each, where step 04 needs more than one.
//
// The tile grows to 128 x 128 with 256 threads: an element from global memory serves 128 FMAs.
// Limit: neighbouring threads read columns 8 apart, so a warp's reads of B fall on few of the 32 banks; from global
// memory elements come one by one, and none while the block computes.
// Refuses: anything but f32.
#include "matmul/launch.cuh"

namespace matmul {
namespace {

constexpr int tile = 128, tile_k = 8, thread_tile = 8;
constexpr int threads = (tile / thread_tile) * (tile / thread_tile);

struct Shared {
  float a[tile][tile_k];  // row, k
  float b[tile_k][tile];  // k, column
};

template <bool a_along_k, bool b_along_k>
__global__ void __launch_bounds__(threads)
    register_tile_2d(Operand<float, a_along_k> a, Operand<float, b_along_k> b, Epilogue<float, float> epilogue) {
  auto& shared = simt::dynamic_shared<Shared>();
  const Tile corner = tile_of_block<tile, tile>(epilogue.m, epilogue.n);
  const int row = threadIdx.x / (tile / thread_tile) * thread_tile;
  const int column = threadIdx.x % (tile / thread_tile) * thread_tile;

  const auto store_a = [&](int line, int k, float x) { shared.a[line][k] = x; };
  const auto store_b = [&](int line, int k, float x) { shared.b[k][line] = x; };
  float sum[thread_tile][thread_tile] = {};
  for (int slice = 0; slice < a.depth; slice += tile_k) {
    load_slice<tile, tile_k, threads>(a, corner.row, slice, store_a);
    load_slice<tile, tile_k, threads>(b, corner.column, slice, store_b);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < tile_k; ++k) {
      float a_part[thread_tile], b_part[thread_tile];
#pragma unroll
      for (int i = 0; i < thread_tile; ++i) a_part[i] = shared.a[row + i][k];
#pragma unroll
      for (int j = 0; j < thread_tile; ++j) b_part[j] = shared.b[k][column + j];
#pragma unroll
      for (int i = 0; i < thread_tile; ++i)
#pragma unroll
        for (int j = 0; j < thread_tile; ++j) sum[i][j] += a_part[i] * b_part[j];
    }
    __syncthreads();
  }

  for_rows(sum, [&](int i, const float (&of_row)[thread_tile]) {
#pragma unroll
    for (int j = 0; j < thread_tile; j += 2)
      epilogue.store_pair(blockIdx.z, corner.row + row + i, corner.column + column + j, of_row[j], of_row[j + 1]);
  });
}

}  // namespace

void register_tile_2d_05(const Problem& problem) {
  require_f32(problem, "register_tile_2d_05");
  require_pairs_for_swiglu(problem, "register_tile_2d_05");
  for_layout<float, Epilogue<float, float>>(problem, [](auto a, auto b, auto epilogue, const Problem& part) {
    simt::launch(register_tile_2d<a.along_k, b.along_k>, grid_of_tiles(part, tile, tile, threads, sizeof(Shared)), a, b,
                 epilogue);
  });
}

}  // namespace matmul
