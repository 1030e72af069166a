// Step 10: a tile of 128 x 128. One stage of 64 x 64 tiles brought 16 KB for 64^3 products; this one brings 32 KB for
// four times as many, so L2 sends half the bytes a FLOP. wgmma with n = 128 reads 2 KB of A and 4 KB of B in its 64
// clocks: 96 bytes a clock instead of 128. With what TMA writes, 64 bytes instead of 128, a clock at full speed would
// want 160 bytes of shared memory instead of 256; there are 128.
//
// A thread now holds 2 x 64 accumulators: two instructions of 64 rows share B's tile. The threads still wait for the
// tensor cores at the end of each stage, and the tensor cores for the threads: the next step separates the two.
#include "matmul/hopper_store.cuh"

namespace matmul {
namespace {

constexpr int tile_m = 128, tile_n = 128, stages = 2, tile_k = hopper::tile_k;

template <class In>
struct Shared {
  alignas(1024) In a[stages][tile_m * tile_k];
  alignas(1024) In b[stages][tile_n * tile_k];
  uint64_t full[stages];
};

template <class In, bool a_mn_major, bool b_mn_major>
__global__ void __launch_bounds__(hopper::warpgroup)
    wgmma_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                 hopper::Sizes sizes, Epilogue<In, In> epilogue) {
  auto& shared = simt::dynamic_shared<Shared<In>>();
  const hopper::Tile tile = hopper::tile_by_rows<tile_m, tile_n>(sizes, blockIdx.x);
  const int steps = hopper::divide_up(sizes.k, tile_k);
  const auto load = [&](int step) {
    const int stage = step % stages;
    ptx::mbarrier_arrive_expect_tx(&shared.full[stage], (tile_m + tile_n) * tile_k * sizeof(In));
    hopper::load_rows<tile_m, a_mn_major>(shared.a[stage], &map_a, &shared.full[stage], step * tile_k, tile.row,
                                          tile.batch * sizes.batch_a);
    hopper::load_rows<tile_n, b_mn_major>(shared.b[stage], &map_b, &shared.full[stage], step * tile_k, tile.column,
                                          tile.batch * sizes.batch_b);
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) ptx::mbarrier_init(&shared.full[i], 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) load(0);

  float d[tile_m / 64][tile_n / 2];
  for (int step = 0; step < steps; ++step) {
    const int stage = step % stages;
    if (threadIdx.x == 0 && step + 1 < steps) load(step + 1);
    ptx::mbarrier_wait(&shared.full[stage], step / stages % 2);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < tile_m / 64; ++i)
      hopper::multiply_stage<tile_n, In, a_mn_major, b_mn_major>(d[i], shared.a[stage] + i * 64 * tile_k,
                                                                 shared.b[stage], step > 0);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    __syncthreads();  // all four warps are done with the stage: the load after next may fill it
  }
#pragma unroll
  for (int i = 0; i < tile_m / 64; ++i)
    hopper::store_fragment<tile_n>(epilogue, d[i], tile.batch, tile.row + i * 64, tile.column);
}

template <class In, bool a_mn_major, bool b_mn_major>
struct Step {
  static void launch(const Problem& p) {
    const hopper::Operands operands = hopper::describe(p, tile_m, tile_n);
    simt::launch(wgmma_kernel<In, a_mn_major, b_mn_major>,
                 simt::Launch{dim3(hopper::count_tiles(p, tile_m, tile_n)), dim3(hopper::warpgroup), sizeof(Shared<In>),
                              1, false, p.stream},
                 operands.a, operands.b, hopper::Sizes::of(p, operands), Epilogue<In, In>::of(p));
  }
};

}  // namespace

void wgmma_128x128_10(const Problem& p) { hopper::dispatch_same_type<Step>(p); }

}  // namespace matmul
