// Step 11: a warp that only loads, a warpgroup that only multiplies. In step 10 the same threads did both in turn:
// after each stage the tensor cores stood still for a barrier, an arrival and the next issue. Now stages form a ring:
//   full[i]    one arrival and the bytes of a stage: the consumer may multiply it
//   empty[i]   one arrival of the consumer: the producer may fill it again
// The producer runs up to six stages ahead, and one thread does all of it: TMA needs no more. The consumer keeps two
// stages in the tensor cores, so that they have the next one before the last is done.
#include "matmul/hopper_store.cuh"

namespace matmul {
namespace {

constexpr int tile_m = 128, tile_n = 128, stages = 6, tile_k = hopper::tile_k;
constexpr int threads = hopper::warpgroup + 32;  // the consumer's four warps, then the producer's

template <class In>
struct Shared {
  alignas(1024) In a[stages][tile_m * tile_k];
  alignas(1024) In b[stages][tile_n * tile_k];
  uint64_t full[stages], empty[stages];
};

template <class In, bool a_mn_major, bool b_mn_major>
__global__ void __launch_bounds__(threads, 1)
    producer_consumer(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                      hopper::Sizes sizes, Epilogue<In, In> epilogue) {
  auto& shared = simt::dynamic_shared<Shared<In>>();
  const hopper::Tile tile = hopper::tile_by_rows<tile_m, tile_n>(sizes, blockIdx.x);
  const int steps = hopper::divide_up(sizes.k, tile_k);
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      ptx::mbarrier_init(&shared.full[i], 1);
      ptx::mbarrier_init(&shared.empty[i], 1);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  hopper::Cursor<stages> cursor;
  if (threadIdx.x >= hopper::warpgroup) {
    if (threadIdx.x != hopper::warpgroup) return;
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
    return;
  }

  float d[tile_m / 64][tile_n / 2];
  uint64_t* previous = nullptr;
#pragma unroll 1
  for (int step = 0; step < steps; ++step, cursor.advance()) {
    ptx::mbarrier_wait(&shared.full[cursor.stage], cursor.parity);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < tile_m / 64; ++i)
      hopper::multiply_stage<tile_n, In, a_mn_major, b_mn_major>(d[i], shared.a[cursor.stage] + i * 64 * tile_k,
                                                                 shared.b[cursor.stage], step > 0);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<1>();  // all but the stage just issued
    if (previous && threadIdx.x == 0) ptx::mbarrier_arrive(previous);
    previous = &shared.empty[cursor.stage];
  }
  ptx::wgmma_wait_group<0>();
#pragma unroll
  for (int i = 0; i < tile_m / 64; ++i)
    hopper::store_fragment<tile_n>(epilogue, d[i], tile.batch, tile.row + i * 64, tile.column);
}

template <class In, bool a_mn_major, bool b_mn_major>
struct Step {
  static void launch(const Problem& p) {
    const hopper::Operands operands = hopper::describe(p, tile_m, tile_n);
    simt::launch(producer_consumer<In, a_mn_major, b_mn_major>,
                 simt::Launch{dim3(hopper::count_tiles(p, tile_m, tile_n)), dim3(threads), sizeof(Shared<In>), 1, false,
                              p.stream},
                 operands.a, operands.b, hopper::Sizes::of(p, operands), Epilogue<In, In>::of(p));
  }
};

}  // namespace

void producer_consumer_11(const Problem& p) { hopper::dispatch_same_type<Step>(p); }

}  // namespace matmul
