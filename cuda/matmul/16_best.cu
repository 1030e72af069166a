// Step 16, the entrance: which member of the family a Tiling names. Refused: shapes that were not built (matmul.h).
#include "matmul/16_best.cuh"

namespace matmul {

void best_16(const Problem& p, const Tiling& tiling) {
  const int tile_m = tiling.tile_m, tile_n = tiling.tile_n, cluster = tiling.cluster, split_k = tiling.split_k;
  const auto is = [&](int m, int n) { return tile_m == m && tile_n == n; };
  const bool family = cluster == 1 || cluster == 2, plain = split_k == 1;
  if (tiling.raster < 0 || tiling.stagger < 0 || tiling.stagger > 2)
    hopper::refuse("raster " + std::to_string(tiling.raster) + " and stagger " + std::to_string(tiling.stagger) +
                   ", expected 0 or more and 0, 1 or 2");
  if (plain && family && is(128, 256)) best::tile_128x256(p, tiling);
  else if (plain && family && is(128, 128)) best::tile_128x128(p, tiling);
  else if (plain && family && is(128, 192)) best::tile_128x192(p, tiling);
  else if (plain && family && is(192, 192)) best::tile_192x192(p, tiling);
  else if (plain && (cluster == 1 || (cluster == 2 && is(64, 128))) && (is(64, 256) || is(64, 128) || is(64, 64)))
    best::tile_64(p, tiling);
  else if ((split_k == 2 || split_k == 4 || split_k == 8) && is(128, 128)) best::split_128x128(p, tiling);
  else if ((split_k == 2 || split_k == 4) && is(64, 64)) best::split_64x64(p, tiling);
  else
    hopper::refuse("no tile of " + std::to_string(tile_m) + " x " + std::to_string(tile_n) + " with cluster " +
                   std::to_string(cluster) + " and split_k " + std::to_string(split_k) +
                   " was built: matmul.h lists those that are");
}

}  // namespace matmul
