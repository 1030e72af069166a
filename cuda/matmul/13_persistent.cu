// Step 13: blocks that stay. Step 12 started a block for each tile: between two tiles its multiprocessor set up
// barriers, waited a trip to memory for the first stage, and had nothing to multiply while the last tile was stored.
// One block a multiprocessor walks over tiles instead, and its ring runs on across them: the first stages of a tile
// are loaded while the one before is multiplied and stored.
//
// Which tiles run at the same time is now ours to say. At 8192, 132 blocks by rows are 4 rows of tiles: together they
// want 528 rows of A and all 8192 columns of B. Walked in groups of 16 rows, 128 of them form a patch of 16 x 8 tiles,
// 2048 rows and 2048 columns, less than half. So the grid has no more blocks than the last round needs: 128 here.
#include "matmul/hopper_store.cuh"

namespace matmul {
namespace {

constexpr int consumers = 2, tile_m = 64 * consumers, tile_n = 256, stages = 4, tile_k = hopper::tile_k;
constexpr int group_rows = 16;  // of tiles, walked together
constexpr int threads = (consumers + 1) * hopper::warpgroup;

template <class In>
struct Shared {
  alignas(1024) In a[stages][tile_m * tile_k];
  alignas(1024) In b[stages][tile_n * tile_k];
  uint64_t full[stages], empty[stages];
};

template <class In, bool a_mn_major, bool b_mn_major>
__global__ void __launch_bounds__(threads, 1)
    persistent(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
               hopper::Sizes sizes, Epilogue<In, In> epilogue) {
  auto& shared = simt::dynamic_shared<Shared<In>>();
  const int tiles = hopper::count_tiles<tile_m, tile_n>(sizes);
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
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
      const hopper::Tile tile = hopper::tile_in_groups<tile_m, tile_n>(sizes, group_rows, index);
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
    }
  } else {
    ptx::setmaxnreg_inc<240>();
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
      const hopper::Tile tile = hopper::tile_in_groups<tile_m, tile_n>(sizes, group_rows, index);
      float d[tile_n / 2];
      hopper::multiply_tile<tile_n, a_mn_major, b_mn_major>(d, shared, cursor, steps, group - 1, [&](int stage) {
        if (threadIdx.x % hopper::warpgroup == 0) ptx::mbarrier_arrive(&shared.empty[stage]);
      });
      hopper::store_fragment<tile_n>(epilogue, d, tile.batch, tile.row + (group - 1) * 64, tile.column);
    }
  }
}

template <class In, bool a_mn_major, bool b_mn_major>
struct Step {
  static void launch(const Problem& p) {
    const hopper::Operands operands = hopper::describe(p, tile_m, tile_n);
    const unsigned tiles = hopper::count_tiles(p, tile_m, tile_n);
    simt::launch(persistent<In, a_mn_major, b_mn_major>,
                 simt::Launch{dim3(hopper::persistent_blocks(tiles, 1)), dim3(threads), sizeof(Shared<In>), 1, false,
                              p.stream},
                 operands.a, operands.b, hopper::Sizes::of(p, operands), Epilogue<In, In>::of(p));
  }
};

}  // namespace

void persistent_13(const Problem& p) { hopper::dispatch_same_type<Step>(p); }

}  // namespace matmul
