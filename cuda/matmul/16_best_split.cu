// Step 16, the tiles whose k is shared by a cluster.
#include "matmul/16_split.cuh"

namespace matmul::best {

void split_128x128(const Problem& p, const Tiling& tiling) { hopper::dispatch<Split<2, 128>::Step>(p, tiling); }
void split_64x64(const Problem& p, const Tiling& tiling) { hopper::dispatch<Split<1, 64>::Step>(p, tiling); }

}  // namespace matmul::best
