// Step 15: the way out by TMA. Step 14 stored with the ordinary instructions: each warp computed 64 addresses a
// thread and wrote 4 bytes to each, in pieces of 16 bytes a row, while nothing was multiplied. Now sums leave as bf16
// through shared memory: stmatrix writes four 8 x 8 matrices at once, swizzled so that no bank is hit twice, and one
// lane starts the store. TMA writes whole rows of 128 bytes, cuts off what lies outside, and works while the next
// tile is multiplied.
//
// Two boxes of 2 KB a warp are enough, and leave room for four stages. An epilogue with more to do than to store, and
// a d that TMA cannot describe, take the same boxes the slow way.
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
  hopper::Boxes<2> boxes[consumers * 4];  // of each warp
  uint64_t full[stages], empty[stages];
};

template <class In, bool a_mn_major, bool b_mn_major>
__global__ void __launch_bounds__(threads, 1)
    tma_store(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
              const __grid_constant__ CUtensorMap map_d, bool describable,
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
    const int warp = ptx::uniform(threadIdx.x / 32 % 4);
    const bool by_tma = describable && epilogue.plain();
    hopper::Boxes<2>& boxes = shared.boxes[(group - 1) * 4 + warp];
    for (int index = blockIdx.x / cluster; index < pairs; index += gridDim.x / cluster) {
      const hopper::Tile tile = hopper::tile_in_groups<tile_m * cluster, tile_n>(sizes, group_rows, index);
      const int row = tile.row + rank * tile_m;
      float d[tile_n / 2];
      hopper::multiply_tile<tile_n, a_mn_major, b_mn_major>(d, shared, cursor, steps, group - 1, [&](int stage) {
        const uint32_t thread = threadIdx.x % hopper::warpgroup;
        if (thread < cluster) ptx::mbarrier_arrive_remote(&shared.empty[stage], thread);
      });
      const int top = row + (group - 1) * 64 + warp * 16;
      if (by_tma) hopper::store_boxes<tile_n, In>(&map_d, boxes, d, top, tile.column, tile.batch);
      else hopper::store_through_boxes<tile_n>(epilogue, boxes, d, top, tile.column, tile.batch);
    }
    if (by_tma && threadIdx.x % 32 == 0) ptx::bulk_wait_group<0>();  // shared memory must outlive its last store
  }
}

template <class In, bool a_mn_major, bool b_mn_major>
struct Step {
  static void launch(const Problem& p) {
    const hopper::Operands operands = hopper::describe(p, tile_m, part);
    const unsigned pairs = hopper::count_tiles(p, tile_m * cluster, tile_n);
    simt::launch(tma_store<In, a_mn_major, b_mn_major>,
                 simt::Launch{dim3(hopper::persistent_blocks(pairs, cluster)), dim3(threads), sizeof(Shared<In>),
                              cluster, false, p.stream},
                 operands.a, operands.b, hopper::output_map(p), hopper::output_describable(p),
                 hopper::Sizes::of(p, operands), Epilogue<In, In>::of(p));
  }
};

}  // namespace

void tma_store_15(const Problem& p) { hopper::dispatch_same_type<Step>(p); }

}  // namespace matmul
