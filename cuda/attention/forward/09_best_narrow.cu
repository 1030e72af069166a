// Step 09, head widths 64 and 96.
#include "attention/forward/best.cuh"

namespace attention::forward::best {

void best_64(const Problem& p) { launch_width<Best09, 64>(p); }
void best_96(const Problem& p) { launch_width<Best09, 96>(p); }

}  // namespace attention::forward::best
