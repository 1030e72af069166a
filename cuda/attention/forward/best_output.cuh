// Steps 08 and 09: from accumulators to memory through shared memory. TMA empties it while the next tile is computed.
#pragma once
#include "attention/forward/best_schedule.cuh"
#include "attention/hopper.cuh"

namespace attention::forward::best {

// A warp's 16 x head_dim accumulators into its rows of a tile of 64 rows, swizzled as TMA stores them.
template <int head_dim, class T>
PTX_INLINE void fill_rows(T* tile, const float (&d)[head_dim / 2]) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % hopper::warpgroup / 32 * 16 + lane % 16;
  unsigned char* const line = reinterpret_cast<unsigned char*>(tile + row * 64);
#pragma unroll
  for (int i = 0; i < head_dim / 2; i += 8) {  // 16 columns: four 8 x 8 matrices, in the order that lanes point at rows
    uint32_t four[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) four[j] = pack<T>(d[i + 2 * j], d[i + 2 * j + 1]);
    ptx::stmatrix_x4(line + i / 32 * 64 * 128 + ((i % 32 * 4 + lane / 16 * 16) ^ (row % 8 << 4)), four);
  }
}

// A consumer's 64 rows, from `row` of the tile's sequence on, to memory. Each warp looks after its own 16 and waits for
// no other. `staged` is their place in shared memory; `map` describes boxes of 16 rows. Behind the last row of a tensor
// TMA writes nothing. Behind that of a packed sequence lies the next: there threads store the rows that there are.
template <int head_dim, class T>
PTX_INLINE void store_output(T* staged, const CUtensorMap* map, const Rows<T>& out, const Tile& tile, int row,
                             bool packed, const float (&o)[head_dim / 2]) {
  const int warp = ptx::uniform(threadIdx.x % hopper::warpgroup / 32), first = row + 16 * warp;
  const int place = tile.s.first_query + first, plane = packed ? 0 : tile.batch;
  if (packed && first + 16 > tile.s.queries) {
    hopper::store_rows<head_dim>(o, out.at(0, tile.s.first_query + row, tile.head), out.row, tile.s.queries - row);
    return;
  }
  if (threadIdx.x % 32 == 0) ptx::bulk_wait_group_read<0>();  // what was staged here before has left
  __syncwarp();
  fill_rows<head_dim>(staged, o);
  ptx::fence_proxy_async();  // each lane makes its own writes visible to TMA
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int box = 0; box < hopper::boxes_of(head_dim); ++box)
      ptx::tma_store(map, staged + (box * 64 + 16 * warp) * 64, 64 * box, place, tile.head, plane);
    ptx::bulk_commit_group();
  }
}

}  // namespace attention::forward::best
