// What steps 01 to 03 share on the host and before their loops: which tile of which head a block has, and the choice of
// the kernel for a head width.
#pragma once
#include <string>
#include <type_traits>

#include "attention/softmax.cuh"

namespace attention::forward {

// Blocks count along x alone (y and z end at 65535): tiles of queries first, then heads, then sequences. Under a causal
// rule the last queries see the most keys; a grid that starts with them ends with short blocks, and all end together.
struct Block {
  int first_query, head, b;
};
__device__ __forceinline__ Block block_of(const Sizes& sizes, int tile) {
  const int tiles = divide_up(sizes.queries, tile), rest = int(blockIdx.x) / tiles;
  return {(tiles - 1 - int(blockIdx.x) % tiles) * tile, rest % sizes.heads, rest / sizes.heads};
}
inline simt::Launch grid_of_tiles(const Problem& p, int tile, int threads, size_t shared_bytes) {
  simt::Launch launch{dim3(unsigned(divide_up(p.queries, tile)) * p.heads * p.batch), dim3(threads), shared_bytes};
  launch.stream = p.stream;
  return launch;
}

// Calls start(head_dim), a constant.
template <class Start>
void for_head_dim(const Problem& p, const char* step, Start start) {
  switch (p.head_dim) {
    case 64: return start(std::integral_constant<int, 64>());
    case 96: return start(std::integral_constant<int, 96>());
    case 128: return start(std::integral_constant<int, 128>());
    case 192: return start(std::integral_constant<int, 192>());
    case 256: return start(std::integral_constant<int, 256>());
  }
  refuse(std::string(step) + ": head width " + std::to_string(p.head_dim) + " of q: expected 64, 96, 128, 192 or 256");
}

}  // namespace attention::forward
