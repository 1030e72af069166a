// Step 16, tiles for sizes that others fit badly: 3072 makes 2.2 rounds of 128 x 256 tiles on 132 multiprocessors,
// 2.9 of 128 x 192 and 1.9 of 192 x 192. Only a row-major and b transposed.
#include "matmul/16_best.cuh"

namespace matmul::best {

void tile_128x192(const Problem& p, const Tiling& tiling) {
  if (tiling.cluster == 2) hopper::dispatch_row_column<Family<2, 192, 2>::Step>(p, tiling);
  else hopper::dispatch_row_column<Family<2, 192, 1>::Step>(p, tiling);
}
void tile_192x192(const Problem& p, const Tiling& tiling) {
  if (tiling.cluster == 2) hopper::dispatch_row_column<Family<3, 192, 2>::Step>(p, tiling);
  else hopper::dispatch_row_column<Family<3, 192, 1>::Step>(p, tiling);
}

}  // namespace matmul::best
