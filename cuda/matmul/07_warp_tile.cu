// Step 07: a level between block and thread, and no waiting. A warp owns 64 x 64 elements (8 x 16 a thread), so 6 loads
// of 16 bytes from shared memory serve 128 FMAs, where step 06 has 4 for 64, and two pipelines hide the loads:
//   global -> shared     cp.async, which needs no registers, fills a ring of four slices, three ahead of their use; by
//                        4 bytes where it has to transpose, else by 16
//   shared -> registers  the elements for k + 1 are loaded while those of k are multiplied
// Limit: FLOPs. 9 of 10 instructions of the loop are FMAs. A block's slice is 2 * 128 * 128 * 8 FLOPs and 4 * 8 * 256
// bytes: 1/32 byte a FLOP, which L2 can give. Refuses: anything but f32.
#include <algorithm>

#include "matmul/launch.cuh"
#include "simt/ptx.cuh"

namespace matmul {
namespace {

constexpr int tile_k = 8, stages = 4, warps_across = 2, warps = warps_across * warps_across, threads = 32 * warps;
constexpr int lanes_down = 8, lanes_across = 4;  // a warp's threads over its tile

// Four columns more than the tile has: the eight k that a warp transposes at once then lie in different banks.
template <int tile>
struct alignas(16) Ring {
  float a[stages][tile_k][tile + 4];  // k, row
  float b[stages][tile_k][tile + 4];  // k, column
};
template <int tile>
struct alignas(16) Patches {  // the same memory afterwards: 32 rows of each warp's sums
  float of_warp[warps][32][tile / warps_across + 4];
};

// A slice is transposed on its way if its neighbours in memory are neighbours along k: then they part.
template <int tile, int width, bool along_k>
using Copy = SliceCopy<tile, tile_k, threads, along_k ? 1 : width, float, along_k>;

// A thread's part of one k of a tile: `quads` times four neighbours.
template <int quads>
__device__ __forceinline__ void load_part(float (&part)[4 * quads], const float* line, int distance) {
#pragma unroll
  for (int i = 0; i < quads; ++i) {
    const float4 quad = *reinterpret_cast<const float4*>(line + i * distance);
    part[4 * i] = quad.x, part[4 * i + 1] = quad.y, part[4 * i + 2] = quad.z, part[4 * i + 3] = quad.w;
  }
}

template <int tile, bool a_along_k, bool b_along_k, int width>
__global__ void __launch_bounds__(threads, 2)
    warp_tile(Operand<float, a_along_k> a, Operand<float, b_along_k> b, Epilogue<float, float> epilogue) {
  constexpr int warp_side = tile / warps_across;
  constexpr int a_step = 4 * lanes_down, b_step = 4 * lanes_across;  // between a thread's quads
  constexpr int rows = warp_side / lanes_down, columns = warp_side / lanes_across;
  auto& ring = simt::dynamic_shared<Ring<tile>>();
  const Tile corner = tile_of_block<tile, tile, 8>(epilogue.m, epilogue.n);
  // Lanes 2i and 2i + 1 want the same of A, lanes i and i + 2 the same of B: the load unit serves both to half a warp.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_in_warp = lane / 2 % lanes_down * 4, column_in_warp = (lane / 16 * 2 + lane % 2) * 4;
  const int warp_row = warp / warps_across * warp_side, warp_column = warp % warps_across * warp_side;
  const int row = warp_row + row_in_warp, column = warp_column + column_in_warp;

  Copy<tile, width, a_along_k> a_copy(a, corner.row);
  Copy<tile, width, b_along_k> b_copy(b, corner.column);
  const auto copy = [&](int stage) {
    a_copy.start([&](int line, int k) { return &ring.a[stage][k][line]; });
    b_copy.start([&](int line, int k) { return &ring.b[stage][k][line]; });
    ptx::cp_async_commit_group();
  };
  for (int stage = 0; stage < stages - 1; ++stage) copy(stage);
  ptx::cp_async_wait_group<stages - 2>();
  __syncthreads();

  float sum[rows][columns] = {}, a_part[2][rows], b_part[2][columns];
  load_part<rows / 4>(a_part[0], &ring.a[0][0][row], a_step);
  load_part<columns / 4>(b_part[0], &ring.b[0][0][column], b_step);

  int stage = 0, free_stage = stages - 1;
  for (int left = ceil_div(a.depth, tile_k); left > 0; --left) {
#pragma unroll
    for (int k = 0; k < tile_k; ++k) {
      if (k == tile_k - 1) {  // this slice is in registers: go on to the next, which has to have landed
        ptx::cp_async_wait_group<stages - 2>();
        __syncthreads();
        free_stage = stage;
        stage = stage + 1 < stages ? stage + 1 : 0;
      }
      load_part<rows / 4>(a_part[(k + 1) % 2], &ring.a[stage][(k + 1) % tile_k][row], a_step);
      load_part<columns / 4>(b_part[(k + 1) % 2], &ring.b[stage][(k + 1) % tile_k][column], b_step);
      if (k == 0) copy(free_stage);  // past the barrier: nobody reads the slice before this one any more
#pragma unroll
      for (int i = 0; i < rows; ++i)
#pragma unroll
        for (int j = 0; j < columns; ++j) sum[i][j] += a_part[k % 2][i] * b_part[k % 2][j];
    }
  }
  ptx::cp_async_wait_group<0>();  // zeros past the end may still be on their way to shared memory
  __syncthreads();

  auto& patch = simt::dynamic_shared<Patches<tile>>().of_warp[warp];
#pragma unroll
  for (int half = 0; half < rows / 4; ++half) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < columns; ++j)
        patch[row_in_warp + i][column_in_warp + j / 4 * b_step + j % 4] = sum[4 * half + i][j];
    __syncwarp();
    store_patch<32, warp_side, warp_side + 4>(epilogue, patch[0], corner.row + warp_row + half * a_step,
                                              corner.column + warp_column);
    __syncwarp();
  }
}

template <int tile, int width, bool a_along_k, bool b_along_k>
void start(const Operand<float, a_along_k>& a, const Operand<float, b_along_k>& b,
           const Epilogue<float, float>& epilogue, const Problem& part) {
  constexpr size_t shared_bytes = std::max(sizeof(Ring<tile>), sizeof(Patches<tile>));
  simt::launch(warp_tile<tile, a_along_k, b_along_k, width>, grid_of_tiles(part, tile, tile, threads, shared_bytes), a,
               b, epilogue);
}

}  // namespace

void warp_tile_07(const Problem& problem) {
  require_f32(problem, "warp_tile_07");
  require_pairs_for_swiglu(problem, "warp_tile_07");
  for_layout<float, Epilogue<float, float>>(problem, [](auto a, auto b, auto epilogue, const Problem& part) {
    if (!Copy<128, 1, a.along_k>::reaches(a) || !Copy<128, 1, b.along_k>::reaches(b)) return vectorised_06(part);
    constexpr int widest = a.along_k && b.along_k ? 1 : 4;
    const bool wide = (a.along_k || a.aligned) && (b.along_k || b.aligned);
    if (enough_tiles(part, 128))
      wide ? start<128, widest>(a, b, epilogue, part) : start<128, 1>(a, b, epilogue, part);
    else
      wide ? start<64, widest>(a, b, epilogue, part) : start<64, 1>(a, b, epilogue, part);
  });
}

}  // namespace matmul
