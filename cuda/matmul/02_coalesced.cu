// Step 02: the same loop, but threadIdx.x walks along the columns. Two indices have changed places, nothing else.
//
// A warp now reads 32 neighbouring elements of B (4 full sectors) and one element of A (a broadcast), and stores one
// run of 128 bytes. Limit: still two loads per FMA. A warp's load keeps the SM's load unit for a clock or more, while
// the SM could start four warps' FMAs in that clock: at most 1/8 of the FLOPs. A is fetched n / 32 times, for one
// broadcast serves 32 columns, and B m times.
// Refuses: anything but f32, swiglu.
#include "matmul/launch.cuh"

namespace matmul {
namespace {

constexpr int tile = 32;  // a block is 32 x 32 threads

template <bool a_along_k, bool b_along_k>
__global__ void coalesced(Operand<float, a_along_k> a, Operand<float, b_along_k> b, Epilogue<float, float> epilogue) {
  const Tile corner = tile_of_block<tile, tile>(epilogue.m, epilogue.n);
  const int row = corner.row + threadIdx.y, column = corner.column + threadIdx.x;
  if (row >= epilogue.m || column >= epilogue.n) return;

  float sum = 0.f;
  for (int k = 0; k < a.depth; ++k) sum += *a.address(row, k) * *b.address(column, k);
  epilogue.store(blockIdx.z, row, column, sum);
}

}  // namespace

void coalesced_02(const Problem& problem) {
  require_f32(problem, "coalesced_02");
  refuse_swiglu(problem, "coalesced_02");
  for_layout<float, Epilogue<float, float>>(problem, [](auto a, auto b, auto epilogue, const Problem& part) {
    simt::launch(coalesced<a.along_k, b.along_k>, grid_of_tiles(part, tile, tile, dim3(tile, tile)), a, b, epilogue);
  });
}

}  // namespace matmul
