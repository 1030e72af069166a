// Step 01: one thread, one element of D; a loop over k.
//
// Deliberately, threadIdx.x walks down the rows. The 32 threads of a warp then read 32 rows of A at the same k, 32
// sectors of 32 bytes for 128 useful bytes, and as many when they store. An FMA (2 FLOPs) waits for two loads (8 bytes,
// from the L1 cache at best), so this is bound by the load units and the caches, far from FLOPs.
// Refuses: anything but f32, swiglu.
#include "matmul/launch.cuh"

namespace matmul {
namespace {

constexpr int tile = 32;  // a block is 32 x 32 threads

template <bool a_along_k, bool b_along_k>
__global__ void naive(Operand<float, a_along_k> a, Operand<float, b_along_k> b, Epilogue<float, float> epilogue) {
  const Tile corner = tile_of_block<tile, tile>(epilogue.m, epilogue.n);
  const int row = corner.row + threadIdx.x, column = corner.column + threadIdx.y;
  if (row >= epilogue.m || column >= epilogue.n) return;

  float sum = 0.f;
  for (int k = 0; k < a.depth; ++k) sum += *a.address(row, k) * *b.address(column, k);
  epilogue.store(blockIdx.z, row, column, sum);
}

}  // namespace

void naive_01(const Problem& problem) {
  require_f32(problem, "naive_01");
  refuse_swiglu(problem, "naive_01");
  for_layout<float, Epilogue<float, float>>(problem, [](auto a, auto b, auto epilogue, const Problem& part) {
    simt::launch(naive<a.along_k, b.along_k>, grid_of_tiles(part, tile, tile, dim3(tile, tile)), a, b, epilogue);
  });
}

}  // namespace matmul
