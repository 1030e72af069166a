// Step 09: the units of Hopper. TMA copies whole tiles, swizzled and bounds-checked, at one thread's word; wgmma
// multiplies them straight from shared memory by four warps at once, so no register holds an operand any more.
//
// mma.sync (08) was limited by the instructions around it: each operand passed through ldmatrix and registers. Here a
// 64 x 64 tile of d takes one warpgroup and two stages: the next tile of k travels while this one is multiplied.
// wgmma with n = 64 reads 128 bytes of shared memory a clock, all there is, and TMA has to write as many for a tile so
// small. So the next step's tile is larger.
#include "matmul/hopper_store.cuh"

namespace matmul {
namespace {

constexpr int tile_m = 64, tile_n = 64, stages = 2, tile_k = hopper::tile_k;

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

  float d[tile_n / 2];
  for (int step = 0; step < steps; ++step) {
    const int stage = step % stages;
    if (threadIdx.x == 0 && step + 1 < steps) load(step + 1);
    ptx::mbarrier_wait(&shared.full[stage], step / stages % 2);
    ptx::wgmma_fence();
    hopper::multiply_stage<tile_n, In, a_mn_major, b_mn_major>(d, shared.a[stage], shared.b[stage], step > 0);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    __syncthreads();  // all four warps are done with the stage: the load after next may fill it
  }
  hopper::store_fragment<tile_n>(epilogue, d, tile.batch, tile.row, tile.column);
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

void wgmma_09(const Problem& p) { hopper::dispatch_same_type<Step>(p); }

}  // namespace matmul
