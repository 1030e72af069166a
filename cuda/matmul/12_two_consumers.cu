// Step 12: a tile of 128 x 256, each half of its rows multiplied by a warpgroup of its own. wgmma with n = 256 reads
// 2 KB of A and 8 KB of B in 128 clocks, 80 bytes a clock instead of 96, and L2 sends a quarter less for a FLOP. With
// what TMA writes, 48 bytes instead of 64, that is 128 bytes a clock: all that shared memory has.
//
// One warpgroup cannot hold 128 x 256 sums: 256 registers a thread and nothing left to count with. Two hold 128 each,
// and setmaxnreg moves registers to where they are needed: of 3 x 168 at the start, the producer keeps 24 and each
// consumer gets 240. That takes a whole warpgroup for the producer, of which one thread works.
#include "matmul/hopper_store.cuh"

namespace matmul {
namespace {

constexpr int consumers = 2, tile_m = 64 * consumers, tile_n = 256, stages = 4, tile_k = hopper::tile_k;
constexpr int threads = (consumers + 1) * hopper::warpgroup;

template <class In>
struct Shared {
  alignas(1024) In a[stages][tile_m * tile_k];
  alignas(1024) In b[stages][tile_n * tile_k];
  uint64_t full[stages], empty[stages];
};

template <class In, bool a_mn_major, bool b_mn_major>
__global__ void __launch_bounds__(threads, 1)
    two_consumers(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                  hopper::Sizes sizes, Epilogue<In, In> epilogue) {
  auto& shared = simt::dynamic_shared<Shared<In>>();
  const hopper::Tile tile = hopper::tile_by_rows<tile_m, tile_n>(sizes, blockIdx.x);
  const int steps = hopper::divide_up(sizes.k, tile_k);
  const int group = ptx::uniform(threadIdx.x / hopper::warpgroup);  // 0 is the producer
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      ptx::mbarrier_init(&shared.full[i], 1);
      ptx::mbarrier_init(&shared.empty[i], consumers);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  hopper::Cursor<stages> cursor;
  if (group == 0) {
    ptx::setmaxnreg_dec<24>();
    if (threadIdx.x != 0) return;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, cursor.advance()) {
      uint64_t* const full = &shared.full[cursor.stage];
      ptx::mbarrier_wait(&shared.empty[cursor.stage], cursor.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, (tile_m + tile_n) * tile_k * sizeof(In));
      hopper::load_rows<tile_m, a_mn_major>(shared.a[cursor.stage], &map_a, full, step * tile_k, tile.row,
                                            tile.batch * sizes.batch_a);
      hopper::load_rows<tile_n, b_mn_major>(shared.b[cursor.stage], &map_b, full, step * tile_k, tile.column,
                                            tile.batch * sizes.batch_b);
    }
  } else {
    ptx::setmaxnreg_inc<240>();
    float d[tile_n / 2];
    hopper::multiply_tile<tile_n, a_mn_major, b_mn_major>(d, shared, cursor, steps, group - 1, [&](int stage) {
      if (threadIdx.x % hopper::warpgroup == 0) ptx::mbarrier_arrive(&shared.empty[stage]);
    });
    hopper::store_fragment<tile_n>(epilogue, d, tile.batch, tile.row + (group - 1) * 64, tile.column);
  }
}

template <class In, bool a_mn_major, bool b_mn_major>
struct Step {
  static void launch(const Problem& p) {
    const hopper::Operands operands = hopper::describe(p, tile_m, tile_n);
    simt::launch(two_consumers<In, a_mn_major, b_mn_major>,
                 simt::Launch{dim3(hopper::count_tiles(p, tile_m, tile_n)), dim3(threads), sizeof(Shared<In>), 1, false,
                              p.stream},
                 operands.a, operands.b, hopper::Sizes::of(p, operands), Epilogue<In, In>::of(p));
  }
};

}  // namespace

void two_consumers_12(const Problem& p) { hopper::dispatch_same_type<Step>(p); }

}  // namespace matmul
