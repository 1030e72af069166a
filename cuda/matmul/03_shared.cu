// Step 03: the block walks along k in slices of 32 and keeps a 32 x 32 tile of A and of B in shared memory, where all
// of its threads use them. Each element fetched from global memory now serves 32 FMAs: traffic falls by 32.
//
// Limit: the operands of an FMA come from shared memory instead, still two loads (8 bytes) for 2 FLOPs. Shared memory
// gives 128 bytes a clock, one warp's load: 1/8 of the FLOPs at most, as before, but without the waits for caches.
// Refuses: anything but f32, swiglu.
#include "matmul/launch.cuh"

namespace matmul {
namespace {

constexpr int tile = 32, threads = tile * tile;

// One column more than the tile has: the loader walks a transposed operand down a column of the tile, whose elements
// would all lie in the same of the 32 banks if a row were 32 long.
struct Shared {
  float a[tile][tile + 1];  // row, k
  float b[tile][tile + 1];  // k, column
};

template <bool a_along_k, bool b_along_k>
__global__ void __launch_bounds__(threads)
    shared_tiles(Operand<float, a_along_k> a, Operand<float, b_along_k> b, Epilogue<float, float> epilogue) {
  auto& shared = simt::dynamic_shared<Shared>();
  const Tile corner = tile_of_block<tile, tile>(epilogue.m, epilogue.n);
  const int row = threadIdx.x / tile, column = threadIdx.x % tile;

  const auto store_a = [&](int line, int k, float x) { shared.a[line][k] = x; };
  const auto store_b = [&](int line, int k, float x) { shared.b[k][line] = x; };
  float sum = 0.f;
  for (int slice = 0; slice < a.depth; slice += tile) {
    load_slice<tile, tile, threads>(a, corner.row, slice, store_a);
    load_slice<tile, tile, threads>(b, corner.column, slice, store_b);
    __syncthreads();  // the tiles are complete
    for (int k = 0; k < tile; ++k) sum += shared.a[row][k] * shared.b[k][column];
    __syncthreads();  // nobody needs them any more
  }
  epilogue.store(blockIdx.z, corner.row + row, corner.column + column, sum);
}

}  // namespace

void shared_03(const Problem& problem) {
  require_f32(problem, "shared_03");
  refuse_swiglu(problem, "shared_03");
  for_layout<float, Epilogue<float, float>>(problem, [](auto a, auto b, auto epilogue, const Problem& part) {
    simt::launch(shared_tiles<a.along_k, b.along_k>, grid_of_tiles(part, tile, tile, threads, sizeof(Shared)), a, b,
                 epilogue);
  });
}

}  // namespace matmul
