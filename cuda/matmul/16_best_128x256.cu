// Step 16, the tile of large products: 128 x 256, as step 12 had it.
#include "matmul/16_best.cuh"

namespace matmul::best {

void tile_128x256(const Problem& p, const Tiling& tiling) {
  if (tiling.cluster == 2) hopper::dispatch<Family<2, 256, 2>::Step>(p, tiling);
  else hopper::dispatch<Family<2, 256, 1>::Step>(p, tiling);
}

}  // namespace matmul::best
