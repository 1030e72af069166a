// Step 16, one consumer: for products with few tiles, and for few rows (64 x 256). 64 x 128 makes 128 tiles of 1024^2,
// and in clusters of two asks L2 for a third less.
#include "matmul/16_best.cuh"

namespace matmul::best {

void tile_64(const Problem& p, const Tiling& tiling) {
  if (tiling.tile_n == 256) hopper::dispatch_row_column<Family<1, 256, 1>::Step>(p, tiling);
  else if (tiling.tile_n == 128 && tiling.cluster == 2) hopper::dispatch_row_column<Family<1, 128, 2>::Step>(p, tiling);
  else if (tiling.tile_n == 128) hopper::dispatch_row_column<Family<1, 128, 1>::Step>(p, tiling);
  else hopper::dispatch<Family<1, 64, 1>::Step>(p, tiling);
}

}  // namespace matmul::best
