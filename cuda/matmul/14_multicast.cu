// Step 14: two blocks share what both need. The multiprocessors of a cluster run tiles one below the other, with the
// same 256 columns of B; each loads half of them and TMA's multicast delivers it to both. L2 sends 32 KB a stage and
// block instead of 48, and power that no longer goes there goes to the tensor cores. Larger clusters save less and
// wait more.
//
// A stage is filled by both blocks, so it must be empty in both: a consumer's arrival goes to both blocks' barriers. No
// block may leave while the other still arrives at its barriers or writes into its memory, and no instruction waits for
// arrivals that are on their way but the wait for their phase. So a producer waits for all of them before it leaves.
#include "matmul/hopper_store.cuh"

namespace matmul {
namespace {

constexpr int consumers = 2, tile_m = 64 * consumers, tile_n = 256, stages = 4, tile_k = hopper::tile_k;
constexpr int cluster = 2, part = tile_n / cluster;  // columns of B that a block loads
constexpr uint16_t both = (1 << cluster) - 1;
constexpr int group_rows = 8;  // of pairs of tiles, walked together
constexpr int threads = (consumers + 1) * hopper::warpgroup;

template <class In>
struct Shared {
  alignas(1024) In a[stages][tile_m * tile_k];
  alignas(1024) In b[stages][tile_n * tile_k];
  uint64_t full[stages], empty[stages];
};

template <class In, bool a_mn_major, bool b_mn_major>
__global__ void __launch_bounds__(threads, 1)
    multicast(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
              hopper::Sizes sizes, Epilogue<In, In> epilogue) {
  auto& shared = simt::dynamic_shared<Shared<In>>();
  const int rank = ptx::cluster_rank();
  const int pairs = hopper::count_tiles<tile_m * cluster, tile_n>(sizes);
  const int steps = hopper::divide_up(sizes.k, tile_k);
  const int group = ptx::uniform(threadIdx.x / hopper::warpgroup);  // 0 is the producer
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      ptx::mbarrier_init(&shared.full[i], 1);
      ptx::mbarrier_init(&shared.empty[i], consumers * cluster);
    }
    ptx::fence_mbarrier_init();
  }
  hopper::cluster_meet();  // the barriers of both blocks are ready

  hopper::Cursor<stages> cursor;
  if (group == 0) {
    ptx::setmaxnreg_dec<40>();
    if (threadIdx.x == 0) {
      for (int index = blockIdx.x / cluster; index < pairs; index += gridDim.x / cluster) {
        const hopper::Tile tile = hopper::tile_in_groups<tile_m * cluster, tile_n>(sizes, group_rows, index);
        const int row = tile.row + rank * tile_m;
#pragma unroll 1
        for (int step = 0; step < steps; ++step, cursor.advance()) {
          uint64_t* const full = &shared.full[cursor.stage];
          ptx::mbarrier_wait(&shared.empty[cursor.stage], cursor.parity ^ 1);
          ptx::mbarrier_arrive_expect_tx(full, (tile_m + tile_n) * tile_k * sizeof(In));
          hopper::load_rows<tile_m, a_mn_major>(shared.a[cursor.stage], &map_a, full, step * tile_k, row,
                                                tile.batch * sizes.batch_a);
          hopper::load_rows_multicast<part, b_mn_major>(shared.b[cursor.stage] + rank * part * tile_k, &map_b, full,
                                                        both, step * tile_k, tile.column + rank * part,
                                                        tile.batch * sizes.batch_b);
        }
      }
      hopper::drain<stages>(shared.empty, cursor);
    }
  } else {
    ptx::setmaxnreg_inc<232>();
    for (int index = blockIdx.x / cluster; index < pairs; index += gridDim.x / cluster) {
      const hopper::Tile tile = hopper::tile_in_groups<tile_m * cluster, tile_n>(sizes, group_rows, index);
      const int row = tile.row + rank * tile_m;
      float d[tile_n / 2];
      hopper::multiply_tile<tile_n, a_mn_major, b_mn_major>(d, shared, cursor, steps, group - 1, [&](int stage) {
        const uint32_t thread = threadIdx.x % hopper::warpgroup;
        if (thread < cluster) ptx::mbarrier_arrive_remote(&shared.empty[stage], thread);
      });
      hopper::store_fragment<tile_n>(epilogue, d, tile.batch, row + (group - 1) * 64, tile.column);
    }
  }
}

template <class In, bool a_mn_major, bool b_mn_major>
struct Step {
  static void launch(const Problem& p) {
    const hopper::Operands operands = hopper::describe(p, tile_m, part);
    const unsigned pairs = hopper::count_tiles(p, tile_m * cluster, tile_n);
    simt::launch(multicast<In, a_mn_major, b_mn_major>,
                 simt::Launch{dim3(hopper::persistent_blocks(pairs, cluster)), dim3(threads), sizeof(Shared<In>),
                              cluster, false, p.stream},
                 operands.a, operands.b, hopper::Sizes::of(p, operands), Epilogue<In, In>::of(p));
  }
};

}  // namespace

void multicast_14(const Problem& p) { hopper::dispatch_same_type<Step>(p); }

}  // namespace matmul
