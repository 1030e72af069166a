// Step 16 for products with few tiles and a long k: the blocks of a cluster multiply slices of k of one tile and add
// up in each other's shared memory. Nothing goes through global memory, no second kernel, no workspace, and the order
// of the sum is always the same.
//
// Each block finishes some of the tile's columns, 16 at a time. A thread's sums have the same places in all blocks,
// so a thread sends those of others' columns as they are to the thread of the same number: 16 bytes a lane, no index
// but its own. A block has one tile; nothing is left to overlap with, so the ring and the registers are those of the
// block's start.
#pragma once
#include "matmul/16_best.cuh"

namespace matmul::best {

template <class In, int consumers_, int tile_n_>
struct SplitShape {
  static constexpr int consumers = consumers_, tile_m = 64 * consumers, tile_n = tile_n_, units = tile_n / 16;
  static constexpr int threads = (consumers + 1) * hopper::warpgroup;
  static constexpr int stage_bytes = (tile_m + tile_n) * tile_k * int(sizeof(In));
  static constexpr int received_bytes = tile_m * tile_n * int(sizeof(float));
  static constexpr int budget = 227 * 1024 - 1024 - received_bytes - consumers * 4 * hopper::Boxes<1>::bytes;
  static constexpr int stages = budget / stage_bytes < 8 ? budget / stage_bytes : 8;

  struct Shared {
    alignas(1024) In a[stages][tile_m * tile_k];
    alignas(1024) In b[stages][tile_n * tile_k];
    hopper::Boxes<1> box[consumers * 4];
    float4 received[units][2][consumers * hopper::warpgroup];  // [sender's turn * own units + unit]
    uint64_t full[stages], empty[stages];
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "shared memory of a block");
};

template <class In, class S, bool a_mn_major, bool b_mn_major>
__global__ void __launch_bounds__(S::threads, 1)
    split(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b, hopper::Sizes sizes,
          EitherEpilogue<In> epilogue, int slices) {
  auto& shared = simt::dynamic_shared<typename S::Shared>();
  const int rank = ptx::cluster_rank(), group = ptx::uniform(threadIdx.x / hopper::warpgroup);  // 0 is the producer
  const hopper::Tile tile = hopper::tile_by_rows<S::tile_m, S::tile_n>(sizes, blockIdx.x / slices);
  const int steps = divide_up(sizes.k, tile_k), first = int(int64_t(steps) * rank / slices);
  const int count = int(int64_t(steps) * (rank + 1) / slices) - first;
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&map_a);
    ptx::prefetch_tensor_map(&map_b);
    for (int i = 0; i < S::stages; ++i) {
      ptx::mbarrier_init(&shared.full[i], 1);
      ptx::mbarrier_init(&shared.empty[i], S::consumers);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::cluster_arrive_relaxed();  // this block has started: others may write here
  ptx::griddepcontrol_wait();

  hopper::Cursor<S::stages> cursor;
  if (group == 0) {
    if (threadIdx.x == 0) {
#pragma unroll 1
      for (int step = first; step < first + count; ++step, cursor.advance()) {
        uint64_t* const full = &shared.full[cursor.stage];
        ptx::mbarrier_wait(&shared.empty[cursor.stage], cursor.parity ^ 1);
        ptx::mbarrier_arrive_expect_tx(full, S::stage_bytes);
        hopper::load_rows<S::tile_m, a_mn_major>(shared.a[cursor.stage], &map_a, full, step * tile_k, tile.row,
                                                 tile.batch * sizes.batch_a);
        hopper::load_rows<S::tile_n, b_mn_major>(shared.b[cursor.stage], &map_b, full, step * tile_k, tile.column,
                                                 tile.batch * sizes.batch_b);
      }
      ptx::griddepcontrol_launch_dependents();
    }
    __syncwarp();
    ptx::cluster_wait();
    hopper::cluster_meet();  // these threads have sent nothing
    return;
  }

  const int consumer = group - 1, thread = threadIdx.x - hopper::warpgroup;
  const int own_units = S::units / slices;  // a power of two, as both are
  const int own_bits = __ffs(own_units) - 1;
  float d[S::tile_n / 2];
  hopper::multiply_tile<S::tile_n, a_mn_major, b_mn_major>(d, shared, cursor, count, consumer, [&](int stage) {
    if (thread % hopper::warpgroup == 0) ptx::mbarrier_arrive(&shared.empty[stage]);
  });
  ptx::cluster_wait();
#pragma unroll
  for (int i = 0; i < S::units; ++i) {
    const int owner = i >> own_bits;
    if (owner == rank) continue;
    const int turn = rank - (rank > owner);  // among those who send to the owner
    auto& to = shared.received[turn * own_units + (i & (own_units - 1))];
    *ptx::map_shared_rank(&to[0][thread], owner) = make_float4(d[8 * i], d[8 * i + 1], d[8 * i + 2], d[8 * i + 3]);
    *ptx::map_shared_rank(&to[1][thread], owner) = make_float4(d[8 * i + 4], d[8 * i + 5], d[8 * i + 6], d[8 * i + 7]);
  }
  ptx::cluster_sync();  // all have sent, and have arrived
#pragma unroll
  for (int i = 0; i < S::units; ++i) {
    if (i >> own_bits != rank) continue;
#pragma unroll 1
    for (int turn = 0; turn + 1 < slices; ++turn) {
      const auto& from = shared.received[turn * own_units + (i & (own_units - 1))];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 x = from[half][thread];
        d[8 * i + 4 * half] += x.x, d[8 * i + 4 * half + 1] += x.y;
        d[8 * i + 4 * half + 2] += x.z, d[8 * i + 4 * half + 3] += x.w;
      }
    }
  }
  const int warp = thread / 32;
  hopper::store_through_boxes<S::tile_n>(epilogue, shared.box[warp], d, tile.row + warp * 16, tile.column, tile.batch,
                                         rank * own_units * 16, (rank + 1) * own_units * 16);
}

template <int consumers, int tile_n>
struct Split {
  template <class In, bool a_mn_major, bool b_mn_major>
  struct Step {
    static void launch(const Problem& p, Tiling tiling) {
      using S = SplitShape<In, consumers, tile_n>;
      const hopper::Operands operands = hopper::describe(p, S::tile_m, tile_n);
      int slices = tiling.split_k;  // each needs a stage to multiply
      while (slices > (p.k + tile_k - 1) / tile_k) slices /= 2;
      const unsigned blocks = hopper::count_tiles(p, S::tile_m, tile_n) * slices;
      simt::launch(split<In, S, a_mn_major, b_mn_major>,
                   simt::Launch{dim3(blocks), dim3(S::threads), sizeof(typename S::Shared), unsigned(slices), false,
                                p.stream, true},
                   operands.a, operands.b, hopper::Sizes::of(p, operands), EitherEpilogue<In>::of(p), slices);
    }
  };
};

}  // namespace matmul::best
