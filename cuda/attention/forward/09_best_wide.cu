// Step 09, head widths 192 and 256.
#include "attention/forward/best.cuh"

namespace attention::forward::best {

void best_192(const Problem& p) { launch_width<Best09, 192>(p); }
void best_256(const Problem& p) { launch_width<Best09, 256>(p); }

}  // namespace attention::forward::best
