// Step 04: TMA and wgmma. Step 03 spent its time on the way from memory to the tensor cores: addresses, cp.async,
// ldmatrix, and mma.sync of 16 x 8 that each wait for their registers. Here one thread asks for a whole tile, and one
// instruction multiplies 64 queries by 128 keys out of shared memory.
//
// A block is one warpgroup with 64 queries. S = q k' takes both operands from shared memory; p stays in the registers
// where the softmax left it and is multiplied by V from there. Everything happens in turn: a block waits for a tile,
// multiplies, exponentiates, multiplies. What is to overlap must come from another block of the same multiprocessor.
// Takes bf16, head widths 64 and 128.
#include "attention/forward/hopper_forward.cuh"

namespace attention::forward {
namespace {

using namespace ladder;

constexpr int tile_queries = 64, tile_keys = 128;

template <int head_dim>
struct Shared {
  alignas(1024) T q[tile_elements(tile_queries, head_dim)];
  alignas(1024) T k[tile_elements(tile_keys, head_dim)];
  alignas(1024) T v[tile_elements(tile_keys, head_dim)];
  uint64_t full_q, full_k, full_v;
};

template <int rows, int head_dim>
PTX_INLINE void load(T* to, const CUtensorMap* map, uint64_t* full, int row, int head, int batch) {
  ptx::mbarrier_arrive_expect_tx(full, tile_bytes(rows, head_dim));
  hopper::load_tile<rows, head_dim>(to, map, full, row, head, batch);
}

template <int head_dim>
__global__ void __launch_bounds__(warpgroup)
    wgmma(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
          const __grid_constant__ CUtensorMap map_v, Sizes sizes, Rules rules, Output output) {
  auto& shared = simt::dynamic_shared<Shared<head_dim>>();
  const Tile tile = tile_of_block<tile_queries, tile_keys>(sizes, rules);
  if (tile.query < 0) return;
  const int batch = sizes.starts_q ? 0 : tile.batch, kv_head = sizes.kv_head(tile.head);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&shared.full_q, 1);
    ptx::mbarrier_init(&shared.full_k, 1);
    ptx::mbarrier_init(&shared.full_v, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0 && tile.count > 0)
    load<tile_queries, head_dim>(shared.q, &map_q, &shared.full_q, tile.query_row(), tile.head, batch);
  if (tile.count > 0) ptx::mbarrier_wait(&shared.full_q, 0);

  float o[head_dim / 2] = {};
  Softmax softmax;
#pragma unroll 1
  for (int i = 0; i < tile.count; ++i) {
    const int key = step_key<tile_keys>(tile, i);
    if (threadIdx.x == 0) {
      load<tile_keys, head_dim>(shared.k, &map_k, &shared.full_k, tile.key_row(key), kv_head, batch);
      load<tile_keys, head_dim>(shared.v, &map_v, &shared.full_v, tile.key_row(key), kv_head, batch);
    }
    float s[tile_keys / 2], factor[2];
    ptx::mbarrier_wait(&shared.full_k, i % 2);
    ptx::wgmma_fence();
    hopper::multiply_along_head<tile_keys, tile_queries, tile_keys, head_dim>(s, shared.q, 0, shared.k, 0);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();

    softmax_step<tile_keys>(s, softmax, factor, rules, tile, tile.query, key);
    multiply_rows<head_dim>(o, factor);
    uint32_t p[tile_keys / 16][4];
    to_operand<T, tile_keys>(s, p);
    ptx::mbarrier_wait(&shared.full_v, i % 2);
    ptx::wgmma_fence();
    hopper::multiply_along_rows<tile_keys, tile_keys, head_dim>(o, p, shared.v, 0);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    __syncthreads();  // all warps have waited: thread 0 may load over K and V
  }
  finish<head_dim>(o, softmax, rules, output, tile, tile.query);
}

}  // namespace

void wgmma_04(const Problem& p) {
  for_head_dim(p, [&](auto head_dim) {
    launch(wgmma<head_dim>, p, tile_queries, tile_keys, warpgroup, sizeof(Shared<head_dim>));
  });
}

}  // namespace attention::forward
