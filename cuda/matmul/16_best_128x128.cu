// Step 16, the tile of medium products: below about 1900, 128 x 256 leaves multiprocessors without work.
#include "matmul/16_best.cuh"

namespace matmul::best {

void tile_128x128(const Problem& p, const Tiling& tiling) {
  if (tiling.cluster == 2) hopper::dispatch<Family<2, 128, 2>::Step>(p, tiling);
  else hopper::dispatch<Family<2, 128, 1>::Step>(p, tiling);
}

}  // namespace matmul::best
